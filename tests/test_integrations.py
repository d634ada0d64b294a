"""Runs the examples of examples/integrations as they are, and checks their results."""

import importlib.util
import runpy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from scorematch import ScoreNet, dsm_loss
from scorematch.training.levels import levels_for, weighting_for

FOLDER = Path(__file__).parents[1] / "examples" / "integrations"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "disks")
PAGE = FOLDER.parents[1] / "docs" / "integrations.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A function that runs an example in an empty folder, and returns its global names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)

    def run(name):
        with torch.random.fork_rng():
            return runpy.run_path(str(FOLDER / f"{name}.py"))

    return run


def _needs(*packages):
    """Marks a slow test that is skipped if a package is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    reason = f"{', '.join(missing)} not installed: pip install {' '.join(missing)}"
    return lambda test: pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=reason)(test))


def _quarters(losses):
    """The mean losses in the first and in the last quarter."""
    first, *_, last = torch.tensor(losses).view(4, -1).mean(1).tolist()
    return first, last


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_on_their_page(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
    assert f"../examples/integrations/{name}.py" in PAGE.read_text(encoding="utf-8")


def test_disks_are_images_in_0_1_of_the_stated_sizes(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    disks = importlib.import_module("disks").disks(500)
    assert disks.shape == (500, 1, 16, 16) and disks.min() == 0 and disks.max() == 1
    # The pixels at the edge are gray, by the part of them that is inside, so that the sum is about the area.
    area = disks.sum((1, 2, 3))
    assert np.pi * 1.9**2 < area.min() and area.max() < np.pi * 4.1**2
    assert disks[..., [0, -1], :].max() == disks[..., [0, -1]].max() == 0  # no disk touches the border


def test_an_exact_score_from_numpy_gives_the_moments_of_the_data(example):
    names = example("numpy_score")
    samples, mean, covariance = names["samples"], names["MEAN"], names["COVARIANCE"]
    deviation = np.sqrt(np.diag(covariance))
    error = len(samples) ** -0.5
    # Four standard errors, and one percent for the steps of the sampler.
    assert np.abs((samples.mean(0) - mean) / deviation).max() < 4 * error + 0.01
    bound = 4 * error * np.sqrt(np.outer(deviation, deviation) ** 2 + covariance**2) + 0.02
    assert (np.abs(np.cov(samples.T) - covariance) < bound).all()


@pytest.mark.slow
def test_the_loss_before_the_training_is_the_stated_one(monkeypatch):
    """The programs print it divided by D/2. It is not 1: the data are darker than those that "karras" assumes."""
    monkeypatch.syspath_prepend(FOLDER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = importlib.import_module("disks").disks(256)
        net = ScoreNet.unet(channels=1, image_size=16, widths=(16, 32), layers_per_block=1)
        sigma = levels_for(net, None).quantile((torch.arange(256, dtype=torch.float64) + 0.5) / 256).to(x)
        loss = dsm_loss(net, x, sigma=sigma, weighting=weighting_for(net, None, p=2)).item() / (x[0].numel() / 2)
    assert abs(loss - 2) < 0.1
    for name in ("plain_loop", "accelerate_loop", "lightning_module"):
        assert "2 before the training" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_plain_loop_learns_to_draw_disks(example):
    names = example("plain_loop")
    first, last = _quarters(names["losses"])
    assert last < 0.25 < 0.5 < first
    images = names["images"]
    assert images.shape == (16, 1, 16, 16) and Path("disks.png").stat().st_size > 200
    # Black and white with few values between them; most images have one disk of a size that occurs.
    assert ((images > 0.2) & (images < 0.8)).float().mean() < 0.1
    area = images.sum((1, 2, 3))
    assert ((area > np.pi * 1.7**2) & (area < np.pi * 4.3**2)).float().mean() > 0.8
    loaded, x = ScoreNet.from_pretrained("./disks"), torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded(x, 0.1), names["trained"](x, 0.1))


@_needs("lightning")
def test_lightning_trains_and_ends_with_averaged_weights(example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: a small data set, no logger
        names = example("lightning_module")
    assert names["trainer"].callback_metrics["loss"] < 0.5
    saved = ScoreNet.from_pretrained("./lightning")
    (callback,) = (each for each in names["trainer"].callbacks if type(each).__name__ == "WeightAveraging")
    average = callback._average_model
    assert int(average.n_averaged) == names["trainer"].global_step == 96
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), average.module.net.parameters(), strict=True))


@_needs("accelerate")
def test_the_loop_with_accelerate_learns(example):
    names = example("accelerate_loop")
    first, last = _quarters(names["losses"])
    assert last < 0.5 < first
    saved = ScoreNet.from_pretrained("./accelerate")
    averaged = names["averaged"]
    assert int(averaged.n_averaged) == len(names["losses"]) == 96
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), averaged.module.parameters(), strict=True))


@_needs("datasets", "accelerate", "PIL")
def test_a_data_set_of_hugging_face_is_read_in_both_ways(example):
    names = example("hugging_face_dataset")
    assert names["last"] < 0.6 * names["first"]
    assert names["own"] < 0.6 * 256 / 2
    batch = next(iter(names["loader"]))["x"]
    torch.testing.assert_close(batch, names["disks"](256)[:64], rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.compile
def test_compiled_training_and_sampling(example):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the network runs uncompiled")
        names = example("compiled")
    first, last = _quarters(names["losses"])
    assert last < 0.8 * first
    difference = (names["samples"] - names["plain"]).square().mean().sqrt()
    assert 0 < difference < 0.02 < 0.1 < names["plain"].std()


@_needs("diffusers")
def test_a_u_net_of_diffusers_is_a_score_and_becomes_a_network_of_this_package(example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers
        names = example("diffusers_unet")
    first, last = _quarters(names["losses"])
    assert last < 0.7 * first
    for sigma in (0.01, 0.5, 20.0):
        expected = names["net"](names["images"][:8], sigma)
        torch.testing.assert_close(names["same"](names["images"][:8], sigma), expected, rtol=1e-4, atol=1e-4 / sigma)
    assert names["samples"].shape == (4, 1, 16, 16)


@pytest.mark.slow
def test_signals_have_the_correlation_of_the_data(example):
    names = example("signals")
    torch.testing.assert_close(names["found"], names["correlation"][:9], rtol=0, atol=0.06)


@pytest.mark.slow
def test_points_are_on_the_spiral(example):
    names = example("points")
    assert names["distance"].quantile(0.9) < 0.15
    torch.testing.assert_close(names["samples"].mean(0), names["data"].mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(names["samples"].std(0), names["data"].std(0), rtol=0.08, atol=0)
