"""The samplers beside annealed Langevin dynamics, and what all samplers have in common."""

import inspect
import itertools
import math

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.observe import Mask, Observation
from scorematch.sampling import (
    SAMPLERS,
    AncestralSampler,
    ODESampler,
    PredictorCorrectorSampler,
    Sampler,
    SamplerSettings,
    recommended_sampler,
)
from tests.helpers import point, run, seed

SHORT = NoiseSchedule.geometric(5, 0.1, 12)
UNEVEN = NoiseSchedule([4.0, 3.0, 1.6, 1.1, 0.5, 0.4])  # no two ratios alike, the smallest 0.4545
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
    "heun": lambda net, schedule=None: ODESampler(net, schedule),
    "dpm-solver++": lambda net, schedule=None: ODESampler(net, schedule, method="dpm-solver++"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
CHAINS = [kind for kind in KINDS if kind not in ("heun", "dpm-solver++")]  # those that draw noise


def test_every_sampler_has_a_kind():
    assert {type(make(point, SHORT)) for make in KINDS.values()} == set(SAMPLERS.values())


# -- Consistent annealed sampling


@pytest.mark.parametrize("epsilon", ["6e-05", "0.0001", "0.00013"])
def test_published_consistent_trajectories_replay(epsilon, published):
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
    states = list(sampler.iterate(init=case["x0"], noise=lambda x: next(recorded), progress=False))
    assert next(recorded, None) is None
    expected = [*case["x_before_score"][1:], case["denoised_final"]]
    assert len(states) == len(expected) == len(sampler) == 10
    for (x, _), image in zip(states, expected, strict=True):
        assert (x - image).abs().max() <= 1e-6 * max(1, image.abs().max())
    assert [sigma for _, sigma in states] == [*list(sampler.schedule)[1:], 0.0]


def test_the_published_inconsistent_trajectory_replays(published):
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
    states = [x for x, _ in sampler.iterate(init=case["x0"], noise=lambda x: next(recorded), progress=False)]
    for x, image in zip(states, [*case["x_before_score"][1:], case["returned_final"]], strict=True):
        assert (x - image).abs().max() <= 1e-6 * max(1, image.abs().max())


@pytest.mark.parametrize("schedule", [SHORT, UNEVEN], ids=["geometric", "uneven"])
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_on_a_point_every_level_begins_with_its_own_variance(schedule, where, rng):
    """For every schedule and every legal step; to five standard errors."""
    low, high = (1 + sign * min(b / a for a, b in itertools.pairwise(schedule)) for sign in (-1, 1))
    step_size = schedule.sigma_min**2 * (low + where * (high - low))
    sampler = AnnealedLangevinSampler(point, schedule, step_size=step_size, consistent=True, denoise=False)
    n = 20_000
    states = list(sampler.iterate(n, shape=(1,), generator=rng, progress=False))
    assert [sigma for _, sigma in states] == list(schedule)[1:]
    for x, sigma in states:
        assert abs(x.var() / sigma**2 - 1) < 5 * math.sqrt(2 / n)


def test_the_default_step_is_ancestral_sampling(world, rng):
    init, zs = 5 * torch.randn(4, 3, generator=rng), [torch.randn(4, 3, generator=rng) for _ in range(11)]
    consistent, ancestral = iter(zs), iter(zs)
    a = run(AnnealedLangevinSampler(world, SHORT, consistent=True), init=init, noise=lambda x: next(consistent))
    sampler = PredictorCorrectorSampler(world, SHORT, predictor="ancestral", corrector_steps=0)
    torch.testing.assert_close(a, run(sampler, init=init, noise=lambda x: next(ancestral)))


def test_consistent_settings():
    r = float((SHORT.sigmas[1:] / SHORT.sigmas[:-1]).min())
    sampler = AnnealedLangevinSampler(point, SHORT, consistent=True)
    assert sampler.step_size == pytest.approx(0.01 * (1 - r**2))
    assert (
        str(sampler) == "AnnealedLangevinSampler(12 levels 5 -> 0.1, 1 step, step 0.0051, consistent, 12 network calls)"
    )
    assert not sampler.exact_noise and sampler.steps_per_level == 1
    assert len(AnnealedLangevinSampler(point, NoiseSchedule([0.5]), consistent=True)) == 1
    for step_size in (0.01 * (1 - r) * 0.999, 0.01 * (1 + r) * 1.001):
        with pytest.raises(ValueError, match=r"must lie between 0\.002993 and 0\.01701, sigma_min\^2 \(1 -\+ r\)"):
            AnnealedLangevinSampler(point, SHORT, step_size=step_size, consistent=True)
    for wrong in ({"steps_per_level": 2}, {"exact_noise": True}, {"exact_noise": False}):
        with pytest.raises(ValueError, match="leave out steps_per_level and exact_noise"):
            AnnealedLangevinSampler(point, SHORT, consistent=True, **wrong)


def test_a_recommendation_counts_for_its_own_kind_of_noise_only():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    net.sampler_settings = SamplerSettings(levels=20, step_size=0.003, consistent=True)
    recommended = AnnealedLangevinSampler(net)
    assert recommended.consistent and recommended.step_size == 0.003 and len(recommended) == 20
    plain = AnnealedLangevinSampler(net, consistent=False)
    assert not plain.consistent and plain.step_size == plain.schedule.suggest_step_size(plain.steps_per_level)
    for other in ({"steps_per_level": 2}, {"exact_noise": True}, {"exact_noise": False}):  # chosen against it
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
def test_the_variance_on_a_point_is_a_recursion_of_numbers(predictor, corrector_steps, rng):
    """In 200 dimensions the norm of a score is its mean to a few percent, and so is the corrector's step."""
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
        assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / (n * dimensions)) + 2e-3  # epsilon's own spread
    if predictor == "ancestral" and corrector_steps == 0:
        assert expected == pytest.approx([sigma**2 for sigma in list(UNEVEN)[1:]])


@pytest.mark.parametrize("kind", ["consistent", "reverse-diffusion", "ancestral", "predictor", "small variance"])
def test_noisy_samplers_reach_mean_and_covariance(world, kind, rng):
    n = 4000
    x = run(KINDS[kind](world, NoiseSchedule.geometric(10, 0.01, 300)), n, shape=(3,), generator=rng)
    deviations = world.covariance.diag().sqrt()
    assert ((x.mean(0) - world.mean).abs() < 5 * deviations / math.sqrt(n) + 0.01).all()
    along = torch.cov((x @ world.vectors).T)
    # Five standard errors, and five percent for 300 levels and for steps that follow the norm of three numbers.
    roots = world.values.sqrt()
    error = (along - world.values.diag()).abs()
    assert (error < (5 * math.sqrt(2 / n) + 0.05) * roots[:, None] * roots).all()


def test_an_image_is_corrected_by_its_own_norm(world, rng):
    """A neighbor with a huge score changes nothing; the authors' programs average over the batch."""
    sampler = PredictorCorrectorSampler(world, SHORT)
    init = torch.randn(1, 3, generator=rng)
    together = run(sampler, init=torch.cat([init, 1e4 * init]), generator=[seed(0), seed(1)])
    torch.testing.assert_close(together[:1], run(sampler, init=init, generator=[seed(0)]))


def test_a_score_of_zero_is_corrected_by_the_greatest_step(rng):
    sampler = PredictorCorrectorSampler(lambda x, sigma: torch.zeros_like(x), NoiseSchedule([2.0, 1.0]), denoise=False)
    x = run(sampler, init=torch.zeros(20_000, 1), generator=rng)
    assert x.var() == pytest.approx(0.75 + 2, rel=5 * math.sqrt(2 / 20_000))  # (2^2 - 1^2) / 2^2, and twice 1^2


# -- The probability flow


def _flow(world, x, sigma, quieter):
    """Where the flow of a Gaussian leads: along each axis of the covariance the deviation shrinks."""
    along = (x.double() - world.mean) @ world.vectors.double()
    scale = ((world.values.double() + quieter**2) / (world.values.double() + sigma**2)).sqrt()
    return along * scale @ world.vectors.double().T + world.mean


@pytest.mark.parametrize("method", ["heun", "dpm-solver++"])
@pytest.mark.parametrize("make", [NoiseSchedule.karras, NoiseSchedule.geometric])
def test_both_methods_are_of_second_order(world, method, make, rng):
    """Half the step, a quarter of the error, against the closed form of the flow."""
    init = world.mean + 5 * torch.randn(200, 3, generator=rng)
    exact = _flow(world, init, 5, 0.1)
    errors = []
    for levels in (17, 33, 65, 129):
        sampler = ODESampler(world, make(5, 0.1, levels), method=method, denoise=False)
        errors.append(float((run(sampler, init=init) - exact).square().mean().sqrt()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(2, abs=0.15), (errors, orders)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("method", ["heun", "dpm-solver++"])
def test_a_straight_path_is_followed_exactly(method, rng):
    """On data at a point the denoised image does not move, and x = sigma z."""
    init = 5 * torch.randn(50, 4, generator=rng)
    for x, sigma in ODESampler(point, UNEVEN, method=method, denoise=False).iterate(init=init, progress=False):
        torch.testing.assert_close(x, init * (sigma / 4), rtol=1e-5, atol=1e-5)


def test_the_flow_draws_only_the_start(world):
    def noise(x):
        raise AssertionError("no noise is drawn")

    sampler = ODESampler(world, SHORT)
    init = torch.randn(3, 3, generator=seed(0))
    assert torch.equal(run(sampler, init=init, noise=noise), run(sampler, init=init))


def test_the_flows_schedule_is_karras():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    assert ODESampler(net).schedule == NoiseSchedule.karras(10, 0.1, 18)
    assert ODESampler(net, levels=5).schedule == NoiseSchedule.karras(10, 0.1, 5)
    assert len(ODESampler(net, levels=5)) == 9 and len(ODESampler(net, levels=5, method="dpm-solver++")) == 5
    assert str(ODESampler(net, levels=5)) == "ODESampler(5 levels 10 -> 0.1, heun, 9 network calls)"


# -- What all samplers have in common


@every_kind
def test_calls_are_what_it_says(kind, capsys):
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
def test_noise_is_taken_once_a_step_before_the_score(kind, world, rng):
    order = []

    def score(x, sigma):
        order.append("score")
        return world(x, sigma)

    def noise(x):
        order.append("noise")
        return torch.randn(x.shape, generator=replay)

    init, replay, state = torch.randn(4, 3, generator=rng), seed(7), torch.get_rng_state()
    sampler = KINDS[kind](score, SHORT)
    replayed = run(sampler, init=init, noise=noise)
    deterministic = not sampler.draws_noise
    assert order == (["score"] if deterministic else ["noise", "score"]) * (len(sampler) - 1) + ["score"]
    assert torch.equal(replayed, run(sampler, init=init, generator=seed(7)))
    assert torch.equal(torch.get_rng_state(), state)


@every_kind
def test_batches_and_generators(kind, world):
    sampler = KINDS[kind](world, SHORT)
    generators = [[seed(i) for i in range(5)] for _ in range(3)]
    together = run(sampler, shape=(3,), generator=generators[0])
    split = run(sampler, shape=(3,), generator=generators[1], batch_size=2)
    alone = torch.cat([run(sampler, shape=(3,), generator=[one]) for one in generators[2]])
    torch.testing.assert_close(together, split, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@every_kind
def test_yields_are_not_written_to_and_end_with_sample(kind, world):
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


@every_kind
def test_any_shape_and_any_network(kind, rng):
    for shape in [(), (2,), (3, 17)]:
        assert run(KINDS[kind](point, SHORT), 4, shape=shape, generator=rng).shape == (4, *shape)
    torch.manual_seed(0)
    nets = [
        ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT),
        ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=1, schedule=SHORT),
    ]
    for net in nets:
        images = run(KINDS[kind](net, SHORT.respaced(4)), 2, generator=rng)
        assert images.shape == (2, 1, 8, 8) and images.min() >= 0 and images.max() <= 1


@every_kind
def test_a_chain_that_leaves_the_finite_numbers_names_the_level(kind):
    def score(x, sigma):
        return x * math.nan if sigma < 1 else -x / sigma**2

    with pytest.raises(RuntimeError, match=r"NaN or infinite values from level [456] of 12 on, sigma"):
        run(KINDS[kind](score, SHORT), 2, shape=(3,))

    def last(x, sigma):
        return x * math.nan if sigma < 1.01 * SHORT.sigma_min else -x / sigma**2

    with pytest.raises(RuntimeError, match=r"from level 11 of 12 on, sigma"):
        run(KINDS[kind](last, SHORT), 2, shape=(3,))


@every_kind
@pytest.mark.parametrize("restore", ["replace", "guide-jacobian"])
def test_inference_mode_changes_nothing(kind, restore, world):
    y = torch.tensor([[0.9, 0.0, 0.0]])
    observation = Observation(Mask(torch.tensor([True, False, False])), y)
    sampler = KINDS[kind](world, SHORT)
    sampler.restore = restore
    init = torch.randn(4, 3, generator=seed(1))
    expected = run(sampler, observation=observation, init=init, generator=seed(0))
    with torch.inference_mode():
        again = run(sampler, observation=observation, init=init + 0, generator=seed(0))
        steps = list(sampler.iterate(observation=observation, init=init + 0, generator=seed(0), progress=False))
    assert torch.equal(again, expected) and torch.equal(steps[-1][0], expected)


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel holds a network."""

    def __init__(self, net):
        super().__init__()
        self.module = net

    def forward(self, x, sigma):
        return self.module(x, sigma)


@every_kind
def test_a_wrapped_network_is_known_by_what_it_wraps(kind):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 4, widths=(4,), layers_per_block=1, schedule=SHORT)
    samplers = [KINDS[kind](one, SHORT.respaced(4)) for one in (net, Wrapped(net))]
    samplers[0].precision = "float32"  # what is wrapped is run as it is
    assert torch.equal(*(run(sampler, 2, generator=seed(0)) for sampler in samplers))


@every_kind
def test_what_was_seen_is_in_the_result_and_nothing_seen_changes_nothing(kind, world):
    seen = torch.tensor([True, False, False])
    y = torch.tensor([[0.9, 0.0, 0.0]])
    sampler = KINDS[kind](world, SHORT)
    x = run(sampler, 50, shape=(3,), observation=Observation(Mask(seen), y), generator=seed(0))
    assert torch.equal(x[:, 0], y[:, 0].expand(50))
    nothing = run(
        sampler, 5, shape=(3,), observation=Observation(Mask(torch.zeros(3, dtype=torch.bool)), y), generator=seed(0)
    )
    assert torch.equal(nothing, run(sampler, 5, shape=(3,), generator=seed(0)))


@pytest.mark.parametrize("kind", ["heun", "dpm-solver++"])
def test_what_was_seen_enters_the_flow_with_the_starts_own_noise(kind, world, rng):
    seen = torch.tensor([True, False, False])
    y = torch.tensor([[0.9, 0.0, 0.0]])
    init = 5 * torch.randn(6, 3, generator=rng)
    states = []

    def score(x, sigma):
        states.append((x, float(sigma)))
        return world(x, sigma)

    run(KINDS[kind](score, SHORT), init=init, observation=Observation(Mask(seen), y))
    for x, sigma in states:
        torch.testing.assert_close(x[:, 0], 0.9 + sigma * init[:, 0] / 5)


@pytest.mark.parametrize("kind", ["consistent", "reverse-diffusion", "ancestral", "predictor"])
def test_what_was_seen_with_noise_has_its_posterior(kind, world, rng):
    """The seen coordinate alone: N(m + k (y - m), (1 - k) v), with k = v / (v + sigma_y^2)."""
    v, m, y, noise, n = 0.5, 0.3, 0.9, 0.3, 3000
    observation = Observation(Mask(torch.tensor([True, False, False])), torch.tensor([[y, 0.0, 0.0]]), sigma=noise)
    sampler = KINDS[kind](world, NoiseSchedule.geometric(10, 0.01, 200))
    x = run(sampler, n, shape=(3,), observation=observation, generator=rng)[:, 0]
    k = v / (v + noise**2)
    spread = (1 - k) * v
    # Five standard errors and, for 200 levels and one draw that serves a step's two ends, two percent of y's noise.
    assert abs(x.mean() - (m + k * (y - m))) < 5 * math.sqrt(spread / n) + 0.02 * noise
    assert abs(x.var() / spread - 1) < 5 * math.sqrt(2 / n) + 0.04


# -- Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODESampler(point, SHORT, method="euler"), "must be one of 'heun', 'dpm-solver\\+\\+', got 'euler'"),
        (lambda: ODESampler(point, SHORT, levels=1), "levels must be at least 2, got 1"),
        (lambda: ODESampler(point, levels=5), "no noise levels of its own: pass a schedule"),
        (lambda: ODESampler(ScoreNet.ncsnv2(1, 8, width=2), levels=1), "levels must be at least 2, got 1"),
        (lambda: PredictorCorrectorSampler(point), "no noise levels of its own: pass a schedule"),
        (
            lambda: PredictorCorrectorSampler(point, SHORT, predictor="ode"),
            "'ancestral', 'reverse-diffusion', got 'ode'",
        ),
        (lambda: PredictorCorrectorSampler(point, SHORT, corrector_steps=-1), "integer of at least 0, got -1"),
        (lambda: PredictorCorrectorSampler(point, SHORT, snr=0.0), "snr must lie between 0 and 1, got 0.0"),
        (lambda: PredictorCorrectorSampler(point, SHORT, snr=math.nan), "snr must lie between 0 and 1, got nan"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- The same arguments mean the same everywhere


@pytest.mark.parametrize("make", SAMPLERS.values())
def test_levels_respaces_the_schedule_and_the_default(make):
    assert make(point, SHORT, levels=5).schedule == SHORT.respaced(5)
    assert make(point, SHORT).schedule == make(point, SHORT, levels=None).schedule == SHORT
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    sampler = make(net, levels=7)
    assert len(sampler.schedule) == 7
    assert (sampler.schedule.sigma_max, sampler.schedule.sigma_min) == (SHORT.sigma_max, SHORT.sigma_min)


@every_kind
def test_a_class_for_all_samples_and_the_shape_of_a_score(kind):
    def score(x, sigma, condition):
        assert condition.dtype == torch.int64 and condition.tolist() == [3] * len(x)
        return -x / sigma**2

    assert run(KINDS[kind](score, SHORT), 2, shape=(1,), condition=3).shape == (2, 1)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1, 4, 4\) for x of shape \(2, 3, 4, 4\)"):
        run(KINDS[kind](lambda x, sigma: x[:, :1], SHORT), 2, shape=(3, 4, 4))


@every_kind
def test_an_int_is_a_seed(kind, world):
    sampler = KINDS[kind](world, SHORT)
    assert torch.equal(run(sampler, 2, shape=(3,), generator=5), run(sampler, 2, shape=(3,), generator=seed(5)))
    assert torch.equal(
        run(sampler, shape=(3,), generator=[1, 2]), run(sampler, shape=(3,), generator=[seed(1), seed(2)])
    )


@every_kind
def test_an_inference_copy_stands_for_its_network(kind):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 4, widths=(4,), layers_per_block=1, schedule=SHORT)
    copied, few = net.inference_copy(), SHORT.respaced(4)
    samplers = [KINDS[kind](one, few) for one in (net, copied)]
    assert str(samplers[0]) == str(samplers[1])
    assert torch.equal(*(run(sampler, 2, generator=0) for sampler in samplers))
    with pytest.raises(ValueError, match="calls the network itself, but net is its inference copy"):
        type(samplers[0])(copied, few, precision="float32")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(run(samplers[1], 2, generator=0), run(KINDS[kind](copied, few), 2, generator=0))


# -- Recommended settings


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(levels=9, step_size=0.005, consistent=True),
        SamplerSettings(levels=9, steps_per_level=2, exact_noise=True),
        SamplerSettings("ode", levels=5, method="dpm-solver++"),
        SamplerSettings("ancestral", variance="small"),
        SamplerSettings("predictor-corrector", levels=6, corrector_steps=2, snr=0.1),
    ],
    ids=str,
)
def test_a_network_is_sampled_as_its_settings_say(settings):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
    net.sampler_settings = settings
    assert len(recommended_sampler(net, levels=7).schedule) == 7
    sampler = recommended_sampler(net)
    assert type(sampler) is SAMPLERS[settings.sampler]
    assert settings.levels in (None, len(sampler.schedule))
    assert all(getattr(sampler, name) == value for name, value in settings.options.items())
    assert SamplerSettings.from_dict(settings.to_dict()) == settings
    if settings.sampler != "langevin":  # they are those of another sampler
        default = ScoreNet.ncsnv2(1, 8, width=2, schedule=SHORT)
        assert str(AnnealedLangevinSampler(net)) == str(AnnealedLangevinSampler(default))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of 'langevin', .*got 'euler'"),
        ({"levels": 1}, "levels must be an integer of at least 2 .*got 1"),
        ({"levels": 2.5}, "levels must be an integer .*got 2.5"),
        ({"consistent": 1}, "consistent must be true or false or null, got 1"),
        ({"step_size": math.nan}, "step_size must be a number .*got nan"),
        ({"method": "heun"}, "method is not an option of the sampler 'langevin', whose options are consistent, "),
        ({"sampler": "ode", "snr": 0.1}, "snr is not an option of the sampler 'ode', whose options are method"),
    ],
)
def test_settings_that_are_none(values, message):
    with pytest.raises(ValueError, match=f"sampler_settings.*{message}"):
        SamplerSettings(**values)


def test_settings_are_typed():
    with pytest.raises(ValueError, match="unknown key, 'level'; known are sampler, levels"):
        SamplerSettings.from_dict({"sampler": "langevin", "level": 3})
    net = ScoreNet.ncsnv2(1, 8, width=2)
    with pytest.raises(TypeError, match=r"must be a SamplerSettings, got dict. Write SamplerSettings\(levels="):
        net.sampler_settings = {"levels": 3}


@pytest.mark.parametrize(("own", "levels"), [(10, 100), (150, 150), (1000, 250)])
def test_a_network_without_settings_is_sampled_consistently_in_at_most_250_calls(own, levels):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.01, own))
    sampler = AnnealedLangevinSampler(net)
    r = min(b / a for a, b in itertools.pairwise(sampler.schedule))
    assert sampler.consistent and len(sampler) == len(sampler.schedule) == levels
    assert sampler.step_size == pytest.approx(1e-4 * (1 - r**1.1))


def test_another_number_of_levels_keeps_the_kind_and_the_noise():
    """The noise per factor of sigma, p, stays that of the recommended settings."""
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    r = 0.01 ** (1 / 19)
    net.sampler_settings = SamplerSettings(levels=20, step_size=0.01 * (1 - r**1.7), consistent=True)
    for sampler in (AnnealedLangevinSampler(net, levels=8), AnnealedLangevinSampler(net, net.schedule.respaced(8))):
        assert sampler.consistent and len(sampler) == 8
        assert sampler.step_size == pytest.approx(0.01 * (1 - 0.01 ** (1.7 / 7)))
    for step_size in (0.01 * (1 - r**5), 0.012):  # at most the noise of ancestral sampling
        net.sampler_settings = SamplerSettings(levels=20, step_size=step_size, consistent=True)
        assert AnnealedLangevinSampler(net).step_size == step_size
        assert AnnealedLangevinSampler(net, levels=8).step_size == pytest.approx(0.01 * (1 - 0.01 ** (2 / 7)))
    net.sampler_settings = SamplerSettings(levels=20, steps_per_level=2, step_size=0.003, exact_noise=False)
    sampler = AnnealedLangevinSampler(net, levels=8)
    assert (sampler.consistent, sampler.steps_per_level, sampler.exact_noise) == (False, 2, False)
    assert sampler.step_size == sampler.schedule.suggest_step_size(2)


# -- A sampler of one's own


class Euler(Sampler):
    """The simplest sampler on the public interface."""

    def __init__(self, net, schedule=None, *, churn=0.0, **options):
        super().__init__(net, schedule, **options)
        self.churn = churn

    def __len__(self):
        return len(self.schedule) - 1 + self.denoise

    def step(self, x, score, z, sigma, following):
        return x + (sigma - following) * sigma * score + self.churn * z


def test_a_sampler_of_ones_own(world):
    assert list(inspect.signature(Euler).parameters) == [
        *("net", "schedule", "churn", "levels", "denoise", "clamp", "restore", "precision", "compile")
    ]
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
