"""The recommended sampler of a network with its options, measured or published, which is stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, get_args

from scorematch.core.arguments import argument
from scorematch.core.json_files import native
from scorematch.core.schema import Field, check
from scorematch.sampling.ancestral import Variance
from scorematch.sampling.ode import Method
from scorematch.sampling.predictor_corrector import Predictor


def _option(sampler: str, kind: type, text: str, **bounds: Any) -> Any:
    """The field of an option of a sampler, or of "all", with the help text of its command-line option."""
    return field(default=None, metadata={"sampler": sampler, "value": Field(kind, **bounds), "help": text})


@dataclass(frozen=True)
class SamplerSettings:
    """The recommended sampler of a network and its options, which have the names of the sampler's arguments.

    Options left as None use the sampler's default.

    Args:
        sampler: "langevin" (AnnealedLangevinSampler), "ode" (ODESampler), "ancestral" (AncestralSampler) or
            "predictor-corrector" (PredictorCorrectorSampler).
        levels: the number of noise levels, at least 2, for all samplers.
        steps_per_level, step_size, exact_noise, consistent: see AnnealedLangevinSampler.
        method, churn, churn_min, churn_max, churn_noise: see ODESampler.
        variance, clamp_denoised: see AncestralSampler.
        predictor, corrector_steps, snr: see PredictorCorrectorSampler.
        sigma_max: the highest noise level, in the units of x, for all samplers; None is that of the network.
        sigma_min: the lowest noise level, in the units of x, for all samplers; None is that of the network.

    Raises:
        ValueError: if a value is out of range or of the wrong type, an option belongs to another sampler, or
            ``consistent`` is True with several steps per level or with ``exact_noise``.

    Example:
        >>> SamplerSettings(levels=100, step_size=5e-5, consistent=True).to_dict()
        {'sampler': 'langevin', 'levels': 100, 'step_size': 5e-05, 'consistent': True}
    """

    sampler: str = "langevin"
    levels: int | None = _option("all", int, "the number of noise levels", low=2, high=1_000_000)
    steps_per_level: int | None = _option(
        "langevin", int, "the number of Langevin steps at each level", low=1, high=1_000_000
    )
    step_size: float | None = _option(
        "langevin", float, "the step size at the lowest level, above 0 and below 2 sigma_min^2", above=0
    )
    exact_noise: bool | None = _option(
        "langevin",
        bool,
        "whether the noise of a Langevin step of size a has variance 2a - a^2/sigma^2 instead of 2a; both "
        "--exact-noise and --no-exact-noise turn off consistent sampling",
    )
    consistent: bool | None = _option(
        "langevin",
        bool,
        "consistent sampling: one step from each level to the next that adds exactly the missing noise",
    )
    method: str | None = _option("ode", str, "the solver (default: heun)", choices=get_args(Method))
    churn: float | None = _option("ode", float, "with heun: how much new noise the steps add (default: 0, none)", low=0)
    churn_min: float | None = _option(
        "ode", float, "the lowest level at which noise is added (default: no limit)", low=0
    )
    churn_max: float | None = _option(
        "ode", float, "the highest level at which noise is added (default: no limit)", low=0
    )
    churn_noise: float | None = _option("ode", float, "the factor of the added noise (default: 1)", above=0)
    variance: str | None = _option(
        "ancestral", str, "the variance of the noise of a step (default: large)", choices=get_args(Variance)
    )
    clamp_denoised: bool | None = _option(
        "ancestral", bool, "clamp the denoised image to [0, 1] at every step (default: no)"
    )
    predictor: str | None = _option(
        "predictor-corrector", str, "the step to the next level (default: ancestral)", choices=get_args(Predictor)
    )
    corrector_steps: int | None = _option(
        "predictor-corrector", int, "the number of Langevin steps at each level (default: 1)", low=0, high=1_000_000
    )
    snr: float | None = _option(
        "predictor-corrector",
        float,
        "the signal-to-noise ratio of these steps, above 0 and below 1 (default: 0.16)",
        above=0,
        below=1,
    )
    sigma_max: float | None = _option("all", float, "the highest noise level, within the network's range", low=0)
    sigma_min: float | None = _option("all", float, "the lowest noise level, within the network's range", low=0)

    SCHEMA: ClassVar[Mapping[str, Field]]
    OPTIONS: ClassVar[Mapping[str, tuple[str, ...]]]  # of each sampler
    NOISE: ClassVar[tuple[str, ...]]  # options of all samplers

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            object.__setattr__(self, name, native(value))  # numbers of NumPy as those of Python
        check(self.to_dict(), self.SCHEMA, "sampler_settings")
        foreign = self.options.keys() - set(self.OPTIONS[self.sampler])
        if foreign:
            known = ", ".join(sorted(self.OPTIONS[self.sampler]))
            raise ValueError(
                f"sampler_settings: {', '.join(sorted(foreign))} is not an option of the sampler {self.sampler!r}, "
                f"whose options are {known}."
            )
        if self.consistent and (self.steps_per_level not in (None, 1) or self.exact_noise is not None):
            raise ValueError(
                f"sampler_settings: consistent sampling takes one step per level and derives the noise from the "
                f"schedule: leave out {argument('steps_per_level')} and {argument('exact_noise')}, got "
                f"{self.steps_per_level!r} and {self.exact_noise!r}."
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
            values = {key: value for key, value in values.items() if value is not None or key not in cls.SCHEMA}
        check(values, cls.SCHEMA, "sampler_settings", closed=True)
        return cls(**values)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.to_dict().items())


_owned: dict[str, tuple[str, ...]] = {}
for _each in fields(SamplerSettings)[1:]:
    _owned[_each.metadata["sampler"]] = (*_owned.get(_each.metadata["sampler"], ()), _each.name)
SamplerSettings.NOISE = _owned.pop("all")
SamplerSettings.OPTIONS = _owned
SamplerSettings.SCHEMA = {
    "sampler": Field(str, required=True, choices=tuple(_owned)),
    **{each.name: each.metadata["value"] for each in fields(SamplerSettings)[1:]},
}
