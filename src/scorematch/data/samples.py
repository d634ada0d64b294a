"""Folders of samples, as ``sample_to`` writes them.

A folder of samples contains

=====================  ================================================================================================
samples.json           the settings, which an interrupted job needs to continue; the versions; the command
images/000123.png      one file per image, or
images/000128.npz      one file per batch, named by its first image: ``arr_0``, uint8 (B, H, W, C), and with classes
                       ``arr_1``, int64 (B,), as in the sample files of guided-diffusion (Dhariwal & Nichol, 2021)
or images/000128.npz   in the format "float": ``x``, float32 (B, ...), and ``condition`` and ``axes``, if there are any
labels.csv             the class of each PNG file, for class-conditional networks
=====================  ================================================================================================

``images`` has no other files and no subfolders, so that evaluation programs can read it. Files are written atomically:
each is written under a temporary name and then renamed.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.conditions import Parts
from scorematch.core.processes import Process, checked_process
from scorematch.core.records import read_record
from scorematch.core.schema import Field, check
from scorematch.data.arrays import read_arrays, read_shape, write_arrays
from scorematch.data.pictures import check_picture, read_image, save_image, to_uint8

__all__ = ["Batch", "read_samples", "stored_samples", "stored_settings"]


class Batch(NamedTuple):
    """One batch of samples.

    Attributes:
        indices: the numbers of the images.
        images: the images (len(indices), ...), float32, on the device of the network.
        classes: their classes, int64 (len(indices),), or their other conditions (len(indices), ...), or a dict of both,
            on the CPU; None without a condition.
    """

    indices: range
    images: Tensor
    classes: Tensor | Parts | None


def ranges(n: int, batch_size: int, process: Process, *, first: int = 0) -> Iterator[range]:
    """The numbers of the images in each batch of a process: rank k of m has the batches k, k + m, k + 2 m, ...

    Args:
        n: the number of images.
        batch_size: the number of images in a batch. Batches begin at its multiples.
        process: the rank and the number of processes.
        first: the number of the first image.
    """
    k, m = process
    begin, end = first // batch_size, -(-(first + n) // batch_size)
    return (range(max(first, b * batch_size), min(first + n, (b + 1) * batch_size)) for b in range(begin + k, end, m))


Format = Literal["png", "npz", "float"]


def stem(i: int) -> str:
    """The number of an image as a file name. It does not depend on n, so that images can be added."""
    return f"{i:06d}"


class Files(ABC):
    """The files of the images in one folder; ``axes`` are the names of the axes of samples that are no pictures."""

    def __init__(self, folder: Path, axes: Sequence[str] | None = None) -> None:
        self._folder, self._axes = folder, axes

    def check(self) -> None:
        """Raises the errors that ``write`` would raise for this folder, before anything is computed."""
        return

    def exist(self, indices: range) -> bool:
        """Whether all images of a batch exist."""
        return self.count(indices) == len(indices)

    @abstractmethod
    def count(self, indices: range) -> int:
        """The number of images of a batch that exist."""

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Writes a batch. ``exist`` returns True only after the whole batch is written."""

    @abstractmethod
    def read(self, indices: range, channels: int) -> Tensor:
        """Reads the images of a batch, or the first of them: (len(indices), C, H, W), float32 in [0, 1]."""


class _Pictures(Files):
    """One PNG file per image."""

    def _path(self, i: int) -> Path:
        return self._folder / f"{stem(i)}.png"

    def check(self) -> None:
        check_picture(self._path(0))

    def exist(self, indices: range) -> bool:
        return all(_is_filled(self._path(i)) for i in reversed(indices))  # the last one is written last

    def count(self, indices: range) -> int:
        return sum(_is_filled(self._path(i)) for i in indices)

    def write(self, batch: Batch) -> None:
        for i, image in zip(batch.indices, batch.images.cpu(), strict=True):
            save_image(image, self._path(i))

    def read(self, indices: range, channels: int) -> Tensor:
        return torch.stack([read_image(self._path(i), channels) for i in indices])


class _Arrays(Files):
    """One .npz file per batch, with the names of arrays of guided-diffusion."""

    array = "arr_0"

    def _path(self, first: int) -> Path:
        return self._folder / f"{stem(first)}.npz"

    def count(self, indices: range) -> int:
        path = self._path(indices.start)
        if not _is_filled(path):
            return 0
        try:
            shape = read_shape(path, self.array)
        except (OSError, ValueError):  # damaged later
            return 0
        return min([*shape[:1], len(indices)])

    def write(self, batch: Batch) -> None:
        pixels = rearrange(to_uint8(batch.images).cpu(), "n c h w -> n h w c").numpy()
        arrays = {"class": batch.classes} if isinstance(batch.classes, Tensor) else dict(batch.classes or {})
        classes = arrays.pop("class", None)
        labels = {} if classes is None else {"arr_1": classes}
        write_arrays(self._path(batch.indices.start), {**arrays, self.array: pixels, **labels})

    def read(self, indices: range, channels: int) -> Tensor:
        path = self._path(indices.start)
        pixels = read_arrays(path, ("arr_0",)).get("arr_0", np.empty(0))
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) < len(indices) or pixels.shape[3] != channels:
            raise ValueError(
                f"{path} must hold an array arr_0 of at least {len(indices)} images (n, H, W, {channels}), uint8, got "
                f"{pixels.dtype} of shape {pixels.shape}."
            )
        return rearrange(torch.from_numpy(pixels[: len(indices)]), "n h w c -> n c h w").float() / 255


class _Values(_Arrays):
    """One .npz file per batch: the samples x, float32, and their conditions."""

    array = "x"

    def write(self, batch: Batch) -> None:
        arrays = values_and_condition(batch.images.cpu(), batch.classes, self._axes)
        write_arrays(self._path(batch.indices.start), arrays)

    def read(self, indices: range, channels: int) -> Tensor:
        path = self._path(indices.start)
        x = read_arrays(path, ("x",)).get("x", np.empty(0))
        if x.dtype != np.float32 or len(x) < len(indices):
            raise ValueError(f"{path} must hold an array x of at least {len(indices)} samples, float32, got {x.dtype}.")
        return torch.from_numpy(x[: len(indices)])


def values_and_condition(
    x: Tensor, condition: Tensor | Parts | None, axes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Samples and their conditions, on the CPU, as the arrays of an .npz file that ``open_arrays`` reads.

    The arrays are x and condition; beside a class condition has the vectors, and label the classes; and axes, the names
    of the axes of x, if they are known.
    """
    parts = {"features": condition} if isinstance(condition, Tensor) else condition or {}
    names = {"features": "condition", "class": "label"}
    arrays = {"x": x, **{names.get(name, name): part for name, part in parts.items()}}
    return arrays if axes is None else {**arrays, "axes": axes}


FORMATS: Mapping[str, type[Files]] = {"png": _Pictures, "npz": _Arrays, "float": _Values}


def _is_filled(path: Path) -> bool:
    """Whether a file exists and is not empty. A file that was renamed just before a power failure may be empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


METADATA_FILE, LABELS_FILE, IMAGES = "samples.json", "labels.csv", "images"
_METADATA: Mapping[str, Field] = {
    "format_version": Field(int, required=True, choices=(1,)),
    "n": Field(int, required=True, low=1, high=2**48),
    "settings": Field(dict, required=True),
    "versions": Field(dict, required=True),
    "about": Field(dict, required=True),
}
_SETTINGS: Mapping[str, Field] = {
    "batch_size": Field(int, required=True, low=1, high=2**31),
    "format": Field(str, required=True, choices=get_args(Format)),
    "shape": Field(list, required=True, high=16, each=Field(int, low=1, high=65_536)),
}


def read_samples(folder: str | os.PathLike[str], n: int) -> Tensor:
    """Reads the first n images of a folder that ``sample_to`` wrote.

    Args:
        folder: the folder, with samples.json.
        n: the number of images, at least 1.

    Returns:
        The images (n, C, H, W), float32 in [0, 1]; or the samples (n, ...) of the format "float" in their own units.

    Raises:
        OSError, TypeError, ValueError: as ``stored_samples``.
    """
    return torch.cat([batch.images for batch in stored_samples(folder, n, process=Process(0, 1))])


def stored_samples(
    folder: str | os.PathLike[str], n: int | None = None, *, process: tuple[int, int] | None = None
) -> Iterator[Batch]:
    """Reads the images of a folder that ``sample_to`` wrote, batch by batch, as ``bulk_samples`` yields them.

    Args:
        folder: the folder, with samples.json.
        n: the number of images, at least 1; None is all of them.
        process: whose batches to read, as (rank, world size); None is this process, see ``this_process``.

    Yields:
        ``Batch(indices, images, None)``, with the images float32 in [0, 1] on the CPU.

    Raises:
        OSError: if there is no samples.json, or an image is missing.
        TypeError: if n is not an integer.
        ValueError: if samples.json is not valid, n is below 1, or the folder has fewer than n images.
    """
    stored = stored_settings(folder)
    n = stored["n"] if n is None else check_count("n", n)
    if n > stored["n"]:
        raise ValueError(f"{folder} has {stored['n']} samples, fewer than n={n}.")
    settings = stored["settings"]
    files, channels = FORMATS[settings["format"]](Path(folder, IMAGES).expanduser()), [*settings["shape"], 0][0]
    batches = list(ranges(n, settings["batch_size"], checked_process(process)))
    if not all(map(files.exist, batches)):
        found = sum(map(files.count, ranges(n, settings["batch_size"], Process(0, 1))))
        raise FileNotFoundError(
            f"{folder} is not complete: {found} of the first {n} images exist. Repeat the command that draws them, or "
            "pass a smaller n."
        )
    return (Batch(indices, files.read(indices, channels), None) for indices in batches)


def stored_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads samples.json of a folder that ``sample_to`` wrote: the keys "n", "settings", "versions" and "about".

    Raises:
        OSError: if there is no samples.json.
        ValueError: if it is not valid.
    """
    stored = read_metadata(Path(folder).expanduser())
    if stored is None:
        raise FileNotFoundError(f"{folder} has no {METADATA_FILE}. Pass a folder that sample_to wrote.")
    return stored


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The checked content of samples.json, or None if there is no such file.

    Raises:
        ValueError: if it is not valid.
    """
    path = folder / METADATA_FILE
    content = read_record(path, _METADATA)
    if content is None:
        return None
    settings = content["settings"]
    check(settings, _SETTINGS, f"{path}: settings")
    if settings["format"] != "float" and len(settings["shape"]) != 3:
        raise ValueError(f"{path}: settings: shape must have 3 entries in files of images, got {settings['shape']}.")
    if settings["format"] == "png" and settings["shape"][0] not in (1, 3):
        raise ValueError(f"{path}: settings: shape must have 1 or 3 channels in png files, got {settings['shape'][0]}.")
    return content
