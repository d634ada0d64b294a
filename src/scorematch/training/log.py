"""The log of a training run, with the loss by noise level."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.core.files import write_whole
from scorematch.core.schema import Field, check
from scorematch.training.levels import Levels
from scorematch.training.steps import Step

CHECK_EVERY = 16  # steps between two checks of the losses, which synchronize with the device
_SLOW_STEP = 0.5  # seconds; longer steps are checked one by one
BINS = 8  # the number of equally probable intervals of noise levels in the log

# The names that the training itself writes into the log.
FIELDS = frozenset({"images", "stage", "lr", "images_per_second", "loss", "loss_by_level", "D/2", "skipped_steps"})

_LINE: Mapping[str, Field] = {  # the values of a line of the log that are read again
    "images": Field(int, required=True, low=0, high=2**62),
    "loss": Field(float),
    "loss_by_level": Field(dict, each=Field(float)),
    "D/2": Field(float),
}


class DivergedError(RuntimeError):
    """A loss or a weight of a training is NaN or infinite."""


# -- The losses of a run ----------------------------------------------------------------------------------------------


class Losses:
    """Collects the losses since the last line of the log by noise level, and detects NaN and infinity.

    Losses stay on the device and are gathered from all processes every ``CHECK_EVERY`` steps, or at every step if steps
    are slow. All processes receive the same numbers at the same step, and therefore make the same decisions.

    Args:
        levels: the distribution of the noise levels in training.
        accelerator: the ``accelerate.Accelerator`` of the run.

    Attributes:
        sums: the sum of the losses in each interval of noise levels.
        counts: the number of the losses in each interval.
        stopping: whether any process had been asked to stop at the last call of ``check``.
        late: whether a checkpoint was due in any process at the last call of ``check``.
        slow: whether the steps of any process are so slow that every step should be checked, so that all processes soon
            agree to stop after a signal. It is True until the first steps have been timed.
    """

    def __init__(self, levels: Levels, accelerator: Any) -> None:
        edges = torch.arange(1, BINS, dtype=torch.float64, device="cpu") / BINS
        self._edges = levels.quantile(edges).float().numpy()
        every = levels.quantile((torch.arange(1024, dtype=torch.float64, device="cpu") + 0.5) / 1024).float().numpy()
        places = self._place(every)
        self._centers = [np.median(every[places == i]) if (places == i).any() else 0.0 for i in range(BINS)]
        self._accelerator = accelerator
        self._waiting: list[tuple[int, int, Tensor, Tensor]] = []
        self._seen: tuple[list[tuple[int, int]], Callable[[], Tensor]] | None = None
        self.sums, self.counts = np.zeros(BINS), np.zeros(BINS)
        self.stopping = self.late = False
        self.slow = True
        self._checked = time.perf_counter()

    def add(self, step: Step) -> None:
        """Adds the losses of a step, without synchronization with the device."""
        self._waiting.append((step.state.step, step.images, step.losses, step.sigma))

    def check(self, stop: bool = False, late: bool = False, *, wait: bool = False) -> None:
        """Evaluates the losses that were added before the previous call, and starts to copy the newer ones.

        Args:
            stop: whether this process was asked to stop.
            late: whether a checkpoint is due in this process.
            wait: whether to evaluate the newer losses too, which synchronizes with the device.

        Raises:
            DivergedError: if a loss was NaN or infinite; the message names the step and the noise level.
        """
        self._receive()
        if self._waiting:
            steps = [(step, images) for step, images, _, _ in self._waiting]
            columns = [[losses, sigma] for _, _, losses, sigma in self._waiting]
            rows = torch.stack([torch.stack(column).float() for column in columns])  # (steps, 2, n)
            now = time.perf_counter()
            slow = now - self._checked > _SLOW_STEP * len(steps)
            self._checked = now
            flags = torch.full((1,), float(stop + 2 * late + 4 * slow), device=rows.device)
            packed = torch.cat([flags, rows.flatten()])
            if self._accelerator.num_processes > 1:
                packed = self._accelerator.gather(packed)
            self._seen = steps, _to_host(packed)
            self._waiting = []
        if wait:
            self._receive()

    def _receive(self) -> None:
        if self._seen is None:
            return
        steps, arrived = self._seen
        self._seen = None
        whole = arrived().view(self._accelerator.num_processes, -1).numpy()
        flags = whole[:, 0].astype(int)
        self.stopping = self.stopping or bool((flags & 1).any())
        self.late = bool((flags & 2).any())
        self.slow = bool((flags & 4).any())
        rows = whole[:, 1:].reshape(len(whole), len(steps), 2, -1).swapaxes(0, 1)  # (steps, processes, 2, n)
        losses, sigma = rows[:, :, 0], rows[:, :, 1]
        wrong = np.argwhere(~np.isfinite(losses))
        if len(wrong):
            k, process, i = (int(index) for index in wrong[0])
            step, images = steps[k]
            raise DivergedError(
                f"the loss became {losses[k, process, i]} at step {step} (image {images:,}), at noise level "
                f"{sigma[k, process, i]:.3g}."
            )
        place = self._place(sigma.ravel())
        self.sums += np.bincount(place, losses.ravel(), BINS)  # float64: practically exact in any order
        self.counts += np.bincount(place, minlength=BINS)

    def _place(self, sigma: np.ndarray) -> np.ndarray:
        """The index of the interval of each noise level; with a schedule of few levels some intervals are empty."""
        return np.searchsorted(self._edges, sigma, side="right")

    def line(self) -> dict[str, Any]:
        """The mean loss since the last line, over all noise levels and in each interval; resets the sums."""
        bins = zip(self._centers, self.sums, self.counts, strict=True)
        line = {
            "loss": float(self.sums.sum() / max(1, self.counts.sum())),
            "loss_by_level": {f"{center:.4g}": float(total / count) for center, total, count in bins if count},
        }
        self.sums, self.counts = np.zeros(BINS), np.zeros(BINS)
        return line


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the CPU; the returned function waits for the copy and returns it."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
        tensor, non_blocking=True
    )
    event = torch.cuda.Event()
    event.record()

    def arrived() -> Tensor:
        event.synchronize()
        return copied

    return arrived


# -- The log ----------------------------------------------------------------------------------------------------------


class Log:
    """A file of JSON lines, each with the number of images seen under the key "images".

    Args:
        path: the path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error  # with the name of the file

    def lines(self) -> list[dict[str, Any]]:
        """All lines. Incomplete lines, which an interruption leaves, and lines of another kind are ignored."""
        found = []
        for text in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError, RecursionError):
                line = json.loads(text)
                check(line, _LINE, "the line")
                found.append(line)
        return found

    def cut(self, images: int) -> None:
        """Removes the lines after the given number of images, for a run that continues from there."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["images"] <= images]
        write_whole(self.path, "".join(kept).encode(), durable=True)


def figures(found: Any) -> dict[str, float | None]:
    """The result of the argument ``evaluate``, with numbers for the log, and None for NaN and infinity."""
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate must return a mapping of names to numbers, got {type(found).__name__}.")
    taken = sorted(FIELDS & found.keys())
    if taken:
        raise ValueError(f"evaluate must not return {', '.join(map(repr, taken))}, which train logs. Rename it.")
    try:
        numbers = {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several values
        raise TypeError(f"evaluate must return numbers: {error}") from error
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN
