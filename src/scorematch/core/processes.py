"""The processes that a launcher such as ``torchrun`` started: rank, number of processes, and their communication."""

from __future__ import annotations

import functools
import itertools
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scorematch.core.arguments import argument
from scorematch.core.files import UNFINISHED
from scorematch.core.records import hash_of


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
    device = local_device(device)
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ValueError(f"{argument('device', name)}: the last CUDA device is cuda:{number - 1}.")
    return device


def local_device(device: torch.device | str) -> torch.device:
    """The device of this process: "cuda" without an index becomes that of LOCAL_RANK, which launchers set.

    ``torchrun`` and ``accelerate launch`` start one process for each device of a machine. With more processes than
    devices, several share one. Every other device is returned unchanged, and so is "cuda" without a launcher.

    Example:
        >>> local_device("cpu")
        device(type='cpu')
    """
    device = torch.device(device)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
    return device


TIMEOUT = timedelta(days=7)  # processes wait for the slowest one, which may have to sample for hours
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
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]  # type: ignore[attr-defined]


@contextmanager
def process_group(device: torch.device | str) -> Iterator[None]:
    """Within this context the processes that ``torchrun`` or ``accelerate launch`` started form a process group.

    If there is one already, or only one process, nothing is done.

    Args:
        device: the device of this process; processes on CUDA devices communicate through NCCL, others through gloo.
    """
    device, (rank, number) = local_device(device), this_process()
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
        timeout=TIMEOUT,
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


# -- Processes that write to one folder -------------------------------------------------------------------------------

CHECK_SECONDS = 0.2  # between two checks of the files of other processes
_FIND_SECONDS = 120.0  # network file systems show new files after up to a minute
_SILENT_SECONDS = 60.0


class SharedFolder:
    """A folder to which several processes write together, which must be the same for all of them.

    The first process writes a file into it, the token, and the others look for it. ``delete_unfinished`` deletes it.

    Args:
        folder: the folder; the first process creates it if it does not exist.
        process: this process.
    """

    def __init__(self, folder: Path, process: Process) -> None:
        # Processes of one launch have the same port. Without a launcher a token of an earlier call may be found.
        launch = hash_of([os.environ.get(name) for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID")])
        self._folder, self._process, self._token = folder, process, folder / f"{UNFINISHED}shared-{launch}"
        self._found, self._began = process.world_size == 1, time.monotonic()
        self._silent_since = self._began
        if process.rank == 0 and not self._found:
            folder.mkdir(parents=True, exist_ok=True)
            self._token.touch()
            self._found = True

    def check(self) -> None:
        """Looks for the token.

        Raises:
            FileNotFoundError: if it has not appeared since the beginning, for two minutes or more.
        """
        self._found = self._found or self._token.exists()
        if not self._found and time.monotonic() > self._began + _FIND_SECONDS:
            raise FileNotFoundError(
                f"process {self._process.rank} does not find the files of the first process in "
                f"{self._folder.resolve()}. Pass a folder on a disk that all processes share."
            )

    def wait(self) -> None:
        """Waits until the token appears; errors are those of ``check``."""
        self.check()
        while not self._found:
            time.sleep(CHECK_SECONDS)
            self.check()

    def waiting(self, ranks: Sequence[int], *, progress: bool) -> None:
        """Warns if the first process waits for others that have made no progress for a minute, and then every minute.

        Args:
            ranks: the processes that are not done.
            progress: whether one of them has made progress since the last call.
        """
        now = time.monotonic()
        if progress:
            self._silent_since = now
        elif self._process.rank == 0 and now > self._silent_since + _SILENT_SECONDS:
            self._silent_since = now
            named = f"{'process' if len(ranks) == 1 else 'processes'} {', '.join(map(str, ranks))}"
            warnings.warn(
                f"{self._folder.resolve()} has got no new files of {named} for {_SILENT_SECONDS:g} seconds; this "
                "process waits for them.",
                stacklevel=3,
            )
