"""Metrics of data that are not pictures: closed forms, laws, and the evaluation of arrays."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

from scorematch import ScoreNet
from scorematch.cli import main
from scorematch.data import moments
from scorematch.evaluation import (
    METRICS,
    classifier_two_sample_test,
    energy_distance,
    evaluate,
    maximum_mean_discrepancy,
    power_spectrum,
    sliced_wasserstein_distance,
    spectrum,
    spectrum_error,
    two_sample,
    values_distance,
)
from scorematch.evaluation.distances import wasserstein
from scorematch.sampling import ODESampler, sample_to
from tests.helpers import seed


def normal(n, *shape, number=0):
    return torch.randn(n, *shape, generator=seed(number), dtype=torch.float64)


# -- Distances


@pytest.mark.slow
def test_energy_distance_of_gaussians_and_of_points_on_a_line():
    x, y = 1.5 + normal(2000, 1), normal(2000, 1, number=1)
    between = 2 / math.sqrt(math.pi) * math.exp(-(1.5**2) / 4) + 1.5 * math.erf(1.5 / 2)  # E |N(1.5, 2)|
    found = energy_distance(x, y)
    assert found.value == pytest.approx(math.sqrt(2 * between - 4 / math.sqrt(math.pi)), abs=4 * found.error)
    assert 0 < found.error < 0.05
    a, b = normal(30, 1), 2 * normal(20, 1, number=1)
    steps = torch.cat([a, b])[:, 0].sort().values
    heights = [(part <= steps[:-1]).double().mean(0) for part in (a, b)]  # the distribution functions
    square = 2 * ((heights[0] - heights[1]).square() * steps.diff()).sum()  # Székely & Rizzo 2013, Eq. 6
    assert energy_distance(a, b).value == pytest.approx(math.sqrt(square), rel=1e-9)
    assert energy_distance(a, a).value == 0


@pytest.mark.slow
def test_maximum_mean_discrepancy_of_gaussians():
    x, y = 1 + 2 * normal(2000, 3), normal(1000, 3, number=1)
    width = float(torch.pdist(y).median()) ** 2

    def kernel(variance, square):  # of a normal difference x - y
        return (width / (width + variance)) ** 1.5 * math.exp(-square / (2 * (width + variance)))

    found = maximum_mean_discrepancy(x, y)
    assert found.value == pytest.approx(kernel(8, 0) + kernel(2, 0) - 2 * kernel(5, 3), abs=4 * found.error)
    assert 0 < found.error < 0.02
    assert abs(maximum_mean_discrepancy(y, normal(1000, 3, number=2)).value) < 0.003


def test_sliced_wasserstein_distance_of_a_shift_and_of_sorted_values():
    x, shift = normal(50, 4), torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    mean_cosine = math.gamma(2) / (math.sqrt(math.pi) * math.gamma(2.5))  # of a direction in four dimensions
    found = sliced_wasserstein_distance(x + shift, x, directions=1000)
    assert found.value == pytest.approx(float(shift.norm()) * mean_cosine, rel=0.07)
    value, _, _ = wasserstein(x, x.square())
    torch.testing.assert_close(value, (x.sort(0).values - x.square().sort(0).values).abs().mean(0))
    value, h, g = wasserstein(x[:20], x)  # of unequal numbers, by duality: the mean potentials are the distance
    torch.testing.assert_close(value, h.mean(0) + g.mean(0))
    values = torch.arange(1000).view(-1, 1).double() % 4
    value, h, g = wasserstein(values, values)  # equal sets, without rounding
    assert not (value.any() or h.any() or g.any())


@pytest.mark.slow
@pytest.mark.parametrize("function", [energy_distance, maximum_mean_discrepancy, sliced_wasserstein_distance])
def test_errors_are_those_of_repeated_draws(function):
    found = [function(0.7 + normal(60, 2, number=i), normal(90, 2, number=1000 + i)) for i in range(150)]
    values, errors = torch.tensor(found).T
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.2)  # 6 % is the error of the deviation


@pytest.mark.slow
def test_a_classifier_has_the_accuracy_of_the_best_one():
    x, y = normal(600, 2), normal(600, 2, number=1)
    best = (1 + math.erf(0.5 / math.sqrt(2))) / 2  # of two Gaussians at a distance of 1
    error = math.sqrt(best * (1 - best) / 1200)
    shifted = x + torch.tensor([0.6, 0.8])
    assert classifier_two_sample_test(shifted, y, steps=200).value == pytest.approx(best, abs=3 * error)
    assert classifier_two_sample_test(x, y, steps=40).value == pytest.approx(0.5, abs=0.05)


def test_the_kernel_has_a_width_if_most_pairs_are_equal():
    """Of rare events, 2 in 20: the median distance is 0, and the kernel gets the mean of the squares, 36 / 190."""
    x, y = torch.zeros(20, 1).double(), torch.zeros(20, 1).double()
    x[:10], y[:2] = 1, 1
    k = math.exp(-190 / 72)
    within = [(a * (a - 1) + b * (b - 1) + 2 * a * b * k) / 380 for a, b in ((10, 10), (2, 18))]
    between = (10 * 2 + 10 * 18 + (10 * 18 + 10 * 2) * k) / 400
    assert maximum_mean_discrepancy(x, y).value == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    assert math.isfinite(maximum_mean_discrepancy(x, 0 * y).value)


# -- Spectra and values


@pytest.mark.parametrize("sides", [(33,), (16, 16), (12, 8), (6, 7, 8)])
def test_the_spectrum_has_the_power_of_the_values_and_of_white_noise(sides):
    x = normal(400, 2, *sides)
    power = power_spectrum(x)
    torch.testing.assert_close(power.sum(2), x.square().flatten(2).mean(2))  # Parseval
    modes = power_spectrum(torch.zeros(1, 1, *sides).index_put_((torch.tensor(0),) * (2 + len(sides)), torch.ones(())))
    expected = modes[0, 0] * x[0, 0].numel()  # an impulse has the same power in each mode
    assert float((power.mean((0, 1)) / expected - 1).abs().max()) < 0.2


def test_the_spectrum_of_a_wave_is_at_its_wave_number():
    place = torch.arange(32, dtype=torch.float64)
    wave = 3 * torch.cos(2 * torch.pi * (3 * place[:, None] + 4 * place) / 32)
    expected = torch.zeros(23, dtype=torch.float64)
    expected[5] = 9 / 2
    torch.testing.assert_close(power_spectrum(wave[None, None])[0, 0, :23], expected)


def test_errors_of_scaled_fields_and_distances_of_shifted_values():
    x = normal(50, 2, 16).cumsum(2)
    x -= x.mean((0, 2), keepdim=True)
    for found in spectrum_error(math.sqrt(1.2) * x, x):
        assert found.value == pytest.approx(0.2, rel=1e-9)
    assert values_distance(x + 3, x).value == pytest.approx(3, rel=1e-9)
    with pytest.raises(ValueError, match=r"for signals and fields \(N, C, ...\), got shape \(4, 3\)"):
        power_spectrum(torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(2, 16), (1, 8)])
def test_figures_of_fields_of_different_shapes_and_of_constant_data_are_an_error(shape):
    x, y = normal(5, *shape), normal(5, 1, 16)
    for figure in (spectrum_error, values_distance):
        with pytest.raises(ValueError, match=r"must have the shape of the data, \(1, 16\) without the batch, got"):
            figure(x, y)
    with pytest.raises(ValueError, match="reference must be finite and not constant"):
        spectrum_error(y, torch.ones(5, 1, 16))


def test_the_error_of_a_spectrum_does_not_depend_on_the_units_of_the_channels():
    """White noise, whose power is too large at one wave number."""
    x, wave = normal(500, 2, 16), torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16)
    y, units = x + wave * normal(500, 1, 1, number=1), torch.tensor([[1e4], [1e-3]])
    found = spectrum_error(y, x)
    assert float(found[1].value) > 1
    for mean in (torch.zeros(2, 1), torch.tensor([[1e6], [-0.2]])):
        for expected, each in zip(found, spectrum_error(mean + units * y, mean + units * x), strict=True):
            assert each.value == pytest.approx(expected.value, rel=1e-6)
    pixels = (20 * x + 128).clamp(0, 255).byte()
    assert spectrum_error(pixels[:250], pixels[250:]) == spectrum_error(pixels[:250].float(), pixels[250:].float())


def test_the_error_of_a_spectrum_of_rare_waves_is_not_known():
    """Each wave is in one of ten signals, so that bootstrap samples of the data lack some."""
    waves = torch.cos(2 * torch.pi * torch.arange(1, 11)[:, None, None] * torch.arange(32) / 32)
    for found in spectrum_error(waves, waves):
        assert found == (0, None)
    assert spectrum_error(normal(9, 1, 8), normal(9, 1, 8, number=1))[0].error > 0


def test_values_are_taken_from_all_places_of_large_sets(monkeypatch):
    """Fields that are right in the first column only, which has each tenth value."""
    monkeypatch.setattr(spectrum, "_VALUES", 1000)
    x, y = normal(100, 1, 10, 10), normal(100, 1, 10, 10, number=1)
    x[..., 1:] += 5
    assert values_distance(x, y).value == pytest.approx(4.5, abs=1)


def test_vectors_of_many_values_are_compared_value_by_value():
    x, y = normal(5, 40_000), normal(4, 40_000, number=1)
    expected = wasserstein(x, y)[0].mean()
    assert values_distance(x, y).value == pytest.approx(float(expected), rel=1e-12)


def test_a_classifier_sees_noise_where_the_data_are_constant():
    """Such as a border of zeros; the standard deviation of the reference is 0 there."""
    x, y = normal(200, 3), normal(200, 3, number=1)
    y[:, 1] = 2.0
    assert classifier_two_sample_test(x, y, steps=100).value > 0.9
    x[:, 1] = 2.0
    assert classifier_two_sample_test(x, y, steps=20).value < 0.65
    x[:, 1] = 2.1
    assert classifier_two_sample_test(x, y, steps=100).value > 0.9


def test_a_classifier_ignores_a_constant_whose_mean_is_rounded():
    x, y = normal(500, 2).float(), 3 + normal(500, 2, number=1).float()
    expected = classifier_two_sample_test(x, y, steps=100).value
    x[:, 1] = y[:, 1] = 0.1
    assert y.mean(0)[1] != y[0, 1]
    assert expected > 0.9 and classifier_two_sample_test(x, y, steps=100).value == pytest.approx(expected, abs=0.1)


def test_a_classifier_has_the_number_of_folds(monkeypatch):
    seen, trained = [], two_sample._trained
    monkeypatch.setattr(two_sample, "_trained", lambda *args: seen.append(len(args[2])) or trained(*args))
    for n, folds in ((6, 5), (20, 12)):
        classifier_two_sample_test(normal(n, 2), normal(n, 2, number=1), folds=folds, steps=1)
        assert seen.pop() == folds


# -- Evaluations


def fields(n, number=0):
    return 250 + 30 * normal(n, 2, 8, number=number).cumsum(2).float()


def test_an_evaluation_of_arrays_does_not_depend_on_their_units(tmp_path):
    x, y = fields(30), fields(80, 1)
    options = {"metrics": ["sliced-wasserstein", "energy", "mmd", "spectrum", "values"], "progress": False}
    result = evaluate(x, y, held_out=fields(40, 2), out=tmp_path, **options)
    assert list(result.sizes.items()) == [("samples", 30), ("held-out", 30), ("floor", 30), ("gaussian", 30)]
    other = evaluate((x - 250) / 30, (y - 250) / 30, **options)
    for name, found in result.figures["samples"]["values"].items():
        torch.testing.assert_close(other.figures["samples"]["values"][name], found, rtol=1e-3, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} >= {"evaluation.json", "spectrum.svg", "values.svg"}
    assert "| number of samples | 30 |" in (tmp_path / "evaluation.md").read_text()
    floor = evaluate(y[:40], y[40:], **options).figures["samples"]["values"]["energy"].value
    assert result.figures["floor"]["values"]["energy"].value == pytest.approx(floor, abs=0.2)


def test_large_data_are_evaluated_in_parts(monkeypatch):
    x, y = fields(30), fields(80, 1)
    options = {"metrics": ["spectrum", "values"], "progress": False}
    whole = evaluate(x, y, **options).figures
    monkeypatch.setattr(moments, "_VALUES", 100)
    monkeypatch.setattr(spectrum, "_AT_ONCE", 100)
    for column, found in evaluate(x, y, **options).figures.items():
        for name, figure in found["values"].items():
            assert figure.value == pytest.approx(whole[column]["values"][name].value, rel=1e-5)


def test_samples_of_a_network_are_compared_in_their_units():
    net = ScoreNet.mlp(2, width=8, depth=1)
    data = torch.tensor([5.0, -80.0]) + torch.tensor([0.1, 7.0]) * normal(400, 2).float()
    net.fit_units(data)  # a network that returns zero is exact for a Gaussian
    result = evaluate(ODESampler(net, levels=12), data, n=200, metrics="energy", progress=False)
    assert set(result.sizes) == {"samples", "floor", "gaussian"} and set(result.figures["samples"]) == {"values"}
    samples, floor = (result.figures[column]["values"]["energy"] for column in ("samples", "floor"))
    assert samples.value < floor.value + 4 * floor.error


def test_a_folder_of_samples_is_compared_as_those_of_the_network(tmp_path):
    net, data = ScoreNet.mlp(2, width=8, depth=1), 80 + normal(40, 2).float()
    net.fit_units(data)
    sampler, options = ODESampler(net, levels=3), {"metrics": "energy", "progress": False}
    sample_to(sampler, tmp_path, 10, format="float", progress=False)
    assert evaluate(tmp_path, data, **options).figures == evaluate(sampler, data, n=10, **options).figures


def test_held_out_data_and_numbers_are_checked_before_samples_are_drawn(monkeypatch):
    sampler, data = ODESampler(ScoreNet.mlp(2, width=8, depth=1), levels=3), normal(40, 2).float()
    monkeypatch.setattr(ODESampler, "sample", lambda *arguments, **options: pytest.fail("it samples"))
    with pytest.raises(ValueError, match=r"must have the shape of the reference, \(2,\), got \(3,\)"):
        evaluate(sampler, data, n=9, held_out=normal(9, 3).float(), metrics="energy", progress=False)
    with pytest.raises(ValueError, match="the metrics need at least 2 samples, got 1"):
        evaluate(sampler, data, n=1, progress=False)


def test_the_settings_identify_data_by_their_values():
    """Also of a Dataset, which is told from others by its type and its shape only."""
    data = normal(20, 2).float()
    hashes = [
        evaluate(data, ConcatDataset([each, each]), metrics="energy", progress=False).hash
        for each in (data, data.clone(), 2 * data)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_command_prints_and_refuses(tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", fields(20).numpy())
    np.save(tmp_path / "data.npy", fields(40, 1).numpy())
    main(["evaluate", str(tmp_path / "samples.npz"), str(tmp_path / "data.npy"), "--metrics", "values", "--quiet"])
    assert f"| {METRICS['values'].figures['values']} |" in capsys.readouterr().out
    net = ScoreNet.mlp(2, width=8, depth=1)
    net.save_pretrained(tmp_path / "network")
    np.save(tmp_path / "vectors.npy", normal(40, 2).float().numpy())
    drawn = ["evaluate", str(tmp_path / "network"), str(tmp_path / "vectors.npy"), "-n", "20", "--levels", "2"]
    assert main([*drawn, "--metrics", "energy", "--quiet"]) == 0
    assert f"| {METRICS['energy'].figures['energy']} |" in capsys.readouterr().out
    assert main([*drawn[:2], str(tmp_path), *drawn[3:]]) == 2
    assert "the network must draw images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the metric 'spectrum' is for signals, fields and volumes"):
        evaluate(fields(9)[:, :, 0], fields(9)[:, :, 0], metrics="spectrum", progress=False)
    with pytest.raises(ValueError, match="the metric 'inception-score' needs an extractor with logits of classes"):
        evaluate(fields(9), fields(9), metrics="inception-score", progress=False)
    with pytest.raises(ValueError, match=r"must have the shape of the reference, \(2, 8\), got \(2, 7\)"):
        evaluate(fields(9)[..., 1:], fields(9), progress=False)
    gaps = tmp_path / "gaps.npy"
    np.save(gaps, torch.where(torch.arange(8) == 3, torch.nan, fields(9)).numpy())
    for sets, name in ((gaps, fields(9)), "samples"), ((fields(9), gaps), "reference"):
        with pytest.raises(ValueError, match=rf"the {name} must be finite, but 9 of 9 samples .* first at \[0, 0, 3\]"):
            evaluate(*sets, metrics="energy", progress=False)
    with pytest.raises(ValueError, match=r"the reference is constant\. Pass data that vary"):
        evaluate(fields(9), torch.full((9, 2, 8), 0.1), progress=False)
    pictures = 2 * torch.rand(9, 1, 8, 8, generator=seed(0)) - 1
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\]"):
        evaluate(pictures, pictures, progress=False)
    found = evaluate(pictures, pictures, features="values", metrics="values", gaussian=False, progress=False)
    assert found.figures["samples"]["values"]["values"].value == 0
