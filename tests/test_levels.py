"""Noise levels from the paths of a score, and settings that store levels."""

import itertools
import json
import math

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.evaluation.exact import Gaussian, GaussianMixture
from scorematch.sampling import (
    AncestralSampler,
    ODESampler,
    PredictorCorrectorSampler,
    SamplerSettings,
    recommended_sampler,
    schedules_of_paths,
)
from scorematch.sampling.levels import _shortest
from tests.helpers import point, refused, run, seed

FINE = NoiseSchedule.karras(20, 0.02, 40)


def _chosen(score, levels, fine=FINE, **options):
    (chosen,) = schedules_of_paths(score, [levels], fine, **{"generator": 0, "progress": False, **options})
    return chosen


def test_the_path_is_the_shortest_of_all():
    for number in range(20):
        error = torch.rand(9, 9, generator=seed(number), dtype=torch.float64).triu(1)
        error[error == 0] = math.inf
        for steps in (2, 3, 5, 8):
            paths = [[0, *between] for between in itertools.combinations(range(1, 8), steps - 1)]
            lengths = [sum(float(error[i, j]) for i, j in itertools.pairwise([*path, 8])) for path in paths]
            assert _shortest(error, steps) == paths[lengths.index(min(lengths))]


@pytest.mark.slow
def test_the_levels_reduce_the_error():
    """The median over paths in 16 dimensions, from other starts than those from which the levels were chosen."""
    means = torch.randn(10, 16, generator=seed(1), dtype=torch.float64)
    world = GaussianMixture([0.1] * 10, means, 0.09, schedule=NoiseSchedule([40.0, 0.02]))
    init = 40 * torch.randn(200, 16, generator=seed(1))
    exact = run(ODESampler(world, levels=100, method="unipc"), init=init)

    def error(schedule, method, order):
        x = run(ODESampler(world, schedule, method=method, order=order), init=init)
        return float((x - exact).norm(dim=1).median())

    usual, chosen = NoiseSchedule.karras(40, 0.02, 10), _chosen(world, 10, None, n=32)
    for method, order in (("dpm-solver++", 2), ("unipc", 2), ("unipc", 3)):
        assert error(chosen, method, order) < 0.8 * error(usual, method, order)
    assert error(chosen, "unipc", 2) < 0.5 * error(usual, "dpm-solver++", 2)


def test_the_levels_have_the_units_of_the_data(world):
    options = {"n": 8, "shape": (3,)}
    scaled = Gaussian(10 * world.mean, 100 * world.covariance)
    fine = NoiseSchedule(10 * FINE.sigmas)
    found = _chosen(scaled, 6, fine, **options).sigmas
    torch.testing.assert_close(found, 10 * _chosen(world, 6, **options).sigmas)
    assert len(found) == 6 and found[0] == 200 and set(found.tolist()) <= set(fine)


@pytest.mark.slow
def test_paths_of_a_network_with_classes():
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, classes=3, schedule=FINE)
    options = {"n": 4, "condition": torch.arange(4) % 3}
    fine = FINE.respaced(9)
    chosen = _chosen(net, 4, fine, **options)
    assert chosen == _chosen(net, 4, fine, batch_size=3, **options)
    assert chosen.sigma_max == 20 and len(chosen) == 4


def test_settings_store_levels(tmp_path, capsys):
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE)
    net.sampler_settings = SamplerSettings("ode", sigmas=[20.0, 3, 0.5], method="unipc")
    net.save_pretrained(tmp_path)
    again = ScoreNet.from_pretrained(tmp_path)
    assert again.sampler_settings == net.sampler_settings
    sampler = recommended_sampler(again)
    assert list(sampler.schedule) == [20, 3, 0.5] and len(sampler) == 3
    assert len(recommended_sampler(again, levels=5)) == 5  # respaced
    assert main(["sample", str(tmp_path), str(tmp_path / "a.png"), "-n", "1", "--sigmas", "9", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("ODESampler(2 levels 9 -> 1, unipc")

    config = json.loads((tmp_path / "config.json").read_text())
    config["sampler_settings"]["sigmas"] = [20.0, 0.5, 3.0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sigmas must be strictly descending"):
        ScoreNet.from_pretrained(tmp_path)
    assert "sigmas must be strictly descending" in refused(["sample", tmp_path, tmp_path / "b.png"], capsys)


@pytest.mark.slow
def test_alternatives_for_fewer_calls(tmp_path, capsys):
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE)
    few = SamplerSettings("ode", sigmas=[20.0, 3, 0.5], method="unipc")
    middle = SamplerSettings(levels=6, step_size=3e-4, consistent=True)
    net.sampler_settings = SamplerSettings("ode", alternatives=[few, middle], levels=5)
    net.save_pretrained(tmp_path)
    again = ScoreNet.from_pretrained(tmp_path)
    assert again.sampler_settings == net.sampler_settings and again.sampler_settings.alternatives == (few, middle)
    assert repr(few) in repr(net.sampler_settings)
    assert str(net.sampler_settings) == "sampler ode, levels 5" and net.sampler_settings.options == {"levels": 5}
    for calls, expected in ((None, 9), (9, 9), (8, 6), (6, 6), (5, 3), (3, 3)):
        for score in (again, again.inference_copy()):
            assert len(recommended_sampler(score, calls=calls)) == expected
    assert AnnealedLangevinSampler(again).step_size == 3e-4  # its own settings, which are not the best
    for calls in (2, 10):
        with pytest.raises(ValueError, match=f"stored settings, which have 3, 6, 9 network calls, got {calls}. For"):
            recommended_sampler(again, calls=calls)

    assert main(["info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--calls 3    ODESampler(3 levels 20 -> 0.5, unipc, 3 network calls)" in lines
    assert [line.split("(")[0] for line in lines[-2:]] == [
        "--calls 3    ODESampler",
        "--calls 6    AnnealedLangevinSampler",
    ]
    options = ["sample", tmp_path, tmp_path / "a.png", "-n", "1", "--quiet"]
    assert main([*map(str, options), "--calls", "5"]) == 0
    assert capsys.readouterr().out.startswith("ODESampler(3 levels 20 -> 0.5, unipc")
    options[2] = tmp_path / "b.png"
    assert "--calls must be in the range of the stored settings" in refused([*options, "--calls", "10"], capsys)
    assert "--calls chooses among the recommended settings" in refused(
        [*options, "--calls", 5, "--levels", 2, "--eta", 1], capsys
    )


def test_every_kind_of_sampler_finds_its_own_settings():
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE)
    net.sampler_settings = SamplerSettings(
        levels=6, consistent=True, alternatives=[SamplerSettings("ode", sigmas=[20.0, 3, 0.5], method="unipc")]
    )
    for score in (net, net.inference_copy(), net.to(torch.bfloat16)):
        assert len(AnnealedLangevinSampler(score)) == 6
        assert str(ODESampler(score, clamp=False)) == "ODESampler(3 levels 20 -> 0.5, unipc, 3 network calls)"
    # An argument that chooses levels or the method takes the place of all of them.
    assert str(ODESampler(net, levels=4)) == "ODESampler(4 levels 20 -> 0.02, heun, 7 network calls)"
    assert str(ODESampler(net, method="ipndm")) == "ODESampler(18 levels 20 -> 0.02, ipndm, 18 network calls)"
    net.sampler_settings = SamplerSettings("ode", denoise=False)
    assert len(ODESampler(net)) == 34 and len(ODESampler(net, denoise=True)) == 35
    others = [SamplerSettings("predictor-corrector", snr=0.1, levels=4), SamplerSettings("ancestral", variance="small")]
    net.sampler_settings = SamplerSettings(alternatives=others)
    found = PredictorCorrectorSampler(net)
    assert str(found).endswith("(4 levels 20 -> 0.02, ancestral, 1 corrector step, snr 0.1, 7 network calls)")
    assert PredictorCorrectorSampler(net, levels=5).snr == 0.16
    assert [AncestralSampler(net, levels=n).variance for n in (None, 5)] == ["small", "large"]
    assert len(PredictorCorrectorSampler(net, levels=None)) == 7  # None leaves an option out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"churn_min": 0.5}, "churn_min, churn_max and churn_noise need churn"),
        ({"churn_max": 5.0}, "churn_min, churn_max and churn_noise need churn"),
        ({"churn_noise": 1.01}, "churn_min, churn_max and churn_noise need churn"),
        ({"data_mean": [0.5]}, "pass both data_mean and data_spectrum"),
    ],
)
def test_an_option_that_needs_another_is_refused_beside_stored_settings_too(option, message):
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=FINE)
    net.sampler_settings = SamplerSettings("ode", levels=3)
    with pytest.raises(ValueError, match=message):
        ODESampler(net, **option)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _chosen(point, 40), "levels must be below the number of fine levels, 40, got 40"),
        (lambda: schedules_of_paths(point, 5, FINE), "levels must be a list of one or more numbers, got 5. Write"),
        (lambda: schedules_of_paths(point, [], FINE), "levels must be a list of one or more numbers"),
        (lambda: _chosen(point, 1), "levels must be an integer of at least 2, got 1"),
        (lambda: schedules_of_paths(point, [5]), "no noise levels of its own: pass a schedule"),
        (lambda: ODESampler(point, FINE, sigmas=[2.0, 1.0]), "sigmas takes the place of the schedule"),
        (lambda: ODESampler(point, sigmas=[1.0, 2.0]), "sigmas must be strictly descending"),
        (lambda: ODESampler(point, sigmas=[1.0, 0.0]), "sigmas must be a list .* each a number of more than 0"),
        (lambda: SamplerSettings("ode", sigmas=[1.0, 2.0]), "^sigmas must be strictly descending"),
        (lambda: SamplerSettings("ode", sigmas=[]), "sigmas must be a list"),
        (lambda: SamplerSettings("ode", churn_min=1.0), "^churn_min, churn_max and churn_noise need churn above 0"),
        (lambda: SamplerSettings("ode", method="unipc", churn=1.0), "^churn is for Heun's method, got 1.0 with 'uni"),
        (
            lambda: SamplerSettings("ode", sigmas=[3.0, 2.0, 1.0], method="unipc", eta=[1.0]),
            "^eta must have one number for each of the 2 steps from level to level, got 1",
        ),
        (lambda: SamplerSettings.from_dict({"sampler": "ode", "alternatives": [3]}), "alternatives must be a list"),
        (
            lambda: SamplerSettings(alternatives=[SamplerSettings("ode", alternatives=[SamplerSettings()])]),
            "alternatives must have no alternatives themselves",
        ),
        (
            lambda: recommended_sampler(point, SamplerSettings("ode", sigmas=[2.0, 1.0]), calls=0),
            "calls must be an int",
        ),
    ],
)
def test_wrong_levels_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
