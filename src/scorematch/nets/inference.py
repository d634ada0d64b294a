"""The inference copy: a network prepared to be called many times, at one noise level after another.

It computes what its original computes, with six differences:

- weights are in channels_last, the layout in which convolutions are fastest (see below for CUDA);
- where the processor multiplies bfloat16 natively, the weights between the first and the last convolution are bfloat16,
  cast once. The convolutions that read or write the image, which at low noise levels needs more precision than bfloat16
  offers, stay in float32, and so do the modules of the noise level and the statistics of norms;
- what depends on the noise level alone is computed once per level, not once per call;
- attention with one head has two projections instead of four (``Attention.fold``);
- on a CPU a batch is processed in parts, small enough for the caches and for memory that the allocator keeps;
- it can be compiled.

On CUDA torch's group norm works in the contiguous layout alone: data in channels_last are copied before each norm and
again before the next convolution. Networks with group norms therefore keep the contiguous layout there, in which
nothing of this package copies; cuDNN may still transform the input of a convolution for itself. Which is faster has not
been measured on a GPU.

Only networks of this package's own classes, exactly as they were built, are copied. One with hooks, adapters, another
dtype, or that was compiled is called as it is.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scorematch.nets import Family
from scorematch.nets.family import as_condition, structure
from scorematch.noise import NoiseSchedule
from scorematch.precision import native_dtype
from scorematch.precondition import Coefficients, Preconditioning
from scorematch.protocol import as_sigma, check_data, per_image

if TYPE_CHECKING:
    from scorematch.sampling.settings import SamplerSettings

_PART_VALUES = 2**21  # eight megabytes of float32
# glibc keeps freed memory up to twice the largest block that was freed so far, if that had 32 MB at most. It begins
# with so little that it returns the memory of each layer and gets it again for the next, page by page.
_LARGEST_KEPT_BLOCK = 2**25 - 2**16


def is_plain(net: nn.Module, backbone: nn.Module) -> bool:
    """Whether a network with that backbone is float32 and as this package built it: nothing added, nothing replaced."""
    return (
        {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        and structure(backbone) == getattr(backbone, "built", None)
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._compiled_call_impl
            or "forward" in vars(module)
            or not type(module).__module__.startswith(("torch.nn.modules.", "scorematch."))
            for module in net.modules()
        )
    )


class InferenceScore:
    """The score of a network, prepared for inference. It is called as the network is, and every sampler accepts it.

    ``ScoreNet.inference_copy`` makes it. It holds its own copy of the weights and does not follow later changes of the
    network. Several threads may call it; their calls run one after another.

    Attributes:
        schedule: the noise levels that the network was trained on.
        value_range: (low, high) of the data, or None.
        sample_shape: of one sample, or None.
        sampler_settings: the settings recommended for the network, or None.
        conditioning: what the network takes as its condition.
        device: of the weights.
    """

    def __init__(
        self,
        family: Family[Any],
        backbone: nn.Module,
        preconditioning: Preconditioning,
        *,
        sample_shape: tuple[int, ...] | None,
        sampler_settings: SamplerSettings | None,
        compile: bool,  # noqa: A002  (torch's word)
    ) -> None:
        self.schedule: NoiseSchedule = preconditioning.schedule
        self.value_range = preconditioning.value_range
        self.sample_shape = sample_shape
        self.sampler_settings = sampler_settings
        self.conditioning = family.condition(backbone, predicts_variance=preconditioning.predicts_variance)
        self.device = next(backbone.parameters()).device
        self._preconditioning = preconditioning
        self._compiled = compile
        self._width = family.width(backbone)
        self._backbone, self._settle = copy_for_inference(family, backbone, native_dtype(self.device), compile=compile)
        self._lock = threading.Lock()
        self._level: tuple[float, torch.dtype] | None = None  # the noise level that the copy is set to
        self._coefficients: Coefficients

    def __call__(self, x: Tensor, sigma: float | Tensor, condition: Any = None) -> Tensor:
        """The score of x (N, ...) at a noise level: a float, () or (N,).

        A float, or a tensor on the CPU, is fastest: consecutive calls at the same level set the copy to it once. Levels
        (N,) are processed one by one, each with all of its images.
        """
        check_data(x)
        condition = as_condition(condition, x, self.conditioning)
        level = as_sigma(sigma, x)
        if level.ndim:
            scores = torch.empty_like(x)
            for one in level.unique():
                rows = level == one
                scores[rows] = self(x[rows], one, None if condition is None else condition[rows])
            return scores
        on_host = not isinstance(sigma, Tensor) or sigma.device.type == "cpu"
        with self._lock:
            self._set(level, (float(sigma), level.dtype) if on_host else None)
            size = part_size(self._width, x)
            conditions = [None] * -(-len(x) // size) if condition is None else condition.split(size)
            parts = [
                self._preconditioning.score(self._backbone, part, self._coefficients, beside)
                for part, beside in zip(x.split(size), conditions, strict=True)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def inference_copy(self, *, compile: bool = False) -> InferenceScore:  # noqa: A002  (torch's word)
        """This object, which is an inference copy already."""
        if compile and not self._compiled:
            raise ValueError("this inference copy is not compiled. Write net.inference_copy(compile=True).")
        return self

    def denoise(self, x: Tensor, sigma: float | Tensor, condition: Any = None) -> Tensor:
        """The denoised image, as ``ScoreNet.denoise``."""
        score = self(x, sigma, condition)
        return (x + per_image(as_sigma(sigma, x).square(), x) * score).to(x.dtype)

    def _set(self, level: Tensor, key: tuple[float, torch.dtype] | None) -> None:
        if key is not None and key == self._level:
            return
        self._level = None  # in case what follows is interrupted
        with torch.no_grad():
            self._coefficients = self._preconditioning.coefficients(level)
            self._settle(self._coefficients.c_noise.to(torch.float32))
        self._level = key


def part_size(width: int, x: Tensor) -> int:
    """How many of the images x are processed at once: on a CPU those with 2^21 values in the first feature map."""
    return len(x) if x.device.type != "cpu" else max(1, _PART_VALUES // (width * x.shape[2:].numel()))


def copy_for_inference(
    family: Family[Any],
    backbone: nn.Module,
    dtype: torch.dtype,
    *,
    compile: bool = False,  # noqa: A002  (torch's word)
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """The inference copy of a backbone, and the function that sets it to a noise level.

    Args:
        family: of the backbone.
        backbone: a network that ``is_plain``. It is not modified.
        dtype: of the weights between the first and the last convolution.
        compile: whether to compile the copy at its first call.

    Returns:
        The copy, called as its original, and ``settle(c_noise)``, c_noise being () float32: until the next call of it,
        the copy computes its output for that level.
    """
    made = copy.deepcopy(backbone).eval().requires_grad_(False)
    for module in made.modules():
        if hasattr(module, "fold"):
            cast(Any, module).fold()
    device = next(made.parameters()).device
    if device.type == "cpu":
        torch.empty(_LARGEST_KEPT_BLOCK, dtype=torch.uint8)  # and freed at once; its memory is never touched
    if device.type == "cpu" or (device.type == "cuda" and family.channels_last_on_cuda):
        for parameter in made.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if dtype != torch.float32:
        _lower(family, made, dtype)
    settle = family.settle(made)
    if compile:
        _compile(made, device)
    return made, settle


# -- Precision --------------------------------------------------------------------------------------------------------


def _lower(family: Family[Any], made: nn.Module, dtype: torch.dtype) -> None:
    first, last = family.image_convolutions(made)
    level = family.level_modules(made)
    for name, module in made.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or name in level:
            continue
        if name in first:
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        elif name in last:
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        else:
            module.to(dtype)


# -- Compilation ------------------------------------------------------------------------------------------------------


def _compile(made: nn.Module, device: torch.device) -> None:
    """Compiles in place at the first call. Where compilation fails it warns, and the network runs without."""
    plain = made.forward
    compiled = torch.compile(plain, mode="reduce-overhead" if device.type == "cuda" else None)

    def first(*arguments: Any) -> Tensor:
        try:
            output = compiled(*arguments)
        except Exception as error:  # of many kinds; for bad input the plain network raises its own error
            made.forward = plain
            output = plain(*arguments)
            warnings.warn(
                f"torch.compile failed, and sampling continues without it: {str(error).strip().splitlines()[0]}",
                stacklevel=2,
            )
        else:
            made.forward = compiled
        return output

    made.forward = first
