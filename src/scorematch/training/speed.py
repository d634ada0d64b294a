"""The measured speed of a training, and the number of images of a run of given hours."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scorematch.core.arguments import argument
from scorematch.core.precision import autocast
from scorematch.data.images import Data
from scorematch.data.pictures import to_float
from scorematch.loss import dsm_loss
from scorematch.score import ScoreNet
from scorematch.training.accelerator import global_generators
from scorematch.training.checks import given_of
from scorematch.training.growth import Stage, enlarged, parts
from scorematch.training.record import length_of
from scorematch.training.settings import Settings, TrainSettings
from scorematch.training.steps import TrainingState, loss_arguments

# On a CPU a step on images with this many values is timed; if it takes less than these seconds, four times as many are.
_TIMED_VALUES, _TIMED_SECONDS = 2**16, 0.5
_FEWEST_STEPS = 100  # of a run of given hours


def with_images(
    folder: str | os.PathLike[str],
    net: ScoreNet,
    data: Data,
    settings: TrainSettings,
    accelerator: Any,
    *,
    fewest_steps: int = _FEWEST_STEPS,
) -> TrainSettings:
    """The settings with a number of images in place of ``hours``: that of the run in the folder, or what fits.

    A stage of growth is left out if the hours are not enough for its fewest images.

    Raises:
        ValueError: if the hours are not enough for the fewest steps.
    """
    from accelerate.utils import broadcast_object_list

    assert settings.hours is not None  # noqa: S101
    found = [length_of(Path(folder)) or _fitting(net, data, settings, accelerator)]
    broadcast_object_list(found)  # of the first process, which writes the record while others may be behind
    images, later = found[0]
    growth = [replace(stage, fewest=0) for stage in settings.growth[:later]]
    if images < fewest_steps * settings.batch_size:
        raise ValueError(
            f"{argument('hours', settings.hours)} is enough for {images // settings.batch_size} steps of "
            f"{settings.batch_size} images here, and a run needs at least {fewest_steps}. Write more hours, or take a "
            "smaller network, such as that of the recipe tiny."
        )
    return replace(settings, hours=None, images=images, growth=growth)


def _fitting(net: ScoreNet, data: Data, settings: TrainSettings, accelerator: Any) -> tuple[int, int]:
    """The number of images that fit into the hours, and the number of later stages."""
    assert settings.hours is not None  # noqa: S101
    seconds = [each / accelerator.num_processes for each in seconds_per_image(net, data, settings, accelerator)]
    for later in range(len(settings.growth), -1, -1):
        stages = settings.growth[:later]
        images = max(1, int(settings.hours * 3600 / mean_seconds(seconds, stages)))
        if later == 0 or images >= stages[-1].fewest:
            break
    return images, later


def mean_seconds(seconds: Sequence[float], stages: Sequence[Stage]) -> float:
    """The mean of the seconds per image over the images of a run with these later stages."""
    return sum(a * b for a, b in zip(parts(stages), seconds, strict=False))


def seconds_per_image(net: ScoreNet, data: Data, settings: TrainSettings, accelerator: Any) -> list[float]:
    """The measured seconds of a step per image on one device with a batch of its own, in each stage.

    On a CPU the forward and the backward pass of a slow network are measured on a part of the batch.
    """
    measured = []
    with global_generators(accelerator.device):  # dropout draws from them
        for number, own in enumerate(settings.stages()):
            net = enlarged(net, settings.growth[number - 1].network).to(accelerator.device) if number else net
            update = _update_seconds(net, own) * accelerator.num_processes / own.batch_size
            measured.append(_gradient_seconds(net, data, own, accelerator) + update)
    return measured


def _update_seconds(net: ScoreNet, settings: Settings) -> float:
    """The seconds of a step after the backward pass: of the optimizer and the averages."""
    state = TrainingState(copy.deepcopy(net), settings)
    for _ in range(2):  # the first creates the state of the optimizer
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        begin = time.perf_counter()
        state.optimizer.step()
        for average in state.averages:
            average.update(state.parameters, step=1)
        state.parameters[-1].sum().item()  # waits for the device
        seconds = time.perf_counter() - begin
    return seconds


def _gradient_seconds(net: ScoreNet, data: Data, settings: Settings, accelerator: Any) -> float:
    device, batch_size = accelerator.device, settings.batch_size // accelerator.num_processes
    most = max(1, min(settings.microbatch or batch_size, batch_size, len(data)))
    n = min(most, max(1, _TIMED_VALUES // math.prod(data.shape))) if device.type == "cpu" else most
    while True:
        seconds = _step_seconds(net, data, settings, device, n)
        if n == most or seconds > _TIMED_SECONDS:
            return seconds / n
        n = min(most, 4 * n)


def _step_seconds(net: ScoreNet, data: Data, settings: Settings, device: torch.device, n: int) -> float:
    """The seconds of the forward and the backward pass of n images."""
    images, condition = data.read(torch.arange(n, device="cpu"))
    x = to_float(images).to(device)
    arguments = loss_arguments(settings, x, given_of(net, condition, settings), seed=0)
    for _ in range(2):  # the first prepares the kernels
        begin = time.perf_counter()
        with autocast(device, settings.precision):
            loss = dsm_loss(net, x, generator=0, **arguments)
        loss.backward()
        last = next(parameter.grad for parameter in net.parameters() if parameter.grad is not None)
        last.sum().item()  # waits for the device
        net.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
    return seconds
