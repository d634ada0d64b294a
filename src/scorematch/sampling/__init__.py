"""Samplers, which turn noise into samples of the data with a score."""

from __future__ import annotations

from typing import Any

from scorematch.core.scores import Score, attribute
from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.bulk import bulk_samples
from scorematch.sampling.chain import Chain
from scorematch.sampling.folder import sample_to
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Sampler
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
    "bulk_samples",
    "recommended_sampler",
    "sample_to",
]

# Keys are the values of SamplerSettings.sampler.
SAMPLERS: dict[str, type[Sampler]] = {
    "langevin": AnnealedLangevinSampler,
    "ode": ODESampler,
    "ancestral": AncestralSampler,
    "predictor-corrector": PredictorCorrectorSampler,
}


def recommended_sampler(
    net: Score,
    settings: SamplerSettings | None = None,
    *,
    levels: int | None = None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> Sampler:
    """Creates the sampler that settings describe.

    Args:
        net: a score, usually a ScoreNet.
        settings: the sampler and its options; None uses the network's own settings, ``net.sampler_settings``, or
            AnnealedLangevinSampler with its defaults if the network has none.
        levels: the number of noise levels, at least 2; None uses that of the settings.
        sigma_max: the highest noise level, in the units of x; None uses that of the settings.
        sigma_min: the lowest noise level, in the units of x; None uses that of the settings.

    Returns:
        A sampler of ``net``, of the class that ``settings.sampler`` names.

    Raises:
        ValueError: if the sampler rejects an option, or ``net`` is a plain function, which has no noise levels.

    Example:
        >>> from scorematch import ScoreNet
        >>> recommended_sampler(ScoreNet.from_pretrained("mnist"))
        AnnealedLangevinSampler(100 levels 16.9 -> 0.01, 1 step, step 5e-05, consistent, 100 network calls)
    """
    own: SamplerSettings | None = attribute(net, "sampler_settings")
    settings = own if settings is None else settings
    noise = {"levels": levels, "sigma_max": sigma_max, "sigma_min": sigma_min}
    given: dict[str, Any] = {name: value for name, value in noise.items() if value is not None}
    if settings is None or (settings is own and settings.sampler == "langevin"):
        # It reads the network's own settings itself, and adapts the step size to other noise levels.
        return AnnealedLangevinSampler(net, **given)
    return SAMPLERS[settings.sampler](net, **{**settings.options, **settings.noise, **given})
