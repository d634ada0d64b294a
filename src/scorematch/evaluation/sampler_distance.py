r"""The distance of a sampler's samples from a known distribution, against the number of network calls.

With an exact score, the samples differ from the distribution only by the error of the sampler. Three distances
are measured, for n samples with mean :math:`\hat m` and covariance :math:`\hat C`:

==============  ========================================================================================================
mean            :math:`\lVert \hat m - m \rVert / \sqrt{\mathrm{tr}\, C}`
covariance      :math:`\lVert \hat C - C \rVert_F / \lVert C \rVert_F`
energy          the root of :math:`\bigl(2 \mathrm{E} \lVert x - y \rVert - \mathrm{E} \lVert x - x' \rVert -
                \mathrm{E} \lVert y - y' \rVert\bigr) / 2 \mathrm{E} \lVert x - y \rVert`, the energy coefficient of the
                samples x and as many exact samples y, which is zero only for equal distributions
==============  ========================================================================================================

With finitely many samples none of them is zero, even for an exact sampler. The *floor* is the distance of exact samples
from the distribution: its mean and its standard deviation over repeated draws of n samples. A sampler whose distance is
within a few deviations of the floor cannot be distinguished from an exact one with n samples.

References:
    Székely & Rizzo, 2013, Energy Statistics: A Class of Statistics Based on Distances, Eq. 5-7.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.randomness import seed_of
from scorematch.core.scores import Score
from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.distances import mean_over
from scorematch.evaluation.distribution import Distribution
from scorematch.evaluation.estimate import Estimate, Report
from scorematch.evaluation.rows import double
from scorematch.sampling import SAMPLERS, Sampler
from scorematch.sampling.sampler import options_of

_TRIED = 10  # the number of levels with which a sampler is created to see whether it accepts a score

Make = Callable[[Score, int], Sampler]


class SamplerDistance(NamedTuple):
    """The distances of samples from a distribution; see ``scorematch.evaluation.sampler_distance``.

    Attributes:
        name: the name of the sampler.
        calls: the number of network calls per sample; None for exact samples.
        mean, covariance, energy: the distances; those of exact samples with their standard deviations.
    """

    name: str
    calls: int | None
    mean: Estimate
    covariance: Estimate
    energy: Estimate


def sampler_distances(
    exact: Distribution,
    samplers: Mapping[str, Make] | None = None,
    *,
    net: Score | None = None,
    levels: Sequence[int] = (5, 10, 20, 50, 100),
    n: int = 2000,
    repeats: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Report[SamplerDistance]:
    """Measures the distance of samples from a known distribution, for samplers with several numbers of network calls.

    The energy distance computes n^2 distances between samples 2 times for each row, and 2 ``repeats`` times for the
    floor. The memory is that of all samples and of a block of 2,048 x 2,048 distances.

    Args:
        exact: the distribution, with a schedule.
        samplers: functions of a score and a number of levels that create samplers, by name; None is
            ``sampler_variants(net)``.
        net: the score to sample; None is the exact score. With a network that was trained on samples of the
            distribution the distance contains the error of the network.
        levels: the numbers of noise levels.
        n: the number of samples, at least 2.
        repeats: the number of draws of exact samples for the floor, at least 2.
        seed: the seed of all samples.
        progress: whether to show a progress bar.

    Returns:
        The distances of each sampler with each number of levels; the last row has those of exact samples, with their
        standard deviations.

    Raises:
        TypeError: if n or ``repeats`` is not an integer.
        ValueError: if n or ``repeats`` is below 2, the distribution is a single point, or the score has no schedule.
        RuntimeError: if a sampler diverges.
    """
    check_count("n", n, 2)
    check_count("repeats", repeats, 2)
    if not exact.covariance.any():
        raise ValueError(f"exact must not be a single point, since distances are relative to its spread: {exact!r}.")
    score = exact if net is None else net
    measure = _distances_from(exact, exact.sample(n, seed_of(seed, "reference")))
    makers = sampler_variants(score) if samplers is None else samplers
    made = [(name, make(score, count)) for (name, make), count in itertools.product(makers.items(), levels)]
    rows = []
    for name, sampler in tqdm(made, "samplers", leave=False, disable=not progress):
        x = sampler.sample(n, shape=exact.sample_shape, generator=seed_of(seed, "sampler", name), progress=False)
        rows.append(SamplerDistance(name, len(sampler), *map(Estimate, measure(x))))
    drawn = [measure(exact.sample(n, seed_of(seed, "floor", i))) for i in range(repeats)]
    own = torch.tensor(drawn, dtype=torch.float64, device="cpu")
    floor = itertools.starmap(Estimate, zip(own.mean(0).tolist(), own.std(0).tolist(), strict=True))
    return Report([*rows, SamplerDistance("exact samples", None, *floor)])


def sampler_variants(score: Score) -> dict[str, Make]:
    """All samplers of ``SAMPLERS`` by name, each with every value of its options that have named values.

    Values that a sampler refuses for this score are left out, such as the variance "learned" for a score that predicts
    no variance. "langevin" is consistent sampling, as for a network without settings; "langevin, plain" is the
    published algorithm.

    Args:
        score: the score to sample.

    Returns:
        Functions of a score and a number of levels that create the samplers.

    Raises:
        ValueError: if a sampler refuses the score with every value, for example if it has no schedule.
    """
    result: dict[str, Make] = {}
    for kind in SAMPLERS:
        refused, before = None, len(result)
        for name, make in _variants(kind):
            try:
                make(score, _TRIED)
            except ValueError as error:
                refused = error
            else:
                result[name] = make
        if refused is not None and len(result) == before:
            raise refused
    return result


def _variants(kind: str) -> Iterator[tuple[str, Make]]:
    """The variants of a sampler, by name."""

    def _make(net: Score, levels: int, **options: Any) -> Sampler:
        return SAMPLERS[kind](net, levels=levels, clamp=False, **options)

    declared = sorted(options_of(SAMPLERS[kind]).items())
    named = {name: option.field.choices for name, option in declared if option.field.choices}
    for values in itertools.product(*named.values()):
        yield ", ".join([kind, *map(str, values)]), partial(_make, **dict(zip(named, values, strict=True)))
    if kind == "langevin":
        yield "langevin, plain", partial(_make, consistent=False)


def _distances_from(exact: Distribution, reference: Tensor) -> Callable[[Tensor], tuple[float, float, float]]:
    """A function that returns the three distances of samples, with these exact samples for the energy distance."""
    center, expected = exact.mean.cpu(), exact.covariance.cpu()
    y = double(reference.cpu()).flatten(1) - center
    within = float(mean_over(Tensor.sqrt, y, y).mean())

    def distances(samples: Tensor) -> tuple[float, float, float]:
        x = double(samples.cpu()).flatten(1) - center
        moments = Moments.of([x])
        mean = float(moments.mean.norm()) / math.sqrt(float(expected.trace()))
        covariance = float((moments.covariance - expected).norm() / expected.norm())
        between, own = (float(mean_over(Tensor.sqrt, x, each).mean()) for each in (y, x))
        return mean, covariance, math.sqrt(max(0.0, 1 - (own + within) / (2 * between)))

    return distances
