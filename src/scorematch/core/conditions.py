"""The condition of a network, such as an image or a class: what a network takes, and the check of what it is given.

The condition of a network that takes one is a tensor (N, ...). That of a network that takes several is a dict of
tensors with the names "class", "features" and "image", its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.batches import first_where
from scorematch.core.messages import quote
from scorematch.core.scores import Given, attribute

__all__ = ["Condition"]

Parts: TypeAlias = dict[str, Tensor]


class Condition(NamedTuple):
    """The condition that a network takes: an image, a class, a vector, several of these, or nothing.

    Attributes:
        channels: the number of channels of the image; 0 for no image.
        classes: the number of classes; None for no class.
        null_class: whether the network was also trained without a class or a vector. The additional class, whose index
            is ``classes``, or a vector of NaN then means "no condition", and is used if none is given.
        vector: the number of values of the vector; 0 for no vector.
        encoder: whether the vector is computed in the network from a condition (N, ...) of any shape.
    """

    channels: int = 0
    classes: int | None = None
    null_class: bool = False
    vector: int = 0
    encoder: bool = False

    def parts(self) -> dict[str, Condition]:
        """The parts of the condition by name, each as the condition of a network that takes it alone."""
        classes = None if self.classes is None else Condition(classes=self.classes, null_class=self.null_class)
        vector = self._replace(channels=0, classes=None) if self.vector else None
        image = Condition(channels=self.channels) if self.channels else None
        found = {"class": classes, "features": vector, "image": image}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def by_name(self) -> bool:
        """Whether the backbone gets its condition as a dict: several parts, or one of any shape, maybe an image's."""
        return self.encoder or len(self.parts()) > 1


def named_parts(condition: Any, takes: Condition | None) -> Parts:
    """The parts by name of the condition of data, which is a tensor, a dict or None.

    A tensor of floating-point values is the image of a network that takes one and no vector, otherwise the vector.
    """
    if condition is None or isinstance(condition, Mapping):
        return dict(condition or {})
    image = takes is not None and takes.channels > 0 and not takes.vector
    return {("image" if image else "features") if condition.is_floating_point() else "class": condition}


def map_parts(function: Callable[[Tensor], Tensor], condition: Any) -> Any:
    """A function of a condition: of the tensor, or of each part; None for none."""
    if isinstance(condition, dict):
        return {name: function(part) for name, part in condition.items()}
    return function(condition) if isinstance(condition, Tensor) else condition


def rows_of(condition: Any, rows: Any) -> Any:
    """The condition of some samples, by a slice, indices or a mask."""
    return map_parts(lambda part: part[rows], condition)


def joined(conditions: Sequence[Any]) -> Any:
    """The conditions of several batches, one after another; None if they are None."""
    first = conditions[0]
    if isinstance(first, dict):
        return {name: torch.cat([parts[name] for parts in conditions]) for name in first}
    return None if first is None else torch.cat(list(conditions))


def length(condition: Given) -> int | None:
    """The number of samples of a condition; None for one of any number, such as an int."""
    return next(iter(lengths(condition)), None)


def lengths(condition: Given) -> list[int]:
    """The number of samples of each part of a condition that is not for any number of them."""
    parts = condition.values() if isinstance(condition, Mapping) else [condition]
    return [len(part) for part in parts if isinstance(part, Tensor) and part.ndim]


def takes_image(net: object) -> bool:
    """Whether the condition of a network is an image, such as the degraded image for Palette's networks."""
    takes = attribute(net, "conditioning")
    return takes is not None and takes.channels > 0


def with_image(image: Tensor, label: int | None, net: object) -> Any:
    """An image as the condition of a network, with a class if the network takes several conditions."""
    takes = attribute(net, "conditioning")
    if takes is None or not takes.by_name:
        return image
    return {"image": image} if label is None else {"image": image, "class": label}


def as_class(condition: Any) -> Any:
    """A condition that is an integer of NumPy, or an integer tensor (), as an int; any other unchanged."""
    if isinstance(condition, Mapping):
        return {name: as_class(part) for name, part in condition.items()}
    one = isinstance(condition, Tensor) and condition.ndim == 0 and condition.dtype in (torch.int64, torch.int32)
    number = isinstance(condition, Integral) and not isinstance(condition, bool)
    return int(condition) if one or number else condition


def class_of_each(condition: Any, x: Tensor) -> Any:
    """A condition that is one class for all samples x (N, ...) as a tensor (N,); any other unchanged."""
    condition = as_class(condition)
    if isinstance(condition, dict):
        return {name: class_of_each(part, x) for name, part in condition.items()}
    return torch.full(x.shape[:1], condition, device=x.device) if type(condition) is int else condition


def check_type(condition: Any) -> None:
    """Raises TypeError if a condition is no tensor, int, dict of these, or None."""
    # torch 2.5 cannot compile isinstance with a union.
    parts = list(condition.values()) if isinstance(condition, dict) else [condition]
    for part in parts:
        if isinstance(part, bool) or not (part is None or isinstance(part, (Tensor, int))):
            hint = f"net.class_names.index({part!r})" if isinstance(part, str) else "torch.as_tensor(condition)"
            raise TypeError(
                "condition must be a tensor, int64 (N,) for classes, float (N, K) for vectors or float (N, K, ...) for "
                f"images, a dict of tensors, or an int for one class, got {type(part).__name__}. Write {hint}."
            )


def as_condition(condition: Given, x: Tensor, takes: Condition | None) -> Tensor | Parts | None:
    """Checks a condition and converts it to a tensor, or to a dict of tensors for a network that takes several.

    The size of an image is checked by the network. Classes and vectors on another device than the CPU are not checked,
    since reading them would synchronize with that device.

    Args:
        condition: classes, int64 (N,); or an int, the class of all samples; or an image, float (N, K, H, W), or a
            vector, float (N, K); or a dict of these with the names "class", "image" and "features"; or None. The null
            class, or a vector of NaN, is used for a network that has one, if none is given.
        x: the samples (N, ...).
        takes: the condition that the network takes; None if it is not known, in which case nothing is checked.

    Returns:
        The condition as a tensor or as a dict of tensors, or None.

    Raises:
        TypeError: if the network takes another type of condition.
        ValueError: if the condition or a part is missing, its length is not that of x, a class is out of range, or a
            vector is not finite.
    """
    condition = as_class(condition)
    check_type(condition)
    if takes is None:
        return class_of_each(condition, x)
    parts = takes.parts()
    if not parts:
        if condition is not None:
            raise TypeError(
                "this network takes no condition. Leave it out, or build a network that takes one with classes=, "
                "condition_channels= or condition_features=."
            )
        return None
    if not isinstance(condition, dict):
        if condition is not None and len(parts) > 1:
            example = ", ".join(f'"{name}": ...' for name in parts)
            raise TypeError(f"this network takes several conditions. Write condition={{{example}}}.")
        condition = {} if condition is None else dict.fromkeys(parts, condition)
    for name in condition:
        if name not in parts:
            named = " and ".join(f'"{name}"' for name in parts)
            raise ValueError(f"the condition of this network is {named}, got {quote(name)}. Leave it out.")
    given = {name: _as_part(condition.get(name), x, name, takes) for name in parts}
    return given if takes.by_name else next(iter(given.values()))


def without(condition: Any, takes: Condition, dropped: Tensor | None = None) -> Any:
    """A condition where the class and the vector of some samples are replaced by the null class and by NaN.

    Args:
        condition: the condition, a tensor (N, ...) or a dict of tensors.
        takes: the condition that the network takes.
        dropped: the samples (N,), bool; None is all of them.
    """
    if isinstance(condition, dict):
        return {name: without(part, takes.parts()[name], dropped) for name, part in condition.items()}
    if condition is None or takes.channels:
        return condition
    null = torch.nan if takes.vector else takes.classes or 0
    if dropped is None:
        return torch.full_like(condition, null)
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), null, condition)


def _as_part(given: Any, x: Tensor, name: str, takes: Condition) -> Tensor:
    """A part of a condition as a tensor, checked."""
    several, takes = len(takes.parts()) > 1, takes.parts()[name]
    wanted = f"an image as its condition, float (N, {takes.channels}, H, W)"
    if takes.encoder:
        wanted = "a tensor for its encoder as its condition, float (N, ...)"
    elif takes.vector:
        wanted = f"a vector as its condition, float (N, {takes.vector})"
    if takes.classes is not None:
        null = f", or {takes.classes} for none" if takes.null_class else ""
        wanted = f"classes as its condition, int64 (N,) from 0 to {takes.classes - 1}{null}"
    if given is None:
        if takes.null_class:
            return _null(takes, x)
        how = f'{{"{name}": ...}}' if several else ""
        raise ValueError(f"this network takes {wanted}: pass {argument('condition')}={how}.")
    values = torch.tensor(given, device="cpu") if isinstance(given, int) else given
    fits = values.is_floating_point() if takes.classes is None else values.dtype in (torch.int64, torch.int32)
    if not fits:
        found = repr(given) if isinstance(given, int) else f"{values.dtype} of shape {tuple(values.shape)}"
        hint = " Write condition.long()." if takes.classes is not None and values.ndim == 1 else ""
        raise TypeError(f"this network takes {wanted}, got {found}.{hint}")
    if isinstance(given, Tensor) and given.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"the condition must have one entry for each of {len(x)} samples, got shape {tuple(values.shape)}."
        )
    if takes.vector:
        _check_vectors(values, wanted, takes)
    if takes.classes is not None:
        if values.ndim > 1:
            raise ValueError(f"the classes must have shape ({len(x)},) like the batch, got {tuple(values.shape)}.")
        classes = takes.classes + takes.null_class
        wrong = first_where(values, lambda values: (values < 0) | (values >= classes))
        if wrong is not None:
            raise ValueError(f"this network takes {wanted}, got class {wrong}.")
    return class_of_each(given, x)


def _check_vectors(values: Tensor, wanted: str, takes: Condition) -> None:
    if not takes.encoder and values.shape[1:] != (takes.vector,):
        raise ValueError(f"this network takes {wanted}, got shape {tuple(values.shape)}.")
    if first_where(values.sum()[None], lambda total: ~total.isfinite()) is None:  # in most calls, and faster
        return
    # A vector of NaN is none, for a network that was also trained without.
    wrong = first_where(values, lambda values: ~(values.isfinite() | (takes.null_class & _is_none(values))))
    if wrong is not None:
        hint = "" if takes.null_class else " Without label_drop in training it has no score without a condition."
        raise ValueError(f"this network takes {wanted}, of finite values, got {wrong}.{hint}")


def _is_none(values: Tensor) -> Tensor:
    """Whether all values of a sample are NaN, (N, 1, ...)."""
    return values.isnan().flatten(1).all(1).view(-1, *[1] * (values.ndim - 1))


def _null(takes: Condition, x: Tensor) -> Tensor:
    """The condition that stands for none: the null class (N,), vectors of NaN (N, K), or (N, 0) for an encoder."""
    if takes.vector:
        values = 0 if takes.encoder else takes.vector
        return torch.full((x.shape[0], values), torch.nan, dtype=x.dtype, device=x.device)
    return torch.full(x.shape[:1], takes.classes or 0, dtype=torch.int64, device=x.device)


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
