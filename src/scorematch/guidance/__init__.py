"""Scores that are computed from other scores: guidance, and tiles of images that are larger than the network's."""

from scorematch.guidance.guided import GuidedScore, autoguidance, classifier, classifier_free
from scorematch.guidance.tiled import Tiled

__all__ = ["GuidedScore", "Tiled", "autoguidance", "classifier", "classifier_free"]
