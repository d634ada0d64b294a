"""Values of each image of a data set, computed in batches over all processes of ``torch.distributed``.

The random numbers of an image depend on a seed and on the content of the image. Its values therefore depend neither on
its place in the data nor on the other images or the number of processes, except through rounding in the network, which
depends on the batch. Equal images get different random numbers: they are counted, and their number is a part of the
seed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.conditions import Parts, map_parts
from scorematch.core.processes import gathered, group_process
from scorematch.core.randomness import seed_of
from scorematch.data.pictures import to_float
from scorematch.evaluation.rows import double

# An int is the class of all images; a function computes the condition from a batch of images and their labels.
ConditionChoice = int | Callable[[Tensor, Any], Tensor | Parts] | None


class ImageBatch(NamedTuple):
    """A batch of images.

    Attributes:
        x: the images (b, ...), floating point; images in [0, 1].
        labels: their labels (b,), int64, or None.
        keys: a hash of the content of each image; the second and every later one of equal images has its number too.
        indices: their indices in the data (b,), int64.
    """

    x: Tensor
    labels: Tensor | None
    keys: list[str]
    indices: Tensor

    def seeds(self, *parts: int | str) -> list[int]:
        """A seed for each image, from the given parts and the content of the image."""
        return [seed_of(*parts, key) for key in self.keys]

    def condition(self, condition: ConditionChoice, device: torch.device) -> Tensor | Parts | int | None:
        """The condition of the batch, on a device."""
        if not callable(condition):
            return condition
        return map_parts(lambda part: part.to(device), condition(self.x, self.labels))


def values_per_image(
    function: Callable[[ImageBatch], Tensor],
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    indices: Tensor,
    *,
    batch_size: int,
    title: str,
    progress: bool,
) -> Tensor:
    """Computes values of images. Under ``torch.distributed`` every process must call it.

    Batch b has the images ``indices[b * batch_size : (b + 1) * batch_size]``; process k of m computes the batches k,
    k + m, k + 2 m, ... Every process reads all images, to count equal ones. Only one batch is in memory at a time.

    Args:
        function: maps a batch of b images to its values (b, K).
        read: reads the images and the labels with given indices. uint8 images are divided by 255.
        indices: the indices of the images (n,).
        batch_size: the number of images in a batch, at least 1.
        title: the name of the progress bar.
        progress: whether to show a progress bar.

    Returns:
        The values (n, K), float64, on the CPU, in the order of the indices.

    Raises:
        ValueError: if a value is NaN or infinite; the message has the index of the image.
    """
    check_count("batch_size", batch_size)
    rank, processes = group_process()
    found, known = {}, Counter[str]()
    starts = range(0, len(indices), batch_size)
    for number, start in enumerate(tqdm(starts, title, unit="batch", leave=False, disable=not progress or rank > 0)):
        own = indices[start : start + batch_size]
        images, labels = read(own)
        keys = [_key(image, known) for image in images]
        if number % processes != rank:
            continue
        values = double(function(ImageBatch(to_float(images), labels, keys, own))).cpu()
        wrong = ~values.isfinite().all(1)
        if wrong.any():
            i = int(wrong.int().argmax())
            raise ValueError(f"{title}: image {int(own[i])} has the values {values[i].tolist()}, which are not finite.")
        found[start] = values
    batches = {start: values for part in gathered(found) for start, values in part.items()}
    return torch.cat([batches[start] for start in starts])


def _key(image: Tensor, known: Counter[str]) -> str:
    """A hash of the content of an image, with its number if equal images are known; counts the image."""
    content = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()
    known[content] += 1
    return content if known[content] == 1 else f"{content} {known[content]}"


def choose(length: int, n: int | None, seed: int) -> Tensor:
    """The indices (n,) of the images to evaluate: n random ones, in random order, or all for None.

    Raises:
        ValueError: if there are fewer than n images, or n is below 2.
    """
    n = length if n is None else n
    if not 2 <= n <= length:
        raise ValueError(f"n must be from 2 to the number of images, {length}, got {n}.")
    generator = torch.Generator().manual_seed(seed_of(seed, "images"))
    return torch.randperm(length, generator=generator, device="cpu")[:n]
