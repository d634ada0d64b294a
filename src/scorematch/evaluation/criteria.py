"""What ``tune`` minimizes: the distance of samples from pictures or from other data, or the error of restorations.

Each criterion is created before anything is drawn, and checks that it can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scorematch.core.arguments import argument
from scorematch.core.provenance import identity
from scorematch.core.scores import Score, attribute
from scorematch.data.array_data import ArrayData, open_arrays
from scorematch.evaluation.arrays import VALUES, ArrayEvaluator, gathered_values, some_values_of
from scorematch.evaluation.estimate import IMAGES, Figures
from scorematch.evaluation.evaluator import Evaluator
from scorematch.evaluation.metrics import METRICS
from scorematch.evaluation.per_image import choose
from scorematch.evaluation.reference import open_for, read_batches, shown
from scorematch.evaluation.restored_images import RESTORATION, RESTORED, Restoring, identified
from scorematch.evaluation.subject import conditions_of
from scorematch.nets.blocks import without_trained_null
from scorematch.restoration.operator import Operator
from scorematch.sampling import Sampler
from scorematch.sampling.bulk import bulk_samples

Distance = Literal["frechet", "kernel", "rmse", "perceptual", "energy", "sliced-wasserstein", "spectrum"]
Kind = Literal["pictures", "restorations", "data that are not pictures"]

_DISTANCES: Mapping[Kind, Sequence[str]] = {  # the default first
    "pictures": ("frechet", "kernel"),
    "restorations": ("rmse", "perceptual", "frechet"),
    "data that are not pictures": ("energy", "sliced-wasserstein", "spectrum", "frechet"),
}


def distance_of(by: str | None, kind: Kind) -> str:
    """The distance to minimize; None is the first of those of this kind.

    Raises:
        ValueError: if ``by`` is not a distance of this kind.
    """
    names = _DISTANCES[kind]
    if by is not None and by not in names:
        raise ValueError(f"{argument('by')} must be one of {', '.join(map(repr, names))} for {kind}, got {by!r}.")
    return names[0] if by is None else by


@dataclass(frozen=True)
class Criterion:
    """What the best sampler minimizes.

    Attributes:
        source: the name of the extractor, or of what is measured without one.
        names: the names of the figures, by their source.
        settings: everything that determines the figures, besides the sampler, as plain values for JSON.
        n: the number of samples or restorations for each sampler.
        measure: draws samples or restorations with a sampler, from the same seeds for every sampler, and measures them.
        held_out: the figures of held-out data, or None.
    """

    source: str
    names: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    n: int
    measure: Callable[[Sampler], Figures]
    held_out: Figures | None = None


def of_arrays(
    data: ArrayData, by: str, net: Score, n: int, drawing: Mapping[str, Any], held_out: Any, progress: bool
) -> Criterion:
    """The distance of n samples of a score from data that are not pictures.

    Args:
        data: the reference.
        by: the distance.
        net: the score.
        n: the number of samples.
        drawing: the arguments of ``bulk_samples`` except the condition, which is that of random data.
        held_out: other data, or None.
        progress: whether to show progress bars.

    Raises:
        ValueError: if the data do not fit, or the distance cannot be measured.
    """
    evaluator = ArrayEvaluator(data, [by])
    evaluator.check(n, attribute(net, "sample_shape") or ())
    condition = conditions_of(data, net, n, drawing["seed"], drawing["classes"])
    backbone = attribute(net, "backbone")
    if condition is None and backbone is not None and without_trained_null(backbone):
        raise ValueError(
            f"the network takes a vector as its condition, and {data.name} has none. Add the vectors of all samples, "
            "np.savez(FILE, x=x, condition=vectors)."
        )

    def measure(sampler: Sampler) -> Figures:
        batches = (batch.images for batch in bulk_samples(sampler, n, condition=condition, **drawing))
        return {VALUES: evaluator.measure(gathered_values(shown(batches, n, repr(sampler), progress)))}

    others = None
    if held_out is not None:
        others = {VALUES: evaluator.measure(some_values_of(open_arrays(held_out), n, drawing["seed"]))}
    settings = evaluator.settings() | ({} if condition is None else {"conditions": identity(condition)})
    return Criterion(VALUES, {VALUES: (by,)}, settings, n, measure, others)


def of_pictures(
    reference: Any, by: str, n: int, drawing: Mapping[str, Any], held_out: Any, options: Mapping[str, Any]
) -> Criterion:
    """The distance of n samples from real images.

    Args:
        reference: the real images, or their statistics.
        by: the distance.
        n: the number of samples.
        drawing: the arguments of ``bulk_samples``.
        held_out: other real images, or None.
        options: the arguments of ``Evaluator``.

    Raises:
        ImportError, OSError, TypeError, ValueError: if an input is damaged or does not fit.
    """
    evaluator, settings = _evaluator(reference, by, n, options)
    source = evaluator.extractors[0].name

    def measure(sampler: Sampler) -> Figures:
        batches = (batch.images for batch in bulk_samples(sampler, n, **drawing))
        return evaluator.measure(shown(batches, n, repr(sampler), options["progress"]))

    others = None
    if held_out is not None:
        other = open_for(held_out, what="held-out images", **_opening(options))
        chosen = choose(len(other), min(n, len(other)), drawing["seed"])
        others = evaluator.measure(read_batches(other, chosen, drawing["batch_size"]), strict=False)
    return Criterion(source, {source: (by,), IMAGES: ("std", "variation")}, settings, n, measure, others)


def of_restorations(
    images: Any,
    by: str,
    n: int,
    drawing: Mapping[str, Any],
    operators: Mapping[str, Operator],
    options: Mapping[str, Any],
) -> Criterion:
    """The error of the restorations of images, for one or more operators.

    Args:
        images: the clean images, of which n are degraded, or all if there are fewer.
        by: the distance.
        n: the largest number of images.
        drawing: the seed and the batch size.
        operators: the operators by their names.
        options: the arguments of ``Evaluator``.

    Raises:
        ImportError, OSError, TypeError, ValueError: if an input is damaged or does not fit.
    """
    data = open_for(images, what="images", **_opening(options))
    evaluator, settings = _evaluator(data, by, n, options)
    source = RESTORATION if by == "rmse" else evaluator.extractors[0].name
    chosen = choose(len(data), min(n, len(data)), drawing["seed"])

    def measure(sampler: Sampler) -> Figures:
        figures: Figures = {}
        for name, operator in operators.items():
            run = Restoring(sampler, evaluator, operator, 1, 0.0, drawing["seed"])
            found = run.measure(data, chosen, drawing["batch_size"], progress=False)[RESTORED]
            figures[name] = {by: found[source][by]}
        return figures

    # Masks of one size can have the same name.
    settings |= {"tasks": list(map(identified, operators.values()))}
    return Criterion(source, dict.fromkeys(operators, (by,)), settings, len(chosen), measure)


def _evaluator(reference: Any, by: str, n: int, options: Mapping[str, Any]) -> tuple[Evaluator, dict[str, Any]]:
    """The evaluator of one distance, and its settings."""
    features = [] if by == "rmse" else options["features"]
    evaluator = Evaluator(reference, **{**options, "features": features}, metrics=[by] if by in METRICS else [])
    if by != "rmse" and not evaluator.extractors:
        raise ValueError(f"by={by!r} needs features. Name an extractor.")
    evaluator.check(n, options["shape"])
    settings = evaluator.settings()
    if any(each.fingerprint is None for each in evaluator.extractors):  # another function can have the same name
        settings["function"] = [identity(each.function) for each in evaluator.extractors]
    return evaluator, settings


def _opening(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("shape", "crop", "progress")}
