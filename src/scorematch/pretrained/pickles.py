"""Reads pickles of tensors without executing them.

A pickle is a program: it can import and call any function of any library. ``Machine`` interprets only the part of the
pickle language that describes tensors, numbers, strings, lists and dicts. A name that is not in the table of known
names is an error. A name in the table is replaced by a function or dtype of this package; the function of that name is
never called. Three containers are supported:

- the zip file of ``torch.save``, whose entries are uncompressed or compressed with deflate;
- the older format of ``torch.save``, a sequence of pickles followed by the numbers;
- a plain pickle.

A tensor is first read as a description (``StoredTensor``). Its shape is checked against its storage, and the storage
against the file, before memory is allocated. The file is memory-mapped, and ``load_tensors`` returns views of it,
except for compressed entries. Time and memory are at most proportional to the size of the file: the length of integers
and the number of operations are limited, and keys of dicts are strings, integers or None.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scorematch.core.messages import quote
from scorematch.pretrained.configuration import remedy
from scorematch.pretrained.interpreter import Globals, Machine, RefusedError

_INFLATION = 50  # the largest ratio of unpacked size to file size; trained weights have about 1.1
_DIMENSIONS = 16
_FROM_BYTES = "torch.storage._load_from_bytes"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the start of an older file of torch.save

# The exceptions that operations of a damaged pickle and entries of a damaged zip file raise.
_DAMAGED = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(EOFError, OSError, struct.error, zipfile.BadZipFile),
)

_OTHER_FILES = (  # the first bytes of a file, and the rest of the error message
    (b"version https://git-lfs.", "is a Git LFS pointer, not the weights. Run git lfs pull, or download the file."),
    (b"<!doctype html", "is a web page: the download failed. Open the address in a browser, and save the file."),
    (b"<html", "is a web page: the download failed. Open the address in a browser, and save the file."),
    (b"\x89hdf", "is an HDF5 file, not a PyTorch checkpoint."),
    (b"\x93numpy", "is a NumPy array, not a PyTorch checkpoint."),
    (b"\x1f\x8b", "is compressed by gzip. Unpack it, and pass the file inside."),
)


class Pickle(NamedTuple):
    """The content of a file.

    Attributes:
        content: numbers, strings, lists, dicts, and what the functions of the table return; a tensor is a StoredTensor.
        globals: the known names that the file refers to.
    """

    content: Any
    globals: frozenset[str]


def read_pickle(path: Path, known: Globals | None = None) -> Pickle:
    """Reads a file that ``torch.save`` or ``pickle.dump`` wrote.

    Args:
        path: the path of the file.
        known: the names that the file may refer to, such as ``"collections.OrderedDict"``, each with the function or
            dtype of this package that replaces it; None is ``TENSORS``.

    Returns:
        The content of the file, and the known names that it refers to.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file has another format, is damaged, refers to an unknown name, or describes more data than
            it contains.
    """
    with path.open("rb") as file:
        start = file.read(24).lower()
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if start else b"")
    for sign, what in _OTHER_FILES:
        if start.startswith(sign):
            raise ValueError(f"{path} {what}")
    if len(start) > 1 and 0x80 < start[0] < 0x90 and 0xA0 <= start[1] < 0xC0:
        raise ValueError(f"{path} is a MessagePack file, as JAX writes checkpoints, not a PyTorch checkpoint.")
    if start[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        raise ValueError(f"{path} is a safetensors file. Load its folder with ScoreNet.from_pretrained.")
    machine = Machine(data, TENSORS if known is None else known)
    if _FROM_BYTES in machine.known:
        machine.known = {**machine.known, _FROM_BYTES: partial(storage_of_bytes, machine)}
    try:
        return Pickle(_read(path, machine), frozenset(machine.used))
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from error
    except _DAMAGED as error:
        kind = f"{path.suffix[1:]} file" if path.suffix else "checkpoint"
        raise ValueError(f"{path} ({len(data)} bytes) is not a complete {kind}. {remedy(path)}") from error


def _read(path: Path, machine: Machine) -> Any:
    start = bytes(machine.source.data[:4])
    if start == b"PK\x03\x04":
        return _read_zip(path, machine)
    if start[:1] != b"\x80":
        if len(start) < 4:
            raise EOFError
        raise RefusedError("is not a PyTorch checkpoint: it is neither a zip file of torch.save nor a pickle.")
    storages: dict[str, Storage] = {}
    machine.storage = lambda *identifier: _storage(storages, *identifier)
    content = machine.run()
    return _read_sequence(machine, storages) if content == _MAGIC else content


# -- Tensors ----------------------------------------------------------------------------------------------------------


class Storage:
    """The numbers of one or more tensors.

    Args:
        dtype: the dtype of the numbers.
        count: how many numbers there are.

    Attributes:
        read: a function that returns the bytes of the numbers; None until they are found in the file.
    """

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.dtype, self.count, self.size = dtype, count, count * dtype.itemsize
        self.read: Callable[[], memoryview] | None = None
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """All numbers, (count,)."""
        if self._values is None:
            if self.read is None:
                raise RefusedError("lacks the numbers of a tensor.")
            self._values = torch.frombuffer(self.read(), dtype=self.dtype, count=self.count)
        return self._values


class StoredTensor(NamedTuple):
    """A tensor as a file describes it: a part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor.

        Raises:
            RefusedError: if its numbers are damaged.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        return self.storage.values().as_strided(self.shape, self.stride, self.offset)


def load_tensors(stored: Any, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name. They are views of the file, except for compressed entries.

    Args:
        stored: the tensors as the file describes them, a dict from names to StoredTensors.
        path: the path of the file, for error messages.

    Raises:
        ValueError: if ``stored`` is not such a dict, the tensors together have more than twice the bytes of their
            storages, or a storage is damaged.
    """
    if not isinstance(stored, dict) or not all(isinstance(tensor, StoredTensor) for tensor in stored.values()):
        raise ValueError(f"{path} does not hold the weights of a network, a mapping of names to tensors.")
    storages = {id(tensor.storage): tensor.storage for tensor in stored.values()}
    size = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in stored.values())
    limit = 2 * sum(storage.size for storage in storages.values())  # tied weights are stored once
    if size > limit:
        raise ValueError(f"{path} describes {size:,} bytes of tensors, and holds {limit // 2:,} bytes for them.")
    try:
        return {str(name): tensor.load() for name, tensor in stored.items()}
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from error


def _storage(
    storages: dict[str, Storage], kind: Any, dtype: Any, key: Any, device: Any, count: Any, view: Any = None
) -> Storage:
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or view is not None:
        kinds = ", ".join(str(each).removeprefix("torch.") for each in _DTYPES.values())
        raise RefusedError(f"holds numbers of an unsupported type. Only {kinds}, written by torch.save, are supported.")
    storage = storages.setdefault(key, Storage(dtype, _size(count)))
    if (storage.dtype, storage.count) != (dtype, count):
        raise RefusedError(f"describes the storage {quote(key)} with two different dtypes or sizes.")
    return storage


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise RefusedError(f"holds a tensor of an impossible size, {quote(value)}.")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, Storage) or not len(shape) == len(stride) <= _DIMENSIONS:
        raise RefusedError(
            f"holds an unsupported tensor. Only tensors with a storage, at most {_DIMENSIONS} dimensions and a stride "
            "for each dimension are supported."
        )
    tensor = StoredTensor(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, stride)))
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    # The second condition rejects strides of zero, which repeat numbers.
    if 0 not in tensor.shape and (last >= storage.count or math.prod(tensor.shape) > storage.count):
        raise RefusedError(
            f"holds a tensor of shape {quote(tensor.shape)}, strides {quote(tensor.stride)} and offset {offset} that "
            f"does not fit into its storage of {storage.count:,} numbers."
        )
    return tensor


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    """Stands for ``torch._utils._rebuild_parameter``."""
    if not isinstance(tensor, StoredTensor):
        raise RefusedError("holds a parameter that is not a tensor.")
    return tensor


def _dictionary() -> dict[Any, Any]:
    """Stands for ``collections.OrderedDict``."""
    return {}


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_STORAGES: Globals = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}

# The names that occur in the pickle of a mapping from names to tensors.
TENSORS: Globals = {
    **_STORAGES,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _dictionary,
}


# -- NumPy numbers ----------------------------------------------------------------------------------------------------


class _NumberType:
    """Stands for ``numpy.dtype``, of float64 or float32."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("f8", "f4"):
            raise RefusedError(f"holds a NumPy number of type {quote(code)}. Only 'f8' and 'f4' are supported.")
        self.code = f"<{code}"

    def set_state(self, state: Any) -> None:
        self.code = {"<": "<", "=": "<", ">": ">"}[state[1]] + self.code[1:]


def _number(kind: Any, value: Any) -> float:
    """Stands for ``numpy.core.multiarray.scalar``."""
    if not isinstance(kind, _NumberType):
        raise RefusedError(f"holds a NumPy number of type {quote(kind)}. Only float64 and float32 are supported.")
    return float(np.frombuffer(value, kind.code).item())


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, with which protocol 2 writes the bytes of a number."""
    if encoding != "latin1" or len(text) > 16:
        raise RefusedError("holds bytes that are not those of a number.")
    return text.encode(encoding)


# The names that occur in the pickle of a NumPy number, such as a learning rate.
NUMBERS: Globals = {
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,  # of NumPy 2
    "numpy.dtype": _NumberType,
    "_codecs.encode": _encode,
}


# -- Containers of torch.save -----------------------------------------------------------------------------------------


def _read_zip(path: Path, machine: Machine) -> Any:
    data = machine.source.data
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    if sum(entry.file_size for entry in archive.infolist()) > _INFLATION * len(data):
        raise RefusedError(f"unpacks to more than {_INFLATION} times its size, which trained weights do not.")
    root = next((name[:-8] for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if root is None:
        what = "a NumPy archive" if any(name.endswith(".npy") for name in entries) else "a zip file"
        raise RefusedError(f"is {what}, not a PyTorch checkpoint.")
    if f"{root}constants.pkl" in entries:
        raise RefusedError("is a TorchScript program, not a checkpoint.")
    checksums = any(entry.CRC for entry in entries.values())  # torch.save can leave them out: all are zero
    if f"{root}byteorder" in entries:
        _check_order(bytes(_entry(data, entries[f"{root}byteorder"], checksums)) == b"little")
    storages: dict[str, Storage] = {}

    def storage(*identifier: Any) -> Storage:
        found = _storage(storages, *identifier)
        entry = entries[f"{root}data/{identifier[2]}"]
        if entry.file_size != found.size:
            raise RefusedError(f"holds {entry.file_size:,} bytes for {found.count:,} numbers of {found.dtype}.")
        found.read = lambda: _entry(data, entry, checksums)
        return found

    machine.storage = storage
    machine.open(_entry(data, entries[f"{root}data.pkl"], checksums))
    return machine.run()


def _entry(data: memoryview, entry: zipfile.ZipInfo, checksums: bool) -> memoryview:
    """Returns the content of an entry of a zip file: a view of the file, or a decompressed copy.

    Args:
        data: the zip file.
        entry: the entry.
        checksums: whether the entries of the file have checksums.

    Raises:
        RefusedError: if the entry is encrypted, compressed by another method than deflate, or damaged.
    """
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError(
            f"holds the entry {quote(entry.filename)}, which is encrypted or compressed in an unsupported way. "
            "Only entries that are stored or compressed by deflate are supported."
        )
    part = memoryview(b"")
    try:
        name, extra = struct.unpack_from("<26x2H", data, entry.header_offset)
        start = entry.header_offset + 30 + name + extra
        part = data[start : start + entry.compress_size]
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(part, max(1, entry.file_size))
            part = memoryview(bytearray(inflated))  # writable, since torch warns about read-only memory
    except (struct.error, zlib.error):
        pass  # the next check then fails
    if len(part) != entry.file_size or (checksums and zlib.crc32(part) != entry.CRC):
        raise RefusedError(f"is damaged: its entry {quote(entry.filename)} does not have the checksum that is stored.")
    return part


def _read_sequence(machine: Machine, storages: Mapping[str, Storage]) -> Any:
    """The content of an older file of ``torch.save``, after the magic number."""
    protocol, system = machine.run(), machine.run()
    if protocol != _PROTOCOL or not isinstance(system, dict):
        raise RefusedError(
            f"has an unsupported version of the older torch.save format. Only version {_PROTOCOL} is supported."
        )
    _check_order(system.get("little_endian") is True)
    content = machine.run()
    for key in machine.run():
        storage = storages[key]
        (count,) = struct.unpack("<q", machine.source.take(8))
        if count != storage.count:
            raise RefusedError(f"holds {count:,} numbers for a storage of {storage.count:,}.")
        values = machine.source.take(storage.size)
        storage.read = lambda values=values: values
    return content


def _check_order(little: bool) -> None:
    if little != (sys.byteorder == "little"):
        raise RefusedError("was written on a machine with another byte order.")


def storage_of_bytes(machine: Machine, data: Any) -> Storage:
    """Stands for ``torch.storage._load_from_bytes``, whose argument is a storage in the older ``torch.save`` format.

    Raises:
        RefusedError: if the bytes hold anything else.
    """
    storages: dict[str, Storage] = {}
    data = data if isinstance(data, memoryview) else memoryview(bytearray(data))  # writable, as torch wants it
    inner = Machine(data, _STORAGES, operations=machine.operations)
    inner.storage = lambda *identifier: _storage(storages, *identifier)
    content = _read_sequence(inner, storages) if inner.run() == _MAGIC else None
    machine.operations = inner.operations
    if not isinstance(content, Storage):
        raise RefusedError("holds a storage whose bytes are not numbers as torch.save writes them.")
    return content
