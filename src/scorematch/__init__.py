"""Score-based image generation: scores from networks, the loss that trains them, the dynamics that samples them."""

from scorematch.loss import dsm_loss
from scorematch.noise import NoiseSchedule
from scorematch.sampling import AnnealedLangevinSampler
from scorematch.score import ScoreNet

__all__ = ["AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"]

__version__ = "0.1.0"
