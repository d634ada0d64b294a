"""Samplers: ways from noise to data along a score."""

from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.sampler import Sampler

__all__ = ["AncestralSampler", "AnnealedLangevinSampler", "Sampler"]
