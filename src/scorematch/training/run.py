"""``train``: a training run that writes its results and checkpoints to a folder, and continues after an interruption.

The folder of a run contains

==================================  ===================================================================================
config.json                         the settings, the versions and the fingerprint of the data
checkpoints/000123456/              the state of the run after 123,456 images; the last two are kept
network/                            the latest averaged network, for ``ScoreNet.from_pretrained``
snapshots/000123456-0.050/          averaged networks of the present stage, for ``from_pretrained`` and
                                    ``reconstruct``; weights that are trained are in half precision
samples/000123456.png               samples from fixed seeds, or a plot of them
log.jsonl                           the loss, the loss by noise level, the learning rate, and images per second
report.md, report/                  a summary with a chart of the loss, written at the end
==================================  ===================================================================================

The same call continues an interrupted run. On the same devices, with the same number of processes and threads, the
result is bitwise the same as without interruption.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.files import check_outside, delete_unfinished, exclusive_lock
from scorematch.core.messages import reason
from scorematch.core.randomness import seed_of
from scorematch.core.schema import Field
from scorematch.data.array_data import find_arrays
from scorematch.data.images import Data, open_images
from scorematch.data.pictures import is_picture
from scorematch.pretrained.hub import check_login, check_repository
from scorematch.score import ScoreNet
from scorematch.training import checkpoint
from scorematch.training.accelerator import global_generators, make_accelerator, wait
from scorematch.training.checks import check_network, check_stages
from scorematch.training.ema import SNAPSHOTS
from scorematch.training.growth import enlarged
from scorematch.training.levels import levels_for
from scorematch.training.log import BINS, CHECK_EVERY, DivergedError, Log, Losses, figures
from scorematch.training.record import FOLDERS, check_files, network_of, write_config
from scorematch.training.report import read_examples, sample_interval, save_samples, write_report
from scorematch.training.sampler import take_sampler
from scorematch.training.settings import RunSettings, TrainSettings, with_options
from scorematch.training.signals import Stop
from scorematch.training.speed import with_images
from scorematch.training.start import begin_with
from scorematch.training.steps import Step, TrainingState, prepare, train_steps
from scorematch.training.units import take_units

# The values of a checkpoint.
_STATE: Mapping[str, Field] = {
    "step": Field(int, required=True, low=0, high=2**62),
    "seconds": Field(float, required=True, low=0),
    "loss_sums": Field(list, required=True, low=BINS, high=BINS, each=Field(float)),
    "loss_counts": Field(list, required=True, low=BINS, high=BINS, each=Field(float, low=0)),
}
# The default time between two checkpoints. The lost time is least at sqrt(2 c m), where c is the time that a checkpoint
# takes, and m the mean time between two interruptions (Young 1974, A First Order Approximation to the Optimum
# Checkpoint Interval): ten minutes for two seconds, which a checkpoint of 16 million parameters takes, and one day.
_CHECKPOINT_SECONDS = 600


@with_options(TrainSettings)
def train(net: ScoreNet, data: Any, folder: str | os.PathLike[str], **options: Any) -> ScoreNet:
    """Trains a network on images; a call with the same arguments continues an interrupted run in ``folder``.

    On SIGTERM and Ctrl-C a checkpoint is saved before the program exits. After SIGKILL or a crash the run continues
    from the last checkpoint, with the same result, bit by bit.

    To train on several devices, start the same program with ``accelerate launch`` or ``torchrun``; all nodes must share
    the folder. All random numbers depend on ``seed``, except those of the initial weights of ``net``; the
    state of torch's global generators is not changed.

    **Optimizer.** AdamW, or Muon (``scorematch.training.muon``), which takes a higher ``lr`` (docs/recipes.md). With
    ``fixed_norms`` the weights of each output of a layer keep their norm (``scorematch.training.norms``). Gradients are
    accumulated over the microbatches of a batch. The learning rate rises over ``warmup_images`` and then falls:
    "cosine" or "linear" to zero, "constant", or "inverse-sqrt" (EDM2). A gradient is scaled down if its norm, for the
    loss divided by D/2, exceeds ``clip``; D is the number of values in an image. ``ema`` has lengths of power function
    averages, relative to the run (EDM2), above 0 and at most 0.289; or decays per step of exponential averages, from
    0.9 to below 1. The first average is saved as ``network/``.

    **Loss.** ``levels`` is a NoiseSchedule, whose levels are drawn equally often; ``LogNormal``, ``LogUniform``,
    ``UniformTime``, a ``LevelMixture`` of these, or any object with their method ``quantile``. None is EDM's log-normal
    distribution for the preconditioning "karras", and the network's own schedule for every other. ``weighting`` is
    "sigma" (sigma^p), "backbone" (1 / abs(c_out)^p), "min-snr" (that of "sigma", with less weight at low levels: Hang
    et al. 2023, arXiv:2303.09556), or a function of sigma (N,). None is "sigma" for the preconditioning "ncsn" and
    "backbone" for every other. A function ``loss`` is called as ``loss(net, x, sigma=, noise=, condition=, mask=)``,
    where the last two are omitted if there are none, and returns one value per image (N,), such as
    ``partial(sliced_score_matching_loss, reduction="none")``; losses with second derivatives cannot be compiled.

    **Conditions.** ``condition`` is called as ``task(x, generator)`` and returns the condition, or (condition, mask),
    such as the tasks of ``scorematch.restoration.palette``; all its random numbers must be drawn from the generator.
    For classifier-free guidance (``scorematch.guidance``) ``label_drop`` is about 0.1, for a network that
    ``ScoreNet.unet(classes=..., null_class=True)`` built.

    **Start.** A run that begins with the weights of another network, ``start``, has a new optimizer. ``net`` must be
    the same network, except for the size of the images, the sampler settings, the classes, and a vector as the
    condition (``scorematch.nets.reconditioning``); or it is larger, and both have the same output at first (Chen et
    al., 2016, arXiv:1511.05641): it may take a conditioning image or more channels of it, and a U-Net of DDPM may have
    more ``layers_per_block`` at some or all scales, ``attention`` at more scales, more ``pixel_layers``, and up to 64
    ``pixel_channels`` instead of fewer.

    **Length.** ``images`` is the length of the run, or ``hours`` on this machine. With ``growth`` the run has stages,
    between which the network is continued as a larger one with the same output (``scorematch.training.growth``). Each
    stage has a new optimizer and new averages; the run has one folder, and the snapshots of its last stage.

    **Output.** An action takes place at the end of the step that reaches its interval. ``evaluate`` is called together
    with the pictures of samples as ``evaluate(averaged_net, images)`` on every process, and returns a mapping of
    numbers for the log, where NaN and infinity become null. The result does not depend on the checkpoints.
    ``Accelerator(cpu=True)`` trains on the CPU.

    Args:
        net: the network to train. Its weights are changed, and moved to the device of the accelerator.
        data: the training data, as for ``open_images`` or ``open_arrays``, or their results. For large sets of pictures
            call ``open_images`` with a ``cache``.
        folder: the folder of the run, created if it does not exist.
        **options: the settings, as declared in ``TrainSettings``.

    Returns:
        The averaged network in eval mode, the same that is saved in ``folder / "network"``.

    Raises:
        ImportError: without Accelerate, or the package of a tracker.
        FileNotFoundError: if there is no network ``start``.
        TypeError, ValueError: if arguments do not fit together, the settings differ from those of the run in the
            folder, its files are damaged, or the network ``start`` differs from ``net``.
        RuntimeError: if the loss becomes NaN or infinite; the message names the step and the noise level.
        PermissionError: if ``push_to_hub`` is given, and there is no token of the Hub.
        OSError: if a file cannot be written, another process is training in the folder, it is a file or has files of
            other programs with the names of results, or the upload fails. The last checkpoint is not affected.
        SystemExit: after SIGTERM, with status 143. KeyboardInterrupt: after Ctrl-C.

    Example:
        >>> import tempfile
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = train(net, torch.rand(64, 1, 8, 8), folder, images=64, batch_size=32, progress=False)
        >>> trained.training
        False
    """
    check_network(net)
    folder = Path(folder).expanduser()
    settings = TrainSettings(**options)
    accelerator = check_possible(folder, data, settings)
    repository = settings.push_to_hub if accelerator.is_main_process else None
    data = _open(net, data)
    check_stages(net, data, settings, accelerator.num_processes)
    shown = settings.progress and accelerator.is_main_process
    take_units(net, data, network_of(folder), settings.start, progress=shown)
    take_sampler(net, data)
    _name_classes(net, data)
    if settings.hours is not None:
        settings = with_images(folder, net.to(accelerator.device), data, settings, accelerator)
    with ExitStack() as stack:
        run = _Run(folder, data, settings, accelerator)
        run.begin(net, stack)
        if settings.trackers:
            accelerator.init_trackers("scorematch")
        with tqdm(
            total=settings.total,
            initial=run.state.images,
            desc="training",
            unit="img",
            unit_scale=True,
            disable=not (settings.progress and accelerator.is_main_process),
        ) as bar:
            run.loop(bar)
        averaged = run.finish()
    wait(accelerator, "the first has written the report")
    if repository is not None:
        try:
            averaged.push_to_hub(repository)
        except OSError as error:
            raise OSError(
                f"the run is complete, and its network is in {folder / 'network'}, but it was not uploaded: "
                f"{reason(error)}. Start the same run again to repeat the upload only."
            ) from error
    if settings.trackers:
        for tracker in accelerator.trackers:
            tracker.finish()
    return averaged


def check_possible(folder: Path, data: Any, settings: RunSettings, *, cpu: bool = False) -> Any:
    """Checks, before data are read, that a run can write to a folder and upload its network; returns the accelerator.

    Args:
        folder: the folder of the run.
        data: the training data, as the user passes them.
        settings: the settings of the run.
        cpu: whether a new accelerator uses the CPU even if there is a GPU.
    """
    check_outside(folder, data)
    check_files(folder)
    if settings.push_to_hub is not None:
        check_repository(settings.push_to_hub)
    accelerator = make_accelerator(settings.accelerator, cpu=cpu, trackers=settings.trackers, folder=folder)
    if settings.push_to_hub is not None and accelerator.is_main_process:
        check_login()
    return accelerator


def _open(net: ScoreNet, data: Any) -> Data:
    """Opens data: arrays as they are, images with the size, channels and range of the network, and labels."""
    if hasattr(data, "read"):
        return data
    arrays = find_arrays(data)
    if arrays is not None:
        return arrays
    takes, shape = net.conditioning, net.sample_shape
    labels = isinstance(data, tuple) if takes is None else takes.classes is not None
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
    """A run and its folder."""

    state: TrainingState
    config: dict[str, Any]
    stage: int  # the number of the present stage, from 0, with its network, its settings and the losses since a line
    net: ScoreNet
    settings: TrainSettings
    losses: Losses
    every: dict[str, int | None]

    def __init__(self, folder: Path, data: Data, whole: TrainSettings, accelerator: Any) -> None:
        self.folder, self.data, self.whole, self.accelerator = folder, data, whole, accelerator
        self.stages = whole.stages()
        self.ends = list(itertools.accumulate(stage.total for stage in self.stages))  # the images of each last step
        self.main: bool = accelerator.is_main_process
        self.draws = True  # pictures of samples
        self.examples = read_examples(data)  # before the data are read in another thread
        self.log = Log(folder / "log.jsonl")
        self.seconds, self.began = 0.0, time.perf_counter()  # training time until the time ``began``
        self.saved = 0  # the number of images of the last checkpoint

    # -- Begin and end ------------------------------------------------------------------------------------------------

    def begin(self, net: ScoreNet, stack: ExitStack) -> None:
        """Locks the folder until ``stack`` is closed, and continues the run there, or writes its first files."""
        found = checkpoint.latest(self.folder / "checkpoints", _STATE)
        if found is None and self.whole.start is not None:
            begin_with(net, self.whole.start)
        self.config = write_config(self.folder, net, self.data, self.whole, self.accelerator)
        if self.main:
            self._lock(stack)
        stage = 0 if found is None else bisect.bisect_left(self.ends[:-1], found.images)
        for earlier in self.whole.growth[:stage]:
            net = enlarged(net, earlier.network)  # with the weights of the checkpoint later
        self._enter(stage, net)
        wait(self.accelerator, "all have looked for checkpoints")  # before one process writes
        if found is not None:
            self._load(found)
        if self.main:
            for name in ("", *FOLDERS):
                delete_unfinished(self.folder / name, folders=True)
            self.log.cut(self.state.images)
            if found is not None:  # in case of an interruption after the checkpoint was written
                checkpoint.prune(self.folder / "checkpoints", found.images, keep=self.settings.keep)
                self._save_network()
        if found is None:  # so that a repeated run has the same initial weights
            self.save()

    def _enter(self, stage: int, net: ScoreNet) -> None:
        """Begins a stage with its network."""
        self.stage, self.net, self.settings = stage, net, self.stages[stage]
        self.state = prepare(net, self.settings, self.accelerator)
        self.state.images = self.state.first = self.ends[stage - 1] if stage else 0
        self.losses = Losses(levels_for(net, self.settings.levels), self.accelerator)
        images = self.whole.images
        self.every = {
            # A thousand points are enough for a chart. With twenty snapshots of two lengths, the profiles of averages
            # of lengths from 0.03 to 0.2 are reconstructed with an error of 3 %.
            "log": self.settings.log_every or max(1, images // 1000),
            "sample": self.settings.sample_every or sample_interval(net, images),
            "snapshot": self.settings.snapshot_every or max(1, self.settings.images // 20),
            "checkpoint": self.settings.checkpoint_every,
        }

    def _lock(self, stack: ExitStack) -> None:
        """Locks the folder of the checkpoints."""
        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        try:
            stack.enter_context(exclusive_lock(checkpoints))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is training in {self.folder}. Wait until it has ended, or pass another folder."
            ) from error

    def _load(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        try:
            self.state.load(found.parts, found.images, state["step"])
        except (LookupError, RuntimeError) as error:  # a name is missing, or a tensor has another shape
            path = self.folder / "checkpoints" / checkpoint.name_of(found.images)
            raise ValueError(
                f"the tensors of the checkpoint {path} are not those of this network and these settings "
                f"({reason(f'{type(error).__name__}: {error}')}). Pass another folder."
            ) from error
        self.losses.sums[:], self.losses.counts[:] = state["loss_sums"], state["loss_counts"]
        self.seconds, self.saved = state["seconds"], found.images

    def finish(self) -> ScoreNet:
        """Writes the report and returns the averaged network."""
        averaged = self.state.average()
        if self.main:
            write_report(self.folder, averaged, self.config, self.seconds, getattr(self.data, "classes", None))
        for parameter, own in zip(averaged.parameters(), self.net.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)  # so that it can be trained further
        return averaged

    # -- The loop -----------------------------------------------------------------------------------------------------

    def loop(self, bar: tqdm[NoReturn]) -> None:
        """Trains in all stages until the end of the run or until a signal.

        Raises:
            RuntimeError: if the loss or a weight is not finite.
            SystemExit, KeyboardInterrupt: after a signal, once a checkpoint has been written.
        """
        with Stop(announce=not bar.disable) as stop:
            self._train(bar, stop)
            while self.stage + 1 < len(self.stages):
                self._grow()
                self._train(bar, stop)

    def _grow(self) -> None:
        """Continues the average of a completed stage as the larger network of the next one."""
        larger = self.whole.growth[self.stage].network
        net = enlarged(self.state.average(), larger, seed_of(self.whole.seed, "growth", self.stage))
        if self.main:  # those of a smaller network cannot be combined with those of the larger one
            shutil.rmtree(self.folder / SNAPSHOTS, ignore_errors=True)
        self._enter(self.stage + 1, net)

    def _train(self, bar: tqdm[NoReturn], stop: Stop) -> None:
        """Trains until the end of a stage or until a signal."""
        steps = train_steps(self.net, self.data, self.settings, state=self.state, accelerator=self.accelerator)
        with closing(steps):
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
                    self._show()
                if "snapshot" in due:
                    self._save_snapshots()
                if "checkpoint" in due:
                    self.save()
                bar.update(self.settings.batch_size)
                if stopping:
                    wait(self.accelerator, "the first has written the checkpoint")
                    stop.leave()

    def _due(self, images: int) -> set[str]:
        """The actions at the end of the step that reaches a number of images; all of them at the end of a stage."""
        before, last = images - self.settings.batch_size, images == self.ends[self.stage]
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
        except DivergedError as error:
            raise DivergedError(
                f"{error} The last checkpoint in {self.folder} is at image {self.saved:,}. Start again in another "
                "folder with a lower lr."
            ) from error

    def _write_line(self, step: Step, speed: float, bar: tqdm[NoReturn]) -> None:
        line = self.losses.line()
        text = f"loss {line['loss']:.4g}"
        if self.settings.loss is None and self.settings.p == 2:
            line["D/2"] = math.prod(self.data.shape) / 2
            text += f", D/2 {line['D/2']:g}"
        bar.set_postfix_str(text, refresh=False)
        if self.settings.precision == "float16":
            line["skipped_steps"] = step.state.skipped
        if self.whole.growth:
            line = {"stage": self.stage + 1, **line}
        self._record({"images": step.images, "lr": step.lr, "images_per_second": round(speed, 3), **line})

    def _record(self, line: dict[str, Any]) -> None:
        if self.main:
            self.log.write(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=line["images"])

    def _show(self) -> None:
        averaged, images, evaluate = self.state.average(), self.state.images, self.settings.evaluate
        if self.main and self.draws:
            path = self.folder / "samples" / f"{checkpoint.name_of(images)}.png"
            try:
                save_samples(averaged, path, self.examples, self.settings)
            except ImportError as error:  # a plot needs Matplotlib
                self.draws = False
                warnings.warn(f"samples are not shown: {error}", stacklevel=2)
            except RuntimeError as error:  # the network is not trained enough yet; the run continues
                warnings.warn(f"the samples at image {images:,} are not saved: {error}", stacklevel=2)
        if evaluate is not None:
            with global_generators(self.accelerator.device):
                found = evaluate(averaged, images)
            self._record({"images": images, **figures(found)})

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
        checkpoint.write(
            self.folder / "checkpoints", self.state.images, self.state.tensors(), values, keep=self.settings.keep
        )
        self._save_network()

    def _save_network(self) -> None:
        self.state.average().save_pretrained(self.folder / "network")

    def _save_snapshots(self) -> None:
        if not self.main:
            return
        for average in self.state.averages:
            seen = self.state.images - self.state.first  # the averages begin with the stage
            path = self.folder / SNAPSHOTS / f"{checkpoint.name_of(seen)}-{average.name}"
            averaged = self.state.average(average.length)
            own = dict(self.net.named_parameters())
            for name, parameter in averaged.named_parameters():
                if own[name].requires_grad:  # others may be frequencies; rounding would change the phases of sines
                    parameter.data = parameter.half()
            with checkpoint.new_folder(path) as folder:
                averaged.save_pretrained(folder)


def check_weights(state: TrainingState) -> None:
    """Checks that all weights are finite.

    Raises:
        DivergedError: if a weight is NaN or infinite; the message names it.
    """
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(list[Tensor](state.parameters), math.inf)])
    if not bool(largest.isfinite().all()):
        name = state.names[int((~largest.isfinite()).nonzero()[0])]
        raise DivergedError(f"the weight {name} is NaN or infinite at step {state.step} (image {state.images:,}).")
