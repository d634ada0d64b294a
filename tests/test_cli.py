import re

import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet, __version__, cards
from scorematch.__main__ import _duration, main
from scorematch.images import read_image, save_image


@pytest.fixture
def folder(tmp_path):
    ScoreNet.ncsnv2(1, 8, width=4).save_pretrained(tmp_path / "network")
    return str(tmp_path / "network")


def _sample(folder, picture, *options):
    return main(["sample", folder, str(picture), "-n", "4", "--levels", "3", "--steps-per-level", "1", *options])


def test_sample_writes_a_picture_and_says_what_it_did(folder, tmp_path, capsys):
    assert _sample(folder, tmp_path / "a.png", "--quiet") == 0
    said = capsys.readouterr()
    assert "3 levels 50 -> 0.01, 1 step" in said.out and str(tmp_path / "a.png") in said.out
    assert said.err == ""
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (22, 22)


def test_sample_says_beforehand_how_long_it_will_take(folder, tmp_path, capsys):
    assert _sample(folder, tmp_path / "a.png", "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"about \d+ s for 4 images", lines[1]) and "4 images in" in lines[2]
    assert [_duration(seconds) for seconds in (0.2, 89, 91, 5000, 36_000)] == [
        "1 s",
        "89 s",
        "2 min",
        "83 min",
        "10.0 h",
    ]


def test_the_seed_decides(folder, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        _sample(folder, tmp_path / f"{name}.png", "--seed", str(seed), "--quiet", "--no-exact-noise")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sample", "nothing", "x.png"], "scorematch: 'nothing' is neither"),
        (["sample", "mnist", "x.png", "-n", "0"], "scorematch: n must be at least 1"),
        (["sample", "mnist", "x.png", "--step-size", "1"], "stability limit"),
        (["sample", "palette-mnist", "x.png"], "restores images that it is shown: write python -m scorematch restore"),
    ],
)
def test_a_failure_is_one_line(options, message, capsys):
    assert main(options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_found_before_the_work(folder, capsys):
    assert main(["sample", folder, "picture.unknown"]) == 1
    said = capsys.readouterr()
    assert "such as .png" in said.err and "call" not in said.err


def test_a_folder_that_cannot_be_written_is_found_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["sample", folder, str(tmp_path / "file" / "picture.png")]) == 1
    said = capsys.readouterr()
    assert "cannot be written to" in said.err and "calls" not in said.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(folder, tmp_path, capsys):
    assert main(["sample", folder, str(tmp_path / "a.png"), "--device", "cuda"]) == 1
    assert "this torch sees no CUDA device" in capsys.readouterr().err


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for card in cards.CARDS:
        assert (card.repository or "ships with the package") in said and card.quality in said


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


# -- restore


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b"):
        save_image(torch.rand(1, 8, 8), tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def _restore(folder, pictures, out, *options):
    chain = ["--levels", "3", "--steps-per-level", "1", "--quiet", "-n", "2"]
    return main(["restore", folder, str(pictures), str(out), *chain, *options])


def test_restore_writes_pictures_and_strips(folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert _restore(folder, pictures, out, "--uncrop", "left=2,bottom=4") == 0
    names = ["a-1.png", "a-2.png", "a-strip.png", "b-1.png", "b-2.png", "b-strip.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    restored, seen = read_image(out / "b-2.png", 1), read_image(pictures / "b.png", 1)
    assert restored.shape == (1, 12, 10)
    assert torch.equal(restored[:, :8, 2:], seen)  # to the last bit
    assert read_image(out / "b-strip.png", 1).shape == (1, 12 + 4, 3 * 12 + 2)
    said = capsys.readouterr()
    assert "about 1 s for 4 images" in said.out
    assert said.err == ""


def test_restore_degrades_whole_pictures_first_and_shows_them_last(folder, pictures, tmp_path):
    seen = torch.arange(8).expand(8, 8) < 4
    save_image(seen[None].float(), tmp_path / "mask.png")
    out = tmp_path / "out"
    options = ("--mask", str(tmp_path / "mask.png"), "--degrade")
    assert _restore(folder, pictures / "a.png", out, *options) == 0
    whole, restored = read_image(pictures / "a.png", 1), read_image(out / "a-1.png", 1)
    assert torch.equal(restored[0][seen], whole[0][seen])
    strip = read_image(out / "a-strip.png", 1)
    assert strip.shape == (1, 12, 4 * 10 + 2)
    assert torch.equal(strip[:, 2:10, -10:-2], whole)
    assert (strip[:, 2:10, 6:10] == 0).all()  # what was seen comes first, and it is half of it


@pytest.mark.parametrize("method", ["replace", "guide"])
@pytest.mark.parametrize("options", [("--jpeg", "10"), ("--pool", "2"), ("--pool", "2", "--sigma", "0.1")])
def test_restore_of_every_kind(folder, pictures, tmp_path, method, options):
    original = ("--original", str(pictures / "a.png")) if options[0] == "--jpeg" else ()
    assert _restore(folder, pictures / "a.png", tmp_path / "out", *options, "--method", method, *original) == 0
    height = 8 if options[0] == "--jpeg" else 16
    assert read_image(tmp_path / "out" / "a-1.png", 1).shape == (1, height, height)


def test_restore_of_gray_pictures(tmp_path, pictures):
    ScoreNet.ncsnv2(3, 8, width=4).save_pretrained(tmp_path / "rgb")
    assert _restore(str(tmp_path / "rgb"), pictures / "a.png", tmp_path / "out", "--gray") == 0
    assert read_image(tmp_path / "out" / "a-1.png", 3).shape == (3, 8, 8)


@pytest.mark.parametrize("options", [("--gray",), ("--uncrop", "left=4"), ("--jpeg", "10")])
def test_restore_with_a_network_that_was_trained_to(tmp_path, pictures, options):
    """What it draws depends on what it is shown, not on the observation alone."""
    schedule, drawn = NoiseSchedule([1.0, 0.1, 0.01]), {}
    for name, shown in [("blind", 0), ("seeing", 1)]:
        torch.manual_seed(0)
        net = ScoreNet.unet(3, 8, widths=(4, 4), layers_per_block=1, condition_channels=3, schedule=schedule)
        with torch.no_grad():
            net.backbone.conv_out.weight.normal_()
            net.backbone.conv_in.weight[:, 3:] *= shown
        net.save_pretrained(tmp_path / name)
        assert _restore(str(tmp_path / name), pictures / "a.png", tmp_path / f"{name}-out", *options) == 0
        drawn[name] = read_image(tmp_path / f"{name}-out" / "a-1.png", 3)
    assert drawn["seeing"].shape == (3, 8, 12 if options[0] == "--uncrop" else 8)
    assert not torch.equal(drawn["seeing"], drawn["blind"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gray"], "--gray is for networks of RGB images; .* is of 1 channel"),
        (["--jpeg", "0"], "quality must be an integer from 1 to 100, got 0"),
        (["--uncrop", "left"], "--uncrop takes sides and pixels, such as left=4,right=4, got 'left'"),
        (["--uncrop", "up=3"], "got 'up=3'"),
        (["--pool", "2", "--original", "{pictures}/a.png"], "2 pictures to restore, but 1 originals"),
        (["--pool", "2", "--original", "{pictures}"], "the original has 8x8 pixels, the restored picture 16x16"),
        (["--mask", "{pictures}/a.png"], "a.png is no mask"),
    ],
)
def test_restore_says_what_is_wrong(folder, pictures, tmp_path, options, message, capsys):
    options = [option.format(pictures=pictures) for option in options]
    assert _restore(folder, pictures, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_restore_never_writes_over_a_picture(folder, pictures, capsys):
    save_image(torch.rand(1, 8, 8), pictures / "a-1.png")
    before = (pictures / "a-1.png").read_bytes()
    assert _restore(folder, pictures / "a.png", pictures, "--pool", "2") == 1
    assert "a-1.png exists already, and is left as it is: name another folder" in capsys.readouterr().err
    assert (pictures / "a-1.png").read_bytes() == before
    assert not (pictures / "a-strip.png").exists()
