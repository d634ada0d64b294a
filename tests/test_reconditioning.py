"""Networks that begin with the weights of a network with another condition."""

import pytest
import torch

from scorematch import ScoreNet
from scorematch.nets.reconditioning import difference
from scorematch.training.start import begin_with

X, SIGMA = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
SAME = {"atol": 1e-6, "rtol": 0}


def _net(builder, names=None, **options):
    """A network of random weights, in which every condition has an effect."""
    net = getattr(ScoreNet, builder)(1, 8, widths=(8, 8), layers_per_block=1, **options)
    net.class_names = names
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return net.eval()


@torch.no_grad()
def _output(net, condition=None):
    return net(X, SIGMA) if condition is None else net(X, SIGMA, condition)


@pytest.fixture(params=["unet", "ncsnpp"])
def builder(request):
    return request.param


@pytest.mark.parametrize("null_class", [True, False])
def test_a_network_keeps_its_outputs_for_the_classes_that_are_kept(builder, null_class, tmp_path):
    """By their names, in any order, before the first step; the others begin with that of no class."""
    before = _net(builder, ("cat", "dog", "cow"), classes=3, null_class=null_class)
    before.save_pretrained(tmp_path)
    net = _net(builder, ("dog", "owl", "cat", "ant"), classes=4, null_class=True)
    begin_with(net, tmp_path)
    for name in ("cat", "dog"):
        assert torch.equal(_output(net, net.class_names.index(name)), _output(before, before.class_names.index(name)))
    assert not torch.equal(_output(net, 0), _output(net, 1))
    if null_class:
        assert torch.equal(_output(net), _output(before)) and torch.equal(_output(net, 1), _output(before))
    assert difference(before.config, net.config) == "2 of its 3 classes are kept, 2 classes are new"


def test_classes_without_names_are_kept_by_their_numbers(builder, tmp_path):
    before = _net(builder, ("cat", "dog", "cow"), classes=3)
    before.save_pretrained(tmp_path)
    net = _net(builder, classes=2)
    begin_with(net, tmp_path)
    assert all(torch.equal(_output(net, k), _output(before, k)) for k in (0, 1))


def test_a_network_without_classes_has_the_output_of_no_class_and_back(builder, tmp_path):
    before = _net(builder, classes=3, null_class=True)
    before.save_pretrained(tmp_path / "classes")
    flat, back = _net(builder), _net(builder, classes=2)
    begin_with(flat, tmp_path / "classes")
    torch.testing.assert_close(_output(flat), _output(before), **SAME)
    assert difference(before.config, flat.config) == "none of its 3 classes are kept"
    flat.save_pretrained(tmp_path / "flat")
    begin_with(back, tmp_path / "flat")
    assert all(torch.equal(_output(back, k), _output(flat)) for k in (0, 1))
    assert difference(flat.config, back.config) == "2 classes are new" and difference(flat.config, flat.config) is None


@pytest.mark.slow
def test_an_image_or_a_vector_takes_the_place_of_classes(tmp_path):
    before = _net("unet", classes=3, null_class=True)
    before.save_pretrained(tmp_path / "classes")
    image, vector = _net("unet", condition_channels=1), _net("unet", condition_features=4)
    for net, condition in ((image, X.flip(0)), (vector, X[:, 0, 0, :4])):
        begin_with(net, tmp_path / "classes")
        torch.testing.assert_close(_output(net, condition), _output(before), **SAME)
    expected = "none of its 3 classes are kept, the vector of its condition is new"
    assert difference(before.config, vector.config) == expected
    vector.save_pretrained(tmp_path / "vector")
    flat = _net("unet")
    begin_with(flat, tmp_path / "vector")
    torch.testing.assert_close(_output(flat), _output(vector, torch.full((3, 4), torch.nan)), **SAME)
    assert difference(vector.config, flat.config) == "its condition is left out"


def test_networks_of_vectors_and_refinenets_keep_their_condition(tmp_path):
    ScoreNet.mlp(2, classes=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classes is 3 instead of 2"):
        begin_with(ScoreNet.mlp(2, classes=2), tmp_path)
