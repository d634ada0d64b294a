r"""Sampling along the probability flow, an ordinary differential equation, by Heun's method or multistep methods.

Let :math:`p_\sigma` be the density of the data with noise of level sigma. It is also the density of the solutions of

.. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma) = \frac{x - D(x, \sigma)}{\sigma},
          \qquad D(x, \sigma) = x + \sigma^2 s(x, \sigma),

which is solved from high to low noise. Only the start is random, and the paths are smooth, so that few, large steps are
enough.

**Heun** (two calls per step) takes an Euler step, then repeats it with the mean of the slopes at its two ends. It is of
second order: halving the step divides the error by four.

**DPM-Solver++, UniPC and iPNDM** (one call per step) extrapolate from the denoised images of the last steps; see
``scorematch.sampling.multistep``. They also solve the stochastic equations with the same densities: with eta > 0 a step
removes more noise than it has to, and adds new noise.

**Churn.** The stochastic sampler of Karras et al. adds noise before each step of Heun's method, and the step removes it
together with the noise of the level:

.. math:: \hat\sigma_i = (1 + \gamma)\, \sigma_i, \qquad
          \hat x = x + S_{noise} \sqrt{\hat\sigma_i^2 - \sigma_i^2}\, z, \qquad
          \gamma = \min(S_{churn} / N,\ \sqrt 2 - 1),

at the levels from :math:`S_{min}` to :math:`S_{max}`, and gamma = 0 at all others; N is the number of levels. New noise
corrects errors of earlier steps, as in Langevin dynamics. With the exact score and :math:`S_{noise} = 1` the density at
each level remains :math:`p_\sigma`. :math:`S_{noise}` slightly above 1 compensates for trained networks, which remove
too much noise. The last step, to sigma = 0, adds no noise.

**With an observation.** A path of the flow keeps its noise: if the denoised image does not change, the state is
:math:`D + \sigma z`, where z is the noise of the start. The observed part is therefore replaced at every level by the
observation with this z as its noise, and the result still depends on the start alone. For ``init``, z is the
difference to the middle of the value range, divided by the highest level. If ``init`` contains an image, this is not
noise, and the samples are wrong: use ``restore="guide"``, or a sampler that draws noise. If a sampler draws new noise
at every step, the hidden part can adapt to the observed part; in a flow it cannot, and restoration is worse. If y is
noisy, the observed part of every path is y itself when sigma reaches the noise level of y. Each result then agrees with
y, but the spread of the results is not that of the posterior. With churn, z is the noise of the state too: at each step
it becomes :math:`(\sigma_i z + \sqrt{\hat\sigma_i^2 - \sigma_i^2}\, z_{new}) / \hat\sigma_i`. At levels below the
noise of y the added variance is limited to :math:`\sigma_i^2 - \sigma_{i+1}^2`, that of the reverse diffusion: more
noise would erase the information about y in the state.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 13.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Alg. 1
    and 2.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.conditions import takes_image
from scorematch.core.derived import DerivedScore, Isotropic
from scorematch.core.json_files import native
from scorematch.core.schema import Field
from scorematch.core.scores import Score, attribute, middle_of
from scorematch.noise import NoiseSchedule, schedule_of
from scorematch.restoration.method import Restoration
from scorematch.restoration.observation import Observation
from scorematch.sampling.chain import Chain
from scorematch.sampling.multistep import METHODS, learned_lengths, learned_steps, multistep, plan
from scorematch.sampling.normal import Normal
from scorematch.sampling.sampler import Sampler, SamplerOptions, own_options, restoring_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ODESampler"]

Method = Literal["heun", "dpm-solver++", "unipc", "ipndm"]

_LEVELS = 18  # as in Karras et al. for CIFAR-10
_NO_CHURN = {"churn": 0.0, "churn_min": 0.0, "churn_max": None, "churn_noise": 1.0}


class ODESampler(Sampler):
    """Samples any score along the probability flow, with few network calls.

    Without churn and eta only the start is random: ``sample`` does not call its ``noise_source``, and the same ``init``
    gives the same samples. If no schedule and no option for the levels, the method or new noise is given, the settings
    of this kind that are stored with the network (``SamplerSettings``) are used, if there are any.

    Stored settings are for drawing. To restore, pass ``restore``: the steps are then by default those of
    SDE-DPM-Solver++, ``method="dpm-solver++", eta=1``, of the order that suits the method of restoration, on 50 levels,
    or 30 for "moment-matching" (``scorematch.restoration.methods``). A network that was trained to restore keeps its
    stored settings.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; each step leads from one level to the next. None uses
            ``NoiseSchedule.karras`` between the highest and the lowest level of the network.
        method: "heun", the default, with two network calls per step; or "dpm-solver++", "unipc" or "ipndm", with one.
        sigmas: the noise levels in place of a schedule, as they are stored in ``SamplerSettings``; see
            ``schedules_of_paths``.
        order: the order of a method with one call, the number of denoised images from which a step extrapolates: 1 to 3
            for "dpm-solver++" and "unipc", 1 to 4 for "ipndm". None is 2, and 4 for "ipndm". UniPC also corrects each
            step, so that its error is of one order higher.
        eta: the amount of new noise of "dpm-solver++" and "unipc", from 0 to 10: one number, or a list of one for each
            step. None, or 0, is the probability flow, and 1 the reverse diffusion, as in ancestral sampling; below
            the noise level of an observation it is at most 1. SDE-DPM-Solver++(2M) is ``method="dpm-solver++"`` with
            ``eta=1``, and SA-Solver "unipc" with ``eta`` tau^2.
        coefficients: the numbers of the steps of "dpm-solver++" or "unipc" on the levels ``sigmas``, in place of those
            of the method, which ``learned_settings`` fits to a network.
        data_mean, data_spectrum: the mean and the spectrum of the data, ``data_moments(data, net=net)``. The steps of
            "dpm-solver++" and "unipc" are then exact for normal data with these moments, and fewer steps are needed.
            The start is drawn from their normal distribution with noise of the highest level, which may be as low as
            half a standard deviation of the coarsest structure; see ``scorematch.sampling.normal``. With an observation
            they are not used: choose higher levels.

        Rarely needed:

        churn: S_churn of Karras et al., at least 0, for Heun's method. The noise that is added before a step raises its
            level by the factor 1 + churn / N, where N is the number of levels; values above 0.41 N have the effect of
            0.41 N.
        churn_min: the lowest level at which noise is added, in the units of x: S_min.
        churn_max: the highest level at which noise is added, in the units of x: S_max; None is the highest level. The
            level is raised by up to 41 % before the step, possibly above the range of the network.
        churn_noise: the factor of the added noise, above 0: S_noise.
        **options: the options of every ``Sampler``: ``levels`` (18 by default, if no schedule is given), ``sigma_max``,
            ``sigma_min``, ``denoise``, ``clamp``, ``restore``, ``precision`` and ``compile``.

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value or is not for the method, options contradict each other, or a
            plain function has no schedule.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> ODESampler(score, NoiseSchedule.karras(50, 0.01, 18))
        ODESampler(18 levels 50 -> 0.01, heun, 35 network calls)

    References:
        Karras et al., 2022, arXiv:2206.00364, Alg. 1 and 2. For the other methods see
        ``scorematch.sampling.multistep``.
    """

    _draws = False  # whether it has the stored settings, with which the network draws

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        method: Annotated[
            Method | None, Field(str, choices=get_args(Method)), "the solver; heun without stored settings"
        ] = None,
        sigmas: Annotated[
            Sequence[float] | None,
            Field(list, low=1, high=1000, each=Field(float, above=0, units=1)),
            "the noise levels, from high to low (default: those of Karras et al.)",
        ] = None,
        order: Annotated[
            int | None, Field(int, low=1, high=4), "the order of dpm-solver++ and unipc, up to 3, or of ipndm, up to 4"
        ] = None,
        eta: Annotated[
            float | Sequence[float] | None,
            Field(float, low=0, high=10, or_list=1000),
            "the new noise of dpm-solver++ and unipc; 1 is the reverse diffusion (default: 0)",
        ] = None,
        coefficients: Annotated[
            Sequence[float] | None,
            Field(list, low=1, high=4000, each=Field(float, low=-100, high=100)),
            "the learned numbers of the steps on the levels sigmas",
        ] = None,
        data_mean: Annotated[
            Sequence[float] | None,
            Field(list, low=1, high=1000, each=Field(float, units=1, place=True)),
            "the mean of each channel of the data, for a start at a moderate level",
        ] = None,
        data_spectrum: Annotated[
            Sequence[float] | None,
            Field(list, low=1, high=100_000, each=Field(float, low=0, units=2)),
            "the variances of the data along bands of cosines, for a start at a moderate level",
        ] = None,
        churn: Annotated[float, Field(float, low=0), "with heun: how much new noise the steps add"] = 0.0,
        churn_min: Annotated[float, Field(float, low=0, units=1), "the lowest level at which noise is added"] = 0.0,
        churn_max: Annotated[
            float | None, Field(float, low=0, units=1), "the highest level at which noise is added (default: no limit)"
        ] = None,
        churn_noise: Annotated[float, Field(float, above=0), "the factor of the added noise"] = 1.0,
        **options: Unpack[SamplerOptions],
    ) -> None:
        self.check_options({"sigmas": sigmas})
        churn_max = None if churn_max == math.inf else churn_max
        noise = {"churn": churn, "churn_min": churn_min, "churn_max": churn_max, "churn_noise": churn_noise}
        changed = None if noise == _NO_CHURN else noise
        chosen = (schedule, method, sigmas, order, eta, coefficients, data_mean, data_spectrum, changed)
        restoring = restoring_method(net, options.get("restore"))
        if restoring is not None:
            if method is None and coefficients is None and not churn:
                method, order = "dpm-solver++", restoring.order if order is None else order
                eta = 1.0 if eta is None else eta
            several = len(schedule_of(net) or ()) != 1
            if several and schedule is None and sigmas is None and options.get("levels") is None:
                options["levels"] = restoring.levels
        elif (own := own_options(net, "ode", options, *chosen)) is not None:
            ODESampler.__init__(self, net, **{"method": "heun", **own})
            self._draws = not takes_image(net)
            return
        method = method or "heun"
        if sigmas is not None:
            if schedule is not None:
                raise ValueError(f"{argument('sigmas')} takes the place of the schedule. Leave out one of them.")
            schedule = NoiseSchedule(sigmas)
        super().__init__(net, schedule, **options)
        self.check_options({"method": method, "order": order, "eta": eta, **noise})
        self.coefficients: list[float] | None = native(coefficients)
        if self.coefficients is not None:
            given = {"method": method, "order": order, "eta": eta, "sigmas": sigmas}
            self.check_options({**given, "coefficients": self.coefficients})
            if self.schedule != NoiseSchedule(sigmas or []):
                raise ValueError(
                    f"{argument('coefficients')} are for the levels {argument('sigmas')}. Leave out "
                    f"{argument('levels')}, {argument('sigma_max')} and {argument('sigma_min')}."
                )
        self.check_options({"data_mean": data_mean, "data_spectrum": data_spectrum})
        self.data_mean: list[float] | None = native(data_mean)
        self.data_spectrum: list[float] | None = native(data_spectrum)
        self.eta, steps = native(eta), len(self.schedule) - 1
        self._etas: list[float] = self.eta if isinstance(self.eta, list) else [self.eta or 0.0] * steps
        _check_etas(self._etas, steps)
        self.method, self.order = method, order
        self.churn, self.churn_noise = float(churn), float(churn_noise)
        self.churn_min, self.churn_max = float(churn_min), None if churn_max is None else float(churn_max)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Also checks that the levels descend, and that the order, eta and the churn are for the method."""
        super().check_options(options)
        method, order, eta = options.get("method") or "heun", options.get("order"), native(options.get("eta"))
        if options.get("sigmas") is not None:
            steps = len(NoiseSchedule(options["sigmas"])) - 1
            if isinstance(eta, list) and options.get("levels") is None:
                _check_etas(eta, steps)
        if (method == "heun" and order is not None) or (method in ("heun", "ipndm") and eta is not None):
            raise ValueError(
                f"{argument('order' if eta is None else 'eta')} is not for the method {method!r}. Write "
                f"{argument('method', 'dpm-solver++')}."
            )
        _check_churn(method, {name: options.get(name, value) for name, value in _NO_CHURN.items()})
        if options.get("coefficients") is not None:
            _check_coefficients(options)
        if (options.get("data_mean") is None) != (options.get("data_spectrum") is None):
            raise ValueError(f"pass both {argument('data_mean')} and {argument('data_spectrum')}, or none of them.")
        if order is not None and order > METHODS[method].highest:
            raise ValueError(
                f"{argument('order')} must be at most {METHODS[method].highest} for {method!r}, got {order}."
            )

    @property
    def draws_noise(self) -> bool:  # type: ignore[override]
        """Whether there is churn, or eta is above 0."""
        return self.churn > 0 or any(self._etas)

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The levels of Karras et al. between the highest and the lowest level of the network."""
        if len(own) == 1:
            return own.respaced(1 if levels is None else levels)
        return NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS if levels is None else levels)

    def start(self, z: Tensor) -> Tensor:
        """The states at the highest level, noise or samples of the normal distribution of the noisy data."""
        normal = self._normal(z)
        return super().start(z) if normal is None else normal.start(z, self.schedule.sigma_max)

    def restoration(self, observation: Observation) -> Restoration:
        """The restoration method; the start is then noise, for which the levels of a normal start are too low."""
        if self._draws:
            warnings.warn(
                "the settings of this sampler are those with which the network draws. To restore, write "
                'ODESampler(net, restore="auto").',
                stacklevel=5,
            )
        elif self.data_spectrum is not None:
            warnings.warn(
                f"with an observation the start is noise, and the highest level of this sampler, "
                f"{self.schedule.sigma_max:g}, is for a start from the normal distribution of the data. Write "
                f"{argument('levels', 18)}, or leave out the sampler.",
                stacklevel=5,
            )
        return super().restoration(observation)

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * (2 if self.method == "heun" else 1) + self.denoise

    def settings(self) -> list[str]:
        """The method with its order, and eta or the churn."""
        if self.coefficients is not None:
            return [self.method, "learned"]
        if not self.churn:
            order = [] if self.order is None else [f"order {self.order}"]
            normal = [] if self.data_spectrum is None else ["normal"]
            return [self.method, *order, *([f"eta {self.eta}"] if self.draws_noise else []), *normal]
        high = self.schedule.sigma_max if self.churn_max is None else self.churn_max
        noise = [] if self.churn_noise == 1 else [f"noise {self.churn_noise:g}"]
        return [self.method, f"churn {self.churn:g} at {high:.3g} -> {self.churn_min:.3g}", *noise]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each step of the method, with its level."""
        if self.method == "heun":
            return self._churned(x, chain) if self.churn else _heun(x, chain, self.schedule)
        method, levels = METHODS[self.method], list(self.schedule)
        if self.coefficients is not None:
            steps = learned_steps(levels, self.coefficients)
            return multistep(x, chain, steps if self.denoise else itertools.islice(steps, len(levels) - 1))
        # Below the noise level of an observation, more noise would erase it.
        etas = [
            min(eta, 1) if sigma < chain.observed_sigma else eta
            for eta, sigma in zip(self._etas, levels[1:], strict=True)
        ]
        order, normal = self.order or method.order, self._normal(x)
        if normal is not None and not method.noise and type(chain.restoration) is Restoration:  # nothing is observed
            return normal.multistep(x, chain, method, levels, order, etas)
        return multistep(x, chain, plan(method, levels, order, etas), noise=method.noise)

    def _normal(self, x: Tensor) -> Normal | None:
        if self.data_mean is None or self.data_spectrum is None:
            return None
        measured: Any = self.net
        while isinstance(measured, DerivedScore) and measured.sample_shape is None:  # the tiles of a network
            measured = measured.net
        normal = Normal(x, self.data_mean, self.data_spectrum, attribute(measured, "sample_shape"))
        if isinstance(self.net, Isotropic) and normal.variance > 2 * (own := self.net.units.typical**2):
            raise ValueError(
                f"{argument('data_spectrum')} has the variance {normal.variance:.3g}, and the network {own:.3g}, whose "
                "channels have different units. Write **data_moments(data, net=net)."
            )
        return normal

    def _churned(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        z = (x - middle_of(self.net, x)) / self.schedule.sigma_max  # the noise of the state
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            new, higher = chain.noise(x), sigma * (1 + self._gamma(sigma))
            if sigma_next < chain.observed_sigma:
                higher = min(higher, math.sqrt(2 * sigma**2 - sigma_next**2))
            added = math.sqrt(higher**2 - sigma**2)
            x = torch.add(x, new, alpha=self.churn_noise * added)
            z = (sigma * z).add_(new, alpha=added).div_(higher)
            x = _heun_step(x, z, chain, higher, sigma_next)
            yield x, sigma_next

    def _gamma(self, sigma: float) -> float:
        """The relative amount by which the noise of a level is raised."""
        high = math.inf if self.churn_max is None else self.churn_max
        return min(self.churn / len(self.schedule), math.sqrt(2) - 1) if self.churn_min <= sigma <= high else 0.0


def _check_churn(method: str, noise: Mapping[str, Any]) -> None:
    if noise["churn"] and method != "heun":
        raise ValueError(
            f"{argument('churn')} is for Heun's method, got {noise['churn']!r} with {method!r}. Write "
            f"{argument('method', 'heun')}."
        )
    if noise["churn_min"] >= (math.inf if noise["churn_max"] is None else noise["churn_max"]):
        raise ValueError(
            f"{argument('churn_min')} must be below {argument('churn_max')}, got "
            f"{argument('churn_min', noise['churn_min'])} and {argument('churn_max', noise['churn_max'])}."
        )
    if noise["churn"] == 0 and noise != _NO_CHURN:
        low, high, factor, amount = map(argument, ("churn_min", "churn_max", "churn_noise", "churn"))
        raise ValueError(f"{low}, {high} and {factor} need {amount} above 0. Pass {amount}, or leave them out.")


def _check_coefficients(options: Mapping[str, Any]) -> None:
    name, found = argument("coefficients"), len(options["coefficients"])
    if options.get("sigmas") is None or options.get("method") not in ("dpm-solver++", "unipc"):
        raise ValueError(
            f"{name} need {argument('sigmas')}, and {argument('method', 'dpm-solver++')} or "
            f"{argument('method', 'unipc')}."
        )
    for other in ("order", "eta"):
        if options.get(other) is not None:
            raise ValueError(f"{name} take the place of {argument(other)}. Leave out one of them.")
    levels = len(options["sigmas"])
    if found != (expected := sum(learned_lengths(levels))):
        raise ValueError(f"{name} must have {expected} numbers for {levels} levels, got {found}.")


def _check_etas(etas: Sequence[float], steps: int) -> None:
    if len(etas) != steps:
        raise ValueError(
            f"{argument('eta')} must have one number for each of the {steps} steps from level to level, got "
            f"{len(etas)}."
        )


def _heun_step(x: Tensor, z: Tensor, chain: Chain, sigma: float, sigma_next: float) -> Tensor:
    """The state at the level ``sigma_next``; z is the noise of an observation."""
    x = chain.observe(x, sigma, z)
    score = chain.score(x, sigma)
    end = chain.observe(torch.add(x, score, alpha=(sigma - sigma_next) * sigma), sigma_next, z)
    slope = sigma * score + sigma_next * chain.score(end, sigma_next)
    return torch.add(x, slope, alpha=(sigma - sigma_next) / 2)


def _heun(x: Tensor, chain: Chain, schedule: NoiseSchedule) -> Iterator[tuple[Tensor, float]]:
    for sigma, sigma_next in itertools.pairwise(schedule):
        x = _heun_step(x, chain.noise(x), chain, sigma, sigma_next)
        yield x, sigma_next
