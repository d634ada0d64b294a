"""Families of networks: one object per family holds everything that depends on the family.

It builds a network from a configuration, checks that a network fits its schedule and preconditioning, says what the
network takes as its condition, and provides what an inference copy needs: which convolutions read or write the image,
and what depends on the noise level alone. Nothing outside ``scorematch.nets`` asks which family a network belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from scorematch.protocol import first_where
from scorematch.schema import Field

Network = TypeVar("Network", bound=nn.Module)


class Condition(NamedTuple):
    """What a network takes as its condition: an image with so many channels, one of so many classes, or neither."""

    channels: int = 0
    classes: int | None = None


def as_condition(condition: Any, x: Tensor, takes: Condition | None) -> Tensor | None:
    """The condition as a tensor, after a check that it is of the kind that the network takes.

    The size of an image is checked by the network. Classes on the CPU are checked to be known; those on another device
    are not, since the check would wait for that device.

    Args:
        condition: int64 (N,), classes; an int, the class of all samples; float (N, K, H, W), an image; or None.
        x: the samples (N, ...).
        takes: what the network takes; None if it is not known.

    Raises:
        TypeError: for a condition of another kind.
        ValueError: for a condition that is missing or has another length than x, or a class that the network does not
            know.
    """
    if isinstance(condition, bool) or not isinstance(condition, Tensor | int | None):
        raise TypeError(
            "condition must be a tensor, int64 (N,) for classes or float (N, K, H, W) for an image, or an int for one "
            f"class, got {type(condition).__name__}."
        )
    if takes is not None:
        _check_condition(condition, len(x), takes)
    return torch.full((len(x),), condition, device=x.device) if isinstance(condition, int) else condition


def _check_condition(condition: Tensor | int | None, n: int, takes: Condition) -> None:
    if takes == Condition():
        if condition is not None:
            raise TypeError(
                "this network takes no condition. ScoreNet.unet(classes=...) and ScoreNet.unet(condition_channels=...) "
                "build networks that take one."
            )
        return
    wanted = f"an image as its condition, float (N, {takes.channels}, H, W)"
    if takes.classes is not None:
        wanted = f"classes as its condition, int64 (N,) from 0 to {takes.classes - 1}"
    if condition is None:
        raise ValueError(f"this network takes {wanted}: pass condition=.")
    given = torch.tensor(condition) if isinstance(condition, int) else condition
    fits = given.is_floating_point() if takes.classes is None else given.dtype in (torch.int64, torch.int32)
    if not fits:
        found = repr(condition) if isinstance(condition, int) else f"{given.dtype} of shape {tuple(given.shape)}"
        hint = " Write condition.long()." if takes.classes is not None and given.ndim == 1 else ""
        raise TypeError(f"this network takes {wanted}, got {found}.{hint}")
    if isinstance(condition, Tensor) and condition.shape[:1] != (n,):
        raise ValueError(f"the condition must have one entry for each of {n} samples, got shape {tuple(given.shape)}.")
    if takes.classes is not None:
        classes = takes.classes
        wrong = first_where(given, lambda given: (given < 0) | (given >= classes))
        if wrong is not None:
            raise ValueError(f"this network takes {wanted}, got class {wrong}.")


class Family(ABC, Generic[Network]):
    """One family of networks.

    Attributes:
        name: the value of ``family`` in a configuration.
        network: the class of its backbones.
        keys: the schema of its part of a configuration.
        preconditions: the rows of the preconditioning table that its networks are used with.
    """

    name: ClassVar[str]
    network: ClassVar[type[nn.Module]]
    keys: ClassVar[Mapping[str, Field]]
    preconditions: ClassVar[tuple[str, ...]]

    @abstractmethod
    def build(self, architecture: Mapping[str, Any], *, levels: int, precondition: str) -> Network:
        """A network with new weights.

        Args:
            architecture: the values of ``keys``.
            levels: the number of levels of the network's schedule.
            precondition: its row of the preconditioning table.
        """

    def accepts(self, backbone: Network) -> bool:
        """Whether a backbone of the class ``network`` is of this family."""
        return True

    def check(self, backbone: Network, *, levels: int, precondition: str) -> None:
        """Raises ValueError if a backbone does not fit a schedule or a row of the preconditioning table."""

    @abstractmethod
    def condition(self, backbone: Network, *, predicts_variance: bool) -> Condition:
        """What a network takes as its condition.

        Args:
            backbone: of the network.
            predicts_variance: whether the second half of its output channels is a variance.
        """

    def diffusers_class(self, architecture: Mapping[str, Any], precondition: str) -> str | None:
        """The class of diffusers that computes the same output from the same weights, or None.

        Args:
            architecture: the values of ``keys``.
            precondition: the row of the preconditioning table.
        """
        return None

    # -- What the inference copy asks ---------------------------------------------------------------------------------

    channels_last_on_cuda: ClassVar[bool] = True  # false where norms copy to the other layout there

    @abstractmethod
    def width(self, backbone: Network) -> int:
        """The number of channels of the first features, at the resolution of the image."""

    @abstractmethod
    def image_convolutions(self, backbone: Network) -> tuple[set[str], set[str]]:
        """The names of the convolutions that read the image, and of those that write it."""

    @abstractmethod
    def level_modules(self, backbone: Network) -> set[str]:
        """The names of the modules whose input is the noise level or a class, not the image: they stay in float32."""

    @abstractmethod
    def settle(self, copy: Network) -> Callable[[Tensor], None]:
        """Prepares a copy for use at one noise level at a time.

        Returns:
            A function that sets the copy to a level, c_noise, () float32. The copy then computes its output for that
            level and ignores the c_noise that it is called with.
        """


def structure(net: nn.Module) -> dict[str, type | None]:
    """The parts of a network: the class of each module, and the names of the parameters."""
    kinds: dict[str, type | None] = {name: type(module) for name, module in net.named_modules()}
    return {**kinds, **dict.fromkeys(name for name, _ in net.named_parameters())}
