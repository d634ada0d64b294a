"""Blur, samples of the Fourier transform, and resizing, against matrices, sums and other implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scorematch.evaluation.exact import operator_matrix
from scorematch.restoration import (
    Blur,
    Fourier,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Mask,
    Matrix,
    MotionBlur,
    Observation,
    Resize,
)
from scorematch.restoration.resize import weights
from tests.helpers import seed

SHAPE = (2, 8, 12)
BOUNDARIES = ("circular", "reflect", "zeros")


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


MASK = random(8, 12) > 0
COILS = torch.complex(random(3, 8, 12, number=1), random(3, 8, 12, number=2))
KERNEL = random(3, 5, number=3)  # not symmetric
IMAGES = [
    *(Blur(KERNEL, boundary) for boundary in BOUNDARIES),
    *(GaussianBlur(1, boundary=boundary) for boundary in BOUNDARIES),
    MotionBlur(5, 30),
    Resize(2),
    Resize(4),
    Fourier(MASK),
    Fourier(MASK, complex=True),
    Fourier(MASK, COILS),
    Fourier(MASK, COILS.real, complex=True),
    FourierLines(3),
    Resize(2) @ GaussianBlur(1, boundary="reflect"),
    Fourier(MASK) @ Mask(random(8, 12, number=4) > 0),
]
SIGNALS = [
    *(Blur(random(5), boundary) for boundary in BOUNDARIES),
    GaussianBlur(1.5),
    Resize(4),
    Fourier(random(12) > 0),
    Resize(3) @ Fourier(random(12) > 0, complex=True),
]


@pytest.mark.parametrize(
    ("operator", "shape"), [*((each, SHAPE) for each in IMAGES), *((each, (2, 12)) for each in SIGNALS)], ids=repr
)
def test_the_adjoint_is_the_transposed_matrix_and_the_operator_equals_its_matrix(operator, shape):
    a, x = operator_matrix(operator, shape), random(2, *shape, number=5)
    y, same = operator.measure(x), Matrix(operator_matrix(operator, shape))
    assert torch.allclose(y.flatten(1), same.measure(x)) and operator.sample_shape(y) == shape
    v = random(*y.shape, number=6)
    assert torch.allclose(operator.adjoint(v, shape).flatten(1), v.flatten(1) @ a)
    Observation(operator, y)  # its own checks pass
    if operator.gain is not None:
        seen = (a.square().sum(1) > 0).double()
        assert torch.allclose(a @ a.T, torch.diag(seen) * operator.gain)


# -- Blur


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_blur_is_the_sum_of_the_definition(boundary):
    x = random(1, 1, 5, 7)
    modes = {"circular": "circular", "reflect": "reflect", "zeros": "constant"}
    padded = F.pad(x, (2, 2, 1, 1), modes[boundary])
    expected = F.conv2d(padded, KERNEL.flip(0, 1)[None, None])  # conv2d is a correlation
    assert torch.allclose(Blur(KERNEL, boundary).measure(x), expected)


def test_a_gaussian_kernel_has_its_deviation():
    weights = GaussianBlur(2.5).kernel
    kernel = weights[:, None] * weights
    place = torch.arange(len(kernel)) - len(kernel) // 2
    assert float(kernel.sum()) == pytest.approx(1) and torch.allclose(kernel, kernel.T)
    # A Gaussian that ends at three deviations has the variance 1 - 6 p(3) / (P(3) - P(-3)) = 0.9733 of the whole one.
    assert float((kernel.sum(1) * place**2).sum()) == pytest.approx(0.9733 * 2.5**2, rel=0.02)
    deltas = GaussianBlur(2.5).measure(torch.eye(1, 24 * 24).double().view(1, 1, 24, 24))
    assert torch.allclose(deltas.roll((8, 8), (-2, -1))[0, 0, :17, :17], kernel)


def test_motion_is_the_mean_over_a_segment():
    assert torch.allclose(MotionBlur(5).kernel, torch.full((1, 5), 0.2).double())
    assert torch.allclose(MotionBlur(4, 90).kernel.flatten(), torch.tensor([1, 2, 2, 2, 1]).double() / 8)
    diagonal = MotionBlur(3 * math.sqrt(2), 45).kernel
    assert torch.allclose(diagonal, torch.eye(3).double().flip(1) / 3, atol=1e-3)  # up to the right: counterclockwise
    for angle in (10, 77, 130):
        kernel = MotionBlur(9, angle).kernel
        assert float(kernel.sum()) == pytest.approx(1) and torch.allclose(kernel, kernel.flip(0, 1))
        down, right = ((torch.arange(size) - size // 2).double() for size in kernel.shape)
        inertia = float(-(kernel * down[:, None] * right).sum()), float((kernel * right**2).sum())
        # The variance of a segment is L^2 / 12 along its direction; pixels change it by at most that of a pixel.
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        assert inertia == pytest.approx((81 / 12 * c * s, 81 / 12 * c * c), abs=1 / 6)


# -- Fourier


def test_fourier_samples_are_those_of_the_transform():
    x = random(2, 2, 8, 12)
    y = Fourier(MASK).measure(x)
    z = torch.complex(*y.chunk(2, 1))
    assert torch.allclose(z, torch.fft.fft2(x, norm="ortho") * MASK)
    real, imaginary = x[:, :1], x[:, 1:]
    assert torch.allclose(
        Fourier(MASK, complex=True).measure(x)[:, 0],
        (torch.fft.fft2(torch.complex(real, imaginary), norm="ortho") * MASK).real[:, 0],
    )
    coils = torch.complex(*Fourier(MASK, COILS).measure(x).chunk(2, 1))
    assert torch.allclose(coils[:, 2:4], torch.fft.fft2(COILS[1] * x, norm="ortho") * MASK)


def test_all_samples_give_the_image_back():
    x, everywhere = random(2, 2, 8, 12), torch.ones(8, 12, dtype=torch.bool)
    for operator in (Fourier(everywhere), Fourier(everywhere, COILS), Fourier(everywhere, COILS, complex=True)):
        assert torch.allclose(operator.as_image(operator.measure(x)), x)
    assert torch.allclose(FourierLines(1).as_image(FourierLines(1).measure(x)), x)


def test_the_columns_of_fourier_lines():
    seen = FourierLines(4, center=0.25).measure(random(1, 1, 4, 16))[0, 0].abs().sum(0) > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 4, 8, 12, 14, 15]
    only = FourierLines(5, center=0).measure(random(1, 1, 4, 12))[0, 0].abs().sum(0) > 0
    assert only.nonzero().flatten().tolist() == [0, 5, 7]


def test_what_is_not_sampled_may_be_nan():
    y = Fourier(MASK).measure(random(1, *SHAPE))
    observation = Observation(Fourier(MASK), torch.where(MASK, y, math.nan), 0.1)
    assert torch.equal(observation.operator.adjoint(observation.y), Fourier(MASK).adjoint(y))
    composed = Observation(Fourier(MASK) @ GaussianBlur(1), torch.where(MASK, y, math.nan))
    assert torch.equal(composed.mask, MASK)


# -- Resize


def test_resize_is_that_of_torch_and_of_pillow():
    x = torch.rand(1, 3, 32, 48, generator=seed())
    y = Resize(4).measure(x)
    torch.testing.assert_close(y, F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True))
    pillow = Image.fromarray(x[0, 0].numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    torch.testing.assert_close(y[0, 0], torch.from_numpy(np.array(pillow)))
    large = torch.nn.functional.interpolate(y, scale_factor=4, mode="bicubic", antialias=True)
    torch.testing.assert_close(Resize(4).as_image(y), large)


def test_resizing_in_inference_mode_leaves_a_gradient_possible():
    x = torch.rand(1, 1, 10, 10)
    with torch.inference_mode():
        Resize(5).measure(x)
    Resize(5).measure(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, Resize(5).adjoint(torch.ones(1, 1, 2, 2)))


@pytest.mark.parametrize("operator", IMAGES, ids=repr)
def test_bfloat16_is_computed_in_float32(operator):
    x = random(1, *SHAPE).bfloat16()
    y = operator.measure(x)
    assert y.dtype == operator.adjoint(y).dtype == torch.bfloat16
    assert torch.allclose(y.double(), operator.measure(x.double()), atol=0.1)


# -- Bad input

X = torch.zeros(1, 1, 8, 12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Blur([1.0]), TypeError, "kernel must be a floating-point tensor .* got list"),
        (lambda: Blur(torch.ones(3, 3, dtype=int)), TypeError, r"got torch.int64 \(3, 3\)"),
        (lambda: Blur(torch.ones(3, 4)), ValueError, "the sizes of a kernel must be odd, .* got 3x4. Add a row"),
        (lambda: Blur(torch.ones(3) / 0), ValueError, "kernel must be finite"),
        (lambda: Blur(torch.ones(3), "wrap"), ValueError, "boundary must be one of 'circular', .* got 'wrap'"),
        (lambda: Blur(torch.ones(9, 3)).measure(X), ValueError, r"a kernel of 9x3 is too large for samples of shape"),
        (lambda: Blur(torch.ones(3, 3)).measure(X[0, 0]), ValueError, r"too large for samples of shape \(12,\)"),
        (lambda: GaussianBlur(0), ValueError, "deviation must be a number of more than 0 and at most 10,000, got 0"),
        (lambda: GaussianBlur(1e4 + 1), ValueError, "deviation must be a number .* and at most 10,000, got 10001.0"),
        (lambda: GaussianBlur("2"), TypeError, "deviation must be a number of more than 0 and at most 10,000, got '2'"),
        (lambda: MotionBlur(3).measure(X[0]), ValueError, r"needs images \(N, C, H, W\), got shape \(1, 8, 12\)"),
        (lambda: MotionBlur(-1), ValueError, "length must be a number of more than 0 and at most 10,000, got -1"),
        (lambda: MotionBlur(3, math.nan), ValueError, "angle must be a number, got nan"),
        (lambda: Resize(1.5), TypeError, "scale must be an integer of at least 1, got 1.5"),
        (lambda: Resize(5).measure(X), ValueError, r"samples whose sizes are multiples of 5, got shape \(1, 8, 12\)"),
        (lambda: Fourier(MASK.double()), TypeError, r"mask must be a bool tensor .* got torch.float64 \(8, 12\)"),
        (lambda: Fourier(MASK).measure(X[..., 1:]), ValueError, r"needs samples .* with the sizes \(8, 12\), got"),
        (
            lambda: Observation(Fourier(MASK), X),
            ValueError,
            r"must have the real and .* a multiple of 2, got shape \(1",
        ),
        (lambda: Fourier(MASK).adjoint(X.expand(1, 3, 8, 12)), ValueError, r"a multiple of 2, got shape \(1, 3, 8"),
        (lambda: Fourier(MASK, MASK), TypeError, "sensitivities must be a floating-point or complex tensor, got"),
        (lambda: Fourier(MASK, COILS[0]), ValueError, r"must have shape \(K, 8, 12\), like the mask, got \(8, 12\)"),
        (lambda: Fourier(MASK, COILS / 0), ValueError, "sensitivities must be finite"),
        (lambda: Fourier(MASK, complex=True).measure(X), ValueError, "must have an even number of channels, got shape"),
        (lambda: FourierLines(0), ValueError, "every must be an integer from 1 to 16777216, got 0"),
        (lambda: FourierLines(10**20), ValueError, "every must be an integer from 1 to 16777216, got 1"),
        (lambda: FourierLines(2, center=2), ValueError, "center must be a number of at least 0 and at most 1, got 2"),
        (lambda: FourierLines(2).measure(X[0]), ValueError, r"needs images \(N, C, H, W\), got shape \(1, 8, 12\)"),
        (lambda: Grayscale() @ Fourier(MASK).measure(X), TypeError, "unsupported operand"),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize(("n", "m"), [(301, 64), (64, 301), (7, 7), (5, 3), (3, 5), (1, 4), (4, 1)])
def test_the_weights_of_any_sizes_are_those_of_torch(n, m, cubic):
    unit, mode = torch.eye(n, dtype=torch.float64)[None, None], "bicubic" if cubic else "bilinear"
    theirs = F.interpolate(unit, (m, n), mode=mode, antialias=True)[0, 0]
    torch.testing.assert_close(weights(n, m, cubic=cubic), theirs, rtol=0, atol=1e-14)
