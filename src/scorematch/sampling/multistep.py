r"""Linear multistep methods for the probability flow and its stochastic versions, with one network call per step.

In :math:`\lambda = -\log\sigma`, with :math:`k = 1 + \eta`, the equation

.. math:: dx = k\, (D(x, \lambda) - x)\, d\lambda + \sqrt{2 \eta}\, \sigma\, dw

has the density :math:`p_\sigma` at every level for every :math:`\eta \ge 0`: the probability flow for eta = 0, the
reverse diffusion for eta = 1. A step of the length :math:`h = \log(\sigma_i / \sigma_{i+1})` solves its linear part
exactly,

.. math:: x_{i+1} = \hat D + e^{-k h} (x_i - \hat D) + \sigma_{i+1} \sqrt{1 - e^{-2 \eta h}}\, z, \qquad
          \hat D = \frac{\int_0^h e^{k u} D(\lambda_i + u)\, du}{\int_0^h e^{k u}\, du},

so that only the mean :math:`\hat D` of the denoised images over the step is approximated. A method replaces D by the
polynomial through the last denoised images, at :math:`u_0 = 0 > u_1 > \dots` With the weights :math:`w_j`, the means
of the Lagrange polynomials,

.. math:: \hat D = D_i + \sum_{j \ge 1} w_j\, (D_{i-j} - D_i).

The weights depend on the levels alone. A method of order p uses p denoised images; the first steps use those that
there are. The step to sigma = 0 is Tweedie's formula, :math:`\hat D = D`, the final denoising of all samplers.

==============  ========================================================================================================
method          weights
==============  ========================================================================================================
"dpm-solver++"  as above; with two images the weight :math:`e^{k u}` of the mean is left out, which gives
                :math:`w_1 = -h / 2 h_{i-1}`. Order 1 is DDIM and, with eta = 1, ancestral sampling; order 2 is
                DPM-Solver++(2M) or SDE-DPM-Solver++(2M); order 3 is UniP-3 or, with noise, the predictor of SA-Solver.
"unipc"         the same, but before the next step the new denoised image corrects the last: :math:`\hat D` is computed
                again with one image more, which raises the order by one. The correction is linear in the images, and is
                added to the weights of the next step.
"ipndm"         Adams-Bashforth with variable steps, for eta = 0: the noise :math:`\epsilon = (x - D) / \sigma` takes
                the place of D, and sigma that of lambda, without a weight. Order 1 is Euler's method, which is DDIM.
==============  ========================================================================================================

Weights and factors can also be learned (``scorematch.sampling.learning``): then each step, also the one to sigma = 0,
has a factor of its own in place of :math:`e^{-k h}`, and weights for at most three earlier images.

The third order of the published DPM-Solver++ differs: its code divides the second difference by two, so that it is of
second order.

References:
    Lu et al., 2022, DPM-Solver++, arXiv:2211.01095, Alg. 2 and Eq. 14.
    Zhao et al., 2023, UniPC, arXiv:2302.04867, Alg. 2 and 3.
    Xue et al., 2023, SA-Solver, arXiv:2309.05019, Eq. 14.
    Zhang & Chen, 2023, Fast Sampling of Diffusion Models with Exponential Integrator, arXiv:2204.13902, Sec. 3.3.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_POINTS, _SHARES = np.polynomial.legendre.leggauss(64)
_PAST = 4  # as many images as the methods use
_LONGEST_STEP = 10  # relative to the distance of two earlier levels that are used for it


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        highest: the highest order.
        order: the default order.
        last: the highest order of the step to the lowest level.
        corrected: whether the denoised image after a step corrects the step.
        noise: whether the noise is extrapolated, in sigma, and not the denoised image, in lambda.
    """

    highest: int
    order: int
    last: int
    corrected: bool = False
    noise: bool = False


METHODS = {
    "dpm-solver++": Method(highest=3, order=2, last=2),
    "unipc": Method(highest=3, order=2, last=2, corrected=True),
    "ipndm": Method(highest=4, order=4, last=4, noise=True),
}


class Step(NamedTuple):
    """The numbers of a step.

    Attributes:
        sigma, sigma_next: its levels.
        weights: w_1, w_2, ... of the earlier images, from the last one back.
        kept: the factor exp(-k h) of the state.
        added: the standard deviation of the new noise.
    """

    sigma: float
    sigma_next: float
    weights: Sequence[float]
    kept: float
    added: float


def plan(method: Method, sigmas: Sequence[float], order: int, etas: Sequence[float]) -> Iterator[Step]:
    """The steps of a method on levels (L,), with eta (L - 1,) for each step."""
    places = list(sigmas) if method.noise else [-math.log(sigma) for sigma in sigmas]
    correction: list[float] = []  # of the last step, in units of the images, for its images from the new one back
    for i, eta in enumerate(etas):
        k, ratio = 1 + eta, sigmas[i + 1] / sigmas[i]
        kept, end, nodes = ratio**k, places[i + 1], nodes_of(method, places, order, i)
        rate = 0 if method.noise else k
        predicted = _means(nodes, nodes[0], end, rate)
        weights = list(predicted[1:])
        weights += [0.0] * (len(correction) - 1 - len(weights))
        for j, change in enumerate(correction[1:]):
            weights[j] += change * kept / (1 - kept)
        if method.corrected:
            correction = list((1 - kept) * (_means([end, *nodes], nodes[0], end, rate) - [0, *predicted]))
        yield Step(sigmas[i], sigmas[i + 1], weights, kept, sigmas[i + 1] * math.sqrt(1 - ratio ** (2 * eta)))


def nodes_of(method: Method, places: Sequence[float], order: int, i: int) -> list[float]:
    """The places of the images that step i uses, from the last one back."""
    # After a very short step the extrapolation would amplify rounding errors.
    length, used = abs(places[i + 1] - places[i]), 1
    most = min(order, i + 1, method.last + len(places) - 2 - i)
    while used < most and length <= _LONGEST_STEP * abs(places[i + 1 - used] - places[i - used]):
        used += 1
    return [places[i - j] for j in range(used)]


def polynomials(nodes: Sequence[float], u: np.ndarray) -> np.ndarray:
    """The Lagrange polynomials of the nodes at u (K,), (nodes, K)."""
    return np.array(
        [math.prod(((u - v) / (node - v) for v in nodes if v != node), start=np.ones_like(u)) for node in nodes]
    )


def quadrature(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """The points (K,) and the weights (K,) of an integral from start to end."""
    return start + (end - start) * (1 + _POINTS) / 2, (end - start) * _SHARES / 2


def learned_steps(sigmas: Sequence[float], coefficients: Iterable[Any]) -> Iterator[Step]:
    """The steps on levels (L,), and from the last of them to 0, with numbers of their own.

    Args:
        sigmas: the levels, from high to low.
        coefficients: for step i the factor of the state and min(i, 3) weights, see ``learned_lengths``; floats or
            Tensors ().
    """
    numbers = iter(coefficients)
    for sigma, sigma_next, length in zip(sigmas, [*sigmas[1:], 0.0], learned_lengths(len(sigmas)), strict=True):
        kept, *weights = itertools.islice(numbers, length)
        yield Step(sigma, sigma_next, weights, kept, 0.0)


def learned_lengths(levels: int) -> list[int]:
    """The number of learned coefficients of each step, also of the one to 0."""
    return [1 + min(i, _PAST - 1) for i in range(levels)]


def _means(nodes: Sequence[float], start: float, end: float, rate: float) -> np.ndarray:
    """The means from start to end, with the weight exp(rate u), of the Lagrange polynomials of the nodes."""
    if len(nodes) == 2:
        rate = 0  # as published
    u, shares = quadrature(start, end)
    density = shares * np.exp(rate * (u - end))
    return np.asarray(polynomials(nodes, u) @ density / density.sum())


def multistep(
    x: Tensor,
    chain: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]],
    steps: Iterable[Step],
    *,
    noise: bool = False,
) -> Iterator[tuple[Tensor, float]]:
    """Yields the state after each step, with its level; ``noise`` is that of the method."""
    past: deque[Tensor] = deque(maxlen=_PAST)
    for sigma, sigma_next, weights, kept, added in steps:
        x, score, z = chain(x, sigma)
        new = score * -sigma if noise else torch.add(x, score, alpha=sigma**2)
        mean = new
        for weight, old in zip(weights, past, strict=False):
            mean = mean + (old - new) * weight
        x = torch.lerp(torch.add(x, mean, alpha=-sigma) if noise else mean, x, kept)
        if added:
            x.add_(z, alpha=added)
        past.appendleft(new)
        yield x, sigma_next
