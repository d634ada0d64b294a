"""The inference copy: the same function, the caller's network untouched, and nothing done twice."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.nets import inference
from scorematch.nets.layers import ConditionalInstanceNormPlus
from scorematch.nets.unet import UNet

LADDER = NoiseSchedule.geometric(10, 0.01, 12)


def _unet(attention="AttnDownBlock2D", up="AttnUpBlock2D", **options):
    return ScoreNet(
        UNet(
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=(attention, attention),
            up_block_types=(up, up),
            **options,
        ),
        LADDER,
        precondition="ncsnpp" if "time_embedding_type" in options else "ddpm",
        sample_shape=(3, 16, 16),
    )


NETS = {
    "ncsn": lambda: ScoreNet.ncsn(3, 16, width=16, schedule=LADDER),
    "ncsnv2": lambda: ScoreNet.ncsnv2(3, 16, width=16, depth="deeper", schedule=LADDER),
    "ncsnv2 karras": lambda: ScoreNet.ncsnv2(3, 16, width=16, schedule=LADDER, precondition="karras"),
    "one head": lambda: _unet(attention_head_dim=None),
    "heads": lambda: _unet(attention_head_dim=8),
    "one narrow head": lambda: _unet(attention_head_dim=24),
    "scale shift": lambda: _unet(resnet_time_scale_shift="scale_shift", act_fn="gelu"),
    "classes": lambda: _unet(num_class_embeds=5),
    "ncsnpp": lambda: _unet(
        "AttnSkipDownBlock2D",
        "AttnSkipUpBlock2D",
        time_embedding_type="fourier",
        mid_block_scale_factor=2**0.5,
        attention_head_dim=None,
    ),
}


@pytest.fixture(params=NETS)
def net(request):
    torch.manual_seed(0)
    net = NETS[request.param]().eval()
    with torch.no_grad():
        for parameter in net.parameters():  # none of them special: a norm of ones hides much
            if parameter.ndim == 1:
                parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape))
    return net


def _condition(net):
    return torch.tensor([3, 1, 4]) if getattr(net.backbone, "class_embedding", None) is not None else None


def _noise(rng, n=3):
    return torch.rand(n, 3, 16, 16, generator=rng)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2.5e-2)])
@torch.no_grad()
def test_it_is_the_same_function(net, dtype, tolerance, rng, monkeypatch):
    monkeypatch.setattr("scorematch.score.native_dtype", lambda device: dtype)
    fast = net.inference_copy()
    x, condition = _noise(rng), _condition(net)
    for sigma in (0.3, torch.tensor(5.0), torch.tensor(0.01), torch.tensor([0.2, 0.02, 2.0])):
        expected = net(x, sigma, condition)
        for _ in range(2):  # computed, and remembered
            found = fast(x, sigma, condition)
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= tolerance * expected.norm()


def test_the_network_is_untouched_and_the_copy_its_own(net, rng, monkeypatch):
    monkeypatch.setattr("scorematch.score.native_dtype", lambda device: torch.bfloat16)
    before = {key: (value, value.clone(), value.stride()) for key, value in net.state_dict(keep_vars=True).items()}
    fast = net.inference_copy()
    with torch.no_grad():
        fast(_noise(rng), torch.tensor(0.3), _condition(net))
    after = net.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for key, (value, copied, stride) in before.items():
        assert after[key] is value and torch.equal(value, copied) and value.stride() == stride
        assert value.requires_grad == (key != "backbone.time_proj.weight")


def test_bfloat16_stays_inside(monkeypatch):
    """What touches the image or sigma, and every norm, keeps float32."""
    short = {
        name: {
            key.rpartition(".")[0]
            for key, value in inference.inference_copy(NETS[name]().backbone, torch.bfloat16)[0].state_dict().items()
            if value.dtype == torch.bfloat16
        }
        for name in ("ncsn", "ncsnpp", "classes")
    }
    for names in short.values():
        assert len(names) > 20
        assert not [name for name in names if "norm" in name or "time" in name or "embed" in name or "skip" in name]
        assert not names & {"conv_in", "conv_out", "begin_conv", "end_conv"}
    assert "mid_block.attentions.0.to_q" in short["classes"] and "res1.0.conv1" in short["ncsn"]


@torch.no_grad()
def test_what_depends_on_sigma_is_computed_once_a_level(rng, monkeypatch):
    net = NETS["ncsn"]()
    norms = sum(isinstance(module, ConditionalInstanceNormPlus) for module in net.modules())
    calls = []
    rows = ConditionalInstanceNormPlus.rows
    monkeypatch.setattr(ConditionalInstanceNormPlus, "rows", lambda *args: (calls.append(1), rows(*args))[1])
    fast, x, sigma = net.inference_copy(), _noise(rng), torch.tensor(0.3)
    first = [fast(x, sigma) for _ in range(3)][-1]
    assert len(calls) == norms
    assert torch.equal(fast(x, torch.tensor(0.3)), first)
    assert len(calls) == 2 * norms
    sigma.fill_(3.0)  # the same tensor, written to
    assert torch.equal(fast(x, sigma), fast(x, 3.0))
    calls.clear()
    schedule = NoiseSchedule.geometric(1, 0.1, 3)
    AnnealedLangevinSampler(net, schedule, steps_per_level=4).sample(2, progress=False)
    assert len(calls) == 4 * norms  # three levels, and the last denoising


@torch.no_grad()
def test_a_batch_in_parts_is_the_batch(net, rng, monkeypatch):
    monkeypatch.setattr("scorematch.score.native_dtype", lambda device: torch.float32)
    fast, x, condition = net.inference_copy(), _noise(rng), _condition(net)
    whole = fast(x, 0.3, condition)
    sizes = []
    monkeypatch.setattr("scorematch.score.part_size", lambda backbone, x: sizes.append(len(x)) or 2)
    torch.testing.assert_close(fast(x, 0.3, condition), whole, rtol=1e-4, atol=1e-4)
    assert sizes == [3]


def test_parts_hold_a_million_values():
    backbone = ScoreNet.ncsn(3, 32, width=128).backbone
    assert inference.part_size(backbone, torch.empty(100, 3, 32, 32)) == 8
    assert inference.part_size(backbone, torch.empty(100, 3, 256, 256)) == 1
    assert inference.part_size(backbone, torch.empty(100, 3, 32, 32, device="meta")) == 100


# In bfloat16 pooling of a random network finds its maximum at other pixels, and passes the gradient on to those.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_gradients_with_respect_to_the_image_flow_through(net, dtype, tolerance, rng, monkeypatch):
    monkeypatch.setattr("scorematch.score.native_dtype", lambda device: dtype)
    x, condition = _noise(rng).requires_grad_(), _condition(net)
    sigma = torch.tensor(0.3)
    found, right = (
        torch.autograd.grad(score(x, sigma, condition).square().sum(), x)[0] for score in (net.inference_copy(), net)
    )
    assert (found - right).norm() <= tolerance * right.norm()


# -- Networks that are run as they are


class Hidden(nn.Conv2d):
    """Of the user's making."""


def _hooked(net):
    net.backbone.begin_conv.register_forward_hook(lambda *args: None)


def _adapted(net):
    net.backbone.begin_conv = Hidden(3, 16, 3, padding=1)


def _parametrized(net):
    nn.utils.parametrizations.weight_norm(net.backbone.begin_conv)


def _patched(net):
    net.backbone.end_conv.forward = lambda x: x[:, :3]


def _widened(net):
    net.backbone.begin_conv = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1))


@pytest.mark.parametrize(
    "change",
    [
        _hooked,
        _adapted,
        _parametrized,
        _patched,
        _widened,
        lambda net: net.register_forward_hook(lambda *args: None),
        lambda net: net.compile(backend="eager"),
        lambda net: net.double(),
        lambda net: net.bfloat16(),
        lambda net: net.backbone.begin_conv.half(),
    ],
)
def test_what_is_not_as_it_was_built_is_run_as_it_is(change):
    net = NETS["ncsn"]()
    assert net.inference_copy() is not net
    change(net)
    assert net.inference_copy() is net


def _low_rank(attention):
    attention.to_q = nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 64))


def _without_bias(attention):
    attention.to_v = nn.Linear(64, 64, bias=False)


@pytest.mark.parametrize("change", [_low_rank, _without_bias])
def test_adapters_made_of_torchs_own_layers(change, rng):
    net = NETS["one head"]()
    change(net.backbone.mid_block.attentions[0])
    assert net.inference_copy() is net
    short = net.schedule.respaced(2)
    assert AnnealedLangevinSampler(net, short, steps_per_level=1).sample(2, progress=False).shape == (2, 3, 16, 16)


def test_a_network_that_was_copied_or_loaded_is_as_it_was_built(tmp_path):
    for made in (NETS["ncsn"](), ScoreNet.unet(1, 8, widths=(8, 8), schedule=LADDER)):
        net = copy.deepcopy(made)
        assert net.inference_copy() is not net
        net.save_pretrained(tmp_path / net.config["family"])
        again = ScoreNet.from_pretrained(tmp_path / net.config["family"])
        assert again.inference_copy() is not again


@torch.no_grad()
def test_the_copy_of_a_level_for_each_image_stays_a_copy(net, rng):
    x, condition, sigma = _noise(rng), _condition(net), torch.tensor([0.3, 2.0, 0.3])
    fast = net.inference_copy()
    before = fast(x, sigma, condition)
    for parameter in net.parameters():
        parameter.mul_(3)
    assert torch.equal(fast(x, sigma, condition), before)
    alone = torch.cat(
        [fast(x[i : i + 1], sigma[i], None if condition is None else condition[i : i + 1]) for i in range(3)]
    )
    assert (before - alone).norm() <= 2e-2 * alone.norm()


def test_inference_mode(rng):
    """A tensor of that mode has no version: what was computed for one that was written to since is not used again."""
    net = NETS["ncsn"]()
    with torch.inference_mode():
        fast, x, sigma = net.inference_copy(), _noise(rng), torch.tensor(0.3)
        fast(x, sigma)
        sigma.fill_(5.0)
        assert torch.equal(fast(x, sigma), fast(x, torch.tensor(5.0)))


def test_subclasses_are_run_as_they_are():
    class Brighter(UNet):
        def forward(self, x, c_noise, condition=None):
            return super().forward(x, c_noise, condition) + 1

    class Louder(ScoreNet):
        def forward(self, x, sigma, condition=None):
            return 2 * super().forward(x, sigma, condition)

    for made in (Louder, ScoreNet):
        backbone = (UNet if made is Louder else Brighter)(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
        net = made(backbone, LADDER)
        assert net.inference_copy() is net


def test_the_users_own_are_run_as_they_are(world):
    own = ScoreNet(nn.Sequential(nn.Linear(2, 2)), LADDER, value_range=None)
    assert own.inference_copy() is own
    init = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    found = [
        AnnealedLangevinSampler(world, LADDER, precision=precision).sample(
            init=init, generator=torch.Generator().manual_seed(1), progress=False
        )
        for precision in ("auto", "float32")
    ]
    assert torch.equal(*found)


# -- In the samplers


def test_a_generator_leaves_the_global_seed_alone(net):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sampler = AnnealedLangevinSampler(net, net.schedule.respaced(2), steps_per_level=1)
    sampler.sample(3, condition=_condition(net), generator=torch.Generator().manual_seed(0), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_copy_a_run_and_none_kept(monkeypatch):
    made = []

    def spy(*args, **kwargs):
        copied, settle = inference.inference_copy(*args, **kwargs)
        made.append(weakref.ref(copied))
        return copied, settle

    monkeypatch.setattr("scorematch.score.inference_copy", spy)
    net = ScoreNet.ncsnv2(1, 8, width=4, schedule=LADDER)
    for precision, count in [("float32", 0), ("auto", 1)]:
        made.clear()
        AnnealedLangevinSampler(net, precision=precision).sample(2, batch_size=1, progress=False)
        gc.collect()
        assert len(made) == count and not any(copied() for copied in made)


def test_digits_are_the_same_to_the_eye():
    """Same seeds in bfloat16 and float32: each of the digits is the same digit, to a few gray levels."""
    net = ScoreNet.from_pretrained("mnist")
    found = [
        AnnealedLangevinSampler(net, net.schedule.respaced(30), steps_per_level=1, precision=precision).sample(
            2, generator=[torch.Generator().manual_seed(i) for i in range(2)], progress=False
        )
        for precision in ("auto", "float32")
    ]
    assert (found[0] - found[1]).square().mean((1, 2, 3)).sqrt().max() < 0.05


# -- Compilation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("net", ["ncsn", "classes"], indirect=True)
@torch.no_grad()
def test_it_compiles(net, rng, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    plain, compiled = net.inference_copy(), net.inference_copy(compile=True)
    x, condition = _noise(rng), _condition(net)
    for sigma in (torch.tensor(0.3), torch.tensor(2.0)):
        expected = plain(x, sigma, condition)
        for _ in range(2):
            torch.testing.assert_close(compiled(x, sigma, condition), expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_without_a_compiler_it_says_so_and_goes_on(rng, monkeypatch):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net = NETS["ncsnv2"]()
    x, sigma = _noise(rng), torch.tensor(0.3)
    fast = net.inference_copy(compile=True)
    with pytest.warns(UserWarning, match=r"goes on without it: No working C\+\+ compiler found$"):
        found = fast(x, sigma)
    assert torch.equal(found, net.inference_copy()(x, sigma))
    assert torch.equal(found, fast(x, sigma))  # and does not say it again


@pytest.mark.parametrize("settings", [{"net": lambda x, sigma: -x}, {"precision": "float32"}])
def test_what_cannot_be_compiled(settings):
    with pytest.raises(ValueError, match=r"compile=True is for a ScoreNet.*Pass torch.compile\(net\)"):
        AnnealedLangevinSampler(**{"net": NETS["ncsnv2"](), "schedule": LADDER, **settings}, compile=True)
