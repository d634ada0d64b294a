"""The commands train and ema."""

import argparse
import contextlib
import io
import itertools
import json
import re
import shutil
from dataclasses import fields
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import ScoreNet, dsm_loss
from scorematch.cli import main
from scorematch.cli import train as command
from scorematch.cli.options.measurements import read_measurements
from scorematch.cli.options.values import image_count
from scorematch.cli.train import _size
from scorematch.core.conditions import Condition
from scorematch.data import open_images
from scorematch.restoration.palette import MultiTask
from scorematch.training import RECIPES, reconstruct, speed
from scorematch.training.settings import TrainSettings
from tests.helpers import refused

pytest.importorskip("accelerate")


def _pictures(folder, n, rng, size=(16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = torch.randint(256, (*size, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def _train(data, out, *options):
    """Runs a short training of the smallest network; returns the exit status."""
    short = ("--recipe", "tiny", "--image-size", "8", "--images", "24", "--batch-size", "8")
    return main(["train", str(data), "--out", str(out), *short, "--device", "cpu", "--quiet", *options])


def _weights(out):
    return ScoreNet.from_pretrained(out / "network").state_dict()


def _same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder with twelve pictures, a broken picture and a text file."""
    folder = _pictures(tmp_path_factory.mktemp("data") / "faces", 12, torch.Generator().manual_seed(0), (20, 16))
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    """The folder of a run, and its output."""
    out, printed = tmp_path_factory.mktemp("runs") / "faces", io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "training_flop", lambda net: 1.5e9)
        assert _train(faces, out, "--checkpoint-every", "8", "--snapshot-every", "8") == 0
    assert torch.equal(torch.get_rng_state(), state)
    return out, printed.getvalue()


@pytest.fixture(autouse=True)
def _no_measurements(monkeypatch):
    """No test counts the operations of a training step or its seconds, which takes longer than a short run."""
    monkeypatch.setattr(command, "training_flop", lambda net: 1e9)
    monkeypatch.setattr(command, "seconds_per_image", lambda net, data, settings, _: [0.01] * len(settings.stages()))


@pytest.fixture
def calls(monkeypatch):
    """Replaces ``train`` by a function that only records its arguments; the list of these."""
    recorded = []

    def train(net, *arguments, **options):
        recorded.append((net, *arguments, options))
        return net

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "_report_copies", lambda *_, **__: "")
    return recorded


# -- From pictures to a network


@pytest.mark.slow
def test_train_prints_data_network_and_time(faces, run):
    out, printed = run
    parameters = sum(parameter.numel() for parameter in RECIPES["tiny"].build(3).parameters())
    assert printed.startswith(
        f"data      12 images of 3 x 8 x 8 from {faces}\n"
        f"          left out: 1 image that cannot be read, {faces / 'broken.jpg'}\n"
        f"network   tiny: {parameters:,} parameters, "
    )
    assert re.search(r" parameters, 1.5 GFLOP per image\ntraining  24 images in 3 steps of 8, 2 epochs\n", printed)
    assert re.search(rf"\ntime      about \d+ s on cpu, [\d.]+ images/s\nout       {out}\n", printed)
    found = re.search(
        r"\n(\d+) of 64 samples are copies: less than a third as far from one of the pictures, or from its mirror "
        rf"image, as from every other\..*\n{out / 'report.md'}\n{out / 'network'}\n$",
        printed,
    )
    report = (out / "report.md").read_text()
    assert f"\n{found[1]} of 64 samples are copies: " in report and "\n| samples | 64 | " in report
    with Image.open(out / "report" / "nearest.png") as picture:
        assert picture.size == (3 * 8 + 4 * 2, 8 * 8 + 9 * 2)


def test_hours_are_the_images_of_a_measured_speed_and_a_run_that_continues_keeps_them(
    faces, tmp_path, calls, monkeypatch, capsys
):
    for module in (command, speed):
        monkeypatch.setattr(module, "seconds_per_image", lambda *_: [0.45])
    short = ["train", str(faces), "--recipe", "tiny", "--image-size", "8", "--batch-size", "8", "--device", "cpu"]
    night = [*short, "--quiet", "--out", str(tmp_path), "--hours", "0.5"]
    assert main(night) == 0
    assert calls[0][-1]["images"] == 4000 and "training  4,000 images" in capsys.readouterr().out
    record = {"settings": {"images": 3000}, "network": calls[0][0].config, "data": {}}
    monkeypatch.setattr(command, "check_run", lambda *_: None)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert main(night) == 0
    assert calls[1][-1]["images"] == 3000
    (tmp_path / "config.json").unlink()
    assert main([*night[:-1], "0.01"]) == 2
    assert capsys.readouterr().err.endswith(
        "--hours 0.01 is enough for 10 steps of 8 images here, and a run needs at least 100. Write more hours, or "
        "take a smaller network, such as that of the recipe tiny.\n"
    )
    assert main([*night, "--images", "24"]) == 2
    assert "--images cannot be combined with --hours" in capsys.readouterr().err
    assert len(calls) == 2


@pytest.mark.parametrize(("options", "shape"), [([], (3, 48, 50)), (["--image-size", "32"], (3, 32, 32))])
def test_growing_takes_the_size_of_the_images_of_a_file(options, shape, tmp_path, calls, monkeypatch):
    for module in (command, speed):
        monkeypatch.setattr(module, "seconds_per_image", lambda *_: [0.01])
    np.savez(tmp_path / "x.npz", x=np.zeros((64, 48, 50, 3), np.uint8))
    growing = ["train", str(tmp_path / "x.npz"), "--recipe", "growing", "--images", "80", "--device", "cpu", "--quiet"]
    assert main([*growing, "--out", str(tmp_path / "run"), *options]) == 0
    net, data, *_ = calls[0]
    assert data.shape == net.sample_shape == shape and net.config["block_out_channels"] == [48, 96, 128]
    assert net.config["patch"] == (4 if shape[1] == 48 else 2)


@pytest.mark.slow
def test_growing_announces_its_stages(faces, tmp_path, calls, monkeypatch, capsys):
    """With 10, 20 and 30 ms the mean over the images is 22.5 ms."""
    for module in (command, speed):
        seconds = lambda net, data, settings, _: [0.01, 0.02, 0.03][: len(settings.stages())]  # noqa: E731
        monkeypatch.setattr(module, "seconds_per_image", seconds)
    growing = ["train", str(faces), "--recipe", "growing", "--batch-size", "8", "--device", "cpu", "--quiet"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)  # a batch of 8 is divided among 4 processes
    monkeypatch.setattr(command, "_PART", 2)
    assert main([*growing, "--out", str(tmp_path), "--hours", "8"]) == 0
    printed = capsys.readouterr().out
    assert "training  1,280,000 images in 160,000 steps of 8, " in printed
    assert "          stage 1 from image 0, 100 images/s: the network above\n" in printed
    assert "          stage 2 from image 320,000, 50 images/s: {'attention': (True, True, True), 'pixel" in printed
    assert "          stage 3 from image 640,000, 33.3 images/s: {'layers_per_block': (2, 2, 1), " in printed
    hint = "          4 processes may be faster: torchrun --nproc-per-node 4 -m scorematch train ...\n"
    assert f"time      about 8.0 h on cpu, 44.4 images/s\n{hint}out" in printed
    assert len(calls[0][-1]["growth"]) == 2 and calls[0][-1]["hours"] is None
    assert calls[0][0].config["block_out_channels"] == [64, 128, 160]

    for length, images in (("--hours", "0.5"), 180_000), (("--images", "80"), 80):  # too short for a second stage
        assert main([*growing, "--out", str(tmp_path / "short"), *length]) == 0
        assert "images are few: samples of CIFAR-10 were noise" in capsys.readouterr().out
        net, *_, options = calls[-1]
        assert net.config["block_out_channels"] == [48, 96, 128]
        assert options["images"] == images and not options.get("growth")
    record = {"settings": {"images": 700_000}, "network": net.config, "data": {}}  # a run on a fast machine
    monkeypatch.setattr(command, "check_run", lambda *_: None)
    (tmp_path / "short" / "config.json").write_text(json.dumps(record))
    assert main([*growing, "--out", str(tmp_path / "short"), "--hours", "1"]) == 0
    assert calls[-1][0].config["block_out_channels"] == [48, 96, 128] and calls[-1][-1]["images"] == 700_000


@pytest.mark.slow
def test_hours_that_are_enough_for_the_small_network_of_growing_only(faces, tmp_path, calls, monkeypatch, capsys):
    """720 images of the large network are less than 100 steps of 8."""

    def seconds(net, data, settings, _):
        return [0.005 if net.config["block_out_channels"][0] == 48 else 0.01] * len(settings.stages())

    for module in (command, speed):
        monkeypatch.setattr(module, "seconds_per_image", seconds)
    growing = ["train", str(faces), "--recipe", "growing", "--batch-size", "8", "--device", "cpu", "--quiet", "--out"]
    assert main([*growing, str(tmp_path), "--hours", "0.002"]) == 0
    assert calls[0][-1]["images"] == 1440
    assert main([*growing, str(tmp_path), "--hours", "0.001"]) == 2
    assert "--hours 0.001 is enough for 90 steps of 8 images here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_trained_network_can_be_loaded_and_sampled(run, tmp_path):
    net = ScoreNet.from_pretrained(run[0] / "network")
    assert net.sample_shape == (3, 8, 8) and net.sampler_settings.sampler == "ode"
    assert main(["sample", str(run[0] / "network"), str(tmp_path / "faces.png"), "-n", "2", "--quiet"]) == 0


@pytest.mark.slow
def test_the_same_command_continues_a_run_and_other_options_give_an_error(faces, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_SAMPLES", 2)
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "checkpoints" / "000000024")  # as if it had been killed before its last step
    shutil.copytree(out / "checkpoints" / "000000016", out / "checkpoints" / "000000016-copy")
    options = ("--checkpoint-every", "8", "--snapshot-every", "8")
    assert _train(faces, out, *options) == 0
    assert "          continues at image 16\n" in capsys.readouterr().out
    assert _same(_weights(run[0]), _weights(out))
    (out / "report.md").unlink()
    assert _train(faces, out, *options, "--lr", "0.5", "--dry-run") == 2
    printed = capsys.readouterr()
    assert printed.err.endswith(
        "contains a run with other settings: lr was 0.001 and is 0.5. To continue it use its settings, on "
        "the command line its options such as --recipe; otherwise use another folder.\n"
    )
    assert printed.out == ""
    shutil.rmtree(out / "checkpoints" / "000000016")
    shutil.rmtree(out / "checkpoints" / "000000024")
    (out / "checkpoints" / "000000000").mkdir()
    assert _train(faces, out, *options, "--lr", "0.5", "--dry-run") == 2
    message = "folder. Nothing of that run is saved yet: if it has ended, delete the folder to begin again.\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_longer_run_than_a_complete_one_starts_with_its_network(faces, run, capsys):
    assert _train(faces, run[0], "--images", "48", "--dry-run") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        f"scorematch: {run[0]} contains a run with other settings: images was 24 and is 48. This run is complete. To "
        f"train longer, start a new run with --start {run[0] / 'network'}.\n"
    )


def test_paths_in_messages_are_quoted_for_a_shell(faces, run, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "my run")
    capsys.readouterr()
    assert _train(faces, tmp_path / "my run", "--images", "48", "--dry-run") == 2
    assert f"start a new run with --start '{tmp_path}/my run/network'.\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_seed_determines_the_initial_network(faces, tmp_path, calls):
    for seed in ("7", "7", "8"):
        assert _train(faces, tmp_path / "run", "--seed", seed) == 0
    a, b, c = (net.state_dict() for net, *_ in calls)
    assert _same(a, b) and not torch.equal(a["backbone.conv_in.weight"], c["backbone.conv_in.weight"])
    assert [options["seed"] for *_, options in calls] == [7, 7, 8]


def test_a_dry_run_writes_nothing(faces, tmp_path, calls, capsys):
    assert _train(faces, tmp_path / "run", "--dry-run") == 0
    assert "24 images in 3 steps of 8" in capsys.readouterr().out
    assert calls == [] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_the_same_network_in_two_processes(forks, faces, tmp_path):
    assert _train(faces, tmp_path / "one", "--precision", "float32") == 0
    short = ("--recipe", "tiny", "--image-size", "8", "--images", "24", "--batch-size", "8", "--quiet")
    short += ("--precision", "float32")
    command = ["train", *map(str, (faces, "--out", tmp_path / "run", *short, "--device", "cpu"))]
    code = f"from scorematch.cli import main\nassert main({command}) == 0"
    (_, first, _), (_, other, _) = forks.group(2, code, tmp_path)
    assert first.count("data      12 images") == 1 and " s on 2 x cpu, " in first and other == ""
    whole, parted = _weights(tmp_path / "one"), _weights(tmp_path / "run")
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=1e-3, atol=1e-4)


# -- Options


@pytest.mark.slow
def test_the_timed_step_has_the_images_of_one_device(faces, tmp_path, monkeypatch):
    """The whole batch would not fit into the memory of a device."""
    seen = []
    monkeypatch.setattr(command, "seconds_per_image", speed.seconds_per_image)
    monkeypatch.setattr(speed, "dsm_loss", lambda net, x, **given: seen.append(len(x)) or dsm_loss(net, x, **given))
    args = argparse.Namespace(data=str(faces), out=tmp_path, start=None, recipe="tiny")
    data = open_images(torch.rand(32, 3, 8, 8))
    four = SimpleNamespace(device=torch.device("cpu"), num_processes=4)
    for settings in (TrainSettings(images=64, batch_size=32), TrainSettings(images=64, batch_size=32, microbatch=3)):
        net = RECIPES["tiny"].build(3, 8)
        command._announce(args, RECIPES["tiny"], data, net, settings, four)
    assert set(seen[:2]) == {8} and set(seen[2:]) == {3}


def test_a_tilde_is_the_home_folder(faces, tmp_path, monkeypatch, calls):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    assert _train(faces, "~/run", "--cache=~/cache") == 0
    assert calls[0][2] == tmp_path / "run" and (tmp_path / "cache").is_dir()


def test_options_are_passed_to_train(faces, tmp_path, calls):
    given = {"images": "16", "batch-size": "4", "microbatch": "2", "lr": "0.01", "warmup-images": "8"}
    every = {"log-every": "1k", "sample-every": "2k", "snapshot-every": "3k", "checkpoint-every": "4k"}
    options = itertools.chain.from_iterable((f"--{name}", value) for name, value in {**given, **every}.items())
    assert _train(faces, tmp_path, *options, "--precision", "float32", "--compile", "--augment") == 0
    net, data, out, found = calls[0]
    assert net.sample_shape == data.shape == (3, 8, 8) and out == tmp_path
    expected = {"images": 16, "batch_size": 4, "microbatch": 2, "lr": 0.01, "warmup_images": 8, "augment": ()}
    events = {"log_every": 1000, "sample_every": 2000, "snapshot_every": 3000, "checkpoint_every": 4000}
    rest = {"precision": "float32", "compile": True, "seed": 0, "progress": False, "push_to_hub": None}
    assert {**expected, **events, **rest}.items() <= vars(TrainSettings(**found)).items()


def test_every_option_of_train_that_has_a_range_is_an_option_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for option in fields(TrainSettings):
        if option.metadata["value"] is not None and option.name != "progress":
            assert f"  --{option.name.replace('_', '-')}" in printed


def test_options_may_be_lists_or_none(faces, tmp_path, calls):
    given = (
        "--betas",
        "0.8",
        "0.9",
        "--ema",
        "--clip",
        "none",
        "--warmup-images",
        "0",
        "--augment",
        "flip",
        "--decay",
        "linear",
    )
    assert _train(faces, tmp_path, *given) == 0
    expected = {
        "betas": (0.8, 0.9),
        "ema": (),
        "clip": None,
        "warmup_images": 0,
        "augment": ("flip",),
        "decay": "linear",
    }
    assert expected.items() <= vars(TrainSettings(**calls[0][3])).items()
    with pytest.raises(SystemExit):
        _train(faces, tmp_path, "--betas", "0.8")  # argparse: expected 2 arguments


def test_without_options_the_settings_are_those_of_the_recipe(tmp_path, calls):
    np.savez(tmp_path / "data.npz", images=np.zeros((128, 28, 28), np.uint8))  # a whole batch
    arguments = ["train", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--recipe", "ncsn-mnist"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_announce", lambda *arguments: None)  # the network is large
        assert main(arguments) == 0
    net, data, _, found = calls[0]
    assert data.shape == net.sample_shape == (1, 28, 28)
    assert RECIPES["ncsn-mnist"].options().items() <= found.items() and found["lr"] == 1e-3 and found["ema"] == ()


@pytest.mark.slow
def test_start_without_a_recipe_trains_the_given_network(faces, run, tmp_path, calls, monkeypatch, capsys):
    start = str(run[0] / "network")
    arguments = ["train", str(faces), "--out", str(tmp_path / "run"), "--start", start, "--batch-size", "8", "--quiet"]
    assert main([*arguments, "--device", "cpu"]) == 0
    net, data, _, found = calls[0]
    assert data.shape == net.sample_shape == (3, 8, 8) and found["start"] == start
    assert _same(net.state_dict(), _weights(run[0])) and (found["images"], found["lr"]) == (20_000, 5e-4)
    printed = capsys.readouterr().out
    assert f"network   {start}: " in printed and f"\n          begins with the weights of {start}\n" in printed
    assert found["augment"] == ("nonleaking",) and "\n          augmented: pictures are mirrored, " in printed
    assert main([*arguments, "--image-size", "16", "--device", "cpu"]) == 0
    assert calls[1][0].sample_shape == calls[1][1].shape == (3, 16, 16)
    assert main([*arguments, "--channels", "1", "--device", "cpu"]) == 2
    assert f"--channels must be 3, as {start} has, got 1. Leave it out." in capsys.readouterr().err
    record = {"settings": {"augment": ["flip"]}, "network": net.config, "data": {}}
    monkeypatch.setattr(command, "check_run", lambda *_: None)
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))  # a run continues as it began
    assert main([*arguments, "--device", "cpu"]) == 0 and calls[-1][-1]["augment"] == ["flip"]


@pytest.mark.slow
def test_a_run_continues_without_the_network_that_it_began_with(faces, run, tmp_path):
    shutil.copytree(run[0] / "network", tmp_path / "first")
    options = ("--images", "16", "--batch-size", "8", "--device", "cpu", "--quiet", "--image-size", "12")
    arguments = ["train", str(faces), "--out", str(tmp_path / "run"), "--start", str(tmp_path / "first"), *options]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000016")  # as if it had been killed before its last step
    before = _weights(tmp_path / "run")
    assert main(arguments) == 0
    assert _same(_weights(tmp_path / "run"), before)


def test_start_with_a_recipe_trains_the_network_of_the_recipe_from_given_weights(faces, run, tmp_path, calls, capsys):
    start = str(run[0] / "network")
    assert _train(faces, tmp_path / "run", "--start-from", start) == 0  # as under torchrun
    net, *_, found = calls[0]
    assert found["start"] == start and not _same(net.state_dict(), _weights(run[0]))  # train copies the weights
    printed = capsys.readouterr().out
    assert "network   tiny: " in printed and f"\n          begins with the weights of {start}\n" in printed


@pytest.mark.slow
def test_start_must_be_the_network_of_the_recipe(faces, run, tmp_path, capsys):
    start = run[0] / "network"
    arguments = ["train", faces, "--out", tmp_path / "run", "--start", start, "--recipe", "ncsn-cifar10", "--dry-run"]
    error = refused([*arguments, "--image-size", "8", "--batch-size", "8", "--quiet", "--device", "cpu"], capsys)
    assert error.startswith(f"scorematch: --start {start} is not the same network as the one to train: ")
    assert "family is 'unet' instead of 'ncsn'" in error and error.endswith(
        ", or on the command line leave out --recipe.\n"
    )


def test_the_data_have_the_range_of_the_network_to_begin_with(tmp_path, calls, capsys):
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1)
    net.value_range = (-5, 5)
    net.save_pretrained(tmp_path / "network")
    np.savez(tmp_path / "data.npz", images=np.linspace(-5, 5, 8 * 64, dtype=np.float32).reshape(8, 1, 8, 8))
    options = ("--device", "cpu", "--images", "8", "--batch-size", "8", "--quiet")
    arguments = ["train", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), *options]
    assert main([*arguments, "--start", str(tmp_path / "network")]) == 0
    assert calls[0][0].value_range == (-5, 5) and calls[0][1].read([0])[0].min() == -5
    assert main([*arguments, "--recipe", "tiny", "--image-size", "8"]) == 2


def test_labels_train_a_class_conditional_network(tmp_path, rng, calls, capsys):
    for name in ("cat", "dog"):
        _pictures(tmp_path / "pets" / name, 5, rng)
    assert _train(tmp_path / "pets", tmp_path / "run", "--labels") == 0
    assert (
        f"10 images of 3 x 8 x 8 from {tmp_path / 'pets'}\n          2 classes: 0 cat, 1 dog\n"
        in capsys.readouterr().out
    )
    assert _train(tmp_path / "pets", tmp_path / "run", "--labels", "--label-drop", "0") == 0
    found = [(net.conditioning, options["label_drop"]) for net, *_, options in calls]
    assert found == [(Condition(classes=2, null_class=True), 0.1), (Condition(classes=2), 0.0)]
    assert calls[0][1].read([0, 9])[1].tolist() == [0, 1]


def test_gray_pictures_of_an_npz_file_that_are_not_square(tmp_path, rng, calls, capsys):
    pixels = torch.randint(256, (9, 12, 10), generator=rng, dtype=torch.uint8).numpy()
    np.savez(tmp_path / "data.npz", images=pixels)
    assert _train(tmp_path / "data.npz", tmp_path / "run", "--image-size", "8x12") == 0
    assert "9 images of 1 x 8 x 12" in capsys.readouterr().out
    assert calls[0][0].sample_shape == calls[0][1].shape == (1, 8, 12)


def test_color_pictures_for_a_gray_network_are_announced(faces, tmp_path, calls, capsys):
    assert _train(faces, tmp_path / "run", "--channels", "1") == 0
    assert f"12 images of 1 x 8 x 8, converted from color, from {faces}\n" in capsys.readouterr().out


def test_the_cache_is_in_the_folder_of_the_run_or_the_given_folder(faces, run, tmp_path, calls):
    assert len(list((run[0] / "cache").glob("*.npy"))) == 1
    assert _train(faces, tmp_path / "second", "--cache", str(tmp_path / "cache")) == 0
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert _train(faces, tmp_path / "third", "--no-cache") == 0
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()
    (cached, _), (decoded, _) = (data.read(range(12)) for _, data, *_ in calls)
    assert torch.equal(cached, decoded) and calls[0][1].fingerprint == calls[1][1].fingerprint


def test_a_recipe_with_a_task_trains_on_it(faces, tmp_path, monkeypatch, calls):
    monkeypatch.setitem(RECIPES["palette"].network, "widths", (8, 8))  # the published one has 481 million parameters
    monkeypatch.setitem(RECIPES["palette"].network, "attention", (False, False))
    options = ("--recipe", "palette", "--image-size", "16", "--images", "8", "--batch-size", "4", "--quiet")
    assert main(["train", str(faces), "--out", str(tmp_path / "run"), *options]) == 0
    net, *_, found = calls[0]
    assert net.conditioning.channels == 3 and isinstance(found["condition"], MultiTask)


# -- Networks to begin with


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({}, ("--channels", "1"), "--channels must be 3, as .*network has, got 1. Leave it out."),
        (
            {"condition_channels": 3},
            (),
            r"restores images. Train it in Python: train\(net, data, out, start=\".*, cond",
        ),
    ],
)
def test_a_network_to_begin_with_takes_the_condition_of_the_data(faces, tmp_path, network, options, message, capsys):
    ScoreNet.unet(3, 8, widths=(4,), layers_per_block=1, **network).save_pretrained(tmp_path / "network")
    arguments = ["train", faces, "--out", tmp_path / "run", "--start", tmp_path / "network", "--device", "cpu"]
    assert re.search(message, refused([*arguments, *options], capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("classes", "options", "kept"),
    [
        (("cat", "dog"), ("--labels",), "1 of its 2 classes is kept, 1 class is new"),
        (("cat", "dog"), (), "none of its 2 classes are kept"),
        (None, ("--labels",), "2 classes are new"),
    ],
)
def test_the_network_to_begin_with_gets_the_classes_of_the_data(tmp_path, calls, rng, classes, options, kept, capsys):
    net = ScoreNet.unet(3, 8, widths=(4,), layers_per_block=1, classes=classes and 2)
    net.class_names = classes
    net.save_pretrained(tmp_path / "network")
    for name in ("cow", "dog"):
        _pictures(tmp_path / "pets" / name, 2, rng)
    arguments = ["train", tmp_path / "pets", "--out", tmp_path / "run", "--start", tmp_path / "network", *options]
    assert main([*map(str, arguments), "--device", "cpu", "--quiet"]) == 0
    trained, _, _, found = calls[0]
    assert trained.class_names == (("cow", "dog") if options else None)
    assert trained.conditioning.null_class == bool(options)
    assert (found["images"], found["lr"], found["batch_size"]) == (20_000, 5e-4, 4)
    assert f"begins with the weights of {tmp_path / 'network'}; {kept}\n" in capsys.readouterr().out
    assert main([*map(str, arguments), "--device", "cpu", "--quiet", "--images", "8", "--lr", "0.1"]) == 0
    assert (calls[1][-1]["images"], calls[1][-1]["lr"]) == (8, 0.1)


@pytest.mark.parametrize(
    ("network", "features", "kept"),
    [
        ({"classes": 2}, 3, "none of its 2 classes are kept, the vector of its condition is new"),
        ({"condition_features": 2}, 3, "the vector of its condition is new"),
        ({"condition_features": 2}, 0, "its condition is left out"),
        ({"condition_features": 3}, 3, None),
    ],
)
def test_the_network_to_begin_with_gets_the_vectors_of_arrays(tmp_path, calls, rng, network, features, kept, capsys):
    ScoreNet.unet(3, 8, widths=(4,), layers_per_block=1, **network).save_pretrained(tmp_path / "network")
    vectors = {"condition": np.ones((5, features))} if features else {}
    np.savez(tmp_path / "x.npz", x=torch.rand(5, 3, 8, 8, generator=rng).numpy(), **vectors)
    arguments = ["train", tmp_path / "x.npz", "--out", tmp_path / "run", "--start", tmp_path / "network"]
    assert main([*map(str, arguments), "--device", "cpu", "--quiet"]) == 0
    takes = calls[0][0].conditioning
    assert (takes.vector, takes.classes) == (features, None)
    end = "" if kept is None else f"; {kept}"
    assert f"begins with the weights of {tmp_path / 'network'}{end}\n" in capsys.readouterr().out


def test_a_network_that_takes_no_classes_begins_without_labels(faces, tmp_path, rng, capsys):
    ScoreNet.ncsnv2(3, 8, width=8).save_pretrained(tmp_path / "network")
    _pictures(tmp_path / "pets" / "cow", 2, rng)
    arguments = ["train", tmp_path / "pets", "--out", tmp_path / "run", "--start", tmp_path / "network", "--labels"]
    assert "network cannot take classes. Leave out --labels.\n" in refused([*arguments, "--device", "cpu"], capsys)


# -- Counts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("50000", 50_000),
        ("50k", 50_000),
        ("5M", 5_000_000),
        ("4.1M", 4_100_000),
        ("2.01k", 2_010),
        ("5m", 5_000_000),
        ("2K", 2_000),
    ],
)
def test_counts_with_and_without_a_suffix(text, number):
    assert image_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-5", "5q", "5g", "1.0005k", "k", "1e6", " 5"])
def test_invalid_counts_raise(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="must be an integer of at least 1, such as 64, 50k or 5M, got"
    ):
        image_count(text)


def test_an_image_size_is_a_side_or_height_x_width():
    assert _size("64") == 64 and _size("48x64") == (48, 64)
    for text in ("", "x", "64x", "4x4x4", "-8"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a side such as 64, or height x width"):
            _size(text)


def test_one_picture_is_one_image(faces, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    shutil.copy(faces / "0.png", tmp_path / "one")
    assert _train(tmp_path / "one", tmp_path / "run", "--batch-size", "1", "--dry-run") == 0
    assert f"data      1 image of 3 x 8 x 8 from {tmp_path / 'one'}\n" in capsys.readouterr().out


# -- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "huge"), "argument --recipe: invalid choice: 'huge'"),
        (("--images", "5q"), "argument --images: must be an integer of at least 1, such as 64, 50k or 5M, got '5q'"),
        (("--epochs", "3"), "unrecognized arguments: --epochs 3. Write the number of images, --images 500k"),
        (("--resume",), "unrecognized arguments: --resume. Repeat the command of the run: it continues. See"),
        (("--image-size", "big"), "argument --image-size: must be a side such as 64"),
        (("--label-drop", "0.2"), "--label-drop is for training on classes with --labels. Leave it out."),
        (("--label-key", "digits"), "--label-key is for training on classes with --labels. Leave it out."),
        (("--cache", "x", "--no-cache"), "--cache and --no-cache cannot be combined. Leave out one."),
        (("--device", "mps"), "--device mps is not available: Accelerate uses cpu"),
        (
            ("--batch-size", "13"),
            r"a batch of 13 is more than the 12 samples of the data\. Pass --batch-size 12 or less",
        ),
        (
            ("--recipe", "ncsn-cifar10", "--image-size", "13"),
            "height and width must be multiples of 2, got 13x13. Pass --image-size 12 or --image-size 14.$",
        ),
        (("--image-size", "3x8"), "every side of a sample must be at least 4, the largest stride, got 3x8.$"),
        (("--labels",), ": --labels needs all images in subfolders.* or leave out --labels.$"),
        (("--crop", "celeba"), "needs images of at least 140 x 140 pixels"),
        (("--recipe", "ncsn-cifar10", "--image-size", "15"), "15x15"),
    ],
)
def test_wrong_arguments_give_an_error_of_one_line(faces, tmp_path, options, message, capsys):
    arguments = ["train", faces, "--out", tmp_path / "run", "--recipe", "tiny", "--image-size", "8", "--quiet"]
    assert re.search(message, refused([*arguments, "--batch-size", "8", "--dry-run", *options], capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["report.md", "network", "log.jsonl"])
def test_files_that_train_did_not_write_are_kept(faces, tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    error = refused(["train", faces, "--out", tmp_path], capsys)
    assert error == f"scorematch: {tmp_path / name} exists already and would be replaced. Choose another folder.\n"
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_settings_are_checked_before_the_data_are_read(faces, tmp_path, capsys):
    error = refused(["train", faces, "--out", tmp_path / "run", "--lr", -1], capsys)
    assert "argument --lr: must be a number of more than 0, got '-1'." in error
    error = refused(["train", faces, "--out", tmp_path / "run", "--ema", 0.5], capsys)
    assert "ema must contain lengths above 0 and at most 0.289" in error
    assert not (tmp_path / "run").exists()


def test_a_missing_login_is_reported_before_the_data_are_read(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    arguments = ["train", faces, "--out", tmp_path / "run", "--device", "cpu", "--push-to-hub", "me/faces"]
    assert "you are not logged in to the Hugging Face Hub. Run hf auth login" in refused(arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_unusable_data_give_an_error_of_one_line(tmp_path, rng, capsys):
    (tmp_path / "empty").mkdir()
    assert "contain no image files" in refused(["train", tmp_path / "empty", "--out", tmp_path / "run"], capsys)
    missing = tmp_path / "nothing"
    assert "nothing does not exist" in refused(["train", missing, "--out", tmp_path / "run"], capsys)
    mixed = _pictures(tmp_path / "mixed", 3, rng)
    Image.new("L", (16, 16)).save(mixed / "gray.png")
    error = refused(["train", mixed, "--out", tmp_path / "run"], capsys)
    assert "mixes gray and color images" in error and error.endswith("or write --channels 3 or --channels 1.\n")
    broken = _pictures(tmp_path / "broken", 3, rng)
    (broken / "a.png").write_bytes(b"no picture")
    arguments = ["train", broken, "--out", tmp_path / "run", "--strict", "--quiet"]
    assert "a.png cannot be read as an image" in refused(arguments, capsys)
    _pictures(tmp_path / "pets" / "cat", 3, rng)
    arguments = ["train", tmp_path / "pets", "--out", tmp_path / "run", "--recipe", "ncsn-cifar10", "--labels"]
    assert "the network of ncsn-cifar10 takes no classes" in refused([*arguments, "--quiet"], capsys)


def test_hints_for_arrays_are_code_that_can_be_copied(tmp_path, capsys):
    def error(*options):
        return refused(["train", tmp_path / "data.npz", "--out", tmp_path / "run", *options], capsys)

    np.savez(tmp_path / "data.npz", images=np.full((4, 1, 8, 8), 2.0))
    assert ", or images.clamp(0, 1). In Python, pass value_range= for " in error("--image-size", "8")
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8)))
    assert error("--image-size", "8").endswith(
        "has samples of shape (8, 8): write x[:, None] for gray images (N, H, W). Leave it out.\n"
    )
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8), np.uint16))
    assert error("--image-size", "8").endswith(
        "got uint16. Write x.astype(np.float32) for data that are not pictures, x.astype(np.uint8) for pictures with "
        "values up to 255, or x / 65535 for 16-bit pictures.\n"
    )
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 5, 8, 8), np.uint8))
    assert error("--image-size", "8").endswith(
        "other numbers of channels as floating point (N, C, H, W): write x / 255.\n"
    )
    np.save(tmp_path / "data.npy", np.zeros((4, 8, 8), np.uint8))
    error = refused(["train", tmp_path / "data.npy", "--out", tmp_path / "run"], capsys)
    assert error.endswith(' Write np.savez("data.npz", array).\n')


# -- Averages after the fact


@pytest.mark.slow
def test_ema_writes_an_average_of_another_length(run, tmp_path, capsys):
    for images, options in [(24, ()), (16, ("--images", "16"))]:
        out = tmp_path / str(images)
        assert main(["ema", str(run[0]), "--length", "0.08", "--out", str(out), *options]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        expected = reconstruct(run[0], 0.08, images=images)
        assert _same(ScoreNet.from_pretrained(out).state_dict(), expected.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("length", "name"), [("0.08", "ema-0.080"), ("0.0812", "ema-0.0812"), (".289", "ema-0.289")])
@pytest.mark.filterwarnings("ignore:.*give an inaccurate average:UserWarning")
def test_ema_writes_to_the_folder_of_the_run_by_default(run, tmp_path, capsys, length, name):
    out = tmp_path / "run"
    shutil.copytree(run[0] / "snapshots", out / "snapshots")
    assert main(["ema", str(out), "--length", length]) == 0
    assert capsys.readouterr().out == f"{out / name}\n"
    assert ScoreNet.from_pretrained(out / name).sample_shape == (3, 8, 8)


def test_ema_of_a_folder_without_a_run_gives_an_error(tmp_path, capsys):
    assert "has no snapshots" in refused(["ema", tmp_path, "--length", "0.08"], capsys)
    assert f"there is no folder {tmp_path / 'a'}." in refused(["ema", tmp_path / "a", "--length", "0.08"], capsys)
    assert "at most 0.289, got 0.5" in refused(["ema", tmp_path, "--length", "0.5"], capsys)


# -- Measurements -----------------------------------------------------------------------------------------------------

STAGES = ("--sigma", "0.1", "--stages", "1", "--images", "16", "--batch-size", "8", "--quiet")
TINY = ("--recipe", "tiny")


@pytest.fixture
def damaged(tmp_path):
    """A folder of twelve pictures, and one of their masks."""
    pictures = _pictures(tmp_path / "damaged", 12, torch.Generator().manual_seed(0))
    (tmp_path / "masks").mkdir()
    for i in range(12):
        mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(i)) < 0.7
        Image.fromarray((255 * mask).to(torch.uint8).numpy()).save(tmp_path / "masks" / f"{i}.png")
    return pictures


@pytest.mark.slow
def test_pictures_with_masks_train_a_prior(damaged, tmp_path):
    options = ("--out", str(tmp_path / "out"), "--observed-where", str(tmp_path / "masks"), *STAGES, *TINY)
    assert main(["train", str(damaged), *options]) == 0
    net = ScoreNet.from_pretrained(tmp_path / "out/network")
    assert (net.sample_shape, net.value_range) == ((3, 16, 16), (0, 1))


def test_pictures_and_their_masks_are_read_in_the_same_order(damaged, tmp_path, capsys):
    options = ("--out", str(tmp_path / "out"), "--observed-where", str(tmp_path / "masks"), *STAGES, *TINY)
    assert main(["train", str(damaged), *options, "--stages", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "12 measurements of shape (3, 16, 16)" in printed and "training  1 stage of " in printed
    assert not (tmp_path / "out").exists()
    read = read_measurements(damaged, tmp_path / "masks", 0.1, 1)
    assert read.y.shape == (12, 1, 16, 16)
    for row, i in enumerate(sorted(range(12), key=str)):
        mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(i)) < 0.7
        assert torch.equal(read.mask[row, 0], mask)


@pytest.mark.slow
def test_arrays_with_gaps_train_a_prior_in_their_own_units(tmp_path, capsys):
    y = 250 + 30 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y[torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.3] = torch.nan
    np.save(tmp_path / "y.npy", y.numpy())
    assert main(["train", str(tmp_path / "y.npy"), "--out", str(tmp_path / "out"), *STAGES]) == 0
    assert ScoreNet.from_pretrained(tmp_path / "out/network").units.mean == pytest.approx([250] * 3, abs=20)
    np.savez(tmp_path / "y.npz", y=y.nan_to_num(0).numpy(), mask=~y.isnan().numpy())
    read = read_measurements(tmp_path / "y.npz", None, 0.1, None)
    assert torch.equal(read.mask, ~y.isnan())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda root: None, [], "a folder of pictures needs its masks: add --observed-where MASKS"),
        (lambda root: (root / "masks/3.png").unlink(), ["--observed-where", "masks"], "3.png has no mask masks/3.png"),
        (
            lambda root: Image.new("L", (16, 8)).save(root / "masks/3.png"),
            ["--observed-where", "masks"],
            "the mask masks/3.png must have 16 x 16 pixels, as its picture has, got 8 x 16",
        ),
        (
            lambda root: Image.new("L", (8, 8)).save(root / "damaged/3.png"),
            ["--observed-where", "masks"],
            "damaged/3.png has another size than damaged/0.png",
        ),
        (lambda root: None, ["--observed-where", "masks", "--labels"], "--labels is not for measurements"),
    ],
)
def test_measurements_that_do_not_fit_are_refused(damaged, tmp_path, monkeypatch, capsys, change, options, message):
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "damaged", "--out", "out", *STAGES, *TINY, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"y": np.zeros((8, 2), int)}, [], "must have measurements y (N, ...), floating point, got int64 of shape"),
        ({"x": np.zeros((8, 2))}, [], "floating point, got the arrays x"),
        ({"y": np.zeros((8, 2)), "mask": np.zeros((8, 2))}, [], "mask of y.npz must be of type bool"),
        ({"y": np.zeros((8, 2)), "mask": np.ones((8, 3), bool)}, [], "mask must broadcast to y of shape (8, 2)"),
        ({"y": np.full((8, 2), np.nan), "mask": np.ones((8, 2), bool)}, [], "y must be finite where it is observed"),
        ({"y": np.zeros((8, 2))}, ["--sigma", "0"], "that is clean data"),
        ({"y": np.zeros((8, 2))}, ["--observed-where", "masks"], "--observed-where is for a folder of pictures"),
        ({"y": np.zeros((8, 2))}, ["--channels", "3"], "--channels is for pictures with --observed-where"),
        ({"y": np.zeros((8, 2))}, ["--padding", "circular"], "--padding is for signals, fields and volumes, and these"),
        (
            {"y": np.zeros((8, 2))},
            [*TINY],
            "--recipe is for pictures, and y.npz has measurements of samples of shape (2,)",
        ),
        (
            {"y": np.zeros((8, 1, 8, 8))},
            [*TINY, "--padding", "circular"],
            "--padding is for a new network of data that are",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, arrays, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("y.npz", **arrays)
    assert main(["train", "y.npz", "--out", "out", *STAGES, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--sigma", "0.1", "--dry-run")])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, options):
    np.savez(tmp_path / "y.npz", y=np.zeros((8, 2)))
    out = tmp_path / "y.npz" / "run"
    assert main(["train", str(tmp_path / "y.npz"), "--out", str(out), *options]) == 2
    assert f"{out} cannot be written to: {out.parent} is not a folder." in capsys.readouterr().err


def test_options_of_measurements_need_the_noise(tmp_path, capsys):
    assert main(["train", str(tmp_path), "--out", "out", "--observed-where", "masks"]) == 2
    assert "--observed-where needs the noise of the pictures: add --sigma" in capsys.readouterr().err
    assert main(["train", str(tmp_path), "--out", "out", "--stages", "2"]) == 2
    assert "--stages is for measurements with --sigma" in capsys.readouterr().err
