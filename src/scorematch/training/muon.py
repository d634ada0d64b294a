r"""Muon, an optimizer for the matrices of a network, and AdamW for its other parameters.

AdamW scales each value of a gradient by itself. Muon (Jordan et al., 2024) makes the singular values of a gradient
equal, so that a step changes all directions of a matrix alike. With the gradient G of a matrix of m x n values, the
momentum M, and the learning rate eta,

.. math::
    M \leftarrow 0.95 M + 0.05\, G, \qquad
    W \leftarrow W - 0.2\, \eta\, \sqrt{\max(m, n)}\; \operatorname{orthogonal}(0.95 M + 0.05\, G)

where orthogonal(U S V^T) is about U V^T. The factor gives a step the mean square of one of AdamW, so that both have the
same learning rate (Liu et al., 2025). The weight of a convolution is a matrix with a row for each output channel.

References:
    Jordan et al., 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon.
    Liu et al., 2025, Muon is Scalable for LLM Training, arXiv:2502.16982, Section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
# An odd polynomial a s + b s^3 + c s^5, which moves singular values from (0, 1] to about 1 in five repetitions.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_REPETITIONS = 5
# Matrices of one size are computed together, with fewer kernels, up to this number of values; on a CPU that is slower.
_GROUP_VALUES = 2**24
_ALONE = ("cpu",)


def matrices(net: nn.Module) -> list[Tensor]:
    """The weights of the linear layers and convolutions of a network."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [layer.weight for layer in net.modules() if isinstance(layer, layers) and layer.weight.requires_grad]


def orthogonal(x: Tensor) -> Tensor:
    """Matrices with the singular vectors of ``x`` (..., m, n), whose singular values are between 0.68 and 1.21.

    Values below 0.0016 of the norm of a matrix become smaller ones. The polynomial is applied to the product of ``x``
    and its transpose, which is smaller than ``x``.
    """
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    identity = torch.eye(wide.shape[-2], dtype=x.dtype, device=x.device)

    def factor_of(gram: Tensor) -> Tensor:  # with s^2 for gram, the polynomial divided by s
        return _A * identity + _B * gram + _C * (gram @ gram)

    gram = wide @ wide.mT
    product = factor = factor_of(gram)
    for _ in range(_REPETITIONS - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    wide = product @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def _groups(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in groups of one size."""
    sizes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            sizes.setdefault(parameter.shape, []).append(parameter)
    for size, group in sizes.items():
        count = 1 if group[0].device.type in _ALONE else max(1, _GROUP_VALUES // size.numel())
        yield from (group[start : start + count] for start in range(0, len(group), count))


class Muon(torch.optim.AdamW):
    """Muon for some parameters, and AdamW for the others.

    Args:
        parameters: all parameters.
        matrices: those that Muon trains, with at least two dimensions.
        options: the arguments of AdamW; ``lr`` and ``weight_decay`` are also those of Muon.
    """

    def __init__(self, parameters: Iterable[Tensor], matrices: Iterable[Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._step_supports_amp_scaling = False  # so that a scaler leaves out a step with infinite gradients
        self.matrices = list(matrices)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Changes the parameters by one step; the gradients of the matrices are removed."""
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for parameters in _groups(self.matrices):
            updates = orthogonal(torch.stack([self._direction(parameter).flatten(1) for parameter in parameters]))
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * decay)
                parameter.add_(update.reshape(parameter.shape), alpha=-0.2 * lr * math.sqrt(max(update.shape)))
                parameter.grad = None  # AdamW leaves out parameters without a gradient
        return super().step(closure)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Adds the gradient to the momentum of a parameter, and returns the mean of both."""
        gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        return gradient.lerp(state["momentum"].lerp_(gradient, 1 - _MOMENTUM), _MOMENTUM)
