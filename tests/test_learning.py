"""Samplers with few calls whose levels and coefficients are learned from paths of a score."""

import copy
import itertools
import json
import warnings
import weakref
from functools import partial

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.data import save_grid
from scorematch.evaluation import few_calls, settings_learned
from scorematch.evaluation.exact import Gaussian
from scorematch.guidance import classifier_free
from scorematch.restoration import Mask, Observation
from scorematch.sampling import ODESampler, SamplerSettings, learned_settings, learning, recommended_sampler
from scorematch.sampling.levels import follow
from scorematch.sampling.multistep import METHODS, learned_lengths, plan
from scorematch.sampling.origin import origin_of
from tests.helpers import point, refused, run, seed

FINE = NoiseSchedule.karras(20, 0.02, 40)
SIGMAS = [20.0, 3.0, 0.5]
COEFFICIENTS = [0.1, 0.2, -0.3, 0.0, -0.4, 0.05]


def _learned(score, calls, fine=FINE, **options):
    return list(learned_settings(score, calls, fine, progress=False, **options))


def _net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE, **options)


@pytest.fixture(scope="module")
def learned_gaussian():
    """A normal distribution with its principal axes and their variances, and settings of four calls for it."""
    axes, variances = torch.linalg.qr(torch.randn(3, 3, generator=seed(1)))[0], torch.tensor([0.09, 0.25, 0.5])
    world = Gaussian(torch.tensor([0.5, -0.2, 1.0]), axes * variances @ axes.T)
    (found,) = _learned(world, [4], n=64, iterations=100, batch_size=32, shape=(3,))
    return world, axes, variances, found


@pytest.mark.slow
def test_a_gaussian_reaches_its_closed_form_in_four_calls(learned_gaussian):
    """From other starts than those of the paths; UniPC on levels of Karras et al. has more than ten times the error."""
    world, axes, variances, found = learned_gaussian
    init, mean = 20 * torch.randn(500, 3, generator=seed(5)), world.mean.float()
    exact = mean + (init - mean) @ axes * (variances / (variances + 20**2)).sqrt() @ axes.T

    def error(sampler):
        return float((run(sampler, init=init) - exact).square().mean().sqrt())

    learned = recommended_sampler(world, found)
    assert len(learned) == 4 and str(learned).endswith(", unipc, learned, 4 network calls)")
    usual = ODESampler(world, NoiseSchedule.karras(20, 0.02, 4), method="unipc")
    print(error(learned), error(usual))
    assert error(learned) < 0.1 * error(usual)


def test_restoring_with_learned_numbers(learned_gaussian):
    """Values observed without noise are exact, and moment matching has the mean and the spread of the posterior."""
    world, *_, found = learned_gaussian
    sampler, y = recommended_sampler(world, found), torch.tensor([[0.9, 0.0, 0.4]])
    for sampler.restore, sigma in (("guide", 0.0), ("moment-matching", 0.3)):
        observation = Observation(Mask(torch.tensor([True, False, True])), y, sigma=sigma)
        x, exact = run(sampler, 4000, observation=observation, generator=0).double(), world.posterior(observation)
        if not sigma:
            assert (x - y)[:, [0, 2]].abs().max() < 1e-6
            continue
        spread = exact.covariance.squeeze().diag().sqrt()
        assert ((x.mean(0) - exact.mean.squeeze()) / spread).abs().max() < 0.06
        torch.testing.assert_close(x.std(0), spread, rtol=0.05, atol=0)


def test_the_numbers_of_a_method_are_its_steps(mixture):
    """With the numbers of DPM-Solver++ the steps are its steps, and without denoising the last one is left out."""
    levels = NoiseSchedule.karras(20, 0.05, 9)
    steps = plan(METHODS["dpm-solver++"], list(levels), 3, [0.0] * 8)
    rows = [*([step.kept, *step.weights] for step in steps), [0.0]]
    numbers = [[*row, 0, 0, 0][:length] for row, length in zip(rows, learned_lengths(9), strict=True)]
    init = 20 * torch.randn(20, 2, generator=seed(0))
    options = {"method": "dpm-solver++", "sigmas": list(levels)}
    for denoise in (True, False):
        learned = ODESampler(mixture, coefficients=list(itertools.chain(*numbers)), denoise=denoise, **options)
        usual = ODESampler(mixture, order=3, denoise=denoise, **options)
        assert len(learned) == len(usual) == 8 + denoise
        pairs = zip(learned.iterate(init=init, progress=False), usual.iterate(init=init, progress=False), strict=True)
        for (x, sigma), (expected, level) in pairs:
            assert sigma == level
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers():
    net, options = _net(classes=3), {"n": 3, "iterations": 2, "batch_size": 2, "condition": torch.arange(3)}
    fine = FINE.respaced(5)
    found = _learned(net, [2, 3], fine, **options)
    assert found[1:] == _learned(net, [3], fine, **options)
    assert found[1:] != _learned(net, [3], fine, generator=1, **options)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_numbers_are_learned_in_every_mode_of_gradients(mode):
    def score(x, sigma, condition):
        return (condition["shift"] * condition["class"][:, None] - x) / (1 + sigma**2)

    options = {"n": 4, "iterations": 2, "batch_size": 2, "shape": (2,)}
    expected = _learned(score, [2], condition={"class": 1, "shift": torch.ones(4, 2)}, **options)
    with mode():
        assert _learned(score, [2], condition={"class": 1, "shift": torch.ones(4, 2)}, **options) == expected


def test_the_network_is_called_in_eval_mode():
    """Dropout in training mode would use global random numbers, and batch norm would change."""
    net = _net(dropout=0.5).train()
    torch.nn.init.normal_(net.backbone.conv_out.weight)
    state = torch.get_rng_state()
    _learned(net, [2], FINE.respaced(4), n=2, iterations=1)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in net.modules())


def test_only_the_ends_of_the_paths_are_kept(monkeypatch):
    states = []

    def recorded(*arguments):
        paths = follow(*arguments)
        states.extend(map(weakref.ref, paths.states))
        return paths

    monkeypatch.setattr(learning, "follow", recorded)
    learned = learned_settings(point, [2], FINE, n=2, iterations=1, shape=(1,), progress=False)
    assert len(states) == len(FINE) + 1 and sum(state() is not None for state in states) == 2
    assert len(next(learned).options["sigmas"]) == 2


@pytest.mark.slow
def test_learned_settings_survive_saving_and_a_bfloat16_copy(tmp_path):
    net = _net()
    net.sampler_settings = SamplerSettings("ode", method="unipc", sigmas=SIGMAS, coefficients=COEFFICIENTS)
    net.save_pretrained(tmp_path)
    again = ScoreNet.from_pretrained(tmp_path)
    assert again.sampler_settings == net.sampler_settings
    results = [run(ODESampler(score), 2, generator=0) for score in (net, again, again.to(torch.bfloat16))]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2].float(), results[0], atol=0.1, rtol=0.1)
    observation = Observation(Mask(torch.ones(1, 8, 8).bool()), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"coefficients are for the levels sigmas\. Leave out levels, sigma_max and"):
        recommended_sampler(again, levels=5)
    restored = run(ODESampler(net, restore="guide"), 1, observation=observation, generator=0)
    assert restored.isfinite().all()


@pytest.mark.slow
def test_what_was_learned_is_kept_in_the_folder(tmp_path, monkeypatch, capsys):
    """With another seed the command refuses the folder."""
    quick = partial(learned_settings, fine=FINE.respaced(5), iterations=1, batch_size=2)
    monkeypatch.setattr(few_calls, "_LEARNED_PATHS", 2)
    monkeypatch.setattr(few_calls, "learned_settings", quick)
    net, options = _net(), {"out": tmp_path, "progress": False}
    (found,) = settings_learned(net, [2], **options)
    stored = json.loads((tmp_path / "learned.json").read_text())
    assert stored["learned"] == {"2": found.to_dict()}
    stored["learned"]["2"]["coefficients"] = [0.1, 0.2, 0.3]
    (tmp_path / "learned.json").write_text(json.dumps(stored))
    again = settings_learned(net, [3, 2], **options)  # learns what is missing
    assert len(again[0].options["sigmas"]) == 3 and again[1].options["coefficients"] == (0.1, 0.2, 0.3)

    with pytest.raises(ValueError, match=r"learned\.json has other settings: condition was None and is 'Tensor"):
        settings_learned(net, [2], condition=torch.ones(2, 3), **options)

    net.save_pretrained(tmp_path)
    save_grid(torch.rand(1, 1, 8, 8), tmp_path / "real.png")
    command = ["tune", tmp_path, "--reference", tmp_path, "--features", "pixels", "--learn", "3", "--out", tmp_path]
    message = refused([*command, "--quiet", "--seed", "1"], capsys)
    assert "learned.json has other settings: seed was 0 and is 1. Pass the same to continue, or another" in message


@pytest.mark.slow
def test_settings_learned_for_another_network_or_guidance_give_a_warning(tmp_path):
    net, other = _net(classes=2, null_class=True), ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE)
    guided = partial(classifier_free, net)
    numbers = {"method": "unipc", "sigmas": SIGMAS, "coefficients": COEFFICIENTS}
    settings = SamplerSettings("ode", learned_for=origin_of(guided(1.5)), **numbers)
    assert SamplerSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings == settings.alone()
    first = SamplerSettings("ode", learned_for=origin_of(net), **numbers)
    net.sampler_settings = other.sampler_settings = SamplerSettings(alternatives=[first])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommended_sampler(guided(1.5), settings)
        copies = [copy.deepcopy(net).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
        for score in (net, *copies, net.inference_copy(), copies[1].to(torch.float32)):
            ODESampler(score)
        ODESampler(other, levels=3)
        other.save_pretrained(tmp_path)
        assert main(["info", str(tmp_path)]) == 0
    learned = (
        r"these sampler settings were learned for the network \(.*\) with ClassifierFree\(weight=1.5\), and are used"
    )
    for score, used in ((guided(2), r"with ClassifierFree\(weight=2\)"), (net, "without guidance")):
        with pytest.warns(match=rf"{learned} for the network \(.*\) {used}\. Learn them again"):
            recommended_sampler(score, settings)
    with pytest.warns(match=r"for the network \(.*\) without guidance, and are used for the network \(.*\) without"):
        ODESampler(other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _learned(point, 4), "calls must be a list of one or more numbers, got 4. Write"),
        (lambda: _learned(point, [1]), "calls must be an integer of at least 2, got 1"),
        (lambda: _learned(point, [40], n=2, shape=(1,)), "calls must be below the number of fine levels, 40, got 40"),
        (lambda: _learned(point, [3], n=2, generator=seed(0)), "generator must be an integer, got"),
        (lambda: _learned(_net().inference_copy(), [3], n=2), "the network itself, not an inference copy"),
        (
            lambda: _learned(lambda x, sigma: -x.detach(), [3], n=2, shape=(1,)),
            "net must be differentiable in x, but it was computed without gradients",
        ),
        (
            lambda: ODESampler(point, sigmas=SIGMAS, method="unipc", coefficients=[0.1]),
            "coefficients must have 6 numbers for 3 levels, got 1",
        ),
        (
            lambda: SamplerSettings("ode", sigmas=SIGMAS, method="heun", coefficients=COEFFICIENTS),
            '^coefficients need sigmas, and method="dpm-solver',
        ),
        (
            lambda: SamplerSettings("ode", levels=3, method="unipc", coefficients=COEFFICIENTS),
            "coefficients need sigmas",
        ),
        (
            lambda: SamplerSettings("ode", sigmas=SIGMAS, method="unipc", eta=1.0, coefficients=COEFFICIENTS),
            "coefficients take the place of eta. Leave out one of them",
        ),
        (
            lambda: SamplerSettings("ode", sigmas=SIGMAS, method="unipc", coefficients=[float("nan")] * 6),
            "coefficients must be a list",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
