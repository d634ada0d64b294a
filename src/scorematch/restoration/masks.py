"""Random masks, True where an image is missing, as in the training of Palette.

References:
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826.
    Yu et al., 2019, Free-Form Image Inpainting with Gated Convolution, arXiv:1806.03589, Alg. 1 (the strokes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Draws:
    """Random float32 numbers, drawn on the generator's device, or on the images' device without a generator."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator = generator
        self.device = device if generator is None else generator.device

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def choices(self, weights: Tensor, n: int) -> Tensor:
        """Indices (n,), with probabilities proportional to the weights."""
        return torch.multinomial(weights.float(), n, replacement=True, generator=self.generator)


def strokes(n: int, height: int, width: int, draws: Draws) -> Tensor:
    """Masks (n, height, width) of thick lines with random corners, after Yu et al.

    Their sizes for images of 256 x 256 pixels are scaled by the length of the diagonal. Each line is a zigzag to the
    left or to the right whose segments go up and down in turn; the side and the first direction are random.
    """
    diagonal = math.hypot(height, width)
    pixel = diagonal / math.hypot(256, 256)
    count = draws.integers(1, 4, n, 1)
    corners = draws.integers(4, 12, n, 3)
    # The center of a pixel is within sqrt(1/2) of every point, so that no line of this radius is empty.
    radius = (pixel * (12 + 28 * draws.uniform(n, 3)) / 2).clamp(min=math.sqrt(0.5))
    angle = 2 * math.pi * (1 / 5 + (2 * draws.uniform(n, 3, 10) - 1) / 15)
    angle[..., ::2] *= -1
    length = (diagonal / 8 * (1 + draws.normal(n, 3, 10) / 2)).clamp(0, diagonal / 4)
    side = 2 * draws.integers(0, 2, n, 3, 1, 2) - 1
    step = side * length[..., None] * torch.stack([angle.cos(), angle.sin()], -1)  # (n, 3, 10, 2): right and down
    size = torch.tensor([width, height], device=draws.device)
    corner = size * draws.uniform(n, 3, 2)

    column = torch.arange(width, device=draws.device) + 0.5
    row = torch.arange(height, device=draws.device)[:, None] + 0.5
    lines = torch.zeros(n, 3, height, width, dtype=torch.bool, device=draws.device)
    for i in range(10):
        following = (corner + step[:, :, i]).clamp(min=0).minimum(size)
        ax, ay = corner[..., None, None].unbind(2)
        dx, dy = (following - corner)[..., None, None].unbind(2)
        share = ((column - ax) * dx + (row - ay) * dy) / (dx * dx + dy * dy).clamp(min=1e-9)
        share = share.clamp(0, 1)  # position on the segment of the point nearest to the pixel: 0 is a, 1 its end
        distance = (column - ax - share * dx).square() + (row - ay - share * dy).square()
        lines |= (distance <= radius.square()[..., None, None]) & (i < corners - 1)[..., None, None]
        corner = following
    drawn = torch.arange(3, device=draws.device) < count
    mask = (lines & drawn[..., None, None]).any(1)
    # Three long thick lines may cover a small image completely, but one line covers only one of a few pixels.
    return torch.where(mask.all(2).all(1)[:, None, None], lines[:, 0], mask)


def boxes(n: int, height: int, width: int, draws: Draws) -> Tensor:
    """Masks (n, height, width) of one to five boxes, which together cover 10 to 40 % of the area."""
    column = torch.arange(width, device=draws.device)
    row = torch.arange(height, device=draws.device)[:, None]
    mask = torch.zeros(n, height, width, dtype=torch.bool, device=draws.device)
    wrong = torch.arange(n, device=draws.device)
    while len(wrong):  # boxes overlap and have whole pixels: those whose area is out of range are drawn again
        n = len(wrong)
        share = (draws.uniform(n, 5) + 0.5) * (torch.arange(5, device=draws.device) < draws.integers(1, 6, n, 1))
        area = (0.1 + 0.3 * draws.uniform(n, 1)) * share / share.sum(1, keepdim=True)
        aspect = torch.exp2(2 * draws.uniform(n, 5) - 1)  # from 1/2 to 2
        tall = (height * (area * aspect).sqrt()).round().clamp(max=height)
        wide = (width * (area / aspect).sqrt()).round().clamp(max=width)
        top = (draws.uniform(n, 5) * (height - tall + 1)).floor()
        left = (draws.uniform(n, 5) * (width - wide + 1)).floor()
        top, tall, left, wide = (value[..., None, None] for value in (top, tall, left, wide))
        boxes = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
        mask[wrong] = boxes.any(1)
        covered = mask[wrong].float().mean((1, 2))
        wrong = wrong[(covered < 0.1) | (covered > 0.4)]
    return mask


def halves(n: int, height: int, width: int, draws: Draws) -> Tensor:
    """Masks (n, height, width) of half of the area: at one of the four sides, or all around a box in the middle."""
    row = torch.arange(height, device=draws.device)[:, None].expand(height, width)
    column = torch.arange(width, device=draws.device).expand(height, width)
    tall = round(height / math.sqrt(2))
    wide = round(height * width / (2 * tall))
    top, left = (height - tall) // 2, (width - wide) // 2
    middle = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    masks = torch.stack(
        [row < height // 2, row >= height - height // 2, column < width // 2, column >= width - width // 2, ~middle]
    )
    side = draws.integers(0, 4, n)
    around = draws.integers(0, 2, n).bool()
    return masks[torch.where(around, 4, side)]
