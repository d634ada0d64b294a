"""The check that the state of a sampler is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule

# The number of steps between two checks. A check waits for the device.
_CHECK_EVERY = 16


class FiniteCheck:
    """Raises an error if a state has NaN or infinite values, without waiting for the device at every step.

    The number of the first such step is recorded on the device, and read every ``_CHECK_EVERY`` steps.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.sigmas: list[float] = []  # of the state after each step
        self.first: Tensor | None = None  # the first step with NaN or infinity, or the largest int32

    def record(self, x: Tensor, sigma: float) -> None:
        """Records whether the state after a step is finite."""
        step = len(self.sigmas)
        self.sigmas.append(sigma)
        here = torch.where(torch.isfinite(x).all(), torch.iinfo(torch.int32).max, step)
        self.first = here if self.first is None else torch.minimum(self.first, here)
        if len(self.sigmas) % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Reads what was recorded, and raises RuntimeError if a state was not finite."""
        first = torch.iinfo(torch.int32).max if self.first is None else int(self.first)
        if first < len(self.sigmas):
            before, sigma = self.sigmas[first - 1] if first else self.schedule.sigma_max, self.sigmas[first]
            level = min(range(len(self.schedule)), key=lambda i: abs(self.schedule[i] - sigma))
            step = f"after the step from sigma {before:.4g}" if before != sigma else "after a step at this level"
            raise RuntimeError(
                f"the state has NaN or infinite values from level {level} of {len(self.schedule)} on, sigma "
                f"{sigma:.4g}, {step}: the score is wrong there, or the step is too large for it."
            )
