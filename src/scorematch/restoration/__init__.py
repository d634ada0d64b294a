"""Image restoration: operators that measure an image, observations, the methods that sample given one, and Palette."""

from scorematch.restoration.blur import Blur, GaussianBlur, MotionBlur
from scorematch.restoration.fourier import Fourier, FourierLines
from scorematch.restoration.linear import Linear, Matrix
from scorematch.restoration.moments import conjugate_gradients
from scorematch.restoration.nonlinear import JPEG, Clip, Magnitude, Quantize
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator
from scorematch.restoration.operators import OPERATORS, AveragePool, Grayscale, Half, Hole, Mask, Uncrop, as_operator
from scorematch.restoration.photograph import Photograph
from scorematch.restoration.physics import Physics
from scorematch.restoration.resize import Resize
from scorematch.restoration.summary import Summary, summary

__all__ = [
    "JPEG",
    "OPERATORS",
    "AveragePool",
    "Blur",
    "Clip",
    "Fourier",
    "FourierLines",
    "GaussianBlur",
    "Grayscale",
    "Half",
    "Hole",
    "Linear",
    "Magnitude",
    "Mask",
    "Matrix",
    "MotionBlur",
    "Observation",
    "Operator",
    "Photograph",
    "Physics",
    "Quantize",
    "Resize",
    "Summary",
    "Uncrop",
    "as_operator",
    "conjugate_gradients",
    "summary",
]
