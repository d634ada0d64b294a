"""The recommended sampler of new networks of pictures, and the moments of the data of a run.

Color pictures are drawn with six network calls, whose steps are exact for normal data with the moments of the images
(``scorematch.sampling.normal``). Gray pictures, such as digits, are often far from normal; they get eight calls of
UniPC. Signals, fields and volumes in their own units often have much more variance at large scales than at small ones;
UniPC with their moments keeps both, in 18 calls, or 36 if the network takes a vector or an image.
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
# With the exact score of a Gaussian, Heun's method with 18 levels (35 calls) has 4 % too much variance along axes of 17
# deviations, 10 % along those of one, and 12 % along those of 0.3. These 36 calls are within 1 % for all of them.
FAITHFUL = SamplerSettings("ode", levels=36, method="unipc")
_FEWEST, _MOST, _VALUES = 100, 2000, 2**25  # the samples of which moments are measured, and the most values of them
_LONGEST = 2048  # a side, whose cosines are a matrix


def take_sampler(net: ScoreNet, data: Data) -> None:
    """Chooses the recommended sampler of a network that has none, and measures the moments of a sampler.

    Chosen are those of networks of pictures, and of data in their own units if the network has none or ``FAITHFUL``.
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
    elif settings in (None, FAITHFUL) and net.units is not None and not net.preconditioning.discrete:
        moments = _moments(net, data)
        net.sampler_settings = _all_scales(net, net.units.typical, moments) if moments else FAITHFUL
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
    """The moments of random samples; {} if there are too few, for vectors, and for long sides."""
    if len(data) < _FEWEST or not 0 < max(data.shape[1:], default=0) <= _LONGEST:
        return {}
    n = max(2, min(len(data), _MOST, _VALUES // math.prod(data.shape)))
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0), device="cpu")[:n].sort().values
    return {**data_moments(to_float(data.read(rows)[0]), net=net)}


def _few(net: ScoreNet, moments: Mapping[str, Any]) -> SamplerSettings:
    """6 calls of DPM-Solver++ of order 1; the alternatives have 4, and 18 without moments."""
    six, four = (
        SamplerSettings("ode", method="dpm-solver++", order=1, sigmas=_levels(net, count, highest, _LOWEST), **moments)
        for count, highest in ((count, start * math.sqrt(variance_of(net))) for count, start in _STARTS.items())
    )
    return six.alone([four, _MANY])


def _all_scales(net: ScoreNet, deviation: float, moments: Mapping[str, Any]) -> SamplerSettings:
    """18 calls of UniPC from far above the largest scale, whose deviation is a multiple of that of a value, and 36.

    The data for one vector or image as the condition may be much narrower than all data. With a tenth of the variance
    18 calls draw 3 % too much of it, and 36 calls 0.2 %.
    """
    highest = max(32 * deviation, 8 * math.sqrt(max(moments["data_spectrum"])))
    few, many = (
        SamplerSettings("ode", method="unipc", sigmas=_levels(net, count, highest, 0.01 * deviation), **moments)
        for count in (18, 36)
    )
    narrow = net.conditioning is not None and bool(net.conditioning.vector or net.conditioning.channels)
    return many.alone([few]) if narrow else few.alone([many])


def _levels(net: ScoreNet, count: int, highest: float, lowest: float) -> list[float]:
    schedule = NoiseSchedule.geometric(min(highest, net.schedule.sigma_max), lowest, count)
    return [float(f"{sigma:.3g}") for sigma in schedule]


def _measured(settings: SamplerSettings, moments: Mapping[str, Any]) -> SamplerSettings:
    options = {**settings.options, **(moments if "data_mean" in settings.options else {})}
    return SamplerSettings(settings.sampler, learned_for=settings.learned_for, **options)
