"""``evaluate``: figures are those of the metrics, for every kind of input, in one process or two."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet
from scorematch.data import REFERENCES, open_images, save_image
from scorematch.evaluation import (
    METRICS,
    Estimate,
    Evaluator,
    Extractor,
    Metric,
    Statistics,
    density_coverage,
    evaluate,
    evaluate_restoration,
    frechet_distance,
    gaussian_images,
    image_figures,
    inception_score,
    kernel_distance,
    pixels,
    precision_recall,
    statistics_of,
    tune,
    values,
)
from scorematch.evaluation.subject import is_network
from scorematch.sampling import AnnealedLangevinSampler, ODESampler, SamplerSettings, bulk_samples, sample_to
from tests.helpers import seed

SIZE = 3

OF_PICTURES = [name for name, line in METRICS.items() if line.default != "arrays"]


def images(n, number=0, channels=1, size=SIZE, dtype=torch.uint8):
    """Random images, darker at the bottom."""
    x = torch.randint(0, 256, (n, channels, size, size), generator=seed(number)) * torch.linspace(1, 0.2, size)[:, None]
    return x.to(torch.uint8) if dtype == torch.uint8 else (x.to(torch.uint8) / 255).to(dtype)


def run(what, reference, **options):
    return evaluate(what, reference, **{"features": "pixels", "cache": False, "progress": False, **options})


def found(result, column="samples", source="pixels"):
    """The values of the figures of one set of images."""
    return {name: figure.value for name, figure in result.figures[column][source].items()}


def agree(one, other):
    """Whether figures agree but for the rounding of decompositions, whose bits may change from call to call."""
    assert one.keys() == other.keys()
    for source, measured in one.items():
        assert measured.keys() == other[source].keys()
        for name, (value, error) in measured.items():
            assert other[source][name].value == pytest.approx(value, rel=1e-9, abs=1e-12), (source, name)
            assert other[source][name].error == (None if error is None else pytest.approx(error, rel=1e-6)), name
    return True


def write(folder, x):
    folder.mkdir(parents=True)
    for i, image in enumerate(x):
        Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()).save(
            folder / f"{i:03d}.png"
        )
    return folder


def classes_of(x):
    """Features and logits of three classes."""
    x = x.float() / 255
    return x.flatten(1)[:, :4], torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3)), x[:, 0, 0, 0]], 1) * 4


CLASSES = Extractor(classes_of, "classes of x", "1")


def small_subsets(monkeypatch, **options):
    """The kernel distance has subsets of 50 images."""
    line = METRICS["kernel"]
    function = partial(line.function, subset_size=50, **options)
    monkeypatch.setitem(METRICS, "kernel", replace(line, function=function, least=50))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=NoiseSchedule([1.0, 0.1, 0.01]))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.2)
    made.sampler_settings = SamplerSettings("ode", levels=3)
    return made


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("network")
    net.save_pretrained(path)
    return path


# -- The figures


def test_figures_are_those_of_the_metrics(monkeypatch):
    small_subsets(monkeypatch, subsets=3)
    real, generated = images(120), images(110, 1)
    result = run(generated, real, features=[pixels(), CLASSES], metrics=OF_PICTURES, gaussian=False)
    assert result.sizes == {"samples": 110, "reference": 120}
    assert set(result.left_out) == {"inception-score of pixels", "classes of pixels"}
    for extractor in (pixels(), CLASSES):
        a, b = extractor(real), extractor(generated)
        measured = found(result, source=extractor.name)
        assert measured["frechet"] == pytest.approx(frechet_distance(a, b).value, rel=1e-9)
        assert measured["kernel"] == pytest.approx(kernel_distance(b, a, subsets=3, subset_size=50).value, rel=1e-9)
        assert set(measured) >= {"precision", "recall", "density", "coverage"}
    logits = CLASSES.extract(generated).logits
    measured = result.figures["samples"]["classes of x"]
    assert measured["inception-score"] == pytest.approx(inception_score(logits))
    confident = (logits.softmax(1).amax(1) > 0.9).double()
    assert measured["confident"] == pytest.approx(
        (float(confident.mean()), float(confident.std(correction=0)) / 110**0.5)
    )
    rarest = min(float((logits.argmax(1) == k).double().mean()) for k in range(3))
    assert measured["rarest"].value == pytest.approx(rarest)


def test_the_default_pixels_lack_logits_and_images():
    with pytest.raises(ValueError, match="the metric 'inception-score' needs an extractor with logits of classes"):
        run(images(40), images(40), metrics=["inception-score"])
    with pytest.raises(ValueError, match=r"'kernel' needs at least 1,000 images in each set, and there are 40"):
        run(images(40), images(2000), metrics=["frechet", "kernel"])
    with pytest.raises(ValueError, match="'precision-recall' needs at least 4 images in each set, and there are 3"):
        run(images(40), images(3), metrics=["precision-recall"])
    with pytest.raises(ValueError, match="'inception-score' needs at least 30 images for 3 classes, and there are 29"):
        run(images(29), images(30), features=CLASSES, metrics=["inception-score"])
    result = run(images(40), images(40))
    assert set(result.left_out) == {"kernel of pixels", "inception-score of pixels"}
    assert set(found(result)) == {"frechet", "precision", "recall", "density", "coverage"}
    with pytest.raises(ValueError, match=r"each of metrics must be one of 'frechet', .* got 'fid'"):
        run(images(40), images(40), metrics=["fid"])


def test_kernel_distances_of_whole_sets_have_no_error(monkeypatch):
    small_subsets(monkeypatch)
    real, generated = images(50), images(50, 1)
    figure = run(generated, real, metrics=["kernel"], gaussian=False).figures["samples"]["pixels"]["kernel"]
    expected = kernel_distance(pixels()(generated), pixels()(real), subset_size=50)
    assert expected.error is None and figure == (pytest.approx(expected.value), None)


def test_balls_compare_equally_many_images():
    """The larger set is cut, so that the sizes do not favor one of the figures."""
    real, generated = images(60), images(30, 1)
    few, many = found(run(generated, real)), found(run(real, generated))
    features = pixels()(generated), pixels()(real)
    precision, recall = precision_recall(*features)
    assert few["precision"] != precision.value or few["recall"] != recall.value
    assert few["precision"] == pytest.approx(many["recall"]) and few["recall"] == pytest.approx(many["precision"])
    whole = found(run(images(60, 1), real))
    more = pixels()(images(60, 1))
    expected = [figure.value for metric in (precision_recall, density_coverage) for figure in metric(more, features[1])]
    assert [whole[name] for name in ("precision", "recall", "density", "coverage")] == pytest.approx(expected)


def test_a_metric_is_one_function_and_one_line(monkeypatch):
    def distance_of_means(features, reference):
        return Estimate(float((features.mean(0) - reference.mean).norm()))

    monkeypatch.setitem(METRICS, "means", Metric(distance_of_means, {"means": "distance of means ↓"}))
    real, generated = images(40), images(30, 1)
    result = run(generated, real, metrics=["means"])
    expected = (pixels()(generated).mean(0) - pixels()(real).mean(0)).norm()
    assert found(result)["means"] == pytest.approx(float(expected), rel=1e-5)
    assert f"| distance of means ↓ | {result.figures['samples']['pixels']['means']} |" in result.table()
    assert "means" in found(run(generated, real))  # by default


@pytest.mark.parametrize("channels", [1, 3])
def test_figures_of_pixels(channels):
    x = images(50, channels=channels, dtype=torch.float64)
    found = image_figures(x.split(20))
    assert found["mean"].value == pytest.approx(float(x.mean()))
    assert found["mean"].error == pytest.approx(float(x.mean((1, 2, 3)).std() / 50**0.5))
    assert found["std"].value == pytest.approx(float(x.std(correction=0)))
    steps = float(x.diff(dim=2).abs().mean()), float(x.diff(dim=3).abs().mean())
    assert found["variation"].value == pytest.approx(sum(steps) / 2)
    assert ("saturation" in found) == (channels == 3)
    if channels == 3:
        assert found["saturation"].value == pytest.approx(float((x.amax(1) - x.amin(1)).mean()))
    # The error of the deviation, by leaving out one image at a time.
    apart = torch.stack([torch.cat([x[:i], x[i + 1 :]]).std(correction=0) for i in range(50)])
    jackknife = float((49 * apart.var(correction=0)).sqrt())
    assert found["std"].error == pytest.approx(jackknife, rel=0.05)
    assert image_figures([images(1)])["mean"].error is None
    pixel = image_figures([x[:, :, :1, :1]])
    assert pixel["std"].value == pytest.approx(float(x[:, :, 0, 0].std(correction=0))) and pixel["variation"].value == 0
    assert image_figures([torch.zeros(3, 1, 2, 2)])["std"] == (0.0, None)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ((12.3456, 0.789), "12.35 ± 0.79"),
        ((12.3456, 23.4), "12 ± 23"),
        ((0.5, 0.0004), "0.50000 ± 0.00040"),
        ((12.3456, None), "12.35"),
        ((1.0, 0.0), "1"),
        ((1.0, float("nan")), "1"),
        ((0.25, 8e-18), "0.25"),  # of a mean of equal values
    ],
)
def test_figures_are_rounded_to_their_errors(figure, text):
    assert str(Estimate(*figure)) == text


# -- What is evaluated


def test_arrays_files_and_folders_agree(tmp_path):
    real, generated = images(40, channels=3, size=4), images(30, 1, channels=3, size=4)
    np.savez(tmp_path / "generated.npz", images=generated.permute(0, 2, 3, 1).numpy())
    kinds = [
        generated,
        generated.numpy(),
        generated.float() / 255,
        generated.double() / 255 + 0.001,  # rounds to the same gray levels
        write(tmp_path / "generated", generated),
        tmp_path / "generated.npz",
        open_images(generated),
    ]
    options = {"gaussian": False, "metrics": ["precision-recall", "density-coverage"]}
    results = [run(kind, real, **options) for kind in kinds]
    for result in results:
        assert result.figures == results[0].figures
    assert run(generated, write(tmp_path / "real", real), **options).figures == results[0].figures


def test_the_order_of_images_does_not_matter(monkeypatch):
    small_subsets(monkeypatch, subsets=3)
    real, generated = images(100), images(101, 1)
    options = {"features": [pixels(), CLASSES], "metrics": OF_PICTURES, "gaussian": False}
    one = run(generated, real, **options)
    other = run(generated.flip(0), real[torch.randperm(100, generator=seed(2))], batch_size=9, **options)
    assert all(agree(measured, other.figures[column]) for column, measured in one.figures.items())


def test_a_random_subset_of_images():
    real, generated = images(50), images(40, 1)
    options = {"n": 20, "gaussian": False, "metrics": ["precision-recall"]}
    few, same, other = (run(generated, real, seed=number, **options) for number in (0, 0, 1))
    assert few.sizes["samples"] == 20 and found(few) == found(same) != found(other)
    assert few.hash == same.hash != other.hash


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("mnist", True),
        ("owner/name", True),
        ("nothing.npz", False),  # so that the error is that of files
        ("nothing.PNG", False),
        (lambda x, sigma: x, True),
        (torch.zeros(2, 1, 2, 2), False),
        ((np.zeros(2), np.zeros(2)), False),
    ],
)
def test_networks_are_told_from_images(what, expected):
    assert is_network(what) is expected


def test_folders_of_networks_are_told_from_images(folder, tmp_path, net):
    write(tmp_path / "images", images(2))
    assert is_network(folder) and not is_network(tmp_path / "images") and not is_network(str(tmp_path / "images"))
    assert is_network(net) and is_network(ODESampler(net))


# -- Samples of a network


@pytest.mark.slow
def test_samples_are_those_of_bulk_sampling(net, folder, tmp_path):
    real, sampler = images(30, size=8), ODESampler(net, levels=2)
    samples = torch.cat([batch.images for batch in bulk_samples(sampler, 5, seed=5, batch_size=4)])
    expected = run(samples, real, metrics=["precision-recall"]).figures["samples"]
    options = {"n": 5, "seed": 5, "batch_size": 4, "metrics": ["precision-recall"]}
    assert run(sampler, real, **options).figures["samples"] == expected
    assert run(str(folder), real, sampler=SamplerSettings("ode", levels=2), **options).figures["samples"] == expected
    sample_to(sampler, tmp_path / "pictures", 5, seed=5, batch_size=4, progress=False)
    for what in (tmp_path / "pictures", tmp_path / "pictures" / "images"):
        assert run(what, real, metrics=["precision-recall"]).figures["samples"] == expected
    assert run(tmp_path / "pictures", real, n=4, metrics=[]).sizes["samples"] == 4


def test_the_sampler_is_the_recommended_one_or_a_chosen_one(net):
    real, options = images(30, size=8), {"n": 4, "metrics": []}
    assert run(net, real, **options).settings["images"]["sampler"]["schedule"] == list(
        ODESampler(net, levels=3).schedule
    )
    chosen = run(net, real, sampler=SamplerSettings("ode", levels=2, method="dpm-solver++"), **options)
    same = run(net, real, sampler=lambda net: ODESampler(net, levels=2, method="dpm-solver++"), **options)
    assert chosen == same and chosen.settings["images"]["sampler"]["method"] == "dpm-solver++"


@pytest.mark.slow
def test_an_interrupted_evaluation_continues_and_other_metrics_draw_nothing(net, tmp_path, monkeypatch):
    real, out = images(30, size=8), tmp_path / "out"
    options = {"n": 10, "batch_size": 4, "out": out}
    with pytest.warns(UserWarning, match="is singular"):
        one = run(net, real, metrics=["frechet"], **options)
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md", "samples", "samples.png"]
    batches = sorted((out / "samples" / "images").iterdir())
    assert [path.name for path in batches] == ["000000.npz", "000004.npz", "000008.npz"]
    batches[1].unlink()
    with pytest.warns(UserWarning, match="is singular"):
        again = run(net, real, metrics=["frechet"], **options)
    assert agree(again.figures["samples"], one.figures["samples"]) and again.settings == one.settings
    monkeypatch.setattr(ODESampler, "sample", None)
    other = run(net, real, metrics=["precision-recall"], features=CLASSES, **options)
    assert other.figures["samples"]["images"] == one.figures["samples"]["images"]
    with pytest.raises(ValueError, match="has samples with other settings: seed was 0 and is 1"):
        run(net, real, metrics=[], seed=1, **options)


def test_the_files_of_an_evaluation(net, tmp_path):
    real, out = images(30, size=8), tmp_path / "out"
    result = run(net, real, n=6, out=out, held_out=images(5, 1, size=8), metrics=["density-coverage"], name="tiny")
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["hash"] == result.hash and stored["name"] == "tiny" and stored["settings"] == result.settings
    assert stored["sizes"] == {"samples": 6, "held-out": 5, "gaussian": 6, "reference": 30}
    value, error = result.figures["samples"]["pixels"]["coverage"]
    assert stored["figures"]["samples"]["pixels"]["coverage"] == {"value": value, "error": error}
    assert "density" not in result.figures["held-out"]["pixels"]  # more than 5 images are needed
    settings = stored["settings"]
    assert (
        settings["images"]["network"].startswith("ScoreNet ") and settings["images"]["sampler"]["name"] == "ODESampler"
    )
    assert settings["metrics"] == {"density-coverage": {"k": 5}} and settings["reference"]["n"] == 30
    assert settings["features"][0]["name"] == "pixels" and stored["versions"]["torch"] == torch.__version__
    page = (out / "evaluation.md").read_text()
    assert page.startswith("# Evaluation of tiny\n\n|  | samples | held-out images | Gaussian | reference |")
    assert f"| coverage ↑ | {Estimate(value, error)} |  |" in page and f"hash is {result.hash}" in page
    assert "- coverage: standard error of a share" in page
    assert stored["sampler"] == result.sampler == str(ODESampler(net, levels=3)) and f"\n- {result.sampler}\n" in page
    with Image.open(out / "samples.png") as picture:
        assert picture.size == (3 * 10 + 2, 2 * 10 + 2)


def test_the_reference_is_resized_to_a_network_but_not_to_images(net, tmp_path):
    real = write(tmp_path / "real", images(8, channels=3, size=20))
    assert run(net, real, n=6, metrics=[]).settings["reference"]["shape"] == [1, 8, 8]
    wanted = r"the size of those to evaluate, 3 x 3 pixels \(gray\), got 20 x 20 pixels \(color\)\. Resize them, or"
    with pytest.raises(ValueError, match=wanted):
        run(images(6), real)
    assert run(images(6), open_images(real, image_size=3, channels=1), metrics=[]).sizes["reference"] == 8
    with pytest.raises(ValueError, match=r"the held-out images must have the shape \(1, 8, 8\), got \(1, 3, 3\)"):
        run(net, real, n=6, metrics=[], held_out=open_images(images(6)))


def test_networks_that_cannot_be_evaluated(net):
    palette = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, condition_channels=1)
    with pytest.raises(ValueError, match=r"takes an image as its condition\. Use evaluate_restoration"):
        run(palette, images(4, size=8))
    with pytest.raises(ValueError, match="`what` is a sampler, so sampler= must be None"):
        run(ODESampler(net), images(4, size=8), sampler=ODESampler)
    with pytest.raises(TypeError, match="sampler must return a Sampler, got int"):
        run(net, images(4, size=8), sampler=lambda net: 1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        run(net, images(4, size=8), n=1)
    with pytest.raises(ValueError, match="sampler, classes, n_classes and condition apply to networks"):
        run(images(4), images(4), sampler=ODESampler)
    with pytest.raises(ValueError, match=r"must be \(C, H, W\) with 1 or 3 channels, but function has \(2,\)"):
        run(lambda x, sigma: -x, images(4), sampler=lambda net: _Points(net))


class _Points(ODESampler):
    def __init__(self, net):
        super().__init__(net, NoiseSchedule([1.0, 0.1]))
        self.net = SimpleNamespace(sample_shape=(2,))


def test_classes_of_samples(net, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conditional = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, classes=3, schedule=net.schedule)
    sampler = ODESampler(conditional, levels=2)
    result = run(sampler, images(9, size=8), n=6, metrics=[], classes="cycle")
    expected = torch.cat([batch.images for batch in bulk_samples(sampler, 6, classes="cycle")])
    assert result.figures["samples"]["images"] == image_figures([expected])


# -- The floor and the ceiling


def test_images_of_the_gaussian_have_the_mean_and_the_covariance_of_the_data():
    x = 0.5 + 0.05 * torch.randn(5, 1, 2, 2, generator=seed(0), dtype=torch.float32)
    data = open_images(x)
    n = 4000
    drawn = torch.cat(list(gaussian_images(data, n, seed=1, batch_size=500))).flatten(1).double()
    rounded = (x * 255).round().double().flatten(1) / 255
    covariance = torch.cov(rounded.T)
    deviation = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - rounded.mean(0)).abs() < 4 * deviation / n**0.5).all()
    error = ((covariance**2 + covariance.diagonal()[:, None] * covariance.diagonal()) / n).sqrt()
    assert ((torch.cov(drawn.T) - covariance).abs() < 4 * error).all()


def test_an_image_of_the_gaussian_depends_on_its_number_only(monkeypatch):
    data = open_images(images(30))
    one = torch.cat(list(gaussian_images(data, 9)))
    few = torch.cat(list(gaussian_images(data, 5, batch_size=2)))
    torch.testing.assert_close(few, one[:5], rtol=0, atol=1e-6)
    assert not torch.equal(torch.cat(list(gaussian_images(data, 9, seed=1))), one)
    monkeypatch.setattr("scorematch.evaluation.reference._VALUES", 1)  # one batch in a pass over the data
    assert torch.equal(torch.cat(list(gaussian_images(data, 5, batch_size=2))), few)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        next(gaussian_images(data, 5, batch_size=0))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(torch.cat(list(gaussian_images(data, 5, batch_size=2))), few)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_image_has_no_gaussian():
    with pytest.raises(ValueError, match="the Gaussian of a data set needs at least 2 images, got 1"):
        run(images(4), images(1), features=[], metrics=None)


def test_held_out_images_and_the_gaussian_are_measured_beside_the_samples():
    real, more, generated = images(60), images(100, 3), images(40, 1)
    result = run(generated, real, held_out=more, metrics=["frechet"], seed=4)
    assert result.sizes == {"samples": 40, "held-out": 40, "gaussian": 40, "reference": 60}
    drawn = torch.cat(list(gaussian_images(open_images(real), 40, seed=4)))
    assert found(result, "gaussian")["frechet"] == pytest.approx(
        frechet_distance(pixels()(drawn), pixels()(real)).value
    )
    assert result.figures["reference"] == {"images": image_figures([real])}
    for same in [(real, real), ("~/real", Path.home() / "other" / ".." / "real")]:
        with pytest.raises(ValueError, match="held_out is the reference"):
            run(generated, same[0], held_out=same[1])
    other = run(generated, real, held_out=more, metrics=["frechet"], seed=5, gaussian=False)
    assert found(other, "held-out") != found(result, "held-out") and "gaussian" not in other.figures
    assert agree(other.figures["samples"], result.figures["samples"])


# -- References


def test_statistics_as_the_reference(tmp_path):
    real, generated = images(60), images(40, 1)
    expected = run(generated, real, gaussian=False)
    whole, plain = tmp_path / "whole.npz", tmp_path / "plain.npz"
    features = pixels()(real)
    Statistics.of(features, pixels()).save(whole)
    np.savez(plain, mu=features.double().mean(0).numpy(), sigma=torch.cov(features.double().T).numpy())
    for reference in (whole, Statistics.load(whole, pixels())):
        assert agree(run(generated, reference).figures["samples"], expected.figures["samples"])
    result = run(generated, str(plain))
    assert set(found(result)) == {"frechet"}
    assert found(result)["frechet"] == pytest.approx(found(expected)["frechet"])
    assert "only their statistics" in result.left_out["Gaussian"]
    assert "needs the features of the reference" in result.left_out["precision-recall of pixels"]
    assert result.settings["reference"]["n"] is None
    with pytest.raises(ValueError, match="'kernel' needs the features of the reference"):
        run(generated, plain, metrics=["kernel"])
    with pytest.raises(ValueError, match=r"have 16 dimensions for images of 4 x 4 pixels \(gray\), but .* have 9"):
        run(images(40, size=4), plain)
    with pytest.raises(ValueError, match="computed by the extractor pixels"):
        run(generated, whole, features=CLASSES)


class _Module(torch.nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x.float()).flatten(1)


def test_damaged_statistics_in_the_cache_are_computed_again(tmp_path):
    real, generated = images(60), images(40, 1)
    one = run(generated, real, cache=tmp_path, gaussian=False)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-200]):
        file.write_bytes(damaged)
        again = run(generated, real, cache=tmp_path, gaussian=False)
        assert again.hash == one.hash and agree(again.figures["samples"], one.figures["samples"])
        assert file.read_bytes() != damaged


def test_results_do_not_lie_in_the_folder_of_the_data(tmp_path):
    """The picture of the samples would become a real image of the next evaluation."""
    faces = tmp_path / "faces"
    faces.mkdir()
    for i, image in enumerate(images(4, size=8) / 255):
        save_image(image, faces / f"{i}.png")
    for out in (faces, faces / "result", tmp_path / "other" / ".." / "faces" / "result"):
        for options in ({"reference": faces}, {"reference": images(4, size=8), "held_out": faces}):
            with pytest.raises(
                ValueError,
                match=r"output folder .*faces.* is inside the data folder .*faces, .*Write to another folder",
            ):
                run(images(4, 1, size=8), out=out, **options)
    with pytest.raises(ValueError, match=r"output folder .*faces is inside the data folder"):
        run(faces, images(4, size=8), out=faces)
    assert len(list(faces.iterdir())) == 4
    run(images(4, 1, size=8), faces, out=tmp_path / "result", metrics=[])


def test_files_of_the_user_are_not_replaced(tmp_path):
    options = {"out": tmp_path, "metrics": []}
    (tmp_path / "samples.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"samples\.png exists already and would be replaced"):
        run(images(4, 1), images(4), **options)
    (tmp_path / "samples.png").unlink()
    for _ in range(2):  # an evaluation replaces its own files
        run(images(4, 1), images(4), **options)


def test_a_folder_of_samples_may_have_their_evaluation(net, tmp_path):
    sample_to(ODESampler(net, levels=2), tmp_path, 3, progress=False)
    run(tmp_path, images(4, size=8), out=tmp_path, metrics=[])
    assert (tmp_path / "evaluation.md").is_file()


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.warns(UserWarning, match=r"the statistics could not be cached in .*file: File exists\."):
        one = run(images(9, 1), images(9), metrics=["precision-recall"], cache=tmp_path / "file")
    assert one.figures == run(images(9, 1), images(9), metrics=["precision-recall"]).figures


def test_only_features_with_a_fingerprint_are_cached(tmp_path):
    real, generated = images(60), images(40, 1)
    cache = tmp_path / "cache"
    plain = lambda x: x.flatten(1)[:, :3].float()  # noqa: E731
    first = run(generated, real, features=plain, cache=cache)
    assert not cache.exists() and first.settings["features"][0]["fingerprint"] is None
    calls = []
    watched = Extractor(lambda x: calls.append(len(x)) or plain(x), "watched", "1")
    one = run(generated, real, features=watched, cache=cache, gaussian=False)
    assert len(list(cache.iterdir())) == 1 and sum(calls) == 60 + 40 + 1  # one black image finds the dimension
    calls.clear()
    again = run(generated, real, features=watched, cache=cache, gaussian=False)
    assert again.hash == one.hash and agree(again.figures["samples"], one.figures["samples"])
    assert sum(calls) == 40 + 1
    # Two modules with equal weights, here none, may compute different features.
    options = {"metrics": ["frechet"], "cache": cache, "gaussian": False}
    for pool in (torch.nn.AvgPool2d(2), torch.nn.MaxPool2d(2)):
        a, b = (pool(x.float()).flatten(1) for x in (real, generated))
        assert found(run(generated, real, features=_Module(pool), **options), source="_Module")[
            "frechet"
        ] == pytest.approx(frechet_distance(a, b).value)
    assert len(list(cache.iterdir())) == 1


def test_the_default_cache_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))
    run(images(9), images(9), cache=True, metrics=[])
    assert len(list((tmp_path / "cache").iterdir())) == 1


class _Table:
    """As much of a data set of the package datasets as is read."""

    column_names = ("image", "label")

    def __init__(self, x):
        self.features, self._x = {}, x

    def __len__(self):
        return len(self._x)

    def __getitem__(self, i):
        return {"image": Image.fromarray(self._x[i, 0].numpy())}


def test_the_settings_identify_data_sets_by_their_pixels():
    """Also data sets of equal length, as evaluated images, as the reference and as held-out images."""
    hashes = set()
    for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        what, reference, held_out = (_Table(images(20, number)) for number in numbers)
        hashes.add(run(what, reference, held_out=held_out, metrics=[], gaussian=False).hash)
    assert len(hashes) == 4


def test_short_names_of_references(monkeypatch):
    loaded = []

    def load_dataset(name, split):
        loaded.append((name, split))
        return _Table(images(30, 3 if split == "test" else 0))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    result = run(images(20, 1), "mnist-train", held_out="mnist-test", metrics=[])
    assert loaded == [("ylecun/mnist", "train"), ("ylecun/mnist", "test")]
    assert result.figures["reference"]["images"] == image_figures([images(30)])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"cifar10-train is neither a file nor a folder, .*pip install datasets"):
        run(images(20, 1), "cifar10-train")
    assert {name.rpartition("-")[2] for name in REFERENCES} == {"train", "test"}


def test_a_reference_that_cannot_be_loaded(monkeypatch):
    def load_dataset(name, split):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        FileNotFoundError, match=r"mnist-test .* ylecun/mnist cannot be loaded from the Hub: no network"
    ):
        run(images(20, 1), "mnist-test")


# -- Bad input


def test_damaged_images_are_an_error(tmp_path):
    folder = write(tmp_path / "images", images(5))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:50])
    for arguments in [(folder, images(5)), (images(5), folder)]:
        with pytest.raises(OSError, match=r"002\.png cannot be read as an image"):
            run(*arguments, metrics=[])
    with pytest.raises(OSError, match=r"002\.png cannot be read as an image"):
        run(images(5), images(5), held_out=folder, metrics=[])


def test_folders_without_images_and_of_several_sizes(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments in [(tmp_path / "empty", images(5)), (images(5), tmp_path / "empty")]:
        with pytest.raises(FileNotFoundError, match="empty and its subfolders contain no image files"):
            run(*arguments)
    folder = write(tmp_path / "images", images(5))
    write(tmp_path / "other", images(1, size=4))
    shutil.move(tmp_path / "other" / "000.png", folder / "other.png")
    with pytest.raises(ValueError, match=r"images of different sizes: .*write open_images\(..., image_size=\("):
        run(folder, images(5))


def test_images_that_are_not_square_are_compared_whole(tmp_path):
    sets = [images(9, number, size=8)[..., :6] for number in range(3)]
    paths = [write(tmp_path / str(k), pixels) for k, pixels in enumerate(sets)]
    options = {"metrics": ["precision-recall"], "gaussian": False}
    expected, result = (run(what, real, held_out=more, **options) for what, real, more in (sets, paths))
    for column in ("samples", "held-out", "reference"):
        assert agree(expected.figures[column], result.figures[column])
    assert result.settings["images"]["shape"] == [1, 8, 6]
    whole = run(paths[0], paths[1], crop=None, **options)
    assert agree(whole.figures["samples"], result.figures["samples"])
    square = run(sets[0][:, :, 1:7], paths[1], metrics=["precision-recall"])  # in the middle
    assert square.settings["reference"]["shape"] == [1, 6, 6]


def test_names_that_are_not_utf_8_are_written(tmp_path):
    result = run(images(9, 1), images(9), metrics=[], name="caf\udce9", out=tmp_path)  # of the folder b"caf\xe9"
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["name"] == result.name
    assert (tmp_path / "evaluation.md").read_text(encoding="utf-8").startswith("# Evaluation of caf\\udce9\n")


def test_files_that_do_not_exist_are_named():
    for name in ("nothing.npz", "folder/nothing.png"):
        with pytest.raises(FileNotFoundError, match=f"^{name} does not exist"):
            run(name, images(5))


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(net, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net.save_pretrained("~/net")
    sample_to(ODESampler(net, levels=2), "~/samples", 4, progress=False)
    Statistics.of(pixels()(images(40, size=8)), pixels()).save("~/real.npz")
    options = {"n": 4, "metrics": "precision-recall"}
    for what in ("~/net", "~/samples"):
        run(what, "~/real.npz", out="~/out", **options).save("~/out/again")
        assert (tmp_path / "out" / "again" / "evaluation.json").exists()
        shutil.rmtree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "real.npz", "samples"]


def test_numbers_of_numpy_and_one_metric():
    numbers = {"n": np.int64(10), "seed": np.int64(0), "batch_size": np.int64(8)}
    result = run(images(20, 1), images(20), **numbers, metrics="precision-recall")
    assert result.sizes["samples"] == 10 and set(found(result)) == {"precision", "recall"}


@pytest.mark.parametrize(("name", "value"), [("n", 1e3), ("seed", [1])])
def test_numbers_that_are_no_integers_are_named(name, value):
    for call in (evaluate, partial(evaluate_restoration, operator="gray"), tune):
        with pytest.raises(TypeError, match=rf"^{name} must be an integer, got {re.escape(repr(value))}\.$"):
            call(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), **{name: value})


def test_one_image_is_not_enough():
    with pytest.raises(ValueError, match="n must be from 2 to the number of images, 1, got 1"):
        run(images(1), images(5))
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        run(images(5), images(1))
    with pytest.raises(ValueError, match="n must be from 2 to the number of images, 5, got 6"):
        run(images(5), images(5), n=6)


def test_features_with_nan():
    broken = Extractor(lambda x: torch.where(x.flatten(1) == 7, float("nan"), x.flatten(1).float()), "broken", "1")
    x = images(5)
    x[3, 0, 0, 0] = 7
    with pytest.raises(ValueError, match="features must be finite, but 1 of the 5 rows hold NaN"):
        run(x, images(5, 1).clamp(min=8), features=broken)


def test_features_need_different_names():
    with pytest.raises(ValueError, match="extractors with different names, got pixels, pixels"):
        run(images(5), images(5), features=["pixels", "pixels"])
    with pytest.raises(ValueError, match=r"metrics need features, and there are none. Name an extractor for 'frechet'"):
        run(images(5), images(5), features=[], metrics=["frechet"])
    with pytest.raises(ValueError, match=r"features must be one of .* got 'fid'"):
        run(images(5), images(5), features="fid")


def test_no_features_measure_the_pixels_only():
    found = run(images(5), images(6, 1), features=[], metrics=None)
    assert all(set(figures) == {"images"} for figures in found.figures.values()) and found.left_out == {}
    assert found.settings["reference"]["n"] == 6 and found.settings["features"] == []
    statistics = statistics_of(images(6), pixels(), progress=False)
    with pytest.raises(ValueError, match=r"the reference is statistics of features, .* Name an extractor"):
        run(images(5), statistics, features=[])


def test_an_evaluator_measures_many_sets():
    evaluator = Evaluator(images(60), features="pixels", metrics=["frechet"], cache=False, progress=False)
    for number in (1, 2):
        x = images(40, number)
        measured = evaluator.measure([x])
        assert agree(measured, run(x, images(60), metrics=["frechet"]).figures["samples"])
        plain = values(measured)
        assert (
            plain["frechet"] == measured["pixels"]["frechet"].value and plain["std"] == measured["images"]["std"].value
        )
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        evaluator.measure([images(1)])
    two = Evaluator(images(60), features=["pixels", CLASSES], metrics=["frechet"], cache=False, progress=False)
    assert {"pixels frechet", "classes of x frechet", "images std"} <= values(two.measure([images(20)])).keys()


def test_nothing_is_drawn_from_the_global_generator(net):
    state = torch.get_rng_state()
    run(AnnealedLangevinSampler(net, levels=3), images(20, size=8), n=6, held_out=images(9, 1, size=8), metrics=[])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_two_processes_equal_one(forks, folder, tmp_path):
    np.savez(tmp_path / "real.npz", images=images(1040, size=8)[:, 0].numpy())
    np.savez(tmp_path / "more.npz", images=images(1040, 1, size=8)[:, 0].numpy())
    options = ("-n", 1030, "--features", "pixels", "--held-out", tmp_path / "more.npz", "--batch-size", 100, "--quiet")
    for size, name in [(1, "one"), (2, "two")]:
        out = ("--out", name, "--cache", f"cache-{name}", "--device", "cpu")
        command = ["evaluate", *map(str, (folder, tmp_path / "real.npz", *options, *out))]
        forks.group(size, f"from scorematch.cli import main\nassert main({command}) == 0", tmp_path)
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["sizes"] == two["sizes"]
    assert one["figures"]["samples"]["pixels"].keys() >= {"frechet", "kernel", "recall", "density"}
    for column, sources in one["figures"].items():
        first, second = (
            {source: {name: Estimate(**each) for name, each in measured.items()} for source, measured in found.items()}
            for found in (sources, two["figures"][column])
        )
        assert agree(first, second), column
