"""An interpreter of the part of the pickle language that describes plain values and tensors.

``pickletools`` of the standard library reads the operations and runs nothing. ``Machine`` carries out those that are
listed here, with the functions of this package in place of the names in the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import torch

from scorematch.core.messages import quote

Globals = Mapping[str, Callable[..., Any] | torch.dtype]

_OPERATIONS = 1_000_000  # of all pickles in a file together; the largest published files need about 150,000
_LONGEST_INTEGER = 32  # bytes
_LONGEST_LINE = 256  # bytes of the name of a module or of a function

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


class RefusedError(ValueError):
    """Raised for a file that cannot be read; the message is the end of a sentence that begins with the path."""


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


class Machine:
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
        self.known, self.operations = known, operations
        self.open(data)
        self.storage: Callable[..., Any] | None = None
        self.used: set[str] = set()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def open(self, data: memoryview) -> None:
        """Reads from other bytes, from now on."""
        self.source = _Source(data)

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
        return function(*_typed(tuple, arguments))

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
