"""Folders of pictures as sources of data."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from scorematch.core.arguments import argument
from scorematch.core.messages import reason
from scorematch.core.threads import ordered_map
from scorematch.data.memory import class_numbers
from scorematch.data.pictures import (
    ENDINGS,
    UNREAD,
    Crop,
    UnfitError,
    channels_and_size,
    fit_picture,
    is_deep,
    open_picture,
    to_uint8,
    why_none,
)
from scorematch.data.samples import IMAGES, stored_samples, stored_settings
from scorematch.data.sources import Source, Wanted


class Pictures(Source):
    """A source of pictures, which may have any size and mode."""

    crop: Crop

    @abstractmethod
    def open(self, i: int) -> Any:
        """Opens picture i; its pixels may be read later."""

    def pixels(self, i: int) -> np.ndarray:  # noqa: D102
        with self.open(i) as picture:
            return fit_picture(picture, self.shape, self.crop, deep=self.deep)

    def set_shape(self, wanted: Wanted, workers: int) -> None:
        """Sets the crop and the shape; what is not given is taken from the pictures."""
        self.crop = wanted.crop
        channels, size = wanted.channels, wanted.size
        with suppress(Exception), self.open(0) as picture:  # a damaged image is reported when it is decoded
            self.from_color = channels == 1 and channels_and_size(picture)[0] == 3
            self.deep = is_deep(picture)
        if channels is None or size is None:
            kinds, sizes = self._all_channels_and_sizes(workers)
            channels = self._common_channels(kinds) if channels is None else channels
            if size is None:
                size = self._common_size(sizes)
                size = size if wanted.crop is None else (min(size), min(size))
        self.shape = (channels, *size)

    def _all_channels_and_sizes(self, workers: int) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
        """All numbers of channels and all sizes in the source, each with the index of the first picture that has it."""

        def header(i: int) -> tuple[int, tuple[int, int]] | Exception:
            try:
                with self.open(i) as picture:
                    return channels_and_size(picture)
            except (UnfitError, ImportError):
                raise
            except Exception as error:  # a damaged image, which is reported when it is decoded
                return error

        kinds: dict[int, int] = {}
        sizes: dict[tuple[int, int], int] = {}
        for i, seen in enumerate(ordered_map(header, range(len(self)), workers)):
            if not isinstance(seen, Exception):
                kinds.setdefault(seen[0], i)
                sizes.setdefault(seen[1], i)
        if not sizes and isinstance(seen, Exception):
            raise OSError(f"none of the {len(self)} images of {self.name} can be read: {reason(seen)}.") from seen
        return kinds, sizes

    def _common_channels(self, kinds: dict[int, int]) -> int:
        if len(kinds) > 1:
            raise ValueError(
                f"{self.name} mixes gray and color images: {self.name_of(kinds[1])} is gray, and "
                f"{self.name_of(kinds[3])} is in color. Convert the pictures, or write "
                f"{argument('channels', 3, of='open_images')} or {argument('channels', 1, of='open_images')}."
            )
        return next(iter(kinds))

    def _common_size(self, sizes: dict[tuple[int, int], int]) -> tuple[int, int]:
        if len(sizes) > 1:
            (one, i), (other, k) = itertools.islice(sizes.items(), 2)
            raise ValueError(
                f"{self.name} has images of different sizes: {self.name_of(i)} has {one[0]} x {one[1]} pixels, and "
                f"{self.name_of(k)} has {other[0]} x {other[1]}. Resize the pictures, or write "
                f"{argument('image_size', one, of='open_images')}."
            )
        return next(iter(sizes))


class Folder(Pictures):
    """The image files of a folder and its subfolders."""

    def __init__(self, folder: Path, wanted: Wanted, workers: int) -> None:
        files = walk(folder)
        self.name, self.folder = str(folder), folder
        self.paths = [path for path in files if path.suffix.lower() in ENDINGS]
        unread = [path for path in files if path.suffix.lower() in UNREAD]
        self.unread = [str(folder / path) for path in unread]
        if not self.paths:
            raise FileNotFoundError(f"{folder} and its subfolders contain no image files{why_none(unread)}")
        if wanted.labels:
            names = [path.parts[0] for path in self.paths]
            loose = next((path for path in self.paths if len(path.parts) == 1), None)
            if loose is not None:
                raise ValueError(
                    f"{argument('labels', True)} needs all images in subfolders, whose names are the classes, got "
                    f"{folder / loose}. Move it into a subfolder, or leave out {argument('labels', True)}."
                )
            self.labels, self.classes = class_numbers(names, len(names), self.name)
        states = [(folder / path).stat() for path in self.paths]
        self.identity = [[path.as_posix(), state.st_size] for path, state in zip(self.paths, states, strict=True)]
        self._times = [state.st_mtime_ns for state in states]
        self.set_shape(wanted, workers)

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, i: int) -> str:  # noqa: D102
        return str(self.folder / self.paths[i])

    def state(self) -> object:  # noqa: D102
        return self._times

    def open(self, i: int) -> Any:  # noqa: D102
        return open_picture(self.folder / self.paths[i])


def walk(folder: Path) -> list[Path]:
    """The paths of the pictures in a folder and its subfolders, sorted and relative to the folder.

    Symbolic links are followed, but no folder is visited twice.

    Raises:
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise OSError(
            error.errno, f"{error.strerror}; make this folder readable, or move it out of {folder}", error.filename
        ) from error

    found, entered = [], set()
    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = Path(where).stat()
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in files if not name.startswith("."))
        pictures = (path for path in paths if path.suffix.lower() in (*ENDINGS, *UNREAD) and path.is_file())
        found += [path.relative_to(folder) for path in pictures]
    return sorted(found, key=lambda path: path.parts)  # paths of Windows are compared without case


def samples_in(folder: Path) -> Any:
    """The samples in a folder that ``sample_to`` wrote, without the sheet beside them; any other folder unchanged."""
    try:
        stored = stored_settings(folder)
    except (OSError, ValueError):  # no samples.json, or one of another program
        return folder
    if stored["settings"]["format"] == "png":
        return folder / IMAGES
    samples = torch.cat([batch.images for batch in stored_samples(folder, process=(0, 1))])
    return {"images": samples if stored["settings"]["format"] == "float" else to_uint8(samples)}
