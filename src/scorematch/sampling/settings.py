"""Sampler settings as a value: what was measured or published to sample a network well, stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from scorematch.schema import Field, check

_COUNT = Field(int, optional=True, low=1, high=1_000_000)
_SCHEMA: Mapping[str, Field] = {
    "sampler": Field(str, required=True, choices=("langevin", "ode", "ancestral", "predictor-corrector")),
    "levels": Field(int, optional=True, low=2, high=1_000_000),
    "steps_per_level": _COUNT,
    "step_size": Field(float, optional=True, low=0),
    "exact_noise": Field(bool, optional=True),
    "consistent": Field(bool, optional=True),
    "method": Field(str, optional=True, choices=("heun", "dpm-solver++")),
    "variance": Field(str, optional=True, choices=("large", "small")),
    "predictor": Field(str, optional=True, choices=("ancestral", "reverse-diffusion")),
    "corrector_steps": Field(int, optional=True, low=0, high=1_000_000),
    "snr": Field(float, optional=True, low=0, high=1),
}
_OPTIONS = {
    "langevin": {"steps_per_level", "step_size", "exact_noise", "consistent"},
    "ode": {"method"},
    "ancestral": {"variance"},
    "predictor-corrector": {"predictor", "corrector_steps", "snr"},
}


@dataclass(frozen=True)
class SamplerSettings:
    """Recommended settings of a network, with the names of the samplers' arguments.

    Arguments left as None use the sampler's default.

    Args:
        sampler: "langevin" (AnnealedLangevinSampler), "ode" (ODESampler), "ancestral" (AncestralSampler) or
            "predictor-corrector" (PredictorCorrectorSampler).
        levels: the number of noise levels.
        steps_per_level: of annealed Langevin dynamics, and likewise the next three.
        step_size: at the lowest level, in units of sigma squared.
        exact_noise: whether the noise of a step has variance 2a - a^2/sigma^2.
        consistent: whether to sample consistently.
        method: of the probability flow, "heun" or "dpm-solver++".
        variance: of ancestral sampling, "large" or "small".
        predictor: of predictor-corrector sampling, "ancestral" or "reverse-diffusion".
        corrector_steps: of predictor-corrector sampling.
        snr: of predictor-corrector sampling.

    Raises:
        ValueError: for a value out of range, or an option of another sampler.

    Example:
        >>> SamplerSettings(levels=100, step_size=5e-5, consistent=True).to_dict()
        {'sampler': 'langevin', 'levels': 100, 'step_size': 5e-05, 'consistent': True}
    """

    sampler: str = "langevin"
    levels: int | None = None
    steps_per_level: int | None = None
    step_size: float | None = None
    exact_noise: bool | None = None
    consistent: bool | None = None
    method: str | None = None
    variance: str | None = None
    predictor: str | None = None
    corrector_steps: int | None = None
    snr: float | None = None

    SCHEMA: ClassVar[Mapping[str, Field]] = _SCHEMA

    def __post_init__(self) -> None:
        check(asdict(self), _SCHEMA, "sampler_settings")
        foreign = self.options.keys() - _OPTIONS[self.sampler]
        if foreign:
            known = ", ".join(sorted(_OPTIONS[self.sampler]))
            raise ValueError(
                f"sampler_settings: {', '.join(sorted(foreign))} is not an option of the sampler {self.sampler!r}, "
                f"whose options are {known}."
            )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the sampler that are set, without the number of levels."""
        skipped = ("sampler", "levels")
        return {key: value for key, value in self.to_dict().items() if key not in skipped}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON, without those that are None; ``from_dict`` restores them."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSettings:
        """The settings that ``to_dict`` wrote.

        Raises:
            ValueError: for an unknown key, or a value out of range.
        """
        check(values, _SCHEMA, "sampler_settings", closed=True)
        return cls(**values)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.to_dict().items())
