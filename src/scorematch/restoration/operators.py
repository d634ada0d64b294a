r"""Degradation operators, such as masks and downsampling.

An operator A degrades an image, :math:`y = A x`. An observation is a measurement of an image,
:math:`y = A x_0 + \sigma_y n` with n standard normal. The same operators constrain samplers
(``sampler.sample(observation=...)``) and compute the condition of conditional networks
(``scorematch.restoration.palette``).

Masks, crops, BT.601 luma and average pooling are linear operators with a gain c: :math:`A A^\top = c I` on the observed
values. They need no singular value decomposition: the pseudo-inverse is :math:`A^+ = A^\top / c`, and :math:`P = A^+ A`
is the projection onto the observed part of the image.

=================  ======================  ====================  =============================
operator           text form               gain c                shape of y, for x (N, C, H, W)
=================  ======================  ====================  =============================
Mask               ``mask:FILE``           1                     (N, C, H, W)
Hole, Half         ``hole``, ``half``      random masks          (N, C, H, W)
Uncrop             ``uncrop:right=14``     1                     (N, C, H', W'), smaller
Grayscale          ``gray``                0.446966              (N, 1, H, W)
AveragePool(k)     ``pool:4``              1 / k^2               (N, C, H/k, W/k)
Resize(scale)      ``resize:4``            none                  (N, C, H/scale, W/scale)
GaussianBlur       ``blur:2``              none                  (N, C, H, W)
MotionBlur         ``motion:9,45``         none                  (N, C, H, W)
FourierLines(k)    ``fourier:4``           none                  (N, 2 C, H, W)
Clip(low, high)    ``clip:0.1,0.9``        none, not linear      (N, C, H, W)
Quantize(levels)   ``quantize:4``          none, not linear      (N, C, H, W)
JPEG(quality)      ``jpeg:10``             none, not linear      (N, C, H, W)
``A @ B``          ``pool:4 @ gray``       product of the gains  that of A for B x
=================  ======================  ====================  =============================

``A @ B`` applies B first. It has a gain if both operators have one and A does not mix values that B observes with
values that it does not. ``Blur``, ``Fourier``, ``Magnitude``, ``Linear``, ``Matrix`` and ``Physics`` have no text form.

To add an operator, subclass ``Operator`` and define ``measure``; also ``linear = True`` if it is linear,
``pseudo_inverse`` and ``gain`` if it has a gain, ``pseudo_inverse`` if y has another shape than x, and ``carry_mask``
if it can be applied after a mask. With a ``form`` and a line in ``scorematch.restoration.OPERATORS`` it can be written
as text, on the command line and in the demo too.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. B.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826 (the four degradations).
    Kawar et al., 2021, SNIPS: Solving Noisy Inverse Problems Stochastically, arXiv:2105.14951.
"""

from __future__ import annotations

import copy
import functools
import re
from abc import abstractmethod
from collections.abc import Sequence
from operator import matmul
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.messages import reason
from scorematch.core.randomness import single_generator
from scorematch.data.pictures import read_mask
from scorematch.restoration.blur import GaussianBlur, MotionBlur
from scorematch.restoration.fourier import FourierLines
from scorematch.restoration.masks import Draws, boxes, halves, strokes
from scorematch.restoration.nonlinear import JPEG, Clip, Quantize
from scorematch.restoration.operator import Operator, SameShape
from scorematch.restoration.resize import Resize

__all__ = ["OPERATORS", "AveragePool", "Grayscale", "Half", "Hole", "Mask", "Uncrop", "as_operator"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Mask(Operator):
    """Observes some values and replaces the others by zero.

    Args:
        mask: bool, True where the image is observed, broadcastable to (N, C, H, W). For an ``Observation`` of other
            data, such as signals (N, C, L), it is broadcastable to their shape.

    Raises:
        TypeError: if the mask is not a bool tensor.

    Example:
        >>> left = torch.arange(28) < 14
        >>> Mask(left).measure(torch.ones(1, 1, 28, 28)).mean()
        tensor(0.5000)
    """

    gain = 1.0
    form = "mask:FILE"
    help = (
        "parts are missing: FILE is a picture of the same aspect ratio that is white where the image is observed and "
        "black elsewhere, or for arrays a file .npy of bool; with mask:FILE,invert, as in diffusers, it is white where "
        "the image is missing"
    )
    examples = ("mask:observed.png", "mask:missing.png,invert")
    _axes = 4  # of a batch

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            tensor = isinstance(mask, Tensor)
            kind, hint = (mask.dtype, "mask > 0.5") if tensor else (type(mask).__name__, "torch.as_tensor(mask) > 0.5")
            raise TypeError(
                f"a mask must be a bool tensor, True where the image is observed, got {kind}. Write {hint}."
            )
        self.mask: Tensor = torch.atleast_1d(mask.detach().clone())

    @classmethod
    def parse(cls, arguments: str) -> Mask:
        """The mask of a picture with black and white pixels, whose path may end with ",invert"."""
        file = arguments.removesuffix(",invert")
        if not file:
            raise TypeError("the file is missing")
        try:
            path = Path(file).expanduser()
            if path.is_dir():
                raise ValueError(f"{file} is a folder. Write the file of one mask")
            white = _read_array(path) if path.suffix.lower() == ".npy" else read_mask(path)
        except RuntimeError as error:
            raise ValueError(f"the home folder of {file} is not known. Write the whole path.") from error
        return cls(white if file == arguments else ~white)

    def __repr__(self) -> str:
        return f"Mask({'x'.join(map(str, self.mask.shape))}, {float(self.mask.float().mean()):.0%} observed)"

    def __len__(self) -> int:
        return len(self.mask) if self.mask.ndim == self._axes else 1

    def measure(self, x: Tensor) -> Tensor:
        """The images with zeros where they are not observed, of x's shape."""
        mask = self.mask.to(x.device)
        try:
            measured = torch.where(mask, x, 0)
            if measured.shape == x.shape:
                return measured
        except RuntimeError:
            pass
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit images of shape {tuple(x.shape)}.")

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The observed values of y, and zeros elsewhere. With one mask per image, a y of one image is repeated."""
        mask = self.mask.to(y.device)
        try:
            return torch.where(mask, y, 0)
        except RuntimeError as error:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit y of shape {tuple(y.shape)}."
            ) from error

    def of_size(self, height: int, width: int) -> Mask:
        """The mask for images of a size; one of another size is resized with nearest neighbor.

        Raises:
            ValueError: if the mask has another aspect ratio, by more than a pixel.
        """
        if self.mask.ndim < 2 or self.mask.shape[-2:] == (height, width) or 1 in self.mask.shape[-2:]:
            return self
        tall, wide = self.mask.shape[-2:]
        if abs(tall * width - wide * height) >= max(tall, wide, height, width):
            raise ValueError(
                f"the mask must have the size of the picture, {height}x{width} pixels, or its aspect ratio, got "
                f"{tall}x{wide}."
            )
        sizes = ((height, tall), (width, wide))
        rows, columns = ((torch.arange(n, device="cpu") * 2 + 1) * m // (2 * n) for n, m in sizes)
        return Mask(self.mask[..., rows[:, None], columns]).with_axes(self._axes)

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """The same mask."""
        return mask

    def to(self, device: torch.device | str) -> Mask:
        """The mask on a device."""
        return Mask(self.mask.to(device)).with_axes(self._axes)

    def with_axes(self, axes: int) -> Mask:
        """The mask for batches with this number of axes."""
        if axes == self._axes:
            return self
        new = copy.copy(self)
        new._axes = axes
        return new

    def rows(self, rows: slice | Tensor) -> Mask:
        """The masks for a slice of the batch, or for indices."""
        return Mask(self.mask[rows]).with_axes(self._axes) if len(self) > 1 else self


def _read_array(path: Path) -> Tensor:
    try:
        mask = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file: {reason(error)}.") from error
    if mask.dtype != np.bool_:
        raise ValueError(f"{path} must be of type bool, True where the data are observed, got {mask.dtype}.")
    return torch.from_numpy(mask)


class RandomMask(SameShape):
    """The base class of operators with a random mask for each image, which ``drawn`` returns."""

    @abstractmethod
    def missing(self, n: int, height: int, width: int, draws: Draws) -> Tensor:
        """Random masks (n, 1, height, width), bool, True where the image is missing."""

    def drawn(self, x: Tensor, seeds: Sequence[int]) -> Mask:
        """The masks of images x, each drawn from its seed on the CPU."""
        if x.ndim != 4:
            raise ValueError(f"{self!r} is for images (N, C, H, W), got shape {tuple(x.shape)}.")
        each = (Draws(single_generator(number), x.device) for number in seeds)
        return Mask(~torch.cat([self.missing(1, x.shape[2], x.shape[3], draws) for draws in each]))

    def measure(self, x: Tensor) -> Tensor:
        """It has no measurement before the masks are drawn."""
        raise ValueError(
            f"{self} has a random mask for each image. Write mask:FILE for a known mask. To damage whole images with a "
            f"drawn mask, write scorematch restore --degrade, or in Python {self!r}.drawn(x, seeds)."
        )


class Hole(RandomMask):
    """A hole: free-form strokes in 60 % of the images, boxes in 40 %, as in the training of Palette.

    A hole of strokes consists of one to three thick lines with 4 to 11 corners, in the proportions of Yu et al. (2019).
    A hole of boxes consists of one to five boxes, which together cover 10 to 40 % of the area. A hole is never empty
    and never the whole image.
    """

    form, help, examples = "hole", "a random hole is missing, for evaluations", ("hole",)

    def missing(self, n: int, height: int, width: int, draws: Draws) -> Tensor:
        """Strokes or boxes."""
        if height * width < 3:  # no number of pixels is 10 to 40 % of the area
            raise ValueError(f"a random hole needs an image of at least 3 pixels, got {height}x{width}.")
        free_form, drawn = draws.uniform(n, 1, 1) < 0.6, strokes(n, height, width, draws)
        free_form = free_form & ~drawn.all(2, keepdim=True).all(1, keepdim=True)  # one line may cover a tiny image
        return torch.where(free_form, drawn, boxes(n, height, width, draws))[:, None]


class Half(RandomMask):
    """Half of the image: at one side in half of the images, all around in the others, as in the training of Palette.

    In half of the images, half of the rows or columns at a random side are missing, rounded down. In the others a box
    in the middle remains, with half of the area as closely as whole pixels allow.
    """

    form, help, examples = "half", "a random half is missing, at a side or all around, for evaluations", ("half",)

    def missing(self, n: int, height: int, width: int, draws: Draws) -> Tensor:
        """One of five halves."""
        return halves(n, height, width, draws)[:, None]


class Uncrop(Operator):
    """Observes the image without its borders, which are to be filled in.

    Args:
        left: the width of the left border in pixels.
        right: the width of the right border.
        top: the height of the upper border.
        bottom: the height of the lower border.

    Raises:
        TypeError: if a border is not an integer.
        ValueError: if a border is negative.

    Example:
        >>> Uncrop(right=14).measure(torch.rand(1, 1, 28, 28)).shape
        torch.Size([1, 1, 28, 14])
    """

    gain = 1.0
    form = "uncrop:left=N,right=N,top=N,bottom=N"
    help = "borders of N pixels are missing, at one or more sides"
    examples = ("uncrop:right=4", "uncrop:left=2,right=2,top=2,bottom=2")

    def __init__(self, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> None:
        self.left, self.right, self.top, self.bottom = self.borders = tuple(
            check_count("a border", border, 0) for border in (left, right, top, bottom)
        )

    def measure(self, x: Tensor) -> Tensor:
        """The images without their borders."""
        left, right, top, bottom = self.borders
        if top or bottom:
            _check_has_rows(x, self)
        height, width = x.shape[-2] - top - bottom, x.shape[-1] - left - right
        if height < 1 or width < 1:
            raise ValueError(
                f"the images must be larger than the borders of {self!r}, got {x.shape[-2]}x{x.shape[-1]} pixels."
            )
        return x[..., top : top + height, left : left + width]

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The observed part, padded with borders of zeros."""
        return torch.nn.functional.pad(y, self.borders)

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """The mask without the borders. An axis of size 1 is kept, since it is broadcast."""
        height, width = mask.shape[-2:] if mask.ndim > 1 else (1, mask.shape[-1])
        left, right, top, bottom = self.borders
        rows = slice(None) if height == 1 else slice(top, height - bottom)
        columns = slice(None) if width == 1 else slice(left, width - right)
        return mask[..., rows, columns] if mask.ndim > 1 else mask[columns]


def _check_has_rows(x: Tensor, operator: Operator) -> None:
    """Raises ValueError for (N, D), whose second to last axis is the batch."""
    if x.ndim < 3:
        raise ValueError(f"{operator!r} needs images (N, C, H, W), got shape {tuple(x.shape)}.")


class Grayscale(Operator):
    """Observes the luma of RGB images, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601): (N, 3, H, W) -> (N, 1, H, W)."""

    gain = sum(weight**2 for weight in _LUMA)
    form, help, examples = "gray", "the colors are missing", ("gray",)

    def measure(self, x: Tensor) -> Tensor:
        """The luma (N, 1, H, W)."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Grayscale needs RGB images (N, 3, H, W), got shape {tuple(x.shape)}.")
        red, green, blue = (weight * channel for weight, channel in zip(_LUMA, x.split(1, 1), strict=True))
        return red + green + blue

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The RGB image of smallest norm whose luma is y, (N, 3, H, W). It is not gray; see ``as_image``."""
        self._check(y)
        return torch.cat([y * (weight / self.gain) for weight in _LUMA], 1)

    def as_image(self, y: Tensor) -> Tensor:
        """The luma repeated on three channels, (N, 3, H, W)."""
        self._check(y)
        return y.repeat(1, 3, 1, 1)

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """The mask with one channel if it is equal in all three, else None."""
        if mask.ndim < 3 or mask.shape[-3] == 1:
            return mask
        first = mask[..., :1, :, :]
        return first if bool((mask == first).all()) else None

    def _check(self, y: Tensor) -> None:
        if y.ndim != 4 or y.shape[1] != 1:
            raise ValueError(f"y of Grayscale must have one channel, (N, 1, H, W), got shape {tuple(y.shape)}.")


class AveragePool(Operator):
    """Observes the mean of each block of pixels: (N, C, H, W) -> (N, C, H / size, W / size).

    All axes after the channels are divided into blocks: one of signals (N, C, L), three of volumes (N, C, D, H, W).

    Args:
        size: the side of a block in pixels, at least 1. It must divide every side of the images.

    Raises:
        TypeError: if ``size`` is not an integer.
        ValueError: if ``size`` is below 1.
    """

    separable = True
    form, help = "pool:SIZE", "each block of SIZE x SIZE pixels was averaged to one"
    examples = ("pool:4", "pool:2", "pool:7", "pool:8", "pool:16")
    _axes = 4  # of a batch

    def __init__(self, size: int) -> None:
        self.size = check_count("size", size)
        self.gain = 1 / self.size ** (self._axes - 2)

    def with_axes(self, axes: int) -> AveragePool:
        """The operator for batches with this number of axes, on which the gain depends."""
        if axes == self._axes:
            return self
        new = copy.copy(self)
        new._axes, new.gain = axes, 1 / self.size ** (axes - 2)
        return new

    def measure(self, x: Tensor) -> Tensor:
        """The mean of each block."""
        _check_has_rows(x, self)
        if any(side % self.size for side in x.shape[2:]):
            raise ValueError(
                f"all sides must be multiples of {self.size}, got images of {'x'.join(map(str, x.shape[2:]))} pixels."
            )
        blocks, places, sizes = self._blocks(x.shape[2:])
        return reduce(x, f"... {blocks} -> ... {places}", "mean", **sizes)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """An image in which every pixel of a block has the value of y."""
        blocks, places, _ = self._blocks(y.shape[2:])
        return repeat(y, f"... {places} -> ... {blocks}", **{f"b{i}": self.size for i in range(y.ndim - 2)})

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """The mask of the blocks if it is constant within each block, else None."""
        sides = self._axes - 2
        mask = mask[(None,) * (sides - mask.ndim)]
        pattern, places, sizes = self._blocks(mask.shape[-sides:])
        if any(side % size for side, size in zip(mask.shape[-sides:], sizes.values(), strict=True)):
            return None
        blocks = rearrange(mask, f"... {pattern} -> ... {places} ({' '.join(sizes)})", **sizes)
        return blocks.all(-1) if bool((blocks.all(-1) == blocks.any(-1)).all()) else None

    def _blocks(self, sides: Sequence[int]) -> tuple[str, str, dict[str, int]]:
        """The axes of these sides in einops: as blocks, as places of blocks, and the sizes of blocks by name.

        An axis of size 1 of a mask is kept, since it is broadcast.
        """
        sizes = {f"b{i}": 1 if side == 1 else self.size for i, side in enumerate(sides)}
        return " ".join(f"(p{i} b{i})" for i in range(len(sides))), " ".join(f"p{i}" for i in range(len(sides))), sizes


# By the names in their text forms.
OPERATORS: dict[str, type[Operator]] = {
    kind.form.partition(":")[0]: kind
    for kind in (
        Mask,
        Hole,
        Half,
        Uncrop,
        Grayscale,
        AveragePool,
        Resize,
        GaussianBlur,
        MotionBlur,
        FourierLines,
        Clip,
        Quantize,
        JPEG,
    )
}


def as_operator(operator: str | Operator) -> Operator:
    """The operator of a text, such as "pool:4", or "pool:4 @ gray" for ``AveragePool(4) @ Grayscale()``.

    ``str(operator)`` is the text of an operator that has one.

    Args:
        operator: one or more forms of ``OPERATORS``, joined by @ between spaces; or an operator, which is returned.

    Raises:
        TypeError: if it is neither a text nor an operator.
        ValueError: if the text does not describe an operator.
        ImportError, OSError: if the picture of a mask cannot be read.

    Example:
        >>> as_operator("pool:4 @ gray")
        AveragePool(4) @ Grayscale()
    """
    if isinstance(operator, Operator):
        return operator
    if not isinstance(operator, str):
        raise TypeError(
            "operator must be an Operator of scorematch.restoration or its text, such as 'pool:4', got "
            f"{type(operator).__name__}."
        )
    return functools.reduce(matmul, map(single_operator, re.split(r"\s+@\s+", operator)))


def single_operator(text: str) -> Operator:
    """The operator of a text that is no composition; ``as_operator`` has the errors."""
    name, _, arguments = text.partition(":")
    kind = OPERATORS.get(name)
    if kind is None:
        forms = ", ".join(each.form for each in OPERATORS.values())
        raise ValueError(f"{argument('operator')} must be {forms}, or several of them joined by ' @ ', got {text!r}.")
    try:
        return kind.parse(arguments)
    except (TypeError, ValueError) as error:
        example = f", such as {kind.examples[0]}" if ":" in kind.form and kind.examples else ""
        reason = str(error).removesuffix(".")
        wanted = f"{argument('operator')} must be {kind.form or name}{example}"
        raise ValueError(f"{wanted}, got {text!r}: {reason}.") from error
