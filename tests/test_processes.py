"""Several processes: their devices, one folder for all of them, and how long they wait for each other.

Two real processes have two different folders, as on nodes with separate disks.
"""

import threading
from datetime import timedelta

import pytest
import torch

from scorematch.core import processes
from scorematch.core.processes import Process, SharedFolder, local_device
from scorematch.evaluation import Evaluator, pixels
from scorematch.sampling import ODESampler, sample_to
from tests.training import image_net

# -- Devices


def test_cuda_without_an_index_is_the_device_of_the_process(monkeypatch):
    assert local_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, expected in [("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")]:
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert local_device("cuda") == local_device(torch.device("cuda")) == torch.device(expected)
        assert [str(local_device(name)) for name in ("cpu", "cuda:0", "mps")] == ["cpu", "cuda:0", "mps"]


def test_the_process_group_and_extractors_use_the_device_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(processes, "_store", lambda: torch.distributed.HashStore())
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: None)
    with processes.process_group("cuda"):
        assert seen == [torch.device("cuda:1")]
    monkeypatch.setattr(
        "scorematch.evaluation.evaluator.as_extractor", lambda given, device: seen.append(device) or pixels()
    )
    Evaluator(torch.rand(4, 1, 4, 4), features="pixels", metrics=[], cache=False, device="cuda", progress=False)
    assert seen[1:] == [torch.device("cuda:1")]


# -- One folder for all processes


def test_the_others_find_the_token_of_the_first_process(tmp_path, monkeypatch):
    other = SharedFolder(tmp_path / "out", Process(1, 2))
    other.check()
    threading.Timer(0.05, lambda: SharedFolder(tmp_path / "out", Process(0, 2))).start()
    monkeypatch.setattr(processes, "CHECK_SECONDS", 0.01)
    other.wait()
    monkeypatch.setattr(processes, "_FIND_SECONDS", -1.0)
    other.check()  # it has been found


def test_the_token_of_another_launch_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_FIND_SECONDS", -1.0)
    SharedFolder(tmp_path, Process(0, 2))
    SharedFolder(tmp_path, Process(1, 2)).check()
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(FileNotFoundError, match="process 1 does not find the files of the first process in"):
        SharedFolder(tmp_path, Process(1, 2)).check()


def test_one_process_writes_no_token(tmp_path):
    shared = SharedFolder(tmp_path / "out", Process(0, 1))
    shared.wait()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_with_folders_of_their_own_do_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_FIND_SECONDS", 0.1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FileNotFoundError, match="Pass a folder on a disk that all processes share"):
        sample_to(ODESampler(image_net(), levels=2), tmp_path, 4, batch_size=2, progress=False)


@pytest.mark.slow
def test_the_first_process_says_for_which_it_waits(tmp_path, monkeypatch):
    sampler = ODESampler(image_net(), levels=2)
    monkeypatch.setattr(processes, "_SILENT_SECONDS", 0.3)
    late = threading.Timer(1, lambda: sample_to(sampler, tmp_path, 6, batch_size=2, process=(2, 3), progress=False))
    sample_to(sampler, tmp_path, 6, batch_size=2, process=(1, 3), progress=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    late.start()
    with pytest.warns(UserWarning, match=r"no new files of process 2 for 0\.3 seconds; this process waits for them"):
        sample_to(sampler, tmp_path, 6, batch_size=2, progress=False)
    assert not list(tmp_path.rglob(".*"))
    late.join(20)


SEPARATE = """
import os
import torch
from scorematch import ScoreNet
from scorematch.core import processes
from scorematch.evaluation import evaluate
from scorematch.sampling import ODESampler, sample_to
from scorematch.training import train

processes._FIND_SECONDS = 2.0
out = {out!r} + os.environ["RANK"]
torch.manual_seed(0)
net, images = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1), torch.rand(16, 1, 8, 8)
if {command!r} == "sample":
    sample_to(ODESampler(net, levels=2), out, 8, batch_size=2)
elif {command!r} == "evaluate":
    evaluate(ODESampler(net, levels=2), images, n=8, features="pixels", metrics=[], batch_size=2, cache=False, out=out)
else:
    train(net, images, out, images=64, batch_size=8, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sample", "evaluate", "train"])
def test_two_nodes_with_separate_disks_end_with_one_sentence(forks, tmp_path, command):
    code = SEPARATE.format(out=str(tmp_path / "out"), command=command)
    _, (status, _, error) = forks.group(2, code, tmp_path, check=False)
    assert status == 1
    assert f"process 1 does not find the files of the first process in {tmp_path / 'out1'}" in error


# -- Slow steps of one process


@pytest.mark.slow
def test_processes_of_a_training_wait_for_a_week(forks, tmp_path):
    code = (
        "import torch\nfrom scorematch.training.accelerator import make_accelerator\n"
        "device = make_accelerator(cpu=True).device\n"
        "print(torch.distributed.group.WORLD._get_backend(device).options._timeout)\n"
    )
    assert [printed for _, printed, _ in forks.group(2, code, tmp_path)] == 2 * [f"{timedelta(days=7)}\n"]


SLOW = """
import os, time
from datetime import timedelta
import torch

first, begin = os.environ["RANK"] == "0", torch.distributed.init_process_group
def short(*args, **options):
    begin(*args, **(options | dict(timeout=timedelta(seconds=10))))
torch.distributed.init_process_group = short

from scorematch import ScoreNet
from scorematch.cli import main
from scorematch.data import folders
from scorematch.training import run

def slow(self, i, pixels=folders.Folder.pixels):
    time.sleep(12 if i == 0 else 0)
    return pixels(self, i)

folders.Folder.pixels = slow
ScoreNet.push_to_hub = lambda self, name: time.sleep(12)
run.check_repository = run.check_login = lambda *name: None
assert main({command}) == 0
"""


@pytest.mark.slow
def test_decoding_and_an_upload_take_longer_than_a_barrier_waits(forks, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "data").mkdir()
    for i in range(8):
        image.new("L", (8, 8), 30 * i).save(tmp_path / "data" / f"{i}.png")
    options = ("--recipe", "tiny", "--image-size", "8", "--images", "16", "--batch-size", "8", "--quiet")
    options += ("--push-to-hub", "someone/digits", "--device", "cpu", "--debug")
    command = ("train", tmp_path / "data", "--out", tmp_path / "out", *options)
    done = forks.group(2, SLOW.format(command=list(map(str, command))), tmp_path, seconds=200)
    assert (tmp_path / "out" / "report.md").exists() and all("Timed out" not in error for *_, error in done)
