"""Random changes of the training data.

The first three keep the distribution of data that have the symmetry; the network is not told of them.

=========  ==========================================================  ===============================================
name       change                                                      symmetry
=========  ==========================================================  ===============================================
"flip"     mirror the last axis with probability 1/2                   left and right, as in most photographs
"rotate"   turn the last two axes by 0, 90, 180 or 270 degrees         no direction, as in isotropic fields; both axes
                                                                       must have the same length
"shift"    shift every axis periodically by any number of values       periodic and homogeneous data
=========  ==========================================================  ===============================================

"nonleaking" needs no symmetry: images are changed, and the network is told how (``scorematch.training.nonleaking``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.data.array_data import ArrayData
from scorematch.data.images import Data
from scorematch.data.pictures import is_picture
from scorematch.nets.image_network import ImageNetwork
from scorematch.score import ScoreNet

Augmentation = Literal["flip", "rotate", "shift", "nonleaking"]
AUGMENTATIONS = get_args(Augmentation)


def augmentations(net: ScoreNet, data: Data, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the changes; None is "flip" for pictures, and no change for other data.

    Raises:
        ValueError: if the data do not have the axes, or the network cannot be told of the changes.
    """
    if asked is None:
        pictures = is_picture(data.shape) and not isinstance(data, ArrayData)
        return ("flip",) if pictures and net.units is None else ()
    sides = data.shape[1:]
    for name in asked:
        if not sides or (name == "rotate" and (len(sides) < 2 or sides[-1] != sides[-2])):
            wanted = "two last axes of the same length" if name == "rotate" else "axes after the channels"
            raise ValueError(
                f"{argument('augment', name)} needs data with {wanted}, got samples of shape {tuple(data.shape)}."
            )
        if name == "nonleaking" and isinstance(data, ArrayData) and data.channels:
            raise ValueError(f"{argument('augment', name)} is for data without an image as their condition.")
        if name == "nonleaking" and not (len(sides) == 2 and can_be_told(net)):
            raise ValueError(
                f"{argument('augment', name)} needs images (C, H, W) and a U-Net or NCSN++, which is told how they "
                f"were changed, got samples of shape {tuple(data.shape)} and {type(net.backbone).__name__}."
            )
    return tuple(asked)


def can_be_told(net: ScoreNet) -> bool:
    """Whether a network can be told how its images were changed: U-Nets and NCSN++ can."""
    return isinstance(net.backbone, ImageNetwork)


def augmented(x: Tensor, names: Sequence[str], u: Tensor) -> Tensor:
    """Changes samples.

    Args:
        x: (n, C, ...).
        names: the names of the changes.
        u: random numbers in [0, 1) for each sample, (n, 2 + the number of axes after the channels).
    """
    if "flip" in names:
        x = torch.where(u[:, 0].view(-1, *[1] * (x.ndim - 1)) < 0.5, x.flip(-1), x)
    if "rotate" in names:
        x = torch.stack([each.rot90(int(4 * turns), (-2, -1)) for each, turns in zip(x, u[:, 1], strict=True)])
    if "shift" in names:
        steps = (u[:, 2:] * torch.tensor(x.shape[2:])).long()
        axes = tuple(range(1, x.ndim - 1))
        x = torch.stack([each.roll(by.tolist(), axes) for each, by in zip(x, steps, strict=True)])
    return x
