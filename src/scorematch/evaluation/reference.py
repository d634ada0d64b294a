r"""The real images of an evaluation, and images from the Gaussian with their mean and covariance.

Samples of the Gaussian need no covariance matrix. For images :math:`x_1, \dots, x_N` with the mean :math:`\bar x` and
independent standard normal numbers :math:`w_j`,

.. math:: \bar x + \frac{1}{\sqrt{N - 1}} \sum_{j=1}^N w_j\, (x_j - \bar x)

has exactly their mean and covariance. Values are clamped to [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.processes import this_process
from scorematch.core.randomness import seed_of, standard_normal
from scorematch.data.array_data import ArrayData
from scorematch.data.find import check_path
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import Crop, to_float, to_uint8
from scorematch.evaluation.features import Extractor
from scorematch.evaluation.statistics import Statistics, is_statistics_file, statistics_of
from scorematch.sampling.bulk import SEEDS

_BLOCK = 4096  # images of the reference that are read at a time for the Gaussian
_VALUES = 2**27  # values of Gaussian images that are made in one pass over the reference


def open_for(
    source: Any,
    shape: Sequence[int] | None,
    what: str,
    *,
    crop: Crop = "center",
    labels: bool = False,
    strict: bool = True,
    progress: bool = True,
) -> ImageData:
    """Opens images, cropped and resized to a shape (C, H, W) unless it is None."""
    size, channels = (None, None) if shape is None else ((shape[1], shape[2]), shape[0])
    data = open_images(
        source, image_size=size, channels=channels, crop=crop, labels=labels, strict=strict, progress=progress
    )
    if shape is not None and tuple(data.shape) != tuple(shape):  # of an ImageData, which is returned unchanged
        raise ValueError(f"the {what} must have the shape {tuple(shape)}, got {tuple(data.shape)}.")
    return data


def statistics_for(
    extractor: Extractor, source: ImageData | Statistics | str | os.PathLike[str], options: dict[str, Any]
) -> Statistics:
    """The statistics of the features of an extractor: of images, given ones, or those in a file.

    Args:
        extractor: the extractor.
        source: the images, the statistics, or the path of their file.
        options: arguments of ``statistics_of``.
    """
    if isinstance(source, Statistics):
        source.check(extractor)
        return source
    if isinstance(source, str | os.PathLike):
        return Statistics.load(source, extractor)
    if extractor.fingerprint is None:
        # Statistics need a fingerprint. These are neither saved nor compared with others.
        extractor, options = replace(extractor, fingerprint="unknown"), {**options, "cache": False}
    return statistics_of(source, extractor, **options)


def check_sources(*sources: Any) -> None:
    """Checks that paths exist or may be names of data sets on the Hub, before slower work; other sources are skipped.

    Raises:
        FileNotFoundError: if a path does not exist.
        ImportError: if a source may be the name of a data set, and the package datasets is not installed.
    """
    for source in sources:
        if isinstance(source, str | os.PathLike):
            check_path(source)


def are_same(one: Any, other: Any) -> bool:
    """Whether two sources are the same object, or the same path or name."""
    paths = isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike)
    return one is other or (paths and Path(one).expanduser().resolve() == Path(other).expanduser().resolve())


def first_images(source: Any, shape: Sequence[int] | None, *, crop: Crop) -> Tensor | None:
    """The first images of a reference, at most 4096; None if it is statistics."""
    if isinstance(source, Statistics) or is_statistics_file(source):
        return None
    return next(_blocks(open_for(source, shape, "images of the reference", crop=crop, progress=False)))


def read_batches(data: ImageData | ArrayData, chosen: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields the share of this process of the chosen images, in batches."""
    k, m = this_process()
    return (data.read(rows)[0] for rows in chosen.split(batch_size)[k::m])


def shown(batches: Iterable[Tensor], n: int, title: str, progress: bool) -> Iterator[Tensor]:
    """The batches of this process, with a progress bar for the n images of all processes."""
    k, m = this_process()
    with tqdm(total=n, desc=title, unit="img", leave=False, disable=not progress or k > 0) as bar:
        for images in batches:
            yield images
            bar.update(min(m * len(images), n - bar.n))  # assumes that the other processes are as fast


def gaussian_images(data: ImageData, n: int, *, seed: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
    """Draws images from the Gaussian with the mean and the covariance of a data set, in batches.

    Image i depends on the seed and on i only, with the same bits for the same batch size. Under ``torch.distributed``
    each process draws its own share.

    Args:
        data: the data set, of at least two images.
        n: the number of images, over all processes together, at least 1.
        seed: the seed of all images.
        batch_size: the number of images per batch, at least 1.

    Yields:
        Images (batch_size, C, H, W), float32 in [0, 1], on the CPU.

    Raises:
        ValueError: if there are fewer than two images, or n or ``batch_size`` is below 1.
    """
    n, batch_size = check_count("n", n), check_count("batch_size", batch_size)
    if len(data) < 2:
        raise ValueError(f"the Gaussian of a data set needs at least 2 images, got {len(data)}.")
    k, m = this_process()
    own = torch.arange(n, device="cpu").split(batch_size)[k::m]
    mean = torch.zeros(data.shape, dtype=torch.float64, device="cpu")
    for block in _blocks(data):
        mean += block.double().sum(0) / len(data)
    flat = mean.float().flatten()
    batches_at_once = max(1, _VALUES // (batch_size * flat.numel()))
    first = seed_of(seed, "gaussian")
    for start in range(0, len(own), batches_at_once):
        group = own[start : start + batches_at_once]
        generators = [[torch.Generator().manual_seed((first + i) % SEEDS) for i in rows.tolist()] for rows in group]
        images = [flat.new_zeros(len(rows), flat.numel()) for rows in group]
        for block in _blocks(data):
            centered = block.flatten(1) - flat
            for batch, drawing in zip(images, generators, strict=True):
                batch.addmm_(standard_normal((len(drawing), len(centered)), drawing, flat.device), centered)
        for batch in images:
            yield (flat + batch / (len(data) - 1) ** 0.5).clamp(0, 1).view(-1, *data.shape)


def _blocks(data: ImageData) -> Iterator[Tensor]:
    """All images in blocks, rounded to 8 bits, float32 in [0, 1]."""
    for rows in torch.arange(len(data), device="cpu").split(_BLOCK):
        yield to_float(to_uint8(data.read(rows)[0]))
