"""Training of networks on one or several devices, with exact continuation of interrupted runs (extra ``train``)."""

from scorematch.training.ema import reconstruct
from scorematch.training.levels import LogNormal, LogUniform, Mixture, UniformTime, levels_for, weighting_for
from scorematch.training.recipes import RECIPES, Recipe
from scorematch.training.run import train
from scorematch.training.steps import Settings, Step, TrainingState, train_steps

__all__ = [
    "RECIPES",
    "LogNormal",
    "LogUniform",
    "Mixture",
    "Recipe",
    "Settings",
    "Step",
    "TrainingState",
    "UniformTime",
    "levels_for",
    "reconstruct",
    "train",
    "train_steps",
    "weighting_for",
]
