r"""Sampling images that agree with an observation, with a score that was not trained for this.

The observation is :math:`y = A x_0 + \sigma_y n` with an operator A and standard normal noise n. Let D be the denoised
image, :math:`x + \sigma^2 s(x, \sigma)`. If the operator has a gain c (:math:`A A^\top = c I`), let
:math:`P = A^\top A / c` be the projection onto the observed part, :math:`y^+ = A^\top y / c`, and
:math:`\varsigma = \sigma_y / \sqrt c` the noise level of :math:`y^+`.

**Replacement** (for operators with a gain). The noise of y is treated as a part of the noise of the chain. While
:math:`\sigma \ge \varsigma`, the observed part of the state is replaced before each network call, and the step does not
change it:

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

**Guidance** (for any operator, including a JPEG codec). The denoised image is moved towards the observation. Let
:math:`e = \mathrm{lift}(y - \mathrm{measure}(D))`, c be 1 for an operator without a gain, and

.. math:: \hat D = D + \frac{r^2}{r^2 + \sigma_y^2 / c}\, e \quad (\text{"guide"}), \qquad
          \hat D = D + \frac{\sigma^2}{q^2 + \sigma_y^2 / c}\, J^\top e \quad (\text{"guide-jacobian"}),

.. math:: r^2 = \frac{\sigma^2 v}{\sigma^2 + v}, \qquad
          q^2 = \max \Bigl( r^2,\; \frac{\sigma^2}{2}\, \frac{e^\top J^\top e}{e^\top e},\;
          \frac{\sigma^2}{4}\, \frac{\lVert J^\top e \rVert}{\lVert e \rVert} \Bigr),

where v is the variance of the data, and J, the Jacobian of D, needs a backward pass through the network. The standard
deviation of the data is taken to be the ``sigma_data`` that a network with the preconditioning "karras" was given,
otherwise a quarter of the value range, and 1 without a range. The covariance of :math:`x_0` given x is
:math:`\sigma^2 J`. With its variance along e in place of :math:`q^2` the change would be the first step of the method
of conjugate gradients towards the conditional score of Gaussian data; half of that variance is an over-relaxation by
two. The last term limits the change to four times the length of e. Without it the change is unbounded where the
variance along e is nearly zero or, since the Jacobian of a network is not symmetric, negative. ΠGDM divides by
:math:`r^2`, the variance for the covariance v I. At high levels that is too small by orders of magnitude for directions
in which data vary more than their single pixels do, such as the brightness of a large image, and its chains diverge
there. Both methods are exact for Gaussian data with covariance v I.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 2.
    Kawar et al., 2021, SNIPS, arXiv:2105.14951.
    Wang et al., 2023, DDNM, arXiv:2212.00490, and Zhu et al., 2023, DiffPIR, arXiv:2305.08995 ("guide").
    Song et al., 2023, Pseudoinverse-Guided Diffusion Models for Inverse Problems (ΠGDM).
    Meng et al., 2021, Estimating High Order Gradients of the Data Distribution by Denoising, arXiv:2111.04726, for the
    covariance of x0 given x.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from scorematch.observe import Observation
from scorematch.protocol import Score, check_differentiable, per_image, score_at

Restore = Literal["replace", "guide", "guide-jacobian"]


class Restoration:
    """How a sampler uses an observation. This base class stands for no observation and changes nothing.

    Attributes:
        sigma: the noise level below which ``project`` changes nothing, since the state contains the observation.
    """

    sigma = 0.0

    def start(self, x: Tensor, sigma: float, middle: float) -> Tensor:
        """The state to start from; x is noise of the highest level, sigma, around ``middle``."""
        return x

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that the sampler uses at x, the ``rows`` of the state; sigma is a float or a tensor ()."""
        return score(x, sigma)

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state at the start of a step, before the score is computed; z is the noise of the step."""
        return x

    def stay(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score and the noise of a step that stays at its level."""
        return score, z

    def project_last(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state before the final denoising, at the lowest level; z is the noise of the last step."""
        return self.project(x, sigma, z)

    def finish(self, x: Tensor) -> Tensor:
        """The result; if y has no noise, its observed part is replaced by the observation."""
        return x


class Replacement(Restoration):
    """Noise-aware replacement, for an operator with this gain."""

    def __init__(self, observation: Observation, gain: float) -> None:
        self._operator = observation.operator
        self._y = self._operator.lift(observation.y)
        self.sigma = observation.sigma / gain**0.5

    def _observed(self, x: Tensor) -> Tensor:
        """P x, the observed part of x."""
        return self._operator.lift(self._operator.measure(x))

    def start(self, x: Tensor, sigma: float, middle: float) -> Tensor:
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


class Guidance(Restoration):
    """Moves the denoised image towards the observation.

    Args:
        observation: an observation with any operator.
        variance: v, the variance of the data.
        jacobian: whether the change is multiplied by the transposed Jacobian of the denoised image.
    """

    def __init__(self, observation: Observation, variance: float, *, jacobian: bool) -> None:
        self._observation = observation
        self._variance = variance
        self._jacobian = jacobian
        gain = observation.operator.gain
        self._exact = Restoration() if gain is None else Replacement(observation, gain)

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that corresponds to the moved denoised image."""
        operator, y = self._observation.operator.rows(rows), self._observation.y
        y = y[rows] if len(y) > 1 else y
        level = sigma**2
        spread = level * self._variance / (level + self._variance)  # r^2
        with torch.set_grad_enabled(self._jacobian):
            x = x.detach().requires_grad_(self._jacobian)
            follow = score_at(score, x, sigma, None)
            if self._jacobian:
                check_differentiable(follow)
            denoised = x + level * follow
        missing = operator.lift(y - operator.measure(denoised.detach()))
        noise = self._observation.sigma**2 / (operator.gain or 1.0)
        if not self._jacobian:
            return follow + missing * (spread / ((spread + noise) * level))
        (gradient,) = torch.autograd.grad(denoised, x, missing)
        squares = missing.square().flatten(1).sum(1)
        along = (missing * gradient).flatten(1).sum(1) / squares
        length = (gradient.square().flatten(1).sum(1) / squares).sqrt()
        # Half of the variance was better than all of it for digits and for faces; with a quarter of it Heun's method
        # diverged on 18 levels. The quotients are NaN if nothing is missing.
        spread = (level * torch.maximum(along / 2, length / 4)).nan_to_num(0.0).clamp(min=spread)
        return follow.detach() + gradient / per_image(spread + noise, x)

    def finish(self, x: Tensor) -> Tensor:
        """As in ``Replacement`` if the operator has a gain; otherwise the denoised image unchanged."""
        return self._exact.finish(x)


def restoration(observation: Observation, restore: Restore, variance: float) -> Restoration:
    """Creates the method with the name ``restore``; for an operator without a gain, "replace" means "guide"."""
    gain = observation.operator.gain
    if restore == "replace" and gain is not None:
        return Replacement(observation, gain)
    return Guidance(observation, variance, jacobian=restore == "guide-jacobian")
