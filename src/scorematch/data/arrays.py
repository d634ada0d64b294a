"""Reading of ``.npz`` files: arrays of numbers and strings, without pickles.

The sizes that a file states are checked against each other and against the size of the file before memory is taken.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scorematch.core.messages import plain, quote, reason
from scorematch.core.schema import Field, check

_SMALL, _INFLATION = 2**26, 50  # unpacked arrays have at most 64 MiB, or 50 times the size of the file
_LARGEST_HEADER = 10_000  # bytes
_Order = Literal["C", "F"]
_HEADER = {
    "descr": Field(str, required=True),
    "fortran_order": Field(bool, required=True),
    "shape": Field(list, required=True, high=32, each=Field(int, low=0, high=2**48)),
}
_DTYPE = r"[<>|=]?([biuf]\d{1,2}|[US][1-9]\d{0,5})"  # bools, integers, floating-point numbers and strings


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
            data = bytearray(archive.read(entry))
            start, shape, dtype, order = _header(data, entry)
            values = np.frombuffer(data, dtype, offset=start)
            found[name] = values.reshape(shape, order=order).astype(dtype.newbyteorder("="), copy=False)
        return found


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
        with archive.open(entry) as file:
            return _header(file.read(_LARGEST_HEADER), entry)[1]


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


def _header(data: bytes | bytearray, entry: zipfile.ZipInfo) -> tuple[int, tuple[int, ...], np.dtype[Any], _Order]:
    """The place of the first value, the shape, the type and the order of an array, from the beginning of its file."""
    name = plain(entry.filename)
    # The header is a dict in Python's notation after the name of the format, its version, and the length of the header.
    form, start = ("<H", 10) if data[6:7] == b"\1" else ("<I", 12)
    if data[:6] != b"\x93NUMPY" or len(data) < start:
        raise ValueError(f"{name} is not a NumPy array")
    end = start + struct.unpack(form, data[8:start])[0]
    if end > min(len(data), _LARGEST_HEADER):
        raise ValueError(f"the header of {name} is too long")
    try:
        header = ast.literal_eval(data[start:end].decode("latin1"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"the header of {name} is damaged") from error
    check(header, _HEADER, f"the header of {name}")
    if not re.fullmatch(_DTYPE, header["descr"]):
        raise ValueError(f"{name} must hold numbers, bools or strings, got the type {quote(header['descr'])}")
    try:
        dtype = np.dtype(header["descr"])
    except TypeError as error:
        raise ValueError(f"{name} has an unknown type, {quote(header['descr'])}") from error
    shape, size = tuple(header["shape"]), entry.file_size - end
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has {size:,} bytes of values for the shape {quote(shape)} and type {dtype}")
    return end, shape, dtype, "F" if header["fortran_order"] else "C"
