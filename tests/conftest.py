"""Worlds of known parameters with a network's interface, and the published numbers."""

import math
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


def _like(sigma, x):
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return sigma if sigma.ndim == 0 else sigma.view(-1, *[1] * (x.ndim - 1))


class Gaussian:
    """N(mean, covariance) in D dimensions, with the exact score of its perturbed densities."""

    def __init__(self, mean, covariance):
        self.mean = torch.tensor(mean)
        self.covariance = torch.tensor(covariance)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def __call__(self, x, sigma):
        along = (x - self.mean.to(x)) @ self.vectors.to(x)
        return -(along / (self.values.to(x) + _like(sigma, x) ** 2)) @ self.vectors.to(x).T

    def sample(self, n, generator):
        z = torch.randn(n, len(self.mean), generator=generator)
        return self.mean + z * self.values.sqrt() @ self.vectors.T


class Mixture:
    """sum_k weight_k N(mean_k, std^2), with the exact score of its perturbed densities."""

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = torch.tensor(weights), torch.tensor(means), std

    def __call__(self, x, sigma):
        variance = self.std**2 + _like(sigma, x) ** 2
        difference = self.means.to(x) - x[:, None]  # (N, K, D)
        variance = variance if variance.ndim == 0 else variance[:, None]
        logits = -(difference**2).sum(-1, keepdim=True) / (2 * variance) + self.weights.to(x).log()[:, None]
        return (logits.softmax(1) * difference / variance).sum(1)

    def sample(self, n, generator):
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[component] + self.std * torch.randn(n, self.means.shape[1], generator=generator)

    def log_density(self, x, sigma):
        variance = self.std**2 + sigma**2
        squares = ((self.means.to(x) - x[:, None]) ** 2).sum(-1)
        dimension = self.means.shape[1]
        logs = self.weights.to(x).log() - squares / (2 * variance) - dimension / 2 * math.log(2 * math.pi * variance)
        return logs.logsumexp(1)


@pytest.fixture
def world():
    return Gaussian([0.3, -0.7, 1.1], [[0.50, 0.20, 0.00], [0.20, 0.30, 0.05], [0.00, 0.05, 0.10]])


@pytest.fixture
def mixture():
    return Mixture([0.8, 0.2], [[1.5, 1.5], [-1.5, -1.5]], 0.5)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def published():
    return lambda name: torch.load(FIXTURES / f"{name}.pt", weights_only=True)
