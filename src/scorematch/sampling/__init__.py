"""Samplers, which turn noise into samples of the data with a score."""

from scorematch.sampling.ancestral import AncestralSampler
from scorematch.sampling.bulk import bulk_samples
from scorematch.sampling.chain import Chain
from scorematch.sampling.decoupled import DecoupledSampler
from scorematch.sampling.folder import sample_to
from scorematch.sampling.langevin import AnnealedLangevinSampler
from scorematch.sampling.learning import learned_settings
from scorematch.sampling.levels import schedules_of_paths
from scorematch.sampling.normal import data_moments
from scorematch.sampling.ode import ODESampler
from scorematch.sampling.particles import ParticleSampler, Population
from scorematch.sampling.predictor_corrector import PredictorCorrectorSampler
from scorematch.sampling.sampler import Sampler
from scorematch.sampling.settings import SAMPLERS, SamplerSettings, recommended_sampler

__all__ = [
    "SAMPLERS",
    "AncestralSampler",
    "AnnealedLangevinSampler",
    "Chain",
    "DecoupledSampler",
    "ODESampler",
    "ParticleSampler",
    "Population",
    "PredictorCorrectorSampler",
    "Sampler",
    "SamplerSettings",
    "bulk_samples",
    "data_moments",
    "learned_settings",
    "recommended_sampler",
    "sample_to",
    "schedules_of_paths",
]
