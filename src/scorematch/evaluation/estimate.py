"""Values with their errors, and tables of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from scorematch.core.charts import table

IMAGES = "images"  # the source of the figures of the pixels; other sources are names of extractors
_ROUNDING = 1e-12  # the largest error, relative to the value, that may be that of rounding


class Estimate(NamedTuple):
    """A measured number.

    Attributes:
        value: the value.
        error: its standard error, or its standard deviation over subsets or splits; the function says which. None if it
            is not known.
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


Figures: TypeAlias = "dict[str, dict[str, Estimate]]"  # extractor or "images" -> name of the figure


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


def as_dicts(figures: Figures) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures as plain values for JSON."""
    return {source: {name: figure._asdict() for name, figure in found.items()} for source, found in figures.items()}


def mean_of(values: Tensor) -> Estimate:
    """The mean of values (N,) and its standard error, which is None for a single value."""
    values = values.double().cpu()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None)


def root_of(square: Estimate) -> Estimate:
    """The square root of an estimate, with its error by the delta method; the root 0 has no error."""
    root = math.sqrt(square.value)
    return Estimate(root, None if square.error is None or root == 0 else square.error / (2 * root))


def ratio_of(a: Tensor, b: Tensor) -> Estimate:
    """The ratio of the means of values (n,) and (n,), and its standard error to first order."""
    ratio = float(a.mean() / b.mean())
    return Estimate(ratio, float((a - ratio * b).std() / b.mean()) / math.sqrt(len(a)))


def share_of(count: int, n: int) -> Estimate:
    """The share of ``count`` among n, and its standard error."""
    share = count / n
    return Estimate(share, math.sqrt(share * (1 - share) / n))


R = TypeVar("R")


class Report(list[R]):
    """A list of rows: named tuples, one for each noise level, sampler or method."""

    def table(self) -> str:
        """The rows as a table in Markdown, with the errors of estimates."""
        rows: list[dict[str, Any]] = [row._asdict() for row in self]  # type: ignore[attr-defined]
        return table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
