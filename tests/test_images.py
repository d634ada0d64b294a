import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch.images import grid, list_pictures, read_image, read_mask, save_grid, save_image


def test_grid_places_images_row_by_row():
    images = torch.arange(1, 6).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 10
    whole = grid(images, columns=2, padding=1)
    assert whole.shape == (1, 10, 9)
    assert whole[0, 1:3, 1:4].unique().item() == images[0, 0, 0, 0]
    assert whole[0, 1:3, 5:8].unique().item() == images[1, 0, 0, 0]
    assert whole[0, 7:9, 1:4].unique().item() == images[4, 0, 0, 0]
    assert (whole[0, 7:9, 5:8] == 0).all() and (whole[0, 0] == 0).all() and (whole[0, :, -1] == 0).all()
    assert grid(torch.ones(10, 3, 4, 4)).shape == (3, 3 * 6 + 2, 4 * 6 + 2)  # about square


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_rounded_values(channels, tmp_path, rng):
    image = torch.rand(channels, 5, 7, generator=rng) * 1.4 - 0.2  # beyond [0, 1]: clamped
    image[0, 0, 0] = torch.nan
    save_image(image, tmp_path / "deep" / "image.png")
    with Image.open(tmp_path / "deep" / "image.png") as picture:
        found = np.asarray(picture)
    expected = (image.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(found.reshape(5, 7, channels), expected)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["image.png"]


def test_save_grid(tmp_path):
    save_grid(torch.ones(4, 1, 8, 8), tmp_path / "grid.png", columns=4)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 10 + 2, 12)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(torch.ones(3, 4, 4)), r"shape \(N, C, H, W\), at least one, got \(3, 4, 4\)"),
        (lambda: grid(torch.ones(0, 1, 4, 4)), "at least one"),
        (lambda: grid(torch.ones(1, 1, 4, 4), columns=0), "columns must be at least 1"),
        (lambda: save_image(torch.ones(2, 4, 4), "x.png"), r"\(1, H, W\) or \(3, H, W\), got \(2, 4, 4\)"),
        (lambda: save_image(torch.ones(1, 4, 4), "x.digits"), "does not end with a kind of picture, such as .png"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_pillow_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import torch; from scorematch.images import save_image\n"
        "save_image(torch.ones(1, 2, 2), 'x.png')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "scorematch[images]"' in done.stderr


@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_saved_is_read_back(channels, tmp_path, rng):
    image = torch.randint(256, (channels, 5, 7), generator=rng) / 255
    save_image(image, tmp_path / "image.png")
    assert torch.equal(read_image(tmp_path / "image.png", channels), image)


def test_pictures_of_other_modes_are_read(tmp_path):
    colors = np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)
    Image.fromarray(colors).save(tmp_path / "rgb.png")
    torch.testing.assert_close(read_image(tmp_path / "rgb.png", 1)[0, 0], torch.tensor([76, 150]) / 255)
    Image.fromarray(colors).convert("P").save(tmp_path / "palette.png")
    assert torch.equal(read_image(tmp_path / "palette.png", 3), torch.from_numpy(colors).permute(2, 0, 1) / 255)
    see_through = np.dstack([colors, np.array([[255, 0]], np.uint8)])
    Image.fromarray(see_through).save(tmp_path / "rgba.png")
    assert torch.equal(read_image(tmp_path / "rgba.png", 3)[:, 0, 1], torch.zeros(3))  # black shows through
    turned = Image.fromarray(colors)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", 3).shape == (3, 2, 1)


def test_pictures_of_a_folder_come_by_name(tmp_path):
    for name in ("b.png", "a.jpg"):
        save_image(torch.zeros(1, 4, 4), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpg", "b.png"]
    assert list_pictures(tmp_path / "b.png") == [tmp_path / "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no pictures"):
        list_pictures(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nothing is neither a picture nor a folder"):
        list_pictures(tmp_path / "nothing")


def test_masks_are_black_and_white(tmp_path):
    seen = torch.rand(6, 9) > 0.5
    save_image(seen[None].float(), tmp_path / "mask.png")
    assert torch.equal(read_mask(tmp_path / "mask.png"), seen)
    save_image(torch.tensor([[[0.0, 0.5, 1.0]]]), tmp_path / "soft.png")
    with pytest.raises(ValueError, match=r"soft.png is no mask: 1 of its 3 pixels are neither black nor white"):
        read_mask(tmp_path / "soft.png")


def test_a_truncated_picture_is_named(tmp_path):
    save_image(torch.rand(3, 64, 64), tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(OSError, match=r"part\.png is no picture that can be read: .*truncated"):
        read_image(tmp_path / "part.png", 3)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png", 3)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"broken\.png is no picture that can be read"):
        read_image(tmp_path / "broken.png", 3)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png", 3)
    with pytest.raises(ValueError, match="a picture has 1 channel or 3, not 4"):
        read_image(tmp_path / "broken.png", 4)
