"""Augmentation of which the network is told."""

import copy
import math

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.data import open_images
from scorematch.nets.blocks import AugmentationEmbedding
from scorematch.nets.inference import is_plain
from scorematch.training import Settings, train, train_steps
from scorematch.training.nonleaking import VALUES, changed, draw, told
from scorematch.training.start import fine_tuning
from tests.helpers import seed
from tests.training import Memory, image_net


def _numbers(**given):
    a = torch.zeros(2, 8)
    for name, value in given.items():
        a[:, int(name[1:])] = value
    return a


X = torch.rand(2, 3, 16, 16, generator=seed())
CASES = {  # random numbers, the image, what the network is told
    "nothing": ({}, X, [0] * 9),
    "x": ({"a0": 1}, X.flip(3), [1, *[0] * 8]),
    "y": ({"a1": 1}, X.flip(2), [0, 1, *[0] * 7]),
    "both": ({"a0": 1, "a1": 1}, X.rot90(2, (2, 3)), [1, 1, *[0] * 7]),
    "turned": ({"a3": math.pi / 2}, X.rot90(1, (2, 3)), [0, 0, 0, -1, 1, 0, 0, 0, 0]),
    "three pixels to the right": ({"a6": 1.5}, torch.cat([X[..., :3].flip(3), X[..., :-3]], 3), [*[0] * 7, 1.5, 0]),
    "two pixels up": ({"a7": -1}, torch.cat([X[..., 2:, :], X[..., -2:, :].flip(2)], 2), [*[0] * 8, -1]),
}


@pytest.mark.parametrize(("given", "image", "values"), CASES.values(), ids=CASES)
def test_changes_have_closed_forms(given, image, values):
    a = _numbers(**given)
    mirrored = not set(given) - {"a0", "a1"}
    torch.testing.assert_close(changed(X, a), image, rtol=0, atol=0 if mirrored else 1e-5)
    torch.testing.assert_close(told(a), torch.tensor(values, dtype=torch.float32).expand(2, -1))


@pytest.mark.parametrize(
    ("given", "map_of"),
    [
        ({"a2": 5.0}, lambda x, y: (x / 2, y / 2)),
        ({"a2": -2.5}, lambda x, y: (x * 2**0.5, y * 2**0.5)),
        ({"a5": 5.0}, lambda x, y: (x / 2, y * 2)),
        ({"a4": math.pi / 2, "a5": 5.0}, lambda x, y: (x * 2, y / 2)),
        ({"a3": 0.3}, lambda x, y: (x * math.cos(0.3) - y * math.sin(0.3), x * math.sin(0.3) + y * math.cos(0.3))),
        ({"a0": 1, "a6": 0.7, "a7": 0.4}, lambda x, y: (4.2 - x, y - 1.6)),
        ({"a2": 5.0, "a6": 0.7}, lambda x, y: (x / 2 - 2.1, y / 2)),
    ],
    ids=["twice as large", "smaller", "wide", "high", "turned", "mirrored and moved", "large and moved"],
)
def test_a_smooth_image_is_mapped_as_its_function(given, map_of):
    """On a rectangle of 32 x 48 pixels: the value at (x, y), from the middle, is that of the image at ``map_of``."""

    def image(x, y):
        return torch.sin(0.15 * x) + torch.cos(0.1 * y + 0.05 * x)

    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(48.0) - 23.5, indexing="ij")
    made = changed(image(x, y).expand(2, 1, -1, -1), _numbers(**given))[0, 0]
    source = map_of(x, y)
    inside = (source[0].abs() < 22) & (source[1].abs() < 14)
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(made[inside], image(*source)[inside], rtol=0, atol=0.03)


@pytest.mark.slow
def test_the_numbers_have_their_distribution():
    a = torch.stack([draw(generator) for generator in [seed(3)] for _ in range(2000)])
    shares = (a != 0).float().mean(0)
    assert ((shares - torch.tensor([0.5, 0.06, *[0.12] * 6])).abs() < 0.04).all()
    stretched = a[a[:, 5] != 0]
    assert (a[a[:, 5] == 0][:, 4] == 0).all() and stretched[:, 4].abs().max() > 3
    assert ((a[:, 6] != 0) == (a[:, 7] != 0)).all() and (a[:, 2:] == 0).all(1).float().mean() == pytest.approx(
        0.88**4, abs=0.05
    )
    assert a[a[:, 2] != 0][:, 2].std() == pytest.approx(1, abs=0.15)
    assert (told(a).any(1) == a.any(1)).all()


def _data():
    return Memory(torch.rand(24, 1, 8, 8, generator=seed(2)))


OPTIONS = {"images": 64, "batch_size": 8, "augment": ("nonleaking",), "lr": 1e-2, "precision": "float32"}


@pytest.mark.slow
def test_the_network_is_told_what_was_done_to_each_image():
    data, seen, net = _data(), [], image_net()

    def loss(net, x, **given):
        seen.append((x, net.backbone.augmentation.c))
        return dsm_loss(net, x, reduction="none", **given)

    for step in train_steps(net, data, Settings(**OPTIONS, microbatch=5, loss=loss)):
        last = step
    x, c = (torch.cat(each) for each in zip(*seen, strict=True))
    originals = data.x[data.seen[: len(x)]]
    kept, mirrored = (c == torch.eye(VALUES)[0] * flag for flag in (0, 1))
    for rows, expected in ((kept.all(1), originals), (mirrored.all(1), originals.flip(3))):
        assert rows.sum() > 10 and torch.equal(x[rows], expected[rows])
    others = ~kept.all(1) & ~mirrored.all(1)
    assert others.sum() > 10 and (x[others] != originals[others]).flatten(1).any(1).all()
    assert last.state.augmentation.linear.weight.norm() > 0
    assert net.backbone.augmentation is None and is_plain(last.state.average(), last.state.average().backbone)


def test_between_two_steps_the_network_is_told_of_no_change():
    net, x = image_net(), torch.rand(3, 1, 8, 8, generator=seed())
    for _ in train_steps(net, _data(), Settings(**{**OPTIONS, "images": 16})):
        plain = copy.deepcopy(net)
        plain.backbone.augmentation = None
        assert net.backbone.augmentation.linear.weight.any() and torch.equal(net(x, 0.3), plain(x, 0.3))


def test_the_layer_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert not AugmentationEmbedding(VALUES, 8).linear.weight.any()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["unet", "ncsnpp"])
def test_a_network_has_the_same_output_before_the_first_step_and_without_a_change(family):
    net = getattr(ScoreNet, family)(1, 8, widths=(12,), layers_per_block=1).eval()  # three channels in a group
    for parameter in net.parameters():  # which are zero at first
        torch.nn.init.normal_(parameter, std=0.1, generator=seed(7))
    x = torch.rand(4, 1, 8, 8, generator=seed())
    before = net(x, 0.3)
    layer = net.backbone.augmentation = AugmentationEmbedding(VALUES, 48)
    layer.c = torch.randn(4, VALUES, generator=seed())
    assert torch.equal(net(x, 0.3), before)
    torch.nn.init.normal_(layer.linear.weight)
    assert not torch.allclose(net(x, 0.3), before)
    layer.c = torch.zeros(4, VALUES)
    assert torch.equal(net(x, 0.3), before)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits_and_saves_networks_without_the_layer(tmp_path):
    options = {**OPTIONS, "progress": False, "checkpoint_every": 16}
    whole = train(image_net(), _data(), tmp_path / "whole", **options)

    def stop(net, images):
        if images >= 32:
            raise KeyboardInterrupt
        return {}

    net = image_net()
    with pytest.raises(KeyboardInterrupt):
        train(net, _data(), tmp_path / "run", **options, evaluate=stop, sample_every=16)
    assert net.backbone.augmentation is None
    again = train(image_net(), _data(), tmp_path / "run", **options)
    other = train(image_net(), _data(), tmp_path / "other", **{**options, "augment": ("flip",)})
    weights = whole.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    assert not all(torch.equal(value, other.state_dict()[name]) for name, value in weights.items())
    assert (
        weights.keys()
        == image_net().state_dict().keys()
        == ScoreNet.from_pretrained(tmp_path / "run" / "network").state_dict().keys()
    )


def test_networks_and_data_that_cannot_be_told_raise(tmp_path):
    message = r"augment='nonleaking' needs images \(C, H, W\) and a U-Net or NCSN\+\+.*got samples of shape"
    for net, data in (
        (ScoreNet.ncsnv2(1, 8, width=8), torch.rand(8, 1, 8, 8)),
        (ScoreNet.unet(1, (8,), widths=(8,)), torch.randn(8, 1, 8)),
    ):
        with pytest.raises(ValueError, match=message.replace("'", ".")):
            train(net, data, tmp_path / "run", images=8, batch_size=8, augment=("nonleaking",), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_changes_of_which_the_network_is_told_do_not_leak():
    """At a high noise level the denoised image is the mean of the data: that without changes, and not that over all."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blob = (-((x - 5) ** 2 + (y - 2) ** 2) / 3).exp()[None, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ScoreNet.unet(1, 8, widths=(12, 16), layers_per_block=1)
    settings = Settings(
        **{**OPTIONS, "images": 3200, "batch_size": 32, "levels": NoiseSchedule([5.0]), "decay": "constant"}
    )
    for step in train_steps(net, Memory(blob.expand(32, -1, -1, -1)), settings):
        last = step

    def error(image):
        return (image - blob).square().mean().sqrt()

    noisy = 5 * torch.randn(64, 1, 8, 8, generator=seed(5))
    assert error(last.state.average().denoise(noisy, 5.0).mean(0)) < 0.06
    numbers = torch.stack([draw(generator) for generator in [seed(6)] for _ in range(2000)])
    assert error(changed(blob.expand(2000, -1, -1, -1), numbers).mean(0)) > 0.15


def test_a_start_with_few_pictures_augments_them_and_has_small_batches():
    net = ScoreNet.unet(1, 8, widths=(12,), layers_per_block=1)
    for n, augment, batch_size in [
        (9, ("nonleaking",), 9),
        (99, ("nonleaking",), 24),
        (100, None, 24),
        (3000, None, 128),
    ]:
        found = fine_tuning(net, open_images(torch.zeros(n, 1, 8, 8, dtype=torch.uint8)), Settings())
        assert (found.get("augment"), found["batch_size"]) == (augment, batch_size)
        assert found["images"] // found["batch_size"] >= 750
    assert fine_tuning(net, open_images(torch.zeros(9, 1, 8, 8)), Settings(images=64))["batch_size"] == 8


def test_a_start_with_a_wide_network_has_a_lower_rate():
    rates = []
    for width in (12, 480, 960):
        net = ScoreNet.unet(1, 8, widths=(width,), layers_per_block=1)
        rates.append(fine_tuning(net, open_images(torch.zeros(100, 1, 8, 8)), Settings())["lr"])
    assert rates[0] == 5e-4 > rates[1] == pytest.approx(2 * rates[2], rel=0.05)  # inversely proportional to the width
