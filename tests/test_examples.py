"""The examples run at their smallest size, in this process; in the slow tier, also as programs."""

import csv
import gzip
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet
from scorematch.images import save_image
from scorematch.sampling import SamplerSettings
from tests.helpers import python

ROOT = Path(__file__).parents[1]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the examples, or of the benchmarks that build on them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def program(example, capsys):
    """Runs the main function of a module, and returns what it prints."""

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
    """A folder like that of MNIST, with noise in place of digits."""
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
    """The file of a classifier that is not trained."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(EXAMPLES)
        torch.manual_seed(0)
        torch.save(importlib.import_module("evaluate_mnist").Classifier().state_dict(), path)
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
    """Random pictures in the files of the binary version of CIFAR-10."""
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


def test_every_layout_of_digits_gives_the_same(digits, tmp_path, example):
    load_digits = example("mnist").load_digits
    images, labels = load_digits(digits, "train")
    assert images.shape == (256, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (256,) and labels.dtype == torch.int64
    archive = tmp_path / "archive"
    archive.mkdir()
    np.savez(archive / "mnist_train.npz", images=images[:, 0].numpy(), labels=labels.numpy())

    # Pictures of 100 digits, 10 per row, the last one not full.
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


def test_the_original_files_of_digits_are_preferred(digits, tmp_path, example):
    load_digits = example("mnist").load_digits
    (tmp_path / "MNIST").symlink_to(digits / "MNIST" / "raw")
    np.savez(tmp_path / "mnist_train.npz", images=np.zeros((1, 28, 28), np.uint8), labels=np.zeros(1))
    assert torch.equal(load_digits(tmp_path / "MNIST", "train")[0], load_digits(digits, "train")[0])


def test_every_layout_of_cifar10_gives_the_same(tmp_path, example):
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
    # One picture of 30 images, 5 per row, lossless.
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
def test_without_a_folder_torchvision_is_needed(module, function, example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"Pass --data, a folder with .* or pip install torchvision"):
        getattr(example(module), function)(None, "train")


# -- Figures


def test_frechet_distance_of_two_gaussians(example):
    """|m_a - m_b|^2 + sum (sqrt(v_a) - sqrt(v_b))^2 for covariances with common axes."""
    frechet_distance = example("evaluate_mnist").frechet_distance
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5000, 4, generator=rng, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).T)  # exactly white
    axes, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))
    a = z * torch.tensor([1.0, 2.0, 3.0, 0.0]) @ axes.T
    b = z * torch.tensor([2.0, 2.0, 0.5, 1.0]) @ axes.T + 0.5
    assert frechet_distance(a, b) == pytest.approx(4 * 0.25 + 1 + 0 + 2.5**2 + 1, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_classifier_learns_and_is_saved(example, tmp_path):
    evaluate = example("evaluate_mnist")
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (256,), generator=rng)
    patterns = torch.randint(2, (10, 1, 7, 7), generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = (255 * patterns[labels]).to(torch.uint8)
    with torch.random.fork_rng():
        classifier = evaluate.train_classifier(images, labels, epochs=20)
    assert evaluate.accuracy(classifier, images.float() / 255, labels) > 0.9
    probabilities, features = evaluate.classify(classifier, images.float() / 255)
    assert features.shape == (256, 128)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    again = evaluate.load_classifier(tmp_path / "classifier.pt", None)
    torch.testing.assert_close(evaluate.classify(again, images.float() / 255)[0], probabilities, rtol=1e-3, atol=1e-5)


def test_evaluation_of_digits(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--n", 2, "--picture", tmp_path / "digits.png")
    printed = program("evaluate_mnist", "--model", network, *options)
    assert "the classifier's accuracy on the test digits is " in printed and "2 test digits" in printed
    assert all(f"{name} " in printed for name in ("confident", "rarest", "frechet", "pixel std", "share of 9"))
    assert (tmp_path / "digits.png").exists()


def test_evaluation_of_restoration(tmp_path, digits, classifier, network, program):
    out = tmp_path / "pictures"
    options = ("--n", 3, "--levels", 3, "--out", out, "--classifier", classifier, "--tasks", "pool 4", "jpeg 5")
    printed = program("evaluate_restoration", "--data", digits, "--model", network, *options)
    assert printed.count("input") == 2 and printed.count("replace") == 2
    assert sorted(path.name for path in out.iterdir()) == ["jpeg 5-replace.png", "pool 4-replace.png"]


@pytest.mark.slow
def test_settings_of_digits(digits, classifier, network, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--n", 2, "--only", 9)
    printed = program("tune_mnist", *options)
    head, line, data = printed.splitlines()
    assert "   9     50     1 0.300 consistent    50 |" in line and "test digits |" in data and "frechet" in head


def test_every_setting_of_digits_is_a_sampler(example):
    samplers = list(example("tune_mnist").samplers(ScoreNet.from_pretrained("mnist")))
    assert len(samplers) == len(example("tune_mnist").SETTINGS)
    assert {sampler.consistent for _, sampler in samplers} == {True, False}


@pytest.mark.slow
def test_quality_against_calls(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--out", tmp_path)
    printed = program("quality", "--smoke", *options)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [20, 39, 20, 20, 20, 20, 20, 20, 39, 39]
    assert all(f"{row['family']:<25}" in printed for row in rows) and "best within 250 calls: " in printed
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.slow
def test_precision(digits, classifier, network, tmp_path, program):
    options = ("--data", digits, "--classifier", classifier, "--model", network, "--out", tmp_path)
    program("precision", "--smoke", *options)
    same, other = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert same["rms difference"] < other["rms difference"]


# -- Training


@pytest.mark.slow
def test_training_stops_and_continues_with_the_same_bits(digits, tmp_path, program):
    """On a CPU. The third part finds nothing left to do."""
    for name, stops in [("whole", [4]), ("parts", [2, 4, 4])]:
        for stop in stops:
            run = tmp_path / name
            options = ("--smoke", "--device", "cpu", "--data", digits, "--out", run, "--stop-at", stop)
            printed = program("train_mnist", *options)
            assert "D/2 = 392" in printed
    assert "continues at step 4 of 4" in printed
    assert sorted(path.name for path in run.glob("*.png")) == ["samples-000002.png", "samples-000004.png"]
    assert len((run / "log.csv").read_text().splitlines()) == 3
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("net", "averaged"):
        assert all(torch.equal(a, b) for a, b in zip(whole[part].values(), parts[part].values(), strict=True))
    settings = ScoreNet.from_pretrained(run / "network").sampler_settings
    assert settings.levels == 100 and settings.consistent


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "ddpm"])
def test_other_networks_train_too(digits, tmp_path, network, program):
    program("train_mnist", "--smoke", "--data", digits, "--out", tmp_path / "run", "--network", network)
    net = ScoreNet.from_pretrained(tmp_path / "run" / "network")
    assert net.config["family"] == "unet"
    assert net.precondition == ("karras" if network == "unet" else "ddpm")


def test_training_levels_are_float32_and_in_range(example):
    """Also where the schedule has float64 levels, which not every device has."""
    training = example("training")
    schedule = ScoreNet.from_pretrained("mnist").schedule
    with torch.random.fork_rng():
        torch.manual_seed(0)
        levels = training.draw_levels(2001, schedule, torch.device("cpu"), center=0.5)
    assert levels.dtype == torch.float32 and levels.shape == (2001,)
    assert levels.min() >= schedule.sigma_min * (1 - 1e-6) and levels.max() <= schedule.sigma_max * (1 + 1e-6)
    assert torch.isin(levels[::2], schedule.sigmas.float()).all()
    # log(sigma / 0.5) is standard normal, but for the clamp beyond 3.5 deviations: its mean has this standard error
    assert abs((levels[1::2] / 0.5).log().mean()) < 4 / 1000**0.5


def test_weighting_is_that_of_the_backbones_error(example):
    """c_out of the row "karras" is sigma_data / sqrt(sigma_data^2 + sigma^2) / sigma, times 1 / sigma_data."""
    sigma = torch.tensor([0.01, 0.25, 30.0])
    expected = sigma**2 * (1 + (sigma / 0.25) ** 2)
    training = example("training")
    torch.testing.assert_close(training.weighting(sigma), expected)
    torch.testing.assert_close(training.weighting(sigma, p=1), expected.sqrt())


@pytest.mark.slow
def test_a_network_of_cifar10_and_its_settings(images, tmp_path, program):
    program("train_cifar10", "--smoke", "--data", images, "--out", tmp_path / "run")
    network = tmp_path / "run" / "network"
    net = ScoreNet.from_pretrained(network)
    assert net.sample_shape == (3, 32, 32) and len(net.schedule) == 1000
    options = ("--data", images, "--n", 4)
    lines = program(
        "tune_cifar10", *options, "--model", network, "--only", 0, 10, "--out", tmp_path / "pictures"
    ).splitlines()
    assert len(lines) == 4 and "Heun    35 |" in lines[1] and "50     1 0.300 consistent    50 |" in lines[2]
    assert (tmp_path / "pictures" / "settings-10.png").exists()
    exact = program("tune_cifar10", *options, "--model", "gaussian", "--smoke", "--only", 0).splitlines()
    assert len(exact) == 3 and "Heun    35 |" in exact[1] and "exact samples" in exact[2]


# -- Restoration


def test_restore(tmp_path, program):
    ScoreNet.ncsnv2(3, 16, width=4).save_pretrained(tmp_path / "network")
    save_image(torch.rand(3, 16, 16), tmp_path / "pictures" / "a.png")
    options = ("--model", tmp_path / "network", "--levels", 3, "-n", 2, "--out", tmp_path / "out")
    printed = program("restore", tmp_path / "pictures", *options)
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        f"a, {task}" for task in ("inpaint", "uncrop", "colorize", "pool", "jpeg")
    ]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5 * 3
    with Image.open(tmp_path / "out" / "a-pool-strip.png") as strip:
        assert strip.size == (4 * 18 + 2, 20)


def test_restore_with_a_network_that_takes_a_condition(tmp_path, program):
    net = ScoreNet.unet(3, 16, widths=(4, 8), layers_per_block=1, condition_channels=3)
    net.save_pretrained(tmp_path / "network")
    save_image(torch.rand(3, 16, 16), tmp_path / "a.png")
    options = ("--model", tmp_path / "network", "--levels", 3, "-n", 1, "--out", tmp_path / "out")
    printed = program("restore", tmp_path / "a.png", *options, "--tasks", "inpaint", "jpeg")
    assert len(printed.splitlines()) == 2


@pytest.mark.slow
def test_palette_trains_continues_and_gives_its_figures(digits, classifier, tmp_path, program):
    run = tmp_path / "run"
    arguments = ("--smoke", "--device", "cpu", "--data", digits, "--out", run, "--classifier", classifier)
    program("palette", *arguments, "--stop-at", 2)
    assert not (run / "figures.csv").exists()
    assert "continues at step 2 of 4" in program("palette", *arguments)
    assert sorted(path.name for path in run.glob("*.png")) == ["strip-000002.png", "strip-000004.png"]
    net = ScoreNet.from_pretrained(run / "network")
    assert net.conditioning.channels == 3 and net.sample_shape == (3, 28, 28)
    figures = (run / "figures.csv").read_text()
    rows = list(csv.DictReader(figures.splitlines()))
    assert [row["task"] for row in rows] == ["colorization", "inpainting", "uncropping", "jpeg"]
    for row in rows:
        assert sum(float(row[f"original color {i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-3)
        assert float(row["diversity"]) > 0
    assert float(rows[1]["consistency"]) == float(rows[2]["consistency"]) == 0
    program("palette", *arguments, "--evaluate")
    assert (run / "figures.csv").read_text() == figures


@pytest.mark.slow
def test_one_task_of_palette_with_power_1_as_a_regression(digits, classifier, tmp_path, program):
    """A regression gives the same answer each time."""
    run = tmp_path / "run"
    arguments = ("--smoke", "--data", digits, "--out", run, "--classifier", classifier)
    program("palette", *arguments, "--p", 1, "--tasks", "jpeg", "--regression")
    assert len(ScoreNet.from_pretrained(run / "network").schedule) == 1
    (row,) = csv.DictReader((run / "figures.csv").read_text().splitlines())
    assert row["task"] == "jpeg" and float(row["diversity"]) == 0


@pytest.mark.slow
def test_palette_on_cifar10(images, tmp_path, program):
    options = ("--images", "cifar10", "--data", images, "--out", tmp_path / "run", "--tasks", "uncropping")
    program("palette", "--smoke", *options)
    assert ScoreNet.from_pretrained(tmp_path / "run" / "network").sample_shape == (3, 32, 32)
    assert "accuracy" not in (tmp_path / "run" / "figures.csv").read_text()


def test_colors_have_one_luma_and_their_shares(example):
    palette = example("palette")
    white = torch.full((3000, 1, 28, 28), 255, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = palette.colored(white)
    gray = palette.Grayscale().measure(x)
    torch.testing.assert_close(gray, torch.full_like(gray, 0.4))
    assert x.min() >= 0 and x.max() <= 1
    for share, expected in zip(palette.color_shares(x), (0.5, 0.3, 0.2), strict=True):
        assert abs(share - expected) < 4 * 0.5 / 3000**0.5
    # A little off in color and half as bright: still the nearest.
    assert palette.color_shares(x / 2 + 0.01) == palette.color_shares(x)


@pytest.mark.slow
def test_toy(tmp_path, program):
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
        "restore.py a.png --out restored --levels 3 -n 1 --tasks pool",
    ],
    ids=lambda arguments: arguments.split(".")[0],
)
def test_programs_run(arguments, digits, classifier, tmp_path):
    save_image(torch.rand(1, 28, 28), tmp_path / "a.png")
    arguments = arguments.replace("DIGITS", str(digits)).replace("CLASSIFIER", str(classifier)).split()
    python(EXAMPLES / arguments[0], *arguments[1:], cwd=tmp_path)
