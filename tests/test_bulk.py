"""Many samples: image i is a function of the seed and of i, in memory, in files, and after any interruption."""

import copy
import enum
import errno
import functools
import itertools
import json
import linecache
import os
import random
import signal
import sys
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet, sampling
from scorematch.core import files
from scorematch.core import provenance as hashing
from scorematch.core.conditions import Condition
from scorematch.core.processes import this_process
from scorematch.core.scores import NetworkScore
from scorematch.data import read_image, read_samples, stored_samples, stored_settings
from scorematch.evaluation.exact import Empirical, Gaussian, GaussianMixture
from scorematch.sampling import SAMPLERS, AnnealedLangevinSampler, ODESampler, SamplerSettings, bulk_samples, sample_to
from scorematch.sampling.bulk import Job
from scorematch.sampling.folder import SampleFolder
from tests.helpers import python, seed

SCHEDULE = NoiseSchedule([1.0, 0.1, 0.01])


class Levels:
    """The exact score of images of one gray level: 0.5, or one for each of four classes. It records its batches."""

    schedule, sample_shape, value_range = SCHEDULE, (1, 3, 4), (0, 1)

    def __init__(self, classes=None):
        self.conditioning = Condition(classes=classes)
        self._batches = []

    def __call__(self, x, sigma, condition=None):
        self._batches.append(len(x))
        level = 0.5 if condition is None else (condition.view(-1, 1, 1, 1) + 1) / 5
        return (level - x) / (1e-3 + sigma**2)

    def drawn(self):
        """The sizes of the batches since the last call. ODESampler makes five calls for each."""
        batches, self._batches = self._batches[::5], []
        return batches


@pytest.fixture
def levels():
    return Levels()


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=SCHEDULE)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.2)
    return made


def _ode(net, **options):
    """Five network calls for a batch."""
    return ODESampler(net, SCHEDULE, **options)


def _all(sampler, n, **options):
    """All images of a job."""
    return torch.cat([batch.images for batch in bulk_samples(sampler, n, **options)])


def _fill(net, folder, n, **options):
    return sample_to(_ode(net), folder, n, **{"batch_size": 4, "progress": False, **options})


def _content(folder):
    """The files of a folder; of .npz files the arrays, since they may be compressed otherwise."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[path.name] = {name: arrays[name].tobytes() for name in arrays}
        elif path.suffix in (".png", ".csv"):
            found[path.name] = path.read_bytes()
    return found


# -- Image i is a function of the seed and of i


def test_indices_cover_all_images_in_batches_that_begin_at_multiples(levels):
    sampler = _ode(levels)

    def indices(*arguments, **options):
        return [batch.indices for batch in bulk_samples(sampler, *arguments, batch_size=4, **options)]

    assert indices(10) == [range(0, 4), range(4, 8), range(8, 10)]
    assert indices(5, first=6) == [range(6, 8), range(8, 11)]
    assert indices(17, process=(1, 3)) == [range(4, 8), range(16, 17)]
    assert indices(3, process=(2, 3)) == []
    assert levels.drawn() == [4, 4, 2, 2, 3, 4, 1]  # each batch goes through the network at once


@pytest.mark.slow
def test_images_are_the_same_in_all_batches_within_rounding(net):
    sampler = _ode(net, precision="float32")
    one = _all(sampler, 6, batch_size=1)
    assert one.std() > 0.1 and len(torch.unique(one)) > 100  # they are not just black and white
    for options in ({"batch_size": 4}, {"batch_size": 6}, {"batch_size": 64}):
        torch.testing.assert_close(_all(sampler, 6, **options), one, atol=1e-5, rtol=0)
    torch.testing.assert_close(_all(sampler, 4, first=2, batch_size=3), one[2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [ODESampler, pytest.param(AnnealedLangevinSampler, marks=pytest.mark.slow)])
def test_any_number_of_processes_draws_the_same_bits(net, kind):
    sampler = kind(net.inference_copy(), SCHEDULE)
    whole = _all(sampler, 7, batch_size=2)
    for processes in (2, 3):
        parts = torch.full_like(whole, torch.nan)
        for k in range(processes):
            for indices, images, _ in bulk_samples(sampler, 7, batch_size=2, process=(k, processes)):
                parts[list(indices)] = images
        assert torch.equal(parts, whole)
    assert torch.equal(_all(sampler, 4, batch_size=2), whole[:4])  # and the number of images does not matter
    assert torch.equal(_all(sampler, 3, batch_size=2, first=4), whole[4:])


def test_the_seed_determines_the_samples(levels):
    sampler = AnnealedLangevinSampler(levels, SCHEDULE)
    state = torch.get_rng_state()
    a, b, c = (_all(sampler, 5, seed=number) for number in (7, 7, 8))
    assert torch.equal(a, b) and not (a == c).all(dim=(1, 2, 3)).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_of_many_images_differ():
    """torch's generators on the CPU use 32 bits of a seed. Of 60,000 random ones, two would agree in one case of 3."""
    assert torch.equal(torch.rand(4, generator=seed(5)), torch.rand(4, generator=seed(5 + 2**32)))
    used = {0: set(), 1: set()}

    class Recording(ODESampler):
        def sample(self, n, *, generator, **options):
            used[number].update(each % 2**32 for each in generator)
            return torch.zeros(n, 1, 1, 1)

    for number in used:
        assert sum(len(images) for _, images, _ in bulk_samples(Recording(Levels()), 60_000, seed=number)) == 60_000
        assert len(used[number]) == 60_000
    assert not used[0] & used[1]


def test_a_job_of_any_size_begins_at_once(levels):
    assert next(bulk_samples(_ode(levels), 2**32, batch_size=2)).indices == range(2)


@pytest.mark.slow
def test_an_inference_copy_is_made_once(net, monkeypatch):
    made = []
    copy = ScoreNet.inference_copy
    monkeypatch.setattr(ScoreNet, "inference_copy", lambda self, **options: made.append(1) or copy(self, **options))
    sampler = _ode(net)
    images = _all(sampler, 4, batch_size=1)
    assert made == [1] and sampler.net is net
    assert torch.equal(images, _all(_ode(net.inference_copy()), 4, batch_size=1))


def test_samples_of_any_shape(tmp_path):
    sampler = ODESampler(lambda x, sigma: -x / (1 + sigma**2), SCHEDULE)
    assert _all(sampler, 3, shape=(2,)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"the shape of a sample is not known: pass shape="):
        bulk_samples(sampler, 3)
    for shape, error in ((5, TypeError), ("12", TypeError), ((2.7,), TypeError), ((-1,), ValueError)):
        with pytest.raises(error, match="shape must be the shape of one sample, such as"):
            bulk_samples(sampler, 3, shape=shape)
    for n in (3, 5):  # single numbers
        sample_to(sampler, tmp_path, n, shape=(), format="float", batch_size=2, progress=False)
    assert torch.equal(read_samples(tmp_path, 5), _all(sampler, 5, shape=(), batch_size=2))


@pytest.mark.cuda
def test_images_on_cuda_are_those_on_the_cpu(net, tmp_path):
    other = copy.deepcopy(net).to("cuda")
    for batch in bulk_samples(_ode(other, precision="float32"), 5, batch_size=4):
        assert batch.images.device.type == "cuda"
    host, device = (_all(_ode(one, precision="float32"), 5, batch_size=4).cpu() for one in (net, other))
    torch.testing.assert_close(device, host, atol=1e-3, rtol=0)
    sample_to(_ode(net), tmp_path, 3, progress=False)
    with pytest.warns(UserWarning, match="changes rounding: device was cpu and is NVIDIA"):
        sample_to(_ode(other), tmp_path, 5, progress=False)


# -- Classes


def _classes(rule, indices, seed=0):
    return Job(_ode(Levels(4)), classes=rule, seed=seed).classes_of(indices)


def test_classes_by_number():
    assert _classes(2, range(3)).tolist() == [2, 2, 2]
    assert _classes("cycle", range(3, 9)).tolist() == [3, 0, 1, 2, 3, 0]
    drawn = _classes("random", range(4000))
    assert drawn[:12].tolist() == [1, 0, 1, 2, 0, 1, 1, 0, 3, 0, 0, 2]  # in every version of the package
    assert torch.equal(drawn[1000:1003], _classes("random", range(1000, 1003)))
    assert not torch.equal(drawn, _classes("random", range(4000), seed=1))
    counts = torch.bincount(drawn, minlength=4)
    # Each count is binomial with a standard error of (4000 * 1/4 * 3/4)^(1/2) = 27.
    assert counts.sum() == 4000 and ((counts - 1000).abs() < 4 * 27).all()
    pairs = torch.bincount(4 * drawn[:-1] + drawn[1:], minlength=16)  # neighbors: 250 each, standard error 15
    assert ((pairs - 250).abs() < 5 * 15).all()


def test_the_seeds_of_images_are_fixed():
    """The same seed gives the same images in every version."""
    assert [Job(_ode(Levels()), seed=seed).seeds_of(range(2)) for seed in (0, 3)] == [
        [61164648, 61164649],
        [3537887363, 3537887364],
    ]


@pytest.mark.parametrize("rule", [3, "cycle", "random"])
def test_the_network_gets_the_class_of_each_image(rule):
    sampler = _ode(Levels(classes=4))
    whole = torch.cat([batch.classes for batch in bulk_samples(sampler, 9, classes=rule)])
    assert torch.equal(whole, _classes(rule, range(9)))
    for batch in bulk_samples(sampler, 9, batch_size=2, classes=rule, process=(1, 2)):
        assert batch.classes.tolist() == whole[list(batch.indices)].tolist()
        assert torch.equal((5 * batch.images.mean(dim=(1, 2, 3)) - 1).round().long(), batch.classes)


def test_the_last_class_may_mean_that_there_is_none():
    batch = next(bulk_samples(_ode(Levels(classes=4)), 50, classes="random", n_classes=3))
    assert set(batch.classes.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("classes", "options", "error", "message"),
    [
        (None, {"classes": "random"}, ValueError, 'classes="random" needs the number of classes: pass n_classes'),
        (None, {"classes": 1}, TypeError, "takes no condition"),
        (4, {}, ValueError, "pass condition="),
        (4, {"classes": 4}, ValueError, "from 0 to 3"),
        (4, {"classes": "cycle", "n_classes": 5}, ValueError, "from 0 to 3"),
        (4, {"classes": "cycle", "n_classes": 0}, ValueError, "n_classes must be an integer of at least 1, got 0"),
        (4, {"classes": 1, "n_classes": 3}, ValueError, 'n_classes is for classes="random" and classes="cycle"'),
        (4, {"classes": "all"}, TypeError, 'classes must be a class, "random", "cycle" or None, got \'all\''),
        (4, {"classes": True}, TypeError, "got True"),
        (None, {"condition": torch.tensor(1.0)}, TypeError, r"condition must be a tensor \(m, ...\) or a dict of such"),
        (None, {"condition": {"features": 1.0}}, TypeError, r"condition must be a tensor \(m, ...\) or a dict of such"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, classes, options, error, message):
    for call in (bulk_samples, functools.partial(sample_to, folder=tmp_path / "out")):
        with pytest.raises(error, match=message):
            call(_ode(Levels(classes)), n=3, **options)
    assert not (tmp_path / "out").exists()


def test_too_few_conditions_are_refused_before_anything_is_written(tmp_path):
    sampler = ODESampler(lambda x, sigma, condition: condition - x, SCHEDULE)
    options = {"n": 3, "condition": torch.zeros(2, 1), "shape": (1,)}
    for call in (bulk_samples, functools.partial(sample_to, folder=tmp_path / "out", format="float")):
        with pytest.raises(ValueError, match="condition must have one row for all samples, or one for each of 3, got"):
            call(sampler, **options, batch_size=1)
    assert not (tmp_path / "out").exists()


# -- Files


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pictures(tmp_path, channels):
    levels = Levels()
    levels.sample_shape = (channels, 3, 4)
    folder = _fill(levels, tmp_path / "out", 6, about={"command": "sample"})
    assert folder == tmp_path / "out" / "images"
    assert sorted(path.name for path in folder.iterdir()) == [f"00000{i}.png" for i in range(6)]
    images = _all(_ode(levels), 6, batch_size=4)
    for i, image in enumerate(images):
        assert torch.equal(read_image(folder / f"00000{i}.png", channels), (image * 255).round() / 255)
    assert torch.equal(read_samples(tmp_path / "out", 5), (images[:5] * 255).round() / 255)
    content = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert content["n"] == 6 and content["about"] == {"command": "sample"}
    assert content["settings"]["sampler"]["schedule"] == [1.0, 0.1, 0.01]
    assert content["settings"]["sampler"]["method"] == "heun"
    assert content["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "samples.json"]


@pytest.mark.parametrize(("classes", "rule"), [(None, None), (4, "random")])
def test_arrays_hold_what_pictures_show(tmp_path, classes, rule):
    for name in ("png", "npz"):
        _fill(Levels(classes), tmp_path / name, 10, classes=rule, format=name)
    paths = sorted((tmp_path / "npz" / "images").iterdir())
    assert [path.name for path in paths] == ["000000.npz", "000004.npz", "000008.npz"]
    arrays = [np.load(path) for path in paths]
    pixels = np.concatenate([one["arr_0"] for one in arrays])
    assert pixels.shape == (10, 3, 4, 1) and pixels.dtype == np.uint8
    for i in range(10):
        with Image.open(tmp_path / "png" / "images" / f"00000{i}.png") as picture:
            assert np.array_equal(np.array(picture), pixels[i, :, :, 0])
    assert torch.equal(read_samples(tmp_path / "npz", 7), read_samples(tmp_path / "png", 7))
    if rule is None:
        assert all(one.files == ["arr_0"] for one in arrays)
        assert not (tmp_path / "png" / "labels.csv").exists()
    else:
        labels = np.concatenate([one["arr_1"] for one in arrays]).tolist()
        assert labels == _classes("random", range(10)).tolist()
        lines = (tmp_path / "png" / "labels.csv").read_text().splitlines()
        assert lines == ["file,class", *(f"00000{i}.png,{label}" for i, label in enumerate(labels))]


def test_arrays_need_no_pillow(tmp_path, levels, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    _fill(levels, tmp_path / "arrays", 3, format="npz")
    with pytest.raises(ImportError, match=r'Pillow: pip install "scorematch\[images\]"'):
        _fill(levels, tmp_path / "pictures", 3)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("name", ["png", "npz"])
def test_only_missing_batches_are_drawn(tmp_path, levels, name):
    out = tmp_path / "out"
    folder = _fill(levels, out, 10, format=name)
    assert levels.drawn() == [4, 4, 2]
    before = _content(out)
    _fill(levels, out, 10, format=name)
    assert levels.drawn() == []
    paths = sorted(folder.iterdir())
    paths[-1].unlink()  # of the last batch
    assert SampleFolder(Job(_ode(levels), batch_size=4), out, 10, format=name).missing == 2
    _fill(levels, out, 10, format=name)
    assert levels.drawn() == [2] and _content(out) == before
    paths[0].write_bytes(b"")  # as after a power failure
    _fill(levels, out, 10, format=name)
    assert levels.drawn() == [4] and _content(out) == before


def test_damaged_arrays_are_drawn_again(tmp_path, levels):
    folder = _fill(levels, tmp_path / "out", 10, format="npz")
    before = _content(tmp_path / "out")
    path = folder / "000004.npz"
    path.write_bytes(path.read_bytes()[:100])
    _fill(levels, tmp_path / "out", 10, format="npz")
    assert _content(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(ODESampler, "png"), (AnnealedLangevinSampler, "npz")])
def test_more_images_are_added_with_the_same_bits(tmp_path, net, name, kind):
    options = {"batch_size": 4, "format": name, "progress": False}
    sampler = kind(net.inference_copy(), SCHEDULE)
    for n in (2, 6, 9):
        sample_to(sampler, tmp_path / "grown", n, **options)
    sample_to(sampler, tmp_path / "whole", 9, **options)
    assert _content(tmp_path / "grown") == _content(tmp_path / "whole")
    assert json.loads((tmp_path / "grown" / "samples.json").read_text())["n"] == 9
    with pytest.raises(ValueError, match=r"has 9 samples, more than n=6. Pass n=9 or more, or another folder"):
        sample_to(sampler, tmp_path / "grown", 6, **options)


def test_labels_are_added_when_a_folder_grows(tmp_path):
    for n in (3, 6):
        _fill(Levels(4), tmp_path, n, classes="cycle")
    assert (tmp_path / "labels.csv").read_text().splitlines()[-1] == "000005.png,1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"format": "npz"}, "format was 'png' and is 'npz'"),
        ({"classes": "random"}, "classes was 'cycle' and is 'random'"),
        ({"classes": 1}, "classes was 'cycle' and is 1; n_classes was 4 and is None"),
        ({"n_classes": 3}, "n_classes was 4 and is 3"),
        ({"shape": (1, 4, 4)}, r"shape was \[1, 3, 4\] and is \[1, 4, 4\]"),
    ],
)
def test_other_settings_are_refused(tmp_path, options, message):
    levels = Levels(4)
    _fill(levels, tmp_path, 2, classes="cycle")
    before = _content(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has samples with other settings: {message}. Pass those"):
        _fill(levels, tmp_path, 2, **{"classes": "cycle", **options})
    assert _content(tmp_path) == before


def test_another_sampler_network_or_version_is_refused(tmp_path, net, monkeypatch):
    options = {"batch_size": 4, "progress": False}
    sample_to(_ode(net), tmp_path, 2, **options)
    for sampler, message in [
        (_ode(net, method="dpm-solver++"), "sampler.method was 'heun' and is 'dpm-solver\\+\\+'"),
        (ODESampler(net, levels=4), r"sampler.schedule was \[1.0, .*\] and is"),
        (_ode(net, denoise=False), "sampler.denoise was True and is False"),
        (AnnealedLangevinSampler(net, SCHEDULE), "sampler.name was 'ODESampler' and is 'AnnealedLangevinSampler'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_to(sampler, tmp_path, 2, **options)
    sample_to(_ode(net), tmp_path, 2, **options)
    with torch.no_grad():
        parameter = next(net.parameters())
        parameter += 1
    with pytest.raises(ValueError, match=r"network was 'ScoreNet .*' and is 'ScoreNet "):
        sample_to(_ode(net), tmp_path, 2, **options)
    with torch.no_grad():
        parameter -= 1
    monkeypatch.setattr("scorematch.sampling.bulk.__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"scorematch was .* and is '0.0.1'"):
        sample_to(_ode(net), tmp_path, 2, **options)


def test_another_version_of_torch_is_a_warning(tmp_path, levels):
    _fill(levels, tmp_path, 2)
    path = tmp_path / "samples.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "2.0"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"changes rounding: torch was '2.0' and is '\d") as caught:
        _fill(levels, tmp_path, 2)
    assert len(caught) == 1
    assert "sample_to(" in linecache.getline(caught[0].filename, caught[0].lineno)  # the line of the caller


def test_before_the_first_image_settings_may_change(tmp_path, levels):
    class Broken(Levels):
        def __call__(self, x, sigma, condition=None):
            return x * torch.nan

    with pytest.raises(RuntimeError, match="NaN"):
        _fill(Broken(), tmp_path, 2)
    assert (tmp_path / "samples.json").exists()
    _fill(levels, tmp_path, 2, seed=1)
    assert read_samples(tmp_path, 2).shape == (2, 1, 3, 4)


def test_other_files_are_never_touched(tmp_path, levels):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has other files, such as notes.txt. Pass a new or an empty folder"):
        _fill(levels, tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file. Pass a folder"):
        _fill(levels, tmp_path / "notes.txt", 2)


def test_metadata_that_is_damaged(tmp_path, levels):
    _fill(levels, tmp_path, 2)
    path = tmp_path / "samples.json"
    content = json.loads(path.read_text())
    for damaged, message in [
        ("{", "samples.json is not valid JSON"),
        ("[]", "samples.json must hold a JSON object, got"),
        (json.dumps({**content, "n": 0}), "samples.json: n must be an integer of at least 1 and at most .*, got 0"),
        (json.dumps({**content, "format_version": 2}), "samples.json: format_version must be one of 1, got 2"),
        (json.dumps({**content, "settings": {}}), "samples.json: settings lacks batch_size, format, shape"),
    ]:
        path.write_text(damaged)
        for call in (lambda: _fill(levels, tmp_path, 2), lambda: read_samples(tmp_path, 1)):
            with pytest.raises(ValueError, match=message):
                call()
    path.write_text(json.dumps({**content, "settings": {**content["settings"], "sampler": "ode"}}))
    with pytest.raises(ValueError, match=r"sampler was 'ode' and is None; .*sampler.name was None and is 'ODESampler'"):
        _fill(levels, tmp_path, 2)


def test_read_samples_of_another_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no samples.json. Pass a folder that sample_to wrote"):
        read_samples(tmp_path, 1)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_stored_samples_are_read_batch_by_batch(levels, tmp_path, kind):
    _fill(levels, tmp_path, 10, format=kind)
    batches = list(stored_samples(tmp_path))
    assert [batch.indices for batch in batches] == [range(0, 4), range(4, 8), range(8, 10)]
    assert torch.equal(torch.cat([batch.images for batch in batches]), read_samples(tmp_path, 10))
    assert [batch.indices for batch in stored_samples(tmp_path, 6)] == [range(0, 4), range(4, 6)]
    (batch,) = stored_samples(tmp_path, 9, process=(2, 3))
    assert batch.indices == range(8, 9) and torch.equal(batch.images, read_samples(tmp_path, 9)[8:])
    with pytest.raises(ValueError, match="has 10 samples, fewer than n=11"):
        stored_samples(tmp_path, 11)
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        stored_samples(tmp_path, 0)
    settings = stored_settings(tmp_path)["settings"]
    expected = Job(_ode(levels), batch_size=4).settings()
    assert settings == {**json.loads(json.dumps(expected)), "format": kind}


def test_numbers_of_numpy_are_those_of_python(levels, tmp_path):
    for number in (np.int64, int):  # the second call continues the first
        sample_to(_ode(levels), tmp_path, number(3), seed=number(7), batch_size=number(2), progress=False)
    (batch,) = bulk_samples(_ode(levels), np.int64(1), first=np.int64(2), seed=np.int64(7), batch_size=np.int64(2))
    assert batch.indices == range(2, 3)
    torch.testing.assert_close(batch.images, read_samples(tmp_path, 3)[2:], rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_folder_that_is_not_complete(levels, tmp_path, kind):
    """samples.json has the larger n before the images exist."""
    _fill(levels, tmp_path, 6, format=kind)
    SampleFolder(Job(_ode(levels), batch_size=4), tmp_path, 11, format=kind)._begin(main=True)
    with pytest.raises(FileNotFoundError, match=r"not complete: 6 of the first 11 images exist\. Repeat the command"):
        stored_samples(tmp_path)
    assert read_samples(tmp_path, 5).shape == (5, 1, 3, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be an integer of at least 1, got 0"),
        ({"n": 2**32 + 1}, ValueError, r"must be below 2\^32"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        (
            {"process": (2, 2)},
            ValueError,
            r"process must be \(rank, world size\) with 0 <= rank < world size, got \(2, 2\)",
        ),
        ({"sampler": Levels()}, TypeError, "sampler must be a Sampler, got Levels"),
    ],
)
def test_invalid_arguments_raise(tmp_path, options, error, message):
    arguments = {"sampler": _ode(Levels()), "n": 2, **options}
    for call in (bulk_samples, functools.partial(sample_to, folder=tmp_path / "out")):
        with pytest.raises(error, match=message):
            call(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_samples_outside_of_the_range_of_images(tmp_path, kind):
    def score(x, sigma):
        return (0.5 - x) / (1 + sigma**2)

    sampler = ODESampler(score, schedule=NoiseSchedule.geometric(1, 0.01, 3))
    options = {"shape": (1, 8, 8), "format": kind, "progress": False}
    with pytest.raises(ValueError, match=r"not images in \[0, 1\] \(.* got values from .*score.value_range = \(0, 1\)"):
        sample_to(sampler, tmp_path, 2, **options)
    score.value_range = (0, 1)
    sample_to(sampler, tmp_path, 2, **options)
    assert read_samples(tmp_path, 2).std() > 0.2


def test_bad_arguments_of_one_function(tmp_path, levels):
    with pytest.raises(ValueError, match="first must be an integer of at least 0, got -1"):
        bulk_samples(_ode(levels), 2, first=-1)
    for options, message in [
        ({"format": "gif"}, "format must be one of 'png', 'npz', 'float', got 'gif'"),
        ({"shape": (2, 4, 4)}, r"images \(C, H, W\) with 1 or 3 channels, but their shape is \(2, 4, 4\)"),
        ({"shape": (4,)}, r"their shape is \(4,\). Write format=\"float\""),
    ]:
        with pytest.raises(ValueError, match=message):
            _fill(levels, tmp_path / "out", 2, **options)
    levels.value_range = (-1, 1)
    with pytest.raises(ValueError, match=r"images in \[0, 1\], but the network's value_range is \(-1, 1\)"):
        _fill(levels, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


# -- Processes


def test_processes_are_those_of_the_launcher(monkeypatch, levels):
    assert this_process() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert this_process() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert this_process() == (1, 3)
    assert [batch.indices for batch in bulk_samples(_ode(levels), 9, batch_size=2)] == [range(2, 4), range(8, 9)]


@pytest.mark.parametrize("name", ["png", "npz"])
def test_shares_make_the_same_folder(tmp_path, levels, name):
    options = {"format": name, "classes": None}
    _fill(levels, tmp_path / "one", 10, **options)
    for k in (1, 2, 0):
        _fill(levels, tmp_path / "three", 10, process=(k, 3), **options)
    assert _content(tmp_path / "three") == _content(tmp_path / "one")
    assert levels.drawn() == [4, 4, 2, 4, 2, 4]


def test_a_process_waits_at_the_end_until_all_images_are_there(tmp_path, levels, monkeypatch):
    _fill(levels, tmp_path / "one", 10)
    monkeypatch.setattr(sampling.folder, "CHECK_SECONDS", 0.001)
    looked = threading.Event()
    monkeypatch.setattr(sampling.folder.time, "sleep", lambda seconds: looked.set() or threading.Event().wait(seconds))
    other = threading.Thread(
        target=lambda: looked.wait(20) and _fill(Levels(), tmp_path / "two", 10, process=(1, 2)), daemon=True
    )
    other.start()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _fill(levels, tmp_path / "two", 10)
    assert _content(tmp_path / "two") == _content(tmp_path / "one") and looked.is_set()
    other.join(20)
    assert not other.is_alive()


def test_the_bar_counts_the_images_of_all_processes(tmp_path, levels, capsys):
    _fill(levels, tmp_path, 10, process=(1, 3))
    _fill(levels, tmp_path, 10, process=(2, 3), progress=True)
    assert capsys.readouterr().err == ""  # only the first process shows a bar
    _fill(levels, tmp_path, 10, process=(0, 3), progress=True)
    assert "sampling: 100%" in (shown := capsys.readouterr().err) and "10/10" in shown
    _fill(levels, tmp_path / "two", 10, process=(1, 2))
    _fill(levels, tmp_path / "two", 10, process=(0, 2), progress=True)
    assert " 4/10 " in (shown := capsys.readouterr().err) and "10/10" in shown and "6/10" not in shown


# -- Interruptions


@pytest.mark.parametrize("name", ["png", "npz"])
def test_a_full_disk_leaves_whole_files(tmp_path, levels, monkeypatch, name):
    """The disk is full between writing a file and renaming it."""
    _fill(levels, tmp_path / "whole", 10, format=name)
    replace, left = os.replace, itertools.count(2 if name == "npz" else 7, -1)

    def full(source, target):
        if Path(target).suffix != ".json" and next(left) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        first = 8 if name == "npz" else 4
        message = rf"the images from {first} on could not be written to .* \(No space left on device\); all existing"
        with pytest.raises(OSError, match=message) as caught:
            _fill(levels, tmp_path / "out", 10, format=name)
    assert caught.value.errno == errno.ENOSPC
    whole, found = _content(tmp_path / "whole"), _content(tmp_path / "out")
    assert found.items() < whole.items() and len(found) == (2 if name == "npz" else 7)
    assert not list((tmp_path / "out").rglob(".*"))
    _fill(levels, tmp_path / "out", 10, format=name)
    assert _content(tmp_path / "out") == whole


def test_what_was_half_written_is_never_taken_for_an_image(tmp_path, levels):
    folder = _fill(levels, tmp_path, 6)
    path = folder / "000005.png"
    path.rename(folder / ".saving-half")  # as if the process had been killed before the file had its name
    levels.drawn()
    _fill(levels, tmp_path, 6)
    assert levels.drawn() == [2] and path.exists()
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture
def interruptible():
    """Python's handler of SIGINT, which a shell ignores for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interruption", ["SIGTERM", "SIGINT"])
def test_signals_leave_whole_files(tmp_path, interruption):
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)

    class Interrupted(Levels):
        def __call__(self, x, sigma, condition=None):
            if len(self._batches) == 7:  # in the second batch
                os.kill(os.getpid(), getattr(signal, interruption))
            return super().__call__(x, sigma, condition)

    with pytest.raises(SystemExit if interruption == "SIGTERM" else KeyboardInterrupt) as caught:
        _fill(Interrupted(), tmp_path, 10)
    assert interruption == "SIGINT" or caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(_content(tmp_path)) == [f"00000{i}.png" for i in range(4)]
    assert not list(tmp_path.rglob(".*"))


def test_a_handler_of_the_user_stays(tmp_path, levels):
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with sampling.folder._exit_after_sigterm():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# -- What a network is


def test_the_identity_of_a_score_follows_what_it_computes(net):
    identity = hashing.identity
    assert identity(net) == identity(copy.deepcopy(net))
    copied = net.inference_copy()
    assert identity(copied) == identity(net.inference_copy()) != identity(net)
    copied(torch.rand(1, 1, 8, 8), 0.5)  # its state does not matter
    assert identity(copied) == identity(net.inference_copy())
    settings, net.sampler_settings = net.sampler_settings, SamplerSettings("ode", levels=7)
    try:
        recommended = identity(net)
    finally:
        net.sampler_settings = settings
    assert recommended == identity(net)


class Guided:
    """A score made of another, as guidance makes them."""

    def __init__(self, net, weight):
        self.net, self.weight, self._cache = net, weight, object()

    def __call__(self, x, sigma):
        return self.weight * self.net(x, sigma)


def test_the_identity_of_scores_made_of_scores(net):
    identity = hashing.identity
    other = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=SCHEDULE)
    found = [
        identity(value)
        for value in (
            Guided(net, 1.0),
            Guided(net, 2.0),
            Guided(other, 1.0),
            functools.partial(Guided.__call__, net),
            functools.partial(Guided.__call__, other),
            Guided.__call__,
            torch.tensor([1.0]),
            torch.tensor(1.0),
            torch.tensor([1.0], dtype=torch.float64),
            {"a": [1, 2]},
            {"a": [[1], 2]},
            object,
            1j,
        )
    ]
    assert len(set(found)) == len(found)
    assert identity(Guided(net, 1.0)) == found[0] and found[0].startswith("Guided ")
    assert identity(object()) == identity(object())  # without the address


def test_the_identity_covers_what_exact_scores_methods_and_arrays_compute():
    """Also values that an object keeps in private attributes, and the middle of large arrays."""

    class Model:
        def __init__(self, values):
            self.values = values

        def score(self, x, sigma):
            return self.values * x

    class Shifted(Gaussian):
        def __init__(self, shift):
            super().__init__([0.0, 1.0], 1.0)
            self.shift = shift

    far, near = np.zeros(5000), np.zeros(5000)
    far[2000] = 1.0
    make = [
        lambda: Empirical(torch.zeros(4, 1, 2, 2)),
        lambda: Empirical(torch.ones(4, 1, 2, 2)),
        lambda: Empirical(torch.ones(4, 1, 2, 2), 0.1),
        lambda: GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.01),
        lambda: GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 1.0),
        lambda: Gaussian([0.0, 1.0], 1.0),
        lambda: Gaussian([0.0, 1.0], 1.0, schedule=NoiseSchedule([1.0, 0.1])),
        lambda: Shifted(1.0),
        lambda: Shifted(2.0),
        lambda: Model(near).score,
        lambda: Model(far).score,
        lambda: Model(far.astype(np.float32)).score,
    ]
    found = [hashing.identity(each()) for each in make]
    assert len(set(found)) == len(found)
    assert found == [hashing.identity(each()) for each in make]
    assert found[0] != hashing.identity(Empirical(torch.zeros(4, 1, 2, 2)).log_density)


def test_the_identity_follows_what_objects_keep_outside_of_their_dict():
    """Methods of built-in objects, functions with a cache, and attributes in slots; also complex tensors."""

    class Slots:
        __slots__ = ("_private", "value")

        def __init__(self, value):
            self.value, self._private = value, object()

    values = [
        lambda: {0.1: 1.0}.get,
        lambda: {0.1: 2.0}.get,
        lambda: torch.ones(2).mul,
        lambda: torch.zeros(2).mul,
        lambda: functools.lru_cache(lambda sigma: sigma),
        lambda: functools.lru_cache(lambda sigma: 2 * sigma),
        lambda: Slots(1),
        lambda: Slots(2),
        lambda: torch.complex(torch.ones(2), torch.ones(2)).conj(),
        lambda: torch.complex(torch.ones(2), torch.ones(2)),
    ]
    found = [hashing.identity(each()) for each in values]
    assert len(set(found)) == len(found) and found == [hashing.identity(each()) for each in values]
    assert found[-2] == hashing.identity(torch.complex(torch.ones(2), -torch.ones(2)))


def test_the_identity_follows_numbers_of_numpy_and_members_of_enumerations():
    class Mode(enum.Enum):
        SMOOTH = enum.auto()
        SHARP = enum.auto()

    values = [np.float64(0.5), np.float64(0.7), np.float32(0.5), np.int64(1), Mode.SMOOTH, Mode.SHARP]
    found = [hashing.identity(types.SimpleNamespace(value=value)) for value in values]
    assert len(set(found)) == len(found)
    with np.printoptions(legacy="1.21"):  # NumPy 1 writes 0.5 where NumPy 2 writes np.float64(0.5)
        assert found == [hashing.identity(types.SimpleNamespace(value=value)) for value in values]


def scaled(factor, shift=0.0, *, power=1):
    """A function whose results depend on its code, its defaults and the variables of this function."""
    helper = functools.lru_cache(lambda: factor)

    def score(x, sigma, shift=shift, *, power=power):
        if power not in {"a", "b"} and factor:
            return -((factor * x + shift) ** power) / sigma
        return score(x, sigma), helper()

    return score


def test_the_identity_of_a_function_follows_its_code_its_defaults_and_its_variables():
    make = [
        lambda: scaled(0.2),
        lambda: scaled(0.8),
        lambda: scaled(0.2, 1.0),
        lambda: scaled(0.2, power=2),
        lambda: scaled(torch.zeros(2)),
        lambda: scaled(scaled(0.2)),
        lambda: scaled({1: torch, "a": 2}),
        lambda: lambda x, sigma: -x,
        lambda: lambda x, sigma: -2 * x,
        lambda: lambda x, sigma: [x for _ in range(1)],
        lambda: lambda x, sigma: [x for _ in range(2)],
        lambda: lambda x, sigma: torch.sin(x),
        lambda: lambda x, sigma: torch.cos(x),
    ]
    found = [hashing.identity(each()) for each in make]
    assert len(set(found)) == len(found)
    assert found == [hashing.identity(each()) for each in make]
    assert hashing.identity({0, 8}) == hashing.identity({8, 0})  # their order differs


@pytest.mark.parametrize("kind", SAMPLERS)
def test_sampling_does_not_change_the_identity_of_a_sampler(net, kind):
    for score in (net, net.inference_copy(), Levels(), Gaussian([0.0, 1.0], 1.0, schedule=SCHEDULE)):
        sampler = SAMPLERS[kind](score, levels=3)
        before = sampling.bulk.description_of(sampler)
        sampler.sample(2, shape=getattr(score, "sample_shape", None) or (1, 3, 4), generator=0, progress=False)
        assert sampling.bulk.description_of(sampler) == before


def test_a_folder_of_another_function_is_refused(tmp_path):
    def make(level):
        return ODESampler(lambda x, sigma: (level - x) / (1e-3 + sigma**2), SCHEDULE)

    options = {"shape": (1, 2, 2), "format": "npz", "progress": False}
    sample_to(make(0.2), tmp_path, 2, **options)
    with pytest.raises(ValueError, match="has samples with other settings: network was"):
        sample_to(make(0.8), tmp_path, 4, **options)
    with pytest.raises(ValueError, match=r"network was .*; batch_size was .*; classes .*; and 1 more\. Pass"):
        sample_to(make(0.8), tmp_path, 4, **options, batch_size=3, classes=1, seed=2)
    sample_to(make(0.2), tmp_path, 4, **options)


def test_the_identity_of_a_new_kind_of_score_follows_its_definition():
    class Scaled(NetworkScore):
        def __init__(self, net, factor):
            self._net, self._factor, self.calls = net, factor, 0

        def _outputs(self, x, sigma, condition, *, variance=False):
            self.calls += 1
            return (self._factor * self._net(x, sigma),)

        def definition(self):
            return [self._net, self._factor]

    score = Scaled(Levels(), 2.0)
    before = hashing.identity(score)
    score._outputs(torch.rand(1, 1, 3, 4), 0.5, None)
    assert score.calls == 1 and hashing.identity(score) == before == hashing.identity(Scaled(Levels(), 2.0))
    assert hashing.identity(Scaled(Levels(), 3.0)) != before


# -- Processes that are killed

JOB = textwrap.dedent(
    """
    import os, signal, sys, threading
    import torch
    torch.set_num_threads(1)
    from scorematch import NoiseSchedule, ScoreNet
    from scorematch.core import files
    from scorematch.sampling import sample_to
    from scorematch.core.processes import this_process
    from scorematch.sampling import AnnealedLangevinSampler

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    if len(sys.argv) > 3:  # the number of writes until the process kills itself between write and rename, or later
        replace, remaining, seconds = files.os.replace, int(sys.argv[3]), float(sys.argv[4])

        def counted(source, target):
            global remaining
            remaining -= 1
            if remaining == 0:
                threading.Timer(seconds, kill).start() if seconds else kill()
            replace(source, target)

        files.os.replace = counted
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, schedule=NoiseSchedule([1.0, 0.3, 0.1]), classes=3)
    sampler = AnnealedLangevinSampler(net, levels=3)
    sample_to(sampler, sys.argv[1], 150, batch_size=8, classes="random", format=sys.argv[2], progress=False)
    sys.stdout.write(f"{this_process()}\\n")  # in one piece, since two processes share the output
    """
)


def _program(script, *arguments):
    """Code that runs a program with arguments."""
    return (
        f"import runpy, sys\nsys.argv[1:] = {[*map(str, arguments)]}\nrunpy.run_path({str(script)!r}, {{}}, '__main__')"
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    script = tmp_path_factory.mktemp("job") / "job.py"
    script.write_text(JOB)
    return script


@pytest.fixture(scope="module")
def whole(forks, job, tmp_path_factory):
    """The content of the folders that one uninterrupted process writes, by their format."""
    folders = {name: tmp_path_factory.mktemp("whole") for name in ("png", "npz")}
    for name, folder in folders.items():
        forks.group(1, _program(job, folder, name), folder.parent)
    return {name: _content(folder) for name, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["png", "npz"])
def test_a_job_that_is_killed_ends_with_the_same_bits(tmp_path, forks, job, whole, name):
    chance = random.Random(0)  # noqa: S311
    most = 30 if name == "png" else 4  # writes in a round: after all rounds something is missing
    for late in (False, False, True, True):  # in the middle of a write, or at any moment
        moment = chance.randint(1, most), late * chance.random() * 0.001
        status, *_ = forks.run(_program(job, tmp_path / "killed", name, *moment), tmp_path)
        assert status == -signal.SIGKILL
        assert late or len(list((tmp_path / "killed").rglob(".saving-*"))) >= 1
    forks.group(1, _program(job, tmp_path / "killed", name), tmp_path)
    assert _content(tmp_path / "killed") == whole[name]
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        # Without a GPU the flag is needed: accelerate launch starts one process then, or leaves them to MPI.
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_write_what_one_writes(tmp_path, job, whole, launcher):
    if launcher[0].startswith("accelerate"):
        pytest.importorskip("accelerate")
    done = python("-m", *launcher, job, tmp_path / "two", "png")
    assert sorted(done.stdout.split("\n")) == ["", *(f"Process(rank={rank}, world_size=2)" for rank in (0, 1))]
    assert _content(tmp_path / "two") == whole["png"]


def test_the_identity_of_an_object_covers_its_attributes_and_the_entries_of_its_schedule():
    class Score:
        def __init__(self, levels, more=None):
            self.schedule, self.more = NoiseSchedule(levels), more

    first = hashing.identity(Score([3.0, 1.0]))
    assert first == hashing.identity(Score([3.0, 1.0]))
    assert first != hashing.identity(Score([3.0, 2.0]))
    assert first != hashing.identity(Score([3.0, 1.0], more=range(2)))
    assert hashing.identity(Score([1.0], range(2))) != hashing.identity(Score([1.0], range(3)))
