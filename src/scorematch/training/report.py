r"""The output of a training run: the log with the loss by noise level, images of samples, and a report with charts.

**Calibration.** The exact score satisfies, at every noise level,
:math:`\mathbb{E} \lVert \sigma s + z \rVert^2 = D - \mathbb{E} \lVert \sigma s \rVert^2`, since
:math:`s = -\mathbb{E}[z | x] / \sigma`: the mean square of :math:`\sigma s`, divided by D, is one minus the loss
divided by D/2. The report shows both as curves. Where they differ, the norm of the network's score is wrong.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scorematch.core.charts import Curve, chart, table
from scorematch.core.conditions import describe_classes
from scorematch.core.files import write_whole
from scorematch.core.randomness import seed_of, single_generator, standard_normal
from scorematch.core.schema import Field, check
from scorematch.data.images import Data
from scorematch.data.pictures import save_grid, to_float
from scorematch.loss import loss_and_norm
from scorematch.sampling import ODESampler, Sampler, recommended_sampler
from scorematch.score import ScoreNet
from scorematch.training.levels import Levels
from scorematch.training.settings import Settings
from scorematch.training.steps import Step, loss_arguments

CHECK_EVERY = 16  # steps between two checks of the losses, which synchronize with the device
_SLOW_STEP = 0.5  # seconds; longer steps are checked one by one
BINS = 8  # the number of equally probable intervals of noise levels in the log

# The names that the training itself writes into the log.
FIELDS = frozenset({"images", "lr", "images_per_second", "loss", "loss_by_level", "D/2"})

_SAMPLES = 16  # the number of samples in an image of samples
_REPORT_IMAGES = 64  # the number of images and of noise levels for the loss by level in the report
_REPORT_LEVELS = 16
_REPORT_VALUES = 2**20  # the largest number of values in a network call for the report, as in a sampler
_LINE: Mapping[str, Field] = {  # the values of a line of the log that are read again
    "images": Field(int, required=True, low=0, high=2**62),
    "loss": Field(float),
    "D/2": Field(float),
}


# -- The losses of a run ----------------------------------------------------------------------------------------------


class Losses:
    """Collects the losses since the last line of the log by noise level, and detects NaN and infinity.

    Losses stay on the device and are gathered from all processes every ``CHECK_EVERY`` steps, or at every step if steps
    are slow. All processes receive the same numbers at the same step, and therefore make the same decisions.

    Args:
        levels: the distribution of the noise levels in training.
        accelerator: the ``accelerate.Accelerator`` of the run.

    Attributes:
        sums: the sum of the losses in each interval of noise levels.
        counts: the number of the losses in each interval.
        stopping: whether any process had been asked to stop at the last call of ``check``.
        late: whether a checkpoint was due in any process at the last call of ``check``.
        slow: whether the steps of any process are so slow that every step should be checked, so that all processes soon
            agree to stop after a signal. It is True until the first steps have been timed.
    """

    def __init__(self, levels: Levels, accelerator: Any) -> None:
        edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        self._edges = levels.quantile(edges).float().numpy()
        every = levels.quantile((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024).float().numpy()
        places = self._place(every)
        self._centers = [np.median(every[places == i]) if (places == i).any() else 0.0 for i in range(BINS)]
        self._accelerator = accelerator
        self._waiting: list[tuple[int, int, Tensor, Tensor]] = []
        self._seen: tuple[list[tuple[int, int]], Callable[[], Tensor]] | None = None
        self.sums, self.counts = np.zeros(BINS), np.zeros(BINS)
        self.stopping = self.late = False
        self.slow = True
        self._checked = time.perf_counter()

    def add(self, step: Step) -> None:
        """Adds the losses of a step, without synchronization with the device."""
        self._waiting.append((step.state.step, step.images, step.losses, step.sigma))

    def check(self, stop: bool = False, late: bool = False, *, wait: bool = False) -> None:
        """Evaluates the losses that were added before the previous call, and starts to copy the newer ones.

        Args:
            stop: whether this process was asked to stop.
            late: whether a checkpoint is due in this process.
            wait: whether to evaluate the newer losses too, which synchronizes with the device.

        Raises:
            RuntimeError: if a loss was NaN or infinite; the message names the step and the noise level.
        """
        self._receive()
        if self._waiting:
            steps = [(step, images) for step, images, _, _ in self._waiting]
            columns = [[losses, sigma] for _, _, losses, sigma in self._waiting]
            rows = torch.stack([torch.stack(column).float() for column in columns])  # (steps, 2, n)
            now = time.perf_counter()
            slow = now - self._checked > _SLOW_STEP * len(steps)
            self._checked = now
            flags = torch.full((1,), float(stop + 2 * late + 4 * slow), device=rows.device)
            packed = torch.cat([flags, rows.flatten()])
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
        flags = whole[:, 0].astype(int)
        self.stopping = self.stopping or bool((flags & 1).any())
        self.late = bool((flags & 2).any())
        self.slow = bool((flags & 4).any())
        rows = whole[:, 1:].reshape(len(whole), len(steps), 2, -1).swapaxes(0, 1)  # (steps, processes, 2, n)
        losses, sigma = rows[:, :, 0], rows[:, :, 1]
        wrong = np.argwhere(~np.isfinite(losses))
        if len(wrong):
            k, process, i = (int(index) for index in wrong[0])
            step, images = steps[k]
            raise RuntimeError(
                f"the loss became {losses[k, process, i]} at step {step} (image {images:,}), at noise level "
                f"{sigma[k, process, i]:.3g}."
            )
        place = self._place(sigma.ravel())
        self.sums += np.bincount(place, losses.ravel(), BINS)  # float64: practically exact in any order
        self.counts += np.bincount(place, minlength=BINS)

    def _place(self, sigma: np.ndarray) -> np.ndarray:
        """The index of the interval of each noise level; with a schedule of few levels some intervals are empty."""
        return np.searchsorted(self._edges, sigma, side="right")

    def line(self) -> dict[str, Any]:
        """The mean loss since the last line, over all noise levels and in each interval; resets the sums."""
        bins = zip(self._centers, self.sums, self.counts, strict=True)
        line = {
            "loss": float(self.sums.sum() / max(1, self.counts.sum())),
            "loss_by_level": {f"{center:.4g}": float(total / count) for center, total, count in bins if count},
        }
        self.sums, self.counts = np.zeros(BINS), np.zeros(BINS)
        return line


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the CPU; the returned function waits for the copy and returns it."""
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
    """A file of JSON lines, each with the number of images seen under the key "images".

    Args:
        path: the path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error  # with the name of the file

    def lines(self) -> list[dict[str, Any]]:
        """All lines. Incomplete lines, which an interruption leaves, and lines of another kind are ignored."""
        found = []
        for text in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError, RecursionError):
                line = json.loads(text)
                check(line, _LINE, "the line")
                found.append(line)
        return found

    def cut(self, images: int) -> None:
        """Removes the lines after the given number of images, for a run that continues from there."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["images"] <= images]
        write_whole(self.path, "".join(kept).encode(), durable=True)


# -- Samples ----------------------------------------------------------------------------------------------------------


def sample_interval(net: ScoreNet, images: int) -> int:
    """The default of ``sample_every``: a twentieth of the run, or more, so that sampling takes at most 2 % of the time.

    Args:
        net: the network.
        images: the number of images of the run.
    """
    cost = _SAMPLES * len(_sampler(net)) // 3  # in training images: a training step costs three network calls
    return max(1, images // 20, 50 * cost)


def _sampler(net: ScoreNet) -> Sampler:
    """The recommended sampler; without a recommendation ``ODESampler``, which needs at least two noise levels."""
    return ODESampler(net) if net.sampler_settings is None and len(net.schedule) > 1 else recommended_sampler(net)


class Examples(NamedTuple):
    """The first samples of the data, for images of samples and the report.

    Attributes:
        x: the samples (n, ...), floating point.
        labels: their labels (n,), int64, or None.
    """

    x: Tensor
    labels: Tensor | None


def read_examples(data: Data) -> Examples:
    """Reads the first 64 samples of the data, or all if there are fewer."""
    x, labels = data.read(torch.arange(min(_REPORT_IMAGES, len(data))))
    return Examples(to_float(x), labels)


def save_samples(net: ScoreNet, path: Path, examples: Examples, settings: Settings) -> None:
    """Draws samples from fixed seeds and writes them to one image file.

    For a network with an image as its condition, the conditions are degraded examples, and the file shows condition,
    sample and original side by side. For a class-conditional network the classes take turns. The sampler
    is the one recommended for the network; without a recommendation it is ``ODESampler``, with 35 network calls, or
    ``AnnealedLangevinSampler`` for a network of one noise level.

    Args:
        net: the network, in eval mode.
        path: the path of the image file.
        examples: the first samples of the data.
        settings: the settings of the run.

    Raises:
        RuntimeError: if the samples have NaN or infinite values.
    """
    x = examples.x[:_SAMPLES]
    condition = _given(net, examples, settings, len(x)).get("condition")
    classes = None if net.conditioning is None else net.conditioning.classes
    if condition is not None and classes is not None:
        condition = torch.arange(len(x), device=condition.device) % classes
    images = _sampler(net).sample(
        len(x),
        shape=x.shape[1:],
        condition=condition,
        generator=[seed_of(settings.seed, "sample", i) for i in range(len(x))],
        progress=False,
    )
    rows, columns = images.cpu(), None
    if condition is not None and condition.shape == images.shape:
        rows, columns = torch.stack([condition.cpu(), rows, x], 1).flatten(0, 1), 6
    low, high = net.value_range or (0.0, 1.0)
    save_grid(((rows - low) / (high - low)).clamp(0, 1), path, columns)


def _given(net: ScoreNet, examples: Examples, settings: Settings, n: int) -> dict[str, Any]:
    """The condition and the region of the first n examples by name, on the network's device, if there are any."""
    takes, x = net.conditioning, examples.x[:n].to(next(net.parameters()).device)
    labels = None if takes is None or takes.classes is None or examples.labels is None else examples.labels[:n]
    return loss_arguments(settings, x, labels, seed_of(settings.seed, "examples"))


# -- Loss and norm by level -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelRow:
    """The evaluation of the network at one noise level.

    Attributes:
        sigma: the noise level.
        loss: the denoising score matching loss with weight sigma^2, divided by D/2; 1 for a score of zero.
        norm: the mean squared norm of sigma times the score, divided by D; 1 - loss for the exact score.
    """

    sigma: float
    loss: float
    norm: float


@torch.no_grad()
def by_level(net: ScoreNet, examples: Examples, settings: Settings) -> list[LevelRow]:
    """The loss and the norm of the score on training images, at 16 geometric levels over the range of the schedule.

    Args:
        net: the network, in eval mode.
        examples: the first samples of the data.
        settings: the settings of the run.
    """
    x = examples.x.to(next(net.parameters()).device)
    given = _given(net, examples, settings, len(x))
    if "region" in given:
        given["region"] = given["region"].expand(x.shape)
    generator = single_generator(seed_of(settings.seed, "report"))
    given["noise"] = standard_normal(x.shape, generator, x.device, x.dtype)
    size = max(1, _REPORT_VALUES // x[0].numel())
    rows = []
    for sigma in np.geomspace(net.schedule.sigma_min, net.schedule.sigma_max, _REPORT_LEVELS).tolist():
        found = []
        for i in range(0, len(x), size):
            part = {name: value[i : i + size] for name, value in given.items()}
            found.append(loss_and_norm(net, x[i : i + size], sigma=sigma, **part))
        loss, norm = (float(torch.cat(values).mean()) for values in zip(*found, strict=True))
        rows.append(LevelRow(sigma, loss, norm))
    return rows


# -- The report -------------------------------------------------------------------------------------------------------


def write_report(
    out: Path,
    net: ScoreNet,
    config: Mapping[str, Any],
    rows: Sequence[LevelRow],
    seconds: float,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes report.md and its charts into the folder of a run.

    Args:
        out: the folder of the run.
        net: the averaged network.
        config: the content of the run's config.json.
        rows: the result of ``by_level``.
        seconds: the duration of the training.
        classes: the names of the classes, or None.
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
                Curve("D/2, for D values per image", *_columns(compared, "images", "D/2")),
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
    text = _report(out, net, config, rows, lines, seconds, classes)
    write_whole(out / "report.md", text.encode(errors="backslashreplace"))  # of folder names in another encoding


def _columns(lines: Sequence[Mapping[str, Any]], *names: str) -> list[list[float]]:
    return [[line[name] for line in lines] for name in names]


def _report(
    out: Path,
    net: ScoreNet,
    config: Mapping[str, Any],
    rows: Sequence[LevelRow],
    lines: Sequence[Mapping[str, Any]],
    seconds: float,
    classes: Sequence[str] | None,
) -> str:
    settings, data = config["settings"], config["data"]
    count = sum(parameter.numel() for parameter in net.parameters())
    names = (path.name for path in (out / "samples").glob("*.png"))
    picture = max(names, key=lambda name: (len(name), name), default="")  # from 10^9 images on, names are longer
    text = [
        f"# {out.name}",
        "",
        f"- Network: {count:,} parameters, preconditioning {net.precondition!r}, {net.schedule}",
        f"- Data: {data['images']:,} samples of shape {tuple(data['shape'])}, fingerprint {data['fingerprint']}",
        *([f"- {describe_classes(classes)}"] if classes is not None else []),
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
        *([f"![samples](samples/{picture})"] if picture else []),
        "",
        table(
            ["sigma", "loss / (D/2)", "mean square of sigma s", "1 - loss / (D/2)"],
            [[f"{row.sigma:.4g}", *(f"{value:.4f}" for value in (row.loss, row.norm, 1 - row.loss))] for row in rows],
        ),
        "For the exact score the last two columns are equal.",
        "",
        table(["setting", "value"], [[name, json.dumps(value)] for name, value in settings.items()]),
    ]
    return "\n".join(text)
