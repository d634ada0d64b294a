"""Other libraries compute the same from the same input: samplers, likelihoods, metrics, and restoration by a denoiser.

These packages are not required: a test is skipped without its package. CONTRIBUTING.md says how to install them.
tests/test_metrics.py has the comparisons with torch-fidelity. Written for azula 0.11, clean-fid 0.1.35, deepinv 0.5,
k-diffusion 0.1.1, prdc 0.2 and torchmetrics 1.9.
"""

import importlib
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.evaluation import density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall
from scorematch.evaluation.exact import Gaussian, GaussianMixture
from scorematch.likelihood import log_likelihood
from scorematch.restoration import Blur, Fourier, GaussianBlur, Mask, Observation, Physics
from scorematch.sampling import AncestralSampler, ODESampler
from tests.helpers import gaussian_images, run, seed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of the other packages
PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
LEVELS = NoiseSchedule.karras(20, 0.05, 9)
PLAIN = {"denoise": False, "clamp": False}


# -- Samplers and likelihoods -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def k_diffusion():
    """The samplers of k-diffusion, without the rest of it, which needs 30 more packages."""
    spec = find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = spec.submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        yield pytest.importorskip("k_diffusion.sampling")
    for name in ("k_diffusion.sampling", "k_diffusion.utils"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def mixture():
    """Three components in 12 dimensions."""
    means = 2 * torch.randn(3, 12, generator=seed(1), dtype=torch.float64)
    return GaussianMixture([0.5, 0.3, 0.2], means, 0.2, (3, 2, 2))


def _denoised(score):
    """The score in the convention of k-diffusion and azula."""
    return lambda x, sigma: x + sigma.view(-1, 1, 1, 1).square() * score(x, sigma)


def _start():
    return LEVELS.sigma_max * torch.randn(16, 3, 2, 2, generator=seed(2))


def _sigmas():
    return torch.tensor(list(LEVELS))


def _near(ours, theirs):
    """The samplers compute in float32, each in its own order."""
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m"])
def test_deterministic_samplers_of_k_diffusion_draw_the_same_samples(k_diffusion, mixture, method):
    init = _start()
    theirs = getattr(k_diffusion, f"sample_{method}")(_denoised(mixture), init, _sigmas(), disable=True)
    sampler = ODESampler(mixture, LEVELS, method={"heun": "heun", "dpmpp_2m": "dpm-solver++"}[method], **PLAIN)
    ours = run(sampler, init=init)
    assert ours.std() > 0.5
    _near(ours, theirs)


def test_the_last_step_of_k_diffusion_is_the_denoised_sample(k_diffusion, mixture):
    sigmas, init = torch.cat([_sigmas(), torch.zeros(1)]), _start()
    theirs = k_diffusion.sample_heun(_denoised(mixture), init, sigmas, disable=True)
    ours = run(ODESampler(mixture, LEVELS, denoise=True, clamp=False), init=init)
    _near(ours, theirs)


def test_the_levels_of_k_diffusion_are_those_of_karras(k_diffusion):
    theirs = k_diffusion.get_sigmas_karras(9, 0.05, 20)
    torch.testing.assert_close(_sigmas(), theirs[:-1], rtol=1e-6, atol=0)


def test_churn_of_k_diffusion_draws_the_same_samples(k_diffusion, mixture):
    """k-diffusion divides the churn by the number of steps, which is one less than that of levels."""
    init, options = _start(), {"s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
    torch.manual_seed(3)
    churn = 2.0
    theirs = k_diffusion.sample_heun(
        _denoised(mixture), init, _sigmas(), disable=True, s_churn=churn * (len(LEVELS) - 1) / len(LEVELS), **options
    )
    torch.manual_seed(3)
    sampler = ODESampler(mixture, LEVELS, churn=churn, churn_min=0.1, churn_max=10, churn_noise=1.01, **PLAIN)
    ours = run(sampler, init=init, noise_source=torch.randn_like)
    _near(ours, theirs)


def test_the_ancestral_sampler_of_k_diffusion_draws_the_same_samples(k_diffusion, mixture):
    init, generator = _start(), seed(4)

    def noise(*_):
        return torch.randn(init.shape, generator=generator)

    theirs = k_diffusion.sample_euler_ancestral(_denoised(mixture), init, _sigmas(), disable=True, noise_sampler=noise)
    generator = seed(4)
    ours = run(AncestralSampler(mixture, LEVELS, variance="small", **PLAIN), init=init, noise_source=noise)
    _near(ours, theirs)


def test_likelihoods_of_k_diffusion_are_equal(k_diffusion):
    """For a normal distribution with one variance, for which the estimate of the trace is exact."""
    gaussian, levels = gaussian_images((1, 2, 2), 0.3), NoiseSchedule.karras(50, 1e-3, 400)
    x = gaussian.sample(5, 0, torch.float64)
    theirs, _ = k_diffusion.log_likelihood(_denoised(gaussian), x, 1e-3, 50, atol=1e-8, rtol=1e-8)
    ours = log_likelihood(gaussian, x, levels, generator=0, progress=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_samplers_of_azula_draw_the_samples_of_this_package():
    """The adapter in docs/integrations.md."""
    azula = pytest.importorskip("azula.sample")
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "azula" in block)
    levels = NoiseSchedule.geometric(10, 0.1, 11)
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 16, widths=(8, 8), layers_per_block=1, classes=8, schedule=levels).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    names = {"net": net, "torch": torch}
    exec(block, names)  # noqa: S102
    assert names["images"].shape == (2, 1, 16, 16) and not names["images"].requires_grad

    init = 0.5 + 10 * torch.randn(2, 1, 16, 16, generator=seed(0))
    options = {"precision": "float32", **PLAIN}
    found = names["sampler"](init, condition=7)
    expected = run(ODESampler(net, levels, **options), init=init, condition=7)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    sampler = azula.DDPMSampler(names["sampler"].denoiser, steps=10, silent=True)
    torch.manual_seed(5)
    found = sampler(init, condition=7)
    torch.manual_seed(5)
    small = AncestralSampler(net, levels, variance="small", **options)
    expected = run(small, init=init, condition=7, noise_source=torch.randn_like)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# -- Restoration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("boundary", "mode"), [("circular", "wrap"), ("reflect", "mirror"), ("zeros", "constant")])
def test_blur_of_scipy_is_equal(boundary, mode):
    ndimage = pytest.importorskip("scipy.ndimage")
    x, kernel = (torch.randn(*shape, generator=seed(), dtype=torch.float64) for shape in ((1, 1, 16, 20), (5, 7)))
    expected = ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode=mode)
    torch.testing.assert_close(Blur(kernel, boundary).measure(x)[0, 0], torch.from_numpy(expected))
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), 2, mode=mode, truncate=3)
    torch.testing.assert_close(GaussianBlur(2, boundary=boundary).measure(x)[0, 0], torch.from_numpy(expected))


def test_blur_and_fourier_samples_of_deepinv_are_equal():
    physics = pytest.importorskip("deepinv.physics")
    x, kernel = (torch.randn(*shape, generator=seed(), dtype=torch.float64) for shape in ((2, 2, 16, 20), (5, 7)))
    theirs = physics.BlurFFT(img_size=(2, 16, 20), filter=kernel[None, None])
    torch.testing.assert_close(Blur(kernel).measure(x), theirs.A(x))
    # deepinv has the frequency zero and the origin of the image in the middle.
    mask, last = torch.rand(16, 20, generator=seed()) > 0.5, (-2, -1)
    theirs = physics.MRI(mask=mask.double(), img_size=(2, 16, 20))
    ours = Fourier(torch.fft.ifftshift(mask), complex=True)
    y = ours.measure(torch.fft.ifftshift(x, dim=last))
    torch.testing.assert_close(torch.fft.fftshift(y, dim=last), theirs.A(x))
    torch.testing.assert_close(torch.fft.fftshift(ours.adjoint(y), dim=last), theirs.A_adjoint(theirs.A(x)))


def test_ddrm_of_deepinv_restores_with_a_network():
    """It calls the denoiser at the levels of its list, of which the last is 0."""
    pytest.importorskip("deepinv")
    physics, sampling = importlib.import_module("deepinv.physics"), importlib.import_module("deepinv.sampling")
    net = ScoreNet.from_pretrained("mnist")
    x = run(ODESampler(net, levels=10), 2, generator=0)
    known = torch.rand(x.shape[1:], generator=seed(1)) > 0.5
    noise = 0.05
    problem = physics.Inpainting(mask=known.float(), img_size=x.shape[1:], noise_model=physics.GaussianNoise(noise))
    y = Mask(known).measure(x) + noise * torch.randn(x.shape, generator=seed(2)) * known

    denoiser, called = net.as_denoiser(), []

    class Recorded(nn.Module):
        def forward(self, x, sigma):
            called.append(float(sigma))
            return denoiser(x, sigma)

    levels = torch.linspace(1, 0, 20).tolist()
    found = sampling.DDRM(Recorded(), sigmas=levels)(y, problem, seed=1)
    assert called == levels and found.shape == x.shape

    def psnr(restored):
        return -10 * (restored - x).square().mean().log10()

    assert psnr(found) > psnr(y) + 6
    hidden = ~known.expand_as(x)
    assert (found - x)[hidden].square().mean() < 0.2 * (y - x)[hidden].square().mean()


def test_physics_of_deepinv_are_operators():
    """A linear one with its own adjoint, and one that is not linear by automatic differentiation."""
    pytest.importorskip("deepinv")
    physics = importlib.import_module("deepinv.physics")
    x = torch.rand(2, 3, 16, 16, generator=seed())
    kernel = torch.rand(1, 1, 3, 5, generator=seed(1))
    blur = Physics(physics.Blur(filter=kernel / kernel.sum(), padding="circular"))
    down = Physics(physics.Downsampling(img_size=(3, 16, 16), factor=2, filter="gaussian"))
    known = (torch.rand(3, 16, 16, generator=seed(2)) > 0.5).float()
    inpainting = Physics(physics.Inpainting(img_size=(3, 16, 16), mask=known))
    for operator in (blur, down, inpainting):
        observation = Observation(operator, operator.measure(x), 0.1)  # checks the adjoint
        assert observation.shape == (3, 16, 16) and operator.is_linear
        exact = Gaussian(torch.full((768,), 0.5), 0.1, (3, 16, 16))
        mean = exact.posterior(observation).mean.view(1, 3, 16, 16).float()
        assert (mean - x[:1]).square().mean() < (0.5 - x[:1]).square().mean()
    own = Mask(known > 0)
    assert torch.equal(inpainting.measure(x), own.measure(x))
    absolute = types.SimpleNamespace(A=lambda x: x.abs())
    near = Physics(absolute).linearized(-x)
    assert torch.equal(near.value, x) and torch.equal(near.adjoint(x), -x)


# -- Metrics ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features():
    """Generated and real features in 12 dimensions."""
    mixing = torch.randn(12, 12, generator=seed(3), dtype=torch.float64)
    real = torch.randn(300, 12, generator=seed(4), dtype=torch.float64) @ mixing
    return 0.8 * torch.randn(300, 12, generator=seed(5), dtype=torch.float64) @ mixing + 0.3, real


def _exactly(value):
    return pytest.approx(value, rel=1e-11)


def _moments(features):
    return features.mean(0).numpy(), torch.cov(features.T).numpy()


def test_the_frechet_distance_of_clean_fid_is_equal(features):
    pytest.importorskip("cleanfid.fid")
    from cleanfid.fid import frechet_distance as theirs

    generated, real = features
    assert frechet_distance(generated, real).value == _exactly(theirs(*_moments(generated), *_moments(real)))


def test_the_kernel_distance_of_clean_fid_is_equal(features):
    """With all features in each subset, so that nothing is random."""
    pytest.importorskip("cleanfid.fid")
    from cleanfid.fid import kernel_distance as theirs

    generated, real = features
    ours = kernel_distance(generated, real, subset_size=len(real)).value
    assert ours == _exactly(theirs(real.numpy(), generated.numpy(), num_subsets=1))


def _updated(metric, generated, real):
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def _given(dimension):
    """A network that returns its input, which torchmetrics accepts as an extractor of features."""
    identity = nn.Identity()
    identity.num_features = dimension
    return identity


def test_the_frechet_distance_of_torchmetrics_is_equal(features):
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(_given(12)).set_dtype(torch.float64)
    assert frechet_distance(*features).value == _exactly(float(_updated(metric, *features)))


def test_the_kernel_distance_of_torchmetrics_is_equal(features):
    kid = pytest.importorskip("torchmetrics.image.kid")
    generated, real = features
    metric = kid.KernelInceptionDistance(_given(12), subsets=1, subset_size=len(real))
    value, _ = _updated(metric, generated, real)
    assert kernel_distance(generated, real, subset_size=len(real)).value == _exactly(float(value))

    torch.manual_seed(0)
    metric = kid.KernelInceptionDistance(_given(12), subsets=200, subset_size=100)
    value, deviation = _updated(metric, generated, real)
    ours = kernel_distance(generated, real, subsets=200, subset_size=100)
    assert ours.error is not None and abs(ours.value - float(value)) < 4 * float(deviation) * (2 / 200) ** 0.5
    assert ours.error == pytest.approx(float(deviation), rel=0.25)  # its standard error is 7 % of it


def test_the_inception_score_of_torchmetrics_is_equal():
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * torch.randn(200, 10, generator=seed(6), dtype=torch.float64)
    metric = inception.InceptionScore(_given(10), splits=1)
    metric.update(logits)
    assert inception_score(logits, splits=1).value == _exactly(float(metric.compute()[0]))


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_and_coverage_of_prdc_are_equal(features, k):
    prdc = pytest.importorskip("prdc")
    generated, real = features
    theirs = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    ours = [*precision_recall(generated, real, k=k), *density_coverage(generated, real, k=k)]
    assert 0.1 < ours[1].value < 0.9
    for name, value in zip(("precision", "recall", "density", "coverage"), ours, strict=True):
        assert value.value == _exactly(theirs[name])
