r"""The base class of all samplers. It handles the start, noise, batches, observations, progress and final denoising.

A sampler uses a score to turn noise of the highest level into samples of the data. A new sampler overrides ``__len__``,
the number of network calls, and one of

- ``step``, which returns the state at the next lower level, from the state, its score and noise; or
- ``steps``, a generator of states, for samplers that do not make exactly one network call per level.

This class does everything else. Every sampler ends with one step of Tweedie's formula at the lowest level,
:math:`x + \sigma_L^2 s(x, \sigma_L)`, which removes the noise of that level. This noise is not visible, but its removal
changed the FID of NCSNv2 on CIFAR-10 from 31.8 to 10.9.

References:
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling, arXiv:2009.05475.
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.nets.family import as_class, class_of_each
from scorematch.noise import NoiseSchedule
from scorematch.observe import Observation
from scorematch.precision import exact_float32, without_autocast
from scorematch.precondition import Preconditioning
from scorematch.protocol import (
    Score,
    attribute,
    check_schedule,
    check_score,
    device_of,
    evaluating,
    has_inference_copy,
    inference_copy_of,
    middle_of,
    schedule_of,
    without_history,
)
from scorematch.randomness import Generator, as_generator, standard_normal
from scorematch.sampling.restoration import Restoration, Restore, restoration
from scorematch.schema import check_choice, check_count

Precision = Literal["auto", "float32"]
Generators = torch.Generator | tuple[torch.Generator, ...] | None

# The largest number of values in one network call by default: those of 1,337 MNIST digits, 341 CIFAR-10 images or 5 RGB
# images of 256 x 256 pixels.
_BATCH_VALUES = 2**20
# The number of steps between two checks that the state is finite. A check waits for the device.
_CHECK_EVERY = 16


class SamplerOptions(TypedDict, total=False):
    """The options of all samplers; see ``Sampler``."""

    levels: int | None
    sigma_max: float | None
    sigma_min: float | None
    denoise: bool
    clamp: bool
    restore: Restore
    precision: Precision
    compile: bool


class Sampler(ABC):
    """The base class of all samplers, with the methods ``sample`` and ``iterate``.

    ``len(sampler)`` is the number of network calls per image, and ``print(sampler)`` shows the settings.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable. A plain
            function receives sigma as a tensor of shape () on x's device.
        schedule: the noise levels, from high to low; None uses the sampler's default for the levels that the network
            was trained on. They need not be the levels of training.
        levels: the number of noise levels, at least 2, to which the schedule is respaced; None keeps the number.
        sigma_max: the highest noise level, in the units of x, within the range of the schedule; None keeps that of the
            schedule. Without a schedule, the range is that of the network's levels.
        sigma_min: the lowest noise level, below ``sigma_max``, in the same way.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the lowest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: the method that makes samples agree with an observation: "replace", which is "guide" for an operator
            without a gain; "guide"; or "guide-jacobian", which takes about twice as long. See
            ``scorematch.sampling.restoration``.
        precision: "auto" calls the network's inference copy, which is faster and gives statistically the same samples;
            a score without an inference copy is called itself. "float32" calls the network itself, with TF32 turned off
            during the call; net must then not be an inference copy.
        compile: whether to compile the inference copy with ``torch.compile`` at each call of ``sample``. To compile it
            only once, pass ``net.inference_copy(compile=True)`` as net.

    Raises:
        TypeError: if net is not callable, or the schedule or levels have the wrong type.
        ValueError: if an option has an invalid value, a plain function has no schedule, ``sigma_max`` or ``sigma_min``
            is outside the range of the schedule, or ``compile`` is True for a score that has no inference copy or with
            precision "float32".
    """

    draws_noise = True  # if False, every step uses the noise of the start, as the probability flow does

    def __init_subclass__(cls) -> None:
        """Adds the options of ``Sampler`` to the signature of a subclass that passes them on as ``**options``."""
        signature = inspect.signature(cls.__init__)
        own = list(signature.parameters.values())
        if own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            shared = inspect.signature(Sampler.__init__).parameters.values()
            names = {parameter.name for parameter in own}
            added = [p for p in shared if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in names]
            cls.__init__.__signature__ = signature.replace(parameters=[*own[:-1], *added])  # type: ignore[attr-defined]

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        levels: int | None = None,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        denoise: bool = True,
        clamp: bool = True,
        restore: Restore = "replace",
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        if not callable(net):
            raise TypeError(f"net must be a score, called as net(x, sigma), got {type(net).__name__}.")
        self.net = net
        if schedule is None:
            own = schedule_of(net)
            if own is None:
                raise ValueError(
                    "the score has no noise levels of its own: pass a schedule, such as "
                    "NoiseSchedule.geometric(50, 0.01, 232)."
                )
            schedule = self.default_schedule(own.between(sigma_max, sigma_min), levels)
        else:
            check_schedule(schedule)
            schedule = schedule.between(sigma_max, sigma_min)
            schedule = schedule if levels is None else schedule.respaced(levels)
        check_choice("restore", restore, get_args(Restore))
        check_choice("precision", precision, get_args(Precision))
        if compile and (precision == "float32" or not has_inference_copy(net)):
            raise ValueError(
                'compile=True needs a ScoreNet and precision="auto". For any other score, pass torch.compile(net).'
            )
        if precision == "float32" and attribute(net, "is_inference_copy"):
            raise ValueError(
                'precision="float32" needs the network itself, but net is an inference copy. Pass the network.'
            )
        self.schedule = schedule
        self.denoise = denoise
        self.clamp = clamp
        self.restore: Restore = restore
        self.precision = precision
        self.compile = compile

    # -- What a sampler defines ---------------------------------------------------------------------------------------

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The noise levels to use if no schedule is given.

        Args:
            own: the levels that the network was trained on, in the range that the user asked for.
            levels: the number of levels that the user asked for, or None.

        Returns:
            The schedule of the sampler.
        """
        return own if levels in (None, len(own)) else without_gaps(own, levels)

    @abstractmethod
    def __len__(self) -> int:
        """The number of network calls per image."""

    def settings(self) -> list[str]:
        """The settings that ``print(sampler)`` shows in addition to the schedule."""
        return []

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
        """The state at the next lower level.

        Args:
            x: the state (n, ...) at ``sigma``. It must not be written to.
            score: the score of x at ``sigma``. It may be overwritten, for example with the result.
            z: standard normal noise of x's shape.
            sigma: the noise level of x.
            following: the next lower level.

        Returns:
            The state at ``following``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step or steps.")

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields (x, sigma) after every step: the state, which is not written to again, and its noise level.

        The default calls ``step`` once for each pair of neighboring levels.

        Args:
            x: the noise to start from (n, ...), float32.
            chain: the score, the noise and the observation of this run.
        """
        for sigma, following in itertools.pairwise(self.schedule):
            x, score, z = chain(x, sigma)
            x = self.step(x, score, z, sigma, following)
            yield x, following

    def __repr__(self) -> str:
        schedule = self.schedule
        described = f"{len(schedule)} levels {schedule.sigma_max:.3g} -> {schedule.sigma_min:.3g}"
        if len(schedule) == 1:
            described = f"1 level {schedule.sigma_max:.3g}"
        return f"{type(self).__name__}({', '.join([described, *self.settings()])}, {len(self)} network calls)"

    # -- What users call ----------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Tensor | int | None = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: the number of samples; None uses the length of ``init``, ``condition``, ``observation`` or the list of
                generators, or 1 if none of them has one.
            shape: the shape of one sample, without the batch axis; None uses that of ``init``, of the observed images,
                or ``net.sample_shape``.

            Rarely needed:

            init: the noisy images to start from, (n, ...); None draws them from N(m, sigma_max^2), where m is the
                middle of the network's value range, or 0 if it has none. It is not modified. With
                ``restore="replace"`` and an observation whose noise is at or above the highest level, it must contain
                y, as a state of ``iterate`` does; for ``ODESampler`` see ``scorematch.sampling.ode``.
            condition: the third argument of the network, (n, ...), or an int, the class of all samples.
            observation: a measurement with which the samples have to agree, of one image for all samples, or of n
                images. The sampler's ``restore`` selects the method.
            generator: the source of all random numbers, a ``torch.Generator`` or an int seed; None is torch's global
                generator. Numbers are drawn on its device. With a list of n generators each sample has its own, and
                does not depend on the other samples.
            noise: a function that takes the state x and returns the noise of a step, standard normal values of x's
                shape, in place of random numbers. It is called once per step, before the score. Samplers that draw no
                noise do not call it.
            batch_size: the number of samples per network call; None is as many as have 2^20 values together, but at
                least 1. The result depends on it only through rounding in the network.
            progress: whether to show a progress bar.

        Returns:
            The samples (n, ...), float32, on the network's device, clamped to its value range if it has one and
            ``clamp`` is True.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the arguments contradict each other, or the shape of a sample is not known.
            RuntimeError: if the state has NaN or infinite values; the message names the level at which that began.
        """
        with _without_gradients():
            x, run = self._start(n, shape, init, condition, observation, generator, batch_size)
            for x, _ in self._run(x, run, _source(noise, run.generator), progress):  # noqa: B007, B020
                pass
        return x if self.denoise else self._result(x, run.restoration)

    def iterate(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Tensor | int | None = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after every step, to watch the sampler or to stop it early.

        Arguments and errors are those of ``sample``; the arguments are checked at the call, before the first step.

        Yields:
            ``(x, sigma)`` after every step: the state (n, ...) and its noise level. If ``denoise`` is True, the last
            pair is the result of ``sample`` with sigma 0. A yielded tensor is never written to again.
        """
        with _without_gradients():
            x, run = self._start(n, shape, init, condition, observation, generator, batch_size)
        return self._run(x, run, _source(noise, run.generator), progress)

    # -- The run ------------------------------------------------------------------------------------------------------

    def _run(
        self, x: Tensor, run: _Run, noise: Callable[[Tensor], Tensor], progress: bool
    ) -> Iterator[tuple[Tensor, float]]:
        with _without_gradients(), without_autocast():
            net = self._inference_net()
        path = None if self.draws_noise else (x - middle_of(self.net)) / self.schedule.sigma_max
        # Gradients are off and the network is in eval mode only within a step; between two steps of ``iterate`` the
        # caller's modes apply.
        with tqdm(total=len(self), disable=not progress, desc="sampling", unit="call") as bar:
            chain = Chain(net, run, noise if path is None else lambda x: path, bar.update)
            finite = _FiniteCheck(self.schedule)
            states, shape = self.steps(x, chain), x.shape
            while True:
                with self._computing(net):
                    state = next(states, None)
                    if state is None:
                        break
                    self._check_state(state, shape)
                    x = state[0]
                    finite.record(x, state[1])
                yield state
            with self._computing(net):
                if self.denoise:
                    x = chain.denoised(x, self.schedule.sigma_min)
                    finite.record(x, self.schedule.sigma_min)
                finite.check()
                if self.denoise:
                    x = self._result(x, run.restoration)
            if self.denoise:
                yield x, 0.0

    def _check_state(self, state: Any, shape: torch.Size) -> None:
        """Checks what ``step`` or ``steps`` of a subclass returned."""
        pair = isinstance(state, tuple) and len(state) == 2
        x = state[0] if pair else state
        if not (pair and isinstance(x, Tensor) and x.shape == shape):
            found = f"shape {tuple(x.shape)}" if pair and isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"step of {type(self).__name__} must return the state, a tensor of the shape of x, {tuple(shape)}, and "
                f"steps must yield pairs of the state and its noise level, got {found}."
            )

    @contextmanager
    def _computing(self, net: Score) -> Iterator[None]:
        exact = exact_float32() if self.precision == "float32" else without_autocast()
        with _without_gradients(), evaluating(net), exact:
            yield

    def _inference_net(self) -> Score:
        """The network, or with precision "auto" its inference copy if it has one, made for one run and not kept."""
        return self.net if self.precision == "float32" else inference_copy_of(self.net, compile=self.compile)

    def _result(self, x: Tensor, restoration: Restoration) -> Tensor:
        x = restoration.finish(x)
        value_range = attribute(self.net, "value_range")
        return x.clamp(*value_range) if self.clamp and value_range is not None else x

    def _start(
        self,
        n: int | None,
        shape: Sequence[int] | None,
        init: Tensor | None,
        condition: Tensor | int | None,
        observation: Observation | None,
        generator: Generator,
        batch_size: int | None,
    ) -> tuple[Tensor, _Run]:
        """The noise to start from (n, ...), float32 on the network's device, and the other arguments of the run."""
        if observation is not None and not isinstance(observation, Observation):
            raise TypeError(
                f"observation must be an Observation, got {type(observation).__name__}. "
                "Write scorematch.observe.Observation(operator, y)."
            )
        condition = as_class(condition)
        if not isinstance(condition, Tensor | int | None) or isinstance(condition, bool):
            raise TypeError(
                f"condition must be a tensor (n, ...) or an int, got {type(condition).__name__}. Write "
                "torch.as_tensor(condition)."
            )
        if init is not None:
            _check_init(init)
        generators = as_generator(generator)
        n = _count(n, init, condition, observation, generators)
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size)
        if isinstance(shape, int):
            raise TypeError(f"shape must be the shape of one sample, such as ({shape},), got {shape!r}.")
        sample_shape = self._sample_shape(shape, init, observation)
        device = self._device(init, generators)
        restoration = self._restoration(observation, device)
        noise: Tensor | None = None
        if init is not None:
            x = without_history(init).to(device, torch.float32)
        else:
            noise = standard_normal((n, *sample_shape), generators, device)
            middle, sigma = middle_of(self.net), self.schedule.sigma_max
            x = restoration.start(middle + sigma * noise, sigma, middle)
        classes: Tensor | None = class_of_each(condition, x)
        values = max(1, math.prod(sample_shape))
        return x, _Run(
            None if classes is None else without_history(classes).to(device),
            restoration,
            max(1, _BATCH_VALUES // values) if batch_size is None else batch_size,
            generators,
            noise if restoration.sigma > 0 else None,
        )

    def _sample_shape(
        self, shape: Sequence[int] | None, init: Tensor | None, observation: Observation | None
    ) -> tuple[int, ...]:
        if init is not None and shape is not None and tuple(shape) != tuple(init.shape[1:]):
            raise ValueError(
                f"shape must be the shape of one sample of init, {tuple(init.shape[1:])}, got {tuple(shape)}. Leave it "
                "out."
            )
        observed = None if observation is None else observation.operator.lift(observation.y).shape[1:]
        found = init.shape[1:] if init is not None else shape
        if found is None:
            found = attribute(self.net, "sample_shape") if observed is None else observed
        if found is None:
            raise ValueError("the shape of a sample is not known: pass shape=, without the batch axis.")
        if observed is not None and tuple(observed) != tuple(found):
            raise ValueError(
                f"the observation must be of images of shape {tuple(found)}, but {observation!r} is of images of shape "
                f"{tuple(observed)}."
            )
        return tuple(found)

    def _restoration(self, observation: Observation | None, device: torch.device) -> Restoration:
        if observation is None:
            return Restoration()
        observation = observation.to(device)
        value_range, needed = attribute(self.net, "value_range"), observation.operator.value_range
        if needed is not None and value_range is not None and tuple(value_range) != needed:
            raise ValueError(
                f"{observation.operator!r} is for images in {needed}, but the network's value_range is "
                f"{tuple(value_range)}."
            )
        if self.clamp and value_range is not None and observation.sigma == 0:
            _warn_of_clamping(observation, value_range)
        # Image data are assumed to have a standard deviation of a quarter of their range, as in the row "karras".
        deviation = 1.0 if value_range is None else (value_range[1] - value_range[0]) / 4
        own = attribute(self.net, "preconditioning")
        if isinstance(own, Preconditioning) and "sigma_data" in own.options:
            deviation = own.options["sigma_data"] / own.units[0]
        return restoration(observation, self.restore, deviation**2)

    def _device(self, init: Tensor | None, generators: Generators) -> torch.device:
        """The network's device; for a plain function that of init, or else that of the generator, or else the CPU."""
        one = generators[0] if isinstance(generators, tuple) else generators
        source = one if init is None else init
        return device_of(self.net, "cpu" if source is None else source.device)


# -- Noise levels -----------------------------------------------------------------------------------------------------


def smallest_ratio(schedule: NoiseSchedule) -> float:
    """The smallest ratio of a level to the one before; 1 for a schedule of one level."""
    return min((low / high for high, low in itertools.pairwise(schedule)), default=1.0)


def without_gaps(own: NoiseSchedule, levels: int) -> NoiseSchedule:
    """A network's own schedule respaced to ``levels``, or a geometric schedule if respacing would leave wider gaps.

    The lowest of the 1,000 levels of a DDPM are far apart: respaced to 50 levels, the last two would differ by a factor
    of eight. A sampler that adds noise would then leave too much of it.
    """
    respaced = own.respaced(levels)
    if len(respaced) == 1:
        return respaced
    even = NoiseSchedule.geometric(own.sigma_max, own.sigma_min, levels)
    return even if smallest_ratio(respaced) < 0.9999 * smallest_ratio(even) else respaced


# -- What the steps of one run use ------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """The checked arguments of one run, except the start, which is kept separately so that it can be freed early."""

    condition: Tensor | None
    restoration: Restoration
    batch_size: int
    generator: Generators
    noise: Tensor | None  # the noise of a start that is drawn, if y has noise


class Chain:
    """The score, the noise and the observation of one run, as ``Sampler.steps`` uses them.

    Most steps begin with ``x, score, z = chain(x, sigma)``, which draws the noise of the step, replaces the observed
    part of the state, and computes the score of the new state.
    """

    def __init__(self, net: Score, run: _Run, noise: Callable[[Tensor], Tensor], count: Callable[[], object]) -> None:
        self._net, self._run, self._noise, self._count = net, run, noise, count
        self._takes_floats = has_inference_copy(net)
        self._sigmas: dict[float, Tensor] = {}
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

        The noise of the observed part is that of the step before, or of the start. With the noise of this step, a step
        from a level above the noise of y to one below it would add the same noise again.
        """
        z = self.noise(x)
        before = self._run.noise if self._z is None else self._z
        x = self.observe(x, sigma, z if before is None else before)
        self._z = z
        return x, z

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape; for a sampler with ``draws_noise = False``, the noise of its start."""
        z = self._noise(x)
        if z.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}.")
        return z.to(x)

    @property
    def observed_sigma(self) -> float:
        """The noise level below which ``observe`` changes nothing; 0 without an observation that has noise.

        From there on the state contains the observation. A step from sigma_i to sigma_{i+1} that adds noise of a larger
        variance than sigma_i^2 - sigma_{i+1}^2 would forget it, unless it stays at its level and uses ``stay``.
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

    def _scores(self, x: Tensor, sigma: float, network: Callable[[slice], Score]) -> Tensor:
        """The score of x, with the function of x and sigma that ``network`` returns for some of its rows."""
        run = self._run
        scores = torch.empty_like(x)
        level = sigma if self._takes_floats else self._tensor(sigma, x)
        for i in range(0, len(x), run.batch_size):
            part = slice(i, i + run.batch_size)
            scores[part] = check_score(run.restoration.score(network(part), x[part], level, part), x[part])
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
        if sigma not in self._sigmas:
            self._sigmas[sigma] = torch.full((), sigma, dtype=x.dtype, device=x.device)
        return self._sigmas[sigma]

    def _for_rows(self, part: slice, function: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
        """A function of x, sigma and the condition as one of x and sigma, for some rows of the condition."""
        condition = self._run.condition
        return function if condition is None else lambda x, sigma: function(x, sigma, condition[part])


class _FiniteCheck:
    """Raises an error if a state has NaN or infinite values, without waiting for the device at every step.

    The number of the first such step is recorded on the device, and read every ``_CHECK_EVERY`` steps.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.sigmas: list[float] = []  # of the state after each step
        self.first: Tensor | None = None  # the first step with NaN or infinity, or the largest int32

    def record(self, x: Tensor, sigma: float) -> None:
        step = len(self.sigmas)
        self.sigmas.append(sigma)
        here = torch.where(torch.isfinite(x).all(), torch.iinfo(torch.int32).max, step)
        self.first = here if self.first is None else torch.minimum(self.first, here)
        if len(self.sigmas) % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        first = torch.iinfo(torch.int32).max if self.first is None else int(self.first)
        if first < len(self.sigmas):
            before, sigma = self.sigmas[first - 1] if first else self.schedule.sigma_max, self.sigmas[first]
            level = min(range(len(self.schedule)), key=lambda i: abs(self.schedule[i] - sigma))
            step = f"after the step from sigma {before:.4g}" if before != sigma else "after a step at this level"
            raise RuntimeError(
                f"the state has NaN or infinite values from level {level} of {len(self.schedule)} on, sigma "
                f"{sigma:.4g}, {step}: the score is wrong there, or the step is too large for it."
            )


def _warn_of_clamping(observation: Observation, value_range: tuple[float, float]) -> None:
    """Warns if observed values are outside the range to which the result is clamped.

    A measurement in other units than the image, such as sums of pixels, is not compared: it does not map an image of
    one value to this value.
    """
    operator, y, top = observation.operator, observation.y, value_range[1]
    seen = torch.ones((), dtype=torch.bool) if operator.seen is None else operator.seen
    seen = seen.to(y.device)
    measured = torch.where(seen, operator.measure(torch.full_like(operator.lift(y), top)), top)
    if not bool(((measured - top).abs() <= 0.02 * (top - value_range[0])).all()):
        return
    low = float(torch.where(seen, y, math.inf).min())
    high = float(torch.where(seen, y, -math.inf).max())
    if low < value_range[0] - 1e-6 or high > value_range[1] + 1e-6:
        warnings.warn(
            f"y has no noise (sigma 0), but its values range from {low:.3g} to {high:.3g}, outside the network's "
            f"value_range {value_range}, to which the result is clamped. Pass the noise level of y, "
            "Observation(operator, y, sigma=...), or create the sampler with clamp=False.",
            stacklevel=5,
        )


def _check_init(init: Tensor) -> None:
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor (n, ...), got {type(init).__name__}. Write torch.as_tensor(init).")
    if not init.is_floating_point():
        raise TypeError(f"init must be floating point, got {init.dtype}. Write init.float().")
    if init.ndim < 2:
        raise ValueError(f"init must be a batch (n, ...), got shape {tuple(init.shape)}.")
    if not bool(torch.isfinite(init).all()):
        raise ValueError("init must be finite, got NaN or infinite values.")


def _count(
    n: int | None,
    init: Tensor | None,
    condition: Tensor | int | None,
    observation: Observation | None,
    generators: Generators,
) -> int:
    """The number of samples; all arguments must agree on it."""
    counts = {
        "n": n,
        "init": None if init is None else len(init),
        "condition": len(condition) if isinstance(condition, Tensor) else None,
        "observation": None if observation is None or len(observation) == 1 else len(observation),
        "generator": len(generators) if isinstance(generators, tuple) else None,
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{count} from {name}" for name, count in given.items())
        one = given.get("condition") == 1
        hint = " To draw n samples for one condition, write condition.repeat_interleave(n, 0)." if one else ""
        raise ValueError(f"the arguments disagree on the number of samples: {listed}.{hint}")
    return check_count("n", next(iter(given.values()), 1))


def _source(noise: Callable[[Tensor], Tensor] | None, generators: Generators) -> Callable[[Tensor], Tensor]:
    """The user's noise, or standard normal noise from the generator."""
    if noise is not None:
        return noise
    return lambda x: standard_normal(x.shape, generators, x.device)


# -- Modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _without_gradients() -> Iterator[None]:
    """Turns gradients off, and also inference mode, in which "guide-jacobian" could not compute derivatives."""
    with torch.inference_mode(False), torch.no_grad():
        yield
