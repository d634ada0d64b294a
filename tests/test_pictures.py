"""Reading, checking and writing pictures, grids and animations."""

import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch.data import open_images
from scorematch.data.pictures import (
    check_picture,
    grid,
    list_pictures,
    open_picture,
    read_image,
    read_mask,
    save_animation,
    save_grid,
    save_image,
)


def test_grid_places_images_row_by_row():
    images = torch.arange(1, 6).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 10
    whole = grid(images, columns=2, padding=1)
    assert whole.shape == (1, 10, 9)
    assert whole[0, 1:3, 1:4].unique().item() == images[0, 0, 0, 0]
    assert whole[0, 1:3, 5:8].unique().item() == images[1, 0, 0, 0]
    assert whole[0, 7:9, 1:4].unique().item() == images[4, 0, 0, 0]
    assert (whole[0, 7:9, 5:8] == 0).all() and (whole[0, 0] == 0).all() and (whole[0, :, -1] == 0).all()
    assert grid(torch.ones(10, 3, 4, 4)).shape == (3, 3 * 6 + 2, 4 * 6 + 2)  # the default grid is nearly square


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_rounded_values(channels, tmp_path, rng):
    image = torch.rand(channels, 5, 7, generator=rng)
    image[0, 0, :2] = torch.tensor([-0.4, 255.4]) / 255  # up to half a gray level outside of [0, 1] is rounded
    save_image(image, tmp_path / "deep" / "image.png")
    with Image.open(tmp_path / "deep" / "image.png") as picture:
        found = np.asarray(picture)
    expected = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(found.reshape(5, 7, channels), expected)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["image.png"]


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".bmp", ".tif", ".webp"])
def test_images_of_every_format_are_written_and_read(ending, tmp_path):
    save_image(torch.full((3, 8, 8), 0.25), tmp_path / f"image{ending}")
    torch.testing.assert_close(
        read_image(tmp_path / f"image{ending}", 3), torch.full((3, 8, 8), 0.25), rtol=0, atol=0.02
    )


@pytest.mark.filterwarnings("ignore:IM image:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_that_is_accepted_can_be_written(channels, tmp_path):
    formats = {kind: ending for ending, kind in Image.registered_extensions().items()}
    written = 0
    for ending in formats.values():
        try:
            check_picture(tmp_path / f"image{ending}")
        except ValueError:
            continue
        save_image(torch.full((channels, 8, 8), 0.25), tmp_path / f"image{ending}")
        written += 1
    assert written > 5


def test_saved_images_have_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_text("")
    save_image(torch.zeros(1, 2, 2), tmp_path / "image.png")
    assert (tmp_path / "image.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_save_grid_writes_a_grid(tmp_path):
    save_grid(torch.ones(4, 1, 8, 8), tmp_path / "grid.png", columns=4)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 10 + 2, 12)


def test_save_grid_refuses_other_shapes_and_columns(tmp_path):
    with pytest.raises(ValueError, match=r"images must be \(N, 1, H, W\) or .*, got shape \(4, 8, 8, 3\)"):
        save_grid(torch.ones(4, 8, 8, 3), tmp_path / "grid.png")
    with pytest.raises(TypeError, match=r"columns must be an integer of at least 1, got 1\.5"):
        save_grid(torch.ones(4, 1, 8, 8), tmp_path / "grid.png", columns=1.5)


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    save_image(torch.zeros(1, 2, 2), tmp_path / "image.png")
    before = (tmp_path / "image.png").read_bytes()

    def save(self, *arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="disk full"):
        save_image(torch.ones(1, 2, 2), tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_check_picture_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a" / "b" / "image.png", "image.jpg", "a/image.png"):
        check_picture(path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is not a folder"):
        check_picture(tmp_path / "file" / "image.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="you have no write permission for"):
        check_picture("image.png")


UNITS = [
    (torch.linspace(-1, 1, 16).view(1, 4, 4), r"values in \[0, 1\], got values from -1 to 1. Write \(image \+ 1\) / 2"),
    (torch.linspace(0, 255, 16).view(1, 4, 4), "got values from 0 to 255.*image / 255 for 8-bit values"),
    (torch.full((1, 4, 4), 1.01), r"got values from .* to 1.01.*image.clamp\(0, 1\)"),
    (torch.full((1, 4, 4), torch.nan), "got NaN"),
    (torch.full((1, 4, 4), torch.inf), "got values from .* to inf"),
]


@pytest.mark.parametrize(("image", "message"), UNITS)
def test_images_in_other_units_raise(image, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_image(image, tmp_path / "image.png")
    with pytest.raises(ValueError, match=message):
        save_grid(image[None], tmp_path / "image.png")
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_floating_point_raise(tmp_path):
    message = r"floating-point tensor in \[0, 1\], got"
    for image, rest in [
        (torch.ones(1, 4, 4).byte(), "torch.uint8. Write image / 255"),
        (np.ones((1, 4, 4)), "ndarray. Write torch.as_tensor"),
    ]:
        with pytest.raises(TypeError, match=f"{message} {rest}"):
            save_image(image, tmp_path / "image.png")
    for images in (np.ones((2, 1, 4, 4)), [torch.ones(1, 4, 4)]):
        with pytest.raises(TypeError, match=r"images must be a tensor .* got (ndarray|list). Write torch.as_tensor"):
            save_grid(images, tmp_path / "image.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(torch.ones(3, 4, 4)), r"\(N, C, H, W\) with at least one image, got shape \(3, 4, 4\)"),
        (lambda: grid(torch.ones(0, 1, 4, 4)), "at least one"),
        (lambda: grid(torch.ones(1, 1, 4, 4), columns=0), "columns must be an integer of at least 1"),
        (lambda: save_image(torch.ones(2, 4, 4), "x.png"), r"\(1, H, W\) or \(3, H, W\), got shape \(2, 4, 4\)"),
        (lambda: save_image(torch.ones(1, 0, 4), "x.png"), r"got shape \(1, 0, 4\)"),
        (
            lambda: save_image(torch.ones(1, 4, 4), "x.digits"),
            "must end in the extension of an image format, such as .png, got x.digits",
        ),
        (lambda: check_picture("x.psd"), "must end in the extension of an image format"),  # Pillow only reads it
        (lambda: check_picture("x.h5"), "must end in the extension of an image format"),  # Pillow has no encoder
        (lambda: check_picture("x.ico"), "must end in the extension of an image format"),  # Pillow would scale it
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_pillow_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "scorematch\[images\]"'):
        save_image(torch.ones(1, 2, 2), tmp_path / "x.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_are_read_unchanged(channels, tmp_path, rng):
    image = torch.randint(256, (channels, 5, 7), generator=rng) / 255
    save_image(image, tmp_path / "image.png")
    assert torch.equal(read_image(tmp_path / "image.png", channels), image)


def test_palette_transparent_and_rotated_pictures_are_read(tmp_path):
    colors = np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)
    Image.fromarray(colors).save(tmp_path / "rgb.png")
    torch.testing.assert_close(read_image(tmp_path / "rgb.png", 1)[0, 0], torch.tensor([76, 150]) / 255)
    Image.fromarray(colors).convert("P").save(tmp_path / "palette.png")
    assert torch.equal(read_image(tmp_path / "palette.png", 3), torch.from_numpy(colors).permute(2, 0, 1) / 255)
    see_through = np.dstack([colors, np.array([[255, 0]], np.uint8)])
    Image.fromarray(see_through).save(tmp_path / "rgba.png")
    assert torch.equal(read_image(tmp_path / "rgba.png", 3)[:, 0, 1], torch.zeros(3))  # transparent pixels are black
    turned = Image.fromarray(colors)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", 3).shape == (3, 2, 1)


DEEP = np.full((4, 6), 32768, np.uint16)
DEEP[0, 0], DEEP[0, 1] = 0, 65535


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("gray.png", DEEP),  # Pillow's mode "I;16"
        ("gray.tif", DEEP),
        ("big-endian.tif", DEEP.astype(">u2")),  # "I;16B"
        ("integers.tif", DEEP.astype(np.int32)),  # "I"
        ("floats.tif", (DEEP / 65535).astype(np.float32)),  # "F"
    ],
)
def test_gray_pictures_of_more_than_8_bits_are_read_exactly(name, pixels, channels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    image = read_image(tmp_path / name, channels)
    assert image.shape == (channels, 4, 6) and image.dtype == torch.float32
    assert image[:, 0, 0].tolist() == [0] * channels and image[:, 0, 1].tolist() == [1] * channels
    torch.testing.assert_close(image[:, 1:], torch.full((channels, 3, 6), 32768 / 65535), rtol=0, atol=1e-7)


def _png(path, depth, color, rows, *chunks):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = len(rows), len(rows[0]) // {0: 1, 2: 3, 4: 2, 6: 4}[color]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_transparent_gray_of_16_bits_is_black(tmp_path):
    _png(tmp_path / "gray.png", 16, 0, DEEP.tolist(), (b"tRNS", struct.pack(">H", 32768)))
    assert read_image(tmp_path / "gray.png", 1).sum() == 1


def test_gray_with_transparency_of_16_bits_is_read_with_8_bits(tmp_path):
    _png(tmp_path / "gray-alpha.png", 16, 4, [[32768, 65535, 32768, 0]])
    torch.testing.assert_close(read_image(tmp_path / "gray-alpha.png", 1).flatten(), torch.tensor([128, 0]) / 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_pictures_of_every_mode_of_at_most_8_bits_are_read(mode, tmp_path):
    name = "image.tif" if mode in ("CMYK", "YCbCr", "PA", "LAB") else "image.png"
    white = Image.new("RGB", (3, 2), "white")
    image = white.convert("P").convert(mode) if mode == "PA" else white.convert(mode)
    # Pillow 12.3 cannot read the uncompressed YCbCr that it writes.
    image.save(tmp_path / name, compression="tiff_lzw" if mode == "YCbCr" else None)
    for channels in (1, 3):
        image = read_image(tmp_path / name, channels)
        torch.testing.assert_close(image, torch.ones(channels, 2, 3), rtol=0, atol=0.01)


def test_pictures_with_values_out_of_range_raise(tmp_path):
    for name, pixels, message in [
        ("large.tif", DEEP.astype(np.int32) * 2, "from 0 to 65535, got values from 0 to 131070"),
        ("negative.tif", DEEP.astype(np.int32) - 1, "from 0 to 65535, got values from -1 to 65534"),
        ("floats.tif", DEEP.astype(np.float32), "from 0 to 1, got values from 0 to 65535"),
        ("nan.tif", np.full((2, 2), np.nan, np.float32), "from 0 to 1, got values from nan to nan"),
    ]:
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(OSError, match=rf"{name} cannot be read as an image: its pixel values must be {message}"):
            read_image(tmp_path / name, 1)


def test_pictures_of_a_folder_are_listed_by_name(tmp_path):
    for name in ("b.png", "a.jpg"):
        save_image(torch.zeros(1, 4, 4), tmp_path / name)
    for name in ("notes.txt", "data.h5"):  # Pillow registers .h5
        (tmp_path / name).write_text("no picture")
    (tmp_path / "._a.jpg").write_text("metadata of a file system")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpg", "b.png"]
    assert list_pictures(tmp_path / "b.png") == [tmp_path / "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty contains no image files"):
        list_pictures(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nothing is neither an image file nor a folder"):
        list_pictures(tmp_path / "nothing")


def test_pictures_of_a_folder_in_unknown_formats_are_named(tmp_path):
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (tmp_path / name).write_bytes(b"ftypheic")
    with pytest.raises(
        FileNotFoundError, match=r"files that can be read\. Convert pictures such as IMG_1\.HEIC to PNG or JPEG"
    ):
        list_pictures(tmp_path)
    save_image(torch.zeros(1, 4, 4), tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"^2 of the 3 pictures in .* are left out: IMG_1\.HEIC, \.\.\.$"):
        assert list_pictures(tmp_path) == [tmp_path / "a.png"]


SEEN = torch.ones(32, 48, dtype=torch.bool)  # white, with a black box that begins and ends inside of blocks of JPEG
SEEN[9:21, 13:30] = False


def _drawn(kind):
    """The mask as people draw it: a picture of Pillow, the ending of its file, and how many pixels are undecided."""
    gray = Image.fromarray(SEEN.numpy().astype(np.uint8) * 255)
    color = np.where(SEEN.numpy()[..., None], np.uint8([255, 230, 210]), np.uint8([120, 0, 40]))
    if kind == "deep":
        return Image.fromarray(SEEN.numpy().astype(np.uint16) * 65535), "png", 0
    if kind == "soft":
        edge = SEEN.numpy() * 0.99
        edge[8, 13:30], edge[9, 13:30] = 0.55, 0.45
        return Image.fromarray((edge * 255).astype(np.uint8)), "png", 34
    if kind == "color":
        return Image.fromarray(color), "png", 0
    if kind == "alpha":  # erased where the picture is missing
        return Image.merge("LA", (Image.new("L", gray.size, 255), gray)), "png", 0
    if kind == "jpeg":
        return gray, "jpg", 0
    return gray.convert({"bits": "1", "palette": "P", "cmyk": "CMYK"}[kind]), "tif" if kind == "cmyk" else "png", 0


@pytest.mark.parametrize("kind", ["bits", "deep", "palette", "cmyk", "soft", "color", "alpha", "jpeg"])
def test_a_mask_of_any_kind_is_cut_at_one_half(kind, tmp_path, recwarn):
    picture, ending, undecided = _drawn(kind)
    picture.save(tmp_path / f"mask.{ending}")
    assert torch.equal(read_mask(tmp_path / f"mask.{ending}"), SEEN)
    warned = [str(each.message) for each in recwarn]
    assert len(warned) == (undecided > 0)
    assert not undecided or f"{undecided} of the 1536 pixels of the mask {tmp_path}/mask.png are undecided" in warned[0]


def test_a_photograph_is_no_mask(tmp_path):
    save_image(0.3 + 0.4 * torch.rand(3, 8, 8), tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"a mask must be black and white, but \d+ of the 64 pixels of .*photo.png"):
        read_mask(tmp_path / "photo.png")


def test_a_mask_of_the_numbers_0_and_1_is_not_black(tmp_path):
    Image.fromarray(SEEN.numpy().astype(np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"the brightest pixel of .*mask\.png has 0\.39 % of white\. Write 255"):
        read_mask(tmp_path / "mask.png")
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    assert not read_mask(tmp_path / "black.png").any()


def test_a_truncated_picture_raises(tmp_path):
    save_image(torch.rand(3, 64, 64), tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(OSError, match=r"part\.png cannot be read as an image: .*truncated"):
        read_image(tmp_path / "part.png", 3)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png", 3)


def test_a_file_that_is_not_an_image_raises(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"broken\.png cannot be read as an image"):
        read_image(tmp_path / "broken.png", 3)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png", 3)
    with pytest.raises(ValueError, match="channels must be one of 1, 3, got 4"):
        read_image(tmp_path / "broken.png", 4)


def test_a_damaged_picture_of_any_format_is_named(tmp_path, monkeypatch):
    def fails(self, *arguments):
        raise RuntimeError("Failed to decode image")  # as Pillow for AVIF

    save_image(torch.zeros(1, 4, 4), tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(OSError, match=r"a\.png cannot be read as an image: Failed to decode image"):
        read_image(tmp_path / "a.png", 3)


def test_a_picture_of_more_pixels_than_its_file_can_hold_raises(tmp_path):
    """A GIF of few bytes with a screen of 36 million pixels."""
    path = tmp_path / "a.gif"
    Image.new("L", (4, 4)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:6] + struct.pack("<HH", 6000, 6000) + data[10:])
    with pytest.raises(
        OSError, match=r"a\.gif cannot be read as an image: it has 6000 x 6000 pixels, too many for a file of \d+ by"
    ):
        read_image(path, 1)
    flat = tmp_path / "flat.png"
    Image.new("1", (3000, 3000)).save(flat)  # a mask without edges is no bomb
    with open_picture(flat) as picture:
        assert picture.size == (3000, 3000)


# -- Animations


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_has_all_images_and_holds_the_last(tmp_path, channels):
    images = [torch.full((channels, 4, 6), value / 255) for value in (0, 100, 200, 255)]
    path = tmp_path / "new" / "a.gif"
    save_animation([*images[:-1], (images[-1] * 255).to(torch.uint8)], path, seconds=0.36, hold=1.5)
    with Image.open(path) as file:
        assert (file.n_frames, file.size, file.info["loop"]) == (4, (6, 4), 0)
        for i, duration in enumerate((120, 120, 120, 1500)):
            file.seek(i)
            assert file.info["duration"] == duration
            assert np.array_equal(np.array(file.convert("RGB"))[..., 0] / np.float32(255), images[i][0].numpy())
    assert [file.name for file in path.parent.iterdir()] == ["a.gif"]


def test_the_images_of_an_animation_are_shown_for_at_least_20_milliseconds(tmp_path):
    save_animation([torch.full((1, 2, 2), i / 9) for i in range(10)], tmp_path / "a.gif", seconds=0.01)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 10 and file.info["duration"] == 20


def test_an_animation_that_cannot_be_written_raises(tmp_path):
    image = torch.zeros(1, 4, 4)
    for frames, name, message in [
        ([], "a.gif", r"at least one image, all of the same shape, got shapes \[\]"),
        ([image, torch.zeros(1, 4, 5)], "a.gif", r"all of the same shape, got shapes \[\(1, 4, 4\), \(1, 4, 5\)\]"),
        ([image], "a.png", r"the path of an animation must end in \.gif, got .*a\.png"),
        ([image + 2], "a.gif", r"image must have values in \[0, 1\]"),
        ([torch.zeros(2, 4, 4)], "a.gif", r"image must be \(1, H, W\) or \(3, H, W\), got shape \(2, 4, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_animation(frames, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# -- Pictures of 16 bits ----------------------------------------------------------------------------------------------


def test_pictures_of_16_bits_are_read_with_16_bits(tmp_path):
    """In gray and in color, alone and as training data, where pictures of 8 bits have the same scale."""
    random = np.random.default_rng(0)
    color = random.integers(0, 65536, (6, 5, 4)).astype(np.uint16)
    expected = torch.from_numpy(color[..., :3] / 65535 * (color[..., 3:] / 65535)).permute(2, 0, 1).float()
    opaque = torch.from_numpy(color[..., :3] / 65535).permute(2, 0, 1).float()
    _png(tmp_path / "a.png", 16, 6, color.reshape(6, -1).tolist())
    _png(tmp_path / "b.png", 16, 2, color[..., :3].reshape(6, -1).tolist())
    Image.fromarray(color[..., 0]).save(tmp_path / "c.png")
    Image.fromarray((color[..., :3] // 257).astype(np.uint8)).save(tmp_path / "d.png")
    torch.testing.assert_close(read_image(tmp_path / "a.png", 3), expected)
    luma = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * opaque).sum(0, keepdim=True)
    torch.testing.assert_close(read_image(tmp_path / "b.png", 1), luma)
    data = open_images(tmp_path, image_size=(6, 5), channels=3, cache=tmp_path / "cache", progress=False)
    x, _ = data.read([0, 1, 2, 3])
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:3], torch.stack([expected, opaque, opaque[:1].expand(3, -1, -1)]))
    torch.testing.assert_close(x[3], opaque, atol=1 / 255, rtol=0)
    small, _ = open_images(tmp_path, image_size=3, channels=3, progress=False).read([1])
    assert float((small * 255 - (small * 255).round()).abs().max()) > 0 and small.shape == (1, 3, 3, 3)
