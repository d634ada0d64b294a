"""An exact score from NumPy: the samplers take any function ``score(x, sigma)``.

    python examples/integrations/numpy_score.py

It prints the mean and the covariance of the samples beside those of the data. ``log_likelihood`` and the restoration
methods "guide-jacobian" and "moment-matching" differentiate the score, and need one that is computed by torch.
"""

import numpy as np
import torch
from torch import Tensor

from scorematch import NoiseSchedule
from scorematch.sampling import ODESampler

MEAN = np.array([1.0, -2.0])
COVARIANCE = np.array([[2.0, 0.9], [0.9, 1.0]])


def numpy_score(x: np.ndarray, sigma: float) -> np.ndarray:
    """The score of normally distributed data with noise, at the points x (N, 2): -(C + sigma^2 I)^-1 (x - m)."""
    return -np.linalg.solve(COVARIANCE + sigma**2 * np.eye(2), (x - MEAN).T).T


def score(x: Tensor, sigma: float | Tensor) -> Tensor:
    """The same function of tensors. A sampler passes one noise level for all points."""
    return torch.from_numpy(numpy_score(x.numpy(), float(sigma))).to(x)


sampler = ODESampler(score, NoiseSchedule.karras(50, 0.01, levels=40))
samples = sampler.sample(20_000, shape=(2,), generator=0, progress=False).numpy()
print(f"mean {samples.mean(0).round(2)}, of the data {MEAN}")
print(f"covariance {np.cov(samples.T).round(2).tolist()}, of the data {COVARIANCE.tolist()}")
