"""``train``: a training run that writes its results and checkpoints to a folder, and continues after an interruption.

The folder of a run contains

==================================  ===================================================================================
config.json                         the settings, the versions and the fingerprint of the data
checkpoints/000123456/              the state of the run after 123,456 images; the last two are kept
network/                            the latest averaged network, for ``ScoreNet.from_pretrained``
snapshots/000123456-0.050/          averaged networks, for ``from_pretrained`` and ``reconstruct``; weights that are
                                    trained are in half precision
samples/000123456.png               samples from fixed seeds
log.jsonl                           the loss, the loss by noise level, the learning rate, and images per second
report.md, report/                  a summary with charts, written at the end
==================================  ===================================================================================

The same call continues an interrupted run. On the same devices, with the same number of processes and threads, the
result is bitwise the same as without interruption.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_count
from scorematch.core.files import check_outside, check_own, delete_unfinished, exclusive_lock, write_whole
from scorematch.core.json_files import read_object
from scorematch.core.messages import quote, reason
from scorematch.core.precision import Autocast
from scorematch.core.provenance import versions
from scorematch.core.schema import Field, check
from scorematch.data.cache import ImageData, open_images
from scorematch.data.pictures import is_picture
from scorematch.noise import NoiseSchedule
from scorematch.pretrained import load, locate
from scorematch.pretrained.hub import check_login, check_repository
from scorematch.pretrained.weights import fill
from scorematch.score import ScoreNet
from scorematch.training import checkpoint
from scorematch.training.ema import SNAPSHOTS
from scorematch.training.levels import Levels, Weighting, levels_for
from scorematch.training.report import (
    BINS,
    CHECK_EVERY,
    FIELDS,
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
    check_network,
    global_generators,
    make_accelerator,
    prepare,
    train_steps,
)

# The subfolders of the folder of a run.
_FOLDERS = ("checkpoints", "network", SNAPSHOTS, "samples", "report")
# Settings that may change when a run continues: the distribution of its result does not depend on them.
_FREE = {"microbatch", "compile", "sampler_settings", "class_names"}
# The parts of config.json that must not change.
_CONFIG = dict.fromkeys(("settings", "network", "data"), Field(dict, required=True))
# The values of a checkpoint.
_STATE: Mapping[str, Field] = {
    "step": Field(int, required=True, low=0, high=2**62),
    "seconds": Field(float, required=True, low=0),
    "loss_sums": Field(list, required=True, low=BINS, high=BINS, each=Field(float)),
    "loss_counts": Field(list, required=True, low=BINS, high=BINS, each=Field(float, low=0)),
}
# The keys in which the configurations of ``net`` and ``start`` may differ.
_FREE_OF_START = {"sample_shape", "sampler_settings", "class_names"}
# The most differences of a network that an error lists.
_FEW = 2
# The default time between two checkpoints. The lost time is least at sqrt(2 c m), where c is the time that a checkpoint
# takes, and m the mean time between two interruptions (Young 1974, A First Order Approximation to the Optimum
# Checkpoint Interval): ten minutes for two seconds, which a checkpoint of 16 million parameters takes, and one day.
_CHECKPOINT_SECONDS = 600


def train(
    net: ScoreNet,
    data: Any,
    out: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
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
    """Trains a network on images; a call with the same arguments continues an interrupted run in ``out``.

    On SIGTERM and Ctrl-C a checkpoint is saved before the program exits. After SIGKILL or a crash the run continues
    from the last checkpoint, with the same result, bit by bit.

    To train on several devices, start the same program with ``accelerate launch`` or ``torchrun``; all nodes must have
    access to ``out``. The state of torch's global generators is not changed.

    Args:
        net: the network to train. Its weights are changed, and moved to the device of the accelerator.
        data: the training data, as for ``open_images``, or its result. For large sets call ``open_images`` with a
            ``cache``.
        out: the folder of the run, created if it does not exist.
        start: a trained network, a name or a folder as for ``ScoreNet.from_pretrained``. A new run begins with its
            weights, and with a new optimizer. It must be the same network as ``net``, except for the size of the
            images, the sampler settings and the names of the classes; or ``net`` is larger, and both have the same
            output at first (Chen et al., 2016, arXiv:1511.05641): it may take a conditioning image or more channels of
            it, and a U-Net of DDPM may have more ``layers_per_block`` at some or all scales, ``attention`` at more
            scales, more ``pixel_layers``, and up to 64 ``pixel_channels`` instead of fewer. None begins with the
            weights of ``net``.
        images: the length of the run in images, counted with repetitions and rounded up to whole batches.
        batch_size: the number of images per step, over all processes together.
        lr: the largest learning rate.
        flip: whether to mirror each image left to right with probability 1/2. Write False for images whose mirror
            images are not valid, such as digits.
        seed: the seed of all random numbers, except those of the initial weights of ``net``.

        The optimizer:

        microbatch: the largest number of images that a process computes at once; gradients are accumulated over a
            batch. None is the whole batch.
        betas: the decay rates of AdamW's first and second moments, each at least 0 and below 1.
        eps: AdamW's eps, which is added to the root of the second moment.
        weight_decay: AdamW's decoupled weight decay; each step multiplies the weights by 1 - lr * weight_decay.
        warmup_images: the number of images over which the learning rate rises linearly; None is 500 steps, but at most
            a twentieth of ``images``.
        decay: the decay of the learning rate: "cosine" or "linear" to zero, "constant", or "inverse-sqrt" (EDM2).
        clip: the largest norm of the gradient of the loss divided by D/2, where D is the number of values in an image;
            larger gradients are scaled down. None does not clip.
        ema: the averages of the weights: lengths of power function averages, relative to the run (EDM2), above 0 and at
            most 0.289; or decays per step of exponential averages, from 0.9 to below 1. The first is saved as
            ``network/``.
        precision: "bfloat16" computes under autocast to bfloat16, "float32" does not; "auto" is "bfloat16" if the
            device multiplies bfloat16 natively.
        compile: whether to compile the backbone with ``torch.compile``. Losses with second derivatives, such as sliced
            score matching, cannot be compiled.

        The loss:

        levels: the noise levels: a NoiseSchedule, whose levels are drawn equally often; ``LogNormal``,
            ``LogUniform``, ``UniformTime``, a ``Mixture`` of these, or any object with their method ``quantile``. None
            is EDM's log-normal distribution for the preconditioning "karras", and the network's own schedule for every
            other.
        weighting: the weighting of the loss by noise level (``scorematch.training.levels``): "sigma" (sigma^p),
            "backbone" (1 / abs(c_out)^p), or a function of sigma (N,). None is "sigma" for the preconditioning "ncsn"
            and "backbone" for every other.
        p: the power of the error, at least 1: 2, or 1 for the L1 loss.
        loss: a function that replaces the denoising loss. It is called as
            ``loss(net, x, sigma=, noise=, condition=, region=)``, where the last two are omitted if there are none, and
            returns one value per image (N,), such as ``partial(sliced_score_matching_loss, reduction="none")``.
        condition: a task that computes the condition from clean images, such as those of
            ``scorematch.restoration.palette``: ``task(x, generator)`` returns the condition, or (condition, region).
            All its random numbers must be drawn from the generator.
        label_drop: the fraction of labels that are replaced by the null class of the network, at least 0 and below 1,
            for classifier-free guidance (``scorematch.guidance``). Such a network is built with
            ``ScoreNet.unet(classes=..., null_class=True)``.

        Output:

        log_every: the interval of lines in the log; None is a thousandth of ``images``. All intervals are numbers of
            images, and an action takes place at the end of the step that reaches its interval.
        sample_every: the interval of sample images and of calls of ``evaluate``; None is a twentieth of ``images``, or
            more, so that sampling takes at most 2 % of the time.
        snapshot_every: the interval of snapshots, from which ``reconstruct`` computes averages of other lengths; None
            is a twentieth of ``images``.
        checkpoint_every: the interval of checkpoints, the most that an interruption can cost; None saves one every
            ten minutes instead, whatever the number of images. The result does not depend on it.
        keep: the number of checkpoints to keep; with two, one is left if the last is damaged.
        evaluate: a function that is called as ``evaluate(averaged_net, images)`` on every process, and returns a
            mapping of numbers for the log, where NaN and infinity become null.
        trackers: the names of trackers of Accelerate, such as "tensorboard", which also receive the log.
        push_to_hub: a repository ``owner/name`` of the Hugging Face Hub, to which the network is uploaded at the end.
        progress: whether to show a progress bar.
        accelerator: an ``accelerate.Accelerator``; None creates one. ``Accelerator(cpu=True)`` trains on the CPU.

    Returns:
        The averaged network in eval mode, the same that is saved in ``out / "network"``.

    Raises:
        ImportError: without Accelerate, or the package of a tracker.
        FileNotFoundError: if there is no network ``start``.
        TypeError, ValueError: if arguments do not fit together, the settings differ from those of the run in ``out``,
            its files are damaged, or the network ``start`` differs from ``net``.
        RuntimeError: if the loss becomes NaN or infinite; the message names the step and the noise level.
        PermissionError: if ``push_to_hub`` is given, and there is no token of the Hub.
        OSError: if a file cannot be written, another process is training in ``out``, ``out`` is a file or has files of
            other programs with the names of results, or the upload fails. The last checkpoint is not affected.
        SystemExit: after SIGTERM, with status 143. KeyboardInterrupt: after Ctrl-C.

    Example:
        >>> import tempfile
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     trained = train(net, torch.rand(64, 1, 8, 8), out, images=64, batch_size=32, progress=False)
        >>> trained.training
        False
    """
    check_network(net)
    out = Path(out).expanduser()
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
        ema=ema,
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
    every: dict[str, int | None] = {
        # A thousand points are enough for a chart. With twenty snapshots of two lengths, the profiles of averages of
        # lengths from 0.03 to 0.2 are reconstructed with an error of 3 %.
        "log": max(1, images // 1000) if log_every is None else log_every,
        "sample": sample_interval(net, images) if sample_every is None else sample_every,
        "snapshot": max(1, images // 20) if snapshot_every is None else snapshot_every,
        "checkpoint": checkpoint_every,
    }
    every = {name: None if value is None else check_count(f"{name}_every", value) for name, value in every.items()}
    keep = check_count("keep", keep)
    if isinstance(trackers, str):
        raise TypeError(f'trackers must be a list of names, got {trackers!r}. Write ["{trackers}"].')
    if trackers and accelerator is not None:
        raise ValueError("trackers and accelerator cannot both be given. Write Accelerator(log_with=...).")
    check_outside(out, data)
    check_results(out)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    accelerator = make_accelerator(accelerator, trackers=trackers, folder=out)
    if push_to_hub is not None and accelerator.is_main_process:
        check_login()
    if not hasattr(data, "read"):
        data = _open(net, data)
    check_arguments(net, data, settings, accelerator.num_processes)
    _name_classes(net, data)
    with ExitStack() as stack:
        run = _Run(out, net, data, settings, start, every, keep, accelerator, stack)
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
        try:
            averaged.push_to_hub(push_to_hub)
        except OSError as error:
            raise OSError(
                f"the run is complete, and its network is in {out / 'network'}, but it was not uploaded: "
                f"{reason(error)}. Start the same run again to repeat the upload only."
            ) from error
    if trackers:
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    return averaged


def _open(net: ScoreNet, data: Any) -> ImageData:
    """Opens data with the image size, channels and range of the network, and with labels if it has classes."""
    labels = net.conditioning is not None and net.conditioning.classes is not None
    shape = net.sample_shape
    if shape is None or not is_picture(shape):
        return open_images(data, labels=labels, value_range=net.value_range)
    size = shape[1], shape[2]
    return open_images(data, image_size=size, channels=shape[0], labels=labels, value_range=net.value_range)


def _name_classes(net: ScoreNet, data: Data) -> None:
    """Gives the network the names of the classes of the data, if these are not the numbers of the classes."""
    names, takes = getattr(data, "classes", None), net.conditioning
    if takes is None or names is None or len(names) != takes.classes or list(names) == [*map(str, range(len(names)))]:
        return
    net.class_names = names


# -- One run ----------------------------------------------------------------------------------------------------------


class _Run:
    """A run and its folder, which is locked until ``stack`` is closed."""

    def __init__(
        self,
        out: Path,
        net: ScoreNet,
        data: Data,
        settings: Settings,
        start: str | os.PathLike[str] | None,
        every: dict[str, int | None],
        keep: int,
        accelerator: Any,
        stack: ExitStack,
    ) -> None:
        self.out, self.net, self.data, self.settings = out, net, data, settings
        self.every, self.keep, self.accelerator = every, keep, accelerator
        self.main: bool = accelerator.is_main_process
        self.examples = read_examples(data)  # before the data are read in another thread
        self.log = Log(out / "log.jsonl")
        self.losses = Losses(levels_for(net, settings.levels), accelerator)
        found = checkpoint.latest(out / "checkpoints", _STATE)
        if found is None and start is not None:
            with accelerator.main_process_first():  # the other processes then find a download in the cache
                _begin_with(net, start)
        self.config = self._configure(start)
        if self.main:
            self._lock(stack)
        self.state = prepare(net, settings, accelerator)
        self.seconds, self.began = 0.0, time.perf_counter()  # training time until the time ``began``
        self.saved = 0  # the number of images of the last checkpoint
        self._continue(found)

    # -- Begin and end ------------------------------------------------------------------------------------------------

    def _configure(self, start: str | os.PathLike[str] | None) -> dict[str, Any]:
        """Writes config.json if it does not exist, and compares it with the settings otherwise; returns its content.

        Raises:
            ValueError: if the folder contains a run with other settings.
        """
        config = _config(self.net, self.data, self.settings, start)
        config["versions"] = versions(self.accelerator.device, "accelerate", "safetensors", "numpy")
        path, text = self.out / "config.json", json.dumps(config, indent=2) + "\n"
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_whole(path, text.encode(), durable=True)
        self.accelerator.wait_for_everyone()
        now: dict[str, Any] = json.loads(text)
        _check_same(self.out, now)
        return now

    def _lock(self, stack: ExitStack) -> None:
        """Locks the folder of the checkpoints.

        Raises:
            BlockingIOError: if another process is training in the folder.
        """
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        try:
            stack.enter_context(exclusive_lock(folder))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is training in {self.out}. Wait until it has ended, or pass another folder."
            ) from error

    def _continue(self, found: checkpoint.Checkpoint | None) -> None:
        """Loads the last checkpoint, or writes the first, so that a repeated run has the same initial weights."""
        self.accelerator.wait_for_everyone()  # before one process writes, all have looked for checkpoints
        if found is not None:
            state = found.state
            try:
                self.state.load(found.parts, found.images, state["step"])
            except (LookupError, RuntimeError) as error:  # a name is missing, or a tensor has another shape
                path = self.out / "checkpoints" / checkpoint.name_of(found.images)
                raise ValueError(
                    f"the tensors of the checkpoint {path} are not those of this network and these settings "
                    f"({reason(f'{type(error).__name__}: {error}')}). Pass another folder."
                ) from error
            self.losses.sums[:], self.losses.counts[:] = state["loss_sums"], state["loss_counts"]
            self.seconds, self.saved = state["seconds"], found.images
        if self.main:
            for name in ("", *_FOLDERS):
                delete_unfinished(self.out / name, folders=True)
            self.log.cut(self.state.images)
            if found is not None:  # in case of an interruption after the checkpoint was written
                checkpoint.prune(self.out / "checkpoints", found.images, keep=self.keep)
                self._save_network()
        if found is None:
            self.save()

    def finish(self) -> ScoreNet:
        """Writes the report and returns the averaged network."""
        averaged = self.state.average()
        if self.main:
            rows = by_level(averaged, self.examples, self.settings)
            classes = getattr(self.data, "classes", None)
            write_report(self.out, averaged, self.config, rows, self.seconds, classes)
        for parameter, own in zip(averaged.parameters(), self.state.parameters, strict=True):
            parameter.requires_grad_(own.requires_grad)  # so that it can be trained further
        return averaged

    # -- The loop -----------------------------------------------------------------------------------------------------

    def loop(self, evaluate: Callable[[ScoreNet, int], Mapping[str, float]] | None, bar: tqdm[NoReturn]) -> None:
        """Trains until the end of the run or until a signal.

        Raises:
            RuntimeError: if the loss or a weight is not finite.
            SystemExit, KeyboardInterrupt: after a signal, once a checkpoint has been written.
        """
        steps = train_steps(self.net, self.data, self.settings, state=self.state, accelerator=self.accelerator)
        with _Stop(announce=not bar.disable) as stop, closing(steps):
            since = self.state.images, time.perf_counter()
            for step in steps:
                self.losses.add(step)
                late = self.every["checkpoint"] is None and time.perf_counter() - self.began > _CHECKPOINT_SECONDS
                # Signals and times differ between processes; they stop and save together after a common call of check.
                single = self.accelerator.num_processes == 1
                stopping = stop.asked if single else self.losses.stopping
                due = self._due(step.images)
                if stopping or (late if single else self.losses.late):
                    due.add("checkpoint")
                if due or self.losses.slow or step.state.step % CHECK_EVERY == 0:
                    self._check_losses(stop.asked, late, wait=bool(due))
                if "log" in due:
                    now = step.images, time.perf_counter()
                    self._write_line(step, (now[0] - since[0]) / max(now[1] - since[1], 1e-9), bar)
                    since = now
                if "sample" in due:
                    self._show(evaluate)
                if "snapshot" in due:
                    self._save_snapshots()
                if "checkpoint" in due:
                    self.save()
                bar.update(self.settings.batch_size)
                if stopping:
                    self.accelerator.wait_for_everyone()  # until the checkpoint is written
                    stop.leave()

    def _due(self, images: int) -> set[str]:
        """The actions at the end of the step that reaches a number of images; all of them at the end of the run."""
        before, last = images - self.settings.batch_size, images == self.settings.total
        return {
            name
            for name, every in self.every.items()
            if last or (every is not None and images // every > before // every)
        }

    def _check_losses(self, asked: bool, late: bool, *, wait: bool) -> None:
        try:
            self.losses.check(asked, late, wait=wait)
            if wait:
                check_weights(self.state)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} The last checkpoint in {self.out} is at image {self.saved:,}. Start again in another folder "
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
        if self.main and is_picture(self.data.shape):
            path = self.out / "samples" / f"{checkpoint.name_of(images)}.png"
            try:
                save_samples(averaged, path, self.examples, self.settings)
            except RuntimeError as error:  # the network is not trained enough yet; the run continues
                warnings.warn(f"the samples at image {images:,} are not saved: {error}", stacklevel=2)
        if evaluate is not None:
            with global_generators(self.accelerator.device):
                found = evaluate(averaged, images)
            self._record({"images": images, **_figures(found)})

    # -- Files --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint and the averaged network."""
        now = time.perf_counter()
        self.seconds, self.began = self.seconds + now - self.began, now
        self.saved, self.losses.late = self.state.images, False
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
            averaged = self.state.average(average.length)
            for parameter, own in zip(averaged.parameters(), self.state.parameters, strict=True):
                if own.requires_grad:  # others may be frequencies, whose rounding would change the phases of sines
                    parameter.data = parameter.half()
            with checkpoint.new_folder(path) as folder:
                averaged.save_pretrained(folder)


class _Stop:
    """Delays SIGTERM and Ctrl-C until the end of a step; a second signal takes effect immediately.

    Args:
        announce: whether to print at the first signal that the run stops after this step, which may take minutes.

    Attributes:
        asked: whether a signal was received.
    """

    def __init__(self, *, announce: bool) -> None:
        self.asked = False
        self._announce = announce
        self._number = int(signal.SIGTERM)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers there only
            for number in (signal.SIGTERM, signal.SIGINT):
                # A handler of another language, None, could not be restored, and a signal may be ignored on purpose.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def leave(self) -> NoReturn:
        """Exits the program as the signal would."""
        self._restore()
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked, self._number = True, number
        self._restore()
        if self._announce:
            with suppress(OSError, RuntimeError, ValueError):  # it is closed, or the signal interrupted its own writing
                print("\nstopping after this step; a second signal stops without a checkpoint", file=sys.stderr)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


def check_weights(state: TrainingState) -> None:
    """Checks that all weights are finite.

    Raises:
        RuntimeError: if a weight is NaN or infinite; the message names it.
    """
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(list[Tensor](state.parameters), math.inf)])
    if not bool(largest.isfinite().all()):
        name = state.names[int((~largest.isfinite()).nonzero()[0])]
        raise RuntimeError(f"the weight {name} is NaN or infinite at step {state.step} (image {state.images:,}).")


def _figures(found: Any) -> dict[str, float | None]:
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


# -- The configuration ------------------------------------------------------------------------------------------------


def check_results(out: Path) -> None:
    """Checks that the files that a run writes replace only those of an earlier one; see ``check_own``."""
    check_own(out, "config.json", (*_FOLDERS, "log.jsonl", "report.md"))


def check_run(
    out: Path, net: ScoreNet, data: Data, settings: Settings, start: str | os.PathLike[str] | None = None
) -> None:
    """Checks that ``train`` can begin a run in a folder or continue it, without writing anything.

    Raises:
        FileNotFoundError: if there is no network ``start``.
        ValueError: if the folder contains a run with other settings, or a new run cannot begin with ``start``.
    """
    if (out / "config.json").exists():
        _check_same(out, json.loads(json.dumps(_config(net, data, settings, start))))
    elif start is not None:
        _growth(net, load(locate(start), weights=False).config, start)


def _config(
    net: ScoreNet, data: Data, settings: Settings, start: str | os.PathLike[str] | None
) -> dict[str, dict[str, Any]]:
    """The parts of config.json that must not change."""
    described = {field.name: _described(getattr(settings, field.name)) for field in fields(settings)}
    described["start"] = None if start is None else os.fspath(start)
    of_data = {"images": len(data), "shape": list(data.shape), "fingerprint": data.fingerprint}
    return {"settings": described, "network": net.config, "data": of_data}


def _check_same(out: Path, now: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder of a run has another configuration in its config.json, or a damaged one."""
    path = out / "config.json"
    try:
        before = read_object(path)
        check(before, _CONFIG, str(path))
    except ValueError as error:
        raise ValueError(f"{error} Pass another folder.") from error
    settings, network, data = (list(_differing(before[part], now[part], _FREE)) for part in _CONFIG)
    known = network if len(network) <= _FEW else []
    data = [change for change in data if change[0] != "fingerprint"] or data  # it changes with the others
    data = [(f"{key} of the data", one, other) for key, one, other in data]  # "images" is a setting, too
    differing = [f"{key} was {quote(one)} and is {quote(other)}" for key, one, other in [*settings, *known, *data]]
    if len(known) < len(network):
        differing.append("the network is different")
    if differing:
        hint = (
            "To continue it use its settings, on the command line its options such as --recipe; otherwise use "
            "another folder."
        )
        if (out / "report.md").exists():
            network_folder = (out / "network").as_posix()
            hint = f"This run is complete. To train longer, start a new run with {argument('start', network_folder)}."
        elif not any(checkpoint.numbers(out / "checkpoints")):  # it has no checkpoint, or only that of image 0
            hint += " Nothing of that run is saved yet: if it has ended, delete the folder to begin again."
        raise ValueError(f"{out} contains a run with other settings: {'; '.join(differing)}. {hint}")


def _begin_with(net: ScoreNet, start: str | os.PathLike[str]) -> None:
    """Copies the weights of the trained network ``start`` to ``net``.

    If ``net`` is larger, the additional weights are such that both networks have the same output at first.

    Raises:
        FileNotFoundError: if there is no such network.
        ValueError: if ``net`` is another network, and not a larger one that can begin with these weights.
    """
    stored = load(locate(start))
    grows = _growth(net, stored.config, start)
    weights = stored.weights
    if net.family is not None and grows:
        weights = net.family.grow(ScoreNet.from_pretrained(start).backbone, net.backbone)
    fill(net.backbone, weights, stored.source)


def _growth(net: ScoreNet, small: Mapping[str, Any], start: str | os.PathLike[str]) -> set[str]:
    """The keys in which ``net`` is larger than the network ``start``, whose configuration is ``small``.

    Raises:
        ValueError: if ``net`` is another network, and not a larger one that can begin with these weights.
    """
    config = json.loads(json.dumps(net.config))
    grows: set[str] = set()
    if net.family is not None and small["family"] == config["family"]:
        grows = net.family.growth(small, config)
    differing = [
        f"{key} is {quote(one)} instead of {quote(other)}"
        for key, one, other in _differing(small, config, _FREE_OF_START | grows)
    ]
    if differing:
        raise ValueError(
            f"{argument('start', os.fspath(start))} is not the same network as the one to train: "
            f"{'; '.join(differing)}. Pass net=ScoreNet.from_pretrained(start), or on the command line leave out "
            "--recipe."
        )
    return grows


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any], free: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; those in ``free`` may differ."""
    for key in sorted({*one, *other} - set(free)):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _described(value: Any) -> Any:
    """Converts a setting to a JSON value that is the same in every process."""
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
    kind: Any = type(value)
    options: Mapping[str, Any] | None = None
    if is_dataclass(value):
        options = {field.name: getattr(value, field.name) for field in fields(value)}
    elif kind.__repr__ is object.__repr__:
        options = getattr(value, "__dict__", {})
    if options is not None:
        arguments = ", ".join(f"{name}={_described(entry)}" for name, entry in options.items())
        return f"{kind.__name__}({arguments})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
