r"""Memorization: how close the samples of a network are to its training images, compared with held-out images.

For each sample x the nearest training images :math:`a_1, a_2, \dots` are found, in the Euclidean distance of pixels or
of features. Three figures follow:

- **Copies.** A sample counts as a copy of :math:`a_1` if :math:`\lVert x - a_1 \rVert < k \lVert x - a_2 \rVert` with
  k = 1/3, or if the distance is zero. The ratio adapts to the density of the data around x. The share of copies among
  held-out images is the control: data sets have near-duplicates.
- **The distribution of distances** to :math:`a_1`, for samples and for held-out images.
- **The probability that a sample is nearer** to the training images than a held-out image, with ties counted as half.
  It is 1/2 if samples have the distribution of the data, above 1/2 if they are too close, and below 1/2 if they are far
  from all data, as noisy samples are.

In pixels, smooth images are close to many others. Measure in features too, and look at the picture of neighbors.

A network that was trained with flipped images can copy a flipped image. With ``flips`` the distance to a training image
is the smaller one of the distances to the image and to its mirror image.

References:
    Song & Ermon, 2019, arXiv:1907.05600, App. C.5 (the figure of nearest neighbors).
    Yoon et al., 2023, Diffusion Probabilistic Models Generalize when They Fail to Memorize (the ratio of 1/3).
    Carlini et al., 2023, Extracting Training Data from Diffusion Models, arXiv:2301.13188 (relative distances).
    Meehan et al., 2020, A Non-Parametric Test to Detect Data-Copying in Generative Models, arXiv:2004.05675 (comparison
    with held-out images).
    DeLong et al., 1988, Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves (the
    standard error).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.charts import table
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import save_grid, to_float
from scorematch.evaluation.estimate import Estimate, mean_of
from scorematch.evaluation.features import Extractor, as_extractor
from scorematch.evaluation.rows import BLOCK, check_features, double, squared_distances

_QUANTILES = (0.01, 0.1, 0.5, 0.9)


class Neighbors(NamedTuple):
    """The nearest training images of n images, the nearest first.

    Attributes:
        distances: (n, k), float64.
        indices: the indices of the training images (n, k), int64. Among equally near images the choice is arbitrary.
        flipped: whether the mirror image of the training image is the nearer one (n, k), bool.
    """

    distances: Tensor
    indices: Tensor
    flipped: Tensor

    @property
    def ratios(self) -> Tensor:
        """The distance to the nearest training image divided by that to the second (n,); 0 if both are 0."""
        return (self.distances[:, 0] / self.distances[:, 1]).nan_to_num(0.0)


class Proportion(NamedTuple):
    """A share of n images.

    Attributes:
        value: the share.
        low, high: Wilson's interval with 95 % confidence.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Tensor) -> Proportion:
        """The share of True in (n,)."""
        n, p, z2 = len(found), float(found.double().mean()), 1.959964**2
        middle, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2)))
        return cls(p, max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


def nearest(queries: Tensor, batches: Iterable[tuple[Tensor, Tensor | None]], k: int) -> Neighbors:
    """Finds the k nearest neighbors of queries among features that arrive in batches.

    Distances are computed in float64 in blocks of at most 2,048 queries. Between batches the memory is that of the
    queries and of the neighbors found so far.

    Args:
        queries: (n, D), floating point.
        batches: the features (b, D), and the features of the mirror images (b, D) or None.
        k: the number of neighbors, at least 1.

    Example:
        >>> batches = [(batch, None) for batch in torch.tensor([[4.0], [1.0], [7.0]]).split(1)]
        >>> found = nearest(torch.tensor([[0.0], [5.0]]), batches, k=2)
        >>> found.distances.tolist(), found.indices.tolist()
        ([[1.0, 4.0], [1.0, 2.0]], [[1, 0], [0, 2]])
    """
    check_count("k", k)
    queries = check_features(queries, "queries")
    # The mean is subtracted, since smaller norms lose fewer digits to cancellation.
    mean, n = double(queries).mean(0), 0
    squares = mean.new_full((len(queries), k), math.inf)
    indices = torch.zeros_like(squares, dtype=torch.int64)
    mirrored = torch.zeros_like(squares, dtype=torch.bool)
    for features, flipped in batches:
        both = [check_features(features)] + ([] if flipped is None else [check_features(flipped, "flipped")])
        for given in both:
            if given.shape[1] != queries.shape[1]:
                raise ValueError(
                    f"features must have {queries.shape[1]} dimensions, like the queries, got {given.shape[1]}. Use "
                    "one extractor, and images of one size."
                )
        centered = [double(given).to(mean.device) - mean for given in both]
        numbers = torch.arange(n, n + len(features), device=mean.device)
        for start in range(0, len(queries), BLOCK):
            rows = slice(start, start + BLOCK)
            block = double(queries[rows]) - mean
            found, flips = torch.stack([squared_distances(block, each) for each in centered]).min(0)
            known = squares[rows], indices[rows], mirrored[rows]
            new = found, numbers.expand(len(block), -1), flips.bool()
            every = [torch.cat(pair, 1) for pair in zip(known, new, strict=True)]
            squares[rows], chosen = every[0].topk(k, 1, largest=False)
            indices[rows], mirrored[rows] = (each.gather(1, chosen) for each in every[1:])
        n += len(features)
    if n < k:
        raise ValueError(f"the {k} nearest neighbors need at least {k} features, got {n}.")
    return Neighbors(squares.sqrt().cpu(), indices.cpu(), mirrored.cpu())


@dataclass(frozen=True, eq=False)
class Memorization:
    """The nearest training images of samples and of held-out images.

    Attributes:
        extractor: the name of the extractor of the features.
        training: the number of training images.
        samples: the neighbors of the samples.
        held_out: the neighbors of the held-out images; None without such images.
    """

    extractor: str
    training: int
    samples: Neighbors
    held_out: Neighbors | None

    def copies(self, ratio: float = 1 / 3) -> tuple[Proportion, Proportion | None]:
        """The share of copies among the samples, and among the held-out images.

        Args:
            ratio: k, above 0 and at most 1; 1/2 and 1/4 are common too.

        Raises:
            ValueError: if the ratio is out of range.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {ratio!r}.")
        samples, *held_out = (Proportion.of(found.ratios < ratio) for found in self._sets().values())
        return samples, held_out[0] if held_out else None

    def nearer(self) -> Estimate | None:
        """The probability that a sample is nearer to the training images than a held-out image, and its standard error.

        None without held-out images. The error is None for a single sample or a single held-out image.
        """
        if self.held_out is None:
            return None
        a, b = (found.distances[:, 0].contiguous() for found in (self.samples, self.held_out))
        # For each sample the share of held-out images that are farther, and the reverse; ties count as half.
        shares = mean_of(1 - _below(a, b)), mean_of(_below(b, a))
        errors = [share.error for share in shares if share.error is not None]
        return Estimate(shares[0].value, math.hypot(*errors) if len(errors) == 2 else None)

    def table(self) -> str:
        """The figures as a table in Markdown."""
        rows = []
        levels = torch.tensor(_QUANTILES, dtype=torch.float64, device="cpu")
        for name, found in self._sets().items():
            quantiles = [f"{value:.4g}" for value in found.distances[:, 0].quantile(levels).tolist()]
            shares = [str(Proportion.of(found.ratios < ratio)) for ratio in (1 / 2, 1 / 3, 1 / 4)]
            rows.append([name, f"{len(found.distances):,}", *quantiles, *shares])
        quantiles = [f"distance, {level:.0%} quantile" for level in _QUANTILES]
        return table([self.extractor, "images", *quantiles, "copies, k = 1/2", "k = 1/3", "k = 1/4"], rows)

    def save_picture(self, path: str | os.PathLike[str], samples: Any, training: Any, rows: int = 16) -> None:
        """Writes a picture of the samples with the smallest ratios: one in each row, and then its nearest neighbors.

        Args:
            path: the path of the image file.
            samples: the samples that were passed to ``memorization_of``.
            training: the training images that were passed to it.
            rows: the number of samples.

        Raises:
            ImportError, OSError, ValueError: as ``save_grid``.
        """
        drawn, known = open_images(samples, progress=False), open_images(training, progress=False)
        chosen = self.samples.ratios.argsort()[:rows]
        cells = [_pictures(drawn, chosen)[:, None]]
        for indices, flipped in zip(self.samples.indices[chosen].T, self.samples.flipped[chosen].T, strict=True):
            images = _pictures(known, indices)
            cells.append(torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)[:, None])
        save_grid(torch.cat(cells, 1).flatten(0, 1), path, columns=len(cells))

    def _sets(self) -> dict[str, Neighbors]:
        return {"samples": self.samples} | ({} if self.held_out is None else {"held-out images": self.held_out})


def memorization_of(
    samples: Any,
    training: Any,
    held_out: Any = None,
    *,
    features: str | Extractor | Callable[[Tensor], Tensor] = "pixels",
    neighbors: int = 8,
    flips: bool = False,
    batch_size: int = 1024,
    progress: bool = True,
) -> Memorization:
    """Finds the nearest training images of samples, and of held-out images as the control.

    The training images are read once, in batches. The memory is that of the features of all samples and held-out images
    and of one batch.

    Args:
        samples: images of the network: an ``ImageData``, or what ``scorematch.data.open_images`` takes, such as a
            folder or a tensor (N, C, H, W).
        training: the training images, with at least ``neighbors`` images.
        held_out: images of the same source that were not used in training; None for no control.
        features: "pixels", another name of an extractor, an Extractor, or a function of images; see ``as_extractor``.
        neighbors: the number of neighbors of each image, at least 2.
        flips: whether the network was trained with mirror images too.
        batch_size: the number of images that are read at once, at least 1.
        progress: whether to show a progress bar.

    Returns:
        The nearest training images of each sample and of each held-out image.

    Raises:
        OSError, TypeError: as ``open_images``.
        ValueError: as ``open_images``; also if there are too few training images, ``neighbors`` or ``batch_size`` is
            too small, or the features of training or held-out images have another dimension than those of the samples.
    """
    check_count("neighbors", neighbors, 2)
    batch_size = check_count("batch_size", batch_size)
    extractor = as_extractor(features)
    known = open_images(training, progress=progress)
    sets = [open_images(images, progress=progress) for images in (samples, held_out) if images is not None]
    queries = [torch.cat(list(map(extractor, _batches(each, batch_size, "features", progress)))) for each in sets]
    dimensions = [each.shape[1] for each in queries]
    if dimensions[0] != dimensions[-1]:
        raise ValueError(
            f"the features of the held-out images must have {dimensions[0]} dimensions, like those of the samples, got "
            f"{dimensions[-1]}. Pass images of one size."
        )
    pairs = (
        (extractor(images), extractor(images.flip(3)) if flips else None)
        for images in _batches(known, batch_size, "training images", progress)
    )
    found = nearest(torch.cat(queries), pairs, neighbors)
    counts = [len(each) for each in queries]
    parts = [Neighbors(*part) for part in zip(*(each.split(counts) for each in found), strict=True)]
    return Memorization(extractor.name, len(known), parts[0], parts[1] if held_out is not None else None)


def _batches(data: ImageData, batch_size: int, title: str, progress: bool) -> Iterator[Tensor]:
    parts = torch.arange(len(data), device="cpu").split(batch_size)
    for rows in tqdm(parts, title, unit="batch", leave=False, disable=not progress):
        yield data.read(rows)[0]


def _pictures(data: ImageData, indices: Tensor) -> Tensor:
    """Images (n, C, H, W) in [0, 1]."""
    return to_float(data.read(indices)[0])


def _below(values: Tensor, others: Tensor) -> Tensor:
    """For each value the share of the others that are below it; equal ones count as half."""
    ordered = others.sort().values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(others))
