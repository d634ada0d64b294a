"""The ``accelerate.Accelerator`` of a training: created or checked; waiting; and the generators on its device."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from scorematch.core.processes import TIMEOUT

_SILENT_SECONDS = 30.0


def make_accelerator(
    given: Any = None, *, cpu: bool = False, trackers: Sequence[str] = (), folder: str | os.PathLike[str] | None = None
) -> Any:
    """Checks the given accelerator, or creates one.

    Args:
        given: an ``accelerate.Accelerator``; None creates one.
        cpu: whether a new accelerator uses the CPU even if there is a GPU.
        trackers: the names of the trackers of a new accelerator, such as "tensorboard".
        folder: the folder to which trackers write.

    Raises:
        ImportError: without Accelerate, or the package of a tracker.
        ValueError: if the accelerator uses mixed precision, for which there is ``precision=``, or DeepSpeed, FSDP or
            Megatron-LM, or its number of processes is not the number of launched processes.
    """
    if given is None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            raise ImportError('training needs Accelerate: pip install "scorematch[train]".') from error
        # Without a GPU, Accelerate creates a process group only with cpu=True.
        cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no supported trackers are currently installed")  # an error below
            given = Accelerator(
                mixed_precision="no",
                cpu=cpu,
                log_with=list(trackers) or None,
                project_dir=folder,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],  # one process may decode images for hours
            )
        missing = [] if "all" in trackers else [name for name in trackers if name not in map(str, given.log_with)]
        if missing:  # Accelerate would leave it out
            raise ImportError(f"the tracker {missing[0]} is not installed: pip install {missing[0]}.")
    if given.mixed_precision != "no":
        raise ValueError(
            f'accelerator must have mixed_precision="no", got {given.mixed_precision!r}. Write precision="bfloat16" '
            "instead."
        )
    if not given.distributed_type.startswith(("NO", "MULTI")):  # the gradients of the processes would not be averaged
        raise ValueError(
            "the network is trained with DistributedDataParallel, but accelerator uses "
            f"{given.distributed_type.value}. Run accelerate config again, without DeepSpeed, FSDP and Megatron-LM."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != given.num_processes:  # each process would train on its own and write to the same files
        raise ValueError(
            f"{launched} processes were launched, but accelerator has {given.num_processes}. On a CPU write "
            "Accelerator(cpu=True)."
        )
    return given


def wait(accelerator: Any, until: str) -> None:
    """Waits for all processes, and says after half a minute what for, such as "the first process has saved"."""
    text = f"process {accelerator.process_index} of {accelerator.num_processes} waits until {until}."
    timer = threading.Timer(_SILENT_SECONDS, warnings.warn, [text])
    timer.daemon = True
    timer.start()
    try:
        accelerator.wait_for_everyone()
    finally:
        timer.cancel()


@contextmanager
def global_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Restores torch's global generators of the CPU and of the device on exit; yields a function that seeds both."""
    modules = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]
    states = [module.get_rng_state() for module in modules]

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)
        for module in modules[1:]:
            module.manual_seed(value)

    try:
        yield seed
    finally:
        for module, state in zip(modules, states, strict=True):
            module.set_rng_state(state)
