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
from scorematch.restoration.shift import Shift

__all__ = ["METHODS", "Method"]

# The names in METHODS, for type checkers.
Restore = Literal["auto", "replace", "guide", "guide-jacobian", "shift", "moment-matching"]


@dataclass(frozen=True)
class Method:
    """A restoration method.

    Attributes:
        help: what it does, in a few words.
        cost: what it costs in comparison with drawing images.
        make: makes it for an observation and the variance of the data.
        levels: the number of noise levels of ``ODESampler(net, restore=...)``.
        order: the order of its steps, or None for that of the sampler. Changes that are over-relaxed, as those of
            "guide-jacobian" are, need steps of the first order: with the second the error was twice as large.
    """

    help: str
    cost: str
    make: Callable[[Observation, float], Restoration]
    levels: int = 50
    order: int | None = 1


def _replace(observation: Observation, variance: float) -> Restoration:
    gain = observation.operator.gain
    return Guidance(observation, variance, jacobian=False) if gain is None else replacement(observation, gain)


def _auto(observation: Observation, variance: float) -> Restoration:
    if observation.operator.is_linear or callable(observation.sigma):
        return Shift(observation, variance)
    return Automatic(*(Guidance(observation, variance, jacobian=jacobian) for jacobian in (True, False)))


METHODS: dict[Restore, Method] = {
    "auto": Method(
        "shift; guide-jacobian for an operator that is not linear",
        "up to half more time; twice the time and more memory if the operator is not linear",
        _auto,
        order=None,
    ),
    "replace": Method("keep the known pixels; guide for blur and others without a gain", "no extra time", _replace),
    "guide": Method("pull towards the known pixels", "no extra time", partial(Guidance, jacobian=False)),
    "guide-jacobian": Method(
        "like guide, more accurate", "about twice the time, more memory", partial(Guidance, jacobian=True)
    ),
    "shift": Method(
        "shift the state until its denoised image agrees with y", "up to half more time", Shift, order=None
    ),
    "moment-matching": Method(
        "the posterior of normal data at each level, with the covariance of the network",
        "three to four times the time, more memory",
        MomentMatching,
        levels=30,
        order=None,
    ),
}
