"""Samplers: methods that follow a score from noise to data."""

from __future__ import annotations

from typing import Any

from scorematch.protocol import Score, attribute
from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Chain, Sampler
from scorematch.sampling.settings import SamplerSettings

__all__ = [
    "SAMPLERS",
    "AncestralSampler",
    "AnnealedLangevinSampler",
    "Chain",
    "ODESampler",
    "PredictorCorrectorSampler",
    "Sampler",
    "SamplerSettings",
    "recommended_sampler",
]

# By the name that SamplerSettings has for each.
SAMPLERS: dict[str, type[Sampler]] = {
    "langevin": AnnealedLangevinSampler,
    "ode": ODESampler,
    "ancestral": AncestralSampler,
    "predictor-corrector": PredictorCorrectorSampler,
}


def recommended_sampler(net: Score, settings: SamplerSettings | None = None, *, levels: int | None = None) -> Sampler:
    """The sampler that settings describe.

    Args:
        net: a score.
        settings: None are the network's own, ``net.sampler_settings``; without these, AnnealedLangevinSampler's
            defaults.
        levels: the number of noise levels, instead of that of the settings.

    Example:
        >>> from scorematch import ScoreNet
        >>> recommended_sampler(ScoreNet.from_pretrained("mnist"))
        AnnealedLangevinSampler(100 levels 16.9 -> 0.01, 1 step, step 5e-05, consistent, 100 network calls)
    """
    settings = attribute(net, "sampler_settings") if settings is None else settings
    if settings is None:
        return AnnealedLangevinSampler(net, levels=levels)
    given = settings is not attribute(net, "sampler_settings")
    # AnnealedLangevinSampler finds the network's own settings itself, and adapts the step size to other levels.
    options: dict[str, Any] = settings.options if given or settings.sampler != "langevin" else {}
    return SAMPLERS[settings.sampler](net, levels=settings.levels if levels is None else levels, **options)
