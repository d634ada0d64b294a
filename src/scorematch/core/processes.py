"""The processes that a launcher such as ``torchrun`` started: rank, number of processes, and their communication."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scorematch.core.arguments import argument


class Process(NamedTuple):
    """One of several processes that share the work.

    Attributes:
        rank: its number, from 0.
        world_size: the number of processes.
    """

    rank: int
    world_size: int


def this_process() -> Process:
    """The rank of this process and the number of processes, (0, 1) for a single one.

    They are those of ``torch.distributed`` if it is initialized, else those in the environment variables RANK and
    WORLD_SIZE, which ``torchrun`` and ``accelerate launch`` set.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Process(torch.distributed.get_rank(), torch.distributed.get_world_size())
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Process(0, 1)


def checked_process(process: tuple[int, int] | None) -> Process:
    """The argument ``process`` of a function; this process for None.

    Raises:
        ValueError: if it is not (rank, world size) with 0 <= rank < world size.
    """
    if process is None:
        return this_process()
    rank, number = process
    if not 0 <= rank < number:
        raise ValueError(
            f"{argument('process')} must be (rank, world size) with 0 <= rank < world size, got ({rank}, {number})."
        )
    return Process(rank, number)


def find_device(name: str = "auto") -> torch.device:
    """The device of this process; "auto" is CUDA if available, else MPS if available, else the CPU.

    "cuda" is another device for each process that ``torchrun`` or ``accelerate launch`` started on one machine.

    Raises:
        ValueError: for an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"{argument('device')} must be auto, cpu, cuda, cuda:N or mps, got {name!r}.")
    device, number = torch.device(name), torch.cuda.device_count()
    if not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[device.type].is_available():
        raise ValueError(
            f"{argument('device', name)}: PyTorch finds no {device.type.upper()} device. Leave out "
            f"{argument('device')}."
        )
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % number)
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ValueError(f"{argument('device', name)}: the last CUDA device is cuda:{number - 1}.")
    return device


_TIMEOUT = timedelta(days=7)  # processes wait for the slowest one, which may have to sample for hours
_GROUPS = itertools.count()


def group_process() -> Process:
    """The rank of this process in ``torch.distributed`` and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    return Process(0, 1)


def world_size() -> int:
    """The number of processes in ``torch.distributed``; 1 without a process group."""
    return group_process().world_size


@functools.cache
def _store() -> Any:
    """The store of the launcher, with which processes find each other."""
    return next(dist.rendezvous("env://", timeout=_TIMEOUT))[0]  # type: ignore[attr-defined]


@contextmanager
def process_group(device: torch.device | str) -> Iterator[None]:
    """Within this context the processes that ``torchrun`` or ``accelerate launch`` started form a process group.

    If there is one already, or only one process, nothing is done.

    Args:
        device: the device of this process; processes on CUDA devices communicate through NCCL, others through gloo.
    """
    device, (rank, number) = torch.device(device), this_process()
    if number == 1 or world_size() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        # A prefix for each group: a process that is ahead would find the addresses of the group before, and wait.
        store=dist.PrefixStore(f"scorematch {next(_GROUPS)}", _store()),  # type: ignore[attr-defined]
        rank=rank,
        world_size=number,
        timeout=_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks; every process must call it. Tensors are on the CPU."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found
