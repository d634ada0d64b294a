"""Line charts as SVG files, which need no plotting library and are displayed by browsers, and tables in Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Curve", "chart", "table"]


class Curve(NamedTuple):
    """A line in a chart.

    Attributes:
        name: the name in the legend.
        x: the x coordinates of its points.
        y: the y coordinates, as many.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60


def chart(
    title: str, x_label: str, curves: Sequence[Curve], *, log_x: bool = False, log_y: bool = False, marks: bool = False
) -> str:
    """A line chart as the text of an SVG file.

    Args:
        title: the title, which also describes the y axis.
        x_label: the label of the x axis.
        curves: the lines. Points whose y is not finite are left out; on a logarithmic axis also those that are not
            positive.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.
        marks: whether to draw a dot at each point.

    Example:
        >>> chart("squares", "x", [Curve("x^2", [1, 2, 3], [1, 4, 9])])[:4]
        '<svg'
    """

    def seen(x: float, y: float) -> bool:
        return math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)

    kept = []
    for name, xs, ys in curves:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if seen(x, y)]
        if points:
            kept.append((name, points))
    across = _Axis([x for _, points in kept for x, _ in points], log_x, _MARGIN, _WIDTH - _MARGIN)
    up = _Axis([y for _, points in kept for _, y in points], log_y, _HEIGHT - _MARGIN, _MARGIN)

    parts = [_text(_WIDTH / 2, 24, title, "middle", 16), _text(_WIDTH / 2, _HEIGHT - 14, x_label, "middle")]
    for value, x in across.ticks():
        parts.append(_line([(x, up.first), (x, up.last)], "#dddddd"))
        parts.append(_text(x, up.first + 18, f"{value:g}", "middle"))
    for value, y in up.ticks():
        parts.append(_line([(across.first, y), (across.last, y)], "#dddddd"))
        parts.append(_text(across.first - 6, y + 4, f"{value:g}", "end"))
    for i, (name, points) in enumerate(kept):
        color = _COLORS[i % len(_COLORS)]
        placed = [(across.place(x), up.place(y)) for x, y in points]
        parts.append(_line(placed, color, 2))
        if marks:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in placed]
        parts.append(_text(_WIDTH - _MARGIN, 40 + 14 * i, name, "end", color=color))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(table(["sigma", "loss"], [["0.1", "0.25"]]), end="")
        | sigma | loss |
        | --- | --- |
        | 0.1 | 0.25 |
    """
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])


class _Axis:
    """An axis from the pixel ``first`` to the pixel ``last``, linear or logarithmic, whose ends are ticks."""

    def __init__(self, values: Sequence[float], log: bool, first: float, last: float) -> None:
        self.first, self.last, self._log = first, last, log
        scaled = [math.log10(value) if log else value for value in values] or [0, 1]
        low, high = min(scaled), max(scaled)
        self._ticks = list(range(math.floor(low), math.ceil(high) + 1)) if log else _round_numbers(low, high)

    def place(self, value: float) -> float:
        """The pixel of a value."""
        return self._place(math.log10(value) if self._log else value)

    def ticks(self) -> list[tuple[float, float]]:
        """The values of the ticks and their pixels."""
        return [(10.0**tick if self._log else tick, self._place(tick)) for tick in self._ticks]

    def _place(self, scaled: float) -> float:
        low, high = self._ticks[0], self._ticks[-1]
        return self.first + (scaled - low) / ((high - low) or 1) * (self.last - self.first)


def _round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers, of which the first is at most low and the last at least high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
    digits = max(12, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _line(points: Sequence[tuple[float, float]], color: str, width: float = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, color: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"'
    return f"<text {place}>{html.escape(text)}</text>"
