"""A plot of samples that are not pictures: signals as lines, fields in colors, vectors as points (extra ``arrays``)."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scorematch.core.files import write_whole

_PANELS, _POINTS, _VALUES = 16, 2000, 4  # of samples; of vectors; of the values of a vector that are shown


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises ImportError without Matplotlib, before samples are drawn for a plot."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the plot {path} needs Matplotlib: pip install "scorematch[arrays]".') from error


def save_plot(x: Tensor, path: str | os.PathLike[str]) -> None:
    """Plots samples in their own units.

    Signals (n, C, L) are lines, one for each channel. Fields (n, C, H, W), and the middle slices of volumes
    (n, C, D, H, W), are shown in colors, with one scale for each channel. Of vectors (n, D), each pair of the first
    four values is shown as points, and each value as a histogram.

    Args:
        x: the samples, of which at most 16 are shown, or 2,000 vectors.
        path: the file, in a format of Matplotlib, such as .png, .pdf or .svg.

    Raises:
        ImportError: without Matplotlib.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    values = x.detach().cpu().float().numpy()
    figure = Figure(layout="constrained")
    if values.ndim == 2:
        _points(figure, values[:_POINTS])
    elif values.ndim == 3:
        _lines(figure, values[:_PANELS])
    else:
        _fields(figure, (values if values.ndim == 4 else values[:, :, values.shape[2] // 2])[:_PANELS])
    path = Path(path).expanduser()
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format=path.suffix[1:].lower())
    write_whole(path, content.getvalue())


def _points(figure: Any, x: np.ndarray) -> None:
    shown = min(_VALUES, x.shape[1])
    axes = figure.subplots(shown, shown, squeeze=False)
    figure.set_size_inches(3 * shown, 2.5 * shown)
    for i, row in enumerate(axes):
        for k, axis in enumerate(row):
            if i == k:
                axis.hist(x[:, i].astype(np.float64), 50)  # whose bins are narrow enough for large values
                axis.set_xlabel(f"value {i}")
            else:
                axis.plot(x[:, k], x[:, i], ".", markersize=2)


def _lines(figure: Any, x: np.ndarray) -> None:
    columns = math.ceil(math.sqrt(len(x)))
    axes = figure.subplots(math.ceil(len(x) / columns), columns, squeeze=False, sharex=True, sharey=True)
    figure.set_size_inches(3 * columns, 2 * len(axes))
    for axis, sample in zip(axes.flat, x, strict=False):
        axis.plot(sample.T)


def _fields(figure: Any, x: np.ndarray) -> None:
    n, channels = x.shape[:2]
    columns = math.ceil(math.sqrt(n)) if channels == 1 else n
    axes = figure.subplots(math.ceil(n * channels / columns), columns, squeeze=False)
    figure.set_size_inches(2 * columns + 1, 2 * len(axes))
    for axis in axes.flat:
        axis.axis("off")
    for channel in range(channels):
        own = axes.flat[channel * n : channel * n + n]  # a row for each channel, if there are several
        low, high = x[:, channel].min(), x[:, channel].max()
        drawn = [axis.imshow(field, vmin=low, vmax=high) for axis, field in zip(own, x[:, channel], strict=True)]
        figure.colorbar(drawn[0], ax=axes if channels == 1 else axes[channel])
