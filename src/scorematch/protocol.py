"""The interface of a score: a callable ``score(x, sigma)`` or ``score(x, sigma, condition)``.

x is a batch (N, ...), sigma its noise level, () or (N,), and the result has the shape of x. Losses, samplers and
likelihood take any such callable. A score may also have attributes: the noise levels that it was trained on
(``schedule``), the range of its data (``value_range``) and the shape of one sample (``sample_shape``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scorematch.noise import NoiseSchedule

Score = Callable[..., Tensor]


# -- Attributes -------------------------------------------------------------------------------------------------------


def attribute(score: object, name: str) -> Any:
    """An attribute of a network or of the one inside DistributedDataParallel and similar wrappers; None without it."""
    inner = getattr(score, "module", None) if isinstance(score, nn.Module) else None
    return getattr(score, name, getattr(inner, name, None))


def schedule_of(score: object) -> NoiseSchedule | None:
    """The noise levels that a network was trained on; None for a plain callable, which has none."""
    schedule = attribute(score, "schedule")
    return schedule if isinstance(schedule, NoiseSchedule) else None


def middle_of(score: object) -> float:
    """The middle of the range of a network's data, where every sampler starts; 0 for data without a range."""
    value_range = attribute(score, "value_range")
    return 0.0 if value_range is None else (value_range[0] + value_range[1]) / 2


# -- Checks -----------------------------------------------------------------------------------------------------------


def check_data(x: Any, name: str = "x") -> None:
    """Checks that x is a batch of floating-point data, (N, ...) with N at least 1.

    Raises:
        TypeError: for something that is not a tensor, or an integer tensor.
        ValueError: for a tensor without a batch axis, or an empty batch.
    """
    if not isinstance(x, Tensor):
        hint = "Write torch.as_tensor(x)."
        if isinstance(x, list | tuple):
            hint = "A batch of a data set with labels is [x, y]: pass its first entry."
        raise TypeError(f"{name} must be a tensor (N, ...), got {type(x).__name__}. {hint}")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, images in [0, 1], got {x.dtype}. Write {name} / 255 for 8-bit images."
        )
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{name} must be a batch (N, ...) with at least one sample, got shape {tuple(x.shape)}.")


def as_sigma(sigma: float | Tensor, x: Tensor) -> Tensor:
    """A noise level as a tensor () or (N,), on the device of x and in its dtype, or in float32 if that is wider.

    A level on the CPU is checked to be positive. One on another device is not, since the check would wait for that
    device.

    Raises:
        TypeError: for an integer tensor.
        ValueError: for another shape, or a level that is not positive.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        if isinstance(sigma, int | float):
            if not sigma > 0:
                raise ValueError(f"sigma must be positive, got {sigma:g}.")
            return torch.full((), sigma, dtype=dtype, device=x.device)  # a fill: nothing is copied from the host
        sigma = torch.as_tensor(sigma)
    if not sigma.is_floating_point():
        raise TypeError(
            f"sigma is a noise level, a standard deviation in the units of x, got {sigma.dtype}. For level i of a "
            "schedule write schedule[i]."
        )
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
        raise ValueError(f"sigma must be a float, () or ({len(x)},) like the batch, got shape {tuple(sigma.shape)}.")
    wrong = first_where(sigma, lambda sigma: ~(sigma > 0))
    if wrong is not None:
        raise ValueError(f"sigma must be positive, got {wrong:g}.")
    return sigma.to(dtype).to(x.device)  # cast first: not every device has float64


def first_where(values: Tensor, wrong: Callable[[Tensor], Tensor]) -> float | None:
    """The first of the values for which ``wrong`` holds; None if there is none, or if values cannot be read.

    They are not read inside torch.compile and torch.func.vmap, nor on another device than the CPU, for which the host
    would have to wait.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        found = values[wrong(values)]
    except RuntimeError:  # of torch.func.vmap, whose tensors cannot have a size that depends on their values
        return None
    return found[0].item() if len(found) else None


def check_score(score: Tensor, x: Tensor) -> Tensor:
    """The score, after a check that it has the shape of x.

    Raises:
        ValueError: for another shape. A score is never broadcast.
    """
    if score.shape != x.shape:
        raise ValueError(
            f"the network returned shape {tuple(score.shape)} for x of shape {tuple(x.shape)}: a score has the shape "
            "of x."
        )
    return score


def per_image(value: Tensor | float, x: Tensor) -> Tensor | float:
    """A value that multiplies x (N, ...) sample by sample: a number or () unchanged, (N,) with as many axes as x."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.view(-1, *[1] * (x.ndim - 1))


# -- Eval mode --------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(net: object) -> Iterator[None]:
    """Puts a network into eval mode, and afterwards each of its modules back into the mode that it had.

    Several threads may use it at once for one network: the last one to leave restores the modes.
    """
    if not isinstance(net, nn.Module):
        yield
        return
    with _lock:
        count, training = _users.get(net, (0, []))
        if count == 0:
            training = [module for module in net.modules() if module.training]
            for module in training:
                module.training = False
        _users[net] = (count + 1, training)
    try:
        yield
    finally:
        with _lock:
            count, training = _users[net]
            if count > 1:
                _users[net] = (count - 1, training)
            else:
                del _users[net]
                for module in training:
                    module.training = True
