"""Averages of the weights, and their reconstruction from snapshots."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.sampling import SamplerSettings
from scorematch.training import Settings, reconstruct, train, train_steps
from scorematch.training.ema import LONGEST, Average, combination, exponent
from tests.helpers import seed
from tests.training import MLP, images, points, points_net, quick, vector


def profile(gamma, total):
    """The weight of each step in a power-function average."""
    t = torch.arange(total + 1, dtype=torch.float64)
    return (t[1:] ** (gamma + 1) - t[:-1] ** (gamma + 1)) / total ** (gamma + 1)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25, LONGEST])
def test_an_average_has_its_closed_form(length):
    total = 60
    average = Average([torch.full((total,), 7.0, dtype=torch.float64)], length)
    for step, weights in enumerate(torch.eye(total, dtype=torch.float64), 1):  # step t is in entry t alone
        average.update([weights], step)
    torch.testing.assert_close(average.tensors[0], profile(exponent(length), total))


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_length_of_an_average_is_its_relative_standard_deviation(length):
    shares, t = profile(exponent(length), 20_000), torch.arange(1, 20_001) / 20_000
    mean = (shares * t).sum()
    assert float((shares * (t - mean) ** 2).sum().sqrt()) == pytest.approx(length, rel=1e-3)


def test_the_longest_average_is_the_mean_and_exponents_are_the_published_ones():
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-6)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01) and exponent(0.05) == pytest.approx(16.97, abs=0.01)


def test_an_exponential_average_has_its_closed_form():
    average = Average([torch.zeros(3, dtype=torch.float64)], 0.9)
    expected, decays = torch.zeros(3, dtype=torch.float64), []
    for step in range(1, 200):
        value = torch.tensor([1.0, step, math.sin(step)], dtype=torch.float64)
        decays.append(min(0.9, (1 + step) / (10 + step)))
        expected = decays[-1] * expected + (1 - decays[-1]) * value
        average.update([value], step)
        if step in (5, 199):  # the smaller decays of the first steps have an effect, or none any more
            torch.testing.assert_close(average.tensors[0], expected)
    assert decays[0] == 2 / 11 and decays[4] == 0.4 and decays[-1] == 0.9


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, 0.89, 1.0, math.nan])
def test_invalid_lengths_of_averages_raise(length):
    with pytest.raises(ValueError, match="ema must contain lengths above 0"):
        Average([], length)
    with pytest.raises(ValueError, match="the length of an average must be above 0"):
        exponent(length)


def test_averages_are_averages_of_the_weights_after_each_step():
    weights = []
    for step in train_steps(points_net(torch.float64), points(dtype=torch.float64), Settings(images=96, batch_size=8)):
        weights.append(vector(step.state.net).clone())
        found, shares = vector(step.state.average(0.1)), profile(exponent(0.1), len(weights))
        torch.testing.assert_close(found, shares @ torch.stack(weights))


def walk(total):
    """Weights that converge, with noise: (total, 50)."""
    noise = torch.randn(total, 50, generator=seed(), dtype=torch.float64)
    return 1 - torch.exp(-torch.arange(total)[:, None] / total * 5) + 0.1 * noise.cumsum(0) / math.sqrt(total) + noise


def test_a_combination_of_snapshots_is_an_average_of_another_length():
    total, every = 4000, 200
    weights = walk(total)
    snapshots = [(t, exponent(length)) for t in range(every, total + 1, every) for length in (0.05, 0.10)]
    tracked = torch.stack([profile(gamma, t) @ weights[:t] for t, gamma in snapshots])
    for length, tolerance in ((0.05, 1e-6), (0.07, 0.02), (0.15, 0.02)):
        shares, missed = combination(snapshots, (total, exponent(length)))
        found, exact = torch.tensor(shares, dtype=torch.float64) @ tracked, profile(exponent(length), total) @ weights
        scale = (weights[-1] - exact).norm()  # the size of the effect of averaging
        assert (found - exact).norm() / scale < tolerance and missed < max(tolerance, 1e-6)
    assert combination(snapshots, (total, exponent(0.005)))[1] > 0.3


def test_a_combination_can_end_at_the_time_of_any_snapshot():
    snapshots = [(t, exponent(length)) for t in range(100, 1001, 100) for length in (0.05, 0.10)]
    shares, missed = combination(snapshots, (700, exponent(0.05)))
    assert missed < 1e-6
    np.testing.assert_allclose(shares, [t == 700 and gamma == exponent(0.05) for t, gamma in snapshots], atol=1e-6)


@pytest.mark.parametrize("lengths", [(0.05, 0.10), (0.1,)], ids=str)
@pytest.mark.parametrize("length", [0.03, 0.08, 0.15, 0.25, LONGEST])
def test_a_combination_does_not_change_constant_weights(lengths, length):
    snapshots = [(t, exponent(each)) for t in (2.5e5, 5e5, 7.5e5, 1e6) for each in lengths]
    assert sum(combination(snapshots, (1e6, exponent(length)))[0]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("length", [0.08, 0.15, 0.2])
def test_a_reconstructed_average_is_near_the_average_of_all_weights(length):
    """The error is small relative to what the average adds to the latest weights, even with few snapshots."""
    total, weights = 4000, 10 + walk(4000)
    snapshots = [(t, exponent(each)) for t in range(500, total + 1, 500) for each in (0.05, 0.10)]
    tracked = torch.stack([profile(gamma, t) @ weights[:t] for t, gamma in snapshots])
    shares, _ = combination(snapshots, (total, exponent(length)))
    found, exact = torch.tensor(shares, dtype=torch.float64) @ tracked, profile(exponent(length), total) @ weights
    assert (found - exact).norm() < 0.05 * (weights[-1] - exact).norm()


@pytest.mark.slow
def test_reconstruct_keeps_weights_that_are_not_trained(tmp_path):
    """In half precision the random frequencies of Fourier features would change the phases of the sines."""
    net = ScoreNet.ncsnpp(1, 8, widths=(8,), layers_per_block=1)
    net.sampler_settings = SamplerSettings("ode", levels=3)
    quick(net, images(), tmp_path, images=32, snapshot_every=8)
    found = reconstruct(tmp_path, 0.08).backbone.time_proj.weight
    torch.testing.assert_close(found, net.backbone.time_proj.weight, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_reconstruct_keeps_integer_buffers(tmp_path):
    """A sum of fractions of 7 may be 6.999, which is 6 as an integer."""

    def backbone():
        module = MLP()
        module.register_buffer("order", torch.arange(100))
        return module

    net = ScoreNet(backbone(), NoiseSchedule.geometric(5, 0.05, 20), sample_shape=(2,))
    quick(net, points(), tmp_path, snapshot_every=20)
    assert torch.equal(reconstruct(tmp_path, 0.08, backbone=backbone()).backbone.order, torch.arange(100))


@pytest.mark.slow
def test_reconstruct_reads_nothing_but_snapshots(tmp_path):
    quick(points_net(), points(), tmp_path, snapshot_every=20)
    expected = vector(reconstruct(tmp_path, 0.08, backbone=MLP()))
    for name in ("notes", "000000000-0.050", "000000020-0.000", f"000000020-{LONGEST + 1e-3:.3f}"):
        (tmp_path / "snapshots" / name).mkdir()
    assert torch.equal(vector(reconstruct(tmp_path, 0.08, backbone=MLP())), expected)


@pytest.mark.slow
def test_reconstruct_gives_averages_of_any_length_after_a_run(tmp_path):
    options = {"images": 64 * 100, "batch_size": 64, "ema": (0.05, 0.10, 0.07), "log_every": 10**6, "lr": 1e-2}
    options |= {"checkpoint_every": 10**6, "sample_every": 10**6, "decay": "constant", "snapshot_every": 320}
    train(points_net(), points(), tmp_path, progress=False, **options)
    tracked = ScoreNet.from_pretrained(tmp_path / "snapshots" / "000006400-0.070", backbone=MLP())
    near = ScoreNet.from_pretrained(tmp_path / "snapshots" / "000006400-0.050", backbone=MLP())
    for folder in (tmp_path / "snapshots").glob("*-0.070"):
        folder.rename(tmp_path / folder.name)
    found = reconstruct(tmp_path, 0.07, backbone=MLP())
    assert (vector(found) - vector(tracked)).norm() < 0.1 * (vector(near) - vector(tracked)).norm()
    middle = ScoreNet.from_pretrained(tmp_path / "000003200-0.070", backbone=MLP())
    found = reconstruct(tmp_path, 0.07, images=3200, backbone=MLP())
    torch.testing.assert_close(vector(found), vector(middle), atol=2e-3, rtol=0)
    with pytest.warns(UserWarning, match="give an inaccurate average of length 0.005"):
        reconstruct(tmp_path, 0.005, backbone=MLP())
    with pytest.raises(ValueError, match="images must be from 320 to 6,400"):
        reconstruct(tmp_path, 0.07, images=30_000, backbone=MLP())


@pytest.mark.slow
@pytest.mark.parametrize("ema", [(0.2504, 0.2496), (0.0125,), (0.0004,)], ids=str)
def test_lengths_of_averages_with_many_digits(tmp_path, ema):
    """Files have the whole length in their names: averages are neither confused nor reconstructed for another length.

    The length 0.0004 is that of the last step alone.
    """
    options = {"images": 80, "ema": ema, "snapshot_every": 40, "checkpoint_every": 40}
    whole = quick(points_net(), points(), tmp_path / "whole", **options)
    assert len(list((tmp_path / "whole" / "snapshots").iterdir())) == 2 * len(ema)
    quick(points_net(), points(), tmp_path / "cut", **options)
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        if int(folder.name) == 80:
            shutil.rmtree(folder)
    assert torch.equal(vector(quick(points_net(), points(), tmp_path / "cut", **options)), vector(whole))
    for length in ema:
        found = reconstruct(tmp_path / "whole", length, backbone=MLP())
        stored = ScoreNet.from_pretrained(tmp_path / "whole" / "snapshots" / f"000000080-{length}", backbone=MLP())
        torch.testing.assert_close(vector(found), vector(stored), atol=1e-6, rtol=0)


def test_reconstruct_of_a_folder_without_snapshots_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no snapshots .* or of the stage since it has grown\. Runs with"):
        reconstruct(tmp_path, 0.1)


@pytest.mark.slow
def test_averages_agree_with_ema_pytorch(tmp_path):
    peer = pytest.importorskip("ema_pytorch")
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    lengths = (0.05, 0.10)
    theirs = peer.PostHocEMA(
        net,
        sigma_rels=lengths,
        update_every=1,
        checkpoint_every_num_steps=100,
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=torch.float32,
    )
    targets = (0.08, 0.15)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    ours, direct = ([Average(start, length) for length in group] for group in (lengths, targets))
    kept = []
    for step in range(1, 1001):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.update()
        for average in (*ours, *direct):
            if step == 1:
                average.tensors = [parameter.detach().clone() for parameter in net.parameters()]
            average.update(list(net.parameters()), step + 1)  # ema-pytorch counts the initial weights as a step
        if step % 100 == 0:
            kept += [torch.cat([tensor.flatten() for tensor in average.tensors]).double() for average in ours]
    for average, their in zip(ours, theirs.ema_models, strict=True):
        for own, other in zip(average.tensors, their.ema_model.parameters(), strict=True):
            torch.testing.assert_close(own, other)
    snapshots = [(t, exponent(length)) for t in range(100, 1001, 100) for length in lengths]
    times, gammas = (torch.tensor(column, dtype=torch.float64) for column in zip(*snapshots, strict=True))
    inner = peer.post_hoc_ema.p_dot_p(times[:, None], gammas[:, None], times, gammas)
    constant = torch.linalg.solve(inner, torch.ones_like(times))
    for target, average in zip(targets, direct, strict=True):
        shares = torch.tensor(combination(snapshots, (1000, exponent(target)))[0], dtype=torch.float64)
        end = torch.tensor([1000.0], dtype=torch.float64), torch.tensor([exponent(target)], dtype=torch.float64)
        free = peer.post_hoc_ema.solve_weights(times, gammas, *end).flatten()
        constrained = free + (1 - free.sum()) * constant / constant.sum()  # by a Lagrange multiplier
        torch.testing.assert_close(shares, constrained, atol=1e-7, rtol=1e-7)
        exact = torch.cat([tensor.flatten() for tensor in average.tensors]).double()
        synthesized = vector(theirs.synthesize_ema_model(sigma_rel=target).ema_model).double()
        torch.testing.assert_close(free @ torch.stack(kept), synthesized, atol=1e-5, rtol=1e-5)
        assert (shares @ torch.stack(kept) - exact).norm() < (synthesized - exact).norm()
