r"""Palette's restoration tasks as training data: of clean images, what a conditional network is shown of them.

Palette (Saharia et al. 2022) restores images with a network that sees the degraded image beside the noisy one on the
channels, :math:`s(x, \sigma, c)`, trained by denoising score matching on pairs. A task makes the pair's other half:
``condition, region = task(x)``, the degraded image c and where the loss counts.

===============  ========================  =====================================================  ================
task             condition                 drawn for each image                                   region
===============  ========================  =====================================================  ================
Colorization     luma, on three channels   nothing                                                everywhere
Inpainting       x, noise in the hole      60 %: free-form strokes; 40 %: 1 to 5 boxes, 10 to     the hole
                                           40 % of the area in all
Uncropping       x, noise in the hole      half of the area, at one side or around, alike often   the hole
JPEGRestoration  x through the codec       quality Q, 5 to 30, as exp(-Q / 10)                    everywhere
MultiTask        one of its tasks'         the task                                               that task's
===============  ========================  =====================================================  ================

There is no channel for the mask and none for the task: the condition says it. A hole is filled with standard normal
noise in the paper's units, images in [-1, 1]; in [0, 1] that is noise of deviation 1/2 around 1/2 (``fill``). Sizes
are relative to the image, so that a mask is of the same kind at 16 pixels and at 256, square or not.

Training is one line, and so is sampling, where ``Observation`` makes the promise hard, "the prediction only in the
hole"::

    condition, region = task(x)
    loss = dsm_loss(net, x, condition=condition, region=region)

    seen = Observation(Mask(~region), x)
    restored = AncestralSampler(net).sample(condition=condition, observation=seen)

Of images that were degraded by others, ``condition_of`` makes the condition.

References:
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826.
    Yu et al., 2019, Free-Form Image Inpainting with Gated Convolution, arXiv:1806.03589, Alg. 1 (the strokes).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scorematch.observe import JPEG, Grayscale, Operator

Degradation = Callable[[Tensor, torch.Generator | None], tuple[Tensor, Tensor]]

_SMALLEST_SIDE = 8


class Task(ABC):
    """A degradation with parameters that are drawn anew for each image: ``condition, region = task(x)``."""

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Degrades images.

        Args:
            x: clean images (N, C, H, W) in [0, 1], of 8 x 8 pixels at least. Not modified.
            generator: what is drawn is drawn from it, on its device; None takes torch's global one.

        Returns:
            The condition (N, K, H, W), of x's dtype, K being C for all of these tasks; and the region, bool and
            broadcastable to x, True where the loss counts. Both on x's device.

        Raises:
            TypeError: for integer images.
            ValueError: for images of another shape, or of a number of channels that the task cannot take.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, images in [0, 1], got {x.dtype}. Write x / 255 for 8-bit images."
            )
        if x.ndim != 4 or len(x) == 0 or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"x must be images (N, C, H, W), at least one, of {_SMALLEST_SIDE} x {_SMALLEST_SIDE} pixels at least, "
                f"got shape {tuple(x.shape)}."
            )
        return self._degrade(x.detach(), _Draws(generator, x.device))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        """The condition and the region, of checked images."""


class Colorization(Task):
    """Gray in, color out: the luma of BT.601, repeated on three channels.

    Example:
        >>> condition, region = Colorization()(torch.rand(2, 3, 32, 32))
        >>> bool((condition[:, 0] == condition[:, 2]).all()), bool(region.all())
        (True, True)
    """

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 3:
            raise ValueError(f"colorization is of RGB images (N, 3, H, W), got shape {tuple(x.shape)}.")
        return Grayscale().measure(x).repeat(1, 3, 1, 1), _everywhere(x)


class Inpainting(Task):
    """A hole in the image: free-form strokes for 60 % of the images, boxes for 40 %.

    Strokes are one to three thick lines of 4 to 11 corners, in the proportions of Yu et al. (2019); boxes are one to
    five, and cover 10 to 40 % of the area in all. No mask is empty, and none is full.

    Example:
        >>> condition, region = Inpainting()(torch.rand(2, 1, 28, 28))
        >>> condition.shape, region.shape
        (torch.Size([2, 1, 28, 28]), torch.Size([2, 1, 28, 28]))
    """

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        n, _, height, width = x.shape
        free_form = draws.uniform(n, 1, 1) < 0.6
        hole = torch.where(free_form, _strokes(n, height, width, draws), _boxes(n, height, width, draws))[:, None]
        return _filled(x, hole.to(x.device), draws)


class Uncropping(Task):
    """Half of the image is missing, half of the time at one of its sides, and else all around.

    At one side it is half of the rows or columns, rounded down; around it the border is missing, and a box in the
    middle, half of the area as nearly as whole pixels can be, is left.
    """

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        n, _, height, width = x.shape
        row = torch.arange(height, device=draws.device)[:, None].expand(height, width)
        column = torch.arange(width, device=draws.device).expand(height, width)
        tall = round(height / math.sqrt(2))
        wide = round(height * width / (2 * tall))
        top, left = (height - tall) // 2, (width - wide) // 2
        middle = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
        holes = torch.stack(
            [
                row < height // 2,
                row >= height - height // 2,
                column < width // 2,
                column >= width - width // 2,
                ~middle,
            ]
        )
        side = draws.integers(0, 4, n)
        around = draws.integers(0, 2, n).bool()
        return _filled(x, holes[torch.where(around, 4, side)][:, None].to(x.device), draws)


class JPEGRestoration(Task):
    """The image after compression, at a quality Q of its own, drawn with probability proportional to exp(-Q / 10).

    Low qualities are harder, and so they come more often. Needs Pillow, the extra ``images``.

    Args:
        lowest: the lowest quality, from 1.
        highest: the highest quality, to 100.

    Raises:
        ValueError: for other qualities.
        ImportError: without Pillow.
    """

    def __init__(self, lowest: int = 5, highest: int = 30) -> None:
        JPEG(lowest), JPEG(highest)  # their checks
        if lowest > highest:
            raise ValueError(f"lowest must not be above highest, got {lowest} and {highest}.")
        self.lowest, self.highest = lowest, highest

    def __repr__(self) -> str:
        return f"JPEGRestoration({self.lowest}, {self.highest})"

    def _qualities(self, n: int, draws: _Draws) -> Tensor:
        every = torch.arange(self.lowest, self.highest + 1, device=draws.device)
        return every[draws.choices(torch.exp(-every / 10), n)]

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        qualities = self._qualities(len(x), draws).tolist()
        images = [JPEG(quality).measure(x[i : i + 1]) for i, quality in enumerate(qualities)]
        return torch.cat(images), _everywhere(x)


class MultiTask(Task):
    """Each image gets one of several tasks: one network learns them all, and the condition tells it which.

    The paper's is ``MultiTask([JPEGRestoration(), Inpainting(), Colorization()])``.

    Args:
        tasks: any number, at least one; a function of one's own will do, ``task(x, generator)`` -> (condition, region).
            Their conditions must have the same number of channels.
        weights: how often each comes, positive numbers in any unit; None is alike.

    Raises:
        TypeError: for a task that cannot be called.
        ValueError: for no tasks, or weights that do not fit.

    Example:
        >>> task = MultiTask([Inpainting(), Colorization()], weights=[3, 1])
        >>> task(torch.rand(4, 3, 32, 32))[0].shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, tasks: Sequence[Degradation], weights: Sequence[float] | None = None) -> None:
        self.tasks = tuple(tasks)
        if not self.tasks:
            raise ValueError("a mixture needs at least one task.")
        for task in self.tasks:
            if not callable(task) or isinstance(task, type):
                raise TypeError(f"a task is called as task(x, generator), as Inpainting() is, got {task!r}.")
        self.weights = (1.0,) * len(self.tasks) if weights is None else tuple(float(weight) for weight in weights)
        if len(self.weights) != len(self.tasks) or not all(0 < w < math.inf for w in self.weights):
            raise ValueError(
                f"weights must be {len(self.tasks)} positive numbers, one for each task, got {list(self.weights)}."
            )

    def __repr__(self) -> str:
        weights = "" if len(set(self.weights)) == 1 else f", weights={list(self.weights)}"
        return f"MultiTask([{', '.join(map(repr, self.tasks))}]{weights})"

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        chosen = draws.choices(torch.tensor(self.weights, device=draws.device), len(x)).to(x.device)
        rows, conditions, regions = [], [], []
        for i, task in enumerate(self.tasks):
            its = (chosen == i).nonzero().flatten()
            if len(its):
                condition, region = task(x[its], draws.generator)
                rows.append(its)
                conditions.append(condition)
                regions.append(region.expand_as(x[its]))
        channels = [condition.shape[1] for condition in conditions]
        if len(set(channels)) > 1:
            raise ValueError(
                f"one network sees the conditions of all tasks, so they must have the same number of channels, got "
                f"{channels} of {self!r}."
            )
        order = torch.cat(rows).argsort()
        return torch.cat(conditions)[order], torch.cat(regions)[order]


def fill(x: Tensor, region: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images with noise in the region, as a network that was trained on these tasks is shown a hole.

    Args:
        x: images (N, C, H, W) in [0, 1]; what they hold in the region does not count.
        region: bool, broadcastable to x, True in the hole.
        generator: of the noise; None takes torch's global one.

    Returns:
        The condition, of x's shape: noise of deviation 1/2 around 1/2 in the hole.

    Raises:
        TypeError: for a region that is not bool.
    """
    if region.dtype != torch.bool:
        raise TypeError(f"region must be bool, True in the hole, got {region.dtype}. Write region > 0.5.")
    return _filled(x, region, _Draws(generator, x.device))[0]


def condition_of(operator: Operator, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What a network that was trained on these tasks is shown of an image that y was seen of.

    Noise in the hole for ``Mask`` and ``Uncrop``, luma on three channels for ``Grayscale``, and y as an image,
    ``operator.lift(y)``, for the others.

    Args:
        operator: that gave y.
        y: what was seen, ``operator.measure(x)``. Repeat it for several samples of one image: each
            has noise of its own.
        generator: of the noise; None takes torch's global one.

    Returns:
        The condition (N, C, H, W).

    Example:
        >>> from scorematch.observe import Uncrop
        >>> condition_of(Uncrop(right=14), torch.rand(2, 3, 28, 14)).shape
        torch.Size([2, 3, 28, 28])
    """
    if isinstance(operator, Grayscale):
        return y.repeat(1, 3, 1, 1)
    return fill(operator.lift(y), operator.lift(torch.ones_like(y)) == 0, generator)


class _Draws:
    """Random numbers on the generator's device: its own, or that of torch's global one for the images."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator = generator
        self.device = device if generator is None else generator.device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def choices(self, weights: Tensor, n: int) -> Tensor:
        """Indices (n,), each as often as its weight says."""
        return torch.multinomial(weights, n, replacement=True, generator=self.generator)


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool, device=x.device)


def _filled(x: Tensor, hole: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
    return torch.where(hole, (0.5 + 0.5 * draws.normal(*x.shape)).to(x), x), hole


def _strokes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
    """Masks (n, height, width): thick lines of random corners, after Yu et al.

    Their pixels of a 256 px image are taken relative to the diagonal. A line runs to one side in a zigzag, up and down;
    which side, and whether up or down first, is drawn for each.
    """
    diagonal = math.hypot(height, width)
    pixel = diagonal / math.hypot(256, 256)
    strokes = draws.integers(1, 4, n, 1)
    corners = draws.integers(4, 12, n, 3)
    # Within sqrt(1/2) of any point there is a pixel's center: no line is so thin that it is none.
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
        share = share.clamp(0, 1)  # of the way from one corner to the next, nearest to the pixel
        distance = (column - ax - share * dx).square() + (row - ay - share * dy).square()
        lines |= (distance <= radius.square()[..., None, None]) & (i < corners - 1)[..., None, None]
        corner = following
    drawn = torch.arange(3, device=draws.device) < strokes
    mask = (lines & drawn[..., None, None]).any(1)
    # Three long thick lines might cover a small image; one cannot.
    return torch.where(mask.all(2).all(1)[:, None, None], lines[:, 0], mask)


def _boxes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
    """Masks (n, height, width): one to five boxes, which cover 10 to 40 % of the area in all."""
    column = torch.arange(width, device=draws.device)
    row = torch.arange(height, device=draws.device)[:, None]
    mask = torch.zeros(n, height, width, dtype=torch.bool, device=draws.device)
    wrong = torch.arange(n, device=draws.device)
    while len(wrong):  # boxes overlap, and are made of whole pixels: what has another area is drawn again
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
