"""``scorematch restore`` for arrays. A new network is the exact score of a normal distribution."""

import re

import numpy as np
import pytest

from scorematch import ScoreNet
from scorematch.cli import main
from scorematch.nets.precondition import Units
from tests.helpers import refused

QUIET = ("--device", "cpu", "--quiet")
MEAN, STD = np.array([250.0, -3.0]), np.array([30.0, 2.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prior of vectors with the mean and the deviation above, and measurements with gaps."""
    folder = tmp_path_factory.mktemp("arrays")
    net = ScoreNet.mlp(2, width=8, depth=1, condition_features=3)
    net.backbone.condition_embedding.null.data.fill_(0.1)  # as if trained with label_drop
    net.units = Units(tuple(MEAN), tuple(STD))
    net.schedule = net.schedule.geometric(300, 0.1, 60)
    net.save_pretrained(folder / "net")
    y = np.array([[280.0, np.nan], [np.nan, -1.0], [210.0, -6.0]], np.float32)
    np.save(folder / "gaps.npy", y)
    np.savez(folder / "masked.npz", y=np.nan_to_num(y), mask=~np.isnan(y))
    np.save(folder / "whole.npy", np.nan_to_num(y))
    np.save(folder / "mask.npy", np.array([True, False]))
    np.save(folder / "x.npy", y[2:])
    return folder


def restored(folder, name, *options, out="restored.npz"):
    command = ["restore", str(folder / "net"), str(folder / name), str(folder / out), "--overwrite"]
    assert main([*command, *options, *QUIET]) == 0
    if out.endswith(".npy"):
        return np.load(folder / out)
    with np.load(folder / out) as file:
        return dict(file)


@pytest.mark.slow
def test_the_draws_are_those_of_the_posterior(folder):
    """Closed form: of a normal prior and normal noise; a gap has the prior."""
    sigma = 3.0
    found = restored(folder, "gaps.npy", "--sigma", "3", "-n", "200", "--uncertainty")
    y = np.load(folder / "gaps.npy")
    share = np.where(np.isnan(y), 0, STD**2 / (STD**2 + sigma**2))
    mean = MEAN + share * np.nan_to_num(y - MEAN)
    deviation = STD * np.sqrt(1 - share)
    assert found["x"].shape == (3, 200, 2) and found["x"].dtype == np.float32
    error = deviation / np.sqrt(200)
    assert (np.abs(found["x"].mean(1) - mean) < 4 * error + 0.02 * STD).all()
    assert np.allclose(found["deviation"], deviation, rtol=0.15)
    assert np.allclose(found["mean"], found["x"].mean(1), rtol=1e-4) and found["quantiles"].shape == (3, 3, 2)
    assert np.allclose(found["levels"], [0.05, 0.5, 0.95])
    again = restored(folder, "masked.npz", "--sigma", "3", "-n", "200")
    assert np.array_equal(again["x"], found["x"]) and [*again] == ["x"]


@pytest.mark.slow
def test_each_measurement_is_restored_for_itself(folder):
    options = ("--sigma", "1", "-n", "2", "--condition", "0.1,0.2,0.3")
    together = restored(folder, "gaps.npy", *options)["x"]
    alone = restored(folder, "gaps.npy", *options, "--batch-size", "2")["x"]
    assert np.allclose(together, alone, rtol=1e-4)
    array = restored(folder, "gaps.npy", *options, out="restored.npy")
    assert np.allclose(array, together, rtol=1e-4)


def test_measurements_in_other_files(folder):
    import h5py  # here, since the imports take a second
    import zarr

    group = zarr.open_group(str(folder / "masked.zarr"), mode="w")
    with np.load(folder / "masked.npz") as arrays, h5py.File(folder / "masked.nc", "w") as file:
        for name, values in arrays.items():
            group[name], file[name] = values, values
    options = ("--sigma", "3", "-n", "2", "--levels", "3")
    expected = restored(folder, "masked.npz", *options)["x"]
    for name in ("masked.nc", "masked.zarr"):
        assert np.array_equal(restored(folder, name, *options)["x"], expected)


def test_a_mask_and_other_operators(folder, capsys):
    mask = f"mask:{folder / 'mask.npy'}"
    found = restored(folder, "whole.npy", "--operator", mask, "-n", "3")["x"]
    assert np.allclose(found[:, :, 0], np.load(folder / "whole.npy")[:, None, 0], rtol=1e-4)
    assert found[:, :, 1].std() > 0.5
    found = restored(folder, "x.npy", "--operator", mask, "--degrade", "-n", "50", "--sigma", "0.5")
    assert np.array_equal(found["truth"], np.load(folder / "x.npy")) and np.abs(found["x"][..., 0] - 210).mean() < 1
    assert "differs from the truth by" in capsys.readouterr().out
    found = restored(folder, "gaps.npy", "--sigma", "3", "-n", "2", "--sampler", "particles", "--particles", "4")
    assert found["log_evidence"].shape == (3,) and np.isfinite(found["log_evidence"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 16), (2, 4, 6, 8)])
def test_signals_fields_and_volumes(shape, tmp_path):
    net = ScoreNet.unet(2, shape[1:], widths=(8,), layers_per_block=1)
    net.units = Units(tuple(MEAN), tuple(STD))
    net.save_pretrained(tmp_path / "net")
    x = MEAN.reshape(1, 2, *[1] * (len(shape) - 1)) + np.random.default_rng(0).normal(size=(3, *shape))
    x[:, :, 1:3] = np.nan
    np.save(tmp_path / "gaps.npy", x.astype(np.float32))
    found = restored(tmp_path, "gaps.npy", "--sigma", "0.1", "-n", "2")["x"]
    assert found.shape == (3, 2, *shape)
    seen = ~np.isnan(x)[:, None].repeat(2, 1)
    assert np.abs(found - x[:, None])[seen].mean() < 0.2 and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whole.npy", (), "neither gaps nor noise. Write what was done to them, --operator, or their noise, --sigma"),
        (
            "gaps.npy",
            ("--sigma", "1", "-n", "1", "--uncertainty"),
            "--uncertainty needs several restorations, got -n 1",
        ),
        ("gaps.npy", ("--resize", "--sigma", "1"), "--resize is for pictures"),
        ("gaps.npy", ("--degrade", "--sigma", "1"), "--degrade needs the damage. Add --operator"),
        ("gaps.npy", ("--sigma", "1", "--condition", "0.1"), "--condition must have 3 values"),
        ("none.npy", ("--sigma", "1"), "there is no file or folder"),
        ("mask.npy", ("--sigma", "1"), r"must have measurements y \(N, ...\), floating point, got bool of shape"),
        ("wide.npy", ("--sigma", "1"), r"wide.npy: .*must be of samples of shape \(2,\)"),
        (
            "gaps.npy",
            ("--sigma", "1", "--operator", "mask:{folder}/x.npy"),
            "must be of type bool, True where the data",
        ),
    ],
)
def test_bad_options_are_refused(folder, capsys, name, options, message):
    np.save(folder / "wide.npy", np.ones((4, 3), np.float32))
    options = [each.format(folder=folder) for each in options]
    command = ["restore", str(folder / "net"), str(folder / name), str(folder / "out.npz"), *options, *QUIET]
    assert re.search(message, refused(command, capsys))


def test_the_measurements_are_not_replaced_by_their_restorations(folder, capsys):
    path = folder / "whole.npy"
    before = path.read_bytes()
    error = refused(["restore", folder / "net", path, path, "--sigma", "1", "--overwrite", *QUIET], capsys)
    assert "would replace the measurements" in error and path.read_bytes() == before


def test_bad_names_of_the_file_are_refused(folder, capsys):
    command = ["restore", str(folder / "net"), str(folder / "gaps.npy")]
    error = refused([*command, str(folder / "out.csv"), "--sigma", "1"], capsys)
    assert f"a file .npz or .npy, got {folder / 'out.csv'}. Write {folder / 'out.npz'}." in error
    error = refused([*command, str(folder / "out.npy"), "--sigma", "1", "--uncertainty"], capsys)
    assert "--uncertainty writes several arrays" in error
    error = refused([*command, str(folder / "x.npy" / "out.npz"), "--sigma", "1"], capsys, unprinted="network calls")
    assert "x.npy is not a folder" in error
    error = refused(["restore", "mnist", str(folder), str(folder / "out")], capsys)
    assert "the following arguments are required: --operator" in error
