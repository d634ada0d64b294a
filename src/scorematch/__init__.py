"""Score-based image generation: networks that estimate scores, the loss that trains them, and samplers.

The submodules, such as ``scorematch.likelihood`` and ``scorematch.observe``, are imported when they are first used.
"""

from typing import Any

from scorematch.loss import dsm_loss
from scorematch.noise import NoiseSchedule
from scorematch.sampling import AnnealedLangevinSampler
from scorematch.score import ScoreNet

__all__ = ["AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"]

__version__ = "0.1.0"

_SUBMODULES = (
    "bulk",
    "convert",
    "guidance",
    "images",
    "likelihood",
    "loss",
    "observe",
    "palette",
    "precision",
    "precondition",
    "sampling",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        import importlib

        return importlib.import_module(f"scorematch.{name}")
    raise AttributeError(f"module 'scorematch' has no attribute {name!r}")
