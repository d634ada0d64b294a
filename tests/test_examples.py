"""The examples run, at their smallest size."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import ScoreNet
from scorematch.images import save_image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the examples."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        sys.modules.pop(name, None)
        return __import__(name)

    return load


def _run(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _write_idx(path, array, compressed):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compressed else data)


@pytest.fixture
def digits(tmp_path):
    """A folder like MNIST's own, with noise for digits."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        compressed = split == "train"
        ending = ".gz" if compressed else ""
        _write_idx(folder / f"{split}-images-idx3-ubyte{ending}", random.integers(0, 256, (256, 28, 28)), compressed)
        _write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", random.integers(0, 10, 256), compressed)
    return tmp_path / "data"


def test_toy(tmp_path):
    said = _run("toy.py", "--smoke", "--out", tmp_path)
    assert "annealed Langevin: " in said
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "samples.png"}


def test_training_stops_and_goes_on(digits, tmp_path):
    run = tmp_path / "run"
    said = _run("train_mnist.py", "--smoke", "--data", digits, "--out", run)
    assert "D/2 = 392" in said and "goes on" not in said
    assert sorted(path.name for path in run.glob("*.png")) == ["samples-000002.png", "samples-000004.png"]
    weights = (run / "network" / "model.safetensors").read_bytes()
    assert "goes on at step 4 of 4" in _run("train_mnist.py", "--smoke", "--data", digits, "--out", run)
    assert (run / "network" / "model.safetensors").read_bytes() == weights
    assert len((run / "log.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("network", ["unet", "ddpm"])
def test_other_networks_train_too(digits, tmp_path, network):
    _run("train_mnist.py", "--smoke", "--data", digits, "--out", tmp_path / "run", "--network", network)
    net = ScoreNet.from_pretrained(tmp_path / "run" / "network")
    assert net.config["family"] == "unet"
    assert net.precondition == ("karras" if network == "unet" else "ddpm")


def test_a_run_that_was_stopped_ends_like_one_that_was_not(digits, tmp_path):
    for name, stops in [("whole", [4]), ("parts", [2, 4])]:
        for stop in stops:
            _run("train_mnist.py", "--smoke", "--data", digits, "--out", tmp_path / name, "--stop-at", stop)
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole["net"].values(), parts["net"].values(), strict=True))


def test_every_layout_of_digits_gives_the_same(digits, tmp_path, example):
    load_digits = example("mnist").load_digits
    images, labels = load_digits(digits, "train")
    assert images.shape == (256, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (256,) and labels.dtype == torch.int64
    np.savez(tmp_path / "mnist_train.npz", images=images[:, 0].numpy(), labels=labels.numpy())
    again = load_digits(tmp_path, "train")  # the original files, found first, at any depth
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "mnist_train.npz").rename(archive / "mnist_train.npz")
    for found in (again, load_digits(archive, "train")):
        assert torch.equal(found[0], images) and torch.equal(found[1], labels)

    # Pictures of 100 digits, 10 a row, the last one not full.
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
    found = load_digits(mosaic, "train")
    assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    with pytest.raises(FileNotFoundError, match=r"neither t10k-images-idx3-ubyte nor mnist_test\.npz"):
        load_digits(mosaic, "test")


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


def test_classifier_learns_and_is_kept(example, tmp_path):
    evaluate = example("evaluate_mnist")
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1024,), generator=rng)
    patterns = torch.randint(2, (10, 1, 7, 7), generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = (255 * patterns[labels]).to(torch.uint8)
    classifier = evaluate.train_classifier(images, labels, epochs=12)
    probabilities, features = evaluate.read(classifier, images.float() / 255)
    assert (probabilities.argmax(1) == labels).float().mean() > 0.9
    assert features.shape == (1024, 128)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    again = evaluate.load_classifier(tmp_path / "classifier.pt", None)
    torch.testing.assert_close(evaluate.read(again, images.float() / 255)[0], probabilities, rtol=1e-3, atol=1e-5)


def test_restore(tmp_path):
    ScoreNet.ncsnv2(3, 16, width=4).save_pretrained(tmp_path / "network")
    save_image(torch.rand(3, 16, 16), tmp_path / "pictures" / "a.png")
    options = ("--model", tmp_path / "network", "--levels", 3, "-n", 2, "--out", tmp_path / "out")
    said = _run("restore.py", tmp_path / "pictures", *options)
    assert [line.split(":")[0] for line in said.splitlines()] == [
        f"a, {task}" for task in ("inpaint", "uncrop", "colorize", "pool", "jpeg")
    ]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5 * 3
    with Image.open(tmp_path / "out" / "a-pool-strip.png") as strip:
        assert strip.size == (4 * 18 + 2, 20)


def test_evaluate_restoration(tmp_path, digits):
    out, classifier = tmp_path / "pictures", tmp_path / "classifier.pt"
    options = ("--n", 4, "--levels", 3, "--out", out, "--classifier", classifier, "--tasks", "pool 4", "jpeg 5")
    said = _run("evaluate_restoration.py", "--data", digits, *options)
    assert said.count("as it is") == 2 and said.count("replace") == 2
    assert sorted(path.name for path in out.iterdir()) == ["jpeg 5-replace.png", "pool 4-replace.png"]


def test_quality_against_calls(digits, tmp_path):
    said = _run(
        "../benchmarks/quality.py", "--smoke", "--data", digits, "--classifier", tmp_path / "c.pt", "--out", tmp_path
    )
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [21, 39, 20, 20, 20, 20, 20, 20, 39, 39]
    assert all(f"{row['family']:<25}" in said for row in rows) and "best within 250 calls: " in said
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_precision(digits, tmp_path):
    classifier = tmp_path / "c.pt"
    _run("../benchmarks/precision.py", "--smoke", "--data", digits, "--classifier", classifier, "--out", tmp_path)
    same, other = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert same["rms difference"] < other["rms difference"]


def test_palette_trains_goes_on_and_gives_its_figures(digits, tmp_path):
    run = tmp_path / "run"
    arguments = ("--smoke", "--data", digits, "--out", run, "--classifier", tmp_path / "classifier.pt")
    _run("palette.py", *arguments, "--stop-at", 2)
    assert not (run / "figures.csv").exists()
    assert "goes on at step 2 of 4" in _run("palette.py", *arguments)
    assert sorted(path.name for path in run.glob("*.png")) == ["strip-000002.png", "strip-000004.png"]
    net = ScoreNet.from_pretrained(run / "network")
    assert net.config["in_channels"] == 6 and net.sample_shape == (3, 28, 28)
    figures = (run / "figures.csv").read_text()
    rows = list(csv.DictReader(figures.splitlines()))
    assert [row["task"] for row in rows] == ["colorization", "inpainting", "uncropping", "jpeg"]
    for row in rows:
        assert sum(float(row[f"original color {i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-3)
        assert float(row["diversity"]) > 0
    assert float(rows[1]["consistency"]) == float(rows[2]["consistency"]) == 0
    _run("palette.py", *arguments, "--evaluate")
    assert (run / "figures.csv").read_text() == figures


def test_palettes_rivals(digits, tmp_path):
    """One task with p = 1; and a regression, whose answers are all the same."""
    run = tmp_path / "run"
    arguments = ("--smoke", "--data", digits, "--out", run, "--classifier", tmp_path / "classifier.pt")
    _run("palette.py", *arguments, "--p", 1, "--tasks", "jpeg", "--regression")
    assert len(ScoreNet.from_pretrained(run / "network").schedule) == 1
    (row,) = csv.DictReader((run / "figures.csv").read_text().splitlines())
    assert row["task"] == "jpeg" and float(row["diversity"]) == 0


def test_settings_of_digits(digits, tmp_path):
    classifier = tmp_path / "classifier.pt"
    said = _run("tune_mnist.py", "--data", digits, "--classifier", classifier, "--n", 4, "--only", 9)
    head, line, data = said.splitlines()
    assert "   9     50     1 0.300 consistent    50 |" in line and "test digits |" in data and "frechet" in head


@pytest.fixture
def images(tmp_path):
    """Random pictures in the original files of CIFAR-10's binary version."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (20, 3073)).astype(np.uint8)
    rows[:, 0] %= 10
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rows[:10].tofile(folder / "data_batch_1.bin")
    rows[10:].tofile(folder / "data_batch_2.bin")
    rows[:8].tofile(folder / "test_batch.bin")
    return tmp_path / "data"


def test_a_network_of_cifar10_and_its_settings(images, tmp_path):
    _run("train_cifar10.py", "--smoke", "--data", images, "--out", tmp_path / "run")
    network = tmp_path / "run" / "network"
    net = ScoreNet.from_pretrained(network)
    assert net.sample_shape == (3, 32, 32) and len(net.schedule) == 1000
    said = _run("tune_cifar10.py", "--data", images, "--model", network, "--n", 4, "--only", 0, 10, "--out", tmp_path)
    lines = said.splitlines()
    assert len(lines) == 4 and "Heun    35 |" in lines[1] and "50     1 0.300 consistent    50 |" in lines[2]
    assert (tmp_path / "settings-10.png").exists()
    exact = _run("tune_cifar10.py", "--data", images, "--model", "gaussian", "--n", 4, "--only", 0).splitlines()
    assert len(exact) == 3 and "Heun    35 |" in exact[1] and "exact draws" in exact[2]


def test_palette_on_cifar10(images, tmp_path):
    _run("palette.py", "--smoke", "--images", "cifar10", "--data", images, "--out", tmp_path / "run")
    assert ScoreNet.from_pretrained(tmp_path / "run" / "network").sample_shape == (3, 32, 32)
    assert "right" not in (tmp_path / "run" / "figures.csv").read_text()


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
    # One picture of 30 images, 5 a row, lossless.
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


def test_tints_have_one_luma_and_their_shares(example):
    palette = example("palette")
    white = torch.full((3000, 1, 28, 28), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    x = palette.tinted(white)
    gray = palette.Grayscale().measure(x)
    torch.testing.assert_close(gray, torch.full_like(gray, 0.4))
    assert x.min() >= 0 and x.max() <= 1
    for share, expected in zip(palette.color_shares(x), (0.5, 0.3, 0.2), strict=True):
        assert abs(share - expected) < 4 * 0.5 / 3000**0.5
    # A little off in color and half as bright: still the nearest.
    assert palette.color_shares(x / 2 + 0.01) == palette.color_shares(x)
