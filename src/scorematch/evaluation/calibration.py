r"""Whether restored images are samples of the posterior: rank statistics and coverage where the posterior is known.

A restoration method answers an observation :math:`y = A x_0 + \sigma_y n` with K draws. If they are samples of the
posterior, then :math:`x_0` and the draws have the same distribution given y, and for any function f the rank of
:math:`f(x_0)` among the K values of the draws is uniform over 0, ..., K. Consequently the interval between the i-th
smallest and the i-th largest value contains :math:`f(x_0)` with the probability

.. math:: 1 - \frac{2i}{K + 1}, \qquad i = 1, \dots, \lfloor K/2 \rfloor .

Here f are projections :math:`\langle w_j, x \rangle` on fixed random directions, :math:`x_0` is drawn from a
``Gaussian`` or a ``GaussianMixture``, and the following is reported over many observations:

- **coverage**: the share of intervals that contain the truth. Below the nominal value the draws are too alike or biased
  (overconfident); above it, too different.
- **spread**: the root of the mean ratio of the variance of the draws to that of the posterior; 1 for exact draws.
- **shift**: the root mean square distance of the mean of the draws from the posterior mean, in standard deviations of
  the posterior, without the part that comes from the finite number of draws. 0 for exact draws.
- **p value**: of the chi-squared test that the ranks are uniform, the smallest over the directions, times their number
  (Bonferroni). Below 0.01 the draws are not samples of the posterior; coverage, spread and shift show the size of the
  error. With enough observations every approximate method is rejected.

References:
    Talts et al., 2018, Validating Bayesian Inference Algorithms with Simulation-Based Calibration, arXiv:1804.06788.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.randomness import seed_of, single_generator, standard_normal, uniform
from scorematch.evaluation.estimate import Estimate, mean_of, root_of
from scorematch.evaluation.exact import GaussianMixture
from scorematch.evaluation.report import Report
from scorematch.restoration.methods import METHODS
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator
from scorematch.sampling import AnnealedLangevinSampler, Sampler

_KNOWN = 1e-9  # the ratio of the posterior variance to the prior variance below which a direction counts as known
_FEWEST_PER_RANK = 5  # observations per rank, below which the chi-squared distribution is not a good approximation


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration of one restoration method.

    Attributes:
        name: the name of the method.
        draws: K, the number of draws for each observation.
        ranks: the ranks of the truth (observations, directions), int64, from 0 to K.
        spread: the root of the mean ratio of variances, draws to posterior, and its standard error.
        shift: the root mean square distance of the means, in standard deviations of the posterior.
    """

    name: str
    draws: int
    ranks: Tensor
    spread: Estimate
    shift: float

    def coverage(self, i: int) -> tuple[float, Estimate]:
        """The coverage of the interval between the i-th smallest and the i-th largest draw.

        Args:
            i: from 1 to K // 2.

        Returns:
            The nominal coverage, 1 - 2 i / (K + 1); and the share of intervals that contain the truth, with its
            standard error over observations.

        Raises:
            ValueError: if i is out of range.
        """
        if not 1 <= i <= self.draws // 2:
            raise ValueError(f"i must be from 1 to {self.draws // 2} for {self.draws} draws, got {i}.")
        inside = (self.ranks >= i) & (self.ranks <= self.draws - i)
        return 1 - 2 * i / (self.draws + 1), mean_of(inside.double().mean(1))

    @property
    def p_value(self) -> float:
        """The p value of the test that the ranks are uniform, over all directions."""
        expected = len(self.ranks) / (self.draws + 1)
        counts = torch.stack([column.bincount(minlength=self.draws + 1) for column in self.ranks.T]).double()
        statistic = ((counts - expected).square() / expected).sum(1)
        half = torch.tensor(self.draws / 2, dtype=torch.float64, device="cpu")
        smallest = float(torch.special.gammaincc(half, statistic / 2).min())
        return min(1.0, len(counts) * smallest)

    def _asdict(self) -> dict[str, object]:
        """The columns of the table, with the coverage of the intervals nearest to 50 % and 90 %."""
        numbers = range(1, self.draws // 2 + 1)
        chosen = [min(numbers, key=lambda i: abs(self.coverage(i)[0] - level)) for level in (0.5, 0.9)]
        shares = {f"coverage, nominal {nominal:.1%}": share for nominal, share in map(self.coverage, chosen)}
        return {"method": self.name, **shares, "spread": self.spread, "shift": self.shift, "p value": self.p_value}


def posterior_calibration(
    exact: GaussianMixture,
    operator: Operator,
    samplers: Mapping[str, Sampler] | None = None,
    *,
    sigma: float = 0.0,
    observations: int = 200,
    draws: int = 19,
    directions: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report[Calibration]:
    """Measures the calibration of restoration methods on a distribution whose posterior is known.

    Args:
        exact: a ``Gaussian`` or a ``GaussianMixture``, with a schedule unless ``samplers`` is given. The truth is drawn
            from it. For each observation a covariance (D, D) is decomposed, which is fast up to D of a few hundred.
        operator: a linear operator that can be applied to any batch of images, without one mask per image.
        samplers: samplers with an exact score, or with that of a network trained on samples of ``exact``, by name; each
            with its ``restore`` and with ``clamp=False``. None is plain annealed Langevin dynamics with each method of
            ``restore``.
        sigma: the standard deviation of the noise in the observations.
        observations: the number of observations, at least 5 (draws + 1).
        draws: K, the number of draws for each observation, at least 2. With 19 the intervals have the nominal coverages
            0.9, 0.8, ..., 0.1.
        directions: the number of random directions, at least 1.
        seed: the seed of all random numbers.
        progress: whether to show a progress bar.

    Returns:
        One result for each sampler, after that of exact draws from the posterior, "posterior".

    Raises:
        TypeError: if the number of draws or directions is not an integer.
        ValueError: if there are too few observations, draws or directions; if the operator is not linear, or has one
            mask per image; or if the observations determine the images completely.
    """
    draws, directions = check_count("draws", draws, 2), check_count("directions", directions)
    fewest = _FEWEST_PER_RANK * (draws + 1)
    if observations < fewest:
        raise ValueError(f"the ranks of {draws} draws need at least {fewest} observations, got {observations}.")
    if len(operator) > 1:
        raise ValueError(f"the operator must be for any image, got one for {len(operator)} images.")
    if samplers is None:
        samplers = {
            restore: AnnealedLangevinSampler(exact, restore=restore, consistent=False, clamp=False)
            for restore in METHODS
        }
    truth = exact.sample(observations, seed_of(seed, "truth"))
    y = operator.measure(truth)
    y = y + sigma * standard_normal(y.shape, single_generator(seed_of(seed, "noise")), y.device)
    drawing = single_generator(seed_of(seed, "directions"))
    w = standard_normal((truth[0].numel(), directions), drawing, torch.device("cpu"))
    w = (w / w.norm(dim=0)).double()

    def along(x: Tensor) -> Tensor:
        """The projections (n, J) of images (n, ...)."""
        return x.cpu().double().flatten(1) @ w

    def variance_of(distribution: GaussianMixture) -> Tensor:
        """The variances (J,) along the directions."""
        return (distribution.covariance.cpu() @ w * w).sum(0)

    posteriors = [exact.posterior(Observation(operator, y, sigma), i) for i in range(observations)]
    mean = torch.stack([posterior.mean.cpu() @ w for posterior in posteriors])
    variance = torch.stack([variance_of(posterior) for posterior in posteriors])
    if not (variance > _KNOWN * variance_of(exact)).all():
        raise ValueError(
            "the observations determine the images completely. Pass an operator that hides a part, or sigma above 0."
        )
    drawn = [
        along(posterior.sample(draws, seed_of(seed, "posterior", i), torch.float64))
        for i, posterior in enumerate(posteriors)
    ]
    found = [_calibration("posterior", torch.stack(drawn), along(truth), mean, variance, seed)]
    repeated = Observation(operator, y.repeat_interleave(draws, 0), sigma)
    for name, sampler in tqdm(samplers.items(), "methods", leave=False, disable=not progress):
        generator = seed_of(seed, "draws", name)
        x = sampler.sample(len(repeated), observation=repeated, generator=generator, progress=False)
        values = along(x).view(observations, draws, directions)
        found.append(_calibration(name, values, along(truth), mean, variance, seed))
    return Report(found)


def _calibration(name: str, values: Tensor, truth: Tensor, mean: Tensor, variance: Tensor, seed: int) -> Calibration:
    """Compares draws with the truth and with the moments of the posterior, all along the directions.

    ``values`` are the draws (observations, K, J), and the others (observations, J).
    """
    draws = values.shape[1]
    below, equal = (compare(values, truth[:, None]).sum(1) for compare in (torch.lt, torch.eq))
    u = uniform(equal.shape, single_generator(seed_of(seed, "ties", name)), equal.device)
    ranks = below + (u * (equal + 1)).long()
    shifts = (values.mean(1) - mean) / variance.sqrt()
    ratios = values.var(1) / variance
    square = float((shifts.square() - ratios / draws).mean())
    return Calibration(name, draws, ranks, root_of(mean_of(ratios.mean(1))), math.sqrt(max(0.0, square)))
