"""The recommended sampler of new networks of pictures, and the moments of the data of a run.

Color pictures are drawn with six network calls, whose steps are exact for normal data with the moments of the images
(``scorematch.sampling.normal``). Gray pictures, such as digits, are often far from normal; they get eight calls of
UniPC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from scorematch.core.conditions import takes_image
from scorematch.core.cosines import Cosines
from scorematch.core.scores import variance_of
from scorematch.data import ArrayData
from scorematch.data.images import Data
from scorematch.data.pictures import is_picture, to_float
from scorematch.noise import NoiseSchedule
from scorematch.sampling import SamplerSettings, data_moments
from scorematch.score import ScoreNet

_STARTS = {6: 32.0, 4: 16.0}  # the highest level for a number of calls, in standard deviations of the data
_LOWEST = 0.03  # barely visible
_MANY = SamplerSettings("ode", levels=18, method="dpm-solver++")
_EIGHT = SamplerSettings("ode", levels=8, sigma_min=_LOWEST, method="unipc", alternatives=[_MANY])
_FEWEST, _MOST, _VALUES = 100, 2000, 2**25  # the samples of which moments are measured, and the most values of them


def take_sampler(net: ScoreNet, data: Data) -> None:
    """Chooses the recommended sampler of a network of pictures that has none, and measures the moments of a sampler.

    The moments in the settings of a network, such as one that a run begins with, are replaced by those of the data. Of
    less than 100 samples they are not measured, and a sampler with those of another size is left out.

    Args:
        net: the network, with its units; only ``sampler_settings`` is changed.
        data: the data, of which at most 2,000 samples are read.
    """
    settings = net.sampler_settings
    if settings is None and _draws_pictures(net, data):
        moments = _moments(net, data) if data.shape[0] == 3 else {}
        net.sampler_settings = _few(net, moments) if moments else _EIGHT
    elif settings is not None and any("data_mean" in each.options for each in (settings, *settings.alternatives)):
        moments = _moments(net, data)
        bands = Cosines(torch.zeros(1, *data.shape)).bands
        measured = [_measured(each, moments) for each in (settings, *settings.alternatives)]
        fitting = [each for each in measured if len(each.options.get("data_spectrum", ())) in (0, bands)]
        first, *others = fitting or [_MANY]
        net.sampler_settings = first.alone(others)


def _draws_pictures(net: ScoreNet, data: Data) -> bool:
    pictures = is_picture(data.shape) and not isinstance(data, ArrayData) and not takes_image(net)
    levels = net.schedule.sigma_min <= _LOWEST < 1 <= net.schedule.sigma_max and not net.preconditioning.discrete
    return pictures and levels and net.units is None and net.value_range == (0, 1)


def _moments(net: ScoreNet, data: Data) -> Mapping[str, Any]:
    """The moments of random samples; {} if there are too few."""
    if len(data) < _FEWEST:
        return {}
    n = max(2, min(len(data), _MOST, _VALUES // math.prod(data.shape)))
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0), device="cpu")[:n].sort().values
    return {**data_moments(to_float(data.read(rows)[0]), net=net)}


def _few(net: ScoreNet, moments: Mapping[str, Any]) -> SamplerSettings:
    """6 calls of DPM-Solver++ of order 1; the alternatives have 4, and 18 without moments."""
    six, four = (
        SamplerSettings("ode", method="dpm-solver++", order=1, sigmas=_levels(net, *each), **moments)
        for each in _STARTS.items()
    )
    return six.alone([four, _MANY])


def _levels(net: ScoreNet, count: int, start: float) -> list[float]:
    highest = min(start * math.sqrt(variance_of(net)), net.schedule.sigma_max)
    return [float(f"{sigma:.3g}") for sigma in NoiseSchedule.geometric(highest, _LOWEST, count)]


def _measured(settings: SamplerSettings, moments: Mapping[str, Any]) -> SamplerSettings:
    options = {**settings.options, **(moments if "data_mean" in settings.options else {})}
    return SamplerSettings(settings.sampler, learned_for=settings.learned_for, **options)
