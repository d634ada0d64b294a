r"""Fixed norms: the weights of each output of a layer keep their norm.

Steps make the norm of the weights grow, and a step of the same size then changes the network less. After each step,

.. math::
    w \leftarrow \frac{\lVert w_0 \rVert}{\lVert w \rVert}\, w

for the weights w of each output of a linear layer or convolution, whose norm was that of :math:`w_0` at first. The
learning rate alone decides then how much a step changes them. Weights that are zero at first are free.

References:
    Karras et al., 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696,
        config E, "forced weight normalization", there with layers that preserve magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FixedNorms:
    """The norms of the rows of matrices, and of the filters of convolutions.

    Args:
        weights: the weights by name, (outputs, ...).

    Attributes:
        norms: the norms at first by name, (outputs,).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.norms: dict[str, Tensor] = {
            name: weight.detach().flatten(1).norm(dim=1) for name, weight in weights.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the weights their norms back."""
        for name, weight in self.weights.items():
            own, first = weight.flatten(1).norm(dim=1), self.norms[name]
            factor = torch.where(first > 0, first / own.clamp(min=1e-12), 1.0)
            weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))

    def load(self, norms: Mapping[str, Tensor]) -> None:
        """Loads the norms of a checkpoint."""
        self.norms = {name: norms[name].to(own.device) for name, own in self.norms.items()}
