"""The command sample: one file per image, animations, folders, and all samplers. Pictures are tested in test_cli.py."""

import json
import re
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.cli.options.duration import announce
from scorematch.core.processes import find_device
from scorematch.core.schema import Field
from scorematch.data import grid, read_image, read_samples
from scorematch.sampling import SAMPLERS, AncestralSampler, ODESampler, SamplerSettings
from scorematch.sampling.sampler import options_of
from tests.helpers import python, refused


def _saved(folder, settings=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ScoreNet.unet(
            1, 8, widths=(4, 6), layers_per_block=1, schedule=NoiseSchedule.geometric(1, 0.01, 9), **options
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.2)
    net.sampler_settings = settings
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _saved(tmp_path_factory.mktemp("network"), SamplerSettings("ode", levels=3))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return _saved(tmp_path_factory.mktemp("classes"), SamplerSettings("ode", levels=3), classes=3)


QUIET = ("--device", "cpu", "--quiet")


def _sample(*arguments):
    return main(["sample", *map(str, arguments), *QUIET])


def _refused(arguments, capsys):
    return refused(["sample", *arguments, *QUIET], capsys, unprinted="network calls")


def _pictures(out):
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


# -- One file per image, and animations


@pytest.mark.slow
def test_the_images_of_a_seed_are_the_same_in_every_output(folder, tmp_path, capsys):
    chain = ("--levels", 2, "--seed", 3)
    assert _sample(folder, "--out", tmp_path / "out", "-n", 4, *chain) == 0
    capsys.readouterr()
    assert _sample(folder, f"{tmp_path}/new/", "-n", 4, *chain) == 0
    first, last = (tmp_path / "new" / f"00000{i}.png" for i in (0, 3))
    assert capsys.readouterr().out.splitlines()[3:] == [str(first), "...", str(last)]
    assert _sample(folder, tmp_path / "few-%02d" / "x.png", "-n", 2, *chain, "--batch-size", 1) == 0
    assert _sample(folder, tmp_path / "my%20digits.png", "-n", 2, *chain) == 0  # as a browser names a file
    assert (tmp_path / "my%20digits.png").exists()
    assert _sample(folder, tmp_path / "one.png", "-n", 1, *chain) == 0
    assert _sample(folder, tmp_path / "sheet.png", "-n", 4, *chain) == 0
    expected = [read_image(tmp_path / "out" / "images" / f"00000{i}.png", 1) for i in range(4)]
    found = [(i, tmp_path / "new" / f"00000{i}.png") for i in range(4)]
    found += [(i, tmp_path / f"few-0{i}" / "x.png") for i in range(2)]
    for i, path in [*found, (0, tmp_path / "one.png")]:  # the network rounds differently in other batches
        torch.testing.assert_close(read_image(path, 1), expected[i], rtol=0, atol=1.01 / 255)
    sheet = read_image(tmp_path / "sheet.png", 1)
    torch.testing.assert_close(sheet, grid(torch.stack(expected)), rtol=0, atol=1.01 / 255)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.slow
def test_an_existing_folder_gets_one_file_per_image(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert _sample(folder, tmp_path, "-n", 2, "--levels", 2) == 0
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png", "mine.txt"]
    assert "000000.png exists already" in _refused([folder, tmp_path, "-n", 2], capsys)
    (tmp_path / "000001.png").unlink()
    (tmp_path / "000001.png").mkdir()
    error = _refused([folder, tmp_path, "-n", 2, "--overwrite"], capsys)
    assert "000001.png is a folder and cannot be replaced by a file. Choose another name." in error


def _animation(path):
    """The frames (T, H, W) of an animation, and their durations in milliseconds."""
    with Image.open(path) as file:
        frames, durations = [], []
        for i in range(file.n_frames):
            file.seek(i)
            frames.append(torch.from_numpy(np.array(file.convert("L"))))
            durations.append(file.info["duration"])
        assert file.info["loop"] == 0
    return torch.stack(frames), durations


@pytest.mark.slow
def test_an_animation_shows_the_way_from_noise_to_the_images(folder, tmp_path, capsys):
    chain = ("-n", 4, "--sampler", "ancestral")
    assert _sample(folder, tmp_path / "a.png", *chain, "--levels", 9, "--gif") == 0
    assert capsys.readouterr().out.splitlines()[3:] == [str(tmp_path / "a.png"), str(tmp_path / "a.gif")]
    frames, durations = _animation(tmp_path / "a.gif")
    assert len(frames) == 9 and durations == [380] * 8 + [2000]  # eight steps, and the denoised images
    assert torch.equal(frames[-1].float() / 255, read_image(tmp_path / "a.png", 1)[0])
    noisy = frames[0, 2:-2, 2:-2].float() / 255
    assert noisy.min() >= 0 and noisy.std() > 0.15 and not torch.equal(frames[0], frames[-1])
    assert _sample(folder, tmp_path / "b.gif", *chain, "--levels", 9, "--gif") == 0  # without a still picture
    assert torch.equal(_animation(tmp_path / "b.gif")[0], frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.png", "b.gif"]
    capsys.readouterr()
    assert "a.gif exists already" in _refused([folder, tmp_path / "a.jpg", "--gif"], capsys)
    assert _sample(folder, tmp_path / "one.png", "-n", 1, "--levels", 3, "--gif") == 0
    assert _animation(tmp_path / "one.gif")[0].shape[1:] == (8, 8)  # one image has no border


@pytest.mark.slow
def test_an_animation_of_many_steps_has_at_most_60_frames(folder, tmp_path):
    assert _sample(folder, tmp_path / "a.png", "-n", 1, "--sampler", "ancestral", "--levels", 62, "--gif") == 0
    frames, _ = _animation(tmp_path / "a.gif")
    assert 30 <= len(frames) <= 60
    assert torch.equal(frames[-1].float() / 255, read_image(tmp_path / "a.png", 1)[0])


@pytest.mark.slow
def test_an_animation_in_a_folder(folder, tmp_path, capsys):
    assert _sample(folder, "--out", tmp_path, "-n", 3, "--levels", 3, "--gif") == 0
    lines = [str(tmp_path / name) for name in ("sheet.png", "sheet.gif")]
    assert capsys.readouterr().out.splitlines()[3:] == [*lines, str(tmp_path)]
    frames, _ = _animation(tmp_path / "sheet.gif")
    sheet = read_image(tmp_path / "sheet.png", 1)[0]
    torch.testing.assert_close(frames[-1].float() / 255, sheet, rtol=0, atol=1.01 / 255)


# -- A folder


@pytest.mark.slow
def test_a_folder_of_images(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert _sample(folder, "--out", out, "-n", 5, "--batch-size", 2) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("ODESampler(3 levels 1 -> 0.01") and re.fullmatch(r"about \d+ s for 5 images", lines[1])
    assert re.fullmatch(r"5 images in [\d.]+ s", lines[2]) and lines[3:] == [str(out / "sheet.png"), str(out)]
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["images", "samples.json", "sheet.png"]
    assert sorted(_pictures(out)) == [f"00000{i}.png" for i in range(5)]
    sheet = read_image(out / "sheet.png", 1)
    torch.testing.assert_close(sheet, grid(read_samples(out, 5)))
    about = json.loads((out / "samples.json").read_text())["about"]
    command = f"scorematch sample {folder} --out {out} -n 5 --batch-size 2 --device cpu --quiet"
    assert about == {"network": folder, "command": command}


def test_the_same_command_continues_and_a_larger_n_adds_images(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert _sample(folder, "--out", out, "-n", 4, "--batch-size", 2) == 0
    before = _pictures(out)
    (out / "images" / "000002.png").unlink()
    capsys.readouterr()
    assert _sample(folder, "--out", out, "-n", 4, "--batch-size", 2) == 0
    assert capsys.readouterr().out.startswith("3 of 4 images exist already; 1 are drawn again\nODESampler(")
    assert _pictures(out) == before
    assert _sample(folder, "--out", out, "-n", 4, "--batch-size", 2) == 0
    assert capsys.readouterr().out == f"4 of 4 images exist already\n{out / 'sheet.png'}\n{out}\n"
    assert _sample(folder, "--out", out, "-n", 6, "--batch-size", 2) == 0
    assert len(_pictures(out)) == 6 and before.items() < _pictures(out).items()
    capsys.readouterr()
    error = _refused([folder, "--out", out, "-n", 6, "--batch-size", 2, "--seed", 1], capsys)
    assert "has samples with other settings: seed was 0 and is 1" in error


@pytest.mark.slow
def test_files_of_arrays_have_the_same_sheet_as_pictures(folder, tmp_path):
    for options, name in [(["--npz"], "arrays"), ([], "pictures")]:
        assert _sample(folder, "--out", tmp_path / name, "-n", 3, "--columns", 3, *options) == 0
    with np.load(tmp_path / "arrays" / "images" / "000000.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (3, 8, 8, 1)
    sheets = [(tmp_path / name / "sheet.png").read_bytes() for name in ("arrays", "pictures")]
    assert sheets[0] == sheets[1]
    with Image.open(tmp_path / "arrays" / "sheet.png") as sheet:
        assert sheet.size == (32, 12)


def test_the_sheet_shows_the_first_images_of_many(folder, tmp_path):
    assert _sample(folder, "--out", tmp_path / "out", "-n", 70, "--npz", "--levels", 2) == 0
    assert read_image(tmp_path / "out" / "sheet.png", 1).shape == (1, 82, 82)  # 8 x 8 images


@pytest.mark.slow
def test_classes_of_a_folder(classes, tmp_path):
    for label in ("1", "cycle", "random"):
        assert _sample(classes, "--out", tmp_path / label, "-n", 6, "--class", label) == 0
    rows = [line.split(",")[1] for line in (tmp_path / "cycle" / "labels.csv").read_text().splitlines()[1:]]
    assert rows == ["0", "1", "2", "0", "1", "2"]
    fixed, cycle = _pictures(tmp_path / "1"), _pictures(tmp_path / "cycle")
    assert [name for name in fixed if fixed[name] == cycle[name]] == ["000001.png", "000004.png"]
    assert _sample(classes, "--out", tmp_path / "two", "-n", 6, "--class", "cycle", "--n-classes", 2) == 0
    assert (tmp_path / "two" / "labels.csv").read_text().splitlines()[3] == "000002.png,0"


@pytest.mark.slow
def test_classes_of_a_sheet(classes, tmp_path):
    for label in ("0", "cycle"):
        assert _sample(classes, tmp_path / f"{label}.png", "-n", 3, "--class", label) == 0
    one, cycle = (read_image(tmp_path / f"{label}.png", 1) for label in ("0", "cycle"))
    assert torch.equal(one[:, 2:10, 2:10], cycle[:, 2:10, 2:10]) and not torch.equal(one, cycle)


@pytest.mark.slow
def test_classes_by_name(tmp_path, capsys):
    """A number is the number of a class if it is not the name of one, and a rule is always the rule."""
    net = ScoreNet.from_pretrained(_saved(tmp_path / "net", SamplerSettings("ode", levels=3), classes=5))
    net.class_names = ["cat", "cycle", "0", "dog", "dog"]
    net.save_pretrained(tmp_path / "net")
    for label in ("cat", "0", "cycle", "2", "1"):
        assert _sample(tmp_path / "net", "--out", tmp_path / label, "-n", 3, "--class", label) == 0
    first = {name: _pictures(tmp_path / name)["000000.png"] for name in ("cat", "0", "cycle", "2")}
    assert first["cat"] == first["cycle"] != first["0"] == first["2"]
    assert _pictures(tmp_path / "1")["000001.png"] == _pictures(tmp_path / "cycle")["000001.png"]
    rows = (tmp_path / "cycle" / "labels.csv").read_text().split()
    assert rows[1:] == ["000000.png,0", "000001.png,1", "000002.png,2"]
    capsys.readouterr()
    for label in ("bird", "dog"):
        error = _refused([tmp_path / "net", tmp_path / "a.png", "--class", label], capsys)
        assert f"must be a number from 0 to 4, a name such as 'cat', random or cycle for {tmp_path}" in error
        assert error.rstrip().endswith(f"got {label}.")


@pytest.mark.slow
def test_guidance_changes_the_samples_and_needs_its_options(tmp_path, capsys):
    """A weight of 1 is the network with the class; each weight has its own samples."""
    net = _saved(tmp_path / "net", SamplerSettings("ode", levels=3), classes=3, null_class=True)
    rows = {"none": (), "1": ("--guidance", 1), "3": ("--guidance", 3)}
    rows |= {name: ("--guidance", 3, "--guidance-interval", *name.split()) for name in ("0 99", "0.1 1", "98 99")}
    rows["rescaled"] = ("--guidance", 3, "--guidance-rescale", 0.7)
    for name, given in rows.items():
        assert _sample(net, "--out", tmp_path / name, "-n", 3, "--class", "cycle", *given) == 0
        if name in ("none", "1", "3"):
            assert _sample(net, tmp_path / f"{name}.png", "-n", 3, "--class", 1, *given) == 0
    none, one, three, everywhere, inside, nowhere, rescaled = (_pictures(tmp_path / name) for name in rows)
    assert none == one == nowhere and three == everywhere
    assert all(one[name] != three[name] != inside[name] != one[name] for name in one)
    assert all(rescaled[name] not in (one[name], three[name]) for name in one)
    sheets = [read_image(tmp_path / f"{name}.png", 1) for name in ("none", "1", "3")]
    assert torch.equal(sheets[0], sheets[1]) and not torch.equal(sheets[1], sheets[2])
    capsys.readouterr()
    assert "samples with other settings: network was" in _refused(
        [net, "--out", tmp_path / "3", "-n", 3, "--class", "cycle", "--guidance", 4], capsys
    )
    error = _refused([net, tmp_path / "a.png", "--guidance", 3], capsys)
    assert "--guidance needs a class. Add --class K, with K from 0 to 2." in error
    error = _refused([net, tmp_path / "a.png", "--class", 1, "--guidance", "nan"], capsys)
    assert "--guidance must be a finite number, got nan." in error
    empty = [net, tmp_path / "a.png", "--class", 1, "--guidance", 3, "--guidance-interval", 1, 0.1]
    assert "--guidance-interval must be (low, high), noise levels with 0 <= low < high, got [1.0, 0.1]." in _refused(
        empty, capsys
    )
    alone = [net, tmp_path / "a.png", "--class", 1, "--guidance-interval", 0.1, 1]
    assert "--guidance-interval needs the weight of the guidance. Add --guidance W." in _refused(alone, capsys)
    alone = [net, tmp_path / "a.png", "--class", 1, "--guidance-rescale", 0.7]
    assert "--guidance-rescale needs the weight of the guidance. Add --guidance W." in _refused(alone, capsys)
    large = [net, tmp_path / "a.png", "--class", 1, "--guidance", 3, "--guidance-rescale", 2]
    assert "--guidance-rescale must be a number from 0 to 1, got 2.0." in _refused(large, capsys)


def test_several_processes_write_into_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes cannot write a.png together. Write --out FOLDER." in _refused(["mnist", "a.png"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "the following arguments are required: picture or --out FOLDER"),
        (["{folder}", "a.png", "--out", "b"], "a.png and --out b cannot be combined. Name a picture or a folder."),
        (["{folder}", "--out", "a.png"], "the output must be a folder, got the name of a picture, a.png. Write a."),
        (["{folder}", "a.png/"], "the output must be a folder, got the name of a picture, a.png. Write a."),
        (["{folder}", "a/%03d.npz"], "a/%03d.npz is a pattern, which is for pictures. Name one file, or write --out"),
        (["{folder}", "a.npz", "--gif"], "--gif is for pictures, and a.npz is a file of arrays. Leave it out."),
        (["{folder}", "a.npy", "--columns", "2"], "--columns is for pictures, and a.npy is a file of arrays."),
        (["{folder}", "a.png", "--npz"], "--npz is for --out FOLDER. Leave it out."),
        (["{folder}", "--out", "b", "--overwrite"], "--overwrite is for a picture, and --out continues in its folder."),
        (["{folder}", "b/", "--gif"], "--gif is for one picture of all images, such as digits.png. Leave it out."),
        (
            ["{folder}", "b%d.png", "--columns", "2"],
            "--columns is for one picture of all images, such as digits.png. Leave it ",
        ),
        (["{folder}", "--out", "b", "--class", "cycle"], "--class is for class-conditional networks"),
        (["{folder}", "--out", "b", "--n-classes", "3"], "--n-classes is for --class random and --class cycle."),
        (["{classes}", "--out", "b"], "is class-conditional. Write --class K"),
        (["{classes}", "--out", "b", "--class", "one"], "--class must be a number from 0 to 2, random or cycle for "),
        (["{classes}", "--out", "b", "--class", "3"], "--class must be a number from 0 to 2, random or cycle for "),
        (["{classes}", "--out", "b", "--class", "cycle", "--n-classes", "4"], "--n-classes must be from 1 to 3"),
        (["{classes}", "a.png", "--class", "1", "--guidance", "2"], "--guidance needs a network with a null class"),
        (["{folder}", "--out", "b", "--sampler", "euler"], "argument --sampler: euler is ode --method dpm-solver++ "),
        (["{folder}", "--out", "b", "--sampler", "ode", "--snr", "0.5"], "--snr is an option of --sampler predictor-"),
        (["{folder}", "big"], "big has no extension and is no folder. Write big.png, or big/ for a new folder."),
        (["{folder}", "x%q.png"], "a pattern must have %d or %03d for the number of the image, got '%q' in 'x%q.png'"),
        (["{folder}", "a.png", "--snr", "0.1", "--method", "heun"], "is an option of --sampler"),
        (["{folder}", "a.png", "--snr", "2"], "argument --snr: must be a number of more than 0 and less than 1"),
        (["{folder}", "a.png", "--exact-noise", "--consistent"], ": leave out --steps-per-level and --exact-noise"),
        (["{folder}", "a.png", "--churn-min", "1"], "--churn-min, --churn-max and --churn-noise need --churn above 0"),
        (["{folder}", "a.png", "--churn", "1", "--method", "dpm-solver++"], ". Write --method heun."),
        (["{folder}", "a.png", "--sigma-max", "100"], ": --sigma-max must be in the range"),
        (["{folder}", "a.png", "--variance", "learned"], ": --variance learned needs a network that predicts"),
        (
            ["{folder}", "a.png", "--step-size", "1"],
            ": --step-size must lie between 0 and the stability limit, 2 sigma",
        ),
    ],
)
def test_arguments_that_do_not_fit(folder, classes, tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(folder=folder, classes=classes) for argument in arguments]
    assert message in _refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_refused(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert "has other files, such as mine.txt" in _refused([folder, "--out", tmp_path], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# -- Samplers


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "ODESampler(3 levels 1 -> 0.01, heun, 5 network calls)"),
        (["--levels", "4"], "ODESampler(4 levels 1 -> 0.01, heun, 7 network calls)"),
        (["--method", "dpm-solver++"], "ODESampler(3 levels 1 -> 0.01, dpm-solver++, 3 network calls)"),
        (["--sigma-max", "0.5", "--sigma-min", "0.02"], "ODESampler(3 levels 0.5 -> 0.02, heun, 5 network calls)"),
        (
            ["--churn", "2", "--churn-min", "0.05", "--churn-max", "0.5", "--churn-noise", "1.003"],
            "ODESampler(3 levels 1 -> 0.01, heun, churn 2 at 0.5 -> 0.05, noise 1.003, 5 network calls)",
        ),
        (
            ["--clamp-denoised", "--levels", "3", "--sigma-min", "0.1"],
            "AncestralSampler(3 levels 1 -> 0.1, large variance, clamped denoised images",
        ),
        (["--sampler", "langevin", "--levels", "3"], "AnnealedLangevinSampler(3 levels"),
        (["--steps-per-level", "2", "--levels", "3"], "AnnealedLangevinSampler(3 levels 1 -> 0.01, 2 steps"),
        (["--variance", "small", "--levels", "3"], "AncestralSampler(3 levels 1 -> 0.01, small variance"),
        (["--sampler", "predictor-corrector"], "PredictorCorrectorSampler(9 levels"),
        (
            ["--predictor", "ancestral", "--corrector-steps", "0", "--snr", "0.1"],
            "PredictorCorrectorSampler(9 levels 1 -> 0.01, ancestral",
        ),
    ],
)
def test_every_sampler_has_its_options(folder, tmp_path, options, expected, capsys):
    assert _sample(folder, tmp_path / "a.png", "-n", 1, *options) == 0
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--order", "2"], "dpm-solver++, order 2, eta 0.5,"),
        (["--method", "dpm-solver++"], "dpm-solver++, order 1, eta 0.5,"),
        (["--method", "heun"], "heun,"),
        (["--method", "unipc"], "unipc,"),
        (["--method", "ipndm"], "ipndm,"),
    ],
)
def test_another_method_leaves_the_recommended_order_and_eta(tmp_path, options, expected, capsys):
    settings = SamplerSettings("ode", levels=3, method="dpm-solver++", order=1, eta=0.5)
    _saved(tmp_path / "net", settings)
    assert _sample(tmp_path / "net", tmp_path / "a.png", "-n", 1, *options) == 0
    assert capsys.readouterr().out.startswith(f"ODESampler(3 levels 1 -> 0.01, {expected}")


def test_another_method_leaves_the_recommended_churn(tmp_path, capsys):
    _saved(tmp_path / "net", SamplerSettings("ode", levels=3, churn=2, churn_noise=1.003))
    assert _sample(tmp_path / "net", tmp_path / "a.png", "-n", 1, "--method", "unipc") == 0
    assert capsys.readouterr().out.startswith("ODESampler(3 levels 1 -> 0.01, unipc, 3 network calls)")


@pytest.mark.slow
def test_every_sampler_is_an_option(folder, tmp_path, capsys):
    for name, sampler in SAMPLERS.items():
        assert _sample(folder, tmp_path / f"{name}.png", "-n", 1, "--levels", 3, "--sampler", name) == 0
        assert capsys.readouterr().out.startswith(f"{sampler.__name__}(3 levels")


def test_a_command_line_option_for_every_option_of_a_sampler(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    printed = capsys.readouterr().out
    for sampler in SAMPLERS.values():
        for option in options_of(sampler):
            assert re.search(rf"--{option.replace('_', '-')}(?![\w-])", printed), option


class _Noisier(AncestralSampler):
    """A sampler with an option of the same name as that of another."""

    def __init__(
        self, net, schedule=None, *, snr: Annotated[float, Field(float, above=0, below=1), "a ratio"] = 0.5, **options
    ):
        super().__init__(net, schedule, **options)
        self.snr = snr

    def settings(self):
        return [f"own snr {self.snr}"]


@pytest.mark.slow
def test_samplers_may_have_options_of_the_same_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAMPLERS, "noisier", _Noisier)
    snr, few = ("--snr", 0.25), ("-n", 1, "--levels", 3)
    for options, expected in [
        (("--sampler", "noisier"), "_Noisier(3 levels 1 -> 0.01, own snr 0.25"),
        (("--sampler", "predictor-corrector"), "PredictorCorrectorSampler(3 levels 1 -> 0.01, ancestral"),
        ((), "PredictorCorrectorSampler("),
        (("--variance", "small"), "_Noisier("),  # it has both options
    ]:
        assert _sample(folder, tmp_path / "a.png", *few, *snr, *options, "--overwrite") == 0
        assert capsys.readouterr().out.startswith(expected)


# -- Processes


def test_processes_of_a_launcher_have_devices_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    for rank, device in [("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")]:
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert find_device("auto") == find_device("cuda") == torch.device(device)
        assert find_device("cuda:0") == torch.device("cuda:0") and find_device("cpu") == torch.device("cpu")


@pytest.mark.slow
def test_torchrun_runs_the_same_command_in_two_processes(folder, tmp_path):
    assert _sample(folder, "--out", tmp_path / "one", "-n", 9, "--batch-size", 2) == 0
    launched = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scorematch", "sample")
    options = ("--out", tmp_path / "two", "-n", 9, "--batch-size", 2, "--device", "cpu", "--quiet")
    done = python(*launched, folder, *options)
    # The first process prints it. The other may have written images by then.
    assert len(re.findall(r"^about .* images in 2 processes$", done.stdout, re.MULTILINE)) == 1
    assert _pictures(tmp_path / "two") == _pictures(tmp_path / "one")
    assert (tmp_path / "two" / "sheet.png").read_bytes() == (tmp_path / "one" / "sheet.png").read_bytes()


def test_the_time_of_sampling_is_that_of_the_network_that_samples(folder, monkeypatch):
    made = []
    net = ScoreNet.from_pretrained(folder)
    monkeypatch.setattr(ScoreNet, "inference_copy", lambda self, **_: made.append(self) or self)
    for precision in ("auto", "float32"):
        announce(ODESampler(net, levels=3, precision=precision), 5)
    assert made == [net]


@pytest.mark.parametrize(
    ("kind", "levels", "hint"),
    [(AncestralSampler, 252, True), (AncestralSampler, 250, False), (ODESampler, 200, False)],
)
def test_a_sampler_of_many_calls_is_named_with_a_faster_one(kind, levels, hint, folder, capsys):
    announce(kind(ScoreNet.from_pretrained(folder), levels=levels))
    assert ("\nfaster: --sampler ode, with 5 network calls\n" in capsys.readouterr().out) == hint
