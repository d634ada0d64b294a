"""Images of samples during a training run, and the report at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.charts import Curve, chart, table
from scorematch.core.conditions import Parts, describe_classes
from scorematch.core.files import write_whole
from scorematch.core.randomness import seed_of
from scorematch.data.images import Data
from scorematch.data.pictures import is_picture, save_grid, to_float
from scorematch.data.plots import save_plot
from scorematch.sampling import ODESampler, Sampler, recommended_sampler
from scorematch.score import ScoreNet
from scorematch.training.checks import given_of
from scorematch.training.log import Log
from scorematch.training.settings import Settings
from scorematch.training.steps import loss_arguments

_SAMPLES, _VECTORS = 16, 512  # the number of samples in a picture of samples, and of vectors

# The number of images after which growing drew objects, and the shortest side of pictures for which this is said.
_MILESTONE, _SMALLEST = 200_000, 28


# -- Samples ----------------------------------------------------------------------------------------------------------


def sample_interval(net: ScoreNet, images: int) -> int:
    """The default of ``sample_every``: a twentieth of the run, or more, so that sampling takes at most 2 % of the time.

    Args:
        net: the network.
        images: the number of images of the run.
    """
    # In training images: a training step costs three network calls.
    cost = _shown(net.sample_shape or ()) * len(sampler_of(net)) // 3
    return max(1, images // 20, 50 * cost)


def _shown(shape: Sequence[int]) -> int:
    return _VECTORS if len(shape) == 1 else _SAMPLES


def sampler_of(net: ScoreNet) -> Sampler:
    """The recommended sampler; without a recommendation ``ODESampler``, which needs more than a few noise levels."""
    few = len(net.schedule) == 1 or net.preconditioning.discrete
    return ODESampler(net) if net.sampler_settings is None and not few else recommended_sampler(net)


class Examples(NamedTuple):
    """The first samples of the data, for images of samples.

    Attributes:
        x: the samples (n, ...), floating point.
        condition: their labels (n,), int64, or vectors (n, K), a dict of both, or None.
    """

    x: Tensor
    condition: Tensor | Parts | None


def read_examples(data: Data) -> Examples:
    """Reads the first 16 samples of the data, or 512 vectors, or all if there are fewer."""
    x, condition = data.read(torch.arange(min(_shown(data.shape), len(data)), device="cpu"))
    return Examples(to_float(x), condition)


def save_samples(net: ScoreNet, path: Path, examples: Examples, settings: Settings) -> None:
    """Draws samples from fixed seeds and writes them to one image file; other data than pictures are plotted.

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
        ImportError: without Matplotlib, for other data than pictures.
    """
    x, device = examples.x, next(net.parameters()).device
    given = given_of(net, examples.condition, settings)
    seed = seed_of(settings.seed, "examples")
    condition = loss_arguments(settings, x.to(device), given, seed).get("condition")
    classes = None if net.conditioning is None else net.conditioning.classes
    if condition is not None and classes is not None:
        turns = torch.arange(len(x), device=device) % classes
        condition = {**condition, "class": turns} if isinstance(condition, dict) else turns
    images = sampler_of(net).sample(
        len(x),
        shape=x.shape[1:],
        condition=condition,
        generator=[seed_of(settings.seed, "sample", i) for i in range(len(x))],
        progress=False,
    )
    if not is_picture(x.shape[1:]) or net.value_range is None:
        save_plot(images, path)
        return
    rows, columns = images.cpu(), None
    degraded = condition.get("image") if isinstance(condition, dict) else condition
    if degraded is not None and degraded.shape == images.shape:
        rows, columns = torch.stack([degraded.cpu(), rows, x], 1).flatten(0, 1), 6
    low, high = net.value_range
    save_grid(((rows - low) / (high - low)).clamp(0, 1), path, columns)


# -- The report -------------------------------------------------------------------------------------------------------


def write_report(
    out: Path, net: ScoreNet, config: Mapping[str, Any], seconds: float, classes: Sequence[str] | None = None
) -> None:
    """Writes report.md and the chart of the loss into the folder of a run.

    Args:
        out: the folder of the run.
        net: the averaged network.
        config: the content of the run's config.json.
        seconds: the duration of the training.
        classes: the names of the classes, or None.
    """
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    lines = [line for line in Log(out / "log.jsonl").lines() if "loss" in line]
    compared = [line for line in (lines[:1] + lines[-1:]) if "D/2" in line]
    curves = [
        Curve("training", *_columns(lines, "images", "loss")),
        Curve("D/2, for D values per image", *_columns(compared, "images", "D/2")),
    ]
    write_whole(folder / "loss.svg", chart("training loss", "images", curves).encode())
    text = _report(out, net, config, lines, seconds, classes)
    write_whole(out / "report.md", text.encode(errors="backslashreplace"))  # of folder names in another encoding


def expectation(images: int, seconds: float, shape: Sequence[int], start: object) -> str | None:
    """A sentence on what samples of a short run are like.

    None for other data, for a run with enough images, and for one that begins with a trained network.

    Args:
        images: the number of images of the run.
        seconds: the time per image.
        shape: the shape of a sample.
        start: the trained network that the run begins with, or None.
    """
    if start is not None or images >= _MILESTONE or not is_picture(shape) or min(shape[1:]) < _SMALLEST:
        return None
    return (
        f"{images:,} images are few: samples of CIFAR-10 were noise after 80,000 images (Fréchet distance 226, that of "
        f"a Gaussian 234), and had the shapes of objects after {_MILESTONE:,} with the recipe growing (67), which take "
        f"{_MILESTONE * seconds / 3600:.1f} hours at this speed."
    )


def _columns(lines: Sequence[Mapping[str, Any]], *names: str) -> list[list[float]]:
    return [[line[name] for line in lines] for name in names]


def _report(
    out: Path,
    net: ScoreNet,
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    seconds: float,
    classes: Sequence[str] | None,
) -> str:
    settings, data = config["settings"], config["data"]
    last: Mapping[str, Any] = lines[-1] if lines else {"images": 0}
    count = sum(parameter.numel() for parameter in net.parameters())
    names = (path.name for path in (out / "samples").glob("*.png"))
    growth = settings.get("growth", ())
    expected = expectation(last["images"], seconds / max(1, last["images"]), data["shape"], settings.get("start"))
    own = "" if net.family is not None else ", backbone=YourClass()"
    own += ", condition_encoder=YourEncoder()" if net.config.get("condition_encoder") else ""
    picture = max(names, key=lambda name: (len(name), name), default="")  # from 10^9 images on, names are longer
    text = [
        f"# {out.name}",
        "",
        f"- Network: {count:,} parameters, preconditioning {net.precondition!r}, {net.schedule}",
        f"- Data: {data['images']:,} samples of shape {tuple(data['shape'])}, fingerprint {data['fingerprint']}",
        *([f"- {describe_classes(classes)}"] if classes is not None else []),
        f"- Training: {last['images']:,} images in {seconds / 3600:.2f} h",
        *(f"- Growth at image {stage['begins']:,}: {json.dumps(stage['network'])}" for stage in growth),
        *([] if expected is None else [f"- {expected}"]),
        f"- Last training loss: {last['loss']:.4g} (D/2 = {math.prod(data['shape']) / 2:g})" if lines else "",
        "- Versions: " + ", ".join(f"{name} {value}" for name, value in config["versions"].items()),
        "",
        "```python",
        "from scorematch import ScoreNet",
        f'net = ScoreNet.from_pretrained("{(out / "network").as_posix()}"{own})',
        "```",
        "",
        "![training loss](report/loss.svg)",
        *([f"![samples](samples/{picture})"] if picture else []),
        "",
        table(
            ["sigma", "last training loss"],
            [[sigma, f"{loss:.4g}"] for sigma, loss in last.get("loss_by_level", {}).items()],
        ),
        "`scorematch diagnose` measures the network at each noise level.",
        "",
        table(["setting", "value"], [[name, json.dumps(value)] for name, value in settings.items()]),
    ]
    return "\n".join(text)
