"""Evaluation on the simulated device."""

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.evaluation import (
    Extractor,
    data_likelihood,
    density_coverage,
    energy_distance,
    evaluate,
    evaluate_restoration,
    exact,
    frechet_distance,
    inception_score,
    kernel_distance,
    level_losses,
    memorization_of,
    posterior_calibration,
    precision_recall,
    sampler_distances,
    score_error,
    sliced_wasserstein_distance,
    spectrum_error,
    statistics_of,
    values_distance,
)
from scorematch.restoration import Mask, Observation
from scorematch.sampling import AncestralSampler, ODESampler
from tests.devices.nets import LEVELS, SIZE, colors, rand
from tests.devices.simulated import by_default

REAL = (rand(60, 3, SIZE, SIZE, seed=5) * 255).round() / 255
WEIGHT = rand(3 * SIZE * SIZE, 5)
QUIET = {"cache": False, "progress": False}


def _extractor(to):
    weight = to(WEIGHT)

    def features(images):
        found = (images.flatten(1).float() / 255) @ weight
        return found, found

    return Extractor(features, "linear", "1", device=weight.device)


def _values(result):
    return [value.value for column in result.figures.values() for one in column.values() for value in one.values()]


def test_metrics(compare):
    a, b = rand(40, 6), rand(40, 6, seed=1) + 0.1

    def metrics(to):
        subsets = {"subset_size": 20, "subsets": 5}
        return [
            frechet_distance(to(a), to(b)),
            frechet_distance(to(a), b),
            kernel_distance(to(a), to(b), **subsets).value,
            kernel_distance(to(a), b, **subsets).value,
            inception_score(to(a), splits=2).value,
            *precision_recall(to(a), to(b)),
            *precision_recall(b, to(a)),
            *density_coverage(to(a), b),
        ]

    compare(metrics, within=1e-6)


def test_metrics_of_arrays(compare):
    a, b = rand(12, 2, 6, 5), rand(12, 2, 6, 5, seed=1) + 0.1

    def metrics(to):
        found = [*spectrum_error(to(a), to(b)), values_distance(to(a), to(b))]
        found += [
            distance(to(a.flatten(1)), to(b.flatten(1))) for distance in (energy_distance, sliced_wasserstein_distance)
        ]
        return [each.value for each in found]

    compare(metrics, within=1e-6)


@pytest.mark.parametrize("default", [False, True])
def test_evaluate(compare, tmp_path, default):
    """Also if the device is torch's default."""

    def evaluated(to):
        sampler = ODESampler(to(colors()), levels=4, precision="float32")
        device = to(torch.zeros(1)).device
        options = {"n": 20, "batch_size": 8, "held_out": REAL[:20].clone(), "out": tmp_path / device.type, **QUIET}
        options["metrics"] = ["frechet", "precision-recall", "classes"]
        features = _extractor(to)
        with by_default(device if default else None):
            return _values(evaluate(sampler, REAL, features=features, **options))

    compare(evaluated, within=2e-2)


@pytest.mark.parametrize("operator", ["half", "gray", "jpeg:20", "pool:2"])
def test_evaluate_restoration(compare, operator):
    def evaluated(to):
        sampler = AnnealedLangevinSampler(to(colors()), levels=4, precision="float32")
        options = {"sigma": 0.05, "features": _extractor(to), "metrics": ["frechet"], "batch_size": 4, **QUIET}
        return _values(evaluate_restoration(sampler, REAL[:9], operator, **options))

    compare(evaluated, within=2e-2)


def test_evaluate_a_palette_network(compare):
    def evaluated(to):
        sampler = AncestralSampler(to(colors(condition_channels=3)), levels=3, precision="float32")
        options = {"features": _extractor(to), "metrics": ["frechet"], "batch_size": 4, **QUIET}
        return _values(evaluate_restoration(sampler, REAL[:4], "half", **options))

    compare(evaluated, within=2e-2)


def test_sets_of_images(compare):
    def measured(to):
        extractor, few = _extractor(to), REAL[:6]
        return [
            *_values(evaluate(few, REAL, features=extractor, metrics=["frechet"], **QUIET)),
            memorization_of(few, REAL, features=extractor, neighbors=2, flips=True, progress=False).samples.distances,
            statistics_of(REAL, extractor, keep_features=True, **QUIET).covariance,
        ]

    compare(measured, within=1e-4)


def test_diagnostics(compare):
    def measured(to):
        net, levels = to(colors()), NoiseSchedule.karras(10, 0.05, 3)
        return [
            data_likelihood(net, REAL[:6], levels, checks=2, batch_size=4, progress=False).per_image,
            *(row.loss.value for row in level_losses(net, REAL[:6], [0.1, 1.0], batch_size=4, progress=False)),
        ]

    compare(measured, within=1e-3)


WORLDS = {
    "Gaussian": lambda to: exact.Gaussian(rand(12), 0.2, (3, 2, 2), schedule=LEVELS),
    "GaussianMixture": lambda to: exact.GaussianMixture([0.5, 0.5], rand(2, 12), 0.1, (3, 2, 2), schedule=LEVELS),
    "Empirical": lambda to: exact.Empirical(to(rand(9, 3, 2, 2)), 0.1, schedule=LEVELS),
}


@pytest.mark.parametrize("name", WORLDS)
def test_exact_scores(compare, name):
    def measured(to):
        world, x = WORLDS[name](to), rand(3, 3, 2, 2)

        def score(x, sigma):
            return -x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

        return [
            *(row.excess.value for row in score_error(score, world, [0.5], n=8, progress=False)),
            world(to(x), 0.5),
            world(to(x), to(torch.tensor([0.5, 1, 2]))),
            world.log_density(to(x), 0.5),
        ]

    compare(measured, within=1e-3)


def test_distances_of_samplers_and_calibration(compare):
    def measured(to):
        world, half = WORLDS["Gaussian"](to), Mask(torch.arange(2) < 1)
        kinds = {"ode": lambda net, levels: ODESampler(net, levels=levels)}
        rows = sampler_distances(world, kinds, levels=(4,), n=20, repeats=2, progress=False)
        samplers = {"x": AnnealedLangevinSampler(world, levels=4, clamp=False)}
        options = {"sigma": 0.1, "observations": 15, "draws": 2, "directions": 2, "progress": False}
        return [
            *(row.energy for row in rows),
            posterior_calibration(world, half, samplers, **options)[1].spread.value,
            world.posterior(Observation(half, rand(1, 3, 2, 2), 0.1)).mean,
        ]

    compare(measured, within=1e-3)


@pytest.mark.parametrize("name", ["mnist", "palette-mnist"])
def test_networks_that_ship(compare, name):
    def samples(to):
        net = to(ScoreNet.from_pretrained(name))
        channels, size = net.conditioning.channels, net.sample_shape[1:]
        given = rand(1, channels, *size) if channels else None
        sampler = ODESampler(net, levels=2, method="dpm-solver++", precision="float32")
        return sampler.sample(1, condition=given, generator=0, progress=False)

    compare(samples, within=2e-2)


def test_networks_are_saved_from_the_device(compare, tmp_path):
    def saved(to):
        to(colors()).save_pretrained(tmp_path)
        return list(ScoreNet.from_pretrained(tmp_path).parameters())

    compare(saved)
