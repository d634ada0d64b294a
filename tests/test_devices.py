"""Requirements of accelerators, tested on the meta device.

Tensors on the meta device have no values, and reading one raises an error. The code that runs there is that of CUDA.
The tests check its requirements: all arguments of a kernel have one dtype, and the host rarely waits for a value.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.precision import exact_float32
from scorematch.data import open_images
from scorematch.evaluation import Extractor, evaluate, evaluate_restoration, few_calls, settings_of_paths
from scorematch.evaluation.levy import Laplace, LevyProcess
from scorematch.nets.layers import GroupNorm
from scorematch.restoration import Grayscale, Mask, Observation
from scorematch.sampling import (
    SAMPLERS,
    AncestralSampler,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    PredictorCorrectorSampler,
)
from scorematch.sampling.finite import FiniteCheck
from scorematch.training import LogNormal, train
from tests.helpers import HostReads, NoFloat64, in_threads, on_meta
from tests.networks import FOURIER, wide_ddpmpp, wide_ncsnpp, wide_unet
from tests.networks import WIDE_LEVELS as LEVELS

KERNELS = ("group_norm", "convolution", "addmm", "mm", "bmm", "baddbmm", "linear", "scaled_dot_product", "layer_norm")


class OneDtype(TorchDispatchMode):
    """Fails if a norm, convolution, matrix product or attention gets tensors of different floating dtypes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if any(kernel in name for kernel in KERNELS):
            tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            self.seen |= {(name, dtype) for dtype in dtypes}
            if len(dtypes) > 1:
                raise TypeError(f"{name} was given {sorted(map(str, dtypes))}")
        return function(*arguments, **(keywords or {}))


# -- All arguments of a kernel have one dtype --------------------------------------------------------------------------


_unet = functools.partial(wide_unet, layers_per_block=1)
NETS = {
    "ncsn": lambda: ScoreNet.ncsn(3, 32, width=16, schedule=LEVELS),
    "ncsnv2": lambda: ScoreNet.ncsnv2(3, 32, width=16, schedule=LEVELS),
    "ncsnv2 deepest": lambda: ScoreNet.ncsnv2(3, 32, width=16, depth="deepest", schedule=LEVELS),
    "unet": lambda: _unet(add_attention=False),
    "unet, attention": lambda: _unet("AttnDownBlock2D", attention_head_dim=8),
    "unet, one head": lambda: _unet("AttnDownBlock2D", attention_head_dim=None),
    "unet, scale and shift": lambda: _unet(resnet_time_scale_shift="scale_shift", act_fn="gelu"),
    "unet, image": lambda: _unet(image=2),
    "unet, classes": lambda: _unet(num_class_embeds=5),
    "ncsnpp": lambda: _unet("SkipDownBlock2D", add_attention=False, **FOURIER),
    "ncsnpp, attention": lambda: _unet("AttnSkipDownBlock2D", **FOURIER),
    "ncsnpp, image": lambda: _unet("SkipDownBlock2D", image=3, **FOURIER),
    "NCSN++": wide_ncsnpp,
    "DDPM++, classes": lambda: wide_ddpmpp("skip"),
}


def _on_meta(name):
    with on_meta():
        return NETS[name]().eval()


def _condition(net, n, size):
    takes = net.conditioning
    if takes.classes is not None:
        return torch.zeros(n, dtype=torch.int64, device="meta")
    return torch.empty(n, takes.channels, size, size, device="meta") if takes.channels else None


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("ncsnv2", "unet, one head", "ncsnpp, image") else pytest.param(name, marks=pytest.mark.slow)
        for name in NETS
    ],
)
@torch.no_grad()
def test_every_kernel_of_an_inference_copy_gets_one_dtype(name, monkeypatch):
    """In feature maps with 64 x 64 pixels, from which on group norms compute in half precision, and with fewer."""
    monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: torch.bfloat16)
    net = _on_meta(name)
    score = net.inference_copy()
    assert score is not net
    x = torch.empty(2, 3, 64, 64, device="meta")
    with OneDtype() as mode:
        assert score(x, 0.3, _condition(net, 2, 64)).shape == x.shape
    assert {dtype for _, dtype in mode.seen} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize(
    "name",
    [name if name in ("ncsnv2", "unet, one head") else pytest.param(name, marks=pytest.mark.slow) for name in NETS],
)
def test_every_kernel_of_a_training_step_gets_one_dtype(name):
    net = _on_meta(name).train()
    x = torch.empty(2, 3, 64, 64, device="meta")
    with OneDtype() as mode, NoFloat64():
        dsm_loss(net, x, condition=_condition(net, 2, 64)).backward()
    assert {dtype for _, dtype in mode.seen} == {torch.float32}


def test_the_check_for_one_dtype_can_fail():
    x, weight = torch.empty(1, 8, 4, 4, device="meta", dtype=torch.bfloat16), torch.empty(8, device="meta")
    with OneDtype(), pytest.raises(TypeError, match="native_group_norm was given"):
        F.group_norm(x, 2, weight, weight)


@pytest.mark.parametrize("name", ["unet, one head", "ncsnpp, attention"])
@torch.no_grad()
def test_attention_of_an_inference_copy_has_a_layout_of_fused_kernels(name, monkeypatch):
    """They need a contiguous last axis of q, k and v."""
    strides, attention = [], F.scaled_dot_product_attention

    def watched(*qkv):
        strides.extend(each.stride(-1) for each in qkv)
        return attention(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    _on_meta(name).inference_copy()(torch.empty(2, 3, 32, 32, device="meta"), 0.3)
    assert len(strides) > 6 and set(strides) == {1}


@pytest.mark.parametrize("size", [16, 64])
def test_group_norm_under_autocast_keeps_no_float32_copy_for_the_backward_pass(size, monkeypatch):
    """Autocast applies to group_norm on every accelerator, but not to the operator that is called instead."""
    monkeypatch.setattr("scorematch.nets.layers._autocast", lambda x: True)
    for key in ("AutocastCUDA", "AutocastMPS"):
        names = [f"aten::{name}" for name in ("group_norm", "native_group_norm")]
        assert [torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names] == [True, False]
    kept = []
    x = torch.empty(2, 8, size, size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        norm = GroupNorm(4, 8)
        with OneDtype() as mode:
            y = norm(x, F.silu)
    assert ("native_group_norm", torch.bfloat16) in mode.seen
    assert y.dtype == torch.bfloat16 and {t.dtype for t in kept if t.ndim == 4} == {torch.bfloat16}
    y.sum().backward()
    assert x.grad is not None and norm.weight.grad.dtype == torch.float32


class OneDevice(TorchDispatchMode):
    """Fails if values from another device are written to indices of a tensor, which CUDA refuses and meta does not."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "index_put" in function.overloadpacket.__name__:
            self.seen += 1
            assert arguments[0].device == arguments[2].device
        return function(*arguments, **(keywords or {}))


@pytest.mark.slow
@torch.no_grad()
def test_a_network_on_the_cpu_does_not_depend_on_the_default_device(tmp_path):
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.3, 0.4])
    net = ScoreNet.unet(1, 8, widths=(4,), precondition="ddpm", schedule=NoiseSchedule([1.0, 0.5, 0.1]))
    expected = copy.deepcopy(net)(x, sigma)
    with torch.device("meta"):
        assert torch.equal(net(x, sigma), expected)
        assert net.schedule.position(0.5) == 1
        net.save_pretrained(tmp_path)
        assert torch.equal(ScoreNet.from_pretrained(tmp_path)(x, sigma), expected)
    net = ScoreNet.unet(1, 8, widths=(4,), classes=2)
    with torch.device("meta"), pytest.raises(ValueError, match="got class 2"):
        net(x, sigma, 2)


def test_a_larger_network_on_an_accelerator_starts_with_weights_on_the_cpu():
    options = {"widths": (4, 8), "layers_per_block": 1, "patch": 2}
    small = ScoreNet.unet(1, 8, pixel_channels=4, **options)
    with on_meta():
        large = ScoreNet.unet(1, 8, pixel_channels=8, **options)
    with OneDevice() as mode:
        grown = large.family.grow(small.backbone, large.backbone)
    assert mode.seen and all(weight.is_meta for weight in grown.values())


# -- The host rarely waits for the device -----------------------------------------------------------------------------


def _score(x, sigma):
    return -x / (1 + sigma**2)


MANY = {
    "langevin": lambda net: AnnealedLangevinSampler(net, LEVELS, steps_per_level=2),
    "consistent": lambda net: AnnealedLangevinSampler(net, LEVELS, consistent=True),
    "ode": lambda net: ODESampler(net, LEVELS.respaced(10)),
    "churn": lambda net: ODESampler(net, LEVELS.respaced(10), churn=5),
    "dpm-solver++": lambda net: ODESampler(net, LEVELS.respaced(16), method="dpm-solver++"),
    "stochastic": lambda net: ODESampler(net, LEVELS.respaced(16), method="unipc", eta=0.5),
    "ancestral": lambda net: AncestralSampler(net, LEVELS.respaced(16)),
    "predictor-corrector": lambda net: PredictorCorrectorSampler(net, LEVELS.respaced(10)),
    "particles": lambda net: ParticleSampler(net, LEVELS.respaced(16)),
    "decoupled": lambda net: DecoupledSampler(net, LEVELS.respaced(16)),
}


def test_every_sampler_is_tested_here():
    assert {type(make(_score)) for make in MANY.values()} == set(SAMPLERS.values())


@pytest.mark.filterwarnings("ignore:.* noise levels of the schedule are not among:UserWarning")  # of NCSN
@pytest.mark.parametrize(
    ("kind", "network"),
    [
        *itertools.product(MANY, ["callable"]),
        *(pytest.param(kind, "unet", marks=() if kind == "ode" else pytest.mark.slow) for kind in MANY),
        pytest.param("consistent", "ncsn", marks=pytest.mark.slow),
        ("ode", "float32"),
    ],
)
def test_samplers_rarely_read_values_on_the_host(kind, network):
    net = _score
    if network == "ncsn":
        net = ScoreNet.ncsn(3, 8, width=2, schedule=LEVELS)
    elif network != "callable":
        net = ScoreNet.unet(3, 4, widths=(4,), layers_per_block=1, schedule=LEVELS)
    sampler = MANY[kind](net)
    sampler.precision = "float32" if network == "float32" else "auto"
    with HostReads() as reads:
        sampler.sample(2, shape=(3, 8, 8), generator=0, progress=False)
    assert reads.count <= 4 + len(sampler) / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsn", "unet, image", "DDPM++, classes"])
@torch.no_grad()
def test_noise_levels_on_the_device_are_not_read(name):
    score, x = _on_meta(name).inference_copy(), torch.empty(2, 3, 8, 8, device="meta")
    with HostReads() as reads:
        assert score(x, torch.empty(2, device="meta"), _condition(score, 2, 8)).shape == x.shape
        assert score.as_denoiser()(x, torch.empty(2, device="meta"), _condition(score, 2, 8)).shape == x.shape
    assert reads.count == 0


@pytest.mark.parametrize("operator", [Mask(torch.arange(8) < 4), Grayscale()], ids=repr)
@pytest.mark.parametrize("restore", ["replace", "guide"])
def test_restoration_rarely_reads_values_on_the_host(operator, restore):
    sampler = AnnealedLangevinSampler(_score, LEVELS, steps_per_level=4, restore=restore)
    seen = Observation(operator, operator.measure(torch.rand(2, 3, 8, 8)), 0.1)
    with HostReads() as reads:
        sampler.sample(2, observation=seen, generator=0, progress=False)
    assert reads.count <= 4 + len(sampler) / 8


FEW = NoiseSchedule.geometric(10, 0.01, 3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ode", "unet"),
        *(pytest.param(kind, "unet", marks=pytest.mark.slow) for kind in ("langevin", "predictor-corrector")),
        ("consistent", "ncsnpp, image"),
        pytest.param("consistent", "ncsn", marks=pytest.mark.slow),
    ],
)
def test_samplers_run_on_the_meta_device(kind, name, monkeypatch):
    monkeypatch.setattr(FiniteCheck, "check", lambda self: None)
    net = _on_meta(name)
    sampler = MANY[kind](net)
    sampler.schedule = FEW
    with NoFloat64():
        x = sampler.sample(2, shape=(3, 8, 8), condition=_condition(net, 2, 8), generator=0, progress=False)
    assert x.shape == (2, 3, 8, 8) and x.device.type == "meta"


def test_noise_of_several_generators_is_copied_to_the_device_at_once():
    """Noise of a list of generators is copied to the network's device in one copy, not sample by sample."""
    from scorematch.core.randomness import standard_normal

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            self.count += function.overloadpacket.__name__ == "_to_copy"
            return result

    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    with Copies() as copies:
        assert standard_normal((8, 3), generators, torch.device("meta")).device.type == "meta"
    assert copies.count == 1


# -- Exact float32 ----------------------------------------------------------------------------------------------------


def _flags():
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return tuple(owner.fp32_precision for owner in owners)
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


def test_nested_exact_float32_restores_the_flags_at_the_last_exit():
    flags = _flags()
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    exact = _flags()
    first.__exit__(None, None, None)
    assert _flags() == exact and all(flag in (False, "ieee") for flag in exact)
    second.__exit__(None, None, None)
    assert _flags() == flags


def _older_flags():
    matmul = torch.backends.cuda.matmul.allow_tf32
    return matmul, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("value", ["highest", "high", "medium"])
def test_older_and_newer_flags_can_be_read_within_exact_float32(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        flags = _flags(), _older_flags()
        with exact_float32():
            assert _older_flags() == (False, False, "highest")
        assert (_flags(), _older_flags()) == flags and flags[1][2] == value
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("iterate", [False, True])
def test_precision_float32_turns_tf32_off_during_calls_only(iterate):
    seen = []

    def score(x, sigma):
        seen.append(_flags())
        return _score(x, sigma)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        flags = _flags()
        sampler = AnnealedLangevinSampler(score, LEVELS, steps_per_level=1, precision="float32")
        if iterate:
            for _ in sampler.iterate(2, shape=(2,), progress=False):
                assert _flags() == flags
        else:
            sampler.sample(2, shape=(2,), progress=False)
        assert _flags() == flags
        assert len(seen) == len(sampler)
        assert all(flag in (False, "ieee") for call in seen for flag in call)
        with pytest.raises(ZeroDivisionError):
            AnnealedLangevinSampler(lambda x, sigma: 1 / 0, LEVELS, precision="float32").sample(2, shape=(2,))
        assert _flags() == flags
    finally:
        torch.set_float32_matmul_precision(before)


# -- Threads ----------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """A backbone whose output depends on its mode, train or eval."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise):
        return F.dropout(self.conv(x), 0.5, self.training)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wrapped", "copy"])
def test_threads_can_sample_from_one_network(kind):
    torch.manual_seed(0)
    if kind == "wrapped":
        net = ScoreNet(Dropping(), LEVELS, sample_shape=(1, 8, 8)).train()
    else:
        net = ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=1, schedule=LEVELS).inference_copy()
    samplers = [AnnealedLangevinSampler(net, LEVELS.respaced(5), steps_per_level=steps) for steps in (2, 3)]
    jobs = [
        lambda sampler=sampler, seed=seed: sampler.sample(3, generator=seed, progress=False)
        for sampler, seed in itertools.product(samplers, range(2))
    ]
    alone = [job() for job in jobs]
    together = in_threads(jobs)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert kind == "copy" or all(module.training for module in net.modules())


def test_a_suspended_iterator_leaves_the_network_in_the_callers_mode():
    net = ScoreNet(Dropping(), LEVELS, sample_shape=(1, 8, 8)).train()
    states = AnnealedLangevinSampler(net, LEVELS, steps_per_level=2).iterate(2, progress=False)
    for _, (x, _sigma) in zip(range(3), states, strict=False):
        assert all(module.training for module in net.modules())
        assert torch.is_grad_enabled() and not x.requires_grad
    other = AnnealedLangevinSampler(net, LEVELS, steps_per_level=1).sample(1, generator=1, progress=False)
    assert torch.isfinite(other).all() and net.training
    next(states)
    assert net.training


# -- torch.set_default_device -----------------------------------------------------------------------------------------


@pytest.fixture
def meta_by_default():
    """Makes meta the default device: values that the host needs cannot be read if they are made without a device."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def _small(**options):
    with torch.device("cpu"), torch.random.fork_rng():
        torch.manual_seed(0)
        return ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("meta_by_default", "few_levels")
def test_training_does_not_depend_on_the_default_device(tmp_path):
    with torch.device("cpu"):
        data = torch.rand(24, 1, 8, 8), torch.arange(24) % 2
    net = _small(classes=2, null_class=True)
    options = {"images": 32, "batch_size": 8, "sample_every": 16, "snapshot_every": 16, "label_drop": 0.2}
    averaged = train(net, open_images(data, labels=True), tmp_path, levels=LogNormal(-1, 1), progress=False, **options)
    assert all(parameter.device.type == "cpu" for parameter in averaged.parameters())
    assert (tmp_path / "report.md").exists() and (tmp_path / "samples" / "000000032.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("meta_by_default")
def test_evaluation_does_not_depend_on_the_default_device(tmp_path):
    with torch.device("cpu"):
        real, held_out, weight = torch.rand(40, 1, 8, 8), torch.rand(20, 1, 8, 8), torch.rand(64, 4)

    def features(images):
        found = images.flatten(1).float() / 255 @ weight
        return found, found

    options = {"features": Extractor(features, "linear", "1"), "cache": False, "progress": False, "batch_size": 8}
    sampler = ODESampler(_small(classes=2), levels=2)
    result = evaluate(
        sampler,
        real,
        n=20,
        held_out=held_out,
        classes="random",
        metrics=["frechet", "precision-recall", "classes"],
        out=tmp_path / "samples",
        **options,
    )
    assert result.figures["samples"]["linear"]
    sampler = AnnealedLangevinSampler(_small(), levels=2)
    restored = evaluate_restoration(sampler, real, "half", n=8, draws=1, sigma=0.1, metrics=["frechet"], **options)
    assert restored.figures["restored"]["restoration"]


@pytest.mark.slow
@pytest.mark.usefixtures("meta_by_default")
def test_the_evaluation_of_arrays_and_signals_does_not_depend_on_the_default_device_and_dtype(monkeypatch):
    monkeypatch.setattr(few_calls, "_PATHS", 2)
    with torch.device("cpu"):
        data, mask, points = torch.randn(40, 1, 8), Mask(torch.arange(4) < 2), torch.zeros(9, 4)
    options = {"metrics": ["mmd", "spectrum", "values"], "progress": False}
    expected = evaluate(data[:9], data[9:], **options)
    torch.set_default_dtype(torch.float64)
    try:
        assert evaluate(data[:9], data[9:], **options).figures == expected.figures
    finally:
        torch.set_default_dtype(torch.float32)
    signals = LevyProcess(Laplace(), 4)
    assert signals.posterior_samples(Observation(mask, points, 0.1), 2, 0, burn_in=1).isfinite().all()
    assert len(settings_of_paths(_small(classes=2), [3], progress=False)) == 1
