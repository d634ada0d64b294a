r"""``evaluate``: measures a network or a set of images, with a floor and a ceiling, and writes the figures to files.

A distance alone says little. It is therefore measured for up to three sets of images with the same number n:

- the samples;
- held-out images of the data, which are not in the reference: the floor that a perfect network would reach;
- images from the Gaussian with the mean and the covariance of the reference: a ceiling, which any network should beat.

The folder of an evaluation contains

==================  ===================================================================================================
evaluation.json     all settings and a hash of them, the versions, and all figures with their errors
evaluation.md       the figures as tables
samples.png         the first samples
samples/            for a network, all samples, as ``sample_to`` writes them
==================  ===================================================================================================

Samples are kept, so that the same call continues an interrupted one, and a call with other metrics or features draws
nothing again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_count, check_integer
from scorematch.core.charts import table
from scorematch.core.conditions import Parts
from scorematch.core.files import check_outside, check_own, delete_unfinished, write_whole
from scorematch.core.processes import local_device, process_group, this_process
from scorematch.core.provenance import versions
from scorematch.core.records import as_stored, hash_of, hash_of_bytes
from scorematch.data.array_data import ArrayData, open_arrays
from scorematch.data.pictures import Crop, check_picture, save_grid
from scorematch.evaluation.arrays import (
    CHARTS,
    VALUES,
    ArrayEvaluator,
    gathered_values,
    reference_arrays,
    save_charts,
    some_values_of,
)
from scorematch.evaluation.estimate import IMAGES, Estimate, Figures, as_dicts
from scorematch.evaluation.evaluator import Evaluator, OneOrMore, image_figures
from scorematch.evaluation.metrics import METRICS
from scorematch.evaluation.per_image import choose
from scorematch.evaluation.reference import are_same, check_sources, gaussian_images, open_for, read_batches, shown
from scorematch.evaluation.subject import SamplerChoice, Subject, is_network, samples_in, subject_of
from scorematch.sampling.bulk import Classes

SAMPLES, HELD_OUT, FLOOR, GAUSSIAN, REFERENCE = "samples", "held-out", "floor", "gaussian", "reference"
_COLUMNS = {SAMPLES: "samples", HELD_OUT: "held-out images", GAUSSIAN: "Gaussian", REFERENCE: "reference"}
_OF_ARRAYS = {HELD_OUT: "held-out data", FLOOR: "floor: data of the reference"}
_LABELS = {  # of the figures that are not in METRICS
    "std": "standard deviation",
    "psnr": "PSNR in dB ↑",
    "rmse": "rmse ↓",
    "consistency": "consistency ↓",
    "perceptual": "perceptual distance ↓",
    "accuracy": "accuracy ↑",
}
_ON_THE_PICTURE = 64


# -- The result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        name: what was evaluated, for the title.
        settings: everything that determines the figures, as plain values for JSON.
        versions: the versions of the packages and the device, which change the rounding.
        sizes: the number of images in each set: "samples", "held-out", "gaussian" and "reference"; for other data also
            "floor".
        figures: ``figures[set][source][name]``, where the source is the name of an extractor, or "images" for figures
            of the pixels themselves, of which the reference has only these. Other data have the source "values".
        left_out: the names of the figures that were not measured, each with the reason.
        sampler: the sampler and its number of network calls in words; None for images that were drawn before.
        skipped: the names of the images that cannot be read and are left out.
    """

    name: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    sizes: Mapping[str, int]
    figures: Mapping[str, Figures]
    left_out: Mapping[str, str]
    sampler: str | None = None
    skipped: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """A hash of the settings, 16 hexadecimal digits."""
        return hash_of(self.settings, size=8)

    def to_json(self) -> str:
        """The content of evaluation.json."""
        content = {
            "format_version": 1,
            "name": self.name,
            "settings": self.settings,
            "hash": self.hash,
            "sampler": self.sampler,
            "versions": self.versions,
            "sizes": self.sizes,
            "figures": {column: as_dicts(figures) for column, figures in self.figures.items()},
            "errors": _errors(self.figures),
            "left_out": self.left_out,
            "skipped": self.skipped,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """A table in Markdown: one column for each set, one row for each figure, grouped by their source."""
        sets = list(self.figures.values())
        arrays = VALUES in sets[0]
        columns = _COLUMNS | (_OF_ARRAYS if arrays else {})
        number = "number of samples" if arrays else "number of images"
        rows = [[number, *(f"{self.sizes[column]:,}" for column in self.figures)]]
        for source in dict.fromkeys(source for found in sets for source in found):
            rows.append([f"**{source}**", *("" for _ in sets)])
            for name in dict.fromkeys(name for found in sets for name in found.get(source, {})):
                cells = (found.get(source, {}).get(name, "") for found in sets)
                rows.append([_label(name), *map(str, cells)])
        return table(["", *(columns.get(column, column) for column in self.figures)], rows)

    def to_markdown(self) -> str:
        """The content of evaluation.md."""
        lines = [f"# Evaluation of {self.name}", "", self.table()]
        lines += ["The number after ± is the error of the figure:", ""]
        lines += [f"- {_label(name).rstrip(' ↑↓')}: {error}" for name, error in _errors(self.figures).items()]
        if self.left_out:
            lines += ["", "Not measured:", ""]
            lines += [f"- {name}: {reason}" for name, reason in self.left_out.items()]
        if self.skipped:
            lines += ["", "Images that cannot be read and are left out:", ""]
            lines += [f"- {name}" for name in self.skipped]
        lines += ["", f"All settings are in evaluation.json; their hash is {self.hash}.", ""]
        lines += [] if self.sampler is None else [f"- {self.sampler}"]
        lines += [f"- {each['name']}: {each['preprocessing']}" for each in self.settings["features"]]
        lines += ["- " + ", ".join(f"{name} {version}" for name, version in self.versions.items()), ""]
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes evaluation.json and evaluation.md, each atomically. Missing folders are created.

        Raises:
            OSError: if a file cannot be written.
        """
        for name, text in {"evaluation.json": self.to_json(), "evaluation.md": self.to_markdown()}.items():
            write_whole(
                Path(folder, name).expanduser(), text.encode(errors="backslashreplace")
            )  # of names in another encoding


def check_evaluation_folder(folder: Path) -> None:
    """Checks that the files that an evaluation writes replace only those of an earlier one; see ``check_own``."""
    check_own(folder, "evaluation.json", ("evaluation.md", "samples.png", "restored.png", *CHARTS))


def checked_folder(out: str | os.PathLike[str] | None, picture: str, *sources: Any) -> Path | None:
    """The folder to write to, after checking that it is not in the data, and that it and its picture can be written."""
    if out is None:
        return None
    folder = Path(out).expanduser()
    check_outside(folder, *sources)
    check_evaluation_folder(folder)
    check_picture(folder / picture)
    return folder


def _label(name: str) -> str:
    """The label of a figure in tables."""
    return {**_LABELS, **{key: label for metric in METRICS.values() for key, label in metric.figures.items()}}.get(
        name, name
    )


def _errors(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Returns a description of the error of each figure that has one."""
    known = {name: metric.error for metric in METRICS.values() for name in metric.figures}
    measured = [item for found in figures.values() for each in found.values() for item in each.items()]
    with_error = dict.fromkeys(name for name, figure in measured if figure.error is not None)
    others = {"others": "standard error over the images"} if any(IMAGES in found for found in figures.values()) else {}
    return {name: known[name] for name in with_error if known.get(name)} | others


# -- What users call --------------------------------------------------------------------------------------------------


def evaluate(
    what: Any,
    reference: Any,
    *,
    n: int | None = None,
    features: OneOrMore = "inception",
    metrics: Sequence[str] | None = None,
    sampler: SamplerChoice = None,
    seed: int = 0,
    batch_size: int = 64,
    held_out: Any = None,
    gaussian: bool = True,
    out: str | os.PathLike[str] | None = None,
    classes: Classes = None,
    n_classes: int | None = None,
    condition: Tensor | Parts | None = None,
    crop: Crop = "center",
    name: str | None = None,
    cache: bool | str | os.PathLike[str] = True,
    device: torch.device | str | None = None,
    strict: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Measures the quality of a network's samples, or of any set of images or other data, against real ones.

    Floating-point data that are not pictures (vectors, signals, fields, volumes, in any units) are measured without
    features, by the metrics for such data, with a floor from the reference itself; see
    ``scorematch.evaluation.arrays``.

    Under ``torchrun`` or ``accelerate launch`` every process must call it; each draws and measures a share of the
    images, and all return the same result.

    Args:
        what: a network or any other score; the name or the folder of a network, as for ``ScoreNet.from_pretrained``; a
            ``Sampler``; or images: a folder, an ``.npz`` file, arrays, or a folder that ``sample_to`` wrote.
        reference: the real images, all of which are used: a folder, an ``.npz`` file, arrays, a data set or its name on
            the Hub, one of the short names in ``scorematch.data.REFERENCES``, or statistics (an object or a file); or
            other data, as for ``scorematch.data.open_arrays``. For samples of a network the real images are cropped
            and resized as in training; images to evaluate must have the size of the reference, and are not cropped.
        n: the number of samples, at least 2; None is 5,000 samples of a network, or all images. Published figures use
            50,000. If a set of images has more than n, a random subset is measured, and of a folder that
            ``sample_to`` wrote the first n images.
        features: the extractor, or several of them: names from ``EXTRACTORS``, ``Extractor`` objects, or functions of
            images (N, C, H, W), uint8, as for ``as_extractor``. "values" says that the data are not pictures, which is
            only needed for values of the shape of pictures in [-1, 1].
        metrics: a name from ``METRICS``, or several; None is everything that can be measured, except "classes".
        sampler: ``SamplerSettings``, or a function of the network that returns a ``Sampler``; None is the sampler that
            is recommended for the network.
        seed: the seed of the samples and of random subsets.
        batch_size: the number of images that go through a network at once.
        held_out: real images that are not in the reference, of the same kinds, cropped and resized to the samples; None
            leaves out this column.
        gaussian: whether to measure images from the Gaussian of the reference. It takes about 2 n N D operations for N
            images of D values.
        out: the folder to write to; None writes nothing, and keeps no samples. Samples in it are used again if they are
            those of the same score; an object with private state should define ``definition()``, as for ``sample_to``.

        Rarely needed:

        classes: for class-conditional networks: a class, "random" or "cycle", as for ``bulk_samples``.
        n_classes: the number of classes for "random" and "cycle".
        condition: for networks that take a vector or an image, as for ``bulk_samples``; None takes those of the
            reference, in random order, and again if there are fewer than ``n``.
        crop: how real images are cropped before they are resized, as for ``open_images``. "center" does not crop the
            reference of a set of images that are not square.
        name: the name of the images for the title; None derives it from ``what``.
        cache: the folder for the statistics of the reference; as for ``statistics_of``.
        device: the device of extractors that are given by name, and of networks that are loaded; None is that of the
            network, or the CPU. "cuda" is another device for each process of a launcher; see ``local_device``.
        strict: whether a damaged image is an error; otherwise it is left out, and its name is in ``skipped``.
        progress: whether to show progress bars.

    Returns:
        The figures, settings and versions. Its methods ``to_markdown`` and ``save`` write them.

    Raises:
        ImportError, OSError, TypeError, ValueError: if an input does not exist, is damaged or does not fit the others,
            one of ``metrics`` cannot be measured, or a file in ``out`` that is not of an evaluation would be replaced.
        RuntimeError: if a sample has NaN or infinite values.

    Example:
        >>> noise = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = evaluate(noise[:20], noise[20:], features="pixels", metrics=[], cache=False, progress=False)
        >>> {name: str(found["images"]["mean"]) for name, found in result.figures.items()}
        {'samples': '0.4953 ± 0.0089', 'gaussian': '0.4830 ± 0.0077', 'reference': '0.4937 ± 0.0058'}
    """
    n, seed = None if n is None else check_integer("n", n), check_integer("seed", seed)
    batch_size = check_count("batch_size", batch_size)
    if held_out is not None and are_same(held_out, reference):
        raise ValueError(f"{argument('held_out')} is the reference. Pass real images that are not in it.")
    check_sources(reference, held_out)
    arrays = None
    if isinstance(features, str) and features in ("inception", VALUES):
        arrays = reference_arrays(reference, what, named=features == VALUES)
    written = is_network(what) or samples_in(what) is not None
    folder = checked_folder(out, "samples.png", reference, held_out, None if written else what)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "classes": classes, "n_classes": n_classes}
    options["condition"] = condition
    if arrays is not None:
        subject = subject_of(what, name, n, sampler, options, None, device, strict, progress, arrays=arrays)
        return _evaluate_arrays(subject, arrays, metrics, held_out, gaussian, seed, folder, progress)
    subject = subject_of(what, name, n, sampler, options, folder, device, strict, progress)
    device = local_device(subject.device if device is None else device)
    # Without a size in pixels, "center" would crop to a square.
    whole = crop == "center" and not subject.is_network and subject.shape[1] != subject.shape[2]
    with process_group(device):
        evaluator = Evaluator(
            reference,
            features=features,
            metrics=metrics,
            shape=subject.shape if subject.is_network else None,
            crop=None if whole else crop,
            cache=cache,
            device=device,
            strict=strict,
            progress=progress,
        )
        data, left_out = evaluator.data, evaluator.check(subject.n, subject.shape)
        sets = {SAMPLES: (subject.n, subject.batches)}
        settings = {"images": subject.settings, **evaluator.settings(), "held_out": None, "gaussian": False}
        skipped = [*subject.skipped, *(() if data is None else data.skipped)]
        if held_out is not None:
            opening: dict[str, Any] = {"crop": crop, "strict": strict, "progress": progress}
            others = open_for(held_out, subject.shape, "held-out images", **opening)
            skipped += others.skipped
            chosen = choose(len(others), min(subject.n, len(others)), seed).sort().values
            sets[HELD_OUT] = len(chosen), lambda: read_batches(others, chosen, batch_size)
            settings["held_out"] = {"n": len(chosen), "content": others.content, "seed": seed}
        if gaussian and data is not None:
            sets[GAUSSIAN] = subject.n, partial(gaussian_images, data, subject.n, seed=seed, batch_size=batch_size)
            settings["gaussian"] = {"seed": seed}
        elif gaussian:
            left_out[_COLUMNS[GAUSSIAN]] = "needs the images of the reference, not only their statistics"
        figures = {
            column: evaluator.measure(shown(batches(), size, _COLUMNS[column], progress), strict=column == SAMPLES)
            for column, (size, batches) in sets.items()
        }
        sizes = {column: size for column, (size, _) in sets.items()}
        if data is not None:
            every, sizes[REFERENCE] = torch.arange(len(data), device="cpu"), len(data)
            figures[REFERENCE] = {IMAGES: image_figures(read_batches(data, every, batch_size))}
        result = Evaluation(
            name=subject.name,
            settings=as_stored(settings),
            versions=versions(device),
            sizes=sizes,
            figures=figures,
            left_out=left_out,
            sampler=subject.sampler,
            skipped=tuple(skipped),
        )
        if folder is not None and this_process().rank == 0:
            result.save(folder)
            save_grid(subject.first(min(subject.n, _ON_THE_PICTURE)), folder / "samples.png")
            delete_unfinished(folder)
    return result


def _evaluate_arrays(
    subject: Subject,
    data: ArrayData,
    metrics: Sequence[str] | None,
    held_out: Any,
    gaussian: bool,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> Evaluation:
    """The evaluation of data that are not pictures."""
    evaluator = ArrayEvaluator(data, [metrics] if isinstance(metrics, str) else metrics)
    left_out = evaluator.check(subject.n, subject.shape)
    others = None if held_out is None else some_values_of(open_arrays(held_out), subject.n, seed)
    known = None if others is None else (len(others), evaluator.measure(others))  # before samples are drawn
    with process_group(subject.device):
        samples = gathered_values(shown(subject.batches(), subject.n, "samples", progress))
    settings: dict[str, Any] = {"samples": subject.settings, **evaluator.settings(), "seed": seed}
    columns: dict[str, Callable[[], tuple[int, dict[str, Estimate]]]] = {
        SAMPLES: lambda: (len(samples), evaluator.measure(samples))
    }
    if others is not None and known is not None:
        settings["held_out"] = {"n": len(others), "content": hash_of_bytes(others.numpy().data)}
        columns[HELD_OUT] = lambda: known
    columns[FLOOR] = lambda: evaluator.floor(len(samples), seed)
    if gaussian:
        columns[GAUSSIAN] = lambda: (len(samples), evaluator.gaussian(len(samples), seed))
    hidden = not progress or this_process().rank > 0
    found = {column: of() for column, of in tqdm(columns.items(), "metrics", leave=False, unit="set", disable=hidden)}
    result = Evaluation(
        name=subject.name,
        settings=as_stored(settings),
        versions=versions(subject.device),
        sizes={column: size for column, (size, _) in found.items()},
        figures={column: {VALUES: figures} for column, (_, figures) in found.items()},
        left_out=left_out,
        sampler=subject.sampler,
    )
    if folder is not None and this_process().rank == 0:
        result.save(folder)
        save_charts(samples, data.read(range(len(data)))[0], folder)
    return result
