"""Runs the examples at their smallest size in the test process; some slow tests run them as programs."""

import csv
import gzip
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet
from scorematch.data import read_image, save_image
from scorematch.evaluation.features import as_extractor
from scorematch.sampling import SamplerSettings
from tests.helpers import python

ROOT = Path(__file__).parents[1]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"


@pytest.fixture
def example(monkeypatch):
    """A function that imports a module of the examples, or of the benchmarks that use them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Statistics are cached in a folder of the tests."""
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def program(example, capsys):
    """A function that runs the main function of a module, and returns its output."""

    def run(name, *arguments):
        capsys.readouterr()
        with torch.random.fork_rng():
            example(name).main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def _write_idx(path, array, compressed):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compressed else data)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the layout of MNIST, with noise in place of digits."""
    data = tmp_path_factory.mktemp("mnist")
    folder = data / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        compressed = split == "train"
        ending = ".gz" if compressed else ""
        _write_idx(folder / f"{split}-images-idx3-ubyte{ending}", random.integers(0, 256, (256, 28, 28)), compressed)
        _write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", random.integers(0, 10, 256), compressed)
    return data


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The file of an untrained classifier."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(EXAMPLES)
        torch.manual_seed(0)
        torch.save(importlib.import_module("digit_classifier").Classifier().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The folder of a small network of digits with random weights."""
    folder = tmp_path_factory.mktemp("network")
    net = ScoreNet.ncsnv2(1, 28, width=4, schedule=NoiseSchedule.geometric(10, 0.01, 20))
    net.sampler_settings = SamplerSettings(levels=5, consistent=True)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with random pictures in the binary file layout of CIFAR-10."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (20, 3073)).astype(np.uint8)
    rows[:, 0] %= 10
    data = tmp_path_factory.mktemp("cifar10")
    folder = data / "cifar-10-batches-bin"
    folder.mkdir()
    rows[:10].tofile(folder / "data_batch_1.bin")
    rows[10:].tofile(folder / "data_batch_2.bin")
    rows[:8].tofile(folder / "test_batch.bin")
    return data


# -- Data


def test_digits_are_equal_from_every_file_layout(digits, tmp_path, example):
    load_digits = example("mnist").load_digits
    images, labels = load_digits(digits, "train")
    assert images.shape == (256, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (256,) and labels.dtype == torch.int64
    archive = tmp_path / "archive"
    archive.mkdir()
    np.savez(archive / "mnist_train.npz", images=images[:, 0].numpy(), labels=labels.numpy())

    # PNG pictures of up to 100 digits each, 10 per row.
    blob, ends = b"", []
    for begin in range(0, 256, 100):
        tiles = np.zeros((100, 28, 28), np.uint8)
        part = images[begin : begin + 100, 0].numpy()
        tiles[: len(part)] = part
        path = tmp_path / "tiles.png"
        Image.fromarray(tiles.reshape(10, 10, 28, 28).swapaxes(1, 2).reshape(280, 280)).save(path)
        blob += path.read_bytes()
        ends.append(len(blob))
    mosaic = tmp_path / "mosaic"
    mosaic.mkdir()
    np.savez(
        mosaic / "mnist_train.npz",
        blob=np.frombuffer(blob, np.uint8),
        ends=ends,
        shape=(256, 28, 28, 1),
        per=100,
        cols=10,
        labels=labels.numpy(),
    )
    for folder in (archive, mosaic):
        found = load_digits(folder, "train")
        assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    with pytest.raises(FileNotFoundError, match=r"neither t10k-images-idx3-ubyte nor mnist_test\.npz"):
        load_digits(mosaic, "test")


def test_original_files_of_digits_are_preferred(digits, tmp_path, example):
    load_digits = example("mnist").load_digits
    (tmp_path / "MNIST").symlink_to(digits / "MNIST" / "raw")
    np.savez(tmp_path / "mnist_train.npz", images=np.zeros((1, 28, 28), np.uint8), labels=np.zeros(1))
    assert torch.equal(load_digits(tmp_path / "MNIST", "train")[0], load_digits(digits, "train")[0])


def test_cifar10_images_are_equal_from_every_file_layout(tmp_path, example):
    load_images = example("cifar10").load_images
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
    labels = random.integers(0, 10, 30).astype(np.uint8)
    binary = tmp_path / "binary"
    binary.mkdir()
    rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(30, -1)], 1)
    rows[:20].tofile(binary / "data_batch_1.bin")
    rows[20:].tofile(binary / "data_batch_2.bin")
    plain = tmp_path / "plain"
    plain.mkdir()
    np.savez(plain / "cifar10_train.npz", images=images, labels=labels)
    # One PNG picture of 30 images, 5 per row.
    mosaic = tmp_path / "mosaic"
    mosaic.mkdir()
    Image.fromarray(images.reshape(6, 5, 32, 32, 3).swapaxes(1, 2).reshape(192, 160, 3)).save(mosaic / "tiles.png")
    blob = np.frombuffer((mosaic / "tiles.png").read_bytes(), np.uint8)
    np.savez(
        mosaic / "cifar10_train.npz", blob=blob, ends=[len(blob)], shape=images.shape, per=30, cols=5, labels=labels
    )
    for folder in (binary, plain, mosaic):
        found = load_images(folder, "train")
        assert found[0].dtype == torch.uint8 and found[1].dtype == torch.int64
        assert np.array_equal(found[0].permute(0, 2, 3, 1).numpy(), images)
        assert np.array_equal(found[1].numpy(), labels)
    with pytest.raises(FileNotFoundError, match=r"neither test_batch\.bin nor cifar10_test\.npz"):
        load_images(mosaic, "test")


@pytest.mark.parametrize(("module", "function"), [("mnist", "load_digits"), ("cifar10", "load_images")])
def test_without_a_folder_and_torchvision_the_error_names_both(module, function, example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"Pass --data, a folder with .* or pip install torchvision"):
        getattr(example(module), function)(None, "train")


# -- Figures


@pytest.mark.slow
def test_classifier_learns_and_is_saved(example, tmp_path):
    module = example("digit_classifier")
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (256,), generator=rng)
    patterns = torch.randint(2, (10, 1, 7, 7), generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = (255 * patterns[labels]).to(torch.uint8)
    with torch.random.fork_rng():
        classifier = module.train_classifier(images, labels, epochs=20)
    assert (module.classify(classifier, images) == labels).float().mean() > 0.9
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    again = module.load_classifier(tmp_path / "classifier.pt", None)
    assert torch.equal(module.classify(again, images), module.classify(classifier, images))
    features, logits = as_extractor(again).extract(images)
    assert features.shape == (256, 128) and torch.equal(logits.argmax(1), module.classify(again, images))


@pytest.mark.slow
def test_evaluate_mnist_prints_its_figures(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--n", 2, "--out", tmp_path)
    with pytest.warns(UserWarning, match="covariance of 2 features of 128 dimensions is singular"):
        printed = program("evaluate_mnist", "--model", network, *options)
    assert "the classifier's accuracy on the test digits is " in printed and "| held-out images |" in printed
    names = ("Fréchet distance ↓", "share over 0.9 confident", "share of the rarest class", "standard deviation")
    assert all(f"| {name} |" in printed for name in names)
    assert printed.splitlines()[-1].startswith("shares of the digits from 0 to 9: ")
    assert {"evaluation.md", "samples.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_evaluate_restoration_prints_its_figures(tmp_path, digits, classifier, network, program):
    out = tmp_path / "pictures"
    options = ("--n", 3, "--levels", 3, "--out", out, "--classifier", classifier, "--tasks", "pool 4", "jpeg 5")
    printed = program("evaluate_restoration", "--data", digits, "--model", network, *options)
    assert printed.count("input") == 2 and printed.count("replace") == 2
    assert sorted(path.parent.name for path in out.glob("*/restored.png")) == ["jpeg 5-replace", "pool 4-replace"]


@pytest.mark.slow
def test_tune_mnist_prints_a_line_per_setting(digits, classifier, network, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--n", 2, "--only", 9)
    with pytest.warns(UserWarning, match="is singular"):
        printed = program("tune_mnist", *options)
    head, line, data = printed.splitlines()
    assert "   9     50     1 0.300 consistent    50 |" in line and "test digits |" in data and "frechet" in head


def test_every_setting_of_tune_mnist_creates_a_sampler(example):
    samplers = list(example("tune_mnist").samplers(ScoreNet.from_pretrained("mnist")))
    assert len(samplers) == len(example("tune_mnist").SETTINGS)
    assert {sampler.consistent for _, sampler in samplers} == {True, False}


@pytest.mark.slow
def test_quality_benchmark_runs(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--out", tmp_path)
    with pytest.warns(UserWarning, match="is singular"):
        printed = program("quality", "--smoke", *options)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [20, 39, 20, 20, 20, 20, 20, 20, 39, 39]
    assert all(f"{row['family']:<25}" in printed for row in rows) and "best within 250 calls: " in printed
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.slow
def test_precision_benchmark_runs(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--out", tmp_path)
    with pytest.warns(UserWarning, match="is singular"):
        program("precision", "--smoke", *options)
    same, other = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert same["rms difference"] < other["rms difference"]


# -- Training


def _lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_mnist_trains_and_continues_from_trained_weights(digits, tmp_path, program):
    run = tmp_path / "run"
    assert "D/2 = 392" in program("train_mnist", "--smoke", "--data", digits, "--out", run)
    assert [path.name for path in (run / "samples").iterdir()] == ["000000032.png"]
    assert [300 < line["test loss"] < 500 for line in _lines(run) if "test loss" in line] == [True]
    settings = ScoreNet.from_pretrained(run / "network").sampler_settings
    assert settings.options["levels"] == 100 and settings.options["consistent"]
    before = (run / "network" / "model.safetensors").read_bytes()
    program("train_mnist", "--smoke", "--data", digits, "--out", run)  # the same command again: nothing is left to do
    assert (run / "network" / "model.safetensors").read_bytes() == before
    program("train_mnist", "--smoke", "--data", digits, "--out", tmp_path / "more", "--start", run / "network")
    stored = json.loads((tmp_path / "more" / "config.json").read_text())["settings"]
    assert stored["start"] == str(run / "network") and stored["augment"] == []
    assert (tmp_path / "more" / "network" / "model.safetensors").read_bytes() != before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the covariance of:UserWarning")
def test_incomplete_digits_are_compared_with_clean_ones(digits, tmp_path, program):
    printed = program("incomplete_digits", "--smoke", "--data", digits, "--out", tmp_path / "run")
    assert "| 0 (Gaussian) |" in printed and printed.count("Fréchet") == 2


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "ddpm"])
def test_train_mnist_trains_other_networks(digits, tmp_path, network, program):
    program("train_mnist", "--smoke", "--data", digits, "--out", tmp_path / "run", "--network", network)
    net = ScoreNet.from_pretrained(tmp_path / "run" / "network")
    assert net.config["family"] == "unet"
    assert net.precondition == ("karras" if network == "unet" else "ddpm")


@pytest.mark.slow
def test_train_cifar10_and_tune_cifar10_run(images, tmp_path, program):
    program("train_cifar10", "--smoke", "--data", images, "--out", tmp_path / "run")
    assert len([line for line in _lines(tmp_path / "run") if "test loss" in line]) == 2
    network = tmp_path / "run" / "network"
    net = ScoreNet.from_pretrained(network)
    assert net.sample_shape == (3, 32, 32) and len(net.schedule) == 1000
    options = ("--data", images, "--n", 4)
    lines = program(
        "tune_cifar10", *options, "--model", network, "--only", 0, 10, "--out", tmp_path / "pictures"
    ).splitlines()
    assert len(lines) == 4 and "Heun    35 |" in lines[1] and "50     1 0.300 consistent    50 |" in lines[2]
    assert (tmp_path / "pictures" / "settings-10.png").exists()
    with pytest.warns(UserWarning, match="16 features of 48 dimensions is singular"):
        exact = program("tune_cifar10", *options, "--model", "gaussian", "--smoke", "--only", 0).splitlines()
    assert len(exact) == 3 and "Heun    35 |" in exact[1] and "exact samples" in exact[2]


# -- Restoration


@pytest.mark.slow
def test_restore_does_every_operator(tmp_path, program):
    ScoreNet.ncsnv2(3, 16, width=4).save_pretrained(tmp_path / "network")
    save_image(torch.rand(3, 16, 16), tmp_path / "pictures" / "a.png")
    options = ("--model", tmp_path / "network", "--levels", 3, "-n", 2, "--out", tmp_path / "out")
    printed = program("restore", tmp_path / "pictures", *options)
    assert [line.split(": rmse")[0] for line in printed.splitlines()] == [
        f"a, {operator}" for operator in ("hole", "half", "gray", "pool:4", "jpeg:5")
    ]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5 * 3
    with Image.open(tmp_path / "out" / "a-pool4-strip.png") as strip:
        assert strip.size == (4 * 18 + 2, 20)


def test_restore_with_a_conditional_network(tmp_path, program):
    net = ScoreNet.unet(3, 16, widths=(4, 8), layers_per_block=1, condition_channels=3)
    net.save_pretrained(tmp_path / "network")
    save_image(torch.rand(3, 16, 16), tmp_path / "a.png")
    options = ("--model", tmp_path / "network", "--levels", 3, "-n", 1, "--out", tmp_path / "out")
    printed = program("restore", tmp_path / "a.png", *options, "--operators", "hole", "jpeg:5")
    assert len(printed.splitlines()) == 2


@pytest.mark.slow
def test_faces_writes_its_pictures(tmp_path, program):
    program("faces", "--levels", 3, "-n", 1, "--out", tmp_path)
    pictures = ("networks/celeba-small.png", "faces.png", "networks/palette-celeba.png")
    samples, faces, palette = (read_image(tmp_path / picture, 3) for picture in pictures)
    # Grids of 40 samples, of five rows and of four double rows, with two pixels between images and around them.
    assert [tuple(picture.shape[1:]) for picture in (samples, faces, palette)] == [(266, 662), (332, 200), (266, 398)]
    for column, sample in [(faces[..., 132:], 0), (palette[..., 132:], 0), (palette[..., 330:], 1)]:  # the originals
        assert torch.equal(column[:, 2:66, 2:66], samples[:, 2:66, 66 * sample + 2 : 66 * sample + 66])


@pytest.mark.slow
def test_palette_trains_and_writes_its_figures(digits, classifier, tmp_path, program):
    run = tmp_path / "run"
    arguments = ("--smoke", "--data", digits, "--out", run, "--classifier", classifier)
    program("palette", *arguments)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["000000016.png", "000000032.png"]
    with Image.open(run / "strip.png") as strip:
        assert strip.size == (10 * 30 + 2, 8 * 30 + 2)  # 4 tasks of 4 images; 2 images of 5 pictures per row
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert "JPEGRestoration(5, 30)" in settings["condition"] and settings["augment"] == []
    net = ScoreNet.from_pretrained(run / "network")
    assert net.conditioning.channels == 3 and net.sample_shape == (3, 28, 28)
    figures = (run / "figures.csv").read_text()
    rows = list(csv.DictReader(figures.splitlines()))
    assert [row["task"] for row in rows] == ["gray", "hole", "half", "jpeg"]
    for row in rows:
        assert sum(float(row[f"original color {i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-3)
        assert float(row["diversity"]) > 0
    assert float(rows[1]["consistency"]) == float(rows[2]["consistency"]) == 0
    program("palette", *arguments, "--evaluate")
    assert (run / "figures.csv").read_text() == figures


@pytest.mark.slow
def test_palette_trains_a_regression_on_one_task_with_power_1(digits, classifier, tmp_path, program):
    """A regression gives the same result each time."""
    run = tmp_path / "run"
    arguments = ("--smoke", "--data", digits, "--out", run, "--classifier", classifier)
    program("palette", *arguments, "--p", 1, "--tasks", "jpeg", "--regression")
    assert len(ScoreNet.from_pretrained(run / "network").schedule) == 1
    (row,) = csv.DictReader((run / "figures.csv").read_text().splitlines())
    assert row["task"] == "jpeg" and float(row["diversity"]) == 0


@pytest.mark.slow
def test_palette_trains_on_cifar10(images, tmp_path, program):
    options = ("--images", "cifar10", "--data", images, "--out", tmp_path / "run", "--tasks", "half")
    program("palette", "--smoke", *options)
    assert ScoreNet.from_pretrained(tmp_path / "run" / "network").sample_shape == (3, 32, 32)
    assert "accuracy" not in (tmp_path / "run" / "figures.csv").read_text()


@pytest.mark.slow
def test_colored_digits_have_equal_luma_and_the_shares_of_the_colors(example):
    palette = example("palette")
    white = torch.full((3000, 1, 28, 28), 255, dtype=torch.uint8)
    x = palette.colored(white, seed=0)
    gray = palette.Grayscale().measure(x)
    torch.testing.assert_close(gray, torch.full_like(gray, 0.4))
    assert x.min() >= 0 and x.max() <= 1
    for share, expected in zip(palette.color_shares(x), (0.5, 0.3, 0.2), strict=True):
        assert abs(share - expected) < 4 * 0.5 / 3000**0.5
    # The nearest color is found even if the colors are slightly different and half as bright.
    assert palette.color_shares(x / 2 + 0.01) == palette.color_shares(x)


@pytest.mark.slow
def test_toy_writes_its_pictures(tmp_path, program):
    printed = program("toy", "--smoke", "--out", tmp_path)
    assert "annealed Langevin: " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "samples.png"}


# -- As programs


PROGRAMS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if "def main" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_have_help(name, example, capsys):
    with pytest.raises(SystemExit) as ended:
        example(name).main(["--help"])
    assert ended.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "train_mnist.py --smoke --data DIGITS --out train",
        "tune_mnist.py --data DIGITS --classifier CLASSIFIER --n 2 --only 9",
        "restore.py a.png --out restored --levels 3 -n 1 --operators pool:4",
    ],
    ids=lambda arguments: arguments.split(".")[0],
)
def test_programs_run_in_a_process_of_their_own(arguments, digits, classifier, tmp_path):
    save_image(torch.rand(1, 28, 28), tmp_path / "a.png")
    arguments = arguments.replace("DIGITS", str(digits)).replace("CLASSIFIER", str(classifier)).split()
    python(EXAMPLES / arguments[0], *arguments[1:], cwd=tmp_path)


# -- Simulations, signals and fields


def test_simulators_have_the_posteriors_that_they_name(example):
    simulators = example("simulators")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("two-moons", "gaussian-linear"):
            task = simulators.TASKS[name]
            theta = simulators.prior(task, 200)
            pairs = zip(theta, task.simulate(theta), strict=True)
            ranks = torch.stack([(task.posterior(x, 100) < truth).double().mean(0) for truth, x in pairs])
            assert float((ranks.mean(0) - 0.5).abs().max()) < 4 / math.sqrt(12 * 200)
            assert float((ranks.std(0) - 1 / math.sqrt(12)).abs().max()) < 0.06
        theta = torch.tensor([[0.7, -1.0, 1.5, -0.8, 0.4]])
        x = simulators.TASKS["slcp"].simulate(theta)[0]
        s1, s2, r = 1.5**2, 0.8**2, math.tanh(0.4)
        covariance = torch.tensor([[s1**2, r * s1 * s2], [r * s1 * s2, s2**2]])
        normal = torch.distributions.MultivariateNormal(theta[0, :2], covariance)
        expected = normal.log_prob(x.view(4, 2)).sum() + 4 * math.log(2 * math.pi)
        assert float(simulators.TASKS["slcp"].log_likelihood(theta, x)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_simulation_based_inference_compares_with_the_true_posterior(tmp_path, program):
    printed = program("simulation_based_inference", "--smoke", "--out", tmp_path, "--tasks", "two-moons")
    assert "two-moons: C2ST 0." in printed and (tmp_path / "two-moons.png").exists()


@pytest.mark.slow
def test_volumes_are_drawn_and_restored(tmp_path, program):
    printed = program("volumes", "--smoke", "--out", tmp_path)
    assert (
        printed.count("spectrum") == 2 and "exact draws, in the gap" in printed and (tmp_path / "volumes.png").exists()
    )


@pytest.mark.slow
def test_data_assimilation_compares_with_particles(tmp_path, program):
    printed = program("data_assimilation", "--smoke", "--out", tmp_path)
    assert "of the particles; distance of the means: " in printed and (tmp_path / "lorenz.png").exists()


@pytest.mark.slow
def test_random_fields_have_spectra_and_gaps(tmp_path, program):
    printed = program("random_fields", "--smoke", "--out", tmp_path)
    assert printed.count("spectrum") == 3 and "gap: rmse" in printed and "means: rmse" in printed
    assert (tmp_path / "fields.png").exists()
