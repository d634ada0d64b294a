r"""Accumulators of features over batches and processes: ``Moments`` keeps the mean and covariance, ``Rows`` all.

The mean and the scatter matrix :math:`M = \sum_i (f_i - \bar f)(f_i - \bar f)^\top` of the union of two sets follow
from those of the sets. With :math:`\delta = \bar f_b - \bar f_a`,

.. math:: \bar f = \bar f_a + \frac{n_b}{n_a + n_b} \delta, \qquad
          M = M_a + M_b + \frac{n_a n_b}{n_a + n_b}\, \delta \delta^\top .

No large sums of squares are subtracted, so a large mean does not reduce the precision of the covariance.

All sums are in float64, on the device of the features, or on the CPU if the device does not support float64.

References:
    Chan, Golub and LeVeque, 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, Eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scorematch.core.processes import gathered, world_size
from scorematch.evaluation.rows import check_features, double

_BLOCK = 8192  # features that are converted to float64 at a time


class Moments:
    """The number, the mean and the covariance of features that arrive in batches.

    Up to rounding, the result does not depend on the batches, their order or the processes. The memory is that of a
    (D, D) matrix of float64.

    Attributes:
        n: the number of features so far.

    Example:
        >>> moments = Moments.of(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]).split(2))
        >>> moments.n, moments.mean.tolist(), moments.covariance.tolist()
        (3, [2.0, 2.0], [[4.0, 3.0], [3.0, 3.0]])
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> Moments:
        """The moments of features in batches."""
        moments = cls()
        for features in batches:
            moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Adds features (N, D), floating point."""
        for block in check_features(features).split(_BLOCK):
            rows = double(block)
            mean = rows.mean(0)
            centered = rows - mean
            self._add(len(rows), mean, centered.T @ centered)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = n, mean, scatter
            return
        _check_dimension(len(mean), len(self._mean))
        mean, scatter = mean.to(self._mean.device), scatter.to(self._mean.device)
        delta, total = mean - self._mean, self.n + n
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    def reduce(self) -> Moments:
        """Returns the moments over all processes of ``torch.distributed``; every process must call it.

        Without a process group it returns itself.
        """
        if world_size() == 1:
            return self
        result = Moments()
        own = None if self._mean is None or self._scatter is None else (self.n, self._mean.cpu(), self._scatter.cpu())
        for part in gathered(own):
            if part is not None:
                result._add(*part)
        return result

    @property
    def mean(self) -> Tensor:
        """The mean (D,), float64."""
        if self._mean is None:
            raise ValueError("there are no features yet: call update.")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64: the scatter matrix divided by n - 1."""
        if self._scatter is None or self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.n}.")
        return self._scatter / (self.n - 1)


class Rows:
    """Collects features that arrive in batches.

    They are kept on their device, in float32 or float64: 50,000 features of dimension 2,048 take 410 MB.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def update(self, features: Tensor) -> None:
        """Adds features (N, D), floating point."""
        features = check_features(features)
        if self._parts:
            _check_dimension(features.shape[1], self._parts[0].shape[1])
        self._parts.append(features.to(torch.promote_types(features.dtype, torch.float32)))

    def gather(self) -> Tensor:
        """Returns the features (N, D) of all processes of ``torch.distributed``; every process must call it."""
        if len(self._parts) > 1:
            # The joined tensor replaces the parts, so only one copy is kept.
            self._parts = [torch.cat([part.to(self._parts[0].device) for part in self._parts])]  # in the widest dtype
        own = self._parts
        if world_size() > 1:
            own = [part for parts in gathered([part.cpu() for part in self._parts]) for part in parts]
        if not own:
            raise ValueError("there are no features yet: call update.")
        for part in own:
            _check_dimension(part.shape[1], own[0].shape[1])
        return own[0] if len(own) == 1 else torch.cat(own).to(self._parts[0].device if self._parts else "cpu")


def _check_dimension(dimension: int, before: int) -> None:
    if dimension != before:
        raise ValueError(f"features have {dimension} dimensions, but those before have {before}.")
