"""The commands for data that are not pictures."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import ScoreNet
from scorematch.cli import main
from scorematch.data import open_arrays, read_samples
from scorematch.data.plots import save_plot
from scorematch.evaluation import evaluate, exact
from scorematch.nets import Condition
from scorematch.sampling import ODESampler, bulk_samples, recommended_sampler, sample_to
from scorematch.training import network_for
from tests.helpers import refused, seed

QUIET = ("--device", "cpu", "--quiet")


def _data(shape, n=40, scale=30.0, middle=250.0):
    return (middle + scale * torch.randn(n, *shape, generator=seed())).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_plots):
    """A run on vectors (N, 3) with conditions (N, 2), which was started by the command."""
    folder = tmp_path_factory.mktemp("run")
    np.savez(folder / "x.npz", x=_data((3,)), condition=np.random.default_rng(0).random((40, 2)), axes=["run", "value"])
    options = ("--images", "64", "--batch-size", "8", "--precision", "float32", "--sample-every", "64")
    assert main(["train", str(folder / "x.npz"), "--out", str(folder / "run"), *options, *QUIET]) == 0
    return folder / "run"


@pytest.mark.slow
def test_training_chooses_the_network_and_its_conditions(run, capsys):
    net = ScoreNet.from_pretrained(run / "network")
    assert net.sample_shape == (3,) and net.conditioning.vector == 2 and net.units is not None
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["label_drop"] == 0.1 and settings["augment"] == []
    assert "samples/000000064.png" in (run / "report.md").read_text() and (run / "samples/000000064.png").exists()
    assert main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "samples      3, values of any size" in printed and "units        mean 25" in printed
    assert "condition    a vector of 2 values" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("few_levels")
def test_samples_are_written_in_the_units_of_the_data(run, tmp_path, capsys):
    import h5py

    sample = ["sample", str(run), *QUIET]
    assert main([*sample, str(tmp_path / "x.npz"), "-n", "5", "--condition", "0.3,0.7"]) == 0
    printed = capsys.readouterr().out
    assert "5 samples in" in printed and printed.endswith(f"{tmp_path / 'x.npz'}\n")
    written = np.load(tmp_path / "x.npz")
    assert written["axes"].tolist() == ["run", "value"]
    condition = torch.tensor([[0.3, 0.7]])
    sampler = recommended_sampler(ScoreNet.from_pretrained(run))
    (batch,) = bulk_samples(sampler, 5, condition=condition)
    assert np.allclose(written["x"], batch.images.numpy(), rtol=1e-4) and written["x"].dtype == np.float32
    assert np.allclose(written["condition"], condition.expand(5, 2)) and 150 < written["x"].mean() < 350
    assert main([*sample, "--out", str(tmp_path / "y.npy"), "-n", "5", "--condition", str(tmp_path / "x.npz")]) == 0
    assert np.array_equal(np.load(tmp_path / "y.npy"), written["x"])  # one vector for each sample
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["condition"] = written["condition"].astype(">f8")
    command = [*sample, "--out", str(tmp_path / "y.npy"), "--overwrite", "--condition", str(tmp_path / "x.h5")]
    assert main(command) == 0
    assert np.array_equal(np.load(tmp_path / "y.npy"), written["x"])
    capsys.readouterr()
    many = [*sample, "--out", str(tmp_path / "many"), "--condition", "0.3,0.7", "--batch-size", "4"]
    assert main([*many, "-n", "4"]) == main([*many, "-n", "5"]) == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in ("\n4 samples in ", "\n4 of 5 samples exist already\n", "\n1 sample in "))
    assert np.allclose(read_samples(tmp_path / "many", 5), written["x"], rtol=1e-4)
    assert main([*sample, str(tmp_path / "plot.png"), "-n", "5", "--guidance", "2", "--condition", "0.3,0.7"]) == 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.npz", "--condition", "0.3"), r"--condition must have 2 values for each sample.*got shape \(1, 1\)"),
        (("x.npz", "--condition", "-0.3"), r"--condition must have 2 values for each sample.*got shape \(1, 1\)"),
        (("x.npz", "--condition", "-0.3,0,1"), r"--condition must have 2 values for each sample.*got shape \(1, 3\)"),
        (("x.npz", "--condition", "DAMAGED.npy"), "DAMAGED.npy cannot be read as an .npy file"),
        (("x.npz", "--condition", "OTHER.h5"), "OTHER.h5 must have the array condition, but has no condition"),
        (("x.npz", "--condition", "TWO.npy", "-n", "64"), "has 2 samples, but -n is 64. Leave out -n, or write -n 2"),
        (("x.npz", "--condition", "0.3,nan"), r"--condition must be finite, .* the first at \[0, 1\]"),
        (("x.npz", "--condition", "GAPS.nc"), r"--condition must be finite, .* the first at \[1, 0\]"),
        (("x.npz", "--condition", "a"), "--condition must be numbers, such as 0.3,0.7, or a file .* got 'a'"),
        (("x.npz", "--class", "1"), "--class is for class-conditional networks"),
        (("x.npz", "--guidance", "2"), "--guidance needs a condition. Add --condition with 2 values"),
        (("x.txt",), r"the file must end in .npz or .npy, or for a plot in .png.*x\.txt\. Write .*x\.npz, or --out"),
        (("x.png", "--columns", "2"), "--columns is for pictures, and .* draws other data"),
        (("DAMAGED.npy/x.npz",), "cannot be written to: .*DAMAGED.npy is not a folder"),
    ],
)
def test_bad_options_of_sample_are_refused(run, tmp_path, capsys, monkeypatch, arguments, message):
    import h5py

    monkeypatch.chdir(tmp_path)
    np.save("TWO.npy", np.ones((2, 2), np.float32))
    np.save("DAMAGED.npy", np.array([{}]), allow_pickle=True)
    with h5py.File("OTHER.h5", "w") as file:
        file["a"] = file["b"] = np.zeros((2, 2))
    with h5py.File("GAPS.nc", "w") as file:
        file["condition"] = [[0.3, 0.7], [1e20, 0.7]]
        file["condition"].attrs["_FillValue"] = 1e20
    name, *options = arguments
    command = ["sample", str(run), str(tmp_path / name), *options, *QUIET]
    assert re.search(message, refused(command, capsys, unprinted="network calls"))


def test_without_matplotlib_no_samples_are_drawn_for_a_plot(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["sample", str(run), str(tmp_path / "x.png"), *QUIET]
    assert "x.png needs Matplotlib: pip install" in refused(command, capsys, unprinted="network calls")


def test_other_commands_say_that_they_are_for_pictures(run, tmp_path, capsys):
    error = refused(["restore", str(run), str(tmp_path), str(tmp_path / "out"), "--operator", "gray"], capsys)
    assert "must draw images (C, H, W)" in error or "no image" in error
    error = refused(["sample", "mnist", str(tmp_path / "x.png"), "--condition", "1", *QUIET], capsys)
    assert "--condition is for networks that take a vector or an image, and mnist does not. Leave it out." in error


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 8), ("--recipe", "tiny"), r"--recipe is for pictures, and .* has samples of shape \(2, 8\)"),
        ((2, 8), ("--label-drop", "0.1"), "--label-drop is for training on classes with --labels"),
        ((2, 8), ("--labels",), "--labels needs an array of labels in .*, which has none"),
        ((2, 8, 8), ("--augment", "rotate", "flips"), "invalid choice|must be one of"),
        ((1, 2, 2, 2, 2), (), r"samples must be \(D,\), \(C, L\), \(C, H, W\) or \(C, D, H, W\), got shape"),
    ],
)
def test_bad_options_of_train_are_refused(tmp_path, capsys, shape, arguments, message):
    np.save(tmp_path / "x.npy", _data(shape))
    command = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *arguments, *QUIET]
    assert re.search(message, refused(command, capsys))


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 64), (2, 9, 12), (1, 40, 33), (1, 4, 6, 5)])
def test_the_network_for_a_shape_takes_it(shape):
    net = network_for(shape, condition_features=2, padding="circular")
    x = torch.randn(2, *shape, generator=seed())
    with torch.no_grad():
        assert net(x, 0.5).shape == x.shape


def test_the_sampler_of_data_keeps_the_variance_of_all_scales():
    """Along each axis of a Gaussian the flow is linear, and a step only changes the factor."""
    variance = torch.tensor([300.0, 30, 3, 0.3, 0.03, 3e-3]).double()
    net = network_for((6,))
    normal = exact.Gaussian(torch.zeros(6), variance.diag(), schedule=net.schedule)
    sampler = recommended_sampler(normal, net.sampler_settings)
    top = float(sampler.schedule.sigmas[0])
    x = sampler.sample(1, init=(top**2 + variance).sqrt()[None], progress=False)
    torch.testing.assert_close(x[0].double().square(), variance, rtol=0.03, atol=0)


def test_a_folder_of_samples_keeps_the_names_of_axes(tmp_path):
    net = ScoreNet.mlp(2, width=8, depth=1)
    net.axes = ("run", "value")
    images = sample_to(ODESampler(net, levels=2), tmp_path / "many", 3, format="float", progress=False)
    assert open_arrays(images / "000000.npz").axes == ("run", "value")


@pytest.mark.parametrize(("own", "shape"), [((3,), (4,)), ((2, 8), (3, 8)), ((3,), (3, 8))])
def test_a_network_for_other_data_is_no_start(tmp_path, capsys, own, shape):
    network_for(own).save_pretrained(tmp_path / "net")
    np.save(tmp_path / "x.npy", _data(shape))
    command = ["train", str(tmp_path / "x.npy"), "--start", str(tmp_path / "net"), "--out", str(tmp_path / "run")]
    error = refused([*command, *QUIET], capsys)
    assert f"whose samples have the shape {shape}, but {tmp_path / 'net'} is one for the shape {own}. Leave" in error


def test_features_of_pictures_are_not_for_other_data(tmp_path, capsys):
    network_for((3,)).save_pretrained(tmp_path / "net")
    np.save(tmp_path / "x.npy", _data((3,)))
    error = refused(["evaluate", tmp_path / "net", tmp_path / "x.npy", "--features", "pixels", *QUIET], capsys)
    assert "Other data are for sample, restore, evaluate and tune without --restore and --features, and for" in error


def test_a_condition_of_bulk_samples_is_that_of_each_sample():
    def score(x, sigma, condition):
        return (condition - x) / (1e-6 + sigma**2)

    net = network_for((2,), condition_features=2)
    rows = torch.rand(5, 2, generator=seed())
    for given, expected in ((rows, rows), (rows[:1], rows[:1].expand(5, 2))):
        sampler = ODESampler(score, net.schedule, levels=5)
        found = list(bulk_samples(sampler, 5, condition=given, batch_size=2, shape=(2,)))
        assert torch.allclose(torch.cat([batch.images for batch in found]), expected, atol=1e-3)
        assert torch.equal(torch.cat([batch.classes for batch in found]), expected)
    sampler = ODESampler(net, levels=5)
    with pytest.raises(ValueError, match="condition must have one row for all samples, or one for each of 6, got 5"):
        next(bulk_samples(sampler, 6, condition=rows))
    with pytest.raises(ValueError, match=r"takes a vector as its condition, float \(N, 2\), got shape \(5, 1\)"):
        bulk_samples(sampler, 5, condition=rows[:, :1])
    with pytest.raises(ValueError, match="classes and condition cannot be combined"):
        bulk_samples(sampler, 5, condition=rows, classes=1)


@pytest.mark.slow
def test_a_vector_and_an_image_go_together_through_the_commands(tmp_path, capsys):
    vectors, image = np.random.default_rng(0).random((20, 3)).astype(np.float32), _data((1, 8), n=20)
    np.savez(tmp_path / "x.npz", x=_data((2, 8), n=20), condition=vectors, image=image)
    np.savez(tmp_path / "four.npz", condition=vectors[:4], image=image[:4])
    np.save(tmp_path / "y.npy", _data((2, 8), n=4))
    data = open_arrays(tmp_path / "x.npz")
    assert (data.features, data.channels) == (3, 1)
    net = ScoreNet.unet(2, (8,), widths=(8,), layers_per_block=1, condition_features=3, condition_channels=1)
    net.fit_units(data)
    for parameter in net.parameters():  # so that the condition matters
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seed())
    net.save_pretrained(tmp_path / "net")

    def command(name, *options, file="four.npz"):
        condition = ("--condition", str(tmp_path / file)) if file else ()
        levels = ("--sampler", "ode", "--levels", "3", "--method", "heun")
        return [name, str(tmp_path / "net"), *(str(tmp_path / each) for each in options), *condition, *levels, *QUIET]

    assert main(command("sample", "drawn.npz")) == 0
    condition = {"features": torch.from_numpy(vectors[:4]), "image": torch.from_numpy(image[:4])}
    (batch,) = bulk_samples(ODESampler(net, levels=3), 4, condition=condition)
    with np.load(tmp_path / "drawn.npz") as written:
        assert np.allclose(written["x"], batch.images, rtol=1e-4)
        assert np.array_equal(written["image"], image[:4]) and np.array_equal(written["condition"], vectors[:4])
    restore = command("restore", "y.npy", "restored.npz")
    assert main([*restore, "--sigma", "1", "-n", "1"]) == 0 and np.load(tmp_path / "restored.npz")["x"].shape[0] == 4
    assert main([*command("evaluate", "x.npz", file=None), "-n", "8", "--metrics", "energy", "--no-gaussian"]) == 0
    assert "energy" in capsys.readouterr().out
    error = refused([*command("restore", "y.npy", "z.npz", file=None), "--sigma", "1"], capsys)
    assert "takes an image as its condition. Add --condition FILE with the images" in error
    np.savez(tmp_path / "vectors.npz", condition=vectors)
    error = refused(command("sample", "z.npz", file="vectors.npz"), capsys)
    assert "must have the vectors as condition and the array image, but has no image" in error


def test_a_network_is_evaluated_with_the_conditions_of_the_reference():
    class Copies:
        """Its samples are the conditioning images."""

        schedule, sample_shape, value_range, conditioning = network_for((1, 8)).schedule, (1, 8), None, Condition(1)

        def __call__(self, x, sigma, condition):
            return (condition - x) / (1e-6 + torch.as_tensor(sigma).view(-1, 1, 1) ** 2)

    x = torch.from_numpy(_data((1, 8)))
    sampler = ODESampler(Copies(), levels=5)
    options = {"n": 40, "metrics": ["sliced-wasserstein"], "gaussian": False, "progress": False}

    def distance(reference, condition=None):
        found = evaluate(sampler, reference, condition=condition, **options)
        return found.figures["samples"]["values"]["sliced-wasserstein"].value

    assert distance({"x": x, "condition": x}) < 1e-3 and distance(x, x) < 1e-3 and distance(x, x + 30) > 0.5
    with pytest.raises(ValueError, match=r"an image as its condition\. Pass a reference with images, or condition="):
        evaluate(sampler, x, **options)


def test_a_reference_without_the_vectors_of_the_network_is_refused(tmp_path, capsys):
    network_for((2,), condition_features=3).save_pretrained(tmp_path / "net")
    np.save(tmp_path / "x.npy", _data((2,)))
    argv = ["tune", tmp_path / "net", "--reference", tmp_path / "x.npy", "-n", 8, "--calls", 18, "--quiet"]
    error = refused(argv, capsys)
    assert "takes a vector as its condition, and x has none. Add the vectors of all samples, np.savez(FILE, x=" in error


@pytest.mark.slow
def test_a_single_vector_of_large_values_is_shown(tmp_path):
    save_plot(torch.tensor([[1e6, -3e9]]), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2,), (2, 16), (1, 8, 8), (2, 4, 8, 6)])
def test_plots_show_every_kind_of_data(tmp_path, shape):
    save_plot(torch.from_numpy(_data(shape, n=2)), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) >= 200 and len(plot.convert("L").getcolors()) > 10
