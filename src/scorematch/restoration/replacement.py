r"""Replacement, for operators with a gain: the observed part of the state is replaced by the observation.

The notation is that of ``scorematch.restoration.method``. The noise of y is treated as a part of the noise of the
chain. While :math:`\sigma \ge \varsigma`, the observed part of the state is replaced before each network call, and the
step does not change it:

.. math:: x \leftarrow x - P x + y^+ + \sqrt{\sigma^2 - \varsigma^2}\, P z .

For a mask and a y without noise this is the inpainting of NCSN. If y has noise, but less than the lowest level, the
final denoising begins with :math:`y^+` alone, since it would not remove all of the noise added to it. At levels below
:math:`\varsigma` the observed part has the density :math:`p_\sigma(x)\, \mathcal{N}(y^+; x, \varsigma^2 - \sigma^2)`,
and a Langevin step that stays at its level uses

.. math:: P \hat D = (1 - \sigma^2/\varsigma^2)\, P D + (\sigma^2/\varsigma^2)\, y^+,
          \qquad \text{with noise}\ \sqrt{1 - \sigma^2/\varsigma^2}\, P z,

which is SNIPS for operators with a gain, without its singular value decomposition. A step of the reverse diffusion to
the next lower level needs no correction, because its state already contains the observation. A step that adds more
noise than that would erase it; at these levels samplers limit the noise to that of the reverse diffusion. A step that
adds less noise, as along the probability flow, would keep too much of the noise of y, and the results would differ too
little. A step from a level above :math:`\varsigma` to one below it begins with y plus noise, and uses less of the
information in y. The samples can then vary more than the posterior, above all if the two levels are far apart. If
:math:`\varsigma` is one of the levels, there is no such step. If the highest level :math:`\sigma_1` is not above
:math:`\varsigma`, the observed part of the start is drawn given y, with the normal distribution around m, the middle of
the value range, as :math:`p_{\sigma_1}`:

.. math:: P x = P \Bigl( m + \frac{\sigma_1^2}{\varsigma^2} (y^+ - m)
          + \sigma_1 \sqrt{1 - \sigma_1^2/\varsigma^2}\, z \Bigr).

If the values of y have different noise, each is treated by its own :math:`\varsigma`.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 2.
    Kawar et al., 2021, SNIPS, arXiv:2105.14951.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scorematch.restoration.method import Restoration, known_sigma
from scorematch.restoration.observation import Observation


def replacement(observation: Observation, gain: float) -> Restoration:
    """The method for an operator with this gain."""
    sigma = known_sigma(observation, "replace")
    return Replacement(observation, gain) if isinstance(sigma, float) else _OfEach(observation, gain, sigma)


class Replacement(Restoration):
    """Noise-aware replacement, for a y with the same noise in all values."""

    def __init__(self, observation: Observation, gain: float) -> None:
        self._operator = observation.operator
        self._y = self._operator.pseudo_inverse(observation.observed(observation.y))
        self.sigma = float(known_sigma(observation, "replace")) / gain**0.5

    def _observed(self, x: Tensor) -> Tensor:
        """P x, the observed part of x."""
        return self._operator.pseudo_inverse(self._operator.measure(x))

    def start(self, x: Tensor, sigma: float, middle: float | Tensor) -> Tensor:
        """The noise x; its observed part contains the observation if sigma is not above the noise level of y."""
        if sigma > self.sigma:
            return x
        share = (sigma / self.sigma) ** 2
        known = middle + share * (self._y - middle) + (1 - share) ** 0.5 * (x - middle)
        return x + self._observed(known - x)

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state with its observed part replaced by the observation, with noise of level sigma."""
        if sigma < self.sigma:
            return x
        noise = self._observed(z) * (sigma**2 - self.sigma**2) ** 0.5
        return x - self._observed(x) + self._y + noise

    def stay(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Keeps the observed part; at or below the noise level of y, samples it from its posterior."""
        if sigma > self.sigma:
            return score - self._observed(score), z - self._observed(z)
        share = (sigma / self.sigma) ** 2
        pull = (self._y - self._observed(x)) / self.sigma**2
        return score - share * self._observed(score) + pull, z - (1 - (1 - share) ** 0.5) * self._observed(z)

    def project_last(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """As ``project``, but without noise in addition to that of y, which would remain in the result."""
        return self.project(x, sigma, torch.zeros_like(z) if self.sigma else z)

    def finish(self, x: Tensor) -> Tensor:
        """The denoised image; if y has no noise, its observed part is replaced by the observation."""
        return x if self.sigma else x - self._observed(x) + self._y


class _OfEach(Replacement):
    """Noise-aware replacement, for a y whose values have noise of their own."""

    def __init__(self, observation: Observation, gain: float, sigma: Tensor) -> None:
        self._operator, self._y = observation.operator, observation.observed(observation.y)
        self._levels = sigma / gain**0.5
        self.sigma = float(observation.observed(self._levels).max())

    def _measured(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._operator.pseudo_inverse(factor * self._operator.measure(x))

    def _given(self, factor: Tensor) -> Tensor:
        return self._operator.pseudo_inverse(factor * self._y)

    def _share(self, sigma: float, above: float) -> Tensor:
        """The squares of sigma relative to the levels of y, and a number where sigma is above them."""
        return torch.where(self._levels < sigma, above, (sigma / self._levels) ** 2)

    def start(self, x: Tensor, sigma: float, middle: float | Tensor) -> Tensor:
        """The noise x; its observed values contain the observation where sigma is not above their noise."""
        share, around = self._share(sigma, 0), torch.zeros_like(x) + middle
        moved = self._given(share) - self._measured(around, share)
        return x + moved - self._measured(x - around, 1 - (1 - share).sqrt())

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state with its observed part replaced by the observation, with noise of level sigma."""
        known = (self._levels <= sigma).to(x.dtype)
        noise = self._measured(z, known * (sigma**2 - self._levels**2).clamp(min=0).sqrt())
        return x - self._measured(x, known) + self._given(known) + noise

    def stay(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Keeps the observed part; at or below the noise level of y, samples it from its posterior."""
        share, pull = self._share(sigma, 1), self._share(sigma, 0) / sigma**2
        pulled = self._given(pull) - self._measured(x, pull)
        return score - self._measured(score, share) + pulled, z - self._measured(z, 1 - (1 - share).sqrt())

    def finish(self, x: Tensor) -> Tensor:
        """The denoised image, whose values that were observed without noise are replaced by the observation."""
        exact = (self._levels == 0).to(x.dtype)
        return x - self._measured(x, exact) + self._given(exact)
