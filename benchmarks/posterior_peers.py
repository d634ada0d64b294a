"""The methods of azula and deepinv for ``posterior.py``, with their default settings, where they are installed.

A method is a function of a score, the number of steps, an observation and a seed, and returns one draw for each row of
the observation.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scorematch.restoration import Observation

Draw = Callable[[Any, int, Observation, int], Tensor]


def peers() -> dict[str, Draw]:
    """The methods of the packages that are installed, by name."""
    found: dict[str, Draw] = {}
    if importlib.util.find_spec("azula") is not None:
        found |= {f"azula {name}": seeded(draw) for name, draw in AZULA.items()}
    if importlib.util.find_spec("deepinv") is not None:
        found |= {f"deepinv {name}": seeded(draw) for name, draw in DEEPINV.items()}
    return found


def seeded(draw: Callable[[Any, int, Observation], Tensor]) -> Draw:
    """A method with a seed, that of torch's global generator, from which the packages draw."""

    def run(score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
        torch.manual_seed(seed % 2**32)
        x = draw(score, steps, observation.of_shape(score.sample_shape)).detach()
        return x if score.value_range is None else x.clamp(*score.value_range)

    return run


def denoise(score: Any, x: Tensor, sigma: Any) -> Tensor:
    """The denoised x. Below the lowest level of the network sigma is that level."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32).clamp(min=score.schedule.sigma_min)
    sigma = sigma.flatten()[0] if sigma.numel() in {1, len(x)} else sigma
    return x + sigma**2 * score(x, sigma)


def middle(score: Any) -> float:
    """The middle of the range of the data, around which the noise of the start is."""
    return 0.0 if score.value_range is None else sum(score.value_range) / 2


def pseudo_inverse(observation: Observation, like: Tensor) -> Callable[[Tensor], Tensor]:
    """A^+ y from the gain of the operator, or from the singular values above the noise, as in DDRM."""
    operator = observation.operator
    if operator.gain is not None:
        return operator.pseudo_inverse
    values, _, sample, measured = operator.decomposition(like)
    inverse = torch.where(values > observation.sigma, 1 / values, 0)
    return lambda y: sample(inverse * (y if measured is None else measured(y)))


def strength(score: Any, steps: int) -> float:
    """The strength of DPS: at least its default 1, which is for 1,000 steps and color images of 256x256 pixels.

    With it all steps together go as far, relative to the norm of a sample.
    """
    return max(1.0, 1000 / steps * math.sqrt(math.prod(score.sample_shape) / (3 * 256**2)))


def _need_linear(observation: Observation) -> None:
    if not observation.operator.is_linear:
        raise ValueError("the method needs a pseudo-inverse, singular values or the adjoint of a linear operator.")


class _Rounded(torch.autograd.Function):
    """A measurement without a gradient, with the identity in place of its derivative, as ``Operator.linearized``."""

    @staticmethod
    def forward(x: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        return measure(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


def measurement(score: Any, observation: Observation) -> Callable[[Tensor], Tensor]:
    """The function that measures samples, with a derivative."""
    operator = observation.operator
    with torch.enable_grad():
        derived = operator.measure(torch.zeros(1, *score.sample_shape, requires_grad=True)).requires_grad
    measure = operator.measure if derived else lambda x: _Rounded.apply(x, operator.measure)
    return lambda x: observation.observed(measure(x))


# -- azula ------------------------------------------------------------------------------------------------------------


def in_azula(score: Any) -> Any:
    """The denoiser of azula, of flattened samples (n, d), with the levels of the network."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule

    class Network(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VESchedule(score.schedule.sigma_min, score.schedule.sigma_max)

        def forward(self, x: Tensor, t: Tensor, **options: Any) -> Any:
            found = denoise(score, x.unflatten(1, score.sample_shape), self.schedule(t)[1])
            return DiracPosterior(mean=found.flatten(1))

    return Network()


def flat(score: Any, observation: Observation) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The measurement (n, values of y) and the function that measures flattened samples."""
    measure = measurement(score, observation)
    return observation.y.flatten(1), lambda x: measure(x.unflatten(1, score.sample_shape)).flatten(1)


def run_azula(score: Any, sampler: Any, n: int) -> Tensor:
    """Draws with a sampler of azula, whose linear solvers need flattened samples."""
    x = sampler.init((n, math.prod(score.sample_shape)), mean=torch.tensor(middle(score)))
    return sampler(x).unflatten(1, score.sample_shape)


def mmps(score: Any, steps: int, observation: Observation) -> Tensor:
    """Moment matching with one iteration of GMRES."""
    from azula.guidance.mmps import MMPSDenoiser
    from azula.sample import DDPMSampler

    y, measure = flat(score, observation)
    guided = MMPSDenoiser(in_azula(score), y, measure, lambda v: observation.sigma**2 * v)
    return run_azula(score, DDPMSampler(guided, steps=steps, silent=True), len(observation))


def azula_dps(score: Any, steps: int, observation: Observation) -> Tensor:
    """DPS; its strength is multiplied by the root of the number of images, since its norm is that of the batch."""
    from azula.guidance.dps import DPSSampler

    y, measure = flat(score, observation)
    zeta = strength(score, steps) * math.sqrt(len(y))
    sampler = DPSSampler(in_azula(score), y, measure, zeta, steps=steps, silent=True)
    return run_azula(score, sampler, len(observation))


def pgdm(score: Any, steps: int, observation: Observation) -> Tensor:
    """ΠGDM."""
    from azula.guidance.pgdm import PGDMSampler

    _need_linear(observation)

    y, measure = flat(score, observation)
    of_y = pseudo_inverse(observation, observation.y.new_zeros(1, *score.sample_shape))

    def inverse(y: Tensor) -> Tensor:
        return of_y(y.view_as(observation.y)).flatten(1)

    sampler = PGDMSampler(in_azula(score), y, measure, inverse, steps=steps, silent=True)
    return run_azula(score, sampler, len(observation))


def azula_diffpir(score: Any, steps: int, observation: Observation) -> Tensor:
    """DiffPIR with one iteration of GMRES."""
    from azula.guidance.diffpir import DiffPIRDenoiser
    from azula.sample import DDPMSampler

    _need_linear(observation)  # A is applied to directions
    y, measure = flat(score, observation)
    guided = DiffPIRDenoiser(in_azula(score), y, measure, observation.sigma**2)
    return run_azula(score, DDPMSampler(guided, steps=steps, silent=True), len(observation))


def tds(score: Any, steps: int, observation: Observation) -> Tensor:
    """Twisted sampling, with the draws for one measurement as the particles."""
    from azula.guidance.tds import TDSSampler

    drawn = []
    for _, group in itertools.groupby(range(len(observation)), lambda i: observation.y[i].tolist()):
        rows = list(group)
        y, measure = flat(score, observation.rows(slice(rows[0], rows[-1] + 1)))

        def twist(x: Tensor, sigma: Tensor, y: Tensor = y, measure: Any = measure) -> Tensor:
            deviation = (observation.sigma**2 + sigma**2).sqrt()
            return torch.distributions.Normal(measure(x), deviation).log_prob(y)

        drawn.append(run_azula(score, TDSSampler(in_azula(score), twist, steps=steps, silent=True), len(rows)))
    return torch.cat(drawn)


AZULA = {"MMPS": mmps, "DPS": azula_dps, "PiGDM": pgdm, "DiffPIR": azula_diffpir, "TDS": tds}


# -- deepinv ----------------------------------------------------------------------------------------------------------


class InDeepinv(nn.Module):
    """The denoiser of deepinv, of x - center."""

    def __init__(self, score: Any, center: float = 0.0) -> None:
        super().__init__()
        self._score, self._center = score, center

    def forward(self, x: Tensor, sigma: Any, *ignored: Any, **options: Any) -> Tensor:
        """The denoised images."""
        return denoise(self._score, x.float() + self._center, sigma).to(x) - self._center


def physics(score: Any, observation: Observation) -> Any:
    """The operator as a ``LinearPhysics``, or a ``Physics`` if it is not linear."""
    import deepinv

    operator, shape, measure = observation.operator, score.sample_shape, measurement(score, observation)
    options = {"A": lambda x, **_: measure(x), "noise_model": deepinv.physics.GaussianNoise(observation.sigma)}
    if not operator.is_linear:
        return deepinv.physics.Physics(**options)
    return deepinv.physics.LinearPhysics(
        A_adjoint=lambda y, **_: operator.adjoint(observation.observed(y), shape), **options
    )


def ddrm(score: Any, steps: int, observation: Observation) -> Tensor:
    """DDRM with levels from 1 to 0 in equal steps, in the singular vectors of the operator.

    It starts around 0, which is black in [0, 1]: x is centered at the middle of its range.
    """
    import deepinv
    import numpy as np

    _need_linear(observation)
    n, shape, center = len(observation), score.sample_shape, middle(score)
    like = observation.y.new_zeros(1, *shape)
    y = observation.residual(observation.operator.measure(like + center))
    values, coefficients, sample, measured = observation.operator.decomposition(like)
    count = coefficients(like).shape[1:]
    # DDRM needs the singular vectors of the values that are not observed too: what V leaves out is kept apart.
    known = SimpleNamespace(
        noise_model=SimpleNamespace(sigma=observation.sigma),
        mask=values.expand(1, *count).clone(),
        U_adjoint=lambda y: y.clone() if measured is None else measured(y),
        V=sample,
        V_adjoint=coefficients,
    )
    whole = _completed(known, n, shape, count)
    model = deepinv.sampling.DDRM(InDeepinv(score, center), sigmas=np.linspace(1, 0, steps))
    return model(y, whole) + center


def _completed(known: Any, n: int, shape: Sequence[int], count: Sequence[int]) -> Any:
    """Adds the part of x that V leaves out as coefficients with the singular value 0."""
    size, own = math.prod(shape), math.prod(count)

    def joined(c: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([c.flatten(1), rest.flatten(1)], 1)

    def v(c: Tensor) -> Tensor:
        rest = c[:, own:].view(-1, *shape)
        return known.V(c[:, :own].reshape(-1, *count)) + rest - known.V(known.V_adjoint(rest))

    def v_adjoint(x: Tensor) -> Tensor:
        c = known.V_adjoint(x)
        return joined(c, x - known.V(c))

    return SimpleNamespace(
        noise_model=known.noise_model,
        mask=joined(known.mask, known.mask.new_zeros(1, size)),
        U_adjoint=lambda y: joined(known.U_adjoint(y), y.new_zeros(n, size)),
        V=v,
        V_adjoint=v_adjoint,
    )


def deepinv_diffpir(score: Any, steps: int, observation: Observation) -> Tensor:
    """DiffPIR with lambda 7 and zeta 0.1."""
    import deepinv

    _need_linear(observation)

    fidelity = deepinv.optim.data_fidelity.L2()
    model = deepinv.sampling.DiffPIR(InDeepinv(score), fidelity, sigma=observation.sigma, max_iter=steps)
    return model(observation.y, physics(score, observation))


def deepinv_dps(score: Any, steps: int, observation: Observation) -> Tensor:
    """DPS."""
    import deepinv

    weight = strength(score, steps)
    model = deepinv.sampling.DPS(InDeepinv(score), num_steps=steps, weight=weight, dtype=torch.float32)
    return model(observation.y, physics(score, observation), x_init=(len(observation), *score.sample_shape))


DEEPINV = {"DDRM": ddrm, "DPS": deepinv_dps, "DiffPIR": deepinv_diffpir}
