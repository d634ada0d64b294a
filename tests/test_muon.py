"""Muon: closed forms of its steps, and AdamW for what is no matrix."""

import math

import pytest
import torch
from torch import nn

from scorematch import ScoreNet
from scorematch.training import muon
from scorematch.training.muon import Muon, matrices, orthogonal
from tests.helpers import seed


@pytest.mark.parametrize("size", [(3, 7), (7, 3), (5, 5), (1, 4)])
def test_a_polynomial_moves_the_singular_values_towards_one(size):
    x = torch.randn(size, generator=seed(), dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(x), left @ values.diag() @ right)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonal(x.float()).double(), orthogonal(x), rtol=0, atol=1e-5)
    assert torch.equal(orthogonal(0 * x), 0 * x)


def test_the_range_of_the_singular_values():
    """They are those of the docstring, for values from 0.0016 of the norm on, and grow with the values below."""
    high, low = (torch.linspace(*ends, 2000, dtype=torch.float64) for ends in ((0.0016, 0.7), (1e-5, 0.0016)))
    found, below = (orthogonal(torch.stack([s, (1 - s**2).sqrt()], 1).diag_embed()) for s in (high, low))
    values = found.diagonal(dim1=1, dim2=2)
    assert 0.68 < values.min() < 0.69 and 1.2 < values.max() < 1.21
    assert (below[:, 0, 0].diff() > 0).all() and below[-1, 0, 0] < 0.72 and below[1250, 0, 0] < 0.5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
def test_a_step_is_that_of_torch_for_matrices_and_of_adamw_for_the_rest():
    """torch has Muon for matrices, in bfloat16."""
    options = {"lr": 0.01, "weight_decay": 0.1}
    own, other = (nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 4)) for _ in range(2))
    other.load_state_dict(own.state_dict())
    start = [layer.weight.clone() for layer in (own[0], own[2])]
    ours = Muon(own.parameters(), matrices(own), **options)
    rest = torch.optim.AdamW([other[0].bias, other[2].bias], **options)
    theirs = torch.optim.Muon([other[0].weight, other[2].weight], adjust_lr_fn="match_rms_adamw", **options)
    for k in range(3):
        x = torch.randn(8, 6, generator=seed(k))
        for net, optimizers in ((own, [ours]), (other, [theirs, rest])):
            net(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad()
    for layer, torchs, before in zip((own[0], own[2]), (other[0], other[2]), start, strict=True):
        change = torchs.weight - before
        assert (layer.weight - torchs.weight).norm() < 0.03 * change.norm()
        assert (layer.bias - torchs.bias).abs().max() < 1e-3


def test_the_first_step_of_a_convolution_has_its_closed_form():
    layer = nn.Conv2d(2, 3, 3, bias=False).to(memory_format=torch.channels_last)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(3, 2, 3, 3, generator=seed())
    update = orthogonal(layer.weight.grad.flatten(1).clone()).view(3, 2, 3, 3)  # it does not depend on the norm
    Muon(layer.parameters(), matrices(layer), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight.detach(), (1 - 0.05) * before - 0.1 * 0.2 * math.sqrt(18) * update)
    root_mean_square = update.square().mean().sqrt() * 0.2 * math.sqrt(18)
    assert 0.14 < root_mean_square < 0.24  # near that of AdamW, for every shape


def test_matrices_in_groups_take_the_same_steps_as_alone(monkeypatch):
    weights = []
    for devices, values in ((("cpu",), 1), ((), 2**24), ((), 2 * 12)):  # each alone, all of one size, two of them
        monkeypatch.setattr(muon, "_ALONE", devices)
        monkeypatch.setattr(muon, "_GROUP_VALUES", values)
        stacked = []
        monkeypatch.setattr(muon, "orthogonal", lambda x, sizes=stacked: (sizes.append(len(x)), orthogonal(x))[1])
        layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)])
        for k, parameter in enumerate(layers.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=seed(k))
        optimizer = Muon(layers.parameters(), matrices(layers), lr=0.1)
        for step in range(2):
            for k, parameter in enumerate(layers.parameters()):
                parameter.grad = None if k == 2 and step == 0 else torch.randn(parameter.shape, generator=seed(9 * k))
            optimizer.step()
        weights.append([parameter.detach() for parameter in layers.parameters()])
        assert stacked == {1: [1] * 7, 2**24: [2, 1, 3, 1], 24: [2, 1, 2, 1, 1]}[values]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


def test_the_matrices_of_a_network_are_those_of_its_layers():
    net = ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=1, classes=3)
    net.backbone.conv_out.requires_grad_(False)
    found = {id(parameter) for parameter in matrices(net)}
    names = {name for name, parameter in net.named_parameters() if id(parameter) not in found}
    assert {"backbone.conv_out.weight", "backbone.class_embedding.weight"} <= names
    assert all(
        name.endswith("bias") or "norm" in name for name in names - {"backbone.conv_out.weight"} if "class" not in name
    )
