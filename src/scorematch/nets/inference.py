"""The inference copy: a copy of a network that is optimized for many calls, with consecutive calls at the same level.

It computes the same function as the network, with six differences:

- weights are in channels_last, the memory format in which convolutions are fastest (see below for CUDA);
- if the processor multiplies half precision natively, the weights between the first and the last convolution are
  converted to it, once: to bfloat16, or to float16 on a GPU that has no bfloat16, if the network's input has unit
  variance at every level; float16 ends at 65,504. The convolutions that read or write the image stay in float32, since
  images at low noise levels need more precision than bfloat16 offers, and so do the modules for the noise level and the
  statistics of norms;
- what depends only on the noise level is computed once per level, not at each call;
- attention with one head has two projections instead of four (``Attention.fold``);
- on a CPU a batch is processed in parts that are small enough for the caches and for the memory that the allocator
  reuses;
- it can be compiled.

On CUDA torch's group norm supports the contiguous format only: data in channels_last are copied before each norm and
again before the next convolution. There, networks with group norms keep the contiguous format, in which this package
copies nothing; cuDNN may still convert the input of a convolution internally.

Only networks of this package's own classes, exactly as they were built, are copied. A network with hooks, adapters or
another dtype, or one that was compiled, is used without a copy.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from scorematch.core.batches import as_sigma, check_data
from scorematch.core.conditions import as_condition, rows_of
from scorematch.core.precision import native_dtype, without_autocast
from scorematch.core.scores import Given, NetworkScore
from scorematch.nets.blocks import Attention, without_trained_null
from scorematch.nets.family import Family, structure
from scorematch.nets.precondition import ROWS, Coefficients, Preconditioning
from scorematch.nets.space import Convolution
from scorematch.noise import NoiseSchedule

_PART_VALUES = 2**21  # eight megabytes of float32
# glibc keeps freed memory for reuse up to twice the size of the largest block freed so far, if that block had at most
# 32 MB. The initial limit is so low that the memory of each layer is returned to the system and requested again, page
# by page; a block of this size, allocated and freed once, raises the limit.
_LARGEST_KEPT_BLOCK = 2**25 - 2**16


def is_plain(net: nn.Module, backbone: nn.Module) -> bool:
    """Whether a network with this backbone is float32 and unchanged since it was built: no hooks, no other modules.

    Accelerate's hooks replace ``forward``.
    """
    return (
        {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        and structure(backbone) == getattr(backbone, "built", None)
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl
            or "forward" in vars(module)
            or not type(module).__module__.startswith(("torch.nn.modules.", "scorematch."))
            for module in net.modules()
        )
    )


class InferenceScore(NetworkScore):
    """A copy of a ScoreNet that is optimized for inference, called in the same way and accepted by every sampler.

    It is created by ``ScoreNet.inference_copy``. It has its own copy of the weights, which later changes of the network
    do not affect. Several threads may call it; the calls are executed one after another.

    Attributes:
        schedule: the noise levels that the network was trained on.
        value_range: (low, high) of the data, or None.
        units: the mean and the standard deviation of each channel of the data, or None.
        sample_shape: the shape of one sample, or None.
        sampler_settings: the sampler settings recommended for the network, or None.
        axes: the names of the axes of the data, or None.
        class_names: the names of the classes, or None.
        conditioning: the condition that the network takes, which must be given if it is a vector and the network was
            trained without ``label_drop``.
        predicts_variance: whether ``score_and_variance`` can be called.
        preconditioning: that of the network.
        device: the device of the weights.
        is_inference_copy: True.
    """

    is_inference_copy = True

    def __init__(
        self,
        family: Family[Any],
        backbone: nn.Module,
        preconditioning: Preconditioning,
        *,
        sample_shape: tuple[int, ...] | None,
        sampler_settings: Any,
        compile: bool,  # noqa: A002  (torch's word)
    ) -> None:
        self.schedule: NoiseSchedule = preconditioning.schedule
        self.value_range, self.units = preconditioning.value_range, preconditioning.data
        self.sample_shape = sample_shape
        self.sampler_settings = sampler_settings
        self.axes: tuple[str, ...] | None = None
        self.class_names: tuple[str, ...] | None = None
        self.predicts_variance = preconditioning.predicts_variance
        takes = family.condition(backbone, predicts_variance=self.predicts_variance)
        self.conditioning = takes._replace(null_class=False) if without_trained_null(backbone) else takes
        self.device = next(backbone.parameters()).device
        self.preconditioning = preconditioning
        self._compiled = compile
        self._width = family.width(backbone)
        dtype = native_dtype(self.device)
        if dtype == torch.float16 and not ROWS[preconditioning.row].centered:  # x is not scaled to unit variance
            dtype = torch.float32
        self._backbone, self._set_c_noise = copy_for_inference(family, backbone, dtype, compile=compile)
        self._lock = threading.Lock()
        self._level: tuple[float, torch.dtype] | None = None  # the noise level that the copy is set to
        self._coefficients: Coefficients

    def __call__(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> Tensor:
        """The score of x (N, ...) at a noise level sigma: a float, () or (N,).

        Arguments, result and errors are those of the ScoreNet. sigma as a float or as a tensor on the CPU is fastest:
        what depends on it is then computed once for consecutive calls at the same level. On a CPU, different levels in
        sigma (N,) are processed one after another, each with all of its images.
        """
        return self._outputs(x, sigma, condition)[0]

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        condition = as_condition(condition, x, self.conditioning)
        level = as_sigma(sigma, x)
        if level.ndim and by_level(x):
            outputs = tuple(torch.empty_like(x) for _ in range(1 + variance))
            for one in level.unique():
                rows = level == one
                given = rows_of(condition, rows)
                for output, part in zip(outputs, self._outputs(x[rows], one, given, variance=variance), strict=True):
                    output[rows] = part
            return outputs
        on_host = level.ndim == 0 and (not isinstance(sigma, Tensor) or sigma.device.type == "cpu")
        with self._lock, without_autocast():
            self._set(level, (float(sigma), level.dtype) if on_host else None)
            size = part_size(self._width, x)
            every = [slice(first, first + size) for first in range(0, max(1, len(x)), size)]
            parts = [
                self.preconditioning.outputs(
                    self._backbone, x[rows], self._coefficients, rows_of(condition, rows), variance=variance
                )
                for rows in every
            ]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def inference_copy(self, *, compile: bool = False) -> InferenceScore:  # noqa: A002  (torch's word)
        """Returns this object, which is already an inference copy.

        Raises:
            ValueError: for ``compile=True`` if it was created without.
        """
        if compile and not self._compiled:
            raise ValueError("this inference copy is not compiled. Write net.inference_copy(compile=True).")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceScore:
        """Returns this object, whose weights never change."""
        return self

    def __reduce__(self) -> NoReturn:
        """Raises TypeError: an inference copy depends on the processor."""
        raise TypeError("an inference copy cannot be pickled. Pickle the network, and call inference_copy() again.")

    def definition(self) -> list[Any]:
        """The preconditioning and the copy of the backbone."""
        return [self.preconditioning, self._backbone]

    def _set(self, level: Tensor, key: tuple[float, torch.dtype] | None) -> None:
        if key is not None and key == self._level:
            return
        self._level = None  # in case of an exception below
        with torch.inference_mode(False), torch.no_grad():  # what is kept can be used in any mode
            self._coefficients = self.preconditioning.coefficients(level)
            self._set_c_noise(self._coefficients.c_noise.to(torch.float32))
        self._level = key


def by_level(x: Tensor) -> bool:
    """Whether images of different levels are processed one after another; elsewhere the host would have to wait."""
    return x.device.type == "cpu"


def part_size(width: int, x: Tensor) -> int:
    """The number of images of x to process at once: on a CPU the first feature map then has at most 2^21 values."""
    return len(x) if x.device.type != "cpu" else max(1, _PART_VALUES // (width * x.shape[2:].numel()))


@torch.inference_mode(False)  # a copy that is made in inference mode can be differentiated later
def copy_for_inference(
    family: Family[Any],
    backbone: nn.Module,
    dtype: torch.dtype,
    *,
    compile: bool = False,  # noqa: A002  (torch's word)
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """Creates the inference copy of a backbone, and the function that sets its noise level.

    Args:
        family: the family of the backbone.
        backbone: a backbone for which ``is_plain`` is True. It is not modified.
        dtype: the dtype of the weights between the first and the last convolution.
        compile: whether to compile the copy at its first call.

    Returns:
        A tuple (copy, set_level). The copy is called in the same way as the backbone, but computes its output for the
        noise level of the last call of ``set_level(c_noise)``, where c_noise is a float32 tensor () or (N,).
    """
    device = next(backbone.parameters()).device
    channels_last = device.type == "cpu" or (device.type == "cuda" and family.channels_last_on_cuda)
    made = _clone(backbone, channels_last=channels_last).eval()
    for module in made.modules():
        if isinstance(module, Attention):
            module.fold()
    if device.type == "cpu":
        torch.empty(_LARGEST_KEPT_BLOCK, dtype=torch.uint8, device="cpu")  # freed at once; its pages are never touched
    if dtype != torch.float32:
        _lower(family, made, dtype)
    set_level = family.fix_level(made)
    if compile:
        _compile(made, device)
    return made, set_level


def _clone(module: nn.Module, *, channels_last: bool) -> nn.Module:
    """A copy of a plain module with its own weights, which need no gradient; faster than ``deepcopy``.

    Dicts, lists and sets are copied. All other attributes of the modules of this package are immutable, and are shared.
    """
    made: nn.Module = object.__new__(type(module))
    vars(made).update(
        {name: value.copy() if isinstance(value, dict | list | set) else value for name, value in vars(module).items()}
    )
    for name, parameter in module._parameters.items():
        made._parameters[name] = None if parameter is None else _own(parameter, channels_last=channels_last)
    for name, buffer in module._buffers.items():
        made._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _clone(child, channels_last=channels_last)
    return made


def _own(parameter: nn.Parameter, *, channels_last: bool) -> nn.Parameter:
    """A copy of a parameter that needs no gradient, in channels_last if wanted."""
    value = parameter.detach()
    made = value.contiguous(memory_format=torch.channels_last) if channels_last and value.ndim == 4 else value
    return nn.Parameter(made.clone() if made is value else made, requires_grad=False)


# -- Precision --------------------------------------------------------------------------------------------------------


def _lower(family: Family[Any], made: nn.Module, dtype: torch.dtype) -> None:
    first, last = family.image_convolutions(made)
    level = family.level_modules(made)
    for name, module in made.named_modules():
        if not isinstance(module, Convolution | nn.Linear) or name in level:
            continue
        if name in first:
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        elif name in last:
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        else:
            module.to(dtype)


# -- Compilation ------------------------------------------------------------------------------------------------------


def _compile(made: nn.Module, device: torch.device) -> None:
    """Compiles ``made.forward`` at its first call. If compilation fails, it warns and uses the uncompiled forward."""
    plain = made.forward
    compiled = torch.compile(plain, mode="reduce-overhead" if device.type == "cuda" else None)

    def first(*arguments: Any) -> Tensor:
        try:
            output = compiled(*arguments)
        except Exception as error:  # errors of many types; for invalid input ``plain`` below raises its own error
            made.forward = plain
            output = plain(*arguments)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"torch.compile failed; the network runs uncompiled: {reason}", stacklevel=2)
        else:
            made.forward = compiled
        return output

    made.forward = first
