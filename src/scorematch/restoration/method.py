r"""How a sampler uses an observation: the interface of a restoration method.

The observation is :math:`y = A x_0 + \sigma_y n` with an operator A and standard normal noise n. Let D be the denoised
image, :math:`x + \sigma^2 s(x, \sigma)`. If the operator has a gain c (:math:`A A^\top = c I`), let
:math:`P = A^\top A / c` be the projection onto the observed part, :math:`y^+ = A^\top y / c`, and
:math:`\varsigma = \sigma_y / \sqrt c` the noise level of :math:`y^+`. Each method has one file in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scorematch.core.batches import per_image
from scorematch.core.scores import Score, WithoutGradientsError
from scorematch.restoration.observation import Observation

__all__ = ["Restoration"]

_POWERS = 8  # iterations of the power method


class Restoration:
    """How a sampler uses an observation. This base class stands for no observation and changes nothing.

    Attributes:
        sigma: the noise level below which ``project`` changes nothing, since the state contains the observation.
        centers: whether a start that is drawn is moved to the mean of the posterior; see ``scorematch.sampling.start``.
    """

    sigma = 0.0
    centers = False

    def start(self, x: Tensor, sigma: float, middle: float | Tensor) -> Tensor:
        """The state to start from; x is noise of the highest level, sigma, around ``middle``."""
        return x

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that the sampler uses at x, the ``rows`` of the state; sigma is a float or a tensor ()."""
        return score(x, sigma)

    def project(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state at the start of a step, before the score is computed; z is the noise of the step."""
        return x

    def stay(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score and the noise of a step that stays at its level."""
        return score, z

    def project_last(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state before the final denoising, at the lowest level; z is the noise of the last step."""
        return self.project(x, sigma, z)

    def finish(self, x: Tensor) -> Tensor:
        """The result; if y has no noise, its observed part is replaced by the observation."""
        return x


@contextmanager
def backward_pass() -> Iterator[None]:
    """A context in which a lack of memory, and a score that converts x to an array, are reported with their remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeError(
            "there is not enough memory for a backward pass through the network. Pass a smaller batch_size, or "
            'restore="replace", which needs none.'
        ) from error
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise WithoutGradientsError(
            f'the score has no gradients: {error} Pass restore="shift" or "guide", which need none.'
        ) from error


def known_sigma(observation: Observation, method: str) -> float | Tensor:
    """The standard deviation of the noise of y, or of each value; ValueError names the method if it is a function."""
    if callable(observation.sigma):
        raise ValueError(
            f'the method "{method}" needs the standard deviation of the noise of each value of y, got {observation!r}. '
            'Write restore="shift" or "moment-matching".'
        )
    return observation.sigma


def largest_eigenvalue(product: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """The largest eigenvalue (n,) of a positive matrix for each sample, above 0, by the power method from u."""
    for _ in range(_POWERS):
        u = product(u / per_image(_length(u), u))
    return _length(u)


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
