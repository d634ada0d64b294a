r"""Sampling an image of which something was seen, with a score that knows nothing of it.

The observation is :math:`y = A x_0 + \sigma_y n`. Write D for the denoised image, :math:`x + \sigma^2 s(x, \sigma)`,
:math:`P = A^\top A / c` for the projection on what was seen, :math:`y^+ = A^\top y / c`, and
:math:`\varsigma = \sigma_y / \sqrt c` for the noise of y in the image.

**Replacement** (an operator with a gain). The noise of y counts as a part of the noise of the chain. While
:math:`\sigma > \varsigma` the seen part of the state is replaced before every call of the network, and does not move:

.. math:: x \leftarrow x - P x + y^+ + \sqrt{\sigma^2 - \varsigma^2}\, P z .

Without noise and with a mask this is the inpainting of NCSN. At a quieter level the seen part has a law of its own,
:math:`p_\sigma(x)\, \mathcal{N}(y^+; x, \varsigma^2 - \sigma^2)`, and a Langevin step that stays at its level heads for

.. math:: P \hat D = (1 - \sigma^2/\varsigma^2)\, P D + (\sigma^2/\varsigma^2)\, y^+,
          \qquad \text{with noise}\ \sqrt{1 - \sigma^2/\varsigma^2}\, P z,

which is SNIPS for operators with a gain, without its singular value decomposition. A step that goes down to the next
level needs nothing more: what was seen is in its state.

**Guidance** (any operator, a JPEG codec too). The denoised image is moved towards what was seen,

.. math:: \hat D = D + w\, G\, \mathrm{lift}(y - \mathrm{measure}(D)), \qquad w = \frac{r^2}{r^2 + \sigma_y^2 / c},
          \qquad r^2 = \frac{\sigma^2 v}{\sigma^2 + v},

v being the variance of the data: with G = 1, or :math:`G = (\sigma^2 / r^2)\, \partial D^\top / \partial x`, which
takes a backward pass through the network. Both are exact for Gaussian data of covariance v I.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 2.
    Kawar et al., 2021, SNIPS, arXiv:2105.14951.
    Wang et al., 2023, DDNM, arXiv:2212.00490, and Zhu et al., 2023, DiffPIR, arXiv:2305.08995 (G = 1).
    Song et al., 2023, Pseudoinverse-Guided Diffusion Models for Inverse Problems (the other G).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from scorematch.observe import Observation

Restore = Literal["replace", "guide", "guide-jacobian"]
Score = Callable[[Tensor, Tensor], Tensor]


class Restoration:
    """What a chain does about an observation. This one does nothing: there is none."""

    def score(self, score: Score, x: Tensor, sigma: Tensor, rows: slice) -> Tensor:
        """The score that the chain follows, at these rows x of the state."""
        return score(x, sigma)

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state as a step begins, before the score is taken of it; z is the step's noise."""
        return x

    def settle(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score and the noise of a step that stays at its level."""
        return score, z

    def finish(self, x: Tensor) -> Tensor:
        """The result, with what was seen without noise put back."""
        return x


class Replacement(Restoration):
    """Noise-aware replacement, for an operator with a gain."""

    def __init__(self, observation: Observation) -> None:
        gain = observation.operator.gain
        assert gain is not None  # noqa: S101  (restoration() sees to it)
        self._operator = observation.operator
        self._y = self._operator.lift(observation.y)
        self._sigma = observation.sigma / gain**0.5

    def _seen(self, x: Tensor) -> Tensor:
        return self._operator.lift(self._operator.measure(x))

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """What was seen, with noise of the level, in its place."""
        if sigma <= self._sigma:
            return x
        noise = self._seen(z.to(x)) * (sigma**2 - self._sigma**2) ** 0.5
        return x - self._seen(x) + self._y + noise

    def settle(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Nothing moves what was seen; at levels below its noise, it is pulled."""
        z = z.to(x)
        if sigma > self._sigma:
            return score - self._seen(score), z - self._seen(z)
        share = (sigma / self._sigma) ** 2
        pull = (self._y - self._seen(x)) / self._sigma**2
        return score - share * self._seen(score) + pull, z - (1 - (1 - share) ** 0.5) * self._seen(z)

    def finish(self, x: Tensor) -> Tensor:
        """The denoised image with what was seen in its place."""
        return x if self._sigma else x - self._seen(x) + self._y


class Guidance(Restoration):
    """The denoised image moved towards what was seen.

    Args:
        observation: of any operator.
        variance: v, of the data.
        jacobian: whether G is the transposed Jacobian of the denoised image.
    """

    def __init__(self, observation: Observation, variance: float, *, jacobian: bool) -> None:
        self._observation = observation
        self._variance = variance
        self._jacobian = jacobian
        self._exact = Replacement(observation) if observation.operator.gain is not None else Restoration()

    def score(self, score: Score, x: Tensor, sigma: Tensor, rows: slice) -> Tensor:
        """The score of the moved denoised image."""
        operator, y = self._observation.operator.rows(rows), self._observation.y
        y = y[rows] if len(y) > 1 else y
        level = sigma.square()
        spread = level * self._variance / (level + self._variance)  # r^2
        with torch.set_grad_enabled(self._jacobian):
            x = x.detach().requires_grad_(self._jacobian)
            follow = score(x, sigma)
            denoised = x + level * follow
        missing = operator.lift(y - operator.measure(denoised.detach()))
        missing = missing * (spread / (spread + self._observation.sigma**2 / (operator.gain or 1.0)))
        if self._jacobian:
            (missing,) = torch.autograd.grad(denoised, x, missing)
            return follow.detach() + missing / spread
        return follow + missing / level

    def finish(self, x: Tensor) -> Tensor:
        """The denoised image with what was seen in its place, for an operator with a gain."""
        return self._exact.finish(x)


def restoration(observation: Observation | None, restore: Restore, variance: float) -> Restoration:
    """The restoration that ``restore`` names; replacement falls back to guidance for an operator without a gain."""
    if observation is None:
        return Restoration()
    if restore == "replace" and observation.operator.gain is not None:
        return Replacement(observation)
    return Guidance(observation, variance, jacobian=restore == "guide-jacobian")
