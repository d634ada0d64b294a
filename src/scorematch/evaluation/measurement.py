"""Linear measurements with normal noise as matrices, in float64: y = A x + n with n from N(0, S)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scorematch.core.randomness import standard_normal
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator


def operator_matrix(operator: Operator, sample_shape: Sequence[int]) -> Tensor:
    """The matrix (values of y, D) of a linear operator on images of a shape, in float64.

    Args:
        operator: a linear operator, for one image.
        sample_shape: the shape (C, H, W) of the images.
    """
    if not operator.is_linear:
        raise ValueError(f"the operator must be linear, got {operator!r}. Write linear = True in its class if it is.")
    size = math.prod(sample_shape)
    return operator.measure(torch.eye(size, dtype=torch.float64, device="cpu").view(size, *sample_shape)).flatten(1).T


def linear_gaussian(observation: Observation, shape: Sequence[int], image: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix A (M, D), y (M,) and the covariance S of the noise, (M, M) or the variance () of all values.

    Values that are not observed have zeros in A, y and a covariance (M, M).

    Args:
        observation: an observation with a linear operator.
        shape: the shape of one sample, with D values.
        image: the number of the sample in the observation.

    Raises:
        TypeError: if ``observation`` is not an Observation.
        ValueError: if the operator is not linear, the observation is of samples of another shape, or it has no sample
            with this number.
    """
    if not isinstance(observation, Observation):
        raise TypeError(f"observation must be an Observation, got {type(observation).__name__}.")
    if len(observation) > 1 and not 0 <= image < len(observation):
        raise ValueError(f"image must be from 0 to {len(observation) - 1}, got {image}.")
    observation = observation.of_shape(shape).rows(slice(image, image + 1))
    a = operator_matrix(observation.operator, shape)
    y = observation.residual(torch.zeros_like(observation.y))
    if observation.mask is not None:
        a = a * observation.mask.expand_as(y).flatten()[:, None].to(a)
    return a, y.flatten().double(), _noise_covariance(observation)


def _noise_covariance(observation: Observation) -> Tensor:
    y = observation.y.double()
    if isinstance(observation.sigma, float):
        return y.new_tensor(observation.sigma**2)
    if isinstance(observation.sigma, Tensor):
        return observation.covariance(torch.ones_like(y)).flatten().diag()
    return torch.linalg.inv(_precision(observation))


def _precision(observation: Observation) -> Tensor:
    """The inverse of the covariance of the noise (M, M), a function, of the first sample; 1 where y is not observed."""
    y, first = observation.y[:1].double(), observation.rows(slice(0, 1))
    seen = first.observed(torch.ones_like(y)).flatten()
    units = torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape[1:])
    return first.precision(units).flatten(1) * seen[:, None] + (1 - seen).diag()


def noise_of(observation: Observation, generator: torch.Generator | None) -> Tensor:
    """Noise like y (N, ...) with the distribution of that of an observation, 0 where its level is infinite."""
    y, sigma = observation.y, observation.sigma
    z = standard_normal(y.shape, generator, y.device, y.dtype)
    if not callable(sigma):
        return sigma * z if isinstance(sigma, float) else torch.where(sigma.isfinite(), sigma * z, 0)
    root = torch.linalg.cholesky(_precision(observation))  # P = L L^T, so that L^-T z has the covariance P^-1
    return torch.linalg.solve_triangular(root.T, z.double().flatten(1).T, upper=True).T.reshape(z.shape).to(y)
