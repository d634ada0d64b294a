r"""Whether restored images are samples of the posterior: rank statistics and coverage where the posterior is known.

A restoration method answers an observation :math:`y = A x_0 + n` with K draws. The ranks of the truth among them
(``scorematch.evaluation.ranks``) are those of projections :math:`\langle w_j, x \rangle` on fixed random directions.
:math:`x_0` is drawn from a ``Gaussian``, a ``GaussianMixture`` or a ``LevyProcess``, and the following is reported over
many observations:

- **coverage**: the share of intervals that contain the truth. Below the nominal value the draws are too alike or biased
  (overconfident); above it, too different.
- **spread**: the root of the mean ratio of the variance of the draws to that of the posterior; 1 for exact draws.
- **shift**: the root mean square distance of the mean of the draws from the posterior mean, in standard deviations of
  the posterior, without the part that comes from the finite number of draws. 0 for exact draws.
- **p value**: of the chi-squared test that the ranks are uniform, the smallest over the directions, times their number
  (Bonferroni). Below 0.01 the draws are not samples of the posterior; coverage, spread and shift show the size of the
  error. With enough observations every approximate method is rejected.

The moments of the posterior of a ``LevyProcess`` are those of its exact draws.

References:
    Talts et al., 2018, Validating Bayesian Inference Algorithms with Simulation-Based Calibration, arXiv:1804.06788.
    Zach et al., 2025, A Statistical Benchmark for Diffusion Posterior Sampling Algorithms, arXiv:2509.12821.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.randomness import seed_of, single_generator
from scorematch.evaluation.distribution import Distribution
from scorematch.evaluation.estimate import Estimate, Report, mean_of, root_of
from scorematch.evaluation.exact import GaussianMixture
from scorematch.evaluation.levy import LevyProcess
from scorematch.evaluation.measurement import noise_of
from scorematch.evaluation.ranks import FEWEST_PER_RANK, inside, nearest, nominal, p_value, ranks_among
from scorematch.evaluation.ranks import directions as random_directions
from scorematch.restoration.methods import METHODS, Method
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator
from scorematch.sampling import AnnealedLangevinSampler, Sampler

_KNOWN = 1e-9  # the ratio of the posterior variance to the prior variance below which a direction counts as known


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
        return nominal(self.draws, i), mean_of(inside(self.ranks, self.draws, i).double().mean(1))

    @property
    def p_value(self) -> float:
        """The p value of the test that the ranks are uniform, over all directions."""
        return p_value(self.ranks, self.draws)

    def _asdict(self) -> dict[str, object]:
        """The columns of the table, with the coverage of the intervals nearest to 50 % and 90 %."""
        chosen = [self.coverage(nearest(self.draws, level)) for level in (0.5, 0.9)]
        shares = {f"coverage, nominal {expected:.1%}": share for expected, share in chosen}
        return {"method": self.name, **shares, "spread": self.spread, "shift": self.shift, "p value": self.p_value}


def posterior_calibration(
    exact: GaussianMixture | LevyProcess,
    operator: Operator,
    samplers: Mapping[str, Sampler] | None = None,
    *,
    sigma: float | Tensor | Callable[[Tensor], Tensor] = 0.0,
    observations: int = 200,
    draws: int = 19,
    directions: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report[Calibration]:
    """Measures the calibration of restoration methods on a distribution whose posterior is known.

    Args:
        exact: a distribution with known posteriors, with a schedule unless ``samplers`` is given. The truth is drawn
            from it. For each observation of a Gaussian or a mixture a covariance (D, D) is decomposed, which is fast up
            to D of a few hundred.
        operator: a linear operator that can be applied to any batch of images, without one mask per image.
        samplers: samplers with an exact score, or with that of a network trained on samples of ``exact``, by name; each
            with its ``restore`` and with ``clamp=False``. None is plain annealed Langevin dynamics with each method of
            ``restore`` that takes an observation with this operator and noise.
        sigma: the noise in the observations, as for an ``Observation``: a standard deviation, that of each value, or
            the product with the inverse of the covariance.
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
    fewest = FEWEST_PER_RANK * (draws + 1)
    if observations < fewest:
        raise ValueError(f"the ranks of {draws} draws need at least {fewest} observations, got {observations}.")
    if len(operator) > 1:
        raise ValueError(f"the operator must be for any image, got one for {len(operator)} images.")
    truth = exact.sample(observations, seed_of(seed, "truth"))
    y = operator.measure(truth)
    observation = Observation(operator, y, sigma)
    y = y + noise_of(observation, single_generator(seed_of(seed, "noise")))
    observation = Observation(operator, y, sigma)
    if samplers is None:
        samplers = {
            restore: AnnealedLangevinSampler(exact, restore=restore, consistent=False, clamp=False)
            for restore, method in METHODS.items()
            if _takes(method, observation)
        }
    w = random_directions(truth[0].numel(), directions, seed)

    def along(x: Tensor) -> Tensor:
        """The projections (n, J) of images (n, ...)."""
        return x.cpu().double().flatten(1) @ w

    def variance_of(distribution: Distribution) -> Tensor:
        """The variances (J,) along the directions."""
        return (distribution.covariance.cpu() @ w * w).sum(0)

    posteriors = exact.posteriors(observation, seed_of(seed, "posteriors"))
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
    if isinstance(sigma, Tensor):
        sigma = sigma.expand_as(y).repeat_interleave(draws, 0)
    repeated = Observation(operator, y.repeat_interleave(draws, 0), sigma)
    for name, sampler in tqdm(samplers.items(), "methods", leave=False, disable=not progress):
        generator = seed_of(seed, "draws", name)
        x = sampler.sample(len(repeated), observation=repeated, generator=generator, progress=False)
        values = along(x).view(observations, draws, directions)
        found.append(_calibration(name, values, along(truth), mean, variance, seed))
    return Report(found)


def _takes(method: Method, observation: Observation) -> bool:
    try:
        method.make(observation, 1.0)
    except ValueError:
        return False
    return True


def _calibration(name: str, values: Tensor, truth: Tensor, mean: Tensor, variance: Tensor, seed: int) -> Calibration:
    """Compares draws with the truth and with the moments of the posterior, all along the directions.

    ``values`` are the draws (observations, K, J), and the others (observations, J).
    """
    draws = values.shape[1]
    ranks = ranks_among(values, truth, single_generator(seed_of(seed, "ties", name)))
    shifts = (values.mean(1) - mean) / variance.sqrt()
    ratios = values.var(1) / variance
    square = float((shifts.square() - ratios / draws).mean())
    return Calibration(name, draws, ranks, root_of(mean_of(ratios.mean(1))), math.sqrt(max(0.0, square)))
