"""The condition of a network, such as an image or a class: what a network takes, and the check of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.batches import first_where
from scorematch.core.scores import attribute

__all__ = ["Condition"]


class Condition(NamedTuple):
    """The condition that a network takes: an image, a class, a vector, or nothing.

    Attributes:
        channels: the number of channels of the image; 0 for no image.
        classes: the number of classes; None for no class.
        null_class: whether the network was also trained without a class or a vector. The additional class, whose index
            is ``classes``, or a vector of NaN then means "no condition", and is used if none is given.
        vector: the number of values of the vector; 0 for no vector.
    """

    channels: int = 0
    classes: int | None = None
    null_class: bool = False
    vector: int = 0


def takes_image(net: object) -> bool:
    """Whether the condition of a network is an image, such as the degraded image for Palette's networks."""
    takes = attribute(net, "conditioning")
    return takes is not None and takes.channels > 0


def as_class(condition: Any) -> Any:
    """A condition that is an integer of NumPy, or an integer tensor (), as an int; any other unchanged."""
    one = isinstance(condition, Tensor) and condition.ndim == 0 and condition.dtype in (torch.int64, torch.int32)
    number = isinstance(condition, Integral) and not isinstance(condition, bool)
    return int(condition) if one or number else condition


def class_of_each(condition: Any, x: Tensor) -> Any:
    """A condition that is one class for all samples x (N, ...) as a tensor (N,); any other unchanged."""
    condition = as_class(condition)
    return torch.full(x.shape[:1], condition, device=x.device) if type(condition) is int else condition


def as_condition(condition: Any, x: Tensor, takes: Condition | None) -> Tensor | None:
    """Checks a condition and converts it to a tensor.

    The size of an image is checked by the network. Classes on another device than the CPU are not checked, since
    reading them would synchronize with that device.

    Args:
        condition: classes, int64 (N,); or an int, the class of all samples; or an image, float (N, K, H, W), or a
            vector, float (N, K); or None, which is the null class of a network that has one.
        x: the samples (N, ...).
        takes: the condition that the network takes; None if it is not known, in which case nothing is checked.

    Returns:
        The condition as a tensor, or None.

    Raises:
        TypeError: if the network takes another type of condition.
        ValueError: if the condition is missing, its length is not that of x, or a class is out of range.
    """
    condition = as_class(condition)
    # torch 2.5 cannot compile isinstance with a union.
    if isinstance(condition, bool) or not (condition is None or isinstance(condition, (Tensor, int))):
        raise TypeError(
            "condition must be a tensor, int64 (N,) for classes or float (N, K, H, W) for an image, or an int for one "
            f"class, got {type(condition).__name__}. Write torch.as_tensor(condition)."
        )
    if takes is not None:
        condition = null_condition(takes, x) if condition is None and takes.null_class else condition
        _check_condition(condition, x.shape[0], takes)
    return class_of_each(condition, x)


def null_condition(takes: Condition, x: Tensor) -> Tensor:
    """The condition that stands for none: the null class (N,), or vectors of NaN (N, K)."""
    if takes.vector:
        return torch.full((len(x), takes.vector), torch.nan, dtype=x.dtype, device=x.device)
    return torch.full(x.shape[:1], takes.classes or 0, dtype=torch.int64, device=x.device)


def _check_condition(condition: Tensor | int | None, n: int, takes: Condition) -> None:
    if takes == Condition():
        if condition is not None:
            raise TypeError(
                "this network takes no condition. Leave it out, or build a network that takes one with classes=, "
                "condition_channels= or condition_features=."
            )
        return
    wanted = f"an image as its condition, float (N, {takes.channels}, H, W)"
    if takes.vector:
        wanted = f"a vector as its condition, float (N, {takes.vector})"
    if takes.classes is not None:
        null = f", or {takes.classes} for none" if takes.null_class else ""
        wanted = f"classes as its condition, int64 (N,) from 0 to {takes.classes - 1}{null}"
    if condition is None:
        raise ValueError(f"this network takes {wanted}: pass condition=.")
    given = torch.tensor(condition, device="cpu") if isinstance(condition, int) else condition
    fits = given.is_floating_point() if takes.classes is None else given.dtype in (torch.int64, torch.int32)
    if not fits:
        found = repr(condition) if isinstance(condition, int) else f"{given.dtype} of shape {tuple(given.shape)}"
        hint = " Write condition.long()." if takes.classes is not None and given.ndim == 1 else ""
        raise TypeError(f"this network takes {wanted}, got {found}.{hint}")
    if isinstance(condition, Tensor) and condition.shape[:1] != (n,):
        raise ValueError(f"the condition must have one entry for each of {n} samples, got shape {tuple(given.shape)}.")
    if takes.vector and given.shape[1:] != (takes.vector,):
        raise ValueError(f"this network takes {wanted}, got shape {tuple(given.shape)}.")
    if takes.classes is not None:
        classes = takes.classes + takes.null_class
        wrong = first_where(given, lambda given: (given < 0) | (given >= classes))
        if wrong is not None:
            raise ValueError(f"this network takes {wanted}, got class {wrong}.")


def describe_classes(classes: Sequence[str], most: int | None = None) -> str:
    """The number of classes and their names, such as "2 classes: 0 cat, 1 dog"; names that are numbers are omitted.

    Args:
        classes: the names.
        most: the largest number of names in the text; None is all.
    """
    number = f"{len(classes)} class{'es' if len(classes) > 1 else ''}"
    if list(classes) == [str(k) for k in range(len(classes))]:
        return number
    names = [f"{k} {name}" for k, name in enumerate(classes[:most])]
    return f"{number}: {', '.join(names)}{', ...' if len(names) < len(classes) else ''}"
