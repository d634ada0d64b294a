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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scorematch.core.processes import (
    communication_device,
    over_processes,
    processes,
)

_BLOCK = 8192  # features that are converted to float64 at a time
_ASYMMETRY = 1e-5  # the tolerance of a covariance, relative to its largest entry; files may hold float32


def check_features(features: Any, name: str = "features") -> Tensor:
    """Checks features (N, D), and detaches them.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if they are not (N, D), are empty, or contain NaN or infinity.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor (N, D), got {type(features).__name__}. Write torch.as_tensor(...).")
    if not features.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {features.dtype}. Pass images to an extractor first, such as "
            "pixels()(images)."
        )
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must be (N, D), one row per image, with N and D at least 1, got shape {tuple(features.shape)}."
        )
    finite = features.isfinite().all(1)
    if not finite.all():
        wrong = int((~finite).sum())
        raise ValueError(
            f"{name} must be finite, but {wrong} of the {len(features)} rows hold NaN or infinity, the first at row "
            f"{int(finite.int().argmin())}."
        )
    return features.detach()


def double(features: Tensor) -> Tensor:
    """Converts features to float64, on the CPU if their device does not support it."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def is_symmetric(covariance: Tensor) -> bool:
    """Whether a covariance (D, D) is symmetric up to the rounding of float32, and has no NaN."""
    return bool((covariance - covariance.T).abs().max() <= _ASYMMETRY * covariance.abs().max())


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
        """Adds features (N, D), floating point.

        Raises:
            TypeError, ValueError: if they are not finite floating-point features (N, D), or D differs from before.
        """
        for block in check_features(features).split(_BLOCK):
            rows = double(block)
            mean = rows.mean(0)
            centered = rows - mean
            self._add(len(rows), mean, centered.T @ centered)

    def merge(self, other: Moments) -> None:
        """Adds all features of another accumulator.

        Raises:
            ValueError: if their dimension differs.
        """
        if other._mean is not None and other._scatter is not None:
            self._add(other.n, other._mean, other._scatter)

    def reduce(self) -> Moments:
        """Returns the moments over all processes of ``torch.distributed``; every process must call it.

        Without a process group it returns a copy.

        Raises:
            ValueError: if the dimensions of the processes differ.
        """
        result = Moments()
        if processes() == 1:
            result.merge(self)
            return result
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
        """The mean (D,), float64.

        Raises:
            ValueError: if there are no features yet.
        """
        if self._mean is None:
            raise ValueError("there are no features yet: call update.")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64: the scatter matrix divided by n - 1.

        Raises:
            ValueError: if there are fewer than two features.
        """
        if self._scatter is None or self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.n}.")
        return self._scatter / (self.n - 1)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        if len(mean) != len(self._mean):
            raise ValueError(f"features have {len(mean)} dimensions, but those before have {len(self._mean)}.")
        mean, scatter = mean.to(self._mean.device), scatter.to(self._mean.device)
        delta, total = mean - self._mean, self.n + n
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total


class Rows:
    """Collects features that arrive in batches.

    They are kept on their device, in float32 or float64: 50,000 features of dimension 2,048 take 410 MB.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def update(self, features: Tensor) -> None:
        """Adds features (N, D), floating point.

        Raises:
            TypeError, ValueError: if they are not finite floating-point features (N, D), or D differs from before.
        """
        features = check_features(features)
        if self._parts and features.shape[1] != self._parts[0].shape[1]:
            raise ValueError(
                f"features have {features.shape[1]} dimensions, but those before have {self._parts[0].shape[1]}."
            )
        self._parts.append(features.to(torch.promote_types(features.dtype, torch.float32)))

    def merge(self, other: Rows) -> None:
        """Adds all features of another accumulator.

        Raises:
            ValueError: if their dimension differs.
        """
        for part in list(other._parts):
            self.update(part)

    def gather(self) -> Tensor:
        """Returns the features (N, D) of all processes of ``torch.distributed``; every process must call it.

        Raises:
            ValueError: if there are none, or if the dimensions of the processes differ.
        """
        own = self._parts[0] if self._parts else torch.empty(0, 0)
        if len(self._parts) > 1:
            # The joined tensor replaces the parts, so only one copy is kept.
            own = torch.cat([part.to(own.device) for part in self._parts])  # in the widest dtype
            self._parts = [own]
        if processes() > 1:
            own = self._gather(own)
        if own.numel() == 0:
            raise ValueError("there are no features yet: call update.")
        return own

    def _gather(self, own: Tensor) -> Tensor:
        dimension = _common_dimension(own.shape[1])
        wide = int(over_processes(torch.tensor(own.dtype == torch.float64, dtype=torch.int64), "max"))
        rows = own.to(torch.float64 if wide else torch.float32)
        counts = torch.zeros(processes(), dtype=torch.int64)
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
