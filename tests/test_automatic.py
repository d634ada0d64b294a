"""The default method of restoration: what it chooses, and scores without gradients."""

from functools import partial

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.restoration import AveragePool, Blur, Clip, Observation, Operator
from scorematch.sampling import AncestralSampler, ODESampler, SamplerSettings, recommended_sampler
from tests.helpers import gaussian_images, run

WORLD = gaussian_images((3, 4, 4))
LEVELS = NoiseSchedule.geometric(20, 0.01, 6)
POOL = AveragePool(2)
Y = POOL.measure(WORLD.sample(2, 1))


SHORT = partial(AnnealedLangevinSampler, steps_per_level=2)


def draw(score, observation, restore, sampler=SHORT):
    chain = sampler(score, LEVELS, clamp=False, restore=restore)
    return run(chain, shape=(3, 4, 4), observation=observation, generator=0)


CLIPPED = Blur(torch.ones(3, 3) / 9) @ Clip(-9, 9)


@pytest.mark.parametrize(
    ("operator", "sigma", "method"),
    [
        (POOL, torch.tensor([0.1, 0.3]), "shift"),
        (Blur(torch.ones(3, 3) / 9), 0.1, "shift"),
        (CLIPPED, 0.1, "guide-jacobian"),
        (CLIPPED, torch.tensor([0.1, 0.3, 0.1, 0.2]), "guide-jacobian"),
        (CLIPPED, lambda v: 9 * v, "shift"),
    ],
)
def test_it_chooses_by_the_operator_and_the_noise(operator, sigma, method):
    assert AnnealedLangevinSampler(WORLD, LEVELS).restore == "auto"
    observation = Observation(operator, operator.measure(WORLD.sample(2, 1)), sigma)
    assert torch.equal(draw(WORLD, observation, "auto"), draw(WORLD, observation, method))


class Sines(Operator):
    """The sines of the values."""

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

    draw(score, Observation(POOL, Y, 0.1), "auto", ODESampler)  # needs no gradients, and gives no warning
    calls.clear()
    observation = Observation(Sines(), WORLD.sample(2, 1).sin(), 0.1)
    with pytest.warns(UserWarning, match=r"no gradients: restore=.auto. uses the method .guide.") as warned:
        x = draw(score, observation, "auto", ODESampler)
    expected = ODESampler(score, LEVELS, restore="auto")
    assert len(warned) == 1 and len(calls) - len(expected) in (0, 1)  # the first call is repeated
    expected.restore = "guide"
    assert torch.equal(x, run(expected, shape=(3, 4, 4), observation=observation, generator=0))
    with pytest.raises(ValueError, match="gradients"):
        draw(score, observation, "guide-jacobian", ODESampler)


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


def test_a_sampler_that_restores_has_not_the_settings_for_drawing():
    """Methods of the first order have the steps of ancestral sampling."""
    small = partial(ScoreNet.unet, 1, 8, widths=(8,), layers_per_block=1, schedule=LEVELS)
    net, trained = small(), small(condition_channels=1)
    for each in (net, trained):
        each.sampler_settings = SamplerSettings("ode", levels=3, method="unipc", sigma_min=0.05)
    for restore, levels in {"auto": 50, "shift": 50, "moment-matching": 30}.items():
        sampler = ODESampler(net, restore=restore)
        expected = ODESampler(net, levels=levels, method="dpm-solver++", eta=1)
        assert vars(sampler) == vars(ODESampler(net, restore=restore, eta=1)) == {**vars(expected), "restore": restore}
        assert repr(sampler) == repr(recommended_sampler(net, restore=restore))
    assert len(recommended_sampler(net, restore="shift", calls=7)) == 7
    with pytest.raises(ValueError, match="calls must be an integer of at least 2, got 1"):
        recommended_sampler(net, restore="shift", calls=1)
    for restore in ("shift", None):
        with pytest.raises(ValueError, match=r"calls and levels cannot be combined\. Leave out one\."):
            recommended_sampler(net, restore=restore, calls=7, levels=400)
    assert repr(ODESampler(net, method="heun", levels=4, restore="shift")).endswith(
        "heun, restore shift, 7 network calls)"
    )
    assert repr(ODESampler(trained, restore="auto")) == repr(recommended_sampler(trained, restore="auto"))
    assert len(ODESampler(trained, restore="auto")) == 3
    observation = Observation(AveragePool(2), torch.rand(1, 1, 4, 4), 0.1)
    options = {"restore": "guide", "precision": "float32"}
    samplers = ODESampler(net, LEVELS, **options), AncestralSampler(net, LEVELS, variance="small", **options)
    restored = [run(sampler, 2, observation=observation, generator=0) for sampler in samplers]
    torch.testing.assert_close(*restored)
    with pytest.warns(UserWarning, match=r"with which the network draws\. To restore, write ODESampler\(net, restore="):
        run(ODESampler(net), 2, observation=observation, generator=0)
