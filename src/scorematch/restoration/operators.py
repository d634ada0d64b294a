r"""Degradation operators, such as masks and downsampling.

An operator A degrades an image, :math:`y = A x`. An observation is a measurement of an image,
:math:`y = A x_0 + \sigma_y n` with n standard normal. The same operators constrain samplers
(``sampler.sample(observation=...)``) and compute the condition of conditional networks
(``scorematch.restoration.palette``).

Masks, crops, BT.601 luma and average pooling are linear operators with a gain c: :math:`A A^\top = c I` on the observed
values. They need no singular value decomposition: the pseudo-inverse is :math:`A^\top / c`, the method ``lift``, and
:math:`P = A^\top A / c`, ``lift`` of ``measure``, is the projection onto the observed part of the image.

=================  ==========================  ====================
operator           gain c                      shape of y, for x (N, C, H, W)
=================  ==========================  ====================
Mask               1                           (N, C, H, W)
Uncrop             1                           (N, C, H', W'), smaller
Grayscale          0.446966                    (N, 1, H, W)
AveragePool(k)     1 / k^2                     (N, C, H/k, W/k)
JPEG(quality)      none, not linear            (N, C, H, W)
``A @ B``          product of the gains        that of A for B x
=================  ==========================  ====================

``A @ B`` applies B first. It has a gain if both operators have one and A does not mix values that B observes with
values that it does not.

To add an operator, subclass ``Operator`` and define ``measure``; also ``lift`` and ``gain`` if it is linear and has a
gain, ``lift`` if y has another shape than x, and ``carry_mask`` if it can be applied after a mask. ``OPERATORS`` lists
the operators of the package.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. B.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826 (the four degradations).
    Kawar et al., 2021, SNIPS: Solving Noisy Inverse Problems Stochastically, arXiv:2105.14951.
"""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.data.pictures import to_pixels

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Operator(ABC):
    """A deterministic degradation of images; image i of the result depends on image i of the input only.

    Attributes:
        gain: the c of A A^T = c I on the observed values, for a linear operator that has one; None otherwise.
        seen: which values of y are observed, bool and broadcastable to y; None if all are.
        value_range: the range of the images that the operator is for, such as (0, 1); None if it is for any.
    """

    gain: float | None = None
    seen: Tensor | None = None
    value_range: tuple[float, float] | None = None

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """The measurement y = A x of images (N, C, H, W). The range of the values is not checked.

        Raises:
            ValueError: if the shape of x does not fit the operator.
        """

    def lift(self, y: Tensor) -> Tensor:
        """An image from the measurement y: A^T y / c for an operator with a gain, and y itself by default.

        An operator without a gain whose measurement has another shape than the image has to define it too, for example
        as the pseudo-inverse of A.

        Raises:
            ValueError: if the shape of y does not fit the operator.
        """
        return y

    def as_image(self, y: Tensor) -> Tensor:
        """The measurement as an image to look at: ``lift(y)``; for ``Grayscale`` a gray RGB image."""
        return self.lift(y)

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """Converts a mask of x to the mask of y: M' with A M x = M' A x, where M is multiplication by ``seen``.

        If A has a gain and such a mask exists, ``A @ Mask(seen)`` has a gain.

        Args:
            seen: bool, broadcastable to x, True where x is observed.

        Returns:
            The mask of y, bool and broadcastable to y; None if a value of y depends on both observed and unobserved
            values of x.
        """
        return None

    def __matmul__(self, inner: Operator) -> Operator:
        """``(A @ B).measure(x)`` is ``A.measure(B.measure(x))``.

        Raises:
            ValueError: if masks of A and B do not fit each other.
        """
        return _Composition(self, inner) if isinstance(inner, Operator) else NotImplemented

    def to(self, device: torch.device | str) -> Operator:
        """The operator with its tensors on a device."""
        return self

    def with_axes(self, axes: int) -> Operator:
        """The operator for batches with this number of axes: 4 for images, 3 for signals (N, C, L), 2 for (N, D).

        A mask with as many axes as the batch has one mask for each sample. ``Observation`` calls this method.
        """
        return self

    def rows(self, rows: slice) -> Operator:
        """The operator for a slice of the batch: with one mask per image, the masks of those images."""
        return self

    def __len__(self) -> int:
        """The batch size that the operator requires, or 1 if it can be applied to any batch."""
        return 1


class Mask(Operator):
    """Observes some values and replaces the others by zero.

    Args:
        seen: bool, True where the image is observed, broadcastable to (N, C, H, W). For an ``Observation`` of other
            data, such as signals (N, C, L), it is broadcastable to their shape.

    Raises:
        TypeError: if the mask is not a bool tensor.

    Example:
        >>> left = torch.arange(28) < 14
        >>> Mask(left).measure(torch.ones(1, 1, 28, 28)).mean()
        tensor(0.5000)
    """

    gain = 1.0
    _axes = 4  # of a batch

    def __init__(self, seen: Tensor) -> None:
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            tensor = isinstance(seen, Tensor)
            kind, hint = (seen.dtype, "mask > 0.5") if tensor else (type(seen).__name__, "torch.as_tensor(mask) > 0.5")
            raise TypeError(
                f"a mask must be a bool tensor, True where the image is observed, got {kind}. Write {hint}."
            )
        self.seen: Tensor = torch.atleast_1d(seen.detach().clone())

    def __repr__(self) -> str:
        return f"Mask({'x'.join(map(str, self.seen.shape))}, {float(self.seen.float().mean()):.0%} seen)"

    def __len__(self) -> int:
        return len(self.seen) if self.seen.ndim == self._axes else 1

    def measure(self, x: Tensor) -> Tensor:
        """The images with zeros where they are not observed, of x's shape."""
        seen = self.seen.to(x.device)
        try:
            if torch.broadcast_shapes(seen.shape, x.shape) == x.shape:
                return torch.where(seen, x, 0)
        except RuntimeError:
            pass
        raise ValueError(f"a mask of shape {tuple(seen.shape)} does not fit images of shape {tuple(x.shape)}.")

    def lift(self, y: Tensor) -> Tensor:
        """The observed values of y, and zeros elsewhere. With one mask per image, a y of one image is repeated."""
        seen = self.seen.to(y.device)
        try:
            return torch.where(seen, y, 0)
        except RuntimeError as error:
            raise ValueError(
                f"a mask of shape {tuple(seen.shape)} does not fit y of shape {tuple(y.shape)}."
            ) from error

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """The same mask."""
        return seen

    def to(self, device: torch.device | str) -> Mask:
        """The mask on a device."""
        return Mask(self.seen.to(device)).with_axes(self._axes)

    def with_axes(self, axes: int) -> Mask:
        """The mask for batches with this number of axes."""
        if axes == self._axes:
            return self
        new = copy.copy(self)
        new._axes = axes
        return new

    def rows(self, rows: slice) -> Mask:
        """The masks for a slice of the batch."""
        return Mask(self.seen[rows]).with_axes(self._axes) if len(self) > 1 else self


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

    def __init__(self, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> None:
        self.borders = tuple(check_count("a border", border, 0) for border in (left, right, top, bottom))

    def __repr__(self) -> str:
        sides = zip(("left", "right", "top", "bottom"), self.borders, strict=True)
        return f"Uncrop({', '.join(f'{side}={border}' for side, border in sides if border)})"

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

    def lift(self, y: Tensor) -> Tensor:
        """The observed part, padded with borders of zeros."""
        return torch.nn.functional.pad(y, self.borders)

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """The mask without the borders. An axis of size 1 is kept, since it is broadcast."""
        height, width = seen.shape[-2:] if seen.ndim > 1 else (1, seen.shape[-1])
        left, right, top, bottom = self.borders
        rows = slice(None) if height == 1 else slice(top, height - bottom)
        columns = slice(None) if width == 1 else slice(left, width - right)
        return seen[..., rows, columns] if seen.ndim > 1 else seen[columns]


def _check_has_rows(x: Tensor, operator: Operator) -> None:
    """Raises ValueError for (N, D), whose second to last axis is the batch."""
    if x.ndim < 3:
        raise ValueError(f"{operator!r} needs images (N, C, H, W), got shape {tuple(x.shape)}.")


class Grayscale(Operator):
    """Observes the luma of RGB images, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601): (N, 3, H, W) -> (N, 1, H, W)."""

    gain = sum(weight**2 for weight in _LUMA)

    def __repr__(self) -> str:
        return "Grayscale()"

    def measure(self, x: Tensor) -> Tensor:
        """The luma (N, 1, H, W)."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Grayscale needs RGB images (N, 3, H, W), got shape {tuple(x.shape)}.")
        red, green, blue = (weight * channel for weight, channel in zip(_LUMA, x.split(1, 1), strict=True))
        return red + green + blue

    def lift(self, y: Tensor) -> Tensor:
        """The RGB image of smallest norm whose luma is y, (N, 3, H, W). It is not gray; see ``as_image``."""
        self._check(y)
        return torch.cat([y * (weight / self.gain) for weight in _LUMA], 1)

    def as_image(self, y: Tensor) -> Tensor:
        """The luma repeated on three channels, (N, 3, H, W)."""
        self._check(y)
        return y.repeat(1, 3, 1, 1)

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """The mask with one channel if it is equal in all three, else None."""
        if seen.ndim < 3 or seen.shape[-3] == 1:
            return seen
        first = seen[..., :1, :, :]
        return first if bool((seen == first).all()) else None

    def _check(self, y: Tensor) -> None:
        if y.ndim != 4 or y.shape[1] != 1:
            raise ValueError(f"y of Grayscale must have one channel, (N, 1, H, W), got shape {tuple(y.shape)}.")


class AveragePool(Operator):
    """Observes the mean of each block of pixels: (N, C, H, W) -> (N, C, H / size, W / size).

    Args:
        size: the side of a block in pixels, at least 1. It must divide the height and the width of the images.

    Raises:
        TypeError: if ``size`` is not an integer.
        ValueError: if ``size`` is below 1.
    """

    def __init__(self, size: int) -> None:
        self.size = check_count("size", size)
        self.gain = 1 / self.size**2

    def __repr__(self) -> str:
        return f"AveragePool({self.size})"

    def measure(self, x: Tensor) -> Tensor:
        """The mean of each block."""
        _check_has_rows(x, self)
        if x.shape[-2] % self.size or x.shape[-1] % self.size:
            raise ValueError(
                f"height and width must be multiples of {self.size}, got images of {x.shape[-2]}x{x.shape[-1]} pixels."
            )
        return reduce(x, "... (h a) (w b) -> ... h w", "mean", a=self.size, b=self.size)

    def lift(self, y: Tensor) -> Tensor:
        """An image in which every pixel of a block has the value of y."""
        return repeat(y, "... h w -> ... (h a) (w b)", a=self.size, b=self.size)

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """The mask of the blocks if it is constant within each block, else None."""
        seen = seen if seen.ndim > 1 else seen[None]
        a, b = (1 if side == 1 else self.size for side in seen.shape[-2:])
        if seen.shape[-2] % a or seen.shape[-1] % b:
            return None
        blocks = rearrange(seen, "... (h a) (w b) -> ... h w (a b)", a=a, b=b)
        return blocks.all(-1) if bool((blocks.all(-1) == blocks.any(-1)).all()) else None


class JPEG(Operator):
    """JPEG compression and decompression with Pillow (the extra ``images``) and its default chroma subsampling, 4:2:0.

    Values are clamped to [0, 1] and rounded to 8 bits. The result has no gradient.

    Args:
        quality: the JPEG quality, from 1 to 100.

    Raises:
        TypeError: if ``quality`` is not an integer.
        ValueError: if ``quality`` is below 1 or above 100.
        ImportError: without Pillow.
    """

    value_range = (0, 1)

    def __init__(self, quality: int) -> None:
        self.quality = check_count("quality", quality, most=100)
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError('JPEG needs Pillow: pip install "scorematch[images]".') from error

    def __repr__(self) -> str:
        return f"JPEG({self.quality})"

    def measure(self, x: Tensor) -> Tensor:
        """The images (N, 1 or 3, H, W) after encoding and decoding, of x's shape and dtype, in [0, 1]."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"JPEG needs images (N, 1, H, W) or (N, 3, H, W), got shape {tuple(x.shape)}.")
        pixels = x.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
        decoded = torch.stack([self._code(image) for image in pixels])
        return decoded.to(x.device, x.dtype).div_(255)

    def _code(self, image: Tensor) -> Tensor:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(to_pixels(image)).save(file, "JPEG", quality=self.quality)
        return rearrange(torch.from_numpy(np.array(Image.open(file))), "h w ... -> (...) h w")


class _Composition(Operator):
    """``outer @ inner``: the inner operator, followed by the outer one."""

    _axes = 4  # of a batch

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        self.value_range = outer.value_range or inner.value_range
        if outer.gain is None or inner.gain is None:
            return
        seen = outer.seen
        if inner.seen is not None:
            # The composition has a gain only if the outer operator does not mix observed and unobserved values.
            carried = outer.carry_mask(inner.seen)
            if carried is None:
                return
            try:
                seen = carried if seen is None else carried & seen.to(carried.device)
            except RuntimeError as error:
                raise ValueError(f"the masks of an operator must fit each other, got {self!r}.") from error
        self.gain, self.seen = outer.gain * inner.gain, seen

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    def __len__(self) -> int:
        return max(len(self.outer), len(self.inner))

    def measure(self, x: Tensor) -> Tensor:
        """The outer measurement of the inner one."""
        return self.outer.measure(self.inner.measure(x))

    def lift(self, y: Tensor) -> Tensor:
        """The lift of the outer operator, then of the inner one."""
        return self.inner.lift(self.outer.lift(y))

    def as_image(self, y: Tensor) -> Tensor:
        """The image of the outer operator, then of the inner one."""
        return self.inner.as_image(self.outer.as_image(y))

    def carry_mask(self, seen: Tensor) -> Tensor | None:
        """The mask carried through the inner operator, then through the outer one."""
        between = self.inner.carry_mask(seen)
        return None if between is None else self.outer.carry_mask(between)

    def to(self, device: torch.device | str) -> Operator:
        """The operator on a device."""
        seen = None if self.seen is None else self.seen.to(device)
        return self._with(self.outer.to(device), self.inner.to(device), seen)

    def with_axes(self, axes: int) -> Operator:
        """The operator for batches with this number of axes."""
        if axes == self._axes:
            return self
        new = self._with(self.outer.with_axes(axes), self.inner.with_axes(axes), self.seen)
        new._axes = axes
        return new

    def rows(self, rows: slice) -> Operator:
        """The operator for a slice of the batch."""
        if len(self) == 1:
            return self
        each = self.seen is not None and self.seen.ndim == self._axes and len(self.seen) > 1
        seen = self.seen[rows] if self.seen is not None and each else self.seen
        return self._with(self.outer.rows(rows), self.inner.rows(rows), seen)

    def _with(self, outer: Operator, inner: Operator, seen: Tensor | None) -> _Composition:
        """A copy with other parts and the same gain. Computing the gain again would synchronize with the device."""
        new = copy.copy(self)
        new.outer, new.inner, new.seen = outer, inner, seen
        return new


# The operators of the package by name. The tests of all operators run for each entry.
OPERATORS: dict[str, type[Operator]] = {
    "mask": Mask,
    "uncrop": Uncrop,
    "grayscale": Grayscale,
    "pool": AveragePool,
    "jpeg": JPEG,
}
