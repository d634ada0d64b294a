"""The singular value decompositions of operators."""

import pytest
import torch

from scorematch.evaluation.exact import operator_matrix
from scorematch.restoration import (
    JPEG,
    AveragePool,
    Blur,
    Fourier,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Linear,
    Mask,
    Matrix,
    MotionBlur,
    Resize,
    Uncrop,
)
from tests.helpers import seed

SHAPE = (3, 4, 4)


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


SUMS = Linear(lambda x: x.cumsum(-1)[..., 1:])
OPERATORS = [
    Mask(random(3, 4, 4) > 0),
    Mask(random(2, 1, 4, 4) > 0),
    Uncrop(right=2, top=1),
    Grayscale() @ AveragePool(2),
    AveragePool(2) @ Mask(torch.arange(4) < 2),
    SUMS,
    SUMS @ Grayscale(),
    GaussianBlur(0.3),
    Blur(random(3, 3)),  # not symmetric: its singular vectors of y are others than those of x
    Blur(random(3, 3), "reflect"),
    Blur(random(3), "zeros") @ Grayscale(),
    MotionBlur(3, 20) @ AveragePool(1),
    Resize(2),
    Resize(2) @ Grayscale(),
    Fourier(random(4, 4) > 0),
    Fourier(random(4, 4) > 0) @ Grayscale(),
    Fourier(random(4, 4) > 0, random(2, 4, 4)),
    FourierLines(3),
    Matrix(random(5, 48)),
    Matrix(random(5, 2) @ random(2, 48)),
    Matrix(random(60, 48)),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_a_decomposition_is_that_of_the_operator(operator):
    x = random(2, *SHAPE)
    y = operator.measure(x)
    svd = operator.decomposition(x)
    c = svd.coefficients(x)
    seen = (svd.values > 0).expand_as(c)
    rotated = y if svd.measured is None else svd.measured(y)
    assert torch.allclose(svd.values * c, rotated)  # S V^T x = U^T A x
    assert torch.allclose(operator.measure(svd.sample(c)), y)  # A V V^T x = A x
    d = torch.where(seen, torch.randn_like(c), 0)
    assert torch.allclose(svd.coefficients(svd.sample(d)), d)  # V^T V = I
    v = operator.measure(random(2, *SHAPE, number=1))
    rotated = v if svd.measured is None else svd.measured(v)
    assert torch.allclose(svd.sample(svd.values * rotated), operator.adjoint(v, SHAPE))  # V S U^T v = A^T v


def test_the_singular_values_are_those_of_the_matrix():
    a = random(5, 2) @ random(2, 48)
    values = Matrix(a).decomposition(random(1, *SHAPE)).values
    assert torch.allclose(values, torch.linalg.svdvals(a), atol=1e-12) and int((values > 0).sum()) == 2
    sums = SUMS.decomposition(random(1, *SHAPE)).values
    assert torch.allclose(sums, torch.linalg.svdvals(operator_matrix(SUMS, SHAPE)))


def test_operators_without_a_cheap_decomposition_have_none():
    assert JPEG(5).decomposition(random(1, *SHAPE)) is None
    for operator in (SUMS, GaussianBlur(1, boundary="zeros"), SUMS @ AveragePool(1), Mask(torch.ones(1) > 0) @ SUMS):
        assert operator.decomposition(torch.zeros(1, 3, 64, 64)) is None


@pytest.mark.parametrize("operator", [GaussianBlur(2), Resize(4), FourierLines(4), Resize(4) @ Grayscale()], ids=repr)
def test_decompositions_of_large_images(operator):
    """They need no matrix of the whole image, and float32 is enough."""
    x = random(1, 3, 64, 64).float()
    svd, y = operator.decomposition(x), operator.measure(x)
    assert torch.allclose(operator.measure(svd.sample(svd.coefficients(x))), y, atol=1e-5)
    assert torch.allclose(svd.values * svd.coefficients(x), svd.measured(y), atol=1e-5)
