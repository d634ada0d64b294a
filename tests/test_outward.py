"""Networks of this package in other packages: as a pipeline of diffusers, and as a denoiser."""

import json
import warnings

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.pretrained.diffusers import SCHEDULER_FILE
from scorematch.sampling import AncestralSampler, ODESampler
from tests.helpers import run, seed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DDPMPipeline


def _net(channels=3, size=(8, 8), **options):
    torch.manual_seed(0)
    options = {"schedule": NoiseSchedule.geometric(20, 0.02, 12), "precondition": "ddpm", **options}
    net = ScoreNet.unet(channels, size, widths=(8, 8), layers_per_block=1, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


# -- A pipeline of diffusers


def _pipeline(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DDPMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("row", ["ddpm_v", *(pytest.param(row, marks=pytest.mark.slow) for row in ("ddpm", "ddpm_x0"))])
def test_a_pipeline_of_diffusers_draws_the_samples_of_the_ancestral_sampler(row, tmp_path):
    """From the same noise, with the scheduler's clipping of the denoised image turned off."""
    net = _net(size=(8, 16), precondition=row)
    net.save_pretrained(tmp_path, diffusers=True)
    pipeline = _pipeline(tmp_path)
    assert pipeline.scheduler.config.clip_sample and pipeline.scheduler.config.num_train_timesteps == 12
    pipeline.scheduler.register_to_config(clip_sample=False)
    found = pipeline(2, generator=seed(1), num_inference_steps=12, output_type="np").images

    replay = seed(1)
    start = torch.randn(2, 3, 8, 16, generator=replay)
    # The state of a DDPM has unit variance at the highest level: x = (y / sqrt(alpha_bar) + 1) / 2.
    init = 0.5 + start * (0.25 + net.schedule.sigma_max**2) ** 0.5
    sampler = AncestralSampler(net, precision="float32")
    expected = run(sampler, init=init, noise_source=lambda x: torch.randn(x.shape, generator=replay))
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(found).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_pipeline_of_diffusers_has_the_weights_and_the_levels_of_the_network(tmp_path):
    """The noise levels of a DDPM, and another value range; both packages load the folder."""
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000))
    net = _net(1, schedule=schedule)
    net.value_range = (-1.0, 2.0)
    schedule = net.schedule
    net.save_pretrained(tmp_path)
    assert ScoreNet.from_pretrained(tmp_path).config == net.config
    pipeline = _pipeline(tmp_path)
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.backbone.state_dict().items())
    # One minus a beta, in float32, is rounded by at most 3e-8, and so is each product of a thousand.
    expected = 1 / (1 + (schedule.sigmas.flip(0) / 1.5).square())  # of data in a range of the length 3
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), expected, rtol=6e-5, atol=0)
    # Without this package's keys in config.json, the same levels follow from the scheduler.
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["format_version"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    again = ScoreNet.from_pretrained(tmp_path)
    torch.testing.assert_close(1 / (1 + 4 * again.schedule.sigmas.flip(0).square()), expected, rtol=6e-5, atol=0)
    assert again.precondition == "ddpm" and again.sample_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: _net(precondition="ncsnpp"),
            "its preconditioning is 'ncsnpp', and not one of 'ddpm', 'ddpm_v', 'ddpm_x0', 'karras'",
        ),
        (
            lambda: _net(precondition="karras", classes=3, null_class=True, patch=2),
            "UNet2DModel has no null_class, patch, and a network for it must be trained without them",
        ),
        (lambda: _net(size=(8, 16), precondition="karras"), "its images are not square"),
        (lambda: _net(size=(8, 15)), "the sides of its images are no multiples of 2"),
        (lambda: ScoreNet.ncsnv2(3, 8, width=2), "its preconditioning is 'ncsnv2'"),
        (lambda: _net(patch=2), "UNet2DModel has no patch, and"),
        (lambda: ScoreNet.ncsnpp(3, 8, widths=(8,), precondition="ddpm"), "UNet2DModel does not have its architecture"),
        (lambda: _net(classes=3), "it takes a condition or predicts a variance"),
        (lambda: _net(condition_channels=1), "it takes a condition or predicts a variance"),
        (
            lambda: ScoreNet(_net().backbone, _net().schedule, precondition="ddpm", sample_shape=(3, 8, 8)),
            "UNet2DModel does not have its architecture",  # a backbone of one's own
        ),
    ],
)
def test_networks_that_a_pipeline_cannot_run_are_refused(make, reason, tmp_path):
    net = make()
    with pytest.raises(ValueError, match=f"no pipeline of diffusers can run this network: {reason}.*Leave out"):
        net.save_pretrained(tmp_path / "net", diffusers=True)
    assert not (tmp_path / "net").exists()
    net.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net" / SCHEDULER_FILE).exists()


def test_a_pipeline_is_replaced_as_a_whole(tmp_path):
    _net().save_pretrained(tmp_path)
    assert {"model_index.json", SCHEDULER_FILE} < {path.name for path in tmp_path.iterdir()}
    _net(precondition="karras").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("classes", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_a_network_of_edm_draws_the_same_samples_in_diffusers(classes, tmp_path, rng):
    """By Euler's method, which is DPM-Solver++ of order 1, from the same noise."""
    diffusers = pytest.importorskip("diffusers")
    net = _net(precondition="karras", classes=classes, schedule=NoiseSchedule.geometric(5, 0.01, 20)).eval()
    net.save_pretrained(tmp_path, diffusers=True)
    assert ScoreNet.from_pretrained(tmp_path).config == net.config
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    labels = None if classes is None else [2, 0]
    condition = None if labels is None else torch.tensor(labels)
    states = [10 * torch.randn(2, *net.sample_shape, generator=rng)]  # in units of images in [-1, 1]
    latents = states[0] / pipeline.scheduler.init_noise_sigma
    keep = {"callback": lambda step, time, state: states.append(state)}
    pipeline(batch_size=2, num_inference_steps=8, latents=latents, class_labels=labels, output_type="pt", **keep)
    levels = [*ODESampler(net, levels=8, method="dpm-solver++", order=1).schedule, 0.0]
    assert len(states) == len(levels)
    for x, after, sigma, lower in zip(states, states[1:], levels, levels[1:], strict=False):
        denoised = 2 * net.denoise(x / 2 + 0.5, sigma, condition) - 1
        expected = denoised + (x - denoised) * (lower / sigma)
        torch.testing.assert_close(after, expected, atol=2e-6 * (1 + sigma), rtol=0)


# -- A denoiser


def test_a_denoiser_takes_noise_levels_of_any_shape(rng):
    net = _net(1, classes=3, precondition="karras")
    denoiser, x, sigma = net.as_denoiser(), torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([0.1, 3.0])
    expected = net.denoise(x, sigma, torch.tensor([1, 1]))
    for levels in (sigma, sigma.view(2, 1, 1, 1)):
        assert torch.equal(denoiser(x, levels, condition=1), expected)
    for level in (0.1, torch.tensor(0.1), torch.tensor([0.1]), torch.full((1, 1, 1, 1), 0.1)):
        torch.testing.assert_close(denoiser(x, level, 1), net.denoise(x, 0.1, 1))
    assert list(denoiser.parameters()) and not denoiser.train().eval().score.training
    copied = net.inference_copy().as_denoiser()
    assert (copied(x, sigma, 1) - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(ValueError, match=r"sigma must be a float, \(\) or \(2,\)"):
        denoiser(x, torch.ones(2, 2), 1)


@pytest.mark.parametrize("make", [lambda net: net, lambda net: net.inference_copy()], ids=["network", "copy"])
def test_a_denoiser_returns_x_at_level_0(make, rng):
    """As deepinv calls it; also if only some of the levels are 0."""
    score, x = make(_net(1, precondition="karras")), torch.rand(2, 1, 8, 8, generator=rng).requires_grad_()
    denoiser = score.as_denoiser()
    for level in (0, 0.0, torch.tensor(0.0), torch.zeros(1), torch.zeros(2, 1, 1, 1)):
        assert torch.equal(denoiser(x, level), x)
    found = denoiser(x, torch.tensor([0.0, 0.3]))
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1:], score.denoise(x[1:], 0.3))
    assert torch.isfinite(torch.autograd.grad(found.square().sum(), x)[0]).all()
    for level in (-0.1, torch.tensor([0.0, -0.1])):
        with pytest.raises(ValueError, match=r"sigma must be positive, got -0\.1"):
            denoiser(x, level)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False])
def test_a_denoiser_can_be_traced_with_and_without_gradients(grad, rng, tmp_path):
    denoiser, x = _net(1, precondition="karras").as_denoiser(), torch.rand(3, 1, 8, 8, generator=rng)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(denoiser, (x[:2], torch.tensor([0.3, 2.0])))  # compares with a call without gradients
    sigma = torch.tensor([0.1, 0.0, 5.0])
    with torch.no_grad():
        torch.testing.assert_close(traced(x, sigma), denoiser(x, sigma))
