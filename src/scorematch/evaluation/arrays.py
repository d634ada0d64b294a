r"""The evaluation of data that are not pictures: vectors, signals, fields and volumes (N, C, ...), in any units.

Each channel is standardized by its mean and its standard deviation in the reference. The metrics are those of the table
``METRICS`` on the values themselves, flattened to (N, D). Up to four sets are measured against the reference:

- the samples;
- held-out data;
- the *floor*: random data of the reference, as many as there are samples but at most half of them, against the rest;
- draws from the Gaussian with the mean and the covariance of the reference, a ceiling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import check_choice
from scorematch.core.charts import Curve, chart
from scorematch.core.derived import Isotropic
from scorematch.core.files import write_whole
from scorematch.core.processes import gathered
from scorematch.core.randomness import seed_of, standard_normal
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.core.scores import attribute
from scorematch.data.array_data import ArrayData, check_finite, find_arrays
from scorematch.data.moments import Sums, batches_of, step_of
from scorematch.data.pictures import is_picture
from scorematch.evaluation.estimate import Estimate
from scorematch.evaluation.features import Extracted, Extractor
from scorematch.evaluation.metrics import METRICS, default_metrics
from scorematch.evaluation.per_image import choose
from scorematch.evaluation.spectrum import power_spectrum
from scorematch.evaluation.statistics import Statistics, is_statistics_file
from scorematch.sampling import Sampler
from scorematch.score import ScoreNet

VALUES = "values"  # the source of the figures
CHARTS = ("spectrum.svg", "values.svg")
_CHANNELS, _BINS, _AT_ONCE = 5, 100, 1000
_FLAT = Extractor(lambda x: x.flatten(1), VALUES, "1", "each channel standardized by the reference")


def reference_arrays(reference: Any, what: Any = None, *, named: bool = False) -> ArrayData | None:
    """Opens a reference of floating-point data that are not pictures; None if it is something else.

    Data of the shape of pictures are pictures if their values are in [-1, 1], or whole numbers up to 255, unless
    ``what`` is a network or a sampler without a ``value_range``, or the user said so (``named``).
    """
    if isinstance(reference, Statistics) or is_statistics_file(reference):
        return None
    net = what.net if isinstance(what, Sampler) else what
    named = named or (isinstance(net, ScoreNet | Isotropic) and attribute(net, "value_range") is None)
    data = find_arrays(reference, pictures=not named)
    if data is None or named or not is_picture(data.shape):
        return data
    return None if max(float(batch.abs().max()) for batch in batches_of(data)) <= 1 else data


def some_values_of(data: ArrayData, n: int, seed: int) -> Tensor:
    """At most n random samples (m, C, ...), float32, in their order."""
    return data.read(choose(len(data), min(n, len(data)), seed).sort().values)[0]


def gathered_values(batches: Iterable[Tensor]) -> Tensor:
    """The samples (n, C, ...) of the batches of all processes, float32, on the CPU; every process must call it."""
    own = [batch.cpu().float() for batch in batches]
    return torch.cat([batch for part in gathered(own) for batch in part])


class ArrayEvaluator:
    """Measures sets of samples (n, C, ...) against a reference (M, C, ...).

    Args:
        data: the reference.
        metrics: names from ``METRICS``; None is all that can be measured.
    """

    def __init__(self, data: ArrayData, metrics: Sequence[str] | None = None) -> None:
        for each in metrics or ():
            check_choice("each of metrics", each, METRICS)
        self.data, self._named = data, metrics is not None
        self.metrics = default_metrics("arrays") if metrics is None else tuple(metrics)
        found, parts = Sums("the reference", "channel"), [data.fingerprint]
        for batch in batches_of(data):
            found.add(batch)
            parts.append(hash_of_bytes(batch.contiguous().numpy().data))
        self._content = hash_of(parts)  # the fingerprint of data that are not in memory does not have all values
        varies, shape = found.low < found.high, (-1, *[1] * (len(data.shape) - 1))
        if not bool(varies.any()):
            raise ValueError("the reference is constant. Pass data that vary.")
        std = torch.where(varies, (found.squares / (found.n - 1)).sqrt(), 1)
        self._mean, self._std = found.mean.view(shape), std.view(shape)
        self.reference = self._standard(batches_of(data), len(data))

    def _standard(self, batches: Iterable[Tensor], n: int) -> Tensor:
        """The n samples of batches, standardized; with many values no other tensor of all of them is made."""
        made, first = torch.empty(n, *self.data.shape, dtype=torch.float32, device="cpu"), 0
        for batch in batches:
            made[first : first + len(batch)] = (batch.double() - self._mean) / self._std
            first += len(batch)
        return made

    def check(self, n: int, shape: Sequence[int]) -> dict[str, str]:
        """Checks that n samples of a shape (C, ...) can be measured, before they are drawn.

        Returns:
            The metrics that will be left out, with the reasons.

        Raises:
            ValueError: if n is below 2, the data have another shape, or a named metric cannot be measured.
        """
        if n < 2:
            raise ValueError(f"the metrics need at least 2 samples, got {n}.")
        self._check_shape(shape)
        left_out = self._lacking(n)
        for each, reason in left_out.items() if self._named else ():
            raise ValueError(f"the metric {each!r} {reason}.")
        return left_out

    def _check_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != self.data.shape:
            found = tuple(shape)
            raise ValueError(f"the samples must have the shape of the reference, {self.data.shape}, got {found}.")

    def _lacking(self, n: int) -> dict[str, str]:
        reasons = {name: self._lacks(METRICS[name].needs, METRICS[name].least, n) for name in self.metrics}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _lacks(self, needs: str, least: Any, n: int) -> str | None:
        if needs == "logits":
            return "needs an extractor with logits of classes"
        if needs == "fields" and self.reference.ndim < 3:
            return "is for signals, fields and volumes"
        least = least(self.reference[0].numel()) if callable(least) else least
        fewest = min(n, len(self.reference))
        return None if fewest >= least else f"needs at least {least:,} samples in each set, and there are {fewest:,}"

    def measure(self, samples: Tensor) -> dict[str, Estimate]:
        """The figures of samples (n, C, ...) that can be measured, by name; ``gathered_values`` joins batches."""
        self._check_shape(samples.shape[1:])
        check_finite(samples, "the samples", data=False)
        step = step_of(self.data.shape)
        return self._measure(self._standard(samples.split(step), len(samples)), self.reference)

    def floor(self, n: int, seed: int) -> tuple[int, dict[str, Estimate]]:
        """The number of data that are measured against the rest of the reference, and their figures."""
        k = min(n, len(self.reference) // 2)
        generator = torch.Generator().manual_seed(seed_of(seed, "floor"))
        order = torch.randperm(len(self.reference), generator=generator, device="cpu")
        return k, self._measure(self.reference[order[:k]], self.reference[order[k:]])

    def gaussian(self, n: int, seed: int) -> dict[str, Estimate]:
        """The figures of n draws from the Gaussian with the mean and the covariance of the reference."""
        generator = torch.Generator().manual_seed(seed_of(seed, "gaussian"))
        mean = self.reference.flatten(1).mean(0)
        rows = self.reference.flatten(1) - mean
        sizes = [len(part) for part in torch.arange(n, device="cpu").split(_AT_ONCE)]
        weights = (standard_normal((size, len(rows)), generator, mean.device) for size in sizes)
        drawn = [mean + each @ rows / (len(rows) - 1) ** 0.5 for each in weights]
        return self._measure(torch.cat(drawn).view(n, *self.reference.shape[1:]), self.reference)

    def _measure(self, x: Tensor, y: Tensor) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        lacking = self._lacking(min(len(x), len(y)))
        for name in (name for name in self.metrics if name not in lacking):
            metric = METRICS[name]
            if metric.needs in ("values", "fields"):
                found |= metric.named(metric.function(x, y))
            else:
                reference = Statistics.of(y.flatten(1), _FLAT) if metric.needs == "statistics" else y.flatten(1)
                found |= metric(Extracted(x.flatten(1), None), reference)
        return found

    def settings(self) -> dict[str, Any]:
        """What determines the figures of given sets, as plain values for JSON."""
        named = {"name": VALUES, "fingerprint": _FLAT.fingerprint, "preprocessing": _FLAT.preprocessing}
        reference = {"n": len(self.data), "content": self._content}
        metrics = {name: METRICS[name].settings for name in self.metrics}
        return {"reference": reference, "features": [named], "metrics": metrics}


def save_charts(samples: Tensor, reference: Tensor, folder: Path) -> None:
    """Writes the distribution of the values, and for signals and fields the mean power spectrum, of each channel."""
    spectra, values = [], []
    for i in range(min(samples.shape[1], _CHANNELS)):
        both = {"samples": samples[:, i : i + 1], "data": reference[:, i : i + 1]}
        low, high = (float(each) for each in torch.cat([part.flatten() for part in both.values()]).aminmax())
        for name, part in both.items():
            label = name if samples.shape[1] == 1 else f"{name}, channel {i}"
            counts, edges = np.histogram(part.numpy(), _BINS, (low, high), density=True)
            values.append(Curve(label, ((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist()))
            if part.ndim > 2:
                power = power_spectrum(part).mean((0, 1))
                spectra.append(Curve(label, list(range(1, len(power))), power[1:].tolist()))
    write_whole(folder / "values.svg", chart("density of the values", "value", values).encode())
    if spectra:
        drawn = chart("power spectrum", "wave number", spectra, log_x=True, log_y=True)
        write_whole(folder / "spectrum.svg", drawn.encode())
