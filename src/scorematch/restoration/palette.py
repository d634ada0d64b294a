r"""The restoration tasks of Palette, which compute training conditions from clean images.

Palette (Saharia et al. 2022) restores images with a network that receives the degraded image c as its condition,
concatenated with the noisy image: :math:`s(x, \sigma, c)`. It is trained by denoising score matching on pairs of
degraded and clean images. A task computes the degraded image from the clean image x, and the region in which the loss
counts: ``condition, region = task(x)``.

===============  ========================  =====================================================  ================
task             condition                 random for each image                                  region
===============  ========================  =====================================================  ================
Colorization     luma, on three channels   nothing                                                everywhere
Inpainting       x, noise in the hole      60 %: free-form strokes; 40 %: 1 to 5 boxes, 10 to     the hole
                                           40 % of the area in all
Uncropping       x, noise in the hole      half of the area; 50 %: at one side; 50 %: all around  the hole
JPEGRestoration  x through the codec       quality Q, 5 to 30, as exp(-Q / 10)                    everywhere
MultiTask        that of one of its tasks  the task                                               that task's
===============  ========================  =====================================================  ================

The condition has no channel for the mask or the task; the network infers both. The hole is filled with noise that is
standard normal in the paper's units, images in [-1, 1]. For images in [0, 1] that is noise of mean 1/2 and standard
deviation 1/2 (``fill``). The sizes of holes are relative to the size of the image, which need not be square.

Training and sampling take one more line each. ``Observation`` keeps everything outside the hole exactly::

    condition, region = task(x)
    loss = dsm_loss(net, x, condition=condition, region=region)

    observation = Observation(Mask(~region), x)
    restored = AncestralSampler(net).sample(condition=condition, observation=observation)

``condition_of`` computes the condition from a measurement of an operator of ``scorematch.restoration``.

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

from scorematch.core.batches import as_region, check_data
from scorematch.core.messages import quote
from scorematch.core.randomness import single_generator
from scorematch.restoration.operators import JPEG, Grayscale, Operator

Degradation = Callable[[Tensor, torch.Generator | None], Tensor | tuple[Tensor, Tensor]]

_SMALLEST_SIDE = 8


class Task(ABC):
    """A degradation with random parameters for each image: ``condition, region = task(x)``."""

    def __call__(self, x: Tensor, generator: torch.Generator | int | None = None) -> tuple[Tensor, Tensor]:
        """Degrades images.

        Args:
            x: clean images (N, C, H, W) in [0, 1], floating point, of at least 8 x 8 pixels. They are not modified.
            generator: the source of the random numbers, which are drawn on its device: a ``torch.Generator``, or a
                seed, which gives the same numbers at each call; None is torch's global generator.

        Returns:
            A tuple (condition, region). The condition (N, K, H, W) has x's dtype; K is C for all tasks of this module.
            The region is bool and broadcastable to x, True where the loss counts. Both are on x's device.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has another shape, or a number of channels that the task does not support.
        """
        check_data(x)
        if x.ndim != 4 or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"x must be images (N, C, H, W) of at least {_SMALLEST_SIDE} x {_SMALLEST_SIDE} pixels, got shape "
                f"{tuple(x.shape)}."
            )
        return self._degrade(x.detach(), _Draws(single_generator(generator), x.device))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"  # which tells apart the settings of two runs

    @abstractmethod
    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        """The condition and the region for checked images."""


class Colorization(Task):
    """Colorization of gray images: the condition is the BT.601 luma, repeated on three channels. It needs RGB images.

    Example:
        >>> condition, region = Colorization()(torch.rand(2, 3, 32, 32))
        >>> bool((condition[:, 0] == condition[:, 2]).all()), bool(region.all())
        (True, True)
    """

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 3:
            raise ValueError(f"Colorization needs RGB images (N, 3, H, W), got shape {tuple(x.shape)}.")
        gray = Grayscale()
        return gray.as_image(gray.measure(x)), _everywhere(x)


class Inpainting(Task):
    """Inpainting of a hole: free-form strokes in 60 % of the images, boxes in 40 %.

    A hole of strokes consists of one to three thick lines with 4 to 11 corners, in the proportions of Yu et al. (2019).
    A hole of boxes consists of one to five boxes, which together cover 10 to 40 % of the area. A hole is never empty
    and never the whole image.

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
    """Completion of an image of which half is missing: at one side in half of the images, all around in the others.

    In half of the images, half of the rows or columns at a random side are missing, rounded down. In the others a box
    in the middle remains, with half of the area as closely as whole pixels allow.

    Example:
        >>> condition, region = Uncropping()(torch.rand(2, 1, 28, 28))
        >>> region.float().mean((1, 2, 3)).round(decimals=1)
        tensor([0.5000, 0.5000])
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
    """Restoration of JPEG-compressed images, whose quality Q has a probability proportional to exp(-Q / 10).

    Images of low quality are harder to restore and therefore more frequent. The task needs Pillow, the extra
    ``images``.

    Args:
        lowest: the lowest quality, an integer of at least 1.
        highest: the highest quality, an integer of at most 100.

    Raises:
        ValueError: if the qualities are out of range, or ``lowest`` is above ``highest``.
        ImportError: without Pillow.
    """

    def __init__(self, lowest: int = 5, highest: int = 30) -> None:
        self.lowest, self.highest = (JPEG(quality).quality for quality in (lowest, highest))  # JPEG checks its quality
        if lowest > highest:
            raise ValueError(f"lowest must be at most highest, got lowest={lowest} and highest={highest}.")

    def __repr__(self) -> str:
        return f"JPEGRestoration({self.lowest}, {self.highest})"

    def _qualities(self, n: int, draws: _Draws) -> Tensor:
        every = torch.arange(self.lowest, self.highest + 1, device=draws.device)
        return every[draws.choices(torch.exp(-every / 10), n)]

    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        qualities = self._qualities(len(x), draws).to(x.device)
        condition = torch.empty_like(x)
        for quality in qualities.unique().tolist():
            own = (qualities == quality).nonzero().flatten()
            condition[own] = JPEG(quality).measure(x[own])
        return condition, _everywhere(x)


class MultiTask(Task):
    """A random one of several tasks for each image, so that one network learns them all.

    The paper's multi-task network is trained on ``MultiTask([JPEGRestoration(), Inpainting(), Colorization()])``.

    Args:
        tasks: one or more tasks, or functions ``task(x, generator)`` that return (condition, region), or a condition
            alone if the loss counts everywhere. Their conditions must have the same number of channels.
        weights: the relative frequency of each task, positive; None is equal frequencies.

    Raises:
        TypeError: if a task is not callable, or a class instead of an instance.
        ValueError: if there is no task, or the weights are not one positive number for each task.

    Example:
        >>> task = MultiTask([Inpainting(), Colorization()], weights=[3, 1])
        >>> task(torch.rand(4, 3, 32, 32))[0].shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, tasks: Sequence[Degradation], weights: Sequence[float] | None = None) -> None:
        if not isinstance(tasks, Sequence):
            raise TypeError(f"tasks must be a list of tasks, got {tasks!r}. Write MultiTask([{tasks!r}]).")
        self.tasks = tuple(tasks)
        if not self.tasks:
            raise ValueError("tasks must have at least one task, got none.")
        for task in self.tasks:
            if not callable(task) or isinstance(task, type):
                raise TypeError(f"a task must be callable as task(x, generator), such as Inpainting(), got {task!r}.")
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
            own = (chosen == i).nonzero().flatten()
            if len(own):
                clean = x[own]
                made: object = task(clean, draws.generator)
                made = (made, _everywhere(clean)) if isinstance(made, Tensor) else made
                if not (isinstance(made, tuple | list) and len(made) == 2 and all(isinstance(m, Tensor) for m in made)):
                    raise TypeError(f"{task!r} must return a tensor or (condition, region), got {quote(made)}.")
                rows.append(own)
                conditions.append(made[0])
                regions.append(as_region(made[1], clean, "where the loss counts"))
        channels = [condition.shape[1] for condition in conditions]
        if len(set(channels)) > 1:
            raise ValueError(
                f"the conditions of all tasks must have the same number of channels, got {channels} from {self!r}."
            )
        order = torch.cat(rows).argsort()
        return torch.cat(conditions)[order], torch.cat(regions)[order]


# The tasks with default arguments, by name. The tests of all tasks run for each entry.
TASKS: dict[str, type[Task]] = {
    "colorization": Colorization,
    "inpainting": Inpainting,
    "uncropping": Uncropping,
    "jpeg": JPEGRestoration,
}


def fill(x: Tensor, region: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
    """Fills a hole in images with noise, as in the conditions of Inpainting and Uncropping.

    Args:
        x: images (N, C, H, W) in [0, 1]. Their values in the hole are ignored.
        region: bool, broadcastable to x, True in the hole.
        generator: the source of the noise: a ``torch.Generator``, or a seed; None is torch's global generator.

    Returns:
        The condition, of x's shape and dtype, with noise of mean 1/2 and standard deviation 1/2 in the hole.

    Raises:
        TypeError: if x is not a floating-point tensor, or ``region`` is not bool.
        ValueError: if ``region`` is not broadcastable to x.
    """
    check_data(x)
    region = as_region(region, x, "in the hole")
    return _filled(x, region, _Draws(single_generator(generator), x.device))[0]


def condition_of(operator: Operator, y: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
    """Computes, from a measurement y, the condition of a network that was trained on these tasks.

    The condition is ``operator.as_image(y)``, with noise where an operator such as ``Mask`` or ``Uncrop`` observes
    nothing.

    Args:
        operator: the operator with which y was measured.
        y: the measurement, ``operator.measure(x)``. For several samples of one image, repeat y, so that each sample
            gets its own noise.
        generator: the source of the noise: a ``torch.Generator``, or a seed; None is torch's global generator.

    Returns:
        The condition (N, C, H, W), of y's dtype.

    Raises:
        TypeError: if y is not a floating-point tensor.
        ValueError: if its shape does not fit the operator.

    Example:
        >>> from scorematch.restoration import Uncrop
        >>> condition_of(Uncrop(right=14), torch.rand(2, 3, 28, 14)).shape
        torch.Size([2, 3, 28, 28])
    """
    check_data(y, "y")
    return fill(operator.as_image(y), operator.lift(torch.ones_like(y)) == 0, generator)


class _Draws:
    """Random float32 numbers, drawn on the generator's device, or on the images' device without a generator."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator = generator
        self.device = device if generator is None else generator.device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def choices(self, weights: Tensor, n: int) -> Tensor:
        """Indices (n,), with probabilities proportional to the weights."""
        return torch.multinomial(weights.float(), n, replacement=True, generator=self.generator)


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool, device=x.device)


def _filled(x: Tensor, hole: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
    return torch.where(hole, (0.5 + 0.5 * draws.normal(*x.shape)).to(x), x), hole


def _strokes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
    """Masks (n, height, width) of thick lines with random corners, after Yu et al.

    Their sizes for images of 256 x 256 pixels are scaled by the length of the diagonal. Each line is a zigzag to the
    left or to the right whose segments go up and down in turn; the side and the first direction are random.
    """
    diagonal = math.hypot(height, width)
    pixel = diagonal / math.hypot(256, 256)
    strokes = draws.integers(1, 4, n, 1)
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
    drawn = torch.arange(3, device=draws.device) < strokes
    mask = (lines & drawn[..., None, None]).any(1)
    # Three long thick lines may cover a small image completely, but one line cannot.
    return torch.where(mask.all(2).all(1)[:, None, None], lines[:, 0], mask)


def _boxes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
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
