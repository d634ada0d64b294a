"""The Fréchet distance of features, with its standard error; see ``metrics``."""

from __future__ import annotations

import warnings
import weakref

import torch

from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.estimate import Estimate
from scorematch.evaluation.rows import BLOCK, check_features, different_dimensions, double
from scorematch.evaluation.statistics import Features, Statistics

_NEGATIVE = 1e-4  # the tolerance for negative eigenvalues of a covariance, relative to the largest
_ROUNDING = 1e-12  # the largest error that may be that of rounding, relative to the variances
_known: weakref.WeakKeyDictionary[Statistics, _Gaussian] = weakref.WeakKeyDictionary()


def frechet_distance(features: Features, reference: Features) -> Estimate:
    r"""The squared Fréchet distance between the Gaussians with the means and covariances of two sets of features.

    The distance is biased upward by about c / N; see ``scorematch.evaluation.metrics``. Its standard error is computed
    by the delta method. Let T be the map that transports the Gaussian of the features to that of the reference, and
    :math:`x_i = f_i - m`. To first order, image i changes the distance by :math:`\psi_i / n`,

    .. math:: \psi_i = 2 (m - m_r)^\top x_i + \lVert x_i \rVert^2 - x_i^\top T x_i - \mathrm{const},

    and the standard error is the standard deviation of :math:`\psi_i`, divided by :math:`\sqrt n`. It holds for n well
    above D. It does not include the bias in n, nor the error of the reference.

    Args:
        features: features of generated images (N, D); or their ``Statistics``, which give no error.
        reference: features or ``Statistics`` of real images. The divisor of covariances is N - 1.

    Returns:
        The distance, at least 0, and its standard error.

    Warns:
        UserWarning: if N is at most D, so that the covariance is singular.

    Raises:
        ValueError: if there are fewer than two features, if the dimensions differ, or if a covariance has negative
            eigenvalues.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
        >>> frechet_distance(a, a + 3).value
        9.0

    References:
        Heusel et al., 2017, arXiv:1706.08500, Eq. 6.
        Rippl, Munk & Sturm, 2016, Limit Laws of the Empirical Wasserstein Distance: Gaussian Distributions,
        arXiv:1507.04090 (the error).
    """
    own, fixed = _gaussian(features), _gaussian(reference)
    _warn_if_singular(own, fixed)
    if len(own.mean) != len(fixed.mean):
        raise different_dimensions(len(own.mean), len(fixed.mean))
    # The sum of the singular values is the trace of the root.
    left, common, _ = torch.linalg.svd(own.factor @ fixed.factor.T, full_matrices=False)
    of_means = float((own.mean - fixed.mean).square().sum())
    distance = max(0.0, of_means + own.variance + fixed.variance - 2 * float(common.sum()))
    if isinstance(features, Statistics):
        return Estimate(distance)
    whiten = own.factor.T / own.factor.square().sum(1)  # x @ whiten has the covariance 1
    parts = []
    for block in check_features(features).split(BLOCK):
        x = double(block).cpu() - own.mean
        change = 2 * x @ (own.mean - fixed.mean) + x.square().sum(1)
        parts.append(change - (x @ whiten @ left).square() @ common)
    error = float(torch.cat(parts).std() / len(features) ** 0.5)
    return Estimate(distance, error if error > _ROUNDING * (own.variance + fixed.variance) else 0.0)


class _Gaussian:
    """The mean and a factor of the covariance of features."""

    def __init__(self, source: Features) -> None:
        given = source if isinstance(source, Statistics) else Moments.of([source])
        self.n = given.n
        # On the CPU: the decomposition of a single matrix is not faster on an accelerator.
        self.mean, covariance = given.mean.cpu().double(), given.covariance.cpu().double()
        self.variance = float(covariance.trace())
        values, vectors = torch.linalg.eigh(covariance)
        largest = float(values[-1])
        if float(values[0]) < -_NEGATIVE * largest:
            raise ValueError(
                f"a covariance must have no negative eigenvalues, but its eigenvalues are from {float(values[0]):.3g} "
                f"to {largest:.3g}."
            )
        kept = values > len(values) * torch.finfo(torch.float64).eps * largest
        self.factor = values[kept].sqrt()[:, None] * vectors[:, kept].T


def _gaussian(source: Features) -> _Gaussian:
    """Returns the Gaussian of a source. That of ``Statistics``, which is often used again, is computed once."""
    if not isinstance(source, Statistics):
        return _Gaussian(source)
    if source not in _known:
        _known[source] = _Gaussian(source)
    return _known[source]


def _warn_if_singular(*gaussians: _Gaussian) -> None:
    for gaussian in gaussians:
        if gaussian.n is not None and gaussian.n <= len(gaussian.mean):
            warnings.warn(
                f"the covariance of {gaussian.n:,} features of {len(gaussian.mean):,} dimensions is singular, and "
                f"the Fréchet distance is strongly biased. Use more than {len(gaussian.mean):,} images, preferably "
                "50,000.",
                stacklevel=3,
            )
