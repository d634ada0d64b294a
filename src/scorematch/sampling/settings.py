"""The samplers by name, and the recommended sampler of a network with its options, which is stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scorematch.core.arguments import argument, check_count
from scorematch.core.conditions import takes_image
from scorematch.core.json_files import native
from scorematch.core.schema import Field, check
from scorematch.core.scores import Score, attribute
from scorematch.restoration.methods import Restore
from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.decoupled import DecoupledSampler
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.particles import ParticleSampler
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Sampler, options_of

__all__ = ["SAMPLERS", "SamplerSettings", "recommended_sampler"]

# Keys are the values of SamplerSettings.sampler and of the command-line option --sampler.
SAMPLERS: dict[str, type[Sampler]] = {
    "langevin": AnnealedLangevinSampler,
    "ode": ODESampler,
    "ancestral": AncestralSampler,
    "predictor-corrector": PredictorCorrectorSampler,
    "particles": ParticleSampler,
    "decoupled": DecoupledSampler,
}


@dataclass(frozen=True, init=False, repr=False)
class SamplerSettings:
    """The recommended sampler of a network, and its options.

    Args:
        sampler: "langevin" (AnnealedLangevinSampler), "ode" (ODESampler), "ancestral" (AncestralSampler),
            "predictor-corrector" (PredictorCorrectorSampler), "particles" (ParticleSampler) or "decoupled"
            (DecoupledSampler).
        **options: arguments of this sampler, by name: ``levels``, ``sigma_max``, ``sigma_min``, ``denoise``, and its
            own, except those that depend on the use, such as ``restore``. None, and an option that is left out, is the
            sampler's default.
        alternatives: other measured settings of the network, with other numbers of network calls or of other samplers,
            from which ``recommended_sampler(net, calls=...)`` chooses. They have no alternatives themselves.

    Attributes:
        sampler: the name of the sampler.
        alternatives: the other settings.

    Raises:
        ValueError: if a value is out of range or of the wrong type, the sampler has no such option, or options
            contradict each other.

    Example:
        >>> SamplerSettings(levels=100, step_size=5e-5, consistent=True).to_dict()
        {'sampler': 'langevin', 'levels': 100, 'step_size': 5e-05, 'consistent': True}
    """

    sampler: str
    _given: tuple[tuple[str, Any], ...]
    alternatives: tuple[SamplerSettings, ...]

    def __init__(
        self, sampler: str = "langevin", *, alternatives: Sequence[SamplerSettings] = (), **options: Any
    ) -> None:
        check({"sampler": sampler}, {"sampler": Field(str, choices=tuple(SAMPLERS))}, "sampler_settings")
        known = options_of(SAMPLERS[sampler])
        unknown = options.keys() - known.keys()
        if unknown:
            raise ValueError(
                f"sampler_settings: {', '.join(sorted(unknown))} is not an option of the sampler {sampler!r}, whose "
                f"options are {', '.join(sorted(known))}."
            )
        given = {name: _frozen(native(options[name])) for name in known if options.get(name) is not None}
        try:
            SAMPLERS[sampler].check_options(given)
        except ValueError as error:
            raise ValueError(f"sampler_settings: {error}") from error
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "_given", tuple(given.items()))
        if any(each.alternatives for each in alternatives):
            raise ValueError("sampler_settings: alternatives must have no alternatives themselves.")
        object.__setattr__(self, "alternatives", tuple(alternatives))

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments of the sampler."""
        return dict(self._given)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values for JSON; ``from_dict`` is the inverse."""
        others = {"alternatives": [each.to_dict() for each in self.alternatives]} if self.alternatives else {}
        return {"sampler": self.sampler, **{name: native(value) for name, value in self._given}, **others}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSettings:
        """Creates settings from a dict that ``to_dict`` returned.

        Raises:
            ValueError: if "sampler" is missing, or as for the constructor.
        """
        others = Field(list, high=100, each=Field(dict))
        check(values, {"sampler": Field(str, required=True), "alternatives": others}, "sampler_settings")
        return cls(**{**values, "alternatives": [cls.from_dict(each) for each in values.get("alternatives", [])]})

    def alone(self) -> SamplerSettings:
        """These settings without alternatives."""
        return SamplerSettings(self.sampler, **self.options)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.alone().to_dict().items())

    def __repr__(self) -> str:
        others = [f"alternatives={list(self.alternatives)!r}"] if self.alternatives else []
        given = [f"{name}={value!r}" for name, value in self._given]
        return f"SamplerSettings({', '.join([repr(self.sampler), *given, *others])})"


def _frozen(value: Any) -> Any:
    """A value with tuples in place of lists, which can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def recommended_sampler(
    net: Score,
    settings: SamplerSettings | None = None,
    *,
    calls: int | None = None,
    levels: int | None = None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    denoise: bool | None = None,
) -> Sampler:
    """Creates the sampler that settings describe.

    Args:
        net: a score, usually a ScoreNet.
        settings: the sampler and its options; None uses the network's own settings, ``net.sampler_settings``, or
            AnnealedLangevinSampler with its defaults if the network has none.
        calls: the largest number of network calls per image, at least 1: of the settings and their alternatives, those
            with the most calls up to this number are used. None uses the settings themselves.
        levels: the number of noise levels, at least 2; None uses that of the settings.
        sigma_max: the highest noise level, in the units of x; None uses that of the settings.
        sigma_min: the lowest noise level, in the units of x; None uses that of the settings.
        denoise: whether to end with one step of Tweedie's formula; None uses the value of the settings.

    Returns:
        A sampler of ``net``, of the class that ``settings.sampler`` names.

    Raises:
        ValueError: if the sampler rejects an option, no settings have as few calls, or ``net`` is a plain function,
            which has no noise levels.

    Example:
        >>> from scorematch import ScoreNet
        >>> recommended_sampler(ScoreNet.from_pretrained("mnist"))
        AnnealedLangevinSampler(100 levels 16.9 -> 0.01, 1 step, step 5e-05, consistent, 100 network calls)
    """
    own: SamplerSettings | None = attribute(net, "sampler_settings")
    settings = own if settings is None else settings
    if calls is not None:
        settings = _with_calls(net, settings, check_count("calls", calls))
    noise = {"levels": levels, "sigma_max": sigma_max, "sigma_min": sigma_min, "denoise": denoise}
    given: dict[str, Any] = {name: value for name, value in noise.items() if value is not None}
    if settings is None or (settings is own and settings.sampler == "langevin"):
        # It reads the network's own settings itself, and adapts the step size to other noise levels.
        return AnnealedLangevinSampler(net, **given)
    return SAMPLERS[settings.sampler](net, **{**settings.options, **given})


def restoring_settings(net: Score, restore: Restore) -> SamplerSettings | None:
    """The settings with which a score restores images if none are given; None stands for its own settings.

    A network that draws images may recommend a flow, with which some methods restore less well. In steps of the first
    order the new noise has too small a variance. "spectral" and "moment-matching" therefore get steps of the second
    order. "guide-jacobian" does not: its changes are over-relaxed, and with such steps the error was twice as large.

    Args:
        net: the score.
        restore: the name of the restoration method.
    """
    if takes_image(net):
        return None
    levels = {"spectral": 50, "moment-matching": 30}.get(restore)
    if levels is None:
        return SamplerSettings("langevin")
    return SamplerSettings("ode", levels=levels, method="dpm-solver++", eta=1.0)


def _with_calls(net: Score, settings: SamplerSettings | None, calls: int) -> SamplerSettings | None:
    """Of settings and their alternatives, those with the most network calls up to a number."""
    stored = (settings, *(() if settings is None else settings.alternatives))
    lengths = [len(recommended_sampler(net, each)) for each in stored]
    if min(lengths) > calls:
        raise ValueError(
            f"{argument('calls')} must be at least {min(lengths)}, the fewest network calls of the stored settings, "
            f"got {calls}. For fewer, choose a sampler and its {argument('levels')}."
        )
    return stored[max(range(len(stored)), key=lambda i: lengths[i] * (lengths[i] <= calls))]
