"""The command line: what all commands have in common, devices, and the commands sample and restore."""

import errno
import importlib
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet, __version__, cli
from scorematch.cli import main
from scorematch.cli.options.duration import duration
from scorematch.core.arguments import argument, written_by
from scorematch.core.processes import find_device
from scorematch.core.randomness import seed_of
from scorematch.data import read_image, save_image
from scorematch.demo.restorer import Restorer
from scorematch.pretrained import cards
from scorematch.restoration import OPERATORS, AveragePool, Observation, Operator, Uncrop
from scorematch.sampling import ParticleSampler, Sampler, SamplerSettings
from tests.helpers import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _saved(ScoreNet.ncsnv2(1, 8, width=4), tmp_path_factory.mktemp("network"))


def _saved(net, path):
    net.save_pretrained(path)
    return str(path)


def _unet(channels, schedule=None, **options):
    """A small U-Net whose output depends on its condition: random weights, and norms over several channels."""
    torch.manual_seed(0)
    schedule = NoiseSchedule([1.0, 0.1, 0.01]) if schedule is None else schedule
    net = ScoreNet.unet(channels, 8, widths=(4, 6), layers_per_block=1, schedule=schedule, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net


def _commands():
    return cli.parsers("scorematch")


# -- All commands


def test_a_module_in_the_cli_package_adds_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        "def add(commands):\n"
        "    parser = commands.add_parser('greet')\n"
        "    parser.add_argument('--name')\n"
        "    parser.set_defaults(run=lambda args: print(f'hello {args.name}'))\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert main(["greet", "--name", "you"]) == 0
    finally:
        sys.modules.pop("scorematch.cli.greet")
    assert capsys.readouterr().out == "hello you\n"


def test_every_module_is_a_command():
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
    assert (
        set(_commands()) == modules >= {"sample", "restore", "train", "evaluate", "convert", "info", "models", "push"}
    )


@pytest.mark.parametrize("name", _commands())
def test_help_of_every_command_has_examples_with_the_program_as_it_was_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/scorematch"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(rf"Examples?:\n  scorematch {name}", printed)
    assert "--debug" in printed and "python -m scorematch" not in printed


def test_the_output_may_have_any_encoding(monkeypatch, tmp_path):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    for i in range(2):
        save_image(torch.rand(1, 4, 4), tmp_path / "images" / f"{i}.png")
    arguments = ["evaluate", str(tmp_path / "images"), str(tmp_path / "images"), "--features", "none", "--quiet"]
    assert main([*arguments, "--no-gaussian"]) == 0
    output.flush()
    assert rb" \xb1 " in output.buffer.getvalue()  # ±


def test_the_output_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["models"]) == 0


@pytest.mark.slow
def test_the_error_output_may_be_closed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["sample", "mnist", str(tmp_path / "digit.png"), "-n", "1", "--levels", "3"]) == 0  # a progress bar
    assert main(["info", str(tmp_path / "none")]) == 2
    sys.stderr.close()


@pytest.mark.parametrize("name", _commands())
def test_options_cannot_be_abbreviated(name, capsys):
    assert _commands()[name].allow_abbrev is False
    with pytest.raises(SystemExit) as ended:
        main([name, "--hel"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["sample", "mnist", "-n", "4", "x.png"], "picture", "x.png"),
        (["sample", "-n", "4", "mnist", "x.png"], "picture", "x.png"),
        (["sample", "mnist", "--gif", "x.png", "--seed", "1"], "picture", "x.png"),
        (["evaluate", "mnist", "--features", "pixels", "-n", "9", "digits"], "reference", "digits"),
        (["demo", "--port", "8000", "./net"], "model", "./net"),
        (["restore", "mnist", "x.png", "out", "--crop", "-9,0,9,9"], "crop", (-9, 0, 9, 9)),  # and may be negative
        (["sample", "mnist", "x.png", "--condition", "-.3,0.7"], "condition", "-.3,0.7"),
    ],
)
def test_options_may_precede_an_optional_argument(options, name, value):
    assert getattr(cli._parsers("scorematch")[0].parse_args(options), name) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: COMMAND. See python -m scorematch --help."),
        (["draw"], "invalid choice: 'draw'"),
        (
            ["sample", "mnist"],
            "the following arguments are required: picture or --out FOLDER. See python -m scorematch sample --help",
        ),
        (["sample", "mnist", "x.png", "--steps", "10"], "--steps 10. Write --calls 8, or .* See .* sample --help"),
        (["sample", "mnist", "-n", "4", "x.png", "y.png"], "unrecognized arguments: (x.png )?y.png."),
        (["evaluate", "mnist", "--reference", "x"], "--reference( x)?. Write the real images after what is measured, "),
        (["restore", "mnist", "x.png", "y", "--mask", "m.png"], "--mask m.png. Write --operator mask:FILE. See"),
        (["train", "x", "--out", "y", "--learning-rate", "1"], "--learning-rate 1. Write --lr 1e-4. See"),
        (["sample", "mnist", "x.png", "--calss", "3"], "--calss 3. The nearest option is --class. See"),
        (["sample", "mnist", "x.png", "--image-size", "9"], "unrecognized arguments: --image-size 9. See"),
        (["sample", "mnist", "x.png", "-n", "few"], "argument -n: must be an integer of at least 1, such as 64, "),
        (["sample", "mnist", "x.png", "-n", "0"], "got '0'. See .* sample --help"),
        (["sample", "mnist", "x.png", "--columns", "0"], "argument --columns: must be an integer of at least 1"),
        (["sample", "mnist", "x.png", "--churn", "-1"], "argument --churn: must be a number of at least 0, got '-1'"),
        (["sample", "mnist", "x.png", "--step-size", "nan"], "argument --step-size: must be a number of more than 0"),
        (["sample", "mnist", "x.png", "--sigma-max", "inf"], "argument --sigma-max: .*, got 'inf'"),
        (["restore", "mnist", "x.png", "y", "--operator", ""], "argument --operator: must not be empty"),
        (["sample", "mnist", "x.png", "--snr", "low"], "argument --snr: .*, got 'low'"),
        (["sample", "mnist", "x.png", "--batch-size", "-1"], "argument --batch-size: must be an integer of at least 1"),
        (["sample", "mnist", ""], "argument picture: must not be empty"),  # an unset variable of a shell
        (["sample", "mnist", "-n", "4", ""], "argument picture: must not be empty"),
        (["sample", "mnist", "--out", ""], "argument --out: must not be empty"),
        (["train", "", "--out", "run"], "argument DATA: must not be empty"),
        (["restore", "mnist", "", "out", "--operator", "gray"], "argument pictures: must not be empty"),
        (["evaluate", "mnist", ""], "argument reference: must not be empty"),
        (["restore", "mnist", "x.png", "out"], "the following arguments are required: --operator"),
    ],
)
def test_wrong_arguments_give_an_error_of_one_line(options, message, capsys):
    assert re.search(message, refused(options, capsys))


@pytest.mark.skipif(os.name == "nt", reason="Windows guesses the home folders of other users")
@pytest.mark.parametrize(
    "options", [["train", "faces", "--out=~$x"], ["restore", "mnist", "~$x", "out", "--operator", "gray"]]
)
def test_a_path_in_an_unknown_home_folder_gives_an_error_of_one_line(options, capsys):
    message = r"the home folder ~\$x is not known; for another file or folder write \./~\$x"
    assert re.search(message, refused(options, capsys))


def test_messages_write_arguments_as_options():
    def written(command):
        with written_by(_commands()[command].written):
            names = [argument("batch_size"), argument("crop", "celeba"), argument("image_size", (48, 64))]
            return [*names, argument("augment", ()), argument("consistent", True), argument("consistent", False)]

    own = ["batch_size", 'crop="celeba"', "image_size=(48, 64)", "augment=()", "consistent=True", "consistent=False"]
    options = ["--batch-size", "--crop celeba", "--image-size 48x64", "--augment", "--consistent", "--no-consistent"]
    assert written("models") == own  # which has no options
    assert written("train") == [*options[:4], *own[4:]]
    assert written("sample") == [options[0], *own[1:4], *options[4:]]
    assert argument("n") == "n" and argument("n", 4, of="bulk_samples") == "bulk_samples(..., n=4)"
    train = _commands()["train"].written
    assert train("ema", (0.05, 0.1), None) == "--ema 0.05 0.1" and train("start", "my run", None) == "--start 'my run'"
    assert train("cache", False, None) == "--no-cache" and train("labels", False, None) == "labels=False"


def test_an_error_during_the_computation_gives_status_1_and_mentions_debug(folder, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("the device\nhas failed.")

    monkeypatch.setattr(cli.models, "table", fail)
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "scorematch: the device has failed. Add --debug for the traceback.\n"


@pytest.mark.parametrize("options", [["--debug", "sample"], ["sample", "--debug"]])
def test_debug_shows_the_traceback(options, capsys):
    assert main([*options, "mnist", "x.png", "--npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("ValueError: --npz is for --out FOLDER. Leave it out.\n")


def test_an_interrupted_command_gives_status_130(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.models, "table", interrupt)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "scorematch: interrupted\n"
    monkeypatch.setattr(cli.train, "check_folder_name", lambda folder: interrupt())
    assert main(["train", "faces", "--out", "run"]) == 130
    assert capsys.readouterr().err == "scorematch: interrupted; repeat the command to continue\n"
    monkeypatch.setattr(cli.ema, "check_new_network", lambda folder, overwrite: interrupt())
    assert main(["ema", "run", "--length", "0.1", "--out", "averaged"]) == 130  # it begins anew
    assert capsys.readouterr().err == "scorematch: interrupted\n"


def test_an_interruption_of_the_imports_shows_no_traceback():
    """Torch is imported after the program has begun, when Ctrl-C has the effect that the system gives it."""
    code = (
        "import os, signal, sys, scorematch.__main__\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['scorematch', 'models']; scorematch.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_second_interruption_at_the_end_of_the_program_is_ignored(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    handlers = []
    monkeypatch.setattr(cli.models, "table", interrupt)
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: handlers.append(arguments))
    monkeypatch.setattr(sys, "argv", ["scorematch", "models"])
    assert main() == 130
    assert handlers == [(signal.SIGINT, signal.SIG_IGN)]


def test_an_error_of_the_operating_system_names_the_file(tmp_path, capsys):
    missing = tmp_path / "missing.pth"
    error = refused(["convert", missing, tmp_path / "network"], capsys)
    assert error == f"scorematch: {missing}: No such file or directory\n"


def test_convert_names_its_options(tmp_path, capsys):
    checkpoint = Path(__file__).parent / "fixtures" / "score_sde" / "checkpoint_1.pth"
    error = refused(["convert", checkpoint, tmp_path / "network"], capsys)
    assert "or a file with the authors' options, as --config." in error


def test_an_error_of_the_operating_system_has_no_number(capsys, monkeypatch):
    def fail():
        raise OSError(errno.ENOSPC, "the checkpoint could not be written to runs/a (No space left on device)")

    monkeypatch.setattr(cli.models, "table", fail)
    error = refused(["models"], capsys)
    assert error == "scorematch: the checkpoint could not be written to runs/a (No space left on device)\n"


@pytest.mark.parametrize(("error", "message"), [(KeyError("x"), "KeyError: 'x'."), (MemoryError(), "MemoryError.")])
def test_an_error_of_another_kind_is_named(error, message, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(cli.models, "table", fail)
    assert main(["models"]) == 1
    assert capsys.readouterr().err == f"scorematch: {message} Add --debug for the traceback.\n"


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli.models, "table", lambda: warnings.warn("something\nis odd.", stacklevel=1))
    shown = warnings.showwarning
    assert main(["models"]) == 0
    assert capsys.readouterr().err == "scorematch: warning: something is odd.\n"
    assert warnings.showwarning is shown


@pytest.mark.slow
def test_output_that_is_not_read_to_the_end_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "scorematch", "models"]
    with open(write, "wb") as output:  # noqa: PTH123  (a descriptor)
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("first", "program"),
    [
        ("/usr/bin/scorematch", "scorematch"),
        ("C:/Scripts/scorematch.exe", "scorematch"),
        ("/usr/lib/python3/scorematch/__main__.py", "python -m scorematch"),
    ],
)
def test_help_and_messages_name_the_program_as_it_was_called(first, program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [first])
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {program} sample ") and f"\n  {program} sample mnist digits.png\n" in printed
    assert refused(["sample", "mnist"], capsys).endswith(f". See {program} sample --help.\n")
    assert f"Write {program} restore for " in refused(["sample", "palette-mnist", "x.png"], capsys)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n  {program} sample mnist digits.png\n" in capsys.readouterr().out


def test_the_script_scorematch_runs_main():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    scripts = re.search(r"^\[project\.scripts\]\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)[1]
    name, module, function = re.fullmatch(r'(\w+) = "([\w.]+):(\w+)"', scripts).groups()
    assert name == "scorematch" and callable(getattr(importlib.import_module(module), function))


def test_python_m_scorematch_prints_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scorematch", "--version"])
    monkeypatch.delitem(sys.modules, "scorematch.__main__", raising=False)  # runpy warns if another test imported it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("scorematch", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_models_lists_all_cards(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for card in cards.CARDS:
        assert (card.repository or "ships with the package") in printed and card.quality in printed
    shipped = re.findall(r"ships with the package in (.*)$", printed, re.MULTILINE)
    assert len(shipped) == sum(card.repository is None for card in cards.CARDS)
    assert all(Path(folder, "README.md").is_file() for folder in shipped)
    for checkpoint in cards.CHECKPOINTS:
        assert checkpoint.address in printed and checkpoint.quality in printed and checkpoint.license in printed


# -- Devices


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_device_auto_is_the_first_available_of_cuda_mps_and_cpu(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == torch.device(device)
    assert find_device("cpu") == torch.device("cpu")


def test_device_auto_is_the_default():
    assert _commands()["sample"].get_default("device") == _commands()["restore"].get_default("device") == "auto"


@pytest.mark.parametrize("name", ["foo", "cuda:", "cuda:x", "gpu", "meta", "cpu:0", ""])
def test_an_unknown_device_name_gives_an_error(name, capsys):
    expected = f"scorematch: --device must be auto, cpu, cuda, cuda:N or mps, got {name!r}.\n"
    assert refused(["sample", "mnist", "x.png", "--device", name], capsys) == expected


def test_an_unavailable_device_gives_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        error = refused(["sample", "mnist", "x.png", "--device", name], capsys)
        assert f"--device {name}: PyTorch finds no CUDA device. Leave out --device." in error
    error = refused(["sample", "mnist", "x.png", "--device", "mps"], capsys)
    assert "PyTorch finds no MPS device" in error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    error = refused(["sample", "mnist", "x.png", "--device", "cuda:2"], capsys)
    assert "--device cuda:2: the last CUDA device is cuda:1." in error


# -- sample


def _sample(folder, picture, *options):
    chain = ["--device", "cpu", "--levels", "3", "--steps-per-level", "1"]
    return main(["sample", folder, str(picture), "-n", "4", *chain, *options])


@pytest.mark.slow
def test_sample_writes_a_picture_and_prints_the_sampler(folder, tmp_path, capsys):
    assert _sample(folder, tmp_path / "a.png", "--quiet") == 0
    printed = capsys.readouterr()
    assert "3 levels 50 -> 0.01, 1 step" in printed.out and str(tmp_path / "a.png") in printed.out
    assert printed.err == ""
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (22, 22)


def test_durations_as_text():
    expected = {0.2: "1 s", 89: "89 s", 91: "2 min", 5000: "83 min", 36_000: "10.0 h", 1e9: "11,574 days"}
    assert {seconds: duration(seconds) for seconds in expected} == expected


@pytest.mark.slow
def test_the_seed_determines_the_picture(folder, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert _sample(folder, tmp_path / f"{name}.png", "--seed", str(seed), "--quiet", "--no-exact-noise") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_one_image_has_no_border(folder, tmp_path, capsys):
    assert _sample(folder, tmp_path / "one.png", "-n", "1", "--quiet") == 0
    assert "1 image in" in capsys.readouterr().out
    assert _sample(folder, tmp_path / "four.png", "--quiet", "--columns", "4") == 0
    one, four = read_image(tmp_path / "one.png", 1), read_image(tmp_path / "four.png", 1)
    assert one.shape == (1, 8, 8) and four.shape == (1, 12, 42)


@pytest.mark.slow
def test_an_existing_picture_is_overwritten_only_with_the_option(folder, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "a.png"
    save_image(torch.zeros(1, 3, 3), picture)
    before = picture.read_bytes()
    assert _sample(folder, picture, "--quiet") == 2
    printed = capsys.readouterr()
    expected = f"scorematch: {picture} exists already. Choose another name, or add --overwrite to replace it.\n"
    assert printed.err == expected and printed.out == ""  # the error comes before sampling
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _sample(folder, "~/a.png", "--quiet") == 2
    assert capsys.readouterr().err == expected
    assert picture.read_bytes() == before
    assert _sample(folder, picture, "--quiet", "--overwrite") == 0
    assert read_image(picture, 1).shape == (1, 22, 22)


@pytest.mark.slow
def test_the_recommended_sampler_is_used(tmp_path, capsys):
    net = _unet(1, NoiseSchedule.geometric(1, 0.01, 20))
    net.sampler_settings = SamplerSettings(sampler="ode", levels=4)
    command = [
        "sample",
        _saved(net, tmp_path / "network"),
        str(tmp_path / "a.png"),
        "-n",
        "1",
        "--quiet",
        "--overwrite",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("ODESampler(4 levels 1 -> 0.01")
    assert main([*command, "--levels", "3"]) == 0
    assert capsys.readouterr().out.startswith("ODESampler(3 levels 1 -> 0.01")
    assert main([*command, "--levels", "3", "--steps-per-level", "1"]) == 0
    assert capsys.readouterr().out.startswith("AnnealedLangevinSampler(3 levels 1 -> 0.01")


@pytest.mark.slow
def test_levels_keeps_the_recommended_kind_of_sampling(tmp_path, capsys):
    net = _unet(1, NoiseSchedule.geometric(1, 0.01, 20))
    net.sampler_settings = SamplerSettings(levels=15, step_size=4e-5, consistent=True)
    folder, out = _saved(net, tmp_path / "network"), str(tmp_path / "a.png")
    for options, expected in [
        ([], "15 levels 1 -> 0.01, 1 step, step 4e-05, consistent, 15 network calls"),
        (["--levels", "10"], r"10 levels 1 -> 0.01, 1 step, step \S+, consistent, 10 network calls"),
        (["--no-consistent", "--levels", "3", "--steps-per-level", "2"], "3 levels .*, 2 steps, .*, 7 network calls"),
    ]:
        assert main(["sample", folder, out, "-n", "1", "--quiet", "--overwrite", *options]) == 0
        printed = capsys.readouterr().out.splitlines()[0]
        assert re.fullmatch(rf"AnnealedLangevinSampler\({expected}\)", printed), printed


def test_sample_draws_a_class(folder, tmp_path, capsys):
    classes = _saved(_unet(1, classes=3), tmp_path / "network")
    for name, label in [("a", "0"), ("b", "0"), ("c", "2")]:
        assert _sample(classes, tmp_path / f"{name}.png", "--quiet", "--class", label) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert _sample(_saved(_unet(1, classes=3, null_class=True), tmp_path / "null"), tmp_path / "0.png", "--quiet") == 0
    sample = ["sample", classes, tmp_path / "d.png"]
    assert "is class-conditional. Write --class K, with K from 0 to 2." in refused(sample, capsys)
    for label in ("3", "-1"):
        error = refused([*sample, "--class", label], capsys)
        assert "--class must be a number from 0 to 2, random or cycle for " in error and f"got {label}." in error
    error = refused(["sample", folder, tmp_path / "d.png", "--class", "1"], capsys)
    assert "--class is for class-conditional networks, and" in error and "is not one" in error
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing", "x.png"], "'nothing' is not the short name of a network; the short names are 'mnist', "),
        (["mnist", "x.png", "--step-size", "1"], "stability limit"),
        (["palette-mnist", "x.png"], "palette-mnist takes an image as its condition. Write python"),
    ],
)
def test_sample_gives_an_error_of_one_line(options, message, capsys):
    assert message in refused(["sample", *options], capsys)


def _restoring(network, folder):
    """A command that restores a picture, which it writes."""
    save_image(torch.rand(1, 8, 8), folder / "damaged.png")
    return ["restore", network, folder / "damaged.png", folder / "restored", "--operator", "pool:2"]


def test_restore_with_a_network_that_draws_no_pictures_gives_an_error(tmp_path, capsys):
    folder = _saved(_unet(2), tmp_path / "network")
    error = refused(_restoring(folder, tmp_path), capsys)
    assert "1 or 3 channels, but the sample_shape of" in error and "is (2, 8, 8)" in error


@pytest.mark.slow
def test_a_checkpoint_without_the_size_of_its_images_is_converted_but_not_sampled(tmp_path, capsys):
    torch.manual_seed(0)
    net = ScoreNet.ncsn(1, width=4, image_size=8)
    torch.save([net.backbone.state_dict(), {}], tmp_path / "checkpoint.pth")
    assert main(["convert", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out")]) == 0
    line = "The checkpoint does not contain the size of the images. The other commands need it: add --config."
    assert line in capsys.readouterr().out.splitlines()
    error = refused(["sample", tmp_path / "out", tmp_path / "a.png"], capsys)
    assert error == (
        f"scorematch: the size of the images of {tmp_path / 'out'} is not stored with it. Convert the checkpoint with "
        "--config, or sample from the network in Python with shape=.\n"
    )


@pytest.mark.parametrize("value_range", [None, (-1, 1)])
def test_restore_with_a_network_of_another_value_range_gives_an_error(tmp_path, value_range, capsys):
    net = ScoreNet.ncsnv2(1, 8, width=4)
    net.value_range = value_range
    net.save_pretrained(tmp_path / "network")
    error = refused(_restoring(tmp_path / "network", tmp_path), capsys)
    assert "must draw images in [0, 1], but the value_range of" in error


def test_an_unknown_picture_format_gives_an_error_before_sampling(folder, capsys):
    assert main(["sample", folder, "picture.unknown"]) == 2
    printed = capsys.readouterr()
    assert "such as .png" in printed.err and "call" not in printed.out


def test_a_folder_without_write_access_gives_an_error_before_sampling(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["sample", folder, str(tmp_path / "file" / "picture.png")]) == 2
    printed = capsys.readouterr()
    assert "cannot be written to" in printed.err and "calls" not in printed.out


# -- restore


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b"):
        save_image(torch.rand(1, 8, 8), tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def _restore_options(folder, pictures, out, *options):
    chain = ["--device", "cpu", "--levels", "3", "--steps-per-level", "1", "--quiet", "-n", "2"]
    return ["restore", folder, str(pictures), str(out), *chain, *options]


def _restore(*arguments):
    return main(_restore_options(*arguments))


def test_restore_writes_pictures_and_strips(folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert _restore(folder, pictures, out, "--operator", "uncrop:left=2,bottom=4") == 0
    names = ["a-1.png", "a-2.png", "a-strip.png", "b-1.png", "b-2.png", "b-strip.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    restored, seen = read_image(out / "b-2.png", 1), read_image(pictures / "b.png", 1)
    assert restored.shape == (1, 12, 10)
    assert torch.equal(restored[:, :8, 2:], seen)  # bit for bit
    assert read_image(out / "b-strip.png", 1).shape == (1, 12 + 4, 3 * 12 + 2)
    printed = capsys.readouterr()
    assert printed.err == ""


@pytest.mark.slow
def test_restore_with_degrade_shows_the_original_last(folder, pictures, tmp_path):
    seen = torch.arange(8).expand(8, 8) < 4
    save_image(seen[None].float(), tmp_path / "mask.png")
    out = tmp_path / "out"
    options = ("--operator", f"mask:{tmp_path}/mask.png", "--degrade")
    assert _restore(folder, pictures / "a.png", out, *options) == 0
    whole, restored = read_image(pictures / "a.png", 1), read_image(out / "a-1.png", 1)
    assert torch.equal(restored[0][seen], whole[0][seen])
    strip = read_image(out / "a-strip.png", 1)
    assert strip.shape == (1, 12, 4 * 10 + 2)
    assert torch.equal(strip[:, 2:10, -10:-2], whole)
    assert (strip[:, 2:10, 6:10] == 0).all()  # the strip begins with what was observed, the left half


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("guide", ("--operator", "jpeg:10")),
        ("replace", ("--operator", "pool:2")),
        ("guide", ("--operator", "pool:2", "--sigma", "0.1")),
    ],
)
def test_restore_with_every_operator_and_method(folder, pictures, tmp_path, method, options):
    assert _restore(folder, pictures / "a.png", tmp_path / "out", *options, "--restore-method", method) == 0
    height = 8 if "jpeg" in options[1] else 16
    assert read_image(tmp_path / "out" / "a-1.png", 1).shape == (1, height, height)


@pytest.mark.slow
def test_restore_writes_the_uncertainty(folder, pictures, tmp_path, capsys):
    out, options = tmp_path / "out", ("--operator", "uncrop:left=2", "--uncertainty")
    assert _restore(folder, pictures / "a.png", out, *options) == 0
    names = ["a-1.png", "a-2.png", "a-deviation.png", "a-mean.png", "a-strip.png", "a-uncertainty.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
    draws = torch.stack([read_image(out / f"a-{k}.png", 1) for k in (1, 2)])
    found = np.load(out / "a-uncertainty.npz")
    rounding = 0.5 / 255
    assert np.abs(found["mean"] - draws.mean(0).numpy()).max() <= rounding + 1e-6
    assert np.abs(found["quantiles"] - draws.sort(0).values[[0, 0, 1]].numpy())[[0, 2]].max() <= rounding + 1e-6
    assert found["levels"].tolist() == [0.05, 0.5, 0.95] and (found["deviation"][..., 2:] == 0).all()
    assert torch.equal(read_image(out / "a-mean.png", 1)[..., 2:], read_image(pictures / "a.png", 1))
    shown = read_image(out / "a-deviation.png", 3)
    assert shown.shape[1] == 256 and (shown[:, :, 64:320] == 0).all()  # what is known has the deviation 0
    most = int(torch.as_tensor(found["deviation"])[0, :, :2].argmax())
    row, column = 32 * (most // 2) + 16, 32 * (most % 2) + 16
    assert shown[:, row, column].tolist() == pytest.approx([1, 1, 224 / 255])
    error = refused(_restore_options(folder, pictures, tmp_path / "one", *options, "-n", "1"), capsys)
    assert "--uncertainty needs several restorations, got -n 1. Write -n 20." in error


@pytest.mark.slow
def test_restore_with_particles_prints_the_evidence(folder, pictures, tmp_path, capsys):
    options = ["--levels", "3", "-n", "2", "--particles", "4", "--sigma", "0.2", "--restore-method", "guide"]
    save_image(torch.rand(1, 8, 6), pictures / "a.png")
    command = ["restore", folder, str(pictures / "a.png"), str(tmp_path / "out"), "--operator", "uncrop:left=2"]
    assert main([*command, *options, "--device", "cpu", "--quiet"]) == 0
    operator, y = Uncrop(left=2), read_image(pictures / "a.png", 1)[None]
    sampler = ParticleSampler(ScoreNet.from_pretrained(folder).inference_copy(), levels=3, particles=4, restore="guide")
    found = sampler.population(
        Observation(operator, y, 0.2), generator=[seed_of(0, "restoration", "a", k) for k in range(2)], progress=False
    )
    evidence = float(found.log_evidence.logsumexp(0)) - math.log(2)
    printed = re.search(r"a-strip\.png: log p\(y\) (\S+)\n", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(evidence, rel=1e-4)


@pytest.mark.slow
def test_restore_colors_gray_pictures(tmp_path, pictures, capsys):
    rgb = _saved(ScoreNet.ncsnv2(3, 8, width=4), tmp_path / "rgb")
    assert _restore(rgb, pictures / "a.png", tmp_path / "out", "--operator", "gray") == 0
    assert read_image(tmp_path / "out" / "a-1.png", 3).shape == (3, 8, 8)
    assert "pixels in" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """The folders of two networks that differ in whether their output depends on the condition."""
    folders, net = {}, _unet(3, condition_channels=3)
    for name, shown in [("seeing", 1), ("blind", 0)]:
        with torch.no_grad():
            net.backbone.conv_in.weight[:, 3:] *= shown
        folders[name] = _saved(net, tmp_path_factory.mktemp(name))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--operator", "gray"), ("--operator", "uncrop:left=4"), ("--operator", "jpeg:10")]
)
def test_restore_passes_the_degraded_image_to_a_conditional_network(tmp_path, conditional, pictures, options):
    """The result depends on the condition, not only on the observation."""
    drawn = {}
    for name, folder in conditional.items():
        assert _restore(folder, pictures / "a.png", tmp_path / f"{name}-out", *options) == 0
        drawn[name] = read_image(tmp_path / f"{name}-out" / "a-1.png", 3)
    assert drawn["seeing"].shape == (3, 8, 12 if "uncrop" in options[1] else 8)
    assert not torch.equal(drawn["seeing"], drawn["blind"])


@pytest.mark.slow
@pytest.mark.usefixtures("few_levels")
def test_restore_uses_the_sampler_that_suits_the_network(tmp_path, pictures, capsys):
    """The recommended one if the network was trained to restore, otherwise that of the method, or --sampler."""
    conditional, plain = _unet(3, condition_channels=3), _unet(3)
    conditional.sampler_settings = SamplerSettings("ancestral", levels=2, variance="small")
    plain.sampler_settings = SamplerSettings("ode", levels=2)
    for network, options, expected in [
        (conditional, (), "AncestralSampler(2 levels 1 -> 0.01, small variance"),
        (conditional, ("--variance", "large"), "AncestralSampler(2 levels 1 -> 0.01, large variance"),
        (plain, (), "ODESampler(50 levels 1 -> 0.01, dpm-solver++, eta 1.0"),
        (plain, ("--levels", "3"), "ODESampler(3 levels 1 -> 0.01, dpm-solver++, eta 1.0"),
        (plain, ("--restore-method", "guide", "--sampler", "langevin"), "AnnealedLangevinSampler("),
        (plain, ("--method", "heun", "--levels", "4"), "ODESampler(4 levels 1 -> 0.01, heun, 7 network calls)"),
        (plain, ("--variance", "small"), "AncestralSampler("),
    ]:
        common = ("--operator", "gray", "-n", "1", "--device", "cpu", "--quiet", "--overwrite")
        folder = _saved(network, tmp_path / "network")
        assert main(["restore", folder, str(pictures / "a.png"), str(tmp_path / "out"), *common, *options]) == 0
        printed = capsys.readouterr().out
        assert expected in printed, options
        assert printed.endswith(f")\n{tmp_path / 'out'}\n") and "luma" not in printed
    save_image(torch.rand(3, 8, 8), tmp_path / "b.png")
    assert main(["restore", folder, str(tmp_path / "b.png"), str(tmp_path / "out"), *common, "--sampler", "ode"]) == 0
    assert capsys.readouterr().out.startswith("the luma of pictures in color is taken, since gray measures gray images")


@pytest.mark.slow
def test_restore_passes_the_class_to_the_network(tmp_path, pictures, capsys):
    classes = _saved(_unet(1, classes=3), tmp_path / "network")
    for label in ("0", "2"):
        assert _restore(classes, pictures / "a.png", tmp_path / label, "--operator", "pool:2", "--class", label) == 0
    assert (tmp_path / "0" / "a-1.png").read_bytes() != (tmp_path / "2" / "a-1.png").read_bytes()
    arguments = _restore_options(classes, pictures, tmp_path / "out", "--operator", "pool:2")
    assert "is class-conditional. Write --class K" in refused(arguments, capsys)


class Negative(Operator):
    """An operator that is registered in a test."""

    form, help, examples = "negative:TOP", "each value was subtracted from TOP", ("negative:1",)

    def __init__(self, top):
        self.top = top

    def measure(self, x):
        return self.top - x

    def pseudo_inverse(self, y):
        return self.top - y


OWN = """
from scorematch.restoration import AveragePool, Operator

class Scaled(Operator):
    linear = True

    def __init__(self, factor=1):
        self.factor = factor

    def measure(self, x):
        return self.factor * x

class Rows(Operator):
    linear = True

    def measure(self, x):
        return x.mean(-1)

half, number = AveragePool(2), 3
if __name__ == "__main__":
    raise RuntimeError
"""


@pytest.mark.slow
def test_an_operator_of_a_file_runs_its_code_and_says_so(folder, pictures, tmp_path, capsys):
    file, drawn = tmp_path / "mine.py", ("--device", "cpu", "--levels", "2", "--quiet", "--features", "none")
    file.write_text(OWN)
    options = ("--operator", f"{file}:half @ {file}:Scaled:0.5", "--degrade")
    assert _restore(folder, pictures, tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.count(f"running the code of {file}\n") == 2
    whole, strip = (read_image(path, 1) for path in (pictures / "a.png", tmp_path / "out" / "a-strip.png"))
    pooled = AveragePool(2).pseudo_inverse(AveragePool(2).measure(whole[None] / 2))[0]
    torch.testing.assert_close(strip[:, 2:10, 2:10], pooled, rtol=0, atol=1 / 255)
    # What is not an image is shown by its least squares.
    assert _restore(folder, pictures, tmp_path / "rows", "--operator", f"{file}:Rows", "--degrade") == 0
    shown, mean = read_image(tmp_path / "rows" / "a-strip.png", 1), whole.mean(-1, keepdim=True).expand(1, 8, 8)
    torch.testing.assert_close(shown[:, 2:10, 2:10], mean, rtol=0, atol=1 / 255)
    figures = ("--data", str(pictures), *drawn, "--out", str(tmp_path / "figures"))
    assert main(["evaluate", folder, "--restore", f"{file}:Rows", *figures[:-2]]) == 0
    assert main(["evaluate", folder, "--restore", f"{file}:Scaled:0.5", *figures]) == 0
    stored = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert stored["settings"]["operator"].startswith("Scaled(0.5)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:number", "mine.py must have a subclass of scorematch.restoration.Operator with the name 'number'."),
        ("{file}:Scaled:up=3", "mine.py:Scaled:up=3: its arguments are factor=, got 'up'"),
        ("{file}:half:3", "mine.py must have a subclass"),
        ("nothing.py:Scaled", "nothing.py: No such file"),
        ("{file}:Scaled @ sharp", "--operator must be mask:FILE, .* got 'sharp'"),
    ],
)
def test_a_bad_operator_of_a_file_gives_an_error_of_one_line(folder, pictures, tmp_path, text, message, capsys):
    (tmp_path / "mine.py").write_text(OWN)
    options = ("--operator", text.format(file=tmp_path / "mine.py"))
    assert re.search(message, refused(_restore_options(folder, pictures, tmp_path / "out", *options), capsys))


@pytest.mark.slow
def test_a_new_operator_works_in_all_commands_and_in_the_demo(folder, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(OPERATORS, "negative", Negative)
    for command in ("restore", "evaluate", "tune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"{Negative.form}\n      {Negative.help}\n" in capsys.readouterr().out
    options = ("--operator", "negative:1 @ pool:2", "--degrade")
    assert _restore(folder, pictures, tmp_path / "out", *options) == 0
    whole, strip = (read_image(path, 1) for path in (pictures / "a.png", tmp_path / "out" / "a-strip.png"))
    pooled = AveragePool(2).pseudo_inverse(AveragePool(2).measure(whole[None]))[0]
    torch.testing.assert_close(strip[:, 2:10, 2:10], pooled, rtol=0, atol=1 / 255)
    drawn = ("--device", "cpu", "--levels", "2", "--quiet", "--features", "none", "--out", str(tmp_path / "figures"))
    assert main(["evaluate", folder, "--restore", "negative:1", "--data", str(pictures), *drawn]) == 0
    assert json.loads((tmp_path / "figures" / "evaluation.json").read_text())["settings"]["operator"] == "negative:1"
    assert Restorer(ScoreNet.from_pretrained(folder)).operators["negative"] == ("1",)


@pytest.mark.slow
def test_restore_does_not_depend_on_the_other_pictures(folder, pictures, tmp_path):
    """Pictures of the same size are restored together; each restoration has a generator of its own."""
    save_image(torch.rand(1, 8, 12), pictures / "c.png")
    options = ("--operator", "pool:2", "--degrade", "--sigma", "0.1")
    assert _restore(folder, pictures, tmp_path / "all", *options) == 0
    assert _restore(folder, pictures / "b.png", tmp_path / "b", *options, "--batch-size", "1", "-n", "3") == 0
    assert len(list((tmp_path / "all").iterdir())) == 9 and len(list((tmp_path / "b").iterdir())) == 4
    for name in (
        "b-1.png",
        "b-2.png",
    ):  # a larger -n adds restorations; the network rounds differently in other batches
        together, alone = (read_image(tmp_path / out / name, 1) for out in ("all", "b"))
        torch.testing.assert_close(together, alone, rtol=0, atol=1.01 / 255)
    drawn = [read_image(tmp_path / "all" / f"{name}.png", 1) for name in ("a-1", "a-2", "b-1")]
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2)))
    assert read_image(tmp_path / "all" / "c-1.png", 1).shape == (1, 8, 12)


@pytest.mark.slow
def test_restore_draws_a_half_of_each_picture_also_between_a_blur_and_a_mask(folder, pictures, tmp_path):
    """Their masks have the same size and share, and the composition has no gain."""
    save_image((torch.arange(8).expand(1, 8, 8) > 0).float(), tmp_path / "mask.png")
    options = ("--operator", f"mask:{tmp_path}/mask.png @ blur:0.5 @ half", "--degrade", "--levels", "2")
    assert _restore(folder, pictures, tmp_path / "all", *options) == 0
    assert _restore(folder, pictures / "b.png", tmp_path / "b", *options) == 0
    together, alone = (read_image(tmp_path / out / "b-1.png", 1) for out in ("all", "b"))
    torch.testing.assert_close(together, alone, rtol=0, atol=1.01 / 255)


def test_restore_draws_a_hole_in_each_picture_and_restores_all_together(folder, pictures, tmp_path, monkeypatch):
    drawn, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *args, **each: drawn.append(sample(*args, **each)) or drawn[-1])
    options = ("--operator", "hole", "--degrade", "--levels", "2")
    assert _restore(folder, pictures, tmp_path / "all", *options) == 0
    assert [len(images) for images in drawn] == [4]  # two of each picture
    assert _restore(folder, pictures / "b.png", tmp_path / "b", *options) == 0
    together, alone = (read_image(tmp_path / out / "b-1.png", 1) for out in ("all", "b"))
    torch.testing.assert_close(together, alone, rtol=0, atol=1.01 / 255)
    whole = read_image(pictures / "b.png", 1)
    hidden = read_image(tmp_path / "all" / "b-strip.png", 1)[:, 2:10, 2:10] != whole
    assert 0 < hidden.sum() < 64 and torch.equal(together[~hidden], whole[~hidden])


@pytest.mark.parametrize("end", ["", ",invert"])
def test_restore_observes_the_white_or_the_black_part_of_the_mask(folder, pictures, tmp_path, end, capsys):
    white = torch.arange(8).expand(1, 8, 8) < 2
    save_image(white.float(), tmp_path / "mask.png")
    operator = f"mask:{tmp_path}/mask.png{end}"
    assert _restore(folder, pictures / "a.png", tmp_path / "out", "--operator", operator) == 0
    seen = ~white if end else white
    whole, restored = read_image(pictures / "a.png", 1), read_image(tmp_path / "out" / "a-1.png", 1)
    assert torch.equal(restored[seen], whole[seen]) and not torch.equal(restored[~seen], whole[~seen])
    assert f"{75 if end else 25} % of the image is observed with {operator}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_restore_lists_the_broken_pictures_at_the_end_and_restores_the_others(folder, pictures, tmp_path, capsys):
    (pictures / "c.png").write_text("not a picture")
    save_image(torch.rand(1, 8, 7), pictures / "d.png")
    command = _restore_options(folder, pictures, tmp_path / "out", "--operator", "pool:2", "--degrade")
    assert main([*command, "--strict"]) == 2
    printed = capsys.readouterr()
    assert "c.png cannot be read as an image" in printed.err and "network calls" not in printed.out
    assert not (tmp_path / "out").exists()  # all pictures are read before the first is restored
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.err == "scorematch: 2 of the 4 pictures are not restored, as listed above.\n"
    lines = printed.out.splitlines()
    assert lines[-2].startswith(f"not restored: {pictures / 'c.png'} cannot be read as an image")
    assert lines[-1].startswith(f"not restored: {pictures / 'd.png'}: all sides must be multiples of 2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*strip.png")) == ["a-strip.png", "b-strip.png"]


def test_restore_does_not_add_pictures_to_the_folder_that_it_reads(folder, pictures, tmp_path, capsys):
    (tmp_path / "link").symlink_to(pictures)
    error = refused(_restore_options(folder, pictures, tmp_path / "link", "--operator", "jpeg:10"), capsys)
    assert error.endswith(f"would become pictures of the folder {tmp_path / 'link'}. Write to another folder.\n")
    assert sorted(path.name for path in pictures.iterdir()) == ["a.png", "b.png"]


@pytest.mark.slow
def test_restore_prints_the_observed_share_of_the_image(folder, pictures, tmp_path, capsys):
    mask = tmp_path / "mask.png"
    save_image((torch.arange(8).expand(1, 8, 8) < 2).float(), mask)
    for operator, share in [(f"mask:{mask}", 25), ("uncrop:left=8", 50)]:
        assert _restore(folder, pictures, tmp_path / str(share), "--operator", operator) == 0
        line = f"{share} % of the image is observed with {operator}"
        assert capsys.readouterr().out.splitlines().count(line) == 1  # printed once for both pictures
    assert _restore(folder, pictures, tmp_path / "pool", "--operator", "pool:2") == 0
    assert "is observed" not in capsys.readouterr().out


@pytest.mark.slow
def test_restore_prints_differences_from_the_pictures_of_the_network(folder, pictures, tmp_path, capsys):
    assert _restore(folder, pictures, tmp_path / "same", "--operator", "jpeg:10") == 0
    assert "pixels in" not in capsys.readouterr().out
    save_image(torch.rand(3, 8, 8), pictures / "c.png")
    assert _restore(folder, pictures, tmp_path / "other", "--operator", "pool:2") == 0
    lines = capsys.readouterr().out.splitlines()
    differences = [line for line in lines if "pixels in" in line]
    assert differences == [
        f"the image to restore has 16x16 pixels in {color}; images of {folder} have 8x8 pixels in gray: in tiles of "
        "8x8 pixels"
        for color in ("gray", "color")  # once for a.png and b.png, once for c.png
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "gray"], "/a.png: gray needs a network that draws RGB images, and .* draws gray ones"),
        (["--operator", "uncrop:left"], "operator must be uncrop:left=N,.*, such as uncrop:right=4, got 'uncrop:left'"),
        (["--operator", "uncrop:up=3"], "got 'uncrop:up=3'"),
        (["--operator", "uncrop:top=3,top=4"], "got 'uncrop:top=3,top=4': .* named twice"),
        (
            ["--operator", "mask:{pictures}/../gray.png"],
            r"a mask must be black and white, but \d+ of the 64 pixels of .*gray.png are neither dark nor bright",
        ),
        (["--operator", "mask:{pictures}/../nothing.png"], "nothing.png"),
        (["--operator", "mask:{mask}"], "/a.png: the mask must have the size of the picture, 8x8 pixels, or its"),
        (["--operator", "pool:2", "--class", "1"], "--class is for class-conditional networks"),
        (["--operator", "pool:2,invert"], "--operator must be pool:SIZE, such as pool:4, got 'pool:2,invert'"),
        (["--operator", "jpeg:0"], "--operator must be jpeg:QUALITY, such as jpeg:5, got 'jpeg:0': quality must be an"),
        (["--operator", "hole"], "/a.png: hole has a random mask .* Write mask:FILE for .*restore --degrade"),
        (["--operator", "mask:~$x/a.png"], r"the home folder of ~\$x/a.png is not known"),
    ],
)
def test_restore_gives_an_error_of_one_line(folder, pictures, tmp_path, options, message, capsys):
    mask = tmp_path / "mask.png"
    save_image(torch.ones(1, 6, 5), mask)
    save_image(torch.full((1, 8, 8), 0.4), tmp_path / "gray.png")
    options = [option.format(pictures=pictures, mask=mask) for option in options]
    assert main(_restore_options(folder, pictures, tmp_path / "out", *options)) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1
    assert "network calls" not in printed.out  # the error comes before sampling


@pytest.mark.parametrize("name", ["out9.png", "out.JPG"])
def test_restore_rejects_an_output_folder_with_a_picture_extension(folder, pictures, tmp_path, name, capsys):
    error = refused(_restore_options(folder, pictures, tmp_path / name, "--operator", "pool:2"), capsys)
    assert f"the output must be a folder, got the name of a picture, {tmp_path / name}. Write " in error
    assert error.endswith(f"Write {tmp_path / Path(name).stem}.\n")
    assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_restore_overwrites_a_picture_only_with_the_option(folder, pictures, monkeypatch, capsys):
    save_image(torch.rand(1, 8, 8), pictures / "a-1.png")
    before = (pictures / "a-1.png").read_bytes()
    error = refused(_restore_options(folder, pictures / "a.png", pictures, "--operator", "pool:2"), capsys)
    assert "a-1.png exists already. Choose another name, or add --overwrite to replace it." in error
    monkeypatch.setenv("HOME", str(pictures))
    assert refused(_restore_options(folder, pictures / "a.png", "~", "--operator", "pool:2"), capsys) == error
    assert (pictures / "a-1.png").read_bytes() == before
    assert not (pictures / "a-strip.png").exists()
    assert _restore(folder, pictures / "a.png", pictures, "--operator", "pool:2", "--overwrite") == 0
    assert (pictures / "a-1.png").read_bytes() != before and (pictures / "a-strip.png").exists()


def test_restore_rejects_two_pictures_with_the_same_name(folder, pictures, tmp_path, capsys):
    save_image(torch.rand(1, 8, 8), pictures / "a.bmp")
    error = refused(_restore_options(folder, pictures, tmp_path / "out", "--operator", "pool:2"), capsys)
    assert re.search(r"the restorations of .*a.bmp and .*a.png would have the same file names. Rename one", error)
    assert not (tmp_path / "out").exists()
