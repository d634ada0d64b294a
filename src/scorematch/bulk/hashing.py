"""What a sampler computes, as plain values for JSON: its options, and a hash of its network."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scorematch.noise import NoiseSchedule
from scorematch.sampling import Sampler


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """Returns a hash of the network ("network") and the options of a sampler ("sampler"), as values for JSON."""
    # Attributes that begin with an underscore are derived from the others.
    options = {key: value for key, value in vars(sampler).items() if key[0] != "_" and key != "net"}
    described = {"name": type(sampler).__name__, **{key: _plain(value) for key, value in options.items()}}
    return {"network": identity(sampler.net), "sampler": described}


def _plain(value: Any) -> Any:
    """An option of a sampler as a plain value for JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return list(value) if isinstance(value, NoiseSchedule) else identity(value)


def identity(value: Any) -> str:
    """The type of a score and a hash of its configuration and weights; for a plain function, a hash of its name.

    The scores of this package define by their method ``definition`` what is hashed. Of any other object its attributes
    are hashed, except those that begin with an underscore, of any other module its ``config`` and its weights, and of a
    method the object that it belongs to.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    kind = value if isinstance(value, type | FunctionType) else type(value)
    return f"{kind.__qualname__} {digest.hexdigest()}"


def _parts(value: Any) -> Iterator[Any]:
    """The bytes of everything in a value that changes what it computes; see ``identity``."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype.str} {value.shape}".encode()
        yield value.tobytes()
        return
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        return
    yield f"{type(value).__module__}.{type(value).__qualname__}(".encode()
    if value is None or isinstance(value, bool | int | float | str):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(_parts(entry) for entry in sorted(value.items()))
    elif isinstance(value, list | tuple | NoiseSchedule):
        yield from itertools.chain.from_iterable(_parts(entry) for entry in value)
    elif isinstance(value, functools.partial):
        yield from _parts([value.func, value.args, value.keywords])
    elif isinstance(value, MethodType):
        yield from _parts([value.__func__, value.__self__])
    elif callable(definition := getattr(value, "definition", None)):
        yield from _parts(definition())
    elif isinstance(value, nn.Module):
        yield from _parts([getattr(value, "config", None), dict(value.state_dict())])
    elif hasattr(value, "__dict__"):
        yield from _parts({key: entry for key, entry in vars(value).items() if key[0] != "_"})
    else:
        yield re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()
    yield b")"
