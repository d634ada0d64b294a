"""Random numbers that depend on the generator only, not on the device of the network.

Every function of this package that draws random numbers takes a ``generator``. Numbers are drawn on the generator's
device and then moved, so that a seed gives the same numbers for a network on any device. The copy to a CUDA device does
not wait for the device: the host draws the noise of a step while the device computes the step before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scorematch.core.messages import quote

# None is torch's global generator, an int a seed; a sequence holds a generator or a seed for each sample.
Generator = torch.Generator | int | Sequence[torch.Generator | int] | None


def as_generator(generator: Any) -> torch.Generator | tuple[torch.Generator, ...] | None:
    """Converts the argument ``generator`` of a function: each seed becomes a new generator on the CPU.

    Returns:
        A generator; a tuple of generators for a list or tuple; None for None.

    Raises:
        TypeError: if it is not a ``torch.Generator``, an int, a list or tuple of these, or None.
    """
    if isinstance(generator, list | tuple):
        return tuple(_one(each) for each in generator)
    return single_generator(generator)


def single_generator(generator: Any) -> torch.Generator | None:
    """As ``as_generator``, for functions that take one generator for all samples.

    Raises:
        TypeError: if it is not a ``torch.Generator``, an int or None.
    """
    return None if generator is None else _one(generator)


def _one(generator: Any) -> torch.Generator:
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, int) and not isinstance(generator, bool):
        if not -(2**63) <= generator < 2**64:
            raise ValueError(f"a seed must have at most 64 bits, got {quote(generator)}.")
        return torch.Generator().manual_seed(generator)
    raise TypeError(
        f"generator must be a torch.Generator or a seed, got {generator!r}. Write torch.Generator().manual_seed(0), or "
        "int(seed)."
    )


def seed_of(*parts: int | str) -> int:
    """Derives a seed of 63 bits from integers and strings by hashing; other parts give another seed.

    Random numbers from a generator with such a seed depend on their purpose, as in ``seed_of(seed, "image", 17)``, and
    not on the numbers drawn before. torch's generator of the CPU uses only the low 32 bits of its seed, so that among
    many thousands of such generators two may be equal.

    Args:
        parts: integers and strings. Their order and their type matter: 1 and "1" give different seeds.

    Raises:
        TypeError: if a part is neither an integer nor a string.

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
        shape: the shape of the result.
        generator: a generator; None is torch's global generator of ``device``; a sequence holds one generator for each
            entry of the first axis.
        device: the device of the result.
        dtype: the dtype of the result.

    Raises:
        ValueError: if the length of a sequence of generators is not ``shape[0]``.
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def uniform(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform random numbers in [0, 1); arguments and errors are those of ``standard_normal``."""
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
        # If all generators are on one device, the samples are moved in a single copy.
        drawn = torch.stack([_draw(function, shape[1:], one, source, dtype) for one in generator])
    else:
        source = device if generator is None else generator.device
        drawn = function(tuple(shape), generator=generator, device=source, dtype=dtype)
    if source.type == "cpu" and device.type == "cuda":  # on MPS memory that is not waited for could be freed too early
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)
