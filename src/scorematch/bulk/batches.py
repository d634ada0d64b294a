"""The batches of a job, and which of them each process draws."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Share: TypeAlias = tuple[int, int]


class Batch(NamedTuple):
    """One batch of samples.

    Attributes:
        indices: the numbers of the images.
        images: the images (len(indices), ...), float32, on the device of the network.
        classes: their classes, int64 (len(indices),), on the CPU; None without classes.
    """

    indices: range
    images: Tensor
    classes: Tensor | None


def this_process() -> Share:
    """The number of this process and the number of all processes, (0, 1) for a single one.

    They are those of ``torch.distributed`` if it is initialized, else those in the environment variables RANK and
    WORLD_SIZE, which ``torchrun`` and ``accelerate launch`` set.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def checked_share(share: Share | None) -> Share:
    """The share (k, m); that of this process for None.

    Raises:
        ValueError: if it is not (k, m) with 0 <= k < m.
    """
    if share is None:
        return this_process()
    k, m = share
    if not 0 <= k < m:
        raise ValueError(f"share must be (k, m) with 0 <= k < m, got {share!r}.")
    return k, m


def ranges(n: int, batch_size: int, share: Share, *, first: int = 0) -> Iterator[range]:
    """The numbers of the images in each batch of the share (k, m): the batches k, k + m, k + 2 m, ...

    Args:
        n: the number of images.
        batch_size: the number of images in a batch. Batches begin at its multiples.
        share: (k, m).
        first: the number of the first image.
    """
    k, m = share
    begin, end = first // batch_size, -(-(first + n) // batch_size)
    return (range(max(first, b * batch_size), min(first + n, (b + 1) * batch_size)) for b in range(begin + k, end, m))
