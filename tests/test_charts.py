"""SVG charts."""

import math

from scorematch.core.charts import Curve, chart


def test_points_are_drawn_at_their_coordinates():
    svg = chart(
        "title <1>", "sigma", [Curve("one", [0.01, 1, 100], [0, 0.5, 1]), Curve("b", [1], [math.nan])], log_x=True
    )
    assert "title &lt;1&gt;" in svg and 'points="60.0,340.0 320.0,200.0 580.0,60.0"' in svg and ">0.01<" in svg
    assert "circle" not in svg and ">b<" not in svg


def test_a_logarithmic_y_axis_leaves_out_what_is_not_positive():
    svg = chart("t", "x", [Curve("one", [0, 1, 2, 3], [0.01, 1, 0, 100])], log_y=True, marks=True)
    assert 'points="60.0,340.0 233.3,200.0 580.0,60.0"' in svg and svg.count("<circle") == 3
    assert all(f">{tick}<" in svg for tick in ("0.01", "0.1", "1", "10", "100"))


def test_charts_without_points_or_without_a_range_are_drawn():
    assert chart("empty", "x", []).startswith("<svg")
    assert chart("empty", "x", [], log_x=True, log_y=True).startswith("<svg")
    assert chart("flat", "x", [Curve("one", [1, 2], [3, 3])]).count("<polyline") > 3


def test_curves_have_different_colors():
    svg = chart("t", "x", [Curve(str(i), [0, 1], [0, i]) for i in range(10)])
    assert len({part.split('"')[0] for part in svg.split('stroke="')[1:]} - {"#dddddd"}) == 10


def test_an_axis_of_tiny_values_has_their_ticks():
    svg = chart("t", "x", [Curve("one", [0, 1, 2], [0, 1e-14, 2e-14])])
    assert 'points="60.0,340.0 320.0,200.0 580.0,60.0"' in svg and ">1e-14<" in svg
