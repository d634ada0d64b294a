"""Summaries of draws, and maps of numbers in colors."""

import math

import pytest
import torch

from scorematch.data.heat import heat_map
from scorematch.restoration import summary
from tests.helpers import seed


def test_the_summary_has_the_moments_and_the_quantiles_of_the_draws():
    draws = torch.randn(19, 2, 3, generator=seed())
    found = summary(draws, levels=(0.05, 0.1, 0.5, 0.95))
    torch.testing.assert_close(found.mean, draws.mean(0))
    torch.testing.assert_close(found.deviation, draws.std(0))
    ordered = draws.sort(0).values
    torch.testing.assert_close(found.quantiles, ordered[[0, 1, 9, 18]])
    assert found.levels == (0.05, 0.1, 0.5, 0.95)
    assert torch.equal(summary(draws[:3], levels=(0.0, 1.0)).quantiles, draws[:3].sort(0).values[[0, 2]])


@pytest.mark.parametrize("draws", [5, 19, 39])
def test_intervals_of_exact_draws_contain_the_truth_as_often_as_they_say(draws):
    n = 40_000
    x = torch.randn(draws + 1, n, generator=seed(1))
    low, high = summary(x[1:]).quantiles[[0, 2]]
    covered = float(((x[0] > low) & (x[0] < high)).double().mean())
    expected = min(0.9, (draws - 1) / (draws + 1))
    assert abs(covered - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_a_map_has_the_color_of_each_value_and_a_scale():
    values = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.75, 0.125]])
    picture = (heat_map(values) * 255).round().int()
    assert picture.shape == (3, 384, 256 + 8 + 16 + 48)
    colors = {(0, 0): [0, 0, 0], (0, 1): [96, 0, 128], (1, 0): [224, 48, 64], (1, 1): [255, 255, 224]}
    for (i, j), color in colors.items():
        square = picture[:, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert (square == torch.tensor(color)[:, None, None]).all()
    assert picture[:, 0, 270].tolist() == [255, 255, 224] and picture[:, -1, 270].tolist() == [0, 0, 0]
    assert (picture[:, :, 281:] > 128).any()  # the numbers
    assert (heat_map(torch.zeros(2, 2))[:, :, :256] == 0).all()


def test_the_map_of_a_summary_is_for_images():
    draws = torch.rand(4, 3, 2, 5, generator=seed())
    assert torch.equal(summary(draws).deviation_map(), heat_map(draws.var(0).mean(0).sqrt()))
    with pytest.raises(ValueError, match=r"a map needs draws of an image, .* got draws of shape \(K, 1, 64\)\. Plot"):
        summary(torch.rand(4, 1, 64)).deviation_map()


@pytest.mark.parametrize(
    ("draws", "levels", "error", "message"),
    [
        (torch.zeros(1, 2), (0.5,), ValueError, r"draws must be \(K, ...\) with at least 2 draws of one sample"),
        (torch.zeros(3), (0.5,), ValueError, r"got shape \(3,\)"),
        (torch.zeros(3, 2).int(), (0.5,), TypeError, "draws must be a floating-point tensor"),
        (torch.zeros(3, 2), (0.5, 1.5), ValueError, r"levels must be from 0 to 1, got \[0.5, 1.5\]"),
    ],
)
def test_invalid_draws_and_levels_raise(draws, levels, error, message):
    with pytest.raises(error, match=message):
        summary(draws, levels)
