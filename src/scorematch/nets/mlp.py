"""A network for vectors (N, D), such as the parameters of a simulation: residual blocks of linear layers.

Every block receives the embedding of the noise level, and of a condition, which scales and shifts its normalized
features. It is good in 2 to 100 dimensions; where the order of the values has a meaning, as in a signal, a U-Net is
better.

References:
    He et al., 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385.
    Perez et al., 2018, FiLM: Visual Reasoning with a General Conditioning Layer, arXiv:1709.07871.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.conditions import Condition, Parts
from scorematch.core.schema import Field
from scorematch.nets.blocks import Constant, Embedding, Positional, VectorEmbedding
from scorematch.nets.family import Family, check_encoder, structure

_FEATURES, _FASTEST = 64, 20.0  # sines and cosines of c_noise, which is of order one, and their highest frequency


class _Block(nn.Module):
    """norm, scale and shift, linear, activation, linear, added to the input; the identity at first."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.level = nn.Linear(width, 2 * width)
        self.linear_1 = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.level(embedding).chunk(2, 1)
        y = self.norm(h) * (1 + scale) + shift
        return h + self.linear_2(self.dropout(F.silu(self.linear_1(y))))


class MLP(nn.Module):
    """Residual blocks of linear layers for vectors.

    Args:
        features: D, the number of values of a vector.
        width: the number of hidden features.
        depth: the number of residual blocks.
        classes: the number of classes of a class-conditional network, or None.
        null_class: whether there is one more class, for samples without a class.
        condition_features: K, the number of values of a vector as the condition, alone or beside the class; 0 for none.
        condition_encoder: a module that computes the vector from a condition (N, ...) of any shape; None for none.
        dropout: the dropout probability in the blocks.
    """

    def __init__(
        self,
        features: int,
        width: int = 256,
        depth: int = 4,
        *,
        classes: int | None = None,
        null_class: bool = False,
        condition_features: int = 0,
        condition_encoder: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if null_class and classes is None:
            raise ValueError("null_class=True needs classes: pass the number of classes, or leave out null_class.")
        check_encoder(condition_encoder is not None, condition_features)
        self.encoder = condition_encoder is not None
        self.features, self.classes, self.null_class, self.vector = features, classes, null_class, condition_features
        self.time_proj: nn.Module = Positional(_FEATURES, cosines_first=True, freq_shift=0, factor=_FASTEST)
        self.time_embedding: nn.Module = Embedding(_FEATURES, width)
        table = None if classes is None else nn.Embedding(classes + null_class, width)
        vectors = VectorEmbedding(condition_features, width, condition_encoder) if condition_features else None
        self.condition_embedding: nn.Module | None = vectors if table is None else table
        self.vector_embedding: nn.Module | None = None if table is None else vectors
        self.linear_in = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, features)
        self.built = structure(self)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | Parts | None = None) -> Tensor:
        """The raw output of the network, (N, D).

        Args:
            x: (N, D).
            c_noise: (N,).
            condition: classes (N,), vectors (N, K), or a dict of both, "class" and "features".
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must be vectors (N, {self.features}), got shape {tuple(x.shape)}.")
        parts = condition if isinstance(condition, dict) else {}
        if isinstance(condition, Tensor):
            parts = {"features" if self.vector else "class": condition}
        vectors, classes = parts.get("features"), parts.get("class")
        if self.vector and not self.encoder and (vectors is None or vectors.shape != (x.shape[0], self.vector)):
            given = "none" if vectors is None else f"shape {tuple(vectors.shape)}"
            raise ValueError(f"the condition must be a vector for each sample, {(len(x), self.vector)}, got {given}.")
        embedding = self.time_embedding(self.time_proj(c_noise).to(x.dtype))
        if self.condition_embedding is not None and classes is not None:
            embedding = embedding + self.condition_embedding(classes)
        embed = self.condition_embedding if self.vector_embedding is None else self.vector_embedding
        if embed is not None and vectors is not None:
            embedding = embedding + embed(vectors.to(x.dtype))
        embedding = F.silu(embedding)
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.linear_out(F.silu(self.norm_out(h)))


class _MLPFamily(Family[MLP]):
    name = "mlp"
    network = MLP
    levels = (50, 0.005, 232)
    dimensions = (0,)
    preconditions = ("karras", "flow", "flow_reverse")
    keys: ClassVar[Mapping[str, Field]] = {
        "features": Field(int, required=True, low=1, high=1_000_000),
        "width": Field(int, low=2, high=65_536),
        "depth": Field(int, low=1, high=256),
        "classes": Field(int, optional=True, low=1, high=10_000_000),
        "null_class": Field(bool),
        "condition_features": Field(int, low=0, high=1_000_000),
        "condition_encoder": Field(bool),
        "dropout": Field(float, low=0, high=1),
    }

    def design(self, given: Mapping[str, Any], size: tuple[int, ...], precondition: str) -> dict[str, Any]:
        """The arguments, of which a configuration says whether there is an encoder."""
        others = {key: value for key, value in given.items() if key != "condition_encoder"}
        return others if given["condition_encoder"] is None else {**others, "condition_encoder": True}

    @torch.no_grad()
    def initialize(self, backbone: MLP) -> None:
        """Each block starts as the identity, and the output as zero."""
        for name, parameter in backbone.named_parameters():
            if "embedding" not in name and ("linear_2." in name or "linear_out." in name):
                nn.init.zeros_(parameter)

    def condition(self, backbone: MLP, *, predicts_variance: bool) -> Condition:
        null = backbone.vector > 0 if backbone.classes is None else backbone.null_class
        return Condition(0, backbone.classes, null, backbone.vector, backbone.encoder)

    def width(self, backbone: MLP) -> int:
        return backbone.linear_in.out_features

    def image_convolutions(self, backbone: MLP) -> tuple[set[str], set[str]]:
        return {"linear_in"}, {"linear_out"}

    def level_modules(self, backbone: MLP) -> set[str]:
        """All of them: vectors are small, and their samples are compared more closely than images."""
        return {name for name, _ in backbone.named_modules()}

    def fix_level(self, copy: MLP) -> Callable[[Tensor], None]:
        features, embed, constant = copy.time_proj, copy.time_embedding, Constant()
        copy._modules["time_proj"], copy._modules["time_embedding"] = nn.Identity(), constant

        def set_level(c_noise: Tensor) -> None:
            constant.value = embed(features(c_noise.reshape(-1)))

        return set_level


MLP_FAMILY = _MLPFamily()
