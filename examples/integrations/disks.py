"""The data of these examples, in place of your own images."""

import torch
from torch import Tensor


def disks(n: int, seed: int = 0) -> Tensor:
    """Draws images (n, 1, 16, 16) in [0, 1], each with a white disk of a random radius at a random place."""
    uniform = torch.rand(3, n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    row, column, radius = 6 + 3 * uniform[0], 6 + 3 * uniform[1], 2 + 2 * uniform[2]
    pixels = torch.arange(16.0)
    distance = ((pixels[:, None] - row).square() + (pixels - column).square()).sqrt()
    return (radius - distance + 0.5).clamp(0, 1)
