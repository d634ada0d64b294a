"""Samplers other than annealed Langevin dynamics, and the properties that all samplers have in common."""

import copy
import functools
import itertools
import math
from typing import Annotated, get_type_hints

import numpy as np
import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.core.conditions import Condition
from scorematch.core.schema import Field
from scorematch.core.scores import attribute
from scorematch.evaluation.exact import Gaussian
from scorematch.evaluation.sampler_distance import sampler_variants
from scorematch.guidance import autoguidance, classifier, classifier_free
from scorematch.restoration import Mask, Observation
from scorematch.sampling import (
    SAMPLERS,
    AncestralSampler,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    PredictorCorrectorSampler,
    Sampler,
    SamplerSettings,
    recommended_sampler,
)
from scorematch.sampling.bulk import description_of
from scorematch.sampling.sampler import SamplerOptions
from tests.helpers import point, run, seed

SHORT = NoiseSchedule.geometric(5, 0.1, 12)
FEW = SHORT.respaced(4)  # for laws that hold with any levels
UNEVEN = NoiseSchedule([4.0, 3.0, 1.6, 1.1, 0.5, 0.4])  # all ratios differ; the smallest is 0.4545
KINDS = {
    "langevin": lambda net, schedule=SHORT: AnnealedLangevinSampler(net, schedule, steps_per_level=3),
    "exact noise": lambda net, schedule=SHORT: AnnealedLangevinSampler(
        net, schedule, steps_per_level=3, exact_noise=True
    ),
    "large variance": lambda net, schedule=None: AncestralSampler(net, schedule),
    "small variance": lambda net, schedule=None: AncestralSampler(net, schedule, variance="small"),
    "consistent": lambda net, schedule=None: AnnealedLangevinSampler(net, schedule, consistent=True),
    "reverse-diffusion": lambda net, schedule=None: PredictorCorrectorSampler(
        net, schedule, predictor="reverse-diffusion"
    ),
    "ancestral": lambda net, schedule=None: PredictorCorrectorSampler(net, schedule, corrector_steps=2),
    "predictor": lambda net, schedule=None: PredictorCorrectorSampler(net, schedule, corrector_steps=0),
    "published": lambda net, schedule=None: PredictorCorrectorSampler(
        net, schedule, predictor="reverse-diffusion", published=True
    ),
    "learned variance": lambda net, schedule=None: AncestralSampler(
        Predicting(net), schedule, variance="learned", clamp_denoised=attribute(net, "value_range") is not None
    ),
    "heun": lambda net, schedule=None: ODESampler(net, schedule),
    "churn": lambda net, schedule=None: ODESampler(net, schedule, churn=3, churn_min=0.2, churn_noise=1.01),
    "dpm-solver++": lambda net, schedule=None: ODESampler(net, schedule, method="dpm-solver++"),
    "unipc": lambda net, schedule=None: ODESampler(net, schedule, method="unipc", order=3),
    "ipndm": lambda net, schedule=None: ODESampler(net, schedule, method="ipndm"),
    "stochastic": lambda net, schedule=None: ODESampler(net, schedule, method="unipc", eta=0.5),
    "particles": lambda net, schedule=None: ParticleSampler(net, schedule, particles=3),
    "decoupled": lambda net, schedule=None: DecoupledSampler(net, schedule),
}


class Predicting:
    """A score that also predicts the variance of ancestral sampling, with everything else of the score ``net``."""

    predicts_variance = True

    def __init__(self, net):
        self.net = net

    def __getattr__(self, name):
        return attribute(vars(self)["net"], name)

    def __call__(self, x, sigma, *condition):
        return self.net(x, sigma, *condition)

    def score_and_variance(self, x, sigma, *condition):
        score = self.net(x, sigma, *condition)
        return score, torch.sigmoid(sigma * score)


every_kind = pytest.mark.parametrize("kind", KINDS)
# For costly tests: every sampler with every option that adds a computation of its own.
QUICK = {
    *("langevin", "consistent", "small variance", "learned variance", "ancestral", "published"),
    *("heun", "churn", "dpm-solver++", "ipndm", "stochastic", "particles", "decoupled"),
}
quick_kinds = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)


def _method(kind, restore):
    """A method of restoration, or "auto" for the sampler that has its own."""
    return "auto" if kind == "decoupled" else restore


@functools.cache
def _tiny():
    """A network that no test changes."""
    torch.manual_seed(0)
    return ScoreNet.unet(1, 4, widths=(4,), layers_per_block=1, schedule=SHORT)


def test_every_sampler_is_tested_here():
    assert {type(make(point, SHORT)) for make in KINDS.values()} == set(SAMPLERS.values())


# -- Consistent annealed sampling


@pytest.mark.parametrize("epsilon", ["6e-05", "0.0001", "0.00013"])
def test_published_consistent_trajectories_are_reproduced(epsilon, published):
    fixture = published("cas_trajectory")
    mean, deviation = fixture["target"]["mu"], fixture["target"]["s"]
    case = fixture[f"consistent_eps_{epsilon}"]
    recorded = iter(case["noise"])
    sampler = AnnealedLangevinSampler(
        lambda x, sigma: -(x - mean) / (deviation**2 + sigma**2),
        NoiseSchedule(case["sigmas_float64"]),
        step_size=case["eps"],
        consistent=True,
    )
    states = list(sampler.iterate(init=case["x0"], noise_source=lambda x: next(recorded), progress=False))
    assert next(recorded, None) is None
    expected = [*case["x_before_score"][1:], case["denoised_final"]]
    assert len(states) == len(expected) == len(sampler) == 10
    for (x, _), image in zip(states, expected, strict=True):
        assert (x - image).abs().max() <= 1e-6 * max(1, image.abs().max())
    assert [sigma for _, sigma in states] == [*list(sampler.schedule)[1:], 0.0]


def test_the_published_trajectory_without_consistent_sampling_is_reproduced(published):
    fixture = published("cas_trajectory")
    mean, deviation = fixture["target"]["mu"], fixture["target"]["s"]
    case = fixture["non_consistent_noise_first_False"]
    recorded = iter(case["noise"])
    sampler = AnnealedLangevinSampler(
        lambda x, sigma: -(x - mean) / (deviation**2 + sigma**2),
        NoiseSchedule(case["sigmas_float64"]),
        steps_per_level=case["nsigma"],
        step_size=case["step_lr"],
        denoise=False,
    )
    states = [x for x, _ in sampler.iterate(init=case["x0"], noise_source=lambda x: next(recorded), progress=False)]
    for x, image in zip(states, [*case["x_before_score"][1:], case["returned_final"]], strict=True):
        assert (x - image).abs().max() <= 1e-6 * max(1, image.abs().max())


@pytest.mark.parametrize("schedule", [SHORT, UNEVEN], ids=["geometric", "uneven"])
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_consistent_sampling_of_a_point_gives_every_level_its_variance(schedule, where, rng):
    """For even and uneven schedules and for step sizes from the smallest to the largest, to five standard errors."""
    low, high = (1 + sign * min(b / a for a, b in itertools.pairwise(schedule)) for sign in (-1, 1))
    step_size = schedule.sigma_min**2 * (low + where * (high - low))
    sampler = AnnealedLangevinSampler(point, schedule, step_size=step_size, consistent=True, denoise=False)
    n = 20_000
    states = list(sampler.iterate(n, shape=(1,), generator=rng, progress=False))
    assert [sigma for _, sigma in states] == list(schedule)[1:]
    for x, sigma in states:
        assert abs(x.var() / sigma**2 - 1) < 5 * math.sqrt(2 / n)


def test_the_default_consistent_step_equals_ancestral_sampling(world, rng):
    init, zs = 5 * torch.randn(4, 3, generator=rng), [torch.randn(4, 3, generator=rng) for _ in range(11)]
    consistent, ancestral = iter(zs), iter(zs)
    a = run(AnnealedLangevinSampler(world, SHORT, consistent=True), init=init, noise_source=lambda x: next(consistent))
    sampler = PredictorCorrectorSampler(world, SHORT, predictor="ancestral", corrector_steps=0)
    torch.testing.assert_close(a, run(sampler, init=init, noise_source=lambda x: next(ancestral)))


def test_step_size_and_arguments_of_consistent_sampling():
    r = float((SHORT.sigmas[1:] / SHORT.sigmas[:-1]).min())
    sampler = AnnealedLangevinSampler(point, SHORT, consistent=True)
    assert sampler.step_size == pytest.approx(0.01 * (1 - r**2))
    assert (
        str(sampler) == "AnnealedLangevinSampler(12 levels 5 -> 0.1, 1 step, step 0.0051, consistent, 12 network calls)"
    )
    assert not sampler.exact_noise and sampler.steps_per_level == 1
    assert len(AnnealedLangevinSampler(point, NoiseSchedule([0.5]), consistent=True)) == 1
    for step_size in (0.01 * (1 - r) * 0.999, 0.01 * (1 + r) * 1.001):
        with pytest.raises(ValueError, match=r"between 0\.002993 and 0\.01701 for .*, sigma_min\^2 \(1 - r\) and"):
            AnnealedLangevinSampler(point, SHORT, step_size=step_size, consistent=True)
    for levels in range(2, 20):  # both ends of the range, up to rounding
        r, geometric = 0.02 ** (1 / (levels - 1)), NoiseSchedule.geometric(5, 0.1, levels)
        for step_size in (0.01 * (1 - r), 0.01 * (1 + r)):
            assert AnnealedLangevinSampler(point, geometric, step_size=step_size, consistent=True).consistent
    for wrong in ({"steps_per_level": 2}, {"exact_noise": True}, {"exact_noise": False}):
        with pytest.raises(ValueError, match="leave out steps_per_level and exact_noise"):
            AnnealedLangevinSampler(point, SHORT, consistent=True, **wrong)


def test_recommended_step_sizes_are_not_used_for_another_kind_of_sampling():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    net.sampler_settings = SamplerSettings(levels=20, step_size=0.003, consistent=True)
    recommended = AnnealedLangevinSampler(net)
    assert recommended.consistent and recommended.step_size == 0.003 and len(recommended) == 20
    plain = AnnealedLangevinSampler(net, consistent=False)
    assert not plain.consistent and plain.step_size == plain.schedule.suggest_step_size(plain.steps_per_level)
    for other in ({"steps_per_level": 2}, {"exact_noise": True}, {"exact_noise": False}):  # not consistent
        chosen = AnnealedLangevinSampler(net, **other)
        assert not chosen.consistent and all(getattr(chosen, name) == value for name, value in other.items())
        assert chosen.step_size == chosen.schedule.suggest_step_size(chosen.steps_per_level)
        with pytest.raises(ValueError, match="leave out steps_per_level and exact_noise"):
            AnnealedLangevinSampler(net, consistent=True, **other)
    net.sampler_settings = SamplerSettings(levels=20, steps_per_level=2, step_size=0.003, exact_noise=True)
    consistent = AnnealedLangevinSampler(net, consistent=True)
    assert consistent.steps_per_level == 1 and consistent.step_size != 0.003


# -- Predictor and corrector


@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
@pytest.mark.parametrize("predictor", ["reverse-diffusion", "ancestral"])
def test_predictor_corrector_variances_for_a_point_follow_their_recursion(predictor, corrector_steps, rng):
    """In 200 dimensions the norm of the score, and with it the corrector's step, is nearly the same for each sample."""
    snr, n, dimensions = 0.25, 400, 200
    sampler = PredictorCorrectorSampler(
        point, UNEVEN, predictor=predictor, corrector_steps=corrector_steps, snr=snr, denoise=False
    )
    v = UNEVEN.sigma_max**2
    expected = []
    for louder, sigma in itertools.pairwise(UNEVEN):
        r2 = (sigma / louder) ** 2
        v = r2**2 * v + (louder**2 - sigma**2) * (r2 if predictor == "ancestral" else 1)
        expected.append(v)
        for _ in range(corrector_steps):
            epsilon = 2 * snr**2 * sigma**4 / v
            v = (1 - epsilon / sigma**2) ** 2 * v + 2 * epsilon
            expected.append(v)
    states = [x for x, _ in sampler.iterate(n, shape=(dimensions,), generator=rng, progress=False)]
    for x, variance in zip(states, expected, strict=True):
        assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / (n * dimensions)) + 2e-3  # and the spread of epsilon
    if predictor == "ancestral" and corrector_steps == 0:
        assert expected == pytest.approx([sigma**2 for sigma in list(UNEVEN)[1:]])


@pytest.mark.parametrize(
    "kind",
    [
        *("consistent", "reverse-diffusion"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ancestral", "predictor", "small variance")),
    ],
)
def test_samples_of_a_gaussian_have_its_mean_and_covariance(world, kind, rng):
    n = 4000
    x = run(KINDS[kind](world, NoiseSchedule.geometric(10, 0.01, 300)), n, shape=(3,), generator=rng)
    deviations = world.covariance.diag().sqrt()
    assert ((x.mean(0) - world.mean).abs() < 5 * deviations / math.sqrt(n) + 0.01).all()
    along = torch.cov((x.double() @ world.vectors).T)
    # Five standard errors, and five percent because there are only 300 levels, and because the corrector's step depends
    # on the norm of only three numbers.
    roots = world.values.sqrt()
    error = (along - world.values.diag()).abs()
    assert (error < (5 * math.sqrt(2 / n) + 0.05) * roots[:, None] * roots).all()


def test_the_corrector_step_of_an_image_does_not_depend_on_the_others(world, rng):
    """Another image with a huge score has no effect. The authors' code averages norms over the batch instead."""
    sampler = PredictorCorrectorSampler(world, SHORT)
    init = torch.randn(1, 3, generator=rng)
    together = run(sampler, init=torch.cat([init, 1e4 * init]), generator=[seed(0), seed(1)])
    torch.testing.assert_close(together[:1], run(sampler, init=init, generator=[seed(0)]))


def _published(score, sigmas, x, noises, snr, corrector_steps, predictor):
    """The authors' sampler for variance-exploding networks, in double precision and one image after another.

    Song et al., 2021, arXiv:2011.13456: for each level Langevin steps with norms averaged over the batch (Alg. 4,
    App. G), then the predictor (App. F, ancestral or reverse diffusion), at last without noise. Returns all states.
    """
    states, sigmas = [], [*sigmas, 0.0]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    for sigma, lower in itertools.pairwise(sigmas):
        for _ in range(corrector_steps):
            g, z = score(x, sigma), next(noises)
            ratio = mean([one.norm() for one in z]) / mean([one.norm() for one in g])
            step = (snr * ratio) ** 2 * 2
            x = torch.stack([x[i] + step * g[i] + (2 * step).sqrt() * z[i] for i in range(len(x))])
            states.append(x)
        x = x + (sigma**2 - lower**2) * score(x, sigma)
        if lower:
            kept = lower**2 / sigma**2 if predictor == "ancestral" else 1
            x = x + math.sqrt(kept * (sigma**2 - lower**2)) * next(noises)
        states.append(x)
    return states


@pytest.mark.parametrize("corrector_steps", [0, 1, 2])
@pytest.mark.parametrize("predictor", ["reverse-diffusion", "ancestral"])
def test_the_published_sampler_is_replayed_step_by_step(mixture, predictor, corrector_steps):
    x = 4 * torch.randn(5, 2, generator=seed(0), dtype=torch.float64)
    count = len(UNEVEN) * (1 + corrector_steps) - 1
    noises = torch.randn(count, 5, 2, generator=seed(1), dtype=torch.float64)
    expected = _published(mixture, UNEVEN, x, iter(noises), 0.2, corrector_steps, predictor)
    sampler = PredictorCorrectorSampler(
        mixture, UNEVEN, predictor=predictor, corrector_steps=corrector_steps, snr=0.2, published=True
    )
    recorded = iter(noises)
    states = list(sampler.iterate(init=x.float(), noise_source=lambda x: next(recorded), progress=False))
    assert next(recorded, None) is None and len(states) == len(expected) == len(sampler)
    for (found, _), state in zip(states, expected, strict=True):
        torch.testing.assert_close(found, state.float(), rtol=1e-4, atol=1e-4)
    levels = [sigma for _, sigma in states]
    assert levels == [*[level for level in UNEVEN for _ in range(1 + corrector_steps)][1:], 0.0]


def test_samples_of_the_published_sampler_depend_on_each_other(world):
    """The averages are over all samples of a call, also if they go through the network in several batches."""
    sampler = PredictorCorrectorSampler(world, SHORT, published=True)
    assert str(sampler) == (
        "PredictorCorrectorSampler(12 levels 5 -> 0.1, ancestral, 1 published corrector step, snr 0.16, "
        "24 network calls)"
    )
    init = torch.randn(3, 3, generator=seed(0))
    together = run(sampler, init=init, generator=[0, 1, 2])
    torch.testing.assert_close(run(sampler, init=init, generator=[0, 1, 2], batch_size=1), together)
    assert not torch.allclose(run(sampler, init=init[:1], generator=[0]), together[:1], rtol=0.01)


def test_a_score_of_zero_gives_the_largest_corrector_step(rng):
    sampler = PredictorCorrectorSampler(lambda x, sigma: torch.zeros_like(x), NoiseSchedule([2.0, 1.0]), denoise=False)
    x = run(sampler, init=torch.zeros(20_000, 1), generator=rng)
    assert x.var() == pytest.approx(0.75 + 2, rel=5 * math.sqrt(2 / 20_000))  # (2^2 - 1^2) / 2^2 and 2 epsilon = 2


# -- The probability flow


def _flow(world, x, sigma, quieter):
    """The exact flow of a Gaussian from sigma to ``quieter``: a scaling along each axis of the covariance."""
    along = (x.double() - world.mean) @ world.vectors.double()
    scale = ((world.values.double() + quieter**2) / (world.values.double() + sigma**2)).sqrt()
    return along * scale @ world.vectors.double().T + world.mean


@pytest.mark.parametrize("method", ["heun", "dpm-solver++"])
@pytest.mark.parametrize("make", [NoiseSchedule.karras, NoiseSchedule.geometric])
def test_ode_methods_are_of_second_order(world, method, make, rng):
    """Halving the step divides the error by four, against the closed form of the flow."""
    init = world.mean + 5 * torch.randn(200, 3, generator=rng)
    exact = _flow(world, init, 5, 0.1)
    errors = []
    for levels in (17, 33, 65, 129):
        sampler = ODESampler(world, make(5, 0.1, levels), method=method, denoise=False)
        errors.append(float((run(sampler, init=init) - exact).square().mean().sqrt()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(2, abs=0.15), (errors, orders)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("method", ["heun", "dpm-solver++", "unipc", "ipndm"])
def test_ode_methods_are_exact_for_a_point(method, rng):
    """For data at zero the denoised image is constant, and the path x = sigma z is straight."""
    init = 5 * torch.randn(50, 4, generator=rng)
    for x, sigma in ODESampler(point, UNEVEN, method=method, denoise=False).iterate(init=init, progress=False):
        torch.testing.assert_close(x, init * (sigma / 4), rtol=1e-5, atol=1e-5)


def test_ode_sampler_does_not_use_the_noise_argument(world):
    def noise(x):
        raise AssertionError("no noise is drawn")

    sampler = ODESampler(world, SHORT)
    init = torch.randn(3, 3, generator=seed(0))
    assert torch.equal(run(sampler, init=init, noise_source=noise), run(sampler, init=init))


def test_the_default_schedule_of_the_ode_sampler_is_that_of_karras():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    assert ODESampler(net).schedule == NoiseSchedule.karras(10, 0.1, 18)
    assert ODESampler(net, levels=5).schedule == NoiseSchedule.karras(10, 0.1, 5)
    assert len(ODESampler(net, levels=5)) == 9 and len(ODESampler(net, levels=5, method="dpm-solver++")) == 5
    assert str(ODESampler(net, levels=5)) == "ODESampler(5 levels 10 -> 0.1, heun, 9 network calls)"


# -- Churn


def _stochastic(score, sigmas, x, noises, churn, low, high, factor):
    """Algorithm 2 of Karras et al., 2022, arXiv:2206.00364, line by line; returns the state after each step."""
    n, states = len(sigmas), []
    for t, sigma_next in itertools.pairwise([*sigmas, 0.0]):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0
        epsilon = factor * next(noises)
        raised = t + gamma * t
        noisy = x + math.sqrt(raised**2 - t**2) * epsilon
        d = (noisy - (noisy + raised**2 * score(noisy, raised))) / raised
        x = noisy + (sigma_next - raised) * d
        if sigma_next != 0:
            d_next = (x - (x + sigma_next**2 * score(x, sigma_next))) / sigma_next
            x = noisy + (sigma_next - raised) * (0.5 * d + 0.5 * d_next)
        states.append(x)
    return states


@pytest.mark.parametrize(
    ("churn", "low", "high", "factor"),
    [(1.5, 0.5, 3.0, 1.003), (40, 0.45, None, 1.0), (0.3, 0.41, 1.6, 1.2)],  # the second is limited to sqrt(2) - 1
)
def test_churn_follows_the_stochastic_sampler_of_karras_et_al(mixture, churn, low, high, factor):
    x = 4 * torch.randn(5, 2, generator=seed(0), dtype=torch.float64)
    noises = torch.randn(len(UNEVEN), 5, 2, generator=seed(1), dtype=torch.float64)
    expected = _stochastic(mixture, UNEVEN, x, iter(noises), churn, low, high or math.inf, factor)
    sampler = ODESampler(mixture, UNEVEN, churn=churn, churn_min=low, churn_max=high, churn_noise=factor)
    recorded = iter(noises)
    states = list(sampler.iterate(init=x.float(), noise_source=lambda x: next(recorded), progress=False))
    assert len(list(recorded)) == 1  # the last step, to sigma = 0, draws none
    for (found, _), state in zip(states, expected, strict=True):
        torch.testing.assert_close(found, state.float(), rtol=1e-4, atol=1e-4)


def _churned(world, schedule, churn, factor=1.0):
    """The mean and the covariance of samples of a Gaussian with churn at all levels: every step is affine.

    Heun's step scales the distance from the mean along each axis of the covariance.
    """
    v = world.values.double()
    distance, variance = -(world.mean @ world.vectors).double(), schedule.sigma_max**2 * torch.ones_like(v)
    for sigma, sigma_next in itertools.pairwise(schedule):
        raised = sigma * (1 + min(churn / len(schedule), math.sqrt(2) - 1))
        step = raised - sigma_next
        euler = 1 - step * raised / (v + raised**2)
        scale = 1 - step / 2 * (raised / (v + raised**2) + sigma_next * euler / (v + sigma_next**2))
        variance = scale**2 * (variance + factor**2 * (raised**2 - sigma**2))
        distance = scale * distance
    tweedie = v / (v + schedule.sigma_min**2)
    covariance = world.vectors.double() @ (tweedie**2 * variance).diag() @ world.vectors.double().T
    return world.mean.double() + world.vectors.double() @ (tweedie * distance), covariance


@pytest.mark.parametrize(("churn", "factor"), [(2.0, 1.0), (5.0, 1.1)])
def test_samples_of_a_gaussian_with_churn_have_the_derived_mean_and_covariance(world, churn, factor):
    n, schedule = 8000, NoiseSchedule.karras(10, 0.05, 9)
    sampler = ODESampler(world, schedule, churn=churn, churn_noise=factor)
    x = run(sampler, n, shape=(3,), generator=seed(0)).double()
    mean, covariance = _churned(world, schedule, churn, factor)
    deviation = covariance.diag().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * deviation / math.sqrt(n)).all()
    error = ((deviation[:, None] * deviation) ** 2 + covariance**2).sqrt() / math.sqrt(n)
    assert ((torch.cov(x.T) - covariance).abs() < 5 * error).all()
    assert not torch.allclose(covariance, _churned(world, schedule, 0.0)[1], rtol=0.02)


def test_the_density_with_churn_is_that_of_the_data_with_an_error_of_second_order(world):
    errors = []
    for levels in (40, 80, 160, 320):
        _, covariance = _churned(world, NoiseSchedule.karras(30, 0.001, levels), 10.0)
        errors.append(float((covariance - world.covariance.double()).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(2, abs=0.2) and errors[-1] < 2e-3, (errors, orders)


def test_dpm_solver_after_a_very_short_step(mixture):
    """The extrapolation from two denoised images that are nearly equal would amplify rounding errors."""
    levels = list(NoiseSchedule.karras(80, 0.01, 18))
    x = torch.randn(500, 2, generator=seed(3))
    ends = []
    for schedule in (levels[8:], [levels[8] * (1 + 1e-6), *levels[8:]]):
        sampler = ODESampler(mixture, NoiseSchedule(schedule), method="dpm-solver++")
        ends.append(run(sampler, init=schedule[0] * x))
    assert (ends[0] - ends[1]).abs().max() < 1e-3 * ends[0].abs().max()


def test_churn_outside_its_range_changes_nothing(world):
    """Noise is drawn, so that the other steps do not depend on the range."""
    init = 5 * torch.randn(4, 3, generator=seed(0))
    plain = ODESampler(world, SHORT)
    churned = ODESampler(world, SHORT, churn=5, churn_min=6)
    assert not plain.draws_noise and churned.draws_noise
    assert torch.equal(run(churned, init=init, generator=1), run(plain, init=init))
    everywhere = ODESampler(world, SHORT, churn=5)
    assert not torch.allclose(run(everywhere, init=init, generator=1), run(plain, init=init), atol=0.01)


def test_an_observation_has_the_noise_of_the_state_with_churn():
    """For data at zero the state is sigma z, with the noise z of the state; so is an observation of zero."""
    sampler = ODESampler(point, SHORT, churn=6, denoise=False, restore="replace")
    nothing = Observation(Mask(torch.tensor([True, False])), torch.zeros(1, 2))
    for seen, free in zip(
        sampler.iterate(6, shape=(2,), observation=nothing, generator=0, progress=False),
        sampler.iterate(6, shape=(2,), generator=0, progress=False),
        strict=True,
    ):
        torch.testing.assert_close(seen[0], free[0], rtol=1e-4, atol=1e-5)
    loud = ODESampler(
        point, SHORT, churn=6, churn_noise=1.2, restore="replace"
    )  # more noise in the state, but not in the observation
    *_, (x, sigma), _ = loud.iterate(4000, shape=(2,), observation=nothing, generator=0, progress=False)
    assert float(x[:, 0].std()) == pytest.approx(sigma, rel=0.05) and float(x[:, 1].std()) > 1.1 * sigma


# -- What all samplers have in common


@every_kind
def test_len_is_the_number_of_network_calls(kind, capsys):
    calls = []

    def score(x, sigma):
        calls.append(sigma)
        return point(x, sigma)

    sampler = KINDS[kind](score, SHORT)
    sampler.sample(2, shape=(1,))
    assert len(calls) == len(sampler)
    assert all(sigma.ndim == 0 for sigma in calls)
    assert f"{len(sampler)}/{len(sampler)}" in capsys.readouterr().err
    assert f"{len(sampler)} network calls" in str(sampler)


@every_kind
def test_noise_is_taken_once_per_step_before_the_score(kind, world, rng):
    order = []

    def score(x, sigma):
        order.append("score")
        return world(x, sigma)

    def noise(x):
        order.append("noise")
        return torch.randn(x.shape, generator=replay)

    init, replay, state = torch.randn(4, 3, generator=rng), seed(7), torch.get_rng_state()
    sampler = KINDS[kind](score, SHORT)
    replayed = run(sampler, init=init, noise_source=noise)
    step = ["noise"] * sampler.draws_noise + ["score"] * (2 if kind == "churn" else 1)
    assert order == step * (order[:-1].count("score") // step.count("score")) + ["score"]
    assert order.count("score") == len(sampler)
    assert torch.equal(replayed, run(sampler, init=init, generator=seed(7)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "published"])
def test_with_a_generator_per_sample_samples_do_not_depend_on_batches(kind, world):
    sampler = KINDS[kind](world, FEW)
    generators = [[seed(i) for i in range(5)] for _ in range(3)]
    together = run(sampler, shape=(3,), generator=generators[0])
    split = run(sampler, shape=(3,), generator=generators[1], batch_size=2)
    alone = torch.cat([run(sampler, shape=(3,), generator=[one]) for one in generators[2]])
    torch.testing.assert_close(together, split, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone[:1], run(sampler, 1, shape=(3,), generator=seed(0)))


@every_kind
def test_yielded_states_are_not_modified_and_end_with_the_result_of_sample(kind, world):
    sampler = KINDS[kind](world, SHORT)
    init = torch.randn(3, 3, generator=seed(1))
    before = init.clone()
    states, copies, sigmas = [], [], []
    for x, sigma in sampler.iterate(init=init, generator=seed(0), progress=False):
        states.append(x)
        copies.append(x.clone())
        sigmas.append(sigma)
    assert torch.equal(init, before)
    assert all(torch.equal(a, b) for a, b in zip(states, copies, strict=True))
    assert torch.equal(states[-1], run(sampler, init=init, generator=seed(0)))
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-2:] == [SHORT.sigma_min, 0]


@functools.cache
def _networks():
    """Inference copies of one network of each of two families."""
    torch.manual_seed(0)
    refinenet = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    return [net.inference_copy() for net in (refinenet, ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=1))]


@quick_kinds
def test_any_shape_and_any_network(kind, rng):
    for shape in [(), (2,), (3, 17)]:
        assert run(KINDS[kind](point, FEW), 4, shape=shape, generator=rng).shape == (4, *shape)
    for net in _networks():
        images = run(KINDS[kind](net, SHORT.respaced(3)), 2, generator=rng)
        assert images.shape == (2, 1, 8, 8) and images.min() >= 0 and images.max() <= 1


@every_kind
def test_nan_in_the_state_raises_an_error_that_names_the_level(kind):
    def score(x, sigma):
        return x * math.nan if sigma < 1 else -x / sigma**2

    with pytest.raises(RuntimeError, match=r"NaN or infinite values from level [456] of 12 on, sigma"):
        run(KINDS[kind](score, SHORT), 2, shape=(3,))

    def last(x, sigma):
        return x * math.nan if sigma < 1.01 * SHORT.sigma_min else -x / sigma**2

    with pytest.raises(RuntimeError, match=r"from level 11 of 12 on, sigma"):
        run(KINDS[kind](last, SHORT), 2, shape=(3,))


@quick_kinds
@pytest.mark.parametrize("restore", ["replace", "guide-jacobian"])
def test_samples_are_equal_in_inference_mode(kind, restore, world):
    y = torch.tensor([[0.9, 0.0, 0.0]])
    observation = Observation(Mask(torch.tensor([True, False, False])), y)
    sampler = KINDS[kind](world, FEW)
    sampler.restore = _method(kind, restore)
    init = torch.randn(4, 3, generator=seed(1))
    expected = run(sampler, observation=observation, init=init, generator=seed(0))
    with torch.inference_mode():
        again = run(sampler, observation=observation, init=init + 0, generator=seed(0))
        steps = list(sampler.iterate(observation=observation, init=init + 0, generator=seed(0), progress=False))
    assert torch.equal(again, expected) and torch.equal(steps[-1][0], expected)


class Wrapped(torch.nn.Module):
    """A wrapper that holds a network as DistributedDataParallel does."""

    def __init__(self, net):
        super().__init__()
        self.module = net

    def forward(self, x, sigma):
        return self.module(x, sigma)


@quick_kinds
def test_a_wrapped_network_is_sampled_like_the_network_itself(kind):
    samplers = [KINDS[kind](one, SHORT.respaced(3)) for one in (_tiny(), Wrapped(_tiny()))]
    samplers[0].precision = "float32"  # a wrapped network is called without an inference copy
    assert torch.equal(*(run(sampler, 2, generator=seed(0)) for sampler in samplers))


@quick_kinds
def test_observed_values_are_in_the_result_and_an_empty_mask_changes_nothing(kind, world):
    seen = torch.tensor([True, False, False])
    y = torch.tensor([[0.9, 0.0, 0.0]])
    sampler = KINDS[kind](world, FEW)
    x = run(sampler, 50, shape=(3,), observation=Observation(Mask(seen), y), generator=seed(0))
    assert torch.equal(x[:, 0], y[:, 0].expand(50))
    if sampler.particles > 1 or kind == "decoupled":  # other random numbers than without an observation
        return
    nothing = run(
        sampler, 5, shape=(3,), observation=Observation(Mask(torch.zeros(3, dtype=torch.bool)), y), generator=seed(0)
    )
    assert torch.equal(nothing, run(sampler, 5, shape=(3,), generator=seed(0)))


@pytest.mark.parametrize("kind", ["heun", "dpm-solver++", "unipc", "ipndm"])
def test_ode_sampler_adds_the_noise_of_the_start_to_the_observation(kind, world, rng):
    seen = torch.tensor([True, False, False])
    y = torch.tensor([[0.9, 0.0, 0.0]])
    init = 5 * torch.randn(6, 3, generator=rng)
    states = []

    def score(x, sigma):
        states.append((x, float(sigma)))
        return world(x, sigma)

    sampler = KINDS[kind](score, SHORT)
    sampler.restore = "replace"
    run(sampler, init=init, observation=Observation(Mask(seen), y))
    for x, sigma in states:
        torch.testing.assert_close(x[:, 0], 0.9 + sigma * init[:, 0] / 5)


@quick_kinds
def test_samples_in_other_units_are_the_same_in_these_units(kind, world):
    """For data u from -1 to 1 and data a u + b. No level is between 0.2 / a and 0.2, where the churn of KINDS ends."""
    a, b, levels = 1.25, 3.0, SHORT.respaced(6).sigmas
    world = Gaussian(world.mean, world.covariance, value_range=(-1, 1))
    other = Gaussian(a * world.mean + b, a**2 * world.covariance, value_range=(b - a, b + a))
    samplers = [KINDS[kind](net, NoiseSchedule(c * levels)) for net, c in ((world, 1), (other, a))]
    seen, y = Mask(torch.tensor([True, False, False])), torch.tensor([[0.4, 0.0, 0.0]])
    for restore, noise in ((None, 0.0), ("replace", 0.3), ("guide", 0.0), ("guide-jacobian", 0.3)):
        found = []
        for sampler, c, m in zip(samplers, (1, a), (0, b), strict=True):
            sampler.restore = _method(kind, restore or "replace")
            observation = Observation(seen, c * y + m, c * noise) if restore else None
            found.append(run(sampler, 5, shape=(3,), observation=observation, generator=0))
        torch.testing.assert_close(found[1], a * found[0] + b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        *("consistent", "reverse-diffusion"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ancestral", "predictor")),
    ],
)
def test_a_noisy_observation_gives_the_posterior(kind, world, rng):
    """The observed coordinate is distributed as N(m + k (y - m), (1 - k) v), with k = v / (v + sigma_y^2)."""
    v, m, y, noise, n = 0.5, 0.3, 0.9, 0.3, 3000
    observation = Observation(Mask(torch.tensor([True, False, False])), torch.tensor([[y, 0.0, 0.0]]), sigma=noise)
    sampler = KINDS[kind](world, NoiseSchedule.geometric(10, 0.01, 200))
    sampler.restore = "replace"
    x = run(sampler, n, shape=(3,), observation=observation, generator=rng)[:, 0]
    k = v / (v + noise**2)
    spread = (1 - k) * v
    # Five standard errors, and two percent of the noise of y because there are only 200 levels.
    assert abs(x.mean() - (m + k * (y - m))) < 5 * math.sqrt(spread / n) + 0.02 * noise
    assert abs(x.var() / spread - 1) < 5 * math.sqrt(2 / n) + 0.04


# -- Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ODESampler(point, SHORT, method="euler"),
            "must be one of 'heun', 'dpm-solver\\+\\+', 'unipc', 'ipndm', got 'euler'",
        ),
        (lambda: ODESampler(point, SHORT, order=2), "order is not for the method 'heun'. Write method=.dpm-solver"),
        (lambda: ODESampler(point, SHORT, eta=[0.0, 1.0]), "eta is not for the method 'heun'"),
        (lambda: ODESampler(point, SHORT, method="unipc", order=4), "order must be at most 3 for 'unipc', got 4"),
        (
            lambda: ODESampler(point, SHORT, method="ipndm", order=5),
            "order must be an integer of at least 1 and at most 4, got 5",
        ),
        (
            lambda: ODESampler(point, SHORT, method="unipc", eta=-1),
            "eta must be a number of at least 0 and at most 10,",
        ),
        (
            lambda: ODESampler(point, SHORT, method="unipc", eta=[0.5, 1.0]),
            "eta must have one number for each of the 11 steps from level to level, got 2",
        ),
        (lambda: ODESampler(point, SHORT, method="ipndm", eta=1), "eta is not for the method 'ipndm'"),
        (lambda: SamplerSettings("ode", order=2), "^order is not for the method 'heun'"),
        (lambda: ODESampler(point, SHORT, levels=1), "levels must be an integer of at least 2, got 1"),
        (lambda: ODESampler(point, levels=5), "no noise levels of its own: pass a schedule"),
        (
            lambda: ODESampler(ScoreNet.ncsnv2(1, 8, width=2), levels=1),
            "levels must be an integer of at least 2, got 1",
        ),
        (
            lambda: ODESampler(point, SHORT, churn_noise=1.5),
            "churn_noise need churn above 0. Pass churn, or leave them",
        ),
        (lambda: ODESampler(point, SHORT, churn=-1.0), "churn must be a number of at least 0, got -1.0"),
        (lambda: ODESampler(point, SHORT, churn=math.inf), "churn must be a number of at least 0, got inf"),
        (
            lambda: ODESampler(point, SHORT, churn=1.0, method="dpm-solver++"),
            r"Heun's method, got 1.0 with 'dpm-solver\+\+'. Write method=\"heun\"",
        ),
        (
            lambda: ODESampler(point, SHORT, churn_min=2, churn_max=1),
            "below churn_max, got churn_min=2 and churn_max=1",
        ),
        (lambda: ODESampler(point, SHORT, churn_noise=0), "churn_noise must be a number of more than 0, got 0"),
        (lambda: PredictorCorrectorSampler(point), "no noise levels of its own: pass a schedule"),
        (
            lambda: PredictorCorrectorSampler(point, SHORT, predictor="ode"),
            "'ancestral', 'reverse-diffusion', got 'ode'",
        ),
        (lambda: PredictorCorrectorSampler(point, SHORT, corrector_steps=-1), "integer of at least 0, got -1"),
        (
            lambda: PredictorCorrectorSampler(point, SHORT, snr=0.0),
            "snr must be .* more than 0 and less than 1, got 0.0",
        ),
        (lambda: PredictorCorrectorSampler(point, SHORT, snr=math.nan), "snr must be .* less than 1, got nan"),
    ],
)
def test_invalid_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- Arguments with the same meaning for all samplers


@pytest.mark.parametrize("make", SAMPLERS.values())
def test_levels_respaces_the_given_and_the_default_schedule(make):
    assert make(point, SHORT, levels=5).schedule == SHORT.respaced(5)
    assert make(point, SHORT).schedule == make(point, SHORT, levels=None).schedule == SHORT
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    sampler = make(net, levels=7)
    assert len(sampler.schedule) == 7
    assert (sampler.schedule.sigma_max, sampler.schedule.sigma_min) == (SHORT.sigma_max, SHORT.sigma_min)


def test_a_learned_variance_keeps_to_the_levels_of_its_network():
    """Respaced to 50, these levels have wide gaps, which other samplers do not take."""
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    net = Predicting(ScoreNet.unet(1, 8, widths=(4,), schedule=schedule, precondition="ddpm"))
    assert AncestralSampler(net, variance="learned", levels=50).schedule == schedule.respaced(50)
    assert AncestralSampler(net, levels=50).schedule != schedule.respaced(50)


@pytest.mark.parametrize("make", SAMPLERS.values())
def test_sigma_max_and_sigma_min_limit_the_given_and_the_default_schedule(make):
    assert make(point, SHORT, sigma_max=4, sigma_min=0.2).schedule == SHORT.between(4, 0.2)
    assert make(point, SHORT, sigma_max=4, levels=5).schedule == SHORT.between(4).respaced(5)
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    limited = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT.between(4, 0.2))
    assert make(net, sigma_max=4, sigma_min=0.2).schedule == make(limited).schedule
    assert make(net, sigma_min=0.2, levels=4).schedule.sigma_min == 0.2
    with pytest.raises(ValueError, match=r"sigma_max must be in the range of the schedule, 0\.1 to 5, got 6"):
        make(net, sigma_max=6)


@every_kind
def test_an_int_condition_is_the_class_of_all_samples_and_score_shapes_are_checked(kind):
    def score(x, sigma, condition):
        assert condition.dtype == torch.int64 and condition.tolist() == [3] * len(x)
        return -x / sigma**2

    assert run(KINDS[kind](score, SHORT), 2, shape=(1,), condition=3).shape == (2, 1)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1, 4, 4\) for x of shape \(2, 3, 4, 4\)"):
        run(KINDS[kind](lambda x, sigma: x[:, :1], SHORT), 2, shape=(3, 4, 4))


@every_kind
def test_an_int_is_a_seed(kind, world):
    sampler = KINDS[kind](world, FEW)
    assert torch.equal(run(sampler, 2, shape=(3,), generator=5), run(sampler, 2, shape=(3,), generator=seed(5)))
    assert torch.equal(
        run(sampler, shape=(3,), generator=[1, 2]), run(sampler, shape=(3,), generator=[seed(1), seed(2)])
    )


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
        if kind != "learned variance"  # makes no copy itself
    ],
)
def test_an_inference_copy_is_sampled_like_its_network(kind):
    net = copy.deepcopy(_tiny())
    copied, few = net.inference_copy(), SHORT.respaced(3)
    samplers = [KINDS[kind](one, few) for one in (net, copied)]
    assert str(samplers[0]) == str(samplers[1])
    expected, found = (run(sampler, 2, generator=0) for sampler in samplers)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="needs the network itself, but net is an inference copy"):
        type(samplers[0])(copied, few, precision="float32")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(run(samplers[1], 2, generator=0), expected)  # the copy has its own weights


@quick_kinds
@pytest.mark.parametrize(
    "guidance",
    ["classifier_free", *(pytest.param(name, marks=pytest.mark.slow) for name in ("autoguidance", "classifier"))],
)
def test_a_guided_score_is_sampled_like_the_function_that_it_computes(kind, guidance, mixture):
    """Also with an observation. A guided score gets its levels as floats, a function as tensors."""

    def labeled(x, sigma, condition):
        return torch.where((condition == 2)[:, None], mixture(x, sigma), -(x - condition[:, None]) / (1 + sigma**2))

    def logits(x, sigma):
        return torch.stack([x.sum(1), (x[:, 0] / (1 + sigma)).sin()], dim=1)

    def derivative(x, sigma, condition):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log = logits(x, sigma.expand(len(x))).log_softmax(1)[torch.arange(len(x)), condition]
            return torch.autograd.grad(log.sum(), x)[0]

    labeled.conditioning = Condition(classes=2, null_class=True)
    guided, function = {
        "classifier_free": (
            classifier_free(labeled, 1.5),
            lambda x, s, c: 1.5 * labeled(x, s, c) - 0.5 * labeled(x, s, torch.full_like(c, 2)),
        ),
        "autoguidance": (
            autoguidance(labeled, lambda x, s, c: -x / (2 + s**2), 1.5),
            lambda x, s, c: 1.5 * labeled(x, s, c) + 0.5 * x / (2 + s**2),
        ),
        "classifier": (classifier(mixture, logits, 1.5), lambda x, s, c: mixture(x, s) + 1.5 * derivative(x, s, c)),
    }[guidance]
    function.data_std = guided.data_std
    labels, init = torch.tensor([0, 1, 1]), 5 * torch.randn(3, 2, generator=seed(0))
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[0.4, 0.0]]))
    for given in ({}, {"observation": observation}):
        samplers = [KINDS[kind](one, FEW) for one in (guided, function)]
        assert str(samplers[0]) == str(samplers[1])
        for one in samplers:
            one.restore = _method(kind, "replace")  # the derivatives of the functions have none themselves
        found, expected = (run(one, init=init, condition=labels, generator=0, **given) for one in samplers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- Recommended settings


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(levels=9, step_size=0.005, consistent=True),
        SamplerSettings(levels=9, steps_per_level=2, exact_noise=True),
        SamplerSettings("ode", levels=5, method="dpm-solver++"),
        SamplerSettings("ode", churn=2.0, churn_min=0.2, churn_max=3.0, churn_noise=1.01, sigma_max=4.0),
        SamplerSettings("ancestral", variance="small", clamp_denoised=True, sigma_max=4.0, sigma_min=0.2),
        SamplerSettings("predictor-corrector", levels=6, corrector_steps=2, snr=0.1),
    ],
    ids=str,
)
def test_recommended_sampler_follows_the_settings(settings):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    net.sampler_settings = settings
    assert len(recommended_sampler(net, levels=7).schedule) == 7
    sampler = recommended_sampler(net)
    assert type(sampler) is SAMPLERS[settings.sampler]
    options = settings.options
    assert options.pop("levels", None) in (None, len(sampler.schedule))
    assert options.pop("sigma_max", None) in (None, sampler.schedule.sigma_max)
    assert options.pop("sigma_min", None) in (None, sampler.schedule.sigma_min)
    assert recommended_sampler(net, sigma_max=3.5, sigma_min=0.25).schedule[0] == 3.5
    assert all(getattr(sampler, name) == value for name, value in options.items())
    assert SamplerSettings.from_dict(settings.to_dict()) == settings
    if settings.sampler != "langevin":  # AnnealedLangevinSampler ignores settings of another sampler
        default = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
        assert str(AnnealedLangevinSampler(net)) == str(AnnealedLangevinSampler(default))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of 'langevin', .*got 'euler'"),
        ({"levels": 1}, "levels must be an integer of at least 2 .*got 1"),
        ({"levels": 2.5}, "levels must be an integer .*got 2.5"),
        ({"consistent": 1}, "consistent must be true or false, got 1"),
        ({"step_size": math.nan}, "step_size must be a number .*got nan"),
        ({"method": "heun"}, "method is not an option of the sampler 'langevin', whose options are consistent, "),
        (
            {"sampler": "ode", "snr": 0.1},
            "snr is not an option of the sampler 'ode', whose options are churn, churn_max, ",
        ),
        ({"sigma_max": -1.0}, "sigma_max must be a number of at least 0, got -1.0"),
        ({"sampler": "predictor-corrector", "snr": 1.0}, "snr must be .* more than 0 and less than 1, got 1.0"),
        (
            {"consistent": True, "steps_per_level": 3},
            "consistent.*leave out steps_per_level and exact_noise, got 3 and None",
        ),
        (
            {"consistent": True, "exact_noise": False},
            "consistent.*leave out steps_per_level and exact_noise, got None and False",
        ),
    ],
)
def test_invalid_sampler_settings_raise(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplerSettings(**values)
    with pytest.raises(ValueError, match=f"^sampler_settings: {message}"):
        SamplerSettings.from_dict({"sampler": "langevin", **values})


def test_settings_take_numbers_of_numpy():
    found = SamplerSettings(levels=np.int64(9), step_size=np.float32(0.5), consistent=np.bool_(True))
    assert found == SamplerSettings(levels=9, step_size=0.5, consistent=True)
    assert [type(value) for value in found.to_dict().values()] == [str, int, float, bool]


def test_unknown_keys_and_dicts_as_settings_raise():
    with pytest.raises(ValueError, match=r"level is not an option of .*'langevin', whose options are .*, levels, "):
        SamplerSettings.from_dict({"sampler": "langevin", "level": 3})
    with pytest.raises(ValueError, match="level is not an option of"):
        SamplerSettings.from_dict({"sampler": "langevin", "level": None})
    assert SamplerSettings.from_dict({"sampler": "langevin", "levels": None}) == SamplerSettings()
    net = ScoreNet.ncsnv2(1, 8, width=2)
    with pytest.raises(TypeError, match=r"None, got dict. Write scorematch.sampling.SamplerSettings\(levels="):
        net.sampler_settings = {"levels": 3}


@pytest.mark.parametrize(("own", "levels"), [(10, 100), (150, 150), (1000, 250)])
def test_a_network_without_settings_is_sampled_consistently_in_at_most_250_calls(own, levels):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.01, own))
    sampler = AnnealedLangevinSampler(net)
    r = min(b / a for a, b in itertools.pairwise(sampler.schedule))
    assert sampler.consistent and len(sampler) == len(sampler.schedule) == levels
    assert sampler.step_size == pytest.approx(1e-4 * (1 - r**1.1))


def test_a_variance_exploding_network_without_langevin_settings_is_sampled_with_more_noise():
    net = ScoreNet.unet(1, 8, widths=(4,), precondition="ncsnpp", schedule=NoiseSchedule.geometric(10, 0.01, 150))
    for net.sampler_settings in (None, SamplerSettings("predictor-corrector", levels=150)):
        for score in (net, net.inference_copy()):
            sampler = AnnealedLangevinSampler(score)
            r = min(b / a for a, b in itertools.pairwise(sampler.schedule))
            assert sampler.consistent and sampler.step_size == pytest.approx(1e-4 * (1 - r**1.5))


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_a_network_with_a_table_of_levels_is_sampled_at_these_levels(kind):
    """The normalization layers of NCSN have parameters for each level, and none for a level in between."""
    net = ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    for options in ({}, {"levels": 5}, {"levels": 100}, {"sigma_max": 0.7}, {"sigma_min": 0.02, "levels": 4}):
        for score in (net, net.inference_copy()):
            schedule = SAMPLERS[kind](score, **options).schedule
            assert set(schedule) <= set(net.schedule)
    assert SAMPLERS[kind](net, levels=100).schedule == net.schedule
    SAMPLERS[kind](net, NoiseSchedule(net.schedule.sigmas.float()))  # without a warning
    with pytest.warns(UserWarning, match=r"^4 of the 5 noise levels of the schedule are not among the 10 that the"):
        SAMPLERS[kind](net, NoiseSchedule.geometric(1, 0.02, 5))


def test_the_default_for_a_table_of_few_levels_is_plain_langevin_sampling():
    net = ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    sampler = recommended_sampler(net)
    assert (sampler.schedule, sampler.consistent, sampler.exact_noise) == (net.schedule, False, True)
    assert 1 < sampler.steps_per_level < 10
    net = ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 120))
    sampler = recommended_sampler(net)
    assert sampler.consistent and sampler.schedule == net.schedule
    # Settings of an earlier version, for levels in between: the step size is derived for the levels of the network.
    net = ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    net.sampler_settings = SamplerSettings(levels=100, step_size=5e-6, consistent=True)
    sampler = recommended_sampler(net)
    assert sampler.consistent and sampler.schedule == net.schedule and sampler.step_size > 5e-6


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_settings_may_leave_out_the_final_denoising(kind):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    net.sampler_settings = SamplerSettings.from_dict({"sampler": kind, "levels": 5, "denoise": False})
    sampler = recommended_sampler(net)
    assert not sampler.denoise and sampler.settings() == recommended_sampler(net, denoise=True).settings()
    assert len(recommended_sampler(net, denoise=True)) == len(sampler) + 1
    with pytest.raises(ValueError, match="denoise must be true or false, got 1"):
        SamplerSettings(kind, denoise=1)


def test_another_number_of_levels_keeps_the_kind_of_sampling_and_the_exponent():
    """The exponent p, the amount of new noise per factor of sigma, stays that of the recommended settings."""
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    r = 0.01 ** (1 / 19)
    net.sampler_settings = SamplerSettings(levels=20, step_size=0.01 * (1 - r**1.7), consistent=True)
    for sampler in (AnnealedLangevinSampler(net, levels=8), AnnealedLangevinSampler(net, net.schedule.respaced(8))):
        assert sampler.consistent and len(sampler) == 8
        assert sampler.step_size == pytest.approx(0.01 * (1 - 0.01 ** (1.7 / 7)))
    for step_size in (0.01 * (1 - r**5), 0.012):  # p is limited to that of ancestral sampling, 2
        net.sampler_settings = SamplerSettings(levels=20, step_size=step_size, consistent=True)
        assert AnnealedLangevinSampler(net).step_size == step_size
        assert AnnealedLangevinSampler(net, levels=8).step_size == pytest.approx(0.01 * (1 - 0.01 ** (2 / 7)))
    net.sampler_settings = SamplerSettings(
        levels=20, step_size=0.04 * (1 - 0.025 ** (1.7 / 19)), consistent=True, sigma_max=8.0, sigma_min=0.2
    )
    sampler = recommended_sampler(net)
    assert (sampler.schedule.sigma_max, sampler.schedule.sigma_min, len(sampler)) == (8.0, 0.2, 20)
    assert sampler.step_size == net.sampler_settings.options["step_size"]
    sampler = AnnealedLangevinSampler(net, sigma_max=4)
    assert (sampler.schedule.sigma_max, sampler.schedule.sigma_min) == (4, 0.2)
    assert sampler.step_size == pytest.approx(0.04 * (1 - 0.05 ** (1.7 / 19)), rel=0.02)  # the levels are not even
    net.sampler_settings = SamplerSettings(levels=20, steps_per_level=2, step_size=0.003, exact_noise=False)
    sampler = AnnealedLangevinSampler(net, levels=8)
    assert (sampler.consistent, sampler.steps_per_level, sampler.exact_noise) == (False, 2, False)
    assert sampler.step_size == sampler.schedule.suggest_step_size(2)


@pytest.mark.parametrize("kind", list(SAMPLERS.values()))
def test_states_are_float32_whatever_the_default_dtype_is(kind):
    def score(x, sigma):
        assert x.dtype == sigma.dtype == torch.float32
        return -x / (1 + sigma**2)

    seen = Observation(Mask(torch.tensor([True, False])), torch.ones(1, 2), sigma=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        for observation in (None, seen):
            x = run(kind(score, SHORT.respaced(3)), 2, shape=(2,), observation=observation, generator=0)
            assert x.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# -- User-defined samplers


class Euler(Sampler):
    """A sampler that uses only the public interface: Euler's method."""

    def __init__(self, net, schedule=None, *, churn=0.0, **options):
        super().__init__(net, schedule, **options)
        self.churn = churn

    def __len__(self):
        return len(self.schedule) - 1 + self.denoise

    def step(self, x, score, z, sigma, sigma_next):
        return x + (sigma - sigma_next) * sigma * score + self.churn * z


@pytest.mark.slow
def test_a_user_defined_sampler(world):
    sampler = Euler(world, SHORT, levels=200)
    assert str(sampler) == "Euler(200 levels 5 -> 0.1, 200 network calls)"
    init = world.mean + 5 * torch.randn(100, 3, generator=seed(0))
    x = run(Euler(world, SHORT, levels=400, denoise=False), init=init)
    torch.testing.assert_close(x, _flow(world, init, 5, 0.1).float(), rtol=0, atol=0.02)
    observed = Observation(Mask(torch.tensor([True, False, False])), torch.tensor([[0.9, 0.0, 0.0]]))
    assert torch.equal(run(sampler, init=init, observation=observed)[:, 0], torch.full((100,), 0.9))
    with pytest.raises(TypeError, match="unexpected keyword argument 'chrun'"):
        Euler(world, SHORT, chrun=1)

    class Nothing(Sampler):
        def __len__(self):
            return 0

    with pytest.raises(NotImplementedError, match="Nothing must define step or steps"):
        run(Nothing(world, SHORT), 1, shape=(3,))


@pytest.mark.parametrize("denoise", [True, False])
def test_steps_may_lead_to_zero(denoise, world):
    class ToZero(Euler):
        def steps(self, x, chain):
            yield from super().steps(x, chain)
            yield torch.zeros_like(x), 0.0

    sampler, init = ToZero(world, SHORT, denoise=denoise), torch.randn(2, 3, generator=seed(0))
    *_, (x, sigma) = sampler.iterate(init=init, progress=False)
    assert sigma == 0 and not x.any() and not run(sampler, init=init).any()


class Plain(Sampler):
    """A sampler without options of its own."""

    def __len__(self):
        return len(self.schedule) - 1 + self.denoise

    def step(self, x, score, z, sigma, sigma_next):
        return x + (sigma - sigma_next) * sigma * score


class Noisy(Plain):
    """A sampler with an option, which is declared in its constructor only."""

    def __init__(
        self, net, schedule=None, *, amount: Annotated[float, Field(float, low=0), "new noise"] = 0.5, **options
    ):
        super().__init__(net, schedule, **options)
        self.check_options({"amount": amount})
        self.amount = amount


def test_a_sampler_is_registered_by_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAMPLERS, "plain", Plain)
    monkeypatch.setitem(SAMPLERS, "noisy", Noisy)
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    for settings in (
        SamplerSettings("plain"),
        SamplerSettings("plain", levels=3),
        SamplerSettings("noisy", amount=0.25),
    ):
        net.sampler_settings = settings
        net.save_pretrained(tmp_path)
        assert ScoreNet.from_pretrained(tmp_path).sampler_settings == settings
        sampler = recommended_sampler(net)
        assert type(sampler) is SAMPLERS[settings.sampler] and getattr(sampler, "amount", 0.25) == 0.25
    assert sampler_variants(net).keys() >= {"plain", "noisy"}
    picture, options = str(tmp_path / "a.png"), ["-n", "1", "--quiet", "--overwrite"]
    for sampler, of_sampler in (("Plain(", ["--sampler", "plain"]), ("Noisy(", ["--amount", "0.1"])):
        assert main(["sample", str(tmp_path), picture, "--levels", "3", *options, *of_sampler]) == 0
        assert capsys.readouterr().out.startswith(sampler)
    for options, message in [
        (
            {"sampler": "plain", "amount": 1},
            "amount is not an option of the sampler 'plain', whose options are denoise, levels",
        ),
        ({"sampler": "noisy", "amount": -1}, "^amount must be a number of at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SamplerSettings(**options)
    with pytest.raises(ValueError, match=r"^amount must be a number of at least 0, got -1"):
        Noisy(net, amount=-1)


def test_the_types_of_shared_options_are_those_of_the_constructor():
    """A subclass passes them on as a ``SamplerOptions``."""
    own = {name: hint for name, hint in get_type_hints(Sampler.__init__).items() if name not in ("return", "net")}
    assert own.pop("schedule") and own == get_type_hints(SamplerOptions)


def test_options_may_be_numbers_of_numpy():
    two = np.int64(2)
    for kind, name in ((AnnealedLangevinSampler, "steps_per_level"), (PredictorCorrectorSampler, "corrector_steps")):
        a, b = (kind(point, SHORT, **{name: number}) for number in (two, 2))
        assert str(a) == str(b)
        assert torch.equal(*(run(each, 3, shape=(2,), generator=0, batch_size=two) for each in (a, b)))
    assert autoguidance(point, point, np.float32(2)).weight == 2
    a, b = (ODESampler(point, SHORT, churn=kind(0.125), churn_max=kind(4)) for kind in (np.float32, float))
    assert torch.equal(*(run(each, 3, shape=(2,), generator=0) for each in (a, b)))
    assert description_of(a) == description_of(b)


def _returning(value):
    """A sampler whose ``step`` returns this function of the state."""

    class Wrong(Euler):
        def step(self, x, score, z, sigma, sigma_next):
            return value(x)

    return Wrong


class _OnlyStates(Euler):
    def steps(self, x, chain):
        for _ in self.schedule:
            yield x


@pytest.mark.parametrize(
    ("sampler", "found"),
    [
        (_returning(lambda x: x[:1]), r"shape \(1, 2\)"),
        (_returning(lambda x: None), "NoneType"),
        (_OnlyStates, "Tensor"),
    ],
)
def test_a_sampler_that_returns_no_state_of_the_shape_of_x_is_an_error(sampler, found):
    own = sampler(lambda x, sigma: -x / (1 + sigma**2), NoiseSchedule([1.0, 0.1]))
    with pytest.raises(ValueError, match=rf"must return the state, .* of x, \(2, 2\), .* got {found}"):
        own.sample(2, shape=(2,), progress=False)
