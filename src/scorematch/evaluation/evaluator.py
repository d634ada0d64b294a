r"""Measures any number of sets of images against one reference with all metrics.

::

    evaluator = Evaluator("faces/", features="inception")
    figures = evaluator.measure(batches)            # batches of images (N, C, H, W), in [0, 1] or uint8
    print(figures["inception-v3-2015-12-05"]["frechet"])

Figures of the pixels are always measured, under the name "images": their mean; their standard deviation ("std", the
contrast); the mean absolute difference of neighboring pixels ("variation", 0 for one pixel); and in color the mean
difference between the largest and the smallest channel ("saturation"). Their errors are standard errors over the
images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorematch.core.arguments import check_choice
from scorematch.core.processes import gathered, local_device, this_process, world_size
from scorematch.core.records import hash_of_bytes
from scorematch.data.pictures import Crop, to_uint8
from scorematch.evaluation.accumulate import Rows
from scorematch.evaluation.estimate import IMAGES, Estimate, Figures, mean_of, root_of
from scorematch.evaluation.features import Extracted, Extractor, as_extractor
from scorematch.evaluation.metrics import METRICS, default_metrics
from scorematch.evaluation.reference import open_for, statistics_for
from scorematch.evaluation.statistics import Statistics, is_statistics_file

OneOrMore: TypeAlias = "str | Extractor | Callable[[Tensor], Any] | Sequence[str | Extractor | Callable[[Tensor], Any]]"
Compared: TypeAlias = tuple[Extractor, Statistics]  # an extractor, and the statistics of the reference


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


def _pixel_figures(statistics: Tensor) -> dict[str, Estimate]:
    """The figures of images, from the statistics of each image."""
    mean, square, *others = statistics.unbind(1)
    variance = float((square.mean() - mean.mean() ** 2).clamp(min=0))
    # To first order, an image changes the variance of all pixels by its mean square deviation.
    error = mean_of(square - 2 * mean.mean() * mean).error
    result = {"mean": mean_of(mean), "std": root_of(Estimate(variance, error))}
    return result | dict(zip(("variation", "saturation"), map(mean_of, others), strict=False))


def image_figures(batches: Iterable[Tensor]) -> dict[str, Estimate]:
    """Returns the figures of the pixels of images in batches (N, C, H, W), uint8 or floating point in [0, 1].

    Under ``torch.distributed`` every process must call it, with its own share of the images.
    """
    statistics = Rows()
    for images in batches:
        statistics.update(_pixel_statistics(images))
    return _pixel_figures(statistics.gather())


# -- Against one reference --------------------------------------------------------------------------------------------


class MeasuredSet:
    """One set of images, which arrive in batches, on one process or many; see ``Evaluator.collect``.

    Raises:
        RuntimeError: if ``torchrun`` or ``accelerate launch`` started several processes, and there is no process group.
    """

    def __init__(self, compared: Sequence[Compared], metrics: Sequence[str] | None) -> None:
        started = this_process().world_size
        if started > world_size():
            raise RuntimeError(
                f"{started} processes were started, and must form a process group to exchange features. Call "
                "torch.distributed.init_process_group() first."
            )
        self._compared, self._metrics = compared, metrics
        self._seen = [(Rows(), Rows()) for _ in compared]  # the features and the logits of each extractor
        self._pixels = Rows()

    def add(self, images: Tensor, found: Sequence[Extracted]) -> None:
        """Adds images (N, C, H, W), uint8 or floating point in [0, 1], with what ``Evaluator.extract`` returns."""
        for extracted, rows in zip(found, self._seen, strict=True):
            for values, kept in zip(extracted, rows, strict=True):
                if values is not None:
                    kept.update(values)
        self._pixels.update(_pixel_statistics(images))

    def figures(self, *, strict: bool = True) -> Figures:
        """The figures of the images of all processes of ``torch.distributed``; every process must call it.

        Args:
            strict: whether a named metric that no extractor can measure is an error; otherwise it is left out.

        Raises:
            ValueError: if there are fewer than two images, or as the metrics.
        """
        pixels = self._pixels.gather()
        if len(pixels) < 2:
            raise ValueError(f"the metrics need at least 2 images, got {len(pixels)}.")
        seen = [
            # A process may have no images, and therefore no logits.
            Extracted(features.gather(), logits.gather() if any(gathered(len(logits))) else None)
            for features, logits in self._seen
        ]
        lacking = _lacking(len(pixels), seen, self._compared, self._metrics, strict)
        result: Figures = {IMAGES: _pixel_figures(pixels)}
        for extracted, (extractor, reference), reasons in zip(seen, self._compared, lacking, strict=True):
            found: dict[str, Estimate] = {}
            for name in [name for name, reason in reasons.items() if reason is None]:
                found |= METRICS[name](extracted, reference)
            result[extractor.name] = found
        return result


def _lacking(
    n: int, seen: Sequence[Extracted], compared: Sequence[Compared], metrics: Sequence[str] | None, strict: bool
) -> list[dict[str, str | None]]:
    """For each extractor, the metrics with the reasons why they cannot be measured; None if they can."""
    wanted = default_metrics() if metrics is None else metrics
    reasons = [
        {name: METRICS[name].lacks(n, extracted, reference) for name in wanted}
        for extracted, (_, reference) in zip(seen, compared, strict=True)
    ]
    if metrics is not None and strict and seen:
        for name in wanted:
            if all(each[name] is not None for each in reasons):
                raise ValueError(f"the metric {name!r} {reasons[0][name]}.")
    return reasons


class Evaluator:
    """Measures any number of sets of images against one reference, whose statistics it computes once.

    Under ``torch.distributed`` every process must make the same calls, with its own share of the images.

    Args:
        reference: the real images, as for ``evaluate``.
        features: an extractor, or several: names from ``EXTRACTORS``, ``Extractor`` objects, or functions of images
            (N, C, H, W), uint8, to features (N, D). An empty list measures the pixels only.
        metrics: a name from ``METRICS``, or several; None is all that can be measured, except "classes".
        shape: the shape (C, H, W) to which the images of the reference are cropped and resized; None keeps theirs.
        crop: how the images of the reference are cropped, as for ``open_images``.
        batch_size: the number of images of the reference that are read at once.
        cache: the folder for the statistics of the reference, as for ``statistics_of``. The features of a function
            without a fingerprint, such as an ``nn.Module``, are not cached.
        device: the device of extractors that are given by name.
        strict: whether a damaged image of the reference is an error; otherwise it is left out.
        progress: whether to show a progress bar.

    Attributes:
        data: the images of the reference, or None if only their statistics are known.
        extractors: the extractors.
        metrics: the names of the requested metrics, including those that cannot be measured.

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
        shape: Sequence[int] | None = None,
        crop: Crop = "center",
        batch_size: int = 256,
        cache: bool | str | os.PathLike[str] = True,
        device: torch.device | str = "cpu",
        strict: bool = True,
        progress: bool = True,
    ) -> None:
        metrics = [metrics] if isinstance(metrics, str) else metrics
        for name in metrics or ():
            check_choice("each of metrics", name, METRICS)
        listed = features if isinstance(features, Sequence) and not isinstance(features, str) else [features]
        device = local_device(device)
        self.extractors = tuple(as_extractor(each, device=device) for each in listed)
        names = [extractor.name for extractor in self.extractors]
        if len({*names, IMAGES}) <= len(names):
            raise ValueError(f"features must be extractors with different names, got {', '.join(names)}.")
        if metrics and not names:
            raise ValueError(f"metrics need features, and there are none. Name an extractor for {metrics[0]!r}.")
        self._named = None if metrics is None else tuple(metrics)
        self.metrics = default_metrics() if metrics is None else tuple(metrics)
        known = isinstance(reference, Statistics) or is_statistics_file(reference)
        if known and not names:
            raise ValueError("the reference is statistics of features, and there are no features. Name an extractor.")
        self.data = None
        if not known:
            opening: dict[str, Any] = {"crop": crop, "strict": strict, "progress": progress}
            self.data = open_for(reference, shape, "images of the reference", **opening)
        options = {
            "keep_features": any(METRICS[name].needs_features for name in self.metrics),
            **{"batch_size": batch_size, "cache": cache, "progress": progress},
        }
        source = reference if self.data is None else self.data
        self._compared = [(each, statistics_for(each, source, options)) for each in self.extractors]

    def extract(self, images: Tensor) -> list[Extracted]:
        """The features and logits of images (N, C, H, W), one ``Extracted`` for each extractor."""
        return [extractor.extract(images) for extractor in self.extractors]

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
                f"{_describe(self.data.shape)}. Resize them, or in Python open the reference with "
                f"open_images(..., image_size=({shape[1]}, {shape[2]}), channels={shape[0]})."
            )
        probes = self.extract(torch.zeros(1, *shape, device="cpu"))
        for (extractor, reference), probe in zip(self._compared, probes, strict=True):
            dimension = probe.features.shape[1]
            if dimension != len(reference.mean):
                raise ValueError(
                    f"the features of {extractor.name} have {dimension:,} dimensions for images of {_describe(shape)}, "
                    f"but those of the reference have {len(reference.mean):,}. Use images of one size."
                )
        return {
            f"{name} of {extractor.name}": reason
            for extractor, reasons in zip(
                self.extractors, _lacking(n, probes, self._compared, self._named, strict=True), strict=True
            )
            for name, reason in reasons.items()
            if reason is not None
        }

    def collect(self, metrics: Sequence[str] | None = None) -> MeasuredSet:
        """Begins a new set of images, of which other metrics may be measured."""
        return MeasuredSet(self._compared, self._named if metrics is None else metrics)

    def measure(self, batches: Iterable[Tensor], *, strict: bool = True) -> Figures:
        """Measures images that arrive in batches (n, C, H, W), uint8 or floating point in [0, 1].

        Returns:
            A dict ``figures[source][name]``, where the source is the name of an extractor or "images".

        Raises:
            RuntimeError: if ``torchrun`` or ``accelerate launch`` started several processes, and there is no process
                group.
            ValueError: if images do not fit, or a named metric cannot be measured. With ``strict=False`` such a metric
                is left out.
        """
        seen = self.collect()
        for images in batches:
            seen.add(images, self.extract(images))
        return seen.figures(strict=strict)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the figures of given images, as plain values for JSON."""
        if self.data is not None:
            reference = {"n": len(self.data), "shape": list(self.data.shape), "content": self.data.content}
        else:
            known = self._compared[0][1]
            content = b"".join(values.contiguous().numpy().tobytes() for values in (known.mean, known.covariance))
            reference = {"n": known.n, "shape": None, "content": hash_of_bytes(content)}
        return {
            "reference": reference,
            "features": [
                {"name": each.name, "fingerprint": each.fingerprint, "preprocessing": each.preprocessing}
                for each in self.extractors
            ],
            "metrics": {name: METRICS[name].settings for name in self.metrics},
        }


def _describe(shape: Sequence[int]) -> str:
    """A shape (C, H, W) in words."""
    kind = {1: "gray", 3: "color"}.get(shape[0], f"{shape[0]} channels")
    return f"{' x '.join(map(str, shape[1:]))} pixels ({kind})"
