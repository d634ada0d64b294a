"""The default method of restoration: what it chooses, and scores without gradients."""

from functools import partial

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.restoration import AveragePool, Blur, Clip, Fourier, Linear, Observation, Operator
from scorematch.sampling import ODESampler
from tests.helpers import gaussian_images, run

WORLD = gaussian_images((3, 4, 4))
LEVELS = NoiseSchedule.geometric(20, 0.01, 6)
POOL = AveragePool(2)
Y = POOL.measure(WORLD.sample(2, 1))


SHORT = partial(AnnealedLangevinSampler, steps_per_level=2)


def draw(score, observation, restore, sampler=SHORT):
    chain = sampler(score, LEVELS, clamp=False, restore=restore)
    return run(chain, shape=(3, 4, 4), observation=observation, generator=0)


def test_it_uses_the_gradients_of_the_score():
    assert AnnealedLangevinSampler(WORLD, LEVELS).restore == "auto"
    for sigma, method in ((0.1, "guide-jacobian"), (torch.tensor([0.1, 0.3]), "moment-matching")):
        observation = Observation(POOL, Y, sigma)
        assert torch.equal(draw(WORLD, observation, "auto"), draw(WORLD, observation, method))


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        (Blur(torch.ones(3, 3) / 9), "spectral"),
        (Fourier(torch.arange(16).view(4, 4) < 6), "spectral"),
        (Blur(torch.ones(3, 3) / 9) @ Clip(-9, 9), "guide-jacobian"),
        (Linear(lambda x: x.repeat(1, 1, 8, 8).cumsum(-1)), "spectral"),
    ],
    ids=repr,
)
def test_it_chooses_by_the_operator(operator, method):
    """Singular vectors are computed for up to 2,048 values, and known for circular blurs of any size."""
    observation = Observation(operator, operator.measure(WORLD.sample(2, 1)), 0.1)
    assert torch.equal(draw(WORLD, observation, "auto"), draw(WORLD, observation, method))


@pytest.mark.slow
def test_it_solves_for_linear_operators_whose_singular_vectors_are_not_known():
    large, operator = gaussian_images((3, 28, 28)), Linear(lambda x: x.cumsum(-1))
    observation = Observation(operator, operator.measure(large.sample(1, 1)), 0.1)

    def one(restore):
        chain = ODESampler(large, NoiseSchedule.geometric(20, 0.01, 3), clamp=False, restore=restore)
        return run(chain, shape=(3, 28, 28), observation=observation, generator=0)

    assert operator.decomposition(torch.zeros(1, 3, 28, 28)) is None
    assert torch.equal(one("auto"), one("moment-matching"))


class Sines(Operator):
    """The sines of the values, without singular vectors."""

    def measure(self, x):
        return x.sin()


def of_arrays(x, sigma):
    return torch.from_numpy(-x.numpy() / (1 + float(sigma) ** 2))


SCORES = {"no_grad": torch.no_grad()(lambda x, sigma: -x / (1 + sigma**2)), "numpy": of_arrays}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_without_gradients_is_used_with_a_method_that_needs_none(name):
    calls = []

    def score(x, sigma):
        result = SCORES[name](x, sigma)
        calls.append(sigma)
        return result

    for operator, method in ((POOL, "spectral"), (Sines(), "guide")):
        calls.clear()
        observation = Observation(operator, operator.measure(WORLD.sample(2, 1)), 0.1)
        with pytest.warns(UserWarning, match=f"no gradients: restore=.auto. uses the method .{method}.") as warned:
            x = draw(score, observation, "auto", ODESampler)
        assert len(warned) == 1 and len(calls) - len(ODESampler(score, LEVELS)) in (0, 1)  # the first call is repeated
        assert torch.equal(x, draw(score, observation, method, ODESampler))


def test_other_errors_of_a_score_are_raised():
    def score(x, sigma):
        raise RuntimeError("the score is broken")

    with pytest.raises(RuntimeError, match="the score is broken"):
        draw(score, Observation(POOL, Y), "auto")


@pytest.mark.parametrize("restore", ["guide-jacobian", "moment-matching"])
def test_a_lack_of_memory_in_the_backward_pass_names_the_remedy(restore):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="not enough memory for a backward pass"):
        draw(lambda x, sigma: Full.apply(-x), Observation(POOL, Y), restore)
