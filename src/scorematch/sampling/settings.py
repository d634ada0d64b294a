"""The recommended sampler of a network with its options, measured or published, which is stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from scorematch.schema import Field, check, native

# The samplers, each with its options.
_OPTIONS = {
    "langevin": {"steps_per_level", "step_size", "exact_noise", "consistent"},
    "ode": {"method", "churn", "churn_min", "churn_max", "churn_noise"},
    "ancestral": {"variance", "clamp_denoised"},
    "predictor-corrector": {"predictor", "corrector_steps", "snr"},
}
_LEVEL = Field(float, low=0)
_COUNT = Field(int, low=1, high=1_000_000)
_SCHEMA: Mapping[str, Field] = {
    "sampler": Field(str, required=True, choices=tuple(_OPTIONS)),
    "levels": Field(int, low=2, high=1_000_000),
    "steps_per_level": _COUNT,
    "step_size": Field(float, above=0),
    "exact_noise": Field(bool),
    "consistent": Field(bool),
    "method": Field(str, choices=("heun", "dpm-solver++")),
    "churn": Field(float, low=0),
    "churn_min": _LEVEL,
    "churn_max": _LEVEL,
    "churn_noise": Field(float, above=0),
    "variance": Field(str, choices=("large", "small", "learned")),
    "clamp_denoised": Field(bool),
    "predictor": Field(str, choices=("ancestral", "reverse-diffusion")),
    "corrector_steps": Field(int, low=0, high=1_000_000),
    "snr": Field(float, above=0, below=1),
    "sigma_max": _LEVEL,
    "sigma_min": _LEVEL,
}


@dataclass(frozen=True)
class SamplerSettings:
    """The recommended sampler of a network and its options, which have the names of the sampler's arguments.

    Options left as None use the sampler's default.

    Args:
        sampler: "langevin" (AnnealedLangevinSampler), "ode" (ODESampler), "ancestral" (AncestralSampler) or
            "predictor-corrector" (PredictorCorrectorSampler).
        levels: the number of noise levels, at least 2.
        steps_per_level: option of "langevin": Langevin steps at each level, at least 1.
        step_size: option of "langevin": the step size at the lowest level, in squared units of x, above 0 and
            below 2 sigma_min^2.
        exact_noise: option of "langevin": whether the noise of a step has variance 2a - a^2/sigma^2 instead of 2a.
        consistent: option of "langevin": whether to use consistent annealed sampling.
        method: option of "ode": "heun" or "dpm-solver++".
        churn: option of "ode": how much new noise the steps add, at least 0.
        churn_min: option of "ode": the lowest level at which noise is added, in the units of x.
        churn_max: option of "ode": the highest level at which noise is added, in the units of x.
        churn_noise: option of "ode": the factor of the added noise, above 0.
        variance: option of "ancestral": "large", "small" or "learned".
        clamp_denoised: option of "ancestral": whether to clamp the denoised image at every step.
        predictor: option of "predictor-corrector": "ancestral" or "reverse-diffusion".
        corrector_steps: option of "predictor-corrector": Langevin steps after each predictor step, at least 0.
        snr: option of "predictor-corrector": the signal-to-noise ratio of the corrector, above 0 and below 1.
        sigma_max: option of all samplers: the highest noise level, in the units of x; None is that of the network.
        sigma_min: option of all samplers: the lowest noise level, in the units of x; None is that of the network.

    Raises:
        ValueError: if a value is out of range or of the wrong type, an option belongs to another sampler, or
            ``consistent`` is True with several steps per level or with ``exact_noise``.

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
    churn: float | None = None
    churn_min: float | None = None
    churn_max: float | None = None
    churn_noise: float | None = None
    variance: str | None = None
    clamp_denoised: bool | None = None
    predictor: str | None = None
    corrector_steps: int | None = None
    snr: float | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None

    SCHEMA: ClassVar[Mapping[str, Field]] = _SCHEMA
    OPTIONS: ClassVar[Mapping[str, Set[str]]] = _OPTIONS
    NOISE: ClassVar[tuple[str, ...]] = ("levels", "sigma_max", "sigma_min")  # options of all samplers

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            object.__setattr__(self, name, native(value))  # numbers of NumPy as those of Python
        check(self.to_dict(), _SCHEMA, "sampler_settings")
        foreign = self.options.keys() - _OPTIONS[self.sampler]
        if foreign:
            known = ", ".join(sorted(_OPTIONS[self.sampler]))
            raise ValueError(
                f"sampler_settings: {', '.join(sorted(foreign))} is not an option of the sampler {self.sampler!r}, "
                f"whose options are {known}."
            )
        if self.consistent and (self.steps_per_level not in (None, 1) or self.exact_noise is not None):
            raise ValueError(
                "sampler_settings: consistent sampling takes one step per level and derives the noise from the "
                f"schedule: leave out steps_per_level and exact_noise, got {self.steps_per_level!r} and "
                f"{self.exact_noise!r}."
            )

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler that are set, as keyword arguments; without those of all samplers."""
        return {key: value for key, value in self.to_dict().items() if key not in ("sampler", *self.NOISE)}

    @property
    def noise(self) -> dict[str, Any]:
        """The options of the noise levels that are set, as keyword arguments of every sampler."""
        return {key: value for key, value in self.to_dict().items() if key in self.NOISE}

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values for JSON, without those that are None; ``from_dict`` is the inverse."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSettings:
        """Creates settings from a dict that ``to_dict`` returned.

        Args:
            values: at least "sampler", and the options that are set; None is as if the key were absent.

        Raises:
            ValueError: if a key is unknown or missing, or a value is out of range.
        """
        if isinstance(values, Mapping):
            values = {key: value for key, value in values.items() if value is not None or key not in _SCHEMA}
        check(values, _SCHEMA, "sampler_settings", closed=True)
        return cls(**values)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.to_dict().items())
