import re

import pytest
import torch
from PIL import Image

from scorematch import ScoreNet, __version__, cards
from scorematch.__main__ import _duration, main


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
