"""The images to evaluate: samples of a network, stored samples, or other images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorematch.core.conditions import Parts, named_parts, takes_image
from scorematch.core.processes import local_device
from scorematch.core.scores import attribute, device_of
from scorematch.data.array_data import FILES, ArrayData, open_arrays
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import ENDINGS, is_picture, to_float, to_uint8
from scorematch.data.samples import read_samples, stored_samples, stored_settings
from scorematch.evaluation.per_image import choose
from scorematch.evaluation.reference import read_batches
from scorematch.pretrained import cards
from scorematch.pretrained.configuration import CONFIG_FILE
from scorematch.pretrained.diffusers import INDEX_FILE
from scorematch.sampling import Sampler, SamplerSettings, recommended_sampler
from scorematch.sampling.bulk import Classes, Job
from scorematch.sampling.folder import SampleFolder
from scorematch.score import ScoreNet

SamplerChoice: TypeAlias = "SamplerSettings | Callable[[Any], Sampler] | None"
DEFAULT_N = 5000  # samples, if the number is not given


class Subject(NamedTuple):
    """The images to evaluate.

    Attributes:
        name: their name.
        n: their number.
        shape: the shape of one, (C, H, W) for pictures.
        is_network: whether they are samples of a network; the reference is then resized to their shape.
        batches: yields the batches of this process.
        first: returns the first n images (n, C, H, W), float32 in [0, 1], for the picture in a folder; called after
            all have been drawn.
        settings: everything that determines the images, as plain values for JSON.
        device: the device of the network.
        sampler: the sampler in words, or None.
        skipped: the names of images that are left out.
    """

    name: str
    n: int
    shape: tuple[int, ...]
    is_network: bool
    batches: Callable[[], Iterator[Tensor]]
    first: Callable[[int], Tensor]
    settings: dict[str, Any]
    device: torch.device = torch.device("cpu")
    sampler: str | None = None
    skipped: tuple[str, ...] = ()


def subject_of(
    what: Any,
    name: str | None,
    n: int | None,
    sampler: SamplerChoice,
    options: dict[str, Any],
    out: Path | None,
    device: torch.device | str | None,
    strict: bool,
    progress: bool,
    *,
    arrays: ArrayData | None = None,
) -> Subject:
    """The images of a network, its name or folder, a sampler, a folder of samples, or images of any other kind.

    With a reference ``arrays`` they are data of any shape and range, and a network draws with its conditions if none
    are given.
    """
    pictures = arrays is None
    name = name_of(what) if name is None else name
    if is_network(what):
        drawn = sampler_for(what, sampler, device)
        return _of_sampler(name, drawn, DEFAULT_N if n is None else n, options, out, progress, arrays)
    if sampler is not None or any(options[each] is not None for each in ("classes", "n_classes", "condition")):
        raise ValueError(
            "sampler, classes, n_classes and condition apply to networks, but the argument `what` is a set of images. "
            "Leave them out."
        )
    stored = samples_in(what)
    if stored is not None:
        return _of_samples(name, Path(what), stored, n, pictures)
    data = open_images(what, crop=None, strict=strict, progress=progress) if pictures else open_arrays(what)
    return _of_images(name, data, n, options, pictures)


def name_of(what: Any) -> str:
    """The name of a network or of images for titles: the path, or the type."""
    return str(what) if isinstance(what, str | os.PathLike) else type(what).__name__


def is_network(what: Any) -> bool:
    """Whether ``what`` is a network, the name or the folder of one, a score or a sampler, and not a set of images."""
    if isinstance(what, str | os.PathLike):
        path = Path(what).expanduser()
        if isinstance(what, str) and cards.find(what) is not None:
            return True
        if path.is_dir():
            return any(
                (path / name).is_file()
                for name in (CONFIG_FILE, INDEX_FILE, f"unet/{CONFIG_FILE}", f"network/{CONFIG_FILE}")
            )
        return path.suffix.lower() not in (*FILES, *ENDINGS)
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
        net = ScoreNet.from_pretrained(what).to(local_device("cpu" if device is None else device))
    if sampler is None or isinstance(sampler, SamplerSettings):
        return recommended_sampler(net, sampler)
    made = sampler(net)
    if not isinstance(made, Sampler):
        raise TypeError(f"sampler must return a Sampler, got {type(made).__name__}. Write sampler=ODESampler.")
    return made


def _of_sampler(
    name: str,
    sampler: Sampler,
    n: int,
    options: dict[str, Any],
    out: Path | None,
    progress: bool,
    arrays: ArrayData | None,
) -> Subject:
    if arrays is not None and options["condition"] is None:
        options = {**options, "condition": conditions_of(arrays, sampler.net, n, options["seed"], options["classes"])}
    if takes_image(sampler.net) and options["condition"] is None:
        how = "Use evaluate_restoration." if arrays is None else "Pass a reference with images, or condition=."
        raise ValueError(f"{name} restores images: it takes an image as its condition. {how}")
    job = Job(sampler, **options)
    shape = _checked_shape(job.shape, name) if arrays is None else job.shape
    settings = {"n": n, **job.settings()}
    samples = Path() if out is None else out / "samples"
    folder = None if out is None else SampleFolder(job, samples, n, format="npz", about={"network": name})

    def batches() -> Iterator[Tensor]:
        if folder is None:
            return (batch.images for batch in job.samples(n))
        folder.fill(progress=progress)
        return _stored_batches(samples, n)

    first = lambda few: read_samples(samples, few)  # noqa: E731
    return Subject(name, n, shape, True, batches, first, settings, device_of(sampler.net), str(sampler))


def conditions_of(data: ArrayData, net: Any, n: int, seed: int, classes: Classes = None) -> Tensor | Parts | None:
    """The conditions of n random data for a network that takes vectors or images; None if there are none.

    With ``classes`` they are without the classes of the data.
    """
    takes = attribute(net, "conditioning")
    if takes is None or not (takes.vector or takes.channels):
        return None
    order = choose(len(data), min(n, len(data)), seed)
    parts = named_parts(data.read(order[torch.arange(n, device="cpu") % len(order)])[1], takes)
    kept = set(takes.parts()) - ({"class"} if classes is not None else set())
    found = {name: part for name, part in parts.items() if name in kept}
    return found or None if len(takes.parts()) > 1 else next(iter(found.values()), None)


def _stored_batches(folder: Path, n: int) -> Iterator[Tensor]:
    return (batch.images for batch in stored_samples(folder, n))


def samples_in(what: Any) -> dict[str, Any] | None:
    """The content of samples.json in a folder, or None if there is no such file."""
    try:
        return stored_settings(Path(what)) if isinstance(what, str | os.PathLike) else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def _of_samples(name: str, folder: Path, stored: dict[str, Any], n: int | None, pictures: bool) -> Subject:
    n, shape = stored["n"] if n is None else n, tuple(stored["settings"]["shape"])
    return Subject(
        name,
        n,
        _checked_shape(shape, name) if pictures else shape,
        True,
        lambda: _stored_batches(folder, n),
        lambda few: read_samples(folder, few),
        {"n": n, **stored["settings"]},
    )


def _of_images(
    name: str, data: ImageData | ArrayData, n: int | None, options: dict[str, Any], pictures: bool
) -> Subject:
    n, seed = len(data) if n is None else n, options["seed"]
    chosen = choose(len(data), n, seed).sort().values  # all images in their order
    content = data.content if isinstance(data, ImageData) else data.fingerprint
    drawn = seed if n < len(data) else None
    settings = {"n": n, "shape": list(data.shape), "content": content, "seed": drawn}
    return Subject(
        name,
        n,
        _checked_shape(data.shape, name) if pictures else data.shape,
        False,
        lambda: read_batches(data, chosen, options["batch_size"]),
        lambda few: to_float(to_uint8(data.read(chosen[:few])[0])),
        settings,
        skipped=data.skipped if isinstance(data, ImageData) else (),
    )


def _checked_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    if not is_picture(shape):
        raise ValueError(
            f"the images to evaluate must be (C, H, W) with 1 or 3 channels, but {name} has {tuple(shape)}."
        )
    return shape[0], shape[1], shape[2]
