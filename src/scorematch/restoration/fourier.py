r"""Samples of the discrete Fourier transform, as magnetic resonance imaging measures them.

Let :math:`\mathcal{F}` be the orthonormal Fourier transform over the last axes of a sample, M the sampling mask, and
:math:`S_1, \dots, S_K` the sensitivities of the receiver coils (K = 1 and :math:`S_1 = 1` without them). The
measurement has, for each coil, the real and the imaginary part of

.. math:: y_k = M \mathcal{F} S_k x

as channels, with zeros where nothing is sampled. The sample x is real, or complex with its real and imaginary parts as
channels. With independent noise in both parts, the frequencies f and -f of a real sample are two measurements of the
same values. The adjoint is :math:`A^\top y = \sum_k \bar S_k \mathcal{F}^{-1} M y_k`, of which a real sample has the
real part. For complex samples without sensitivities :math:`A A^\top = I` on the sampled values.

References:
    Pruessmann et al., 1999, SENSE: Sensitivity Encoding for Fast MRI (the sensitivities).
    Zbontar et al., 2018, fastMRI, arXiv:1811.08839 (every k-th line and the center).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from scorematch.core.arguments import check_count, check_value
from scorematch.core.schema import Field
from scorematch.restoration.decomposition import Decomposition, hartley
from scorematch.restoration.operator import Operator, kind_of

__all__ = ["Fourier", "FourierLines"]


class Fourier(Operator):
    """Observes some values of the Fourier transform: (N, C, H, W) -> (N, 2 K C, H, W).

    The channels of y are the real parts for coil 1, 2, ..., each with all channels of x, and then the imaginary parts.

    Args:
        mask: bool, True where the transform is sampled, (H, W) for images (N, C, H, W) and (L,) for signals (N, C, L),
            in the order of ``torch.fft``, the frequency zero first. For a mask with the frequency zero in the middle
            write ``torch.fft.ifftshift(mask)``.
        sensitivities: those of K coils, real or complex, (K, H, W); None is one coil with the sensitivity 1.
        complex: whether the samples are complex, with the C real parts before the C imaginary parts, (N, 2 C, H, W).

    Raises:
        TypeError: if the mask is not a bool tensor, or ``sensitivities`` not a floating-point or complex one.
        ValueError: if the shape of the sensitivities does not fit the mask, or they are not finite.

    Example:
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[0, 0] = True  # the frequency zero: the sum of all pixels / 8
        >>> Fourier(mask).measure(torch.ones(1, 1, 8, 8)).sum()
        tensor(8.)
    """

    linear = True

    def __init__(self, mask: Tensor, sensitivities: Tensor | None = None, *, complex: bool = False) -> None:  # noqa: A002
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.ndim:
            raise TypeError(f"mask must be a bool tensor (H, W) or (L,), True where sampled, got {kind_of(mask)}.")
        if sensitivities is not None:
            if not isinstance(sensitivities, Tensor) or not (
                sensitivities.is_floating_point() or sensitivities.is_complex()
            ):
                kind = kind_of(sensitivities)
                raise TypeError(f"sensitivities must be a floating-point or complex tensor, got {kind}.")
            if sensitivities.ndim != mask.ndim + 1 or sensitivities.shape[1:] != mask.shape:
                sizes = ", ".join(map(str, mask.shape))
                found = tuple(sensitivities.shape)
                raise ValueError(f"sensitivities of K coils must have shape (K, {sizes}), like the mask, got {found}.")
            if not bool(torch.isfinite(sensitivities).all()):
                raise ValueError("sensitivities must be finite, got NaN or infinite values.")
            sensitivities = sensitivities.detach().clone()
        self.mask: Tensor | None = mask.detach().clone()
        self.axes, self.sensitivities, self.complex = mask.ndim, sensitivities, complex
        self.gain = 1.0 if complex and sensitivities is None else None

    def __repr__(self) -> str:
        if self.mask is None:
            return super().__repr__()
        coils = "" if self.sensitivities is None else f", {len(self.sensitivities)} coils"
        share = float(self.mask.float().mean())
        sizes = "x".join(map(str, self.mask.shape))
        return f"Fourier({sizes}, {share:.0%} sampled{coils}{', complex' if self.complex else ''})"

    def measure(self, x: Tensor) -> Tensor:
        """The sampled values, and zeros elsewhere."""
        mask = self._sampled(x)
        if self.complex and x.shape[1] % 2:
            raise ValueError(f"complex samples must have an even number of channels, got shape {tuple(x.shape)}.")
        z = _joined(_exact(x)) if self.complex else _exact(x)
        if self.sensitivities is not None:
            z = (self._coils(x) * z[:, None]).flatten(1, 2)
        return torch.where(mask, _parts(torch.fft.fftn(z, dim=self._last, norm="ortho")), 0).to(x.dtype)

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The sum over the coils of the inverse transform times the conjugate sensitivity."""
        mask = self._sampled(y)
        self.sample_shape(y)  # checks the number of channels
        z = torch.fft.ifftn(_joined(torch.where(mask, _exact(y), 0)), dim=self._last, norm="ortho")
        if self.sensitivities is not None:
            z = (self._coils(y).conj() * z.unflatten(1, (len(self.sensitivities), -1))).sum(1)
        return (_parts(z) if self.complex else z.real).to(y.dtype)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The image with zeros in place of what is not sampled: the adjoint over the sum of squared sensitivities."""
        x = self.adjoint(y)
        if self.sensitivities is None:
            return x
        squares = self.sensitivities.abs().square().sum(0).to(x)
        return torch.where(squares > 0, x / squares, 0)

    def decomposition(self, x: Tensor) -> Decomposition | None:
        r"""For real samples without sensitivities :math:`A^\top A` is diagonal in the Fourier transform.

        Its eigenvalues are 1 where both f and -f are sampled, and 1/2 where one of them is.
        """
        if self.complex or self.sensitivities is not None:
            return super().decomposition(x)
        mask = self._sampled(x).expand(x.shape[-self.axes :])
        opposite = mask.flip(self._last).roll((1,) * self.axes, self._last)
        values = ((mask.to(x) + opposite.to(x)) / 2).sqrt()
        inverse = torch.where(values > 0, 1 / values, 0)
        return Decomposition(
            values,
            lambda x: hartley(x, self._last),
            lambda c: hartley(c, self._last),
            lambda y: hartley(self.adjoint(y), self._last) * inverse,
        )

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """That of y with the channels of the samples."""
        coils = 1 if self.sensitivities is None else len(self.sensitivities)
        if y.ndim < 3 or y.shape[1] % (2 * coils):
            raise ValueError(
                f"y of {self!r} must have the real and the imaginary parts as channels, a multiple of {2 * coils}, got "
                f"shape {tuple(y.shape)}."
            )
        return (y.shape[1] // (coils if self.complex else 2 * coils), *y.shape[2:])

    def to(self, device: torch.device | str) -> Fourier:
        """The operator with its tensors on a device."""
        new = copy.copy(self)
        new.mask = None if self.mask is None else self.mask.to(device)
        if self.sensitivities is not None:
            kind = torch.complex64 if self.sensitivities.is_complex() else torch.float32
            new.sensitivities = self.sensitivities.to(kind).to(device)
        return new

    @property
    def _last(self) -> tuple[int, ...]:
        return tuple(range(-self.axes, 0))

    def _sampled(self, x: Tensor) -> Tensor:
        """The mask for samples like x."""
        assert self.mask is not None  # noqa: S101
        if x.ndim != self.axes + 2 or x.shape[2:] != self.mask.shape:
            sizes = tuple(self.mask.shape)
            raise ValueError(f"{self!r} needs samples (N, C, ...) with the sizes {sizes}, got shape {tuple(x.shape)}.")
        return self.mask.to(x.device)

    def _coils(self, x: Tensor) -> Tensor:
        """The sensitivities (K, 1, ...) on x's device."""
        assert self.sensitivities is not None  # noqa: S101
        return self.sensitivities.to(x.device)[:, None]


class FourierLines(Fourier):
    """Observes every k-th line of the Fourier transform of images, and those around the frequency zero.

    The lines are columns of the transform. Column f of W is sampled if the smaller one of f and W - f is a multiple of
    k or at most center W / 2.

    Args:
        every: k, the distance of the lines, from 1 to 2^24.
        center: the share of columns around the frequency zero that are all sampled, from 0 to 1.

    Raises:
        TypeError: if ``every`` is not an integer, or ``center`` not a number.
        ValueError: if ``every`` or ``center`` is out of range.
    """

    form = "fourier:EVERY"
    help = (
        "of the Fourier transform, as in magnetic resonance imaging, only every EVERY-th column and the 8 % in the "
        "center are known; with center=0.04, 4 %"
    )
    examples = ("fourier:4", "fourier:2", "fourier:8,center=0.04")

    def __init__(self, every: int, *, center: float = 0.08) -> None:
        check_value("center", center, Field(float, low=0, high=1))
        self.every, self.center = check_count("every", every, most=2**24), center
        self.mask, self.axes, self.sensitivities, self.complex = None, 2, None, False

    def mask_of(self, y: Tensor) -> Tensor:
        """The sampled columns (W,)."""
        return self._sampled(y)

    def _sampled(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{self!r} needs images (N, C, H, W), got shape {tuple(x.shape)}.")
        column = torch.arange(x.shape[-1], device=x.device)
        distance = torch.minimum(column, x.shape[-1] - column)
        return (distance % self.every == 0) | (distance <= self.center * x.shape[-1] / 2)


def _exact(x: Tensor) -> Tensor:
    """X in float32 at least: there is no Fourier transform in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _joined(x: Tensor) -> Tensor:
    """Complex values from their real and imaginary parts as channels."""
    return torch.complex(*x.chunk(2, 1))


def _parts(z: Tensor) -> Tensor:
    """The real and the imaginary parts of complex values as channels."""
    return torch.cat([z.real, z.imag], 1)
