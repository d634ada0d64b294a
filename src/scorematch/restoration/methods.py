"""The restoration methods by name, as the argument ``restore`` of a sampler has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scorematch.restoration.automatic import Automatic
from scorematch.restoration.guide import Guidance
from scorematch.restoration.method import Restoration
from scorematch.restoration.moments import MomentMatching
from scorematch.restoration.observation import Observation
from scorematch.restoration.replacement import replacement
from scorematch.restoration.spectral import Spectral

__all__ = ["METHODS", "Method"]

# The names in METHODS, for type checkers.
Restore = Literal["auto", "replace", "guide", "guide-jacobian", "spectral", "moment-matching"]


@dataclass(frozen=True)
class Method:
    """A restoration method.

    Attributes:
        help: what it does, in a few words.
        cost: what it costs in comparison with drawing images.
        make: makes it for an observation and the variance of the data.
    """

    help: str
    cost: str
    make: Callable[[Observation, float], Restoration]


def _replace(observation: Observation, variance: float) -> Restoration:
    gain = observation.operator.gain
    return Guidance(observation, variance, jacobian=False) if gain is None else replacement(observation, gain)


def _auto(observation: Observation, variance: float) -> Restoration:
    operator = observation.operator
    best: Restore = "guide-jacobian"
    if not isinstance(observation.sigma, float):
        best = "moment-matching"
    elif operator.is_linear and operator.gain is None:  # such as a blur
        spectral = _spectral(observation, variance)
        if spectral is not None:
            return spectral
        best = "moment-matching"

    def without_gradients() -> tuple[str, Restoration]:
        other = _spectral(observation, variance)
        return ("guide", METHODS["guide"].make(observation, variance)) if other is None else ("spectral", other)

    return Automatic(METHODS[best].make(observation, variance), without_gradients)


def _spectral(observation: Observation, variance: float) -> Restoration | None:
    try:
        return Spectral(observation, variance)
    except ValueError:  # the operator has no decomposition, or the noise does not fit it
        return None


METHODS: dict[Restore, Method] = {
    "auto": Method(
        "guide-jacobian; spectral or moment-matching for a linear operator without a gain, or noise that is not one "
        "number; spectral or guide for a score without gradients",
        "about twice the time, more memory",
        _auto,
    ),
    "replace": Method("keep the known pixels, or guide for an operator without a gain", "no extra time", _replace),
    "guide": Method("pull towards the known pixels", "no extra time", partial(Guidance, jacobian=False)),
    "guide-jacobian": Method(
        "like guide, more accurate", "about twice the time, more memory", partial(Guidance, jacobian=True)
    ),
    "spectral": Method("shift the state until its denoised image agrees with y", "no extra time", Spectral),
    "moment-matching": Method(
        "the posterior of normal data at each level, with the covariance of the network",
        "three to four times the time, more memory",
        MomentMatching,
    ),
}
