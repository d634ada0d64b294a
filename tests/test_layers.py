"""Group norm equals that of torch in values and derivatives, for whole batches and batches in parts; activations."""

import pytest
import torch
import torch.nn.functional as F

from scorematch.nets import group_norm
from scorematch.nets.layers import ConditionalInstanceNormPlus, GroupNorm, InstanceNormPlus


@pytest.fixture(autouse=True, params=["whole", "one by one"])
def _parts(request, monkeypatch):
    """Runs every test with whole batches and with batches in parts."""
    if request.param == "one by one":
        monkeypatch.setattr(group_norm, "_PART_VALUES", 1)


def _norm(groups, channels, dtype):
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def _last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(6, 5), (40, 30)])  # a small and a large image, which use different code
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
def test_values_and_gradients_equal_those_of_torchs_group_norm(size, groups, dtype, tolerance, rng):
    norm = _norm(groups, 8, dtype)
    x = (2 * torch.randn(3, 8, *size, generator=rng) + 5).to(dtype)
    g = torch.randn(3, 8, *size, generator=rng).to(dtype)
    last, first = _last(x).requires_grad_(), x.clone().requires_grad_()
    y, expected = norm(last), F.group_norm(first, groups, norm.weight, norm.bias, norm.eps)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    found = (y, *torch.autograd.grad(y, (last, norm.weight, norm.bias), g))
    right = (expected, *torch.autograd.grad(expected, (first, norm.weight, norm.bias), g))
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_groups_that_do_not_divide_the_channels_raise(groups):
    with pytest.raises(ValueError, match=f"norm_num_groups, must divide its 8 channels, got {groups}"):
        GroupNorm(groups, 8)


def test_group_norm_is_accurate_for_data_with_a_large_mean(rng):
    x = torch.randn(2, 8, 6, 6, generator=rng) + 1000
    norm = _norm(4, 8, torch.float32)
    expected = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(norm(_last(x)).double(), expected, rtol=0, atol=2e-3)  # the error of x itself is 6e-5


@torch.no_grad()
@pytest.mark.parametrize(("size", "rounded"), [((30, 40), 1), ((64, 70), 3)])  # large images are rounded three times
def test_the_error_in_half_precision_is_that_of_its_roundings(size, rounded, rng):
    """One rounding to the 8 bits of bfloat16 has a relative error of at most 2^-8, and 2^-8 / sqrt(3) on average."""
    norm = _norm(4, 8, torch.float32)
    x = (2 * torch.randn(3, 8, *size, generator=rng) + 1).bfloat16()
    level = torch.randn(1, 8, 1, 1, generator=rng)
    y, expected = norm(_last(x), F.silu, level), norm(_last(x.float()), F.silu, level)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    error = (y - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < rounded**0.5 * 2**-8 / 3**0.5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # a warning of torch's forward mode
@pytest.mark.parametrize("size", [(2, 3), pytest.param((32, 32), marks=pytest.mark.slow)])
def test_first_and_second_derivatives_in_reverse_and_forward_mode(size, rng):
    norm = _norm(2, 4, torch.float64)
    x = _last(torch.randn(2, 4, *size, generator=rng, dtype=torch.float64))

    def value(x, weight, bias):
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return y.sin().sum()

    def plain(x, weight, bias):
        return F.group_norm(x, 2, weight, bias, norm.eps).sin().sum()

    inputs = (x, norm.weight.detach(), norm.bias.detach())
    tangents = tuple(torch.randn(t.shape, generator=rng, dtype=t.dtype) for t in inputs)
    tangents = (_last(tangents[0]), *tangents[1:])

    def slope(f):
        gradient = torch.func.grad(f, (0, 1, 2))
        return lambda *inputs: sum((g * t).sum() for g, t in zip(gradient(*inputs), tangents, strict=True))

    for f, g in [(value, plain), (slope(value), slope(plain))]:
        found, right = torch.func.grad(f, (0, 1, 2))(*inputs), torch.func.grad(g, (0, 1, 2))(*inputs)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.jvp(value, inputs, tangents)[1], slope(plain)(*inputs))
    if size == (2, 3):
        arguments = tuple(t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
        assert torch.autograd.gradgradcheck(value, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("size", [(5, 5), (33, 33)])
def test_gradient_of_a_directional_derivative(size, rng):
    norm = _norm(2, 4, torch.float64)
    x, v = (torch.randn(3, 4, *size, generator=rng, dtype=torch.float64) for _ in range(2))

    def slope(f, x, v):
        return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (v,))[1])(x)

    right = slope(lambda x: F.group_norm(x, 2, norm.weight, norm.bias, norm.eps).sin().sum(), x, v)
    torch.testing.assert_close(slope(lambda x: norm(x).sin().sum(), _last(x), _last(v)), right)


def test_group_norm_under_vmap(rng):
    norm = _norm(2, 4, torch.float64)
    x = torch.randn(3, 2, 4, 5, 5, generator=rng, dtype=torch.float64)
    last = torch.stack([_last(one) for one in x])
    expected = torch.stack([norm(one) for one in x])
    for each in (x, last):
        torch.testing.assert_close(torch.vmap(norm)(each), expected)


def test_batched_gradients_of_group_norm(rng):
    norm = _norm(2, 4, torch.float64)
    x = _last(torch.randn(3, 4, 5, 5, generator=rng, dtype=torch.float64)).requires_grad_()
    directions = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    y = norm(x).sin().sum((1, 2, 3))
    (found,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
    for direction, one in zip(directions, found, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, direction, retain_graph=True)[0])


def test_per_sample_gradients_of_group_norm(rng):
    norm = _norm(2, 4, torch.float64)
    x = _last(torch.randn(3, 4, 3, 3, generator=rng, dtype=torch.float64))
    grad = torch.func.grad(
        lambda weight, x: torch.func.functional_call(norm, {"weight": weight}, (x[None],)).sin().sum()
    )
    found = torch.func.vmap(grad, (None, 0))(norm.weight.detach(), x)
    for one, g in zip(x, found, strict=True):
        torch.testing.assert_close(g, grad(norm.weight.detach(), one))


# -- The activation that follows a norm

NORMS = {
    "group": lambda: GroupNorm(4, 8),
    "instance": lambda: InstanceNormPlus(8),
    "conditional": lambda: ConditionalInstanceNormPlus(8, levels=3),
}


def _called(norm, x, level, activation=None):
    """Calls a norm of any kind, with the noise level if it takes one."""
    if isinstance(norm, GroupNorm):
        return norm(x, activation, level)
    return norm(x, torch.tensor(1.0, device=x.device), activation)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_the_activation_does_not_modify_the_callers_tensors(name, dtype, grad, rng):
    norm, level = NORMS[name](), torch.randn(2, 8, 1, 1, generator=rng).to(dtype)
    cases = [(activation, (6, 5)) for activation in (F.silu, F.elu, F.mish, F.relu, F.gelu)]
    for activation, size in [*cases, (F.silu, (64, 64))]:  # small and large images use different code
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 8, *size, generator=rng).to(dtype).contiguous(memory_format=layout)
            before = x.clone(), level.clone()
            with torch.set_grad_enabled(grad):
                y, plain = _called(norm, x, level, activation), _called(norm, x, level)
            assert torch.equal(x, before[0]) and torch.equal(level, before[1])
            assert y.dtype == dtype and y.requires_grad == grad
            tolerance = 1e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(y, activation(plain), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_norms_run_on_devices_without_autocast(name, dtype):
    """For example meta, for which ``torch.is_autocast_enabled`` raises an error."""
    x, level = (torch.empty(2, 8, *size, dtype=dtype, device="meta") for size in [(6, 5), (1, 1)])
    norm = NORMS[name]().to("meta")
    assert _called(norm, x, level, F.silu).dtype == dtype
    with torch.no_grad():
        assert _called(norm, x, level, F.silu).dtype == dtype


def test_under_autocast_group_norm_computes_in_float32(rng):
    """In training half-precision input is not converted to float32, which autograd would store; statistics are."""
    norm = _norm(4, 8, torch.float32)
    x = (torch.randn(3, 8, 6, 5, generator=rng) + 100).bfloat16()
    expected = F.group_norm(x.float(), 4, norm.weight, norm.bias, norm.eps)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x.contiguous(memory_format=layout))
        assert (y - expected).norm() <= 1e-2 * expected.norm()
