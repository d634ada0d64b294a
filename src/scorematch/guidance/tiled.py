r"""The score of an image that is larger than those of a network, from overlapping tiles.

Let :math:`T_k x` be tile k of an image x, of the size that the network knows, :math:`s` the score of the network, and
:math:`w_k` weights, which are largest in the middle of a tile. The score of the image is

.. math:: S(x, \sigma) = \frac{\sum_k T_k^\top w_k\, s(T_k x, \sigma)}{\sum_k T_k^\top w_k} .

It belongs to the denoised image :math:`x + \sigma^2 S` in which each pixel is the weighted mean of those of the
denoised tiles: at each noise level all tiles agree on one image, so that there are no seams. S is a score for every
sampler, likelihood and restoration method. It is exact if pixels are independent, and nearly exact if those that depend
on each other are closer than the overlap. What tiles cannot know: relations over more than the size of a tile, such as
the two eyes of a large face, and the place of a tile in the image. A network that was trained on whole, aligned
pictures draws one in each tile; tiles are for networks of textures and of crops of photographs.

References:
    Bar-Tal et al., 2023, MultiDiffusion, arXiv:2302.08113, Eq. 3 and 5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scorematch.core.arguments import argument, check_count, check_sizes
from scorematch.core.batches import as_sigma, check_data
from scorematch.core.conditions import as_condition, map_parts, rows_of
from scorematch.core.derived import DerivedScore, call
from scorematch.core.json_files import native
from scorematch.core.scores import Given, Score, attribute, has_inference_copy, inference_copy_of

# The largest number of values in one network call by default, and in one whose gradient is computed: 21 tiles of 32x32
# pixels in color, for which a U-Net of 8 million parameters keeps 0.8 GB.
_VALUES, _WITH_GRADIENT = 2**20, 2**16


class Tiled(DerivedScore):
    """The score of samples that are larger than those of a network; see ``scorematch.guidance.tiled``.

    A call of the score calls the network for all tiles, ``batch_size`` of them at once, so that the memory does not
    depend on the size of the sample, also for a method of restoration with gradients.

    Args:
        net: a score of images (N, C, H, W), or of signals or volumes.
        size: the size of a tile along each axis: an int, or one for each axis. None is that of the samples of net.
        overlap: how much neighboring tiles share at least, 0 <= overlap < size. None is a quarter of the size.
        batch_size: the number of tiles in a network call; None is as many as have 2^20 values, or 2^16 if the method of
            restoration needs the gradient of the network.

    Raises:
        TypeError: if net is not callable, or a number is not an integer.
        ValueError: if a number is out of range, or ``size`` is None for a score without a sample shape.

    Example:
        >>> from scorematch import ScoreNet
        >>> score = Tiled(ScoreNet.from_pretrained("mnist"))
        >>> score(torch.rand(1, 1, 40, 28), 0.5).shape
        torch.Size([1, 1, 40, 28])

    References:
        Bar-Tal et al., 2023, MultiDiffusion, arXiv:2302.08113.
    """

    def __init__(
        self,
        net: Score,
        size: int | Sequence[int] | None = None,
        overlap: int | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(net)
        shape = attribute(net, "sample_shape")
        if size is None and shape is None:
            raise ValueError(f"the size of the samples of net is not known. Write {argument('size', 64, of='Tiled')}.")
        given = native(shape[1:] if size is None else size)
        self.size: int | tuple[int, ...] = (
            check_count("size", given) if isinstance(given, int) else check_sizes("size", given, "one for each axis")
        )
        least = self.size if isinstance(self.size, int) else min(self.size)
        self.overlap = check_count("overlap", least // 4 if overlap is None else overlap, 0)
        if self.overlap >= least:
            raise ValueError(f"{argument('overlap')} must be below the size of a tile, {least}, got {overlap}.")
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    sample_shape: tuple[int, ...] | None = None  # samples of any size that is not below that of a tile

    def inference_copy(self, *, compile: bool = False) -> Tiled:  # noqa: A002  (torch's word)
        """The tiles of the inference copy of its network.

        Raises:
            ValueError: for ``compile=True`` if its network cannot be compiled.
        """
        if compile and not has_inference_copy(self.net):
            raise ValueError("compile=True needs a ScoreNet. For any other score, pass torch.compile(net).")
        net = inference_copy_of(self.net, compile=compile)
        return Tiled(net, self.size, self.overlap, batch_size=self.batch_size)

    def definition(self) -> list[Any]:
        """Its score, and the geometry of the tiles."""
        return [self.net, list(self.size) if isinstance(self.size, tuple) else self.size, self.overlap]

    def extra_repr(self) -> str:
        """The geometry, which ``print`` shows."""
        return f"size={self.size}, overlap={self.overlap}"

    def _sides(self, x: Tensor) -> tuple[int, ...]:
        """The size of a tile along each axis of a sample, which is checked."""
        axes = x.shape[2:]
        sides = self.size if isinstance(self.size, tuple) else (self.size,) * len(axes)
        if len(sides) != len(axes) or any(side > length for side, length in zip(sides, axes, strict=False)):
            raise ValueError(
                f"a sample must be at least as large as a tile, {'x'.join(map(str, sides))}, got "
                f"{'x'.join(map(str, axes))}. Enlarge it, or take smaller tiles."
            )
        return sides

    def _along(self, length: int, side: int) -> list[slice]:
        """The parts of an axis that tiles have, at equal distances of at most side - overlap."""
        last = math.ceil((length - side) / (side - self.overlap))
        starts = (round(i * (length - side) / max(1, last)) for i in range(last + 1))
        return [slice(start, start + side) for start in starts]

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        sides = self._sides(x)
        tiles: list[Any] = [(..., *tile) for tile in itertools.product(*map(self._along, x.shape[2:], sides))]
        given = as_condition(condition, x, self.conditioning)
        wide = torch.promote_types(x.dtype, torch.float32)  # weighted scores exceed the range of float16
        weight = _weight(sides).to(x.device, wide)
        gradient = x.requires_grad and torch.is_grad_enabled()
        values = _WITH_GRADIENT if gradient else _VALUES
        batch = max(1, values // (x.shape[1] * weight.numel())) if self.batch_size is None else self.batch_size
        levels = as_sigma(sigma, x) if isinstance(sigma, Tensor) and sigma.ndim else None  # of each sample
        if len(x) > batch:  # one tile of each sample is too many
            parts = [
                self._outputs(
                    x[rows], sigma if levels is None else levels[rows], rows_of(given, rows), variance=variance
                )
                for rows in (slice(i, i + batch) for i in range(0, len(x), batch))
            ]
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        total = torch.zeros_like(x[:1, :1], dtype=wide)
        sums = [torch.zeros_like(x, dtype=wide) for _ in range(1 + variance)]
        at_once = batch // len(x)
        for some in (tiles[i : i + at_once] for i in range(0, len(tiles), at_once)):
            cut = torch.cat([x[tile] for tile in some])
            level = sigma if levels is None else levels.repeat(len(some))
            arguments = (self.net, cut, level, _of_tiles(given, some, x))
            if gradient and len(some) < len(tiles):
                # The network is called again in the backward pass, for one batch at a time.
                outputs = checkpoint(call, *arguments, variance=variance, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = call(*arguments, variance=variance)
            for each, output in zip(sums, outputs, strict=True):
                for tile, part in zip(some, output.split(len(x)), strict=True):
                    each[tile] += weight * part
            for tile in some:
                total[tile] += weight
        return tuple((each / total).to(x.dtype) for each in sums)


def _weight(sides: Sequence[int]) -> Tensor:
    """The weights of the pixels of a tile: the product over the axes of the distance from the next border."""
    weight = torch.ones(())
    for side in sides:
        place = torch.arange(1, side + 1)
        weight = weight[..., None] * torch.minimum(place, place.flip(0))
    return weight


def _of_tiles(condition: Any, tiles: list[Any], x: Tensor) -> Any:
    """The condition of tiles: the tiles of an image, or the same class for all tiles of a sample."""

    def of_tiles(part: Tensor) -> Tensor:
        image = part.shape[2:] == x.shape[2:]
        return torch.cat([part[tile] for tile in tiles] if image else [part] * len(tiles))

    return map_parts(of_tiles, condition)
