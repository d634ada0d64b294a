"""Features (N, D) of images: checks, float64, random rows, and distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scorematch.core.randomness import single_generator

BLOCK = 2048  # the number of features on each side of a block of distances
_ASYMMETRY = 1e-5  # the tolerance of a covariance, relative to its largest entry; files may hold float32


def check_features(features: Any, name: str = "features") -> Tensor:
    """Checks features (N, D), and detaches them.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if they are not (N, D), are empty, or contain NaN or infinity.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor (N, D), got {type(features).__name__}. Write torch.as_tensor(...).")
    if not features.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {features.dtype}. Pass images to an extractor first, such as "
            "pixels()(images)."
        )
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must be (N, D), one row per image, with N and D at least 1, got shape {tuple(features.shape)}."
        )
    finite = features.isfinite().all(1)
    if not finite.all():
        wrong = int((~finite).sum())
        raise ValueError(
            f"{name} must be finite, but {wrong} of the {len(features)} rows hold NaN or infinity, the first at row "
            f"{int(finite.int().argmin())}."
        )
    return features.detach()


def double(features: Tensor) -> Tensor:
    """Converts features to float64, on the CPU if their device does not support it."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def is_symmetric(covariance: Tensor) -> bool:
    """Whether a covariance (D, D) is symmetric up to the rounding of float32, and has no NaN."""
    return bool((covariance - covariance.T).abs().max() <= _ASYMMETRY * covariance.abs().max())


def different_dimensions(*dimensions: int) -> ValueError:
    """The error about features and a reference with different dimensions."""
    return ValueError(
        f"features and reference must have the same dimension, got {' and '.join(map(str, dimensions))}. Use one "
        "extractor, and images of one size."
    )


def random_rows(features: Tensor, size: int, generator: torch.Generator | int | None = 0) -> Tensor:
    """Draws ``size`` different rows of features (N, D) in random order. The result does not depend on their order.

    Args:
        features: features (N, D).
        size: the number of rows, at most N.
        generator: the source of the random numbers; an int is a seed, None is torch's global generator.
    """
    return features[canonical_order(features)[draw(len(features), size, single_generator(generator))]]


def canonical_order(features: Tensor) -> Tensor:
    """The indices (N,) that sort features by their projection on a fixed direction."""
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(features.shape[1], generator=rng, dtype=torch.float64, device="cpu")
    direction = direction.to(double(features[:1]).device)
    return torch.cat([double(block) @ direction for block in features.split(BLOCK)]).argsort().to(features.device)


def draw(n: int, size: int, generator: torch.Generator | None) -> Tensor:
    """``size`` different indices below n, in random order, on the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=device)[:size].cpu()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared distances (N, M), set to 0 where they are below their rounding error."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= a.shape[1] * torch.finfo(a.dtype).eps * norms, 0)
