"""Settings with few network calls that are fitted to a network, for ``tune``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorematch.core.conditions import length, rows_of
from scorematch.core.provenance import identity
from scorematch.core.records import as_stored, differences, read_record, refuse, write_record
from scorematch.core.schema import Field
from scorematch.core.scores import Given, variance_of
from scorematch.guidance import GuidedScore
from scorematch.noise import NoiseSchedule
from scorematch.sampling import SamplerSettings, data_moments, learned_settings, schedules_of_paths
from scorematch.score import ScoreNet

_PATHS, _LEARNED_PATHS = 64, 256
_BARELY_VISIBLE = 0.03  # in units of the value range
_FIRST = 24.0  # in standard deviations of the data; from higher levels one step is enough
_NORMAL = 16.0, 32.0  # in these deviations; noisy data are nearly normal there
_RECORD: Mapping[str, Field] = {
    "format_version": Field(int, required=True, choices=(1,)),
    "settings": Field(dict, required=True),
    "learned": Field(dict, required=True, each=Field(dict)),
}


def settings_with_few_calls(
    net: ScoreNet | GuidedScore, calls: Sequence[int], images: Tensor | None = None
) -> list[SamplerSettings]:
    """Settings with few network calls that need no paths: several kinds of levels, without new noise and with it.

    The levels are those of Karras et al., or the highest one and others with equal ratios from 24 standard deviations
    of the data: above, a step changes little more than the brightness of an image. The lowest level is that of
    ``settings_of_paths``. The method is UniPC, and on the levels of Karras et al. also DPM-Solver++ with the noise of
    the reverse diffusion, eta = 1, at all steps, at the first half of them, or at the second. With images or other data
    there are also settings whose steps are exact for normal data (``data_moments``): DPM-Solver++ with equal ratios, of
    order 1 from 16 or 32 standard deviations, and of order 2 from the highest level, which suits data that are far from
    normal.

    Args:
        net: the network.
        calls: the numbers of network calls, each at least 3.
        images: images or other samples of the data (N, C, ...), some thousand.
    """
    found, lowest, deviation = [], _lowest(net), math.sqrt(variance_of(net))
    high, top = _FIRST * deviation, net.schedule.sigma_max
    starts = [*((each, 1) for each in sorted({min(each * deviation, top) for each in _NORMAL})), (top, 2)]
    moments: dict[str, Any] = {}
    if images is not None:
        moments |= data_moments(images, net=net)
    for count in calls:
        levels: dict[str, Any] = {"levels": count, "sigma_min": lowest}
        first = (count - 1) // 2
        last = count - 1 - first
        found.append(SamplerSettings("ode", method="unipc", **levels))
        if lowest < high < top:
            sigmas = [top, *NoiseSchedule.geometric(high, lowest, count - 1)]
            found.append(SamplerSettings("ode", method="unipc", sigmas=_rounded(sigmas)))
        for start, order in starts if moments else ():
            sigmas = _rounded(list(NoiseSchedule.geometric(start, lowest, count)))
            found.append(SamplerSettings("ode", method="dpm-solver++", order=order, sigmas=sigmas, **moments))
        for eta in (1.0, [1.0] * first + [0.0] * last, [0.0] * first + [1.0] * last):
            found.append(SamplerSettings("ode", method="dpm-solver++", eta=eta, **levels))
    return found


def settings_of_paths(
    net: ScoreNet | GuidedScore, calls: Sequence[int], *, condition: Given = None, seed: int = 0, progress: bool = True
) -> list[SamplerSettings]:
    """Settings of UniPC with few network calls, whose levels are chosen from 64 paths of the network.

    The lowest level is that of the network, but at least 0.03 times the width of the value range, and the others are
    chosen: if the lowest were chosen too, it would be so high that images are smooth.

    Args:
        net: the network.
        calls: the numbers of network calls, each from 3 to 59.
        condition: conditions (N, ...), those of the paths in turn; None is each class of the network in turn.
        seed: the seed of the paths.
        progress: whether to show a progress bar.

    Returns:
        Settings for each number of calls, with fewer where levels below the lowest would be chosen; see
        ``scorematch.sampling.schedules_of_paths``.

    Raises:
        ValueError: if a number of calls is out of range.
    """
    counts = [count - 1 for count in calls]
    options: dict[str, Any] = {"condition": _in_turn(net, condition, _PATHS), "generator": seed, "progress": progress}
    schedules = schedules_of_paths(net, counts, n=_PATHS, **options)
    lowest = _lowest(net)
    chosen = [[*(sigma for sigma in schedule if sigma > lowest), lowest] for schedule in schedules]
    return [SamplerSettings("ode", sigmas=_rounded(sigmas), method="unipc") for sigmas in chosen]


def settings_learned(
    net: ScoreNet | GuidedScore,
    calls: Sequence[int],
    *,
    condition: Given = None,
    seed: int = 0,
    out: Path | None = None,
    progress: bool = True,
) -> list[SamplerSettings]:
    """Settings with few network calls, whose levels and coefficients are learned from 256 paths of the network.

    Args:
        net: the network.
        calls: the numbers of network calls, each from 2 to 59.
        condition: conditions (N, ...), those of the paths in turn; None is each class of the network in turn.
        seed: the seed of the paths.
        out: the folder in which finished settings are kept, in learned.json, so that the same call continues.
        progress: whether to show progress bars.

    Returns:
        Settings for each number of calls; see ``scorematch.sampling.learned_settings``.

    Raises:
        ValueError: if a number of calls is out of range, or the folder has settings of another network, seed or
            condition.
    """
    path = None if out is None else out / "learned.json"
    given = None if condition is None else identity(condition)
    settings = as_stored({"network": identity(net), "seed": seed, "condition": given})
    record = None if path is None else read_record(path, _RECORD)
    kept: dict[str, Any] = {} if record is None else record["learned"]
    if record is not None:
        differing = differences(record["settings"], settings)
        refuse(f"{path} has other settings", differing, "Pass the same to continue, or another folder.")
    missing = [count for count in dict.fromkeys(calls) if str(count) not in kept]
    options: dict[str, Any] = {
        "condition": _in_turn(net, condition, _LEARNED_PATHS),
        "generator": seed,
        "progress": progress,
    }
    found = learned_settings(net, missing, n=_LEARNED_PATHS, **options) if missing else ()
    for count, each in zip(missing, found, strict=True):
        kept[str(count)] = each.to_dict()
        if path is not None:
            write_record(path, {"format_version": 1, "settings": settings, "learned": kept})
    return [SamplerSettings.from_dict(kept[str(count)]) for count in calls]


def _rounded(sigmas: Sequence[float]) -> list[float]:
    return [float(f"{sigma:.5g}") for sigma in sigmas]


def _lowest(net: ScoreNet | GuidedScore) -> float:
    """The lowest level for few calls, whose noise is barely visible."""
    low, high = net.value_range or (0, 0)
    return max(net.schedule.sigma_min, _BARELY_VISIBLE * (high - low))


def _in_turn(net: ScoreNet | GuidedScore, condition: Given, n: int) -> Given:
    """The given conditions, or the classes of a network, in turn (n, ...); None if it has no classes."""
    if (count := length(condition)) is not None:
        return rows_of(condition, torch.arange(n, device="cpu") % count)
    classes = None if net.conditioning is None else net.conditioning.classes
    return None if classes is None else {"class": torch.arange(n, device="cpu") % classes}
