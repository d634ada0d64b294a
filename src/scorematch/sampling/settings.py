"""The samplers by name, and the recommended sampler of a network with its options, which is stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.json_files import native
from scorematch.core.messages import about
from scorematch.core.schema import Field, check
from scorematch.core.scores import Score, attribute
from scorematch.restoration.methods import Restore
from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.decoupled import DecoupledSampler
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.origin import ORIGIN, warn_of_origin
from scorematch.sampling.particles import ParticleSampler
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Sampler, options_of, restoring_method

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
        learned_for: for learned numbers the network and the guidance to which they were fitted; for another score
            there is a warning.

    Attributes:
        sampler: the name of the sampler.
        alternatives: the other settings.
        learned_for: as given, or None.

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
    _origin: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        sampler: str = "langevin",
        *,
        alternatives: Sequence[SamplerSettings] = (),
        learned_for: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        known = options_of(SAMPLERS[sampler])
        unknown = options.keys() - known.keys()
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))} is not an option of the sampler {sampler!r}, whose "
                f"options are {', '.join(sorted(known))}."
            )
        given = {name: _frozen(native(options[name])) for name in known if options.get(name) is not None}
        SAMPLERS[sampler].check_options(given)
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "_given", tuple(given.items()))
        if any(each.alternatives for each in alternatives):
            raise ValueError("alternatives must have no alternatives themselves.")
        object.__setattr__(self, "alternatives", tuple(alternatives))
        if learned_for is not None:
            check(learned_for, ORIGIN, "learned_for", closed=True)
        origin = {} if learned_for is None else {name: _frozen(native(learned_for[name])) for name in ORIGIN}
        object.__setattr__(self, "_origin", tuple(origin.items()))

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments of the sampler."""
        return dict(self._given)

    @property
    def learned_for(self) -> dict[str, Any] | None:
        """The network and the guidance for which the numbers were learned, or None."""
        return dict(self._origin) or None

    def check_origin(self, net: Score) -> None:
        """Warns if the numbers were learned for another network or another guidance."""
        if self.learned_for is not None:
            warn_of_origin(self.learned_for, net)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values for JSON; ``from_dict`` is the inverse."""
        others = {"alternatives": [each.to_dict() for each in self.alternatives]} if self.alternatives else {}
        origin = {"learned_for": {name: native(value) for name, value in self._origin}} if self._origin else {}
        return {"sampler": self.sampler, **{name: native(value) for name, value in self._given}, **origin, **others}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSettings:
        """Creates settings from a dict that ``to_dict`` returned.

        Raises:
            ValueError: if "sampler" is missing, or as for the constructor.
        """
        others = Field(list, high=100, each=Field(dict))
        fields = {"sampler": Field(str, required=True), "alternatives": others, "learned_for": Field(dict)}
        check(values, fields, "sampler_settings")
        alternatives = [cls.from_dict(each) for each in values.get("alternatives", [])]
        with about("sampler_settings"):
            return cls(**{**values, "alternatives": alternatives})

    def alone(self, alternatives: Sequence[SamplerSettings] = ()) -> SamplerSettings:
        """These settings without alternatives, or with others."""
        return SamplerSettings(self.sampler, alternatives=alternatives, learned_for=self.learned_for, **self.options)

    def in_units(self, scale: float, shift: float) -> SamplerSettings:
        """These settings and their alternatives for the same network with data x in the units of scale * x + shift."""
        known = options_of(SAMPLERS[self.sampler])
        options = {name: known[name].field.in_units(value, scale, shift) for name, value in self._given}
        others = [each.in_units(scale, shift) for each in self.alternatives]
        return SamplerSettings(self.sampler, alternatives=others, learned_for=self.learned_for, **options)

    def __str__(self) -> str:
        return ", ".join(f"{key} {native(value)}" for key, value in [("sampler", self.sampler), *self._given])

    def __repr__(self) -> str:
        others = [f"learned_for={self.learned_for!r}"] if self._origin else []
        others += [f"alternatives={list(self.alternatives)!r}"] if self.alternatives else []
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
    restore: Restore | None = None,
    levels: int | None = None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    denoise: bool | None = None,
) -> Sampler:
    """Creates the sampler that settings describe, or that restores.

    Args:
        net: a score, usually a ScoreNet.
        settings: the sampler and its options. None uses the network's own settings, ``net.sampler_settings``, or
            AnnealedLangevinSampler with its defaults if the network has none; with ``restore`` it is
            ``ODESampler(net, restore=restore)``, unless the network was trained to restore.
        calls: the largest number of network calls per image: of the settings and their alternatives, those with the
            most calls up to this number are used. It must be in the range of their calls, or with ``restore`` at least
            2. It cannot be combined with ``levels``. None uses the settings themselves.
        restore: the method with which measurements are restored, see ``Sampler``; None draws.
        levels: the number of noise levels, at least 2; None uses that of the settings.
        sigma_max: the highest noise level, in the units of x; None uses that of the settings.
        sigma_min: the lowest noise level, in the units of x; None uses that of the settings.
        denoise: whether to end with one step of Tweedie's formula; None uses the value of the settings.

    Returns:
        A sampler of ``net``, of the class that ``settings.sampler`` names.

    Raises:
        ValueError: if the sampler rejects an option, ``calls`` is below or above those of all stored settings or
            given with ``levels``, or ``net`` is a plain function, which has no noise levels.

    Example:
        >>> from scorematch import ScoreNet
        >>> recommended_sampler(ScoreNet.from_pretrained("mnist"))
        AnnealedLangevinSampler(100 levels 16.9 -> 0.01, 1 step, step 5e-05, consistent, 100 network calls)
    """
    if calls is not None and levels is not None:
        raise ValueError(f"{argument('calls')} and {argument('levels')} cannot be combined. Leave out one.")
    if settings is None and restoring_method(net, restore) is not None:
        if calls is not None:
            levels = check_count("calls", calls, 2)
        settings, calls = SamplerSettings("ode"), None
    settings = attribute(net, "sampler_settings") if settings is None else settings
    if calls is not None:
        settings = _with_calls(net, settings, check_count("calls", calls))
    given = {"levels": levels, "sigma_max": sigma_max, "sigma_min": sigma_min, "denoise": denoise, "restore": restore}
    if settings is not None:
        settings.check_origin(net)
    return _created(net, settings, {name: value for name, value in given.items() if value is not None})


def _created(net: Score, settings: SamplerSettings | None, given: Mapping[str, Any]) -> Sampler:
    """The sampler of settings, with options in place of theirs."""
    if settings is None or (settings is attribute(net, "sampler_settings") and settings.sampler == "langevin"):
        # It reads the network's own settings itself, and adapts the step size to other noise levels.
        return AnnealedLangevinSampler(net, **given)
    return SAMPLERS[settings.sampler](net, **{**settings.options, **given})


def _with_calls(net: Score, settings: SamplerSettings | None, calls: int) -> SamplerSettings | None:
    """Of settings and their alternatives, those with the most network calls up to a number."""
    stored = (settings, *(() if settings is None else settings.alternatives))
    lengths = [len(_created(net, each, {})) for each in stored]
    if not min(lengths) <= calls <= max(lengths):
        raise ValueError(
            f"{argument('calls')} must be in the range of the stored settings, which have "
            f"{', '.join(map(str, sorted(set(lengths))))} network calls, got {calls}. For others, choose a sampler "
            f"and its {argument('levels')}."
        )
    return stored[max(range(len(stored)), key=lambda i: lengths[i] * (lengths[i] <= calls))]
