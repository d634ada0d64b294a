r"""What a run shows of itself: the loss by noise level, a log, pictures of samples, charts, and a report at the end.

**Calibration.** For the exact score the mean square of :math:`\sigma s`, divided by D, is one minus the loss divided by
D/2, at every noise level: :math:`\mathbb{E} \lVert \sigma s + z \rVert^2 = D - \mathbb{E} \lVert \sigma s \rVert^2`,
since :math:`s = -\mathbb{E}[z | x] / \sigma`. A network whose two curves differ has scores of the wrong length there.

Charts are SVG files, which need no other library and are shown by browsers and by renderers of Markdown.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scorematch.images import save_grid
from scorematch.protocol import per_image
from scorematch.randomness import seed_of
from scorematch.sampling import ODESampler, Sampler, recommended_sampler
from scorematch.score import ScoreNet
from scorematch.training.checkpoint import write_whole
from scorematch.training.levels import Levels
from scorematch.training.steps import Data, Settings, Step

LOOK_EVERY = 16  # steps between two looks at the losses; a look waits for the device

_BINS = 8  # of the noise levels, equally probable
_SAMPLES = 16  # in a picture
_REPORT_IMAGES = 64  # on which the loss by level is computed, and at so many levels:
_REPORT_LEVELS = 16


# -- The losses of a run ----------------------------------------------------------------------------------------------


class Losses:
    """The losses since the last line of the log, by noise level, and a guard against NaN.

    Losses stay on the device and are looked at every ``LOOK_EVERY`` steps, over all processes together. All processes
    see the same numbers at the same step, and so decide alike.

    Args:
        levels: the distribution of the noise levels.
        accelerator: gathers the losses of all processes.

    Attributes:
        stopping: whether a process was asked to stop, as known at the last look.
    """

    def __init__(self, levels: Levels, accelerator: Any) -> None:
        edges = torch.arange(1, _BINS, dtype=torch.float64) / _BINS
        self._edges = levels.quantile(edges).float().numpy()
        every = levels.quantile((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024).float().numpy()
        places = self._place(every)
        self._centers = [np.median(every[places == i]) if (places == i).any() else 0.0 for i in range(_BINS)]
        self._accelerator = accelerator
        self._waiting: list[tuple[int, int, Tensor, Tensor]] = []
        self._seen: tuple[list[tuple[int, int]], Callable[[], Tensor]] | None = None
        self.sums, self.counts = np.zeros(_BINS), np.zeros(_BINS)
        self.stopping = False

    def add(self, step: Step) -> None:
        """Takes in the losses of a step, without waiting for the device."""
        self._waiting.append((step.state.step, step.images, step.losses, step.sigma))

    def look(self, stop: bool = False, *, wait: bool = False) -> None:
        """Looks at the losses up to the look before this one, or up to now.

        Args:
            stop: whether this process was asked to stop.
            wait: whether to look at all losses up to now, which waits for the device.

        Raises:
            RuntimeError: if a loss was NaN or infinite; the message names the step and the noise level.
        """
        self._receive()
        if self._waiting:
            steps = [(step, images) for step, images, _, _ in self._waiting]
            columns = [[losses, sigma] for _, _, losses, sigma in self._waiting]
            rows = torch.stack([torch.stack(column).float() for column in columns])  # (steps, 2, n)
            flag = torch.full((1,), float(stop), device=rows.device)
            packed = torch.cat([flag, rows.flatten()])
            if self._accelerator.num_processes > 1:
                packed = self._accelerator.gather(packed)
            self._seen = steps, _to_host(packed)
            self._waiting = []
        if wait:
            self._receive()

    def _receive(self) -> None:
        if self._seen is None:
            return
        steps, arrived = self._seen
        self._seen = None
        whole = arrived().view(self._accelerator.num_processes, -1).numpy()
        self.stopping = self.stopping or bool(whole[:, 0].any())
        rows = whole[:, 1:].reshape(len(whole), len(steps), 2, -1)
        losses, sigma = rows[:, :, 0], rows[:, :, 1]
        wrong = np.argwhere(~np.isfinite(losses.transpose(1, 0, 2)))  # in the order of the steps
        if len(wrong):
            k, process, i = (int(index) for index in wrong[0])
            step, images = steps[k]
            raise RuntimeError(
                f"the loss became {losses[process, k, i]} at step {step} (image {images:,}), at noise level "
                f"{sigma[process, k, i]:.3g}."
            )
        place = self._place(sigma.ravel())
        self.sums += np.bincount(place, losses.ravel(), _BINS)
        self.counts += np.bincount(place, minlength=_BINS)

    def _place(self, sigma: np.ndarray) -> np.ndarray:
        """The bins of noise levels; a schedule of few levels leaves some of them empty."""
        return np.searchsorted(self._edges, sigma, side="right")

    def line(self) -> dict[str, Any]:
        """The mean loss, and by noise level, since the last line; begins anew."""
        bins = zip(self._centers, self.sums, self.counts, strict=True)
        line = {
            "loss": float(self.sums.sum() / max(1, self.counts.sum())),
            "loss_by_level": {f"{center:.4g}": float(total / count) for center, total, count in bins if count},
        }
        self.sums, self.counts = np.zeros(_BINS), np.zeros(_BINS)
        return line


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a tensor to the CPU; the function returns it when it has arrived."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> Tensor:
        event.synchronize()
        return copied

    return arrived


# -- The log ----------------------------------------------------------------------------------------------------------


class Log:
    """A file of JSON lines, each with the number of images seen.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines; one that an interruption has cut off is left out."""
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def cut(self, images: int) -> None:
        """Removes what was logged after so many images, for a run that continues from there."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["images"] <= images]
        write_whole(self.path, "".join(kept).encode())


# -- Samples ----------------------------------------------------------------------------------------------------------


def sample_interval(net: ScoreNet, images: int) -> int:
    """The images between two pictures of samples: a twentieth of the run, or so many that pictures take 2 % of it.

    Args:
        net: the network.
        images: of the run.
    """
    cost = _SAMPLES * len(_sampler(net)) // 3  # in images of training: a step takes as long as three network calls
    return max(1, images // 20, 50 * cost)


def _sampler(net: ScoreNet) -> Sampler:
    return ODESampler(net) if net.sampler_settings is None else recommended_sampler(net)


class Examples(NamedTuple):
    """The first samples of the data, for what a run shows of itself."""

    x: Tensor
    labels: Tensor | None


def read_examples(data: Data) -> Examples:
    """Reads as many samples as pictures and reports need."""
    x, labels = data.read(torch.arange(min(_REPORT_IMAGES, len(data))))
    return Examples(x.float() / 255 if x.dtype == torch.uint8 else x, labels)


def save_samples(net: ScoreNet, path: Path, examples: Examples, settings: Settings) -> None:
    """Draws samples from fixed seeds, and writes them as one picture.

    A network with an image as its condition gets degraded examples; its picture shows condition, sample and original
    side by side. The sampler is the network's recommended one, or, without a recommendation, the probability flow, in
    35 network calls.

    Args:
        net: the network, in eval mode.
        path: of the picture.
        examples: of the data.
        settings: of the run.

    Raises:
        RuntimeError: if the samples have NaN or infinite values.
    """
    x = examples.x[:_SAMPLES]
    condition, _ = _conditions(net, examples, settings, len(x))
    images = _sampler(net).sample(
        len(x),
        shape=x.shape[1:],
        condition=condition,
        generator=[seed_of(settings.seed, "sample", i) for i in range(len(x))],
        progress=False,
    )
    images = images.cpu().clamp(0, 1)
    if condition is None or condition.shape != images.shape:
        save_grid(images, path)
    else:
        save_grid(torch.stack([condition.cpu().clamp(0, 1), images, x], 1).flatten(0, 1), path, columns=6)


def _conditions(net: ScoreNet, examples: Examples, settings: Settings, n: int) -> tuple[Tensor | None, Tensor | None]:
    """The condition and the region of the first n examples, on the network's device."""
    device = next(net.parameters()).device
    if settings.condition is not None:
        generator = torch.Generator(device).manual_seed(seed_of(settings.seed, "examples"))
        made = settings.condition(examples.x[:n].to(device), generator)
        return (made, None) if isinstance(made, Tensor) else made
    conditional = net.conditioning is not None and net.conditioning.classes is not None
    return (examples.labels[:n].to(device) if conditional and examples.labels is not None else None), None


# -- Loss and norm by level -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelRow:
    """The network at one noise level.

    Attributes:
        sigma: the level.
        loss: of denoising score matching with weight sigma^2, divided by D/2: 1 for a network that returns zero.
        norm: the mean square of sigma times the score, divided by D; 1 - loss for a network of the right length.
    """

    sigma: float
    loss: float
    norm: float


@torch.no_grad()
def by_level(net: ScoreNet, examples: Examples, settings: Settings) -> list[LevelRow]:
    """The loss and the norm of the score on training images, at noise levels over the range of the schedule.

    Args:
        net: the network, in eval mode.
        examples: of the data.
        settings: of the run.
    """
    device = next(net.parameters()).device
    condition, region = _conditions(net, examples, settings, len(examples.x))
    arguments = () if condition is None else (condition,)
    x = examples.x.to(device)
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "report"))
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device)
    weight = torch.ones_like(x) if region is None else region.expand_as(x).to(x.dtype)
    weight = weight / per_image(weight.flatten(1).mean(1).clamp(min=1e-6), x)
    rows = []
    for sigma in np.geomspace(net.schedule.sigma_min, net.schedule.sigma_max, _REPORT_LEVELS).tolist():
        scaled = sigma * net(x + sigma * noise, sigma, *arguments)
        loss, norm = ((value.square() * weight).mean() for value in (scaled + noise, scaled))
        rows.append(LevelRow(sigma, float(loss), float(norm)))
    return rows


# -- Charts -----------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60


def chart(title: str, x_label: str, curves: Sequence[Curve], *, log_x: bool = False) -> str:
    """A chart of lines as the text of an SVG file.

    Args:
        title: above the chart; it also names the y axis.
        x_label: below it.
        curves: the lines; values that are not finite are left out.
        log_x: whether the x axis is logarithmic.
    """
    kept = [
        Curve(name, *zip(*points, strict=True))
        for name, xs, ys in curves
        if (points := [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (x > 0 or not log_x)])
    ]
    xs = [math.log10(x) if log_x else x for curve in kept for x in curve.x] or [0, 1]
    ys = [y for curve in kept for y in curve.y] or [0, 1]
    x_ticks = range(math.floor(min(xs)), math.ceil(max(xs)) + 1) if log_x else _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(ys), max(ys))
    (left, right), (bottom, top) = (min(x_ticks[0], *xs), max(x_ticks[-1], *xs)), (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1) * (_WIDTH - 2 * _MARGIN) + _MARGIN
        return across, _HEIGHT - _MARGIN - (y - bottom) / ((top - bottom) or 1) * (_HEIGHT - 2 * _MARGIN)

    parts = [_text(_WIDTH / 2, 24, title, "middle", 16), _text(_WIDTH / 2, _HEIGHT - 14, x_label, "middle")]
    for tick in x_ticks:
        x, y = place(tick, bottom)
        parts.append(_line([(x, y), (x, place(tick, top)[1])], "#dddddd"))
        parts.append(_text(x, y + 18, f"{10.0**tick if log_x else tick:g}", "middle"))
    for tick in y_ticks:
        x, y = place(left, tick)
        parts.append(_line([(x, y), (place(right, tick)[0], y)], "#dddddd"))
        parts.append(_text(x - 6, y + 4, f"{tick:g}", "end"))
    for i, curve in enumerate(kept):
        color = _COLORS[i % len(_COLORS)]
        points = [place(math.log10(x) if log_x else x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        parts.append(_line(points, color, 2))
        parts.append(_text(_WIDTH - _MARGIN, 40 + 14 * i, curve.name, "end", color=color))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below low to above high, about five."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _line(points: Sequence[tuple[float, float]], color: str, width: float = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, color: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"'
    return f"<text {place}>{html.escape(text)}</text>"


# -- The report -------------------------------------------------------------------------------------------------------


def write_report(out: Path, net: ScoreNet, config: Mapping[str, Any], rows: Sequence[LevelRow], seconds: float) -> None:
    """Writes report.md and its charts into the folder of a run.

    Args:
        out: the folder.
        net: the averaged network.
        config: the content of the run's config.json.
        rows: from ``by_level``.
        seconds: that the training took.
    """
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    lines = [line for line in Log(out / "log.jsonl").lines() if "loss" in line]
    compared = [line for line in (lines[:1] + lines[-1:]) if "D/2" in line]
    charts = {
        "loss": chart(
            "training loss",
            "images",
            [
                Curve("training", *_columns(lines, "images", "loss")),
                Curve("a network that predicts nothing", *_columns(compared, "images", "D/2")),
            ],
        ),
        "levels": chart(
            "loss by noise level, divided by D/2",
            "sigma",
            [Curve("averaged network", [row.sigma for row in rows], [row.loss for row in rows])],
            log_x=True,
        ),
        "calibration": chart(
            "calibration: mean square of sigma times the score",
            "sigma",
            [
                Curve("of the network", [row.sigma for row in rows], [row.norm for row in rows]),
                Curve("one minus the loss", [row.sigma for row in rows], [1 - row.loss for row in rows]),
            ],
            log_x=True,
        ),
    }
    for name, text in charts.items():
        write_whole(folder / f"{name}.svg", text.encode())
    write_whole(out / "report.md", _report(out, net, config, rows, lines, seconds).encode())


def _columns(lines: Sequence[Mapping[str, Any]], *names: str) -> list[list[float]]:
    return [[line[name] for line in lines] for name in names]


def _report(
    out: Path,
    net: ScoreNet,
    config: Mapping[str, Any],
    rows: Sequence[LevelRow],
    lines: Sequence[Mapping[str, Any]],
    seconds: float,
) -> str:
    settings, data = config["settings"], config["data"]
    count = sum(parameter.numel() for parameter in net.parameters())
    pictures = sorted((out / "samples").glob("*.png")) if (out / "samples").is_dir() else []
    text = [
        f"# {out.name}",
        "",
        f"- Network: {count:,} parameters, row {net.precondition!r}, {net.schedule}",
        f"- Data: {data['images']:,} samples of shape {tuple(data['shape'])}, fingerprint {data['fingerprint']}",
        f"- Training: {lines[-1]['images'] if lines else 0:,} images in {seconds / 3600:.2f} h",
        f"- Last training loss: {lines[-1]['loss']:.4g} (D/2 = {math.prod(data['shape']) / 2:g})" if lines else "",
        "- Versions: " + ", ".join(f"{name} {value}" for name, value in config["versions"].items()),
        "",
        "```python",
        "from scorematch import ScoreNet",
        f'net = ScoreNet.from_pretrained("{(out / "network").as_posix()}")',
        "```",
        "",
        "![training loss](report/loss.svg)",
        "![loss by noise level](report/levels.svg)",
        "![calibration](report/calibration.svg)",
        *([f"![samples](samples/{pictures[-1].name})"] if pictures else []),
        "",
        "| sigma | loss / (D/2) | mean square of sigma s | 1 - loss / (D/2) |",
        "|---|---|---|---|",
        *(f"| {row.sigma:.4g} | {row.loss:.4f} | {row.norm:.4f} | {1 - row.loss:.4f} |" for row in rows),
        "",
        "For the exact score the last two columns are equal.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {json.dumps(value)} |" for name, value in settings.items()),
        "",
    ]
    return "\n".join(text)
