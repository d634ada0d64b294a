"""Laws of all families of networks: what each says about its networks is true of them."""

import copy
import inspect

import pytest
import torch
from torch import nn

from scorematch import ScoreNet
from scorematch.nets import FAMILIES, family_of
from scorematch.nets.family import Condition
from scorematch.precondition import ROWS
from scorematch.schema import check
from tests.networks import CHANNELS, CONDITIONS, LEVELS, NETS, SIZE, backbone, condition, images, network

every_net = pytest.mark.parametrize("name", NETS)


def _arguments(name, rng, position):
    """What a backbone is called with, at a noise level."""
    beside = condition(name, 2, rng)
    return (images(2, rng), position, *([] if beside is None else [beside]))


def test_every_family_has_networks_here():
    assert {family for family, _, _ in NETS.values()} == FAMILIES.keys()


@every_net
def test_a_configuration_builds_a_network_of_its_family(name):
    family, precondition, architecture = NETS[name]
    check(architecture, FAMILIES[family].keys, "the configuration", closed=True)
    made = backbone(name)
    assert type(made) is FAMILIES[family].network
    assert family_of(made) is FAMILIES[family]
    assert precondition in FAMILIES[family].preconditions


def test_the_keys_of_a_unet_are_its_arguments():
    assert inspect.signature(FAMILIES["unet"].network).parameters.keys() == FAMILIES["unet"].keys.keys()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_used_with_the_rows_of_its_family_alone(family, row):
    made = backbone(next(name for name, (other, _, _) in NETS.items() if other == family))
    if row in FAMILIES[family].preconditions:
        assert ScoreNet(made, LEVELS, precondition=row).family is FAMILIES[family]
    else:
        with pytest.raises(ValueError, match=f"precondition '{row}' does not fit"):
            ScoreNet(made, LEVELS, precondition=row)


@every_net
def test_it_takes_the_condition_that_it_describes_and_no_other(name, rng):
    net, x = network(name), images(2, rng)
    assert net.conditioning == CONDITIONS.get(name, Condition())
    assert net(x, 0.3, condition(name, 2, rng)).shape == x.shape
    kinds = {"nothing": None, "classes": torch.tensor([0, 1]), "an image": images(2, rng)}
    takes = net.conditioning
    del kinds["classes" if takes.classes is not None else "an image" if takes.channels else "nothing"]
    for other in kinds.values():
        with pytest.raises((TypeError, ValueError), match="condition"):
            net(x, 0.3, other)


@every_net
@torch.no_grad()
def test_the_image_convolutions_are_those_with_the_channels_of_the_image(name):
    """Of the image itself, its pyramid, its patches, and an image beside it."""
    made = backbone(name)
    convolutions = {path: module for path, module in made.named_modules() if isinstance(module, nn.Conv2d)}
    first, last = FAMILIES[NETS[name][0]].image_convolutions(made)
    assert first == {path for path, module in convolutions.items() if module.in_channels % CHANNELS == 0}
    assert last == {path for path, module in convolutions.items() if module.out_channels % CHANNELS == 0}
    assert first and last


def _outputs(made, arguments):
    """The outputs of the convolutions and linear layers by name."""
    found, hooks = {}, []
    for path, module in made.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(lambda _, __, output, path=path: found.update({path: output})))
    made(*arguments)
    for hook in hooks:
        hook.remove()
    return found


@every_net
@torch.no_grad()
def test_the_level_modules_are_those_that_do_not_see_the_image(name, rng):
    made = backbone(name)
    level = torch.tensor([1.5, 3.0])
    one, other = (_outputs(made, _arguments(name, rng, level)) for _ in range(2))
    modules = dict(made.named_modules())
    named = {path for path in FAMILIES[NETS[name][0]].level_modules(made) if path in one}
    assert named == {path for path in one if torch.equal(one[path], other[path])}
    assert all(isinstance(modules[path], nn.Linear) for path in named)


@every_net
@torch.no_grad()
def test_the_width_counts_the_values_of_the_first_features(name, rng):
    """Per pixel of the image, rounded up; batches are divided into parts by it."""
    made = backbone(name)
    family = FAMILIES[NETS[name][0]]
    outputs = _outputs(made, _arguments(name, rng, torch.tensor([1.5, 3.0])))
    first = {path for path in family.image_convolutions(made)[0] if "." not in path} | ({"conv_in"} & outputs.keys())
    assert family.width(made) == max(-(-outputs[path][0].numel() // SIZE**2) for path in first)


@every_net
@torch.no_grad()
def test_a_settled_copy_ignores_the_level_that_it_is_given(name, rng):
    made = backbone(name)
    settled = copy.deepcopy(made).requires_grad_(False)
    settle = FAMILIES[NETS[name][0]].settle(settled)
    arguments = _arguments(name, rng, torch.full((2,), 4.0))
    for level in (0.0, 3.25, 1.0):
        settle(torch.tensor(level))
        expected = made(arguments[0], torch.full((2,), level), *arguments[2:])
        torch.testing.assert_close(settled(*arguments), expected, rtol=1e-4, atol=1e-4)
