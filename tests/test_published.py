"""Files in the formats of score_sde, EDM and improved-diffusion: outputs, options and memory."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.nets import FAMILIES
from scorematch.pretrained import cards, improved_diffusion, score_sde
from scorematch.pretrained.loading import build
from scorematch.sampling import SAMPLERS, AncestralSampler, SamplerSettings, recommended_sampler
from tests import published as theirs
from tests.conftest import FIXTURES
from tests.helpers import convert, on_meta, python, run
from tests.published import randomize


def _close(found, expected, tolerance=2e-5):
    error = (found - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert error.max() <= tolerance, error


def _noisy(size, sigma, seed=1):
    """Images in [0, 1] with noise, one for each level, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sigma), 3, size, size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.rand(shape, generator=generator, dtype=torch.float64) + sigma.view(-1, 1, 1, 1) * noise


def _slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def _image(values):
    return values.view(-1, 1, 1, 1)


# -- score_sde


def _score_sde(sde="vesde", *, continuous=True, size=8, **model):
    """A configuration of the authors, with every option that they have for the network."""
    exploding = sde == "vesde"
    options = {
        "name": "ncsnpp",
        "nf": 8,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "scale_by_sigma": exploding,
        "num_scales": 50,
        "sigma_min": 0.01,
        "sigma_max": 50,
        "beta_min": 0.1,
        "beta_max": 20.0,
        "dropout": 0.1,
        "conditional": True,
        "nonlinearity": "swish",
        "resamp_with_conv": True,
        "fir": True,
        "fir_kernel": [1, 3, 3, 1],
        "skip_rescale": True,
        "embedding_type": "fourier" if exploding and continuous else "positional",
        "progressive": "none",
        "progressive_input": "none",
        "progressive_combine": "sum",
        "resblock_type": "biggan",
        **model,
    }
    return {
        "training": {"sde": sde, "continuous": continuous, "batch_size": 128},
        "data": {"image_size": size, "num_channels": 3, "centered": not exploding, "dataset": "CIFAR10"},
        "model": options,
        "sampling": {"predictor": "reverse_diffusion", "corrector": "langevin", "n_steps_each": 1, "snr": 0.16},
        "seed": 42,
    }


def _ddpm(sde, *, continuous=False, **model):
    return _score_sde(sde, continuous=continuous, name="ddpm", nf=32, ch_mult=[1, 1], embedding_type="fourier", **model)


SCORE_SDE = {
    "ncsnpp": _score_sde(progressive_input="residual"),
    "ncsnpp, skips": _score_sde(progressive="output_skip", progressive_input="input_skip", ch_mult=[1, 1, 2], size=16),
    "ncsnpp, skips, repetition": _score_sde(progressive="output_skip", progressive_input="input_skip", fir=False),
    "ncsnpp, residual output": _score_sde(progressive="residual", fir=False, ch_mult=[1, 2, 1]),
    "ncsnpp, residual, no filter": _score_sde(
        progressive="residual", progressive_input="residual", fir=False, ch_mult=[1, 2, 1]
    ),
    "ncsnpp, sums": _score_sde(skip_rescale=False, num_res_blocks=2, attn_resolutions=[8, 4]),
    "ncsnpp, no attention": _score_sde(attn_resolutions=[], nf=12, ch_mult=[2]),
    "ncsnpp, discrete": _score_sde(continuous=False, progressive_input="residual"),
    "ddpmpp, VP": _score_sde("vpsde", fir=False),
    "ddpmpp, VP, other betas": _score_sde("vpsde", fir=False, beta_min=0.2, beta_max=12.0),
    "ddpmpp, VP, discrete": _score_sde("vpsde", fir=False, continuous=False),
    "ddpmpp, sub-VP": _score_sde("subvpsde", fir=False),
    "ncsnpp, sub-VP": _score_sde("subvpsde", progressive_input="residual"),
    "ddpm, VP": _ddpm("vpsde", continuous=True, num_res_blocks=2),
    "ddpm, VP, discrete": _ddpm("vpsde"),
    "ddpm, sub-VP": _ddpm("subvpsde", continuous=True, attn_resolutions=[8, 4]),
    "ddpm, VE, discrete": _ddpm("vesde", attn_resolutions=[]),
}


def _expected_of_score_sde(net, config, x, sigma):
    """The score by the definitions of the authors' equations, at noise levels on their discrete table."""
    model, sde, continuous = config["model"], config["training"]["sde"], config["training"]["continuous"]
    count = model["num_scales"]
    if sde == "vesde":
        table = torch.logspace(math.log10(model["sigma_max"]), math.log10(model["sigma_min"]), count).double()
        labels = sigma if continuous else (table[None] / sigma[:, None]).log().abs().argmin(1).double()
        return net(x, labels) / _image(sigma)
    # Of the scaled image in [-1, 1]: alpha and the deviation of the noise, found by bisection in t.
    low, high = model["beta_min"], model["beta_max"]
    if sde == "vpsde" and not continuous:
        alphas = torch.cumprod(1 - torch.linspace(low / count, high / count, count, dtype=torch.float64), 0).sqrt()
        stds = (1 - alphas**2).sqrt()
        labels = (stds / alphas / 2 - sigma[:, None]).abs().argmin(1)
        alpha, std, labels = alphas[labels], stds[labels], labels.double()
    else:

        def deviation(t):
            log_alpha = -(t**2) * (high - low) / 4 - t * low / 2
            return log_alpha.exp(), (-torch.expm1(2 * log_alpha)) ** (0.5 if sde == "vpsde" else 1)

        below, above = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(60):
            t = (below + above) / 2
            alpha, std = deviation(t)
            below, above = (
                torch.where(std / alpha / 2 < sigma, t, below),
                torch.where(std / alpha / 2 < sigma, above, t),
            )
        labels = 999 * t
    score = -net(_image(alpha) * (2 * x - 1), labels) / _image(std)
    return 2 * _image(alpha) * score


def _write_score_sde(config, folder, **options):
    """A checkpoint and its configuration; returns the networks with the average and with the weights."""
    average, net = (randomize(theirs.ScoreSDE(config), seed) for seed in (0, 1))
    if average.fourier:
        average.all_modules[0].W.copy_(net.all_modules[0].W)
    theirs.save_score_sde(net, folder / "checkpoint_3.pth", average, **options)
    (folder / "config.json").write_text(json.dumps(config))
    return average, net


MORE = {
    *("ncsnpp, skips, repetition", "ncsnpp, sums", "ncsnpp, no attention", "ncsnpp, sub-VP", "ddpm, sub-VP"),
    *("ncsnpp, residual output", "ddpmpp, VP, other betas", "ddpmpp, VP, discrete", "ddpm, VP, discrete"),
}
MORE |= {"ddpmpp, VP, other betas", "ddpmpp, VP, discrete", "ddpm, VE, discrete", "ncsnpp, residual output"}


@pytest.mark.parametrize("name", [_slow(name) if name in MORE else name for name in SCORE_SDE])
@torch.no_grad()
def test_a_checkpoint_of_score_sde_gives_the_scores_of_its_authors(name, tmp_path):
    config = SCORE_SDE[name]
    average, _ = _write_score_sde(config, tmp_path)
    made = convert(tmp_path / "checkpoint_3.pth", tmp_path / "out", config=tmp_path / "config.json")
    found = ScoreNet.from_pretrained(tmp_path / "out")
    assert found.config == made.config and not found.training
    size = config["data"]["image_size"]
    assert found.sample_shape == (3, size, size) and len(found.schedule) == 50
    sigma = torch.tensor([found.schedule[i] for i in (1, 24, 48)], dtype=torch.float64)
    x = _noisy(size, sigma)
    expected = _expected_of_score_sde(average.double(), config, x, sigma)
    _close(found(x.float(), sigma), expected, 1e-4 if average.fourier else 2e-5)


@torch.no_grad()
def test_the_average_is_taken_unless_raw(tmp_path):
    config = SCORE_SDE["ncsnpp, no attention"]
    average, net = _write_score_sde(config, tmp_path, _use_new_zipfile_serialization=False)
    x, sigma = _noisy(8, torch.tensor([0.3, 4.0])), torch.tensor([0.3, 4.0])
    for raw, theirs_ in ((False, average), (True, net)):
        found = convert(tmp_path / "checkpoint_3.pth", tmp_path / "out", config=tmp_path / "config.json", raw=raw)
        _close(found(x.float(), sigma), _expected_of_score_sde(theirs_, config, x.float(), sigma), 1e-4)


@torch.no_grad()
def test_an_earlier_name_of_the_convolutions_of_the_input_pyramid(tmp_path, monkeypatch):
    inner = theirs._Inner
    monkeypatch.setattr(theirs, "_Inner", lambda name, *rest: inner("Conv", *rest))
    config = SCORE_SDE["ncsnpp, skips, repetition"]
    average, _ = _write_score_sde(config, tmp_path)
    found = convert(tmp_path / "checkpoint_3.pth", tmp_path / "out", config=tmp_path / "config.json")
    x, sigma = _noisy(8, torch.tensor([0.3, 4.0])), torch.tensor([0.3, 4.0])
    _close(found(x.float(), sigma), _expected_of_score_sde(average, config, x.float(), sigma), 1e-4)


# -- EDM

EDM = {
    "ddpmpp": ("EDMPrecond", theirs.SongUNet, {}),
    "ddpmpp, other data": (
        "EDMPrecond",
        theirs.SongUNet,
        {"sigma_data": 0.7, "channel_mult": (2, 2), "augment_dim": 9},
    ),
    "ddpmpp, classes": ("EDMPrecond", theirs.SongUNet, {"classes": 3, "num_blocks": 2, "attn_resolutions": (8, 4)}),
    "ddpmpp, VP": ("VPPrecond", theirs.SongUNet, {"channel_mult": (1, 2, 1), "attn_resolutions": ()}),
    "ncsnpp, VE": (
        "VEPrecond",
        theirs.SongUNet,
        {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "taps": (1, 3, 3, 1)},
    ),
    "ncsnpp, skips": (
        "EDMPrecond",
        theirs.SongUNet,
        {"encoder_type": "skip", "decoder_type": "skip", "taps": (1, 3, 3, 1), "channel_mult": (1, 2, 1)},
    ),
    "ddpmpp, residual": ("EDMPrecond", theirs.SongUNet, {"encoder_type": "residual", "classes": 4}),
    "adm": ("EDMPrecond", theirs.DhariwalUNet, {"heads": 8, "channel_mult": (2, 1)}),
    "adm, classes": (
        "EDMPrecond",
        theirs.DhariwalUNet,
        {"heads": 4, "channel_mult": (1, 2, 2), "classes": 5, "attn_resolutions": (8, 2), "num_blocks": 2},
    ),
    "adm, VE": ("VEPrecond", theirs.DhariwalUNet, {"heads": 8, "channel_mult": (1, 2)}),
    "adm, iDDPM": ("iDDPMPrecond", theirs.DhariwalUNet, {"heads": 8, "classes": 3, "outputs": 6}),
}
_LADDER = torch.logspace(3, -2, 51, dtype=torch.float64)


def _edm(name):
    kind, network, options = EDM[name]
    options = dict(options)
    attributes = {
        "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": options.pop("sigma_data", 0.5)},
        "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "sigma_min": 0.001, "sigma_max": 152.0},
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
        "iDDPMPrecond": {"M": 50, "sigma_min": 0.01, "sigma_max": 1000.0},
    }
    net = theirs.Preconditioned(kind, randomize(network(8, **options)), **attributes[kind])
    if kind == "iDDPMPrecond":
        net.register_buffer("u", torch.cat([_LADDER[:50].float(), torch.zeros(1)]))
    return net


def _expected_of_edm(net, x, sigma, classes):
    """The score by Table 1 of Karras et al., at noise levels of the ladder for iDDPM."""
    y, s = 2 * x - 1, 2 * sigma
    if net.kind == "EDMPrecond":
        data, total = net.sigma_data, (s**2 + net.sigma_data**2).sqrt()
        c_skip, c_out, c_in, c_noise = data**2 / total**2, s * data / total, 1 / total, s.log() / 4
    elif net.kind == "VEPrecond":
        c_skip, c_out, c_in, c_noise = 0 * s, s, 1 + 0 * s, (s / 2).log()
    else:
        c_skip, c_out, c_in = 0 * s, -s, 1 / (s**2 + 1).sqrt()
        if net.kind == "VPPrecond":
            q = (1 + s**2).log()
            c_noise = (net.M - 1) * ((net.beta_min**2 + 2 * net.beta_d * q).sqrt() - net.beta_min) / net.beta_d
        else:
            c_noise = 49 - (_LADDER[:50].log() - s.log()[:, None]).abs().argmin(1).double()
            c_skip = c_skip + 1
    if net.kind == "VPPrecond":
        c_skip = c_skip + 1
    if net.kind == "VEPrecond":
        c_skip = c_skip + 1
    # F first: (D - y) / s^2 loses digits at low noise levels.
    output = net.model(_image(c_in) * y, c_noise, classes)[:, :3]
    return 2 * (_image((c_skip - 1) / s**2) * y + _image(c_out / s**2) * output)


@pytest.mark.parametrize(
    "name", [name if name in ("ddpmpp, classes", "ncsnpp, VE", "adm, iDDPM") else _slow(name) for name in EDM]
)
@torch.no_grad()
def test_a_file_of_edm_gives_the_scores_of_its_authors(name, tmp_path):
    net = _edm(name)
    theirs.save_edm(net, tmp_path / "net.pkl")
    made = convert(tmp_path / "net.pkl", tmp_path / "out")
    found = ScoreNet.from_pretrained(tmp_path / "out")
    assert found.config == made.config and found.sample_shape == (3, 8, 8)
    sigma = torch.tensor([20.0, 0.7, 0.02], dtype=torch.float64)
    if net.kind == "iDDPMPrecond":
        sigma = _LADDER[[3, 25, 48]] / 2
    x = _noisy(8, sigma)
    tolerance = 1e-4 if name == "ncsnpp, VE" else 2e-5
    if not net.label_dim:
        _close(found(x.float(), sigma), _expected_of_edm(net.double(), x, sigma, None), tolerance)
        return
    for classes in (torch.tensor([0, 2, 1]), None):
        one_hot = None if classes is None else torch.eye(net.label_dim, dtype=torch.float64)[classes]
        one_hot = torch.zeros(3, net.label_dim, dtype=torch.float64) if classes is None else one_hot
        _close(found(x.float(), sigma, classes), _expected_of_edm(net.double(), x, sigma, one_hot), tolerance)


# -- improved-diffusion


def _improved(**options):
    return {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 1,
        "num_heads_upsample": -1,
        "attention_resolutions": [4],
        "dropout": 0.0,
        "learn_sigma": False,
        "sigma_small": False,
        "class_cond": "num_classes" in options,
        "diffusion_steps": 100,
        "noise_schedule": "linear",
        "predict_xstart": False,
        "rescale_timesteps": False,
        "use_scale_shift_norm": True,
        "channel_mult": [1, 2],
        "num_classes": None,
        "num_head_channels": -1,
        "resblock_updown": False,
        "use_new_attention_order": False,
        **options,
    }


IMPROVED = {
    "plain": _improved(),
    "cosine": _improved(noise_schedule="cosine", learn_sigma=True, num_heads=4, attention_resolutions=[8, 4]),
    "rescaled": _improved(rescale_timesteps=True, num_heads=4, num_heads_upsample=2, num_res_blocks=2),
    "classes": _improved(num_classes=3, use_scale_shift_norm=False),
    "heads that do not divide all widths": _improved(num_heads=3, channel_mult=[1, 3]),
    "clean image": _improved(predict_xstart=True, attention_resolutions=[], channel_mult=[1, 1, 2]),
    "guided": _improved(
        num_head_channels=16, num_heads=4, resblock_updown=True, learn_sigma=True, attention_resolutions=[8, 4]
    ),
    "guided, new order": _improved(
        num_heads=2, use_new_attention_order=True, resblock_updown=True, num_classes=3, channel_mult=[1, 1, 2]
    ),
    "guided, half a width": _improved(num_channels=64, num_head_channels=32, channel_mult=[0.5, 1]),
}


def _alpha_bar(options):
    steps = options["diffusion_steps"]
    betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    if options["noise_schedule"] == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


@pytest.mark.parametrize("name", [name if name in ("plain", "cosine", "classes") else _slow(name) for name in IMPROVED])
@torch.no_grad()
def test_a_checkpoint_of_improved_diffusion_gives_the_scores_of_its_authors(name, tmp_path):
    options = IMPROVED[name]
    net = randomize(theirs.ImprovedUNet(options))
    theirs.save_improved(net, tmp_path / "ema_0.9999_000100.pt")
    (tmp_path / "options.json").write_text(json.dumps(options))
    made = convert(tmp_path / "ema_0.9999_000100.pt", tmp_path / "out", config=tmp_path / "options.json")
    found = ScoreNet.from_pretrained(tmp_path / "out")
    assert found.config == made.config and found.predicts_variance == options["learn_sigma"]
    steps = torch.tensor([0, 40, 95])
    alpha_bar = _alpha_bar(options)[steps]
    sigma = (1 / alpha_bar - 1).sqrt() / 2
    x, classes = _noisy(8, sigma), torch.tensor([0, 2, 1]) if options["num_classes"] else None
    scaled = _image(alpha_bar.sqrt()) * (2 * x - 1)
    factor = 1000 / options["diffusion_steps"] if options["rescale_timesteps"] else 1
    output = net.double()(scaled, steps.double() * factor, classes)[:, :3]
    if options["predict_xstart"]:
        output = (scaled - _image(alpha_bar.sqrt()) * output) / _image((1 - alpha_bar).sqrt())
    expected = -2 * _image((alpha_bar / (1 - alpha_bar)).sqrt()) * output
    _close(found(x.float(), sigma, *([] if classes is None else [classes])), expected)


@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_a_network_of_improved_diffusion_for_other_images_than_rgb(channels, tmp_path):
    net = theirs.ImprovedUNet(_improved())
    net.input_blocks[0][0], net.out[2] = (
        theirs._First(channels, 32, 3, padding=1),
        nn.Conv2d(32, channels, 3, padding=1),
    )
    theirs.save_improved(randomize(net), tmp_path / "net.pt")
    (tmp_path / "options.json").write_text(json.dumps(_improved()))
    found = convert(tmp_path / "net.pt", tmp_path / "out", config=tmp_path / "options.json")
    assert found.sample_shape == (channels, 8, 8)
    alpha_bar = _alpha_bar(_improved())[[40, 95]]
    sigma = (1 / alpha_bar - 1).sqrt() / 2
    x = _noisy(8, sigma)[:, [0, 1, 2, 0][:channels]]
    output = net.double()(_image(alpha_bar.sqrt()) * (2 * x - 1), torch.tensor([40.0, 95.0]).double(), None)
    _close(found(x.float(), sigma), -output / _image(sigma))


# -- Sampling with learned variances


def _respaced(net, options, indices, y, noises, classes, *, clamp):
    """The authors' sampler with learned variances on some of the time steps, in float64 and in their units.

    Nichol & Dhariwal, 2021, arXiv:2102.09672: the respaced process has the products of alphas at ``indices`` and their
    betas (Sec. 3.1), and the variance of Eq. 15, with the network's output from -1 to 1 in place of v from 0 to 1.
    """
    products = _alpha_bar(options)[indices]
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    betas = 1 - products / before
    smallest = betas * (1 - before) / (1 - products)
    smallest[0] = smallest[1]
    factor = 1000 / options["diffusion_steps"] if options["rescale_timesteps"] else 1
    for i in reversed(range(len(indices))):
        steps = torch.full((len(y),), factor * indices[i], dtype=torch.float64)
        epsilon, v = net(y, steps, classes).chunk(2, 1)
        clean = (y - (1 - products[i]).sqrt() * epsilon) / products[i].sqrt()
        clean = clean.clamp(-1, 1) if clamp else clean
        mean = before[i].sqrt() * betas[i] * clean + (1 - betas[i]).sqrt() * (1 - before[i]) * y
        mean = mean / (1 - products[i])
        v = (v + 1) / 2
        deviation = ((v * betas[i].log() + (1 - v) * smallest[i].log()) / 2).exp()
        y = mean + deviation * next(noises) if i else mean
    return y


@pytest.mark.parametrize(
    ("options", "clamp", "indices"),
    [
        pytest.param(
            {"noise_schedule": "cosine", "rescale_timesteps": True, "diffusion_steps": 9},
            True,
            range(9),
            marks=pytest.mark.slow,
        ),
        ({"noise_schedule": "cosine", "num_classes": 3, "diffusion_steps": 9}, False, [0, 3, 4, 8]),
        pytest.param({"use_scale_shift_norm": False}, True, [0, 30, 31, 70, 99], marks=pytest.mark.slow),
    ],
    ids=["all steps", "respaced, not clamped", "respaced"],
)
@torch.no_grad()
def test_learned_variances_are_sampled_as_by_their_authors(options, clamp, indices, tmp_path):
    options = _improved(learn_sigma=True, **options)
    net = randomize(theirs.ImprovedUNet(options))
    theirs.save_improved(net, tmp_path / "model.pt")
    (tmp_path / "options.json").write_text(json.dumps(options))
    found = convert(tmp_path / "model.pt", tmp_path / "out", config=tmp_path / "options.json")
    steps = options["diffusion_steps"]
    published = SamplerSettings("ancestral", levels=steps, variance="learned", clamp_denoised=True)
    assert found.sampler_settings == published
    schedule = NoiseSchedule([found.schedule[steps - 1 - i] for i in reversed(indices)])
    sampler = recommended_sampler(found)
    assert sampler.schedule == found.schedule
    sampler = AncestralSampler(
        found, schedule, variance="learned", clamp_denoised=clamp, clamp=clamp, precision="float32"
    )
    generator = torch.Generator().manual_seed(1)
    y, *noises = torch.randn(len(indices), 3, 3, 8, 8, generator=generator, dtype=torch.float64)
    classes = torch.tensor([0, 2, 1]) if options["num_classes"] else None
    expected = _respaced(net.double(), options, list(indices), y, iter(noises), classes, clamp=clamp)
    scale = (1 + 4 * schedule.sigma_max**2) ** 0.5
    recorded = iter(noises)
    x = run(sampler, init=(1 + y * scale) / 2, condition=classes, noise_source=lambda x: next(recorded), batch_size=2)
    assert next(recorded, None) is None
    _close(2 * x.double() - 1, expected, 1e-4)


def test_learned_variances_lie_between_the_two_of_ddpm():
    """A network that predicts -1 or 1 everywhere has the small or the large variance."""

    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, step):
            return torch.cat([x.tanh(), torch.full_like(x, self.value)], 1)

    for variance, value in (("small", -1.0), ("large", 1.0)):
        levels = NoiseSchedule.geometric(20, 0.01, 12)
        net = ScoreNet(Constant(value), levels, precondition="ddpm", sample_shape=(1, 4, 4), predicts_variance=True)
        fixed, learned = (AncestralSampler(net, variance=kind) for kind in (variance, "learned"))
        torch.testing.assert_close(run(learned, 3, generator=0), run(fixed, 3, generator=0), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(run(learned, 3, generator=0), run(fixed, 3, generator=1), atol=0.01)


# -- Options


QUICK = {
    "ve/cifar10_ncsnpp_deep_continuous",
    "ve/ffhq_1024_ncsnpp_continuous",
    "vp/cifar10_ddpmpp_deep_continuous",
    "vp/ddpm/bedroom",
    "subvp/cifar10_ncsnpp_deep_continuous",
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else _slow(name)
        for name in score_sde.CONFIGURATIONS
        if "cifar10" not in name or "_deep" in name
    ],
)
def test_published_configurations_of_score_sde_have_the_modules_of_their_networks(name):
    options = score_sde._options(name)
    with on_meta():
        net = theirs.ScoreSDE({"data": options, "model": options})
        keys = score_sde._architecture(options)
        made = FAMILIES[keys.pop("family")].build(keys, levels=10, precondition="vp").state_dict()
    weights = {name: tensor for name, tensor in net.state_dict().items() if name != "sigmas"}
    found = score_sde._named(weights, options, "a file")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: made[name].shape for name in made}


@pytest.mark.parametrize(
    "name",
    [name if name in ("lsun_cat", "64x64_diffusion") else _slow(name) for name in improved_diffusion.CONFIGURATIONS],
)
def test_published_configurations_of_improved_diffusion_describe_networks(name, monkeypatch):
    """The weights of the authors' network have the names and shapes of ours. Millions are those of ADM's Table 11."""
    options = improved_diffusion._options(name)
    with on_meta():
        net = theirs.ImprovedUNet({**options, "num_classes": options["num_classes"] if options["class_cond"] else None})
    monkeypatch.setattr(improved_diffusion, "load_tensors", lambda content, path: content)
    stored = improved_diffusion.read(net.state_dict(), Path("a.pt"), name)
    made = build(stored._replace(has_weights=False)).state_dict()
    assert {key: tensor.shape for key, tensor in stored.weights.items()} == {key: made[key].shape for key in made}
    millions = {"64x64_diffusion": 296, "128x128_diffusion": 422, "256x256_diffusion": 554, "512x512_diffusion": 559}
    if name in millions:
        assert round(sum(tensor.numel() for tensor in made.values()) / 1e6) == millions[name]


def test_every_published_checkpoint_has_its_configuration():
    configurations = {**score_sde.CONFIGURATIONS, **improved_diffusion.CONFIGURATIONS}
    for checkpoint in cards.CHECKPOINTS:
        options = checkpoint.config and configurations[checkpoint.config]
        size = options and options.get("data", options).get("image_size", 64)
        assert size in (None, checkpoint.shape[1])
        assert (checkpoint.config is None) == ("not for commercial use" in checkpoint.license)


_LANGEVIN = {"predictor": "reverse-diffusion", "corrector_steps": 1, "published": True}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ve/cifar10_ncsnpp_continuous", SamplerSettings("predictor-corrector", levels=1000, **_LANGEVIN, snr=0.16)),
        ("ve/church_ncsnpp_continuous", SamplerSettings("predictor-corrector", levels=2000, **_LANGEVIN, snr=0.075)),
        ("ve/ffhq_1024_ncsnpp_continuous", SamplerSettings("predictor-corrector", levels=2000, **_LANGEVIN, snr=0.15)),
        (
            "subvp/cifar10_ddpmpp_continuous",
            SamplerSettings("predictor-corrector", levels=1000, predictor="reverse-diffusion", corrector_steps=0),
        ),
        ("vp/cifar10_ddpmpp", SamplerSettings("ancestral", levels=1000, variance="large")),
    ],
)
def test_the_sampler_settings_of_published_configurations_of_score_sde(name, settings):
    assert score_sde._settings(score_sde._options(name)) == settings


@pytest.mark.slow
@torch.no_grad()
def test_the_recommended_sampler_of_score_sde_takes_the_steps_of_its_authors():
    """The file, its noise and its states were made with the authors' program, with five noise levels."""
    folder = FIXTURES / "score_sde"
    recorded = {name: torch.from_numpy(array) for name, array in np.load(folder / "pc_sampler.npz").items()}
    net = ScoreNet.from_checkpoint(folder / "checkpoint_1.pth", config=folder / "config.json")
    settings = net.sampler_settings
    sampler = SAMPLERS[settings.sampler](net, **settings.options, precision="float32", clamp=False)
    assert str(sampler) == str(recommended_sampler(net)) and len(sampler) == recorded["nfe"]
    steps = list(zip(recorded["corrector_noise"], recorded["predictor_noise"], strict=True))
    noises = (noise for pair in steps for noise in pair)
    start = recorded["prior"] * net.schedule.sigma_max
    found = [x for x, _ in sampler.iterate(init=start, noise_source=lambda x: next(noises), progress=False)]
    pairs = zip(recorded["after_corrector"], recorded["after_predictor"], strict=True)
    expected = [*[x for pair in pairs for x in pair][:-1], recorded["sample"]]
    for ours, theirs_ in zip(found, expected, strict=True):
        _close(ours, theirs_, 1e-5)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (
            {"predictor": "ancestral_sampling", "corrector": "none"},
            SamplerSettings("ancestral", levels=50, variance="small"),
        ),
        (
            {"predictor": "ancestral_sampling", "corrector": "langevin", "snr": 0.1, "n_steps_each": 2},
            SamplerSettings(
                "predictor-corrector", levels=50, predictor="ancestral", corrector_steps=2, snr=0.1, published=True
            ),
        ),
        ({"predictor": "none", "corrector": "langevin"}, None),
        ({"predictor": "reverse_diffusion", "corrector": "ald"}, None),
        ({}, None),
    ],
)
def test_settings_of_other_samplers(sampling, expected, tmp_path):
    config = {**_score_sde(), "sampling": sampling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert score_sde._settings(score_sde._options(tmp_path / "config.json")) == expected


def test_the_variance_of_ancestral_sampling_is_the_authors(tmp_path):
    """x' = (x + beta s) / sqrt(1 - beta) + sqrt(beta) z, in units without the scale of the image."""
    options = score_sde._options("vp/cifar10_ddpm")
    schedule, _ = score_sde._noise(options, "")
    betas = np.linspace(0.1 / 1000, 20 / 1000, 1000)
    i = 400
    alpha_bar = np.cumprod(1 - betas)[i - 1]
    high, low = schedule[999 - i], schedule[1000 - i]
    ratio = (1 + 4 * low**2) / (1 + 4 * high**2)
    assert 4 * (high**2 - low**2) * ratio == pytest.approx(betas[i] / alpha_bar, rel=1e-9)


def test_a_configuration_in_any_notation(tmp_path):
    config = SCORE_SDE["ncsnpp"]
    (tmp_path / "a.json").write_text(json.dumps(config))
    (tmp_path / "a.yml").write_text(json.dumps(config).replace("[1, 2]", "!!python/tuple [1, 2]"))
    expected = score_sde._options(tmp_path / "a.json")
    assert score_sde._options(str(tmp_path / "a.yml")) == expected
    flags = "image_size: 32\nnum_channels: 64\nlearn_sigma: True\nnoise_schedule: cosine  # as trained\n"
    (tmp_path / "flags.txt").write_text(flags + "attention_resolutions: 16,8\ndropout: 0.3")
    found = improved_diffusion._options(tmp_path / "flags.txt")
    assert found["num_channels"] == 64 and found["learn_sigma"] is True and found["noise_schedule"] == "cosine"
    assert (
        found["attention_resolutions"] == [16, 8] and found["channel_mult"] == [1, 2, 2, 2] and found["num_heads"] == 4
    )


@pytest.mark.parametrize("suffix", ["yml", "json"])
def test_a_configuration_in_the_home_folder_that_windows_wrote(suffix, tmp_path, monkeypatch):
    """The path begins with a tilde, and the file with a byte order mark."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / f"a.{suffix}").write_text(json.dumps(SCORE_SDE["ncsnpp"]), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(SCORE_SDE["ncsnpp"]))
    assert score_sde._options(f"~/a.{suffix}") == score_sde._options(tmp_path / "b.json")


@pytest.mark.parametrize("line", ["noise-schedule: cosine", "use_rope: True", "small_size: 64"])
def test_unknown_options_of_improved_diffusion_raise(tmp_path, line):
    (tmp_path / "options.yml").write_text(f"image_size: 32\n{line}\n")
    with pytest.raises(
        ValueError, match=r"(noise-schedule|use_rope|small_size) is not a supported option of improved-diffusion o"
    ):
        improved_diffusion._options(tmp_path / "options.yml")


def test_options_of_guided_diffusion(tmp_path):
    """As in its README; rescale_timesteps has another default than in improved-diffusion."""
    flags = (
        "attention_resolutions: 32,16,8; class_cond: True; diffusion_steps: 1000; image_size: 512; learn_sigma: True; "
        "noise_schedule: linear; num_channels: 256; num_head_channels: 64; num_res_blocks: 2; resblock_updown: True; "
        "use_fp16: False; use_scale_shift_norm: True"
    )
    (tmp_path / "flags.yml").write_text(flags.replace("; ", "\n"))
    found = improved_diffusion._options(tmp_path / "flags.yml")
    assert found == improved_diffusion._options("512x512_diffusion")
    assert found["channel_mult"] == [0.5, 1, 1, 2, 2, 4, 4] and not found["rescale_timesteps"]
    assert improved_diffusion._options("64x64_diffusion")["use_new_attention_order"]
    (tmp_path / "options.json").write_text(
        json.dumps({"image_size": 256, "channel_mult": "", "attention_resolutions": 16, "timestep_respacing": ""})
    )
    found = improved_diffusion._options(tmp_path / "options.json")
    assert found["channel_mult"] == [1, 1, 2, 2, 4, 4] and found["attention_resolutions"] == [16]
    (tmp_path / "flags.yml").write_text("num_channels: 96\nnum_head_channels: 64")
    with pytest.raises(ValueError, match="num_head_channels must divide the number of channels at each sca"):
        improved_diffusion._options(tmp_path / "flags.yml")


def test_the_time_factor_is_asked_for_where_the_two_projects_have_different_defaults(tmp_path):
    path = tmp_path / "flags.yml"
    path.write_text("diffusion_steps: 4000")
    with pytest.raises(
        ValueError, match=r"flags\.yml: rescale_timesteps must be given for 4000 steps\. Its default is"
    ):
        improved_diffusion._options(path)
    for rescaled in (True, False):
        path.write_text(f"diffusion_steps: 4000\nrescale_timesteps: {rescaled}")
        assert improved_diffusion._options(path)["rescale_timesteps"] is rescaled
    path.write_text("diffusion_steps: 4000\nresblock_updown: True")  # guided-diffusion
    assert improved_diffusion._options(path)["rescale_timesteps"] is False
    assert improved_diffusion._options("cifar10_uncond_50M_500K")["rescale_timesteps"] is True


def test_published_options_of_improved_diffusion():
    options = improved_diffusion._options("imagenet64_cond_270M_250K")
    assert (options["num_channels"], options["num_classes"], options["class_cond"]) == (192, 1000, True)
    assert not options["rescale_timesteps"] and options["channel_mult"] == [1, 2, 3, 4]
    options = improved_diffusion._options("lsun_uncond_100M_1200K_bs128")
    assert (options["num_heads"], options["channel_mult"]) == (1, [1, 1, 2, 2, 4, 4])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("model.nf = 8", "a.txt", r"a\.txt is not a configuration: it must hold options by key"),
        (
            "import ml_collections",
            "a.py",
            r"a\.py is a Python program, which is not run: write its options into a YAML file, as",
        ),
        ("- 1", "a.yml", r"a\.yml is not a configuration: it must hold options by key"),
        ("!!python/object/apply:os.getcwd []", "a.yml", r"a\.yml is not a configuration that can be read safely"),
        ("{", "a.json", r"a\.json is not valid JSON"),
        ("a: [1\nb: 2", "a.yml", r"a\.yml is not a configuration that can be read safely: .* in line 2\.$"),
        ("a: &a {x: 1}\nb: {<<: *a}", "a.yml", r"a\.yml is not a .* read safely: could not .* in line 2\.$"),
        ("#" * 300_000, "a.txt", r"a\.txt has 300,000 bytes, and a file of options has at most 262,144\.$"),
    ],
)
def test_configurations_that_cannot_be_read(text, name, message, checkpoint, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        ScoreNet.from_checkpoint(checkpoint, config=tmp_path / name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of score_sde."""
    folder = tmp_path_factory.mktemp("checkpoint")
    _write_score_sde(_score_sde(), folder)
    return folder / "checkpoint_3.pth"


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"nf": None}, "section model lacks nf"),
        ("training", {"sde": "ouve"}, "section training: sde must be one of 'vesde', 'vpsde', 'subvpsde', got 'ouve'"),
        ("training", {"continuous": "yes"}, "continuous must be true or false, got 'yes'"),
        ("data", {"centered": True}, "centered must be False in a network of a continuous vesde, got True"),
        ("model", {"scale_by_sigma": False}, "scale_by_sigma must be True in a network of a continuous vesde"),
        (
            "model",
            {"embedding_type": "positional"},
            "embedding_type must be 'fourier' in a network of a continuous ves",
        ),
        ("model", {"conditional": False}, "conditional must be one of True, got False"),
        ("model", {"nonlinearity": "elu"}, "nonlinearity must be one of 'swish', got 'elu'"),
        ("model", {"resblock_type": "ddpm"}, "resblock_type must be one of 'biggan', got 'ddpm'"),
        ("model", {"progressive_combine": "cat"}, "progressive_combine must be one of 'sum', got 'cat'"),
        ("model", {"fir_kernel": [1, 2, 1]}, r"fir_kernel must be one of \[1, 3, 3, 1\], got \[1, 2, 1\]"),
        ("model", {"name": "ncsnv2"}, "name must be one of 'ncsnpp', 'ddpm', got 'ncsnv2'"),
        ("model", {"name": "ddpm", "ch_mult": [2, 2]}, "ch_mult must begin with 1 in a network named ddpm"),
        ("model", {"sigma_max": 0.001}, "section model: the options do not define valid noise levels"),
    ],
)
def test_options_of_score_sde_that_are_not_supported(section, changes, message, checkpoint, tmp_path):
    config = _score_sde()
    if changes.get("name") == "ddpm":
        config = _ddpm("vesde")
    config[section] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        convert(checkpoint, tmp_path / "out", config=tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


# -- What a file does not contain, or what it is instead


@pytest.mark.slow
def test_what_a_file_does_not_contain_is_asked_for(tmp_path):
    _write_score_sde(SCORE_SDE["ddpmpp, VP"], tmp_path)
    theirs.save_improved(randomize(theirs.ImprovedUNet(_improved())), tmp_path / "model.pt")
    theirs.save_edm(_edm("ddpmpp"), tmp_path / "net.pkl")
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint_3.pth"
    for path, keywords, error, message in [
        (
            checkpoint,
            {},
            ValueError,
            r"is a checkpoint of score_sde, which does not hold its configuration: pass the na",
        ),
        (
            checkpoint,
            {"config": "vp/cifar"},
            FileNotFoundError,
            r"'vp/cifar' is neither a file nor the name of a publish",
        ),
        (
            tmp_path / "model.pt",
            {},
            ValueError,
            "is a checkpoint of improved-diffusion or guided-diffusion, which does not hold its options",
        ),
        (tmp_path / "model.pt", {"raw": True}, ValueError, "which holds one set of weights: leave out raw"),
        (
            tmp_path / "net.pkl",
            {"config": "x"},
            ValueError,
            "is a file of EDM, which holds its own options: leave out co",
        ),
        (
            tmp_path / "net.pkl",
            {"raw": True},
            ValueError,
            "contains only the moving average of the weights: leave out raw",
        ),
    ]:
        with pytest.raises(error, match=message) as caught:
            convert(path, out, **keywords)
        assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.slow
def test_weights_of_another_configuration_are_refused(tmp_path):
    _write_score_sde(SCORE_SDE["ddpmpp, VP"], tmp_path)
    for changes, message in [
        ({"num_res_blocks": 2}, r"weights of 18 modules, and a network of its configuration has 23"),
        ({"attn_resolutions": [8]}, r"holds the tensor 'all_modules\.4\.Conv_0\.weight', which a network with these o"),
        ({"nf": 16}, "belong to a network of other sizes"),
    ]:
        config = _score_sde("vpsde", fir=False, **changes)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"checkpoint_3\.pth.*{message}"):
            convert(tmp_path / "checkpoint_3.pth", tmp_path / "out", config=tmp_path / "config.json")
    net = randomize(theirs.ImprovedUNet(_improved()))
    theirs.save_improved(net, tmp_path / "model.pt")
    for changes, message in [
        (
            {"attention_resolutions": [8]},
            r"holds the tensor 'output_blocks\.0\.1\.norm\.weight', which a network with these o",
        ),
        ({"num_res_blocks": 2}, r"holds the tensor 'input_blocks\.2\.0\.op\.weight', which"),
        ({"num_heads": 5}, r"input_blocks\.3\.1\.qkv\.weight: its 192 rows do not have 5 heads"),
        ({"learn_sigma": True}, r"other sizes: conv_out\.weight"),
    ]:
        (tmp_path / "options.json").write_text(json.dumps(_improved(**changes)))
        with pytest.raises(ValueError, match=rf"model\.pt.*{message}"):
            convert(tmp_path / "model.pt", tmp_path / "out", config=tmp_path / "options.json")


def test_a_moving_average_of_other_weights_is_refused(tmp_path):
    net = randomize(theirs.ScoreSDE(SCORE_SDE["ncsnpp, no attention"]))
    (tmp_path / "config.json").write_text(json.dumps(SCORE_SDE["ncsnpp, no attention"]))
    path = tmp_path / "a.pth"
    model = nn.DataParallel(net).state_dict()
    shadow = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
    for ema, message in [
        (None, "holds no moving average of the weights: pass raw=True"),
        ({"shadow_params": shadow[:-1]}, "holds a moving average whose shapes differ from those of its weights"),
        ({"shadow_params": shadow[::-1]}, "holds a moving average whose shapes differ from those of its weights"),
        ({"shadow_params": [*shadow[:-1], 3]}, "holds a moving average whose shapes differ from those of its weights"),
    ]:
        torch.save({"model": model, "ema": ema}, path)
        with pytest.raises(ValueError, match=rf"a\.pth {message}"):
            convert(path, tmp_path / "out", config=tmp_path / "config.json")
    assert convert(path, tmp_path / "out", config=tmp_path / "config.json", raw=True).precondition == "ncsnpp"


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [(6, 3, "6 input and 3 output"), (6, 6, "6 input and 6 output"), (3, None, "3 input and 0 output")],
)
def test_networks_that_enlarge_images_and_classifiers_are_named(inputs, outputs, message, tmp_path):
    net = theirs.ImprovedUNet(_improved())
    net.input_blocks[0][0] = nn.Conv2d(inputs, 32, 3)
    net.out[2] = nn.Identity() if outputs is None else nn.Conv2d(32, outputs, 3)
    theirs.save_improved(randomize(net), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"guided-diffusion with {message} channels: classifiers and networks that"):
        convert(tmp_path / "other.pt", tmp_path / "out")


# -- Records of EDM


def _break(edit, tmp_path):
    inner = randomize(theirs.SongUNet(8, classes=3))
    net = theirs.Preconditioned("EDMPrecond", inner, sigma_min=0, sigma_max=math.inf, sigma_data=0.5)
    edit(net)
    theirs.save_edm(net, tmp_path / "net.pkl")
    return tmp_path / "net.pkl"


def _attention_of_two_heads(net):
    for module in net.modules():
        if getattr(module, "num_heads", 0):
            module.num_heads = 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda net: setattr(net, "kind", "SongUNet"),
            "holds a network of the class SongUNet: expected one of EDMPrecond",
        ),
        (
            lambda net: setattr(net, "kind", "Generator"),
            "holds an object of the class 'Generator', which no network of",
        ),
        (
            lambda net: setattr(net, "model", net.model.map_layer0),
            "holds a network of the class EDMPrecond: expected one",
        ),
        (lambda net: setattr(net, "img_resolution", "8"), "ema: img_resolution must be an integer .* got '8'"),
        (lambda net: setattr(net, "img_resolution", 12), "holds a network without blocks at its resolution, 12"),
        (lambda net: setattr(net, "sigma_data", math.nan), "ema: sigma_data must be a number"),
        (lambda net: delattr(net, "sigma_data"), "ema lacks sigma_data"),
        (lambda net: setattr(net, "label_dim", 4), "label_dim is 4, which is not the width of map_label"),
        (
            lambda net: setattr(net.model.enc["8x8_block0"], "skip_scale", 1),
            r"skip_scale must have the same value in all",
        ),
        (
            lambda net: setattr(net.model.enc["8x8_block0"], "adaptive_scale", True),
            "adaptive_scale must have False in all",
        ),
        (
            lambda net: setattr(net.model.enc["8x8_block0"].norm0, "eps", 1e-5),
            "eps must have 1e-06 in all modules of the",
        ),
        (
            lambda net: setattr(net.model.enc["8x8_block0"].norm0, "num_groups", 1),
            "num_groups of model.enc.8x8_block0.no",
        ),
        (_attention_of_two_heads, "a SongUNet has attention of one head"),
        (lambda net: setattr(net.model.map_noise, "endpoint", False), "endpoint must have True in all modules"),
        (lambda net: net.model.enc["4x4_down"].conv0.resample_filter.mul_(2), "resample_filter must be one of"),
        (
            lambda net: net.model.enc.__delitem__("4x4_down"),
            r"lacks 12 tensor\(s\) that the network needs: down_blocks.0",
        ),
        (lambda net: net.model.enc.__delitem__("8x8_conv"), "lacks the weight of enc.8x8_conv"),
        (lambda net: net.model.enc.add_module("8x8_more", theirs.Linear(2, 2)), "holds the tensor 'model.enc.8x8_more"),
        (lambda net: net.model.enc.add_module("8x8_more", net.model.map_layer0), "has no module at"),
        (
            lambda net: net.model.enc.add_module("x" * 300, theirs.Linear(2, 2)),
            "holds a part with a name of more than 200",
        ),
        (lambda net: net.model.add_module("self", net), "has no module at 'model.self', or the same module twice"),
        (
            lambda net: setattr(net.model.map_layer1, "weight", nn.Parameter(torch.zeros(3))),
            "belong to a network of othe",
        ),
    ],
)
def test_networks_of_edm_that_are_not_supported(edit, message, tmp_path):
    path = _break(edit, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "classes", "levels"), [(32, 10, 18), (64, 0, 40), (64, 1000, 256)])
def test_the_steps_of_edm_follow_the_resolution(size, classes, levels, tmp_path):
    net = theirs.SongUNet(size, classes=classes, channel_mult=(1,), attn_resolutions=())
    net = theirs.Preconditioned("EDMPrecond", randomize(net), sigma_min=0, sigma_max=math.inf, sigma_data=0.5)
    theirs.save_edm(net, tmp_path / "net.pkl", loss_fn=theirs.Linear(1, 1), dataset_kwargs={"path": "data.zip"})
    found = convert(tmp_path / "net.pkl", tmp_path / "out")
    # Of ImageNet, in units of images in [0, 1]: S_churn = 40, S_min = 0.05, S_max = 50, S_noise = 1.003.
    churn = {"churn": 40, "churn_min": 0.025, "churn_max": 25, "churn_noise": 1.003} if classes == 1000 else {}
    assert found.sampler_settings == SamplerSettings("ode", levels=levels, method="heun", **churn)
    sampler = recommended_sampler(ScoreNet.from_pretrained(tmp_path / "out"))
    assert (sampler.schedule.sigma_max, sampler.schedule.sigma_min) == (40, 0.001)
    assert len(sampler) == 2 * levels - 1  # as published: 35, 79 and 511 calls
    assert all(getattr(sampler, name) == value for name, value in churn.items())


def test_networks_of_iddpm_in_the_format_of_edm_are_sampled_in_the_range_of_edm(tmp_path):
    """Their own noise levels, of which the highest is 500, are kept."""
    theirs.save_edm(_edm("adm, iDDPM"), tmp_path / "net.pkl")
    with torch.device("meta"):  # whatever the default device is
        found = convert(tmp_path / "net.pkl", tmp_path / "out")
    assert found.sampler_settings == SamplerSettings("ode", levels=18, method="heun", sigma_max=40)
    assert found.schedule.sigma_max == pytest.approx(500)
    lowest = found.schedule.sigma_min
    assert recommended_sampler(found).schedule == NoiseSchedule.karras(40, lowest, 18)
    assert recommended_sampler(found, sigma_max=20, levels=5).schedule == NoiseSchedule.karras(20, lowest, 5)


def test_names_outside_the_list_of_a_format_are_refused(tmp_path):
    """Numbers of NumPy are in the list of score_sde, and not in that of improved-diffusion."""
    weights = theirs.ImprovedUNet(_improved()).state_dict()
    torch.save({**weights, "lr": np.float64(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="checkpoint of improved-diffusion or guided-diffusion does not need; it was"):
        convert(tmp_path / "a.pt", tmp_path / "out")


# -- The command


def test_the_command_convert_reads_a_checkpoint_of_score_sde(tmp_path, capsys):
    _write_score_sde(SCORE_SDE["ddpmpp, VP"], tmp_path)
    checkpoint, config = str(tmp_path / "checkpoint_3.pth"), str(tmp_path / "config.json")
    assert main(["convert", checkpoint, str(tmp_path / "out"), "--config", config, "--raw"]) == 0
    assert "NoiseSchedule(50 levels, 76.1 -> 0.00524)" in capsys.readouterr().out
    assert ScoreNet.from_pretrained(tmp_path / "out").precondition == "vp"
    assert main(["convert", checkpoint, str(tmp_path / "other"), "--config", "vp/cifar10_ddpmpp_continuous"]) == 2
    error = capsys.readouterr().err
    assert "it was trained with another configuration" in error and error.count("\n") == 1


# -- Memory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["score_sde", "edm", "improved_diffusion"])
def test_reading_takes_at_most_twice_the_size_of_the_file(kind, tmp_path):
    """The largest resident memory of a process that converts a file of tens of megabytes."""
    path, config = tmp_path / "large", None
    if kind == "score_sde":
        config = _score_sde(nf=64, ch_mult=[1, 2, 2])
        theirs.save_score_sde(randomize(theirs.ScoreSDE(config)), path)
    elif kind == "improved_diffusion":
        config = _improved(num_channels=64, channel_mult=[1, 2, 2])
        theirs.save_improved(randomize(theirs.ImprovedUNet(config)), path)
    else:
        net = randomize(theirs.SongUNet(8, model_channels=64, channel_mult=(1, 2, 2)))
        theirs.save_edm(theirs.Preconditioned("EDMPrecond", net, sigma_min=0, sigma_max=1, sigma_data=0.5), path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs.save_edm(_edm("ddpmpp"), tmp_path / "small")
    code = """
import resource, sys
from scorematch import ScoreNet
path, config, small, out = sys.argv[1:]
ScoreNet.from_checkpoint(small).save_pretrained(out)  # what the libraries need themselves
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ScoreNet.from_checkpoint(path, config=config or None).save_pretrained(out)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    arguments = (path, tmp_path / "config.json" if config else "", tmp_path / "small", tmp_path / "out")
    used = int(python("-c", code, *arguments).stdout)
    assert used <= 2.05 * path.stat().st_size  # and the pages of the interpreter
