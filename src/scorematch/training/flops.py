"""The number of floating-point operations of a network, for the cost of a training step and of a network call."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from scorematch.score import ScoreNet


def training_flop(net: ScoreNet) -> int:
    """The number of floating-point operations of a training step per image, where a multiply-add counts as two.

    They are counted on the meta device, without any computation.

    Args:
        net: a network with a ``sample_shape`` and a known condition, on any device. It is not changed.

    Raises:
        ValueError: if the network has no ``sample_shape``, or its condition is not known.

    Example:
        >>> training_flop(ScoreNet.mlp(2, width=8, depth=1))
        4896
    """
    return _flop(net, backward=True)


def sampling_flop(net: ScoreNet) -> int:
    """The number of floating-point operations of a network call per image; see ``training_flop``.

    Example:
        >>> sampling_flop(ScoreNet.mlp(2, width=8, depth=1))
        1984
    """
    return _flop(net, backward=False)


def _flop(net: ScoreNet, *, backward: bool) -> int:
    takes = net.conditioning
    if net.sample_shape is None or takes is None:
        raise ValueError("the network must have a sample_shape, and a backbone whose condition is known.")
    named = itertools.chain(net.backbone.named_parameters(), net.backbone.named_buffers())
    weights = {name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for name, tensor in named}
    inputs: list[Any] = [torch.empty(1, *net.sample_shape, device="meta"), torch.empty(1, device="meta")]
    parts = {
        "class": torch.empty(1, dtype=torch.int64, device="meta"),
        "features": torch.empty(1, 0 if takes.encoder else takes.vector, device="meta"),
        "image": torch.empty(1, takes.channels, *net.sample_shape[1:], device="meta"),
    }
    given: Any = {name: parts[name] for name in takes.parts()}
    inputs += [given if takes.by_name else part for part in list(given.values())[:1]]
    with FlopCounterMode(display=False) as counter:
        output = functional_call(net.backbone, weights, tuple(inputs))
        if backward:
            output.sum().backward()
    return counter.get_total_flops()
