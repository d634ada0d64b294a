r"""What learned numbers of a sampler belong to: the weights of a network, and its guidance.

The weights w are told apart by two numbers that hardly depend on their precision, the real and the imaginary part of

.. math:: \frac{1}{\lVert w \rVert} \sum_k w_k\, e^{ik}.

For two networks that were trained independently they differ by about one, and by 0.001 for a copy in bfloat16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scorematch.core.schema import Field
from scorematch.core.scores import NetworkScore, Score

ORIGIN: Mapping[str, Field] = {
    "network": Field(list, required=True, optional=True, each=Field(float), low=2, high=2),
    "guidance": Field(str, required=True),
}
_SAME = 0.01


def origin_of(score: Score) -> dict[str, Any]:
    """The network of a score, None if its weights are not known (a function, an inference copy), and its guidance."""
    guidance: list[str] = []
    while isinstance(score, NetworkScore) and isinstance(score, nn.Module) and hasattr(score, "net"):
        guidance.append(f"{type(score).__name__.strip('_')}({score.extra_repr()})")
        score = score.net
    network = _fingerprint(score) if isinstance(score, nn.Module) else None
    return {"network": network, "guidance": " of ".join(guidance)}


def warn_of_origin(learned_for: Mapping[str, Any], score: Score) -> None:
    """Warns if a score is not the one for which settings were learned."""
    used = origin_of(score)
    a, b = learned_for["network"], used["network"]
    other = a is not None and b is not None and math.dist(a, b) > _SAME
    if other or learned_for["guidance"] != used["guidance"]:
        warnings.warn(
            f"these sampler settings were learned for {_named(learned_for)}, and are used for {_named(used)}. Learn "
            "them again, or choose others.",
            stacklevel=4,
        )


def _named(origin: Mapping[str, Any]) -> str:
    network = origin["network"]
    name = "a network" if network is None else f"the network ({network[0]:.3f}, {network[1]:.3f})"
    return f"{name} with {origin['guidance']}" if origin["guidance"] else f"{name} without guidance"


def _fingerprint(net: nn.Module) -> Sequence[float] | None:
    if any(weights.is_meta for weights in net.parameters()):  # they are not loaded, or elsewhere
        return None
    total, square = torch.zeros((), dtype=torch.complex128, device="cpu"), 0.0
    for weights in net.parameters():
        w = weights.detach().cpu().flatten().double()  # MPS has no float64
        k = torch.arange(len(w), dtype=torch.float64, device="cpu")
        total += torch.complex((w * k.cos()).sum(), (w * k.sin()).sum())
        square += float(w.square().sum())
    if not square or not math.isfinite(square):
        return None
    return [round(float(part) / math.sqrt(square), 4) for part in (total.real, total.imag)]
