"""Training data that are not pictures: arrays in memory and on the disk, their conditions and their units."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from scorematch import ScoreNet, dsm_loss
from scorematch.cli.options.measurements import read_measurements
from scorematch.core.conditions import Condition
from scorematch.data import open_arrays, open_images
from scorematch.data.array_data import find_arrays
from scorematch.data.moments import moments
from scorematch.training import Settings, train, train_steps
from scorematch.training.augment import augmentations, augmented
from tests.helpers import seed

pytestmark = pytest.mark.usefixtures("no_plots")

RARELY = {"sample_every": 10**6, "snapshot_every": 10**6}
QUICK = {"images": 32, "batch_size": 8, "precision": "float32", "progress": False, **RARELY}


AXES = ("time", "variable", "height")


def signals(n=24, scale=30.0, middle=250.0):
    """Smooth signals of two channels (n, 2, 12), and a vector for each (n, 3)."""
    x = torch.randn(n, 2, 12, generator=seed()).cumsum(2)
    x = (x - x.mean()) / x.std()
    return middle + scale * x, torch.rand(n, 3, generator=seed(1))


def net(**options):
    torch.manual_seed(0)
    return ScoreNet.unet(2, (12,), widths=(8, 8), layers_per_block=1, **options)


def sources(folder):
    """The same data in all kinds of files and objects."""
    import h5py  # here, since the imports take a second
    import zarr

    x, condition = (each.numpy() for each in signals())
    np.savez(folder / "plain.npz", x=x, condition=condition)
    np.savez_compressed(folder / "packed.npz", condition=condition, x=x)
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"], file["condition"] = x.astype(">f4"), condition.astype(">f8")  # another byte order
        file["x"].dims[0].label, file["x"].dims[1].label, file["x"].dims[2].label = AXES
    group = zarr.open_group(str(folder / "x.zarr"), mode="w")
    group["x"], group["condition"] = x, condition
    group["x"].attrs["_ARRAY_DIMENSIONS"] = list(AXES)  # as xarray writes them
    names = ("plain.npz", "packed.npz", "x.h5", "x.zarr")
    pair = torch.from_numpy(x), torch.from_numpy(condition)
    return [*(folder / name for name in names), pair, {"x": x, "condition": condition}, TensorDataset(*pair)]


def test_all_kinds_of_sources_give_the_same_data(tmp_path):
    x, condition = signals()
    rows = torch.tensor([5, 0, 5, 23])
    for source in sources(tmp_path):
        data = open_arrays(source)
        assert data.axes == (AXES if str(source).endswith((".h5", ".zarr")) else None)
        assert (len(data), data.shape, data.features) == (24, (2, 12), 3)
        for indices in (rows, list(range(3, 9)), [7]):
            found = data.read(indices)
            each = torch.as_tensor(indices)
            assert torch.equal(found[0], x[each]) and torch.equal(found[1], condition[each])
            assert found[0].dtype == found[1].dtype == torch.float32
    np.save(tmp_path / "x.npy", x.double().numpy().astype(">f8"))
    assert torch.equal(open_arrays(tmp_path / "x.npy").read(rows)[0], x[rows])
    assert isinstance(open_arrays(tmp_path / "plain.npz")._x, np.memmap)


def test_values_of_netcdf_that_stand_for_gaps_are_nan(tmp_path):
    import h5py

    x, _ = signals()
    x[7, 1, 4] = 1e20
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["group/y"], file["y"], file["z"] = x, x, x
        for name in ("group/y", "y"):
            file[name].attrs["_FillValue"] = np.float32([1e20])
    data = open_arrays(tmp_path / "x.nc", key="group/y")
    assert data.read(range(24))[0].isnan().nonzero().tolist() == [[7, 1, 4]]
    with pytest.raises(ValueError, match=r"data must be finite, but 1 of 24 samples .* \[7, 1, 4\]"):
        moments(data)
    assert (~read_measurements(tmp_path / "x.nc", None, 0.1, None).mask).nonzero().tolist() == [[7, 1, 4]]
    with pytest.raises(ValueError, match=r"array x, or only one of data .* got 'group/y', 'y', 'z'. Write open_arrays"):
        open_arrays(tmp_path / "x.nc")
    with h5py.File(tmp_path / "pair.nc", "w") as file:
        file["x"], file["condition"] = np.ones((3, 2)), [[1.0], [1e20], [2.0]]
        file["condition"].attrs["_FillValue"] = 1e20
    with pytest.raises(ValueError, match=r"the condition of x must be finite, but 1 of 3 .* first at \[1, 0\]"):
        open_arrays(tmp_path / "pair.nc")


def test_the_axes_of_netcdf_have_the_names_of_its_dimensions(tmp_path):
    import h5py

    without = "This is a netCDF dimension but not a netCDF variable."  # as netCDF calls a dimension without coordinates
    scales = {"time": "time", "variable": f"{without}{2:10}", "height": ""}
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["group/x"] = np.ones((3, 2, 4))
        for axis, (name, title) in zip(file["group/x"].dims, scales.items(), strict=True):
            file[name] = np.zeros(file["group/x"].shape[0])
            file[name].make_scale(title)
            axis.attach_scale(file[name])
    assert open_arrays(tmp_path / "x.nc").axes == AXES


@pytest.mark.parametrize("kind", ["S3", None], ids=["fixed", "variable"])
def test_classes_that_are_strings_in_hdf5(kind, tmp_path):  # which h5py reads as bytes
    import h5py

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.zeros((3, 2))
        file.create_dataset("label", data=["cat", "ape", "cat"], dtype=kind)
    data = open_arrays(tmp_path / "x.h5")
    assert data.classes == ("ape", "cat") and data.read([0, 1])[1].tolist() == [1, 0]


def test_images_of_8_bits_in_hdf5_are_refused_with_a_way(tmp_path):
    import h5py

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"x.h5 has uint8 images, 'images', .* Write np.savez\("):
        find_arrays(tmp_path / "x.h5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed.npz", "x.h5"])
def test_an_interrupted_run_from_a_file_has_the_bits_of_a_whole_one_from_memory(tmp_path, name):
    class StoppedError(Exception):
        pass

    def stop(averaged, images):
        if images == 24:
            raise StoppedError

    *_, pair, _, _ = sources(tmp_path)
    options = {**QUICK, "label_drop": 0.2, "checkpoint_every": 16, "sample_every": 24}
    train(net(condition_features=3), pair, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        train(net(condition_features=3), tmp_path / name, tmp_path / "run", evaluate=stop, **options)
    train(net(condition_features=3), tmp_path / name, tmp_path / "run", **options)
    whole, run = (tmp_path / folder / "network" for folder in ("whole", "run"))
    assert (whole / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    of_whole, of_run = (json.loads((folder / "config.json").read_text()) for folder in (whole, run))
    assert of_run.pop("axes", None) == (list(AXES) if name == "x.h5" else None)  # which arrays in memory lack
    assert of_whole == of_run


def test_moments_are_those_of_all_values():
    x, condition = signals()
    found, others = moments(open_arrays((x, condition)), takes=Condition(vector=condition.shape[1]))
    std, mean = torch.std_mean(x.double().transpose(0, 1).flatten(1), 1)
    assert torch.allclose(found.mean, mean, rtol=1e-12) and torch.allclose(found.std, std, rtol=1e-12)
    assert found.low.min() == x.min() and found.high.max() == x.max()
    assert torch.allclose(others["features"].std, condition.double().std(0), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["own", "range"])
def test_a_run_in_kelvin_is_that_in_standard_units(tmp_path, start):
    """The range of the data, too wide by far, only clamps the samples."""
    x, _ = signals()
    own, standard = net(), net()
    if start == "range":
        own.value_range = (0, 1e4)
    own = train(own, x, tmp_path / "kelvin", **QUICK)
    standard = train(standard, (x - 250) / 30, tmp_path / "standard", **QUICK)
    assert own.value_range == ((0, 1e4) if start == "range" else None)
    assert own.schedule.sigma_max == pytest.approx(30 * standard.schedule.sigma_max)
    noise = torch.randn(4, 2, 12, generator=seed(2))
    sigma = torch.tensor([0.1, 1.0, 3.0, 20.0])
    with torch.no_grad():
        y = standard(noise, sigma)
        assert torch.allclose(30 * own(250 + 30 * noise, 30 * sigma), y, atol=1e-3 * float(y.abs().max()))


@pytest.mark.slow
def test_units_are_measured_once(tmp_path):
    x, _ = signals()
    first = train(net(), x, tmp_path / "run", **QUICK)
    files = [path.read_bytes() for path in sorted((tmp_path / "run" / "network").iterdir())]
    train(net(), x, tmp_path / "run", **QUICK)  # it is complete
    assert [path.read_bytes() for path in sorted((tmp_path / "run" / "network").iterdir())] == files
    began = train(net(), 2 * x, tmp_path / "more", start=tmp_path / "run" / "network", **QUICK)
    assert began.units == first.units and began.schedule == first.schedule
    loaded = ScoreNet.from_pretrained(tmp_path / "run" / "network")
    assert train(loaded, 2 * x, tmp_path / "again", **QUICK).units == first.units


def test_gaps_that_came_later_are_found_in_the_batch(tmp_path):
    """A run that begins with another network, or continues, does not measure its data."""
    x, _ = signals()
    train(net(), x, tmp_path / "run", **QUICK)
    x[17, 1, 4] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ValueError, match=r"x must be finite, .* the first at \[17, 1, 4\]\. Leave these samples out"):
        train(net(), tmp_path / "x.npy", tmp_path / "more", start=tmp_path / "run" / "network", **QUICK)


def test_train_steps_measures_the_units_too():
    x, _ = signals()
    own = net()
    for _ in train_steps(own, open_arrays(x), Settings(images=8, batch_size=8, ema=())):
        pass
    assert own.units.mean == pytest.approx(x.mean((0, 2)).tolist(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "measured"),
    [
        (torch.rand(16, 1, 8, 8, generator=seed()), False),
        (torch.rand(16, 2, 8, 8, generator=seed()), False),
        (35 * torch.rand(16, 1, 8, 8, generator=seed()) - 5, True),
        (35 * torch.rand(16, 2, 8, 8, generator=seed()) - 5, True),
    ],
)
def test_images_in_the_unit_range_keep_it_and_others_have_units(tmp_path, x, measured):
    own = train(ScoreNet.unet(x.shape[1], 8, widths=(8, 8), layers_per_block=1), x, tmp_path / "run", **QUICK)
    assert (own.units is not None) is measured and own.value_range == (None if measured else (0, 1))


def test_another_range_is_the_same_network_in_other_units():
    torch.manual_seed(0)
    own = ScoreNet.unet(1, 8, widths=(8, 8), layers_per_block=1)
    torch.nn.init.normal_(own.backbone.conv_out.weight)
    x, sigma = torch.rand(2, 1, 8, 8, generator=seed()), torch.tensor([0.1, 2.0])
    before, levels = own(x, sigma), own.schedule.sigmas
    own.value_range = (9e4, 1.1e5)
    assert torch.allclose(own.schedule.sigmas, 2e4 * levels, rtol=1e-6)
    assert torch.allclose(2e4 * own(9e4 + 2e4 * x, 2e4 * sigma), before, rtol=1e-3, atol=1e-3)


def test_only_pictures_are_mirrored_by_default():
    """The mirror image of a field in [0, 1] may not fit the vector that is its condition."""
    net, x = ScoreNet.unet(1, 8, widths=(4,), condition_features=2), torch.rand(4, 1, 8, 8)
    assert augmentations(net, open_arrays((x, torch.rand(4, 2))), None) == ()
    assert augmentations(net, open_images(x), None) == ("flip",)


def test_an_image_for_an_encoder_changes_with_the_data():
    x, encoder = torch.randn(8, 1, 8, 8, generator=seed()), nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    net = ScoreNet.unet(1, 8, widths=(4,), condition_features=2, condition_encoder=encoder)

    def loss(net, x, *, condition, **given):
        assert torch.equal(condition["features"], -x)
        return dsm_loss(net, x, condition=condition, reduction="none", **given)

    options = Settings(images=8, batch_size=8, augment=("flip", "rotate", "shift"), loss=loss)
    assert sum(1 for _ in train_steps(net, open_arrays((x, -x)), options)) == 1


def test_augmentations_are_symmetries():
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)

    def changed(name, *u):
        return augmented(x, (name,), torch.tensor([u]))

    assert torch.equal(changed("flip", 0.4, 0, 0, 0), x.flip(3)) and torch.equal(changed("flip", 0.6, 0, 0, 0), x)
    assert torch.equal(changed("rotate", 0, 0.3, 0, 0), x.rot90(1, (2, 3)))
    assert torch.equal(changed("shift", 0, 0, 0.3, 0.9), x.roll((1, 3), (2, 3)))
    signal = x[:, :, 0]
    assert torch.equal(augmented(signal, ("shift",), torch.tensor([[0, 0, 0.5]])), signal.roll(2, 2))


def _nan(row):
    x, _ = signals()
    x[row, 1, 4] = torch.nan
    return x


X, CONDITION = signals()


class Uneven:
    """A Dataset in which one signal is shorter."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i, :, : 11 if i == 3 else 12]


class Named(Uneven):
    """A Dataset with the names of classes."""

    def __getitem__(self, i):
        return X[i], "even"


@pytest.mark.parametrize(
    ("options", "data", "settings", "message"),
    [
        ({}, _nan(7), {}, r"x must be finite, but 1 of 24 samples have NaN .* the first at \[7, 1, 4\]. Leave these"),
        ({}, np.ma.masked_greater(X.numpy(), 300), {}, "x must be finite, but"),
        ({}, X + 0j, {}, r"x must be floating point, got complex64. Write np.concatenate\(\[x.real, x.imag\], 1\)"),
        ({}, X.int(), {}, r"x must be floating point, got int32. Write x.astype\(np.float32\) for data that are not"),
        ({}, X[:, 0], {}, r"sample_shape, \(2, 12\), got \(12,\)"),
        ({}, torch.cat([X[:, :1], 0 * X[:, :1] + 0.1], 1), {}, "channel 1 of data is constant. Leave it out"),
        ({}, X.double() + 1e12, {}, "channel 0 of data is constant. Leave it out, or if it varies, but not in float32"),
        ({}, X.double() + 1e8, {}, r"mean of channel 0 of data must be at most 100000 standard.*Write x - x.mean\(\)"),
        ({}, Uneven(), {}, r"x of all items of the Uneven must have one shape, got \(2, 11\) and \(2, 12\)"),
        ({}, Named(), {}, "the condition of an item of the Named must be numbers, got 'even'. Number the classes from"),
        ({}, (X, CONDITION), {}, "a vector of 3 values .* which the network does not take. Build it with condition_fe"),
        ({"condition_features": 3}, X, {}, r"takes a vector of 3 values .*, got none. Pass a pair \(x, condition\)"),
        ({"condition_features": 2}, (X, CONDITION), {}, r"takes a vector of 2 .*, got torch.float32 of shape \(3,\)"),
        ({"condition_features": 3}, (X, CONDITION[:5]), {}, r"a vector for each of 24 samples.*, got shape \(5, 3\)"),
        ({"condition_features": 3}, (X, CONDITION / 0), {}, "the condition of x must be finite, but 24 of 24"),
        ({}, X, {"augment": ("rotate",)}, r'augment="rotate" needs data with two last axes of the same length'),
        ({}, X, {"label_drop": 0.1}, "label_drop needs a network with a null class"),
    ],
)
def test_bad_data_raise(tmp_path, options, data, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(net(**options), data, tmp_path / "run", **QUICK, **settings)


def test_data_outside_of_the_range_raise(tmp_path):
    own = net()
    own.value_range = (0, 100)
    with pytest.raises(ValueError, match=r"network's value_range, \(0.0, 100.0\), got values .*value_range = None"):
        train(own, X, tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\].* x / 255|/ 255 for 8-bit values"):
        train(ScoreNet.unet(1, 8, widths=(8, 8)), 255.0 * torch.eye(8).expand(8, 1, 8, 8), tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match='build the network with precondition="karras"'):
        train(ScoreNet.ncsnv2(1, 8, width=8), X[:, :1, :8, None].expand(24, 1, 8, 8), tmp_path / "run", **QUICK)


def test_a_mapping_without_a_single_array_raises():
    with pytest.raises(TypeError, match="data must be an array"):
        open_arrays({"a": X, "b": X})
    with pytest.raises(FileNotFoundError, match=r"x\.npz does not exist"):
        open_arrays("x.npz")
    with pytest.raises(ValueError, match="there is no array 'c'; the names are 'a'"):
        open_arrays({"a": X}, key="c")
    assert open_arrays({"a": X, "b": X}, key="b").shape == (2, 12)


@pytest.mark.parametrize("file", ["x.h5", "x.zarr"])
def test_arrays_of_groups_have_paths(file, tmp_path):
    import h5py
    import zarr

    x, condition = (each.numpy() for each in signals())
    root = h5py.File(tmp_path / file, "w") if file == "x.h5" else zarr.open_group(str(tmp_path / file), mode="w")
    group = root.create_group("run").create_group("first")
    group["x"], group["c"] = x, condition
    if file == "x.h5":
        root["broken"], group["root"] = h5py.SoftLink("/nothing"), h5py.SoftLink("/")
        root.close()
    data = open_arrays(tmp_path / file, key="run/first/x", condition_key="run/first/c")
    assert (len(data), data.shape, data.features) == (24, (2, 12), 3)
    assert np.array_equal(data.read([7])[0][0], x[7])
    with pytest.raises(ValueError, match=r"no array 'run'; the names are 'run/first/.', 'run/first/.'"):
        open_arrays(tmp_path / file, key="run")


def test_a_folder_that_is_not_zarr_raises(tmp_path):
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(ValueError, match=r"x\.zarr cannot be read as a folder of zarr"):
        open_arrays(tmp_path / "x.zarr")


def test_a_table_is_its_values():
    class Table:  # of pandas, whose import takes a second
        def to_numpy(self):
            return CONDITION.numpy()

    assert torch.equal(open_arrays(Table()).read(range(24))[0], CONDITION)
