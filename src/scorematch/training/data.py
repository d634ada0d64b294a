"""Training data: ``open_images`` turns a folder, arrays or a data set into batches of tensors.

It accepts

- a folder: all pictures in it and its subfolders, sorted by path;
- a tensor or an array, alone or as a pair (images, labels), or a dict or an .npz file of these: images (N, C, H, W),
  (N, H, W, C) or (N, H, W), or floating-point data of any shape (N, ...);
- a ``torch.utils.data.Dataset`` with a length, whose items are images or tuples (image, label);
- a data set of Hugging Face's ``datasets``, or its name on the Hub.

Pictures are cropped and resized with Pillow and kept as uint8, the precision that they have. Each picture is decoded
once when the data are opened, so that damaged ones are known before the training starts. The decoded pictures are kept
in memory, or in a memory-mapped file (``cache``), so that later epochs decode nothing.

Which image a training run sees when is a function of the seed and of the position in the run alone; see ``Order``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.randomness import seed_of
from scorematch.training.sources import Array, Crop, Options, Source, UnfitError, find, ordered_map

_IN_MEMORY = 2**30  # bytes of decoded pictures that are kept in memory without a cache


class ImageData:
    """Training data with random access, as ``open_images`` returns them.

    Attributes:
        shape: of one image, (C, H, W), or of one sample of other data.
        classes: the names of the classes, or None without labels.
        skipped: the names of the pictures that cannot be read and are left out.
        fingerprint: a hash that differs between different data. Of a folder it covers the paths and sizes of the files,
            of arrays their values, of data sets their length, always with the shape of an image and the crop.
    """

    def __init__(
        self, source: Source, *, array: np.ndarray | None, broken: Sequence[int], fingerprint: str, workers: int
    ) -> None:
        self.shape, self.classes, self.fingerprint = source.shape, source.classes, fingerprint
        self.skipped = tuple(map(source.name_of, broken))
        self._source, self._array = source, array
        self._kept = np.setdiff1d(np.arange(len(source)), broken)  # the images of the source that can be read
        self._labels = None if source.labels is None else torch.from_numpy(source.labels[self._kept])
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"ImageData({len(self):,} x {self.shape} from {self._source.name})"

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads images by their positions.

        Args:
            indices: n positions from 0 to ``len(self) - 1``; they may repeat.

        Returns:
            The images (n, C, H, W), uint8, or float32 in [0, 1] for floating-point sources; and their labels (n,),
            int64, or None.

        Raises:
            OSError: for a file that has become unreadable since the data were opened.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if self._array is not None:
            images = np.asarray(self._array[rows])
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="scorematch-decode")
            images = np.stack(list(self._pool.map(self._source.pixels, self._kept[rows].tolist())))
        return torch.from_numpy(images), None if self._labels is None else self._labels[torch.from_numpy(rows)]


class Order:
    """The order in which a run sees its data: each epoch is a permutation of all images, drawn from the seed.

    Image i of a run is the same whatever the batch size, the number of processes, and whether it was interrupted.

    Args:
        length: the number of images in the data.
        seed: of the run.

    Raises:
        ValueError: if there are no images.

    Example:
        >>> order = Order(5, seed=0)
        >>> sorted(order(0, 5).tolist()), bool((order(3, 8)[:2] == order(0, 5)[3:]).all())
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}.")
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, start: int, stop: int) -> Tensor:
        """The positions in the data of the images ``start`` to ``stop - 1`` of the run, int64 (stop - start,)."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.length)
            last = min(self.length, first + stop - start)
            parts.append(self._of(epoch)[first:last])
            start += last - first
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        return self._permutation


def open_images(
    source: Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    crop: Crop = "center",
    labels: bool = False,
    cache: str | os.PathLike[str] | None = None,
    strict: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ImageData:
    """Opens training data.

    Args:
        source: any of the kinds that this module lists. A string is a path if there is such a file or folder, else the
            name of a data set on the Hub, of which the split "train" is taken. An ``ImageData`` is returned itself.
        image_size: (height, width), or the side of a square. None is the size of the images, which must then agree;
            pictures become square.
        channels: 1 for gray, 3 for RGB. None is that of the images, which must then agree.
        crop: "center" is the largest area in the middle with the proportions of ``image_size``; "celeba" the 140 x 140
            pixels in the middle, for CelebA's aligned pictures; None is the whole picture, whatever its proportions.
            What is cropped is resized with Pillow's antialiased bilinear filter.
        labels: whether to read class labels: in a folder, the names of its subfolders.
        cache: a folder for the decoded images, where later calls find them. None keeps up to 1 GiB of decoded pictures
            in memory; a larger set is decoded again in each epoch, and so is a ``torch`` Dataset.
        strict: whether a damaged picture is an error. Otherwise it is left out, and a warning names it.

        Rarely needed:

        image_key: of a data set, a dict or an .npz file, the name of the images; None finds it.
        label_key: likewise of the labels.
        workers: the number of threads that decode; None is the number of processors.
        progress: whether to show a progress bar while pictures are decoded.

    Returns:
        The data.

    Raises:
        FileNotFoundError: for a path that does not exist, or a folder without pictures.
        ImportError: without Pillow, for pictures; without ``datasets``, for a name.
        TypeError: for a source of another kind.
        ValueError: for pictures of different sizes without ``image_size``, gray and color pictures without
            ``channels``, arrays of another shape, or labels that do not fit.
        OSError: if no picture can be read; for a damaged picture with ``strict``; for a cache that cannot be written.

    Example:
        >>> data = open_images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8))
        >>> data.read([4, 2])[0].shape
        torch.Size([2, 3, 8, 8])
    """
    if isinstance(source, ImageData):
        return source
    if crop not in ("center", "celeba", None):
        raise ValueError(f'crop must be "center", "celeba" or None, got {crop!r}.')
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and not (len(size) == 2 and min(size) >= 1):
        raise ValueError(f"image_size must be (height, width), or the side of a square, got {image_size!r}.")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    options = Options(None if size is None else (size[0], size[1]), channels, crop, labels, image_key, label_key)
    found = find(source, options, workers)
    fingerprint = _digest(found.identity, found.shape, crop, labels)
    array, broken = _decode(found, fingerprint, None if cache is None else Path(cache), strict, workers, progress)
    data = ImageData(found, array=array, broken=broken, fingerprint=fingerprint, workers=workers)
    if broken:
        few = ", ".join(data.skipped[:3]) + (", ..." if len(broken) > 3 else "")
        warnings.warn(
            f"{len(broken)} of the {len(found)} pictures of {found.name} cannot be read and are left out: {few}",
            stacklevel=2,
        )
    return data


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# -- Decoding ---------------------------------------------------------------------------------------------------------


def _decode(
    source: Source, fingerprint: str, cache: Path | None, strict: bool, workers: int, progress: bool
) -> tuple[np.ndarray | None, list[int]]:
    """All images but the damaged ones: memory-mapped, in memory, or None if they are not kept; and the damaged ones."""
    if isinstance(source, Array):
        return source.array, []
    if cache is not None:
        key = _digest(fingerprint, source.state())
        pixels, index = cache / f"{key}.npy", cache / f"{key}.json"  # the index is written last
        if not (pixels.is_file() and index.is_file()):
            _write(source, pixels, index, strict, workers, progress)
        broken = json.loads(index.read_text(encoding="utf-8"))["broken"]
        if broken and strict:
            raise OSError(f"{source.name_of(broken[0])} cannot be read as an image.")
        return np.load(pixels, mmap_mode="r"), broken
    if not source.constant:
        return None, []
    fits = len(source) * math.prod(source.shape) <= _IN_MEMORY
    kept, broken = [], []
    for i, image in enumerate(_decoded(source, strict, workers, progress)):
        if image is None:
            broken.append(i)
        elif fits:
            kept.append(image)
    return np.stack(kept) if fits else None, broken


def _decoded(source: Source, strict: bool, workers: int, progress: bool) -> Iterator[np.ndarray | None]:
    """The pixels of each image, or None for one that is damaged."""

    def decode(i: int) -> np.ndarray | Exception:
        try:
            return source.pixels(i)
        except (UnfitError, ImportError):
            raise
        except Exception as error:  # of many kinds: Pillow's decoders raise what they meet
            if strict:
                raise OSError(f"{source.name_of(i)} cannot be read as an image: {error}") from error
            return error

    found, last = 0, None
    images = ordered_map(decode, range(len(source)), workers)
    for image in tqdm(images, "decoding", len(source), unit="image", leave=False, disable=None if progress else True):
        if isinstance(image, Exception):
            last = image
            yield None
        else:
            found += 1
            yield image
    if not found:
        raise OSError(f"none of the {len(source)} pictures of {source.name} can be read: {last}") from last


def _write(source: Source, pixels: Path, index: Path, strict: bool, workers: int, progress: bool) -> None:
    """Writes the decoded images and the list of the damaged ones; both files are complete or not there at all."""
    staged = pixels.with_name(f".writing-{uuid.uuid4().hex}")
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    broken = []
    with _writing_to(pixels.parent):
        pixels.parent.mkdir(parents=True, exist_ok=True)
        needed, free = len(source) * math.prod(source.shape), shutil.disk_usage(pixels.parent).free
        if needed > free:
            raise OSError(f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
        file = staged.open("wb")
    try:
        with file:
            # Written and not memory-mapped: a full disk is then an error, and not the end of the process.
            file.write(_header(source, len(source), dtype))
            for i, image in enumerate(_decoded(source, strict, workers, progress)):
                if image is None:
                    broken.append(i)
                    continue
                dtype = image.dtype
                with _writing_to(pixels.parent):
                    file.write(image.tobytes())
            with _writing_to(pixels.parent):
                file.seek(0)
                file.write(_header(source, len(source) - len(broken), dtype))
                file.flush()
                os.fsync(file.fileno())
        with _writing_to(pixels.parent):
            os.replace(staged, pixels)
            staged.write_text(json.dumps({"broken": broken}), encoding="utf-8")
            os.replace(staged, index)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the decoded images cannot be written to {cache}: {error.strerror or error}. Name another folder for the "
            "cache."
        ) from error


def _header(source: Source, n: int, dtype: np.dtype[Any]) -> bytes:
    """The start of an .npy file. NumPy leaves room for n to grow, so that its length does not depend on n."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n, *source.shape)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
