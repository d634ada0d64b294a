"""Networks of every family, losses and likelihoods on the simulated device."""

import copy

import pytest
import torch

from scorematch import NoiseSchedule, dsm_loss
from scorematch.likelihood import bits_per_dimension, log_likelihood
from scorematch.loss import sliced_score_matching_loss
from tests.devices.nets import SIZE, colors, rand
from tests.devices.simulated import KIND
from tests.helpers import seed
from tests.networks import NETS, condition, images, shared

NAMES = list(NETS) if KIND == "cuda" else list(NETS)[::3]  # MPS has no branches of its own here
SIGMAS = torch.tensor([0.05, 0.3, 2.0, 8.0])


def _given(name, to, n=4):
    made = condition(name, n, seed(1))
    return images(n, seed(2)), None if made is None else to(made)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores(compare, name):
    def scores(to):
        net, (x, given) = to(shared(name)), _given(name, to)
        found = [net(to(x), 0.3, given), net(to(x), to(SIGMAS), given)]
        return found + (list(net.score_and_variance(to(x), 0.3, given)) if net.predicts_variance else [])

    compare(scores, reads=0, copies=2)


@pytest.mark.parametrize("name", NAMES[::2])
@torch.no_grad()
def test_inference_copies(compare, name):
    def scores(to):
        net, (x, given) = to(shared(name)).inference_copy(), _given(name, to)
        return [net(to(x), 2.0, given), net(to(x), to(torch.tensor([0.3, 0.3, 0.3, 8.0])), given)]

    compare(scores, within=5e-2)


@pytest.mark.parametrize("name", NAMES[1::2])
def test_gradients(compare, name):
    def gradients(to):
        net, (x, given) = copy.deepcopy(to(shared(name))), _given(name, to)
        loss = dsm_loss(net, to(x), sigma=to(SIGMAS), noise=to(images(4, seed(3))), condition=given)
        loss.backward()
        return [loss, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])]

    compare(gradients, within=1e-3, copies=1)


def test_losses(compare):
    x = rand(4, 3, SIZE, SIZE)
    other = x.double() if KIND == "cuda" else x.half()

    def losses(to):
        net, noise, v = to(colors()), to(rand(4, 3, SIZE, SIZE, seed=1)), to(rand(4, 3, SIZE, SIZE, seed=2))
        return [
            sliced_score_matching_loss(net, to(x), sigma=to(SIGMAS), noise=noise, projections=v),
            dsm_loss(net, to(x), mask=torch.arange(SIZE) < 8, p=1, generator=0),
            dsm_loss(net, to(other), generator=0).float(),
        ]

    compare(losses, within=1e-2)


def test_likelihoods(compare):
    levels, x = NoiseSchedule.karras(10, 0.05, 4), (rand(6, 3, SIZE, SIZE) * 255).round() / 255

    def likelihoods(to):
        net = to(colors())
        return [
            log_likelihood(net, to(x), levels, generator=0, progress=False),
            log_likelihood(to(colors(classes=3)), to(x), levels, generator=[0] * 6, condition=1, progress=False),
            bits_per_dimension(net, to(x), levels, generator=0, progress=False),
        ]

    compare(likelihoods, within=1e-3)


def test_levels_of_data(compare):
    compare(lambda to: [*NoiseSchedule.from_data(to(rand(6, 3, SIZE, SIZE)))])
