r"""Accumulators of features over batches and processes: ``Moments`` keeps the mean and covariance, ``Rows`` all.

The mean and the scatter matrix :math:`M = \sum_i (f_i - \bar f)(f_i - \bar f)^\top` of the union of two sets follow
from those of the sets. With :math:`\delta = \bar f_b - \bar f_a`,

.. math:: \bar f = \bar f_a + \frac{n_b}{n_a + n_b} \delta, \qquad
          M = M_a + M_b + \frac{n_a n_b}{n_a + n_b}\, \delta \delta^\top .

No large sums of squares are subtracted, so a large mean does not reduce the precision of the covariance. Over
processes p the formula is :math:`M = \sum_p M_p + n_p (\bar f_p - \bar f)(\bar f_p - \bar f)^\top`.

All sums are in float64, on the device of the features, or on the CPU if the device does not support float64.

References:
    Chan, Golub and LeVeque, 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, Eq. 2.1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from scorematch.core.processes import communication_device, over_processes, world_size
from scorematch.evaluation.rows import check_features, double

_BLOCK = 8192  # features that are converted to float64 at a time


class Moments:
    """The number, the mean and the covariance of features that arrive in batches.

    Up to rounding, the result does not depend on the batches, their order or the processes. The memory is that of a
    (D, D) matrix of float64.

    Attributes:
        n: the number of features so far.

    Example:
        >>> moments = Moments()
        >>> for batch in torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]).split(2):
        ...     moments.update(batch)
        >>> moments.n, moments.mean.tolist(), moments.covariance.tolist()
        (3, [2.0, 2.0], [[4.0, 3.0], [3.0, 3.0]])
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Adds features (N, D), floating point."""
        for block in check_features(features).split(_BLOCK):
            rows = double(block)
            mean = rows.mean(0)
            centered = rows - mean
            scatter = centered.T @ centered
            if self._mean is None or self._scatter is None:
                self.n, self._mean, self._scatter = len(rows), mean, scatter
                continue
            if len(mean) != len(self._mean):
                raise ValueError(f"features have {len(mean)} dimensions, but those before have {len(self._mean)}.")
            mean, scatter = mean.to(self._mean.device), scatter.to(self._mean.device)
            delta, total = mean - self._mean, self.n + len(rows)
            self._scatter += scatter + torch.outer(delta, delta) * (self.n * len(rows) / total)
            self._mean += delta * (len(rows) / total)
            self.n = total

    def reduce(self) -> Moments:
        """Returns the moments over all processes of ``torch.distributed``; every process must call it.

        Without a process group it returns itself.
        """
        if world_size() == 1:
            return self
        result = Moments()
        dimension = _common_dimension(0 if self._mean is None else len(self._mean))
        if dimension == 0:
            return result
        mean = torch.zeros(dimension, dtype=torch.float64) if self._mean is None else self._mean
        scatter = mean.new_zeros(dimension, dimension) if self._scatter is None else self._scatter
        result.n = int(over_processes(torch.tensor(self.n)))
        result._mean = over_processes(mean * self.n / result.n)
        delta = mean - result._mean
        result._scatter = over_processes(scatter + torch.outer(delta, delta) * self.n)
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
        if self._parts and features.shape[1] != self._parts[0].shape[1]:
            raise ValueError(
                f"features have {features.shape[1]} dimensions, but those before have {self._parts[0].shape[1]}."
            )
        self._parts.append(features.to(torch.promote_types(features.dtype, torch.float32)))

    def gather(self) -> Tensor:
        """Returns the features (N, D) of all processes of ``torch.distributed``; every process must call it."""
        own = self._parts[0] if self._parts else torch.empty(0, 0)
        if len(self._parts) > 1:
            # The joined tensor replaces the parts, so only one copy is kept.
            own = torch.cat([part.to(own.device) for part in self._parts])  # in the widest dtype
            self._parts = [own]
        if world_size() > 1:
            own = self._gather(own)
        if own.numel() == 0:
            raise ValueError("there are no features yet: call update.")
        return own

    def _gather(self, own: Tensor) -> Tensor:
        dimension = _common_dimension(own.shape[1])
        wide = int(over_processes(torch.tensor(own.dtype == torch.float64, dtype=torch.int64), "max"))
        rows = own.to(torch.float64 if wide else torch.float32)
        counts = torch.zeros(world_size(), dtype=torch.int64)
        counts[dist.get_rank()] = len(own)
        counts = over_processes(counts)
        padded = rows.new_zeros(int(counts.max()), dimension, device=communication_device(own.device))
        if len(own):
            padded[: len(own)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)]).to(own.device)


def _common_dimension(dimension: int) -> int:
    """Checks that all processes have the same dimension, 0 for a process without features, and returns it."""
    largest = int(over_processes(torch.tensor(dimension), "max"))
    smallest = int(over_processes(torch.tensor(dimension or largest), "min"))
    if smallest != largest:
        raise ValueError(f"features have {smallest} dimensions on one process, but {largest} on another.")
    return largest
