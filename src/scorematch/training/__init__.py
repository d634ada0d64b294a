"""Training: from a folder of images to a network, on one device or many, resumable to the bit (extra ``train``)."""

from scorematch.training.data import ImageData, open_images
from scorematch.training.ema import reconstruct
from scorematch.training.levels import LogNormal, LogUniform
from scorematch.training.run import train
from scorematch.training.steps import Settings, Step, TrainingState, train_steps

__all__ = [
    "ImageData",
    "LogNormal",
    "LogUniform",
    "Settings",
    "Step",
    "TrainingState",
    "open_images",
    "reconstruct",
    "train",
    "train_steps",
]
