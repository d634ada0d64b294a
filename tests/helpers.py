"""What several test files share: distributions with exact scores, generators, and Python in a process of its own."""

import math
import subprocess
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seed(number=0):
    """A new generator."""
    return torch.Generator().manual_seed(number)


def run(sampler, n=None, **arguments):
    """Samples without a progress bar."""
    return sampler.sample(n, progress=False, **arguments)


def python(*arguments, timeout=120, check=True, **options):
    """Runs Python with the arguments, such as ``"-c", code``, and returns the CompletedProcess, its output as text.

    A test of a process group, or of anything else that may leave threads behind, runs in such a process: there a
    deadlock ends with the timeout.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=timeout, **options
    )
    assert not check or done.returncode == 0, done.stderr
    return done


# -- Exact scores


def point(x, sigma):
    """The score of data that are all zero."""
    return -x / sigma**2


def _beside(sigma, x):
    """Sigma () or (N,), with as many axes as x."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma if sigma.ndim == 0 else sigma.view(-1, *[1] * (x.ndim - 1))


class Gaussian:
    """The normal distribution with a mean (D,) and a covariance (D, D), of samples of a shape with D values.

    Called as ``gaussian(x, sigma)`` it is the exact score of the distribution with noise of level sigma.
    """

    def __init__(self, mean, covariance, shape=None):
        self.mean, self.covariance = torch.as_tensor(mean), torch.as_tensor(covariance)
        self.shape = tuple(self.mean.shape) if shape is None else shape
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    @classmethod
    def images(cls, shape, variance=None, seed=0):
        """Images in float64 with a random mean, and a random covariance or ``variance`` times the identity."""
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(shape)
        mean = torch.rand(size, generator=generator, dtype=torch.float64)
        identity = torch.eye(size, dtype=torch.float64)
        if variance is not None:
            return cls(mean, variance * identity, shape)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return cls(mean, 0.3 * root @ root.T / size + 0.02 * identity, shape)

    def __call__(self, x, sigma):
        flat, vectors = x.reshape(*x.shape[: -len(self.shape)], -1), self.vectors.to(x)
        along = (flat - self.mean.to(x)) @ vectors
        return (-(along / (self.values.to(x) + _beside(sigma, flat) ** 2)) @ vectors.T).view(x.shape)

    def sample(self, n, generator):
        z = torch.randn(n, len(self.mean), generator=generator).to(self.mean)
        return (self.mean + z * self.values.sqrt() @ self.vectors.T).view(n, *self.shape)

    def precision(self, sigma):
        """The inverse covariance of the distribution with noise."""
        return self.vectors @ torch.diag(1 / (self.values + sigma**2)) @ self.vectors.T

    def posterior(self, observation, image=0):
        """The mean and the covariance given one image of an observation, by the textbook formula."""
        a, s = matrix(observation.operator, self.shape), self.covariance
        noise = observation.sigma**2 * torch.eye(len(a), dtype=s.dtype)
        gain = s @ a.T @ torch.linalg.pinv(a @ s @ a.T + noise)
        mean = self.mean + gain @ (observation.y[image].to(s).flatten() - a @ self.mean)
        return mean, s - gain @ a @ s


class Mixture:
    """sum_k weight_k N(mean_k, std^2), with the exact score of the distribution with noise, as ``Gaussian``."""

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = torch.tensor(weights), torch.tensor(means), std

    def __call__(self, x, sigma):
        variance = self.std**2 + _beside(sigma, x) ** 2
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


def matrix(operator, shape):
    """The matrix of a linear operator on images of a shape, in float64."""
    size = math.prod(shape)
    return operator.measure(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1).T


# -- Rules of accelerators


class NoFloat64(TorchDispatchMode):
    """Fails where a float64 tensor appears on another device than the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 and leaf.device.type != "cpu":
                raise TypeError(f"{function} made a float64 tensor on {leaf.device}")
        return result


class HostReads(TorchDispatchMode):
    """Counts how often a value is read on the host, which on CUDA waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal")
        return function(*arguments, **(keywords or {}))
