"""The classes of images by their numbers, for class-conditional networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from scorematch.nets.family import as_condition
from scorematch.protocol import attribute
from scorematch.randomness import seed_of
from scorematch.schema import check_count

Rule = Literal["random", "cycle"]
Classes: TypeAlias = int | Rule | None


def image_classes(indices: Iterable[int], condition: int | Rule, classes: int | None, seed: int) -> Tensor:
    """The classes of images by their numbers, int64 (len(indices),).

    Args:
        indices: the numbers of the images.
        condition: the class of all images, "random" or "cycle", as for ``bulk_samples``.
        classes: the number of classes, for "random" and "cycle".
        seed: the seed of the images.

    Example:
        >>> image_classes(range(8, 12), "cycle", 10, seed=0)
        tensor([8, 9, 0, 1])
    """
    if isinstance(condition, int):
        return torch.tensor([condition for _ in indices], dtype=torch.int64)
    if classes is None:
        raise ValueError(f"condition={condition!r} needs the number of classes: pass classes=.")
    if condition == "cycle":
        return torch.tensor([i % classes for i in indices], dtype=torch.int64)
    return torch.tensor([seed_of(seed, "class", i) % classes for i in indices], dtype=torch.int64)


def number_of_classes(net: object, condition: Classes, classes: int | None, shape: Sequence[int]) -> int | None:
    """The number of classes for "random" and "cycle", otherwise None.

    Args:
        net: the network or any other score.
        condition: the class of all images, "random", "cycle" or None.
        classes: the number that the user asked for; None is that of the network, without its null class.
        shape: the shape of one sample.

    Raises:
        TypeError, ValueError: if the arguments do not fit together, or the network does not take these classes.
    """
    takes = attribute(net, "conditioning")
    if condition is not None and (
        isinstance(condition, bool) or (not isinstance(condition, int) and condition not in get_args(Rule))
    ):
        raise TypeError(f'condition must be a class, "random", "cycle" or None, got {condition!r}.')
    if isinstance(condition, str):
        if classes is None and takes is not None:
            classes = takes.classes
        if classes is None:
            raise ValueError(f"condition={condition!r} needs the number of classes: pass classes=.")
        check_count("classes", classes)
        largest: int | None = classes - 1
    else:
        if classes is not None:
            raise ValueError('classes= is for condition="random" and condition="cycle". Leave it out.')
        largest = condition
    as_condition(largest, torch.empty(1, *shape, device="meta"), takes)
    return classes
