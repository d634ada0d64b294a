"""Sampling of many images with any number of processes, into files or batch by batch.

Image i has its own random generator, whose seed depends only on the seed of the job and on i. The network processes
images in fixed batches: with a batch size of B, batch b has the images from b B to (b + 1) B - 1. Process k of m draws
the batches k, k + m, k + 2 m, ... An image is therefore the same in every job with the same seed, whatever the number
of images and processes, and whether the job was interrupted. With the same batch size and number of threads it is
bitwise the same; with another batch size the results of the network are rounded differently.

A folder of samples contains

=====================  ================================================================================================
samples.json           the settings, which an interrupted job needs to continue; the versions; the command
images/000123.png      one file per image, or
images/000128.npz      one file per batch, named by its first image: ``arr_0``, uint8 (B, H, W, C), and with classes
                       ``arr_1``, int64 (B,), as in the sample files of guided-diffusion (Dhariwal & Nichol, 2021)
labels.csv             the class of each PNG file, for class-conditional networks
=====================  ================================================================================================

``images`` has no other files and no subfolders, so that evaluation programs can read it. Files are written atomically:
each is written under a temporary name and then renamed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import itertools
import json
import os
import re
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm

from scorematch import __version__
from scorematch.files import UNFINISHED, write_whole
from scorematch.guidance import GuidedScore
from scorematch.images import check_picture, read_image, save_image, to_uint8
from scorematch.nets.family import as_condition
from scorematch.nets.inference import InferenceScore
from scorematch.noise import NoiseSchedule
from scorematch.protocol import attribute
from scorematch.randomness import seed_of
from scorematch.sampling import Sampler
from scorematch.schema import Field, check, quote

Rule = Literal["random", "cycle"]
Classes: TypeAlias = int | Rule | None
Format = Literal["png", "npz"]
Share: TypeAlias = tuple[int, int]

_METADATA_FILE, _LABELS_FILE, _IMAGES = "samples.json", "labels.csv", "images"
_METADATA: Mapping[str, Field] = {
    "format_version": Field(int, required=True, choices=(1,)),
    "n": Field(int, required=True, low=1),
    "settings": Field(dict, required=True),
    "versions": Field(dict, required=True),
    "about": Field(dict, required=True),
}
_SETTINGS: Mapping[str, Field] = {
    "batch_size": Field(int, required=True, low=1),
    "format": Field(str, required=True, choices=get_args(Format)),
    "shape": Field(list, required=True, low=3, high=3, each=Field(int, low=1)),
}
SEEDS = 2**32  # A torch.Generator on a CPU uses the lowest 32 bits of its seed only.
_LOOK_SECONDS = 0.2  # between two checks of the files of other processes


class Batch(NamedTuple):
    """One batch of samples.

    Attributes:
        indices: the numbers of the images.
        images: the images (len(indices), ...), float32, on the device of the network.
        classes: their classes, int64 (len(indices),), on the CPU; None without classes.
    """

    indices: range
    images: Tensor
    classes: Tensor | None


# -- What users call --------------------------------------------------------------------------------------------------


def bulk_samples(
    sampler: Sampler,
    n: int,
    *,
    first: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    condition: Classes = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
    share: Share | None = None,
) -> Iterator[Batch]:
    """Draws many samples batch by batch; each image depends only on the seed and on its number.

    Only one batch is in memory at a time. Under ``torchrun`` or ``accelerate launch`` each process draws its own share
    of the batches, and no process waits for another.

    Args:
        sampler: the sampler; its network is prepared for inference once.
        n: the number of images, over all processes together.
        first: the number of the first image. The images are ``first`` to ``first + n - 1``.
        seed: the seed of all images.
        batch_size: the number of images that go through the network at once. Batches begin at its multiples.
        condition: for class-conditional networks: an int, the class of all images; "random", uniform random classes;
            "cycle", the classes in turn. The class of an image depends only on the seed and on its number.
        classes: the number of classes for "random" and "cycle"; None is that of the network, without its null class.
        shape: the shape of one sample, for a score without ``sample_shape``.
        share: (k, m), the share k of m equal shares; None is the share of this process, see ``this_process``.

    Yields:
        ``Batch(indices, images, classes)``, with ascending numbers.

    Raises:
        TypeError, ValueError: if arguments do not fit together.
        RuntimeError: if an image has NaN or infinite values.

    Example:
        >>> from scorematch import ScoreNet
        >>> from scorematch.sampling import ODESampler
        >>> sampler = ODESampler(ScoreNet.from_pretrained("mnist"), levels=3)
        >>> [(batch.indices, tuple(batch.images.shape)) for batch in bulk_samples(sampler, 5, batch_size=4)]
        [(range(0, 4), (4, 1, 28, 28)), (range(4, 5), (1, 1, 28, 28))]
    """
    job = _Job(sampler, seed, batch_size, condition, classes, shape)
    _check_count("n", n)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"first must be an integer of at least 0, got {first!r}.")
    if first + n > SEEDS:
        raise ValueError(f"first + n must be at most 2^32, got {first + n}.")
    k, m = _checked_share(share)
    begin, end = first // batch_size, -(-(first + n) // batch_size)
    ranges = (range(max(first, b * batch_size), min(first + n, (b + 1) * batch_size)) for b in range(begin + k, end, m))
    return job.draw(ranges)


def sample_to(
    sampler: Sampler,
    folder: str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    condition: Classes = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
    format: Format = "png",  # noqa: A002  (Pillow's word)
    about: Mapping[str, str] | None = None,
    share: Share | None = None,
    progress: bool = True,
) -> Path:
    """Draws many samples into a folder; a call with the same arguments continues an interrupted one.

    Only missing batches are drawn, and a call with a larger ``n`` adds images. The files are the same as after a single
    uninterrupted call; for that an incomplete last batch is drawn again. Under ``torchrun`` or ``accelerate launch``
    each process draws its own share of the batches into the same folder, which must be on a disk that all processes
    share. At the end each process waits until all images exist.

    Args:
        sampler: the sampler. Its network must draw images (C, H, W) in [0, 1] with 1 or 3 channels.
        folder: the folder to write, new, empty, or with samples of the same settings; see ``scorematch.bulk``.
        n: the number of images, over all processes together.
        seed: the seed of all images.
        batch_size: the number of images that go through the network at once.
        condition: the class of all images, "random" or "cycle", as for ``bulk_samples``.
        classes: the number of classes for "random" and "cycle", as for ``bulk_samples``.
        shape: the shape of one sample, for a score without ``sample_shape``.
        format: "png", one file per image, or "npz", one file per batch.
        about: remarks to store in samples.json, such as the command and the name of the network.
        share: (k, m), the share k of m equal shares, for processes that are started at different times; a call then
            returns as soon as its own share is drawn. None is the share of this process.
        progress: whether the first process shows a progress bar. It counts the images of all processes.

    Returns:
        The folder with the image files, ``folder / "images"``.

    Raises:
        ImportError: if ``format`` is "png" and Pillow is not installed.
        TypeError, ValueError: if arguments do not fit together, or the folder contains other files or samples with
            other settings.
        RuntimeError: if an image has NaN or infinite values.
        OSError: if a file cannot be written. All existing files are complete.
        SystemExit: after SIGTERM, with status 143. All existing files are complete.
    """
    samples = SampleFolder(
        sampler,
        folder,
        n,
        seed=seed,
        batch_size=batch_size,
        condition=condition,
        classes=classes,
        shape=shape,
        format=format,
        about=about,
    )
    return samples.fill(share=share, progress=progress)


def image_classes(indices: Iterable[int], condition: int | Rule, classes: int | None, seed: int) -> Tensor:
    """The classes of images by their numbers, int64 (len(indices),).

    Args:
        indices: the numbers of the images.
        condition: the class of all images, "random" or "cycle", as for ``bulk_samples``.
        classes: the number of classes, for "random" and "cycle".
        seed: the seed of the images.

    Example:
        >>> image_classes(range(8, 12), "cycle", 10, seed=0)
        tensor([8, 9, 0, 1])
    """
    if isinstance(condition, int):
        return torch.tensor([condition for _ in indices], dtype=torch.int64)
    if classes is None:
        raise ValueError(f"condition={condition!r} needs the number of classes: pass classes=.")
    if condition == "cycle":
        return torch.tensor([i % classes for i in indices], dtype=torch.int64)
    return torch.tensor([seed_of(seed, "class", i) % classes for i in indices], dtype=torch.int64)


def settings_of(
    sampler: Sampler,
    *,
    seed: int = 0,
    batch_size: int = 64,
    condition: Classes = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns everything that determines the images of ``bulk_samples``, as plain values for JSON.

    The network is represented by a hash. Arguments and errors are those of ``bulk_samples``.
    """
    return _Job(sampler, seed, batch_size, condition, classes, shape).settings()


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """Returns a hash of the network ("network") and the options of a sampler ("sampler"), as values for JSON."""
    # Attributes that begin with an underscore are derived from the others.
    options = {key: value for key, value in vars(sampler).items() if key[0] != "_" and key != "net"}
    described = {"name": type(sampler).__name__, **{key: _plain(value) for key, value in options.items()}}
    return {"network": identity(sampler.net), "sampler": described}


def prepared(sampler: Sampler) -> Sampler:
    """A copy of a sampler whose network is prepared for inference once, for many calls of ``sample``."""
    made = copy.copy(sampler)
    if made.precision == "auto" and hasattr(type(made.net), "inference_copy"):
        made.net = made.net.inference_copy(compile=made.compile)  # type: ignore[attr-defined]
    return made


def this_process() -> Share:
    """The number of this process and the number of all processes, (0, 1) for a single one.

    They are those of ``torch.distributed`` if it is initialized, else those in the environment variables RANK and
    WORLD_SIZE, which ``torchrun`` and ``accelerate launch`` set.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def read_samples(folder: str | os.PathLike[str], n: int) -> Tensor:
    """Reads the first n images of a folder that ``sample_to`` wrote.

    Args:
        folder: the folder, with samples.json.
        n: the number of images.

    Returns:
        The images (n, C, H, W), float32 in [0, 1].

    Raises:
        OSError: if there is no samples.json, or an image is missing.
        ValueError: if samples.json is not valid.
    """
    return torch.cat([batch.images for batch in stored_samples(folder, n, share=(0, 1))])


def stored_samples(
    folder: str | os.PathLike[str], n: int | None = None, *, share: Share | None = None
) -> Iterator[Batch]:
    """Reads the images of a folder that ``sample_to`` wrote, batch by batch, as ``bulk_samples`` yields them.

    Args:
        folder: the folder, with samples.json.
        n: the number of images; None is all of them.
        share: (k, m), the share k of m equal shares; None is the share of this process, see ``this_process``.

    Yields:
        ``Batch(indices, images, None)``, with the images float32 in [0, 1] on the CPU.

    Raises:
        OSError: if there is no samples.json, or an image is missing.
        ValueError: if samples.json is not valid, or the folder has fewer than n images.
    """
    stored = stored_settings(folder)
    n = stored["n"] if n is None else n
    if n > stored["n"]:
        raise ValueError(f"{folder} has {stored['n']} samples, fewer than n={n}.")
    settings, (k, m) = stored["settings"], _checked_share(share)
    files, size = _FORMATS[settings["format"]](Path(folder, _IMAGES)), settings["batch_size"]
    ranges = (range(i, min(i + size, n)) for i in range(k * size, n, m * size))
    return (Batch(indices, files.read(indices, settings["shape"][0]), None) for indices in ranges)


def stored_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads samples.json of a folder that ``sample_to`` wrote: the keys "n", "settings", "versions" and "about".

    Raises:
        OSError: if there is no samples.json.
        ValueError: if it is not valid.
    """
    stored = _read_metadata(Path(folder))
    if stored is None:
        raise FileNotFoundError(f"{folder} has no {_METADATA_FILE}. Pass a folder that sample_to wrote.")
    return stored


# -- What is drawn ----------------------------------------------------------------------------------------------------


class _Job:
    """The checked arguments that determine image i, for every i."""

    def __init__(
        self,
        sampler: Sampler,
        seed: int,
        batch_size: int,
        condition: Classes,
        classes: int | None,
        shape: Sequence[int] | None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, got {type(sampler).__name__}. Write ODESampler(net).")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}.")
        _check_count("batch_size", batch_size)
        shape = attribute(sampler.net, "sample_shape") if shape is None else shape
        if shape is None:
            raise ValueError("the shape of a sample is not known: pass shape=, that of one sample without the batch.")
        self.sampler, self.seed, self.batch_size, self.condition = sampler, seed, batch_size, condition
        self.shape = tuple(shape)
        self.number_of_classes = self._check_classes(classes)

    def _check_classes(self, classes: int | None) -> int | None:
        """Checks the condition, and returns the number of classes for "random" and "cycle", otherwise None."""
        condition = self.condition
        takes = attribute(self.sampler.net, "conditioning")
        if condition is not None and (
            isinstance(condition, bool) or (not isinstance(condition, int) and condition not in get_args(Rule))
        ):
            raise TypeError(f'condition must be a class, "random", "cycle" or None, got {condition!r}.')
        largest: int | None = None
        if isinstance(condition, str):
            if classes is None and takes is not None:
                classes = takes.classes
            if classes is None:
                raise ValueError(f"condition={condition!r} needs the number of classes: pass classes=.")
            _check_count("classes", classes)
            largest = classes - 1
        else:
            if classes is not None:
                raise ValueError('classes= is for condition="random" and condition="cycle". Leave it out.')
            largest = condition
        as_condition(largest, torch.empty(1, *self.shape, device="meta"), takes)
        return classes

    def draw(self, ranges: Iterable[range]) -> Iterator[Batch]:
        """Yields the batch of each range of images. Each range is requested just before its batch is drawn."""
        sampler = prepared(self.sampler)
        first = seed_of(self.seed, "image")
        for indices in ranges:
            classes = self.classes_of(indices)
            images = sampler.sample(
                len(indices),
                shape=self.shape,
                condition=classes,
                # Consecutive seeds differ in the lowest 32 bits for all images. Of 50,000 independent seeds, two would
                # agree in these bits with a probability of 1/4, and two images would be equal.
                generator=[(first + i) % SEEDS for i in indices],
                batch_size=len(indices),
                progress=False,
            )
            yield Batch(indices, images, classes)

    def classes_of(self, indices: Iterable[int]) -> Tensor | None:
        """The classes of images, or None."""
        if self.condition is None:
            return None
        return image_classes(indices, self.condition, self.number_of_classes, self.seed)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the images, as plain values for JSON."""
        return {
            **sampler_settings(self.sampler),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "condition": self.condition,
            "classes": self.number_of_classes,
            "shape": list(self.shape),
            "scorematch": __version__,
        }


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def _checked_share(share: Share | None) -> Share:
    if share is None:
        return this_process()
    k, m = share
    if not 0 <= k < m:
        raise ValueError(f"share must be (k, m) with 0 <= k < m, got {share!r}.")
    return k, m


# -- The folder -------------------------------------------------------------------------------------------------------


class SampleFolder:
    """A folder of samples, possibly incomplete, for ``sample_to``.

    Arguments and errors are those of ``sample_to``. They are checked at once; nothing is written before ``fill``.

    Attributes:
        missing: the number of images that ``fill`` has to draw, over all processes together.
    """

    def __init__(
        self,
        sampler: Sampler,
        folder: str | os.PathLike[str],
        n: int,
        *,
        seed: int = 0,
        batch_size: int = 64,
        condition: Classes = None,
        classes: int | None = None,
        shape: Sequence[int] | None = None,
        format: Format = "png",  # noqa: A002  (Pillow's word)
        about: Mapping[str, str] | None = None,
    ) -> None:
        _check_count("n", n)
        if n > SEEDS:
            raise ValueError(f"n must be at most 2^32, got {n}.")
        if format not in _FORMATS:
            raise ValueError(f'format must be "png" or "npz", got {format!r}.')
        self._job = _Job(sampler, seed, batch_size, condition, classes, shape)
        value_range = attribute(sampler.net, "value_range")
        if len(self._job.shape) != 3 or self._job.shape[0] not in (1, 3):
            raise ValueError(
                f"the samples must be images (C, H, W) with 1 or 3 channels, but their shape is {self._job.shape}. Use "
                "bulk_samples."
            )
        if value_range is not None and tuple(value_range) != (0, 1):
            raise ValueError(
                f"the samples must be images in [0, 1], but the network's value_range is {value_range}. Use "
                "bulk_samples."
            )
        self._folder, self._n, self._format = Path(folder), n, format
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file. Pass a folder.")
        self._files = _FORMATS[format](self._folder / _IMAGES)
        self._files.check()
        self._about = dict(about or {})
        self._stored = self._check_folder()
        self.missing = sum(len(indices) for indices in self._ranges(0, 1) if not self._files.exist(indices))

    def fill(self, *, share: Share | None = None, progress: bool = True) -> Path:
        """Draws the missing images; arguments, result and errors as for ``sample_to``."""
        k, m = _checked_share(share)
        self._begin(main=k == 0)
        count = _Count(self._ranges, self._files.exist, m)
        with (
            _exit_after_sigterm(),
            tqdm(total=self._n, initial=count.new(), desc="sampling", unit="img", disable=not progress or k > 0) as bar,
        ):
            missing = (indices for indices in self._ranges(k, m) if not self._files.exist(indices))
            for batch in self._job.draw(missing):
                self._write(batch)
                bar.update(count.new())
            while share is None and not count.complete:
                time.sleep(_LOOK_SECONDS)
                bar.update(count.new())
        if count.complete:
            for remains in (self._folder / _IMAGES).glob(f"{UNFINISHED}*"):  # of interrupted calls
                remains.unlink(missing_ok=True)
        return self._folder / _IMAGES

    def _ranges(self, k: int, m: int) -> Iterator[range]:
        """The images of the batches k, k + m, k + 2 m, ..."""
        size = self._job.batch_size
        return (range(i, min(i + size, self._n)) for i in range(k * size, self._n, m * size))

    def _write(self, batch: Batch) -> None:
        try:
            self._files.write(batch)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the images from {batch.indices.start} on could not be written to {self._folder} "
                f"({error.strerror or error}); the files that are there are complete. Free some space and run the same "
                "command again",
            ) from error

    # -- samples.json -------------------------------------------------------------------------------------------------

    def _metadata(self) -> dict[str, Any]:
        device = self._job.sampler._device(None, None)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        content = {
            "format_version": 1,
            "n": self._n,
            "settings": {**self._job.settings(), "format": self._format},
            "versions": {"torch": torch.__version__, "device": name},
            "about": self._about,
        }
        return json.loads(json.dumps(content))  # lists instead of tuples, as it is read

    def _check_folder(self) -> dict[str, Any] | None:
        """Returns the metadata of the existing samples, or None if there are no samples yet.

        Raises:
            ValueError: if the folder has other files, samples with other settings, or more than n samples.
        """
        folder = self._folder
        # Other processes may be writing to the folder. They write samples.json first, so it is read last.
        found = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
        begun = _IMAGES in found and any(path.name[0] != "." for path in (folder / _IMAGES).iterdir())
        stored = _read_metadata(folder)
        if stored is None:
            if found:
                raise ValueError(f"{folder} has other files, such as {min(found)}. Pass a new or an empty folder.")
            return None
        if not begun:
            return None
        now = self._metadata()
        before, after = _flat(stored["settings"]), _flat(now["settings"])
        differing = [
            f"{key} was {quote(before.get(key))} and is {quote(after.get(key))}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
        if differing:
            raise ValueError(
                f"{folder} has samples with other settings: {'; '.join(differing)}. Pass those settings to continue, "
                "or another folder."
            )
        if stored["n"] > self._n:
            raise ValueError(
                f"{folder} has {stored['n']} samples, more than n={self._n}. Pass n={stored['n']} or more, or another "
                "folder."
            )
        return stored

    def _begin(self, *, main: bool) -> None:
        """Writes all files except the images. All processes write the same samples.json, and none waits."""
        now, before = self._metadata(), self._stored
        if main and before is not None:
            changed = [
                f"{key} was {before['versions'].get(key)} and is {value}"
                for key, value in now["versions"].items()
                if before["versions"].get(key) != value
            ]
            if changed:
                warnings.warn(
                    f"{self._folder} continues with another version or device, which changes rounding: "
                    f"{'; '.join(changed)}.",
                    stacklevel=4,
                )
        if before is None or before["n"] < self._n:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _METADATA_FILE, (json.dumps(now, indent=2) + "\n").encode())
        (self._folder / _IMAGES).mkdir(exist_ok=True)
        if main and self._format == "png" and self._job.condition is not None:
            text = io.StringIO()
            text.write("file,class\n")
            for indices in self._ranges(0, 1):
                classes = self._job.classes_of(indices)
                assert classes is not None  # noqa: S101  (for the type checker)
                for i, one in zip(indices, classes.tolist(), strict=True):
                    text.write(f"{_name(i)}.png,{one}\n")
            write_whole(self._folder / _LABELS_FILE, text.getvalue().encode())


def _read_metadata(folder: Path) -> dict[str, Any] | None:
    """The checked content of samples.json, or None if there is no such file."""
    path = folder / _METADATA_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Pass another folder.") from error
    check(content, _METADATA, str(path))
    check(content["settings"], _SETTINGS, f"{path}: settings")
    return content


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens settings; the key of an option of the sampler is ``sampler.option``."""
    flat = {key: value for key, value in settings.items() if key != "sampler"}
    sampler = settings.get("sampler")
    if isinstance(sampler, Mapping):
        return {**flat, **{f"sampler.{key}": value for key, value in sampler.items()}}
    return {**flat, "sampler": sampler}


class _Count:
    """Counts the existing images of all processes.

    Each process draws its batches in ascending order. It is therefore enough to check, for each process, the first
    batch that was missing at the last check.
    """

    def __init__(
        self, ranges: Callable[[int, int], Iterator[range]], exist: Callable[[range], bool], processes: int
    ) -> None:
        self._exist = exist
        self._remaining = [ranges(k, processes) for k in range(processes)]
        self._due = [next(ranges, None) for ranges in self._remaining]

    @property
    def complete(self) -> bool:
        return not any(self._due)

    def new(self) -> int:
        """The number of images that were found since the last call."""
        found = 0
        for k, ranges in enumerate(self._remaining):
            while (due := self._due[k]) is not None and self._exist(due):
                found += len(due)
                self._due[k] = next(ranges, None)
        return found


@contextmanager
def _exit_after_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the program by an exception, as Ctrl-C does, so that no unfinished file remains."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # Only the main thread can set a handler, and a handler that the user has set is kept.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -- File formats -----------------------------------------------------------------------------------------------------


def _name(i: int) -> str:
    """The number of an image as a file name. It does not depend on n, so that images can be added."""
    return f"{i:06d}"


class _Files(Protocol):
    def __init__(self, folder: Path) -> None: ...

    def check(self) -> None:
        """Raises the errors that ``write`` would raise for this folder, before anything is computed."""

    def exist(self, indices: range) -> bool:
        """Whether all images of a batch exist."""

    def write(self, batch: Batch) -> None:
        """Writes a batch. ``exist`` returns True only after the whole batch is written."""

    def read(self, indices: range, channels: int) -> Tensor:
        """Reads the images of a batch, or the first of them: (len(indices), C, H, W), float32 in [0, 1]."""


class _Pictures:
    """One PNG file per image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, i: int) -> Path:
        return self._folder / f"{_name(i)}.png"

    def check(self) -> None:
        check_picture(self._path(0))

    def exist(self, indices: range) -> bool:
        return all(_is_filled(self._path(i)) for i in reversed(indices))  # the last one is written last

    def write(self, batch: Batch) -> None:
        for i, image in zip(batch.indices, batch.images.cpu(), strict=True):
            save_image(image, self._path(i))

    def read(self, indices: range, channels: int) -> Tensor:
        return torch.stack([read_image(self._path(i), channels) for i in indices])


class _Arrays:
    """One .npz file per batch, with the names of arrays of guided-diffusion."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, first: int) -> Path:
        return self._folder / f"{_name(first)}.npz"

    def check(self) -> None:
        pass

    def exist(self, indices: range) -> bool:
        path = self._path(indices.start)
        if not _is_filled(path):
            return False
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged later
            return False
        return shape[0] == len(indices)  # fewer images if n has grown since

    def write(self, batch: Batch) -> None:
        pixels = rearrange(to_uint8(batch.images).cpu(), "n c h w -> n h w c").numpy()
        content = io.BytesIO()
        np.savez(content, *([pixels] if batch.classes is None else [pixels, batch.classes.numpy()]))
        write_whole(self._path(batch.indices.start), content.getvalue())

    def read(self, indices: range, channels: int) -> Tensor:
        with np.load(self._path(indices.start)) as arrays:
            pixels = torch.from_numpy(arrays["arr_0"])
        return rearrange(pixels[: len(indices)], "n h w c -> n c h w").float() / 255


_FORMATS: Mapping[str, type[_Files]] = {"png": _Pictures, "npz": _Arrays}


def _is_filled(path: Path) -> bool:
    """Whether a file exists and is not empty. A file that was renamed just before a power failure may be empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


# -- What a network is ------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """An option of a sampler as a plain value for JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return list(value) if isinstance(value, NoiseSchedule) else identity(value)


def identity(value: Any) -> str:
    """The type of a score and a hash of its configuration and weights; for a plain function, a hash of its name."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    kind = value if isinstance(value, type | FunctionType) else type(value)
    return f"{kind.__qualname__} {digest.hexdigest()}"


def _parts(value: Any) -> Iterator[Any]:
    """The bytes of everything in a value that changes what it computes; see ``identity``."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        return
    yield f"{type(value).__module__}.{type(value).__qualname__}(".encode()
    if value is None or isinstance(value, bool | int | float | str):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(_parts(entry) for entry in sorted(value.items()))
    elif isinstance(value, list | tuple | NoiseSchedule):
        yield from itertools.chain.from_iterable(_parts(entry) for entry in value)
    elif isinstance(value, functools.partial):
        yield from _parts([value.func, value.args, value.keywords])
    elif isinstance(value, GuidedScore):
        yield from _parts([value.net, value.other, value.weight, value.interval])
    elif isinstance(value, InferenceScore):
        yield from _parts([value._preconditioning, value._backbone])
    elif isinstance(value, nn.Module):
        config = dict(getattr(value, "config", {}))
        config.pop("sampler_settings", None)  # they do not change the score
        yield from _parts([config, dict(value.state_dict())])
    elif hasattr(value, "__dict__"):
        yield from _parts({key: entry for key, entry in vars(value).items() if key[0] != "_"})
    else:
        yield re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()
    yield b")"
