"""The result of a diagnostic: rows of estimates, as a table."""

from __future__ import annotations

from typing import Any, TypeVar

from scorematch.core.charts import table

R = TypeVar("R")


class Report(list[R]):
    """A list of rows: named tuples, one for each noise level, sampler or method."""

    def table(self) -> str:
        """The rows as a table in Markdown, with the errors of estimates."""
        rows: list[dict[str, Any]] = [row._asdict() for row in self]  # type: ignore[attr-defined]
        return table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
