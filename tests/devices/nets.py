"""The networks for color images that the tests on the simulated device share."""

import functools

import torch

from scorematch import NoiseSchedule, ScoreNet

LEVELS, SIZE = NoiseSchedule.geometric(10, 0.01, 6), 8


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def colors(**options):
    """A small U-Net for images (3, 8, 8), in which all weights are random."""
    torch.manual_seed(0)
    small = {"widths": (8,), "layers_per_block": 1, "attention": [False], "schedule": LEVELS}
    net = ScoreNet.unet(3, SIZE, **small, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape) if parameter.ndim == 1 else parameter)
    return net.eval()
