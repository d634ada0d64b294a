"""Reads pickles of tensors without executing them.

A pickle is a program: it can import and call any function of any library. This module interprets only the part of the
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
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from scorematch.core.messages import quote
from scorematch.pretrained.configuration import remedy

Globals = Mapping[str, Callable[..., Any] | torch.dtype]

_OPERATIONS = 1_000_000  # of all pickles in a file together; the largest published files need about 150,000
_LONGEST_INTEGER = 32  # bytes
_LONGEST_LINE = 256  # bytes of the name of a module or of a function
_INFLATION = 50  # the largest ratio of unpacked size to file size; trained weights have about 1.1
_DIMENSIONS = 16
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


class RefusedError(ValueError):
    """Raised for a file that cannot be read; the message is the end of a sentence that begins with the path."""


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
    machine = _Machine(data, TENSORS if known is None else known)
    try:
        return Pickle(_read(path, machine), frozenset(machine.used))
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from error
    except _DAMAGED as error:
        kind = f"{path.suffix[1:]} file" if path.suffix else "checkpoint"
        raise ValueError(f"{path} ({len(data)} bytes) is not a complete {kind}. {remedy(path)}") from error


def _read(path: Path, machine: _Machine) -> Any:
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
    """Returns the storage that a persistent id describes."""
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


def _read_zip(path: Path, machine: _Machine) -> Any:
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
    machine.source = _Source(_entry(data, entries[f"{root}data.pkl"], checksums))
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


def _read_sequence(machine: _Machine, storages: Mapping[str, Storage]) -> Any:
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


def storage_of_bytes(machine: _Machine, data: Any) -> Storage:
    """Stands for ``torch.storage._load_from_bytes``, whose argument is a storage in the older ``torch.save`` format.

    Raises:
        RefusedError: if the bytes hold anything else.
    """
    storages: dict[str, Storage] = {}
    data = data if isinstance(data, memoryview) else memoryview(bytearray(data))  # writable, as torch wants it
    inner = _Machine(data, _STORAGES, operations=machine.operations)
    inner.storage = lambda *identifier: _storage(storages, *identifier)
    content = _read_sequence(inner, storages) if inner.run() == _MAGIC else None
    machine.operations = inner.operations
    if not isinstance(content, Storage):
        raise RefusedError("holds a storage whose bytes are not numbers as torch.save writes them.")
    return content


# -- The interpreter --------------------------------------------------------------------------------------------------

_MARK = object()  # marks the start of a list of values on the stack
# Operations by their names in ``pickletools``. The first ones add their argument to the stack.
_ARGUMENTS = {
    *("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "LONG4"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("SHORT_BINSTRING", "BINSTRING"),  # of Python 2
}
_CONSTANTS = {"MARK": _MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Source:
    """The bytes of a file, as ``pickletools`` reads them; long parts are views."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> memoryview:
        """Reads the next ``count`` bytes."""
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise EOFError
        self.position += count
        return part

    def read(self, count: int) -> Any:
        part = self.take(count)
        return part if count > _LONGEST_LINE else bytes(part)

    def readline(self) -> bytes:
        line, end, _ = bytes(self.data[self.position : self.position + _LONGEST_LINE]).partition(b"\n")
        if not end or b"\\" in line:  # a name has no backslash, about which Python may warn
            raise EOFError
        self.position += len(line) + 1
        return line + end


class _Machine:
    """An interpreter of pickles of protocols 2 to 5 that contain only plain values and known names.

    Python's ``Unpickler`` with a ``find_class`` that knows these names would not be safe: it takes any key of a dict,
    and the hash of nested tuples takes exponential time or overflows the stack of the process; it allocates memory for
    any index into its memo; and it copies the bytes of tensors.

    Args:
        data: one or more pickles in sequence, which other data may follow.
        known: the known names, each with the function or dtype that replaces it.
        operations: the number of earlier operations that count toward the limit.

    Attributes:
        storage: a function that returns the storage of a persistent id; None does not allow persistent ids.
        used: the known names that occurred so far.
    """

    def __init__(self, data: memoryview, known: Globals, operations: int = 0) -> None:
        self.source, self.known, self.operations = _Source(data), known, operations
        self.storage: Callable[..., Storage] | None = None
        self.used: set[str] = set()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Reads the next pickle and returns its value."""
        self.stack, self.memo = [], {}
        for operation, argument, _ in pickletools.genops(cast(IO[bytes], self.source)):
            self.operations += 1
            if self.operations > _OPERATIONS:
                raise RefusedError(
                    f"holds a pickle of more than {_OPERATIONS:,} operations, which weights do not need."
                )
            self._add(operation.name, argument)
        (value,) = self.stack
        return value

    def _add(self, name: str, argument: Any) -> None:
        """Carries out an operation that adds a value to the stack, and passes all others to ``_change``."""
        stack = self.stack
        if name in _ARGUMENTS:
            if isinstance(argument, int) and argument.bit_length() > 8 * _LONGEST_INTEGER:
                raise RefusedError(f"holds an integer of more than {_LONGEST_INTEGER} bytes.")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._named(*self._last(2)))
        elif name in _TUPLES:
            stack.append(tuple(self._last(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(*self._last(2)))
        elif name == "BINPERSID" and self.storage is not None:
            stack.append(self.storage(*_typed(tuple, stack.pop())))
        else:
            self._change(name, argument)

    def _change(self, name: str, argument: Any) -> None:
        """Carries out an operation on the last value of the stack."""
        stack = self.stack
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("APPEND", "APPENDS"):
            values = self._last(1) if name == "APPEND" else self._marked()
            _typed(list, stack[-1]).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._last(2) if name == "SETITEM" else self._marked()
            _typed(dict, stack[-1]).update(zip(map(_key, values[::2]), values[1::2], strict=True))
        elif name == "ADDITEMS":
            values = self._marked()
            _typed(set, stack[-1]).update(map(_key, values))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], dict):  # the attributes of an OrderedDict are versions of modules
                stack[-1].set_state(state)
        elif name == "POP":
            stack.pop()
        elif name == "PROTO" and not 2 <= argument <= 5:
            raise RefusedError(f"holds a pickle of protocol {argument}, which is not supported.")
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(
                f"holds a pickle with the operation {name}, which weights do not need; it was not loaded."
            )

    def _last(self, count: int) -> list[Any]:
        """Takes the last values from the stack."""
        if count > len(self.stack):
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """Takes the values after the last mark, and the mark, from the stack."""
        i = len(self.stack) - 1
        while self.stack[i] is not _MARK:  # IndexError if there is no mark
            i -= 1
        return self._last(len(self.stack) - i)[1:]

    def _call(self, function: Any, arguments: Any) -> Any:
        if not callable(function):
            raise RefusedError(f"holds a damaged pickle: expected function, got {type(function).__name__}.")
        first = (self,) if function is storage_of_bytes else ()
        return function(*first, *_typed(tuple, arguments))

    def _named(self, module: Any, name: Any) -> Any:
        full = f"{_typed(str, module)}.{_typed(str, name)}"
        if full not in self.known:
            raise RefusedError(
                f"refers to {quote(full)}, which weights do not need; it was not loaded, because a pickle can run code."
            )
        self.used.add(full)
        return self.known[full]


def _typed(kind: type, value: Any) -> Any:
    """Returns a value after checking that it is exactly of a type."""
    if type(value) is not kind:
        raise RefusedError(f"holds a damaged pickle: expected {kind.__name__}, got {type(value).__name__}.")
    return value


def _key(key: Any) -> Any:
    """Returns a key of a dict after checking that it is a string, an integer below 2^63 in size, or None."""
    if not isinstance(key, str | int | None) or (isinstance(key, int) and abs(key) >= 2**63):
        raise RefusedError("holds a dict with a key that is not a string, None, or an integer below 2^63.")
    return key
