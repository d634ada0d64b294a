"""Batches of data: the checks of x (N, ...), of its noise levels and of its masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The tolerance, as a fraction of the range. Data in other units exceed it; the overshoot of image resizing does not.
_OVERSHOOT = 0.1


def is_outside(low: float, high: float, value_range: tuple[float, float]) -> bool:
    """Whether data with values from low to high are in other units than a range; NaN is outside of every range."""
    margin = _OVERSHOOT * (value_range[1] - value_range[0])
    return not (low >= value_range[0] - margin and high <= value_range[1] + margin)  # also true for NaN


def check_data(x: Any, name: str = "x") -> None:
    """Checks that x is a batch of floating-point data, (N, ...) with N at least 1.

    Raises:
        TypeError: if x is not a floating-point tensor.
        ValueError: if x has fewer than two axes, or the batch is empty.
    """
    if not isinstance(x, Tensor):
        gaps = ".filled(numpy.nan)" if hasattr(x, "filled") else ""  # of a masked array
        hint = f"Write torch.as_tensor({name}{gaps})."
        if isinstance(x, list | tuple) and name == "x":
            hint = "A batch of a data set with labels is [x, y]: pass its first entry."
        raise TypeError(f"{name} must be a tensor (N, ...), got {type(x).__name__}. {hint}")
    if not x.is_floating_point():
        hint = f"{name} / 255 for 8-bit images, and {name}.float() for other data"
        hint = f"torch.cat([{name}.real, {name}.imag], 1)" if x.is_complex() else hint
        raise TypeError(f"{name} must be floating point, got {x.dtype}. Write {hint}.")
    # x.shape[0] and not len(x), which torch.export would make a constant.
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must be a batch (N, ...) with at least one sample, got shape {tuple(x.shape)}.")


def as_sigma(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Converts a noise level to a tensor () or (N,) on the device of x, in x's dtype, but at least float32.

    A level on the CPU must be positive. A level on another device is not checked, since reading it would synchronize
    with that device.

    Raises:
        TypeError: if sigma is an integer tensor, or not a number.
        ValueError: if sigma has another shape, or is not positive.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        if isinstance(sigma, int | float):
            if not sigma > 0:
                raise ValueError(f"sigma must be positive, got {sigma:g}.")
            return torch.full((), sigma, dtype=dtype, device=x.device)  # without a copy from the CPU
        try:
            sigma = torch.as_tensor(sigma, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"sigma must be a noise level, a float or a tensor () or (N,), got {sigma!r}.") from error
    if not sigma.is_floating_point():
        raise TypeError(
            "sigma must be a floating-point noise level, a standard deviation in the units of x, got "
            f"{sigma.dtype}. Write schedule[i] for level i of a schedule."
        )
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape != x.shape[:1]):
        raise ValueError(f"sigma must be a float, () or ({len(x)},) like the batch, got shape {tuple(sigma.shape)}.")
    wrong = first_where(sigma, lambda sigma: ~(sigma > 0))
    if wrong is not None:
        raise ValueError(f"sigma must be positive, got {wrong:g}.")
    return sigma.to(dtype).to(x.device)  # cast first: not every device has float64


def first_where(values: Tensor, wrong: Callable[[Tensor], Tensor]) -> float | None:
    """The first of the values for which ``wrong`` is true; None if there is none, or if the values are not read.

    Values are not read inside torch.compile and torch.func.vmap, nor on another device than the CPU, where reading
    would synchronize with the device.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        found = values[wrong(values)]
    except RuntimeError:  # torch.func.vmap does not support results whose shape depends on values
        return None
    return found[0].item() if len(found) else None


def as_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Expands a mask, bool and True where the loss counts, to the shape of x, and moves it to its device.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if it is not broadcastable to x.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a bool tensor, True where the loss counts, got {type(mask).__name__}. Write "
            "torch.as_tensor(mask)."
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where the loss counts, got {mask.dtype}. Write mask > 0.5.")
    try:
        return mask.to(x.device).expand(x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"mask must be broadcastable to x, {tuple(x.shape)}, got shape {tuple(mask.shape)}."
        ) from error


def without_history(x: Tensor) -> Tensor:
    """The tensor detached from the graph, and as an ordinary tensor if it was created in inference mode.

    A tensor of inference mode cannot be differentiated through.
    """
    return x.clone() if x.is_inference() else x.detach()


def per_image(value: Tensor | float, x: Tensor) -> Tensor | float:
    """Reshapes a value (N,) or (N, C) so that it broadcasts over x (N, C, ...); a number or () stays."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.view(*value.shape, *[1] * (x.ndim - value.ndim))
