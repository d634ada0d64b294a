"""Random numbers that depend on a generator alone.

Whatever draws in this package takes a ``generator``. Numbers are drawn on the generator's own device and then moved, so
that one seed gives the same numbers whatever device the network is on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# None is torch's global generator; an int is a seed; a sequence holds one of either for each sample.
Generator = torch.Generator | int | Sequence[torch.Generator | int] | None


def as_generator(generator: Any) -> torch.Generator | tuple[torch.Generator, ...] | None:
    """The generators that ``generator`` describes: a seed becomes a new generator on the CPU.

    Raises:
        TypeError: if it is not a ``torch.Generator``, an int, a sequence of these, or None.
    """
    if isinstance(generator, list | tuple):
        return tuple(_one(each) for each in generator)
    return single_generator(generator)


def single_generator(generator: Any) -> torch.Generator | None:
    """The generator that ``generator`` describes, for functions that do not draw sample by sample.

    Raises:
        TypeError: if it is not a ``torch.Generator``, an int or None.
    """
    return None if generator is None else _one(generator)


def _one(generator: Any) -> torch.Generator:
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, int) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(generator)
    raise TypeError(
        f"generator must be a torch.Generator or a seed, got {generator!r}. Write torch.Generator().manual_seed(0)."
    )


def seed_of(*parts: int | str) -> int:
    """A seed, 63 bits, that depends on its parts alone: another one for any other parts.

    With it, random numbers are functions of what they are for, as in ``seed_of(seed, "image", 17)``, and not of what
    was drawn before them.

    Args:
        parts: integers and strings; their order matters, and so does whether 1 or "1" is given.

    Raises:
        TypeError: for a part of another type.

    Example:
        >>> seed_of(0, "image", 17) == seed_of(0, "image", 17), seed_of(0, "image", 17) == seed_of(0, "image", 18)
        (True, False)
    """
    for part in parts:
        if not isinstance(part, int | str):
            raise TypeError(f"the parts of a seed must be integers or strings, got {part!r}.")
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, drawn on the generator's device and then moved to ``device``.

    Args:
        shape: of the result.
        generator: None is torch's global generator of the device; a sequence holds one generator for each entry of the
            first axis.
        device: of the result.
        dtype: of the result.

    Raises:
        ValueError: if a sequence of generators has another length than the first axis.
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def uniform(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers that are uniform in [0, 1), drawn as ``standard_normal`` draws; arguments and errors are the same."""
    return _draw(torch.rand, shape, generator, device, dtype)


def _draw(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"a list of generators must have one entry for each of the {shape[0]} samples, got {len(generator)}."
            )
        sources = {one.device for one in generator}
        source = sources.pop() if len(sources) == 1 else device
        # All images of one source device move together, in one copy.
        drawn = [_draw(function, shape[1:], one, source, dtype) for one in generator]
        return torch.stack(drawn).to(device)
    source = device if generator is None else generator.device
    return function(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
