r"""Moment matching (MMPS): the posterior of Gaussian data at each noise level, with the covariance of the network.

The notation is that of ``scorematch.restoration.method``, with the Jacobian A of the operator at D. Given x, the data
have the mean D and the covariance :math:`\sigma^2 J`, where J is the Jacobian of D. If they are taken to be normal,
then :math:`y - A(D)` has the covariance :math:`\Sigma_y + \sigma^2 A J A^\top`, where :math:`\Sigma_y` is that of the
noise of y, and the score of the posterior is

.. math:: s(x, \sigma) + J^\top A^\top v, \qquad (\Sigma_y + \sigma^2 A J^\top A^\top)\, v = y - A(D) .

For Gaussian data it is exact. A product with :math:`J^\top` is a backward pass through the network. The Jacobian of a
network is only nearly symmetric. The equation is therefore solved by the method of generalized conjugate residuals: as
in GMRES, each iteration reduces the norm of the residual as far as the directions so far allow. The first direction is
the solution at the previous level. The following ones solve the equation with the covariance of
``scorematch.restoration.cosine`` in place of :math:`\sigma^2 J`, approximately and without calls of the network. That
covariance is learned from the products with :math:`J^\top` on the way. If only the product with the inverse P of
:math:`\Sigma_y` is known, the unknown is w with v = P w. If the operator is not linear, the part of :math:`y - A(D)`
outside the range of A is left out, since no small change of D explains it.

References:
    Rozet et al., 2024, Learning Diffusion Priors from Observations by Expectation Maximization, arXiv:2405.13712,
    Sec. 4 (moment matching posterior sampling, MMPS).
    Eisenstat et al., 1983, Variational Iterative Methods for Nonsymmetric Systems of Linear Equations (GCR).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.batches import per_image
from scorematch.core.scores import Score, check_differentiable, score_at
from scorematch.restoration.cosine import CosineCovariance
from scorematch.restoration.method import Restoration, backward_pass
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Linearization, Operator
from scorematch.restoration.replacement import replacement

Product = Callable[[Tensor], Tensor]

_CONTRADICTION = 1e-3  # the part of y without noise that no sample measures, relative
_LEAST_SQUARES = 100  # the largest number of iterations for the least squares of values without noise
_INNER, _INNER_TOLERANCE = 20, 1e-2  # iterations without calls of the network, and their relative residual


class MomentMatching(Restoration):
    """The score of the posterior if the data given the state are normal.

    Args:
        observation: an observation with any operator.
        variance: the variance of the data, for the first estimate of their covariance.
        iterations: the largest number of products with the Jacobian at each call of the network, at least 1.
        tolerance: the norm of the residual at which the iterations end, relative to that of y - A(D).
    """

    centers = True

    def __init__(
        self, observation: Observation, variance: float, *, iterations: int = 3, tolerance: float = 1e-2
    ) -> None:
        self._observation = consistent(observation)
        self._variance = variance
        self._iterations, self._tolerance = iterations, tolerance
        self._covariances: dict[int, CosineCovariance] = {}  # by the first row of a batch
        self._solutions: dict[int, Tensor] = {}

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score of the posterior; each iteration needs a backward pass."""
        observation, level = self._observation.rows(rows), sigma**2
        with backward_pass(), torch.enable_grad():
            x = x.detach().requires_grad_()
            follow = score_at(score, x, sigma, None)
            check_differentiable(follow)
            denoised = x + level * follow

        def jacobian(u: Tensor) -> Tensor:
            with backward_pass():
                return torch.autograd.grad(denoised, x, u, retain_graph=True)[0]

        if rows.start not in self._covariances:
            self._covariances[rows.start] = CosineCovariance(x, self._variance)
        covariance = self._covariances[rows.start]
        covariance.at(level)
        near = observation.operator.linearized(denoised.detach())
        system = System(observation, near)
        r = explained(observation, near, observation.residual(near.value))
        enough = self._tolerance**2 * _dot(r, r)
        solution, change = torch.zeros_like(r), torch.zeros_like(x)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(self._iterations):
            active = _dot(r, r) > enough
            if not bool(active.any()):
                break
            w = (
                self._solutions[rows.start]
                if i == 0 and rows.start in self._solutions
                else system.solve(covariance.product, r)
            )
            u = near.adjoint(system.weighted(w))
            g = jacobian(u)
            g = per_image(_dot(u, g) > 0, g) * g  # a covariance is positive; a network's may not be, far from the data
            covariance.learn(u * per_image(active, u), g)
            q = system.noise(w) + level * observation.observed(near.forward(g))
            for before in found:
                share = _quotient(_dot(q, before[1]), _dot(before[1], before[1]))
                w, q, g = (new - per_image(share, new) * old for new, old in zip((w, q, g), before, strict=True))
            found.append((w, q, g))
            length = _quotient(_dot(r, q), _dot(q, q)) * active
            r = r - per_image(length, r) * q
            solution, change = solution + per_image(length, w) * w, change + per_image(length, g) * g
        self._solutions[rows.start] = solution
        return follow.detach() + change

    def finish(self, x: Tensor) -> Tensor:
        """The result meets the values of y without noise if the operator is linear; otherwise it is unchanged."""
        return exactly(self._observation, x)


def exactly(observation: Observation, x: Tensor) -> Tensor:
    """The sample nearest to x that meets the values of y without noise, for a linear operator; x for another one."""
    sigma, operator = observation.sigma, observation.operator
    if callable(sigma) or not operator.is_linear:
        return x
    if isinstance(sigma, float):
        if sigma > 0:
            return x
        if operator.gain is not None:
            return replacement(observation, operator.gain).finish(x)

    def exact(values: Tensor) -> Tensor:
        values = observation.observed(values)
        return torch.where(sigma == 0, values, 0) if isinstance(sigma, Tensor) else values

    near = operator.linearized(x)
    # The normal equations have a solution also if the values of y contradict each other.
    missing = near.adjoint(exact(observation.y - near.value))
    return x + conjugate_gradients(lambda u: near.adjoint(exact(near.forward(u))), missing, _LEAST_SQUARES)


def image_of(operator: Operator, y: Tensor, shape: Sequence[int]) -> Tensor:
    """The measurement as images of a shape to look at: ``as_image``, or if that has another shape the least squares.

    They are zeros if it has another shape and the operator is not linear.
    """
    with suppress(RuntimeError, IndexError, ValueError):  # y does not fit an operator before a matrix or a function
        found = operator.as_image(y)
        if found.shape[1:] == tuple(shape):
            return found
    zeros = y.new_zeros((len(y), *shape))
    return exactly(Observation(operator, y).of_shape(shape), zeros) if operator.is_linear else zeros


def consistent(observation: Observation) -> Observation:
    """The observation; of values without noise that contradict each other, with the least squares in their place."""
    sigma, operator, shape = observation.sigma, observation.operator, observation.shape
    if callable(sigma) or not operator.is_linear or operator.gain is not None or shape is None:
        return observation
    without_noise = torch.as_tensor(sigma, device=observation.y.device) == 0
    if not bool(without_noise.any()):
        return observation
    x = exactly(observation, observation.y.new_zeros((len(observation), *shape)))
    rest = torch.where(without_noise, observation.residual(operator.measure(x)), 0)
    contradict = _dot(rest, rest) > _CONTRADICTION**2 * _dot(*(observation.observed(observation.y),) * 2)
    if not bool(contradict.any()):
        return observation
    return replace(observation, y=observation.y - per_image(contradict, rest) * rest).of_shape(shape)


def explained(observation: Observation, near: Linearization, r: Tensor) -> Tensor:
    """The part of r in the range of A, if the operator is not linear; without noise the rest has no solution."""
    if observation.operator.is_linear:
        return r
    observed, back = observation.observed, near.adjoint(observation.observed(r))
    x = conjugate_gradients(lambda u: near.adjoint(observed(near.forward(u))), back, _LEAST_SQUARES)
    return observed(near.forward(x))


class System(NamedTuple):
    """The equation for w, whose noise is the covariance; if only its inverse P is known, the identity, and v = P w."""

    observation: Observation
    near: Linearization

    def weighted(self, w: Tensor) -> Tensor:
        """The v of w."""
        observation = self.observation
        return observation.precision(w) if callable(observation.sigma) else observation.observed(w)

    def noise(self, w: Tensor) -> Tensor:
        """The product of the covariance of the noise with v."""
        return w if callable(self.observation.sigma) else self.observation.covariance(w)

    def solve(self, covariance: Product, r: Tensor) -> Tensor:
        """The w for a symmetric covariance of the data, approximately."""

        def product(w: Tensor) -> Tensor:
            spread = self.near.forward(covariance(self.near.adjoint(self.weighted(w))))
            return self.noise(w) + self.observation.observed(spread)

        return conjugate_gradients(product, r, _INNER, _INNER_TOLERANCE, self.weighted)


def conjugate_gradients(
    product: Product, r: Tensor, iterations: int, tolerance: float = 1e-6, weighted: Product = lambda w: w
) -> Tensor:
    """Solves M w = r for each row, by the method of conjugate gradients.

    Args:
        product: the product of values like r with M, which is symmetric and not negative, row by row.
        r: the right-hand sides (N, ...).
        iterations: the largest number of products.
        tolerance: the norm of the residual at which the iterations for a row end, relative to that of r.
        weighted: the product with the matrix W of the inner product a · W b, in which M is symmetric.

    Example:
        >>> diagonal, r = torch.tensor([1.0, 4.0]), torch.tensor([[2.0, 4.0]])
        >>> conjugate_gradients(lambda w: w * diagonal, r, iterations=2).round()
        tensor([[2., 1.]])
    """
    # Relative to a power of two near the largest value, since squares of very large or small units are not float32.
    unit = per_image(torch.exp2(r.abs().flatten(1).amax(1).log2().round()).clamp(1e-30, 1e30), r)
    r = r / unit
    w, p = torch.zeros_like(r), r
    square = first = _dot(r, weighted(r))
    for _ in range(iterations):
        q = product(p)
        length = _quotient(square, _dot(p, weighted(q))) * (square > tolerance**2 * first)
        if not bool(length.any()):
            break
        w, r, before = w + per_image(length, p) * p, r - per_image(length, q) * q, square
        square = _dot(r, weighted(r))
        p = r + per_image(_quotient(square, before), p) * p
    return w * unit


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)
