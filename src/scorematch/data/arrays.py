"""Reading and writing of ``.npz`` files: arrays of numbers and strings, without pickles.

The sizes that a file states are checked against each other and against the size of the file before memory is taken.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from scorematch.core.files import write_whole
from scorematch.core.messages import plain, quote, reason
from scorematch.core.schema import Field

_SMALL, _INFLATION = 2**26, 50  # unpacked arrays have at most 64 MiB, or 50 times the size of the file
_LARGEST_HEADER = 10_000  # bytes
_NAMES = 26  # where the lengths of the name and of the extra field are in the header of a file in a zip file
_SHAPE = Field(list, high=32, each=Field(int, low=0, high=2**48))
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an ``.npz`` file.

    Args:
        path: the path of the file.
        names: the names of the arrays to read, if they exist; None reads all arrays.

    Returns:
        The arrays by name, in the byte order of this machine.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not an ``.npz`` file, is damaged, or unpacks to more than 64 MiB and 50 times its size; or
            if an array holds anything but numbers, bools and strings.
    """
    with _opened(path) as archive:
        entries = {name: entry for name, entry in _entries(archive).items() if names is None or name in names}
        if sum(entry.file_size for entry in entries.values()) > max(_SMALL, _INFLATION * path.stat().st_size):
            raise ValueError(f"it unpacks to more than {_INFLATION} times its size")
        found = {}
        for name, entry in entries.items():
            _read_header(archive, entry)
            with archive.open(entry) as file:
                values = npy.read_array(file, allow_pickle=False)
            found[name] = values.astype(values.dtype.newbyteorder("="), copy=False)
        return found


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, or tensors on the CPU, to an ``.npz`` file, or the first one to an ``.npy`` file, atomically."""
    content, found = io.BytesIO(), {name: np.asarray(values) for name, values in arrays.items()}
    if path.suffix.lower() == ".npy":
        np.save(content, next(iter(found.values())))
    else:
        np.savez(content, **found)  # type: ignore[arg-type]  # one array could have the name of an option
    write_whole(path, content.getvalue())


def array_names(path: Path) -> list[str]:
    """The names of the arrays of an ``.npz`` file, whose values are not read.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not an ``.npz`` file, or is damaged.
    """
    with _opened(path) as archive:
        return list(_entries(archive))


def read_shape(path: Path, name: str) -> tuple[int, ...]:
    """Reads the shape of one array of an ``.npz`` file, without its values.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if there is no such array, or for the reasons of ``read_arrays``.
    """
    with _opened(path) as archive:
        entry = _entries(archive).get(name)
        if entry is None:
            raise ValueError(f"it has no array {name}")
        return _read_header(archive, entry)


def map_array(path: Path, name: str) -> np.ndarray:
    """One array of an ``.npz`` file: memory-mapped if it is not compressed, and otherwise read.

    Raises:
        OSError, ValueError: as for ``read_shape``.
    """
    with _opened(path) as archive:
        entry = _entries(archive).get(name)
        if entry is None:
            raise ValueError(f"it has no array {name}")
        _read_header(archive, entry)
        with archive.open(entry) as file:
            shape, fortran, dtype = _HEADERS[npy.read_magic(file)](file, max_header_size=_LARGEST_HEADER)
            begin = file.tell()
    if entry.compress_type != zipfile.ZIP_STORED or 0 in shape:
        return read_arrays(path, (name,))[name]
    with path.open("rb") as content:
        content.seek(entry.header_offset + _NAMES)  # of the local header, whose lengths may differ from the central one
        lengths = struct.unpack("<HH", content.read(4))
    offset = entry.header_offset + _NAMES + 4 + sum(lengths) + begin
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file; errors about its content become a ValueError that names the file."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except OSError as error:  # a position outside of the file
            raise ValueError(f"{path} cannot be read as an .npz file of arrays: it is damaged.") from error
        except (ValueError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as an .npz file of arrays: {reason(error)}.") from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries that hold arrays, by the names of the arrays."""
    found = {entry.filename[:-4]: entry for entry in archive.infolist() if entry.filename[-4:] == ".npy"}
    for entry in found.values():
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{plain(entry.filename)} is compressed by another method than deflate")
    return found


def _read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an array, after checking that its values have the size of its file."""
    name = plain(entry.filename)
    with archive.open(entry) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # about headers that NumPy has to repair
                shape, _, dtype = _HEADERS[npy.read_magic(file)](file, max_header_size=_LARGEST_HEADER)
        except Exception as error:  # of Python's parser too
            raise ValueError(
                f"the header of {name} is damaged, not that of an array, or longer than {_LARGEST_HEADER:,} bytes"
            ) from error
        size = entry.file_size - file.tell()
    if dtype.kind not in "biufSU" or dtype.itemsize == 0:
        raise ValueError(f"{name} must hold numbers, bools or strings, got the type {quote(dtype.str)}")
    if not _SHAPE.fits(shape):
        raise ValueError(f"the shape of {name} must be {_SHAPE}, got {quote(shape)}")
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has {size:,} bytes of values for the shape {quote(shape)} and type {dtype}")
    return shape
