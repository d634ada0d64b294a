"""The inference copy: the same function, the caller's network untouched, and nothing computed twice."""

import copy
import functools
import gc
import itertools
import pickle
import types
import weakref

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.nets import inference
from scorematch.nets.family import structure
from scorematch.nets.layers import ConditionalInstanceNormPlus
from scorematch.nets.unet import UNet
from scorematch.sampling import SAMPLERS, SamplerSettings
from tests.helpers import in_threads, run, seed
from tests.networks import LEVELS, NETS, SIZE, condition, every_net, every_path, images, network, shared

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 2.5e-2)]  # and the tolerance for the score
SHORT = NoiseSchedule([1.0, 0.3, 0.1])
some_paths = every_net({"ncsn", "unet, heads", "ncsnpp, attention", "DDPM++, classes"})


@pytest.fixture
def native(monkeypatch):
    """A function that sets the dtype that ``native_dtype`` returns."""
    return lambda dtype: monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: dtype)


@functools.cache
def _copy(name, dtype):
    """The inference copy of the shared network in this dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scorematch.nets.inference.native_dtype", lambda device: dtype)
        made = shared(name).inference_copy()
    assert made is not shared(name)
    return made


@pytest.fixture
def rows(monkeypatch):
    """A list with one entry for each time that a norm of NCSN has selected its rows for a noise level."""
    calls, select = [], ConditionalInstanceNormPlus.rows
    monkeypatch.setattr(ConditionalInstanceNormPlus, "rows", lambda *args: (calls.append(1), select(*args))[1])
    return calls


def _norms(net):
    return sum(isinstance(module, ConditionalInstanceNormPlus) for module in net.modules())


def test_a_copy_has_the_names_of_classes_and_axes():
    net = ScoreNet.mlp(2, width=8, classes=2)
    net.class_names, net.axes = ("cat", "dog"), ("sample", "value")
    copied = net.inference_copy()
    assert copied is not net
    assert (copied.class_names, copied.axes) == (net.class_names, net.axes)


# -- The same function


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [DTYPES[0], pytest.param(*DTYPES[1], marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@every_path
@torch.no_grad()
def test_the_copy_computes_the_same_score(name, dtype, tolerance, rng):
    net, fast = shared(name), _copy(name, dtype)
    x, beside = images(2, rng), condition(name, 2, rng)
    for sigma in (0.3, torch.tensor(5.0), torch.tensor([2.0, 0.01])):
        expected, found = net(x, sigma, beside), fast(x, sigma, beside)
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= tolerance * expected.norm()
        if not torch.as_tensor(sigma).ndim:  # a second call reuses what was computed for the level
            assert (fast(x, sigma, beside) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["unet, image and variance", "DDPM++, variance"])
@torch.no_grad()
def test_the_copy_predicts_the_same_variance(name, dtype, tolerance, rng, monkeypatch):
    """Also for a batch with several noise levels, and for one that is processed in parts."""
    net, fast = shared(name), _copy(name, dtype)
    x, beside = images(3, rng), condition(name, 3, rng)
    for sigma in (0.3, torch.tensor([0.2, 0.02, 2.0])):
        _, expected = net.score_and_variance(x, sigma, beside)
        score, found = fast.score_and_variance(x, sigma, beside)
        assert torch.equal(score, fast(x, sigma, beside))
        assert found.shape == x.shape and (found - expected).norm() <= tolerance * expected.norm()
    monkeypatch.setattr(inference, "_PART_VALUES", 1)
    assert (fast.score_and_variance(x, sigma, beside)[1] - expected).norm() <= tolerance * expected.norm()
    with pytest.raises(ValueError, match="this network predicts no variance"):
        _copy("unet", dtype).score_and_variance(x, 0.3)


@pytest.mark.slow
@every_net({"ncsn", "unet, image and variance", "unet, ADM"})
@torch.no_grad()
def test_denoise_equals_tweedies_formula(name, rng):
    net, x, beside = shared(name), images(3, rng), condition(name, 3, rng)
    for score in (net, _copy(name, torch.float32)):
        for sigma in (0.3, torch.tensor(0.3), torch.tensor([0.2, 0.02, 2.0])):
            variance = torch.as_tensor(sigma) ** 2
            variance = variance.view(-1, 1, 1, 1) if variance.ndim else variance
            torch.testing.assert_close(score.denoise(x, sigma, beside), x + variance * score(x, sigma, beside))


@some_paths
def test_making_and_calling_a_copy_does_not_change_the_network(name, rng, native):
    native(torch.bfloat16)
    net = shared(name)
    before = {key: (value, value.clone(), value.stride()) for key, value in net.state_dict(keep_vars=True).items()}
    fast = net.inference_copy()
    with torch.no_grad():
        fast(images(2, rng), 0.3, condition(name, 2, rng))
    after = net.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for key, (value, copied, stride) in before.items():
        assert after[key] is value and torch.equal(value, copied) and value.stride() == stride
        assert value.requires_grad == (key != "backbone.time_proj.weight")


@every_path
def test_a_clone_shares_only_immutable_objects_with_the_network(name):
    immutable = (
        int,
        float,
        str,
        tuple,
        functools.partial,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.NoneType,
    )
    net = shared(name).backbone
    clone = inference._clone(net, channels_last=True)
    assert structure(clone) == structure(net)
    for module, cloned in zip(net.modules(), clone.modules(), strict=True):
        assert cloned is not module and vars(cloned).keys() == vars(module).keys()
        for key, value in vars(module).items():
            assert vars(cloned)[key] is not value or isinstance(value, immutable), key
    before, after = ([*one.parameters(), *one.buffers()] for one in (net, clone))
    for tensor, cloned in zip(before, after, strict=True):
        assert torch.equal(tensor, cloned) and tensor.data_ptr() != cloned.data_ptr() and not cloned.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_later_changes_of_the_weights_do_not_change_the_copy(name, rng):
    """Also if each image has its own noise level; such batches are processed level by level."""
    net, x, beside, sigma = network(name), images(3, rng), condition(name, 3, rng), torch.tensor([0.3, 2.0, 0.3])
    fast = net.inference_copy()
    before = fast(x, sigma, beside)
    for parameter in net.parameters():
        parameter.mul_(3)
    assert torch.equal(fast(x, sigma, beside), before)
    alone = [fast(x[i : i + 1], sigma[i], None if beside is None else beside[i : i + 1]) for i in range(3)]
    assert (before - torch.cat(alone)).norm() <= 2e-2 * before.norm()


def test_the_copy_holds_no_reference_to_the_network(rng):
    net = network("ncsn")
    fast, gone = net.inference_copy(), weakref.ref(net)
    del net
    assert gone() is None
    assert fast(images(2, rng), 0.3).shape == (2, 5, SIZE, SIZE)


@pytest.mark.parametrize("name", ["ncsn", "ncsnpp, attention", "unet, classes", "unet, pixels"])
def test_only_inner_layers_are_bfloat16(name):
    """Norms, and the layers at the image and at sigma, stay in float32."""
    net = shared(name)
    made, _ = inference.copy_for_inference(net.family, net.backbone, torch.bfloat16)
    dtypes = {key.rpartition(".")[0]: value.dtype for key, value in made.state_dict().items()}
    low = {path for path, dtype in dtypes.items() if dtype == torch.bfloat16}
    first, last = net.family.image_convolutions(net.backbone)
    assert len(low) > 10
    assert not low & (first | last | net.family.level_modules(net.backbone))
    assert not [path for path in low if "norm" in path]
    linear = {path for path, module in made.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert low == linear - first - last - net.family.level_modules(net.backbone)


@some_paths
@torch.no_grad()
def test_several_levels_at_once_give_the_same_result(name, rng, monkeypatch):
    """As on an accelerator, where images of different levels are not processed one after another."""
    fast, x, beside, sigma = (
        _copy(name, torch.float32),
        images(3, rng),
        condition(name, 3, rng),
        torch.tensor([2, 0.3, 2]),
    )
    expected = fast(x, sigma, beside)
    monkeypatch.setattr(inference, "by_level", lambda x: False)
    torch.testing.assert_close(fast(x, sigma, beside), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fast(x[:1], 0.3, None if beside is None else beside[:1]),
        fast(x[:1], sigma[1:2], None if beside is None else beside[:1]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["unet", "ncsn", "ncsnv2"])
def test_float16_is_for_networks_whose_input_has_unit_variance(name, native):
    native(torch.float16)
    dtypes = {parameter.dtype for parameter in shared(name).inference_copy()._backbone.parameters()}
    assert (torch.float16 in dtypes) == (name == "unet")


@some_paths
@torch.no_grad()
def test_a_batch_processed_in_parts_gives_the_same_result(name, rng, monkeypatch):
    fast, x, beside = _copy(name, torch.float32), images(3, rng), condition(name, 3, rng)
    whole, sizes = fast(x, 0.3, beside), []
    monkeypatch.setattr("scorematch.nets.inference.part_size", lambda width, x: sizes.append(len(x)) or 2)
    torch.testing.assert_close(fast(x, 0.3, beside), whole, rtol=1e-4, atol=1e-4)
    assert sizes == [3]


def test_parts_have_at_most_two_million_values_on_a_cpu():
    assert inference.part_size(128, torch.empty(100, 3, 32, 32)) == 16
    assert inference.part_size(128, torch.empty(100, 3, 256, 256)) == 1
    assert inference.part_size(128, torch.empty(100, 3, 32, 32, device="meta")) == 100


# In bfloat16 the maxima of pooling can be at other pixels, which then get the gradient.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), pytest.param(torch.bfloat16, 0.3, marks=pytest.mark.slow)]
)
@every_path
def test_gradients_of_the_copy_with_respect_to_the_image(name, dtype, tolerance, rng):
    x, beside = images(1, rng, size=16).requires_grad_(), condition(name, 1, rng, size=16)
    found, right = (
        torch.autograd.grad(score(x, 0.3, beside).square().sum(), x)[0] for score in (_copy(name, dtype), shared(name))
    )
    assert (found - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2", "unet", "unet, classes"])
def test_gradients_of_a_level_after_a_call_at_another_level(name, rng):
    """For example with two threads: one computes a gradient after the other has called the copy at its level."""
    net, fast = shared(name), _copy(name, torch.float32)
    x, beside = images(2, rng).requires_grad_(), condition(name, 2, rng)
    earlier = fast(x, 0.3, beside).square().sum()
    fast(x, 2.0, beside)
    (found,) = torch.autograd.grad(earlier, x)
    (right,) = torch.autograd.grad(net(x, 0.3, beside).square().sum(), x)
    assert (found - right).norm() <= 1e-3 * right.norm()


# -- Once per level


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* noise levels of the schedule are not among:UserWarning")  # of NCSN
@torch.no_grad()
def test_what_depends_on_sigma_is_computed_once_per_level(rng, rows):
    net = shared("ncsn")
    norms, fast, x, sigma = _norms(net), net.inference_copy(), images(2, rng), torch.tensor(0.3)
    first = [fast(x, sigma) for _ in range(3)][-1]
    assert len(rows) == norms
    assert torch.equal(fast(x, torch.tensor(0.3)), first)  # another tensor with the same value
    assert len(rows) == norms
    sigma.fill_(3.0)  # the same tensor with another value
    assert torch.equal(fast(x, sigma), fast(x, 3.0))
    assert len(rows) == 2 * norms
    assert fast(x.double(), 3.0).dtype == torch.float64
    assert len(rows) == 3 * norms  # computed again, because coefficients for float64 data are float64
    rows.clear()
    run(AnnealedLangevinSampler(net, SHORT, steps_per_level=4), 2)
    assert len(rows) == 3 * norms  # once for each level; the final denoising is at the last level


@pytest.mark.slow
@torch.no_grad()
def test_sigma_on_a_device_is_not_read(rows):
    """Comparing it with the previous level would make the host wait for the device."""
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
    fast, x = _copy("ncsn", torch.float32), images(2, rng)
    expected = fast(x, 3.0)
    fast(x, 0.3)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConditionalInstanceNormPlus, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(x, 3.0)
    assert torch.equal(fast(x, 3.0), expected)


def test_results_of_another_level_are_not_reused_in_inference_mode(rng):
    """Tensors in inference mode have no version counters that would show a change in place."""
    with torch.inference_mode():
        fast, x, sigma = shared("ncsn").inference_copy(), images(2, rng), torch.tensor(0.3)
        fast(x, sigma)
        sigma.fill_(5.0)
        assert torch.equal(fast(x, sigma), fast(x, torch.tensor(5.0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsn", "unet, image"])
def test_threads_can_share_a_copy(name):
    """Each thread gets the score of its own noise level."""
    net = network(name)
    fast, levels = net.inference_copy(), (0.3, 2.0)
    x, beside = images(2, seed()), condition(name, 2, seed(1))
    with torch.no_grad():
        expected = [fast(x, sigma, beside) for sigma in levels]

    @torch.no_grad()
    def right(i):
        return all(torch.equal(fast(x, levels[i], beside), expected[i]) for _ in range(20))

    assert in_threads([functools.partial(right, i) for i in (0, 1)]) == [True, True]


# -- Networks without an inference copy


class Hidden(nn.Conv2d):
    """A layer of a class that the user has defined."""


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
        lambda net: net.backbone.end_conv.register_full_backward_hook(lambda *args: None),
        lambda net: net.compile(backend="eager"),
        lambda net: net.double(),
        lambda net: net.bfloat16(),
        lambda net: net.backbone.begin_conv.half(),
    ],
)
def test_inference_copy_of_a_modified_network_is_the_network_itself(change):
    net = copy.deepcopy(shared("ncsn"))
    assert net.inference_copy() is not net
    change(net)
    assert net.inference_copy() is net


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* noise levels of the schedule are not among:UserWarning")  # of NCSN
def test_a_network_that_accelerate_offloads_can_be_sampled():
    accelerate = pytest.importorskip("accelerate")
    net = network("ncsn")
    expected = run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1, precision="float32"), 2, generator=0)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    assert net.inference_copy() is net and all(parameter.is_meta for parameter in net.parameters())
    assert torch.equal(run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 2, generator=0), expected)


def _low_rank(attention):
    attention.to_q = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16))


def _without_bias(attention):
    attention.to_v = nn.Linear(16, 16, bias=False)


@pytest.mark.parametrize("change", [_low_rank, _without_bias])
def test_inference_copy_of_a_network_with_adapters_is_the_network_itself(change):
    net = network("unet, one head")
    change(net.backbone.mid_block.attentions[0])
    assert net.inference_copy() is net
    assert run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 2).shape == (2, 5, SIZE, SIZE)


@pytest.mark.slow
def test_copied_and_loaded_networks_have_an_inference_copy(tmp_path):
    made = (ScoreNet.ncsn(1, SIZE, width=4, schedule=LEVELS), ScoreNet.unet(1, SIZE, widths=(8, 8), schedule=LEVELS))
    for net in map(copy.deepcopy, made):
        assert net.inference_copy() is not net
        net.save_pretrained(tmp_path / net.config["family"])
        again = ScoreNet.from_pretrained(tmp_path / net.config["family"])
        assert again.inference_copy() is not again


def test_inference_copy_of_a_subclass_is_the_network_itself():
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


def test_inference_copy_of_a_user_defined_network_is_the_network_itself(world):
    own = ScoreNet(nn.Sequential(nn.Linear(2, 2)), LEVELS)
    assert own.inference_copy() is own
    init = torch.randn(3, 3, generator=seed())
    found = [
        run(AnnealedLangevinSampler(world, LEVELS, precision=precision), init=init, generator=1)
        for precision in ("auto", "float32")
    ]
    assert torch.equal(*found)


# -- In the samplers


def test_the_copy_has_the_attributes_of_the_network():
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
def test_every_sampler_accepts_a_copy_in_place_of_the_network(kind, monkeypatch):
    """The samples are equal, and no further copy is made."""
    net = ScoreNet.ncsn(1, SIZE, width=2, schedule=LEVELS)
    expected = run(SAMPLERS[kind](net, levels=4), 2, generator=0)
    fast = net.inference_copy()
    monkeypatch.setattr("scorematch.nets.inference.copy_for_inference", None)
    sampler = SAMPLERS[kind](fast, levels=4)
    assert str(sampler) == str(SAMPLERS[kind](net, levels=4))
    for _ in range(2):
        assert torch.equal(run(sampler, 2, generator=0), expected)
    with pytest.raises(ValueError, match="needs the network itself, but net is an inference copy"):
        SAMPLERS[kind](fast, levels=4, precision="float32")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
def test_the_inference_copy_of_a_copy_is_the_copy_itself(compiler):
    net = shared("unet")
    fast = net.inference_copy()
    assert fast.inference_copy() is fast
    with pytest.raises(ValueError, match=r"is not compiled. Write net.inference_copy\(compile=True\)"):
        fast.inference_copy(compile=True)
    compiled = net.inference_copy(compile=True)  # compilation would happen at the first call
    assert compiled.inference_copy() is compiled and compiled.inference_copy(compile=True) is compiled


@pytest.mark.filterwarnings("ignore:.* noise levels of the schedule are not among:UserWarning")  # of NCSN
@pytest.mark.parametrize("name", ["ncsn", "unet", "ncsnpp"])
def test_sampling_with_a_seed_leaves_the_global_generator_alone(name):
    net = shared(name)
    before = torch.get_rng_state()
    run(AnnealedLangevinSampler(net, SHORT, steps_per_level=1), 3, generator=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_sampler_makes_one_copy_per_run_and_does_not_keep_it(monkeypatch):
    made, original = [], inference.copy_for_inference

    def spy(*args, **kwargs):
        copied, set_level = original(*args, **kwargs)
        made.append(weakref.ref(copied))
        return copied, set_level

    monkeypatch.setattr("scorematch.nets.inference.copy_for_inference", spy)
    net = ScoreNet.ncsnv2(1, SIZE, width=4, schedule=LEVELS)
    for precision, count in [("float32", 0), ("auto", 1)]:
        made.clear()
        run(AnnealedLangevinSampler(net, SHORT, precision=precision), 2, batch_size=1)
        gc.collect()
        assert len(made) == count and not any(copied() for copied in made)


@pytest.mark.parametrize("levels", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_bfloat16_and_float32_give_nearly_the_same_digits(levels, native):
    """With equal seeds the root mean square difference of a digit is below 0.05."""
    native(torch.bfloat16)
    net = ScoreNet.from_pretrained("mnist")
    found = [
        run(AnnealedLangevinSampler(net, levels=levels, precision=precision), 1, generator=0)
        for precision in ("auto", "float32")
    ]
    assert 0 < (found[0] - found[1]).square().mean().sqrt() < 0.05


# -- Compilation


@pytest.fixture
def compiler(monkeypatch):
    """Replaces the backend of torch.compile by one that returns the graph itself; a list of the compiled graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def _tiny():
    """A network for tests of compilation, which takes seconds even for small networks."""
    torch.manual_seed(0)
    options = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "add_attention": False}
    return ScoreNet(UNet(1, 1, num_class_embeds=3, **options, **_one_block()), LEVELS, sample_shape=(1, SIZE, SIZE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*noise levels of the schedule are not among")
@pytest.mark.parametrize("name", ["tiny", "ncsn", "unet, classes", "ncsnpp"])
@torch.no_grad()
def test_a_copy_is_compiled_once_for_all_levels_and_runs(name, rng, compiler):
    net = _tiny() if name == "tiny" else network(name)
    x, beside = torch.rand(2, *net.sample_shape, generator=rng), 1 if name == "tiny" else condition(name, 2, rng)
    plain, compiled = net.inference_copy(), net.inference_copy(compile=True)
    assert not compiler
    counts = []
    for sigma, _ in itertools.product((0.3, torch.tensor(2.0), 0.05), range(2)):
        torch.testing.assert_close(compiled(x, sigma, beside), plain(x, sigma, beside), rtol=1e-2, atol=1e-2)
        counts.append(len(compiler))
    init = torch.randn(2, *net.sample_shape, generator=rng)
    for options in ({}, {"compile": True}, {}):
        samplers = [
            AnnealedLangevinSampler(one, SHORT, steps_per_level=1, **given)
            for one, given in ((compiled, options), (plain, {}))
        ]
        found, expected = (run(sampler, init=init, condition=beside, generator=0) for sampler in samplers)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        counts.append(len(compiler))
    assert counts[0] > 0 and counts[-1] == counts[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "bfloat16"])
def test_a_step_of_training_compiles_to_one_graph_and_has_the_same_gradients(enabled, rng, compiler):
    """In channels_last the group norm on a CPU is a function with its own derivatives, which divides a graph."""
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1).to(memory_format=torch.channels_last)
    x, noise = images(2, rng, channels=1, size=8), torch.randn(2, 1, 8, 8, generator=rng)
    for parameter in net.parameters():  # the last convolution of a new network is zero, and so are most gradients
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    gradients = []
    for compiled in (False, True):
        if compiled:
            net.backbone.compile(dynamic=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = dsm_loss(net, x.to(memory_format=torch.channels_last), sigma=0.3, noise=noise)
        gradients.append(torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True))
    assert len(compiler) == 1
    close = {"rtol": 0.1, "atol": 0.1} if enabled else {"rtol": 1e-4, "atol": 1e-4}
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, **close)


def _raise(error):
    raise error


@torch.no_grad()
def test_without_a_compiler_there_is_a_warning_and_the_result_is_the_same(rng, monkeypatch):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net, x = shared("ncsnv2"), images(2, rng)
    fast = net.inference_copy(compile=True)
    with pytest.warns(UserWarning, match=r"the network runs uncompiled: No working C\+\+ compiler found$"):
        found = fast(x, 0.3)
    monkeypatch.setattr(torch, "compile", lambda *_, **options: lambda *arguments: _raise(AssertionError()))
    with pytest.warns(UserWarning, match=r"the network runs uncompiled: AssertionError$"):
        assert torch.equal(net.inference_copy(compile=True)(x, 0.3), found)
    assert torch.equal(found, net.inference_copy()(x, 0.3))
    assert torch.equal(found, fast(x, 0.3))  # the second call does not warn


@torch.no_grad()
def test_invalid_input_of_a_compiled_copy_raises_the_usual_error(compiler):
    fast = shared("ncsnv2").inference_copy(compile=True)
    with pytest.raises(ValueError, match=r"images \(N, 5, H, W\), got shape \(2, 3, 8, 8\)"):
        fast(torch.zeros(2, 3, SIZE, SIZE), 0.3)


@pytest.mark.parametrize("settings", [{"net": lambda x, sigma: -x}, {"precision": "float32"}])
def test_compile_raises_for_scores_that_cannot_be_compiled(settings):
    with pytest.raises(ValueError, match=r"compile=True needs a ScoreNet.*pass torch.compile\(net\)"):
        AnnealedLangevinSampler(**{"net": shared("ncsnv2"), "schedule": LEVELS, **settings}, compile=True)


# -- Modes and copies


@some_paths
def test_an_inference_copy_works_in_all_modes_of_torch(name, rng):
    """What it keeps from a call in inference mode is used outside, and autocast of the caller does not apply."""
    made = shared(name).inference_copy()
    x, beside = images(2, rng), condition(name, 2, rng)
    expected = shared(name).inference_copy()(x, 0.3, beside)
    with torch.inference_mode():
        made(x, 0.3, beside)
    x = x.clone().requires_grad_()
    made(x, 0.3, beside).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(made(x.detach(), 0.3, beside), expected)


@some_paths
def test_a_copy_that_is_made_in_inference_mode_has_gradients(name, rng, native):
    native(torch.bfloat16)
    with torch.inference_mode():
        made = shared(name).inference_copy()
    x = images(2, rng).requires_grad_()
    made(x, 0.3, condition(name, 2, rng)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_copies_of_an_inference_copy():
    made = shared("ncsnv2").inference_copy()
    sampler = AnnealedLangevinSampler(made, SHORT)
    assert copy.deepcopy(made) is made and copy.deepcopy(sampler).net is made
    with pytest.raises(TypeError, match=r"cannot be pickled\. Pickle the network, and call inference_copy"):
        pickle.dumps(made)
