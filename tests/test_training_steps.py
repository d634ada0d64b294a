"""Training without files: noise levels, settings, steps, and conditions."""

import copy
import inspect
import itertools
import math
import random
import sys
import threading
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.conditions import Condition
from scorematch.core.randomness import seed_of
from scorematch.data import open_images
from scorematch.loss import sliced_score_matching_loss
from scorematch.nets.precondition import Preconditioning, Units
from scorematch.restoration.palette import Inpainting
from scorematch.training import LevelMixture, LogNormal, LogUniform, Settings, UniformTime, train, train_steps
from scorematch.training.accelerator import make_accelerator
from scorematch.training.levels import ScheduleLevels, levels_for, uniforms, weighting_for
from scorematch.training.settings import TrainSettings
from scorematch.training.steps import Order, prepare
from tests.helpers import seed
from tests.training import MLP, Memory, Recorder, content, image_net, images, points, points_net, quick, steps, vector

pytestmark = pytest.mark.usefixtures("no_plots")

# -- Noise levels and weights -----------------------------------------------------------------------------------------


def test_uniforms_do_not_depend_on_batches_and_are_evenly_spread():
    u = uniforms(3, 0, 1000)
    assert torch.equal(torch.cat([uniforms(3, 0, 7), uniforms(3, 7, 1000)]), u)
    assert not torch.equal(uniforms(4, 0, 1000), u)
    for start in (0, 10**12):  # the largest deviation from even spacing is at least 0.5 / n
        sorted_u = uniforms(3, start, start + 128).sort().values
        even = (torch.arange(128) + 0.5) / 128
        assert (sorted_u - even).abs().max() < 3 / 128
        assert sorted_u.min() > 0 and sorted_u.max() < 1


def test_log_normal_levels_have_their_mean_and_deviation():
    log = LogNormal(-1.2, 0.7).quantile(uniforms(0, 0, 20_000)).log()
    assert log.mean() == pytest.approx(-1.2, abs=1e-3) and log.std() == pytest.approx(0.7, abs=1e-3)


def test_log_uniform_levels_have_their_quantiles():
    sigma = LogUniform(0.01, 10).quantile(torch.tensor([0, 0.5, 1], dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([0.01, math.sqrt(0.1), 10], dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"beta_min": 0.5, "beta_max": 8.0}], ids=str)
def test_uniform_times_are_those_of_the_preconditioning_at_their_levels(options):
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    row = Preconditioning("vp", NoiseSchedule([1.0]), (0, 1), options={**options, "time_scale": 1.0})
    time = row.coefficients(UniformTime(first=0.01, **options).quantile(u)).c_noise
    torch.testing.assert_close(time, 0.01 + 0.99 * u)


def test_the_levels_of_a_schedule_are_drawn_equally_often():
    schedule = NoiseSchedule.geometric(1, 0.01, 10)
    sigma = ScheduleLevels(schedule).quantile(uniforms(0, 0, 1000))
    counts = [int((sigma == level).sum()) for level in schedule]
    assert sum(counts) == 1000 and max(counts) - min(counts) <= 3


def test_a_mixture_of_levels_draws_equally_often_from_its_parts():
    schedule = NoiseSchedule.geometric(10, 5, 4)
    mixture = LevelMixture((schedule, LogNormal(-1.2, 0.7)))  # the parts do not overlap: log 5 is four deviations away
    sigma = mixture.quantile(uniforms(0, 0, 20_000))
    high = sigma[sigma > 4.9]
    assert len(high) == pytest.approx(10_000, abs=10)
    counts = [int(torch.isclose(high, torch.tensor(level, dtype=torch.float64)).sum()) for level in schedule]
    assert sum(counts) == len(high) and max(counts) - min(counts) <= 10
    low = sigma[sigma < 4.9].log()
    assert low.mean() == pytest.approx(-1.2, abs=1e-3) and low.std() == pytest.approx(0.7, abs=1e-3)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (mixture.quantile(u).diff() >= 0).all()
    one = LevelMixture((LogUniform(0.01, 10),))
    torch.testing.assert_close(one.quantile(u), LogUniform(0.01, 10).quantile(u), rtol=1e-3, atol=0)
    assert levels_for(image_net(), mixture) is mixture


def test_default_levels_are_those_of_edm_or_of_the_schedule():
    assert levels_for(image_net(), None) == LogNormal(-1.2 - math.log(2), 1.2)  # images in [0, 1]
    assert levels_for(points_net(), None) == LogNormal(-1.2, 1.2)  # data without a range are not rescaled
    signals = ScoreNet.unet(1, (32,), widths=(8,))
    signals.fit_units(torch.randn(50, 1, 32, generator=seed()))
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    above = (levels_for(signals, None).quantile(u) > 20 * signals.units.std[0]).double().mean()
    # A quarter is log-uniform between 0.02 and 200 deviations; of the others 1.8 in 1,000 are above 20.
    assert above == pytest.approx(0.25 * math.log(200 / 20) / math.log(200 / 0.02) + 0.75 * 0.0018, rel=0.02)
    wide = ScoreNet(torch.nn.Identity(), NoiseSchedule([1.0, 0.5]), precondition_options={"sigma_data": 100.0})
    assert levels_for(wide, None) == LogNormal(-1.2 + math.log(200), 1.2)  # in proportion to the data
    net = ScoreNet.ncsnv2(1, 8, width=8)
    assert levels_for(net, None) == ScheduleLevels(net.schedule)
    assert levels_for(net, NoiseSchedule([1.0, 0.5])) == ScheduleLevels(NoiseSchedule([1.0, 0.5]))


@pytest.mark.parametrize("precondition", ["karras", "ddpm", "ddpm_v", "ncsnv2", "ncsn"])
def test_the_weighting_backbone_is_the_inverse_of_c_out(precondition):
    schedule = NoiseSchedule.geometric(1, 0.01, 10)
    net = ScoreNet(MLP(), schedule, precondition=precondition, sample_shape=(2,))
    sigma = torch.tensor([0.01, 0.3, 1.0])
    c_out = torch.as_tensor(Preconditioning(precondition, schedule, None).coefficients(sigma).c_out)
    for p in (1, 2):
        torch.testing.assert_close(weighting_for(net, "backbone", p)(sigma), c_out.abs().expand(3) ** -p)
    assert (weighting_for(net, None, 2) is None) == (precondition == "ncsn")


@pytest.mark.parametrize("precondition", ["ncsn", "ddpm", "karras", "flow"])
def test_the_weighting_min_snr_limits_the_weight_of_the_denoised_image_to_five(precondition):
    schedule, sigma = NoiseSchedule.geometric(1, 0.01, 10), torch.tensor([0.01, 0.2, 0.25, 1.0])
    images = ScoreNet(MLP(), schedule, precondition=precondition, sample_shape=(2,), value_range=(0, 1))
    of_score = weighting_for(images, "min-snr", 2)(sigma)
    of_image = of_score / sigma**4  # the denoised image is x + sigma^2 times the score
    torch.testing.assert_close(of_image, 4 * torch.tensor([5.0, 5, 4, 0.25]))  # of images from -1 to 1, divided by 4
    torch.testing.assert_close(weighting_for(images, "min-snr", 1)(sigma), of_score.sqrt())


def test_the_weighting_min_snr_follows_the_units_of_the_data():
    field = ScoreNet.unet(2, (8,), widths=(8,))
    field.units, ratio = Units((250.0, 0.0), (20.0, 20.0)), torch.tensor([10.0, 5, 4, 0.25])
    sigma = 40 / ratio.sqrt()  # twice the deviation is the signal
    expected = torch.tensor([0.5, 1, 1, 1]) * sigma**2
    torch.testing.assert_close(weighting_for(field, "min-snr", 2)(sigma), expected)


@pytest.mark.slow
def test_a_new_network_has_a_loss_of_half_the_dimension():
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False])  # before training its output is zero
    x = (0.5 + 0.25 * torch.randn(4096, 1, 8, 8, generator=seed())).clamp(0, 1)  # deviation 1/2 in [-1, 1]
    sigma = LogNormal(-1.9, 1.2).quantile(uniforms(0, 0, 4096)).float()
    loss = dsm_loss(net, x, sigma=sigma, weighting=weighting_for(net, None, 2), generator=1)
    assert loss.item() == pytest.approx(32, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LogNormal(0, 0), "std finite and positive"),
        (lambda: LogUniform(1, 1), "0 < low < high"),
        (lambda: UniformTime(first=0), "first must be above 0 and below 1, got 0"),
        (lambda: UniformTime(beta_min=30), "0 < beta_min <= beta_max, got beta_min=30 and beta_max=20"),
        (lambda: levels_for(points_net(), 0.5), "a NoiseSchedule or a distribution"),
        (lambda: levels_for(points_net(), LogNormal), "a NoiseSchedule or a distribution .*got <class"),
        (lambda: levels_for(points_net(), torch.tensor([1.0, 0.5])), r"a NoiseSchedule or a distribution .*got tensor"),
        (lambda: LevelMixture(()), "at least one distribution"),
        (lambda: LevelMixture((LogUniform(1, 2), 0.5)), r"a NoiseSchedule or a distribution .*got 0\.5"),
        (lambda: weighting_for(points_net(), "snr", 2), "weighting must be one of 'sigma', 'backbone'"),
    ],
)
def test_invalid_levels_and_weightings_raise(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()


# -- Settings ---------------------------------------------------------------------------------------------------------


def test_learning_rates_follow_their_formulas():
    settings = {"images": 10_000, "batch_size": 10, "lr": 2.0, "warmup_images": 1000}

    def rates(**changes):
        chosen = Settings(**{**settings, **changes})
        return [chosen.rate(images) for images in (0, 500, 990, 1000, 5000, 9990)]

    assert rates(decay="constant") == pytest.approx([0.02, 1.02, 2, 2, 2, 2])
    assert rates(decay="linear", warmup_images=0) == pytest.approx([2, 1.9, 1.802, 1.8, 1, 0.002])
    cosine = [1 + math.cos(math.pi * images / 10_000) for images in (0, 500, 990, 1000, 5000, 9990)]
    assert rates(warmup_images=0) == pytest.approx(cosine)
    falling = rates(decay="inverse-sqrt", warmup_images=0)
    assert falling == pytest.approx([2, 2, 2 / math.sqrt(0.099 / 0.07), 2 / math.sqrt(0.1 / 0.07), *falling[4:]])
    assert falling[5] == pytest.approx(2 * math.sqrt(0.07 / 0.999))
    seen = [step.lr for step in train_steps(points_net(), points(), Settings(images=64, batch_size=16, lr=0.1))]
    expected = Settings(images=64, batch_size=16, lr=0.1)
    assert seen == [expected.rate(images) for images in (0, 16, 32, 48)]


def test_the_default_warm_up_is_a_twentieth_or_5000_images():
    assert Settings(images=2000, batch_size=10, decay="constant").rate(40) == pytest.approx(0.5e-3)  # of 100 images
    assert Settings(images=10**7, batch_size=10, decay="constant").rate(2490) == pytest.approx(0.5e-3)  # of 5,000


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    numbers = {"images": np.int64(32), "batch_size": np.int32(16), "seed": np.uint8(3), "clip": np.float32(0.5)}
    known = {name: value.item() for name, value in numbers.items()}
    assert Settings(**numbers) == Settings(**known)
    for given in (numbers, known):  # the second call continues the run
        train(points_net(), points(), tmp_path, log_every=np.int64(16), progress=False, **given)


def test_the_number_of_images_is_rounded_up_to_whole_batches():
    settings = Settings(images=100, batch_size=32)
    assert (settings.steps, settings.total) == (4, 128)
    assert steps(points_net(), points(), images=100, batch_size=32).images == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "images must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"microbatch": 0}, "microbatch must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"lr": 0}, "lr must be a number of more than 0, got 0"),
        ({"clip": -1.0}, "clip must be a number of more than 0 or None, got -1.0"),
        ({"p": 0.5}, r"p must be a number of at least 1, got 0\.5"),
        ({"p": math.nan}, "p must be a number of at least 1, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must be a list with exactly 2 entries, each a number of at least 0 and"),
        ({"label_drop": 1.0}, "label_drop must be a number of at least 0 and less than 1"),
        ({"decay": "step"}, "decay must be one of 'cosine', 'linear'"),
        ({"precision": "half"}, "precision must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'half'"),
        ({"ema": (0.05, 0.05)}, "ema must not contain a length twice"),
        ({"ema": (0.5,)}, "ema must contain lengths above 0"),
        ({"loss": dsm_loss, "p": 1}, "p and weighting apply to the default loss only"),
        ({"ema": 0.999}, r"ema must be a list, each a number, such as \(0\.05, 0\.1\), got 0\.999"),
        ({"betas": 0.9}, r"betas must be a list .*, such as \(0\.9, 0\.99\), got 0\.9"),
        ({"lr": "1e-3"}, "lr must be a number of more than 0, got '1e-3'"),
        ({"label_drop": None}, "label_drop must be a number of at least 0 and less than 1, got None"),
        ({"augment": ["no"]}, "augment must be .*one of 'flip', 'rotate', 'shift'.*got"),
        ({"compile": 1}, "compile must be True or False, got 1"),
    ],
)
def test_invalid_settings_raise(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Settings(**arguments)


def test_the_arguments_of_train_are_the_declared_options():
    parameters = list(inspect.signature(train).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["net", "data", "folder"]
    declared = {option.name: option.default for option in fields(TrainSettings)}
    assert {parameter.name: parameter.default for parameter in parameters[3:]} == declared
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[3:])
    for option in fields(TrainSettings):
        assert f" {option.name}: {option.metadata['meaning'][:20]}" in train.__doc__


# -- What is drawn ----------------------------------------------------------------------------------------------------


def test_two_epochs_see_every_image_twice():
    data = points(60)
    steps(points_net(), data, images=120, batch_size=8)
    first, *seen = data.seen  # the first one is read to check whether the backbone takes the condition of the data
    assert first == 0 and sorted(seen[:60]) == list(range(60)) and sorted(seen[60:]) == list(range(60))
    assert seen[:60] != seen[60:] != list(range(60))
    assert seen == Order(60, 0)(0, 120).tolist()


@pytest.mark.slow
def test_random_numbers_depend_only_on_the_seed_and_the_image():
    def drawn(**settings):
        loss = Recorder()
        steps(image_net(), Memory(images()), images=48, loss=loss, **settings)
        return [loss.all(name) for name in ("x", "sigma", "noise")]

    one = drawn(batch_size=8)
    for same in (drawn(batch_size=16), drawn(batch_size=24, microbatch=5), drawn(batch_size=8, lr=1e-5)):
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    other = drawn(batch_size=8, seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    net, data, loss = image_net(), Memory(images()), Recorder()
    torch.set_default_dtype(torch.float64)
    try:
        steps(net, data, images=48, batch_size=8, loss=loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(loss.all(name), a) for name, a in zip(("x", "sigma", "noise"), one, strict=True))
    x, sigma, noise = one
    order = Order(32, 0)(0, 48)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(x, images()[order], strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(x, images()[order], strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 12 < sum(mirrored) < 36
    torch.testing.assert_close(sigma.double(), LogNormal(-1.2 - math.log(2), 1.2).quantile(uniforms(0, 0, 48)))
    assert noise.mean().abs() < 0.1 and noise.std() == pytest.approx(1, abs=0.05) and len(noise.unique()) > 3000


def test_images_are_not_flipped_without_flip():
    loss = Recorder()
    steps(image_net(), Memory(images()), images=32, batch_size=8, augment=(), loss=loss)
    assert torch.equal(loss.all("x"), images()[Order(32, 0)(0, 32)])


def test_volumes_train_a_network_of_3d_convolutions():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x, c_noise):
            return self.conv(x)

    net = ScoreNet(Backbone(), NoiseSchedule([1.0, 0.5]), sample_shape=(1, 4, 4, 4))
    before = vector(net)
    steps(net, Memory(torch.rand(8, 1, 4, 4, 4)), images=16, batch_size=8, optimizer="muon")
    assert not torch.equal(vector(net), before)


@pytest.mark.slow
def test_8_bit_images_are_scaled_to_0_1():
    loss = Recorder()
    pixels = (255 * images()).to(torch.uint8)
    steps(image_net(), open_images(pixels), images=32, batch_size=8, augment=(), loss=loss)
    assert torch.equal(loss.all("x"), pixels[Order(32, 0)(0, 32)].float() / 255)


def test_dropout_differs_between_microbatches_and_is_equal_in_each_run():
    def outputs(start):
        torch.manual_seed(start)
        net = ScoreNet(nn.Sequential(), NoiseSchedule([1.0]), sample_shape=(64,), precondition="ncsn")
        drop = nn.Dropout(0.5)
        weight = nn.Parameter(torch.ones(()))
        net.backbone.register_parameter("weight", weight)
        seen = []
        net.backbone.forward = lambda x, c_noise: (seen.append(drop(torch.ones_like(x))), weight * x)[1]
        steps(net, Memory(torch.zeros(8, 64)), images=16, batch_size=8, microbatch=4)
        return seen

    one = outputs(0)
    assert all(torch.equal(a, b) for a, b in zip(one, outputs(1), strict=True))
    assert len(one) == 4 and not any(torch.equal(one[0], other) for other in one[1:])


def test_tasks_compute_in_float32_at_any_precision():
    def task(x, generator):
        return nn.functional.conv2d(x, torch.full((1, 1, 1, 1), 0.3))  # which autocast computes in half precision

    record, net = Recorder(), image_net(condition_channels=1)
    steps(net, Memory(images()), images=8, batch_size=8, precision="bfloat16", condition=task, loss=record)
    assert torch.equal(record.all("condition"), task(record.all("x"), None))


def test_a_backbone_of_ones_own_may_have_a_module_named_augmentation():
    net, layer = points_net(), nn.Identity()
    net.backbone.augmentation = layer
    steps(net, points(16), images=16, batch_size=8)
    assert net.backbone.augmentation is layer


@pytest.mark.slow
def test_global_generators_are_left_alone():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    net = image_net(dropout=0.5, condition_channels=1)
    for _ in train_steps(net, Memory(images()), Settings(images=24, batch_size=8, condition=Inpainting())):
        assert torch.equal(torch.get_rng_state(), before[0])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.slow
def test_a_run_does_not_depend_on_global_generators(tmp_path):
    def run(start):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        evaluate = lambda net, images: {"drawn": float(torch.rand(()))}  # noqa: E731
        quick(points_net(dropout=0.5), points(), tmp_path / str(start), sample_every=40, evaluate=evaluate)
        assert torch.equal(before, torch.get_rng_state())
        return content(tmp_path / str(start))

    assert run(0) == run(1)


# -- Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatch):
    def run(**settings):
        return vector(steps(points_net(torch.float64), points(dtype=torch.float64), **settings).state.net)

    settings = {"images": 80, "batch_size": 8, "lr": 1e-2}
    start, whole = vector(points_net(torch.float64)), run(**settings)
    torch.testing.assert_close(run(**settings, microbatch=microbatch), whole, atol=1e-9, rtol=0)
    assert (whole - start).abs().max() > 1e-3


def test_the_gradient_accumulation_of_an_accelerator_does_not_change_the_gradient(monkeypatch):
    """``accelerate launch --gradient_accumulation_steps 4`` sets it; ``microbatch`` is for that here."""
    before = steps(points_net(), points(), images=32, batch_size=8).state.tensors()["optimizer"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    after = steps(points_net(), points(), images=32, batch_size=8).state.tensors()["optimizer"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_gradient_is_clipped():
    def first_moment(net, data, **settings):
        last = steps(net, data, images=8, batch_size=8, **settings)
        moments = [value for name, value in last.state.tensors()["optimizer"].items() if name.endswith("exp_avg")]
        return torch.cat([moment.flatten() for moment in moments]).norm() / 0.1

    for net, data, dimension in ((points_net(), points(), 2), (image_net(), open_images(images()), 64)):
        assert first_moment(net, data, clip=1e-3) == pytest.approx(1e-3 * dimension / 2, rel=1e-3)
    assert first_moment(points_net(), points(), clip=None) > 1e-2


def test_a_step_has_the_losses_and_the_number_of_images():
    *_, last = train_steps(points_net(), points(), Settings(images=16, batch_size=8, microbatch=3))
    assert last.images == last.state.images == 16 and last.state.step == 2
    assert last.losses.shape == last.sigma.shape == (8,) and last.loss == last.losses.mean()


def test_the_loss_equals_dsm_loss():
    net = points_net()
    before = copy.deepcopy(net)
    settings = Settings(images=8, batch_size=8, levels=LogUniform(0.1, 1), weighting="sigma", precision="float32")
    (step,) = train_steps(net, points(), settings)
    generator = torch.Generator()
    noise = torch.empty(8, 2)
    for i, z in enumerate(noise):
        generator.manual_seed(seed_of(0, "image", i))
        torch.rand(2, generator=generator)
        z.normal_(generator=generator)
    x = points().x[Order(64, 0)(0, 8)]
    expected = dsm_loss(before, x, sigma=step.sigma, noise=noise, reduction="none")
    torch.testing.assert_close(step.losses, expected.detach())
    (one,) = train_steps(before, points(), Settings(images=8, batch_size=8, p=1, weighting="sigma"))
    assert not torch.allclose(one.losses, expected)


def test_a_loss_must_return_one_value_per_image():
    steps(points_net(), points(), images=16, batch_size=8, loss=partial(sliced_score_matching_loss, reduction="none"))
    with pytest.raises(ValueError, match=r"loss must return one value per image, \(8,\), got shape \(\)"):
        steps(points_net(), points(), images=16, batch_size=8, loss=dsm_loss)


def test_state_average_returns_the_network_of_each_length():
    state = steps(points_net(), points(), images=64, batch_size=8, ema=(0.1, 0.2)).state
    assert torch.equal(vector(state.average()), vector(state.average(0.1)))
    assert not torch.equal(vector(state.average(0.1)), vector(state.average(0.2)))
    assert not state.average().training and not any(p.requires_grad for p in state.average().parameters())
    with pytest.raises(ValueError, match=r"one of settings\.ema, \(0\.1, 0\.2\), got 0\.05"):
        state.average(0.05)
    state = steps(points_net(), points(), images=64, batch_size=8, ema=()).state
    assert torch.equal(vector(state.average()), vector(state.net))


def test_the_state_of_the_optimizer_keeps_its_dtypes():
    """Also that of a weight of one value in float64, of which a step counter in float32 has the shape."""
    net = points_net(torch.float64)
    net.backbone.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    net.backbone.register_forward_hook(lambda module, arguments, output: module.scale * output)
    state = steps(net, points(dtype=torch.float64), images=16, batch_size=8).state
    before = state.tensors()
    state.load({name: {key: value.clone() for key, value in part.items()} for name, part in before.items()}, 16, 2)
    after = state.tensors()["optimizer"]
    assert {key: value.dtype for key, value in after.items()} == {k: v.dtype for k, v in before["optimizer"].items()}


def test_frozen_weights_do_not_change():
    net = points_net()
    net.backbone.layers.requires_grad_(False)
    before = vector(net.backbone.layers)
    state = steps(net, points(), images=32, batch_size=8).state
    assert torch.equal(vector(net.backbone.layers), before)
    torch.testing.assert_close(vector(state.average().backbone.layers), before)


def test_a_network_without_weights_to_train_gives_an_error_and_writes_nothing(tmp_path):
    state = steps(points_net(), points(), images=16, batch_size=8).state
    with pytest.raises(ValueError, match=r"no trainable weights\. Write net\.requires_grad_\(True\)"):
        quick(state.average(), points(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_result_of_a_run_can_be_trained_further(tmp_path):
    net = points_net()
    net.backbone.layers.requires_grad_(False)
    first = quick(net, points(), tmp_path / "first")
    before = vector(first.backbone.layers), vector(first.backbone.last)
    quick(first, points(), tmp_path / "second")
    assert torch.equal(vector(first.backbone.layers), before[0])
    assert not torch.equal(vector(first.backbone.last), before[1])


@pytest.mark.slow
def test_steps_continue_from_a_state():
    def run(stops):
        net, state = image_net(dropout=0.2), None
        settings = Settings(images=64, batch_size=8)
        for stop in stops:
            iterator = train_steps(net, Memory(images()), settings, state=state)
            for step in iterator:
                state = step.state
                if step.images == stop:
                    iterator.close()
        return state

    one, other = run([64]), run([24, 40, 64])
    assert torch.equal(vector(one.net), vector(other.net)) and other.images == 64
    assert torch.equal(vector(one.average(0.1)), vector(other.average(0.1)))
    with pytest.raises(ValueError, match="state belongs to another network"):
        train_steps(points_net(), points(), Settings(batch_size=8), state=one)


# -- Loss scaling in float16


@pytest.mark.slow
def test_steps_in_float16_are_close_to_those_in_float32():
    def loss(net, x, **given):  # small, so that no step is skipped
        return 1e-3 * dsm_loss(net, x, reduction="none", **given)

    options = {"images": 640, "batch_size": 32, "lr": 1e-3, "loss": loss}
    start = vector(image_net())
    net = {each: image_net() for each in ("float32", "float16")}
    skipped = [steps(net[each], Memory(images()), **options, precision=each).state.skipped for each in net]
    change, difference = (vector(net["float32"]) - each for each in (start, vector(net["float16"])))
    assert skipped == [0, 0] and 0 < difference.norm() < 0.2 * change.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "optimizer"), [(1.0, "adamw"), (None, "adamw"), (1.0, "muon")])
def test_a_step_in_float16_with_an_infinite_gradient_is_skipped_and_halves_the_scale(clip, optimizer):
    calls = []

    def loss(net, x, **given):  # far too large in the third step
        calls.append(x)
        return (1e30 if len(calls) == 3 else 1e-4) * dsm_loss(net, x, reduction="none", **given)

    settings = Settings(images=40, batch_size=8, precision="float16", loss=loss, clip=clip, optimizer=optimizer)
    state, seen = None, []
    for step in train_steps(image_net(), Memory(images()), settings):
        state = step.state
        tensors = state.tensors()
        moments = torch.cat([value.flatten() for value in tensors["optimizer"].values()])
        seen.append((vector(state.net), moments.clone(), state.scaler.get_scale(), state.skipped))
    weights, moments, scales, skipped = zip(*seen, strict=True)
    assert skipped == (0, 0, 1, 1, 1) and scales == (65536.0,) * 2 + (32768.0,) * 3
    assert [torch.equal(one, other) for one, other in itertools.pairwise(weights)] == [False, True, False, False]
    assert torch.equal(moments[1], moments[2]) and bool(moments[4].isfinite().all())


def test_float16_on_another_device_than_cuda_and_a_cpu_raises():
    accelerator = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ValueError, match='precision="float16" is for CUDA devices and CPUs, got mps'):
        prepare(points_net(), Settings(precision="float16"), accelerator)


def test_reading_threads_end_with_the_iterator():
    def own():
        return [thread for thread in threading.enumerate() if thread.name.startswith("scorematch")]

    iterator = train_steps(points_net(), points(), Settings(images=10_000, batch_size=8))
    next(iterator)
    assert own()
    iterator.close()
    assert not own()
    with pytest.raises(OSError, match="the disk is gone"):
        steps(points_net(), Memory(points().x, fail_at=40), images=640, batch_size=8)
    assert not own()


# -- Conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_creates_the_condition():
    loss = Recorder()
    net = image_net(condition_channels=1)
    settings = {"images": 32, "batch_size": 8, "microbatch": 4, "condition": Inpainting()}
    steps(net, Memory(images()), loss=loss, **settings)
    for call in loss.calls:
        hole = call["mask"]
        assert torch.equal(call["condition"][~hole], call["x"][~hole])
        assert not torch.equal(call["condition"][hole], call["x"][hole])
    again = Recorder()
    torch.manual_seed(5)
    steps(image_net(condition_channels=1), Memory(images()), loss=again, **settings)
    assert torch.equal(loss.all("condition"), again.all("condition"))
    assert len({tuple(call["mask"].flatten().tolist()) for call in loss.calls}) == 8


@pytest.mark.parametrize("made", [None, torch.zeros(3, 8, 1, 8, 8).unbind(0)])
def test_a_task_that_returns_something_else_raises(made):
    with pytest.raises(TypeError, match=r"condition= must return a tensor or \(condition, mask\), got"):
        steps(image_net(condition_channels=1), Memory(images()), images=8, batch_size=8, condition=lambda x, _: made)


def test_a_task_may_write_into_its_argument():
    loss = Recorder()
    black = lambda x, generator: x.zero_()  # noqa: E731
    steps(image_net(condition_channels=1), Memory(images()), images=8, batch_size=8, condition=black, loss=loss)
    assert loss.all("x").max() > 0 and not loss.all("condition").any()


@pytest.mark.parametrize("condition", ["colorization", Inpainting])
def test_a_condition_that_is_no_task_raises(condition):
    with pytest.raises(
        TypeError, match=r"condition must be callable as task\(x, generator\), such as Colorization\(\)"
    ):
        Settings(condition=condition)


def test_a_loss_that_is_no_function_or_returns_no_tensor_raises():
    with pytest.raises(TypeError, match=r"loss must be a function, such as dsm_loss, got 'l1'\."):
        Settings(loss="l1")
    with pytest.raises(TypeError, match=r"loss must return a tensor, one value per image, got 1\.0\."):
        steps(points_net(), points(), images=8, batch_size=8, loss=lambda *_, **__: 1.0)


def test_a_function_creates_the_condition():
    loss = Recorder()
    half = lambda x, generator: x / 2  # noqa: E731
    steps(image_net(condition_channels=1), Memory(images()), images=16, batch_size=8, condition=half, loss=loss)
    assert torch.equal(loss.all("condition"), loss.all("x") / 2) and "mask" not in loss.calls[0]


@pytest.mark.slow
def test_labels_are_the_condition_and_some_are_dropped():
    labels = torch.arange(32) % 3
    loss = Recorder()
    steps(image_net(classes=3), Memory(images(), labels), images=32, batch_size=8, loss=loss)
    assert torch.equal(loss.all("condition"), labels[Order(32, 0)(0, 32)])
    loss = Recorder()
    settings = {"images": 320, "batch_size": 16, "label_drop": 0.25, "loss": loss}
    steps(image_net(classes=3, null_class=True), Memory(images(), labels), **settings)
    given, dropped = labels[Order(32, 0)(0, 320)], loss.all("condition") == 3
    assert torch.equal(loss.all("condition")[~dropped], given[~dropped])
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.08)
    kept = [torch.equal(x, own) for x, own in zip(loss.all("x"), images()[Order(32, 0)(0, 320)], strict=True)]
    assert 0.3 < torch.tensor(kept)[dropped].float().mean() < 0.7  # flips do not depend on dropped labels


def test_a_user_defined_backbone_with_conditioning_is_trained_on_labels(tmp_path):
    class Backbone(nn.Module):
        def __init__(self, conditioning):
            super().__init__()
            self.conditioning = conditioning
            self.label = nn.Embedding(4, 1)

        def forward(self, x, c_noise, condition):
            return x * self.label(condition)

    def net(conditioning=Condition(classes=3, null_class=True)):  # noqa: B008
        return ScoreNet(Backbone(conditioning), NoiseSchedule([1.0, 0.1]), sample_shape=(2,))

    labels = torch.arange(64) % 3
    loss = Recorder()
    steps(net(), Memory(points().x, labels), images=64, batch_size=16, label_drop=0.25, loss=loss)
    given, own = loss.all("condition"), labels[Order(64, 0)(0, 64)]
    assert set(given.tolist()) == {0, 1, 2, 3} and torch.equal(given[given < 3], own[given < 3])
    quick(net(), (points().x, labels), tmp_path, images=16)  # which opens the data with their labels
    loaded = ScoreNet.from_pretrained(tmp_path / "network", backbone=net().backbone)
    assert loaded.conditioning == Condition(classes=3, null_class=True)
    x = points().x[:2]
    assert not torch.equal(loaded(x, 0.5, condition=1), loaded(x, 0.5))
    assert torch.equal(loaded(x, 0.5, condition=3), loaded(x, 0.5))
    with pytest.raises(ValueError, match="takes classes as its condition, int64"):
        loaded(x, 0.5, condition=4)
    assert net("another package's").conditioning is None


def check(net, data, **settings):
    train_steps(net, data, Settings(**{"batch_size": 8, **settings}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: check(MLP(), points()), "net must be a ScoreNet, got MLP"),
        (lambda: check(points_net(), torch.zeros(9, 2)), "result of open_images, got Tensor. Write open_images"),
        (lambda: check(points_net().half(), points()), "weights must be float32 for training, got torch.float16"),
        (
            lambda: check(points_net(), Memory(torch.zeros(9, 3))),
            r"samples of the network's sample_shape, \(2,\), got \(3,\)",
        ),
        (
            lambda: check(points_net(), points(), batch_size=65),
            "a batch of 65 is more than the 64 samples of the data. Pass batch_size=64",
        ),
        (
            lambda: check(points_net(), points(), levels=3),
            "levels must be a NoiseSchedule or a distribution with a method",
        ),
        *(
            (
                lambda quantile=quantile: check(points_net(), points(), levels=SimpleNamespace(quantile=quantile)),
                "quantile of levels must return a tensor of positive levels, .* got",
            )
            for quantile in (lambda u: -u, lambda u: u[:1], lambda u: u.numpy(), lambda u: 0.5)
        ),
        (lambda: check(points_net(), points(), weighting="x"), "weighting must be one of"),
        (
            lambda: check(image_net(), Memory(images()), condition=Inpainting()),
            "take an image as their condition, which net does not",
        ),
        (lambda: check(image_net(condition_channels=3), Memory(images())), "an image of 3 channels as its condition"),
        (lambda: check(image_net(), Memory(images()), label_drop=0.1), "label_drop needs a network with a null class"),
        (lambda: check(image_net(classes=3), Memory(images())), "the data have no labels"),
        (
            lambda: check(image_net(classes=3), Memory(images(), torch.full((32,), 3))),
            "labels must be classes of the network, from 0 to 2, got 3",
        ),
        (
            lambda: check(image_net(classes=3), Memory(images(), torch.full((32,), 2)), label_drop=0.1),
            r"needs a network with a null class, .* Write ScoreNet.unet\(classes=..., null_class=True\)",
        ),
    ],
)
def test_invalid_arguments_raise_at_the_call(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()


def test_invalid_arguments_of_train_raise(tmp_path):
    with pytest.raises(TypeError, match=r"net must be a ScoreNet, got MLP\. Write ScoreNet\(backbone, schedule\)"):
        quick(MLP(), points(), tmp_path)
    with pytest.raises(TypeError, match=r"ema must be a list, each a number, .* got 0\.999"):
        quick(points_net(), points(), tmp_path, ema=0.999)


def test_labels_are_checked_in_every_batch():
    labels = torch.zeros(32, dtype=torch.int64)
    labels[17] = 5
    with pytest.raises(ValueError, match="from 0 to 2, got 5"):
        steps(image_net(classes=3), Memory(images(), labels), images=32, batch_size=8)


def test_the_labels_of_all_images_are_checked_before_a_run_is_written(tmp_path):
    data = open_images((images(), torch.arange(32) % 5), labels=True)
    with pytest.raises(ValueError, match="labels must be classes of the network, from 0 to 2, got 4"):
        quick(image_net(classes=3), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_accelerator_with_mixed_precision_raises():
    class Accelerator:
        mixed_precision, num_processes = "bf16", 1

    with pytest.raises(ValueError, match="must have mixed_precision=\"no\", got 'bf16'"):
        train_steps(points_net(), points(), accelerator=Accelerator())


def test_an_accelerator_that_does_not_average_gradients_raises():
    class Other:
        mixed_precision, num_processes, distributed_type = "no", 1, DistributedType.DEEPSPEED

    with pytest.raises(ValueError, match="but accelerator uses DEEPSPEED"):
        train_steps(image_net(), Memory(images()), accelerator=Other())


def test_an_accelerator_without_the_launched_processes_raises(monkeypatch):
    accelerator = make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerator has 1"):
        make_accelerator(accelerator)


def test_without_accelerate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'training needs Accelerate: pip install "scorematch\[train\]"'):
        train_steps(points_net(), points())


# -- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_reaches_the_exact_score_of_a_mixture(mixture):
    torch.manual_seed(0)
    net = ScoreNet(MLP(64), NoiseSchedule.geometric(10, 0.1, 20), sample_shape=(2,))
    x, z = mixture.sample(2000, seed(2)), torch.randn(2000, 2, generator=seed(3))

    def errors(net):
        """The mean square of the error divided by the mean square of the exact score, for each noise level."""
        rows = []
        for sigma in (0.3, 1.0, 3.0):
            noisy = x + sigma * z
            exact = mixture(noisy, sigma)
            with torch.no_grad():
                rows.append((net(noisy, sigma) - exact).square().mean() / exact.square().mean())
        return torch.stack(rows)

    loss, losses, seen = Recorder(), [], [errors(net)]
    settings = {"images": 128 * 300, "batch_size": 128, "lr": 1e-2, "levels": LogUniform(0.1, 10), "ema": (0.1,)}
    for step in train_steps(net, Memory(mixture.sample(128 * 300, seed(1))), Settings(**settings, loss=loss)):
        losses.append(step.loss)
        if step.images in (128 * 30, 128 * 300):
            seen.append(errors(step.state.average()))
    start, early, late = seen
    assert (early < start / 2).all() and (late < early / 2).all()
    assert (late < torch.tensor([0.03, 0.02, 0.005])).all()
    floor = torch.stack([dsm_loss(mixture, reduction="none", **call).mean() for call in loss.calls])  # not zero
    excess = torch.stack(losses) - floor
    assert floor[-100:].mean() > 0.3 and 0 < excess[-100:].mean() < 0.01 and excess[:10].mean() > 0.1


# -- A backbone of one's own with a condition -------------------------------------------------------------------------


def test_a_backbone_of_ones_own_gets_the_labels_or_the_vectors_of_its_data(tmp_path):
    """Each sample gets its own, as the third argument."""
    seen = []

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x, c_noise, condition):
            seen.append((x, condition))
            return self.layer(x[..., None])[..., 0]

    numbers = torch.arange(16.0)
    for x, condition in (
        (numbers[:, None].expand(16, 2), numbers[:, None].expand(16, 3)),
        (numbers.byte()[:, None, None, None].expand(16, 1, 4, 4).numpy(), numbers.long()),
    ):
        net = ScoreNet(Own(), NoiseSchedule([1e-4]), sample_shape=tuple(x.shape[1:]))
        seen.clear()
        options = {"images": 16, "batch_size": 8, "precision": "float32", "levels": NoiseSchedule([1e-4])}
        options["augment"] = ()
        train(net, (x, condition), tmp_path / str(len(x.shape)), progress=False, **options)
        x, condition = seen[0]
        assert torch.equal(x.flatten(1)[:, 0].argsort(), condition.reshape(8, -1)[:, 0].argsort())


def test_a_backbone_that_cannot_take_the_condition_of_its_data_raises_before_anything_is_written(tmp_path):
    class Own(torch.nn.Linear):
        def forward(self, x, c_noise):
            return super().forward(x)

    net = ScoreNet(Own(2, 2), NoiseSchedule([1e-4]), sample_shape=(2,))
    with pytest.raises(
        ValueError, match=r"does not take x, the noise level and the condition .*\(self, x, sigma, cond"
    ):
        train(net, (torch.rand(16, 2), torch.rand(16, 3)), tmp_path / "run", progress=False, images=16, batch_size=8)
    assert not (tmp_path / "run").exists()
