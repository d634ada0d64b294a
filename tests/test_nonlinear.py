"""Operators that are not linear: their measurements, derivatives and bad input. JPEG is in test_operators.py."""

import math

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.evaluation.exact import Gaussian
from scorematch.restoration import JPEG, Clip, Magnitude, Observation, Operator, Quantize
from scorematch.sampling import SAMPLERS, ODESampler
from tests.helpers import seed


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


def test_clipped_values_have_no_derivative():
    x = torch.tensor([[-1.0, 0.3, 0.7, 2.0]])
    near = Clip(0, 0.5).linearized(x)
    assert torch.equal(near.value, torch.tensor([[0, 0.3, 0.5, 0.5]]))
    ones, inside = torch.ones_like(x), [[0, 1, 0, 0]]
    assert near.forward(ones).tolist() == near.adjoint(ones).tolist() == inside


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_rounding_to_levels(levels):
    x = torch.rand(4, 1000, generator=seed(), dtype=torch.float64)
    y = Quantize(levels).measure(x)
    assert torch.allclose(y * (levels - 1), (y * (levels - 1)).round())
    assert float((y - x).abs().max()) <= 0.5 / (levels - 1) + 1e-9
    # The error is uniform: its deviation is q / sqrt(12), with a standard error of 1 % for 4,000 values.
    assert float((y - x).std() * (levels - 1) * math.sqrt(12)) == pytest.approx(1, abs=0.03)
    assert torch.equal(Quantize(levels).measure(torch.tensor([[-1.0, 2.0]])), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("operator", [Quantize(3), JPEG(20)], ids=repr)
def test_the_derivative_of_rounding_is_the_identity(operator):
    x = torch.rand(1, 3, 8, 8, generator=seed())
    near = operator.linearized(x)
    assert torch.equal(near.value, operator.measure(x))
    assert torch.equal(near.forward(x), x) and torch.equal(near.adjoint(x), x)


@pytest.mark.parametrize(("axes", "shape"), [(2, (2, 4, 6)), (1, (2, 12)), (1, (12,))])
def test_the_magnitude_is_the_modulus_of_the_transform(axes, shape):
    operator, x = Magnitude(2), random(2, *shape)
    y = operator.measure(x)
    padded = torch.zeros(2, *shape[: len(shape) - axes], *(2 * size for size in shape[len(shape) - axes :])).double()
    padded[tuple(map(slice, x.shape))] = x
    last = tuple(range(-axes, 0))
    assert torch.allclose(y, torch.fft.fftn(padded, dim=last, norm="ortho").abs())
    assert operator.sample_shape(y) == shape
    # Autocorrelation: what the modulus determines is the same for the sample, its negative and its mirror image.
    assert torch.allclose(operator.measure(-x.flip(last)), y)
    # Its square is the transform of the autocorrelation, and the sum of squares is that of x.
    assert torch.allclose(y.square().flatten(1).sum(1), x.square().flatten(1).sum(1))


def test_the_derivative_of_the_magnitude():
    x, u = random(1, 1, 4, 6), random(1, 1, 4, 6, number=1)
    near = Magnitude(2).linearized(x)
    difference = (Magnitude(2).measure(x + 1e-6 * u) - Magnitude(2).measure(x - 1e-6 * u)) / 2e-6
    assert torch.allclose(near.forward(u), difference, atol=1e-6)
    v = random(*near.value.shape, number=2)
    assert torch.allclose((near.forward(u) * v).sum(), (u * near.adjoint(v)).sum())
    assert torch.isfinite(Magnitude(2).linearized(torch.zeros(1, 1, 4, 6)).adjoint(torch.ones(1, 1, 8, 12))).all()
    Observation(Magnitude(2), near.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Clip(1, 0), ValueError, "low must be below high, got 1 and 0"),
        (lambda: Clip(0, math.inf), ValueError, "high must be a number, got inf"),
        (lambda: Clip("a", 1), TypeError, "low must be a number, got 'a'"),
        (lambda: Quantize(1), ValueError, "levels must be an integer from 2 to 16777216, got 1"),
        (lambda: Quantize(10**20), ValueError, "levels must be an integer from 2 to 16777216, got 1"),
        (lambda: Magnitude(0), ValueError, "oversampling must be an integer of at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


class _Cubic(Operator):
    """Pairs of values, linear or not, in units of its own."""

    def __init__(self, unit_x, unit_y, curved):
        self.unit_x, self.unit_y, self.curved, self.linear = unit_x, unit_y, curved, not curved

    def measure(self, x):
        x = x / self.unit_x
        return self.unit_y * (x[:, ::2] + 0.5 * x[:, 1::2] + 0.2 * self.curved * x[:, ::2] ** 3)


@pytest.mark.parametrize(
    ("name", "curved"),
    [("guide", True), ("guide-jacobian", True), ("decoupled", True), ("shift", False), ("particles", True)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in ("guide", "guide-jacobian", "decoupled")],
)
def test_the_units_of_samples_and_measurements_do_not_matter(name, curved):
    i, results = torch.arange(6), []
    covariance = 0.8 ** (i[:, None] - i).abs().double()
    for unit_x, unit_y in ((1.0, 1.0), (1.0, 300.0), (1e3, 0.01)):
        levels = NoiseSchedule.geometric(10 * unit_x, 0.02 * unit_x, 5)
        exact = Gaussian([0.5 * unit_x] * 6, covariance * unit_x**2, schedule=levels)
        y = torch.tensor([[1.0, 0.3, -0.6]]) * unit_y
        observation = Observation(_Cubic(unit_x, unit_y, curved), y, 0.1 * unit_y)
        sampler = SAMPLERS[name](exact) if name in SAMPLERS else ODESampler(exact, levels, restore=name)
        results.append(sampler.sample(2, observation=observation, generator=0, progress=False) / unit_x)
    for other in results[1:]:
        assert torch.allclose(other, results[0], atol=1e-4)


@pytest.mark.parametrize("method", ["shift", pytest.param("moment-matching", marks=pytest.mark.slow)])
def test_saturated_values_without_noise(method):
    """The limit of little noise: what no change of the sample explains does not count."""
    i = torch.arange(16)
    covariance = torch.exp(-(((i[:, None] - i) / 3.0) ** 2)).double() + 0.01 * torch.eye(16)
    exact = Gaussian(torch.zeros(16), covariance, schedule=NoiseSchedule.karras(20, 0.02, 20))
    y, draws = Clip(-1, 1).measure(exact.sample(3, 0)), []
    for sigma in (0.0, 1e-3):
        sampler = ODESampler(exact, levels=20, restore=method)
        draws.append(sampler.sample(3, observation=Observation(Clip(-1, 1), y, sigma), generator=1, progress=False))
    assert torch.allclose(*draws, atol=0.02)
    assert float((Clip(-1, 1).measure(draws[0]) - y).square().mean().sqrt()) < 0.1
