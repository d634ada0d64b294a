"""Operators and observations: adjoints, gains, composition, JPEG, and shapes."""

import math
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorematch.data import save_image
from scorematch.evaluation.exact import operator_matrix
from scorematch.restoration import (
    JPEG,
    OPERATORS,
    AveragePool,
    Clip,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Half,
    Hole,
    Mask,
    MotionBlur,
    Observation,
    Operator,
    Quantize,
    Resize,
    Uncrop,
    as_operator,
)
from scorematch.restoration.methods import METHODS, Restore
from scorematch.restoration.replacement import replacement
from tests.helpers import HostReads, NoFloat64, seed

SHAPE = (2, 3, 8, 12)


def random(*shape, number=0):
    return torch.rand(*shape, generator=seed(number), dtype=torch.float64)


def blocks():
    """A mask that is constant on blocks of 2x2 pixels and over the channels."""
    return (random(1, 1, 4, 6) > 0.4).repeat_interleave(2, -1).repeat_interleave(2, -2)


# At least one example of each operator of the package, with its gain.
EXAMPLES = {
    "mask": [
        (Mask(random(3, 8, 12) > 0.5), 1),
        (Mask(random(2, 1, 8, 12) > 0.5), 1),  # a mask for each image
    ],
    "uncrop": [(Uncrop(right=4), 1), (Uncrop(left=1, right=2, top=3, bottom=1), 1)],
    "hole": [(Hole().drawn(torch.zeros(SHAPE), [1, 2]), 1)],
    "half": [(Half().drawn(torch.zeros(SHAPE), [1, 2]), 1)],
    "gray": [(Grayscale(), 0.446966)],
    "pool": [(AveragePool(2), 0.25)],
    "resize": [(Resize(2), None)],
    "blur": [(GaussianBlur(1), None), (GaussianBlur(1, boundary="reflect"), None)],
    "motion": [(MotionBlur(5, 30), None)],
    "fourier": [(FourierLines(4), None)],
    "clip": [(Clip(0.2, 1.0), None)],
    "quantize": [(Quantize(4), None)],
    "jpeg": [(JPEG(20), None)],
}
COMPOSED = {
    "gray of pool": (Grayscale() @ AveragePool(2), 0.1117415),
    "pool of gray": (AveragePool(4) @ Grayscale(), 0.446966 / 16),
    "gray of mask": (Grayscale() @ Mask(random(8, 12) > 0.5), 0.446966),
    "mask of pool": (Mask(random(4, 6) > 0.5) @ AveragePool(2), 0.25),
    "pool of mask of blocks": (AveragePool(2) @ Mask(blocks()), 0.25),
    "mask of pool of mask": (Mask(random(4, 6) > 0.5) @ AveragePool(2) @ Mask(blocks()), 0.25),
    "mask of mask": (Mask(random(8, 12) > 0.3) @ Mask(torch.tensor([True, False, True])[:, None, None]), 1),
    "gray of a mask each": (Grayscale() @ Mask(random(2, 1, 8, 12) > 0.5), 0.446966),
    "pool of JPEG": (AveragePool(2) @ JPEG(20), None),
    "gray of blur": (Grayscale() @ GaussianBlur(1), None),
    "pool of resize": (AveragePool(2) @ Resize(2), None),
    "uncrop of mask": (Uncrop(top=2, left=3) @ Mask(random(8, 12) > 0.5), 1),
    "uncrop of column mask": (Uncrop(top=2, left=3) @ Mask(random(12) > 0.5), 1),
    "pool of uncrop": (AveragePool(2) @ Uncrop(bottom=4), 0.25),
    "gray of pool of column mask": (
        Grayscale() @ AveragePool(2) @ Mask((random(6) > 0.5).repeat_interleave(2)),
        0.11174,
    ),
}
OF_ALL = [*(example for name in OPERATORS for example in EXAMPLES[name]), *COMPOSED.values()]
ALL = [operator for operator, _ in OF_ALL]
LINEAR = [(operator, gain) for operator, gain in OF_ALL if gain is not None]


def test_every_operator_has_examples_here():
    for name, kind in OPERATORS.items():
        made = Mask if name in ("hole", "half") else kind  # these are random
        assert all(type(operator) is made for operator, _ in EXAMPLES[name]), name


# -- Properties of every operator


@pytest.mark.parametrize("operator", ALL, ids=repr)
def test_images_are_measured_independently_and_without_random_numbers(operator):
    x = random(*SHAPE)
    before, state = x.clone(), torch.get_rng_state()
    y = operator.measure(x)
    assert torch.equal(y, operator.measure(x)) and torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert y.dtype == x.dtype and len(operator) in (1, 2)
    for i in range(2):
        own = operator.rows(slice(i, i + 1))
        assert torch.equal(own.measure(x[i : i + 1]), y[i : i + 1])
        assert torch.equal(own.pseudo_inverse(y[i : i + 1]), operator.pseudo_inverse(y)[i : i + 1])
        assert own.gain == operator.gain


@pytest.mark.parametrize("operator", ALL, ids=repr)
def test_pseudo_inverse_and_as_image_return_images_in_the_units_of_x(operator):
    x = random(*SHAPE)
    y = operator.measure(x)
    assert operator.pseudo_inverse(y).shape == operator.as_image(y).shape == x.shape
    gray = Grayscale().measure(x).expand(-1, 3, -1, -1)
    white = operator.as_image(operator.measure(torch.ones(SHAPE)))
    assert white.max() == pytest.approx(1, abs=0.01 if operator.gain is None else 1e-6)  # white stays white
    if isinstance(operator, Grayscale):
        assert torch.equal(operator.as_image(y), gray)
    elif "Grayscale" not in repr(operator):
        assert torch.equal(operator.as_image(y), operator.pseudo_inverse(y))


@pytest.mark.parametrize("operator", ALL, ids=repr)
def test_the_values_that_are_seen_are_those_of_the_masks(operator):
    x = random(*SHAPE)
    seen = operator.seen(operator.measure(x))
    if operator.is_linear:
        a = torch.stack([operator_matrix(operator.rows(slice(i, i + 1)), SHAPE[1:]) for i in range(2)])
        assert torch.equal(seen.flatten(1), (a != 0).any(1))
    else:
        assert seen.all()


@pytest.mark.parametrize("operator", ALL, ids=repr)
def test_an_observation_of_every_operator(operator):
    observation = Observation(operator, operator.measure(random(*SHAPE)), sigma=0.1)
    assert len(observation) == 2
    assert repr(observation).startswith(f"Observation({operator!r}, y ") and repr(observation).endswith("sigma 0.1)")
    moved = observation.to("cpu")
    assert moved.y.dtype == torch.float32 and moved.sigma == 0.1 and repr(moved.operator) == repr(operator)
    assert moved.operator.gain == operator.gain
    assert torch.equal(moved.operator.pseudo_inverse(observation.y), operator.pseudo_inverse(observation.y))


@pytest.mark.parametrize("operator", ALL, ids=repr)
def test_rows_and_to_read_no_values_from_the_device(operator):
    """Properties of a mask are computed once, when the operator is created. JPEG reads its images and nothing else."""
    x = torch.rand(SHAPE, generator=seed())
    with HostReads() as reads:
        part = operator.rows(slice(0, 1)).to("cpu")
        part.pseudo_inverse(part.measure(x[:1]))
    assert reads.count == 0
    if "JPEG" not in repr(operator):
        with NoFloat64():
            y = operator.to("meta").measure(torch.empty(SHAPE, device="meta"))
            assert operator.to("meta").pseudo_inverse(y).shape == SHAPE


# -- Operators with a gain


@pytest.mark.parametrize(("operator", "gain"), OF_ALL, ids=[repr(operator) for operator, _ in OF_ALL])
def test_gains_of_operators(operator, gain):
    assert operator.gain == (None if gain is None else pytest.approx(gain, rel=1e-4))


@pytest.mark.parametrize(("operator", "gain"), LINEAR, ids=[repr(operator) for operator, _ in LINEAR])
def test_the_pseudo_inverse_is_the_adjoint_over_the_gain(operator, gain):
    x = random(*SHAPE)
    y = random(*operator.measure(x).shape, number=1)
    measured, image = operator.measure(x), operator.pseudo_inverse(y)
    # <A x, y> = <x, A^T y> for each image
    inner = (measured * y).flatten(1).sum(1)
    torch.testing.assert_close(inner, operator.gain * (x * image).flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    # A A^T = c I on the observed values, so A pseudo_inverse(A x) = A x
    torch.testing.assert_close(operator.measure(operator.pseudo_inverse(measured)), measured, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("operator", "gain"), LINEAR, ids=[repr(operator) for operator, _ in LINEAR])
def test_the_matrix_of_an_operator_times_its_transpose_is_the_gain(operator, gain):
    """A A^T = c I on the observed values of one image, with the whole matrix A."""
    operator = operator.rows(slice(0, 1))
    shape = SHAPE[1:]
    a = operator_matrix(operator, shape)
    square = a @ a.T
    seen = square.diag() > 0
    torch.testing.assert_close(square, torch.diag(seen.double()) * operator.gain, rtol=1e-12, atol=1e-14)
    if operator.mask is not None:
        y = operator.measure(torch.zeros(1, *shape))
        assert torch.equal(operator.mask.expand(y.shape).flatten(), seen)


@pytest.mark.parametrize(("operator", "gain"), LINEAR, ids=[repr(operator) for operator, _ in LINEAR])
def test_carry_mask_returns_a_mask_that_commutes_with_the_operator(operator, gain):
    """A M x = M' A x. If ``carry_mask`` returns None, A mixes values that M keeps with values that it hides."""
    operator = operator.rows(slice(0, 1))
    x = random(1, *SHAPE[1:], number=2)
    masks = [random(1, 8, 12) > 0.5, random(3, 8, 12, number=1) > 0.5, blocks()[0], random(1, 1, 12) > 0.5]
    for seen in masks:
        carried = operator.carry_mask(seen)
        masked = operator.measure(torch.where(seen, x, 0))
        if carried is not None:
            assert torch.equal(masked, torch.where(carried, operator.measure(x), 0))
        else:
            different = (masked != 0) & ((masked - operator.measure(x)).abs() > 1e-9)
            assert different.any()


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 2, 6)], ids=["signals", "volumes"])
def test_pooling_has_the_gain_of_the_axes_without_an_observation_too(shape):
    x = random(*shape)
    for operator in (AveragePool(2), Uncrop(left=1) @ AveragePool(2)):
        y = operator.measure(x)
        v = random(*y.shape, number=1)
        assert torch.allclose((y * v).sum(), (x * operator.adjoint(v)).sum())
        found = operator.decomposition(x)
        assert torch.allclose(found.sample(found.coefficients(operator.adjoint(v))), operator.adjoint(v))


def test_the_decomposition_of_a_mask_has_the_dtype_of_the_samples():
    assert Mask(blocks()).decomposition(random(*SHAPE)).values.dtype == torch.float64


def test_compositions_that_mix_observed_and_hidden_values_have_no_gain():
    half = torch.arange(8) < 3
    assert (AveragePool(2) @ Mask(half)).gain is None
    channels = torch.tensor([True, False, True])[:, None, None]
    assert (Grayscale() @ Mask(channels)).gain is None
    assert (JPEG(10) @ Grayscale()).gain is None
    assert JPEG(10).gain is None
    assert (AveragePool(3) @ Mask(torch.rand(8, 8) > 0.5)).gain is None  # composing raises no error; measure does


def test_measurements_of_every_operator():
    x = random(*SHAPE)
    mask = random(8, 12) > 0.5
    seen = Mask(mask).measure(x)
    assert seen.shape == x.shape
    assert torch.equal(seen[..., mask], x[..., mask])
    assert (seen[..., ~mask] == 0).all()
    assert torch.equal(Uncrop(left=1, right=2, top=3, bottom=1).measure(x), x[..., 3:7, 1:10])
    torch.testing.assert_close(Grayscale().measure(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(
        Grayscale().measure(torch.eye(3).view(3, 3, 1, 1)).flatten(), torch.tensor([0.299, 0.587, 0.114])
    )
    pooled = torch.nn.functional.avg_pool2d(x, 4)
    torch.testing.assert_close(AveragePool(4).measure(x), pooled)
    volumes, seen = random(2, 3, 4, 6, 8), torch.zeros(4, 6, 8, dtype=torch.bool)
    seen[2:] = True  # an operator of volumes has another gain and another mask than one of images
    torch.testing.assert_close(AveragePool(2).measure(volumes), torch.nn.functional.avg_pool3d(volumes, 2))
    composed = AveragePool(2) @ Mask(seen)
    volume = Observation(composed, composed.measure(volumes)).of_shape((3, 4, 6, 8))
    assert volume.operator.gain == 1 / 8 and torch.equal(volume.mask, seen[::2, ::2, ::2])
    signals = random(2, 3, 8)
    torch.testing.assert_close(AveragePool(4).measure(signals), torch.nn.functional.avg_pool1d(signals, 4))
    assert torch.equal((Grayscale() @ AveragePool(2)).measure(x), Grayscale().measure(AveragePool(2).measure(x)))


@pytest.mark.parametrize(("operator", "gain"), LINEAR, ids=[repr(operator) for operator, _ in LINEAR])
def test_pseudo_inverse_after_measure_is_a_projection(operator, gain):
    x = random(*SHAPE)
    once = operator.pseudo_inverse(operator.measure(x))
    torch.testing.assert_close(operator.pseudo_inverse(operator.measure(once)), once, rtol=1e-12, atol=1e-12)


# -- Text


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_form_examples_and_a_help(name, tmp_path, monkeypatch):
    """The text of an operator gives the operator again, except for a mask, which is read from a picture."""
    monkeypatch.chdir(tmp_path)
    for file in ("observed.png", "missing.png"):
        save_image((random(1, 8, 12) > 0.5).float(), file)
    kind = OPERATORS[name]
    assert kind.form.partition(":")[0] == name and kind.help and kind.examples
    for text in kind.examples:
        operator = as_operator(text)
        assert type(operator) is kind and as_operator(operator) is operator
        if kind is not Mask:
            assert operator.text() == str(operator) == text
            assert repr(as_operator(str(operator))) == repr(operator)


def test_the_page_about_restoration_lists_all_forms_and_methods():
    page = (Path(__file__).parents[1] / "docs" / "restoration.md").read_text(encoding="utf-8")
    assert all(f"| `{kind.form}` | {kind.help} |" in page for kind in OPERATORS.values())
    assert all(f'- `"{name}"`' in page for name in METHODS)


def test_the_names_of_the_methods_for_type_checkers_are_those_of_the_table():
    assert get_args(Restore) == tuple(METHODS)
    assert all(method.help and method.cost for method in METHODS.values())


def test_a_mask_of_a_picture(tmp_path):
    white = random(8, 12) > 0.5
    save_image(white[None].float(), tmp_path / "a,b=1.png")
    for end, mask in [("", white), (",invert", ~white)]:
        made = as_operator(f"mask:{tmp_path}/a,b=1.png{end}")
        assert torch.equal(made.mask, mask) and made.text() is None and str(made) == repr(made)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        as_operator("mask:nothing.png")


def test_the_text_of_a_composition():
    assert repr(as_operator("pool:2 @ gray")) == "AveragePool(2) @ Grayscale()"
    text = "jpeg:10 @ pool:2 @ uncrop:left=1,bottom=2"
    operator = as_operator(text)
    assert str(operator) == text and repr(operator) == "JPEG(10) @ AveragePool(2) @ Uncrop(left=1, bottom=2)"
    x = random(1, 3, 10, 9)
    assert torch.equal(operator.measure(x), JPEG(10).measure(AveragePool(2).measure(x[..., :8, 1:])))
    assert (Grayscale() @ Mask(torch.ones(2, 2) > 0)).text() is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("haze", ValueError, r"operator must be mask:FILE, hole, .* or several of them joined by ' @ ', got 'haze'\."),
        ("", ValueError, "operator must be mask:FILE, .* got ''"),
        ("gray @ haze", ValueError, "got 'haze'"),
        ("pool:2 @", ValueError, "operator must be pool:SIZE, such as pool:4, got 'pool:2 @'"),
        ("gray:2", ValueError, r"operator must be gray, got 'gray:2': it has no arguments\."),
        ("pool", ValueError, "operator must be pool:SIZE, such as pool:4, got 'pool'"),
        ("pool:2,2", ValueError, "operator must be pool:SIZE, such as pool:4, got 'pool:2,2'"),
        ("pool:two", ValueError, r"got 'pool:two': size must be an integer of at least 1, got 'two'\.$"),
        ("pool:0", ValueError, "size must be an integer of at least 1, got 0"),
        ("jpeg:101", ValueError, "got 'jpeg:101': quality must be an integer from 1 to 100, got 101"),
        ("jpeg:7.5", ValueError, "got 'jpeg:7.5': quality must be an integer from 1 to 100, got 7.5"),
        ("uncrop", ValueError, "operator must be uncrop:left=N,right=N,top=N,bottom=N, such as uncrop:right=4, got"),
        ("uncrop:left", ValueError, "got 'uncrop:left': its arguments are left=, right=, top=, bottom=, got 'left'"),
        ("pool:4,5", ValueError, "its arguments are size=, got 5"),
        ("clip:0", ValueError, "got 'clip:0': the argument high is missing"),
        ("motion:1e9,0", ValueError, "length must be a number of more than 0 and at most 10,000, got"),
        ("pool:4,size=5", ValueError, "an argument is missing or named twice"),
        ("uncrop:up=3", ValueError, "got 'uncrop:up=3'"),
        ("uncrop:top=3,top=4", ValueError, "got 'uncrop:top=3,top=4': an argument is missing or named twice"),
        ("uncrop:top=-3", ValueError, "a border must be an integer of at least 0, got -3"),
        ("mask", ValueError, "operator must be mask:FILE, .*got 'mask'"),
        ("mask:,invert", ValueError, "operator must be mask:FILE, .*got 'mask:,invert'"),
        (3, TypeError, "operator must be an Operator of scorematch.restoration or its text, .* got int"),
    ],
)
def test_bad_texts_raise(text, error, message):
    with pytest.raises(error, match=message):
        as_operator(text)


def test_operators_without_a_name_or_with_arguments_that_are_no_numbers_have_no_text():
    assert Sharper().text() is None and str(Sharper()) == "Sharper()"
    assert Sums(4.0, 1 / 4).text() is None and repr(Sums(4.0, 1 / 4)) == "Sums(4.0, 0.25)"
    assert Rotation().text() is None


# -- Random operators


@pytest.mark.parametrize("kind", [Hole, Half])
def test_random_masks_depend_on_the_seed_of_each_image(kind):
    x = torch.zeros(3, 3, 12, 10)
    masks = kind().drawn(x, [5, 6, 5])
    assert masks.mask.shape == (3, 1, 12, 10) and torch.equal(masks.mask[0], masks.mask[2])
    assert torch.equal(kind().drawn(x[:1], [6]).mask[0], masks.mask[1])
    composed = AveragePool(2) @ kind()
    assert torch.equal(composed.drawn(x + 1, [5, 6, 5]).measure(x + 1), AveragePool(2).measure(masks.measure(x + 1)))
    with pytest.raises(ValueError, match=rf"a random mask .* or in Python {kind.__name__}\(\)\.drawn"):
        Observation(kind(), x)


def test_other_operators_are_drawn_as_they_are():
    assert all(operator.drawn(random(*SHAPE), [0, 1]) is operator for operator in ALL)


# -- User-defined operators


class EveryOther(Operator):
    """An operator that observes every other row, with the public interface including ``carry_mask``."""

    gain = 1.0

    def measure(self, x):
        return x[..., ::2, :]

    def pseudo_inverse(self, y):
        x = y.new_zeros(*y.shape[:-2], 2 * y.shape[-2], y.shape[-1])
        x[..., ::2, :] = y
        return x

    def carry_mask(self, mask):
        return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., ::2, :]


class Sharper(Operator):
    """An operator for two images that defines only ``measure``."""

    def measure(self, x):
        return x.square()

    def __len__(self):
        return 2


def test_user_defined_operators_compose_with_masks():
    seen = random(8, 12) > 0.5
    operator = Grayscale() @ EveryOther() @ Mask(seen)
    assert operator.gain == Grayscale.gain and torch.equal(operator.mask, seen[::2])
    x = random(*SHAPE)
    assert torch.equal(operator.measure(x), Grayscale().measure(torch.where(seen, x, 0)[..., ::2, :]))
    once = operator.pseudo_inverse(operator.measure(x))
    torch.testing.assert_close(operator.pseudo_inverse(operator.measure(once)), once, rtol=1e-12, atol=1e-12)
    assert (Sharper() @ Mask(seen)).gain is None  # Sharper has neither carry_mask nor a gain
    assert (EveryOther() @ EveryOther()).gain == 1


class Sums(Operator):
    """Sums of blocks of 2x2 pixels: A A^T = 4 I."""

    def __init__(self, gain, factor):
        self.gain, self.factor = gain, factor

    def measure(self, x):
        return 4 * torch.nn.functional.avg_pool2d(x, 2)

    def pseudo_inverse(self, y):
        return self.factor * y.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.slow
def test_the_gain_fits_for_photographs_of_many_pixels():
    assert Observation(Grayscale(), torch.zeros(1, 1, 2000, 3000)).shape == (3, 2000, 3000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gain_must_be_that_of_measure_and_pseudo_inverse(dtype):
    y = random(2, 3, 4, 6).to(dtype)
    Observation(Sums(4.0, 1 / 4), y)
    for gain, factor in [(1.0, 1.0), (1.0, 1 / 4), (4.0, 1.0)]:
        with pytest.raises(
            ValueError, match=r"the gain and pseudo_inverse of .*Sums.* do not fit measure: .*Correct them"
        ):
            Observation(Sums(gain, factor), y)
    Observation(Sums(None, 1.0), y)  # without a gain, pseudo_inverse may be any image


class Rotation(Operator):
    """A product with an orthogonal matrix: A A^T = I. It records whether products may be computed in TF32."""

    gain = 1

    def __init__(self):
        self.matrix, self.allowed = torch.linalg.qr(random(64, 64).double()).Q.float(), []

    def measure(self, x):
        matmul = torch.backends.cuda.matmul
        new = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 and later
        self.allowed.append(matmul.fp32_precision == "tf32" if new else matmul.allow_tf32)
        return (x.flatten(1) @ self.matrix).reshape(x.shape)

    def pseudo_inverse(self, y):
        return (y.flatten(1) @ self.matrix.T).reshape(y.shape)


def test_the_gain_is_checked_in_full_precision():
    """The errors of TF32 are near the tolerance; those of bfloat16, under autocast, are above that of float32."""
    operator, y = Rotation(), random(2, 1, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        Observation(operator, y)
    operator.allowed.clear()
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(torch.backends.cudnn, "conv") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        Observation(operator, y)
    finally:
        setattr(matmul, name, before)
    assert operator.allowed[0] and not any(operator.allowed[2:])


def test_the_operator_and_y_must_agree_on_the_number_of_images():
    assert (
        len(Observation(Sharper(), torch.rand(1, 3, 8, 8))) == len(Observation(Sharper(), torch.rand(2, 1, 8, 8))) == 2
    )
    with pytest.raises(ValueError, match="y must have 2 images, like the operator, got 3"):
        Observation(Sharper(), torch.rand(3, 1, 8, 8))


def test_the_gain_of_a_batch_of_masks_is_that_of_its_rows():
    """If one of two masks does not fit the blocks of pooling, neither the batch nor any of its rows has a gain."""
    masks = torch.cat([blocks(), random(1, 1, 8, 12) > 0.5])
    together = AveragePool(2) @ Mask(masks)
    assert together.gain is None
    assert [together.rows(slice(i, i + 1)).gain for i in range(2)] == [None, None]
    assert (AveragePool(2) @ Mask(masks[:1])).gain == 0.25


# -- JPEG


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_measurement_equals_that_of_pillow(channels, tmp_path):
    import numpy as np
    from PIL import Image

    image = torch.rand(channels, 24, 33, generator=torch.Generator().manual_seed(0))
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy().squeeze()
    Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=20)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "image.jpg"))).view(24, 33, channels).permute(2, 0, 1)
    assert torch.equal(JPEG(20).measure(image[None])[0], expected / 255)


def test_jpeg_loses_less_at_a_higher_quality():
    x = torch.nn.functional.interpolate(torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), 32)
    errors = [float((JPEG(quality).measure(x) - x).square().mean()) for quality in (1, 10, 50, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < 1e-3 < errors[0]


def test_jpeg_compresses_images_separately_and_clamps_them():
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = JPEG(30).measure(x)
    assert torch.equal(together, torch.cat([JPEG(30).measure(image[None]) for image in x]))
    assert torch.equal(together, JPEG(30).measure(x.clamp(0, 1)))
    assert torch.equal(JPEG(30).pseudo_inverse(together), together)
    assert not JPEG(30).measure(x.requires_grad_()).requires_grad


def test_jpeg_without_pillow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"JPEG needs Pillow: pip install \"scorematch\[images\]\""):
        JPEG(10)


# -- Shapes


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 8), min_size=4, max_size=4))
@settings(deadline=None)
def test_uncrop_of_any_size(n, height, width, borders):
    left, right, top, bottom = borders
    operator = Uncrop(left=left, right=right, top=top, bottom=bottom)
    y = torch.rand(n, 2, height, width)
    x = operator.pseudo_inverse(y)
    assert x.shape == (n, 2, height + top + bottom, width + left + right)
    assert torch.equal(operator.measure(x), y)
    assert float(x.sum()) == pytest.approx(float(y.sum()), rel=1e-5)


def test_masks_accept_data_that_are_not_images():
    known = Mask(torch.tensor([True, False]))
    assert torch.equal(known.measure(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0, 0.0]]))
    assert len(Observation(known, torch.tensor([[1.0, math.nan]]))) == 1
    assert torch.equal(Uncrop(right=1).measure(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0]]))


def test_sizes_may_be_integers_of_numpy(rng):
    two, x = np.int64(2), torch.rand(1, 1, 8, 8, generator=rng)
    for kind, options in ((AveragePool, "size"), (Uncrop, "left"), (JPEG, "quality")):
        a, b = (kind(**{options: number}) for number in (two, 2))
        assert repr(a) == repr(b) and torch.equal(a.pseudo_inverse(a.measure(x)), b.pseudo_inverse(b.measure(x)))


def test_rows_of_a_batch_of_masks():
    masks = torch.rand(4, 1, 8, 12) > 0.5
    operator = Grayscale() @ Mask(masks)
    assert len(operator) == 4
    x = torch.rand(4, 3, 8, 12)
    assert torch.equal(operator.rows(slice(1, 3)).measure(x[1:3]), operator.measure(x)[1:3])
    assert Grayscale().rows(slice(1, 3)).measure(x).shape == (4, 1, 8, 12)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("each", [True, False])
def test_a_mask_has_the_axes_of_the_data(shape, each):
    """With the axes of a batch, a mask has one mask for each sample; with one axis less, it is for all samples."""
    n, x = 2, torch.rand(2, *shape)
    masks = torch.rand(n if each else 1, *shape) > 0.5
    for mask in (Mask(masks if each else masks[0]), Uncrop(left=1) @ Mask(masks if each else masks[0])):
        observation = Observation(mask, mask.measure(x)).to("cpu")
        assert len(observation.operator) == (n if each else 1)
        for i in range(n):
            own = observation.operator.rows(slice(i, i + 1))
            assert torch.equal(own.measure(x[i : i + 1]), observation.y[i : i + 1])
            masks_of_all = observation.operator.mask
            assert torch.equal(own.mask, masks_of_all[i : i + 1] if each else masks_of_all)


def test_a_mask_copies_the_callers_tensor():
    seen = torch.ones(4, 4, dtype=torch.bool)
    mask = Mask(seen)
    seen[:] = False
    assert mask.measure(torch.ones(1, 1, 4, 4)).all()


# -- Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mask([[True]]), TypeError, r"must be a bool tensor, .* got list. Write torch.as_tensor\(mask\) > 0.5"),
        (lambda: Mask(torch.rand(4, 4)), TypeError, "must be a bool tensor, .* got torch.float32. Write mask > 0.5"),
        (lambda: Mask([True]), TypeError, "got list"),
        (lambda: Uncrop(left=-1), ValueError, "a border must be an integer of at least 0, got -1"),
        (lambda: Uncrop(top=0.5), TypeError, "a border must be an integer of at least 0, got 0.5"),
        (lambda: AveragePool(0), ValueError, "size must be an integer of at least 1, got 0"),
        (lambda: JPEG(0), ValueError, "from 1 to 100, got 0"),
        (lambda: JPEG(101), ValueError, "from 1 to 100, got 101"),
        (lambda: JPEG(7.5), TypeError, "got 7.5"),
        (
            lambda: Mask(torch.ones(5, 5) > 0).measure(torch.rand(1, 1, 4, 4)),
            ValueError,
            r"\(5, 5\) does not fit images",
        ),
        (lambda: Mask(torch.ones(2, 1, 4, 4) > 0).measure(torch.rand(3, 1, 4, 4)), ValueError, "does not fit"),
        (lambda: Mask(torch.ones(2, 1, 4, 4) > 0).measure(torch.rand(1, 1, 4, 4)), ValueError, "does not fit"),
        (
            lambda: Mask(torch.ones(4, 6) > 0) @ Mask(torch.ones(8, 12) > 0),
            ValueError,
            r"masks of an operator must fit each other, got Mask\(4x6, 100% observed\) @ Mask\(8x12, 100% observed\)",
        ),
        (lambda: GaussianBlur(1e4).measure(torch.rand(1, 1, 4, 4)), ValueError, "kernel of 60001x60001 is too large"),
        (lambda: Uncrop(left=4).measure(torch.rand(1, 1, 4, 4)), ValueError, "larger than the borders .*got 4x4"),
        (
            lambda: Grayscale().measure(torch.rand(1, 1, 4, 4)),
            ValueError,
            r"RGB images \(N, 3, H, W\), got shape \(1, 1, 4, 4\)",
        ),
        (
            lambda: AveragePool(3).measure(torch.rand(1, 1, 4, 4)),
            ValueError,
            "all sides must be multiples of 3, got images of 4x4 pixels",
        ),
        (
            lambda: AveragePool(2).measure(torch.rand(4, 8)),
            ValueError,
            r"AveragePool\(2\) needs images \(N, C, H, W\), got shape \(4, 8\)",
        ),
        (
            lambda: Observation(Uncrop(top=1), torch.rand(4, 8)),
            ValueError,
            r"Uncrop\(top=1\) needs images \(N, C, H, W\), got shape \(4, 8\)",
        ),
        (lambda: JPEG(5).measure(torch.rand(1, 4, 8, 8)), ValueError, r"got shape \(1, 4, 8, 8\)"),
        (
            lambda: Observation(lambda x: x, torch.rand(1, 3, 4, 4)),
            TypeError,
            "operator must be an Operator of scorematch.restoration, got function",
        ),
        (
            lambda: Observation(Grayscale(), torch.rand(1, 3, 4, 4)),
            ValueError,
            r"must have one channel, \(N, 1, H, W\), got shape \(1, 3, 4, 4\)",
        ),
        (
            lambda: Observation(JPEG(5), torch.ones(1, 3, 8, 8).int()),
            TypeError,
            "y must be floating point, got torch.int32. Write y / 255",
        ),
        (
            lambda: Observation(JPEG(5), torch.rand(8)),
            ValueError,
            r"must be a batch \(N, ...\) with at least one sample, got shape \(8,\)",
        ),
        (lambda: Observation(JPEG(5), torch.rand(0, 3, 8, 8)), ValueError, "at least one sample, got shape"),
        (lambda: Observation(JPEG(5), [0.5]), TypeError, "y must be a tensor .* got list. Write torch.as_tensor"),
        (lambda: Grayscale().as_image(torch.rand(1, 3, 4, 4)), ValueError, "must have one channel"),
        (lambda: Observation(JPEG(5), torch.rand(1, 3, 8, 8), sigma=-0.1), ValueError, "must be at least 0, got -0.1"),
        (lambda: Observation(JPEG(5), torch.rand(1, 3, 8, 8), sigma=math.nan), ValueError, "got nan"),
        (
            lambda: Observation(Grayscale(), torch.full((1, 1, 4, 4), math.nan)),
            ValueError,
            "y must be finite where it is observed, got NaN or infinite",
        ),
        (
            lambda: Observation(Mask(torch.ones(3, 4, 4) > 0), torch.rand(1, 1, 4, 4)),
            ValueError,
            r"must have shape \(3, 4, 4\) for each image, .*got \(1, 4, 4\)",
        ),
        (lambda: Observation(Mask(torch.ones(2, 1, 4, 4) > 0), torch.rand(3, 1, 4, 4)), ValueError, "does not fit y"),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_hidden_values_of_y_are_ignored_whatever_an_operator_of_the_user_does():
    class Product(Operator):
        gain, mask = 1.0, torch.tensor([True, False])

        def measure(self, x):
            return x * self.mask

        pseudo_inverse = measure

    for sigma in (0.0, torch.tensor([0.1, 0.2])):
        method = replacement(Observation(Product(), torch.tensor([[0.5, math.nan]]), sigma), 1.0)
        assert torch.equal(method.project(torch.zeros(1, 2), 0.3, torch.zeros(1, 2)), torch.tensor([[0.5, 0.0]]))


def test_hidden_values_of_y_may_be_nan_or_infinite():
    y = torch.tensor([[[[0.5, math.nan], [math.inf, 0.25]]]])
    observation = Observation(Mask(torch.tensor([[True, False], [False, True]])), y)
    assert torch.equal(observation.operator.pseudo_inverse(y), torch.tensor([[[[0.5, 0.0], [0.0, 0.25]]]]))
