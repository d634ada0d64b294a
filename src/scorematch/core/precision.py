"""The precision of computations: half precision on devices with native support, and full float32 on request.

A CPU with AVX512-BF16 or AMX, and a CUDA device of compute capability 8.0 or higher, multiplies bfloat16 faster than
float32. Other devices emulate bfloat16: on a CPU with AVX2 only, a training step under autocast to bfloat16 took twelve
times as long as in float32. CUDA devices of compute capability 7.0 to 7.5, such as V100 and T4, multiply float16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch

from scorematch.core.arguments import check_choice

__all__ = ["autocast", "exact_float32", "native_dtype"]

Autocast = Literal["auto", "float32", "bfloat16", "float16"]


def native_dtype(device: torch.device | str) -> torch.dtype:
    """Returns the half precision that a device multiplies faster than float32, or float32 if there is none."""
    device = torch.device(device)
    if device.type == "cpu":
        # By name, since not every supported version of torch has both functions.
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return torch.bfloat16 if any(check is not None and check() for check in checks) else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) else torch.float32


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of any other device. On another device results may be rounded differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast(device: torch.device | str, precision: Autocast = "auto") -> AbstractContextManager[object]:
    """A context manager for the forward pass of a training step, in which operations autocast to half precision.

    Args:
        device: the device of the network.
        precision: "bfloat16" and "float16" enable autocast, "float32" does not; "auto" enables it for bfloat16 if the
            device multiplies it natively. Gradients in float16 need a scaled loss (``torch.amp.GradScaler``).

    Returns:
        ``torch.autocast``, or a context manager that does nothing.

    Raises:
        ValueError: if ``precision`` is unknown.

    Example:
        >>> from scorematch import ScoreNet, dsm_loss
        >>> net = ScoreNet.unet(1, 16, widths=(8, 16))
        >>> with autocast("cpu"):
        ...     loss = dsm_loss(net, torch.rand(2, 1, 16, 16))
    """
    check_choice("precision", precision, get_args(Autocast))
    device = torch.device(device)
    if precision == "bfloat16" or (precision == "auto" and native_dtype(device) == torch.bfloat16):
        return torch.autocast(device.type, torch.bfloat16)
    return torch.autocast(device.type, torch.float16) if precision == "float16" else nullcontext()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within this context, autocast is turned off on all devices on which it is on, for this thread."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# -- Full float32 -----------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_users = 0
_flags: list[tuple[Callable[[Any], None], Any, Any]] = []  # while they are changed


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within this context, float32 matrix products and convolutions use full precision, without TF32 or bfloat16.

    Autocast is turned off too, for this thread.

    On CUDA, torch computes float32 convolutions in TF32, with 10 bits of mantissa, by default, and matrix products too
    after ``torch.set_float32_matmul_precision("high")``. Torch's flags are global: while the context is active, they
    also apply to other threads. If several threads use it, the last one to leave restores the user's flags.
    """
    global _users
    with _lock:
        if _users == 0:
            _flags[:] = _read_flags()
            for write, _, exact in _flags:
                write(exact)
        _users += 1
    try:
        with without_autocast():
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for write, value, _ in _flags:
                    write(value)


def _read_flags() -> list[tuple[Callable[[Any], None], Any, Any]]:
    """Torch's flags in the order of writing: (function that writes it, the user's value, value for full precision).

    Since torch 2.9 there are older and newer flags. Writing an older one also writes newer ones, and reading an older
    one that contradicts the newer ones is an error.
    """
    backends: Any = torch.backends
    flags: list[tuple[Callable[[Any], None], Any, Any]] = []
    with suppress(RuntimeError):  # if the user has set newer flags only, an older one may not be readable, and stays
        flags.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest"))
    with suppress(RuntimeError):
        flags.append((partial(setattr, backends.cudnn, "allow_tf32"), backends.cudnn.allow_tf32, False))
    if hasattr(backends.cudnn, "conv"):
        cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
        for owner in (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv):
            flags.append((partial(setattr, owner, "fp32_precision"), owner.fp32_precision, "ieee"))
    return flags
