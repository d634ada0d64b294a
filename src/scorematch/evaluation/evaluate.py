r"""``evaluate``: measures a network or a set of images, with a floor and a ceiling, and writes the figures to files.

A distance alone says little. It is therefore measured for up to three sets of images with the same number n:

- the samples;
- held-out images of the data, which are not in the reference: the floor that a perfect network would reach;
- images from the Gaussian with the mean and the covariance of the reference: a ceiling, which any network should beat.

Samples of the Gaussian need no covariance matrix. For images :math:`x_1, \dots, x_N` with the mean :math:`\bar x` and
independent standard normal numbers :math:`w_j`,

.. math:: \bar x + \frac{1}{\sqrt{N - 1}} \sum_{j=1}^N w_j\, (x_j - \bar x)

has exactly their mean and covariance. Values are clamped to [0, 1].

The folder of an evaluation contains

==================  ===================================================================================================
evaluation.json     all settings and a hash of them, the versions, and all figures with their errors
evaluation.md       the figures as tables
samples.png         the first samples
samples/            for a network, all samples, as ``scorematch.bulk`` writes them
==================  ===================================================================================================

Samples are kept, so that the same call continues an interrupted one, and a call with other metrics or features draws
nothing again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count, check_integer
from scorematch.core.charts import table
from scorematch.core.conditions import takes_image
from scorematch.core.files import check_outside, check_own, delete_unfinished, write_whole
from scorematch.core.processes import process_group, this_process
from scorematch.core.provenance import versions
from scorematch.core.randomness import seed_of, standard_normal
from scorematch.core.scores import device_of
from scorematch.data.find import check_path
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import ENDINGS, Crop, check_picture, is_picture, save_grid, to_float, to_uint8
from scorematch.data.samples import read_samples, stored_samples, stored_settings
from scorematch.evaluation.figures import IMAGES, MEASURES, Evaluator, Figures, OneOrMore, as_dicts, image_figures
from scorematch.evaluation.per_image import choose
from scorematch.pretrained import cards
from scorematch.pretrained.configuration import CONFIG_FILE
from scorematch.pretrained.diffusers import INDEX_FILE
from scorematch.sampling import Sampler, SamplerSettings, recommended_sampler
from scorematch.sampling.bulk import SEEDS, Classes, Job
from scorematch.sampling.folder import SampleFolder
from scorematch.score import ScoreNet

SamplerChoice: TypeAlias = "SamplerSettings | Callable[[Any], Sampler] | None"

SAMPLES, HELD_OUT, GAUSSIAN, REFERENCE = "samples", "held-out", "gaussian", "reference"
_COLUMNS = {SAMPLES: "samples", HELD_OUT: "held-out images", GAUSSIAN: "Gaussian", REFERENCE: "reference"}
_LABELS = {
    "frechet": "Fréchet distance ↓",
    "frechet-infinity": "Fréchet distance, extrapolated to n = ∞ ↓",
    "kernel": "kernel distance ↓",
    "inception-score": "Inception Score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "confident": "share over 0.9 confident",
    "rarest": "share of the rarest class",
    "std": "standard deviation",
    "psnr": "PSNR in dB ↑",
    "rmse": "rmse ↓",
    "consistency": "consistency ↓",
    "perceptual": "perceptual distance ↓",
    "accuracy": "accuracy ↑",
}
DEFAULT_N = 5000  # samples, if the number is not given
_ON_THE_PICTURE = 64
_BLOCK = 4096  # images of the reference that are read at a time for the Gaussian
_VALUES = 2**27  # values of Gaussian images that are made in one pass over the reference


# -- The result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        name: what was evaluated, for the title.
        settings: everything that determines the figures, as plain values for JSON.
        versions: the versions of the packages and the device, which change the rounding.
        sizes: the number of images in each set: "samples", "held-out", "gaussian" and "reference".
        figures: ``figures[set][source][name]``, where the source is the name of an extractor, or "images" for figures
            of the pixels themselves. The reference has the source "images" only.
        left_out: the names of the figures that were not measured, each with the reason.
        sampler: the sampler and its number of network calls in words; None for images that were drawn before.
    """

    name: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    sizes: Mapping[str, int]
    figures: Mapping[str, Figures]
    left_out: Mapping[str, str]
    sampler: str | None = None

    @property
    def hash(self) -> str:
        """A hash of the settings, 16 hexadecimal digits."""
        return hash_of(self.settings)

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
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """A table in Markdown: one column for each set, one row for each figure, grouped by their source."""
        rows = [["number of images", *(f"{self.sizes[column]:,}" for column in self.figures)]]
        sets = list(self.figures.values())
        for source in dict.fromkeys(source for found in sets for source in found):
            rows.append([f"**{source}**", *("" for _ in sets)])
            for name in dict.fromkeys(name for found in sets for name in found.get(source, {})):
                cells = (found.get(source, {}).get(name, "") for found in sets)
                rows.append([_LABELS.get(name, name), *map(str, cells)])
        return table(["", *(_COLUMNS.get(column, column) for column in self.figures)], rows)

    def to_markdown(self) -> str:
        """The content of evaluation.md."""
        lines = [f"# Evaluation of {self.name}", "", self.table()]
        lines += ["The number after ± is the error of the figure:", ""]
        lines += [
            f"- {_LABELS.get(name, name).rstrip(' ↑↓')}: {error}" for name, error in _errors(self.figures).items()
        ]
        if self.left_out:
            lines += ["", "Not measured:", ""]
            lines += [f"- {name}: {reason}" for name, reason in self.left_out.items()]
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
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"evaluation.json": self.to_json(), "evaluation.md": self.to_markdown()}.items():
            write_whole(folder / name, text.encode(errors="backslashreplace"))  # of names in another encoding


def hash_of(settings: Mapping[str, Any]) -> str:
    """A hash of settings, 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_results(folder: Path) -> None:
    """Checks that the files that an evaluation writes replace only those of an earlier one; see ``check_own``."""
    check_own(folder, "evaluation.json", ("evaluation.md", "samples.png", "restored.png"))


def _errors(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Returns a description of the error of each figure."""
    known = {
        name: error for measure in MEASURES.values() for name, error in measure.errors.items() if error is not None
    }
    present = dict.fromkeys(name for found in figures.values() for each in found.values() for name in each)
    return {name: known[name] for name in present if name in known} | {"others": "standard error over the images"}


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
    condition: Classes = None,
    classes: int | None = None,
    crop: Crop = "center",
    name: str | None = None,
    cache: bool | str | os.PathLike[str] = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures the quality of a network's samples, or of any set of images, against real images.

    Under ``torchrun`` or ``accelerate launch`` every process must call it; each draws and measures a share of the
    images, and all return the same result.

    Args:
        what: a network or any other score; the name or the folder of a network, as for ``ScoreNet.from_pretrained``; a
            ``Sampler``; or images: a folder, an ``.npz`` file, arrays, or a folder that ``sample_to`` wrote.
        reference: the real images, all of which are used: a folder, an ``.npz`` file, arrays, a data set or its name on
            the Hub, one of the short names in ``scorematch.data.REFERENCES``, or statistics (an object or a file). For
            samples of a network they are cropped and resized as in training; images must have the size of the
            reference, and are not cropped.
        n: the number of samples, at least 2; None is 5,000 samples of a network, or all images. Published figures use
            50,000. If a set of images has more than n, a random subset is measured; of a folder that ``sample_to``
            wrote, the first n images are.
        features: the extractor, or several of them: names from ``EXTRACTORS``, ``Extractor`` objects, or functions of
            images (N, C, H, W), uint8, as for ``as_extractor``.
        metrics: a name from ``MEASURES``, or several; None is everything that can be measured, except "classes".
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

        condition: for class-conditional networks: a class, "random" or "cycle", as for ``bulk_samples``.
        classes: the number of classes for "random" and "cycle".
        crop: how real images are cropped before they are resized, as for ``open_images``. "center" does not crop the
            reference of a set of images that are not square.
        name: the name of the images for the title; None derives it from ``what``.
        cache: the folder for the statistics of the reference; True is ``cache_folder()``, False uses no cache.
        device: the device of extractors that are given by name, and of networks that are loaded; None is that of the
            network, or the CPU.
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
    if held_out is not None and _are_same(held_out, reference):
        raise ValueError("held_out is the reference. Pass real images that are not in it.")
    check_sources(reference, held_out)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        written = is_network(what) or (isinstance(what, str | os.PathLike) and _samples_in(Path(what)) is not None)
        check_outside(folder, reference, held_out, None if written else what)
        check_results(folder)
        check_picture(folder / "samples.png")  # fails early
    options = {"seed": seed, "batch_size": batch_size, "condition": condition, "classes": classes}
    subject = _subject(what, n, sampler, options, folder, device, progress)
    device = subject.device if device is None else device
    # Without a size in pixels, "center" would crop to a square.
    whole = crop == "center" and not subject.is_network and subject.shape[1] != subject.shape[2]
    with process_group(device):
        evaluator = Evaluator(
            reference,
            features=features,
            metrics=metrics,
            image_size=subject.shape[1:] if subject.is_network else None,
            channels=subject.shape[0] if subject.is_network else None,
            crop=None if whole else crop,
            cache=cache,
            device=device,
            progress=progress,
        )
        data, left_out = evaluator.data, evaluator.check(subject.n, subject.shape)
        sets = {SAMPLES: (subject.n, subject.batches)}
        settings = {"images": subject.settings, **evaluator.settings(), "held_out": None, "gaussian": False}
        if held_out is not None:
            others = open_for(held_out, subject.shape, crop, progress)
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
            every, sizes[REFERENCE] = torch.arange(len(data)), len(data)
            figures[REFERENCE] = {IMAGES: image_figures(read_batches(data, every, batch_size))}
        result = Evaluation(
            name=subject.name if name is None else name,
            settings=json.loads(json.dumps(settings)),  # lists instead of tuples
            versions=versions(device),
            sizes=sizes,
            figures=figures,
            left_out=left_out,
            sampler=subject.sampler,
        )
        if folder is not None and this_process()[0] == 0:
            result.save(folder)
            save_grid(subject.first(min(subject.n, _ON_THE_PICTURE)), folder / "samples.png")
            delete_unfinished(folder)
    return result


# -- The images to evaluate -------------------------------------------------------------------------------------------


class _Subject(NamedTuple):
    """The images to evaluate.

    Attributes:
        name: their name.
        n: their number.
        shape: the shape of one, (C, H, W).
        is_network: whether they are samples of a network; the reference is then resized to their shape.
        batches: yields the batches of this process.
        first: returns the first n images (n, C, H, W), float32 in [0, 1]; called after all have been drawn.
        settings: everything that determines the images, as plain values for JSON.
        device: the device of the network.
        sampler: the sampler in words, or None.
    """

    name: str
    n: int
    shape: tuple[int, int, int]
    is_network: bool
    batches: Callable[[], Iterator[Tensor]]
    first: Callable[[int], Tensor]
    settings: dict[str, Any]
    device: torch.device
    sampler: str | None = None


def _subject(
    what: Any,
    n: int | None,
    sampler: SamplerChoice,
    options: dict[str, Any],
    out: Path | None,
    device: torch.device | str | None,
    progress: bool,
) -> _Subject:
    name = str(what) if isinstance(what, str | os.PathLike) else type(what).__name__
    if is_network(what):
        drawn = sampler_for(what, sampler, device)
        return _of_sampler(name, drawn, DEFAULT_N if n is None else n, options, out, progress)
    if sampler is not None or options["condition"] is not None or options["classes"] is not None:
        raise ValueError(
            "sampler, condition and classes apply to networks, but the argument `what` is a set of images. Leave them "
            "out."
        )
    if isinstance(what, str | os.PathLike) and (stored := _samples_in(Path(what))) is not None:
        return _of_samples(name, Path(what), stored, n)
    return _of_images(name, open_images(what, crop=None, strict=True, progress=progress), n, options)


def is_network(what: Any) -> bool:
    """Whether ``what`` is a network, the name or the folder of one, a score or a sampler, and not a set of images."""
    if isinstance(what, str | os.PathLike):
        path = Path(what).expanduser()
        if isinstance(what, str) and cards.find(what) is not None:
            return True
        if path.is_dir():
            return any((path / name).is_file() for name in (CONFIG_FILE, INDEX_FILE, f"unet/{CONFIG_FILE}"))
        return path.suffix.lower() not in (".npz", *ENDINGS)
    return isinstance(what, Sampler) or callable(what)


def sampler_for(what: Any, sampler: SamplerChoice, device: torch.device | str | None = None) -> Sampler:
    """Returns the sampler of a network (or of its name or folder) or a score; a ``Sampler`` is returned unchanged.

    Args:
        what: a network as for ``evaluate``.
        sampler: the choice of the sampler as for ``evaluate``.
        device: the device of a network that is loaded; None is the CPU.

    Raises:
        TypeError, ValueError: if ``sampler`` does not return a Sampler, or is given although ``what`` is a Sampler.
        OSError: if there is no such network.
    """
    if isinstance(what, Sampler):
        if sampler is not None:
            raise ValueError("`what` is a sampler, so sampler= must be None: leave it out.")
        return what
    net = what
    if isinstance(what, str | os.PathLike):
        net = ScoreNet.from_pretrained(what).to("cpu" if device is None else device)
    if sampler is None or isinstance(sampler, SamplerSettings):
        return recommended_sampler(net, sampler)
    made = sampler(net)
    if not isinstance(made, Sampler):
        raise TypeError(f"sampler must return a Sampler, got {type(made).__name__}. Write sampler=ODESampler.")
    return made


def _of_sampler(
    name: str, sampler: Sampler, n: int, options: dict[str, Any], out: Path | None, progress: bool
) -> _Subject:
    if takes_image(sampler.net):
        raise ValueError(f"{name} restores images: it takes an image as its condition. Use evaluate_restoration.")
    job = Job(sampler, **options)
    shape = _checked_shape(job.shape, name)
    if out is None:

        def batches() -> Iterator[Tensor]:
            return (batch.images for batch in job.samples(n))

        def first(few: int) -> Tensor:
            return torch.cat([batch.images for batch in job.samples(few, share=(0, 1))])

    else:
        samples = out / "samples"
        folder = SampleFolder(job, samples, n, format="npz", about={"network": name})

        def batches() -> Iterator[Tensor]:
            folder.fill(progress=progress)
            return (batch.images for batch in stored_samples(samples, n))

        def first(few: int) -> Tensor:
            return read_samples(samples, few)

    settings = {"n": n, **job.settings()}
    return _Subject(name, n, shape, True, batches, first, settings, device_of(sampler.net), str(sampler))


def _samples_in(path: Path) -> dict[str, Any] | None:
    """The content of samples.json, or None if there is no such file."""
    try:
        return stored_settings(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _of_samples(name: str, folder: Path, stored: dict[str, Any], n: int | None) -> _Subject:
    n = stored["n"] if n is None else n
    return _Subject(
        name,
        n,
        _checked_shape(stored["settings"]["shape"], name),
        True,
        lambda: (batch.images for batch in stored_samples(folder, n)),
        lambda few: read_samples(folder, few),
        {"n": n, **stored["settings"]},
        torch.device("cpu"),
    )


def _of_images(name: str, data: ImageData, n: int | None, options: dict[str, Any]) -> _Subject:
    n, seed = len(data) if n is None else n, options["seed"]
    chosen = choose(len(data), n, seed).sort().values  # all images in their order
    settings = {"n": n, "shape": list(data.shape), "content": data.content, "seed": seed if n < len(data) else None}
    return _Subject(
        name,
        n,
        _checked_shape(data.shape, name),
        False,
        lambda: read_batches(data, chosen, options["batch_size"]),
        lambda few: to_float(to_uint8(data.read(chosen[:few])[0])),
        settings,
        torch.device("cpu"),
    )


def _checked_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    if not is_picture(shape):
        raise ValueError(
            f"the images to evaluate must be (C, H, W) with 1 or 3 channels, but {name} has {tuple(shape)}."
        )
    return shape[0], shape[1], shape[2]


def shown(batches: Iterable[Tensor], n: int, title: str, progress: bool) -> Iterator[Tensor]:
    """The batches of this process, with a progress bar for the n images of all processes."""
    k, m = this_process()
    with tqdm(total=n, desc=title, unit="img", leave=False, disable=not progress or k > 0) as bar:
        for images in batches:
            yield images
            bar.update(min(m * len(images), n - bar.n))  # assumes that the other processes are as fast


# -- Real images and the Gaussian -------------------------------------------------------------------------------------


def _are_same(one: Any, other: Any) -> bool:
    """Whether two sources are the same object, or the same path or name."""
    paths = isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike)
    return one is other or (paths and Path(one).expanduser().resolve() == Path(other).expanduser().resolve())


def check_sources(*sources: Any) -> None:
    """Checks that paths exist or may be names of data sets on the Hub, before slower work; other sources are skipped.

    Raises:
        FileNotFoundError: if a path does not exist.
        ImportError: if a source may be the name of a data set, and the package datasets is not installed.
    """
    for source in sources:
        if isinstance(source, str | os.PathLike):
            check_path(source)


def open_for(source: Any, shape: Sequence[int], crop: Crop = "center", progress: bool = True) -> ImageData:
    """Opens images as ``open_images`` does, cropped and resized to a shape (C, H, W); a damaged image is an error."""
    size = (shape[1], shape[2])
    data = open_images(source, image_size=size, channels=shape[0], crop=crop, strict=True, progress=progress)
    if tuple(data.shape) != tuple(shape):  # of an ImageData, which is returned unchanged
        raise ValueError(f"the held-out images must have the shape {tuple(shape)}, got {tuple(data.shape)}.")
    return data


def read_batches(data: ImageData, chosen: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields the share of this process of the chosen images, in batches."""
    k, m = this_process()
    return (data.read(rows)[0] for rows in chosen.split(batch_size)[k::m])


def gaussian_images(data: ImageData, n: int, *, seed: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
    """Draws images from the Gaussian with the mean and the covariance of a data set, in batches.

    Image i depends on the seed and on i only, with the same bits for the same batch size. Under ``torch.distributed``
    each process draws its own share.

    Args:
        data: the data set, of at least two images.
        n: the number of images, over all processes together, at least 1.
        seed: the seed of all images.
        batch_size: the number of images per batch, at least 1.

    Yields:
        Images (batch_size, C, H, W), float32 in [0, 1], on the CPU.

    Raises:
        TypeError, ValueError: if n or ``batch_size`` is not an integer of at least 1.
    """
    n, batch_size = check_count("n", n), check_count("batch_size", batch_size)
    k, m = this_process()
    own = torch.arange(n).split(batch_size)[k::m]
    mean = torch.zeros(data.shape, dtype=torch.float64)
    for block in _blocks(data):
        mean += block.double().sum(0) / len(data)
    flat = mean.float().flatten()
    batches_at_once = max(1, _VALUES // (batch_size * flat.numel()))
    first = seed_of(seed, "gaussian")
    for start in range(0, len(own), batches_at_once):
        group = own[start : start + batches_at_once]
        generators = [[torch.Generator().manual_seed((first + i) % SEEDS) for i in rows.tolist()] for rows in group]
        images = [flat.new_zeros(len(rows), flat.numel()) for rows in group]
        for block in _blocks(data):
            centered = block.flatten(1) - flat
            for batch, drawing in zip(images, generators, strict=True):
                batch.addmm_(standard_normal((len(drawing), len(centered)), drawing, flat.device), centered)
        for batch in images:
            yield (flat + batch / (len(data) - 1) ** 0.5).clamp(0, 1).view(-1, *data.shape)


def _blocks(data: ImageData) -> Iterator[Tensor]:
    """All images in blocks, rounded to 8 bits, float32 in [0, 1]."""
    for start in range(0, len(data), _BLOCK):
        yield to_float(to_uint8(data.read(range(start, min(start + _BLOCK, len(data))))[0]))
