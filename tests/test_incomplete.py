"""Priors from incomplete data: the Gaussian against closed forms, the stages, and what is refused."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from scorematch import ScoreNet
from scorematch.data import read_image
from scorematch.evaluation import exact
from scorematch.evaluation.subject import is_network
from scorematch.restoration import JPEG, Mask, Matrix, Observation
from scorematch.sampling import ODESampler
from scorematch.training import gaussian, incomplete, train_from_observations
from scorematch.training.gaussian import Gaussian, _Block, fit_gaussian
from tests.test_interruption import Killed, _struck

pytestmark = pytest.mark.usefixtures("no_plots")

SAMPLER = partial(ODESampler, levels=3, restore="moment-matching")
SHORT = {
    "sampler": SAMPLER,
    "stages": 2,
    "images": 64,
    "batch_size": 32,
    "draw_batch": 32,
    "ema": (0.05,),
    "progress": False,
}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _gaussian(size, n, seed=0):
    """A Gaussian with correlated values of different means, and samples of it."""
    generator = _generator(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.T / size + 0.1 * torch.eye(size)
    prior = exact.Gaussian(3 * torch.arange(size), covariance)
    return prior, prior.sample(n, generator, torch.float64)


def _net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScoreNet.mlp(2, width=8, depth=1, **options)


def _holes(n=70, sigma=0.1):
    _, x = _gaussian(2, n)
    y = (x + sigma * torch.randn(x.shape, generator=_generator(1))).float()
    return Observation.with_gaps(torch.where(torch.rand(x.shape, generator=_generator(2)) < 0.7, y, torch.nan), sigma)


def _stages(folder, net, observation, **options):
    settings = incomplete.StageSettings(**{**SHORT, **options})
    return incomplete._Stages(folder, net, observation, settings, torch.device("cpu"))


# -- The Gaussian -----------------------------------------------------------------------------------------------------


def test_with_monotone_gaps_the_gaussian_has_the_maximum_likelihood_of_anderson():
    """Anderson, 1957: the moments of what is always seen, and the regression on it of what is sometimes missing."""
    _, x = _gaussian(2, 250)
    seen = torch.rand(250, generator=_generator(1)) < 0.6
    y = torch.stack([x[:, 0], torch.where(seen, x[:, 1], torch.nan)], 1)
    found = fit_gaussian(Observation.with_gaps(y, 0.0).of_shape((2,)), _generator())
    m, v = x[:, 0].mean(), x[:, 0].var(correction=0)
    both = torch.cov(x[seen].T, correction=0)
    slope = both[0, 1] / both[0, 0]
    mean = x[seen, 1].mean() + slope * (m - x[seen, 0].mean())
    rest = both[1, 1] - slope * both[0, 1]
    torch.testing.assert_close(found.mean, torch.stack([m, mean]), rtol=0, atol=1e-3)
    expected = torch.stack([torch.stack([v, slope * v]), torch.stack([slope * v, rest + slope**2 * v])])
    torch.testing.assert_close(found.covariance, expected, rtol=0, atol=2e-3)


def test_with_everything_seen_in_noise_the_gaussian_has_the_covariance_of_y_without_the_noise():
    _, x = _gaussian(3, 400)
    a = torch.randn(3, 3, generator=_generator(1), dtype=torch.float64)
    y = x @ a.T + 0.2 * torch.randn(x.shape, generator=_generator(2), dtype=torch.float64)
    found = fit_gaussian(Observation(Matrix(a), y, 0.2).of_shape((3,)), _generator())
    torch.testing.assert_close(found.mean @ a.T, y.mean(0), rtol=0, atol=1e-3)
    expected = torch.cov(y.T, correction=0) - 0.04 * torch.eye(3)
    torch.testing.assert_close(a @ found.covariance @ a.T, expected, rtol=0, atol=3e-3)


def test_with_holes_the_covariance_is_recovered_within_its_sampling_error():
    """Twice the gain of log-likelihood over the truth has a chi-squared distribution with as many degrees of freedom
    as there are parameters, 14: a mean of 14 and a standard deviation of 5.3."""
    truth, x = _gaussian(4, 1500)
    y = x + 0.1 * torch.randn(x.shape, generator=_generator(1), dtype=torch.float64)
    seen = torch.rand(x.shape, generator=_generator(2)) < 0.5
    observation = Observation.with_gaps(torch.where(seen, y, torch.nan), 0.1).of_shape((4,))
    found = fit_gaussian(observation, _generator())
    items = _Block.of(observation)
    gain = 2 * (items.posterior(found.mean, found.covariance)[2] - items.posterior(truth.mean, truth.covariance)[2])
    assert 3 < gain < 36  # 4 standard deviations above the mean
    one = observation.rows(slice(7, 8))
    expected = truth.log_evidence(one)
    assert _Block.of(one).posterior(truth.mean, truth.covariance)[2] == pytest.approx(expected, rel=1e-6)


def test_draws_are_those_of_the_exact_posterior():
    truth, x = _gaussian(4, 1)
    matrix = Matrix(torch.randn(2, 4, generator=_generator(1)))
    y = matrix.measure(x.float())
    n = 20_000
    values, vectors = torch.linalg.eigh(truth.covariance)
    prior = Gaussian((4,), truth.mean, vectors[:, 1:] * (values[1:] - values[0]).sqrt(), float(values[0]))
    torch.testing.assert_close(prior.covariance, truth.covariance)
    draws = prior.draw(Observation(matrix, y.expand(n, 2), 0.3).of_shape((4,)), _generator())
    expected = truth.posterior(Observation(matrix, y, 0.3))
    error = (draws.mean(0) - expected.mean) / (expected.covariance.diag() / n).sqrt()
    assert error.abs().max() < 4  # standard errors
    variance = expected.covariance.diag()
    assert ((torch.cov(draws.T) - expected.covariance).abs() / (variance[:, None] * variance).sqrt()).max() < 6 / n**0.5


@pytest.mark.slow
def test_large_samples_have_the_principal_axes_of_the_data():
    """In a space of 72 values with 4 axes; the error of a covariance of 600 samples without gaps is its measure."""
    generator = _generator()
    factor = torch.randn(72, 4, generator=generator, dtype=torch.float64)
    x = 1 + torch.randn(600, 4, generator=generator, dtype=torch.float64) @ factor.T
    x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, torch.nan)
    found = fit_gaussian(Observation.with_gaps(y, 0.05).of_shape((72,)), generator)
    truth = factor @ factor.T + 0.01 * torch.eye(72)
    error = float((found.covariance - truth).norm())
    assert error < 1.5 * float((torch.cov(x.T) - truth).norm())
    assert float((found.mean - 1).norm()) < 1.5 * float((x.mean(0) - 1).norm())


def test_the_gaussian_of_large_samples_is_the_same_in_other_units(monkeypatch):
    """Kelvin and pascal. After more iterations rounding has turned the principal axes, and the draws differ."""
    monkeypatch.setattr(gaussian, "_ROUNDS", 2)
    u = torch.randn(200, 2, 40, generator=_generator(), dtype=torch.float64).cumsum(2) / 4
    seen = torch.rand(u.shape, generator=_generator(1)) < 0.7
    scale, offset = (torch.tensor(each).double().repeat_interleave(40).view(2, 40) for each in ([30, 2e3], [250, 1e5]))
    plain, other = (
        fit_gaussian(Observation(Mask(seen), s * u + m, 0.1 * s).of_shape((2, 40)), _generator())
        for s, m in ((torch.ones(2, 40).double(), 0.0), (scale, offset))
    )
    s = scale.flatten()
    torch.testing.assert_close((other.mean - offset.flatten()) / s, plain.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(other.covariance / s / s[:, None], plain.covariance, rtol=0, atol=1e-3)


# -- The stages -------------------------------------------------------------------------------------------------------


def _result(folder):
    lines = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    return [(line["stage"], line["error"]) for line in lines], (folder / "network/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    net = train_from_observations(_net(), _holes(), folder, **SHORT)
    assert all(torch.equal(value, _load(folder)[name]) for name, value in net.state_dict().items())
    assert net.units.mean == pytest.approx((0, 3), abs=0.6)
    assert is_network(folder) and ScoreNet.from_pretrained(folder).units == net.units
    return _result(folder)


def _load(folder):
    return ScoreNet.from_pretrained(folder / "network").state_dict()


@pytest.mark.parametrize("when", ["in the draws", pytest.param("in the training", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_continues_bitwise(tmp_path, monkeypatch, whole, when):
    writes, limit = [], {"in the draws": 4, "in the training": 2}[when]
    name = {"in the draws": "write_whole", "in the training": "save_pretrained"}[when]
    place = {"in the draws": incomplete, "in the training": ScoreNet}[when]
    original = getattr(place, name)

    def dies(*arguments, **keywords):
        writes.append(arguments)
        if len(writes) == limit + 1:
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dies)
        with pytest.raises(Killed):
            train_from_observations(_net(), _holes(), tmp_path / "other", **SHORT)
    train_from_observations(_net(), _holes(), tmp_path / "other", **SHORT)
    assert _result(tmp_path / "other") == whole
    assert "| 2 |" in (tmp_path / "other/report.md").read_text()
    assert list((tmp_path / "other/draws").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_was_killed_at_a_file_operation_continues_bitwise(tmp_path, monkeypatch, whole):
    for k in range(5, 100, 37):
        folder = tmp_path / str(k)
        _struck(
            monkeypatch, lambda folder=folder: train_from_observations(_net(), _holes(), folder, **SHORT), k, Killed()
        )
        train_from_observations(_net(), _holes(), folder, **SHORT)
        assert _result(folder) == whole


@pytest.mark.slow
def test_more_stages_continue_and_other_settings_do_not(tmp_path, whole):
    train_from_observations(_net(), _holes(), tmp_path, **{**SHORT, "stages": 1})
    (tmp_path / "report.md").unlink()
    (tmp_path / "draws/001").mkdir()
    with (tmp_path / "stages.jsonl").open("a") as file:
        file.write('{"images": 6')  # as if the process had died
    train_from_observations(_net(), _holes(), tmp_path, **{**SHORT, "stages": 1})
    assert "| 1 |" in (tmp_path / "report.md").read_text() and not list((tmp_path / "draws").iterdir())
    train_from_observations(_net(), _holes(), tmp_path, **SHORT)
    assert _result(tmp_path) == whole
    with pytest.raises(ValueError, match=r"lr was 0\.001 and is 0\.002"):
        train_from_observations(_net(), _holes(), tmp_path, lr=2e-3, **SHORT)
    with pytest.raises(ValueError, match="other settings"):
        train_from_observations(_net(), _holes(80), tmp_path, **SHORT)


@pytest.mark.slow
def test_a_run_is_the_same_in_other_units(tmp_path):
    scale, offset, results = torch.tensor([30.0, 2e3]), torch.tensor([250.0, 1e5]), []
    plain = _holes()
    other = Observation.with_gaps(torch.where(plain.mask, plain.y, torch.nan) * scale + offset, 0.1 * scale)
    for name, observation in ("plain", plain), ("other", other):
        net = train_from_observations(_net(), observation, tmp_path / name, **{**SHORT, "stages": 1})
        results.append((_result(tmp_path / name)[0], SAMPLER(net).sample(5, generator=0, progress=False)))
    (errors, x), (others, z) = results
    assert [error for _, error in others] == pytest.approx([error for _, error in errors], rel=1e-3)
    torch.testing.assert_close((z - offset) / scale, x, rtol=1e-3, atol=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "expected"), [(1.0, None), (30.0, 250)])
def test_a_network_for_images_gets_units_for_other_data_only(tmp_path, scale, expected):
    x = torch.rand(200, 1, 4, 4, generator=_generator()) + (0 if expected is None else expected / scale - 0.5)
    y = scale * (x + 0.3 * torch.randn(x.shape, generator=_generator(1)))
    observation = Observation.with_gaps(y, 0.3 * scale).of_shape((1, 4, 4))
    net = ScoreNet.unet(1, 4, widths=(8,))
    stages = _stages(tmp_path, net, observation)
    stages.gaussian = fit_gaussian(observation, _generator())
    stages._take_units()
    assert net.value_range == ((0, 1) if expected is None else None)
    assert expected is None or net.units.mean == pytest.approx([expected], abs=2)


def test_the_report_shows_measurements_that_are_no_images_by_least_squares(tmp_path):
    operator, x = Matrix(torch.eye(16)) @ Mask(torch.ones(4) > 0), torch.rand(8, 1, 4, 4, generator=_generator())
    observation = Observation(operator, operator.measure(x), 0.1).of_shape((1, 4, 4))
    stages = _stages(tmp_path, ScoreNet.unet(1, 4, widths=(8,)), observation, batch_size=4)
    x = stages.observation.y.view(-1, 1, 4, 4)  # without the ones that are held out
    stages._show(1, x)
    (picture,) = (tmp_path / "report").iterdir()
    shown = read_image(picture, 1)
    assert torch.allclose(shown[:, 2:6, 2:6], x[0], atol=0.01) and torch.equal(shown[:, 2:6, 2:6], shown[:, 2:6, 8:12])


def test_the_error_of_the_prediction_is_that_of_the_exact_posterior_mean(tmp_path):
    truth, x = _gaussian(2, 3010)
    y = (x + 0.1 * torch.randn(x.shape, generator=_generator(1))).float()
    observation = Observation.with_gaps(y, 0.1).of_shape((2,))
    stages = _stages(tmp_path, _net(), observation, draw_batch=3000, held_out=3000, batch_size=8)
    values, vectors = torch.linalg.eigh(truth.covariance)
    stages.gaussian = Gaussian((2,), truth.mean, vectors * values.sqrt(), 0.0)
    error, deviation = stages._error(0)
    # Of two values, one is hidden alone with probability 3/16 each, and both together with 1/16.
    c = truth.covariance + 0.01 * torch.eye(2)
    alone = c.diag() - c[0, 1] ** 2 / c.diag().flip(0)
    expected = float((alone.mean() * 3 + c.diag().mean()) / 4) ** 0.5
    assert abs(error - expected) < 4 * deviation
    assert deviation < 0.08 * expected


@pytest.mark.parametrize("seed_of_run", range(4))
def test_at_least_one_value_of_a_single_held_out_item_is_predicted(tmp_path, seed_of_run):
    stages = _stages(tmp_path, _net(), _holes(8), held_out=1, batch_size=2, seed=seed_of_run)
    stages.gaussian = fit_gaussian(stages.observation, _generator())
    assert stages._error(0)[0] >= 0  # not NaN


# -- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "net", "message"),
    [
        (lambda: Observation.with_gaps(np.ma.zeros((8, 2)), 0.1), _net, r"torch.as_tensor\(y.filled\(numpy.nan\)\)"),
        (lambda: torch.rand(8, 2), _net, "observation must be an Observation, got Tensor. Write .*with_gaps"),
        (lambda: Observation(Matrix(torch.eye(2)), torch.rand(8, 2), lambda v: v), _net, "sigma .* got a function"),
        (lambda: Observation.with_gaps(torch.rand(8, 2), 0.0), _net, "that is clean data. Write train"),
        (lambda: Observation.with_gaps(torch.rand(2, 2), 0.1), _net, "at least 4 samples, got 2"),
        (lambda: Observation.with_gaps(torch.full((8, 2), math.nan), 0.1), _net, "nothing is observed"),
        (lambda: Observation.with_gaps(torch.rand(8, 3), 0.1), _net, r"samples of shape \(2,\)"),
        (lambda: Observation(Matrix(torch.eye(3)), torch.rand(8, 3), 0.1), _net, "needs samples of 3 values"),
        (_holes, lambda: _net(classes=3), "must take no condition"),
        (
            lambda: Observation.with_gaps(torch.tensor([3.0, 0.0]) + torch.rand(40, 2) * torch.tensor([0.0, 1.0]), 0.1),
            _net,
            "channel 0 of the measurements is constant. Leave it out",
        ),
        (
            lambda: Observation(JPEG(5), torch.rand(8, 1, 16, 16), 0.1),
            lambda: ScoreNet.unet(1, 16, widths=(8,)),
            "operator must be linear",
        ),
    ],
)
def test_unfit_observations_are_refused(tmp_path, observation, net, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train_from_observations(net(), observation(), tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 40}, "held_out must be less than the 40 measurements, got 40"),
        (
            {"batch_size": 36},
            "a batch of 36 is more than the 35 measurements that are not held out. Pass batch_size=35",
        ),
    ],
)
def test_too_few_measurements_are_refused_before_the_first_stage(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_from_observations(_net(), _holes(40), tmp_path / "run", **{**SHORT, **options})
    assert not (tmp_path / "run").exists()


def test_gaps_are_nan_or_outside_of_the_mask():
    y = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    assert torch.equal(Observation.with_gaps(y, 0.1).mask, ~y.isnan())
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(Observation.with_gaps(y, 0.1, mask).mask, mask)
    with pytest.raises(ValueError, match="must be finite where it is observed"):
        Observation.with_gaps(y, 0.1, torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"mask must broadcast to y of shape \(2, 2\), got shape \(3, 2\)"):
        Observation.with_gaps(y, 0.1, torch.ones(3, 2, dtype=torch.bool))


def test_values_that_are_never_seen_give_a_warning(tmp_path):
    y = torch.rand(40, 2)
    y[:, 1] = torch.nan
    with pytest.warns(UserWarning, match="1 of the 2 values of a sample are observed in no item"):
        _stages(tmp_path, _net(), Observation.with_gaps(y, 0.1).of_shape((2,)))
