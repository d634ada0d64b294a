"""Sampling many images batch by batch, where each depends only on the seed of the job and on its number.

Image i has its own random generator, whose seed ``Job.seeds_of`` computes. The network processes images in fixed
batches: with a batch size of B, batch b has the images from b B to (b + 1) B - 1. Of m processes, the one of rank k
draws the batches k, k + m, k + 2 m, ... An image is therefore the same in every job with the same seed, whatever the
number of images and processes, and whether the job was interrupted or not. With the same batch size and number of
threads it is the same bit for bit, except in an incomplete batch, the first or the last: there, and with another batch
size, the results of the network are rounded differently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.conditions import Parts, as_condition, length, map_parts
from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.processes import checked_process
from scorematch.core.provenance import __version__, identity
from scorematch.core.randomness import seed_of
from scorematch.core.scores import attribute, inference_copy_of
from scorematch.data.samples import Batch, ranges
from scorematch.noise import NoiseSchedule
from scorematch.sampling.sampler import Sampler
from scorematch.sampling.start import as_shape

__all__ = ["bulk_samples"]


Rule = Literal["random", "cycle"]
Classes: TypeAlias = int | Rule | None


def _plain(value: Any) -> Any:
    """An option of a sampler as a plain value for JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return list(value) if isinstance(value, NoiseSchedule) else identity(value)


def description_of(sampler: Sampler) -> dict[str, Any]:
    """Returns a hash of the network ("network") and the options of a sampler ("sampler"), as values for JSON."""
    # Attributes that begin with an underscore are derived from the others.
    options = {key: value for key, value in vars(sampler).items() if key[0] != "_" and key != "net"}
    described = {"name": type(sampler).__name__, **{key: _plain(value) for key, value in options.items()}}
    return {"network": identity(sampler.net), "sampler": described}


SEEDS = 2**32  # A torch.Generator on a CPU uses the lowest 32 bits of its seed only.


def bulk_samples(
    sampler: Sampler,
    n: int,
    *,
    first: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    classes: Classes = None,
    n_classes: int | None = None,
    condition: Tensor | Parts | None = None,
    shape: Sequence[int] | None = None,
    process: tuple[int, int] | None = None,
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
        classes: for class-conditional networks: an int, the class of all images; "random", uniform random classes;
            "cycle", the classes in turn. The class of an image depends only on the seed and on its number.
        n_classes: the number of classes for "random" and "cycle"; None is that of the network, without its null class.
        condition: for networks that take a vector or an image: the conditions (m, ...), floating point, or a dict of
            them for networks that take both. Sample i has condition i; if there is one only, m = 1, all samples have
            it. A network that takes a class too has that of ``classes``.
        shape: the shape of one sample, for a score without ``sample_shape``.
        process: whose batches to draw, as (rank, world size); None is this process, see ``this_process``.

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
    job = Job(
        sampler,
        seed=seed,
        batch_size=batch_size,
        classes=classes,
        n_classes=n_classes,
        condition=condition,
        shape=shape,
    )
    return job.samples(n, first=first, process=process)


class Job:
    """Everything that determines image i, for every i.

    Arguments and errors are those of ``bulk_samples``.

    Attributes:
        sampler, seed, batch_size, classes, condition: the arguments.
        shape: the shape of one sample.
        n_classes: the number of classes for "random" and "cycle", otherwise None.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        seed: int = 0,
        batch_size: int = 64,
        classes: Classes = None,
        n_classes: int | None = None,
        condition: Tensor | Parts | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, got {type(sampler).__name__}. Write ODESampler(net).")
        seed, classes, n_classes = map(native, (seed, classes, n_classes))
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}.")
        batch_size = check_count("batch_size", batch_size)
        shape = attribute(sampler.net, "sample_shape") if shape is None else shape
        if shape is None:
            raise ValueError("the shape of a sample is not known: pass shape=, without the batch axis.")
        self.sampler, self.seed, self.batch_size, self.classes = sampler, seed, batch_size, classes
        self.shape = as_shape(shape)
        self.condition = self._named(condition)
        self.n_classes = self._check_classes(n_classes)
        given = self._with_class(self.condition, classes if self.n_classes is None else self.n_classes - 1)
        self._samples = length(self.condition)
        x = torch.empty(max(1, self._samples or 1), *self.shape, device="meta")
        as_condition(given, x, attribute(sampler.net, "conditioning"))

    def _named(self, condition: Any) -> Tensor | Parts | None:
        """The condition on the CPU; as a dict if the network also takes classes."""
        if condition is None:
            return None
        parts = condition.values() if isinstance(condition, dict) else [condition]
        if not all(isinstance(part, Tensor) and part.ndim for part in parts):
            raise TypeError(f"condition must be a tensor (m, ...) or a dict of such tensors, got {quote(condition)}.")
        takes = attribute(self.sampler.net, "conditioning")
        others = [] if takes is None else [name for name in takes.parts() if name != "class"]
        if self.classes is not None and (takes is None or takes.classes is None or not others):
            raise ValueError(f"{argument('classes')} and {argument('condition')} cannot be combined. Leave out one.")
        if isinstance(condition, Tensor) and takes is not None and takes.classes is not None and len(others) == 1:
            condition = {others[0]: condition}
        return map_parts(lambda part: part.detach().cpu(), condition)

    def _with_class(self, condition: Any, classes: Any) -> Any:
        """A condition with classes, which are a part of it if the network takes several."""
        takes = attribute(self.sampler.net, "conditioning")
        if classes is None:
            return condition
        several = takes is not None and len(takes.parts()) > 1
        return {**(condition or {}), "class": classes} if several else classes

    def _check_classes(self, n_classes: int | None) -> int | None:
        """The number of classes for "random" and "cycle", otherwise None."""
        classes, takes = self.classes, attribute(self.sampler.net, "conditioning")
        if isinstance(classes, bool) or not (classes is None or isinstance(classes, int) or classes in get_args(Rule)):
            raise TypeError(f'{argument("classes")} must be a class, "random", "cycle" or None, got {classes!r}.')
        if isinstance(classes, str):
            n_classes = takes.classes if n_classes is None and takes is not None else n_classes
            if n_classes is None:
                raise ValueError(
                    f"{argument('classes', classes)} needs the number of classes: pass {argument('n_classes')}."
                )
            return check_count("n_classes", n_classes)
        if n_classes is not None:
            raise ValueError(
                f"{argument('n_classes')} is for {argument('classes', 'random')} and {argument('classes', 'cycle')}. "
                "Leave it out."
            )
        return None

    def samples(self, n: int, *, first: int = 0, process: tuple[int, int] | None = None) -> Iterator[Batch]:
        """Draws images batch by batch, as ``bulk_samples`` does."""
        n, first = check_count("n", n), check_count("first", first, 0)
        self.check(n, first)
        return self.draw(ranges(n, self.batch_size, checked_process(process), first=first))

    def check(self, n: int, first: int = 0) -> None:
        """Raises ValueError if there are not n images from ``first`` on, for want of conditions or of seeds."""
        if self._samples is not None and 1 != self._samples < first + n:
            raise ValueError(
                f"{argument('condition')} must have one row for all samples, or one for each of {first + n}, got "
                f"{self._samples}."
            )
        if first + n > SEEDS:
            raise ValueError(f"the numbers of images must be below 2^32, got {n} images from {first} on.")

    def draw(self, batches: Iterable[range]) -> Iterator[Batch]:
        """Yields the batch of each range of images. Each range is requested just before its batch is drawn."""
        sampler = prepared(self.sampler)
        for indices in batches:
            condition = self.condition_of(indices)
            images = sampler.sample(
                len(indices),
                shape=self.shape,
                condition=condition,
                generator=self.seeds_of(indices),
                batch_size=len(indices),
                progress=False,
            )
            yield Batch(indices, images, condition)

    def condition_of(self, indices: range) -> Tensor | Parts | None:
        """The conditions of images by their numbers, with their classes, or None."""

        def of(part: Tensor) -> Tensor:
            return part.expand(len(indices), *part.shape[1:]) if len(part) == 1 else part[indices.start : indices.stop]

        condition: Tensor | Parts | None = self._with_class(map_parts(of, self.condition), self.classes_of(indices))
        return condition

    def classes_of(self, indices: Iterable[int]) -> Tensor | None:
        """The classes of images by their numbers, int64 (len(indices),), or None."""
        if self.classes is None:
            return None
        if isinstance(self.classes, int):
            found = [self.classes for _ in indices]
        else:
            n = self.n_classes or 1
            cycle = self.classes == "cycle"
            found = [(i if cycle else seed_of(self.seed, "class", i)) % n for i in indices]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    def seeds_of(self, indices: Iterable[int]) -> list[int]:
        """The seeds of the generators of images."""
        # Consecutive seeds differ in the lowest 32 bits for all images. Of 50,000 independent seeds, two would agree in
        # these bits with a probability of 1/4, and two images would be equal.
        first = seed_of(self.seed, "image")
        return [(first + i) % SEEDS for i in indices]

    def settings(self) -> dict[str, Any]:
        """Everything that determines the images, as plain values for JSON. The network is represented by a hash."""
        condition = self._with_class(self.condition, self.classes)
        return {
            **description_of(self.sampler),
            "seed": self.seed,
            "batch_size": self.batch_size,
            # The names of these two keys are a file format.
            "condition": self.classes if self.condition is None else identity(condition),
            "classes": self.n_classes,
            "shape": list(self.shape),
            "scorematch": __version__,
        }


def prepared(sampler: Sampler) -> Sampler:
    """A copy of a sampler whose network is prepared for inference once, for many calls of ``sample``."""
    made = copy.copy(sampler)
    if made.precision == "auto":
        made.net = inference_copy_of(made.net, compile=made.compile)
    return made
