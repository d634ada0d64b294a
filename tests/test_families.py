"""Tests of all families: the properties that a family declares are those of its networks."""

import copy
import inspect

import pytest
import torch
from torch import nn

from scorematch import ScoreNet
from scorematch.core.conditions import Condition
from scorematch.core.schema import check
from scorematch.nets import FAMILIES, MLP, family_of
from scorematch.nets.blocks import Attention, ResidualBlock
from scorematch.nets.precondition import ROWS
from tests.networks import CHANNELS, CONDITIONS, LEVELS, NETS, SIZE, condition, every_path, images, network, shared

every_net = pytest.mark.parametrize("name", NETS)


def _arguments(name, rng, position):
    """The arguments of a backbone at a noise level."""
    beside = condition(name, 2, rng)
    return (images(2, rng), position, *([] if beside is None else [beside]))


def test_every_family_is_tested_here():
    """Those of images; tests/test_mlp.py has the tests of networks for vectors."""
    assert {family for family, _, _ in NETS.values()} == {name for name in FAMILIES if name != "mlp"}


@every_net
def test_a_configuration_builds_a_network_of_its_family(name):
    family, precondition, architecture = NETS[name]
    check(architecture, FAMILIES[family].keys, "the configuration", closed=True)
    made = shared(name).backbone
    assert type(made) is FAMILIES[family].network
    assert family_of(made) is FAMILIES[family]
    assert precondition in FAMILIES[family].preconditions


@pytest.mark.parametrize("family", ["unet", "ncsnpp"])
def test_the_keys_of_a_configuration_are_the_arguments_of_its_network(family):
    assert inspect.signature(FAMILIES[family].network).parameters.keys() == FAMILIES[family].keys.keys()


WIDTH, LAYERS, CLASSES, SHARE = (1, 65_536), (1, 64), (1, 10_000_000), (0, 1)
EXTREMES = {
    "refinenet": {"channels": WIDTH, "width": (2, 65_536)},
    "ncsnpp": {
        **dict.fromkeys(("in_channels", "out_channels", "model_channels", "time_embedding_dim"), WIDTH),
        **{"time_proj_dim": (2, 65_536), "layers_per_block": LAYERS, "patch": LAYERS},
        **{"num_class_embeds": CLASSES, "dropout": SHARE},
    },
    "unet": {
        **dict.fromkeys(("in_channels", "out_channels", "attention_head_dim", "norm_num_groups"), WIDTH),
        **dict.fromkeys(("attn_norm_num_groups", "time_embedding_dim"), WIDTH),
        **dict.fromkeys(("layers_per_block", "patch", "pixel_layers"), LAYERS),
        **{"norm_eps": SHARE, "dropout": SHARE, "downsample_padding": SHARE, "num_class_embeds": CLASSES},
        **{"time_proj_dim": (2, 65_536), "pixel_channels": (0, 65_536), "freq_shift": (-1000, 1000)},
        **{"mid_block_scale_factor": (1e-3, 1000), "time_factor": (1e-6, 1e6)},
        **{"condition_features": (0, 1_000_000), "dimensions": (1, 3)},
    },
    "mlp": {
        **{"features": (1, 1_000_000), "width": (2, 65_536), "depth": (1, 256)},
        **{"classes": CLASSES, "condition_features": (0, 1_000_000), "dropout": SHARE},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_extreme_values_of_a_configuration(family):
    """Files with these values can be read in every version."""
    for key, field in FAMILIES[family].keys.items():
        if field.kind in (int, float):
            low, high = EXTREMES[FAMILIES[family].network.__name__.lower()][key]
            assert all(map(field.fits, (low, high))), key
            step = 1 if field.kind is int else 1e-9
            assert not field.fits(low - step) and not field.fits(high + step), key
        if field.kind is list and field.each is not None:
            each = True if field.each.kind is bool else (field.each.choices or (65_536,))[0]
            assert all(field.fits([each] * n) == (1 <= n <= 16) for n in (0, 1, 16, 17)), key
            assert field.each.kind is not int or (field.fits([1]) and not field.fits([0]) and not field.fits([65_537]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_accepts_only_the_preconditioning_rows_of_its_family(family):
    if family == "mlp":
        made = MLP(2, 4, 1)
    else:
        made = shared(next(name for name, (other, _, _) in NETS.items() if other == family)).backbone
    for row in ROWS:
        if row in FAMILIES[family].preconditions:
            assert ScoreNet(made, LEVELS, precondition=row).family is FAMILIES[family]
        else:
            with pytest.raises(ValueError, match=f"precondition '{row}' does not fit"):
                ScoreNet(made, LEVELS, precondition=row)


@every_path
def test_a_network_accepts_only_the_condition_that_it_describes(name, rng):
    net, x = shared(name), images(2, rng)
    assert net.conditioning == CONDITIONS.get(name, Condition())
    assert net(x, 0.3, condition(name, 2, rng)).shape == x.shape
    kinds = {"nothing": None, "classes": torch.tensor([0, 1]), "an image": images(2, rng)}
    takes = net.conditioning
    del kinds["classes" if takes.classes is not None else "an image" if takes.channels else "nothing"]
    if takes.null_class:
        del kinds["nothing"]
    for other in kinds.values():
        with pytest.raises((TypeError, ValueError), match="condition"):
            net(x, 0.3, other)


@every_net
@torch.no_grad()
def test_image_convolutions_are_those_with_the_channels_of_the_image(name):
    """At the image itself, its pyramid and its patches, also with an image as a condition."""
    made = shared(name).backbone
    convolutions = {path: module for path, module in made.named_modules() if isinstance(module, nn.Conv2d)}
    first, last = FAMILIES[NETS[name][0]].image_convolutions(made)
    assert first == {path for path, module in convolutions.items() if module.in_channels % CHANNELS == 0}
    assert last == {path for path, module in convolutions.items() if module.out_channels % CHANNELS == 0}
    assert first and last


@pytest.mark.parametrize("family", ["unet", "ncsnpp"])
def test_a_new_network_begins_with_blocks_that_are_the_identity_and_an_output_of_zero(family):
    made = getattr(ScoreNet, family)(1, 8, widths=(4, 8), layers_per_block=1).backbone
    weights = {name for name, weight in made.named_parameters() if weight.ndim > 1 and not weight.any()}
    last = {ResidualBlock: "conv2", **({Attention: "to_out.0"} if family == "ncsnpp" else {})}
    blocks = {f"{path}.{last[type(module)]}" for path, module in made.named_modules() if type(module) in last}
    assert weights == {f"{path}.weight" for path in blocks | FAMILIES[family].image_convolutions(made)[1]}


@pytest.mark.parametrize("name", [name for name in NETS if CONDITIONS.get(name, Condition()).null_class])
@torch.no_grad()
def test_the_null_class_is_the_condition_where_none_is_given(name, rng):
    net, x = shared(name), images(2, rng)
    null = net.conditioning.classes
    for score in (net, net.inference_copy()):
        expected = score(x, 0.3, torch.full((2,), null))
        assert torch.equal(score(x, 0.3), expected) and torch.equal(score(x, 0.3, null), expected)
        assert not torch.allclose(score(x, 0.3, 0), expected)
        with pytest.raises(ValueError, match=f"from 0 to {null - 1}, or {null} for none, got class {null + 1}"):
            score(x, 0.3, null + 1)


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


@every_path
@torch.no_grad()
def test_level_modules_are_those_whose_output_does_not_depend_on_the_image(name, rng):
    made = shared(name).backbone
    level = torch.tensor([1.5, 3.0])
    first, second = (_arguments(name, rng, level) for _ in range(2))
    takes = CONDITIONS.get(name, Condition())
    if takes.classes is not None or takes.vector:
        second = (*second[:2], first[2])
    one, other = _outputs(made, first), _outputs(made, second)
    modules = dict(made.named_modules())
    named = {path for path in FAMILIES[NETS[name][0]].level_modules(made) if path in one}
    assert named == {path for path in one if torch.equal(one[path], other[path])}
    assert all(isinstance(modules[path], nn.Linear) for path in named)


@every_path
@torch.no_grad()
def test_width_is_the_number_of_values_of_the_first_features_per_pixel(name, rng):
    """Rounded up. The inference copy derives from it how many images it processes at once."""
    made = shared(name).backbone
    family = FAMILIES[NETS[name][0]]
    outputs = _outputs(made, _arguments(name, rng, torch.tensor([1.5, 3.0])))
    first = {path for path in family.image_convolutions(made)[0] if "." not in path} | ({"conv_in"} & outputs.keys())
    assert family.width(made) == max(-(-outputs[path][0].numel() // SIZE**2) for path in first)


@every_path
@torch.no_grad()
def test_a_copy_with_a_fixed_level_uses_the_level_that_was_set(name, rng):
    made = shared(name).backbone
    fixed = copy.deepcopy(made).requires_grad_(False)
    set_level = FAMILIES[NETS[name][0]].fix_level(fixed)
    arguments = _arguments(name, rng, torch.full((2,), 4.0))
    for level in (0.0, 3.25):
        set_level(torch.tensor(level))
        expected = made(arguments[0], torch.full((2,), level), *arguments[2:])
        torch.testing.assert_close(fixed(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp", "NCSN++"])
@torch.no_grad()
def test_the_frequencies_of_fourier_features_are_not_rounded_in_half_precision(name, rng):
    """At low noise levels rounding to bfloat16 would change a phase by half a period."""
    net, x = network(name), images(2, rng)
    frequencies = net.backbone.time_proj.weight
    frequencies.copy_(16 * torch.randn(frequencies.shape, generator=rng))
    expected = net(x, 0.02)
    for convert, bound in (
        (lambda net: net.half(), 0.005),
        (lambda net: net.bfloat16(), 0.04),
        (lambda net: net.to("cpu", torch.bfloat16), 0.04),
        (lambda net: net.double().half().bfloat16(), 0.04),
    ):
        low = copy.deepcopy(net)
        convert(low)
        assert torch.equal(low.backbone.time_proj.weight, frequencies)
        assert low.backbone.conv_in.weight.dtype.itemsize == 2
        assert low(x, 0.02).dtype == torch.float32
        assert (low(x, 0.02) - expected).norm() < bound * expected.norm()
    assert torch.equal(net.double().backbone.time_proj.weight, frequencies.double())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export
@pytest.mark.parametrize("name", ["ncsn", "unet, classes", "unet, image", "NCSN++, index"])
@torch.no_grad()
def test_exported_networks_take_batches_of_any_length(name, rng):
    net = shared(name)

    def arguments(n):
        beside = condition(name, n, rng)
        return (images(n, rng), torch.rand(n, generator=rng) + 0.1, *([] if beside is None else [beside]))

    batch = torch.export.Dim("batch", min=1, max=64)
    given = arguments(2)
    exported = torch.export.export(net, given, dynamic_shapes=tuple({0: batch} for _ in given), strict=False).module()
    for n in (1, 2, 5):
        given = arguments(n)
        torch.testing.assert_close(exported(*given), net(*given))
