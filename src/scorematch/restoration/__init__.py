"""Image restoration: operators that measure an image, observations, the methods that sample given one, and Palette."""

from scorematch.restoration.observation import Observation
from scorematch.restoration.operators import JPEG, OPERATORS, AveragePool, Grayscale, Mask, Operator, Uncrop

__all__ = ["JPEG", "OPERATORS", "AveragePool", "Grayscale", "Mask", "Observation", "Operator", "Uncrop"]
