"""The commands info and push, and the protection of a network that is in the folder to write."""

import copy
import json

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import info, main
from scorematch.sampling import SamplerSettings
from scorematch.training.flops import sampling_flop
from tests.helpers import refused
from tests.hub_server import Hub, environment


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        schedule = NoiseSchedule.geometric(2, 0.01, 12)
        net = ScoreNet.unet(
            1, (8, 12), widths=(4, 6), layers_per_block=1, schedule=schedule, classes=3, null_class=True
        )
    net.sampler_settings = SamplerSettings("ode", levels=5)
    return net


@pytest.fixture
def folder(net, tmp_path):
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture(autouse=True)
def _no_count_of_operations(monkeypatch):
    """The first count of a process imports torch's compiler, which takes a second."""
    monkeypatch.setattr(info, "sampling_flop", lambda net: 1.5e9)


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """A client of the Hub without a token, for which every request is an error."""

    def request(*arguments, **options):
        raise AssertionError("a request")

    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(ScoreNet, "push_to_hub", request)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def run(forks, hub, tmp_path):
    """Runs a command in a process whose Hub is the local server; returns its status, its output and its errors."""

    def run(*arguments, **variables):
        code = f"from scorematch.cli import main\nprint(main({list(map(str, arguments))!r}))"
        _, printed, errors = forks.run(code, tmp_path, {**environment(hub.url, tmp_path / "home"), **variables})
        *lines, status = printed.splitlines(keepends=True)
        return int(status), "".join(lines), errors

    return run


def _lines(capsys):
    """The lines that info printed, by their names."""
    lines = capsys.readouterr().out.splitlines()
    return {line[:13].strip(): line[13:] for line in lines}


# -- info


def test_info_about_a_folder_needs_no_weights(net, folder, capsys):
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert main(["info", str(folder)]) == 0
    assert _lines(capsys) == {
        "network": str(folder),
        "weights": f"the folder {folder}",
        "license": "not stated",
        "family": 'unet, preconditioning "karras"',
        "parameters": f"{sum(each.numel() for each in net.parameters()):,}",
        "computation": "1.5 GFLOP per network call and image",
        "images": "1x8x12, values in [0, 1]",
        "condition": "3 classes, 0 to 2, or no class",
        "noise levels": "12, sigma from 2 to 0.01",
        "sampler": "ODESampler(5 levels 2 -> 0.01, heun, 9 network calls)",
    }


def test_info_about_a_network_with_names_of_classes(net, tmp_path, capsys):
    named = copy.deepcopy(net)
    named.class_names = ["cat", "cow", "dog"]
    named.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert _lines(capsys)["condition"] == "3 classes: 0 cat, 1 cow, 2 dog, or no class"


def test_info_about_a_network_whose_size_does_not_fit_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(info, "sampling_flop", sampling_flop)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sample_shape": [1, 8, 1]}))
    assert main(["info", str(folder)]) == 0
    assert _lines(capsys)["computation"].startswith("unknown: every side of x must be at least ")


def test_info_about_a_folder_takes_a_tilde(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["info", f"~/{folder.name}"]) == 0
    said = _lines(capsys)
    assert said["weights"] == f"the folder {folder}" and said["license"] == "mit"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlibrary_name: scorematch\nlicense: mit\n---\n# Net\n", "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", "not stated"),
        ("---\nlicense: \33[2Jmit\n---\n", r"'\x1b[2Jmit'"),  # which would clear the terminal
        ("# Net\n", "not stated"),
    ],
)
def test_info_has_the_license_in_the_metadata_of_the_readme(folder, text, expected, capsys):
    (folder / "README.md").write_text(text)
    assert main(["info", str(folder)]) == 0
    assert _lines(capsys)["license"] == expected


def test_info_has_the_license_of_a_pipeline(net, tmp_path, capsys):
    net.save_pretrained(tmp_path / "unet")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["info", str(tmp_path)]) == 0
    assert _lines(capsys)["license"] == "mit"


def test_info_about_a_network_of_the_package(capsys):
    assert main(["info", "palette-mnist"]) == 0
    info = _lines(capsys)
    loaded = ScoreNet.from_pretrained("palette-mnist")
    assert info["parameters"] == f"{sum(each.numel() for each in loaded.parameters()):,}" and info["license"] == "MIT"
    assert info["weights"].startswith("part of the package, in ") and info["quality"].startswith("a classifier")
    assert info["condition"].startswith("an image with 3 channels")
    assert info["sampler"].startswith("AnnealedLangevinSampler(30 levels")


def test_info_about_a_network_of_the_users_own_class(tmp_path, capsys):
    net = ScoreNet(nn.Identity(), NoiseSchedule([1.0, 0.1]), sample_shape=(2,))
    net.sampler_settings = SamplerSettings("ode", levels=2)
    net.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    info = _lines(capsys)
    assert info["class"] == "your own; ScoreNet.from_pretrained needs it as backbone=YourClass()"
    assert {"parameters", "computation", "condition"}.isdisjoint(info)
    assert info["samples"] == "2, values of any size" and info["sampler"] == "sampler ode, levels 2"


@pytest.mark.slow
def test_info_about_a_repository_downloads_only_the_configuration(hub, run, folder):
    hub.repositories["me/net"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["me/net"]["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    _, printed, errors = run("info", "me/net")
    assert f"weights      https://huggingface.co/me/net, commit {hub.commit[:12]}\n" in printed, errors
    assert "license      apache-2.0\n" in printed and "condition    3 classes, 0 to 2, or no class\n" in printed
    assert hub.fetched() == ["README.md", *sorted(path.name for path in folder.glob("*.json"))]
    del hub.repositories["me/net"]["README.md"]
    hub.commit = "f" + hub.commit[1:]
    assert "license      not stated\n" in run("info", "me/net")[1]


def test_info_refuses_what_is_no_network(tmp_path, capsys):
    assert "'nothing' is not the short name of a network" in refused(["info", "nothing"], capsys)
    assert "has no config.json; it holds nothing." in refused(["info", tmp_path], capsys)


# -- push


@pytest.mark.parametrize("of_a_run", [False, True])
def test_push_uploads_the_network_of_a_folder_or_of_a_run(net, folder, tmp_path, monkeypatch, of_a_run, capsys):
    calls = []

    def push_to_hub(self, repo_id, **options):
        calls.append((repo_id, options))
        state, other = self.backbone.state_dict(), net.backbone.state_dict()
        assert all(torch.equal(state[name], other[name]) for name in other)
        return "https://huggingface.co/me/net/commit/0123"

    if of_a_run:
        (tmp_path / "run").mkdir()
        folder = folder.rename(tmp_path / "run" / "network").parent
        (folder / "config.json").write_text('{"images": 8}')  # the record of the run
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(ScoreNet, "push_to_hub", push_to_hub)
    assert main(["push", str(folder), "me/net", "--private", "--license", "mit", "--message", "the first"]) == 0
    assert main(["push", str(folder), "me/net"]) == 0
    assert capsys.readouterr().out == 2 * "https://huggingface.co/me/net\n"
    assert calls == [
        ("me/net", {"license": "mit", "private": True, "commit_message": "the first"}),
        ("me/net", {"license": None, "private": None, "commit_message": "Upload a score network"}),
    ]


@pytest.mark.slow
def test_a_pushed_network_is_in_the_repository(hub, run, folder):
    hub.writer = "secret"
    status, printed, errors = run("push", folder, "me/net", "--license", "mit", HF_TOKEN="secret")  # noqa: S106
    assert (status, printed) == (0, f"{hub.url}/me/net\n"), errors
    held = hub.repositories["me/net"]
    assert b"\nlicense: mit\n" in held["README.md"]
    assert all(held[path.name] == path.read_bytes() for path in folder.iterdir())
    status, _, errors = run("push", folder, "me/net", HF_TOKEN="another")  # noqa: S106
    assert status == 2 and errors.startswith("scorematch: the Hub refused to write to me/net.")
    hub.stop()
    status, _, errors = run("push", folder, "me/net", HF_TOKEN="secret")  # noqa: S106
    assert status == 2 and errors.startswith("scorematch: uploading to me/net failed: ") and errors.count("\n") == 1


def test_push_refuses_what_is_no_network_before_it_contacts_the_hub(no_token, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    for arguments, message in [
        ((tmp_path / "nothing", "me/net"), "there is no folder"),
        ((tmp_path, "me/net"), "has no config.json"),
        ((folder, "net"), "the repository must be owner/name, got 'net'."),
    ]:
        assert message in refused(["push", *arguments], capsys)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "is not a complete safetensors file" in refused(["push", folder, "me/net"], capsys)


@pytest.mark.parametrize("command", [("push", "me/net"), ("sample", "x.png")])
def test_a_network_of_the_users_own_class_is_left_to_python(command, tmp_path, capsys):
    ScoreNet(nn.Identity(), NoiseSchedule([1.0, 0.1]), sample_shape=(1, 8, 8)).save_pretrained(tmp_path)
    assert refused([command[0], tmp_path, *command[1:]], capsys) == (
        f"scorematch: {tmp_path} has a network of your own class, whose code is not stored. Load it in Python: "
        f'ScoreNet.from_pretrained("{tmp_path}", backbone=YourClass()).\n'
    )


def test_push_without_a_token_says_how_to_log_in(no_token, folder, capsys):
    error = refused(["push", folder, "me/net"], capsys)
    assert "you are not logged in to the Hugging Face Hub. Run hf auth login, or set the environment variable" in error


# -- Networks in the folder to write


def test_convert_and_ema_keep_a_network_in_the_folder(folder, tmp_path, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = f"{folder} has a network already. Choose another folder, or add --overwrite to replace the network."
    for arguments in (["convert", tmp_path / "a.pth", folder], ["ema", tmp_path, "--length", "0.1", "--out", folder]):
        assert message in refused(arguments, capsys)
        assert message not in refused([*arguments, "--overwrite"], capsys)  # there is nothing to read
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    folder.rename(tmp_path / "ema-0.100")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "ema-0.100 has a network already" in refused(["ema", "~", "--length", "0.1"], capsys)
