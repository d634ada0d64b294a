"""Samplers: ways from noise to data along a score."""

from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.sampler import Sampler

__all__ = ["AnnealedLangevinSampler", "Sampler"]
