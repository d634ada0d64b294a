"""Stages of a run, between which the network grows."""

import contextlib
import json
import random
import signal
import textwrap
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.cli import main
from scorematch.core.randomness import seed_of
from scorematch.data import open_images
from scorematch.training import LogNormal, Stage, checkpoint, reconstruct, record, run, speed, train, train_steps
from scorematch.training.growth import enlarged
from scorematch.training.log import Log
from scorematch.training.settings import TrainSettings
from scorematch.training.steps import prepare
from tests.helpers import seed
from tests.training import Interrupted, image_net, images, interrupt_at, same_runs, vector

pytestmark = pytest.mark.usefixtures("no_plots")

SMALL = {"widths": (4,), "layers_per_block": 1, "attention": [False], "patch": 2, "pixel_channels": 4}
GROWTH = (
    Stage(0.5, {"pixel_channels": 8, "attention": (True,)}, {"lr": 7e-4, "levels": LogNormal(-2.0, 1.2)}),
    Stage(
        0.5, {"layers_per_block": 2, "pixel_layers": 2}, {"batch_size": 16, "optimizer": "muon", "fixed_norms": True}
    ),
)
RUN = {"images": 95, "batch_size": 8, "growth": GROWTH, "ema": (0.05,), "log_every": 24, "progress": False}
RUN |= {"snapshot_every": 10**6}  # at the end of each stage only; the batches have 96 images


def net():
    return image_net(**SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three stages, of 24, 24 and 48 images, without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    _train(out, interrupt_at(None))
    return out


# -- The larger network


def test_growing_leaves_the_generators_of_all_devices_alone(monkeypatch):
    small, before, seeded = net(), torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    enlarged(small, GROWTH[0].network, seed=1)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_a_network_in_float64_computes_the_same_function_after_a_growth():
    x, small = torch.rand(3, 1, 8, 8, generator=seed(1), dtype=torch.float64), net().double()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=seed(2), dtype=torch.float64)
    large = enlarged(small, GROWTH[0].network, 3)
    torch.testing.assert_close(large(x, 0.3), small(x, 0.3), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_a_network_computes_the_same_function_after_each_growth():
    x, sigma = torch.rand(3, 1, 8, 8, generator=seed(1)), torch.tensor([0.02, 0.3, 5.0])
    small = net()
    for stage in GROWTH:
        large = enlarged(small, stage.network, 3)
        assert len(vector(large)) > len(vector(small))
        torch.testing.assert_close(large(x, sigma), small(x, sigma), rtol=1e-4, atol=1e-5)
        assert large.sampler_settings == small.sampler_settings and large.sample_shape == small.sample_shape
        small = large
    assert torch.equal(vector(enlarged(net(), stage.network, 3)), vector(enlarged(net(), stage.network, 3)))
    assert not torch.equal(vector(enlarged(net(), stage.network, 3)), vector(enlarged(net(), stage.network, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_channels": 2}, "cannot grow with .*pixel_channels from 4 to 2"),
        ({"pixel_channels": 4}, "it is the same network"),
        ({"widths": (8, 16)}, "widths cannot become larger within a run: a U-Net can grow in attention, layers"),
        ({"attention": (True, True)}, "attention must have one entry per scale, 1"),
        ({"layers_per_block": "two"}, "layers_per_block must be an integer"),
    ],
)
def test_a_network_that_cannot_grow_so_raises_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(net(), images(), tmp_path / "run", **{**RUN, "growth": [Stage(0.5, changes)]})
    assert not (tmp_path / "run").exists()


def test_only_unets_grow():
    own = ScoreNet(torch.nn.Conv2d(1, 1, 1), NoiseSchedule([1.0]), sample_shape=(1, 8, 8))
    encoder = ScoreNet.unet(1, 8, widths=(4,), condition_features=2, condition_encoder=torch.nn.Linear(3, 2))
    for other in (own, ScoreNet.ncsnv2(1, 8, width=4), encoder):
        with pytest.raises(ValueError, match="cannot grow"):
            enlarged(other, {"layers_per_block": 2})


# -- The stages of a run


@pytest.mark.slow
def test_a_run_is_the_chain_of_its_stages(whole):
    """Each stage trains what the average of the stage before has become, with a new optimizer and new averages."""
    trained, first, accelerator = net(), 0, Accelerator(cpu=True)
    for number, settings in enumerate(TrainSettings(**RUN).stages()):
        if number:
            trained = enlarged(trained, GROWTH[number - 1].network, seed_of(0, "growth", number - 1))
        state = prepare(trained, settings, accelerator)
        state.images = state.first = first
        *_, last = train_steps(trained, open_images(images()), settings, state=state, accelerator=accelerator)
        first, trained = last.images, state.average(0.05)
    found = checkpoint.latest(whole / "checkpoints")
    assert found.images == first == 96
    for part, tensors in state.tensors().items():
        assert all(torch.equal(tensor, found.parts[part][name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_the_files_of_a_run_name_its_stages(whole, capsys):
    lines = [line for line in Log(whole / "log.jsonl").lines() if "loss" in line]
    assert [(line["images"], line["stage"]) for line in lines] == [(24, 1), (48, 2), (80, 3), (96, 3)]
    assert list(lines[0]["loss_by_level"]) != list(lines[1]["loss_by_level"])  # the second stage has other levels
    settings = json.loads((whole / "config.json").read_text())["settings"]
    assert [stage["begins"] for stage in settings["growth"]] == [24, 48]
    assert settings["growth"][0]["network"] == {"pixel_channels": 8, "attention": [True]}
    assert settings["growth"][0]["training"] == {"lr": 7e-4, "levels": "LogNormal(mean=-2.0, std=1.2)"}
    assert '\n- Growth at image 48: {"layers_per_block": 2, "pixel_layers": 2}\n' in (whole / "report.md").read_text()
    assert main(["info", str(whole)]) == 0
    assert "\nstage        3 of 3, at image 96 of 96\n" in capsys.readouterr().out
    # The snapshots are those of the last stage, from which averages of other lengths are computed.
    assert sorted(path.name for path in whole.glob("snapshots/*-0.050")) == ["000000048-0.050"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one snapshot is few
        assert reconstruct(whole, 0.05).config == ScoreNet.from_pretrained(whole / "network").config


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_every_stage_and_while_it_grows_ends_with_the_same_bits(
    whole, tmp_path, monkeypatch
):
    for stop, image in [(GROWTH[0], 24), (40, 32), (GROWTH[1], 48), (None, 96)]:
        with monkeypatch.context() as patch, contextlib.suppress(Interrupted):
            patch.setattr(run, "enlarged", interrupted_by(stop))
            _train(tmp_path, interrupt_at(stop))
        assert checkpoint.latest(tmp_path / "checkpoints").images == image
    assert same_runs(whole, tmp_path)


def interrupted_by(stage):
    """The function ``enlarged``, which stops the run at a stage."""

    def interrupted(net, changes, *seeds):
        if stage in GROWTH and changes == stage.network:
            raise Interrupted
        return enlarged(net, changes, *seeds)

    return interrupted


def _train(out, evaluate):
    return train(net(), images(), out, checkpoint_every=32, sample_every=40, evaluate=evaluate, **RUN)


def test_other_stages_than_those_of_the_run_raise(whole):
    with pytest.raises(ValueError, match=r"contains a run with other settings: growth was \["):
        train(net(), images(), whole, **{**RUN, "growth": GROWTH[:1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"images": 24, "growth": GROWTH},
            "stage 1 of 3 would have 6 images, less than a batch of 8. Write images with",
        ),
        ({"growth": [Stage(0.5, {"pixel_layers": 2}, {"seed": 1})]}, "cannot change seed, which are those of the"),
        ({"hours": 1000}, "hours must be a number of more than 0 and at most 500 or None, got 1000"),
        ({"hours": 0}, "hours must be a number of more than 0"),
    ],
)
def test_stages_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"images": 128, "batch_size": 8, **options})


def test_a_shorter_run_has_the_first_stages_of_a_longer_one():
    growth = (Stage(0.3, GROWTH[0].network), Stage(0.5, GROWTH[1].network, fewest=2000))
    short, whole = (TrainSettings(images=images, batch_size=10, growth=growth).stages() for images in (1000, 2000))
    assert [stage.images for stage in short] == [700, 300]
    assert [stage.images for stage in whole] == [700, 300, 1000] and whole[:2] == short


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_of_a_stage_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="share must be above 0 and below 1"):
        Stage(share, {"pixel_layers": 2})


# -- Hours


def test_hours_give_as_many_images_as_fit_and_short_runs_have_fewer_stages(tmp_path, monkeypatch):
    """With 0.1, 0.2 and 0.4 s per image, the mean is 0.275 s with three stages and 0.15 s with two."""
    growth = [replace(stage, fewest=fewest) for stage, fewest in zip(GROWTH, (8000, 20_000), strict=True)]
    monkeypatch.setattr(speed, "seconds_per_image", lambda *_: [0.1, 0.2, 0.4])
    accelerator = SimpleNamespace(num_processes=1)

    def fitted(hours):
        settings = TrainSettings(hours=hours, growth=growth, batch_size=8)
        return speed.with_images(tmp_path, net(), images(), settings, accelerator)

    for hours, number, stages in [(2, 26_181, 3), (1, 23_999, 2), (0.25, 9000, 1)]:
        settings = fitted(hours)
        assert (settings.images, len(settings.stages()), settings.hours) == (number, stages, None)
        seconds = zip((0.1, 0.2, 0.4), settings.stages(), strict=False)
        assert sum(each * stage.images for each, stage in seconds) == pytest.approx(3600 * hours, rel=1e-3)
    with pytest.raises(ValueError, match=r"hours=0.01 is enough for 45 steps of 8 images here, and a run needs at"):
        fitted(0.01)


def test_all_processes_get_the_length_of_a_run_from_the_first(tmp_path, monkeypatch):
    """A process that is behind may find the record of the run that the first has just begun."""
    monkeypatch.setattr(speed, "length_of", lambda folder: (64, 0))
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda found: found.__setitem__(0, (800, 0)))
    settings = TrainSettings(hours=1, batch_size=8)
    assert speed.with_images(tmp_path, net(), images(), settings, SimpleNamespace(num_processes=2)).images == 800


@pytest.mark.slow
def test_the_speed_is_measured_in_each_stage():
    before, small = torch.get_rng_state(), image_net(**SMALL, dropout=0.5)
    seconds = speed.seconds_per_image(small, open_images(images()), TrainSettings(**RUN), Accelerator(cpu=True))
    assert len(seconds) == 3 and min(seconds) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_the_time_of_the_optimizer_counts_once_for_a_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: now.__setitem__(0, now[0] + 4))
    settings = TrainSettings(images=64, batch_size=8)
    for processes in (1, 2):
        accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes)
        assert speed.seconds_per_image(net(), open_images(images()), settings, accelerator) == [processes * 4 / 8]


@pytest.mark.parametrize(("fixed", "expected"), [(0.1, (0.1 + 8 * 0.01) / 8), (1, 1 + 0.01)])
def test_a_fast_network_is_timed_with_the_whole_batch_and_a_slow_one_with_few_images(monkeypatch, fixed, expected):
    """With few images the fixed cost of a step counted for each: runs of given hours had far fewer images than fit."""
    now = [0.0]

    def loss(net, x, **options):
        now[0] += fixed + 0.01 * len(x)
        return dsm_loss(net, x, **options)

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(speed, "dsm_loss", loss)
    monkeypatch.setattr(speed, "_TIMED_VALUES", 1)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    settings = TrainSettings(images=64, batch_size=8)
    assert speed.seconds_per_image(net(), open_images(images()), settings, accelerator) == [pytest.approx(expected)]


@pytest.mark.slow
def test_a_run_of_hours_continues_with_its_images_and_its_stages(tmp_path, monkeypatch):
    growth = [Stage(0.25, GROWTH[0].network), Stage(0.25, GROWTH[1].network, fewest=9000)]
    options = {"hours": 1, "batch_size": 8, "growth": growth, "log_every": 10**6, "progress": False}
    monkeypatch.setattr(speed, "seconds_per_image", lambda *_: [0.5, 0.5, 0.5])
    seen = []

    def begin(self, *_):
        seen.append(self.whole)
        raise Interrupted

    monkeypatch.setattr(run._Run, "begin", begin)
    with pytest.raises(Interrupted):
        train(net(), images(), tmp_path, **options)
    monkeypatch.setattr(speed, "seconds_per_image", lambda *_: pytest.fail("it is not measured again"))
    record.write_config(tmp_path, net(), open_images(images()), seen[0], Accelerator(cpu=True))
    with pytest.raises(Interrupted):
        train(net(), images(), tmp_path, **options)
    assert seen[0] == seen[1]
    assert (seen[1].images, [stage.images for stage in seen[1].stages()]) == (7200, [5400, 1800])


# -- Killed


KILLED = textwrap.dedent(
    """
    import os, signal, threading, sys
    import torch
    torch.set_num_threads(1)
    from scorematch.training import run, train
    from tests.test_growth import RUN, images, net

    prepare = run.prepare
    left = {stage}

    def killing(*arguments):
        global left
        left -= 1
        if left == 0:
            threading.Timer({seconds}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return prepare(*arguments)

    run.prepare = killing
    train(net(), images(), {out!r}, **{{**RUN, "images": 512}}, checkpoint_every=64, sample_every=256)
    """
)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_bits(forks, tmp_path):
    chance = random.Random(0)  # noqa: S311

    def killed(out, stage):
        code = KILLED.format(out=out, stage=stage, seconds=chance.random() * 0.05)
        status, _, error = forks.run(code, tmp_path)
        assert status == (-signal.SIGKILL if stage else 0), error

    killed("whole", 0)
    for stage in (1, 2, 2):  # in the first stage, and twice shortly after the network has grown
        killed("killed", stage)
    killed("killed", 0)
    assert same_runs(tmp_path / "whole", tmp_path / "killed")
