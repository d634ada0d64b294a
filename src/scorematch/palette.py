r"""Palette's restoration tasks as training data: they make the condition of a network from clean images.

Palette (Saharia et al. 2022) restores images with a network that receives the degraded image as its condition, as extra
channels beside the noisy image, :math:`s(x, \sigma, c)`. It is trained by denoising score matching on pairs of images.
A task makes such a pair from a clean image: ``condition, region = task(x)`` are the degraded image c, and where the
loss counts.

===============  ========================  =====================================================  ================
task             condition                 drawn for each image                                   region
===============  ========================  =====================================================  ================
Colorization     luma, on three channels   nothing                                                everywhere
Inpainting       x, noise in the hole      60 %: free-form strokes; 40 %: 1 to 5 boxes, 10 to     the hole
                                           40 % of the area in all
Uncropping       x, noise in the hole      half of the area, at one side or around, equally       the hole
                                           often
JPEGRestoration  x through the codec       quality Q, 5 to 30, as exp(-Q / 10)                    everywhere
MultiTask        that of one of its tasks  the task                                               that task's
===============  ========================  =====================================================  ================

There is no channel for the mask and none for the task: the network infers both from the condition. A hole is filled
with noise that is standard normal in the paper's units, images in [-1, 1]. For images in [0, 1] that is noise of mean
1/2 and standard deviation 1/2 (``fill``). Sizes are relative to the image, so that the masks of 16 and of 256 pixels
look alike, also for images that are not square.

Training takes one more line, and so does sampling, where ``Observation`` keeps everything outside the hole exactly::

    condition, region = task(x)
    loss = dsm_loss(net, x, condition=condition, region=region)

    observation = Observation(Mask(~region), x)
    restored = AncestralSampler(net).sample(condition=condition, observation=observation)

``condition_of`` makes the condition from an image that was degraded elsewhere.

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
from scorematch.protocol import check_data
from scorematch.randomness import single_generator

Degradation = Callable[[Tensor, torch.Generator | None], tuple[Tensor, Tensor]]

_SMALLEST_SIDE = 8


class Task(ABC):
    """A degradation whose parameters are drawn anew for each image: ``condition, region = task(x)``."""

    def __call__(self, x: Tensor, generator: torch.Generator | int | None = None) -> tuple[Tensor, Tensor]:
        """Degrades images.

        Args:
            x: clean images (N, C, H, W) in [0, 1], of at least 8 x 8 pixels. Not modified.
            generator: the source of what is drawn, on its own device: a ``torch.Generator``, or a seed, which gives the
                same numbers at each call; None is torch's global generator.

        Returns:
            The condition (N, K, H, W), of x's dtype, where K is C for all tasks of this module; and the region, bool
            and broadcastable to x, True where the loss counts. Both are on x's device.

        Raises:
            TypeError: for images that are not a floating-point tensor.
            ValueError: for images of another shape, or with a number of channels that the task does not support.
        """
        check_data(x)
        if x.ndim != 4 or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"x must be images (N, C, H, W) of at least {_SMALLEST_SIDE} x {_SMALLEST_SIDE} pixels, got shape "
                f"{tuple(x.shape)}."
            )
        return self._degrade(x.detach(), _Draws(single_generator(generator), x.device))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def _degrade(self, x: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
        """The condition and the region of images that have been checked."""


class Colorization(Task):
    """Color from gray: the condition is the luma of BT.601, repeated on three channels.

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
    """A hole in the image: free-form strokes in 60 % of the images, boxes in 40 %.

    Strokes are one to three thick lines with 4 to 11 corners, in the proportions of Yu et al. (2019). There are one to
    five boxes, which cover 10 to 40 % of the area in all. No mask is empty, and none is full.

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
    """Half of the image is missing: at one of its sides in half of the images, all around in the others.

    At one side half of the rows or columns is missing, rounded down. All around, a box in the middle is left, which has
    half of the area as closely as whole pixels allow.

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
    """The image after JPEG compression, with a quality Q drawn with a probability proportional to exp(-Q / 10).

    Low qualities are harder and therefore more frequent. It needs Pillow, the extra ``images``.

    Args:
        lowest: the lowest quality, at least 1.
        highest: the highest quality, at most 100.

    Raises:
        ValueError: for other qualities.
        ImportError: without Pillow.
    """

    def __init__(self, lowest: int = 5, highest: int = 30) -> None:
        self.lowest, self.highest = (JPEG(quality).quality for quality in (lowest, highest))  # JPEG checks its quality
        if lowest > highest:
            raise ValueError(f"lowest must not be above highest, got {lowest} and {highest}.")

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
    """Each image gets one of several tasks, drawn at random, so that one network learns them all.

    The paper's multi-task network is trained on ``MultiTask([JPEGRestoration(), Inpainting(), Colorization()])``.

    Args:
        tasks: one or more tasks, or functions ``task(x, generator)`` -> (condition, region). Their conditions must have
            the same number of channels.
        weights: the relative frequency of each task, positive; None is equal frequencies.

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
            raise ValueError("MultiTask needs at least one task.")
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
                condition, region = task(x[own], draws.generator)
                rows.append(own)
                conditions.append(condition)
                regions.append(region.expand_as(x[own]))
        channels = [condition.shape[1] for condition in conditions]
        if len(set(channels)) > 1:
            raise ValueError(
                f"the conditions of all tasks must have the same number of channels, got {channels} from {self!r}."
            )
        order = torch.cat(rows).argsort()
        return torch.cat(conditions)[order], torch.cat(regions)[order]


# The tasks with default arguments, by a short name each. The tests of all tasks find new ones here.
TASKS: dict[str, type[Task]] = {
    "colorization": Colorization,
    "inpainting": Inpainting,
    "uncropping": Uncropping,
    "jpeg": JPEGRestoration,
}


def fill(x: Tensor, region: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
    """Images with noise in a hole: the condition that these tasks train a network on.

    Args:
        x: images (N, C, H, W) in [0, 1]. Their values in the region do not matter.
        region: bool, broadcastable to x, True in the hole.
        generator: the source of the noise: a ``torch.Generator``, or a seed; None is torch's global generator.

    Returns:
        The condition, of x's shape, with noise of mean 1/2 and standard deviation 1/2 in the hole.

    Raises:
        TypeError: for a region that is not bool.
    """
    if region.dtype != torch.bool:
        raise TypeError(f"region must be bool, True in the hole, got {region.dtype}. Write region > 0.5.")
    return _filled(x, region, _Draws(single_generator(generator), x.device))[0]


def condition_of(operator: Operator, y: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
    """Builds the condition of a network that was trained on these tasks from a measurement y.

    It is ``operator.as_image(y)``, with noise where an operator such as ``Mask`` or ``Uncrop`` observes nothing.

    Args:
        operator: the operator that gave y.
        y: the measurement, ``operator.measure(x)``. For several samples of one image, repeat it: each sample then has
            noise of its own.
        generator: the source of the noise: a ``torch.Generator``, or a seed; None is torch's global generator.

    Returns:
        The condition (N, C, H, W).

    Example:
        >>> from scorematch.observe import Uncrop
        >>> condition_of(Uncrop(right=14), torch.rand(2, 3, 28, 14)).shape
        torch.Size([2, 3, 28, 28])
    """
    return fill(operator.as_image(y), operator.lift(torch.ones_like(y)) == 0, generator)


class _Draws:
    """Random numbers on the generator's device, which for torch's global generators is the device of the images."""

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
        """Indices (n,), with probabilities proportional to the weights."""
        return torch.multinomial(weights, n, replacement=True, generator=self.generator)


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool, device=x.device)


def _filled(x: Tensor, hole: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
    return torch.where(hole, (0.5 + 0.5 * draws.normal(*x.shape)).to(x), x), hole


def _strokes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
    """Masks (n, height, width) of thick lines with random corners, after Yu et al.

    The sizes that they give for images of 256 pixels are scaled with the diagonal. A line runs to one side in a zigzag,
    up and down; the side, and whether it goes up or down first, are drawn for each line.
    """
    diagonal = math.hypot(height, width)
    pixel = diagonal / math.hypot(256, 256)
    strokes = draws.integers(1, 4, n, 1)
    corners = draws.integers(4, 12, n, 3)
    # Every point has the center of a pixel within sqrt(1/2), so that no line of this radius is empty.
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
        share = share.clamp(0, 1)  # the point of the segment that is nearest to the pixel, as a share of its length
        distance = (column - ax - share * dx).square() + (row - ay - share * dy).square()
        lines |= (distance <= radius.square()[..., None, None]) & (i < corners - 1)[..., None, None]
        corner = following
    drawn = torch.arange(3, device=draws.device) < strokes
    mask = (lines & drawn[..., None, None]).any(1)
    # Three long thick lines may cover a small image completely; one cannot.
    return torch.where(mask.all(2).all(1)[:, None, None], lines[:, 0], mask)


def _boxes(n: int, height: int, width: int, draws: _Draws) -> Tensor:
    """Masks (n, height, width) of one to five boxes, which cover 10 to 40 % of the area in all."""
    column = torch.arange(width, device=draws.device)
    row = torch.arange(height, device=draws.device)[:, None]
    mask = torch.zeros(n, height, width, dtype=torch.bool, device=draws.device)
    wrong = torch.arange(n, device=draws.device)
    while len(wrong):  # boxes overlap and consist of whole pixels: those of another area are drawn again
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
