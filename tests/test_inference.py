"""The inference copy: the same function, the caller's network untouched, and nothing computed twice."""

import copy
import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.nets import inference
from scorematch.nets.layers import ConditionalInstanceNormPlus
from scorematch.nets.unet import UNet
from scorematch.sampling import SAMPLERS, SamplerSettings
from tests.helpers import run, seed
from tests.networks import LEVELS, NETS, SIZE, condition, images, network

# One of each way to compute; the others are slow tests.
KINDS = {
    *("ncsn", "ncsnv2, deeper", "unet", "unet, one head", "unet, heads", "unet, classes", "unet, pixels"),
    *("unet, image and variance", "ncsnpp, attention"),
}
every_net = pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
)
SHORT = NoiseSchedule([1.0, 0.3, 0.1])


@pytest.fixture
def native(monkeypatch):
    """Sets the dtype that the processor is said to multiply fastest."""
    return lambda dtype: monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: dtype)


@pytest.fixture
def rows(monkeypatch):
    """A list that grows with each norm of an NCSN that selects its rows for a noise level."""
    calls, select = [], ConditionalInstanceNormPlus.rows
    monkeypatch.setattr(ConditionalInstanceNormPlus, "rows", lambda *args: (calls.append(1), select(*args))[1])
    return calls


def _norms(net):
    return sum(isinstance(module, ConditionalInstanceNormPlus) for module in net.modules())


# -- The same function


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2.5e-2)])
@every_net
@torch.no_grad()
def test_it_is_the_same_function(name, dtype, tolerance, rng, native):
    native(dtype)
    net, x, beside = network(name), images(3, rng), condition(name, 3, rng)
    fast = net.inference_copy()
    assert fast is not net
    for sigma in (0.3, torch.tensor(5.0), torch.tensor(0.01), torch.tensor([0.2, 0.02, 2.0])):
        expected = net(x, sigma, beside)
        for _ in range(2):  # computed, and remembered
            found = fast(x, sigma, beside)
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= tolerance * expected.norm()


@every_net
@torch.no_grad()
def test_denoise_is_tweedies_formula(name, rng):
    net, x, beside = network(name), images(3, rng), condition(name, 3, rng)
    for score in (net, net.inference_copy()):
        for sigma in (0.3, torch.tensor(0.3), torch.tensor([0.2, 0.02, 2.0])):
            variance = torch.as_tensor(sigma) ** 2
            variance = variance.view(-1, 1, 1, 1) if variance.ndim else variance
            torch.testing.assert_close(score.denoise(x, sigma, beside), x + variance * score(x, sigma, beside))


@every_net
def test_the_network_is_untouched_and_the_copy_its_own(name, rng, native):
    native(torch.bfloat16)
    net = network(name)
    before = {key: (value, value.clone(), value.stride()) for key, value in net.state_dict(keep_vars=True).items()}
    fast = net.inference_copy()
    with torch.no_grad():
        fast(images(2, rng), 0.3, condition(name, 2, rng))
    after = net.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for key, (value, copied, stride) in before.items():
        assert after[key] is value and torch.equal(value, copied) and value.stride() == stride
        assert value.requires_grad == (key != "backbone.time_proj.weight")


@pytest.mark.slow
@every_net
@torch.no_grad()
def test_it_does_not_follow_the_weights(name, rng):
    """Also where each image has its own level: those are processed level by level."""
    net, x, beside, sigma = network(name), images(3, rng), condition(name, 3, rng), torch.tensor([0.3, 2.0, 0.3])
    fast = net.inference_copy()
    before = fast(x, sigma, beside)
    for parameter in net.parameters():
        parameter.mul_(3)
    assert torch.equal(fast(x, sigma, beside), before)
    alone = [fast(x[i : i + 1], sigma[i], None if beside is None else beside[i : i + 1]) for i in range(3)]
    assert (before - torch.cat(alone)).norm() <= 2e-2 * before.norm()


def test_it_does_not_keep_the_network(rng):
    net = network("ncsn")
    fast, gone = net.inference_copy(), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert fast(images(2, rng), 0.3).shape == (2, 5, SIZE, SIZE)


@pytest.mark.parametrize("name", ["ncsn", "ncsnpp, attention", "unet, classes", "unet, pixels"])
def test_bfloat16_stays_inside(name):
    """What touches the image or sigma, and every norm, keeps float32."""
    net = network(name)
    made, _ = inference.copy_for_inference(net.family, net.backbone, torch.bfloat16)
    dtypes = {key.rpartition(".")[0]: value.dtype for key, value in made.state_dict().items()}
    low = {path for path, dtype in dtypes.items() if dtype == torch.bfloat16}
    first, last = net.family.image_convolutions(net.backbone)
    assert len(low) > 10
    assert not low & (first | last | net.family.level_modules(net.backbone))
    assert not [path for path in low if "norm" in path]
    linear = {path for path, module in made.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert low == linear - first - last - net.family.level_modules(net.backbone)


@torch.no_grad()
def test_a_batch_in_parts_is_the_batch(rng, monkeypatch):
    for name in NETS:
        fast, x, beside = network(name).inference_copy(), images(3, rng), condition(name, 3, rng)
        whole, sizes = fast(x, 0.3, beside), []
        with monkeypatch.context() as patch:
            patch.setattr(
                "scorematch.nets.inference.part_size", lambda width, x, sizes=sizes: sizes.append(len(x)) or 2
            )
            torch.testing.assert_close(fast(x, 0.3, beside), whole, rtol=1e-4, atol=1e-4)
        assert sizes == [3]


def test_parts_hold_two_million_values():
    assert inference.part_size(128, torch.empty(100, 3, 32, 32)) == 16
    assert inference.part_size(128, torch.empty(100, 3, 256, 256)) == 1
    assert inference.part_size(128, torch.empty(100, 3, 32, 32, device="meta")) == 100


# In bfloat16 pooling of a random network finds its maximum at other pixels, and passes the gradient on to those.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@every_net
def test_gradients_with_respect_to_the_image_flow_through(name, dtype, tolerance, rng, native):
    native(dtype)
    net, x, beside = network(name), images(2, rng, size=16).requires_grad_(), condition(name, 2, rng, size=16)
    found, right = (
        torch.autograd.grad(score(x, 0.3, beside).square().sum(), x)[0] for score in (net.inference_copy(), net)
    )
    assert (found - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2", "unet", "unet, classes"])
def test_gradients_of_an_earlier_level(name, rng, native):
    """As of two threads that share a copy: one asks for a gradient when the other has set the next level."""
    native(torch.float32)
    net, x, beside = network(name), images(2, rng).requires_grad_(), condition(name, 2, rng)
    fast = net.inference_copy()
    earlier = fast(x, 0.3, beside).square().sum()
    fast(x, 2.0, beside)
    (found,) = torch.autograd.grad(earlier, x)
    (right,) = torch.autograd.grad(net(x, 0.3, beside).square().sum(), x)
    assert (found - right).norm() <= 1e-3 * right.norm()


# -- Once per level


@torch.no_grad()
def test_what_depends_on_sigma_is_computed_once_per_level(rng, rows):
    net = network("ncsn")
    norms, fast, x, sigma = _norms(net), net.inference_copy(), images(2, rng), torch.tensor(0.3)
    first = [fast(x, sigma) for _ in range(3)][-1]
    assert len(rows) == norms
    assert torch.equal(fast(x, torch.tensor(0.3)), first)  # another tensor of the same value
    assert len(rows) == norms
    sigma.fill_(3.0)  # the same tensor with another value
    assert torch.equal(fast(x, sigma), fast(x, 3.0))
    assert len(rows) == 2 * norms
    assert fast(x.double(), 3.0).dtype == torch.float64
    assert len(rows) == 3 * norms  # its coefficients are float64
    rows.clear()
    run(AnnealedLangevinSampler(net, SHORT, steps_per_level=4), 2)
    assert len(rows) == 3 * norms  # the last denoising is at the last level


@pytest.mark.slow
@torch.no_grad()
def test_a_level_on_a_device_is_not_read(rows):
    """To know whether it is the level before, the host would have to wait for the device."""
    net = network("ncsn").to("meta")
    fast, x = net.inference_copy(), torch.empty(2, 5, SIZE, SIZE, device="meta")
    for count, sigma in enumerate([torch.tensor(0.3, device="meta")] * 3, 1):
        fast(x, sigma)
        assert len(rows) == count * _norms(net)
    for _ in range(3):
        fast(x, 0.3)
    assert len(rows) == 4 * _norms(net)


@torch.no_grad()
def test_an_interrupted_change_of_level_is_repeated(rng, monkeypatch):
    net = network("ncsn")
    fast, x = net.inference_copy(), images(2, rng)
    expected = fast(x, 3.0)
    fast(x, 0.3)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConditionalInstanceNormPlus, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(x, 3.0)
    assert torch.equal(fast(x, 3.0), expected)


def test_inference_mode(rng):
    """What was computed for a level is not used for another, also where tensors have no versions."""
    net = network("ncsn")
    with torch.inference_mode():
        fast, x, sigma = net.inference_copy(), images(2, rng), torch.tensor(0.3)
        fast(x, sigma)
        sigma.fill_(5.0)
        assert torch.equal(fast(x, sigma), fast(x, torch.tensor(5.0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsn", "unet, image"])
def test_threads_share_a_copy(name):
    """Each gets the score of its own level."""
    net = network(name)
    fast, levels = net.inference_copy(), (0.3, 2.0)
    x, beside = images(2, seed()), condition(name, 2, seed(1))
    with torch.no_grad():
        expected = [fast(x, sigma, beside) for sigma in levels]
    wrong = []

    @torch.no_grad()
    def work(i):
        wrong.extend(1 for _ in range(20) if not torch.equal(fast(x, levels[i], beside), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# -- Networks that are called as they are


class Hidden(nn.Conv2d):
    """Of the user's making."""


def _hooked(net):
    net.backbone.begin_conv.register_forward_hook(lambda *args: None)


def _adapted(net):
    net.backbone.begin_conv = Hidden(5, 4, 3, padding=1)


def _parametrized(net):
    nn.utils.parametrizations.weight_norm(net.backbone.begin_conv)


def _patched(net):
    net.backbone.end_conv.forward = lambda x: x[:, :5]


def _widened(net):
    net.backbone.begin_conv = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(4, 4, 1))


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
def test_what_is_not_as_it_was_built_is_called_as_it_is(change):
    net = network("ncsn")
    assert net.inference_copy() is not net
    change(net)
    assert net.inference_copy() is net


def _low_rank(attention):
    attention.to_q = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16))


def _without_bias(attention):
    attention.to_v = nn.Linear(16, 16, bias=False)


@pytest.mark.parametrize("change", [_low_rank, _without_bias])
def test_adapters_made_of_torchs_own_layers(change):
    net = network("unet, one head")
    change(net.backbone.mid_block.attentions[0])
    assert net.inference_copy() is net
    assert run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 2).shape == (2, 5, SIZE, SIZE)


def test_a_network_that_was_copied_or_loaded_is_as_it_was_built(tmp_path):
    made = (ScoreNet.ncsn(1, SIZE, width=4, schedule=LEVELS), ScoreNet.unet(1, SIZE, widths=(8, 8), schedule=LEVELS))
    for net in map(copy.deepcopy, made):
        assert net.inference_copy() is not net
        net.save_pretrained(tmp_path / net.config["family"])
        again = ScoreNet.from_pretrained(tmp_path / net.config["family"])
        assert again.inference_copy() is not again


def test_subclasses_are_called_as_they_are():
    class Brighter(UNet):
        def forward(self, x, c_noise, condition=None):
            return super().forward(x, c_noise, condition) + 1

    class Doubled(ScoreNet):
        def forward(self, x, sigma, condition=None):
            return 2 * super().forward(x, sigma, condition)

    for made in (Doubled, ScoreNet):
        backbone = (UNet if made is Doubled else Brighter)(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
        net = made(backbone, LEVELS)
        assert net.inference_copy() is net


def test_the_users_own_are_called_as_they_are(world):
    own = ScoreNet(nn.Sequential(nn.Linear(2, 2)), LEVELS)
    assert own.inference_copy() is own
    init = torch.randn(3, 3, generator=seed())
    found = [
        run(AnnealedLangevinSampler(world, LEVELS, precision=precision), init=init, generator=1)
        for precision in ("auto", "float32")
    ]
    assert torch.equal(*found)


# -- In the samplers


def test_it_says_what_the_network_says():
    net = ScoreNet.ncsn(1, (SIZE, 12), width=2, schedule=LEVELS)
    net.sampler_settings = SamplerSettings(levels=4, consistent=True)
    fast = net.inference_copy()
    for name in ("schedule", "value_range", "sample_shape", "sampler_settings", "conditioning"):
        assert getattr(fast, name) == getattr(net, name)
    assert fast.device == torch.device("cpu")
    assert net.to("meta").inference_copy().device == torch.device("meta")
    points = ScoreNet(UNet(1, 1, block_out_channels=(32,), **_one_block()), LEVELS).inference_copy()
    assert points.value_range is None and points.sample_shape is None and points.sampler_settings is None


def _one_block():
    return {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_accepts_it_in_place_of_the_network(kind, monkeypatch):
    """With the same samples, and one copy for all of them."""
    net = ScoreNet.ncsn(1, SIZE, width=2, schedule=LEVELS)
    expected = run(SAMPLERS[kind](net, levels=4), 2, generator=0)
    fast = net.inference_copy()
    monkeypatch.setattr("scorematch.nets.inference.copy_for_inference", None)
    sampler = SAMPLERS[kind](fast, levels=4)
    assert str(sampler) == str(SAMPLERS[kind](net, levels=4))
    for _ in range(2):
        assert torch.equal(run(sampler, 2, generator=0), expected)
    with pytest.raises(ValueError, match="calls the network itself, but net is its inference copy"):
        SAMPLERS[kind](fast, levels=4, precision="float32")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
def test_an_inference_copy_is_its_own():
    net = network("unet")
    fast = net.inference_copy()
    assert fast.inference_copy() is fast
    with pytest.raises(ValueError, match=r"is not compiled. Write net.inference_copy\(compile=True\)"):
        fast.inference_copy(compile=True)
    compiled = net.inference_copy(compile=True)  # at its first call
    assert compiled.inference_copy() is compiled and compiled.inference_copy(compile=True) is compiled


@pytest.mark.parametrize("name", ["ncsn", "unet", "ncsnpp"])
def test_a_generator_leaves_the_global_seed_alone(name):
    net = network(name)
    before = torch.get_rng_state()
    run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 3, generator=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_copy_per_run_and_none_kept(monkeypatch):
    made, original = [], inference.copy_for_inference

    def spy(*args, **kwargs):
        copied, settle = original(*args, **kwargs)
        made.append(weakref.ref(copied))
        return copied, settle

    monkeypatch.setattr("scorematch.nets.inference.copy_for_inference", spy)
    net = ScoreNet.ncsnv2(1, SIZE, width=4, schedule=LEVELS)
    for precision, count in [("float32", 0), ("auto", 1)]:
        made.clear()
        run(AnnealedLangevinSampler(net, SHORT, precision=precision), 2, batch_size=1)
        gc.collect()
        assert len(made) == count and not any(copied() for copied in made)


@pytest.mark.parametrize("levels", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_digits_are_the_same_to_the_eye(levels, native):
    """Same seeds in bfloat16 and float32: each of the digits is the same digit, to a few gray levels."""
    native(torch.bfloat16)
    net = ScoreNet.from_pretrained("mnist")
    found = [
        run(AnnealedLangevinSampler(net, levels=levels, precision=precision), 2, generator=[seed(0), seed(1)])
        for precision in ("auto", "float32")
    ]
    assert (found[0] - found[1]).square().mean((1, 2, 3)).sqrt().max() < 0.05


# -- Compilation


@pytest.fixture
def compiler(monkeypatch):
    """Compiles with a backend that returns the function itself, and counts how often it was asked to."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def _tiny():
    """Compilation takes seconds even for small networks."""
    torch.manual_seed(0)
    options = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "add_attention": False}
    return ScoreNet(UNet(1, 1, num_class_embeds=3, **options, **_one_block()), LEVELS, sample_shape=(1, SIZE, SIZE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ncsn", "unet, classes", "ncsnpp"))]
)
@torch.no_grad()
def test_it_compiles_once_for_all_levels(name, rng, compiler):
    net = _tiny() if name == "tiny" else network(name)
    x, beside = torch.rand(2, *net.sample_shape, generator=rng), 1 if name == "tiny" else condition(name, 2, rng)
    plain, compiled = net.inference_copy(), net.inference_copy(compile=True)
    assert not compiler
    counts = []
    for sigma, _ in itertools.product((0.3, torch.tensor(2.0), 0.05), range(2)):
        torch.testing.assert_close(compiled(x, sigma, beside), plain(x, sigma, beside), rtol=1e-2, atol=1e-2)
        counts.append(len(compiler))
    assert counts[0] > 0 and counts[-1] == counts[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_copy_is_compiled_once_for_many_runs(compiler):
    net, arguments = _tiny(), {"condition": 1, "generator": 0}
    expected = run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 2, **arguments)
    compiled, counts = net.inference_copy(compile=True), []
    for options in ({}, {"compile": True}, {}):
        sampler = AnnealedLangevinSampler(compiled, SHORT, steps_per_level=1, **options)
        torch.testing.assert_close(run(sampler, 2, **arguments), expected, rtol=1e-2, atol=1e-2)
        counts.append(len(compiler))
    assert counts[0] > 0 and counts[-1] == counts[0]


@torch.no_grad()
def test_without_a_compiler_it_warns_and_runs(rng, monkeypatch):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net, x = network("ncsnv2"), images(2, rng)
    fast = net.inference_copy(compile=True)
    with pytest.warns(UserWarning, match=r"sampling continues without it: No working C\+\+ compiler found$"):
        found = fast(x, 0.3)
    assert torch.equal(found, net.inference_copy()(x, 0.3))
    assert torch.equal(found, fast(x, 0.3))  # and it does not warn again


@torch.no_grad()
def test_bad_input_of_a_compiled_copy_is_called_bad(compiler):
    fast = network("ncsnv2").inference_copy(compile=True)
    with pytest.raises(ValueError, match=r"shape \(N, 5, H, W\), got \(2, 3, 8, 8\)"):
        fast(torch.zeros(2, 3, SIZE, SIZE), 0.3)


@pytest.mark.parametrize("settings", [{"net": lambda x, sigma: -x}, {"precision": "float32"}])
def test_what_cannot_be_compiled(settings):
    with pytest.raises(ValueError, match=r"compile=True is for a ScoreNet.*Pass torch.compile\(net\)"):
        AnnealedLangevinSampler(**{"net": network("ncsnv2"), "schedule": LEVELS, **settings}, compile=True)
