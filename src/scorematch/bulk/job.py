"""Sampling batch by batch, where each image depends only on the seed of the job and on its number."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from scorematch import __version__
from scorematch.bulk.batches import Batch, Share, checked_share, ranges
from scorematch.bulk.classes import Classes, image_classes, number_of_classes
from scorematch.bulk.hashing import sampler_settings
from scorematch.protocol import attribute, inference_copy_of
from scorematch.randomness import seed_of
from scorematch.sampling import Sampler
from scorematch.schema import check_count, native

SEEDS = 2**32  # A torch.Generator on a CPU uses the lowest 32 bits of its seed only.


def bulk_samples(
    sampler: Sampler,
    n: int,
    *,
    first: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    condition: Classes = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
    share: Share | None = None,
) -> Iterator[Batch]:
    """Draws many samples batch by batch; each image depends only on the seed and on its number.

    Only one batch is in memory at a time. Under ``torchrun`` or ``accelerate launch`` each process draws its own share
    of the batches, and no process waits for another.

    Args:
        sampler: the sampler; its network is prepared for inference once.
        n: the number of images, over all processes together.
        first: the number of the first image. The images are ``first`` to ``first + n - 1``.
        seed: the seed of all images.
        batch_size: the number of images that go through the network at once. Batches begin at its multiples.
        condition: for class-conditional networks: an int, the class of all images; "random", uniform random classes;
            "cycle", the classes in turn. The class of an image depends only on the seed and on its number.
        classes: the number of classes for "random" and "cycle"; None is that of the network, without its null class.
        shape: the shape of one sample, for a score without ``sample_shape``.
        share: (k, m), the share k of m equal shares; None is the share of this process, see ``this_process``.

    Yields:
        ``Batch(indices, images, classes)``, with ascending numbers.

    Raises:
        TypeError, ValueError: if arguments do not fit together.
        RuntimeError: if an image has NaN or infinite values.

    Example:
        >>> from scorematch import ScoreNet
        >>> from scorematch.sampling import ODESampler
        >>> sampler = ODESampler(ScoreNet.from_pretrained("mnist"), levels=3)
        >>> [(batch.indices, tuple(batch.images.shape)) for batch in bulk_samples(sampler, 5, batch_size=4)]
        [(range(0, 4), (4, 1, 28, 28)), (range(4, 5), (1, 1, 28, 28))]
    """
    job = Job(sampler, seed=seed, batch_size=batch_size, condition=condition, classes=classes, shape=shape)
    return job.samples(n, first=first, share=share)


class Job:
    """Everything that determines image i, for every i.

    Arguments and errors are those of ``bulk_samples``.

    Attributes:
        sampler, seed, batch_size, condition: the arguments.
        shape: the shape of one sample.
        classes: the number of classes for "random" and "cycle", otherwise None.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        seed: int = 0,
        batch_size: int = 64,
        condition: Classes = None,
        classes: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, got {type(sampler).__name__}. Write ODESampler(net).")
        seed, condition, classes = map(native, (seed, condition, classes))
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}.")
        batch_size = check_count("batch_size", batch_size)
        shape = attribute(sampler.net, "sample_shape") if shape is None else shape
        if shape is None:
            raise ValueError("the shape of a sample is not known: pass shape=, without the batch axis.")
        self.sampler, self.seed, self.batch_size, self.condition = sampler, seed, batch_size, condition
        self.shape = tuple(map(int, shape))
        self.classes = number_of_classes(sampler.net, condition, classes, self.shape)

    def samples(self, n: int, *, first: int = 0, share: Share | None = None) -> Iterator[Batch]:
        """Draws images batch by batch, as ``bulk_samples`` does."""
        n, first = check_count("n", n), check_count("first", first, 0)
        if first + n > SEEDS:
            raise ValueError(f"first + n must be at most 2^32, got {first + n}.")
        return self.draw(ranges(n, self.batch_size, checked_share(share), first=first))

    def draw(self, batches: Iterable[range]) -> Iterator[Batch]:
        """Yields the batch of each range of images. Each range is requested just before its batch is drawn."""
        sampler = prepared(self.sampler)
        for indices in batches:
            classes = self.classes_of(indices)
            images = sampler.sample(
                len(indices),
                shape=self.shape,
                condition=classes,
                generator=self.seeds_of(indices),
                batch_size=len(indices),
                progress=False,
            )
            yield Batch(indices, images, classes)

    def classes_of(self, indices: Iterable[int]) -> Tensor | None:
        """The classes of images, or None."""
        return None if self.condition is None else image_classes(indices, self.condition, self.classes, self.seed)

    def seeds_of(self, indices: Iterable[int]) -> list[int]:
        """The seeds of the generators of images."""
        # Consecutive seeds differ in the lowest 32 bits for all images. Of 50,000 independent seeds, two would agree in
        # these bits with a probability of 1/4, and two images would be equal.
        first = seed_of(self.seed, "image")
        return [(first + i) % SEEDS for i in indices]

    def settings(self) -> dict[str, Any]:
        """Everything that determines the images, as plain values for JSON. The network is represented by a hash."""
        return {
            **sampler_settings(self.sampler),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "condition": self.condition,
            "classes": self.classes,
            "shape": list(self.shape),
            "scorematch": __version__,
        }


def prepared(sampler: Sampler) -> Sampler:
    """A copy of a sampler whose network is prepared for inference once, for many calls of ``sample``."""
    made = copy.copy(sampler)
    if made.precision == "auto":
        made.net = inference_copy_of(made.net, compile=made.compile)
    return made
