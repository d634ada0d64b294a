"""Observations with any linear or differentiable operator and any noise model, against matrices."""

import math
from typing import get_args

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.evaluation.exact import Gaussian, operator_matrix
from scorematch.restoration import JPEG, AveragePool, Clip, Grayscale, Linear, Mask, Matrix, Observation, Operator
from scorematch.restoration.likelihood import Likelihood
from scorematch.restoration.methods import Restore
from scorematch.sampling import ODESampler
from tests.helpers import run, seed

SHAPE = (3, 4, 4)


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


class Cubes(Operator):
    """The cubes of every second value: neither linear nor of the shape of the sample."""

    def measure(self, x):
        return x[..., ::2] ** 3


class Wrong(Operator):
    """A linear operator with the adjoint of another one."""

    linear = True

    def measure(self, x):
        return x.flip(-1).cumsum(-1)

    def adjoint(self, y, shape=None):
        return y.cumsum(-1)


class Backward(Wrong):
    """A linear operator whose adjoint has another shape than the samples."""

    def adjoint(self, y, shape=None):
        return y[..., 1:]


def weighted(x):
    return (x * torch.arange(1, 5, dtype=x.dtype)).cumsum(-1)[..., 1:]


FUNCTION = Linear(weighted)
SAME = Linear(lambda x: x)
COMPOSED = [FUNCTION @ AveragePool(1), Matrix(random(2, 36)) @ FUNCTION, FUNCTION @ Grayscale()]


@pytest.mark.parametrize("operator", [FUNCTION, Matrix(random(5, 48)), *COMPOSED], ids=repr)
def test_the_adjoint_is_the_transposed_matrix(operator):
    a = operator_matrix(operator, SHAPE)
    y = operator.measure(random(2, *SHAPE))
    assert torch.allclose(operator.adjoint(y, SHAPE).flatten(1), y.flatten(1) @ a, atol=1e-12)
    near = operator.linearized(random(2, *SHAPE, number=1))
    assert torch.allclose(near.adjoint(y), operator.adjoint(y, SHAPE))
    assert torch.allclose(near.forward(random(2, *SHAPE)), operator.measure(random(2, *SHAPE)))


def test_a_matrix_equals_the_operator_whose_matrix_it_is():
    for operator in (Mask(random(*SHAPE) > 0), Grayscale(), AveragePool(2), FUNCTION):
        x = random(2, *SHAPE)
        same = Matrix(operator_matrix(operator, SHAPE))
        y = operator.measure(x)
        assert torch.allclose(same.measure(x), y.flatten(1))
        assert torch.allclose(same.adjoint(y.flatten(1), SHAPE), operator.adjoint(y, SHAPE))


@pytest.mark.parametrize("operator", [Cubes(), FUNCTION @ Linear(lambda x: 2 * x), Grayscale() @ Cubes()], ids=repr)
def test_a_differentiable_operator_near_x_is_its_jacobian(operator):
    x, u = random(2, *SHAPE), random(2, *SHAPE, number=1)
    y, tangent = torch.autograd.functional.jvp(operator.measure, x, u)
    near = operator.linearized(x)
    assert torch.equal(near.value, y) and torch.allclose(near.forward(u), tangent)
    v = torch.randn_like(y)
    assert torch.allclose((near.forward(u) * v).sum(), (u * near.adjoint(v)).sum())


def test_an_adjoint_by_automatic_differentiation_in_inference_mode():
    with torch.inference_mode():
        slopes, y = Linear(lambda x: x[..., 1:] - x[..., :-1]), torch.tensor([[1.0, 0.0]])
        assert torch.equal(slopes.adjoint(y, (3,)), torch.tensor([[-1.0, 1.0, 0.0]]))
        assert torch.equal(slopes.linearized(torch.ones(1, 3)).adjoint(y), slopes.adjoint(y, (3,)))


def test_an_operator_without_a_gradient_says_so_or_is_approximated_by_the_identity():
    rounded = type("Rounded", (Operator,), {"measure": lambda self, x: x.detach().round()})()
    with pytest.raises(ValueError, match=r"has no gradient\. .* or define the method linearized"):
        rounded.linearized(random(1, 4))
    x = torch.rand(1, 3, 8, 8, generator=seed())
    near = (AveragePool(2) @ JPEG(20)).linearized(x)
    assert torch.equal(near.value, AveragePool(2).measure(JPEG(20).measure(x)))
    assert torch.equal(near.forward(x), AveragePool(2).measure(x))


# -- The noise


def posterior(prior, operator, y, sigma):
    return prior.posterior(Observation(operator, y, sigma))


@pytest.mark.parametrize("operator", [FUNCTION, Mask(random(*SHAPE) > 0), COMPOSED[1]], ids=repr)
def test_noise_models_agree_on_the_posterior(operator):
    """A number, a tensor with this number, and the inverse of the covariance; against the formula with matrices."""
    root = random(48, 48)
    prior = Gaussian(random(48), root @ root.T / 48, SHAPE)
    y = operator.measure(random(1, *SHAPE))
    a, c, noise = operator_matrix(operator, SHAPE), prior.covariance, 0.3**2
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + noise * torch.eye(len(a), dtype=torch.float64))
    mean = prior.mean + gain @ (y.flatten() - a @ prior.mean)
    for sigma in (0.3, torch.full(y.shape[1:], 0.3), torch.full_like(y, 0.3), lambda r: r / noise):
        found = posterior(prior, operator, y, sigma)
        assert torch.allclose(found.mean, mean, atol=1e-6)
        assert torch.allclose(found.covariance, c - gain @ a @ c, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restore", ["auto", "moment-matching"])
def test_functions_may_have_tensors_of_either_precision(dtype, restore):
    """The sampler computes in float32, and the posterior in float64."""
    exact = Gaussian([0.0, 1.0], [[1.0, 0.5], [0.5, 1.0]], schedule=NoiseSchedule.geometric(30, 0.01, 20))
    a, inverse, y = (torch.tensor(each, dtype=dtype) for each in ([[1, 1], [0, 1]], [[3, 1], [1, 2]], [[1, 0]]))
    observation = Observation(Linear(lambda x: x @ a.T), y, lambda v: v @ inverse)
    x = run(ODESampler(exact, restore=restore), 1000, observation=observation, generator=seed())
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean(0).double(), exact.posterior(observation).mean, atol=0.1)


def test_guidance_of_a_covariance_names_the_methods_that_take_it():
    exact = Gaussian([0.0, 1.0], 1.0, schedule=NoiseSchedule.geometric(30, 0.01, 5))
    observation = Observation(Linear(lambda x: x), torch.zeros(1, 2), lambda v: v)
    with pytest.raises(ValueError, match=r'"guide" needs the standard deviation.*Write restore="shift"'):
        run(ODESampler(exact, restore="guide"), 1, observation=observation)


def test_a_value_with_infinite_sigma_is_not_measured():
    prior = Gaussian(random(48), 1.0, SHAPE)
    mask, y = random(1, *SHAPE) > 0, random(1, *SHAPE, number=1)
    y_with_nan = torch.where(mask, y, math.nan)
    sigma = torch.where(mask, 0.2, math.inf)
    observation = Observation(Linear(lambda x: x), y_with_nan, sigma)
    assert torch.equal(observation.residual(torch.zeros_like(y)), torch.where(mask, y, 0))
    assert torch.equal(observation.precision(torch.ones_like(y)) == 0, ~mask)
    expected = posterior(prior, Mask(mask[0]), y, 0.2)
    found = prior.posterior(observation)
    assert torch.allclose(found.mean, expected.mean) and torch.allclose(found.covariance, expected.covariance)


@pytest.mark.parametrize("name", ["moment-matching", "shift"])
@pytest.mark.parametrize("rows", [range(7), (0, 0, 1, 1, 2, 3, 3)], ids=["random", "twice"])
def test_values_that_contradict_each_other_give_the_least_squares(name, rows):
    """The last one measures nothing."""
    a, y = random(7, 4).float()[list(rows)], random(1, 7, number=1).float()
    a[-1] = 0
    sampler = ODESampler(Gaussian(random(4), 1.0), NoiseSchedule.geometric(8, 0.02, 6), restore=name)
    x = run(sampler, 2, observation=Observation(Matrix(a), y), generator=0)
    assert torch.allclose(x, (torch.linalg.pinv(a) @ y[0]).expand(2, 4), atol=1e-3)


def test_counts_may_be_integers():
    counts = torch.tensor([[0, 3, 10, 2]])
    assert torch.equal(Observation.from_counts(SAME, counts).y, Observation.from_counts(SAME, counts.float()).y)


@pytest.mark.parametrize("inner", [AveragePool(2), Mask(torch.arange(24).view(3, 1, 8) % 5 > 0)])
def test_an_operator_after_another_one_may_measure_vectors(inner):
    x = random(3, 1, 8)
    operator = Matrix(random(2, inner.measure(x)[0].numel(), number=1)) @ inner
    observation = Observation(operator, operator.measure(x), 0.1).of_shape((1, 8))
    for i in range(3):
        one = observation.scaled(torch.ones(1, 1)).rows(slice(i, i + 1)).operator
        matrix = operator_matrix(one, (1, 8))
        assert torch.allclose(one.decomposition(x[:1]).values, torch.linalg.svdvals(matrix))


def test_a_mask_of_images_before_a_matrix_is_not_one_for_each_sample():
    x, mask = random(2, 3, 4, 6), random(4, 6, number=1) > 0
    operator = Matrix(random(5, 72)) @ Mask(mask)
    made = Observation(operator, operator.measure(x), 0.1)
    assert len(made) == len(made.of_shape((3, 4, 6))) == 2 and len(Observation(operator, made.y[:1])) == 1
    three = Matrix(random(5, 72)) @ Mask(random(3, 3, 4, 6) > 0)
    with pytest.raises(ValueError, match="must have 3 images, like the operator, got 2"):
        Observation(three, made.y).of_shape((3, 4, 6))


def test_a_function_of_axes_that_y_lacks_does_not_fit_samples_like_y():
    means = Observation(Linear(lambda x: x.mean((2, 3))), torch.zeros(1, 3))
    assert means.fits((3, 4, 4)) and not means.fits((3,))


@pytest.mark.parametrize("name", get_args(Restore))
def test_values_with_more_noise_than_float32_can_square_say_nothing(name):
    sampler = ODESampler(Gaussian([0.0, 1.0], 1.0), NoiseSchedule.geometric(5, 0.02, 4), restore=name)
    y = torch.tensor([[1.0, 2.0]])
    huge, infinite = (
        run(sampler, 2, observation=Observation(SAME, y, torch.tensor([0.1, noise])), generator=0)
        for noise in (1e30, math.inf)
    )
    assert torch.equal(huge, infinite) and bool(huge.isfinite().all())


def test_noise_whose_square_is_zero_in_float32_is_no_noise():
    """Otherwise particles have infinite weights."""
    assert Observation(SAME, Y, 1e-24).sigma == 0.0 and Observation(SAME, Y, torch.tensor(1e-9)).sigma > 0


def test_observations_do_not_depend_on_the_default_device_and_dtype():
    made = Observation(Clip(-4, 110), random(3, 2, 4).float(), 0.5)
    ratios = torch.tensor([[20.0], [0.1]])
    expected = made.scaled(ratios)
    method = Likelihood(expected, 1.0, 0.0)
    arguments = (torch.zeros(3, 2, 4), torch.ones(3, 2, 4), 1.0, torch.ones(3), 1, torch.ones_like, lambda: ones)
    ones = torch.ones(3)
    with torch.device("meta"):
        found = made.scaled(ratios)
        assert torch.equal(found.sigma, expected.sigma)
        assert method.draw(*arguments)[0].device.type == "cpu"


def test_values_of_an_operator_that_is_not_linear_are_in_the_units_of_their_channels():
    """Otherwise a method that has one number for all values neglects those of small units."""
    ratios, middle, u = torch.tensor([[20.0], [0.1]]), torch.tensor([[5.0], [-30.0]]), random(3, 2, 4)
    observation = Observation(Clip(-4, 110), random(3, 2, 4, number=1), 0.5).scaled(ratios, middle)
    assert torch.allclose(observation.y, random(3, 2, 4, number=1) / ratios)
    assert torch.allclose(observation.sigma * torch.ones(2, 4), 0.5 / ratios)
    x = ratios * (middle + u)
    assert torch.allclose(observation.operator.measure(middle + u), x.clamp(-4, 110) / ratios)


def test_a_measurement_of_nothing_has_units():
    observation = Observation(Matrix(torch.zeros(2, 3)), torch.ones(1, 2), 1.0).of_shape((3,))
    assert observation.scaled(torch.tensor([1.0, 2.0, 3.0])).y.isfinite().all()


def test_the_noise_of_a_slice_of_the_batch():
    y = random(3, 4)
    sigma = random(3, 4).abs()
    part = Observation(Linear(lambda x: x), y, sigma).of_shape((4,)).rows(slice(1, 2))
    assert torch.equal(part.covariance(torch.ones(1, 4, dtype=torch.float64)), sigma[1:2] ** 2)
    whole = Observation(Linear(lambda x: x), y, sigma[:1]).rows(slice(1, 3))
    assert torch.equal(whole.sigma, sigma[:1]) and torch.equal(whole.y, y[1:3])


# -- Counts


@pytest.mark.parametrize("mean", [0.3, 2.0, 30.0])
def test_the_weighted_mean_of_counts_is_unbiased(mean):
    """Over all counts of a Poisson distribution, E[y / variance] / E[1 / variance] is the mean (Mighell 1999)."""
    n = torch.arange(200.0, dtype=torch.float64)
    chances = torch.exp(n * math.log(mean) - mean - torch.lgamma(n + 1))
    counts = Observation.from_counts(SAME, n[None], 4.0)
    weights = chances / counts.sigma**2
    assert float((weights * counts.y).sum() / weights.sum()) == pytest.approx(mean / 4)


def test_the_posterior_of_a_large_count_is_that_of_its_poisson_distribution():
    prior, scale, count = Gaussian(torch.tensor([0.5]).double(), 0.04, (1,)), 200.0, 80.0
    found = prior.posterior(Observation.from_counts(SAME, torch.tensor([[count]], dtype=torch.float64), scale))
    x = torch.linspace(0.01, 1.5, 10_000, dtype=torch.float64)
    weights = (count * torch.log(scale * x) - scale * x - (x - 0.5) ** 2 / 0.08).softmax(0)
    mean = (weights * x).sum()
    deviation = (weights * (x - mean) ** 2).sum().sqrt()
    assert float(found.mean - mean) == pytest.approx(0, abs=0.05 * float(deviation))
    assert float(found.covariance.sqrt() / deviation) == pytest.approx(1, abs=0.05)


def observation(operator, y, sigma=0.0, shape=None):
    made = Observation(operator, y, sigma)
    return made if shape is None else made.of_shape(shape)


Y = torch.rand(1, 4, generator=seed())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: observation(Wrong(), Y, shape=(4,)), "the adjoint of .*Wrong.* is not that of measure"),
        (lambda: observation(Linear(torch.abs), Y, shape=(4,)), r"Linear\(abs\) is not linear"),
        (
            lambda: observation(Backward(), Y, shape=(4,)),
            r"the shape of the samples, \(1, 4\), got torch.float32 \(1, 3\)",
        ),
        (lambda: observation(Linear(lambda x: x / 0), Y, shape=(4,)), "must return finite values"),
        (lambda: observation(Linear(lambda x: (x, x)), Y, shape=(4,)), "a floating-point tensor, got tuple"),
        (lambda: observation(SAME, Y, Y > 0), "sigma must be a tensor of real numbers, got torch.bool"),
        (lambda: observation(SAME, Y, lambda v: v @ torch.eye(3)), "a function, cannot be applied to y of shape"),
        (lambda: observation(Linear(lambda x: x + 1), Y, shape=(4,)), "is not linear.* Subtract a constant term"),
        (lambda: observation(Linear(lambda x: x - x.mean()), Y, shape=(4,)), "mixes the samples of a batch"),
        (lambda: observation(Linear(lambda x: x.mul_(2)), Y, shape=(4,)), "changes x in place"),
        (lambda: observation(SAME, Y, lambda v: v[:, 1:]), r"the shape of y, \(1, 4\), got torch.float32 \(1, 3\)"),
        (lambda: observation(SAME, Y, lambda v: v.roll(1, 1)), "a symmetric and positive matrix, but that of random"),
        (lambda: observation(SAME, Y, lambda v: v * math.nan), "a symmetric and positive matrix"),
        (lambda: Linear(torch.round).adjoint(Y), r"Linear\(round\) has no gradient"),
        (lambda: observation(SAME, Y, [0.1] * 4), r"a number, a tensor .* got list. Write torch.as_tensor\(sigma\)"),
        (lambda: observation(SAME, Y / 0, torch.ones(4)), "y must be finite where it is observed"),
        (lambda: observation(SAME, Y, torch.ones(3)), r"must broadcast to y of shape \(1, 4\), got shape \(3,\)"),
        (lambda: observation(SAME, Y, -torch.ones(4)), "must be at least 0, got lower"),
        (lambda: observation(SAME, Y, torch.full((4,), math.nan)), "must be at least 0, got lower ones or NaN"),
        (lambda: observation(SAME, Y, -1), "must be at least 0, got -1"),
        (lambda: observation(SAME, Y, 1e20), r"must be at most 1e\+18, got 1e\+20"),
        (lambda: observation(Mask(torch.ones(5) > 0), Y, torch.ones(4)), r"a mask of shape \(5,\) does not fit y"),
        (lambda: Observation.from_counts(SAME, Y - 1), "counts must be at least 0 and finite, got others or NaN"),
        (lambda: Observation.from_counts(SAME, Y / 0), "counts must be at least 0 and finite"),
        (lambda: Observation.from_counts(SAME, Y, 0), "scale must be a number of more than 0, got 0"),
        (lambda: Matrix(torch.eye(2) / 0), "a must be finite"),
        (lambda: Matrix(torch.eye(3)).adjoint(Y), r"y of Matrix\(3x3\) must have shape \(3,\), got \(4,\)"),
        (lambda: Observation.from_counts(SAME, Y * 1j), "counts must be floating point, got torch.complex64"),
        (lambda: Matrix(torch.eye(3)).measure(Y), r"Matrix\(3x3\) needs samples of 3 values, got shape \(4,\)"),
        (lambda: Linear(lambda x: x[..., 1:]).adjoint(Y), r"must have shape \(3,\) .* pass shape="),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
