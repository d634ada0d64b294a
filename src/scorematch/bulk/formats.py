"""The two formats of the files in a folder of samples: PNG, one file per image, and .npz, one file per batch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from scorematch.arrays import read_arrays, read_shape
from scorematch.bulk.batches import Batch
from scorematch.files import write_whole
from scorematch.images import check_picture, read_image, save_image, to_uint8

Format = Literal["png", "npz"]


def stem(i: int) -> str:
    """The number of an image as a file name. It does not depend on n, so that images can be added."""
    return f"{i:06d}"


class Files(Protocol):
    """The files of the images in one folder."""

    def __init__(self, folder: Path) -> None: ...

    def check(self) -> None:
        """Raises the errors that ``write`` would raise for this folder, before anything is computed."""

    def exist(self, indices: range) -> bool:
        """Whether all images of a batch exist."""

    def count(self, indices: range) -> int:
        """The number of images of a batch that exist."""

    def write(self, batch: Batch) -> None:
        """Writes a batch. ``exist`` returns True only after the whole batch is written."""

    def read(self, indices: range, channels: int) -> Tensor:
        """Reads the images of a batch, or the first of them: (len(indices), C, H, W), float32 in [0, 1]."""


class _Pictures:
    """One PNG file per image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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


class _Arrays:
    """One .npz file per batch, with the names of arrays of guided-diffusion."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, first: int) -> Path:
        return self._folder / f"{stem(first)}.npz"

    def check(self) -> None:
        pass

    def exist(self, indices: range) -> bool:
        return self.count(indices) == len(indices)  # fewer images if n has grown since

    def count(self, indices: range) -> int:
        path = self._path(indices.start)
        if not _is_filled(path):
            return 0
        try:
            shape = read_shape(path, "arr_0")
        except (OSError, ValueError):  # damaged later
            return 0
        return min([*shape[:1], len(indices)])

    def write(self, batch: Batch) -> None:
        pixels = rearrange(to_uint8(batch.images).cpu(), "n c h w -> n h w c").numpy()
        content = io.BytesIO()
        np.savez(content, *([pixels] if batch.classes is None else [pixels, batch.classes.numpy()]))
        write_whole(self._path(batch.indices.start), content.getvalue())

    def read(self, indices: range, channels: int) -> Tensor:
        path = self._path(indices.start)
        pixels = read_arrays(path, ("arr_0",)).get("arr_0", np.empty(0))
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) < len(indices) or pixels.shape[3] != channels:
            raise ValueError(
                f"{path} must hold an array arr_0 of at least {len(indices)} images (n, H, W, {channels}), uint8, got "
                f"{pixels.dtype} of shape {pixels.shape}."
            )
        return rearrange(torch.from_numpy(pixels[: len(indices)]), "n h w c -> n c h w").float() / 255


FORMATS: Mapping[str, type[Files]] = {"png": _Pictures, "npz": _Arrays}


def _is_filled(path: Path) -> bool:
    """Whether a file exists and is not empty. A file that was renamed just before a power failure may be empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
