"""Score-based image generation: networks that estimate scores, the loss that trains them, and samplers.

The submodules, such as ``scorematch.likelihood`` and ``scorematch.restoration``, are imported when they are first
used, and so is torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorematch.core.provenance import __version__
    from scorematch.loss import dsm_loss
    from scorematch.noise import NoiseSchedule
    from scorematch.sampling import AnnealedLangevinSampler
    from scorematch.score import ScoreNet

__all__ = ["AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"]

_MODULES = {
    "AnnealedLangevinSampler": "sampling",
    "NoiseSchedule": "noise",
    "ScoreNet": "score",
    "__version__": "core.provenance",
    "dsm_loss": "loss",
}
_SUBMODULES = (
    *("core", "data", "evaluation", "guidance", "likelihood", "loss", "nets", "noise"),
    *("pretrained", "restoration", "sampling", "score", "training"),
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"scorematch.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'scorematch' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"scorematch.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
