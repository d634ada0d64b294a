r"""Decoupled sampling (DAPS): the prior and the likelihood take turns, for measurements of any kind.

At each level the sampler goes from the noisy state x to a sample :math:`x_0` of the data given x and y, and from there
to a new state at the next level :math:`\sigma'`,

.. math:: x_0 \sim \mathcal{N}(x_0;\, D, r^2 I)\; p(y \mid x_0), \qquad x' = x_0 + \sigma' z, \qquad
          r^2 = \frac{\sigma^2 v}{\sigma^2 + v},

where D is the denoised image, and v the variance of the data. The normal distribution stands for the data given x; it
is exact for data with the covariance v I, and for other data where :math:`\sigma` is low. With the exact one both steps
are those of a Gibbs sampler for the pair of :math:`x_0` and the state, so that :math:`x_0` has the distribution of the
posterior at every level. The noise of all levels is new, and a state can correct errors of the levels above.

The first step takes one call of the network, without gradients. For a linear operator with known singular vectors
:math:`x_0` is drawn from the product itself (``scorematch.restoration.likelihood``). For others a few proposals of
Hamiltonian Monte Carlo from the :math:`x_0` of the level before follow. They compute the measurement, but not the
network. A measurement is therefore never linearized, unless it has no gradient. Proposals from D instead would not keep
the distribution: a few do not leave a plateau of the likelihood, such as that beyond the limits of ``Clip``.

At a low level :math:`x_0` moves by about :math:`\sigma` only. With too few levels, what y leaves open has the spread of
higher levels.

References:
    Zhang et al., 2024, Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (DAPS),
    arXiv:2407.01521, Alg. 1.
    Wu et al., 2024, Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors (PnP-DM),
    arXiv:2405.18782, Sec. 3 (splitting, with Gibbs steps).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from scorematch.core.conditions import takes_image
from scorematch.core.schema import Field
from scorematch.core.scores import Score, middle_of, variance_of
from scorematch.noise import NoiseSchedule
from scorematch.restoration.likelihood import Likelihood
from scorematch.restoration.observation import Observation
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DecoupledSampler"]

_LEVELS = 60


class DecoupledSampler(Sampler):
    """Decoupled sampling (DAPS): posteriors of nonlinear measurements, without gradients of the network.

    Without an observation it draws from the prior.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; None uses the network's own, or 60 levels in the same range if it
            has more. Levels above 16 standard deviations of the data are of no use.
        proposals: the number of proposals of Hamiltonian Monte Carlo at each level, at least 1.
        **options: the options of every ``Sampler`` except ``restore``: ``levels``, ``sigma_max``, ``sigma_min``,
            ``denoise``, ``clamp``, ``precision`` and ``compile``.

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value, or a plain function has no schedule.

    Example:
        >>> from scorematch.evaluation.exact import Gaussian
        >>> from scorematch.restoration import Clip
        >>> exact = Gaussian([0.0], [[1.0]], schedule=NoiseSchedule.geometric(8, 0.02, 30))
        >>> seen = Observation(Clip(-1, 1), torch.tensor([[1.0]]), sigma=0.1)  # a saturated value
        >>> x = DecoupledSampler(exact).sample(100, observation=seen, generator=0, progress=False)
        >>> bool(x.min() > 0.5), bool(x.max() > 1.5)
        (True, True)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        proposals: Annotated[
            int, Field(int, low=1, high=10_000), "the number of proposals of Hamiltonian Monte Carlo at each level"
        ] = 5,
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        if self.restore != "auto":
            raise ValueError(
                "DecoupledSampler draws from the likelihood itself: leave out the method of restoration, got "
                f"{self.restore!r}."
            )
        self.check_options({"proposals": proposals})
        self.proposals = proposals

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The network's own levels, respaced to ``levels``, or by default to 60 if there are more."""
        return super().default_schedule(own, min(_LEVELS, len(own)) if levels is None else levels)

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def settings(self) -> list[str]:
        """The number of proposals."""
        return [f"{self.proposals} proposals"]

    def restoration(self, observation: Observation) -> Likelihood:
        """The likelihood, from which the data are drawn."""
        if takes_image(self.net):
            raise ValueError(
                "DecoupledSampler is for networks of undamaged data, got one that was trained to restore. Use another "
                "sampler."
            )
        middle = middle_of(self.net, observation.y.new_zeros((1, *(observation.shape or ()))))
        return Likelihood(observation, variance_of(self.net), middle)

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """A draw of the data given x, with noise of the next level."""
        clean = torch.add(x, score, alpha=sigma**2, out=score)
        return clean.add_(z, alpha=math.hypot(self._deviation(sigma), sigma_next))

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state at each level, after a draw of the data given the state before and the observation."""
        likelihood = chain.restoration
        return self._given(x, chain, likelihood) if isinstance(likelihood, Likelihood) else super().steps(x, chain)

    def _given(self, x: Tensor, chain: Chain, likelihood: Likelihood) -> Iterator[tuple[Tensor, float]]:
        clean, angle = None, x.new_full((len(x),), 0.5)
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            z = chain.noise(x)
            center = torch.add(x, chain.prior(x, sigma), alpha=sigma**2)
            clean, angle = likelihood.draw(
                center if clean is None else clean,
                center,
                self._deviation(sigma),
                angle,
                self.proposals,
                chain.noise,
                chain.uniform,
            )
            x = torch.add(clean, z, alpha=sigma_next)
            yield x, sigma_next

    def _deviation(self, sigma: float) -> float:
        """The standard deviation r of the data given a state."""
        return sigma / math.sqrt(1 + sigma**2 / variance_of(self.net))
