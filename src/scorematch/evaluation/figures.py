r"""Figures of a set of images: the values and errors of all metrics against one reference.

An ``Evaluator`` opens a reference and computes its statistics once. It then measures any number of sets of images::

    evaluator = Evaluator("faces/", features="inception")
    figures = evaluator.measure(batches)            # batches of images (N, C, H, W), in [0, 1] or uint8
    print(figures["inception-v3-2015-12-05"]["frechet"])

``MEASURES`` lists the metrics. Each gives one or two figures:

==================  ====================  ==============================================================================
metric              figures               error
==================  ====================  ==============================================================================
frechet             frechet               standard error over the images (delta method)
frechet-infinity    frechet-infinity      none: the subsets overlap
kernel              kernel                standard deviation over 100 subsets of 1,000 images; none for one subset
inception-score     inception-score       standard deviation over 10 splits
precision-recall    precision, recall     standard error of a share
density-coverage    density, coverage     none for density; standard error of a share for coverage
classes             confident, rarest     standard error of a share
==================  ====================  ==============================================================================

The standard error of a share treats the balls around features as given. Those of recall are around generated images:
where these are less diverse than the data, recall varies between sets of them by up to about twice its error.

"classes" is for a classifier of the classes in the data: the share of images for which one class has a probability
above 0.9, and the share of the rarest class. "precision-recall" and "density-coverage" depend on the sizes of both
sets. They therefore compare sets of equal size: a random subset of the larger set is used.

Figures of the pixels are always measured, under the name "images": their mean; their standard deviation ("std", the
contrast); the mean absolute difference of neighboring pixels ("variation", 0 for one pixel); and in color the mean
difference between the largest and the smallest channel ("saturation"). Their errors are standard errors over the
images.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorematch.core.arguments import check_choice
from scorematch.core.processes import agreed, processes, this_process
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import Crop, to_uint8
from scorematch.evaluation.accumulate import Rows
from scorematch.evaluation.features import Extracted, Extractor, as_extractor
from scorematch.evaluation.metrics import (
    density_coverage,
    frechet_estimate,
    frechet_extrapolation,
    inception_score,
    kernel_distance,
    precision_recall,
    random_rows,
    rows_of,
)
from scorematch.evaluation.statistics import Statistics, cache_folder, is_statistics_file, statistics_of

IMAGES = "images"  # the source of the figures of the pixels; other sources are names of extractors
_CONFIDENT = 0.9
_SUBSETS, _SUBSET_SIZE, _SPLITS, _NEAREST, _NEAREST_FOR_COVERAGE = 100, 1000, 10, 3, 5
_OF_A_SHARE = "standard error of a share"
_ROUNDING = 1e-12  # the largest error, relative to the value, that may be that of rounding
_OVER_IMAGES = "standard error over the images"

OneOrMore: TypeAlias = "str | Extractor | Callable[[Tensor], Any] | Sequence[str | Extractor | Callable[[Tensor], Any]]"


class Figure(NamedTuple):
    """A measured number.

    Attributes:
        value: the value.
        error: its error, which ``MEASURES`` describes; None if it is not known.
    """

    value: float
    error: float | None = None

    def __str__(self) -> str:
        """The value with its error, which is rounded to two digits; without an error, four digits."""
        # The error of a mean of equal values is not always 0, but that of rounding.
        if self.error is None or not abs(self.value) * _ROUNDING < self.error < math.inf:
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}"


Figures: TypeAlias = "dict[str, dict[str, Figure]]"  # extractor or "images" -> figure


def as_dicts(figures: Figures) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures as plain values for JSON."""
    return {source: {name: figure._asdict() for name, figure in found.items()} for source, found in figures.items()}


def values(figures: Figures) -> dict[str, float]:
    """The values of figures by name, without errors, as for ``scorematch.training.train(evaluate=...)``.

    With several extractors, their names precede those of the figures.
    """
    several = len(figures) > 2  # an extractor and "images"
    return {
        f"{source} {name}" if several else name: figure.value
        for source, found in figures.items()
        for name, figure in found.items()
    }


# -- The metrics by name ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A metric by its name.

    Attributes:
        compute: computes the figures from the features and logits of the images and the reference.
        errors: a dict from the names of the figures to descriptions of their errors; None for a figure without error.
        lacks: returns the reason why the metric cannot be measured, or None if it can, from the number of images, their
            features and the reference. It uses only the dimensions D of the features and K of the logits.
        settings: the constants of the metric.
        needs_features: whether it needs the features of the reference, and not only their mean and covariance.
        default: whether it is measured when no metrics are named.
    """

    compute: Callable[[Extracted, Statistics], dict[str, Figure]]
    errors: Mapping[str, str | None]
    lacks: Callable[[int, Extracted, Statistics], str | None]
    settings: Mapping[str, int | float] = field(default_factory=dict)
    needs_features: bool = False
    default: bool = True


def _share(share: float, n: int) -> Figure:
    return Figure(share, math.sqrt(share * (1 - share) / n))


def _frechet(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    return {"frechet": Figure(*frechet_estimate(seen.features, reference))}


def _frechet_infinity(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    return {"frechet-infinity": Figure(frechet_extrapolation(seen.features, reference).value)}


def _kernel(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    found = kernel_distance(seen.features, reference, subsets=_SUBSETS, subset_size=_SUBSET_SIZE)
    return {"kernel": Figure(found.value, found.deviation or None)}  # no error if the only subset is the whole set


def _inception_score(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    return {"inception-score": Figure(*inception_score(seen.class_logits, splits=_SPLITS))}


def _precision_recall(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    real, generated = _equally_many(seen, reference)
    precision, recall = precision_recall(real, generated, k=_NEAREST)
    return {"precision": _share(precision, len(generated)), "recall": _share(recall, len(real))}


def _density_coverage(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    real, generated = _equally_many(seen, reference)
    density, coverage = density_coverage(real, generated, k=_NEAREST_FOR_COVERAGE)
    return {"density": Figure(density), "coverage": _share(coverage, len(real))}


def _equally_many(seen: Extracted, reference: Statistics) -> tuple[Tensor, Tensor]:
    sets = rows_of(reference, "reference"), seen.features
    n = min(map(len, sets))
    real, generated = (features if len(features) == n else random_rows(features, n) for features in sets)
    return real.to(generated.device), generated


def _classes(seen: Extracted, reference: Statistics) -> dict[str, Figure]:
    logits = seen.class_logits
    probabilities, classes = logits.softmax(1).max(1)
    n = len(classes)
    rarest = int(torch.bincount(classes, minlength=logits.shape[1]).min())
    confident = int((probabilities > _CONFIDENT).sum())
    return {"confident": _share(confident / n, n), "rarest": _share(rarest / n, n)}


def _lacks_nothing(n: int, seen: Extracted, reference: Statistics) -> str | None:
    return None


def _lacks_images(n: int, seen: Extracted, reference: Statistics) -> str | None:
    needed = 2 * (seen.features.shape[1] + 1)
    return None if n >= needed else f"needs at least 2 (D + 1) = {needed:,} images, and there are {n:,}"


def _lacks_logits(n: int, seen: Extracted, reference: Statistics) -> str | None:
    return None if seen.logits is not None else "needs an extractor with logits of classes"


def _lacks_images_per_class(n: int, seen: Extracted, reference: Statistics) -> str | None:
    if seen.logits is None:
        return _lacks_logits(n, seen, reference)
    needed = _SPLITS * seen.logits.shape[1]
    return None if n >= needed else f"needs {_SPLITS} images per class, {needed:,}, and there are {n:,}"


def _lacks_in_a_set(needed: int, words: str) -> Callable[[int, Extracted, Statistics], str | None]:
    """For a metric that needs the features of so many images in each set, which are ``words`` in the reason."""

    def lacks(n: int, seen: Extracted, reference: Statistics) -> str | None:
        if reference.features is None:
            return "needs the features of the reference, and the file of statistics has none"
        least = min(n, len(reference.features))
        return None if least >= needed else f"needs {words} images in each set, and there are {least:,}"

    return lacks


def _lacks_subsets(n: int, seen: Extracted, reference: Statistics) -> str | None:
    return _lacks_in_a_set(_SUBSET_SIZE, f"{_SUBSET_SIZE:,}")(n, seen, reference)


def _lacks_neighbors(k: int) -> Callable[[int, Extracted, Statistics], str | None]:
    return _lacks_in_a_set(k + 1, f"more than {k}")


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "frechet": Measure(_frechet, {"frechet": f"{_OVER_IMAGES} (delta method)"}, _lacks_nothing),
        "frechet-infinity": Measure(_frechet_infinity, {"frechet-infinity": None}, _lacks_images),
        "kernel": Measure(
            _kernel,
            {"kernel": f"standard deviation over {_SUBSETS} subsets of {_SUBSET_SIZE:,} images"},
            _lacks_subsets,
            {"subsets": _SUBSETS, "subset_size": _SUBSET_SIZE},
            needs_features=True,
        ),
        "inception-score": Measure(
            _inception_score,
            {"inception-score": f"standard deviation over {_SPLITS} splits"},
            _lacks_images_per_class,
            {"splits": _SPLITS},
        ),
        "precision-recall": Measure(
            _precision_recall,
            {"precision": _OF_A_SHARE, "recall": _OF_A_SHARE},
            _lacks_neighbors(_NEAREST),
            {"k": _NEAREST},
            needs_features=True,
        ),
        "density-coverage": Measure(
            _density_coverage,
            {"density": None, "coverage": _OF_A_SHARE},
            _lacks_neighbors(_NEAREST_FOR_COVERAGE),
            {"k": _NEAREST_FOR_COVERAGE},
            needs_features=True,
        ),
        "classes": Measure(
            _classes,
            {"confident": _OF_A_SHARE, "rarest": _OF_A_SHARE},
            _lacks_logits,
            {"confident": _CONFIDENT},
            default=False,
        ),
    }
)


# -- The pixels -------------------------------------------------------------------------------------------------------


def _pixel_statistics(images: Tensor) -> Tensor:
    """For each image the mean, the mean square, the variation and, in color, the saturation: float64 (N, 3 or 4)."""
    x = to_uint8(images).cpu().double() / 255
    steps = torch.cat([x.diff(dim=2).abs().flatten(1), x.diff(dim=3).abs().flatten(1)], 1)
    # An image of one pixel has no neighbors, and the mean of no values is NaN.
    found = [x.mean((1, 2, 3)), x.square().mean((1, 2, 3)), steps.mean(1).nan_to_num(0.0)]
    if x.shape[1] == 3:
        found.append((x.amax(1) - x.amin(1)).mean((1, 2)))
    return torch.stack(found, 1)


def _pixel_figures(statistics: Tensor) -> dict[str, Figure]:
    """The figures of images, from the statistics of each image."""
    mean, square, *others = statistics.unbind(1)
    variance = float((square.mean() - mean.mean() ** 2).clamp(min=0))
    # To first order, an image changes the variance of all pixels by its mean square deviation.
    error = mean_figure(square - 2 * mean.mean() * mean).error
    result = {"mean": mean_figure(mean), "std": root_figure(Figure(variance, error))}
    return result | dict(zip(("variation", "saturation"), map(mean_figure, others), strict=False))


def image_figures(batches: Iterable[Tensor]) -> dict[str, Figure]:
    """Returns the figures of the pixels of images in batches (N, C, H, W), uint8 or floating point in [0, 1].

    Under ``torch.distributed`` every process must call it, with its own share of the images.
    """
    statistics = Rows()
    for images in batches:
        statistics.update(_pixel_statistics(images))
    return _pixel_figures(statistics.gather())


def mean_figure(values: Tensor) -> Figure:
    """The mean of values (N,) and its standard error, which is None for a single value."""
    values = values.double().cpu()
    return Figure(float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None)


def root_figure(figure: Figure) -> Figure:
    """The square root of a figure, with its error by the delta method; the root 0 has no error."""
    root = math.sqrt(figure.value)
    return Figure(root, None if figure.error is None or root == 0 else figure.error / (2 * root))


# -- Against one reference --------------------------------------------------------------------------------------------


class Collection:
    """The features of one set of images, which arrive in batches, on one process or many; see ``Evaluator.collect``.

    Raises:
        RuntimeError: if ``torchrun`` or ``accelerate launch`` started several processes, and there is no process group.
    """

    def __init__(
        self, extractors: Sequence[Extractor], references: Sequence[Statistics], names: Sequence[str] | None
    ) -> None:
        started = this_process()[1]
        if started > processes():
            raise RuntimeError(
                f"{started} processes were started, and must form a process group to exchange features. Call "
                "torch.distributed.init_process_group() first."
            )
        self._extractors, self._references, self._names = extractors, references, names
        self._features = [Rows() for _ in extractors]
        self._logits = [Rows() for _ in extractors]
        self._pixel_statistics = Rows()

    def add(self, images: Tensor) -> list[Extracted]:
        """Adds images (N, C, H, W), uint8 or floating point in [0, 1].

        Returns:
            The features and logits of the images, one ``Extracted`` for each extractor.

        Raises:
            TypeError, ValueError: as the extractor; or if a feature is NaN or infinite.
        """
        found = [extractor.extract(images) for extractor in self._extractors]
        for (features, logits), rows, scores in zip(found, self._features, self._logits, strict=True):
            rows.update(features)
            if logits is not None:
                scores.update(logits)
        self._pixel_statistics.update(_pixel_statistics(images))
        return found

    def figures(self, *, strict: bool = True) -> Figures:
        """The figures of the images of all processes of ``torch.distributed``; every process must call it.

        Args:
            strict: whether a named metric that no extractor can measure is an error; otherwise it is left out.

        Raises:
            ValueError: if there are fewer than two images, or as the metrics.
        """
        statistics = self._pixel_statistics.gather()
        if len(statistics) < 2:
            raise ValueError(f"the metrics need at least 2 images, got {len(statistics)}.")
        result: Figures = {IMAGES: _pixel_figures(statistics)}
        seen = [
            # A process may have no images, and therefore no logits.
            Extracted(rows.gather(), None if agreed(len(scores) == 0) else scores.gather())
            for rows, scores in zip(self._features, self._logits, strict=True)
        ]
        plan = Plan.of(len(statistics), seen, self._references, self._names, strict=strict)
        for extractor, features, reference, names in zip(
            self._extractors, seen, self._references, plan.names, strict=True
        ):
            found: dict[str, Figure] = {}
            for name in names:
                found |= MEASURES[name].compute(features, reference)
            result[extractor.name] = found
        return result


class Plan(NamedTuple):
    """What can be measured.

    Attributes:
        names: for each extractor the names of the metrics that can be measured.
        absent: for each extractor, the metrics that cannot be measured, each with the reason.
    """

    names: list[list[str]]
    absent: list[dict[str, str]]

    @classmethod
    def of(
        cls,
        n: int,
        seen: Sequence[Extracted],
        references: Sequence[Statistics],
        names: Sequence[str] | None,
        *,
        strict: bool,
    ) -> Plan:
        """The plan for n images.

        Args:
            n: the number of images.
            seen: the features and logits of each extractor; only their shapes are used.
            references: the statistics of the reference, for each extractor.
            names: the names of the metrics; None is all defaults.
            strict: whether a named metric that no extractor can measure is an error.
        """
        wanted = default_metrics() if names is None else names
        reasons = [
            {name: MEASURES[name].lacks(n, features, reference) for name in wanted}
            for features, reference in zip(seen, references, strict=True)
        ]
        if names is not None and strict and seen:
            for name in wanted:
                if all(each[name] is not None for each in reasons):
                    raise ValueError(f"the metric {name!r} {reasons[0][name]}.")
        return cls(
            [[name for name, reason in each.items() if reason is None] for each in reasons],
            [{name: reason for name, reason in each.items() if reason is not None} for each in reasons],
        )


def default_metrics() -> tuple[str, ...]:
    """The names of the metrics that are measured when none are named."""
    return tuple(name for name, each in MEASURES.items() if each.default)


class Evaluator:
    """Measures any number of sets of images against one reference, whose statistics it computes once.

    Under ``torch.distributed`` every process must make the same calls, with its own share of the images.

    Args:
        reference: the real images: an ``ImageData``, or what ``scorematch.training.open_images`` takes, such as a
            folder, arrays, an ``.npz`` file or the name of a data set; or ``Statistics``, or a file of statistics. A
            damaged image is an error.
        features: an extractor, or several: names from ``EXTRACTORS``, ``Extractor`` objects, or functions of images. An
            empty list measures the pixels only.
        metrics: a name from ``MEASURES``, or several; None is all that can be measured, except "classes".
        image_size: (height, width) in pixels to which the images of the reference are cropped and resized, as for
            ``open_images``; None keeps their size.
        channels: 1 for gray, 3 for RGB; None keeps the number of channels of the reference.
        crop: how the images of the reference are cropped, as for ``open_images``.
        batch_size: the number of images of the reference that are read at once.
        cache: the folder for the statistics of the reference; True is ``cache_folder()``, False uses no cache. The
            features of a function without a fingerprint, such as an ``nn.Module``, are not cached.
        device: the device of extractors that are given by name.
        progress: whether to show a progress bar.

    Attributes:
        data: the images of the reference, or None if only their statistics are known.
        extractors: the extractors.
        references: for each extractor, the statistics of the reference.

    Raises:
        OSError, TypeError, ValueError: as ``open_images``, ``as_extractor`` and ``statistics_of``; or if the name of a
            metric is unknown.

    Example:
        >>> noise = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> options = {"features": "pixels", "metrics": ["precision-recall"], "cache": False, "progress": False}
        >>> figures = Evaluator(noise[:20], **options).measure(noise[20:].split(10))
        >>> str(figures["pixels"]["recall"]), str(figures["images"]["mean"])
        ('0.950 ± 0.049', '0.4984 ± 0.0068')
    """

    def __init__(
        self,
        reference: Any,
        *,
        features: OneOrMore = "inception",
        metrics: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        crop: Crop = "center",
        batch_size: int = 256,
        cache: bool | str | os.PathLike[str] = True,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> None:
        metrics = [metrics] if isinstance(metrics, str) else metrics
        for name in metrics or ():
            check_choice("each of metrics", name, MEASURES)
        listed = features if isinstance(features, Sequence) and not isinstance(features, str) else [features]
        self.extractors = tuple(as_extractor(each, device=device) for each in listed)
        names = [extractor.name for extractor in self.extractors]
        if len({*names, IMAGES}) <= len(names):
            raise ValueError(f"features must be extractors with different names, got {', '.join(names)}.")
        if metrics and not names:
            raise ValueError(f"metrics need features, and there are none. Name an extractor for {metrics[0]!r}.")
        self._names = None if metrics is None else tuple(metrics)
        self.data: ImageData | None = None
        if isinstance(reference, Statistics):
            for extractor in self.extractors:
                reference.check(extractor)
            self.references = (reference,) * len(names)
        elif isinstance(reference, str | os.PathLike) and is_statistics_file(reference):
            self.references = tuple(Statistics.load(reference, extractor) for extractor in self.extractors)
        else:
            self.data = open_images(
                reference, image_size=image_size, channels=channels, crop=crop, strict=True, progress=progress
            )
            folder = cache_folder() if cache is True else None if cache is False else Path(cache)
            rows = any(MEASURES[name].needs_features for name in self.metrics)
            self.references = tuple(
                statistics_of(
                    self.data,
                    # Statistics need a fingerprint. These are neither saved nor compared with others.
                    replace(each, fingerprint="unknown") if each.fingerprint is None else each,
                    features=rows,
                    cache=None if each.fingerprint is None else folder,
                    batch_size=batch_size,
                    progress=progress,
                )
                for each in self.extractors
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the requested metrics, including those that cannot be measured."""
        return default_metrics() if self._names is None else self._names

    def check(self, n: int, shape: Sequence[int]) -> dict[str, str]:
        """Checks that n images of a shape (C, H, W) can be measured, before they are drawn.

        Returns:
            The metrics that will be left out, with the reasons.

        Raises:
            ValueError: if n is below 2, the images of the reference have another size, the dimension of the features
                differs, or a named metric cannot be measured.
        """
        if n < 2:
            raise ValueError(f"the metrics need at least 2 images, got {n}.")
        if self.data is not None and tuple(self.data.shape) != tuple(shape):
            raise ValueError(
                f"the images of the reference must have the size of those to evaluate, {_describe(shape)}, got "
                f"{_describe(self.data.shape)}. Open the reference with "
                f"open_images(..., image_size=({shape[1]}, {shape[2]}), channels={shape[0]})."
            )
        probes = [extractor.extract(torch.zeros(1, *shape, dtype=torch.uint8)) for extractor in self.extractors]
        for extractor, probe, reference in zip(self.extractors, probes, self.references, strict=True):
            dimension = probe.features.shape[1]
            if dimension != len(reference.mean):
                raise ValueError(
                    f"the features of {extractor.name} have {dimension:,} dimensions for images of {_describe(shape)}, "
                    f"but those of the reference have {len(reference.mean):,}. Use images of one size."
                )
        plan = Plan.of(n, probes, self.references, self._names, strict=True)
        return {
            f"{name} of {extractor.name}": reason
            for extractor, absent in zip(self.extractors, plan.absent, strict=True)
            for name, reason in absent.items()
        }

    def collect(self) -> Collection:
        """Begins a new set of images."""
        return Collection(self.extractors, self.references, self._names)

    def measure(self, batches: Iterable[Tensor], *, strict: bool = True) -> Figures:
        """Measures images that arrive in batches (n, C, H, W), uint8 or floating point in [0, 1].

        Returns:
            A dict ``figures[source][name]``, where the source is the name of an extractor or "images".

        Raises:
            RuntimeError: if ``torchrun`` or ``accelerate launch`` started several processes, and there is no process
                group.
            TypeError, ValueError: if images do not fit, or a named metric cannot be measured. With ``strict=False``
                such a metric is left out.
        """
        seen = self.collect()
        for images in batches:
            seen.add(images)
        return seen.figures(strict=strict)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the figures of given images, as plain values for JSON."""
        return {
            "reference": {
                "n": self.references[0].n if self.data is None else len(self.data),
                "shape": None if self.data is None else list(self.data.shape),
                "content": _digest(self.references[0]) if self.data is None else self.data.content,
            },
            "features": [
                {"name": each.name, "fingerprint": each.fingerprint, "preprocessing": each.preprocessing}
                for each in self.extractors
            ],
            "metrics": {name: dict(MEASURES[name].settings) for name in self.metrics},
        }


def _digest(statistics: Statistics) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for values in (statistics.mean, statistics.covariance):
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def _describe(shape: Sequence[int]) -> str:
    """A shape (C, H, W) in words."""
    kind = {1: "gray", 3: "color"}.get(shape[0], f"{shape[0]} channels")
    return f"{' x '.join(map(str, shape[1:]))} pixels ({kind})"
