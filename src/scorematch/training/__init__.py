"""Training of networks on one or several devices, with exact continuation of interrupted runs (extra ``train``)."""

from scorematch.training.ema import reconstruct
from scorematch.training.growth import Stage
from scorematch.training.incomplete import train_from_observations
from scorematch.training.levels import LevelMixture, Levels, LogNormal, LogUniform, UniformTime
from scorematch.training.recipes import RECIPES, Recipe, network_for
from scorematch.training.run import train
from scorematch.training.settings import Settings
from scorematch.training.steps import Step, TrainingState, train_steps

__all__ = [
    "RECIPES",
    "LevelMixture",
    "Levels",
    "LogNormal",
    "LogUniform",
    "Recipe",
    "Settings",
    "Stage",
    "Step",
    "TrainingState",
    "UniformTime",
    "network_for",
    "reconstruct",
    "train",
    "train_from_observations",
    "train_steps",
]
