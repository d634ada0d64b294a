r"""Guidance by an observation, with any operator: the denoised image is moved towards the observation.

The notation is that of ``scorematch.restoration.method``. Let
:math:`e = A^+ (y - A D)`. For an operator without a gain, let c be the largest squared singular value of its Jacobian
:math:`A'` at D, and :math:`e = A'^\top (y - A(D)) / c`. Let

.. math:: \hat D = D + \frac{r^2}{r^2 + \sigma_y^2 / c}\, e \quad (\text{"guide"}), \qquad
          \hat D = D + \frac{\sigma^2}{q^2 + \sigma_y^2 / c}\, J^\top e \quad (\text{"guide-jacobian"}),

.. math:: r^2 = \frac{\sigma^2 v}{\sigma^2 + v}, \qquad
          q^2 = \max \Bigl( r^2,\; \frac{\sigma^2}{2}\, \frac{e^\top J^\top e}{e^\top e},\;
          \frac{\sigma^2}{4}\, \frac{\lVert J^\top e \rVert}{\lVert e \rVert} \Bigr),

where v is the variance of the data, and J, the Jacobian of D, needs a backward pass through the network. The standard
deviation of the data is taken to be the attribute ``data_std`` of the score or, of a network with the preconditioning
"karras", the ``sigma_data`` that it was given; otherwise a quarter of the value range, and 1 without a range. The
covariance of :math:`x_0` given x is :math:`\sigma^2 J`. With its variance along e in place of :math:`q^2` the change
would be the first step of the method of conjugate gradients towards the conditional score of Gaussian data; half of
that variance is an over-relaxation by two. The last term limits the change to four times the length of e. Without it
the change is unbounded where the variance along e is nearly zero or, since the Jacobian of a network is not symmetric,
negative. ΠGDM divides by :math:`r^2`, the variance for the covariance v I. At high levels that is too small by orders
of magnitude for directions in which data vary more than their single pixels do, such as the brightness of a large
image, and its chains diverge there. Both methods are exact for Gaussian data with covariance v I.

If the values of y have different noise, :math:`d = (y - A D) / (r^2 + \sigma_y^2 / c)`, value by value, takes the place
of :math:`y - A D` in e, without another division in "guide". In "guide-jacobian" the result is multiplied by
:math:`d^\top (y - A D) / d^\top d`, and :math:`\sigma_y^2` is its mean with the weights :math:`d^2`.

References:
    Wang et al., 2023, DDNM, arXiv:2212.00490, and Zhu et al., 2023, DiffPIR, arXiv:2305.08995 ("guide").
    Song et al., 2023, Pseudoinverse-Guided Diffusion Models for Inverse Problems (ΠGDM).
    Meng et al., 2021, Estimating High Order Gradients of the Data Distribution by Denoising, arXiv:2111.04726, for the
    covariance of x0 given x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scorematch.core.batches import per_image
from scorematch.core.randomness import standard_normal
from scorematch.core.scores import Score, check_differentiable, score_at
from scorematch.restoration.method import Restoration, backward_pass, known_sigma, largest_eigenvalue
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Linearization
from scorematch.restoration.replacement import replacement


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
        self._name = "guide-jacobian" if jacobian else "guide"
        known_sigma(observation, self._name)
        gain = observation.operator.gain
        self._exact = Restoration() if gain is None else replacement(observation, gain)
        operator = observation.operator
        self._largest: Tensor | None = None  # the c of a linear operator without a gain; of others it depends on D
        if gain is None and operator.is_linear:
            like = observation.y.new_zeros((len(operator), *(observation.shape or ())))
            self._largest = _largest(observation, operator.linearized(like), like)

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that corresponds to the moved denoised image."""
        observation = self._observation.rows(rows)
        level = sigma**2
        spread = level * (self._variance / (level + self._variance))  # r^2
        with backward_pass(), torch.set_grad_enabled(self._jacobian):
            x = x.detach().requires_grad_(self._jacobian)
            follow = score_at(score, x, sigma, None)
            if self._jacobian:
                check_differentiable(follow)
            denoised = x + level * follow
        residual, back, gain = self._residual(observation, denoised.detach(), rows)
        direction, sigma_y = residual, known_sigma(observation, self._name)
        if isinstance(sigma_y, Tensor):
            direction = residual / (spread + sigma_y**2 / per_image(gain, residual))
            noise = per_image(_quotient(observation.covariance(direction), direction) / gain, x)
            share = spread / level
        else:
            noise = per_image(sigma_y**2 / gain, x)
            share = spread / (spread + noise) / level
        missing = back(direction)
        if not self._jacobian:
            return follow + missing * share
        with backward_pass():
            (gradient,) = torch.autograd.grad(denoised, x, missing)
        squares = missing.square().flatten(1).sum(1)
        along = (missing * gradient).flatten(1).sum(1) / squares
        length = (gradient.square().flatten(1).sum(1) / squares).sqrt()
        # Half of the variance was better than all of it for digits and for faces; with a quarter of it Heun's method
        # diverged on 18 levels. The quotients are NaN if nothing is missing.
        spread = (level * torch.maximum(along / 2, length / 4)).nan_to_num(0.0).clamp(min=spread)
        if direction is not residual:
            gradient = gradient * per_image(_quotient(residual, direction), x)
        return follow.detach() + gradient / (per_image(spread, x) + noise)

    def _residual(
        self, observation: Observation, denoised: Tensor, rows: slice
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], float | Tensor]:
        """The difference y - A(D), the function that turns it into a change e of the denoised image, and c."""
        operator, c = observation.operator, self._largest
        if operator.gain is not None:
            return observation.residual(operator.measure(denoised)), operator.pseudo_inverse, operator.gain
        near = operator.linearized(denoised)
        if c is None:
            c = _largest(observation, near, denoised)
        elif len(c) > 1:
            c = c[rows]
        size = per_image(c, denoised)
        return observation.residual(near.value), lambda v: near.adjoint(v) / size, c

    def finish(self, x: Tensor) -> Tensor:
        """As in ``Replacement`` if the operator has a gain; otherwise the denoised image unchanged."""
        return self._exact.finish(x)


def _largest(observation: Observation, near: Linearization, like: Tensor) -> Tensor:
    """The largest squared singular value (n,) of an operator near samples (n, ...), where y is observed."""
    u = standard_normal((1, *like.shape[1:]), torch.Generator().manual_seed(0), like.device).expand(like.shape)
    return largest_eigenvalue(lambda u: near.adjoint(observation.observed(near.forward(u))), u)


def _quotient(a: Tensor, d: Tensor) -> Tensor:
    """The numbers a d / d d (n,) for values like y; 0 if d is 0."""
    return ((a * d).flatten(1).sum(1) / d.square().flatten(1).sum(1)).nan_to_num(0.0)
