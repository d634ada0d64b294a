"""The result of a diagnostic: rows of estimates, as a table and as charts."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

from scorematch.core.charts import Curve, chart, table

R = TypeVar("R")


class Report(list[R]):
    """A list of rows: named tuples, one for each noise level, sampler or method."""

    def table(self) -> str:
        """The rows as a table in Markdown, with the errors of estimates."""
        rows: list[dict[str, Any]] = [row._asdict() for row in self]  # type: ignore[attr-defined]
        return table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])

    def chart(self, figure: str, *, log_y: bool = False) -> str:
        """One column against the noise level, or the number of network calls, as the text of an SVG file.

        Args:
            figure: the name of the column.
            log_y: whether the y axis is logarithmic.
        """
        x = "sigma" if hasattr(self[0], "sigma") else "calls"
        every = [value for row in self if (value := getattr(row, x)) is not None]
        curves = []
        for name, rows in itertools.groupby(self, lambda row: getattr(row, "name", figure)):
            points = [(getattr(row, x), getattr(row, figure)) for row in rows]
            if points[0][0] is None:  # exact samples, which need no network
                value, error = points[0][1]
                curves.append(Curve(f"{name}, plus two deviations", [min(every), max(every)], [value + 2 * error] * 2))
            else:
                values = [getattr(value, "value", value) for _, value in points]
                curves.append(Curve(name, [place for place, _ in points], values))
        return chart(figure, "network calls" if x == "calls" else x, curves, log_x=True, log_y=log_y, marks=True)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
