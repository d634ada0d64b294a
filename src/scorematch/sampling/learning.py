r"""Levels and coefficients of few steps, learned from paths of a score.

With the levels :math:`\sigma_i`, the factors :math:`\kappa_i` and the weights :math:`w_{ij}` as free numbers, the steps

.. math:: x_{i+1} = \hat D_i + \kappa_i (x_i - \hat D_i), \qquad
          \hat D_i = D_i + \sum_{j \ge 1} w_{ij}\, (D_{i-j} - D_i), \qquad D_i = D(x_i, \sigma_i),

are a differentiable function of them; the last step leads to sigma = 0. Since the factors are free, a level is only
what the network is told about the noise of a state. The numbers minimize the mean distance of the ends x of the steps
from the ends y of paths that were solved on many levels from the same starts,

.. math:: d(x, y) = \overline{(x - y)^2} + \sum_{s = 1, 2, 4} \Bigl( \overline{(\partial_1 A_s (x - y))^2}
          + \overline{(\partial_2 A_s (x - y))^2} \Bigr),

where the bars are means over all values, A_s takes means of s x s pixels, and the sum, of differences between neighbors
along both sides, is for images of at least 8 x 8 pixels only. The first values are the levels of
``schedules_of_paths`` and the numbers of UniPC. Adam changes them with the gradient through all steps, in which each
network call is computed a second time, so that it needs the memory of one call.

The result is a few dozen numbers for any batch size, precision and class. It fits one score: a guided score with
another weight has other paths. Observations have no part in the learning, nor has new noise, which a distance of
states sees as an error.

References:
    Tong et al., 2024, LD3, arXiv:2405.15506. Frankel et al., 2025, S4S, arXiv:2502.17423. GS, 2025, arXiv:2510.17699.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count, check_integer
from scorematch.core.batches import without_history
from scorematch.core.conditions import class_of_each, map_parts, rows_of
from scorematch.core.derived import isotropic
from scorematch.core.precision import autocast
from scorematch.core.scores import Given, Score, attribute, check_differentiable, evaluating, score_at
from scorematch.noise import NoiseSchedule
from scorematch.sampling.levels import follow, straightest
from scorematch.sampling.multistep import METHODS, learned_lengths, learned_steps, multistep, plan
from scorematch.sampling.origin import origin_of
from scorematch.sampling.settings import SamplerSettings

__all__ = ["learned_settings"]

_RATE = 0.01


def learned_settings(
    net: Score,
    calls: Sequence[int],
    fine: NoiseSchedule | None = None,
    *,
    n: int = 256,
    iterations: int = 60,
    batch_size: int = 16,
    shape: Sequence[int] | None = None,
    condition: Given = None,
    generator: int = 0,
    progress: bool = True,
) -> Iterator[SamplerSettings]:
    """Settings of a multistep method whose levels and coefficients are learned from paths of the score itself.

    For each number of calls it takes about 3 * calls * iterations * batch_size network calls, and n * 60 for the paths.
    No data are needed.

    Args:
        net: a score that can be differentiated, ``net(x, sigma)`` -> the shape of x; not an inference copy. Pass a
            guided score for settings that fit its guidance.
        calls: the numbers of network calls, each at least 2.
        fine: the levels of the paths; None is 60 levels of Karras et al. in the range of the network.
        n: the number of paths.
        iterations: the number of steps of Adam.
        batch_size: the number of paths in a step.

        Rarely needed:

        shape: the shape of one sample, for a score without ``sample_shape``.
        condition: the condition of the paths, as for ``Sampler.sample``; for a network with classes pass the class of
            each path, such as ``torch.arange(256) % 10``.
        generator: the seed of the paths and of their order.
        progress: whether to show progress bars.

    Yields:
        Settings for each number of calls, with ``sigmas`` and ``coefficients``, which do not depend on the other
        numbers of calls.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there are not more fine levels than calls, or the score cannot be differentiated.

    Example:
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> fine = NoiseSchedule.karras(50, 0.01, 60)
        >>> (found,) = learned_settings(score, [3], fine, n=16, iterations=2, shape=(3,), progress=False)
        >>> len(found.options["sigmas"]), len(found.options["coefficients"])
        (3, 6)
    """
    n, iterations = check_count("n", n), check_count("iterations", iterations)
    seed = check_integer("generator", generator)
    batch_size = min(n, check_count("batch_size", batch_size))
    options = {"n": n, "shape": shape, "condition": condition, "generator": seed, "progress": progress}
    if attribute(net, "is_inference_copy"):  # it computes what depends on the level once, without a gradient
        raise ValueError(
            "net must be differentiable in the noise level: pass the network itself, not an inference copy."
        )
    origin, net = origin_of(net), isotropic(net)
    paths = follow(net, fine, calls, "calls", options)
    start, end = paths.states[0], paths.states[-1]  # all that is kept of the paths
    with torch.inference_mode(False), torch.enable_grad(), evaluating(net):
        classes = class_of_each(condition, start)
        condition = map_parts(lambda part: without_history(part).to(start.device), classes)
        x = start[:1].clone().requires_grad_()
        check_differentiable(score_at(net, x, x.new_tensor(paths.sigmas[0]), rows_of(condition, slice(1))), "net")
    found = (
        _fitted(net, sigmas, start, end, condition, iterations, batch_size, seed, progress)
        for sigmas in straightest(paths, calls)
    )
    return (SamplerSettings("ode", method="unipc", learned_for=origin, **each.rounded()) for each in found)


@torch.inference_mode(False)
@torch.enable_grad()
def _fitted(
    net: Score,
    sigmas: Sequence[float],
    start: Tensor,
    end: Tensor,
    condition: Given,
    iterations: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> _Numbers:
    """The numbers that are learned from these levels."""
    numbers, order = _Numbers(sigmas, start.device), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(numbers.groups(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in tqdm(range(iterations), f"{len(sigmas)} calls", disable=not progress):
        rows = torch.randperm(len(start), generator=order)[:batch_size].to(start.device)
        with evaluating(net):
            x = numbers.solve(net, start[rows], rows_of(condition, rows))
            _distance(x, end[rows]).backward(inputs=numbers.all)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return numbers


class _Numbers:
    """The logarithms of the ratios of neighboring levels, and the coefficients of the steps."""

    def __init__(self, sigmas: Sequence[float], device: torch.device) -> None:
        self.highest = sigmas[0]
        gaps = [math.log(a / b) for a, b in itertools.pairwise(sigmas)]
        first: list[list[float]] = []
        for step in plan(METHODS["unipc"], sigmas, 2, [0.0] * len(gaps)):
            first.append([step.kept, *step.weights])
        first.append([0.0])
        padded = [
            value
            for row, length in zip(first, learned_lengths(len(sigmas)), strict=True)
            for value in [*row, *[0.0] * length][:length]
        ]
        self.gaps = torch.tensor(gaps, device=device).log().requires_grad_()
        self.coefficients = torch.tensor(padded, dtype=torch.float32, device=device).requires_grad_()
        self.all = [self.gaps, self.coefficients]

    def groups(self) -> list[dict[str, object]]:
        """The groups of the optimizer."""
        return [{"params": [self.gaps], "lr": _RATE}, {"params": [self.coefficients], "lr": 1.5 * _RATE}]

    def levels(self) -> Tensor:
        """The levels (L,), the highest of which is fixed."""
        ratios = F.pad(-self.gaps.exp().cumsum(0), (1, 0))
        return self.highest * ratios.exp()

    def solve(self, net: Score, x: Tensor, condition: Given) -> Tensor:
        """The ends of the steps from x; the network is differentiated, and its calls are computed twice."""
        levels = self.levels()
        values = levels.tolist()
        tensors = dict(zip(values, levels, strict=True))

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            with autocast(x.device):
                score = net(x, sigma) if condition is None else net(x, sigma, condition)
            return score.to(x)

        def chain(x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
            level = tensors[sigma]
            score: Tensor = checkpoint(call, x, level, use_reentrant=False)
            return x, score * (level / sigma) ** 2, x  # a step multiplies it by sigma^2, without a gradient

        *_, (x, _) = multistep(x, chain, learned_steps(values, self.coefficients.to(x)))
        return x

    def rounded(self) -> dict[str, Any]:
        """The options of the sampler, to six digits."""
        numbers = {"sigmas": self.levels(), "coefficients": self.coefficients}
        return {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in numbers.items()}


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean distance of samples (n, ...); the differences of neighbors are for images (n, C, H, W) only."""
    difference = x - y
    total = difference.square().mean()
    for scale in (1, 2, 4) if x.ndim == 4 and min(x.shape[-2:]) >= 8 else ():
        means = F.avg_pool2d(difference, scale)
        total = total + means.diff(dim=-1).square().mean() + means.diff(dim=-2).square().mean()
    return total
