"""A map of numbers as a picture in colors, with a scale."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scorematch.data.pictures import as_picture

_HEIGHT = 256  # pixels of the shorter side of a map, at least; each value becomes a square
_COLORS = ((0, 0, 0), (96, 0, 128), (224, 48, 64), (255, 176, 32), (255, 255, 224))  # from 0 to the largest value
_BAR, _TEXT = 16, 48  # the widths of the scale and of its numbers


def heat_map(values: Tensor) -> Tensor:
    """A picture of values that are at least 0, in colors from black at 0 to white at the largest, with their scale.

    Args:
        values: (H, W).

    Returns:
        The picture (3, H', W') in [0, 1]. Each value is a square of pixels, so that the shorter side has at least 256.
    """
    from PIL import ImageDraw

    most = float(values.max())
    factor = math.ceil(_HEIGHT / min(values.shape))
    enlarged = values.double().cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    height = len(enlarged)
    bar = torch.linspace(1, 0, height, dtype=torch.float64)[:, None].expand(-1, _BAR)
    space = torch.zeros(height, _BAR // 2, dtype=torch.float64)
    share = torch.cat([enlarged / most if most else enlarged, space, bar, torch.zeros(height, _TEXT)], 1)
    table = torch.tensor(_COLORS, dtype=torch.float64)
    place = share.clamp(0, 1) * (len(table) - 1)
    low = place.long().clamp(max=len(table) - 2)
    colors = torch.lerp(table[low], table[low + 1], (place - low)[..., None])
    picture = as_picture(colors.round().to(torch.uint8).numpy())
    drawing = ImageDraw.Draw(picture)
    left = share.shape[1] - _TEXT + 4
    for value, y in ((most, 0), (most / 2, height // 2 - 6), (0.0, height - 12)):
        drawing.text((left, y), f"{value:.2g}", fill="white")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
