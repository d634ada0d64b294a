"""A whole run: training with files, from which it continues after any interruption.

The folder of a run holds

==================================  ===================================================================================
config.json                         the settings, the versions and the fingerprint of the data
checkpoints/000123456/              all that the run needs to continue, after so many images; the last two are kept
network/                            the latest averaged network, for ``ScoreNet.from_pretrained``
snapshots/000123456-0.050/          averaged networks in half precision, for ``from_pretrained`` and ``reconstruct``
samples/000123456.png               samples from fixed seeds
log.jsonl                           the loss, also by noise level, the learning rate, images per second
report.md, report/                  a summary at the end, with charts
==================================  ===================================================================================

The same call again continues the run. Whether and when it was interrupted does not change its result by a bit, on the
same devices and with the same number of processes and threads.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch import __version__
from scorematch.noise import NoiseSchedule
from scorematch.precision import Autocast
from scorematch.pretrained.configuration import read_json
from scorematch.schema import quote
from scorematch.score import ScoreNet
from scorematch.training import checkpoint
from scorematch.training.data import open_images
from scorematch.training.ema import SNAPSHOTS
from scorematch.training.levels import Levels, Weighting, levels_for
from scorematch.training.report import (
    LOOK_EVERY,
    Log,
    Losses,
    by_level,
    read_examples,
    sample_interval,
    save_samples,
    write_report,
)
from scorematch.training.steps import (
    Data,
    Decay,
    Loss,
    Settings,
    Step,
    Task,
    TrainingState,
    check_arguments,
    global_generators,
    make_accelerator,
    prepare,
    train_steps,
)

# Settings that a run may change when it continues: they change the order of sums, or draws of the same distribution.
_FREE = {"microbatch", "compile"}


def train(
    net: ScoreNet,
    data: Any,
    out: str | os.PathLike[str],
    *,
    images: int = Settings.images,
    batch_size: int = Settings.batch_size,
    microbatch: int | None = None,
    lr: float = Settings.lr,
    betas: tuple[float, float] = Settings.betas,
    eps: float = Settings.eps,
    weight_decay: float = Settings.weight_decay,
    warmup_images: int | None = None,
    decay: Decay = Settings.decay,
    clip: float | None = Settings.clip,
    ema: Sequence[float] = Settings.ema,
    levels: Levels | NoiseSchedule | None = None,
    weighting: Weighting | Callable[[Tensor], Tensor] | None = None,
    p: float = Settings.p,
    loss: Loss | None = None,
    precision: Autocast = Settings.precision,
    flip: bool = Settings.flip,
    label_drop: float = Settings.label_drop,
    condition: Task | None = None,
    seed: int = Settings.seed,
    compile: bool = Settings.compile,  # noqa: A002  (torch's word)
    log_every: int | None = None,
    sample_every: int | None = None,
    snapshot_every: int | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    evaluate: Callable[[ScoreNet, int], Mapping[str, float]] | None = None,
    trackers: Sequence[str] = (),
    push_to_hub: str | None = None,
    progress: bool = True,
    accelerator: Any = None,
) -> ScoreNet:
    """Trains a network on images, and continues where an earlier call was interrupted.

    A call with the same arguments continues the run in ``out``. SIGTERM and Ctrl-C save a checkpoint before the program
    leaves; after SIGKILL or a crash the run continues from the last checkpoint, and ends with the same bits.

    ``accelerate launch`` and ``torchrun`` run the same call on many devices; ``out`` is then on a disk that all nodes
    see. torch's global generators are left as they are.

    Args:
        net: the network to train. Its weights are changed, and moved to the device of the accelerator.
        data: training images: what ``open_images`` takes, or its result. Open large sets with its ``cache``.
        out: the folder of the run, created if it does not exist.
        images: how many images the run sees, counted with repetitions and rounded up to whole batches.
        batch_size: images per step, over all processes together.
        lr: the highest learning rate.
        flip: whether to mirror half of the images. Write False where left and right differ, as for digits.
        seed: of everything random. The initial weights belong to ``net``.

        The optimizer:

        microbatch: the largest number of images that a process computes at once; the gradients of a batch are
            accumulated. None is all.
        betas: of AdamW, as are ``eps`` and ``weight_decay``.
        eps: added to the root of the second moment.
        weight_decay: per step, times the learning rate.
        warmup_images: over which the learning rate rises; None is 500 steps, and at most a twentieth of ``images``.
        decay: of the learning rate: "cosine" and "linear" to zero, "constant", or "inverse-sqrt" (EDM2).
        clip: the largest norm of the gradient, of the loss divided by D/2, which makes it independent of the size of
            the images; None does not clip.
        ema: the averages of the weights: lengths of power functions, relative to the run (EDM2), at most 0.289; or
            decays per step of exponential averages, from 0.9 to 1. The first becomes ``network/``.
        precision: "auto" computes in bfloat16 where the device multiplies it natively; "float32" or "bfloat16".
        compile: whether to compile the backbone with ``torch.compile``.

        The loss:

        levels: the noise levels: a NoiseSchedule, whose levels are drawn equally often; ``LogNormal``,
            ``LogUniform``, or any object with their method ``quantile``. None is EDM's log-normal distribution for the
            row "karras", and the network's own schedule for every other.
        weighting: "sigma" (sigma^p), "backbone" (1 / c_out^p), or a function of sigma (N,). None is "sigma" for the
            row "ncsn" and "backbone" for every other.
        p: the power of the error: 2, or 1 for the L1 loss.
        loss: a function that replaces the denoising loss. It is called as
            ``loss(net, x, sigma=, noise=, condition=, region=)``, the last two only where there are any, and returns
            one value per image (N,), as ``partial(sliced_score_matching_loss, reduction="none")`` does.
        condition: a task that makes the condition from clean images, ``task(x, generator)`` -> the condition, or
            (condition, region), such as those of ``scorematch.palette``. It must draw from the generator alone.
        label_drop: the share of labels that are replaced by the last class of the network, which then means that there
            is no label (classifier-free guidance). The network needs one class more than the data.

        What is written; all counts are images, and events happen at the end of the step that reaches them:

        log_every: between lines of the log; None is a thousandth of ``images``.
        sample_every: between pictures of samples, and calls of ``evaluate``; None is a twentieth, or more where the
            pictures would take more than 2 % of the time.
        snapshot_every: between snapshots, from which ``reconstruct`` makes averages of other lengths; None is a
            twentieth.
        checkpoint_every: between checkpoints; None is a fiftieth, the most that an interruption costs.
        keep: how many checkpoints are kept; two, so that there is another one if the last is damaged.
        evaluate: called as ``evaluate(averaged_net, images)`` on every process; returns numbers for the log.
        trackers: names of trackers of Accelerate, such as "tensorboard", which also receive the log.
        push_to_hub: a repository ``owner/name`` of the Hugging Face Hub, to which the network is uploaded at the end.
        progress: whether to show a progress bar.
        accelerator: an ``accelerate.Accelerator``; None makes one. ``Accelerator(cpu=True)`` trains on the CPU.

    Returns:
        The averaged network in eval mode, as ``from_pretrained(out / "network")`` loads it.

    Raises:
        ImportError: without Accelerate.
        TypeError, ValueError: for arguments that do not fit together, or other settings than those of the run in
            ``out``.
        RuntimeError: if the loss becomes NaN or infinite; the message names the step and the noise level.
        OSError: if a file cannot be written. The last checkpoint is then whole.
        SystemExit: after SIGTERM, with status 143. KeyboardInterrupt: after Ctrl-C.

    Example:
        >>> import tempfile
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     trained = train(net, torch.rand(64, 1, 8, 8), out, images=64, batch_size=32, progress=False)
        >>> trained.training
        False
    """
    settings = Settings(
        images=images,
        batch_size=batch_size,
        microbatch=microbatch,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_images=warmup_images,
        decay=decay,
        clip=clip,
        ema=tuple(ema),
        levels=levels,
        weighting=weighting,
        p=p,
        loss=loss,
        precision=precision,
        flip=flip,
        label_drop=label_drop,
        condition=condition,
        seed=seed,
        compile=compile,
    )
    every = {
        # A thousand points make a chart. Twenty snapshots of two lengths determine averages of lengths from 0.03 to 0.2
        # to 3 % of their profile. A fiftieth of the run is the most that an interruption costs.
        "log": _count("log_every", max(1, images // 1000) if log_every is None else log_every),
        "samples": _count("sample_every", sample_interval(net, images) if sample_every is None else sample_every),
        "snapshot": _count("snapshot_every", max(1, images // 20) if snapshot_every is None else snapshot_every),
        "checkpoint": _count(
            "checkpoint_every", max(1, images // 50) if checkpoint_every is None else checkpoint_every
        ),
    }
    if trackers and accelerator is not None:
        raise ValueError("trackers are for the accelerator that train makes. Write Accelerator(log_with=...).")
    accelerator = make_accelerator(accelerator, trackers=trackers, folder=out)
    if not hasattr(data, "read"):
        data = _open(net, data)
    check_arguments(net, data, settings, accelerator.num_processes)
    run = _Run(Path(out), net, data, settings, every, _count("keep", keep), accelerator)
    if trackers:
        accelerator.init_trackers("scorematch")
    with tqdm(
        total=settings.total,
        initial=run.state.images,
        desc="training",
        unit="img",
        unit_scale=True,
        disable=not (progress and accelerator.is_main_process),
    ) as bar:
        run.loop(evaluate, bar)
    averaged = run.finish()
    if push_to_hub is not None and accelerator.is_main_process:
        averaged.push_to_hub(push_to_hub)
    if trackers:
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    return averaged


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return value


def _open(net: ScoreNet, data: Any) -> Any:
    """The data of a network, with its size and its labels."""
    classes = None if net.conditioning is None else net.conditioning.classes
    shape = net.sample_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        return open_images(data, labels=classes is not None)
    return open_images(data, image_size=(shape[1], shape[2]), channels=shape[0], labels=classes is not None)


# -- One run ----------------------------------------------------------------------------------------------------------


class _Run:
    """A run and its folder."""

    def __init__(
        self,
        out: Path,
        net: ScoreNet,
        data: Data,
        settings: Settings,
        every: dict[str, int],
        keep: int,
        accelerator: Any,
    ) -> None:
        self.out, self.net, self.data, self.settings = out, net, data, settings
        self.every, self.keep, self.accelerator = every, keep, accelerator
        self.main: bool = accelerator.is_main_process
        self.examples = read_examples(data)  # before the thread of the loop reads
        self.log = Log(out / "log.jsonl")
        self.losses = Losses(levels_for(net, settings.levels), accelerator)
        self.config = self._configure()
        self.state = prepare(net, settings, accelerator)
        self.seconds, self.began = 0.0, time.perf_counter()  # of training, up to that moment
        self.saved = 0  # the images of the last checkpoint
        self._continue()

    # -- Begin and end ------------------------------------------------------------------------------------------------

    def _configure(self) -> dict[str, Any]:
        """The content of config.json, written if there is none, and compared otherwise.

        Raises:
            ValueError: if it is of a run with other settings.
        """
        settings = {field.name: _described(getattr(self.settings, field.name)) for field in fields(self.settings)}
        data = {"images": len(self.data), "shape": list(self.data.shape), "fingerprint": self.data.fingerprint}
        config = {"settings": settings, "network": self.net.config, "data": data}
        config["versions"] = _versions(self.accelerator.device)
        path, text = self.out / "config.json", json.dumps(config, indent=2) + "\n"
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                checkpoint.write_whole(path, text.encode())
        self.accelerator.wait_for_everyone()
        before, now = read_json(path), json.loads(text)
        if not {"settings", "network", "data"} <= before.keys():
            raise ValueError(f"{path} is not the configuration of a training run. Pass another folder.")
        differing = [
            f"{key} was {quote(before[part].get(key))} and is {quote(now[part].get(key))}"
            for part in ("settings", "network", "data")
            for key in sorted({*before[part], *now[part]} - _FREE)
            if before[part].get(key) != now[part].get(key)
        ]
        if differing:
            raise ValueError(
                f"{self.out} holds a run with other settings: {'; '.join(differing)}. Pass the settings of that run to "
                "continue it, or another folder."
            )
        return now

    def _continue(self) -> None:
        """Loads the last checkpoint, or writes the first, so that even the initial weights are those of one run."""
        found = checkpoint.latest(self.out / "checkpoints")
        self.accelerator.wait_for_everyone()  # all processes have looked before one writes
        if found is not None:
            state = found.state
            self.state.load(found.parts, found.images, state["step"])
            self.losses.sums[:], self.losses.counts[:] = state["loss_sums"], state["loss_counts"]
            self.seconds, self.saved = state["seconds"], found.images
        if self.main:
            for name in ("", "checkpoints", "network", SNAPSHOTS, "samples", "report"):
                checkpoint.clean(self.out / name)
            self.log.cut(self.state.images)
            if found is not None:
                self._save_network()  # an interruption may have come between the checkpoint and the network
        if found is None:
            self.save()

    def finish(self) -> ScoreNet:
        """Writes the report, and returns the averaged network."""
        averaged = self.state.average()
        if self.main:
            rows = by_level(averaged, self.examples, self.settings)
            write_report(self.out, averaged, self.config, rows, self.seconds)
        return averaged

    # -- The loop -----------------------------------------------------------------------------------------------------

    def loop(self, evaluate: Callable[[ScoreNet, int], Mapping[str, float]] | None, bar: tqdm[NoReturn]) -> None:
        """Trains to the end, or until the program is asked to stop.

        Raises:
            RuntimeError: if the loss or the weights are not finite.
            SystemExit, KeyboardInterrupt: after a signal, when a checkpoint is written.
        """
        steps = train_steps(self.net, self.data, self.settings, state=self.state, accelerator=self.accelerator)
        with _Stop() as stop, closing(steps):
            since = self.state.images, time.perf_counter()
            for step in steps:
                self.losses.add(step)
                # Processes may be asked to stop at different steps, and agree at their common looks.
                stopping = stop.asked if self.accelerator.num_processes == 1 else self.losses.stopping
                due = self._due(step.images)
                if stopping:
                    due.add("checkpoint")
                if due or step.state.step % LOOK_EVERY == 0:
                    self._look(stop.asked, wait=bool(due))
                if "log" in due:
                    now = step.images, time.perf_counter()
                    self._write_line(step, (now[0] - since[0]) / max(now[1] - since[1], 1e-9), bar)
                    since = now
                if "samples" in due:
                    self._show(evaluate)
                if "snapshot" in due:
                    self._save_snapshots()
                if "checkpoint" in due:
                    self.save()
                bar.update(self.settings.batch_size)
                if stopping:
                    self.accelerator.wait_for_everyone()  # the checkpoint is written
                    stop.leave()

    def _due(self, images: int) -> set[str]:
        """What is due at the end of the step that has reached so many images; everything at the end of the run."""
        before, last = images - self.settings.batch_size, images == self.settings.total
        return {name for name, every in self.every.items() if last or images // every > before // every}

    def _look(self, asked: bool, *, wait: bool) -> None:
        try:
            self.losses.look(asked, wait=wait)
            if wait:
                check_weights(self.state)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} The last checkpoint in {self.out} is of image {self.saved:,}. Start again in another folder, "
                "with a lower lr."
            ) from error

    def _write_line(self, step: Step, speed: float, bar: tqdm[NoReturn]) -> None:
        line = self.losses.line()
        text = f"loss {line['loss']:.4g}"
        if self.settings.loss is None and self.settings.p == 2:
            line["D/2"] = math.prod(self.data.shape) / 2
            text += f", D/2 {line['D/2']:g}"
        bar.set_postfix_str(text, refresh=False)
        self._record({"images": step.images, "lr": step.lr, "images_per_second": round(speed, 3), **line})

    def _record(self, line: dict[str, Any]) -> None:
        if self.main:
            self.log.write(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=line["images"])

    def _show(self, evaluate: Callable[[ScoreNet, int], Mapping[str, float]] | None) -> None:
        averaged, images = self.state.average(), self.state.images
        if self.main and _is_image(self.data.shape):
            path = self.out / "samples" / f"{checkpoint.name_of(images)}.png"
            try:
                save_samples(averaged, path, self.examples, self.settings)
            except RuntimeError as error:  # of a network that is not trained enough: the run goes on
                warnings.warn(f"there is no picture of samples at image {images:,}: {error}", stacklevel=2)
        if evaluate is not None:
            with global_generators(self.accelerator.device):
                self._record({"images": images, **evaluate(averaged, images)})

    # -- Files --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint, and the averaged network."""
        now = time.perf_counter()
        self.seconds, self.began = self.seconds + now - self.began, now
        self.saved = self.state.images
        if not self.main:
            return
        values = {
            "step": self.state.step,
            "seconds": self.seconds,
            "processes": self.accelerator.num_processes,
            "loss_sums": self.losses.sums.tolist(),
            "loss_counts": self.losses.counts.tolist(),
        }
        checkpoint.write(self.out / "checkpoints", self.state.images, self.state.tensors(), values, keep=self.keep)
        self._save_network()

    def _save_network(self) -> None:
        self.state.average().save_pretrained(self.out / "network")

    def _save_snapshots(self) -> None:
        if not self.main:
            return
        for average in self.state.averages:
            path = self.out / SNAPSHOTS / f"{checkpoint.name_of(self.state.images)}-{average.name}"
            with checkpoint.new_folder(path) as folder:
                self.state.average(average.length).half().save_pretrained(folder)


class _Stop:
    """SIGTERM and Ctrl-C, kept until the step is finished; a second signal acts at once.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._number = int(signal.SIGTERM)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # others may not have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def leave(self) -> NoReturn:
        """Leaves the program as the signal would."""
        self._restore()
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked, self._number = True, number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


def check_weights(state: TrainingState) -> None:
    """Raises RuntimeError if a weight is NaN or infinite."""
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(list[Tensor](state.parameters), math.inf)])
    if not bool(largest.isfinite().all()):
        name = state.names[int((~largest.isfinite()).nonzero()[0])]
        raise RuntimeError(f"the weight {name} is NaN or infinite at step {state.step} (image {state.images:,}).")


# -- The configuration ------------------------------------------------------------------------------------------------


def _described(value: Any) -> Any:
    """A setting as plain values for JSON, the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(entry) for entry in value]
    if isinstance(value, NoiseSchedule):
        return value.to_dict()
    if isinstance(value, partial):
        given = {"function": _described(value.func), "args": _described(value.args)}
        return {**given, **{key: _described(entry) for key, entry in value.keywords.items()}}
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _versions(device: torch.device) -> dict[str, str]:
    names = ("accelerate", "torch", "safetensors", "numpy")
    return {
        "scorematch": __version__,
        **{name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3)
