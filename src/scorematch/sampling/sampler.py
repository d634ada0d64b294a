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
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_choice, check_count
from scorematch.core.batches import without_history
from scorematch.core.conditions import as_class, class_of_each
from scorematch.core.precision import exact_float32, without_autocast
from scorematch.core.randomness import Generator, as_generator, standard_normal
from scorematch.core.scores import (
    Score,
    attribute,
    device_of,
    evaluating,
    has_inference_copy,
    inference_copy_of,
    middle_of,
)
from scorematch.noise import NoiseSchedule, check_schedule, schedule_of
from scorematch.restoration.method import Restoration
from scorematch.restoration.methods import Restore, restoration
from scorematch.restoration.observation import Observation
from scorematch.sampling.chain import Chain, FiniteCheck, Generators, Run

Precision = Literal["auto", "float32"]

# The largest number of values in one network call by default: those of 1,337 MNIST digits, 341 CIFAR-10 images or 5 RGB
# images of 256 x 256 pixels.
_BATCH_VALUES = 2**20


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
            ``scorematch.restoration.methods``.
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
        return own if levels in (None, len(own)) else own.without_gaps(levels)

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
        self, x: Tensor, run: Run, noise: Callable[[Tensor], Tensor], progress: bool
    ) -> Iterator[tuple[Tensor, float]]:
        with _without_gradients(), without_autocast():
            net = self._inference_net()
        path = None if self.draws_noise else (x - middle_of(self.net)) / self.schedule.sigma_max
        # Gradients are off and the network is in eval mode only within a step; between two steps of ``iterate`` the
        # caller's modes apply.
        with tqdm(total=len(self), disable=not progress, desc="sampling", unit="call") as bar:
            chain = Chain(net, run, noise if path is None else lambda x: path, bar.update)
            finite = FiniteCheck(self.schedule)
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
    ) -> tuple[Tensor, Run]:
        """The noise to start from (n, ...), float32 on the network's device, and the other arguments of the run."""
        if observation is not None and not isinstance(observation, Observation):
            raise TypeError(
                f"observation must be an Observation, got {type(observation).__name__}. "
                "Write scorematch.restoration.Observation(operator, y)."
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
        return x, Run(
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
        if own is not None and own.data_std is not None:
            deviation = own.data_std
        return restoration(observation, self.restore, deviation**2)

    def _device(self, init: Tensor | None, generators: Generators) -> torch.device:
        """The network's device; for a plain function that of init, or else that of the generator, or else the CPU."""
        one = generators[0] if isinstance(generators, tuple) else generators
        source = one if init is None else init
        return device_of(self.net, "cpu" if source is None else source.device)


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
