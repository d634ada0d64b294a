"""What the steps of one run of a sampler use: the score, the noise and the observation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.conditions import Parts, rows_of
from scorematch.core.scores import Score, attribute, check_score, has_inference_copy
from scorematch.restoration.method import Restoration

__all__ = ["Chain"]


class Run(NamedTuple):
    """The checked arguments of one run, except the start, which is kept separately so that it can be freed early."""

    condition: Tensor | Parts | None
    restoration: Restoration
    batch_size: int
    noise_source: Callable[[Tensor], Tensor]  # the noise of a step, from the state
    start_noise: Tensor | None  # the noise of a start that is drawn, if y has noise
    offset: Tensor | None  # the start, relative to the denoised image of the state that was drawn, if it is centered
    particles: int  # states for each sample
    uniform_source: Callable[[], Tensor]  # a uniform random number for each sample (n,)
    results: dict[str, Tensor]  # what a sampler returns in addition to the samples


class Chain:
    """The score, the noise and the observation of one run, as ``Sampler.steps`` uses them.

    Most steps begin with ``x, score, z = chain(x, sigma)``, which draws the noise of the step, replaces the observed
    part of the state, and computes the score of the new state.
    """

    def __init__(self, net: Score, run: Run, count: Callable[[], object]) -> None:
        self._net, self._run, self._count = net, run, count
        self._takes_floats = has_inference_copy(net)
        self._level: tuple[float, Tensor] | None = None  # the last one, as a tensor
        self._z: Tensor | None = None  # the noise of the last step or replacement

    def __call__(self, x: Tensor, sigma: float, *, stay: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The state with the observation, its score, and the noise of the step.

        Args:
            x: the state (n, ...).
            sigma: its noise level.
            stay: whether the step stays at its level, as in Langevin dynamics. With an observation the score and the
                noise are then those of the posterior.

        Returns:
            Three tensors of x's shape: the state, its score, and standard normal noise.
        """
        x, z = self.begin(x, sigma)
        score = self.score(x, sigma)
        if stay:
            score, z = self.stay(x, score, z, sigma)
        return x, score, z

    def begin(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The state with the observation, and the noise of the step.

        The observed part gets the noise z of the step before, or of the start. The new z is added by the step itself;
        in the observed part it would be added twice when a step crosses the noise level of y.
        """
        z = self.noise(x)
        before = self._run.start_noise if self._z is None else self._z
        x = self.observe(x, sigma, z if before is None else before)
        self._z = z
        return x, z

    def centered(self, x: Tensor, sigma: float) -> Tensor:
        """The start at the highest level, around the mean of the posterior, for a state x that was drawn there."""
        offset = self._run.offset
        return x if offset is None else offset + torch.add(x, self.score(x, sigma), alpha=sigma**2)

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape; for a sampler with ``draws_noise = False``, the noise of its start."""
        z = self._run.noise_source(x)
        if not isinstance(z, Tensor):
            raise TypeError(f"noise_source must return a tensor, got {type(z).__name__}. Write torch.as_tensor(noise).")
        if z.shape != x.shape:
            raise ValueError(
                f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)} from noise_source."
            )
        return z.to(x)

    @property
    def observed_sigma(self) -> float:
        """The noise level below which ``observe`` changes nothing; 0 without an observation that has noise.

        Below this level the state itself carries the observation, and more noise would erase it: a step from sigma_i to
        sigma_{i+1} may add noise of variance sigma_i^2 - sigma_{i+1}^2 at most. A step that stays at its level uses
        ``stay``.
        """
        return self._run.restoration.sigma

    def observe(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state with its observed part replaced by the observation, with noise sigma z."""
        self._z = z
        return self._run.restoration.project(x, sigma, z)

    def stay(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score and the noise of a step that stays at its level; unchanged without an observation."""
        return self._run.restoration.stay(x, score, z, sigma)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """The score of x (n, ...) at a noise level, one network call per sample. The result may be overwritten."""
        return self._scores(x, sigma, lambda part: self._for_rows(part, self._net))

    @property
    def restoration(self) -> Restoration:
        """The method of this run."""
        return self._run.restoration

    @property
    def particles(self) -> int:
        """The number of states for each sample."""
        return self._run.particles

    @property
    def results(self) -> dict[str, Tensor]:
        """What the sampler returns in addition to the samples."""
        return self._run.results

    def uniform(self) -> Tensor:
        """A uniform random number for each sample, (n,)."""
        return self._run.uniform_source()

    def prior(self, x: Tensor, sigma: float) -> Tensor:
        """The score of the network without the observation."""
        return self._scores(x, sigma, lambda part: self._for_rows(part, self._net), Restoration())

    def prior_and_posterior(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score of the network without the observation, and that of ``score``.

        Both are from the same network call, unless the method calls the network at another state than x.
        """
        prior = torch.empty_like(x)
        missing = set(range(0, len(x), self._run.batch_size))

        def network(part: slice) -> Score:
            inner, own = self._for_rows(part, self._net), x[part].data_ptr()

            def score(x: Tensor, sigma: Any) -> Tensor:
                found = inner(x, sigma)
                if x.data_ptr() == own:
                    prior[part] = check_score(found, x).detach()
                    missing.discard(part.start)
                return found

            return score

        posterior = self._scores(x, sigma, network)
        return self.prior(x, sigma) if missing else prior, posterior

    def score_and_variance(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score, and the variance that the network predicts in the same call; see ``ScoreNet.score_and_variance``.

        With an observation the variance is that of the network without it.
        """
        variance = torch.empty_like(x)

        def network(part: slice) -> Score:
            both = self._for_rows(part, attribute(self._net, "score_and_variance"))

            def score(x: Tensor, sigma: Any) -> Tensor:
                score, share = both(x, sigma)
                variance[part] = check_score(share, x).detach()
                return score

            return score

        return self._scores(x, sigma, network), variance

    def _scores(
        self, x: Tensor, sigma: float, network: Callable[[slice], Score], restoration: Restoration | None = None
    ) -> Tensor:
        """The score of x, with the function of x and sigma that ``network`` returns for some of its rows."""
        run = self._run
        restoration = run.restoration if restoration is None else restoration
        scores = torch.empty_like(x)
        level = sigma if self._takes_floats else self._tensor(sigma, x)
        for i in range(0, len(x), run.batch_size):
            part = slice(i, i + run.batch_size)
            scores[part] = check_score(restoration.score(network(part), x[part], level, part), x[part])
        self._count()
        return scores

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """The denoised image by Tweedie's formula, after the observed part of the state is replaced."""
        # A sampler that takes no step, since it has one level, has replaced nothing yet.
        z = self.noise(x) if self._z is None else self._z
        x, self._z = self._run.restoration.project_last(x, sigma, z), None
        scores = self.score(x, sigma)
        return torch.add(x, scores, alpha=sigma**2, out=scores)

    def _tensor(self, sigma: float, x: Tensor) -> Tensor:
        if self._level is None or self._level[0] != sigma:
            self._level = sigma, torch.full((), sigma, dtype=x.dtype, device=x.device)
        return self._level[1]

    def _for_rows(self, part: slice, function: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
        """A function of x, sigma and the condition as one of x and sigma, for some rows of the condition."""
        condition = self._run.condition
        return function if condition is None else lambda x, sigma: function(x, sigma, rows_of(condition, part))
