"""Laws of all rows of the preconditioning table: the exact score of Gaussian data, and digits at every noise level."""

import math

import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.evaluation.exact import Gaussian
from scorematch.nets.precondition import ROWS, Preconditioning
from scorematch.pretrained.configuration import checked
from scorematch.training.levels import weighting_for

DDPM = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
VE = NoiseSchedule.geometric(50, 0.01, 300)
MEAN, DEVIATION = 0.3, 0.2  # of the data, in [0, 1]


def _wide(t):
    return t.view(-1, 1, 1, 1)


def _at(levels):
    """The noise level at a fractional position, with log sigma linear between two levels."""
    logs = levels.sigmas.log()

    def sigma(position):
        lower = position.floor().long().clamp(max=len(levels) - 2)
        return _wide(torch.lerp(logs[lower], logs[lower + 1], position - lower).exp())

    return sigma


def _score(x, sigma):
    """In [0, 1]."""
    return -(x - MEAN) / (DEVIATION**2 + sigma**2)


def _denoised(u, s):
    """The clean image in [-1, 1], from a noisy one there."""
    mean, variance = 2 * MEAN - 1, 4 * DEVIATION**2
    return (variance * u + s**2 * mean) / (variance + s**2)


def _noise(v, s):
    """The noise in an image whose signal and noise together have unit variance, as a DDPM predicts it."""
    u = v * (1 + s**2).sqrt()
    return (u - _denoised(u, s)) / s


def _velocity(v, s):
    """Salimans & Ho 2022: alpha noise - sigma image, with alpha = 1 / sqrt(1 + s^2)."""
    u = v * (1 + s**2).sqrt()
    return (_noise(v, s) - s * _denoised(u, s)) / (1 + s**2).sqrt()


def _diffusion(kind, beta_min=0.1, beta_max=20.0, time_scale=999.0):
    """The noise as a network of a diffusion in continuous time predicts it (Song et al. 2021, Eq. 29 and App. C)."""

    def backbone(v, c_noise):
        t = _wide(c_noise) / time_scale
        alpha = torch.exp(-(beta_max - beta_min) * t**2 / 4 - beta_min * t / 2)
        deviation = (1 - alpha**2).sqrt() if kind == "vp" else 1 - alpha**2
        mean, variance = alpha * (2 * MEAN - 1), alpha**2 * 4 * DEVIATION**2 + deviation**2
        return deviation * (v - mean) / variance

    return backbone


def _karras(sigma_data=0.5):
    """Karras et al. 2022, Eq. 7 solved for F, with Table 1: D = c_skip u + c_out F(c_in u)."""

    def backbone(v, c_noise):
        s = torch.exp(4 * _wide(c_noise))
        total = (s**2 + sigma_data**2).sqrt()
        u = v * total
        return (_denoised(u, s) - sigma_data**2 / total**2 * u) / (s * sigma_data / total)

    return backbone


def _velocity_of_flow(reverse=False, time_scale=1.0):
    """n - x0 at x_t = (1 - t) x0 + t n (Lipman et al. 2023), or with time and velocity reversed."""

    def backbone(v, c_noise):
        t = _wide(c_noise) / time_scale
        t = 1 - t if reverse else t
        clean = _denoised(v / (1 - t), t / (1 - t))
        velocity = (v - (1 - t) * clean) / t - clean
        return -velocity if reverse else velocity

    return backbone


def _step(levels):
    """s of a time step of a DDPM."""
    return lambda step: 2 * _at(levels)(len(levels) - 1 - step)


# Name -> the row, its options, the levels, and the backbone that is exact on Gaussian data.
EXACT = {
    "ncsn": ("ncsn", {}, VE, lambda x, c: _score(x, _at(VE)(c))),
    "ncsnv2": ("ncsnv2", {}, VE, lambda x, c: _wide(c) * _score(x, _wide(c))),
    "ncsnpp": ("ncsnpp", {}, VE, lambda x, c: _wide(c).exp() * _score(x, _wide(c).exp())),
    "ncsnpp_index": ("ncsnpp_index", {}, VE, lambda x, c: _at(VE)(c) * _score(x, _at(VE)(c))),
    "ddpm": ("ddpm", {}, DDPM, lambda v, c: _noise(v, _step(DDPM)(c))),
    "ddpm_v": ("ddpm_v", {}, DDPM, lambda v, c: _velocity(v, _step(DDPM)(c))),
    "ddpm_x0": ("ddpm_x0", {}, DDPM, lambda v, c: _denoised(v * (1 + _step(DDPM)(c) ** 2).sqrt(), _step(DDPM)(c))),
    "vp": ("vp", {}, VE, _diffusion("vp")),
    "vp, other betas": ("vp", {"beta_max": 8.0, "time_scale": 500.0}, VE, _diffusion("vp", 0.1, 8.0, 500.0)),
    "vp, constant beta": ("vp", {"beta_min": 3.0, "beta_max": 3.0}, VE, _diffusion("vp", 3.0, 3.0)),
    "subvp": ("subvp", {}, VE, _diffusion("subvp")),
    "subvp, other betas": ("subvp", {"beta_min": 0.5}, VE, _diffusion("subvp", 0.5)),
    "karras": ("karras", {}, VE, _karras()),
    "flow": ("flow", {}, VE, _velocity_of_flow()),
    "flow, steps": ("flow", {"time_scale": 1000.0}, VE, _velocity_of_flow(time_scale=1000.0)),
    "flow_reverse": ("flow_reverse", {}, VE, _velocity_of_flow(reverse=True)),
    "karras, sigma_data": ("karras", {"sigma_data": 0.2}, VE, _karras(0.2)),
}


class Backbone(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, c_noise):
        return self.function(x, c_noise)


def test_every_row_of_the_table_is_tested():
    assert {row for row, _, _, _ in EXACT.values()} == ROWS.keys()


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_backbone_gives_the_exact_score(name, rng):
    row, options, levels, function = EXACT[name]
    net = ScoreNet(Backbone(function), levels, precondition=row, sample_shape=(1, 3, 5), precondition_options=options)
    exact = Gaussian(MEAN * torch.ones(15), DEVIATION**2 * torch.eye(15), (1, 3, 5))
    sigma = torch.tensor([40.0, 3.0, 0.27, 0.0101], dtype=torch.float64)  # none of them a level
    x = 0.5 + sigma.view(-1, 1, 1, 1) * torch.randn(4, 1, 3, 5, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(net(x, sigma), exact(x, sigma), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(net(x, 0.3), exact(x, 0.3), rtol=1e-7, atol=1e-7)


# Sigma, where float32 must have the digits of float64: beyond both ends of what networks are trained on.
RANGE = torch.logspace(-5, 4.7, 2000, dtype=torch.float64).float()


@pytest.mark.parametrize("name", EXACT)
def test_float32_has_the_digits_of_float64(name):
    """The relative error of coefficients; that of c_noise relative to 1 where it is a logarithm or a number of a level.

    A sum of logarithms or positions may be near zero, and enters a network through sines.
    """
    row, options, levels, _ = EXACT[name]
    preconditioning = Preconditioning(row, levels, (0.0, 1.0), options=options)
    single, double = (preconditioning.coefficients(sigma) for sigma in (RANGE, RANGE.double()))
    for found, expected in zip(single[:3], double[:3], strict=True):
        found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
        assert ((found - expected).abs() <= 4e-7 * expected.abs()).all()
    assert single.c_noise.dtype == torch.float32
    error = (single.c_noise.double() - double.c_noise).abs()
    if row in ("vp", "subvp", "ncsnv2"):
        assert (error <= 6e-7 * double.c_noise).all()
    elif row in ("karras", "ncsnpp"):
        assert (error <= 2e-7 * double.c_noise.abs().clamp(min=1)).all()
    else:  # a position or a time step: a hundredth of the step between two levels
        assert error.max() <= 0.01


@pytest.mark.parametrize("row", ["vp", "subvp"])
def test_the_time_of_a_diffusion_is_recovered(row):
    """From the first moments on, where the quadratic formula in its usual form has lost five digits in float32."""
    t = torch.logspace(-8, 0, 200, dtype=torch.float64)
    q = 0.1 * t + 19.9 * t**2 / 2
    s = torch.expm1(q).sqrt() if row == "vp" else 2 * torch.sinh(q / 2)
    preconditioning = Preconditioning(row, VE, (0.0, 1.0))
    c_noise = preconditioning.coefficients((s / 2).float()).c_noise
    assert ((c_noise.double() / (999 * t) - 1).abs() <= 1e-6).all()
    usual = (-0.1 + (0.01 + 2 * 19.9 * q.float()).sqrt()) / 19.9
    assert (usual.double() / t - 1).abs().max() > 0.01


@pytest.mark.parametrize("build", [ScoreNet.unet, ScoreNet.ncsnpp])
def test_a_new_network_is_the_score_of_a_gaussian_with_sigma_data(build, tmp_path):
    net = build(
        1, 8, widths=(8, 8), layers_per_block=1, precondition="karras", precondition_options={"sigma_data": 0.2}
    )
    net.save_pretrained(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    for each in (net.eval(), ScoreNet.from_pretrained(tmp_path)):  # in the units of [-1, 1], 0.2 is 0.1 of those of x
        torch.testing.assert_close(each(x, 0.3), (0.5 - x) / (0.3**2 + 0.1**2))


def test_options_of_a_row_are_stored_and_change_the_score_and_the_weighting(tmp_path):
    net = ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=1, schedule=VE)
    assert "precondition_options" not in net.config
    other = ScoreNet(net.backbone, VE, sample_shape=(1, 8, 8), precondition_options={"sigma_data": 0.2})
    assert other.config["precondition_options"] == {"sigma_data": 0.2}
    x, sigma = torch.rand(1, 1, 8, 8), torch.tensor([0.3])
    assert not torch.allclose(other(x, 0.3), net(x, 0.3))
    v = 0.6**2 + 0.2**2
    torch.testing.assert_close(weighting_for(other, None, 2)(sigma), torch.tensor([0.6**2 * v / (2 * 0.2) ** 2]))
    copies = other.inference_copy()
    torch.testing.assert_close(copies(x, 0.3), other(x, 0.3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ("ncsnpp", {"sigma_data": 1.0}, "the preconditioning 'ncsnpp' has no options, got 'sigma_data'"),
        ("karras", {"beta_min": 1.0}, "has an unknown key, 'beta_min'; the known keys are sigma_data"),
        ("karras", {"sigma_data": -1}, "sigma_data must be a number of at least"),
        ("karras", {"sigma_data": math.nan}, "sigma_data must be a number of at least"),
        ("vp", {"beta_max": 0.05}, "beta_max must be at least beta_min, 0.1, got 0.05"),
        ("subvp", {"beta_min": 30}, "beta_max must be at least beta_min, 30, got 20"),
    ],
)
def test_options_that_are_refused(row, options, message):
    with pytest.raises(ValueError, match=f"precondition_options.*{message}"):
        ScoreNet(nn.Identity(), VE, precondition=row, precondition_options=options)
    config = {**ScoreNet(nn.Identity(), VE, precondition=row).config, "precondition_options": options}
    with pytest.raises(ValueError, match=f"here: precondition_options.*{message}"):
        checked(config, "here")
