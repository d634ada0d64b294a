"""Image restoration: operators that measure an image, observations, the methods that sample given one, and Palette."""

from scorematch.restoration.linear import Linear, Matrix
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator
from scorematch.restoration.operators import (
    JPEG,
    OPERATORS,
    AveragePool,
    Grayscale,
    Half,
    Hole,
    Mask,
    Uncrop,
    as_operator,
)

__all__ = [
    "JPEG",
    "OPERATORS",
    "AveragePool",
    "Grayscale",
    "Half",
    "Hole",
    "Linear",
    "Mask",
    "Matrix",
    "Observation",
    "Operator",
    "Uncrop",
    "as_operator",
]
