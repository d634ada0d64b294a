"""Training on the simulated device."""

import contextlib
import copy

import pytest
import torch

from scorematch.data import open_images
from scorematch.loss import sliced_score_matching_loss
from scorematch.restoration import palette
from scorematch.sampling import SamplerSettings
from scorematch.training import Settings, train, train_steps
from tests.devices.nets import SIZE, colors, rand
from tests.devices.simulated import KIND, WAITS, by_default, count
from tests.training import vector

IMAGES, LABELS = (rand(60, 3, SIZE, SIZE, seed=5) * 255).round() / 255, torch.arange(60) % 3


class Accelerator:
    """What training uses of Accelerate, for one process."""

    num_processes, process_index, is_main_process, mixed_precision, distributed_type = 1, 0, True, "no", "NO"

    def __init__(self, device):
        self.device = device

    def prepare_model(self, net):
        return net

    def no_sync(self, model):
        return contextlib.nullcontext()

    def wait_for_everyone(self):
        pass

    def log(self, numbers, step):
        pass


def _sliced(net, x, **given):
    return sliced_score_matching_loss(net, x, projections=torch.ones_like(x), reduction="none", **given)


RUNS = {
    "float32": ({}, {}),
    "auto": ({}, {"precision": "auto"}),
    **({"float16": ({}, {"precision": "float16"})} if KIND == "cuda" else {}),
    "microbatch": ({}, {"batch_size": 6, "microbatch": 4}),
    "classes": ({"classes": 3, "null_class": True}, {"label_drop": 0.3}),
    "patches": ({"patch": 2}, {}),
    "colorization": ({"condition_channels": 3}, {"condition": palette.Colorization()}),
    "inpainting": ({"condition_channels": 3}, {"condition": palette.Inpainting()}),
    "sliced": ({}, {"loss": _sliced}),
}


def _trained(to, name):
    network, options = RUNS[name]
    data = open_images((IMAGES, LABELS), labels="classes" in network)
    options = {"images": 24, "batch_size": 8, "lr": 1e-4, "precision": "float32", **options}
    accelerator = Accelerator(to(torch.zeros(1)).device)
    for step in train_steps(copy.deepcopy(colors(**network)), data, Settings(**options), accelerator=accelerator):
        if step.state.step > 1 and KIND == "cuda" and name not in ("inpainting", "auto"):
            assert count("reads") + count("copies") == 0, dict(WAITS)  # the first step reads the range of the data
        WAITS.clear()
    averaged = step.state.average(0.05)
    return [vector(step.state.net), vector(averaged)]


@pytest.mark.parametrize("name", RUNS if KIND == "cuda" else list(RUNS)[::3])
def test_a_step_does_not_wait(compare, name):
    """The masks of Inpainting are drawn on the host."""
    compare(lambda to: _trained(to, name), within=2e-2)


def test_the_second_device(compare):
    compare(lambda to: _trained(to, "float32"), within=2e-2, index=1)


@pytest.mark.parametrize("default", [False, True])
def test_a_run_continues_after_an_interruption(compare, tmp_path, default):
    """Also if the device is torch's default."""

    def trained(to):
        device = to(torch.zeros(1)).device
        out = tmp_path / device.type

        def interrupt(net, images):
            if images == 16 and not (out / "stopped").exists():
                (out / "stopped").touch()
                raise KeyboardInterrupt
            return {}

        options = {"sample_every": 16, "snapshot_every": 16, "checkpoint_every": 8, "log_every": 8, "lr": 1e-4}
        options |= {"images": 24, "batch_size": 8, "precision": "float32", "progress": False, "evaluate": interrupt}
        for _ in range(2):
            net = copy.deepcopy(colors())
            net.sampler_settings = SamplerSettings("ode", levels=2)
            with contextlib.suppress(KeyboardInterrupt), by_default(device if default else None):
                made = train(net, IMAGES, out, accelerator=Accelerator(device), **options)
        return vector(made)

    compare(trained, within=2e-2)
