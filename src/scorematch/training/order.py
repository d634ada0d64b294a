"""The order in which a run sees the images of its data."""

from __future__ import annotations

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import seed_of


class Order:
    """The order of the images in a run: each epoch is a random permutation of all images that depends on the seed.

    Image i of a run does not depend on the batch size, the number of processes, or interruptions. ``order(start,
    stop)`` returns the indices in the data of the images start to stop - 1 of the run.

    Args:
        length: the number of images in the data, at least 1.
        seed: the seed of the run.

    Example:
        >>> order = Order(5, seed=0)
        >>> sorted(order(0, 5).tolist()), bool((order(3, 8)[:2] == order(0, 5)[3:]).all())
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, length: int, seed: int) -> None:
        check_count("length", length)
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, start: int, stop: int) -> Tensor:
        """The indices in the data of the images ``start`` to ``stop - 1`` of the run, int64 (stop - start,)."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.length)
            last = min(self.length, first + stop - start)
            parts.append(self._permutation_of(epoch)[first:last])
            start += last - first
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def _permutation_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator, device="cpu")
        return self._permutation
