"""Decodes all images of a source, finds the damaged ones, and keeps the others in memory or in a folder, the cache.

The cache has two files for each source: the decoded images as an .npy file, which is memory-mapped, and the indices of
the damaged images as a JSON file. Their name is a hash of what determines the images.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from scorematch.core.arguments import argument
from scorematch.core.files import new_files
from scorematch.core.records import hash_of, read_record
from scorematch.core.schema import Field
from scorematch.core.threads import ordered_map
from scorematch.data.memory import Array
from scorematch.data.pictures import UnfitError
from scorematch.data.sources import Source

_IN_MEMORY = 2**30  # the largest size in bytes of decoded images that are kept in memory without a cache
_LONGEST_HEADER = 4096  # bytes


def decode(
    source: Source, fingerprint: str, cache: Path | None, *, strict: bool, workers: int, progress: bool
) -> tuple[np.ndarray | None, list[int]]:
    """Decodes all images, or finds them in the cache.

    Args:
        source: the source of the images.
        fingerprint: a hash that identifies them.
        cache: the folder of the cache; None keeps the images in memory.
        strict: whether a damaged image raises an error.
        workers: the number of threads.
        progress: whether to show a progress bar.

    Returns:
        The array of the images that are not damaged, in memory or memory-mapped, or None if they are not kept; and the
        indices of the damaged ones.

    Raises:
        OSError: if no image can be read, an image is damaged and ``strict`` is True, or the cache cannot be written.
    """
    if isinstance(source, Array):
        return source.array, []
    images = _decoded(source, strict, workers, progress)
    if cache is not None:
        key = hash_of([fingerprint, source.state()])
        pixels, index = cache / f"{key}.npy", cache / f"{key}.json"
        found = _stored(source, pixels, index) or _write(source, images, pixels, index)
        if found[1] and strict:
            raise OSError(f"{source.name_of(found[1][0])} cannot be read as an image.")
        return found
    if not source.constant:
        return None, []
    fits = _size(source) <= _IN_MEMORY
    kept, broken = [], []
    for i, image in enumerate(images):
        if image is None:
            broken.append(i)
        elif fits:
            kept.append(image)
    return np.stack(kept) if fits else None, broken


def _decoded(source: Source, strict: bool, workers: int, progress: bool) -> Iterator[np.ndarray | None]:
    """The pixels of each image in order, or None for a damaged image."""

    def decode(i: int) -> np.ndarray | Exception:
        try:
            return source.pixels(i)
        except (UnfitError, ImportError):
            raise
        except Exception as error:  # Pillow's decoders raise errors of many types
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
        raise OSError(f"none of the {len(source)} images of {source.name} can be read: {last}") from last


def _stored(source: Source, pixels: Path, index: Path) -> tuple[np.ndarray, list[int]] | None:
    """The decoded images in the cache and the indices of the damaged ones; None if they are missing or incomplete."""
    try:
        stored = read_record(
            index, {"broken": Field(list, required=True, each=Field(int, low=0, high=len(source) - 1))}
        )
        if stored is None:
            return None
        broken = sorted(set(stored["broken"]))
        shape = len(source) - len(broken), *source.shape
        with pixels.open("rb") as file:
            start = file.read(_LONGEST_HEADER)
        for dtype in (np.dtype(np.uint8), np.dtype(np.float32)):
            header = _header(shape, dtype)
            size = len(header) + math.prod(shape) * dtype.itemsize
            if start.startswith(header) and pixels.stat().st_size == size:
                return np.memmap(pixels, dtype, "r", len(header), shape), broken
    except (OSError, ValueError):  # they are decoded again
        pass
    return None


def _write(
    source: Source, images: Iterable[np.ndarray | None], pixels: Path, index: Path
) -> tuple[np.ndarray, list[int]]:
    """Writes the decoded images and the indices of the damaged ones to the cache, and returns them.

    If another process is writing to the cache, this one waits, and then uses what the other has written.
    """
    cache, broken, dtype = pixels.parent, [], np.dtype(np.uint8)
    with ExitStack() as stack:
        with _writing_to(cache):
            cache.mkdir(parents=True, exist_ok=True)
            new = stack.enter_context(new_files(cache, lambda folder: ()))
            found = _stored(source, pixels, index)
            if found is not None:
                return found
            needed, free = _size(source), shutil.disk_usage(cache).free
            if needed > free:
                raise OSError(f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
            file = stack.enter_context((new / pixels.name).open("wb"))
            file.write(_header((len(source), *source.shape), dtype))
        # Not memory-mapped: with a full disk, a write raises an error, but a memory map kills the process.
        for i, image in enumerate(images):
            if image is None:
                broken.append(i)
                continue
            dtype = image.dtype
            with _writing_to(cache):
                file.write(image.tobytes())
        with _writing_to(cache):
            file.seek(0)
            file.write(_header((len(source) - len(broken), *source.shape), dtype))
            file.flush()
            (new / index.name).write_text(json.dumps({"broken": broken}), encoding="utf-8")
    return np.load(pixels, mmap_mode="r"), broken


def _size(source: Source) -> int:
    """The size in bytes of all images."""
    return len(source) * math.prod(source.shape) * (4 if source.deep else 1)


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the decoded images cannot be written to {cache}: {error.strerror or error}. Pass another folder as "
            f"{argument('cache')}."
        ) from error


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The header of an .npy file. NumPy pads it, so that its length does not depend on the number of images."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
