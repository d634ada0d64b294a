"""Training of networks on one or several devices, with exact continuation of interrupted runs (extra ``train``)."""

from scorematch.training.data import ImageData, open_images
from scorematch.training.ema import reconstruct
from scorematch.training.levels import LogNormal, LogUniform, Mixture, UniformTime, levels_for, weighting_for
from scorematch.training.recipes import RECIPES, Recipe
from scorematch.training.run import train
from scorematch.training.steps import Settings, Step, TrainingState, train_steps

__all__ = [
    "RECIPES",
    "ImageData",
    "LogNormal",
    "LogUniform",
    "Mixture",
    "Recipe",
    "Settings",
    "Step",
    "TrainingState",
    "UniformTime",
    "levels_for",
    "open_images",
    "reconstruct",
    "train",
    "train_steps",
    "weighting_for",
]
