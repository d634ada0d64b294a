import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch.images import grid, save_grid, save_image


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
