"""Pictures of any size, which are resized for a network or restored in tiles: what is known keeps its bits."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.cli import main, restore
from scorematch.core.randomness import seed_of
from scorematch.data import read_image, save_image
from scorematch.data.pictures import fit_picture
from scorematch.guidance import Tiled
from scorematch.restoration import (
    JPEG,
    AveragePool,
    Blur,
    GaussianBlur,
    Grayscale,
    Mask,
    Observation,
    Photograph,
    Resize,
    Uncrop,
)
from scorematch.restoration.palette import condition_of
from tests.helpers import refused, run, seed

OWN = (3, 16, 16)  # the shape of the network's images


SIZES = [(16, 16), (40, 31), (120, 50), (64, 64)]  # of the slow tests


def _net(channels=3, size=16):
    torch.manual_seed(0)
    schedule = NoiseSchedule([1.0, 0.1, 0.01])
    return ScoreNet.unet(channels, size, widths=(4, 6), layers_per_block=1, schedule=schedule)


def _picture(height, width, channels=3):
    """A picture with 8 bits."""
    return torch.randint(0, 256, (1, channels, height, width), generator=seed()).float() / 255


def _hole(height, width, top=0.4, left=0.3, tall=0.2, wide=0.3):
    known = torch.ones(height, width, dtype=torch.bool)
    known[int(top * height) : int((top + tall) * height) + 1, int(left * width) : int((left + wide) * width) + 1] = (
        False
    )
    return known


def _restored(photo, n=2):
    net = _net(photo.shape[0])
    sampler = AnnealedLangevinSampler(Tiled(net, 16) if photo.tile else net, levels=3)
    return photo.restored(run(sampler, n, observation=photo.observation, generator=0))


# -- What is known


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize(
    ("height", "width"), [(17, 16), (18, 60), *(pytest.param(*size, marks=pytest.mark.slow) for size in SIZES)]
)
def test_outside_of_a_hole_the_picture_keeps_its_bits(height, width, tile, tmp_path):
    x, known = _picture(height, width), _hole(height, width)
    photo = Photograph(Mask(known), Mask(known).measure(x), OWN, tile=tile)
    found = _restored(photo)
    assert found.shape == (2, 3, height, width) and photo.shape == (3, height, width)
    save_image(found[0], tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 3)[:, known], x[0][:, known])
    assert found[..., ~known].std() > 0 and not torch.equal(found[0], found[1])
    assert photo.tile == tile and photo.resized == (not tile and (height, width) != (16, 16))


@pytest.mark.parametrize(("size", "tile"), [((5, 7), False), ((33, 50), None), ((16, 20), True)])
def test_borders_are_added_to_pictures_of_any_size(size, tile):
    y, operator = _picture(*size), Uncrop(left=3, bottom=2)
    found = _restored(Photograph(operator, y, OWN, tile=tile))
    assert found.shape == (2, 3, size[0] + 2, size[1] + 3)
    assert torch.equal(operator.measure(found), y.expand(2, -1, -1, -1))


@pytest.mark.parametrize("size", [(8, 12), pytest.param((40, 90), marks=pytest.mark.slow)])
def test_a_colored_picture_keeps_its_luma(size):
    x = _picture(*size)
    luma = Grayscale().measure(x)
    found = _restored(Photograph(Grayscale(), luma, OWN))
    assert found.min() >= 0 and found.max() <= 1 and found.std(1).mean() > 0.01
    torch.testing.assert_close(Grayscale().measure(found), luma.expand(2, -1, -1, -1), rtol=0, atol=2e-6)


def test_the_colors_of_the_right_size_return():
    """The luma of a smooth picture with the colors of the same picture at the size of the network is the picture."""
    ramp = torch.linspace(0.2, 0.8, 160)
    x = torch.stack([ramp.expand(160, -1), ramp[:, None].expand(-1, 160), 0 * ramp.expand(160, -1) + 0.5])[None]
    photo = Photograph(Grayscale(), Grayscale().measure(x), OWN)
    small = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(photo.restored(small)[..., 10:-10, 10:-10], x[..., 10:-10, 10:-10], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("operator", "size"),
    [
        (AveragePool(4), (10, 10)),
        pytest.param(Resize(2), (10, 10), marks=pytest.mark.slow),
        pytest.param(JPEG(10), (48, 48), marks=pytest.mark.slow),
        (GaussianBlur(2.0), (40, 40)),
    ],
)
def test_a_restoration_gets_what_its_measurement_lacks(operator, size):
    """Of the right image at the size of the network, its measurement is nearer to y than that of the enlarged image."""
    height, width = operator.sample_shape(_picture(*size))[1:] if not isinstance(operator, Blur) else size
    x = torch.nn.functional.interpolate(_picture(4, 4), (height, width), mode="bicubic", antialias=True)
    x = 0.1 + 0.8 * x.clamp(0, 1)
    y = operator.measure(x)
    photo = Photograph(operator, y, OWN)
    assert photo.resized and not photo.tile and photo.shape == (3, height, width)
    small = torch.nn.functional.interpolate(photo.box.of(x), (16, 16), mode="bilinear", antialias=True)
    enlarged = photo.box.back(
        torch.nn.functional.interpolate(small, photo.box[:1:-1], mode="bicubic", antialias=True), (height, width)
    )
    error = [float((operator.measure(each) - y).square().mean()) for each in (photo.restored(small), enlarged)]
    assert error[0] < 0.7 * error[1]
    of_small = photo.observation.operator
    measured, given = of_small.measure(small), photo.observation.y
    if operator.is_linear:
        whole = operator.measure(enlarged)
        same = whole.shape == enlarged.shape
        small_again = torch.nn.functional.interpolate(photo.box.of(whole), (16, 16), mode="bilinear", antialias=True)
        torch.testing.assert_close(measured, small_again if same else whole, rtol=0, atol=1e-5)
        svd = of_small.decomposition(small)
        torch.testing.assert_close(svd.measured(measured), svd.values * svd.coefficients(small), rtol=0, atol=1e-5)
    assert (measured - given).square().mean().sqrt() < 0.04  # the small image fits the observation that is made of y
    assert _restored(photo).shape == (2, 3, height, width)


@pytest.mark.parametrize("operator", [AveragePool(4), Resize(4), GaussianBlur(1.0)])
def test_a_network_that_restores_gets_an_image_of_its_size(operator):
    x = torch.nn.functional.interpolate(_picture(4, 4), (24, 40), mode="bicubic", antialias=True)
    photo = Photograph(operator, operator.measure(x), OWN)
    assert photo.resized and photo.box == (0, -8, 40, 40)
    condition = condition_of(photo.observation.operator, photo.observation.y, seed())
    small = torch.nn.functional.interpolate(photo.box.of(x), (16, 16), mode="bilinear", antialias=True)
    assert condition.shape == (1, *OWN)
    assert (condition - small)[..., 5:-5, :].square().mean().sqrt() < 0.1


def test_what_is_not_known_comes_from_the_restoration():
    """A constant restoration fills the hole with its color, also where the hole has pixels outside of one pixel."""
    x, known = _picture(80, 64), _hole(80, 64)
    photo = Photograph(Mask(known), Mask(known).measure(x), OWN)
    found = photo.restored(torch.full((1, *OWN), 0.25))
    torch.testing.assert_close(found[..., ~known], torch.full_like(found[..., ~known], 0.25), rtol=0, atol=1e-6)


def test_feathering_blends_a_ring_around_the_hole_and_nothing_else():
    x, known = _picture(64, 64), _hole(64, 64)
    photo = Photograph(Mask(known), Mask(known).measure(x), OWN, feather=3)
    found = photo.restored(torch.full((1, *OWN), 0.25))
    far = torch.nn.functional.max_pool2d((~known)[None].float(), 7, 1, 3)[0] == 0
    near = torch.nn.functional.max_pool2d((~known)[None].float(), 3, 1, 1)[0] > 0
    assert torch.equal(found[0][:, far], x[0][:, far])
    ring = near & known
    torch.testing.assert_close(found[0][:, ring], 0.25 * x[0][:, ring] + 0.75 * 0.25, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (Mask(_hole(40, 64, left=0.05)), {"feather": 3}),  # the box begins at the hole
        (GaussianBlur(2.0), {"crop": "center"}),
        (JPEG(30), {"crop": (5, 3, 30, 30)}),
    ],
)
def test_what_lies_beside_the_part_that_is_resized_is_not_black(operator, options):
    x = torch.full((1, 3, 40, 64), 0.5)
    photo = Photograph(operator, operator.measure(x), OWN, tile=False, **options)
    assert photo.box.left > 0 and photo.box.width < 64
    small = torch.full((1, *OWN), 0.5)
    torch.testing.assert_close(photo.restored(small), x, rtol=0, atol=3e-3)
    measured, y = photo.observation.operator.measure(small), photo.observation.y
    torch.testing.assert_close(photo.observation.observed(measured - y), torch.zeros_like(y), rtol=0, atol=3e-3)


# -- The part that is restored


def test_the_size_of_the_network_needs_no_change():
    x, known = _picture(16, 16), _hole(16, 16)
    photo = Photograph(Mask(known), x, OWN, sigma=0.1)
    assert photo.observation.operator is not None and torch.equal(photo.observation.y, x)
    images = torch.rand(2, *OWN)
    assert photo.restored(images) is images and not photo.resized and not photo.tile


@pytest.mark.parametrize(
    ("size", "hole", "box"),
    [
        ((60, 100), (0.4, 0.4, 0.1, 0.1), (20, 0, 60, 60)),  # the middle
        ((60, 100), (0.4, 0.05, 0.1, 0.1), (5, 0, 60, 60)),  # as near to the middle as the hole allows
        ((100, 60), (0.85, 0.4, 0.1, 0.1), (0, 36, 60, 60)),
        ((60, 100), (0.4, 0.1, 0.1, 0.75), (0, -20, 100, 100)),  # the whole picture, with borders
    ],
)
def test_the_part_that_is_resized_has_the_whole_hole(size, hole, box):
    known = _hole(*size, *hole)
    assert tuple(Photograph(Mask(known), _picture(*size), OWN).box) == box


def test_the_center_is_prepared_as_for_training():
    """The pixels are those of ``open_images``, up to the rounding to 8 bits of Pillow."""
    x = _picture(50, 70)
    picture = Image.fromarray((x[0].movedim(0, 2) * 255).round().to(torch.uint8).numpy())
    for crop, size in (("center", (50, 70)), ("celeba", (160, 150))):
        x = _picture(*size)
        picture = Image.fromarray((x[0].movedim(0, 2) * 255).round().to(torch.uint8).numpy())
        known = torch.ones(size, dtype=torch.bool)
        known[size[0] // 2, size[1] // 2] = False
        photo = Photograph(Mask(known), x, OWN, crop=crop)
        prepared = torch.from_numpy(fit_picture(picture, OWN, crop)) / 255
        seen = photo.observation.operator.mask
        error = (photo.observation.y[0] - prepared).abs()[seen.expand_as(prepared)]
        assert error.quantile(0.95) < 1.6 / 255


def test_noise_is_smaller_at_the_size_of_the_network():
    known, g = _hole(160, 160), seed()
    y = 0.5 + 0.1 * torch.randn(1, 3, 160, 160, generator=g)
    photo = Photograph(Mask(known), y, OWN, sigma=0.1)
    seen = photo.observation.operator.mask.expand(1, *OWN)
    spread = float((photo.observation.y - 0.5)[seen].std())  # its relative standard error is 3 %
    assert photo.observation.sigma == pytest.approx(spread, rel=0.1) and photo.observation.sigma < 0.01
    photo = Photograph(AveragePool(16), y[..., :10, :10], OWN, sigma=0.1)  # which is taken as it is
    assert photo.resized and photo.observation.y.shape == (1, 3, 10, 10) and photo.observation.sigma == 0.1


def test_noise_around_black_keeps_its_mean_when_it_is_resized():
    """The resized noise has mean zero, with a standard error of 0.0009; cut off at zero its mean would be 0.007."""
    known = torch.ones(64, 64, dtype=torch.bool)
    known[:8, :8] = False
    photo = Photograph(Mask(known), 0.1 * torch.randn(1, 3, 64, 64, generator=seed(0)), OWN, sigma=0.1)
    observed = photo.observation.y[photo.observation.operator.mask.expand_as(photo.observation.y)]
    assert photo.resized and (observed < 0).float().mean() > 0.4 and observed.mean().abs() < 0.0035


def test_known_values_that_noise_takes_out_of_the_range_are_cut_off():
    known, y = _hole(40, 31), torch.where(_picture(40, 31) > 0.5, 1.25, -0.25)
    photo = Photograph(Mask(known), y, OWN, sigma=0.2)
    pictures = photo.restored(torch.rand(2, *OWN, generator=seed()))
    assert torch.equal(pictures[..., known], y.clamp(0, 1)[..., known].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("operator", "y", "tile"),
    [
        (AveragePool(2), (16, 16), True),  # the network has no pixels that are finer
        (AveragePool(2), (15, 15), False),
        (Grayscale(), (16, 65), True),
        (Grayscale(), (16, 64), False),
        (Mask(_hole(16, 200, 0.3, 0.9, 0.3, 0.02)), (16, 200), False),  # the hole fits a square
        (Mask(_hole(16, 200, 0.3, 0.1, 0.3, 0.7)), (16, 200), True),
    ],
)
def test_the_default_is_chosen_from_the_sizes(operator, y, tile):
    photo = Photograph(operator, _picture(*y, 1 if isinstance(operator, Grayscale) else 3), OWN)
    assert photo.tile == tile and photo.resized != tile


def test_a_crop_of_a_long_picture_is_resized():
    photo = Photograph(Grayscale(), _picture(16, 100, 1), OWN, crop="center")
    assert photo.resized and photo.box == (42, 0, 16, 16)
    photo = Photograph(Grayscale(), _picture(16, 16, 1), OWN, crop="center")
    assert not photo.resized and photo.box == (0, 0, 16, 16)
    with pytest.raises(ValueError, match="crop is for a picture that is resized, but this one is not"):
        Photograph(Grayscale(), _picture(16, 16, 1), OWN, crop=(0, 0, 16, 16))


def test_tiles_are_computed_around_the_hole_only():
    x, known = _picture(400, 300), torch.ones(400, 300, dtype=torch.bool)
    known[100:110, 290:295] = False
    photo = Photograph(Mask(known), Mask(known).measure(x), OWN, tile=True)
    assert tuple(photo.box) == (282, 92, 18, 26)
    found = _restored(photo)
    assert torch.equal(found[..., known], x[..., known].expand(2, -1, -1)) and found[..., ~known].std() > 0
    whole = Photograph(Mask(known), x, OWN, tile=True, sigma=0.1)
    assert whole.box == (0, 0, 300, 400)  # noise is everywhere


@pytest.mark.parametrize("size", [(8, 6), (32, 24), (161, 120)])
def test_a_mask_of_the_same_aspect_ratio_is_resized_with_nearest_neighbor(size):
    small = torch.rand(16, 12, generator=seed()) > 0.4
    found = Mask(small).of_size(*size).mask
    picture = Image.fromarray(small.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    assert torch.equal(found, torch.from_numpy(np.array(picture)))
    gray = Photograph(Grayscale() @ Mask(small), _picture(32, 24, 1), OWN)
    assert gray.restored(torch.rand(1, *OWN)).shape == (1, 3, 32, 24)


# -- Bad input

HOLE = _hole(40, 60)


@pytest.mark.parametrize(
    ("operator", "y", "options", "message"),
    [
        (Mask(torch.ones(40, 60) > 0), (40, 60), {}, "nothing of the picture is missing"),
        (Mask(torch.ones(40, 60) < 0), (40, 60), {}, "nothing of the picture is observed"),
        (Mask(HOLE), (40, 50), {}, "the mask must have the size of the picture, 40x50 pixels, or its aspect ratio"),
        (Mask(_hole(1, 1)), (1, 1), {}, "nothing of the picture is observed"),
        (Grayscale(), (1, 1), {}, "a picture of 1x1 pixels is too small for a network for 16x16"),
        (
            Grayscale(),
            (10, 500),
            {},
            "a picture of 10x500 pixels is too long to be resized to 16x16. Choose a part with crop.",
        ),
        (Grayscale(), (10, 500), {"tile": True}, "a tile of 16x16 pixels is larger than the picture, which has 10x500"),
        (Mask(HOLE), (40, 60), {"crop": (30, 0, 40, 40)}, "crop must be inside of the picture, .* got 40x40 pixels at"),
        (Mask(HOLE), (40, 60), {"crop": (-1, 0, 40, 40)}, "crop must be inside of the picture"),
        (Mask(HOLE), (40, 60), {"crop": "celeba"}, "crop must be inside of the picture, .* got 140x140 pixels"),
        (Mask(HOLE), (40, 60), {"crop": (0, 0, 40, 20)}, "crop must have the aspect ratio .* 16:16, got 40x20 pixels"),
        (Mask(HOLE), (40, 60), {"crop": (0, 0, 20, 20)}, r"\d+ missing pixels are outside of crop"),
        (Mask(HOLE), (40, 60), {"crop": "face"}, "crop must be center, celeba or"),
        (Mask(HOLE), (40, 60), {"crop": "center", "tile": True}, "crop is for a picture that is resized"),
        (AveragePool(2), (10, 12), {"crop": "center"}, "crop is not for pool:2. Crop the picture itself."),
        (AveragePool(2), (6, 250), {}, "12x500 pixels is too long to be resized to 16x16. Crop the picture itself."),
        (AveragePool(2), (20, 20), {"tile": False}, "cannot enlarge a picture of 20x20, which is resized. Write tile"),
        (Grayscale(), (40, 40), {"feather": 3}, "feather is for a hole in a picture that is resized"),
        (Mask(torch.rand(90, 90) < 0.1), (90, 90), {}, "the known pixels are so far apart"),
        (
            Mask((torch.arange(60) - 29.5).abs().expand(40, 60) > 20),
            (40, 60),
            {"crop": "center"},
            "nothing of the part that is resized is observed",
        ),
    ],
)
def test_bad_input_gives_one_clear_sentence(operator, y, options, message):
    with pytest.raises(ValueError, match=message):
        Photograph(operator, _picture(*y, 1 if isinstance(operator, Grayscale) else 3), OWN, **options)


@pytest.mark.parametrize(
    ("y", "shape", "message"),
    [
        (torch.rand(3, 40, 60), OWN, r"y must be one picture, .* torch.float32 \(3, 40, 60\). Write y\[None\]"),
        (torch.rand(2, 3, 40, 60), OWN, r"y must be one picture, .* got torch.float32 \(2, 3, 40, 60\)"),
        (torch.ones(1, 3, 40, 60, dtype=torch.uint8), OWN, "got torch.uint8 .* y / 255 for 8-bit values"),
        (255 * torch.ones(1, 3, 40, 60), OWN, r"y must have values in \[0, 1\], got values from 0 to 255"),
        (torch.rand(1, 3, 40, 60), OWN[1:], r"shape must be that of the network's images, \(C, h, w\), got \(16, 16\)"),
    ],
)
def test_a_picture_of_another_kind_gives_an_error(y, shape, message):
    with pytest.raises(ValueError, match=message):
        Photograph(Mask(HOLE), y, shape)


# -- The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("network")
    _net().save_pretrained(path)
    return str(path)


def _command(folder, picture, out, *options):
    fast = ("--device", "cpu", "--levels", "2", "--steps-per-level", "1", "--quiet", "-n", "1")
    return ["restore", folder, str(picture), str(out), *fast, *options]


def test_restore_takes_files_of_every_kind_and_says_what_it_leaves_out(folder, tmp_path, capsys):
    x = (_picture(24, 40)[0].movedim(0, 2) * 255).to(torch.uint8).numpy()
    (tmp_path / "in").mkdir()
    Image.fromarray(x).convert("CMYK").save(tmp_path / "in" / "cmyk.tif")
    Image.fromarray(x).save(tmp_path / "in" / "moving.gif", save_all=True, append_images=[Image.fromarray(255 - x)])
    Image.fromarray(x).save(tmp_path / "in" / "plain.png")
    Image.fromarray(np.dstack([x, x[..., 0]])).save(tmp_path / "in" / "clear.png")
    Image.fromarray(x).convert("RGBA").save(tmp_path / "in" / "opaque.png")
    Image.fromarray(x[..., 0].astype(np.uint16) * 257).save(tmp_path / "in" / "deep.png")
    Image.fromarray(_hole(48, 80).numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")  # of twice the size
    operator = f"mask:{tmp_path}/mask.png"
    assert main(_command(folder, tmp_path / "in", tmp_path / "out", "--operator", operator)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/in/moving.gif: only the first of its 2 pictures is restored" in lines
    assert f"{tmp_path}/in/cmyk.tif: its colors are converted from CMYK to RGB" in lines
    assert [line for line in lines if "transparent" in line] == [
        f"{tmp_path}/in/clear.png: its transparent pixels count as black"
    ]
    assert f"{tmp_path}/in/deep.png: its values are rounded to 8 bits in the files that are written" in lines
    size = (
        "the image to restore has 24x40 pixels in color; images of .* have 16x16 pixels in color: resized, 24x24 pixels"
    )
    assert len([line for line in lines if re.match(size, line)]) == 1
    known = Mask(_hole(48, 80)).of_size(24, 40).mask
    for name in ("clear.png", "cmyk.tif", "deep.png", "moving.gif", "opaque.png", "plain.png"):
        given, found = read_image(tmp_path / "in" / name, 3), read_image(tmp_path / "out" / f"{name[:-4]}-1.png", 3)
        assert torch.equal(given[:, known], found[:, known])


def test_a_small_hole_is_not_said_to_be_nothing(folder, tmp_path, capsys):
    known = torch.ones(40, 40)
    known[0, 0] = 0
    save_image(known[None], tmp_path / "mask.png")
    save_image(_picture(40, 40)[0], tmp_path / "x.png")
    operator = f"mask:{tmp_path}/mask.png"
    assert main(_command(folder, tmp_path / "x.png", tmp_path / "out", "--operator", operator, "--resize")) == 0
    assert f"99.94 % of the image is observed with {operator}\n" in capsys.readouterr().out


def test_pictures_of_other_sizes_are_restored_as_alone(folder, tmp_path):
    """The noise at the size of the network depends on the size of the picture."""
    (tmp_path / "in").mkdir()
    for name, side in (("a", 20), ("b", 80)):
        save_image(_picture(side, side)[0], tmp_path / "in" / f"{name}.png")
    for pictures in ("in", "in/b.png"):
        command = _command(folder, tmp_path / pictures, tmp_path / f"{pictures[:2]}{pictures[3:4]}-out")
        assert main([*command, "--operator", "gray", "--sigma", "0.2"]) == 0
    together, alone = (read_image(tmp_path / out / "b-1.png", 3) for out in ("in-out", "inb-out"))
    torch.testing.assert_close(together, alone, rtol=0, atol=1.01 / 255)


def test_a_folder_that_was_interrupted_is_continued(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in "abc":
        save_image(_picture(16, 16)[0], tmp_path / "in" / f"{name}.png")
    out, saved = tmp_path / "out", []

    def interrupted(image, path, **options):
        saved.append(path)
        if path == out / "b-strip.png":
            raise KeyboardInterrupt
        save_image(image, path, **options)

    options = ("--operator", "gray", "--batch-size", "1")
    command = _command(folder, tmp_path / "in", out, *options)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "save_image", interrupted)
        assert main(command) == 130
    continues = "scorematch: interrupted; add --skip-existing to continue with the other pictures\n"
    assert capsys.readouterr().err == continues and (out / "b-1.png").exists()
    before = (out / "a-1.png").stat()
    assert main([*command, "--skip-existing"]) == 0
    assert "restored already: 1 of 3 pictures\n" in capsys.readouterr().out
    assert (out / "a-1.png").stat() == before
    assert main(_command(folder, tmp_path / "in", tmp_path / "whole", *options)) == 0
    both = [{path.name: path.read_bytes() for path in each.iterdir()} for each in (out, tmp_path / "whole")]
    assert both[0] == both[1] and len(both[0]) == 6
    (out / "b-strip.png").write_bytes(both[0]["b-strip.png"][:5])  # which cannot be read, and is made again
    assert main([*command, "--skip-existing", "--strict"]) == 0
    assert (out / "b-strip.png").read_bytes() == both[0]["b-strip.png"]
    for other in ("--seed", "1"), ("-n", "2"), ("--operator", "jpeg:5"):
        error = refused([*command, "--skip-existing", *other], capsys)
        assert error == (
            f"scorematch: {out}/a-strip.png was made with other settings. Write to another folder, or replace "
            "--skip-existing by --overwrite.\n"
        )
    assert main(command) == 2


def test_continuing_with_a_changed_mask_is_refused(folder, tmp_path, capsys):
    save_image(_picture(16, 16)[0], tmp_path / "x.png")
    operator = ("--operator", f"gray @ mask:{tmp_path}/mask.png")
    command = [*_command(folder, tmp_path / "x.png", tmp_path / "out", *operator), "--skip-existing"]
    for expected in "restored already: 0 of 1 picture\n", "restored already: 1 of 1 picture\n":
        save_image(_hole(16, 16)[None].float(), tmp_path / "mask.png")
        assert main(command) == 0
        assert expected in capsys.readouterr().out
    save_image(1 - _hole(16, 16)[None].float(), tmp_path / "mask.png")
    assert "x-strip.png was made with other settings" in refused(command, capsys)


@pytest.mark.parametrize("options", [("--resize",), ("--tile",), ("--tile", "20"), ("--crop", "4,0,20,20")])
def test_the_options_of_sizes(folder, tmp_path, options, capsys):
    save_image(_picture(20, 30)[0], tmp_path / "x.png")
    save_image(_hole(20, 30)[None].float(), tmp_path / "mask.png")
    operator = f"mask:{tmp_path}/mask.png"
    assert main(_command(folder, tmp_path / "x.png", tmp_path / "out", "--operator", operator, *options)) == 0
    tile = options[-1] if options[-1].isdigit() else "16"
    expected = {"--tile": f": in tiles of {tile}x{tile} pixels", "--crop": "at left 4, top 0", "--resize": "at left"}
    assert expected[options[0]] in capsys.readouterr().out
    found, known = read_image(tmp_path / "out" / "x-1.png", 3), _hole(20, 30)
    assert torch.equal(found[:, known], read_image(tmp_path / "x.png", 3)[:, known])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tile", "64"],
            "a tile of 64x64 pixels is larger than the picture, which has 20x30. Write a smaller --tile",
        ),
        (["--tile", "1"], "must be at least 2, the largest stride, got 1x1. Pass --tile 2 or more"),
        (["--crop", "20,0,20,20"], "--crop must be inside of the picture, which has 20x30 pixels, got 20x20 pixels at"),
        (["--crop", "left"], "argument --crop: must be center, celeba or LEFT,TOP,WIDTH,HEIGHT in pixels, got 'left'"),
        (["--crop", "center", "--tile"], "--crop is for a picture that is resized"),
        (["--resize", "--tile"], "argument --tile: not allowed with argument --resize"),
        (["--feather", "3", "--tile"], "--feather is for a hole in a picture that is resized"),
        (["--feather", "-3"], "argument --feather: must be"),
    ],
)
def test_bad_options_of_sizes_write_nothing(folder, tmp_path, options, message, capsys):
    save_image(_picture(20, 30)[0], tmp_path / "x.png")
    save_image(_hole(20, 30)[None].float(), tmp_path / "mask.png")
    command = _command(folder, tmp_path / "x.png", tmp_path / "out", "--operator", f"mask:{tmp_path}/mask.png")
    assert message in refused([*command, *options], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "shown"), [((2, 2000), (1, 512)), ((600, 900), (341, 512)), ((90, 1), (90, 1))])
def test_large_pictures_are_small_in_the_strip(size, shown):
    assert restore._shown(torch.rand(1, 3, *size)).shape == (1, 3, *shown)


@pytest.mark.slow
def test_a_picture_in_tiles_agrees_with_the_score_of_tiles(folder, tmp_path):
    """The command restores the whole picture with ``Tiled``."""
    y = _picture(20, 30, 1)
    save_image(y[0], tmp_path / "x.png")
    assert main(_command(folder, tmp_path / "x.png", tmp_path / "out", "--operator", "gray", "--tile")) == 0
    found = read_image(tmp_path / "out" / "x-1.png", 3)
    net = ScoreNet.from_pretrained(folder).inference_copy()
    sampler = AnnealedLangevinSampler(Tiled(net), levels=2, steps_per_level=1)
    generator = [torch.Generator().manual_seed(seed_of(0, "restoration", "x", 0))]
    drawn = run(sampler, 1, observation=Observation(Grayscale(), y), generator=generator)
    torch.testing.assert_close(found, drawn[0], rtol=0, atol=0.51 / 255)
