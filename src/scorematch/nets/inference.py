"""The inference copy: a published network made ready to be called a thousand times, one noise level after another.

It computes what its original computes, with six differences:

- its convolutions lie in channels_last, the layout in which they are fastest;
- where the processor multiplies bfloat16 natively, the weights between the first and the last convolution are bfloat16,
  cast once. The convolutions at the image, which at a quiet level sees digits that bfloat16 has not, and everything
  about the noise level stay in float32, and so does what norms accumulate;
- what depends on the noise level alone is computed once a level, not once a call;
- attention with one head needs two projections instead of four (see ``_fold``);
- on a CPU a batch goes through it in parts, small enough for the caches and for memory that the allocator keeps;
- it can be compiled.

Only networks of this package are known well enough for that, and only as they were built: whoever has put hooks,
adapters or another dtype into one, or compiled it, finds it run as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from scorematch.nets.layers import ConditionalInstanceNormPlus, InstanceNormPlus, structure
from scorematch.nets.refinenet import RefineNet
from scorematch.nets.unet import Attention, ResidualBlock, UNet

_PART_VALUES = 2**20  # four megabytes of float32
# glibc keeps freed memory up to twice the largest block that was freed so far, if that had 32 MB at most. It begins
# with so little that it returns the memory of each layer and gets it again for the next, page by page.
_LARGEST_KEPT_BLOCK = 2**25 - 2**16
_SIGMA = ("time_proj", "time_embedding", "class_embedding", "time_emb_proj")


def is_plain(net: nn.Module, backbone: RefineNet | UNet) -> bool:
    """Whether a network with that backbone is float32 and as this package built it: nothing added, nothing replaced."""
    return (
        {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        and structure(backbone) == backbone.built
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._compiled_call_impl
            or "forward" in vars(module)
            or not type(module).__module__.startswith(("torch.nn.modules.", "scorematch."))
            for module in net.modules()
        )
    )


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a device that multiplies it faster than float32, else float32."""
    if device.type == "cpu":
        # Asked by name: not every torch that this package takes has both.
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        native = any(check is not None and check() for check in checks)
    else:
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def part_size(backbone: RefineNet | UNet, x: Tensor) -> int:
    """How many of the images x go through a network at once: on a CPU as many as have 2^20 values in a feature map."""
    if x.device.type != "cpu":
        return len(x)
    first = backbone.begin_conv if isinstance(backbone, RefineNet) else backbone.conv_in
    return max(1, _PART_VALUES // (first.out_channels * x.shape[2:].numel()))


def inference_copy(
    backbone: RefineNet | UNet,
    dtype: torch.dtype,
    *,
    compile: bool = False,  # noqa: A002  (torch's word)
) -> tuple[RefineNet | UNet, Callable[[Tensor], None]]:
    """The inference copy of a network, and the function that sets it to a noise level.

    Args:
        backbone: a network that ``is_plain``. It is not modified.
        dtype: of the weights between the first and the last convolution.
        compile: whether to compile the copy at its first call.

    Returns:
        The copy, called as its original, and ``settle(c_noise)``, c_noise being () float32: until the next time, the
        copy answers for that level, whatever is passed to it as one.
    """
    made = copy.deepcopy(backbone).eval().requires_grad_(False)
    for module in made.modules():
        if (
            isinstance(module, Attention)
            and module.heads == 1
            and module.to_q.weight.shape[0] == module.to_q.in_features
        ):
            _fold(module)
    device = next(made.parameters()).device
    if device.type == "cpu":
        torch.empty(_LARGEST_KEPT_BLOCK, dtype=torch.uint8)  # and freed; it is never touched
    if device.type in ("cpu", "cuda"):
        for parameter in made.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if dtype != torch.float32:
        _lower(made, dtype)
    settle = _settle_refinenet(made) if isinstance(made, RefineNet) else _settle_unet(made)
    if compile:
        _compile(made, device)
    return made, settle


# -- Precision --------------------------------------------------------------------------------------------------------


def _lower(made: RefineNet | UNet, dtype: torch.dtype) -> None:
    for name, module in made.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or any(part in _SIGMA for part in name.split(".")):
            continue
        first = name in ("begin_conv", "conv_in") or (name.startswith("down_blocks") and name.endswith("skip_conv"))
        last = name in ("end_conv", "conv_out") or (name.startswith("up_blocks") and name.endswith("skip_conv"))
        if first:
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        elif last:
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        else:
            module.to(dtype)


# -- Attention --------------------------------------------------------------------------------------------------------


def _fold(attention: Attention) -> None:
    r"""Takes the pixels themselves as keys and as values.

    With one head, the product of query and key is
    :math:`(W_q x_i + b_q)^\top (W_k x_j + b_k) = (W_k^\top W_q x_i + W_k^\top b_q)^\top x_j` plus what is the same for
    all j, which the softmax does not see. Its weights sum to one, so that :math:`W_v` can be applied after the mean.
    """
    q, k, v = attention.to_q, attention.to_k, attention.to_v
    out = cast(nn.Linear, attention.to_out[0])
    out.bias.copy_(out.bias + out.weight @ v.bias)
    out.weight.copy_(out.weight @ v.weight)
    q.bias.copy_(k.weight.T @ q.bias)
    q.weight.copy_(k.weight.T @ q.weight)
    attention._modules.update(to_k=nn.Identity(), to_v=nn.Identity())


# -- The noise level --------------------------------------------------------------------------------------------------


class _Settled(nn.Module):
    """Stands where a module of the noise level alone stood, with what that one says of the present level."""

    value: Tensor

    def forward(self, *_: Tensor) -> Tensor:
        return self.value


def _settle_refinenet(made: RefineNet) -> Callable[[Tensor], None]:
    """At a given level a conditional norm is a plain one."""
    pairs = []
    for parent in list(made.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, ConditionalInstanceNormPlus):
                table = module.embed.weight
                with torch.device("meta"):  # where nothing is drawn for it
                    norm = InstanceNormPlus(table.shape[1] // 3)
                norm = norm.to_empty(device=table.device).to(table).requires_grad_(False)
                parent._modules[name] = norm
                pairs.append((module, norm))

    def settle(position: Tensor) -> None:
        for conditional, norm in pairs:
            for parameter, row in zip((norm.gamma, norm.alpha, norm.beta), conditional.rows(position), strict=True):
                parameter.copy_(row)

    return settle


def _settle_unet(made: UNet) -> Callable[[Tensor], None]:
    """The embedding is one vector for all images; without classes, so is what each block makes of it."""
    features, embed = made.time_proj, made.time_embedding
    embedding = made.time_proj = _Settled()
    made._modules["time_embedding"] = nn.Identity()
    pairs = []
    if made.class_embedding is None:
        for block in made.modules():
            if isinstance(block, ResidualBlock):
                settled = _Settled()
                pairs.append((block.time_emb_proj, settled))
                block._modules["time_emb_proj"] = settled

    def settle(c_noise: Tensor) -> None:
        embedding.value = embed(features(c_noise[None]))
        for projection, settled in pairs:
            settled.value = projection(made.activation(embedding.value))

    return settle


# -- Compilation ------------------------------------------------------------------------------------------------------


def _compile(made: nn.Module, device: torch.device) -> None:
    """Compiles in place at the first call. Where there is no compiler, it says so and the network runs as it is."""
    plain = made.forward
    compiled = torch.compile(plain, mode="reduce-overhead" if device.type == "cuda" else None)

    def first(*arguments: Any) -> Tensor:
        try:
            output = compiled(*arguments)
        except Exception as error:  # of many kinds, and wrong input is said again by the network itself
            made.forward = plain
            output = plain(*arguments)
            warnings.warn(
                f"torch.compile failed, sampling goes on without it: {str(error).strip().splitlines()[0]}", stacklevel=2
            )
        else:
            made.forward = compiled
        return output

    made.forward = first
