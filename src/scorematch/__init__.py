"""Score-based image generation: networks that estimate scores, the loss that trains them, and samplers.

The submodules, such as ``scorematch.likelihood`` and ``scorematch.restoration``, are imported when they are first
used.
"""

from typing import Any

from scorematch.core.provenance import __version__
from scorematch.loss import dsm_loss
from scorematch.noise import NoiseSchedule
from scorematch.sampling import AnnealedLangevinSampler
from scorematch.score import ScoreNet

__all__ = ["AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"]

_SUBMODULES = ("core", "data", "evaluation", "guidance", "likelihood", "nets", "pretrained", "restoration", "training")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        import importlib

        return importlib.import_module(f"scorematch.{name}")
    raise AttributeError(f"module 'scorematch' has no attribute {name!r}")
