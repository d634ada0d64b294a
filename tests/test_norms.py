"""Weights of fixed norm."""

import pytest
import torch

from scorematch import ScoreNet
from scorematch.training import Settings, train_steps
from scorematch.training.muon import matrices
from scorematch.training.norms import FixedNorms
from scorematch.training.steps import TrainingState
from tests.training import Memory, images, points, points_net, steps, vector


def test_the_weights_of_each_output_have_their_norm_back_and_keep_their_direction():
    first = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    weight, filters = torch.nn.Parameter(first.clone()), torch.nn.Parameter(torch.ones(2, 1, 2, 2))
    fixed = FixedNorms({"weight": weight, "filters": filters})
    weight.data = torch.tensor([[0.0, 12.0], [6.0, 8.0]])
    filters.data = torch.stack([torch.full((1, 2, 2), 7.0), torch.zeros(1, 2, 2)])
    fixed.restore()
    assert torch.equal(weight.data, torch.tensor([[0.0, 5.0], [6.0, 8.0]]))  # what is zero at first is free
    assert torch.equal(filters.data, torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_changes_directions_and_what_begins_at_zero(optimizer):
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False])
    before = [weight.detach().clone() for weight in matrices(net)]
    steps(net, Memory(images()), images=32, batch_size=8, lr=0.05, optimizer=optimizer, fixed_norms=True)
    free = []
    for old, new in zip(before, matrices(net), strict=True):
        norm, own = old.flatten(1).norm(dim=1), new.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(own[norm > 0], norm[norm > 0])
        assert not torch.equal(new, old)
        free.append(bool((norm == 0).all()))
    assert 0 < sum(free) < len(free)


def test_a_run_continues_with_the_norms_of_its_beginning():
    settings = Settings(images=48, batch_size=8, optimizer="muon", fixed_norms=True, augment=())

    def run(net, stop, state=None):
        for step in train_steps(net, points(), settings, state=state):
            state = step.state
            if step.images == stop:
                break
        return state

    whole, part, later = run(points_net(), 48), run(points_net(), 24), points_net()
    for weight in matrices(later):
        weight.data.mul_(2)  # other weights at first
    state = TrainingState(later, settings)
    state.load(part.tensors(), part.images, part.step)
    assert torch.equal(vector(run(later, 48, state).net), vector(whole.net))
