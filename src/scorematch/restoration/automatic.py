"""The default method for operators that are not linear: "guide-jacobian", or "guide" for a score without gradients."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from scorematch.core.scores import Score, WithoutGradientsError
from scorematch.restoration.method import Restoration


class Automatic(Restoration):
    """A method that changes the score, and another one from the first call on if the score has no gradients.

    Args:
        best: the method.
        guide: the method "guide", for a score without gradients.
    """

    def __init__(self, best: Restoration, guide: Restoration) -> None:
        self._method, self._guide = best, guide
        self._decided = False
        self.centers = best.centers

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score of the method, which is decided at the first call."""
        if self._decided:
            return self._method.score(score, x, sigma, rows)
        self._decided = True
        try:
            return self._method.score(score, x, sigma, rows)
        except WithoutGradientsError:
            self._method = self._guide
        warnings.warn(
            'the score has no gradients: restore="auto" uses the method "guide", which is less accurate. Pass '
            'restore="guide" to turn this warning off.',
            stacklevel=2,
        )
        return self._method.score(score, x, sigma, rows)

    def finish(self, x: Tensor) -> Tensor:
        """As the method."""
        return self._method.finish(x)
