"""Interruptions: what was there before stays whole at every moment, and the next call completes the work.

The quick tests interrupt every single file operation within this process. The slow tests use processes that are killed
or stopped by signals, reach a limit of the size of files, or lose their folder, at random file operations.
"""

import errno
import io
import json
import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

import scorematch
from scorematch import NoiseSchedule, ScoreNet
from scorematch.core.files import new_files, reading, write_whole
from scorematch.pretrained import saving
from scorematch.sampling import ODESampler, sample_to
from scorematch.training import checkpoint
from tests.forks import Forks

if not hasattr(signal, "SIGKILL"):
    pytest.skip("needs the signals of POSIX", allow_module_level=True)

OPERATIONS = ("mkdir", "rmdir", "rename", "replace", "link", "unlink", "remove", "chmod")


# -- Every file operation ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process: no file operation after it takes place, as after SIGKILL."""


FAULTS = {"killed": Killed(), "Ctrl-C": KeyboardInterrupt(), "full disk": OSError(errno.ENOSPC, "full")}


def _struck(monkeypatch, job, k, fault):
    """Runs a job with a fault at its file operation k; returns whether there were so many, and the error of the job.

    After ``Killed`` every later operation fails as well. The other faults happen once.
    """
    count, opened = 0, io.open

    def before(operation):
        def call(*arguments, **keywords):
            nonlocal count
            if operation is not opened or set("wax+") & set(keywords.get("mode", (*arguments, "r")[1])):
                count += 1
                if count == k or (count > k and isinstance(fault, Killed)):
                    raise fault
            return operation(*arguments, **keywords)

        return call

    error = None
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, before(getattr(os, name)))
        patch.setattr(io, "open", before(opened))
        patch.setattr(saving, "save_file", before(saving.save_file))
        try:
            job()
        except type(fault) as raised:
            error = raised
    return count >= k, error


def _files(folder):
    """The content of the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _read(folder):
    """The files that are read from a folder."""
    with reading(folder) as home:
        return {**_files(home), "notes.txt": (folder / "notes.txt").read_bytes()}


def _check_every_fault(monkeypatch, fault, job, folder, old, new):
    """Runs a job that changes the files in ``folder`` from those of the folder ``old`` to those of ``new``."""
    before, after, found = _files(old), _files(new), []
    for k in range(1, 1000):
        shutil.copytree(old, folder)
        struck, error = _struck(monkeypatch, job, k, fault)
        now = _read(folder)
        assert now in (before, after), k
        found.append(now == after)
        if isinstance(error, OSError):  # an operation whose failure does not matter raises no error
            assert now == before and error.errno == errno.ENOSPC
        job()
        assert _files(folder) == after and len(list(folder.iterdir())) == len(after), k
        shutil.rmtree(folder)
        if not struck:
            break
    assert error is None and k > 10
    assert found == sorted(found) or not isinstance(fault, Killed)  # there is one moment of the change
    assert set(found) == {False, True}


@pytest.mark.parametrize("kind", FAULTS)
def test_files_are_replaced_together_if_any_file_operation_fails(kind, tmp_path, monkeypatch):
    """After a kill either all old files or all new files are read; after Ctrl-C or an error the old ones remain."""
    for name, files in {"old": {"a": "1", "b": "2"}, "new": {"b": "3", "c": "4"}}.items():
        (tmp_path / name).mkdir()
        for file, text in {**files, "notes.txt": "mine"}.items():
            (tmp_path / name / file).write_text(text)

    def job():
        replaced = lambda folder: [path for path in folder.iterdir() if path.name in "abc"]  # noqa: E731
        with new_files(tmp_path / "files", replaced) as new:
            (new / "b").write_text("3")
            (new / "c").write_text("4")

    _check_every_fault(monkeypatch, FAULTS[kind], job, tmp_path / "files", tmp_path / "old", tmp_path / "new")


def test_files_are_replaced_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    test_files_are_replaced_together_if_any_file_operation_fails("killed", tmp_path, monkeypatch)


def _small(layout):
    torch.manual_seed(0)
    if layout == "diffusers":
        return ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False], precondition="ddpm")
    return ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule([1.0, 0.1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("own", "diffusers"), ("diffusers", "own"), (None, "own"), (None, "diffusers")]
)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_save_leaves_a_whole_network_if_any_file_operation_fails(before, after, kind, tmp_path, monkeypatch):
    for name in {before, after}:
        (tmp_path / str(name)).mkdir()
        (tmp_path / str(name) / "notes.txt").write_text("mine")
        if name is not None:
            _small(name).save_pretrained(tmp_path / name)
    net, folder = _small(after), tmp_path / "net"
    old, new = tmp_path / str(before), tmp_path / after
    _check_every_fault(monkeypatch, FAULTS[kind], lambda: net.save_pretrained(folder), folder, old, new)


def test_an_error_of_a_save_names_the_folder(tmp_path, monkeypatch):
    _, error = _struck(monkeypatch, lambda: _small("own").save_pretrained(tmp_path), 2, FAULTS["full disk"])
    assert str(error) == f"[Errno {errno.ENOSPC}] {tmp_path} could not be written: full"


@pytest.mark.slow
def test_a_network_is_loaded_after_a_killed_save(tmp_path, monkeypatch):
    """In the middle of the replacement, when the folder has files of both networks."""
    net, other, folder = _small("own"), _small("diffusers"), tmp_path / "net"
    net.save_pretrained(tmp_path / "old")
    for k in range(10, 1000):
        shutil.copytree(tmp_path / "old", folder)
        assert _struck(monkeypatch, lambda: other.save_pretrained(folder), k, FAULTS["killed"])[0]
        if (folder / "diffusion_pytorch_model.safetensors").exists():
            break
        shutil.rmtree(folder)
    assert (folder / "model.safetensors").exists()
    assert ScoreNet.from_pretrained(folder).config == net.config
    other.save_pretrained(folder)
    assert ScoreNet.from_pretrained(folder).config == other.config and not list(folder.glob(".*"))


def test_an_error_of_a_write_names_the_file(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(path, b"")
    assert caught.value.filename == str(path)


def test_samples_that_are_removed_while_others_are_drawn_give_an_error(tmp_path):
    """No process would draw them again, and waiting for them would not end."""

    def score(x, sigma):
        (tmp_path / "samples" / "images" / "000000.png").unlink(missing_ok=True)
        return -x

    score.value_range = (0.0, 1.0)
    sampler = ODESampler(score, NoiseSchedule([1.0, 0.1]))
    with pytest.raises(FileNotFoundError, match="the images from 0 on were written to"):
        sample_to(sampler, tmp_path / "samples", 2, batch_size=1, shape=(1, 8, 8), progress=False)


# -- Processes --------------------------------------------------------------------------------------------------------

FIRST = """
import os, resource, shutil, signal, sys, warnings
import torch
torch.set_num_threads(1)
from scorematch import NoiseSchedule, ScoreNet
from scorematch.sampling import sample_to
from scorematch.evaluation import evaluate
from scorematch.pretrained.pickles import read_pickle
from scorematch.sampling import ODESampler, SamplerSettings
from scorematch.training import train
import accelerate, numpy.ma, PIL.Image, PIL.PngImagePlugin, torch._dynamo, yaml  # what the jobs import
warnings.simplefilter("ignore")
torch.manual_seed(0)
net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False], schedule=NoiseSchedule([1.0, 0.3, 0.1]))
net.sampler_settings = SamplerSettings("ode", levels=3)
x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
ODESampler(net, levels=3).sample(2, progress=False)
"""
JOBS = {
    "save": "net.save_pretrained('job')",
    "convert": "ScoreNet.from_checkpoint('checkpoint.pth', config='config.yml').save_pretrained('job')",
    "sample": ("sample_to(ODESampler(net, levels=3), 'job', 20, batch_size=4, progress=False)"),
    "evaluate": (
        "options = dict(features='pixels', metrics=['precision-recall'], n=12, batch_size=4, cache=False)\n"
        "evaluate(net, x, out='job', progress=False, **options)"
    ),
    "train": (
        "options = dict(checkpoint_every=16, log_every=8, sample_every=32, snapshot_every=32)\n"
        "train(net, x, 'job', images=64, batch_size=8, progress=False, **options)"
    ),
}
# Runs a job; something happens to it at its k-th file operation that changes something, or from the beginning.
CODE = """
moment, k, size = 0, {k}, {size}
def happens(event, arguments):
    global moment
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rmdir", "os.rename", "os.link", "os.remove", "os.chmod"):
        moment += 1
        if moment == k:
            {at_k}
{at_first}
sys.addaudithook(happens)
try:
    exec({job!r})
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(moment)
"""
LIMITED = "resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))"
# What happens at operation k, and at the beginning; and how the process ends if it happens.
HAPPENINGS = {
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", "", -signal.SIGKILL),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "", -signal.SIGTERM),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT)", "", "KeyboardInterrupt"),
    "removed folder": ("os.rename('job', 'removed') if os.path.isdir('job') else None", "", "Error: "),
    "full disk": ("pass", LIMITED, "Error: "),
    "killed in a file": ("pass", f"{LIMITED}; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)", -signal.SIGXFSZ),
    # Permissions do not apply to root.
    "read-only folder": ("pass", "os.chmod('job', 0o555); os.geteuid() or os.seteuid(65534)", "Error: "),
    "nothing": ("pass", "", 0),
}
ORDER = [*["SIGKILL"] * 4, "SIGTERM", "Ctrl-C", "SIGKILL", "full disk", "killed in a file", "removed folder"]


@pytest.fixture(scope="module")
def forks():
    """Processes that have also run a sampler, and imported what the jobs import."""
    started = Forks(FIRST)
    yield started
    started.stop()


def _result(folder):
    """The files of a finished job by name, without those of training whose content depends on times.

    Of the checkpoints of training the last one; after a signal there is another one before it.
    """
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "log.jsonl" in found:
        lines = [json.loads(line) for line in found["log.jsonl"].splitlines()]
        found["log.jsonl"] = [{**line, "images_per_second": 0} for line in lines]
        *others, _ = checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
        left_out = ("report", *(f"checkpoints/{name}/" for name in others))
        found = {name: each for name, each in found.items() if not name.startswith(left_out)}
        found = {name: each for name, each in found.items() if not name.endswith("state.json")}
        found["checkpoints"] = len(checkpoints)
    return found


def _installation_is_readable():
    """Whether the process can import more modules after it gave up the rights of root, as in "read-only folder"."""
    places = [Path(module.__file__).resolve() for module in (os, torch, scorematch)]
    return os.geteuid() != 0 or all(
        folder.stat().st_mode & 0o005 == 0o005 for each in places for folder in each.parents
    )


def _check_whole(job, folder, old, result):
    """Checks that the files of an interrupted job are complete, except those with temporary names."""
    if job in ("save", "convert"):
        with reading(folder) as home:
            assert _files(home) in (old, result)
        return
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        changing = job == "train" and name.startswith(("report", "checkpoints/", "network/", "log.jsonl"))
        if path.is_file() and "/." not in f"/{name}" and not changing:
            assert path.read_bytes() == result[name], name
    if job == "train" and (folder / "network").exists():
        with reading(folder / "network") as home:  # which is empty if the first network was being written
            has_network = (home / "config.json").exists()
        if has_network:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # there is a warning for a damaged checkpoint
                assert checkpoint.latest(folder / "checkpoints") is not None
            ScoreNet.from_pretrained(folder / "network")


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_interrupted_at_random_moments_loses_nothing(job, forks, tmp_path, published):
    """Thirty interruptions; the next call continues and ends with the same files as without interruptions."""
    folder, whole, chance = tmp_path / "job", tmp_path / "whole", random.Random(0)  # noqa: S311
    tmp_path.chmod(0o755)
    fixture = published("ncsnv2")
    weights = {f"module.{name}": tensor for name, tensor in {**fixture["weights"], "sigmas": fixture["sigmas"]}.items()}
    torch.save([weights, {}, 5, 300000, None], tmp_path / "checkpoint.pth")
    (tmp_path / "config.yml").write_text(fixture["config_yaml"])

    def run(happening, k=0, size=0):
        at_k, at_first, ends = HAPPENINGS[happening]
        code = CODE.format(k=k, size=size, at_k=at_k, at_first=at_first, job=JOBS[job])
        status, printed, error = forks.run(code, tmp_path)
        last = error.strip().split("\n")[-1]
        if status == 1 and isinstance(ends, str):
            assert ends in last and (ends != "Error: " or str(folder.name) in last), error
        elif status == 1:
            assert happening == "SIGTERM" and last == "SystemExit: 143", error
        else:
            assert status in (ends, 0), (happening, status, error)
        return status, printed

    operations = int(run("nothing")[1])
    folder.rename(whole)
    result, old = _result(whole), {}
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    if job in ("save", "convert"):
        _small("own").save_pretrained(tmp_path / "old")
        old = _files(tmp_path / "old")
    interruptions = 0
    read_only = ["read-only folder"] if _installation_is_readable() else []
    for happening in [*read_only, *ORDER * 3, *read_only]:
        if old:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "old", folder)
        folder.mkdir(exist_ok=True)
        status, _ = run(happening, chance.randint(1, operations), chance.choice(sizes) - 1)
        interruptions += status != 0
        if (tmp_path / "removed").exists():
            shutil.rmtree(tmp_path / "removed")
            shutil.rmtree(folder, ignore_errors=True)  # it may have been created again, with some of the files
        if folder.exists():
            folder.chmod(0o755)
            _check_whole(job, folder, old, result)
            if status == 0:
                assert _result(folder) == result, happening
                shutil.rmtree(folder)
    assert interruptions >= 15
    run("nothing")
    assert _result(folder) == result and not list(folder.rglob(".*"))
