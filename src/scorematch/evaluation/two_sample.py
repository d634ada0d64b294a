r"""The classifier two-sample test (C2ST): how well a classifier tells samples from data.

A small network is trained to tell the two sets apart, and its accuracy is measured on vectors that it did not see: 0.5
if the sets have one distribution, 1 if they are separate. It is at most the accuracy of the best classifier,
:math:`\tfrac12 + \tfrac14 \int |p - q|`, so that a value near 0.5 may also mean that the network did not find the
difference.

As in sbi and its benchmark, the network has two hidden layers of 10 D features, at most 256 here, the vectors are
standardized by the reference, and the mean accuracy of five folds is reported. Unlike there, a tenth of the vectors for
training says when to stop, since a network that has learned its vectors by heart finds fewer differences. Vectors of
more than 8,192 values are projected on 512 random directions.

References:
    Lopez-Paz & Oquab, 2017, Revisiting Classifier Two-Sample Tests, arXiv:1610.06545.
    Lueckmann et al., 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import single_generator, standard_normal, uniform
from scorematch.evaluation.estimate import Estimate, mean_of
from scorematch.evaluation.rows import canonical_order, draw
from scorematch.evaluation.statistics import Features, pair_of

FOLDS, _WIDEST = 5, 256
_MOST, _PROJECTED = 8192, 512  # vectors with more values are projected on as many random directions
_BATCH, _RATE = 256, 3e-3
_SHARE, _CHECK, _PATIENCE = 10, 20, 10  # one of ten vectors says when to stop, asked every 20 steps


def classifier_two_sample_test(
    features: Features,
    reference: Features,
    *,
    folds: int = FOLDS,
    steps: int = 2000,
    generator: torch.Generator | int | None = 0,
) -> Estimate:
    """The accuracy of a classifier that tells vectors (N, D) from (N, D), and its standard error over the folds.

    Args:
        features: the samples (N, D).
        reference: as many data (N, D).
        folds: the number of parts, each of which is classified by a network that was trained on the others.
        steps: the most training steps, with 256 vectors each.
        generator: the source of the folds, weights and batches; an int is a seed, None is torch's global generator.
    """
    check_count("folds", folds, 2)
    check_count("steps", steps)
    x, y = (each[canonical_order(each)] for each in pair_of(features, reference))
    n = len(x)
    if len(y) != n or n < folds:
        raise ValueError(f"{folds} folds need as many samples as data, at least {folds}, got {n} and {len(y)}.")
    rng = single_generator(generator)
    center, spread = y.mean(0), y.std(0)
    spread = torch.where(spread > 0, spread, torch.cat([x, y]).std(0))  # such as a border of zeros
    spread = torch.where(spread > 0, spread, 1)
    order = torch.stack([draw(n, n, rng), n + draw(n, n, rng)], 1).flatten().to(x.device)  # both in equal numbers
    data = ((torch.cat([x, y]) - center) / spread).float()[order]
    if data.shape[1] > _MOST:
        data = data @ standard_normal((data.shape[1], _PROJECTED), rng, data.device) / math.sqrt(data.shape[1])
    labels = (order < n).float()
    parts = torch.arange(len(order), device=x.device).tensor_split(folds)
    least = len(order) - max(map(len, parts))
    others = torch.stack([torch.cat([*parts[:i], *parts[i + 1 :]])[:least] for i in range(len(parts))])
    weights = _trained(data, labels, others, steps, rng)
    right = (_forward(weights, data.expand(len(parts), -1, -1)) > 0) == (labels > 0)
    return mean_of(torch.stack([right[i, part].double().mean() for i, part in enumerate(parts)]))


def _trained(data: Tensor, labels: Tensor, rows: Tensor, steps: int, rng: torch.Generator | None) -> list[Tensor]:
    """The weights of one network for each row of indices (folds, n), those with the lowest loss on a tenth of it."""
    watched, used = rows.tensor_split([rows.shape[1] // _SHARE + 1], 1)
    width = min(10 * data.shape[1], _WIDEST)
    weights = []
    for inputs, outputs in itertools.pairwise((data.shape[1], width, width, 1)):
        for shape in (len(rows), inputs, outputs), (len(rows), 1, outputs):
            made = (2 * uniform(shape, rng, data.device) - 1) / math.sqrt(inputs)
            weights.append(made.requires_grad_())
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    best, lowest = [each.detach().clone() for each in weights], labels.new_full((len(rows),), math.inf)
    since = 0  # checks since a network has become better
    for step in range(steps):
        drawn = used.gather(1, (uniform((len(rows), _BATCH), rng, data.device) * used.shape[1]).long())
        with torch.enable_grad():
            loss = _losses(weights, data[drawn], labels[drawn]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % _CHECK == _CHECK - 1:
            losses = _losses([each.detach() for each in weights], data[watched], labels[watched])
            better = losses < lowest
            for kept, each in zip(best, weights, strict=True):
                kept[better] = each.detach()[better]
            lowest, since = torch.minimum(losses, lowest), 0 if better.any() else since + 1
            if since == _PATIENCE:
                break
    return best


def _losses(weights: list[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each network (folds,)."""
    return F.binary_cross_entropy_with_logits(_forward(weights, x), labels, reduction="none").mean(1)


def _forward(weights: list[Tensor], x: Tensor) -> Tensor:
    """The logits (folds, n) of vectors (folds, n, D)."""
    a, b, c, d, e, f = weights
    h = F.relu(torch.baddbmm(b, x, a))
    h = F.relu(torch.baddbmm(d, h, c))
    return torch.baddbmm(f, h, e)[..., 0]
