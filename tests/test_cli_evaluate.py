"""The commands evaluate, tune and diagnose."""

import json
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.cli import tune as command
from scorematch.data import save_image
from scorematch.evaluation import METRICS, evaluate, evaluate_restoration
from scorematch.evaluation.exact import Gaussian
from scorematch.evaluation.features import as_extractor
from scorematch.evaluation.sampler_distance import sampler_variants
from scorematch.restoration.methods import METHODS
from scorematch.sampling import SamplerSettings
from tests.helpers import refused, seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network, and two files of images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=NoiseSchedule.geometric(1, 0.01, 9))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.2)
    net.sampler_settings = SamplerSettings("ode", levels=3)
    path = tmp_path_factory.mktemp("all")
    net.save_pretrained(path / "network")
    for name, number in [("real", 0), ("more", 1)]:
        images = torch.randint(0, 256, (30, 8, 8), generator=seed(number), dtype=torch.uint8)
        np.savez(path / f"{name}.npz", images=images.numpy(), labels=np.arange(30) % 64)
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))


QUIET = ("--device", "cpu", "--quiet")


def _run(*arguments):
    return main([*map(str, arguments), *QUIET])


def _refused(arguments, capsys):
    return refused([*arguments, *QUIET], capsys)


# -- evaluate


@pytest.mark.filterwarnings("ignore:1 of the 4 images")
@pytest.mark.parametrize("restore", [(), ("--restore", "uncrop:left=2", "--levels", "2", "--draws", "1")])
def test_evaluate_leaves_out_broken_images_and_says_so(folder, tmp_path, restore, capsys):
    for i in range(4):
        save_image(torch.rand(1, 8, 8), tmp_path / "images" / f"{i}.png")
    broken = tmp_path / "images" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    given = (
        (folder / "network", tmp_path / "images", *restore) if restore else (tmp_path / "images", folder / "real.npz")
    )
    command = ("evaluate", *given, "--features", "none", "--out", tmp_path / "out")
    assert _run(*command) == 2
    printed = capsys.readouterr()
    assert printed.out.endswith(f"left out, since it cannot be read: {broken}\n")
    assert printed.err.endswith("scorematch: 1 image left out, as listed above.\n")
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["skipped"] == [str(broken)] and set(stored["sizes"].values()) <= {3, 30}
    assert f"- {broken}" in (tmp_path / "out" / "evaluation.md").read_text()
    assert "1.png cannot be read as an image" in _refused([*map(str, command), "--strict"], capsys)


def test_an_interruption_says_whether_the_same_command_continues(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    np.save(tmp_path / "data.npy", 9 * np.random.default_rng(0).standard_normal((9, 1, 8, 8), np.float32))
    real = (folder / "real.npz", "--features", "none")
    for function, words, continues in [
        ("evaluate_restoration", [*real, "--restore", "pool:4"], "the same command begins anew"),
        ("evaluate", real, "repeat the command to continue"),
        ("evaluate", [tmp_path / "data.npy"], "the same command begins anew"),  # whose samples are not kept
    ]:
        monkeypatch.setattr(f"scorematch.cli.evaluate.{function}", interrupted)
        assert _run("evaluate", folder / "network", *words, "--out", tmp_path / "out") == 130
        assert capsys.readouterr().err == f"scorematch: interrupted; {continues}\n"


@pytest.mark.slow
def test_evaluate_a_network(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("-n", 6, "--features", "pixels", "--metrics", "precision-recall", "--seed", 3, "--levels", 2)
    held_out = ("--held-out", folder / "more.npz", "--out", out)
    assert _run("evaluate", folder / "network", folder / "real.npz", *options, *held_out) == 0
    printed = capsys.readouterr()
    first, drawing, features, *others = printed.out.splitlines()
    assert re.fullmatch(r"about \d+ s for 6 images", drawing)
    assert re.fullmatch(r"about \d+ s for the features of 18 images, and \d+ s for each 1,000 of the .*", features)
    lines = [first, *others]
    assert lines[0].startswith("ODESampler(2 levels") and printed.err == ""
    assert lines[1] == "|  | samples | held-out images | Gaussian | reference |"
    assert lines[2:4] == ["| --- | --- | --- | --- | --- |", "| number of images | 6 | 6 | 6 | 30 |"]
    assert any(line.startswith("| recall ↑ | ") for line in lines) and lines[-1] == str(out / "evaluation.md")
    stored = json.loads((out / "evaluation.json").read_text())
    expected = evaluate(
        folder / "network",
        folder / "real.npz",
        n=6,
        features="pixels",
        metrics=["precision-recall"],
        seed=3,
        sampler=SamplerSettings("ode", levels=2),
        held_out=folder / "more.npz",
        progress=False,
    )
    assert stored["settings"] == expected.settings and stored["name"] == str(folder / "network")
    assert stored["figures"] == json.loads(expected.to_json())["figures"]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert _run("evaluate", folder / "network", folder / "real.npz", *options, *held_out) == 0
    assert "s for 6 images" not in capsys.readouterr().out  # they exist
    about = json.loads((out / "samples" / "samples.json").read_text())["about"]
    assert about == {"network": str(folder / "network")}


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.* is singular:UserWarning")
def test_evaluate_takes_inception_by_default(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "scorematch.cli.options.reference.as_extractor", lambda name, **_: asked.append(name) or as_extractor("pixels")
    )
    options = ("-n", 6, "--metrics", "precision-recall", "--levels", 2)
    assert _run("evaluate", folder / "network", folder / "real.npz", *options) == 0
    assert asked == ["inception"] and "for the features of 12 images" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_with_guidance(folder, tmp_path):
    """A weight of 1 is the network with the class; another weight draws other samples of the same seeds."""
    net = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, classes=3, null_class=True)
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.normal_(std=0.2, generator=seed(number))
    net.sampler_settings = SamplerSettings("ode", levels=3)
    net.save_pretrained(tmp_path / "network")
    options = ("-n", 4, "--features", "pixels", "--metrics", "precision-recall", "--class", "cycle", "--no-cache")
    found = {}
    for name, given in {"none": (), "1": ("--guidance", 1), "3": ("--guidance", 3)}.items():
        out = tmp_path / name
        assert _run("evaluate", tmp_path / "network", folder / "real.npz", *options, "--out", out, *given) == 0
        found[name] = json.loads((out / "evaluation.json").read_text())["figures"]["samples"]["images"]
    assert found["none"] == found["1"] != found["3"]


@pytest.mark.filterwarnings("default:.* is singular:UserWarning")
def test_evaluate_images(folder, capsys):
    options = ("--features", "pixels", "--no-gaussian", "--no-cache")
    assert _run("evaluate", folder / "more.npz", folder / "real.npz", *options) == 0
    printed, warning = capsys.readouterr()
    assert re.fullmatch(r"scorematch: warning: .* is singular.*\n", warning)
    assert printed.startswith("|  | samples | reference |\n") and "| number of images | 30 | 30 |" in printed
    assert (
        "not measured: kernel of pixels, which needs at least 1,000 images in each set, and there are 30\n" in printed
    )


@pytest.mark.slow
def test_evaluate_restorations(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--features", "pixels", "--metrics", "precision-recall", "--draws", 3, "--sigma", 0.1, "--out", out)
    method = ("--restore-method", "guide", "--sampler", "ode", "--levels", 2)
    data = ("--data", folder / "more.npz", "-n", 4)
    assert _run("evaluate", folder / "network", "--restore", "pool:4", *data, *options, *method) == 0
    printed = capsys.readouterr().out
    assert "|  | restored | degraded | original |" in printed
    settings = json.loads((out / "evaluation.json").read_text())["settings"]
    assert (settings["operator"], settings["draws"], settings["sigma"]) == ("pool:4", 3, 0.1)
    assert (
        settings["sampler"]["restore"] == "guide" and settings["reference"]["content"] == settings["images"]["content"]
    )
    assert (out / "restored.png").exists()
    # With a reference and --data, the distances are to the reference; without --data the reference is restored.
    for arguments in [(folder / "real.npz", *data), (folder / "real.npz", "-n", 4)]:
        assert _run("evaluate", folder / "network", *arguments, "--restore", "pool:4", *options, *method) == 0
        settings = json.loads((out / "evaluation.json").read_text())["settings"]
        same = settings["reference"]["content"] == settings["images"]["content"]
        assert same == ("--data" not in arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("few_levels")
def test_restorations_use_the_sampler_that_is_best_for_the_method(folder, tmp_path, capsys):
    """As the command restore does, although the recommended sampler of the network is ode."""
    options = ("--data", folder / "more.npz", "-n", 5, "--features", "pixels", "--metrics", "precision-recall")
    assert _run("evaluate", folder / "network", "--restore", "pool:4", *options, "--out", tmp_path) == 0
    assert capsys.readouterr().out.startswith("ODESampler(50 levels 1 -> 0.01, dpm-solver++, eta 1.0")
    expected = evaluate_restoration(
        folder / "network",
        folder / "more.npz",
        "pool:4",
        n=5,
        features="pixels",
        metrics=["precision-recall"],
        progress=False,
    )
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"] == expected.settings
    assert expected.settings["sampler"]["name"] == "ODESampler"
    for chosen, sampler in [
        (("shift", "--levels", 3), "3 levels 1 -> 0.01, dpm-solver++, eta 1.0, restore shift, 3 network calls"),
        (("guide", "--calls", 2), "2 levels 1 -> 0.01, dpm-solver++, order 1, eta 1.0, restore guide, 2 network calls"),
        (("guide", "--sampler", "ode", "--method", "unipc", "--levels", 4), "4 levels 1 -> 0.01, unipc, restore guide"),
    ]:
        assert _run("evaluate", folder / "network", "--restore", "pool:4", *options, "--restore-method", *chosen) == 0
        assert capsys.readouterr().out.startswith(f"ODESampler({sampler}")


def test_wrong_arguments_of_evaluate_are_refused(folder, capsys):
    network, real = folder / "network", folder / "real.npz"
    extra = "a does not exist. Fetch https://" if find_spec("torch_fidelity") else "need torch_fidelity: pip install"
    for arguments, message in [
        ((network,), "the following arguments are required: reference"),
        ((network, "--restore", "pool:4"), "the following arguments are required: --data DATA"),
        (("palette-mnist", real), "palette-mnist restores images. Add the operator to measure, such as --restore gray"),
        ((network, real, "--features", "fid"), "invalid choice: 'fid'"),
        ((network, real, "--metrics", "fid"), "invalid choice: 'fid'"),
        ((network, real, "-n", 0), "must be an integer of at least 1"),
        ((network, real, "-n", 1, "--features", "pixels"), "at least 2 images, got 1"),
        ((network, folder / "nothing", "--features", "inception", "--weights", folder / "a"), "nothing does not exist"),
        ((network, real, "--features", "pixels", "--weights", "a"), "'pixels' has no weights file"),
        ((network, real, "--features", "pixels", "inception", "--weights", "a"), "--weights is for one extractor"),
        ((network, real, "--features", "inception", "--weights", folder / "a"), extra),
        ((network, real, "--draws", 2), "--draws is for --restore"),
        ((network, real, "--sigma", 0), "--sigma is for --restore"),
        ((network, real, "--restore-method", "guide"), "--restore-method is for --restore"),
        ((network, real, "--labels"), "--labels is for --restore"),
        ((real, real, "--levels", 3), "--levels is for networks, but"),
        ((real, real, "--class", 3), "--class is for networks, but"),
        ((real, real, "--guidance", 3), "--guidance is for networks, but"),
        ((network, real, "--guidance", 3), "--guidance needs a network with a null class"),
        ((network, real, "--restore", "pool:4", "--guidance", 3), "--guidance is not for --restore"),
        ((network, real, "--restore", "pool:4", "--n-classes", 3), "--n-classes is not for --restore"),
        ((real, "--restore", "pool:4", "--data", real), "--restore needs a network, but"),
        ((network, real, "--restore", "pool:4", "--held-out", real), "--held-out is not for --restore"),
        (
            (network, real, "--restore", "smudge", "--features", "pixels"),
            "several of them joined by ' @ ', got 'smudge'",
        ),
        ((network, real, "--class", 3, "--features", "pixels"), "--class is for class-conditional networks"),
        (("nothing.npz", real, "--features", "pixels"), "nothing.npz does not exist"),
        (("nothing", real), "'nothing' is not the short name of a network"),
        (
            (network, real, "--features", "pixels", "--metrics", "kernel", "-n", 6),
            "'kernel' needs at least 1,000 images",
        ),
    ]:
        assert message in _refused(["evaluate", *arguments], capsys), arguments


def test_the_help_lists_all_metrics(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert all(name in printed.replace("- ", "-") for name in METRICS)


@pytest.mark.parametrize("name", ["evaluation.md", "samples.png"])
def test_evaluate_keeps_files_that_it_did_not_write(folder, tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    error = _refused(["evaluate", folder / "network", folder / "real.npz", "--out", tmp_path], capsys)
    assert error == f"scorematch: {tmp_path / name} exists already and would be replaced. Choose another folder.\n"
    assert (tmp_path / name).read_text() == "mine"


# -- tune


def test_tune_keeps_a_network_that_it_did_not_write(folder, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text("mine")
    arguments = ["tune", folder / "network", "--reference", folder / "real.npz", "--out", tmp_path]
    error = _refused(arguments, capsys)
    assert error == f"scorematch: {path} exists already and would be replaced. Choose another folder.\n"
    assert path.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.* is singular:UserWarning")
def test_tune_writes_into_the_folder_of_the_network(folder, tmp_path):
    shutil.copytree(folder / "network", tmp_path / "network")
    options = ("--reference", folder / "real.npz", "--features", "pixels", "-n", 4, "--calls", 5)
    for _ in range(2):  # it also continues there
        assert _run("tune", tmp_path / "network", *options, "--out", f"{tmp_path}/./network") == 0
    assert (tmp_path / "network" / "README.md").is_file()


@pytest.mark.filterwarnings("default:.* is singular:UserWarning")
def test_tune_stores_the_best_settings(folder, tmp_path, capsys):
    out = tmp_path / "tuned"
    options = ("--reference", folder / "real.npz", "--features", "pixels", "-n", 4, "--calls", 19, "--out", out)
    assert _run("tune", folder / "network", *options, "--held-out", folder / "more.npz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 settings with 42 network calls per sample"  # the network's own, and two more
    assert lines[1].startswith("| sampler settings | calls | frechet, pixels |") and lines[-1] == str(out)
    stored = ScoreNet.from_pretrained(out).sampler_settings
    assert lines[-2] == f"recommended: {stored}" and f"| **{stored}** |" in "\n".join(lines)


@pytest.mark.filterwarnings("default:.* is singular:UserWarning")
def test_tune_counts_the_settings_that_it_measures(folder, tmp_path, monkeypatch, capsys):
    """Each once, and none with more network calls than --calls."""
    monkeypatch.setattr(command, "settings_learned", lambda *_, **__: [])
    twice = [SamplerSettings("ode", levels=3), SamplerSettings("ode", levels=30), SamplerSettings("ode", levels=3)]
    monkeypatch.setattr(command, "settings_of_paths", lambda *_, **__: [])
    monkeypatch.setattr(command, "settings_with_few_calls", lambda *_: twice)
    options = ("--reference", folder / "real.npz", "--features", "pixels", "-n", 4, "--calls", 5)
    assert _run("tune", folder / "network", *options, "--learn", 4) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "1 setting with 5 network calls per sample"
    assert len([line for line in lines if line.startswith("|")]) == 2 + 1  # below the head


@pytest.mark.slow
def test_tune_of_restorations(folder, tmp_path, capsys):
    levels = NoiseSchedule.geometric(1, 0.01, 9)
    network = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, condition_channels=1, schedule=levels)
    network.save_pretrained(tmp_path / "palette")
    options = ("--reference", folder / "real.npz", "-n", 3, "--calls", 18, "--out", tmp_path / "tuned")
    assert _run("tune", tmp_path / "palette", "--restore", "pool:2", "pool:4", *options) == 0
    printed = capsys.readouterr().out
    assert "| sampler settings | calls | pool:2: rmse | pool:4: rmse | mean: rmse | seconds |" in printed
    assert (tmp_path / "tuned" / "tune.json").is_file() and f"{tmp_path / 'tuned'}\n" in printed


@pytest.mark.slow
def test_wrong_arguments_of_tune_are_refused(folder, capsys):
    network, reference = folder / "network", ("--reference", folder / "real.npz")
    for arguments, message in [
        ((network,), "the following arguments are required: --reference"),
        ((network, *reference, "--features", "pixels", "inception"), "--features must be one extractor"),
        ((network, *reference, "--by", "precision"), "invalid choice: 'precision'"),
        ((network, *reference, "--out", "a.png"), "must be a folder, got the name of a picture"),
        (
            (network, *reference, "--features", "pixels", "--calls", 1),
            "no settings have at most 1 network calls per image: the fewest are 5. Write --calls 5.",
        ),
        (
            (network, *reference, "--features", "pixels", "--cache", "a", "--no-cache"),
            "--cache and --no-cache cannot be combined. Leave out one.",
        ),
        ((network, *reference, "--calls", 5, "--learn", 4, 6), "--learn 6 has more network calls than --calls 5."),
        (("nothing", *reference), "'nothing' is not the short name of a network"),
        ((network, *reference, "--by", "rmse"), "by must be one of 'frechet', 'kernel' for pictures, got 'rmse'"),
        ((network, *reference, "--restore", "pool:2", "--class", 1), "--class is not for --restore. Leave it out."),
        (
            (network, *reference, "--restore", "pool:2", "--held-out", "a"),
            "--held-out is not for --restore. Leave it out",
        ),
        ((network, *reference, "--restore", "pool:2"), "--restore is for networks that were trained to restore, and"),
        (
            ("palette-mnist", *reference),
            "palette-mnist restores images. Add the operators to measure, such as --restore",
        ),
    ]:
        assert message in _refused(["tune", *arguments], capsys), arguments


# -- diagnose


@pytest.mark.parametrize(
    ("options", "head", "rows"),
    [
        ((), "| sigma | loss | norm | calibration | denoised | slope | bias |", 16),
        pytest.param(
            ("--samplers", "--size", 2, "-n", 20),
            "| name | calls | mean | covariance | energy |",
            1 + 5 * len(sampler_variants(Gaussian([0.0], 1.0, schedule=NoiseSchedule.geometric(10, 0.01, 20)))),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--posterior", "pool:2", "--size", 2, "--sigma", 0.1, "-n", 100),
            "| method | coverage, nominal 50.0% | coverage, nominal 90.0% | spread | shift | p value |",
            1 + len(METHODS),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_diagnose_prints_a_table(folder, options, head, rows, capsys):
    assert _run("diagnose", folder / "network", folder / "real.npz", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == head and len(lines) == 2 + rows and " ± " in lines[-1]


@pytest.mark.slow
def test_wrong_arguments_of_diagnose_are_refused(folder, capsys):
    both = (folder / "network", folder / "real.npz")
    for arguments, message in [
        ((*both, "--sigma", 1), "--sigma is for --posterior. Leave it out."),
        ((*both, "--size", 4), "--size is for --samplers and --posterior. Leave it out."),
        ((*both, "--samplers", "--posterior", "gray"), "not allowed with argument"),
        ((*both, "--posterior", "smudge"), "'smudge'"),
        ((*both, "--posterior", "jpeg:5"), "must be linear"),
        ((*both, "--posterior", "pool:2", "-n", 10), "need at least 100 observations, got 10"),
        ((folder / "network", folder / "nothing"), "nothing does not exist"),
        (("palette-mnist", folder / "real.npz"), "palette-mnist needs a condition for each image. Write level_losses("),
    ]:
        assert message in _refused(["diagnose", *arguments], capsys), arguments
