"""Training runs: their files, continuation, start with trained weights, failures, and reports."""

import contextlib
import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import textwrap
import time
import warnings
from functools import partial
from types import SimpleNamespace

import accelerate
import huggingface_hub
import numpy as np
import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.data import open_images, read_image, save_image
from scorematch.pretrained import load, locate
from scorematch.restoration.palette import Inpainting
from scorematch.sampling import SamplerSettings
from scorematch.training import LevelMixture, LogNormal, Settings, reconstruct, report, train, train_steps
from scorematch.training import accelerator as accelerators
from scorematch.training import checkpoint as checkpoints
from scorematch.training.accelerator import make_accelerator
from scorematch.training.levels import ScheduleLevels, uniforms
from scorematch.training.log import Log, Losses
from scorematch.training.report import Examples, sample_interval, save_samples
from scorematch.training.signals import Stop
from scorematch.training.start import begin_with
from tests.helpers import in_threads, seed
from tests.training import (
    MLP,
    Interrupted,
    Memory,
    content,
    image_net,
    images,
    interrupt_at,
    points,
    points_net,
    quick,
    same_runs,
    steps,
    vector,
)

pytestmark = pytest.mark.usefixtures("no_plots")

# -- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a complete run, and the network that it returned."""
    out = tmp_path_factory.mktemp("run") / "faces"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = train(
            image_net(dropout=0.2),
            images(),
            out,
            images=160,
            batch_size=8,
            log_every=40,
            sample_every=80,
            snapshot_every=80,
            checkpoint_every=32,
            evaluate=lambda net, images: {"score": images / 2},
            progress=False,
        )
    return out, net


def test_a_run_does_not_write_into_the_folder_of_its_data(tmp_path):
    """Its pictures of samples would become data, and the same call would not continue the run."""
    faces = tmp_path / "faces"
    faces.mkdir()
    for i, image in enumerate(images(4)):
        save_image(image, faces / f"{i}.png")
    for out in (faces / "run", faces):
        with pytest.raises(
            ValueError, match=r"output folder .*faces.* is inside the data folder .*faces, .*Write to another folder"
        ):
            quick(image_net(), faces, out)
    assert len(list(faces.iterdir())) == 4


@pytest.mark.parametrize("name", ["network", "log.jsonl"])
def test_files_of_other_programs_are_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} exists already and would be replaced\. Choose another folder"):
        quick(points_net(), points(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
    with pytest.raises(NotADirectoryError, match=rf"{name} is a file\. Pass a folder\."):
        quick(points_net(), points(), tmp_path / name)


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # on Windows
    monkeypatch.chdir(tmp_path)
    quick(image_net(), images(), "~/run", images=16, snapshot_every=16)
    assert reconstruct("~/run", 0.05).sample_shape == image_net().sample_shape
    save_image(torch.zeros(1, 8, 8), "~/faces/a.png")
    assert read_image("~/faces/a.png", 1).shape == (1, 8, 8)
    open_images("~/faces", cache="~/cache", progress=False)
    with pytest.raises(ValueError, match="is inside the data folder"):
        quick(image_net(), "~/faces", "~/faces/run")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["cache", "faces", "run"]


@pytest.mark.slow
def test_the_report_names_classes_of_folders_whose_names_are_not_utf_8(tmp_path):
    labels = ["caf\udce9", "宿"] * 20  # Python's name of the folder b"caf\xe9"
    quick(image_net(classes=2), open_images((torch.rand(40, 1, 8, 8), labels), labels=True), tmp_path, images=16)
    assert r"- 2 classes: 0 caf\udce9, 1 宿" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="there are no locks on Windows")
def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    refused = []

    def evaluate(net, images):
        with pytest.raises(BlockingIOError, match=r"another process is training in .*run\. Wait until it has ended"):
            quick(points_net(), points(), tmp_path / "run")
        refused.append(images)
        return {}

    quick(points_net(), points(), tmp_path / "run", evaluate=evaluate)
    assert refused == [80]
    quick(points_net(), points(), tmp_path / "run")


def test_the_repository_of_the_result_is_checked_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="the repository must be owner/name, got 'faces'"):
        quick(image_net(), images(), tmp_path / "run", push_to_hub="faces")
    assert not (tmp_path / "run").exists()


def test_unknown_options_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"train has no option device, epochs\. help\(train\) lists its options"):
        train(image_net(), images(), tmp_path / "run", epochs=3, device="cpu")


def test_a_missing_login_is_reported_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(PermissionError, match="you are not logged in to the Hugging Face Hub"):
        quick(image_net(), images(), tmp_path / "run", push_to_hub="me/faces")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_results_of_evaluate_are_numbers_in_the_log(tmp_path):
    given = {"tensor": torch.tensor(0.5), "array": np.float32(2), "number": 3, "nan": math.nan, "infinity": -math.inf}
    quick(points_net(), points(), tmp_path / "run", images=16, sample_every=16, evaluate=lambda net, images: given)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"images": 16, "tensor": 0.5, "array": 2.0, "number": 3.0, "nan": None, "infinity": None} in lines
    wrong = {
        "evaluate must return a mapping of names to numbers, got NoneType": None,
        "evaluate must return numbers: ": {"all": torch.zeros(2)},
        "evaluate must not return 'images', 'loss', which train logs": {"loss": 1.0, "images": 2},
    }
    for i, (message, found) in enumerate(wrong.items()):
        options = {"images": 16, "sample_every": 16, "evaluate": lambda net, images, found=found: found}
        with pytest.raises((TypeError, ValueError), match=message):
            quick(points_net(), points(), tmp_path / str(i), **options)


@pytest.mark.slow
def test_the_folder_of_a_run_stands_for_its_network(run):
    loaded, same = (ScoreNet.from_pretrained(folder).state_dict() for folder in (run[0], run[0] / "network"))
    assert all(torch.equal(loaded[name], same[name]) for name in same)


def test_files_of_a_run(run):
    out, net = run
    names = {"checkpoints", "config.json", "log.jsonl", "network", "report", "report.md", "samples", "snapshots"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000000128", "000000160"]
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["000000080.png", "000000160.png"]
    kept = ["000000080-0.050", "000000080-0.100", "000000160-0.050", "000000160-0.100"]
    assert [path.name for path in sorted((out / "snapshots").iterdir())] == kept
    loaded = ScoreNet.from_pretrained(out / "network")
    assert torch.equal(vector(loaded), vector(net)) and not net.training
    weights = load(locate(out / "snapshots" / "000000160-0.050")).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    half = ScoreNet.from_pretrained(out / "snapshots" / "000000160-0.050")
    torch.testing.assert_close(vector(half), vector(net), atol=1e-3, rtol=1e-3)


def test_log_of_a_run(run):
    lines = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["images"] for line in logged] == [40, 80, 120, 160]
    assert [line["score"] for line in lines if "score" in line] == [40, 80]
    for line in logged:
        levels = list(map(float, line["loss_by_level"]))
        assert line["D/2"] == 32 and line["images_per_second"] > 0 and len(levels) == 8 and levels == sorted(levels)
        assert np.mean(list(line["loss_by_level"].values())) == pytest.approx(line["loss"], rel=0.05)
    assert [line["lr"] for line in logged] == [Settings(images=160, batch_size=8).rate(i) for i in (32, 72, 112, 152)]


def test_report_of_a_run(run):
    text = (run[0] / "report.md").read_text()
    lines = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    line = [line for line in lines if "loss" in line][-1]
    levels = "".join(f"| {sigma} | {loss:.4g} |\n" for sigma, loss in line["loss_by_level"].items())
    for part in ("D/2 = 32", "(report/loss.svg)", "(samples/000000160.png)", "| batch_size | 8 |", levels):
        assert part in text
    svg = (run[0] / "report" / "loss.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") > 5 and "nan" not in svg


def test_configuration_of_a_run(run):
    config = json.loads((run[0] / "config.json").read_text())
    assert config["settings"]["ema"] == [0.05, 0.1] and config["settings"]["batch_size"] == 8
    assert config["data"]["images"] == 32 and config["data"]["shape"] == [1, 8, 8] and config["data"]["fingerprint"]
    assert config["versions"]["torch"] == torch.__version__ and config["network"]["precondition"] == "karras"


def test_a_complete_run_is_not_repeated(run):
    before = content(run[0])
    again = quick(image_net(dropout=0.2), images(), run[0], images=160)
    assert content(run[0]) == before and torch.equal(vector(again), vector(run[1]))


def test_other_settings_raise_an_error_that_names_them(run):
    with pytest.raises(ValueError, match=r"other settings: batch_size was 8 and is 16; lr was 0.001 and is 0.01; seed"):
        quick(image_net(dropout=0.2), images(), run[0], images=160, batch_size=16, lr=0.01, seed=1)
    with pytest.raises(ValueError, match=r"dropout was 0\.2 and is 0"):
        quick(image_net(), images(), run[0], images=160)
    with pytest.raises(ValueError, match=r"other settings: the network is different\. This run is complete\."):
        quick(image_net(widths=(4, 8), attention=[False] * 2), images(), run[0], images=160)
    with pytest.raises(ValueError, match="fingerprint of the data was"):
        quick(image_net(dropout=0.2), images() / 2, run[0], images=160)
    with pytest.raises(ValueError, match=r"settings: images of the data was 32 and is 31\. "):
        quick(image_net(dropout=0.2), images()[:31], run[0], images=160)
    with pytest.raises(ValueError, match="take an image as their condition, which net does not"):
        quick(image_net(dropout=0.2), images(), run[0], images=160, condition=Inpainting())


@pytest.mark.slow
def test_options_of_other_objects_are_settings(tmp_path):
    class Loss:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, net, x, **options):
            return self.factor * dsm_loss(net, x, reduction="none", **options)

    def start(factor):
        return quick(points_net(), points(), tmp_path / "run", images=16, loss=Loss(factor))

    start(1.0)
    start(1.0)
    with pytest.raises(ValueError, match=r"loss was '.*Loss\(factor=1\.0\)' and is '.*Loss\(factor=2\.0\)'"):
        start(2.0)


@pytest.mark.slow
def test_schedules_in_a_mixture_are_settings(tmp_path):
    def start(*sigmas):
        levels = LevelMixture((LogNormal(0.0, 1.0), NoiseSchedule([2.0, *sigmas, 0.1])))
        return quick(points_net(), points(), tmp_path / "run", images=16, levels=levels)

    start(1.0, 0.5)
    start(1.0, 0.5)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["levels"]
    assert stored == (  # as it has always been, so that old runs continue
        "Mixture(parts=['LogNormal(mean=0.0, std=1.0)', \"ScheduleLevels(schedule={'sigmas': [2.0, 1.0, 0.5, 0.1]})\"])"
    )
    with pytest.raises(ValueError, match="other settings: levels was"):
        start(1.0, 0.25)


def test_settings_that_do_not_matter_may_change(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    quick(image_net(dropout=0.2), images(), tmp_path / "run", images=160, microbatch=4, log_every=3, keep=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000160"]


def test_the_recommended_sampler_settings_may_change(tmp_path):
    """Those of a network that ships with the package, with which a run starts, may change with its version."""
    quick(points_net(), points(), tmp_path, images=8)
    net = points_net()
    net.sampler_settings = SamplerSettings("ode", levels=3)
    assert quick(net, points(), tmp_path, images=8).sampler_settings == net.sampler_settings


def test_functions_are_stored_by_name_in_the_configuration(tmp_path):
    settings = {"loss": partial(dsm_loss, reduction="none"), "levels": NoiseSchedule([1.0, 0.5]), "images": 8}
    quick(points_net(), points(), tmp_path, **settings)
    stored = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert stored["loss"] == {"function": "scorematch.loss.dsm_loss", "args": [], "reduction": "none"}
    assert stored["levels"] == {"sigmas": [1.0, 0.5]}
    quick(points_net(), points(), tmp_path, **settings)


EVENTS = {"checkpoint_every": 24, "log_every": 40, "sample_every": 8, "snapshot_every": 40}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    quick(points_net(dropout=0.3), points(), out, evaluate=interrupt_at(None), **EVENTS)
    return out


@pytest.mark.parametrize(
    "stops",
    [[8], [32, 56, 72, 72], *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([24], [*range(8, 88, 8)]))],
)
def test_an_interrupted_run_ends_with_the_same_bits(whole, tmp_path, stops):
    for stop in stops:
        if checkpoints.latest(tmp_path / "cut" / "checkpoints") is None:
            net = points_net(dropout=0.3)
        with pytest.raises(Interrupted):
            quick(net, points(), tmp_path / "cut", evaluate=interrupt_at(stop), **EVENTS)
        net = ScoreNet(MLP(dropout=0.3), net.schedule, sample_shape=(2,))  # other weights, not used
    quick(net, points(), tmp_path / "cut", evaluate=interrupt_at(None), **EVENTS)
    assert same_runs(whole, tmp_path / "cut")


@pytest.mark.slow
def test_an_interrupted_run_in_float16_ends_with_the_same_bits_and_counts_the_skipped_steps(tmp_path):
    options = {"precision": "float16", "lr": 1e-3, **EVENTS}

    for name, stops in [("whole", [None]), ("cut", [24, 56, None])]:
        for stop in stops:
            with contextlib.suppress(Interrupted):
                quick(image_net(), images(), tmp_path / name, evaluate=interrupt_at(stop), **options)
    assert same_runs(tmp_path / "whole", tmp_path / "cut")
    lines = Log(tmp_path / "cut" / "log.jsonl").lines()
    counts = [line["skipped_steps"] for line in lines if "skipped_steps" in line]
    assert counts == sorted(counts) and 0 < counts[-1] < 10
    assert list((tmp_path / "cut" / "checkpoints").rglob("scaler.safetensors"))


@pytest.mark.slow
def test_a_process_says_once_what_it_waits_for(monkeypatch):
    monkeypatch.setattr(accelerators, "_SILENT_SECONDS", 0.02)
    slow = SimpleNamespace(process_index=1, num_processes=2, wait_for_everyone=lambda: time.sleep(0.3))
    with pytest.warns(UserWarning, match="^process 1 of 2 waits until the first has saved.$") as found:
        accelerators.wait(slow, "the first has saved")
    assert len(found) == 1
    monkeypatch.setattr(accelerators, "_SILENT_SECONDS", 60)
    with warnings.catch_warnings(record=True) as found:
        accelerators.wait(slow, "the first has saved")
    assert not found


class Stopping(Inpainting):
    """A task that stops the run at the call with this number."""

    def __init__(self, calls):
        self.calls = calls

    def __repr__(self):
        return "Inpainting()"

    def _degrade(self, x, draws):
        self.calls -= 1
        if self.calls == 0:
            raise Interrupted
        return super()._degrade(x, draws)


@pytest.mark.slow
def test_an_interrupted_run_of_images_ends_with_the_same_bits(tmp_path):
    options = {"images": 64, "microbatch": 4, "checkpoint_every": 24, "snapshot_every": 32, "label_drop": 0}

    def net():
        return image_net(dropout=0.3, condition_channels=1)

    quick(net(), images(), tmp_path / "whole", condition=Inpainting(), **options)
    for calls in (1, 8, 5):  # in the first step, after a checkpoint, and between two microbatches
        with pytest.raises(Interrupted):
            quick(net(), images(), tmp_path / "cut", condition=Stopping(calls), **options)
    quick(net(), images(), tmp_path / "cut", condition=Inpainting(), **options)
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_fails_at_once_has_saved_its_initial_weights(tmp_path):
    with pytest.raises(Interrupted):
        quick(points_net(), points(), tmp_path, sample_every=8, evaluate=interrupt_at(8))
    assert checkpoints.latest(tmp_path / "checkpoints").images == 0
    assert torch.equal(vector(ScoreNet.from_pretrained(tmp_path / "network", backbone=MLP())), vector(points_net()))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 600])
def test_checkpoints_by_time_do_not_change_the_result(tmp_path, monkeypatch, seconds):
    """By default checkpoints are saved after a time: here after each step, or at the end only."""
    monkeypatch.setattr("scorematch.training.run._CHECKPOINT_SECONDS", seconds)
    monkeypatch.setattr("scorematch.training.run.CHECK_EVERY", 3)  # losses are added at checkpoints and after 3 steps
    options = {"images": 56, "log_every": 56}
    quick(points_net(dropout=0.3), points(), tmp_path / "time", keep=100, **options)
    saved = [int(path.name) for path in sorted((tmp_path / "time" / "checkpoints").iterdir())]
    assert saved == (list(range(0, 57, 8)) if seconds == 0 else [0, 56])
    quick(points_net(dropout=0.3), points(), tmp_path / "images", checkpoint_every=16, keep=1, **options)
    for number in saved[:-1]:
        shutil.rmtree(tmp_path / "time" / "checkpoints" / f"{number:09d}")
    assert same_runs(tmp_path / "time", tmp_path / "images")


# -- Starting with trained weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, run):
    """A run that started with the network of another run, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("fine") / "tuned"
    net = image_net(dropout=0.2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)  # these weights are replaced
    return out, quick(net, images(), out, start=run[0] / "network", images=24, checkpoint_every=8, keep=9)


@pytest.mark.slow
def test_a_run_with_start_equals_a_run_of_the_loaded_network(fine_tuned, run, tmp_path):
    out, net = fine_tuned
    trained = ScoreNet.from_pretrained(run[0] / "network")
    shutil.copytree(out / "checkpoints" / "000000000", tmp_path / "000000000")
    first = checkpoints.latest(tmp_path)
    assert first.parts["optimizer"] == {}
    for part in ("weights", "ema-0.050", "ema-0.100"):
        assert all(torch.equal(first.parts[part][name], value) for name, value in trained.named_parameters())
    same = quick(trained, images(), tmp_path / "same", images=24)  # the same with a network that was loaded before
    assert torch.equal(vector(same), vector(net))


def test_start_is_one_of_the_settings_of_a_run(fine_tuned, run, tmp_path):
    out, net = fine_tuned
    start = str(run[0] / "network")
    assert json.loads((out / "config.json").read_text())["settings"]["start"] == start
    assert f'| start | "{start}" |' in (out / "report.md").read_text()
    for other in (None, run[0] / "snapshots" / "000000160-0.100"):
        with pytest.raises(
            ValueError, match=r"a run with other settings: start was '.*network' and is .*[e0]'?\. This run is comp"
        ):
            quick(image_net(dropout=0.2), images(), out, start=other, images=24)
    again = quick(image_net(dropout=0.2), images(), out, start=start, images=24, keep=9)
    assert torch.equal(vector(again), vector(net))


@pytest.mark.slow
def test_an_interrupted_run_with_start_continues_without_the_start_network(tmp_path):
    """The run continues from its checkpoint."""
    trained = steps(points_net(), points(), images=16, batch_size=8).state.average()
    trained.save_pretrained(tmp_path / "start")
    options = {"start": tmp_path / "start", "images": 24, "sample_every": 8, "checkpoint_every": 8}
    quick(points_net(), points(), tmp_path / "whole", evaluate=interrupt_at(None), **options)
    with pytest.raises(Interrupted):
        quick(points_net(), points(), tmp_path / "cut", evaluate=interrupt_at(16), **options)
    shutil.rmtree(tmp_path / "start")
    quick(points_net(), points(), tmp_path / "cut", evaluate=interrupt_at(None), **options)
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_user_defined_network_can_start_with_trained_weights(tmp_path):
    quick(points_net(), points(), tmp_path / "first", images=8)
    trained = ScoreNet.from_pretrained(tmp_path / "first" / "network", backbone=MLP())
    found = quick(points_net(), points(), tmp_path / "second", start=tmp_path / "first" / "network", images=8)
    same = quick(trained, points(), tmp_path / "same", images=8)
    assert torch.equal(vector(found), vector(same))
    wide = ScoreNet(MLP(8), points_net().schedule, sample_shape=(2,))
    with pytest.raises(ValueError, match="belong to a network of other sizes"):
        quick(wide, points(), tmp_path / "third", start=tmp_path / "first" / "network", images=8)


def test_start_with_another_network_raises_before_anything_is_written(run, tmp_path):
    start = run[0] / "network"
    with pytest.raises(
        ValueError, match=r"not the same network as the one to train: dropout is 0\.2 instead of 0\.0\. Pass"
    ):
        quick(image_net(classes=3), Memory(images(), torch.zeros(32).long()), tmp_path / "run", start=start)
    net = image_net(dropout=0.2, schedule=NoiseSchedule([1.0, 0.1]))
    with pytest.raises(ValueError, match=r"schedule is .* instead of .*\. Pass net=ScoreNet\.from_pretrained\(start"):
        quick(net, images(), tmp_path / "run", start=start)
    with pytest.raises(ValueError, match=r"the one to train: family is 'unet' instead of 'ncsnv2'\. Pass net="):
        quick(ScoreNet.ncsnv2(1, 8, width=2), images(), tmp_path / "run", start=start)
    with pytest.raises(FileNotFoundError, match="nothing"):
        quick(image_net(), images(), tmp_path / "run", start=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_start_with_a_network_of_another_image_size(run, tmp_path):
    net = image_net(dropout=0.2)
    net.sample_shape = (1, 16, 16)
    x = torch.rand(16, 1, 16, 16, generator=seed(2))
    assert quick(net, x, tmp_path, start=run[0] / "network", images=8).sample_shape == (1, 16, 16)


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"patch": 2}, {"patch": 2, "pixel_channels": 4}))],
    ids=str,
)
def test_a_conditional_network_starts_as_the_unconditional_one(tmp_path, options):
    """The outputs are equal at first, whatever the condition; after one step they depend on it."""
    first = image_net(**options)
    first.save_pretrained(tmp_path / "start")
    net = image_net(condition_channels=1, **options)
    x, sigma, dark = torch.rand(2, 1, 8, 8, generator=seed(3)), torch.tensor([0.1, 1.0]), torch.zeros(2, 1, 8, 8)
    assert not torch.allclose(net(x, sigma, dark), first(x, sigma))
    options = {"start": tmp_path / "start", "images": 16, "condition": Inpainting()}
    trained = quick(net, images(), tmp_path / "run", **options)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000016")
    with torch.no_grad():  # the weights that the run began with
        for name, value in checkpoints.latest(tmp_path / "run" / "checkpoints").parts["weights"].items():
            net.get_parameter(name).copy_(value)
    for condition in (dark, torch.rand(2, 1, 8, 8, generator=seed(4))):
        torch.testing.assert_close(net(x, sigma, condition), first(x, sigma))
    assert not torch.allclose(trained(x, sigma, dark), trained(x, sigma, dark + 1))


GROWTH = {
    "layers": ({}, {"layers_per_block": 3}),
    "layers, from two": ({"layers_per_block": 2}, {"layers_per_block": 3}),
    "layers, from three": (
        {"layers_per_block": 3, "patch": 2, "pixel_channels": 4},
        {"layers_per_block": 5, "attention": [True, True]},
    ),
    "layers of one scale": ({"layers_per_block": [1, 2]}, {"layers_per_block": [3, 2], "attention": [True, False]}),
    "layers, from one to each": ({"patch": 2, "pixel_channels": 4}, {"layers_per_block": [2, 3]}),
    "layers, attention": ({"attention": [False, True]}, {"layers_per_block": 2}),
    "attention": ({}, {"attention": [True, True]}),
    "pixels": ({"patch": 2, "pixel_channels": 4}, {"pixel_channels": 64}),
    "pixel layers": ({"patch": 2, "pixel_channels": 4}, {"pixel_layers": 3}),
    "pixel layers, from two": (
        {"patch": 2, "pixel_channels": 4, "pixel_layers": 2},
        {"pixel_channels": 8, "pixel_layers": 3, "layers_per_block": 2},
    ),
    "condition, pixels": ({"patch": 2, "pixel_channels": 8}, {"pixel_channels": 12, "condition_channels": 2}),
    "more conditions": ({"condition_channels": 1}, {"condition_channels": 2, "layers_per_block": 2}),
    "classes, everything": (
        {"patch": 2, "pixel_channels": 8, "classes": 3},
        {"pixel_channels": 16, "layers_per_block": 2, "attention": [True, True]},
    ),
}
SLOW_GROWTH = {
    "layers",
    "layers, from two",
    "layers, from three",
    "layers, from one to each",
    "layers of one scale",
    "layers, attention",
    "attention",
    "pixels",
    "pixel layers",
    "pixel layers, from two",
    "more conditions",
    "classes, everything",
}


@pytest.mark.parametrize(
    ("options", "more"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (name in SLOW_GROWTH)) for name, pair in GROWTH.items()],
    ids=GROWTH,
)
def test_a_larger_network_starts_as_the_smaller_one(tmp_path, options, more):
    """The outputs are equal at first, and training changes all of the additional weights.

    These are the functions that ``train`` calls; the test above calls ``train`` itself.
    """
    options = {"widths": (8, 16), "attention": [False, False], "layers_per_block": 1, **options}
    first, net = image_net(**options), image_net(**{**options, **more})
    first.save_pretrained(tmp_path / "start")
    assert len(vector(net)) > len(vector(first))

    def given(net):
        channels, classes = net.conditioning.channels, net.conditioning.classes
        if classes is not None:
            return torch.tensor([0, 2])
        return torch.rand(2, 2, 8, 8, generator=seed(4))[:, :channels] if channels else None

    def task(x, generator):
        return torch.rand(len(x), net.conditioning.channels, 8, 8, generator=seed(4)), None

    x, sigma = torch.rand(2, 1, 8, 8, generator=seed(3)), torch.tensor([0.1, 1.0])
    assert not torch.allclose(net(x, sigma, given(net)), first(x, sigma, given(first)))
    begin_with(net, tmp_path / "start")
    torch.testing.assert_close(net(x, sigma, given(net)), first(x, sigma, given(first)))
    at_first = {name: value.detach().clone() for name, value in net.named_parameters()}
    data = Memory(images(), torch.arange(32) % 3 if net.conditioning.classes else None)
    steps(net, data, images=64, batch_size=8, condition=task if net.conditioning.channels else None)
    same = [name for name, value in net.named_parameters() if torch.equal(value, at_first[name])]
    assert not [name for name in same if not name.endswith("to_k.bias")]  # attention does not depend on it


@pytest.mark.slow
def test_a_network_does_not_start_with_a_larger_one(tmp_path):
    """Neither with one of other widths, nor with more channels at full resolution than keep the groups of the norms."""
    large = {"condition_channels": 2, "layers_per_block": 2, "patch": 2, "pixel_channels": 8, "attention": [True]}
    large["pixel_layers"] = 2
    cases = {
        "in_channels is 3 instead of 2": {"condition_channels": 1},
        "layers_per_block is 2 instead of 1": {"layers_per_block": 1},
        r"block_out_channels is .*; layers_per_block is 2 instead of \[1, 3\]": {
            "widths": (4, 4),
            "layers_per_block": [1, 3],
            "attention": [True, True],
        },
        "pixel_channels is 8 instead of 4": {"pixel_channels": 4},
        "pixel_layers is 2 instead of None": {"pixel_layers": 1},
        "pixel_channels is 8 instead of 96": {"pixel_channels": 96},
        r"down_block_types is \['AttnDownBlock2D'\] instead of \['DownBlock2D'\]": {"attention": [False]},
        r"block_out_channels is \[4\] instead of \[8\]": {"widths": (8,)},
    }
    image_net(**large).save_pretrained(tmp_path / "start")
    for message, options in cases.items():
        net = image_net(**{**large, **options})
        with pytest.raises(ValueError, match=f"not the same network as the one to train: {message}.* Pass"):
            quick(net, images(), tmp_path / "run", start=tmp_path / "start", condition=Inpainting())


# -- Compilation ------------------------------------------------------------------------------------------------------

NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None
INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="needs a C++ compiler")]


@pytest.fixture(
    params=["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=INDUCTOR)]
)
def compiled(request, monkeypatch):
    """Replaces the backend of torch.compile; a list of the shapes for which graphs were compiled."""
    shapes, lookup = [], torch._dynamo.lookup_backend(request.param)

    def backend(graph, inputs):
        shapes.append(tuple(next(tensor.shape for tensor in inputs if tensor.shape[1:] == (2,))))
        return lookup(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield shapes
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
def test_an_interrupted_compiled_run_ends_with_the_same_bits(compiled, tmp_path):
    options = {"images": 48, "microbatch": 3, "compile": True, "sample_every": 8, "checkpoint_every": 16}

    def run(out, stop):
        torch._dynamo.reset()  # as in a new process
        quick(points_net(dropout=0.3), points(), out, evaluate=interrupt_at(stop), **options)

    run(tmp_path / "whole", None)
    assert compiled == [(3, 2), (2, 2)]  # one graph per shape, whatever the order of the shapes
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", 24)
    run(tmp_path / "cut", None)
    assert same_runs(tmp_path / "whole", tmp_path / "cut") and len(compiled) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps_are_close_to_steps_without_compilation(compiled):
    settings = {"images": 48, "batch_size": 8, "precision": "float32", "lr": 1e-2}
    state = steps(points_net(), points(), compile=True, **settings).state
    assert compiled == [(8, 2)]
    expected = steps(points_net(), points(), **settings).state
    assert (vector(points_net()) - vector(expected.net)).abs().max() > 1e-2
    torch.testing.assert_close(vector(state.net), vector(expected.net), atol=1e-4, rtol=1e-3)
    state.average()(points().x, 0.5)  # the averaged network is not compiled
    assert compiled == [(8, 2)]


# -- Failures ---------------------------------------------------------------------------------------------------------


def broken_after(image, value):
    """A loss that is not finite for one image of each batch after this number of images."""

    def loss(net, x, *, sigma, noise):
        losses = dsm_loss(net, x, sigma=sigma, noise=noise, reduction="none")
        loss.images += len(x)
        return losses * torch.tensor([1.0] * 5 + [value] + [1.0] * (len(x) - 6)) if loss.images > image else losses

    loss.images = 0
    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    settings = {"images": 8 * 40, "log_every": 10**6, "checkpoint_every": 32}
    with pytest.raises(RuntimeError) as caught:
        quick(points_net(), points(), tmp_path, loss=broken_after(80, value), **settings)
    sigma = LogNormal(-1.2, 1.2).quantile(uniforms(0, 85, 86)).item()
    message = str(caught.value)
    assert f"the loss became {value} at step 11 (image 88), at noise level {sigma:.3g}" in message
    assert "The last checkpoint" in message and "is at image 64" in message
    last = checkpoints.latest(tmp_path / "checkpoints")
    assert last.images == 64
    assert all(tensor.isfinite().all() for part in last.parts.values() for tensor in part.values())


def test_a_loss_that_is_not_finite_stops_the_run_within_48_steps(tmp_path):
    settings = {"images": 8 * 200, "log_every": 10**6, "checkpoint_every": 10**6}
    loss = broken_after(80, math.nan)
    with pytest.raises(RuntimeError, match=r"became nan at step 11 .*is at image 0"):
        quick(points_net(), points(), tmp_path, loss=loss, **settings)
    assert loss.images <= 8 * 48


@pytest.mark.slow
def test_slow_steps_are_checked_one_by_one(tmp_path, monkeypatch):
    """So that several processes agree on a signal before a launcher kills them; NaN is found as early."""
    settings = {"images": 8 * 200, "log_every": 10**6, "checkpoint_every": 10**6}
    seen = []
    for seconds in (0.0, math.inf):  # every step is slow; no step is slow
        monkeypatch.setattr("scorematch.training.log._SLOW_STEP", seconds)
        loss = broken_after(80, math.nan)
        with pytest.raises(RuntimeError, match="became nan at step 11"):
            quick(points_net(), points(), tmp_path / str(seconds), loss=loss, **settings)
        seen.append(loss.images)
    assert seen[0] <= 8 * 13 < seen[1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def loss(net, x, *, sigma, noise):  # the loss is finite, but its gradient is not
        losses = dsm_loss(net, x, sigma=sigma, noise=noise, reduction="none")
        loss.calls += 1
        return losses + (net.backbone.last[1].bias * 0).abs().sqrt().sum() if loss.calls == 3 else losses

    loss.calls = 0
    with pytest.raises(RuntimeError, match=r"the weight backbone.layers.0.weight is NaN or infinite at step 3"):
        quick(points_net(), points(), tmp_path, loss=loss, checkpoint_every=8, clip=1.0)
    assert checkpoints.latest(tmp_path / "checkpoints").images == 16


def test_an_error_of_the_device_is_not_reported_as_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Errors of CUDA are raised where the losses are read."""

    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Losses, "check", fail)
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access$"):
        quick(points_net(), points(), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    write, count = checkpoints.write_file, 0

    def full(path, content):
        nonlocal count
        count += path.name.startswith("optimizer")
        if count == 3:  # after other files of the checkpoint were written
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    out, options = tmp_path / "full", {"checkpoint_every": 32}
    monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(OSError, match=r"the checkpoint at image 64 could not .*No space left.*at image 32 is complete"):
        quick(points_net(dropout=0.2), points(), out, **options)
    monkeypatch.undo()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000000000", "000000032"]
    quick(points_net(dropout=0.2), points(), out, **options)
    quick(points_net(dropout=0.2), points(), tmp_path / "other", **options)
    assert same_runs(out, tmp_path / "other")


@pytest.mark.slow
def test_temporary_files_of_an_interruption_are_removed(tmp_path):
    quick(points_net(), points(), tmp_path)
    before = content(tmp_path)
    remains = [tmp_path / "checkpoints" / ".saving-000000096-ab", tmp_path / "snapshots" / ".saving-1-0.050-cd"]
    remains.append(tmp_path / "network" / ".saving-ef")
    for folder in remains:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".saving-gh").write_text("half")
    (tmp_path / "network" / "model.safetensors").unlink()  # killed between two renames
    quick(points_net(), points(), tmp_path)
    assert not list(tmp_path.rglob(".*")) and content(tmp_path) == before


@pytest.fixture
def complete(tmp_path, complete_once):
    """The folder of a complete run, with checkpoints at image 40 and 80, which a test may change."""
    return shutil.copytree(complete_once, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def complete_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("complete")
    quick(points_net(), points(), out, checkpoint_every=40)
    return out


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "state"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    before = content(tmp_path)
    file = tmp_path / "checkpoints" / "000000080" / "weights.safetensors"
    data, state = file.read_bytes(), file.with_name("state.json")
    {
        "state": lambda: state.write_text(state.read_text().replace('"step": ', '"step": 1')),
        "changed": lambda: file.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "cut": lambda: file.write_bytes(data[:-100]),
        "missing": file.unlink,
    }[damage]()
    with pytest.warns(UserWarning, match="000000080 is damaged"):
        quick(points_net(), points(), tmp_path, checkpoint_every=40)
    assert content(tmp_path) == before


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(tmp_path):
    quick(points_net(), points(), tmp_path, checkpoint_every=40)
    for state in (tmp_path / "checkpoints").glob("*/state.json"):
        state.write_text("{}")
    before = content(tmp_path)
    with (
        pytest.warns(UserWarning, match="000000080 is damaged"),
        pytest.raises(
            ValueError, match=r"000000040 is damaged .* there is no earlier one\. Delete .*checkpoints to begin"
        ),
    ):
        quick(points_net(), points(), tmp_path, checkpoint_every=40)
    assert content(tmp_path) == before


def test_damaged_checkpoints_do_not_count_among_those_to_keep(tmp_path):
    for number in (40, 80):
        checkpoints.write(tmp_path, number, {"weights": {"a": torch.full((2,), number)}}, {"step": 1}, keep=2)
    (tmp_path / "000000080" / "state.json").write_text("{")
    checkpoints.write(tmp_path, 48, {"weights": {"a": torch.full((2,), 48)}}, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000000048"]
    last = checkpoints.latest(tmp_path)
    assert (last.images, last.state) == (48, {"step": 2}) and last.parts["weights"]["a"].tolist() == [48, 48]


@pytest.fixture
def in_the_foreground():
    """A shell may have started the tests in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)
def test_sigterm_and_ctrl_c_save_a_checkpoint(tmp_path, number, error, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def loss(net, x, *, sigma, noise):
        loss.calls += 1
        if loss.calls == 3:
            os.kill(os.getpid(), number)
        return dsm_loss(net, x, sigma=sigma, noise=noise, reduction="none")

    loss.calls, options = 0, {"checkpoint_every": 10**6, "loss": loss}
    with pytest.raises(error) as caught:
        quick(points_net(), points(), tmp_path / "stopped", **options)
    assert capsys.readouterr().err == ""
    if error is SystemExit:
        assert caught.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoints.latest(tmp_path / "stopped" / "checkpoints").images == 24
    quick(points_net(), points(), tmp_path / "stopped", **options)
    loss.calls = 3
    quick(points_net(), points(), tmp_path / "whole", **options)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


@pytest.mark.usefixtures("in_the_foreground")
def test_the_first_ctrl_c_says_that_the_step_is_completed(capsys, monkeypatch):
    """A cluster sends it to torchrun and to its processes, and torchrun passes it on: these count as one."""
    now = 50.0
    monkeypatch.setattr("scorematch.training.signals.time.monotonic", lambda: now)
    with Stop(announce=True) as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        message = "\nstopping after this step; another signal more than two seconds later stops without a checkpoint\n"
        assert stop.asked and capsys.readouterr().err == message
        now = 53.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.usefixtures("in_the_foreground")
def test_an_ignored_signal_does_not_stop_a_run():
    """A shell that starts a program in the background of a script makes it ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop(announce=False) as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_handlers_of_signals_that_python_did_not_set_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("a handler is replaced"))
    quick(points_net(), points(), tmp_path, images=8)


def test_a_run_outside_of_the_main_thread(tmp_path):
    in_threads([partial(quick, points_net(), points(), tmp_path)])
    assert checkpoints.latest(tmp_path / "checkpoints").images == 80


@pytest.mark.slow
def test_an_error_while_sampling_pictures_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("the state has NaN")

    monkeypatch.setattr("scorematch.training.run.save_samples", fail)
    with pytest.warns(UserWarning, match="the samples at image 80 are not saved: the state has NaN"):
        quick(image_net(), images(), tmp_path)
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize("name", ["log_every", "sample_every", "snapshot_every", "checkpoint_every", "keep"])
def test_intervals_must_be_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1( or None)?, got 0"):
        train(points_net(), points(), tmp_path, batch_size=8, **{name: 0})


def test_trackers_that_are_one_string_raise(tmp_path):
    with pytest.raises(
        TypeError, match=r"trackers must be a list, each a string, got 'tensorboard'\. Write \['tensorboard'\]"
    ):
        train(points_net(), points(), tmp_path, trackers="tensorboard")


def test_a_tracker_that_is_not_installed_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=r"the tracker tensorboard is not installed: pip install tensorboard\."):
        train(points_net(), points(), tmp_path, trackers=["tensorboard"])


def test_trackers_with_an_accelerator_raise(tmp_path):
    with pytest.raises(ValueError, match="trackers and accelerator cannot both be given"):
        train(points_net(), points(), tmp_path, trackers=["tensorboard"], accelerator=make_accelerator())


def test_the_trained_network_is_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    pushed = []
    monkeypatch.setattr(ScoreNet, "push_to_hub", lambda net, name: pushed.append((name, vector(net))))
    net = quick(points_net(), points(), tmp_path, images=16, push_to_hub="me/points")
    assert pushed[0][0] == "me/points" and torch.equal(pushed[0][1], vector(net))


def test_a_failed_upload_can_be_repeated(tmp_path, monkeypatch):
    def fail(net, name):
        raise OSError("uploading to me/points failed: no connection")

    monkeypatch.setattr("scorematch.training.run.check_login", lambda: None)
    monkeypatch.setattr(ScoreNet, "push_to_hub", fail)
    message = r"complete, and its network is in .*network, but it was not uploaded: uploading .*connection\. Start"
    with pytest.raises(OSError, match=message):
        quick(points_net(), points(), tmp_path, images=16, push_to_hub="me/points")
    pushed = []
    monkeypatch.setattr(ScoreNet, "push_to_hub", lambda net, name: pushed.append(name))
    quick(points_net(), points(), tmp_path, images=16, push_to_hub="me/points")
    assert pushed == ["me/points"]


# -- Samples, report and log of a run ---------------------------------------------------------------------------------


def test_the_report_shows_the_last_samples_of_more_than_a_billion_images(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in (990_000_000, 1_010_000_000):
        (tmp_path / "samples" / f"{checkpoints.name_of(number)}.png").touch()
    config = {"settings": {}, "data": {"images": 1, "shape": [1, 8, 8], "fingerprint": ""}, "versions": {}}
    report.write_report(tmp_path, image_net(), config, 1.0)
    assert "\n![samples](samples/1010000000.png)\n" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_network_of_one_noise_level_saves_samples_and_a_report(tmp_path):
    net = image_net(schedule=NoiseSchedule([0.5]))
    net.sampler_settings = None
    quick(net, images(), tmp_path, images=16)
    assert (tmp_path / "samples" / "000000016.png").stat().st_size > 500
    assert '/network")\n' in (tmp_path / "report.md").read_text()


def test_the_report_of_an_own_network_names_its_class(tmp_path):
    quick(points_net(), points(), tmp_path, images=16)
    assert '/network", backbone=YourClass())\n' in (tmp_path / "report.md").read_text()
    assert "(report/loss.svg)" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_network_has_the_names_of_the_classes_of_its_data(tmp_path):
    start = image_net(classes=3)
    start.class_names = ["one", "two", "three"]
    start.save_pretrained(tmp_path / "start")
    data = Memory(images(), torch.arange(32) % 3)
    for classes, expected in (
        (("0", "1", "2"), ("one", "two", "three")),
        (None, ("one", "two", "three")),
        (("cat", "cow", "dog"), ("cat", "cow", "dog")),
    ):
        data.classes = classes
        out = tmp_path / str(classes)
        net = ScoreNet.from_pretrained(tmp_path / "start")
        assert quick(net, data, out, images=8, start=tmp_path / "start").class_names == expected
        assert ScoreNet.from_pretrained(out / "network").class_names == expected
    # The run continues under other names.
    data.classes = ("Cat", "Cow", "Dog")
    assert quick(image_net(classes=3), data, out, images=8, start=tmp_path / "start").class_names == data.classes


@pytest.mark.slow
def test_the_classes_take_turns_in_the_samples_of_a_run(tmp_path):
    """Whatever the classes of the first images: data are often ordered by class."""
    for label in (0, 2):
        net = image_net(classes=3)
        labels = torch.arange(32) % 3
        labels[:16] = label
        data = Memory(images(), labels)
        data.classes = ("cat", "cow", "dog")
        quick(net, data, tmp_path / str(label), images=8, lr=1e-12, sample_every=8)
        assert "\n- 3 classes: 0 cat, 1 cow, 2 dog\n" in (tmp_path / str(label) / "report.md").read_text()
    zero, two = ((tmp_path / name / "samples" / "000000008.png").read_bytes() for name in ("0", "2"))
    assert zero == two


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task", "labels"])
def test_runs_with_conditions_save_samples_and_a_report(tmp_path, kind):
    net = image_net(condition_channels=1) if kind == "task" else image_net(classes=3, null_class=True)
    data = Memory(images(), None if kind == "task" else torch.arange(32) % 2)
    options = {"condition": Inpainting()} if kind == "task" else {"label_drop": 0.1}
    quick(net, data, tmp_path, images=16, **options)
    assert (tmp_path / "samples" / "000000016.png").stat().st_size > 500 and (tmp_path / "report.md").exists()


def test_pictures_of_samples_show_the_value_range_of_the_network(tmp_path):
    net = image_net(condition_channels=1)
    net.value_range = (-1, 1)
    settings = Settings(condition=lambda x, generator: -x)
    save_samples(net, tmp_path / "a.png", Examples(2 * images(1) - 1, None), settings)
    condition, _, original = read_image(tmp_path / "a.png", 1)[:, 2:-2, 2:].unfold(2, 8, 10)[:, :, :3].unbind(2)
    torch.testing.assert_close(original, images(1)[0], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(condition, 1 - images(1)[0], atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_default_sample_interval_limits_the_share_of_sampling():
    net = image_net()
    assert sample_interval(net, 10**7) == 500_000
    assert sample_interval(net, 1000) == 50 * (16 * 7 // 3)


@pytest.mark.parametrize("count", [1, 3, 10, 232])
def test_losses_are_logged_by_noise_level(count):
    schedule = NoiseSchedule([1.0]) if count == 1 else NoiseSchedule.geometric(1, 0.01, count)
    settings = Settings(images=128, batch_size=32, levels=schedule)
    losses = Losses(ScheduleLevels(schedule), make_accelerator())
    for step in train_steps(points_net(), points(), settings):
        losses.add(step._replace(losses=step.sigma))  # the loss is the noise level
    losses.check(wait=True)
    line = losses.line()
    assert len(line["loss_by_level"]) == min(count, 8)
    for level, mean in line["loss_by_level"].items():
        assert float(level) == pytest.approx(mean, rel=1e-3 if count < 9 else 0.3)
    assert line["loss"] == pytest.approx(np.mean(list(schedule)), rel=0.1)
    assert losses.line()["loss_by_level"] == {}


def test_a_run_from_before_there_were_optimizers_and_fixed_norms_continues_without(tmp_path):
    quick(points_net(), points(), tmp_path, images=8)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"].pop("optimizer") == "adamw" and config["settings"].pop("fixed_norms") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    quick(points_net(), points(), tmp_path, images=8)
    with pytest.raises(ValueError, match="optimizer was 'adamw' and is 'muon'"):
        quick(points_net(), points(), tmp_path, images=8, optimizer="muon")


def test_a_folder_with_another_configuration_raises(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json lacks settings, network, data\. Pass another folder"):
        quick(points_net(), points(), tmp_path)
    (tmp_path / "config.json").write_text('{"settings": [], "network": {}, "data": {}}')
    with pytest.raises(ValueError, match=r"config\.json: settings must be an object, got \[\]\. Pass another folder"):
        quick(points_net(), points(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        quick(points_net(), points(), tmp_path)


def _sign(path, changes):
    """Changes values of state.json of a checkpoint, and gives all files the right hashes."""
    state = {**json.loads((path / "state.json").read_text()), **changes}
    state["files"] = {name: hash_of_bytes((path / name).read_bytes()) for name in state["files"]}
    state.pop("hash")
    (path / "state.json").write_text(json.dumps({**state, "hash": hash_of(state)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "3"}, "step must be an integer of at least 0"),
        ({"loss_sums": [1.0]}, "loss_sums must be a list with exactly 8 entries"),
        ({"images": 8}, "belongs to another checkpoint"),
    ],
)
@pytest.mark.usefixtures("complete")
def test_a_checkpoint_with_wrong_values_is_not_used(changes, message, tmp_path):
    """Although its hashes are right."""
    name, files, _ = content(tmp_path)
    _sign(tmp_path / "checkpoints" / name, changes)
    with pytest.warns(UserWarning, match=f"{name} is damaged .*{message}.* the checkpoint before it is used"):
        quick(points_net(), points(), tmp_path, checkpoint_every=40)
    assert content(tmp_path)[1]["weights.safetensors"] == files["weights.safetensors"]


def test_a_checkpoint_with_the_tensors_of_another_network_raises(tmp_path):
    quick(points_net(), points(), tmp_path)
    path = tmp_path / "checkpoints" / content(tmp_path)[0]
    (path / "weights.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes())
    _sign(path, {})
    with pytest.raises(ValueError, match=f"the tensors of the checkpoint .*{path.name} are not those of this network"):
        quick(points_net(), points(), tmp_path)


def test_lines_of_the_log_with_wrong_values_are_ignored(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write({"images": 8, "loss": 0.5})
    wrong = [b'{"images": "8"}', b'{"images": 8, "loss": "x"}', b'{"images": true}', b"\xff", b"[" * 50_000, b"[1]"]
    log.path.write_bytes(log.path.read_bytes() + b"\n".join(wrong) + b"\n")
    assert log.lines() == [{"images": 8, "loss": 0.5}]


def test_trackers_receive_the_log(tmp_path):
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self):
            super().__init__()
            self.lines = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            self.lines.append((step, values))

    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    quick(points_net(), points(), tmp_path, log_every=40, accelerator=accelerator)
    assert [step for step, _ in tracker.lines] == [40, 80] and tracker.lines[0][1]["loss"] > 0


# -- Runs in separate processes ---------------------------------------------------------------------------------------

KILLED = textwrap.dedent(
    """
    import os, signal, threading
    import torch
    torch.set_num_threads(1)
    from scorematch import ScoreNet
    from scorematch.training import checkpoint, train

    # The number of files until the process kills itself in the middle of a file, or so many seconds later; 0 for never.
    write, (out, remaining, seconds) = checkpoint.write_file, {arguments}

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(path, content):
        global remaining
        remaining -= 1
        if remaining == 0 and seconds:
            threading.Timer(seconds, kill).start()
        elif remaining == 0:
            write(path, content[: len(content) // 2])
            kill()
        write(path, content)

    checkpoint.write_file = counted
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False], dropout=0.2)
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    options = dict(images=1600, batch_size=8, checkpoint_every=16, log_every=40, sample_every=400, snapshot_every=400)
    train(net, x, out, progress=False, **options)
    """
)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(forks, tmp_path):
    def run(out, files=0, seconds=0.0):
        status, _, error = forks.run(KILLED.format(arguments=(out, files, seconds)), tmp_path)
        assert status == (-signal.SIGKILL if files else 0), error

    run("whole")
    chance = random.Random(0)  # noqa: S311
    for _ in range(4):  # in the middle of a file of a checkpoint
        run("killed", chance.randint(1, 30))
        assert any((tmp_path / "killed").glob("checkpoints/.saving-*"))
    for _ in range(4):  # at any moment
        run("killed", chance.randint(1, 20), 1e-3 + chance.random() * 0.05)
    run("killed")
    assert content(tmp_path / "whole") == content(tmp_path / "killed")
    for path in (tmp_path / "whole" / "snapshots").rglob("model.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()
    for path in (tmp_path / "whole" / "samples").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / "samples" / path.name).read_bytes()
    assert not list((tmp_path / "killed").rglob(".*"))


TWO = textwrap.dedent(
    """
    import os, signal
    import torch
    torch.set_num_threads(1)
    from scorematch import ScoreNet
    from scorematch.training import train

    class Images:
        shape, fingerprint = (1, 8, 8), "images"
        x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def __len__(self):
            return 64

        def read(self, indices):
            return self.x[indices], None

    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1).double()
    options = dict(images=320, batch_size=8, checkpoint_every=160, log_every=40, sample_every=160, snapshot_every=160)

    def evaluate(net, images):
        if {stop} and images == 160 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)  # one process alone is asked to stop
        return dict(seen=images)

    train(net, Images(), {out!r}, progress=False, evaluate=evaluate, **options)
    """
)


@pytest.mark.slow
def test_two_processes_train_the_same_network_as_one(forks, tmp_path):
    def run(size, out, stop=False):
        done = forks.group(size, TWO.format(out=out, stop=stop), tmp_path, check=False)
        assert all((status == 0) != stop for status, *_ in done), done

    run(1, "one")
    run(2, "two")
    run(2, "both", stop=True)
    assert 160 < checkpoints.latest(tmp_path / "both" / "checkpoints").images < 320
    run(1, "both")  # started by two processes, finished by one
    one = checkpoints.latest(tmp_path / "one" / "checkpoints")
    for name in ("two", "both"):
        other = checkpoints.latest(tmp_path / name / "checkpoints")
        assert other.images == 320
        for part in ("weights", "ema-0.050", "optimizer"):
            for key, tensor in one.parts[part].items():
                torch.testing.assert_close(other.parts[part][key], tensor, atol=1e-9, rtol=1e-7)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in log if "loss" in json.loads(line)] for log in logs]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=1e-6)
