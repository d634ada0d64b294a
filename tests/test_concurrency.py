"""Processes that load and save the same network at the same time, and threads that sample from one network."""

import os
import threading
from functools import partial

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.core.files import new_files, reading
from scorematch.sampling import SAMPLERS
from tests.helpers import in_threads, seed
from tests.hub_server import Hub, environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def _net(kind=0):
    """Networks with other files, or with the same shapes and other weights and noise levels."""
    torch.manual_seed(kind)
    if kind == 2:
        return ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False], precondition="ddpm")
    return ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule([1.0 + kind, 0.1]))


# -- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reading_waits_for_the_end_of_a_replacement(tmp_path):
    """With files that belong together: all of them are old or all of them are new."""
    names, stop = [f"{i}.txt" for i in range(5)], threading.Event()
    for name in names:
        (tmp_path / name).write_text("0")

    def write():
        try:
            for i in range(1, 11):
                with new_files(tmp_path, lambda folder: list(folder.glob("*.txt"))) as new:
                    for name in names:
                        (new / name).write_text(str(i))
        finally:
            stop.set()

    def read():
        while not stop.is_set():
            with reading(tmp_path) as folder:
                assert len({(folder / name).read_text() for name in names}) == 1

    in_threads([write, read, read])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "10")


@pytest.mark.slow
def test_processes_can_save_to_and_load_from_one_folder(forks, tmp_path):
    """Every loaded network is one that was saved, and so is the last one."""
    nets = {kind: _net(kind) for kind in range(3)}
    nets[0].save_pretrained(tmp_path / "net")
    for kind, net in nets.items():
        net.save_pretrained(tmp_path / f"net{kind}")
    begin = (
        "import torch\n"
        "from scorematch import ScoreNet\n"
        "nets = [ScoreNet.from_pretrained(name) for name in ('./net0', './net1', './net2')]\n"
    )
    save = begin + "for i in range(40):\n    nets[{kind}].save_pretrained('net')\n"
    load = begin + (
        "for i in range(40):\n"
        "    found = ScoreNet.from_pretrained('./net')\n"
        "    net = next(net for net in nets if net.config == found.config)\n"
        "    for name, tensor in net.state_dict().items():\n"
        "        assert torch.equal(found.state_dict()[name], tensor)\n"
    )
    codes = [*(save.format(kind=kind) for kind in range(3)), load, load]
    for status, _, error in forks.run_together(codes, tmp_path):
        assert status == 0, error
    found = {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    saved = [{path.name: path.read_bytes() for path in (tmp_path / f"net{kind}").iterdir()} for kind in range(3)]
    assert found in saved


@pytest.mark.slow
def test_processes_can_load_a_repository_at_the_same_time(forks, tmp_path):
    net = _net()
    net.save_pretrained(tmp_path / "net")
    hub = Hub()
    hub.repositories["someone/net"] = {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    code = (
        "import torch\nfrom scorematch import ScoreNet\n"
        "found, net = ScoreNet.from_pretrained('someone/net'), ScoreNet.from_pretrained('./net')\n"
        "assert found.config == net.config\n"
        "for name, tensor in net.state_dict().items():\n"
        "    assert torch.equal(found.state_dict()[name], tensor)\n"
    )
    try:
        for status, _, error in forks.run_together([code] * 3, tmp_path, environment(hub.url, tmp_path / "home")):
            assert status == 0, error
    finally:
        hub.stop()


# -- Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name == "langevin" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_threads_with_lists_of_generators_draw_what_single_calls_draw(name):
    """The threads share a sampler. Every generator is used as often as in a single call."""
    torch.manual_seed(0)
    net = ScoreNet.unet(
        1, 8, widths=(4,), layers_per_block=1, attention=[False], schedule=NoiseSchedule([1.0, 0.3, 0.1])
    )
    sampler = SAMPLERS[name](net, levels=3)
    lists = [range(0, 3), range(3, 6), range(1, 4)]

    def draw(numbers):
        generators = [seed(number) for number in numbers]
        return sampler.sample(3, generator=generators, progress=False), [each.get_state() for each in generators]

    alone, together = [draw(numbers) for numbers in lists], in_threads([partial(draw, numbers) for numbers in lists])
    for (images, states), (found, others) in zip(alone, together, strict=True):
        assert torch.equal(found, images)
        assert all(torch.equal(a, b) for a, b in zip(others, states, strict=True))
    assert torch.equal(alone[0][0][1:], alone[2][0][:2])  # each image depends on its own generator
