"""Training data: sources, decoding, the cache and the order of images."""

import copy
import math
import os
import re
import sys
import types
from pathlib import PurePath

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scorematch import NoiseSchedule
from scorematch.data import cache as module
from scorematch.data import read_samples, save_grid, to_uint8
from scorematch.data.folders import walk
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import list_pictures
from scorematch.sampling import ODESampler, sample_to
from scorematch.training.steps import Order


def _colors(rng, height=8, width=8):
    """Random 8-bit pixels (H, W, 3)."""
    return torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy()


class Gaussian:
    """The score of a standard normal distribution, whose samples are clamped to those of images."""

    value_range = (0, 1)

    def __call__(self, x, sigma):
        return -x / (1 + sigma**2)


def _open(source, **options):
    return open_images(source, progress=False, **options)


@pytest.fixture
def pictures(tmp_path, rng):
    """A folder of six RGB pictures of 8 x 8 pixels, two of them in a subfolder; and their pixels (6, 3, 8, 8)."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    pixels = []
    for name in ("a.png", "b.PNG", "c.bmp", "d.png", "inner/a.png", "inner/b.png"):
        pixels.append(_colors(rng))
        Image.fromarray(pixels[-1]).save(folder / name)
    return folder, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


# -- A folder


def test_a_folder_is_read_recursively_in_the_order_of_paths(pictures):
    folder, pixels = pictures
    data = _open(folder)
    assert len(data) == 6 and data.shape == (3, 8, 8) and data.skipped == () and data.classes is None
    images, labels = data.read([5, 0, 0])
    assert labels is None and images.dtype == torch.uint8
    assert torch.equal(images, pixels[[5, 0, 0]])
    assert repr(data) == f"ImageData(6 x (3, 8, 8) from {folder})"
    assert torch.equal(_open(str(folder)).read(range(6))[0], pixels)


def test_the_order_of_files_is_the_same_on_windows(tmp_path, monkeypatch):
    for name in ("B", "a", "C"):
        save_grid(torch.zeros(1, 1, 4, 4), tmp_path / f"{name}.png")
    monkeypatch.setattr(PurePath, "__lt__", lambda one, other: str(one).lower() < str(other).lower())  # as there
    assert [path.stem for path in walk(tmp_path)] == ["B", "C", "a"]
    assert [path.stem for path in list_pictures(tmp_path)] == ["B", "C", "a"]


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_of_a_folder_of_samples_only_the_samples_are_read(tmp_path, kind):
    sampler = ODESampler(Gaussian(), NoiseSchedule([1.0, 0.1]))
    sample_to(sampler, tmp_path, 3, batch_size=2, shape=(1, 4, 4), format=kind, progress=False)
    samples = read_samples(tmp_path, 3)
    save_grid(samples, tmp_path / "sheet.png")  # as the command sample
    assert torch.equal(_open(tmp_path).read(range(3))[0], to_uint8(samples)) and len(_open(tmp_path)) == 3
    (tmp_path / "samples.json").write_text("{}")  # of another program
    assert _open(tmp_path, image_size=4).read([-1])[0].shape == (1, 1, 4, 4)
    assert len(_open(tmp_path, image_size=4)) == (4 if kind == "png" else 1)


def test_a_folder_with_pictures_of_many_kinds_and_damaged_ones(tmp_path, rng):
    folder = tmp_path / "difficult"
    (folder / "z" / "er").mkdir(parents=True)
    colors = Image.fromarray(_colors(rng, 12, 10))
    colors.save(folder / "a-rgb.png")
    colors.save(folder / "b-whole.jpg", quality=95)
    (folder / "c-truncated.jpg").write_bytes((folder / "b-whole.jpg").read_bytes()[:300])
    Image.fromarray(np.full((12, 10), 0x80FF, np.uint16)).save(folder / "d-deep.png")
    colors.quantize(8).save(folder / "e-palette.png")
    colors.convert("CMYK").save(folder / "f-cmyk.jpg", quality=95)
    red, blue = Image.new("RGB", (10, 12), (255, 0, 0)), Image.new("RGB", (10, 12), (0, 0, 255))
    red.save(folder / "g-animated.gif", save_all=True, append_images=[blue])
    (folder / "h-none.png").write_bytes(b"this is no picture")
    (folder / "notes.txt").write_text("this is no picture")
    colors.save(folder / ".hidden.png")
    colors.save(folder / "z" / "er" / "i.png")
    (folder / "z" / "er" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "j.png").symlink_to(folder / "a-rgb.png")
    (folder / "k.png").symlink_to(folder / "nothing.png")

    with pytest.warns(UserWarning, match=r"2 of the 10 images of .* left out: .*c-truncated.jpg, .*h-none.png"):
        data = _open(folder, channels=3, image_size=(12, 10))
    assert [name.rpartition("/")[2] for name in data.skipped] == ["c-truncated.jpg", "h-none.png"]
    images, _ = data.read(range(len(data)))
    rgb = torch.from_numpy(np.array(colors)).permute(2, 0, 1)
    assert len(images) == 8
    assert torch.equal(images[0], rgb) and torch.equal(images[6], rgb) and torch.equal(images[7], rgb)
    assert (images[2] == 128).all()  # 0x80FF / 0xFFFF = 128.5 / 255, in all three channels
    palette = torch.from_numpy(np.array(colors.quantize(8).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(images[3], palette)
    assert (images[4].float() - rgb.float()).abs().mean() < 60  # CMYK is not read as its negative
    assert torch.equal(images[5], torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 12, 10))


def test_a_damaged_picture_raises_with_strict(pictures):
    folder, _ = pictures
    (folder / "d.png").write_bytes((folder / "d.png").read_bytes()[:100])
    for cache in (None, folder.parent / "cache"):
        with pytest.raises(OSError, match=r"d\.png cannot be read as an image"):
            _open(folder, strict=True, cache=cache)
    with pytest.warns(UserWarning, match="1 of the 6 images"):
        assert len(_open(folder, cache=folder.parent / "cache")) == 5
    with pytest.raises(OSError, match=r"d\.png cannot be read as an image"):  # also if the cache exists
        _open(folder, strict=True, cache=folder.parent / "cache")


def test_a_folder_with_only_damaged_pictures_raises(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    for options in ({}, {"image_size": 8, "channels": 3}):
        with pytest.raises(OSError, match=r"none of the 2 images of .* can be read"):
            _open(tmp_path, **options)


def test_a_picture_with_a_complete_header_and_missing_pixels_is_left_out(pictures):
    folder, pixels = pictures
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) - 60])
    with pytest.warns(UserWarning, match=r"left out: .*a\.png"):
        data = _open(folder)
    assert torch.equal(data.read(range(5))[0], pixels[1:])


@pytest.mark.parametrize("cached", [False, True])
def test_labels_are_the_names_of_subfolders(tmp_path, rng, cached):
    for name in ("cat/deep/a.png", "cat/b.png", "ant/c.png", "dog/d.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_colors(rng)).save(path)
    damaged = tmp_path / "pictures" / "bee" / "e.png"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of the 5 images"):
        data = _open(tmp_path / "pictures", labels=True, cache=tmp_path / "cache" if cached else None)
    assert data.classes == ("ant", "bee", "cat", "dog")
    assert data.read([0, 1, 2, 3])[1].tolist() == [0, 2, 2, 3]
    assert data.read([3, 1])[1].dtype == torch.int64
    Image.fromarray(_colors(rng)).save(tmp_path / "pictures" / "loose.png")
    with pytest.raises(ValueError, match=r"labels=True needs all images in subfolders.*got .*loose\.png\. Move it"):
        _open(tmp_path / "pictures", labels=True)


# -- Size and channels


def test_center_crop_and_resize_equal_those_of_pillow(tmp_path, rng):
    picture = Image.fromarray(_colors(rng, 20, 31))
    picture.save(tmp_path / "a.png")
    for size, box in [(8, (5, 0, 25, 20)), ((6, 12), (0, 2, 31, 18)), ((10, 5), (10, 0, 20, 20))]:
        found = _open(tmp_path, image_size=size).read([0])[0][0]
        height, width = (size, size) if isinstance(size, int) else size
        expected = picture.crop(box).resize((width, height), Image.Resampling.BILINEAR)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert torch.equal(_open(tmp_path).read([0])[0][0], torch.from_numpy(np.array(picture)[:, 5:25]).permute(2, 0, 1))
    whole = _open(tmp_path, crop=None).read([0])[0][0]
    assert torch.equal(whole, torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    stretched = picture.resize((8, 8), Image.Resampling.BILINEAR)
    found = _open(tmp_path, crop=None, image_size=8).read([0])[0][0]
    assert torch.equal(found, torch.from_numpy(np.array(stretched)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(32, 64), (16, 64), 64])
def test_pictures_of_one_column_are_cropped_to_at_least_one_pixel(tmp_path, size):
    Image.fromarray(np.full((100, 1), 200, np.uint8)).save(tmp_path / "a.png")
    assert (_open(tmp_path, image_size=size).read([0])[0] == 200).all()


def test_the_celeba_crop_is_the_published_one(tmp_path, rng):
    picture = Image.fromarray(_colors(rng, 218, 178))
    picture.save(tmp_path / "a.png")
    middle = picture.crop((19, 39, 159, 179))  # 140 x 140
    for size in (64, 32):
        found = _open(tmp_path, crop="celeba", image_size=size).read([0])[0][0]
        expected = middle.resize((size, size), Image.Resampling.BILINEAR)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    for source in (tmp_path, np.array(picture)[None], [picture]):  # the last one is a Dataset
        found = _open(source, crop="celeba").read([0])[0][0]
        assert torch.equal(found, torch.from_numpy(np.array(middle)).permute(2, 0, 1))
    Image.fromarray(_colors(rng, 64, 64)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"needs images of at least 140 x 140 pixels, got 64 x 64. Write crop="):
        _open(tmp_path, crop="celeba", image_size=64)


def test_pictures_of_different_sizes_need_an_image_size(pictures, rng):
    folder, _ = pictures
    Image.fromarray(_colors(rng, 10, 9)).save(folder / "e.png")
    with pytest.raises(ValueError, match=r"a\.png has 8 x 8 pixels, and .*e\.png has 10 x 9\. Resize the"):
        _open(folder)
    assert _open(folder, image_size=8).shape == (3, 8, 8)


def test_images_of_another_range_need_this_range(rng):
    x = 5 * torch.randn(20, 1, 8, 8, generator=rng)
    with pytest.raises(ValueError, match=r"In Python, pass value_range= for data of another range\.$"):
        _open(x)
    for source in (x, _Dataset(list(x))):
        for ends in ((-30, 30), None):
            assert torch.equal(_open(source, value_range=ends).read(range(20))[0], x)
        with pytest.raises(ValueError, match=r"values in \[-1, 1\], got values from .*\. Pass another value_range="):
            _open(source, value_range=(-1, 1))
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        _open(x, value_range=None)


def test_pictures_in_unknown_formats_are_left_out_with_a_warning(pictures, tmp_path):
    folder, pixels = pictures
    (folder / "inner" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    with pytest.warns(UserWarning, match=r"1 of the 7 images of .* left out: .*IMG_1\.HEIC$"):
        data = _open(folder)
    assert len(data) == len(pixels) and data.skipped == (str(folder / "inner" / "IMG_1.HEIC"),)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(
        FileNotFoundError, match=r"files that can be read\. Convert pictures such as IMG_1\.HEIC to PNG or JPEG"
    ):
        _open(tmp_path / "phone")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_rotation_is_applied(tmp_path, rng, ending):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(_colors(rng, 6, 10)).save(tmp_path / f"a.{ending}", exif=exif)
    Image.fromarray(_colors(rng, 10, 6)).save(tmp_path / "b.png")
    assert _open(tmp_path, crop=None).shape == (3, 10, 6)


def test_gray_and_color_pictures_need_channels(tmp_path, rng):
    Image.fromarray(_colors(rng)).save(tmp_path / "color.png")
    Image.fromarray(_colors(rng)[..., 0]).save(tmp_path / "gray.png")
    with pytest.raises(
        ValueError,
        match=r"gray\.png is gray, and .*color\.png is in color\. Convert .* or write open_images\(..., channels=3\)",
    ):
        _open(tmp_path)
    assert _open(tmp_path, channels=3).shape == (3, 8, 8)
    assert _open(tmp_path, channels=1).shape == (1, 8, 8)


def test_a_color_picture_after_a_gray_one_of_a_dataset_needs_channels(rng):
    dataset = _Dataset([Image.fromarray(_colors(rng)[..., 0]), Image.fromarray(_colors(rng))])
    with pytest.raises(
        ValueError, match=r"item 0 is gray, and item 1 is in color\. Write open_images\(..., channels=3\) or"
    ):
        _open(dataset).read([0, 1])
    for channels in (1, 3):
        assert _open(dataset, channels=channels).read([0, 1])[0].shape == (2, channels, 8, 8)
    assert _open(_Dataset(dataset.items[::-1])).read([0, 1])[0].shape == (2, 3, 8, 8)


def test_gray_pictures_of_every_mode_have_one_channel(tmp_path, rng):
    gray = Image.fromarray(_colors(rng)[..., 0])
    for name, picture in [
        ("L", gray),
        ("LA", gray.convert("LA")),
        ("1", gray.convert("1")),
        ("deep", Image.fromarray(np.full((8, 8), 1000, np.uint16))),
    ]:
        picture.save(tmp_path / f"{name}.png")
    assert _open(tmp_path).shape == (1, 8, 8)


# -- Other sources


@pytest.mark.parametrize(
    ("shape", "found"),
    [((4, 3, 6, 8), (3, 6, 8)), ((4, 6, 8, 3), (3, 6, 8)), ((4, 6, 8), (1, 6, 8)), ((4, 6, 8, 1), (1, 6, 8))],
)
@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_arrays_of_pixels_with_channels_first_or_last(shape, found, kind, rng):
    array = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
    data = _open(kind(array.numpy()))
    assert data.shape == found and len(data) == 4
    expected = array.view(4, *found) if shape[1:] != (6, 8, 3) else array.permute(0, 3, 1, 2)
    assert torch.equal(data.read([0, 1, 2, 3])[0], expected)


def test_floating_point_data_are_not_changed(rng):
    points = torch.randn(5, 2, generator=rng, dtype=torch.float64)
    data = _open(points)
    images, labels = data.read([3, 1])
    assert data.shape == (2,) and labels is None
    assert torch.equal(images, points[[3, 1]].float())
    latents = torch.randn(2, 4, 4, 4, generator=rng)
    assert torch.equal(_open(latents).read([0, 1])[0], latents)
    images = torch.rand(2, 3, 4, 4, generator=rng)
    assert torch.equal(_open(images, image_size=4, channels=3).read([0, 1])[0], images)
    for shape in ((2, 3, 6, 4), (2, 1, 6, 3), (2, 16, 4, 4)):  # images of few columns, and latents
        assert _open(torch.rand(shape, generator=rng)).shape == shape[1:]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_floating_point_images_whose_last_axis_are_channels_raise(channels, rng):
    images = torch.rand(2, 8, 6, channels, generator=rng)
    for source in (images.numpy(), {"images": images}, _Dataset([(image, 0) for image in images])):
        with pytest.raises(
            ValueError, match=r"floating-point images \(N, C, H, W\) .*, 8, 6, .* x\.permute\(0, 3, 1, 2\)"
        ):
            _open(source, image_size=8)


def test_an_array_of_pixels_is_resized_like_a_picture(rng):
    pixels = torch.from_numpy(_colors(rng, 9, 6)).permute(2, 0, 1)[None]
    found = _open(pixels, image_size=4, channels=1)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).convert("L").crop((0, 1, 6, 7))
    expected = torch.from_numpy(np.array(picture.resize((4, 4), Image.Resampling.BILINEAR)))
    assert torch.equal(found.read([0])[0][0, 0], expected)


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train"), ("arr_0", "arr_1"), ("mine", "own")])
def test_images_and_labels_of_npz_files_and_dicts(tmp_path, names, rng):
    arrays = dict(zip(names, (np.stack([_colors(rng) for _ in range(3)]), np.array([2, 0, 1])), strict=True))
    np.savez(tmp_path / "data.npz", **arrays)
    keys = {"image_key": "mine", "label_key": "own"} if names[0] == "mine" else {}
    for source in (tmp_path / "data.npz", str(tmp_path / "data.npz"), arrays):
        data = _open(source, labels=True, **keys)
        assert data.shape == (3, 8, 8) and data.classes == ("0", "1", "2")
        images, labels = data.read([0, 2])
        assert torch.equal(images, torch.from_numpy(arrays[names[0]])[[0, 2]].permute(0, 3, 1, 2))
        assert labels.tolist() == [2, 1]
        assert _open(source, **keys).read([0])[1] is None
    with pytest.raises(ValueError, match=r"the data have no images named 'nothing'; the names are .* Pass image_key"):
        _open(arrays, image_key="nothing")


def test_other_arrays_of_an_npz_file_may_have_any_type(tmp_path, rng):
    pixels = np.stack([_colors(rng) for _ in range(3)])
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.array([1, 0, 1]), names=np.array(["a", None], object))
    images, labels = _open(tmp_path / "data.npz", labels=True).read([2])
    assert torch.equal(images[0], torch.from_numpy(pixels[2]).permute(2, 0, 1)) and labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"names\.npy must hold numbers, bools or strings"):
        _open(tmp_path / "data.npz", image_key="names")


@pytest.mark.parametrize("labels", [torch.tensor([1, 0, 1]), np.array([[1], [0], [1]]), ["b", "a", "b"]])
def test_pairs_of_images_and_labels(labels):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    data = _open((images, labels), labels=True)
    assert data.read([0, 1, 2])[1].tolist() == [1, 0, 1]
    assert data.classes == (("a", "b") if isinstance(labels, list) else ("0", "1"))
    assert _open((images, labels)).classes is None


class _Dataset(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("kind", ["picture", "array", "tensor", "float"])
def test_datasets_of_pictures_arrays_and_tensors(kind, rng):
    pixels = [_colors(rng) for _ in range(3)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    items = {
        "picture": [Image.fromarray(each) for each in pixels],
        "array": pixels,
        "tensor": list(images),
        "float": list(images.float() / 255),
    }[kind]
    data = _open(_Dataset([(item, 2 - i) for i, item in enumerate(items)]), labels=True)
    found, labels = data.read([2, 0])
    assert torch.equal(found, images[[2, 0]] if kind != "float" else (images.float() / 255)[[2, 0]])
    assert labels.tolist() == [0, 2] and data.classes == ("0", "1", "2")
    alone = _open(_Dataset(items))
    assert torch.equal(alone.read([2, 0])[0], found) and alone.read([0])[1] is None


def test_a_dataset_is_read_again_at_each_access(rng):
    """Transforms of a dataset may be random."""

    class Random(_Dataset):
        def __getitem__(self, i):
            return torch.rand(1, 4, 4, generator=rng)

    data = _open(Random([None] * 3))
    assert not torch.equal(data.read([0])[0], data.read([0])[0])


def test_labels_and_classes_of_torchvision_datasets(rng):
    dataset = _Dataset([(Image.fromarray(_colors(rng, 9, 8)), 1), (Image.fromarray(_colors(rng, 8, 12)), 0)])
    dataset.targets, dataset.classes = [1, 0], ["cat", "dog"]
    data = _open(dataset, labels=True)
    assert data.classes == ("cat", "dog") and data.read([0])[1].tolist() == [1]
    assert data.shape == (3, 8, 8)  # the first picture sets the size
    assert data.read([0, 1])[0].shape == (2, 3, 8, 8)


def test_data_that_were_read_can_be_copied(rng):
    data = _open(_Dataset(list(torch.rand(3, 1, 4, 4, generator=rng))))
    data.read([0])
    assert torch.equal(copy.deepcopy(data).read([2, 1])[0], data.read([2, 1])[0])


def test_the_labels_of_a_dataset_are_those_of_its_items(rng):
    dataset = _Dataset([(_colors(rng), 2 - k) for k in (0, 1, 2)])
    dataset.targets, dataset.classes = [0, 1, 2], ["cat", "dog", "bird"]
    dataset.target_transform = lambda k: 2 - k  # of torchvision's data sets; targets and classes are those before
    data = _open(dataset, labels=True)
    assert data.classes == ("0", "1", "2") and data.read([0, 1])[1].tolist() == [2, 1]


@pytest.mark.parametrize("label", [str, np.int64, torch.tensor], ids=["str", "int64", "tensor"])
def test_labels_of_every_kind_in_a_dataset(label, rng):
    data = _open(_Dataset([(_colors(rng), label(k)) for k in (1, 0, 1)]), labels=True)
    assert data.classes == ("0", "1") and data.read([0, 1])[1].tolist() == [1, 0]


ImageFeature = type("Image", (), {})  # stands for datasets.Image, which is recognized by its name


class ClassLabel:
    def __init__(self, names):
        self.names = names


class _Table:
    """The part of a Hugging Face dataset's interface that is used."""

    def __init__(self, columns, features=None):
        self.columns, self.features = columns, features
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return (
            self.columns[key] if isinstance(key, str) else {name: column[key] for name, column in self.columns.items()}
        )


def test_hugging_face_datasets(rng):
    pixels = [_colors(rng) for _ in range(3)]
    pictures = [Image.fromarray(each) for each in pixels]
    features = {"id": object(), "photo": ImageFeature(), "kind": ClassLabel(["cat", "dog"])}
    table = _Table({"id": [5, 6, 7], "photo": pictures, "kind": [1, 0, 1]}, features)
    for source in (table, {"train": table}):
        data = _open(source, labels=True)
        images, labels = data.read([0, 2])
        assert torch.equal(images, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)[[0, 2]])
        assert labels.tolist() == [1, 1] and data.classes == ("cat", "dog")
    plain = _open(_Table({"img": pixels, "fine_label": [0, 2, 1]}), labels=True)
    assert torch.equal(plain.read([0, 2])[0], images) and plain.classes == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"the data have no images; the names are 'a', 'b'\. Pass image_key\."):
        _open(_Table({"a": pixels, "b": pixels}))
    assert torch.equal(_open(_Table({"a": pixels, "b": pixels}), image_key="b").read([0, 2])[0], images)
    with pytest.raises(ValueError, match="no split \"train\"; the splits are 'test'"):
        _open({"test": table})


def test_a_hugging_face_dataset_in_the_format_torch(rng):
    pixels = torch.from_numpy(np.stack([_colors(rng, 9, 8) for _ in range(3)])).permute(0, 3, 1, 2)
    data = _open(_Table({"image": pixels}, {"image": ImageFeature()}), crop=None)
    assert torch.equal(data.read([0, 1, 2])[0], pixels)


def test_a_name_loads_a_hugging_face_dataset(monkeypatch, rng):
    asked = []
    table = _Table({"image": [_colors(rng)]})

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")
        return table

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(_open("owner/pictures")) == 1 and asked == [("owner/pictures", "train")]
    assert len(_open("mnist-test")) == 1 and asked.pop() == ("ylecun/mnist", "test")
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is not a file or a folder, .* loaded from the Hub"):
        _open("nobody/nothing")
    for path in ("./pictures", "/nothing/here", "a/b/c", "pictures/", "fields.npy", "fields.h5"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            _open(path)
    assert len(asked) == 2
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"faces is neither a file nor a folder, .* pip install datasets"):
        _open("faces")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the library and its dependencies give warnings
def test_a_dataset_of_the_datasets_library(rng):
    datasets = pytest.importorskip("datasets")
    pixels = [_colors(rng) for _ in range(3)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"picture": [Image.fromarray(each) for each in pixels], "kind": [1, 0, 1]}
    table = datasets.Dataset.from_dict(columns, features=features)
    for source in (table, datasets.DatasetDict({"train": table})):
        data = _open(source, labels=True)
        images, labels = data.read([0, 2])
        assert torch.equal(images, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)[[0, 2]])
        assert labels.tolist() == [1, 1] and data.classes == ("cat", "dog")
    with pytest.raises(TypeError, match="must have a length, got a streamed one"):
        _open(table.to_iterable_dataset())


# -- The cache


def _read_all(data):
    return data.read(range(len(data)))[0]


def test_pictures_in_a_cache_are_decoded_once(pictures, monkeypatch):
    folder, pixels = pictures
    cache = folder.parent / "cache"
    first = _open(folder, cache=cache)
    assert torch.equal(_read_all(first), pixels)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]
    monkeypatch.setattr("scorematch.data.pictures.fit_picture", None)  # decoding again would fail
    second = _open(folder, cache=cache)
    assert torch.equal(_read_all(second), pixels) and second.fingerprint == first.fingerprint
    assert isinstance(second._array, np.memmap)
    assert np.array_equal(np.load(next(cache.glob("*.npy"))), pixels.numpy())  # the cache is an ordinary .npy file


def test_a_cache_leaves_out_damaged_pictures(pictures):
    folder, pixels = pictures
    (folder / "c.bmp").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"left out: .*c\.bmp"):
            data = _open(folder, cache=folder.parent / "cache")
        assert len(data) == 5 and data.skipped == (str(folder / "c.bmp"),)
        assert torch.equal(_read_all(data), pixels[[0, 1, 3, 4, 5]])


def test_other_pictures_or_arguments_write_a_new_cache(pictures, rng):
    folder, pixels = pictures
    cache = folder.parent / "cache"
    _open(folder, cache=cache)
    changed = _colors(rng)
    Image.fromarray(changed).save(folder / "a.png")
    data = _open(folder, cache=cache)
    assert torch.equal(data.read([0])[0][0], torch.from_numpy(changed).permute(2, 0, 1))
    assert torch.equal(data.read([1])[0][0], pixels[1])
    assert _open(folder, cache=cache, image_size=4).read([0])[0].shape == (1, 3, 4, 4)
    assert _open(folder, cache=cache, channels=1).read([0])[0].shape == (1, 1, 8, 8)
    assert len(list(cache.glob("*.npy"))) == 4


def test_an_interrupted_cache_leaves_no_files(pictures, monkeypatch):
    folder, pixels = pictures
    cache = folder.parent / "cache"

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "ordered_map", stop)
        with pytest.raises(KeyboardInterrupt):
            _open(folder, cache=cache)
    assert list(cache.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
        with pytest.raises(OSError, match=r"cannot be written to .*cache: 0\.0 GB are needed, .* Pass another folder"):
            _open(folder, cache=cache)
    assert torch.equal(_read_all(_open(folder, cache=cache)), pixels)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", b"{"),
        (".json", b'{"broken": ["x"]}'),
        (".json", b'{"broken": [99]}'),
        (".json", b'{"broken": [0]}'),
        (".npy", b""),
        (".npy", b"\x93NUMPY"),
    ],
)
def test_a_damaged_cache_is_written_again(suffix, content, pictures):
    """A folder that an interrupted call has left is deleted."""
    folder, pixels = pictures
    cache = folder.parent / "cache"
    _open(folder, cache=cache)
    next(cache.glob(f"*{suffix}")).write_bytes(content)
    (cache / ".saving-x" / "new").mkdir(parents=True)
    assert torch.equal(_read_all(_open(folder, cache=cache)), pixels)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]
    assert torch.equal(_read_all(_open(folder, cache=cache)), pixels)


@pytest.mark.skipif(os.name == "nt", reason="there are no locks")
def test_a_cache_that_another_process_has_just_written_is_used(pictures, monkeypatch):
    """It is looked for again when the other process has unlocked the folder."""
    folder, pixels = pictures
    cache, stored, calls = folder.parent / "cache", module._stored, []
    _open(folder, cache=cache)
    monkeypatch.setattr(module, "_stored", lambda *arguments: stored(*arguments) if calls else calls.append(1))
    monkeypatch.setattr(module, "ordered_map", None)  # nothing is decoded
    assert torch.equal(_read_all(_open(folder, cache=cache)), pixels) and calls


def test_a_cache_that_cannot_be_written_raises(pictures):
    folder, _ = pictures
    with pytest.raises(OSError, match=r"the decoded images cannot be written to .*a\.png: .* Pass another folder"):
        _open(folder, cache=folder / "a.png")


def test_a_cached_dataset_is_read_once(tmp_path):
    reads = []

    class Counting(_Dataset):
        def __getitem__(self, i):
            reads.append(i)
            return torch.full((1, 2, 2), i / 4)

    data = _open(Counting([None] * 4), cache=tmp_path)
    before = len(reads)
    images, _ = data.read([3, 1])
    assert len(reads) == before
    assert images.dtype == torch.float32 and images[:, 0, 0, 0].tolist() == [0.75, 0.25]


def test_pictures_that_do_not_fit_into_memory_are_decoded_again(pictures, monkeypatch):
    folder, pixels = pictures
    monkeypatch.setattr(module, "_IN_MEMORY", 6 * 3 * 8 * 8 - 1)
    data = _open(folder)
    assert data._array is None
    assert torch.equal(data.read([4, 0, 4])[0], pixels[[4, 0, 4]])
    (folder / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        data.read([0])


# -- The fingerprint


def test_the_fingerprint_differs_between_data(pictures, rng):
    folder, pixels = pictures
    base = _open(folder).fingerprint
    assert _open(folder).fingerprint == base
    found = {base, *(_open(folder, **options).fingerprint for options in ({"image_size": 4}, {"channels": 1}))}
    found.add(_open(folder, image_size=4, crop=None).fingerprint)
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    found.add(_open(folder).fingerprint)
    (folder / "e.png").rename(folder / "f.png")
    found.add(_open(folder).fingerprint)
    assert len(found) == 6
    images, labels = pixels.clone(), torch.tensor([0, 1, 1, 0, 0, 1])
    arrays = {_open(images).fingerprint, _open((images, labels), labels=True).fingerprint}
    arrays.add(_open((images, 1 - labels), labels=True).fingerprint)
    images[3, 1, 2, 2] ^= 1
    arrays.add(_open(images).fingerprint)
    assert len(arrays) == 4


# -- Order


def test_an_epoch_is_a_permutation():
    order = Order(7, seed=3)
    epochs = [order(7 * e, 7 * e + 7) for e in range(20)]
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 15
    assert not torch.equal(order(0, 7), Order(7, seed=4)(0, 7))
    assert order(5, 5).tolist() == []


def test_the_order_does_not_depend_on_the_requested_range():
    whole = Order(7, seed=3)(0, 30)
    for size in (1, 4, 7, 30):
        order = Order(7, seed=3)
        assert torch.equal(torch.cat([order(i, min(30, i + size)) for i in range(0, 30, size)]), whole)
    assert torch.equal(Order(7, seed=3)(26, 30), whole[26:])


def test_an_order_of_no_images_raises():
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        Order(0, seed=0)


# -- Bad input


def test_open_images_returns_opened_data_unchanged():
    data = _open(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    assert isinstance(data, ImageData) and open_images(data) is data


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (5, {}, TypeError, "data must be a folder, an .npz file, a tensor or an array, .* got int"),
        (torch.utils.data.DataLoader([0]), {}, TypeError, "got DataLoader. Pass its data set, loader.dataset."),
        (torch.zeros(3, 1, 2, 2, dtype=torch.int64), {}, TypeError, "must be uint8, or floating point.* got int64"),
        (torch.zeros(0, 1, 2, 2), {}, ValueError, r"at least one sample, got shape \(0, 1, 2, 2\)"),
        (torch.zeros(5), {}, ValueError, r"at least one sample, got shape \(5,\)"),
        (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), {}, ValueError, r"gray or RGB images .* got shape \(3, 4, 8, 8\)"),
        (torch.full((3, 1, 8, 8), -1.0), {}, ValueError, r"values in \[0, 1\], got values from -1 to -1"),
        (torch.full((3, 3, 8, 8), 255.0), {}, ValueError, r"in \[0, 1\], got values from 255 to 255\. Write .*/ 255"),
        (torch.full((3, 1, 8, 8), math.nan), {}, ValueError, r"images must have values in \[0, 1\], got NaN"),
        (torch.zeros(3, 1, 8, 8), {"image_size": 4}, ValueError, r"images of shape \(1, 4, 4\), got \(1, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8), {"channels": 3}, ValueError, r"images of shape \(3, 8, 8\), got \(1, 8, 8\)"),
        (torch.zeros(3, 2), {"labels": True}, ValueError, "the array has no labels. Pass a pair"),
        ((torch.zeros(3, 2), [0, 1]), {"labels": True}, ValueError, r"one per image, \(3,\), got shape \(2,\)"),
        (
            (torch.zeros(2, 2), [0, -1]),
            {"labels": True},
            ValueError,
            "must be integers from 0, got -1. Number the classes from 0",
        ),
        ((torch.zeros(2, 2), [0.5, 1]), {"labels": True}, ValueError, "or strings, got float64. Convert them"),
        ((torch.zeros(3, 2), torch.eye(3)), {"labels": True}, ValueError, r"got shape \(3, 3\)\. Write labels.argmax"),
        ({"x": torch.zeros(3, 2)}, {"labels": True}, ValueError, r"Pass label_key, or leave out labels=True\."),
        (torch.zeros(3, 2), {"crop": "left"}, ValueError, "crop must be one of 'center', 'celeba', None, got 'left'"),
        (torch.zeros(3, 2), {"channels": 2}, ValueError, "channels must be one of 1, 3, None, got 2"),
        (torch.zeros(3, 2), {"image_size": 0}, ValueError, "image_size must be .* got 0"),
        (torch.zeros(3, 2), {"image_size": (4, 4, 3)}, ValueError, "image_size must be .* got"),
        (torch.zeros(3, 2), {"workers": 0}, ValueError, "workers must be an integer of at least 1, got 0"),
        (_Dataset([]), {}, ValueError, "the _Dataset is empty"),
        (_Dataset([torch.zeros(1, 2, 2)]), {"labels": True}, ValueError, "must be .image, label., but item 0"),
        (
            _Dataset([torch.zeros(1, 2, 2, dtype=torch.int32)]),
            {},
            TypeError,
            "Dataset must be .* uint8 or .* got int32",
        ),
        (["faces/a.png"], {}, TypeError, r"Dataset must be an image or a tuple \(image, label\), .* got str"),
        ([{"image": torch.zeros(1, 2, 2)}], {}, TypeError, r"a tuple \(image, label\), .* got dict"),
        (_Dataset([torch.full((1, 2, 2), -1.0)]), {}, ValueError, r"item 0 .*in \[0, 1\], got values from -1 to -1"),
        (_Dataset([torch.full((3, 2, 2), 99.0)]), {}, ValueError, r"item 0 of the _Dataset: images .*images / 255"),
        (_Dataset([torch.full((2,), math.inf)]), {}, ValueError, "item 0 of the _Dataset: it must be finite"),
        (_Table({"image": []}), {}, ValueError, "the data set is empty"),
        (_Table({"image": [np.zeros((8, 8))]}), {}, ValueError, "a picture of Pillow or a uint8 array, got float64"),
        (_Table({"image": [np.zeros((8, 8, 5), np.uint8)]}), {}, OSError, "none of the 1 images .*Cannot handle"),
        (_Dataset([(torch.zeros(1, 2, 2), 1.7)]), {"labels": True}, ValueError, "or strings, got float64"),
        (_Dataset([(torch.zeros(1, 2, 2), torch.eye(3)[0])]), {"labels": True}, ValueError, r"got shape \(1, 3\)"),
        (torch.zeros(3, 2), {"image_size": 8.0}, ValueError, r"image_size must be .* got 8\.0"),
    ],
)
def test_invalid_data_raise(source, options, error, message):
    with pytest.raises(error, match=message):
        _open(source, **options)


def test_an_item_of_another_shape_raises():
    data = _open(_Dataset([torch.zeros(1, 2, 2), torch.zeros(1, 3, 2)]))
    with pytest.raises(ValueError, match=r"the _Dataset must .*item 1 has \(1, 3, 2\) and item 0 has \(1, 2, 2\)"):
        data.read([0, 1])


def test_a_dataset_without_a_length_raises():
    class Endless(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return torch.zeros(1, 2, 2)

    with pytest.raises(TypeError, match="the Endless must have a length, so that it can be shuffled"):
        _open(Endless())


def test_a_folder_without_pictures_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(FileNotFoundError, match="and its subfolders contain no image files"):
        _open(tmp_path)


def test_a_subfolder_that_cannot_be_read_raises(pictures, monkeypatch):
    folder, _ = pictures
    inner, scandir = str(folder / "inner"), os.scandir

    def refusing(path):
        if os.fspath(path) == inner:
            raise PermissionError(13, "Permission denied", inner)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"denied; make this folder readable, or move it out of .*inner'$"):
        _open(folder)


def test_files_of_other_kinds_raise(tmp_path):
    hints = {
        "notes.txt": "$",
        "faces.zip": " Unpack it",
        "x.NPY": r" Write np\.savez",
        "x.csv": r" Write its numbers as an ",
    }
    for name, hint in hints.items():
        (tmp_path / name).write_text("nothing to see")
        with pytest.raises(ValueError, match=rf"an \.npz file, got the file .*{re.escape(name)}\.{hint}"):
            _open(tmp_path / name)
    (tmp_path / "data.npz").write_bytes(b"nothing to see")
    with pytest.raises(ValueError, match=r"data\.npz cannot be read as an \.npz file"):
        _open(tmp_path / "data.npz")


def test_without_pillow_the_error_names_the_extra(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for options in ({}, {"image_size": 8, "channels": 3}):
        with pytest.raises(ImportError, match=r"pip install \"scorematch"):
            _open(pictures[0], **options)


def test_reading_leaves_the_global_generators_alone(pictures):
    state = torch.get_rng_state()
    data = _open(pictures[0])
    data.read(Order(len(data), seed=0)(0, 6))
    assert isinstance(state, Tensor) and torch.equal(state, torch.get_rng_state())
