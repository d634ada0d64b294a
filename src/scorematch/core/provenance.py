"""Provenance: the versions of packages, and a hash of any object that tells two apart."""

from __future__ import annotations

import functools
import hashlib
import itertools
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib import metadata
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from scorematch.core.precision import device_name

__version__ = "0.1.0"
_T = TypeVar("_T", covariant=True)


class Entries(Iterable[_T]):
    """The base class of objects whose identity is that of their entries, as for a list."""


def identity(value: Any) -> str:
    """The type of a score and a hash of its configuration and weights; for a function, a hash of its code.

    The scores of this package define by their method ``definition`` what is hashed. For any other object, the hash
    covers its attributes, except those that begin with an underscore; for any other module, its ``config`` and its
    weights; for a method, the object that it belongs to. For a plain function, it covers the code as the running
    version of Python compiles it, the defaults of its arguments, and the variables of enclosing functions that it uses.
    Global variables enter the hash by their names only.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    kind = value if isinstance(value, type | FunctionType) else type(value)
    return f"{kind.__qualname__} {digest.hexdigest()}"


def _parts(value: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """The bytes of everything in a value that changes what it computes; see ``identity``.

    ``within`` has the ids of the values that this one is a part of. A value that is a part of itself is not repeated.
    """
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()
        return
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:  # the repr depends on NumPy's version
        yield f"{value.dtype.str} {value.shape}".encode()
        yield value.tobytes()
        return
    if isinstance(value, ModuleType):
        yield value.__name__.encode()
        return
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        bound = isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, type | ModuleType | None)
        if not (bound or isinstance(value, FunctionType)):
            return
    if id(value) in within:
        return
    nested = functools.partial(_parts, within=(*within, id(value)))
    yield f"{type(value).__module__}.{type(value).__qualname__}(".encode()
    if value is None or isinstance(value, bool | int | float | str):
        yield repr(value).encode()
    elif isinstance(value, Enum):
        yield from nested([value.name, value.value])
    elif isinstance(value, Mapping):
        yield from nested(sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, set | frozenset):
        yield from nested(sorted(value, key=repr))
    elif isinstance(value, list | tuple | Entries):
        yield from itertools.chain.from_iterable(nested(entry) for entry in value)
    elif isinstance(value, functools.partial):
        yield from nested([value.func, value.args, value.keywords])
    elif isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        yield from nested([value.__code__, value.__defaults__, value.__kwdefaults__, cells])
    elif isinstance(value, CodeType):
        yield value.co_code
        yield from nested([value.co_names, value.co_consts])
    elif isinstance(value, BuiltinFunctionType):  # of an object, such as the method ``get`` of a dict
        yield from nested([value.__self__])
    elif isinstance(value, MethodType):
        yield from nested([value.__func__, value.__self__])
    elif callable(definition := getattr(value, "definition", None)):
        yield from nested(definition())
    elif isinstance(value, nn.Module):
        yield from nested([getattr(value, "config", None), dict(value.state_dict())])
    elif (attributes := _attributes(value)) or hasattr(value, "__dict__"):
        yield from nested(attributes)
    else:
        yield re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()
    yield b")"


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object without those that begin with an underscore, also those of ``__slots__``."""
    slots = itertools.chain.from_iterable(vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    # The function of functools.lru_cache is in __wrapped__.
    return {name: each for name, each in found.items() if name[0] != "_" or name == "__wrapped__"}


def _content(cell: Any) -> Any:
    """The value of a variable of an enclosing function; None if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def versions(device: torch.device | str, *packages: str) -> dict[str, str]:
    """The versions of Python and of packages, and the device, on all of which the rounding of results depends.

    Args:
        device: the device.
        packages: the names of packages besides scorematch and torch.
    """
    return {
        "scorematch": __version__,
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in packages},
        "device": device_name(torch.device(device)),
    }
