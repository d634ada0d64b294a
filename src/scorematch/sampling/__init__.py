"""Samplers: ways from noise to data along a score."""

from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Sampler

__all__ = ["AncestralSampler", "AnnealedLangevinSampler", "ODESampler", "PredictorCorrectorSampler", "Sampler"]
