r"""What was seen of an image: operators, and observations made with them.

An operator A is what happens to an image, :math:`y = A x`; an observation is what was seen of it,
:math:`y = A x_0 + \sigma_y n`. The same operator constrains a sampler (``sampler.sample(observation=...)``) and makes a
conditional network's input (``scorematch.palette``).

Masks, croppings, BT.601 luma and average pooling have a gain: :math:`A A^\top = c I` on what they see. Such an operator
needs no singular value decomposition. :math:`A^\top / c`, which is ``lift``, is its pseudo-inverse, and
:math:`P = A^\top A / c`, ``lift`` of ``measure``, projects on what was seen:

=================  ==========================  ====================
operator           c                           y of x (N, C, H, W)
=================  ==========================  ====================
Mask               1                           (N, C, H, W)
Uncrop             1                           smaller
Grayscale          0.446966                    (N, 1, H, W)
AveragePool(k)     1 / k^2                     (N, C, H/k, W/k)
JPEG(quality)      none, it is not linear      (N, C, H, W)
``A @ B``          the product, where it has   A of B of x
=================  ==========================  ====================

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. B.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826 (the four degradations).
    Kawar et al., 2021, SNIPS: Solving Noisy Inverse Problems Stochastically, arXiv:2105.14951.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Operator(ABC):
    """What happens to an image. The operators are deterministic, and keep images apart: y[i] depends on x[i] only.

    Attributes:
        gain: the c of A A^T = c I on what is seen, for a linear operator that has one; else None.
        seen: which values of y the operator sees, bool and broadcastable to y; None is all of them.
    """

    gain: float | None = None
    seen: Tensor | None = None

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """A x, of images (N, C, H, W). Ranges are not checked."""

    def lift(self, y: Tensor) -> Tensor:
        """An image of y: A^T y / c for an operator with a gain, y itself for one that gives images."""
        return y

    def __matmul__(self, inner: Operator) -> Operator:
        """``(A @ B).measure(x)`` is ``A.measure(B.measure(x))``."""
        return _Composition(self, inner) if isinstance(inner, Operator) else NotImplemented

    def to(self, device: torch.device | str) -> Operator:
        """The same operator with what it holds on a device."""
        return self

    def rows(self, rows: slice) -> Operator:
        """The operator of these images of a batch, where each has its own."""
        return self

    def __len__(self) -> int:
        """For how many images it holds something of their own; 1 is for any number."""
        return 1

    def _carry(self, seen: Tensor) -> Tensor | None:
        """The mask M' of y for which A M x = M' A x, ``seen`` being M; None if there is none."""
        return None


class Mask(Operator):
    """Some values are seen, and the others are zeros.

    Args:
        seen: bool, True where the image is observed, broadcastable to (N, C, H, W).

    Raises:
        TypeError: for a mask that is not bool.

    Example:
        >>> left = torch.arange(28) < 14
        >>> Mask(left).measure(torch.ones(1, 1, 28, 28)).mean()
        tensor(0.5000)
    """

    gain = 1.0

    def __init__(self, seen: Tensor) -> None:
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            kind = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(
                f"a mask must be a bool tensor, True where the image is seen, got {kind}. Write mask > 0.5."
            )
        self.seen: Tensor = seen.detach().clone()

    def __repr__(self) -> str:
        return f"Mask({'x'.join(map(str, self.seen.shape))}, {float(self.seen.float().mean()):.0%} seen)"

    def __len__(self) -> int:
        return len(self.seen) if self.seen.ndim == 4 else 1

    def measure(self, x: Tensor) -> Tensor:
        """Zeros where nothing is seen; the shape of x."""
        seen = self.seen.to(x.device)
        try:
            if torch.broadcast_shapes(seen.shape, x.shape) == x.shape:
                return torch.where(seen, x, 0)
        except RuntimeError:
            pass
        raise ValueError(f"a mask of shape {tuple(seen.shape)} does not fit images of shape {tuple(x.shape)}.")

    def lift(self, y: Tensor) -> Tensor:
        """What was seen, and zeros where nothing is seen."""
        # An observation of one image may be seen through a batch of masks.
        seen = self.seen.to(y.device)
        try:
            return torch.where(seen, y, 0)
        except RuntimeError as error:
            raise ValueError(
                f"a mask of shape {tuple(seen.shape)} does not fit y of shape {tuple(y.shape)}."
            ) from error

    def to(self, device: torch.device | str) -> Mask:
        """The same on a device."""
        return Mask(self.seen.to(device))

    def rows(self, rows: slice) -> Mask:
        """That of some images of the batch."""
        return Mask(self.seen[rows]) if len(self) > 1 else self

    def _carry(self, seen: Tensor) -> Tensor | None:
        return seen


class Uncrop(Operator):
    """The middle is seen, and the image goes on around it: y is the image without these borders.

    Args:
        left: pixels of the image to the left of y; and likewise the others.
        right: to the right.
        top: above.
        bottom: below.

    Raises:
        ValueError: for a border below 0.

    Example:
        >>> Uncrop(right=14).measure(torch.rand(1, 1, 28, 28)).shape
        torch.Size([1, 1, 28, 14])
    """

    gain = 1.0

    def __init__(self, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> None:
        self.borders = (left, right, top, bottom)
        for border in self.borders:
            if not isinstance(border, int) or isinstance(border, bool) or border < 0:
                raise ValueError(f"a border must be a count of pixels, 0 or more, got {border!r}.")

    def __repr__(self) -> str:
        sides = zip(("left", "right", "top", "bottom"), self.borders, strict=True)
        return f"Uncrop({', '.join(f'{side}={border}' for side, border in sides if border)})"

    def measure(self, x: Tensor) -> Tensor:
        """The image without the borders."""
        left, right, top, bottom = self.borders
        height, width = x.shape[-2] - top - bottom, x.shape[-1] - left - right
        if height < 1 or width < 1:
            raise ValueError(f"nothing is left of images of {x.shape[-2]}x{x.shape[-1]} pixels within {self!r}.")
        return x[..., top : top + height, left : left + width]

    def lift(self, y: Tensor) -> Tensor:
        """What was seen, with borders of zeros."""
        return torch.nn.functional.pad(y, self.borders)

    def _carry(self, seen: Tensor) -> Tensor | None:
        height, width = seen.shape[-2:] if seen.ndim > 1 else (1, seen.shape[-1])
        left, right, top, bottom = self.borders
        rows = slice(None) if height == 1 else slice(top, height - bottom)
        columns = slice(None) if width == 1 else slice(left, width - right)
        return seen[..., rows, columns] if seen.ndim > 1 else seen[columns]


class Grayscale(Operator):
    """Of colors only the luma is seen, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601): (N, 3, H, W) -> (N, 1, H, W)."""

    gain = sum(weight**2 for weight in _LUMA)

    def __repr__(self) -> str:
        return "Grayscale()"

    def measure(self, x: Tensor) -> Tensor:
        """The luma (N, 1, H, W)."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"luma is of RGB images (N, 3, H, W), got {tuple(x.shape)}.")
        red, green, blue = (weight * channel for weight, channel in zip(_LUMA, x.split(1, 1), strict=True))
        return red + green + blue

    def lift(self, y: Tensor) -> Tensor:
        """The gray image, (N, 3, H, W), whose luma is y and which is nearest to zero."""
        if y.ndim != 4 or y.shape[1] != 1:
            raise ValueError(f"a gray y has one channel, (N, 1, H, W), got {tuple(y.shape)}.")
        return torch.cat([y * (weight / self.gain) for weight in _LUMA], 1)

    def _carry(self, seen: Tensor) -> Tensor | None:
        if seen.ndim < 3 or seen.shape[-3] == 1:
            return seen
        first = seen[..., :1, :, :]
        return first if bool((seen == first).all()) else None


class AveragePool(Operator):
    """Of each block of pixels only the mean is seen: (N, C, H, W) -> (N, C, H / size, W / size).

    Args:
        size: the side of a block, at least 1.
    """

    def __init__(self, size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size must be a count of pixels, at least 1, got {size!r}.")
        self.size = size
        self.gain = 1 / size**2

    def __repr__(self) -> str:
        return f"AveragePool({self.size})"

    def measure(self, x: Tensor) -> Tensor:
        """The mean of each block."""
        if x.shape[-2] % self.size or x.shape[-1] % self.size:
            raise ValueError(
                f"blocks of {self.size}x{self.size} pixels do not fill images of {x.shape[-2]}x{x.shape[-1]}."
            )
        return reduce(x, "... (h a) (w b) -> ... h w", "mean", a=self.size, b=self.size)

    def lift(self, y: Tensor) -> Tensor:
        """Each block filled with its mean."""
        return repeat(y, "... h w -> ... (h a) (w b)", a=self.size, b=self.size)

    def _carry(self, seen: Tensor) -> Tensor | None:
        seen = seen if seen.ndim > 1 else seen[None]
        a, b = (1 if side == 1 else self.size for side in seen.shape[-2:])
        if seen.shape[-2] % a or seen.shape[-1] % b:
            return None
        blocks = rearrange(seen, "... (h a) (w b) -> ... h w (a b)", a=a, b=b)
        return blocks.all(-1) if bool((blocks.all(-1) == blocks.any(-1)).all()) else None


class JPEG(Operator):
    """The image after compression, by a real codec (Pillow, the extra ``images``), with its default 4:2:0 chroma.

    Values are clamped to [0, 1] and rounded to 8 bits. No gradient goes through it.

    Args:
        quality: from 1 to 100, as the codec counts it.

    Raises:
        ValueError: for another quality.
        ImportError: without Pillow.
    """

    def __init__(self, quality: int) -> None:
        if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
            raise ValueError(f"quality must be an integer from 1 to 100, got {quality!r}.")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError('JPEG needs Pillow: pip install "scorematch[images]".') from error
        self.quality = quality

    def __repr__(self) -> str:
        return f"JPEG({self.quality})"

    def measure(self, x: Tensor) -> Tensor:
        """The image, encoded and decoded."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"JPEG is of images (N, 1, H, W) or (N, 3, H, W), got {tuple(x.shape)}.")
        pixels = x.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
        decoded = torch.stack([self._code(image) for image in pixels])
        return decoded.to(x.device, x.dtype).div_(255)

    def _code(self, image: Tensor) -> Tensor:
        import numpy as np
        from PIL import Image

        array = rearrange(image, "c h w -> h w c").numpy()
        file = io.BytesIO()
        Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(file, "JPEG", quality=self.quality)
        decoded = torch.from_numpy(np.array(Image.open(file)))
        return rearrange(decoded, "h w c -> c h w") if decoded.ndim == 3 else decoded[None]


class _Composition(Operator):
    """First the inner, then the outer operator."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        if outer.gain is None or inner.gain is None:
            return
        seen = outer.seen
        if inner.seen is not None:
            # The product is a gain only where the outer operator does not mix what was seen with what was not.
            carried = outer._carry(inner.seen)
            if carried is None:
                return
            seen = carried if seen is None else carried & seen
        self.gain, self.seen = outer.gain * inner.gain, seen

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    def __len__(self) -> int:
        return max(len(self.outer), len(self.inner))

    def measure(self, x: Tensor) -> Tensor:
        """The outer of the inner."""
        return self.outer.measure(self.inner.measure(x))

    def lift(self, y: Tensor) -> Tensor:
        """The lift of the outer, then of the inner."""
        return self.inner.lift(self.outer.lift(y))

    def to(self, device: torch.device | str) -> Operator:
        """The same on a device."""
        return self.outer.to(device) @ self.inner.to(device)

    def rows(self, rows: slice) -> Operator:
        """That of some images of the batch."""
        return self.outer.rows(rows) @ self.inner.rows(rows) if len(self) > 1 else self

    def _carry(self, seen: Tensor) -> Tensor | None:
        between = self.inner._carry(seen)
        return None if between is None else self.outer._carry(between)


@dataclass(frozen=True, eq=False)
class Observation:
    r"""What was seen of one image, or of each of a batch: :math:`y = A x_0 + \sigma_y n`.

    Args:
        operator: A.
        y: what was seen, of the shape that ``operator.measure`` gives; a batch of 1 is for any number of samples. What
            a mask hides may hold anything, NaN too.
        sigma: the standard deviation of the noise in y, in the units of images in [0, 1]; 0 is none.

    Raises:
        TypeError: for an operator that is none, or a y of integers.
        ValueError: for a sigma below 0, a y that does not fit, or one that is not finite where it was seen.

    Example:
        >>> x = torch.rand(1, 3, 32, 32)
        >>> Observation(Grayscale() @ AveragePool(2), (Grayscale() @ AveragePool(2)).measure(x))
        Observation(Grayscale() @ AveragePool(2), y 1x1x16x16)
    """

    operator: Operator
    y: Tensor
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"operator must be one of scorematch.observe, got {type(self.operator).__name__}. Write Mask(seen)."
            )
        if not isinstance(self.y, Tensor) or not self.y.is_floating_point():
            kind = self.y.dtype if isinstance(self.y, Tensor) else type(self.y).__name__
            raise TypeError(f"y must be a floating point tensor, got {kind}. Write y / 255 for 8-bit images.")
        if self.y.ndim < 2:
            raise ValueError(f"y must be a batch (N, ...), of 1 image at least, got shape {tuple(self.y.shape)}.")
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma, of the noise in y, must be 0 or more, got {self.sigma!r}.")
        lifted = self.operator.lift(self.y)
        if not bool(torch.isfinite(lifted).all()):
            raise ValueError("y holds NaN or infinity where it was seen.")
        measured = self.operator.measure(lifted)
        if measured.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"{self.operator!r} gives shape {tuple(measured.shape[1:])} for each image, but y has "
                f"{tuple(self.y.shape[1:])}."
            )
        if len(self.operator) > 1 < len(self.y) != len(self.operator):
            raise ValueError(f"the operator is of {len(self.operator)} images, but y of {len(self.y)}.")

    def __repr__(self) -> str:
        noise = f", sigma {self.sigma:g}" if self.sigma else ""
        return f"Observation({self.operator!r}, y {'x'.join(map(str, self.y.shape))}{noise})"

    def __len__(self) -> int:
        """How many images it is of; 1 is for any number of samples."""
        return max(len(self.y), len(self.operator))

    def to(self, device: torch.device | str) -> Observation:
        """The same observation on a device, y in float32."""
        return Observation(self.operator.to(device), self.y.detach().to(device, torch.float32), self.sigma)
