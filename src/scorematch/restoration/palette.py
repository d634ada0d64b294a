r"""The restoration tasks of Palette, which compute training conditions from clean images.

Palette (Saharia et al. 2022) restores images with a network that receives the degraded image c as its condition,
concatenated with the noisy image: :math:`s(x, \sigma, c)`. It is trained by denoising score matching on pairs of
degraded and clean images. A task computes the degraded image from the clean image x, and a mask, True where the loss
counts: ``condition, mask = task(x)``.

For ``Inpainting`` and ``Uncropping`` the mask is the hole; for colors and JPEG it is the whole image. The condition has
no channel for the mask or the task; the network infers both. The hole is filled with noise that is standard normal in
the paper's units, images in [-1, 1]. For images in [0, 1] that is noise of mean 1/2 and standard deviation 1/2. The
sizes of holes are relative to the size of the image, which need not be square.

Training and sampling take one more line each. ``Observation`` keeps everything outside the hole exactly::

    condition, mask = task(x)
    loss = dsm_loss(net, x, condition=condition, mask=mask)

    observation = Observation(Mask(~mask), x)
    restored = AncestralSampler(net).sample(condition=condition, observation=observation)

``condition_of`` computes the condition from a measurement of an operator of ``scorematch.restoration``. The tasks in
``TASKS`` have the names of the operators of which they are random versions.

References:
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scorematch.core.batches import as_mask, check_data
from scorematch.core.messages import quote
from scorematch.core.randomness import Generator, as_generator, single_generator, standard_normal
from scorematch.restoration.masks import Draws
from scorematch.restoration.nonlinear import JPEG
from scorematch.restoration.operator import Operator
from scorematch.restoration.operators import Grayscale, Half, Hole, RandomMask

__all__ = ["TASKS", "Colorization", "Inpainting", "JPEGRestoration", "MultiTask", "Task", "Uncropping", "condition_of"]

Degradation = Callable[[Tensor, torch.Generator | None], Tensor | tuple[Tensor, Tensor]]

_SMALLEST_SIDE = 8


class Task(ABC):
    """A degradation with random parameters for each image: ``condition, mask = task(x)``."""

    def __call__(self, x: Tensor, generator: torch.Generator | int | None = None) -> tuple[Tensor, Tensor]:
        """Degrades images.

        Args:
            x: clean images (N, C, H, W) in [0, 1], floating point, of at least 8 x 8 pixels. They are not modified.
            generator: the source of the random numbers, which are drawn on its device: a ``torch.Generator``, or a
                seed, which gives the same numbers at each call; None is torch's global generator.

        Returns:
            A tuple (condition, mask). The condition (N, K, H, W) has x's dtype; K is C for all tasks of this module.
            The mask is bool and broadcastable to x, True where the loss counts. Both are on x's device.

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
        return self._degrade(x.detach(), Draws(single_generator(generator), x.device))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"  # which tells apart the settings of two runs

    @abstractmethod
    def _degrade(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The condition and the mask for checked images."""


class Colorization(Task):
    """Colorization of gray images: the condition is the BT.601 luma, repeated on three channels. It needs RGB images.

    Example:
        >>> condition, mask = Colorization()(torch.rand(2, 3, 32, 32))
        >>> bool((condition[:, 0] == condition[:, 2]).all()), bool(mask.all())
        (True, True)
    """

    def _degrade(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 3:
            raise ValueError(f"Colorization needs RGB images (N, 3, H, W), got shape {tuple(x.shape)}.")
        gray = Grayscale()
        return gray.as_image(gray.measure(x)), _everywhere(x)


class _Filling(Task):
    """Filling in what a random mask hides."""

    _missing: RandomMask

    def _degrade(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        mask = self._missing.missing(len(x), x.shape[2], x.shape[3], draws).to(x.device)
        return _filled(x, mask, draws.generator), mask


class Inpainting(_Filling):
    """Inpainting of a hole: free-form strokes in 60 % of the images, boxes in 40 %, as ``scorematch.restoration.Hole``.

    Example:
        >>> condition, mask = Inpainting()(torch.rand(2, 1, 28, 28))
        >>> condition.shape, mask.shape
        (torch.Size([2, 1, 28, 28]), torch.Size([2, 1, 28, 28]))
    """

    _missing = Hole()


class Uncropping(_Filling):
    """Completion of an image of which half is missing, at one side or all around, as ``scorematch.restoration.Half``.

    Example:
        >>> condition, mask = Uncropping()(torch.rand(2, 1, 28, 28))
        >>> mask.float().mean((1, 2, 3)).round(decimals=1)
        tensor([0.5000, 0.5000])
    """

    _missing = Half()


class JPEGRestoration(Task):
    """Restoration of JPEG-compressed images, whose quality Q has a probability proportional to exp(-Q / 10).

    Images of low quality are harder to restore and therefore more frequent. The task needs Pillow, the extra
    ``images``.

    Args:
        lowest: the lowest quality, an integer of at least 1.
        highest: the highest quality, an integer of at most 100.

    Raises:
        TypeError: if a quality is not an integer.
        ValueError: if the qualities are out of range, or ``lowest`` is above ``highest``.
        ImportError: without Pillow.
    """

    def __init__(self, lowest: int = 5, highest: int = 30) -> None:
        self.lowest, self.highest = (JPEG(quality).quality for quality in (lowest, highest))  # JPEG checks its quality
        if lowest > highest:
            raise ValueError(f"lowest must be at most highest, got lowest={lowest} and highest={highest}.")

    def __repr__(self) -> str:
        return f"JPEGRestoration({self.lowest}, {self.highest})"

    def _qualities(self, n: int, draws: Draws) -> Tensor:
        every = torch.arange(self.lowest, self.highest + 1, device=draws.device)
        return every[draws.choices(torch.exp(-every / 10), n)]

    def _degrade(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
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
        tasks: one or more tasks, or functions ``task(x, generator)`` that return (condition, mask), or a condition
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

    def _degrade(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        chosen = draws.choices(torch.tensor(self.weights, device=draws.device), len(x)).to(x.device)
        rows, conditions, masks = [], [], []
        for i, task in enumerate(self.tasks):
            own = (chosen == i).nonzero().flatten()
            if len(own):
                clean = x[own]
                made: object = task(clean, draws.generator)
                made = (made, _everywhere(clean)) if isinstance(made, Tensor) else made
                if not (isinstance(made, tuple | list) and len(made) == 2 and all(isinstance(m, Tensor) for m in made)):
                    raise TypeError(f"{task!r} must return a tensor or (condition, mask), got {quote(made)}.")
                rows.append(own)
                conditions.append(made[0])
                masks.append(as_mask(made[1], clean))
        channels = [condition.shape[1] for condition in conditions]
        if len(set(channels)) > 1:
            raise ValueError(
                f"the conditions of all tasks must have the same number of channels, got {channels} from {self!r}."
            )
        order = torch.cat(rows).argsort()
        return torch.cat(conditions)[order], torch.cat(masks)[order]


# The tasks with default arguments, by the names of the operators of which they are random versions.
TASKS: dict[str, type[Task]] = {"gray": Colorization, "hole": Inpainting, "half": Uncropping, "jpeg": JPEGRestoration}


def condition_of(operator: Operator, y: Tensor, generator: Generator = None) -> Tensor:
    """Computes, from a measurement y, the condition of a network that was trained on these tasks.

    The condition is ``operator.as_image(y)``, with noise where an operator such as ``Mask`` or ``Uncrop`` observes
    nothing.

    Args:
        operator: the operator with which y was measured.
        y: the measurement, ``operator.measure(x)``. For several samples of one image, repeat y, so that each sample
            gets its own noise.
        generator: the source of the noise: a ``torch.Generator``, or a seed; a list with one for each image; None is
            torch's global generator.

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
    return _filled(operator.as_image(y), ~operator.seen(y), as_generator(generator))


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool, device=x.device)


def _filled(x: Tensor, missing: Tensor, generator: torch.Generator | tuple[torch.Generator, ...] | None) -> Tensor:
    return torch.where(missing, (0.5 + 0.5 * standard_normal(x.shape, generator, x.device)).to(x), x)
