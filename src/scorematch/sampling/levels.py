r"""The noise levels at which few steps follow the paths of a score best.

Where a path of the probability flow is straight, one step is as good as many; where it is curved, levels are needed. A
network shows where: its paths are solved on N levels, with states :math:`x_i` and denoised images :math:`D_i`. The
error of one Euler step from level i to level j, and that of the final denoising, are

.. math:: e_{ij} = \Bigl\lVert D_i + \frac{\sigma_j}{\sigma_i} (x_i - D_i) - x_j \Bigr\rVert, \qquad
          e_{i0} = \lVert D_i - x_0 \rVert,

root mean squares over all values of some paths, in the units of the data; :math:`x_0` is the end of the path. The
levels that minimize the sum of the errors from the highest level to 0, over all choices of a given number of levels,
are a shortest path, which dynamic programming finds exactly.

"dpm-solver++" and "unipc" have smaller errors at the same places, and use the same levels. "ipndm" gains less.

References:
    Chen et al., 2024, On the Trajectory Regularity of ODE-based Diffusion Sampling, arXiv:2405.11326, Sec. 4.2 (GITS).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.derived import ratios_of
from scorematch.core.randomness import Generator
from scorematch.core.scores import Given, Score
from scorematch.noise import NoiseSchedule
from scorematch.sampling.chain import Chain
from scorematch.sampling.multistep import METHODS, multistep, plan
from scorematch.sampling.ode import ODESampler

__all__ = ["schedules_of_paths"]


def schedules_of_paths(
    net: Score,
    levels: Sequence[int],
    fine: NoiseSchedule | None = None,
    *,
    n: int = 64,
    shape: Sequence[int] | None = None,
    condition: Given = None,
    generator: Generator = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[NoiseSchedule]:
    """The noise levels for few steps along the probability flow, from paths of the score itself.

    It takes n times as many network calls as there are fine levels, and no data. The result is for ``ODESampler`` with
    "unipc" or "dpm-solver++". To store it with a network, write
    ``SamplerSettings("ode", method="unipc", sigmas=list(schedule))``.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x. Pass a guided score for levels that fit its guidance.
        levels: the number of levels of each schedule, at least 2, which is the number of calls of a method with one
            call per step. All schedules are chosen from the same paths.
        fine: the levels from which to choose, more than ``levels``; the highest is always chosen. None is 60 levels of
            Karras et al. in the range of the network.
        n: the number of paths.

        Rarely needed:

        shape: the shape of one sample, for a score without ``sample_shape``.
        condition: the condition of the paths, as for ``Sampler.sample``; for a network with classes pass the class of
            each path, such as ``torch.arange(64) % 10``.
        generator: the source of the starts, a ``torch.Generator`` or an int seed.
        batch_size: the number of paths per network call.
        progress: whether to show a progress bar.

    Returns:
        The schedules, each a subset of the fine levels.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there are not more fine levels than ``levels``, or the score has no levels of its own.

    Example:
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> fine = NoiseSchedule.karras(50, 0.01, 60)
        >>> (schedule,) = schedules_of_paths(score, [5], fine, shape=(3,), generator=0, progress=False)
        >>> [round(sigma, 2) for sigma in schedule]
        [50.0, 3.29, 1.51, 0.73, 0.33]
    """
    options = {"n": n, "shape": shape, "condition": condition, "generator": generator, "progress": progress}
    paths = follow(net, fine, levels, "levels", {**options, "batch_size": batch_size})
    return [NoiseSchedule(sigmas) for sigmas in straightest(paths, levels)]


class Paths(NamedTuple):
    """Paths of the probability flow.

    Attributes:
        sigmas: the levels (N + 1,), the last of which is 0.
        states: the states (n, ...) at these levels; for channels of different units those of ``Isotropic``.
        denoised: the denoised images at the first N levels, the last of which are the ends of the paths.
    """

    sigmas: list[float]
    states: list[Tensor]
    denoised: list[Tensor]


def follow(
    net: Score, fine: NoiseSchedule | None, counts: Sequence[int], name: str, options: Mapping[str, Any]
) -> Paths:
    """Solves paths on more fine levels than any of the counts, which an argument ``name`` has.

    The options are arguments of ``Sampler.sample``.
    """
    if isinstance(counts, int) or not counts:
        raise TypeError(f"{argument(name)} must be a list of one or more numbers, got {counts}. Write [6].")
    most = max(check_count(name, count, 2) for count in counts)
    sampler = _Recorder(net, fine, levels=60 if fine is None else None, clamp=False)
    if most >= len(sampler.schedule):
        raise ValueError(
            f"{argument(name)} must be below the number of fine levels, {len(sampler.schedule)}, got {most}. Pass more "
            "fine levels."
        )
    end = sampler.sample(**options)
    end = end / ratios_of(sampler.net, end)  # in the units of the states
    return Paths([*sampler.schedule, 0.0], [*sampler.states, end], [*sampler.denoised, end])


def straightest(paths: Paths, levels: Sequence[int]) -> list[list[float]]:
    """The chosen levels for each number of levels."""
    sigmas, states, denoised = paths
    error = torch.full((len(sigmas), len(sigmas)), math.inf, dtype=torch.float64, device="cpu")
    for i, j in itertools.combinations(range(len(sigmas)), 2):
        step = torch.lerp(denoised[i], states[i], sigmas[j] / sigmas[i])
        error[i, j] = float((step - states[j]).square().mean().sqrt())
    return [[sigmas[i] for i in _shortest(error, count)] for count in levels]


class _Recorder(ODESampler):
    """Keeps the states of its paths at all levels, and the denoised images at all but the lowest."""

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each step of UniPC, with its level."""
        self.states: list[Tensor] = []
        self.denoised: list[Tensor] = []

        def recorded(x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
            x, score, z = chain(x, sigma)
            self.states.append(x)
            self.denoised.append(torch.add(x, score, alpha=sigma**2))
            return x, score, z

        levels = list(self.schedule)
        end = x
        for end, sigma in multistep(x, recorded, plan(METHODS["unipc"], levels, 2, [0.0] * (len(levels) - 1))):
            yield end, sigma
        self.states.append(end)


def _shortest(error: Tensor, steps: int) -> list[int]:
    """The nodes of the path with the smallest sum of errors from the first node to the last one, without the last."""
    cost, choices = error[:, -1], []  # the smallest sum from each node on
    for _ in range(steps - 1):
        cost, choice = (error + cost).min(1)
        choices.append(choice)
    nodes = [0]
    for choice in reversed(choices):
        nodes.append(int(choice[nodes[-1]]))
    return nodes
