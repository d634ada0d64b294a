"""Training data: ``open_images`` opens a folder, arrays or a data set as an ``ImageData``, from which batches are read.

It accepts

- a folder: all image files in it and its subfolders, sorted by path; of a folder that ``sample_to`` wrote, the samples;
- a tensor or an array, alone or as a pair (images, labels), or a dict or an .npz file of arrays. Images are uint8 of
  shape (N, C, H, W), (N, H, W, C) or (N, H, W); floating-point data may have any shape (N, ...), and images among them
  are (N, C, H, W) in [0, 1], or in ``value_range``;
- a ``torch.utils.data.Dataset`` with a length, whose items are images or tuples (image, label). Its random transforms
  are drawn again at each access, also in a run that continues;
- a data set of Hugging Face's ``datasets``, its name on the Hub, or a short name in
  ``scorematch.data.REFERENCES``, such as "mnist-train".

Image files are cropped and resized with Pillow and kept as uint8, or, if the first one has 16 bits, as float32. Each
file is decoded once when the data are opened, so that damaged files are found before the training starts. The decoded
images are kept in memory, or in a memory-mapped file (``cache``), so that no later epoch decodes them again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.conditions import Parts
from scorematch.core.messages import few
from scorematch.core.records import hash_of
from scorematch.data.cache import decode
from scorematch.data.find import find
from scorematch.data.pictures import CELEBA_SIDE, Crop
from scorematch.data.sources import Source, Wanted

_BLOCK = 1024  # images that are read at a time to hash them


class Data(Protocol):
    """The interface of training data, which ``ImageData`` implements.

    Attributes:
        shape: the shape of one sample, (C, H, W) for images.
        fingerprint: a string that identifies the data.
    """

    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of samples."""

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor | Parts | None]:
        """Reads samples by index. It is called from one thread at a time.

        Args:
            indices: int64 (n,), from 0 to ``len(self) - 1``.

        Returns:
            The samples (n, ...), uint8 from 0 to 255, or floating point in the units of the network; and their labels
            (n,), int64, or None.
        """


class ImageData:
    """Training data with random access, created by ``open_images``. ``len(data)`` is the number of images.

    Attributes:
        shape: the shape of one image, (C, H, W), or of one sample of other data.
        labels: the labels of all images, int64 (len(data),), or None.
        classes: the names of the classes, or None without labels.
        skipped: the names of the images that cannot be read and are left out.
        from_color: whether the images are gray and the first picture is in color.
        fingerprint: a hash that identifies the data. It covers the shape of an image, the crop, and the paths and sizes
            of the files of a folder, the values of arrays, or the length of a data set.
    """

    def __init__(
        self, source: Source, *, array: np.ndarray | None, broken: Sequence[int], fingerprint: str, workers: int
    ) -> None:
        self.shape, self.classes, self.fingerprint = source.shape, source.classes, fingerprint
        self.from_color = source.from_color
        self.skipped = (*map(source.name_of, broken), *source.unread)
        self._source, self._array = source, array
        self._kept = np.setdiff1d(np.arange(len(source)), broken)  # indices of the images that can be read
        self.labels = None if source.labels is None else torch.from_numpy(source.labels[self._kept])
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}  # threads cannot be copied

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"ImageData({len(self):,} x {self.shape} from {self._source.name})"

    @functools.cached_property
    def content(self) -> str:
        """A hash of ``fingerprint`` and of all pixels, in order; all images are read when it is first used."""
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        for start in range(0, len(self), _BLOCK):
            batch, _ = self.read(range(start, min(start + _BLOCK, len(self))))
            digest.update(f"{batch.dtype} {tuple(batch.shape)}".encode())
            digest.update(batch.contiguous().numpy().data)
        return digest.hexdigest()

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads images by index.

        Args:
            indices: n indices from 0 to ``len(self) - 1``; they may repeat.

        Returns:
            A tuple (images, labels): the images (n, C, H, W), uint8, or float32 for floating-point sources; the labels
            (n,), int64, or None.

        Raises:
            OSError: if a file has become unreadable since the data were opened.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if self._array is not None:
            images = np.asarray(self._array[rows])
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="scorematch-decode")
            images = np.stack(list(self._pool.map(self._source.pixels, self._kept[rows].tolist())))
        return torch.from_numpy(images), None if self.labels is None else self.labels[torch.from_numpy(rows)]


def open_images(
    data: Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    crop: Crop = "center",
    labels: bool = False,
    cache: str | os.PathLike[str] | None = None,
    strict: bool = False,
    value_range: tuple[float, float] | None = (0, 1),
    image_key: str | None = None,
    label_key: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ImageData:
    """Opens training data.

    Args:
        data: one of the kinds listed in the module docstring. A string is a path if such a file or folder exists, and
            otherwise a short name, or the name of a data set on the Hub, of which the split "train" is used. An
            ``ImageData`` is returned unchanged.
        image_size: (height, width) in pixels, or the side of a square. None keeps the size of the images, which must be
            the same for all; images from files and data sets are then cropped to a square, unless ``crop`` is None.
            Pictures of a ``torch`` Dataset are resized to the size of the first. For the crop "celeba" None is 140.
        channels: 1 for gray, 3 for RGB. None keeps the number of channels of the images, which must be the same for
            all.
        crop: "center" crops the largest area in the middle with the aspect ratio of ``image_size``; "celeba" crops the
            140 x 140 pixels in the middle, for CelebA's aligned images; None does not crop, and may change the aspect
            ratio. The result is resized with Pillow's antialiased bilinear filter.
        labels: whether to read class labels. The classes of a folder are its subfolders.
        cache: a folder for the decoded images, which later calls reuse. One process at a time writes to it, and others
            wait. None keeps up to 1 GiB of decoded images in memory; a larger data set is decoded again in each epoch,
            and so is a ``torch`` Dataset.
        strict: whether a damaged image raises an error. Otherwise it is left out, with a warning, as are pictures in
            formats that cannot be read, such as HEIC.

        Rarely needed:

        value_range: (low, high) of floating-point images with 1 or 3 channels; None is for data without a fixed range.
            ``train`` takes that of the network.
        image_key: the name of the images in a data set, a dict or an .npz file; None finds it by type or common names.
        label_key: the name of the labels; None finds it in the same way.
        workers: the number of threads that decode images, at least 1; None is the number of processors.
        progress: whether to show a progress bar while images are decoded.

    Returns:
        The data.

    Raises:
        FileNotFoundError: if the path does not exist, or the folder has no image files.
        ImportError: without Pillow, if images must be decoded or resized; without ``datasets``, for the name of a data
            set.
        TypeError: if the data are of another kind.
        ValueError: if the images have different sizes and ``image_size`` is None; if gray and color images are mixed
            and ``channels`` is None; if an array has another shape, or floating-point images are (N, H, W, C); if
            floating-point values in an array or in the first item of a Dataset are outside the range or NaN; or if the
            labels do not fit.
        OSError: if no image can be read, an image is damaged and ``strict`` is True, or the cache cannot be written.

    Example:
        >>> data = open_images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8))
        >>> data.read([4, 2])[0].shape
        torch.Size([2, 3, 8, 8])
    """
    if isinstance(data, ImageData):
        return data
    check_choice("crop", crop, ("center", "celeba", None))
    check_choice("channels", channels, (1, 3, None))
    if image_size is None and crop == "celeba":
        image_size = CELEBA_SIDE
    size = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    pair = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int | np.integer) for side in size)
    if size is not None and not (pair and min(size) >= 1):
        raise ValueError(
            f"{argument('image_size')} must be (height, width), or the side of a square, got {image_size!r}."
        )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = check_count("workers", workers)
    size = None if size is None else (int(size[0]), int(size[1]))
    source = find(data, Wanted(size, channels, crop, labels, image_key, label_key, value_range), workers)
    fingerprint = hash_of([source.identity, source.shape, crop, labels, *(["16 bits"] if source.deep else [])])
    folder = None if cache is None else Path(cache).expanduser()
    array, broken = decode(source, fingerprint, folder, strict=strict, workers=workers, progress=progress)
    opened = ImageData(source, array=array, broken=broken, fingerprint=fingerprint, workers=workers)
    if opened.skipped:
        number = len(source) + len(source.unread)
        warnings.warn(
            f"{len(opened.skipped)} of the {number} images of {source.name} cannot be read and are left out: "
            f"{few(opened.skipped)}",
            stacklevel=2,
        )
    return opened
