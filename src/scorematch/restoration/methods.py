"""The restoration methods by name, as the argument ``restore`` of a sampler has them."""

from __future__ import annotations

from typing import Literal

from scorematch.restoration.guidance import Guidance
from scorematch.restoration.method import Restoration
from scorematch.restoration.observation import Observation
from scorematch.restoration.replacement import Replacement

Restore = Literal["replace", "guide", "guide-jacobian"]


def restoration(observation: Observation, restore: Restore, variance: float) -> Restoration:
    """Creates the method with the name ``restore``; for an operator without a gain, "replace" means "guide"."""
    gain = observation.operator.gain
    if restore == "replace" and gain is not None:
        return Replacement(observation, gain)
    return Guidance(observation, variance, jacobian=restore == "guide-jacobian")
