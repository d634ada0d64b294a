"""The real repositories, compared with the outputs that diffusers publishes for them.

These tests are off by default, since they download gigabytes:

    python -m pytest -m network                          # all
    python -m pytest -m network -k ddpm-cifar10-32       # 143 MB

The numbers come from huggingface/diffusers, scripts/generate_logits.py at 58eb52c080 and
tests/models/unets/test_models_unet_2d.py. In golden.json, "published" holds 30 values of each network's output, in the
network's units, for standard normal noise of seed 0 as the image, at time step 10, or at sigma 10 for variance
exploding networks; "small_sigma" holds nine values of the score of google/ncsnpp-celebahq-256 for an image of ones at
sigma 1e-4.
"""

import json
from pathlib import Path

import pytest
import torch

from scorematch import AnnealedLangevinSampler, ScoreNet

pytestmark = pytest.mark.network

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("repository", GOLDEN["published"])
def test_published_outputs(repository):
    net = ScoreNet.from_pretrained(repository)
    assert net.sample_shape is not None
    x = torch.randn(1, *net.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if "ncsnpp" in repository:
            output = net(x, 10.0)
        else:
            sigma = net.schedule.sigmas[len(net.schedule) - 1 - 10].float()  # of time step 10, in units of [0, 1]
            s = 2 * sigma  # in [-1, 1], where the network scales an image down by sqrt(1 + s^2)
            output = -net(x * (1 + s**2).sqrt() / 2 + 0.5, sigma) * sigma
    torch.testing.assert_close(output[0, 0, 0, :30], torch.tensor(GOLDEN["published"][repository]), rtol=0, atol=1e-3)


def test_the_score_at_a_small_sigma():
    net = ScoreNet.from_pretrained("google/ncsnpp-celebahq-256")
    with torch.no_grad():
        score = net(torch.ones(1, 3, 256, 256), 1e-4)
    torch.testing.assert_close(score[0, -3:, -3:, -1].flatten(), torch.tensor(GOLDEN["small_sigma"]), rtol=1e-2, atol=0)


def test_three_lines_to_a_picture():
    net = ScoreNet.from_pretrained("cifar10")
    images = AnnealedLangevinSampler(net).sample(1)
    assert images.shape == (1, 3, 32, 32)
    assert 0.05 < images.std() < 0.45
