import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scorematch.observe import JPEG, AveragePool, Grayscale, Mask, Observation, Uncrop

SHAPE = (2, 3, 8, 12)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(seed=0):
    """A mask that is constant on blocks of 2x2 pixels and over the channels."""
    return (random(1, 1, 4, 6, seed=seed) > 0.4).repeat_interleave(2, -1).repeat_interleave(2, -2)


ISOMETRIC = {
    "mask": (Mask(random(3, 8, 12) > 0.5), 1),
    "a mask each": (Mask(random(2, 1, 8, 12) > 0.5), 1),
    "uncrop one side": (Uncrop(right=4), 1),
    "uncrop four sides": (Uncrop(left=1, right=2, top=3, bottom=1), 1),
    "gray": (Grayscale(), 0.446966),
    "pool": (AveragePool(2), 0.25),
    "gray of pool": (Grayscale() @ AveragePool(2), 0.1117415),
    "pool of gray": (AveragePool(4) @ Grayscale(), 0.446966 / 16),
    "gray of mask": (Grayscale() @ Mask(random(8, 12) > 0.5), 0.446966),
    "mask of pool": (Mask(random(4, 6) > 0.5) @ AveragePool(2), 0.25),
    "pool of mask of blocks": (AveragePool(2) @ Mask(blocks()), 0.25),
    "mask of pool of mask": (Mask(random(4, 6) > 0.5) @ AveragePool(2) @ Mask(blocks()), 0.25),
    "mask of mask": (Mask(random(8, 12) > 0.3) @ Mask(random(3, 1, 1, seed=1) > 0.3), 1),
    "uncrop of mask": (Uncrop(top=2, left=3) @ Mask(random(8, 12) > 0.5), 1),
    "uncrop of column mask": (Uncrop(top=2, left=3) @ Mask(random(12) > 0.5), 1),
    "pool of uncrop": (AveragePool(2) @ Uncrop(bottom=4), 0.25),
    "gray of pool of column mask": (
        Grayscale() @ AveragePool(2) @ Mask((random(6) > 0.5).repeat_interleave(2)),
        0.11174,
    ),
}


@pytest.mark.parametrize("name", ISOMETRIC)
def test_the_lift_is_the_adjoint_over_the_gain(name):
    operator, gain = ISOMETRIC[name]
    assert operator.gain == pytest.approx(gain, rel=1e-4)
    x = random(*SHAPE)
    y = random(*operator.measure(x).shape, seed=1)
    measured, lifted = operator.measure(x), operator.lift(y)
    assert lifted.shape == x.shape
    # <A x, y> = <x, A^T y>, image by image
    inner = (measured * y).flatten(1).sum(1)
    torch.testing.assert_close(inner, operator.gain * (x * lifted).flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    # A A^T = c I on what is seen: A lift A = A
    torch.testing.assert_close(operator.measure(operator.lift(measured)), measured, rtol=1e-12, atol=1e-12)


def test_the_gain_by_the_whole_matrix():
    """A A^T of each operator written out, on what it sees."""
    for name, (operator, _) in ISOMETRIC.items():
        if len(operator) > 1:
            continue
        size = math.prod(SHAPE[1:])
        basis = torch.eye(size, dtype=torch.float64).view(size, *SHAPE[1:])
        matrix = operator.measure(basis).flatten(1).T
        square = matrix @ matrix.T
        seen = square.diag() > 0
        expected = torch.diag(seen.double()) * operator.gain
        torch.testing.assert_close(square, expected, rtol=1e-12, atol=1e-14, msg=name)
        if operator.seen is not None:
            y_shape = operator.measure(basis[:1]).shape
            assert torch.equal(operator.seen.expand(y_shape).flatten(), seen), name


def test_no_gain_where_an_operator_mixes_what_was_seen_with_what_was_not():
    half = torch.arange(8) < 3
    assert (AveragePool(2) @ Mask(half)).gain is None
    channels = torch.tensor([True, False, True])[:, None, None]
    assert (Grayscale() @ Mask(channels)).gain is None
    assert (JPEG(10) @ Grayscale()).gain is None
    assert JPEG(10).gain is None
    assert (AveragePool(3) @ Mask(torch.rand(8, 8) > 0.5)).gain is None  # and measure says why it does not fit


def test_what_is_measured():
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
    assert torch.equal((Grayscale() @ AveragePool(2)).measure(x), Grayscale().measure(AveragePool(2).measure(x)))


def test_measuring_again_after_lifting_changes_nothing():
    x = random(*SHAPE)
    for operator, _ in ISOMETRIC.values():
        once = operator.lift(operator.measure(x))
        torch.testing.assert_close(operator.lift(operator.measure(once)), once, rtol=1e-12, atol=1e-12)


# -- JPEG


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_the_codecs_own(channels, tmp_path):
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


def test_jpeg_keeps_images_apart_and_takes_any_range():
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = JPEG(30).measure(x)
    assert torch.equal(together, torch.cat([JPEG(30).measure(image[None]) for image in x]))
    assert torch.equal(together, JPEG(30).measure(x.clamp(0, 1)))
    assert torch.equal(JPEG(30).lift(together), together)
    assert not JPEG(30).measure(x.requires_grad_()).requires_grad


def test_jpeg_without_pillow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"JPEG needs Pillow: pip install \"scorematch\[images\]\""):
        JPEG(10)


# -- Shapes


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 8), min_size=4, max_size=4))
def test_uncrop_of_any_size(n, height, width, borders):
    left, right, top, bottom = borders
    operator = Uncrop(left=left, right=right, top=top, bottom=bottom)
    y = torch.rand(n, 2, height, width)
    x = operator.lift(y)
    assert x.shape == (n, 2, height + top + bottom, width + left + right)
    assert torch.equal(operator.measure(x), y)
    assert float(x.sum()) == pytest.approx(float(y.sum()), rel=1e-5)


def test_operators_take_points_and_signals_too():
    known = Mask(torch.tensor([True, False]))
    assert torch.equal(known.measure(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0, 0.0]]))
    assert len(Observation(known, torch.tensor([[1.0, math.nan]]))) == 1


def test_rows_of_a_batch_of_masks():
    masks = torch.rand(4, 1, 8, 12) > 0.5
    operator = Grayscale() @ Mask(masks)
    assert len(operator) == 4
    x = torch.rand(4, 3, 8, 12)
    assert torch.equal(operator.rows(slice(1, 3)).measure(x[1:3]), operator.measure(x)[1:3])
    assert Grayscale().rows(slice(1, 3)).measure(x).shape == (4, 1, 8, 12)


def test_a_mask_keeps_no_hold_on_the_callers_tensor():
    seen = torch.ones(4, 4, dtype=torch.bool)
    mask = Mask(seen)
    seen[:] = False
    assert mask.measure(torch.ones(1, 1, 4, 4)).all()


# -- Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mask(torch.rand(4, 4)), TypeError, "must be a bool tensor, .* got torch.float32. Write mask > 0.5"),
        (lambda: Mask([True]), TypeError, "got list"),
        (lambda: Uncrop(left=-1), ValueError, "0 or more, got -1"),
        (lambda: Uncrop(top=0.5), ValueError, "count of pixels, 0 or more, got 0.5"),
        (lambda: AveragePool(0), ValueError, "at least 1, got 0"),
        (lambda: JPEG(0), ValueError, "from 1 to 100, got 0"),
        (lambda: JPEG(101), ValueError, "from 1 to 100, got 101"),
        (lambda: JPEG(7.5), ValueError, "got 7.5"),
        (
            lambda: Mask(torch.ones(5, 5) > 0).measure(torch.rand(1, 1, 4, 4)),
            ValueError,
            r"\(5, 5\) does not fit images",
        ),
        (lambda: Mask(torch.ones(2, 1, 4, 4) > 0).measure(torch.rand(3, 1, 4, 4)), ValueError, "does not fit"),
        (lambda: Mask(torch.ones(2, 1, 4, 4) > 0).measure(torch.rand(1, 1, 4, 4)), ValueError, "does not fit"),
        (lambda: Uncrop(left=4).measure(torch.rand(1, 1, 4, 4)), ValueError, "nothing is left of images of 4x4"),
        (
            lambda: Grayscale().measure(torch.rand(1, 1, 4, 4)),
            ValueError,
            r"RGB images \(N, 3, H, W\), got \(1, 1, 4, 4\)",
        ),
        (lambda: AveragePool(3).measure(torch.rand(1, 1, 4, 4)), ValueError, "3x3 pixels do not fill images of 4x4"),
        (lambda: JPEG(5).measure(torch.rand(1, 4, 8, 8)), ValueError, r"got \(1, 4, 8, 8\)"),
        (
            lambda: Observation(lambda x: x, torch.rand(1, 3, 4, 4)),
            TypeError,
            "operator must be one of scorematch.observe",
        ),
        (lambda: Observation(Grayscale(), torch.rand(1, 3, 4, 4)), ValueError, "a gray y has one channel"),
        (
            lambda: Observation(JPEG(5), torch.ones(1, 3, 8, 8).int()),
            TypeError,
            "floating point tensor, got torch.int32",
        ),
        (lambda: Observation(JPEG(5), torch.rand(8)), ValueError, "must be a batch"),
        (lambda: Observation(JPEG(5), torch.rand(1, 3, 8, 8), sigma=-0.1), ValueError, "must be 0 or more, got -0.1"),
        (lambda: Observation(JPEG(5), torch.rand(1, 3, 8, 8), sigma=math.nan), ValueError, "got nan"),
        (
            lambda: Observation(Grayscale(), torch.full((1, 1, 4, 4), math.nan)),
            ValueError,
            "NaN or infinity where it was",
        ),
        (lambda: Observation(Mask(torch.ones(3, 4, 4) > 0), torch.rand(1, 1, 4, 4)), ValueError, "but y has"),
        (lambda: Observation(Mask(torch.ones(2, 1, 4, 4) > 0), torch.rand(3, 1, 4, 4)), ValueError, "does not fit y"),
    ],
)
def test_bad_input_is_one_clear_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_a_mask_hides_may_be_anything():
    y = torch.tensor([[[[0.5, math.nan], [math.inf, 0.25]]]])
    observation = Observation(Mask(torch.tensor([[True, False], [False, True]])), y)
    assert torch.equal(observation.operator.lift(y), torch.tensor([[[[0.5, 0.0], [0.0, 0.25]]]]))
