"""Loading from and uploading to a local server with the Hub's protocol, by the real client in separate processes."""

import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys

import pytest
import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file, save_file

from scorematch import ScoreNet
from scorematch.pretrained import cards
from scorematch.sampling import SamplerSettings
from tests.hub_server import COMMIT, Hub, environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")

DDPM = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a repository with a small DDPM, as on the Hub."""
    folder = tmp_path_factory.mktemp("ddpm")
    torch.manual_seed(0)
    ScoreNet.unet(3, 8, widths=(8, 16), layers_per_block=1, precondition="ddpm").save_pretrained(folder)
    config = _diffusers(json.loads((folder / "config.json").read_text()))
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "weights.bin")
    return {
        "config.json": json.dumps(config).encode(),
        "scheduler_config.json": json.dumps(DDPM).encode(),
        "model_index.json": b"{}",
        "modeling.py": b"print('remote code ran')",
        "README.md": b"a card",
        "images/sample.png": b"not needed",
        "diffusion_pytorch_model.safetensors": (folder / "diffusion_pytorch_model.safetensors").read_bytes(),
        "diffusion_pytorch_model.bin": (folder / "weights.bin").read_bytes(),
    }


def _diffusers(config):
    """A saved configuration as diffusers writes it, without the keys of this package."""
    own = ("format_version", "family", "precondition", "predicts_variance", "sampler_settings", "schedule")
    return {key: value for key, value in config.items() if key not in own}


def _pipeline(files):
    """The same network in the layout of a pipeline."""
    return {
        "model_index.json": b"{}",
        "unet/config.json": files["config.json"],
        "unet/diffusion_pytorch_model.safetensors": files["diffusion_pytorch_model.safetensors"],
        "scheduler/scheduler_config.json": files["scheduler_config.json"],
    }


@pytest.fixture
def hub(files):
    server = Hub()
    server.repositories["someone/ddpm"] = dict(files)
    yield server
    server.stop()


@pytest.fixture
def run(forks, hub, tmp_path):
    """A function that runs code with the server as the Hub and an empty cache, and returns the output."""

    def call(code, *, fails=False, **variables):
        first = "import scorematch.pretrained.hub\nscorematch.pretrained.hub._WAITS = (0.01, 0.02, 0.04)\n"
        code = f"{first}from scorematch import AnnealedLangevinSampler, ScoreNet\n{code}"
        variables = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **variables}
        status, out, error = forks.run(code, tmp_path, {**environment(hub.url, tmp_path / "home"), **variables})
        assert (status != 0) == fails, error
        return error.strip().splitlines()[-1] if fails else out

    return call


SAVED = [
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "model_index.json",
    "schedule.json",
    "scheduler_config.json",
]
LOAD = "net = ScoreNet.from_pretrained('someone/ddpm')\n"


def _errors_of(*calls):
    """Code that prints the error of each call, one line for each."""
    return (
        f"for call in {calls!r}:\n"
        "    try:\n"
        "        exec(call)\n"
        "    except Exception as error:\n"
        "        print(f'{type(error).__name__}: {error}')\n"
    )


@pytest.mark.slow
def test_only_needed_files_are_downloaded_and_then_loaded_from_the_cache(hub, run):
    code = LOAD + (
        "sampler = AnnealedLangevinSampler(net, net.schedule.respaced(3), steps_per_level=1)\n"
        "print(tuple(sampler.sample(2, progress=False).shape))"
    )
    assert run(code) == "(2, 3, 8, 8)\n"
    assert hub.fetched() == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler_config.json",
    ]
    hub.requests.clear()
    assert run(code.replace("'someone/ddpm'", f"'someone/ddpm', revision='{COMMIT}'")) == "(2, 3, 8, 8)\n"
    assert hub.requests == []  # a commit in the cache needs no request
    hub.stop()
    local = code.replace("'someone/ddpm'", "'someone/ddpm', local_files_only=True")
    assert run(f"{code}\n{local}") == 2 * "(2, 3, 8, 8)\n"
    assert run(code, HF_HUB_OFFLINE="1") == "(2, 3, 8, 8)\n"


@pytest.mark.slow
def test_pickled_weights_are_downloaded_if_there_are_no_safetensors(hub, run):
    del hub.repositories["someone/ddpm"]["diffusion_pytorch_model.safetensors"]
    code = LOAD + "print(net.sample_shape)"
    assert run(code) == "(3, 8, 8)\n"
    needed = ["config.json", "diffusion_pytorch_model.bin", "model_index.json", "scheduler_config.json"]
    assert hub.fetched() == needed
    hub.stop()
    assert run(code, HF_HUB_OFFLINE="1") == "(3, 8, 8)\n"


@pytest.mark.slow
def test_pickled_weights_are_used_next_to_safetensors_of_another_network(hub, run):
    held = hub.repositories["someone/ddpm"]
    held["model.safetensors"] = held.pop("diffusion_pytorch_model.safetensors")
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"


@pytest.mark.slow
def test_pipelines_cache_dir_and_redirects_to_another_host(hub, run, files, tmp_path):
    hub.redirect = True
    hub.repositories["someone/pipeline"] = _pipeline(files)
    code = "net = ScoreNet.from_pretrained('someone/pipeline', cache_dir='elsewhere')\nprint(net.sample_shape)"
    assert run(code) == "(3, 8, 8)\n"
    assert (tmp_path / "elsewhere" / "models--someone--pipeline").is_dir()
    assert any(path.startswith("/elsewhere/") for _, path in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ncsn", "unet"])
def test_a_network_of_this_package_on_the_hub(family, hub, run, tmp_path):
    """In both layouts; in that of diffusers the noise levels are in a separate file."""
    net = ScoreNet.ncsn(1, 8, width=2)
    if family == "unet":
        net = ScoreNet.unet(1, 8, widths=(8, 8), layers_per_block=1, precondition="ddpm")
    net.save_pretrained(tmp_path / "ours")
    hub.repositories["someone/net"] = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    code = "net = ScoreNet.from_pretrained('someone/net')\nprint(net.config['family'], len(net.schedule))"
    assert run(code) == f"{family} {len(net.schedule)}\n"
    assert ("schedule.json" in hub.fetched()) == (family == "unet")


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(hub, run):
    hub.cut.add("diffusion_pytorch_model.safetensors")
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"
    assert not hub.cut


@pytest.mark.slow
def test_a_private_repository_needs_a_token(hub, run):
    hub.private["someone/ddpm"] = "secret"
    assert "log in (hf auth login) or pass token=" in run(LOAD, fails=True)
    code = "print(ScoreNet.from_pretrained('someone/ddpm', token='secret').sample_shape)"
    assert run(code) == "(3, 8, 8)\n"


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_gives_an_error_that_names_it(status, hub, run):
    hub.busy = {"GET /api/": [status]}
    error = run(LOAD, fails=True)
    assert error.startswith("PermissionError: the Hub refused to send someone/ddpm.") and "HF_TOKEN" in error


@pytest.mark.parametrize("broken", [pytest.param("silent", marks=pytest.mark.slow), "unavailable", "stopped"])
def test_an_unreachable_hub_gives_one_error(broken, hub, run):
    """For a branch, and for the commit of a card. A request is repeated only if the Hub answers that it is busy."""
    if broken == "stopped":
        hub.stop()
    hub.silent, hub.status = broken == "silent", 503 if broken == "unavailable" else None
    errors = run(_errors_of("ScoreNet.from_pretrained('someone/ddpm')", "ScoreNet.from_pretrained('cifar10')"))
    for repository, error in zip(("someone/ddpm", "google/ddpm-cifar10-32"), errors.splitlines(), strict=True):
        assert error.startswith(
            f"FileNotFoundError: {repository} is not in the cache, or not completely, and the Hub cannot be reached ("
        )
        assert f"ScoreNet.from_pretrained('{repository}') while online" in error
    assert len(hub.requests) == {"stopped": 0, "silent": 2, "unavailable": 8}[broken]


@pytest.mark.slow
def test_with_an_unreachable_hub_the_cache_is_used_after_one_request(hub, run):
    run(LOAD)
    hub.requests.clear()
    hub.silent = True
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"
    assert len(hub.requests) == 1


LOADING_ERRORS = [
    (
        "ScoreNet.from_pretrained('nobody/nothing')",
        "there is no repository 'nobody/nothing' on the Hub, or it is private",
    ),
    ("ScoreNet.from_pretrained('someone/ddpm', revision='v9')", "someone/ddpm has no revision 'v9'"),
    ("ScoreNet.from_pretrained('someone/gated')", "PermissionError: someone/gated is gated: accept its terms at"),
    ("ScoreNet.from_pretrained('someone/text')", "holds no network: expected config.json .* found README.md, data.csv"),
    (
        "ScoreNet.from_pretrained('someone/half')",
        "holds no network: expected diffusion_pytorch_model.* found config.json, model.ckpt, .*fp16.safetensors",
    ),
    ("ScoreNet.from_pretrained('someone/latent')", "is a latent pipeline, with a vqvae/"),
    (
        "ScoreNet.from_pretrained('someone/ddpm', local_files_only=True)",
        "someone/ddpm is not in the cache, .* and local_files_only is set. .* There is no folder of this name either",
    ),
    ("ScoreNet.from_pretrained('someone/a..b')", "'someone/a..b' is not the name of a repository"),
]


@pytest.mark.slow
def test_loading_errors_have_clear_messages(hub, run):
    hub.repositories["someone/text"] = {"README.md": b"", "data.csv": b""}
    whole = hub.repositories["someone/ddpm"]
    configs = {name: whole[name] for name in ("config.json", "scheduler_config.json")}
    half = {"model.ckpt": b"", "pytorch_model.fp16.safetensors": b""}
    hub.repositories["someone/half"] = {**configs, **half}
    index = json.dumps({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}).encode()
    hub.repositories["someone/latent"] = {**_pipeline(whole), "model_index.json": index}
    hub.repositories["someone/gated"] = {}
    hub.gated.add("someone/gated")
    errors = run(_errors_of(*(code for code, _ in LOADING_ERRORS))).splitlines()
    for (_, message), error in zip(LOADING_ERRORS, errors, strict=True):
        assert re.search(message, error), error
    offline = "not in the cache, .* and the Hub cannot be reached .*HF_HUB_OFFLINE.*Download it first"
    assert re.search(offline, run(LOAD, fails=True, HF_HUB_OFFLINE="1"))


@pytest.mark.slow
def test_a_short_name_loads_the_commit_of_its_card(hub, run, files):
    card = cards.find("cifar10")
    hub.commit = card.revision
    hub.repositories[card.repository] = dict(files)
    code = (
        "net = ScoreNet.from_pretrained('cifar10')\n"
        "sampler = AnnealedLangevinSampler(net)\n"
        "print(len(sampler), sampler.consistent, net.schedule)\n"
    )
    assert run(code) == "250 True NoiseSchedule(1000 levels, 78.7 -> 0.005)\n"
    assert any(card.revision in path for _, path in hub.requests)
    hub.requests.clear()
    assert run(code.replace("'cifar10'", "'google/ddpm-cifar10-32'")).startswith("250 True")
    assert hub.requests == []


@pytest.mark.slow
def test_a_card_corrects_the_noise_levels_of_a_repository(hub, run, tmp_path):
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 8, widths=(8, 8), layers_per_block=1, precondition="ncsnpp")
    net.save_pretrained(tmp_path / "ve")
    config = json.loads((tmp_path / "ve" / "config.json").read_text())
    config = {**_diffusers(config), "_class_name": "UNet2DModel", "sample_size": 8}
    weights = load_file(tmp_path / "ve" / "model.safetensors")
    weights["time_proj.weight"] = torch.ones(8)
    weights["time_embedding.linear_1.weight"] = torch.ones(32, 16)
    save_file(weights, tmp_path / "ve" / "diffusion_pytorch_model.safetensors")
    content = (tmp_path / "ve" / "diffusion_pytorch_model.safetensors").read_bytes()
    default = {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 1348, "num_train_timesteps": 2000}
    levels = {"celebahq": 348, "google/ncsnpp-bedroom-256": 378, "google/ncsnpp-church-256": 380}
    levels["google/ncsnpp-ffhq-256"] = 348
    for name in levels:
        hub.repositories[name.replace("celebahq", "google/ncsnpp-celebahq-256")] = {
            "config.json": json.dumps({**config, "time_embedding_type": "fourier"}).encode(),
            "scheduler_config.json": json.dumps(default).encode(),
            "diffusion_pytorch_model.safetensors": content,
        }
    nets = f"nets = [ScoreNet.from_pretrained(name) for name in {list(levels)}]"
    found = run(f"{nets}\nprint(*((net.schedule, net.sampler_settings.options['snr']) for net in nets), sep='\\n')")
    assert found == "".join(f"(NoiseSchedule(2000 levels, {level} -> 0.01), 0.075)\n" for level in levels.values())


@pytest.mark.slow
def test_a_damaged_download_gives_an_error_that_says_what_to_delete(hub, run, tmp_path):
    run(LOAD)
    for name, message in [
        ("diffusion_pytorch_model.safetensors", "is not a complete safetensors file"),
        ("config.json", "config.json is not valid JSON"),
    ]:
        (path,) = (tmp_path / "home").rglob(name)
        blob = path.resolve()
        blob.write_bytes(blob.read_bytes()[:100])
        error = run(LOAD, fails=True)
        assert message in error and error.endswith(
            f"Delete {blob} and load the network again, which downloads it again."
        )
        blob.unlink()
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on the size of files")
def test_a_full_disk_gives_a_clear_error(run):
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + LOAD
    )
    error = run(code, fails=True)
    assert "too large: someone/ddpm could not be written to the cache" in error and "cache_dir=" in error
    code = code.replace(LOAD, "ScoreNet.unet(3, 8, widths=(8, 16), layers_per_block=1).save_pretrained('net')\n")
    error = run(code, fails=True)
    assert error.startswith("OSError: net could not be written") and "too large" in error


@pytest.mark.slow
def test_remote_code_is_neither_downloaded_nor_run(hub, run):
    assert "remote code ran" not in run(LOAD)
    assert not any(file.endswith(".py") for file in hub.fetched())


def _pushed(folder, arguments=""):
    return f"net = ScoreNet.from_pretrained({str(folder)!r})\nprint(net.push_to_hub('me/net'{arguments}))\n"


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 8, widths=(8, 16), layers_per_block=1, precondition="ddpm")
    net.sampler_settings = SamplerSettings(levels=4, steps_per_level=1, exact_noise=True)
    net.half().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.slow
def test_an_uploaded_network_is_downloaded_unchanged(hub, run, saved):
    hub.writer = "secret"
    printed = run(_pushed(saved, ", license='mit', datasets=['cifar10']"), HF_TOKEN="secret")  # noqa: S106
    assert printed == f"{hub.url}/me/net/commit/{hub.commit}\n"
    held = hub.repositories["me/net"]
    assert sorted(held) == [".gitattributes", *SAVED]
    code = (
        "import torch\n"
        f"a, b = ScoreNet.from_pretrained('me/net'), ScoreNet.from_pretrained({str(saved)!r})\n"
        "same = [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]\n"
        "print(all(same), len(same) > 50, a.config == b.config)\n"
    )
    assert run(code) == "True True True\n"


@pytest.mark.slow
def test_the_model_card_of_an_upload_and_the_code_on_it(hub, run, saved):
    hub.writer = "secret"
    run(_pushed(saved, ", license='mit', datasets=['cifar10'], token='secret'"))
    card = hub.repositories["me/net"]["README.md"].decode()
    meta = yaml.safe_load(card.split("---")[1])
    assert meta["library_name"] == "scorematch" and meta["license"] == "mit" and meta["datasets"] == ["cifar10"]
    assert meta["pipeline_tag"] == "unconditional-image-generation"
    assert "sampler langevin, levels 4, steps_per_level 1, exact_noise True" in card
    assert "`net(x, sigma)` is the score of\nimages in [0, 1] with noise of level sigma." in card
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert run(code + "print(tuple(images.shape))\n") == "(4, 3, 8, 8)\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "image", "flow"])
def test_the_code_on_the_model_card_runs_for_every_kind_of_network(hub, run, tmp_path, kind):
    torch.manual_seed(0)
    options = {"class": {"classes": 5}, "image": {"condition_channels": 2}, "flow": {}}[kind]
    net = ScoreNet.unet(1, 8, widths=(8, 8), layers_per_block=1, **options)
    net.sampler_settings = SamplerSettings("ode" if kind == "flow" else "langevin", levels=2)
    net.save_pretrained(tmp_path / "net")
    hub.writer = "secret"
    run(_pushed(tmp_path / "net", ", token='secret'"))
    card = hub.repositories["me/net"]["README.md"].decode()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert run(code + "print(tuple(images.shape))\n") == "(4, 1, 8, 8)\n"
    assert ("image-to-image" in card) == (kind == "image")


@pytest.mark.slow
def test_an_upload_keeps_other_files_and_replaces_the_network(hub, run, saved):
    hub.writer = "secret"
    hub.repositories["me/net"] = {"README.md": b"my words", "notes.txt": b"", "model.safetensors": b"old"}
    run(_pushed(saved, ", token='secret', revision='trial'"))
    held = hub.repositories["me/net"]
    assert sorted(held) == sorted([*SAVED, "notes.txt"])
    assert held["README.md"] == b"my words" and hub.branches == {"me/net": {"trial"}}
    assert any("/commit/trial" in path for _, path in hub.requests)


@pytest.mark.slow
def test_an_upload_replaces_a_pipeline(hub, run, saved, files):
    hub.writer = "secret"
    hub.repositories["me/net"] = _pipeline(files)
    code = "print(ScoreNet.from_pretrained('me/net').sampler_settings.options['levels'])\n"
    assert run(_pushed(saved, ", token='secret'") + code).splitlines()[-1] == "4"
    assert sorted(hub.repositories["me/net"]) == SAVED


@pytest.mark.slow
def test_a_rejected_upload_gives_a_clear_error(hub, run, saved):
    hub.writer = "secret"
    error = run(_pushed(saved, ", token='another'"), fails=True)
    assert error.startswith("PermissionError: the Hub refused to write to me/net") and "hf auth login" in error
    assert "me/net" not in hub.repositories
    error = run(_pushed(saved).replace("me/net", "net"), fails=True)
    assert error == "ValueError: the repository must be owner/name, got 'net'."


# -- A Hub that does not work as it should


WEIGHTS = "diffusion_pytorch_model.safetensors"
AGAIN = " Load it again to continue the download."


def _faults(files):
    """What is wrong -> the attributes of the server, and the error."""
    return {
        "the content is that of another file": (
            {"swapped": {WEIGHTS: files["config.json"]}},
            f"OSError: downloading someone/ddpm failed: Consistency check failed: .*{AGAIN}",
        ),
        "the content has the right length only": (
            {"swapped": {WEIGHTS: bytes(len(files[WEIGHTS]))}},
            f"OSError: downloading someone/ddpm failed: the content of {WEIGHTS} was damaged during the download, "
            f"and was deleted.{AGAIN}",
        ),
        "the content is shorter than announced": (
            {"lengths": {WEIGHTS: 100}},
            f"OSError: downloading someone/ddpm failed: RemoteProtocolError: peer closed connection .*{AGAIN}",
        ),
        "the content is longer than announced": (
            {"lengths": {WEIGHTS: -100}},
            f"OSError: downloading someone/ddpm failed: Consistency check failed: .*{AGAIN}",
        ),
        "redirects in a circle": (
            {"circular": True},
            f"OSError: downloading someone/ddpm failed: TooManyRedirects: .*{AGAIN}",
        ),
        "too many requests": (
            {"status": 429},
            f"OSError: downloading someone/ddpm failed: 429 Too Many Requests .*{AGAIN}",
        ),
        "no answer": ({"hanging": ""}, "FileNotFoundError: .* the Hub cannot be reached .*timed out"),
        "no answer to the request of a file": (
            {"hanging": f"GET /someone/ddpm/resolve/{COMMIT}/{WEIGHTS}"},
            f"OSError: downloading someone/ddpm failed: ReadTimeout: .*{AGAIN}",
        ),
        "a commit that is a path": (
            {"commit": "../../evil"},
            f"OSError: downloading someone/ddpm failed: the Hub names the commit '../../evil', which is not .*{AGAIN}",
        ),
    }


QUICK = ("the content has the right length only", "redirects in a circle")


@pytest.mark.parametrize(
    "fault",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in _faults(dict.fromkeys((WEIGHTS, "config.json"), b""))
    ],
)
def test_a_hub_with_a_fault_gives_a_clear_error_and_the_next_call_succeeds(fault, hub, run, files):
    attributes, message = _faults(files)[fault]
    before = {name: getattr(hub, name) for name in attributes}
    vars(hub).update(attributes)
    error = run(LOAD, fails=True, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert re.fullmatch(message + ".*", error), error
    vars(hub).update(before)
    hub.stopped.set()
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    ["GET /api/", *(pytest.param(f"{word} /someone/ddpm/", marks=pytest.mark.slow) for word in ("HEAD", "GET"))],
)
def test_requests_that_a_busy_hub_refuses_are_repeated(request_, hub, run):
    hub.busy = {request_: [429, 503]}
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"
    assert hub.busy == {request_: []}


@pytest.mark.slow
def test_a_busy_hub_does_not_delay_what_is_in_the_cache(hub, run):
    """One request is made. A download that was interrupted is completed."""
    run(LOAD)
    hub.requests.clear()
    hub.busy = {"GET /api/": [503, 503]}
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"
    assert hub.busy == {"GET /api/": [503]} and not hub.requests
    held = hub.repositories["someone/ddpm"]
    held[WEIGHTS] = safetensors.torch.save({k: 2 * v for k, v in safetensors.torch.load(held[WEIGHTS]).items()})
    hub.busy, hub.commit, hub.swapped = {}, hub.commit[::-1], {WEIGHTS: bytes(len(held[WEIGHTS]))}
    run(LOAD, fails=True)
    hub.swapped, hub.busy = {}, {"GET /api/": [503, 503]}
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"
    assert hub.busy == {"GET /api/": []}


@pytest.mark.slow
@pytest.mark.parametrize("cached", [["config.json"], ["config.json", "scheduler_config.json", f"{WEIGHTS}.index.json"]])
def test_what_another_program_has_left_out_of_the_cache_is_downloaded(cached, hub, run):
    """For a commit, which is loaded without a request if all its files are in the cache."""
    held, part = hub.repositories["someone/ddpm"], "diffusion_pytorch_model-00001-of-00001.safetensors"
    held[part] = held.pop(WEIGHTS)
    names = list(safetensors.torch.load(held[part]))
    held[f"{WEIGHTS}.index.json"] = json.dumps({"weight_map": dict.fromkeys(names, part)}).encode()
    code = "from huggingface_hub import hf_hub_download\n"
    code += "".join(f"hf_hub_download('someone/ddpm', '{name}', revision='{COMMIT}')\n" for name in cached)
    code += f"print(ScoreNet.from_pretrained('someone/ddpm', revision='{COMMIT}').sample_shape)"
    assert run(code) == "(3, 8, 8)\n"


@pytest.mark.slow
def test_weights_in_float16_of_another_program_in_the_cache_are_used_only_offline(hub, run):
    held, half = hub.repositories["someone/ddpm"], "diffusion_pytorch_model.fp16.safetensors"
    held[half] = safetensors.torch.save({k: v.half() for k, v in safetensors.torch.load(held[WEIGHTS]).items()})
    code = "from huggingface_hub import hf_hub_download\n"
    for name in ("config.json", "scheduler_config.json", half):
        code += f"hf_hub_download('someone/ddpm', '{name}')\n"
    load = f"{LOAD}print(all((each == each.half()).all() for each in net.parameters()))"
    run(code)
    assert run(load, HF_HUB_OFFLINE="1") == "True\n"
    assert run(load) == run(load, HF_HUB_OFFLINE="1") == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_connections_that_end_at_random_moments_are_resumed(seed, hub, run):
    hub.flaky = random.Random(seed)  # noqa: S311
    assert run(LOAD + "print(net.sample_shape)") == "(3, 8, 8)\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "diffusion_pytorch_model-a/../../../../evil-of-2.safetensors",
            "ValueError: someone/ddpm cannot be downloaded: ",
        ),
        pytest.param("../../../../diffusion_pytorch_model.safetensors", None, marks=pytest.mark.slow),
        pytest.param("/evil/config.json", None, marks=pytest.mark.slow),
    ],
)
def test_names_of_files_do_not_leave_the_cache(name, message, hub, run, files, tmp_path):
    """A file whose name is none of a network's is not requested."""
    held = hub.repositories["someone/ddpm"]
    held[name] = files[WEIGHTS]
    if message is not None:  # the pattern of the parts of an index fits this name
        held[f"{WEIGHTS}.index.json"] = b"{}"
        del held[WEIGHTS]
    printed = run(LOAD, fails=message is not None)
    assert message is None or printed.startswith(message)
    assert name not in hub.fetched()
    cache = tmp_path / "home" / "hub" / "models--someone--ddpm"
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".safetensors"]
    assert all(path.is_relative_to(cache) and path.resolve().is_relative_to(cache.resolve()) for path in found)
    assert message is not None or len(found) == 1


@pytest.mark.slow
def test_an_index_does_not_lead_out_of_the_folder(hub, run, files):
    """Of a path in an index only the name is used, so a file elsewhere is not read."""
    held = hub.repositories["someone/ddpm"]
    part = "diffusion_pytorch_model-00001-of-00001.safetensors"
    held[part] = held.pop(WEIGHTS)
    names = list(safetensors.torch.load(held[part]))
    for path, works in ((f"../../../{part}", True), ("../../../../../.stdout0", False), ("/etc/passwd", False)):
        held[f"{WEIGHTS}.index.json"] = json.dumps({"weight_map": dict.fromkeys(names, path)}).encode()
        hub.commit = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
        printed = run(LOAD + "print(net.sample_shape)", fails=not works)
        assert printed == "(3, 8, 8)\n" if works else f"has no {path.split('/')[-1]}" in printed


@pytest.mark.parametrize("name", ["someone/..", "../someone", "someone/../../ddpm", "-/ddpm"])
def test_names_of_repositories_do_not_leave_the_cache(name, hub, run):
    error = run(f"ScoreNet.from_pretrained({name!r})", fails=True)
    assert re.match("ValueError: .* is not the name of a repository|FileNotFoundError: there is no folder", error)
    assert hub.requests == []


@pytest.mark.slow
def test_a_refused_network_is_not_downloaded(hub, run):
    """Its configuration is enough to refuse it."""
    held = hub.repositories["someone/ddpm"]
    config = json.loads(held["config.json"])
    held["config.json"] = json.dumps({**config, "_class_name": "UNet2DConditionModel"}).encode()
    assert "its _class_name must be UNet2DModel" in run(LOAD, fails=True)
    held["config.json"] = json.dumps({**config, "mid_block_type": "Other"}).encode()
    hub.commit = hub.commit[::-1]
    assert "mid_block_type must be one of 'UNetMidBlock2D' or null, got 'Other'" in run(LOAD, fails=True)
    assert hub.fetched() == ["config.json", "model_index.json", "scheduler_config.json"]


@pytest.mark.parametrize("token", ["hf_secret ", "hf_secret\nX-Header: 1", "hf_s\u00e9cret"])
def test_a_token_that_cannot_be_sent_is_not_in_the_error(token, hub, run):
    errors = run(
        _errors_of(
            f"ScoreNet.from_pretrained('someone/ddpm', token={token!r})",
            f"ScoreNet.ncsn(1, 8, width=2).push_to_hub('me/net', token={token!r})",
        )
    )
    assert errors == 2 * (
        "ValueError: token must be the string of an access token, without spaces, line breaks and other special "
        "characters. Copy it again.\n"
    )
    assert hub.requests == []


@pytest.mark.slow
def test_tokens_are_not_written(hub, run, saved, tmp_path):
    """Neither in errors nor in the cache, the card or the files of a network."""
    hub.writer, hub.private["someone/ddpm"] = "hf_secret", "hf_secret"
    hub.gated.add("someone/gated")
    hub.repositories["someone/gated"] = {}
    code = (
        "import logging\nlogging.basicConfig(level=logging.DEBUG)\n"
        "net = ScoreNet.from_pretrained('someone/ddpm', token='hf_secret')\n"
        "net.push_to_hub('me/net', token='hf_secret')\nnet.save_pretrained('again')\n"
    )
    printed = run(code + "import sys\nsys.stderr.flush()\nprint(open('.stderr0').read())")
    printed += run(_errors_of("ScoreNet.from_pretrained('someone/gated', token='hf_secret')"))
    printed += run("net = ScoreNet.ncsn(1, 8, width=2)\nnet.push_to_hub('me/net', token='hf_secrets')", fails=True)
    assert "api/models/someone/ddpm" in printed and "hf_secret" not in printed  # the requests are in the log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"hf_secret" in path.read_bytes()]
    assert not [file for file, content in hub.repositories["me/net"].items() if b"hf_secret" in content]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_upload_that_is_killed_at_any_request_leaves_a_whole_network(moment, hub, forks, tmp_path, saved):
    """The repository has the old network or the new one, and the next upload completes the work."""
    ScoreNet.ncsn(1, 8, width=2).save_pretrained(tmp_path / "old")
    ScoreNet.from_pretrained(saved).save_pretrained(tmp_path / "new")
    old, new = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("old", "new"))
    hub.writer = "secret"
    code = "import os\nopen('pid', 'w').write(str(os.getpid()))\nfrom scorematch import ScoreNet\n"
    code += _pushed(saved, ", token='secret'")
    states = []
    for k in range(1, 30):

        def kill(requests=itertools.count(1), last=k):  # noqa: B008  (a new counter for each k)
            if next(requests) == last:
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

        hub.repositories["me/net"] = dict(old)
        setattr(hub, moment, kill)
        status, _, error = forks.run(code, tmp_path, environment(hub.url, tmp_path / "home"))
        setattr(hub, moment, None)
        assert status in (0, -signal.SIGKILL), error
        held = {file: content for file, content in hub.repositories["me/net"].items() if file != "README.md"}
        states.append("old" if held == old else "new" if held == new else "damaged")
        if status == 0:
            break
    assert status == 0 and len(states) > 4
    assert states == sorted(states, reverse=True) and set(states) == {"old", "new"}
