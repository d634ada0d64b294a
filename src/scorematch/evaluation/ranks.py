r"""The ranks of the truth among draws: whether restorations are draws from the posterior.

If K draws and the truth :math:`x_0` have the same distribution given y, the rank of :math:`f(x_0)` among the values of
the draws is uniform over 0, ..., K, for any function f. Consequently the interval between the i-th smallest and the
i-th largest value contains :math:`f(x_0)` with the probability

.. math:: 1 - \frac{2i}{K + 1}, \qquad i = 1, \dots, \lfloor K/2 \rfloor .

References:
    Talts et al., 2018, Validating Bayesian Inference Algorithms with Simulation-Based Calibration, arXiv:1804.06788.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scorematch.core.randomness import seed_of, single_generator, standard_normal, uniform

FEWEST_PER_RANK = 5  # observations per rank, below which the chi-squared distribution is not a good approximation


def directions(size: int, count: int, seed: int) -> Tensor:
    """Random directions of unit length, the columns of (size, count), float64."""
    drawing = single_generator(seed_of(seed, "directions"))
    w = standard_normal((size, count), drawing, torch.device("cpu"))
    return (w / w.norm(dim=0)).double()


def ranks_among(draws: Tensor, truth: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """The ranks (N, ...) of the truth (N, ...) among draws (N, K, ...), int64, from 0 to K.

    The rank among equal values is drawn at random.
    """
    below, equal = (compare(draws, truth[:, None]).sum(1) for compare in (torch.lt, torch.eq))
    u = uniform(equal.shape, generator, equal.device)
    return below + (u * (equal + 1)).long()


def nominal(draws: int, i: int) -> float:
    """The probability that the interval between the i-th smallest and the i-th largest draw contains the truth."""
    return 1 - 2 * i / (draws + 1)


def nearest(draws: int, level: float) -> int:
    """The i whose interval has the nominal coverage nearest to a level."""
    return min(range(1, draws // 2 + 1), key=lambda i: abs(nominal(draws, i) - level))


def inside(ranks: Tensor, draws: int, i: int) -> Tensor:
    """Whether the interval between the i-th smallest and the i-th largest draw contains the truth."""
    return (ranks >= i) & (ranks <= draws - i)


def p_value(ranks: Tensor, draws: int) -> float:
    """The p value of the chi-squared test that the ranks (N, J) of J functions are uniform, with Bonferroni."""
    expected = len(ranks) / (draws + 1)
    counts = torch.stack([column.bincount(minlength=draws + 1) for column in ranks.T]).double()
    statistic = ((counts - expected).square() / expected).sum(1)
    half = torch.tensor(draws / 2, dtype=torch.float64, device="cpu")
    smallest = float(torch.special.gammaincc(half, statistic / 2).min())
    return min(1.0, len(counts) * smallest)
