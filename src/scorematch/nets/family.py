"""Families of networks. All code that depends on the family of a network is in one ``Family`` object per family.

It builds a network from a configuration, checks that a network fits its schedule and preconditioning, describes the
condition that the network takes, and provides what an inference copy needs: which convolutions read or write the image,
and which modules depend on the noise level only. No code outside ``scorematch.nets`` may depend on the family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

from scorematch.core.arguments import argument
from scorematch.core.conditions import Condition
from scorematch.core.json_files import native
from scorematch.core.schema import Field

Network = TypeVar("Network", bound=nn.Module)


class Family(ABC, Generic[Network]):
    """The interface of a family of networks.

    Attributes:
        name: the value of the key ``family`` in a configuration.
        network: the class of the backbones.
        keys: the schema of the keys of a configuration that describe the backbone.
        preconditions: the rows of the preconditioning table that fit its networks.
        levels: the published noise levels, (sigma_max, sigma_min, number) of a geometric schedule.
        dimensions: the numbers of axes that the data may have, 2 for images.
        arguments: the arguments of the builder ``ScoreNet.NAME`` that have another name than their key.
    """

    name: ClassVar[str]
    network: ClassVar[type[nn.Module]]
    keys: ClassVar[Mapping[str, Field]]
    preconditions: ClassVar[tuple[str, ...]]
    levels: ClassVar[tuple[float, float, int]]
    dimensions: ClassVar[tuple[int, ...]] = (2,)
    arguments: ClassVar[Mapping[str, str]] = {}

    def build(self, architecture: Mapping[str, Any], *, levels: int, precondition: str) -> Network:
        """Builds a backbone with new weights.

        Args:
            architecture: the values of ``keys``.
            levels: the number of levels of the network's schedule.
            precondition: the row of the preconditioning table.
        """
        return cast(Network, self.network(**architecture))

    def create(
        self, given: Mapping[str, Any], size: tuple[int, ...], *, levels: int, precondition: str
    ) -> tuple[Network, dict[str, Any]]:
        """Builds a backbone to be trained from scratch, from the arguments of its builder.

        Args:
            given: the arguments of the builder by name.
            size: (height, width) of a sample in pixels, (length,) of a signal, or (depth, height, width) of a volume.
            levels: as for ``build``.
            precondition: as for ``build``.

        Returns:
            A tuple (backbone, architecture).

        Raises:
            ValueError: if an argument is not valid, or the network does not take images of this size.
        """
        architecture = {key: native(value) for key, value in self.design(given, size, precondition).items()}
        for key, value in architecture.items():
            if not self.keys[key].fits(value):
                name, wanted = self.arguments.get(key, key), str(self.keys[key]).replace(" or null", " or None")
                raise ValueError(f"ScoreNet.{self.name}: {name} must be {wanted}, got {value!r}.")
        encoder = given.get("condition_encoder")
        own = {} if encoder is None else {"condition_encoder": encoder}
        backbone = self.build({**architecture, **own}, levels=levels, precondition=precondition)
        check_size(backbone, size)
        self.initialize(backbone)
        return backbone, architecture

    def design(self, given: Mapping[str, Any], size: tuple[int, ...], precondition: str) -> dict[str, Any]:
        """The architecture of a new network, the values of ``keys``; the arguments are those of ``create``."""
        return dict(given)

    def initialize(self, backbone: Network) -> None:
        """Sets the initial weights of a network to be trained, if they are not those that its modules draw."""

    def accepts(self, backbone: Network) -> bool:
        """Whether a backbone of the class ``network`` belongs to this family."""
        return True

    def check(self, backbone: Network, *, levels: int, precondition: str) -> None:
        """Raises ValueError if a backbone does not fit a schedule or a row of the preconditioning table."""
        if precondition not in self.preconditions:
            raise ValueError(
                f"precondition {precondition!r} does not fit this {self.network.__name__}: it must be "
                f"{' or '.join(map(repr, self.preconditions))}."
            )

    @abstractmethod
    def condition(self, backbone: Network, *, predicts_variance: bool) -> Condition:
        """The condition that a network takes.

        Args:
            backbone: the backbone of the network.
            predicts_variance: whether the second half of its output channels is a variance.
        """

    def diffusers_class(self, architecture: Mapping[str, Any], precondition: str) -> str | None:
        """The class of diffusers that computes the same output from the same weights, or None.

        Args:
            architecture: the values of ``keys``.
            precondition: the row of the preconditioning table.
        """
        return None

    # -- For a network that begins with the weights of a smaller one ---------------------------------------------------

    def growth(self, small: Mapping[str, Any], large: Mapping[str, Any]) -> set[str]:
        """The keys in which a network is larger than another one, but can begin with its weights.

        Args:
            small: the architecture of the smaller network, the keys of its configuration.
            large: that of the larger network.
        """
        return set()

    def larger(self, architecture: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a configuration that change if the arguments of the builder change.

        Raises:
            ValueError: if a network of this family cannot become larger in this way.
        """
        raise ValueError(f"a network of the family {self.name!r} cannot grow. Use ScoreNet.unet.")

    def recondition(
        self,
        weights: Mapping[str, Tensor],
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        own: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the weights of an earlier network with the condition of a network.

        A family that cannot change the condition returns them unchanged.

        Args:
            weights: the weights of the earlier network; if there are none, only the configuration is changed.
            before: its configuration.
            now: the configuration of the network.
            own: the weights of the network, for what is new; not needed for classes.
        """
        return dict(before), dict(weights)

    def grow(self, small: Network, large: Network) -> dict[str, Tensor]:
        """The weights with which a larger network computes the same function as a smaller one.

        Args:
            small: the smaller backbone.
            large: the larger one, with new weights. Its additional input channels are the last ones.
        """
        grown = {name: weight.clone() for name, weight in large.state_dict().items()}
        for name, weight in small.state_dict().items():
            place(grown[name], weight)
        return grown

    # -- For the inference copy ---------------------------------------------------------------------------------------

    channels_last_on_cuda: ClassVar[bool] = True  # False if its norms convert to the contiguous format on CUDA

    @abstractmethod
    def width(self, backbone: Network) -> int:
        """The number of channels of the first feature map, at the resolution of the image."""

    @abstractmethod
    def image_convolutions(self, backbone: Network) -> tuple[set[str], set[str]]:
        """The names of the convolutions whose input is the image, and of those whose output is the result."""

    @abstractmethod
    def level_modules(self, backbone: Network) -> set[str]:
        """The names of the modules whose input is the noise level or a class, not the image; they stay in float32."""

    @abstractmethod
    def fix_level(self, copy: Network) -> Callable[[Tensor], None]:
        """Changes a copy of a backbone so that its noise level is set before it is called.

        Returns:
            A function that sets the noise level of the copy, c_noise, () or (N,) float32. When the copy is called, it
            uses this level and ignores the c_noise in its arguments.
        """


def check_encoder(given: bool, features: int) -> None:
    """Raises ValueError if there is an encoder of the condition without the number of its features."""
    if given and not features:
        raise ValueError(
            "condition_encoder needs the number of its features (N, K): pass condition_features=K, or leave it out."
        )


def check_size(backbone: nn.Module, size: Sequence[int], name: str | None = None) -> None:
    """Raises ValueError if a backbone does not take samples of a size: the U-Nets extend all that are large enough.

    ``name`` is that of the argument to change, for the message.
    """
    divisor: int = getattr(backbone, "divisor", 1)
    if hasattr(backbone, "space"):
        if min(size) < divisor:
            sides = "x".join(map(str, size))
            hint = "" if name is None else f" Pass {argument(name, divisor)} or more."
            raise ValueError(
                f"every side of a sample must be at least {divisor}, the largest stride, got {sides}.{hint}"
            )
        return
    if not size:
        return
    height, width = size
    if height % divisor or width % divisor:
        below, above = (
            [max(2 * divisor, number(side / divisor) * divisor) for side in (height, width)]
            for number in (math.floor, math.ceil)
        )
        sizes = (size[0] if height == width else tuple(size) for size in (below, above))
        fitting = " or ".join(dict.fromkeys(argument(name or "image_size", size) for size in sizes))
        raise ValueError(f"height and width must be multiples of {divisor}, got {height}x{width}. Pass {fitting}.")


def structure(net: nn.Module) -> dict[str, type | None]:
    """The structure of a network: the class of each module, and the names of the parameters."""
    kinds: dict[str, type | None] = {name: type(module) for name, module in net.named_modules()}
    return {**kinds, **dict.fromkeys(name for name, _ in net.named_parameters())}


def place(weight: Tensor, smaller: Tensor, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Writes the weight of a layer into that of a larger layer, whose additional inputs get the weight zero.

    Weights from all inputs to additional outputs are not changed.

    Args:
        weight: the weight or bias of the larger layer (outputs, inputs, ...) or (outputs,), which is changed.
        smaller: that of the smaller layer.
        outputs: the indices of the smaller layer's outputs in the larger one; None is the first ones.
        inputs: the indices of the smaller layer's inputs in the larger one; None is the first ones.
    """
    rows = slice(len(smaller)) if outputs is None else outputs
    smaller = values = smaller.to(weight)
    if smaller.ndim > 1:
        values = weight.new_zeros(len(smaller), *weight.shape[1:])
        values[:, slice(smaller.shape[1]) if inputs is None else inputs] = smaller
    weight[rows] = values
