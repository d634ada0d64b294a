"""Results on CUDA compared with the CPU: ``python -m pytest -m cuda``. Skipped without a CUDA device."""

import copy

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.precision import exact_float32
from scorematch.likelihood import log_likelihood
from scorematch.loss import sliced_score_matching_loss
from scorematch.restoration import JPEG, AveragePool, Grayscale, Mask, Observation, Uncrop
from scorematch.restoration.palette import Colorization, Inpainting, JPEGRestoration, MultiTask, Uncropping
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler
from tests.networks import FOURIER, wide_ddpmpp, wide_ncsnpp, wide_unet
from tests.networks import WIDE_LEVELS as LEVELS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
NETS = {
    "ncsn": lambda: ScoreNet.ncsn(3, 32, width=16, schedule=LEVELS),
    "ncsnv2": lambda: ScoreNet.ncsnv2(3, 32, width=16, depth="deeper", schedule=LEVELS),
    "unet": wide_unet,
    "attention": lambda: wide_unet("AttnDownBlock2D", attention_head_dim=None),
    "classes": lambda: wide_unet(num_class_embeds=5),
    "ncsnpp": lambda: wide_unet("AttnSkipDownBlock2D", **FOURIER),
    "NCSN++": wide_ncsnpp,
    "DDPM++": lambda: wide_ddpmpp("residual"),
    "condition": lambda: ScoreNet.unet(
        3, 32, widths=(32, 32), layers_per_block=1, condition_channels=3, schedule=LEVELS
    ),
}


@pytest.fixture(params=NETS)
def net(request):
    torch.manual_seed(0)
    net = NETS[request.param]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape))
    return net


def _on_cuda(net):
    return copy.deepcopy(net).cuda()


def _condition(net, n, size):
    takes = net.conditioning
    if takes.classes is not None:
        return torch.arange(n) % takes.classes
    return torch.rand(n, takes.channels, size, size) if takes.channels else None


def _to(condition):
    return None if condition is None else condition.cuda()


def _near(found, expected, tolerance):
    assert (found.cpu() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("size", [32, 64, 128])
@torch.no_grad()
def test_scores_equal_those_of_the_cpu(net, size):
    x, condition = torch.rand(2, 3, size, size), _condition(net, 2, size)
    device = _on_cuda(net)
    for sigma in (0.05, torch.tensor([0.3, 5.0])):
        expected = net(x, sigma, condition)
        sigma = sigma.cuda() if isinstance(sigma, torch.Tensor) else sigma
        with exact_float32():
            _near(device(x.cuda(), sigma, _to(condition)), expected, 1e-4)
        _near(device.inference_copy()(x.cuda(), sigma, _to(condition)), expected, 4e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda net, **options: AnnealedLangevinSampler(net, **options),
        lambda net, **options: AnnealedLangevinSampler(net, steps_per_level=2, **options),
        lambda net, **options: ODESampler(net, levels=6, **options),
        lambda net, **options: ODESampler(net, levels=6, method="dpm-solver++", **options),
        lambda net, **options: ODESampler(net, levels=6, method="unipc", eta=0.5, **options),
        lambda net, **options: AncestralSampler(net, **options),
        lambda net, **options: PredictorCorrectorSampler(net, **options),
    ],
)
def test_samples_with_a_cpu_generator_equal_those_of_the_cpu(make):
    torch.manual_seed(0)
    net = NETS["unet"]().eval()
    expected = make(net, precision="float32").sample(2, generator=0, progress=False)
    found = make(_on_cuda(net), precision="float32").sample(2, generator=0, progress=False)
    assert found.is_cuda
    _near(found, expected, 2e-2)
    auto = make(_on_cuda(net)).sample(2, generator=[0, 1], progress=False)
    assert torch.isfinite(auto).all()


@pytest.mark.parametrize("restore", ["replace", "guide", "guide-jacobian"])
@pytest.mark.parametrize(
    "operator",
    [Mask(torch.arange(32) < 16), Uncrop(left=8), Grayscale(), AveragePool(4), JPEG(20), Grayscale() @ AveragePool(2)],
    ids=repr,
)
def test_restored_images_equal_those_of_the_cpu(operator, restore):
    torch.manual_seed(0)
    net = NETS["unet"]().eval()
    y = operator.measure(torch.rand(1, 3, 32, 32))
    drawn = [
        AnnealedLangevinSampler(one, levels=6, restore=restore, precision="float32").sample(
            2, observation=Observation(operator, y), generator=0, progress=False
        )
        for one in (net, _on_cuda(net))
    ]
    _near(drawn[1], drawn[0], 5e-2)


def test_losses_and_gradients_equal_those_of_the_cpu(net):
    x, condition = torch.rand(4, 3, 32, 32), _condition(net, 4, 32)
    z, sigma = torch.randn(4, 3, 32, 32), torch.tensor([0.05, 0.5, 2.0, 8.0])
    device = _on_cuda(net)
    gradients = []
    for one, to in ((net, lambda t: t), (device, _to)):
        with exact_float32():
            loss = dsm_loss(one, to(x), sigma=to(sigma), noise=to(z), condition=to(condition))
            loss.backward()
        gradients.append((loss.detach().cpu(), [p.grad.cpu() for p in one.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-3, atol=0)
    for found, expected in zip(gradients[1][1], gradients[0][1], strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm() + 1e-5
    if condition is None:
        v = torch.randn(4, 3, 32, 32)
        values = [
            sliced_score_matching_loss(one, to(x), sigma=to(sigma), noise=to(z), projections=to(v)).detach().cpu()
            for one, to in ((net, lambda t: t), (device, _to))
        ]
        torch.testing.assert_close(values[1], values[0], rtol=2e-2, atol=1e-2)


def test_training_step_under_autocast(net):
    device = _on_cuda(net).train()
    optimizer = torch.optim.AdamW(device.parameters(), fused=True)
    x = torch.rand(4, 3, 64, 64, device="cuda")
    condition = _to(_condition(net, 4, 64))
    before = [parameter.detach().clone() for parameter in device.parameters()]
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = dsm_loss(device, x, condition=condition)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, device.parameters(), strict=True))


def test_likelihoods_equal_those_of_the_cpu():
    torch.manual_seed(0)
    net = ScoreNet.ncsnv2(1, 8, width=8, schedule=LEVELS).eval()
    x, schedule = torch.rand(3, 1, 8, 8), NoiseSchedule.karras(10, 0.05, 8)
    values = [
        log_likelihood(one, to(x), schedule, generator=0, progress=False).cpu()
        for one, to in ((net, lambda t: t), (_on_cuda(net), _to))
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-2, atol=1.0)


@torch.no_grad()
def test_a_compiled_copy_computes_the_same_score(net):
    x, condition = torch.rand(2, 3, 32, 32), _condition(net, 2, 32)
    compiled = _on_cuda(net).inference_copy(compile=True)
    for sigma in (0.3, 2.0, 0.3):
        expected = net(x, sigma, condition)
        for _ in range(2):
            _near(compiled(x.cuda(), sigma, _to(condition)).clone(), expected, 4e-2)
    if condition is None:
        sampler = AnnealedLangevinSampler(compiled, levels=4)
        first = sampler.sample(2, generator=0, progress=False)
        assert torch.equal(sampler.sample(2, generator=0, progress=False), first)


def test_palette_tasks_equal_those_of_the_cpu():
    tasks = [Colorization(), Inpainting(), Uncropping(), JPEGRestoration()]
    x = torch.rand(4, 3, 32, 32)
    for task in [*tasks, MultiTask(tasks)]:
        for found, expected in zip(
            task(x.cuda(), torch.Generator().manual_seed(0)), task(x, torch.Generator().manual_seed(0)), strict=True
        ):
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), expected)
