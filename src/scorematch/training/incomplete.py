r"""``train_from_observations``: a prior from incomplete, noisy data alone, by expectation-maximization (EM).

Each sample was measured once, :math:`y_i = A_i x_i + n_i`, with an operator of its own, such as a mask, and no sample
is known. The likelihood of all measurements under a prior q grows in stages of two steps,

.. math:: x_i \sim q_{k-1}(x \mid y_i), \qquad q_k = \arg\max_q \sum_i \log q(x_i),

a draw from each posterior with a sampler and a restoration method, and a training on the draws, which starts from the
weights of the stage before. The first prior is a Gaussian fitted to the measurements, see
``scorematch.training.gaussian``.
EM finds the distribution of the data only if the operators together observe all of it; what no item observes stays as
the Gaussian had it.

**When to stop.** A part of the items takes no part in the trainings. A quarter of their measured values is hidden, the
rest is measured, and the mean of the posterior predicts the hidden values. With two independent draws x, x' the mean of
:math:`(A x - y)(A x' - y)` is the mean squared error of this prediction, including the noise of y, without bias. The
true prior has the smallest error. With several channels it is relative to the standard deviation of each.

The folder contains

==================  ===================================================================================================
stages.json         the settings, the versions and a hash of the measurements
gaussian.npz        the Gaussian: ``mean``, ``factor``, ``variance``, ``scale``
draws/002/          the draws for stage 2, one file for each batch; deleted when the stage is complete
stage-002/          the run of stage 2, as ``train`` writes it
stages.jsonl        the error of the prediction after each stage; stage 0 is the Gaussian
network/            the network of the last complete stage
report.md, report/  the table and the chart of these errors
==================  ===================================================================================================

Every file is written atomically, and the same call continues after an interruption at any time, with the same result,
bit by bit.

References:
    Rozet et al., 2024, Learning Diffusion Priors from Observations by Expectation Maximization, arXiv:2405.13712.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument
from scorematch.core.charts import Curve, chart, table
from scorematch.core.files import check_own, delete_unfinished, exclusive_lock, write_whole
from scorematch.core.provenance import identity, versions
from scorematch.core.randomness import seed_of, standard_normal
from scorematch.core.records import as_stored, differences, hash_of, read_record, refuse, write_record
from scorematch.core.schema import Field
from scorematch.data.arrays import read_arrays
from scorematch.data.pictures import is_picture, save_grid
from scorematch.nets.precondition import ROWS
from scorematch.restoration import Mask, Observation
from scorematch.restoration.moments import image_of
from scorematch.sampling import ODESampler
from scorematch.sampling.bulk import prepared
from scorematch.score import ScoreNet
from scorematch.training.checks import check_network
from scorematch.training.gaussian import Gaussian, fit_gaussian, start_for
from scorematch.training.log import Log
from scorematch.training.record import described
from scorematch.training.run import check_possible, train
from scorematch.training.settings import RunSettings, StageSettings, with_options
from scorematch.training.start import begin_with

__all__ = ["train_from_observations"]

# The reverse diffusion; moment matching took the Frechet distance from 119 to 13 (Rozet et al., Table 3).
_SAMPLER = partial(ODESampler, method="dpm-solver++", eta=1.0, levels=18, restore="moment-matching")
_HIDDEN = 0.25  # the fraction of the measured values of held-out items that is predicted
_MOST_HELD_OUT = 256
_FITTED = 4096  # draws from the Gaussian, from which a network gets its units
_NEAR = 0.2  # the tolerance, relative to the range of the network, for data that are in this range
_RECORD = dict.fromkeys(("settings", "observations"), Field(dict, required=True))
_SHOWN = 32  # draws in a picture
_EVERY = 2**62  # images: all lines of the log stay except one that is not complete
# What may change when a run continues; "evaluate" and "accelerator" are not described.
_FREE = ("stages", "progress", "accelerator", "trackers", "push_to_hub", "evaluate", "microbatch", "compile", "keep")
_FILES = ("draws", "network", "report", "report.md", "stages.jsonl", "gaussian.npz")


@with_options(StageSettings)
def train_from_observations(
    net: ScoreNet, observation: Any, folder: str | os.PathLike[str], **options: Any
) -> ScoreNet:
    """Trains a network on measurements of unknown samples; a call with the same arguments continues a run.

    The samples of an observation with N measurements are N different ones. Missing values are those outside of the
    operator's mask, or with an infinite ``sigma``; see ``Observation.with_gaps``. A new network gets its units from the
    Gaussian, unless the data are in the range (0, 1) of images. Each stage is a run of ``train`` of its own, of
    ``images`` images.

    Args:
        net: the network to train, without a condition. Its weights are changed.
        observation: an ``Observation`` of N samples with a linear operator, and a number or a tensor as ``sigma``.
        folder: the folder of all stages, created if it does not exist.
        **options: the settings, as declared in ``StageSettings``.

    Returns:
        The averaged network of the last stage in eval mode, which is also in ``folder / "network"``.

    Raises:
        TypeError, ValueError: if arguments do not fit together, the measurements are clean data, or the settings differ
            from those of the stages in the folder.
        OSError: if a file cannot be written, or another process works in the folder.
        Other errors are those of ``train``.

    Warns:
        UserWarning: if a value of the samples is observed in no item.

    Example:
        >>> import tempfile
        >>> x, seen = torch.randn(64, 2), torch.rand(64, 2) < 0.7
        >>> observation = Observation(Mask(seen), x + 0.1 * torch.randn(64, 2), sigma=0.1)
        >>> short = dict(stages=1, images=64, batch_size=32, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net = train_from_observations(ScoreNet.mlp(2, width=8, depth=1), observation, folder, **short)
        >>> net.sample_shape
        (2,)
    """
    check_network(net)
    settings = StageSettings(**options)
    accelerator = check_possible(Path(folder).expanduser() / "stage-001", None, settings)
    if accelerator.num_processes > 1:
        raise ValueError("train_from_observations runs in one process. Start it without accelerate launch.")
    observation = check_observation(net, observation)
    run = _Stages(Path(folder).expanduser(), net, observation, settings, accelerator.device)
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(run.folder):
            return run.all()
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another process is training in {run.folder}. Wait until it has ended, or pass another folder."
        ) from error


def check_observation(net: ScoreNet, observation: Any) -> Observation:
    """The observation for samples of the network's shape, after checking that a prior can be learned from it."""
    if not isinstance(observation, Observation):
        raise TypeError(
            f"observation must be an Observation, got {type(observation).__name__}. Write Observation(operator, y, "
            "sigma), or Observation.with_gaps(y, sigma) for y with NaN where nothing was measured."
        )
    if net.sample_shape is None:
        raise ValueError("the network must have a sample_shape, the shape of the unknown samples.")
    if net.conditioning is not None and net.conditioning != type(net.conditioning)():
        raise ValueError("the network must take no condition. Write ScoreNet.unet(...) without classes.")
    if callable(observation.sigma):
        raise ValueError("sigma of the observation must be a number or a tensor, got a function.")
    if not observation.operator.is_linear:
        raise ValueError(f"the operator must be linear, got {observation.operator!r}.")
    observation = (observation if observation.y.is_cpu else observation.to("cpu")).of_shape(net.sample_shape)
    if len(observation.y) < 4:
        raise ValueError(f"there must be measurements of at least 4 samples, got {len(observation.y)}.")
    if observation.mask is not None and not bool(observation.mask.any()):
        raise ValueError("nothing is observed: every value of y is outside of the mask, or its sigma is infinite.")
    exact = observation.sigma == 0 if isinstance(observation.sigma, float) else not bool(observation.sigma.any())
    every = observation.mask is None or bool(observation.mask.all())
    if (
        exact
        and every
        and observation.operator.gain is not None
        and observation.y[0].numel() == math.prod(net.sample_shape)
    ):
        raise ValueError(
            "everything is observed without noise: that is clean data. Write train(net, y, folder), or on "
            "the command line leave out --sigma."
        )
    return observation


class _Draws:
    """The draws of a stage as data for ``train``."""

    def __init__(self, x: Tensor, fingerprint: str) -> None:
        self.x, self.shape, self.fingerprint = x, tuple(x.shape[1:]), fingerprint

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices: Tensor) -> tuple[Tensor, None]:
        return self.x[indices], None


class _Stages:
    """The stages in a folder."""

    def __init__(
        self, folder: Path, net: ScoreNet, observation: Observation, settings: StageSettings, device: torch.device
    ) -> None:
        self.folder, self.net, self.settings, self.device = folder, net, settings, device
        self.log = Log(folder / "stages.jsonl")
        n = len(observation.y)
        held_out = min(_MOST_HELD_OUT, n // 10 + 1) if settings.held_out is None else settings.held_out
        if held_out >= n:
            raise ValueError(f"{argument('held_out')} must be less than the {n} measurements, got {held_out}.")
        if settings.batch_size > n - held_out:
            raise ValueError(
                f"a batch of {settings.batch_size} is more than the {n - held_out} measurements that are not held out. "
                f"Pass {argument('batch_size', n - held_out)} or less."
            )
        order = torch.randperm(n, generator=self._generator("held out"), device="cpu")
        self.held_out = observation.rows(order[:held_out].sort().values)
        self.observation = observation.rows(order[held_out:].sort().values)
        values = {each.name: described(getattr(settings, each.name)) for each in fields(settings)}
        values = {name: value for name, value in values.items() if name not in _FREE}
        values.update(held_out=held_out, start=None if settings.start is None else os.fspath(settings.start))
        self.record = as_stored(
            {
                "settings": values,
                "network": net.config,
                "observations": {"number": n, "operator": repr(observation.operator), "hash": identity(observation)},
            }
        )
        self._check_channels()
        unseen = int((~self._seen(observation).any(0)).sum())
        if unseen:
            warnings.warn(
                f"{unseen} of the {math.prod(self.shape)} values of a sample are observed in no item: nothing is "
                "learned about them.",
                stacklevel=4,
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.net.sample_shape or ()

    def _generator(self, *purpose: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.settings.seed, *purpose))

    @staticmethod
    def _seen(observation: Observation) -> Tensor:
        """Which values of the samples the measurements depend on."""
        z = standard_normal(observation.y.shape, torch.Generator().manual_seed(0), observation.y.device)
        return observation.operator.adjoint(observation.observed(z), observation.shape) != 0

    # -- The stages ---------------------------------------------------------------------------------------------------

    def all(self) -> ScoreNet:
        """Completes all stages, and returns the network of the last one."""
        began = time.perf_counter()
        self._check_record()
        self.gaussian = self._fitted()
        self._take_units()
        self.template = copy.deepcopy(self.net)
        self.log.cut(_EVERY)
        done = len(self.log.lines())
        for stage in range(max(0, done - 1), self.settings.stages + 1):
            if stage >= done:  # otherwise the process may have died after the line, and before what follows
                if stage > 0:
                    self._train(stage)
                error, deviation = self._error(stage)
                began, elapsed = time.perf_counter(), time.perf_counter() - began
                self.log.write(
                    {
                        "images": stage * self.settings.total,
                        "stage": stage,
                        "error": error,
                        "standard_error": deviation,
                        "seconds": round(elapsed, 1),
                    }
                )
            shutil.rmtree(self.folder / "draws" / _name(stage), ignore_errors=True)
            self._report()
        last = self._network(self.settings.stages)
        last.save_pretrained(self.folder / "network")
        return last

    def _check_record(self) -> None:
        path = self.folder / "stages.json"
        check_own(self.folder, path.name, _FILES)
        before = read_record(path, _RECORD)
        if before is None:
            write_record(path, {**self.record, "versions": versions(self.device, "numpy")}, durable=True)
            return
        differing = [each for part in _RECORD for each in differences(before[part], self.record[part])]
        refuse(f"{self.folder} contains stages with other settings", differing, "Pass those, or another folder.")

    def _fitted(self) -> Gaussian:
        path = self.folder / "gaussian.npz"
        if not path.exists():
            found = fit_gaussian(self.observation, self._generator("gaussian"))
            content = io.BytesIO()
            arrays = {name: np.asarray(value) for name, value in found._asdict().items() if name != "shape"}
            np.savez(content, **arrays)  # type: ignore[arg-type]
            write_whole(path, content.getvalue(), durable=True)
        stored = {name: torch.from_numpy(values) for name, values in read_arrays(path).items()}
        scale = stored["scale"] if "scale" in stored and stored["scale"].ndim else 1.0
        return Gaussian(self.shape, stored["mean"], stored["factor"], float(stored["variance"]), scale)

    def _of_channels(self, gaussian: Gaussian) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each channel."""
        mean, variance = (each.view(self.shape[0], -1).mean(1) for each in (gaussian.mean, gaussian.variances))
        return mean, variance.sqrt()

    def _needs_units(self, gaussian: Gaussian) -> bool:
        """Whether the network is new and the channels of the data do not fit its range."""
        net, (mean, deviation) = self.net, self._of_channels(gaussian)
        if not net.is_new or net.units is not None or not ROWS[net.precondition].centered:
            return False
        low, high = net.value_range or (math.inf, -math.inf)
        near = _NEAR * (high - low)
        # Data within a range have at most the deviation of its two ends, half of its width.
        fits = low - near <= float(mean.min()) and float(mean.max()) <= high + near
        return not (fits and float(deviation.max()) <= (high - low) / 2 + near)

    def _check_channels(self) -> None:
        """Raises ValueError for a channel that would have no unit."""
        gaussian = start_for(self.observation, self._generator("gaussian"))
        mean, deviation = self._of_channels(gaussian)
        limits = torch.finfo(torch.float32)
        constant = deviation <= limits.eps * mean.abs() + limits.tiny
        if bool(constant.any()) and self._needs_units(gaussian):
            raise ValueError(f"channel {int(constant.nonzero()[0])} of the measurements is constant. Leave it out.")

    def _take_units(self) -> None:
        """Gives a new network the units of the Gaussian, if it needs them."""
        if self._needs_units(self.gaussian):
            self.net.fit_units(self.gaussian.sample(_FITTED, self._generator("units")).float())

    def _train(self, stage: int) -> None:
        """Trains on draws under the prior of the stage before."""
        x = self._draws(stage)
        options = {each.name: getattr(self.settings, each.name) for each in fields(RunSettings)}
        last = stage == self.settings.stages
        options.update(
            start=self.settings.start if stage == 1 else self._folder(stage - 1) / "network",
            seed=seed_of(self.settings.seed, "stage", stage),
            push_to_hub=self.settings.push_to_hub if last else None,
        )
        train(self.net, _Draws(x, hash_of([self.record, stage])), self._folder(stage), **options)

    def _folder(self, stage: int) -> Path:
        return self.folder / f"stage-{_name(stage)}"

    def _network(self, stage: int) -> ScoreNet:
        """The averaged network of a stage."""
        net = copy.deepcopy(self.template)
        begin_with(net, self._folder(stage) / "network")
        return net.eval().to(self.device)

    # -- Draws --------------------------------------------------------------------------------------------------------

    def _prior(self, stage: int) -> Callable[[Observation, Sequence[int]], Tensor]:
        """The function that draws from the posteriors under the prior of a stage, with a seed for each item."""
        if stage == 0:
            low, high = self.net.value_range or (None, None)

            def from_gaussian(items: Observation, seeds: Sequence[int]) -> Tensor:
                x = self.gaussian.draw(items, torch.Generator().manual_seed(seeds[0]))
                return x.float() if low is None else x.float().clamp(low, high)

            return from_gaussian
        sampler = prepared((self.settings.sampler or _SAMPLER)(self._network(stage)))

        def from_network(items: Observation, seeds: Sequence[int]) -> Tensor:
            n = len(seeds)
            x = sampler.sample(n, observation=items, generator=list(seeds), batch_size=n, progress=False)
            return x.cpu()

        return from_network

    def _draws(self, stage: int) -> Tensor:
        """A draw for each item under the prior of the stage before, from the files or a sampler."""
        folder, size = self.folder / "draws" / _name(stage), self.settings.draw_batch
        folder.mkdir(parents=True, exist_ok=True)
        delete_unfinished(folder)
        n = len(self.observation.y)
        paths = {first: folder / f"{first:06d}.npz" for first in range(0, n, size)}
        missing = [first for first, path in paths.items() if not path.exists()]
        prior = functools.cache(self._prior)
        for first in tqdm(missing, desc=f"draws for stage {stage}", unit="batch", disable=not self.settings.progress):
            rows = slice(first, min(first + size, n))
            seeds = [seed_of(self.settings.seed, "draw", stage, i) for i in range(rows.start, rows.stop)]
            content = io.BytesIO()
            np.savez(content, x=prior(stage - 1)(self.observation.rows(rows), seeds).numpy())
            write_whole(paths[first], content.getvalue(), durable=True)
        x = torch.cat([torch.from_numpy(read_arrays(path)["x"]) for path in paths.values()])
        if is_picture(self.shape):
            self._show(stage, x[:_SHOWN])
        return x

    def _show(self, stage: int, x: Tensor) -> None:
        """Writes a picture of what was measured, and beside it of the draws."""
        items = self.observation.rows(slice(0, len(x)))
        pairs = [image_of(items.operator, items.observed(items.y), self.shape), x]
        low, high = self.net.value_range or (float(x.min()), float(x.max()))
        (self.folder / "report").mkdir(exist_ok=True)
        images = ((torch.stack(pairs, 1).flatten(0, 1) - low) / (high - low)).clamp(0, 1)
        save_grid(images, self.folder / "report" / f"draws-{_name(stage)}.png", 4 * len(pairs))

    def _error(self, stage: int) -> tuple[float, float]:
        """The root mean squared error of the prediction of hidden values, divided by s, and its standard error."""
        items = self.held_out
        seen = items.observed(torch.ones_like(items.y)) > 0
        u = torch.rand(items.y.shape, generator=self._generator("hidden")).masked_fill(~seen, 1)
        hidden = seen & (u <= u.min().clamp(min=_HIDDEN))  # at least one value
        rest = Observation(Mask(~hidden) @ items.operator, items.y, items.sigma).of_shape(self.shape)
        prior, size = self._prior(stage), self.settings.draw_batch
        residuals, scale = [], self.gaussian.scale_of_sample
        for k in range(2):
            parts = []
            for first in range(0, len(items.y), size):
                rows = slice(first, min(first + size, len(items.y)))
                seeds = [seed_of(self.settings.seed, "predict", stage, k, i) for i in range(rows.start, rows.stop)]
                part = items.rows(rows).scaled(scale)
                parts.append(part.operator.measure(prior(rest.rows(rows), seeds) / scale) - part.y)
            residuals.append(torch.where(hidden, torch.cat(parts), 0).double())
        errors, counts = (each.flatten(1).sum(1) for each in (residuals[0] * residuals[1], hidden.double()))
        mean = float(errors.sum() / counts.sum())
        deviation = float((errors - mean * counts).square().sum().sqrt() / counts.sum())
        root = math.sqrt(max(mean, 0.0))
        return root, deviation / (2 * root) if root > 0 else math.sqrt(deviation)

    # -- The report ---------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        lines = self.log.lines()
        (self.folder / "report").mkdir(exist_ok=True)
        curve = Curve("held-out values", [line["stage"] for line in lines], [line["error"] for line in lines])
        drawn = chart("error of the prediction", "stage", [curve], marks=True)
        write_whole(self.folder / "report" / "error.svg", drawn.encode())
        best = min(lines, key=lambda line: line["error"])
        pictures = sorted(path.name for path in (self.folder / "report").glob("draws-*.png"))
        text = [
            f"# {self.folder.name}",
            "",
            f"- Data: {len(self.observation.y):,} measurements, and {len(self.held_out.y):,} held out, of samples of "
            f"shape {self.shape}",
            f"- Smallest error: {best['error']:.4g} after stage {best['stage']} of {lines[-1]['stage']}",
            "",
            table(
                ["stage", "error of held-out values", "standard error", "minutes"],
                [
                    [
                        f"{line['stage']}{'' if line['stage'] else ' (Gaussian)'}",
                        f"{line['error']:.4g}",
                        f"{line['standard_error']:.2g}",
                        f"{line['seconds'] / 60:.1f}",
                    ]
                    for line in lines
                ],
            ),
            "The error is that of the mean of the posterior, and includes the noise of the measurements"
            + ("" if isinstance(self.gaussian.scale, float) else "; it is relative to the deviation of each channel")
            + ". More stages",
            "are worth their time while it falls; the same call with more `stages` continues.",
            "",
            "![error](report/error.svg)",
            *([f"![measured, and drawn](report/{pictures[-1]})"] if pictures else []),
            "",
        ]
        write_whole(self.folder / "report.md", "\n".join(text).encode())


def _name(stage: int) -> str:
    return f"{stage:03d}"
