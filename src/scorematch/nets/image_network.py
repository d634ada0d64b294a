"""The base classes of the U-Nets: a network with a way down and a way up, and its family.

The condition of these networks is an image, which is concatenated with x, a class, a vector, several of these, or
nothing. x is an image, or for a U-Net also a signal or a volume. A size that is no multiple of ``divisor`` is extended
inside the network, and the output is cropped to the size of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_sizes
from scorematch.core.conditions import Condition, Parts
from scorematch.nets.blocks import (
    AugmentationEmbedding,
    Constant,
    DownBlock,
    Embedding,
    MiddleBlock,
    UpBlock,
    VectorEmbedding,
    fix_projections,
)
from scorematch.nets.family import Family, check_encoder
from scorematch.nets.layers import GroupNorm
from scorematch.nets.reconditioning import is_reconditioned, reconditioned, reconditioned_config
from scorematch.nets.space import Convolution, Space, from_patches, to_patches


class ImageNetwork(nn.Module):
    """The base class of the U-Nets, whose condition is an image, a class, a vector, several of these, or nothing.

    A subclass defines the modules below. A block on the way down is called as ``block(h, embedding, image)``, and
    returns its output, the features that are kept for the way up, and the image for the next block. A block on the way
    up is called as ``block(h, kept, embedding, picture)``. It removes features from ``kept``, and returns its output
    and the picture, which is the sum over the scales of an output pyramid, or None.

    Args:
        in_channels: the number of channels of the input, including those of a conditioning image.
        out_channels: the number of channels of the output.
        scales: the number of scales. Sizes are extended to multiples of ``patch * 2 ** (scales - 1)``, ``divisor``.
        patch: the side of the patches in pixels, 1 for no patches.
        classes: the number of classes, or None.
        null_class: whether there is one more class, with the index ``classes``, for samples without a class.
        center: whether to map the input from [0, 1] to [-1, 1].
        vector: the number of values of a vector as the condition; 0 for none.
        encoder: whether an encoder computes the vector.
        space: the axes of the data.

    Raises:
        ValueError: if ``null_class`` is True without classes.
    """

    conv_in: Convolution
    time_proj: nn.Module
    time_embedding: Embedding
    activation: Callable[[Tensor], Tensor]  # of the embedding of the noise level, and in the residual blocks
    down_blocks: nn.ModuleList
    mid_block: MiddleBlock | None
    up_blocks: nn.ModuleList
    conv_norm_out: GroupNorm
    conv_out: Convolution

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        scales: int,
        patch: int,
        classes: int | None,
        null_class: bool,
        center: bool,
        vector: int = 0,
        encoder: bool = False,
        space: Space = Space(),  # noqa: B008  (immutable)
    ) -> None:
        super().__init__()
        if null_class and classes is None:
            raise ValueError("null_class=True needs classes: pass the number of classes, or leave out null_class.")
        check_encoder(encoder, vector)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch, self.divisor, self.space = patch, patch * 2 ** (scales - 1), space
        self.classes, self.null_class, self.center = classes, null_class, center
        self.vector, self.encoder = vector, encoder
        self.augmentation: AugmentationEmbedding | None = None  # during a training that tells the network of it

    def initialize(self) -> None:
        """Initializes the weights of a network to be trained."""
        raise NotImplementedError

    def class_table(self, width: int) -> nn.Embedding | None:
        """The embedding of the classes, a row (width,) for each; None for a network without classes."""
        return None if self.classes is None else nn.Embedding(self.classes + self.null_class, width)

    def add_blocks(
        self,
        first: int,
        widths: Sequence[int],
        layers: Sequence[int],
        *,
        down: Callable[[int, int, bool], DownBlock],
        middle: Callable[[], MiddleBlock | None],
        up: Callable[[int, int, list[int]], UpBlock],
    ) -> None:
        """Builds the blocks of the way down, the middle and the way up, in this order.

        Args:
            first: the number of channels of the first convolution.
            widths: the width of each scale, from full resolution down.
            layers: the number of residual blocks at each scale on the way down; the way up has one more.
            down: returns the block at a scale on the way down, called as ``down(scale, inputs, halve)``.
            middle: returns the middle block, or None for none.
            up: returns the block at a scale on the way up, called as ``up(scale, inputs, kept)`` with the widths of the
                features of the way down that its residual blocks receive.
        """
        lowest, kept = len(widths) - 1, [first]
        self.down_blocks = nn.ModuleList()
        for scale, inputs in enumerate([first, *widths[:-1]]):
            self.down_blocks.append(down(scale, inputs, scale < lowest))
            kept += [widths[scale]] * (layers[scale] + (scale < lowest))
        self.mid_block = middle()
        self.up_blocks = nn.ModuleList()
        for scale in range(lowest, -1, -1):
            inputs = widths[min(scale + 1, lowest)]
            self.up_blocks.append(up(scale, inputs, [kept.pop() for _ in range(layers[scale] + 1)]))

    def inputs(self, x: Tensor, condition: Tensor | Parts | None) -> tuple[Tensor, Parts]:
        """Checks the shapes, and concatenates x with a conditioning image.

        Returns:
            The input of the first convolution (N, in_channels, ...), in [-1, 1] if ``center`` is True, with sides that
            are multiples of ``divisor``; and the other parts of the condition, "class" and "features".
        """
        parts = dict(condition) if isinstance(condition, dict) else {}
        if isinstance(condition, Tensor):
            name = "features" if self.vector else "image" if condition.is_floating_point() else "class"
            parts = {name: condition}
        image = parts.pop("image", None)
        self._check(x, image, parts)
        x = x if image is None else torch.cat([x, image.to(x.dtype)], dim=1)
        x = self.space.to_multiple(x, self.divisor)
        return 2 * x - 1 if self.center else x, parts

    def down_and_up(self, x: Tensor, embedding: Tensor, *, add_picture: bool) -> Tensor:
        """The way down and the way up, from the first to the last convolution.

        Args:
            x: the input (N, C, ...), with sides that are multiples of ``divisor``.
            embedding: the embedding of the noise level (N, E) or (1, E), after its activation.
            add_picture: whether the picture of the last block is added to the output.
        """
        x = to_patches(x, self.patch) if self.patch > 1 else x
        h, image = self.conv_in(x), x
        kept = [h]
        for block in self.down_blocks:
            h, outputs, image = block(h, embedding, image)
            kept += outputs
        h = h if self.mid_block is None else self.mid_block(h, embedding)
        picture: Tensor | None = None
        for block in self.up_blocks:
            h, picture = block(h, kept, embedding, picture)
        h = self.conv_out(self.conv_norm_out(h, F.silu))
        h = h + picture if add_picture and picture is not None else h
        return from_patches(h, self.patch) if self.patch > 1 else h

    def _check(self, x: Tensor, image: Tensor | None, others: Parts) -> None:
        axes = _AXES[self.space.dimensions]
        if x.ndim != self.space.dimensions + 2:
            raise ValueError(f"x must be {axes.format(self.in_channels)}, got shape {tuple(x.shape)}.")
        channels = 0 if image is None or image.ndim != x.ndim else image.shape[1]  # of a conditioning image
        if image is not None and self.in_channels == x.shape[1]:
            raise ValueError(
                f"this network takes no image as its condition, since x has all of its {self.in_channels} input "
                "channels. Build it with condition_channels=."
            )
        if x.shape[1] + channels != self.in_channels or (image is not None and not channels):
            given = "" if image is None else f" and a condition of shape {tuple(image.shape)}"
            raise ValueError(
                "x and the conditioning image, if the network takes one, must have "
                f"{self.in_channels} channels in all, got x of shape {tuple(x.shape)}{given}."
            )
        if min(x.shape[2:]) < self.divisor:
            sides = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"every side of x must be at least {self.divisor}, the largest stride, got {sides}.")
        expected = (x.shape[0], channels, *x.shape[2:])
        if image is not None and image.shape != expected:
            raise ValueError(
                f"the condition must be an image with x's batch and size, of shape {expected}, got "
                f"{tuple(image.shape)}."
            )
        vectors, classes = others.get("features"), others.get("class")
        if self.vector and not self.encoder and (vectors is None or vectors.shape != (x.shape[0], self.vector)):
            given = "none" if vectors is None else f"shape {tuple(vectors.shape)}"
            raise ValueError(f"the condition must be a vector for each image, {(len(x), self.vector)}, got {given}.")
        if (classes is None) != (self.classes is None):
            raise ValueError(
                "this network takes classes as its condition: pass condition=, int64 (N,)."
                if classes is None
                else "this network takes no classes as its condition."
            )
        if classes is not None and classes.shape != x.shape[:1]:
            raise ValueError(f"the classes must have shape {(len(x),)} like the batch, got {tuple(classes.shape)}.")


_AXES = {1: "signals (N, {}, L)", 2: "images (N, {}, H, W)", 3: "volumes (N, {}, D, H, W)"}


def cropped(h: Tensor, sides: torch.Size) -> Tensor:
    """The first values of h (N, C, ...) along each axis, so that it has these sides."""
    for axis, side in enumerate(sides, 2):
        h = h if h.shape[axis] == side else h.narrow(axis, 0, side)
    return h


def is_larger(key: str, small: Mapping[str, Any], large: Mapping[str, Any]) -> bool:
    """Whether both configurations have a number for the key, and the second one is larger."""
    return bool(small.get(key, math.inf) < large.get(key, 0))


Images = TypeVar("Images", bound=ImageNetwork)


class ImageFamily(Family[Images]):
    """The base class of the families of such networks."""

    # For channels_last data on CUDA, torch's group norm copies to the contiguous format and back.
    channels_last_on_cuda = False

    class_before_embedding: ClassVar[bool]  # whether that of the class is added before the linear layers of the level's
    arguments: ClassVar[Mapping[str, str]] = {
        "in_channels": "channels",
        "out_channels": "channels",
        "block_out_channels": "widths",
        "num_class_embeds": "classes",
        "time_embedding_type": "embedding",
    }

    def design(self, given: Mapping[str, Any], size: tuple[int, ...], precondition: str) -> dict[str, Any]:
        """The channels and the widths, which all these families have."""
        channels, condition_channels = given["channels"], given["condition_channels"]
        if condition_channels < 0:
            raise ValueError(f"condition_channels must be at least 0, got {condition_channels}.")
        widths = check_sizes("widths", given["widths"], "a tuple such as (64, 128, 128)")
        return {
            "in_channels": channels + condition_channels,
            "out_channels": channels,
            "block_out_channels": list(widths),
        }

    def initialize(self, backbone: Images) -> None:
        """Initializes the weights as in the authors' code."""
        backbone.initialize()

    def condition(self, backbone: Images, *, predicts_variance: bool) -> Condition:
        """An image if there are more input channels than the score has; otherwise that of the backbone."""
        channels = backbone.out_channels // 2 if predicts_variance else backbone.out_channels
        image = max(0, backbone.in_channels - channels)
        null = backbone.null_class
        if backbone.classes is None:
            null = any(isinstance(module, VectorEmbedding) for module in backbone.children())
        return Condition(image, backbone.classes, null, backbone.vector, backbone.encoder)

    def skip_convolutions(self, backbone: Images) -> list[list[str]]:
        """The names of the convolutions of the pyramids, on the way down and on the way up."""
        names = [name for name, _ in backbone.named_modules() if name.endswith("skip_conv")]
        return [[name for name in names if name.startswith(way)] for way in ("down_blocks", "up_blocks")]

    def fix_level(self, copy: Images) -> Callable[[Tensor], None]:
        """What depends on the level alone is computed once: its embedding, and without classes all its projections."""
        features, embed, constant = copy.time_proj, copy.time_embedding, Constant()
        embedded = copy.classes is None or not self.class_before_embedding
        if copy.vector:  # which time_proj may embed too
            copy._modules["time_embedding"] = constant
        else:
            copy.time_proj = constant
            if embedded:
                copy._modules["time_embedding"] = nn.Identity()
        projections = fix_projections(copy) if copy.classes is None and not copy.vector else None

        def set_level(c_noise: Tensor) -> None:
            value = features(c_noise.reshape(-1))
            constant.value = embed(value) if embedded else value
            if projections is not None:
                projections(copy.activation(constant.value))

        return set_level

    def level_modules(self, backbone: Images) -> set[str]:
        """The embeddings of the noise level and of the condition, and their projections in the residual blocks."""
        kinds = ("time_proj", "time_embedding", "class_embedding", "vector_embedding", "time_emb_proj")
        return {name for name, _ in backbone.named_modules() if set(kinds) & set(name.split("."))}

    def growth(self, small: Mapping[str, Any], large: Mapping[str, Any]) -> set[str]:
        """A network may take a conditioning image, or one with more channels."""
        return {"in_channels"} if is_larger("in_channels", small, large) else set()

    def recondition(
        self,
        weights: Mapping[str, Tensor],
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        own: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Classes that both networks have are kept; see ``scorematch.nets.reconditioning``."""
        if not is_reconditioned(before, now):
            return super().recondition(weights, before, now, own)
        first = self.class_before_embedding
        changed = reconditioned(weights, before, now, own, added_first=first) if weights else {}
        return reconditioned_config(before, now), changed
