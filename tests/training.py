"""Small networks, data and runs for the tests of the training."""

import json

import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.sampling import SamplerSettings
from scorematch.training import Settings, train, train_steps
from tests.helpers import seed

FILES = ("weights.safetensors", "ema-0.050.safetensors", "ema-0.100.safetensors", "optimizer.safetensors")


class MLP(nn.Module):
    """A backbone for points (N, 2)."""

    def __init__(self, width=32, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 2))

    def forward(self, x, c_noise):
        return self.last(self.layers(torch.cat([x, 4 * c_noise[:, None].to(x.dtype)], 1)))


class Memory:
    """Data in memory that record which images were read."""

    fingerprint = "memory"

    def __init__(self, x, labels=None, fail_at=None):
        self.x, self.labels, self.seen, self.fail_at = x, labels, [], fail_at
        self.shape = tuple(x.shape[1:])

    def __len__(self):
        return len(self.x)

    def read(self, indices):
        self.seen += indices.tolist()
        if self.fail_at is not None and len(self.seen) > self.fail_at:
            raise OSError("the disk is gone")
        return self.x[indices], None if self.labels is None else self.labels[indices]


class Recorder:
    """A loss that records its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, net, x, **given):
        self.calls.append({"x": x, **given})
        return dsm_loss(net, x, reduction="none", **given)

    def all(self, name):
        return torch.cat([call[name] for call in self.calls])


def points_net(dtype=torch.float32, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(dropout=dropout)
    return ScoreNet(backbone, NoiseSchedule.geometric(5, 0.05, 20), sample_shape=(2,)).to(dtype)


def image_net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ScoreNet.unet(1, 8, **{"widths": (4,), "layers_per_block": 1, "attention": [False], **options})
        for parameter in net.parameters():  # zeros of the initialization could hide errors
            nn.init.normal_(parameter, std=0.1)
    net.sampler_settings = SamplerSettings("ode", levels=4)  # for the samples of a run
    return net


def points(n=64, dtype=torch.float32):
    return Memory(torch.randn(n, 2, generator=seed(1)).to(dtype))


def images(n=32):
    return torch.rand(n, 1, 8, 8, generator=seed(2))


def steps(net, data, **settings):
    """Trains, and returns the last step."""
    *_, last = train_steps(net, data, Settings(**settings))
    return last


def quick(net, data, out, **options):
    """A run of 80 images that saves no samples or snapshots by default."""
    options = {"images": 80, "batch_size": 8, "sample_every": 10**6, "snapshot_every": 10**6, **options}
    return train(net, data, out, progress=False, **options)


def content(out, files=FILES):
    """The name and the bytes of the last checkpoint of a run, and the bytes of its network."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    found = {name: (last / name).read_bytes() for name in files}
    return last.name, found, (out / "network" / "model.safetensors").read_bytes()


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Interrupted(Exception):  # noqa: N818
    pass


def interrupt_at(image):
    """A function for ``evaluate`` that stops the run when this number of images has been seen."""

    def evaluate(net, images):
        if images == image:
            raise Interrupted
        return {}

    return evaluate


def same_runs(one, other):
    """Whether two runs have written the same files, except for times."""
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (one, other)]
    logs = [[{**json.loads(line), "images_per_second": 0} for line in log] for log in logs]
    files = [
        {
            path.relative_to(out): path.read_bytes()
            for folder in ("checkpoints", "network", "samples", "snapshots")
            for path in (out / folder).rglob("*")
            if path.suffix in (".safetensors", ".png")
        }
        for out in (one, other)
    ]
    return logs[0] == logs[1] and files[0] == files[1]
