"""Tiles of samples that are larger than those of a network: against exact scores, and with networks and samplers."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.core.conditions import Condition
from scorematch.guidance import Tiled
from scorematch.guidance import tiled as module
from scorematch.restoration import Mask, Observation
from scorematch.sampling import ODESampler, data_moments
from tests.helpers import run, seed


def _white(x, sigma):
    """The score of white noise with noise of a level, () or (N,)."""
    return -x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


SIZES = [(8, 8, None), (17, 23, None), (40, 11, 3), (9, 8, 0)]


@pytest.mark.parametrize(("height", "width", "overlap"), SIZES)
def test_tiles_of_white_noise_have_its_score(height, width, overlap):
    """The score of independent pixels depends on no other pixel, so that tiles change nothing, at seams or inside."""
    x = torch.randn(3, 2, height, width, generator=seed(), dtype=torch.float64)
    for sigma in (0.3, torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)):
        tiled = Tiled(_white, 8, overlap, batch_size=5)
        torch.testing.assert_close(
            tiled(x, sigma), _white(x, torch.as_tensor(sigma, dtype=x.dtype)), rtol=1e-12, atol=1e-12
        )


def test_a_constant_image_stays_constant():
    """The network sees its tile only: one that returns the mean of the tile keeps constants."""
    tiled = Tiled(lambda x, s: (x.mean((1, 2, 3), keepdim=True) - x) / s**2, 8, 2)
    x = torch.full((1, 3, 19, 30), 0.7)
    torch.testing.assert_close(tiled.denoise(x, 0.5), x, rtol=0, atol=1e-6)


def test_samples_of_white_noise_have_the_same_spread_at_the_seams_as_inside():
    schedule = NoiseSchedule.geometric(8, 0.01, 30)
    found = []
    for score in (Tiled(_white, 6, 2), _white):
        found.append(run(ODESampler(score, schedule, levels=30), 400, shape=(1, 14, 14), generator=0))
    spread = found[0].square().mean((0, 1)).sqrt()  # of each pixel; the standard error is 0.035
    assert (spread - 1).abs().max() < 0.14
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_moments_of_the_samples_of_the_network_serve_samples_of_tiles():
    """Networks of color pictures have settings with moments; with tiles they raised an error for larger pictures."""

    class White:
        sample_shape = (1, 6, 6)

        def __call__(self, x, sigma):
            return _white(x, sigma)

    moments = data_moments(torch.randn(200, 1, 6, 6, generator=seed(), dtype=torch.float64))
    found = [
        run(ODESampler(score, sigmas=[3, 1, 0.2], method="unipc", **moments), 2, shape=(1, 9, 14), generator=0)
        for score in (White(), Tiled(White()))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


class Process:
    """The exact score of a stationary process of any length whose neighboring values have the correlation r."""

    def __init__(self, r):
        self.r = r

    def __call__(self, x, sigma):
        place = torch.arange(x.shape[-1], dtype=x.dtype)
        covariance = self.r ** (place - place[:, None]).abs()
        return -torch.linalg.solve(covariance + sigma**2 * torch.eye(len(place), dtype=x.dtype), x[..., None])[..., 0]


@pytest.mark.parametrize(("overlap", "most"), [(4, 0.17), (8, 0.05), (16, 0.02)])
def test_tiles_of_a_process_are_nearly_exact_with_an_overlap_above_its_correlation(overlap, most):
    """Values at a distance of 4 have the correlation 0.24."""
    process = Process(0.7)
    x = 1.4 * torch.randn(200, 1, 96, generator=seed(), dtype=torch.float64)
    exact = process(x, 1.0)
    error = (Tiled(process, 2 * overlap, overlap)(x, 1.0) - exact).square().mean(0).sqrt()
    assert error.max() < most * exact.square().mean().sqrt()


def _net(**options):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=NoiseSchedule([1.0, 0.1, 0.01]), **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net


def test_one_tile_is_the_network():
    net, x = _net(), torch.rand(2, 1, 8, 8, generator=seed())
    torch.testing.assert_close(Tiled(net)(x, 0.1), net(x, 0.1), rtol=1e-6, atol=1e-6)


def test_each_pixel_is_the_weighted_mean_of_its_tiles():
    """Two tiles of 8 pixels with an overlap of 4: the weights in the overlap are 4:1, 3:2, 2:3 and 1:4."""
    net, x = _net(), torch.rand(1, 1, 8, 12, generator=seed())
    left, right = net(x[..., :8], 0.1), net(x[..., 4:], 0.1)
    share = torch.tensor([1.0] * 4 + [0.8, 0.6, 0.4, 0.2])
    found = Tiled(net, overlap=4)(x, 0.1)
    torch.testing.assert_close(found[..., :4], left[..., :4])
    torch.testing.assert_close(found[..., 4:8], share[4:] * left[..., 4:] + (1 - share[4:]) * right[..., :4])


def test_scores_in_half_precision_are_weighted_in_float32():
    """The largest weight of a tile is 256, and its product with a score of 400 is beyond the range of float16."""
    x = torch.ones(1, 1, 48, 48, dtype=torch.float16)
    score = Tiled(lambda x, sigma: torch.full_like(x, -400), 32)(x, 0.05)
    assert score.dtype == torch.float16 and torch.equal(score, torch.full_like(x, -400))


@pytest.mark.parametrize("kind", ["classes", "image"])
def test_conditions_go_to_the_tiles(kind):
    net = _net(classes=3) if kind == "classes" else _net(condition_channels=2)
    x = torch.rand(2, 1, 8, 12, generator=seed())
    given = torch.tensor([0, 2]) if kind == "classes" else torch.rand(2, 2, 8, 12, generator=seed(1))
    found = Tiled(net, overlap=4, batch_size=3)(x, torch.tensor([0.1, 1.0]), given)
    part = given if kind == "classes" else given[..., :8]
    torch.testing.assert_close(found[..., :4], net(x[..., :8], torch.tensor([0.1, 1.0]), part)[..., :4])
    assert Tiled(net).conditioning == net.conditioning != Condition()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_a_call_of_the_network_has_at_most_the_number_of_tiles_that_was_asked_for(batch_size):
    """Also if there are more samples than that."""
    calls = []

    def score(x, sigma, condition):
        calls.append(len(x))
        return -sigma.view(-1, 1, 1, 1) * x + condition["shift"] + condition["class"].view(-1, 1, 1, 1)

    x, sigma = torch.rand(5, 1, 8, 12, generator=seed()), torch.rand(5, generator=seed(1)) + 0.1
    given = {"shift": torch.rand(5, 1, 8, 12, generator=seed(2)), "class": torch.arange(5)}
    expected = score(x, sigma, given)
    calls.clear()
    torch.testing.assert_close(Tiled(score, np.int64(8), 2, batch_size=batch_size)(x, sigma, given), expected)
    assert max(calls) <= batch_size and sum(calls) == 10
    with pytest.raises(ValueError, match=r"sigma must be a float, \(\) or \(5,\) like the batch, got shape \(6,\)"):
        Tiled(score, 8, 2, batch_size=batch_size)(x, torch.ones(6), given)


@pytest.mark.slow
def test_batches_of_tiles_have_the_gradient_of_all_at_once_with_less_memory(monkeypatch):
    calls, net, x = [], _net(), torch.rand(1, 1, 16, 16, generator=seed())

    def counted(*arguments, **options):
        calls.append(len(arguments[2]))
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(module, "checkpoint", counted)
    found = {}
    for batch_size in (None, 2):
        inputs = x.clone().requires_grad_()
        (found[batch_size],) = torch.autograd.grad(
            Tiled(net, overlap=4, batch_size=batch_size)(inputs, 0.1).square().sum(), inputs
        )
    assert calls == [2, 2, 2, 2, 1]  # tiles of each checkpoint
    monkeypatch.setattr(module, "_WITH_GRADIENT", 4 * 8 * 8)  # which is less than without a gradient
    Tiled(net, overlap=4)(x.clone().requires_grad_(), 0.1)
    assert calls[5:] == [4, 4, 1]
    torch.testing.assert_close(found[2], found[None], rtol=1e-4, atol=1e-4 * float(found[None].abs().max()))


@pytest.mark.parametrize("restore", ["auto", "replace"])
def test_every_method_restores_with_tiles(restore):
    tiled = Tiled(_net(), batch_size=4)
    sampler = AnnealedLangevinSampler(tiled, levels=3, restore=restore)
    assert repr(sampler) == repr(AnnealedLangevinSampler(tiled.net, levels=3, restore=restore))
    known = torch.arange(20) < 15
    y = torch.rand(1, 1, 20, 20, generator=seed())
    restored = run(sampler, 2, observation=Observation(Mask(known), y))
    assert torch.equal(restored[..., known], y[..., known].expand(2, -1, -1, -1))
    assert restored[..., ~known].std() > 0


def test_a_tiled_score_has_the_attributes_of_its_network():
    net = _net()
    tiled = Tiled(net, 8, 3)
    assert tiled.schedule is net.schedule and tiled.value_range == net.value_range and tiled.sample_shape is None
    copied = tiled.inference_copy()
    assert copied.is_inference_copy and not tiled.is_inference_copy and (copied.size, copied.overlap) == (8, 3)
    with pytest.raises(ValueError, match="compile=True needs a ScoreNet"):
        Tiled(lambda x, sigma: x, 8).inference_copy(compile=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"the size of the samples of net is not known. Write Tiled\(..., size=64\)."),
        ({"size": 0}, ValueError, "size must be"),
        ({"size": 8, "overlap": 8}, ValueError, "overlap must be below the size of a tile, 8, got 8."),
        ({"size": 8, "overlap": -1}, ValueError, "overlap must be"),
        ({"size": 8, "batch_size": 0}, ValueError, "batch_size must be"),
        ({"size": "8"}, (TypeError, ValueError), "size must be"),
    ],
)
def test_bad_arguments_give_an_error(options, error, message):
    with pytest.raises(error, match=message):
        Tiled(lambda x, s: x, **options)


@pytest.mark.parametrize("shape", [(7, 20), (20,)])
def test_a_sample_below_the_size_of_a_tile_gives_an_error(shape):
    with pytest.raises(ValueError, match=f"at least as large as a tile, 8x8, got {'x'.join(map(str, shape))}."):
        Tiled(_net())(torch.rand(1, 1, *shape), 0.1)
