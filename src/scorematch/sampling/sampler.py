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

import functools
import inspect
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_origin

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_choice
from scorematch.core.conditions import takes_image
from scorematch.core.derived import isotropic, ratios_of
from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.precision import exact_float32, without_autocast
from scorematch.core.randomness import Generator
from scorematch.core.schema import Field
from scorematch.core.scores import (
    Given,
    Score,
    attribute,
    evaluating,
    has_inference_copy,
    inference_copy_of,
    middle_of,
    variance_of,
)
from scorematch.noise import NoiseSchedule, check_schedule, schedule_of
from scorematch.restoration.method import Restoration
from scorematch.restoration.methods import METHODS, Method, Restore
from scorematch.restoration.observation import Observation
from scorematch.sampling.chain import Chain, Run
from scorematch.sampling.finite import FiniteCheck
from scorematch.sampling.start import start

__all__ = ["Sampler"]


Precision = Literal["auto", "float32"]
_SAME_LEVEL = 1e-4  # relative difference below which a level is one of the network's, rounded


class SamplerOptions(TypedDict, total=False):
    """The options of all samplers; see ``Sampler``."""

    levels: int | None
    sigma_max: float | None
    sigma_min: float | None
    denoise: bool
    clamp: bool
    restore: Restore | None
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
        levels: the number of noise levels, at least 2, to which the schedule is respaced; None keeps the number. The
            network NCSN (the preconditioning "ncsn") knows only the levels that it was trained on: without a schedule,
            each level is replaced by the nearest of these, and a schedule with other levels gives a warning.
        sigma_max: the highest noise level, in the units of x, within the range of the schedule; None keeps that of the
            schedule. Without a schedule, the range is that of the network's levels.
        sigma_min: the lowest noise level, below ``sigma_max``, in the same way.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the lowest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: the method that makes samples agree with an observation. Pass it to a sampler that restores, since the
            steps of ``ODESampler`` depend on it. "auto", also used for None, is "shift" for a linear operator or noise
            with a covariance, and "guide-jacobian" otherwise, or "guide" with a warning for a score without gradients.
            For a network whose condition is the degraded image it is "replace". See ``scorematch.restoration.methods``
            for all methods and their costs.
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
    particles = 1  # states for each sample, if there is an observation

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        levels: Annotated[int | None, Field(int, low=2, high=1_000_000), "the number of noise levels"] = None,
        sigma_max: Annotated[
            float | None, Field(float, low=0, units=1), "the highest noise level, within the network's range"
        ] = None,
        sigma_min: Annotated[
            float | None, Field(float, low=0, units=1), "the lowest noise level, within the network's range"
        ] = None,
        denoise: Annotated[
            bool, Field(bool), "whether to end with one step of Tweedie's formula at the lowest level"
        ] = True,
        clamp: bool = True,
        restore: Restore | None = None,
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        if not callable(net):
            raise TypeError(f"net must be a score, called as net(x, sigma), got {type(net).__name__}.")
        self.net = isotropic(net)  # states have the same noise in all channels
        if schedule is None:
            own = schedule_of(net)
            if own is None:
                raise ValueError(
                    "the score has no noise levels of its own: pass a schedule, such as "
                    "NoiseSchedule.geometric(50, 0.01, 232)."
                )
            schedule = self._default_levels(own.between(sigma_max, sigma_min), levels)
        else:
            check_schedule(schedule)
            schedule = schedule.between(sigma_max, sigma_min)
            schedule = schedule if levels is None else schedule.respaced(levels)
            _warn_between_levels(net, schedule)
        if restore is not None:
            check_choice("restore", restore, METHODS)
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
        self.restore: Restore = restore or "auto"
        self.precision = precision
        self.compile = compile

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError if declared options are out of range, or contradict each other; None may be a default."""
        for name, value in options.items():
            field, _, default = options_of(cls)[name]
            if not (value is default is None or field.fits(native(value))):
                raise ValueError(f"{argument(name)} must be {field}, got {quote(value)}.")

    def restoration(self, observation: Observation) -> Restoration:
        """The restoration method for an observation, on the device of the network and of known shape."""
        # A network that was trained to restore knows y from its condition.
        method = "replace" if self.restore == "auto" and takes_image(self.net) else self.restore
        return METHODS[method].make(observation, variance_of(self.net))

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

    def _default_levels(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """``default_schedule``, with each level replaced by the nearest one of a network that knows no others."""
        schedule, table = self.default_schedule(own, levels), _only_levels(self.net)
        return schedule if table is None else table.nearest(schedule)

    def start(self, z: Tensor) -> Tensor:
        """The states at the highest level from standard normal noise z (n, ...): noise around the middle."""
        return middle_of(self.net, z) + self.schedule.sigma_max * z

    @abstractmethod
    def __len__(self) -> int:
        """The number of network calls per image."""

    def settings(self) -> list[str]:
        """The settings that ``print(sampler)`` shows in addition to the schedule."""
        return []

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The state at the next lower level.

        Args:
            x: the state (n, ...) at ``sigma``. It must not be written to.
            score: the score of x at ``sigma``. It may be overwritten, for example with the result.
            z: standard normal noise of x's shape.
            sigma: the noise level of x.
            sigma_next: the next lower level.

        Returns:
            The state at ``sigma_next``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step or steps.")

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields (x, sigma) after every step: the state, which is not written to again, and its noise level.

        The default calls ``step`` once for each pair of neighboring levels.

        Args:
            x: the noise to start from (n, ...), float32.
            chain: the score, the noise and the observation of this run.
        """
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            x, score, z = chain(x, sigma)
            x = self.step(x, score, z, sigma, sigma_next)
            yield x, sigma_next

    def __repr__(self) -> str:
        schedule = self.schedule
        described = f"{len(schedule)} levels {schedule.sigma_max:.3g} -> {schedule.sigma_min:.3g}"
        if len(schedule) == 1:
            described = f"1 level {schedule.sigma_max:.3g}"
        restore = [] if self.restore == "auto" else [f"restore {self.restore}"]
        settings = ", ".join([described, *self.settings(), *restore])
        return f"{type(self).__name__}({settings}, {len(self)} network calls)"

    # -- What users call ----------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Given = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise_source: Callable[[Tensor], Tensor] | None = None,
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
            condition: the third argument of the network, (n, ...), or an int, the class of all samples, or a dict of
                these for a network that takes several conditions.
            observation: a measurement with which the samples have to agree, of one image for all samples, or of n
                images. The sampler's ``restore`` selects the method.
            generator: the source of all random numbers, a ``torch.Generator`` or an int seed; None is torch's global
                generator. Numbers are drawn on its device. With a list of n generators each sample has its own, and
                does not depend on the other samples.
            noise_source: a function that takes the state x and returns the noise of a step, standard normal values of
                x's shape, in place of random numbers. It is called once per step, before the score, and by
                ``DecoupledSampler`` for each proposal too. Samplers that draw no noise do not call it.
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
        with without_gradients():
            x, run = start(self, n, shape, init, condition, observation, generator, noise_source, batch_size)
            for x, _ in self._run(x, run, progress):  # noqa: B007, B020
                pass
        return self._result(x if self.denoise else run.restoration.finish(x))

    def iterate(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Given = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise_source: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after every step, to watch the sampler or to stop it early.

        Arguments and errors are those of ``sample``; the arguments are checked at the call, before the first step.

        Yields:
            ``(x, sigma)`` after every step: the state (n, ...) and its noise level. If ``denoise`` is True, the last
            pair is the result of ``sample`` with sigma 0. A yielded tensor is never written to again.
        """
        with without_gradients():
            x, run = start(self, n, shape, init, condition, observation, generator, noise_source, batch_size)
        states = self._run(x, run, progress)
        return ((self._in_units(x) if sigma > 0 else self._result(x), sigma) for x, sigma in states)

    # -- The run ------------------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, run: Run, progress: bool) -> Iterator[tuple[Tensor, float]]:
        with without_gradients(), without_autocast():
            # The network, or with precision "auto" its inference copy if it has one, made for one run and not kept.
            net = self.net if self.precision == "float32" else inference_copy_of(self.net, compile=self.compile)
        if not self.draws_noise:
            path = (x - middle_of(self.net, x)) / self.schedule.sigma_max
            run = run._replace(noise_source=lambda x: path)
        total = len(self) + (run.offset is not None)
        with tqdm(total=total, disable=not progress, desc="sampling", unit="call") as bar:
            states = self._states(x, Chain(net, run, bar.update), run.restoration)
            del x  # so that the memory of the start is free after the first step
            yield from _each_within(lambda: self._computing(net), states)

    def _states(self, x: Tensor, chain: Chain, restoration: Restoration) -> Iterator[tuple[Tensor, float]]:
        """The checked state after every step, and the result before it is clamped."""
        finite, shape, sigma = FiniteCheck(self.schedule), x.shape, self.schedule.sigma_max
        for state in self.steps(chain.centered(x, sigma), chain):
            self._check_state(state, torch.Size((shape[0] // chain.particles, *shape[1:])))
            x, sigma = state
            finite.record(x, max(sigma, self.schedule.sigma_min))
            if sigma > 0 or not self.denoise:
                yield state
        if self.denoise and sigma > 0:
            x = chain.denoised(x, self.schedule.sigma_min)
            finite.record(x, self.schedule.sigma_min)
        finite.check()
        if self.denoise:
            yield restoration.finish(x), 0.0

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
        with without_gradients(), evaluating(net), exact:
            yield

    def _in_units(self, x: Tensor) -> Tensor:
        """A state (n, ...) in the units of the data."""
        ratios = ratios_of(self.net, x)
        return x * ratios if isinstance(ratios, Tensor) else x

    def _result(self, x: Tensor) -> Tensor:
        x, value_range = self._in_units(x), attribute(self.net, "value_range")
        return x.clamp(*value_range) if self.clamp and value_range is not None else x


def _each_within(
    context: Callable[[], AbstractContextManager[None]], states: Iterator[tuple[Tensor, float]]
) -> Iterator[tuple[Tensor, float]]:
    """The states, each computed within a context; between two states of ``iterate`` the caller's modes apply."""
    while True:
        with context():
            state = next(states, None)
        if state is None:
            return
        yield state


@contextmanager
def without_gradients() -> Iterator[None]:
    """Turns gradients off, and also inference mode, in which "guide-jacobian" could not compute derivatives."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _only_levels(net: Score) -> NoiseSchedule | None:
    """The levels of a network whose scores at other levels are not trained; None for any other score."""
    return schedule_of(net) if getattr(attribute(net, "preconditioning"), "discrete", False) else None


def _warn_between_levels(net: Score, schedule: NoiseSchedule) -> None:
    table = _only_levels(net)
    if table is None:
        return
    nearest = [table[round(float(table.position(sigma)))] for sigma in schedule]
    others = sum(abs(sigma / level - 1) > _SAME_LEVEL for sigma, level in zip(schedule, nearest, strict=True))
    if others:
        warnings.warn(
            f"{others} of the {len(schedule)} noise levels of the schedule are not among the {len(table)} that the "
            "network was trained on, and it knows no others: its scores there are interpolated, and samples may be "
            "wrong. Leave out the schedule, or pass net.schedule.",
            stacklevel=4,
        )


# -- The options of a sampler -----------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option of a sampler that can be stored with a network and set on the command line.

    The constructor of the sampler declares it, in the annotation of its keyword argument:
    ``eta: Annotated[float, Field(float, low=0, high=1), "the amount of new noise"] = 1.0``.

    Attributes:
        field: the type and range of its values.
        help: one sentence of help.
        default: the default; None if it depends on the network.
    """

    field: Field
    help: str
    default: Any


@functools.cache
def options_of(kind: type[Sampler]) -> Mapping[str, Option]:
    """The options of a sampler, in the order in which they are stored; those of ``Sampler`` are those of every one."""
    found: dict[str, Option] = {}
    for each in kind.__mro__:
        if not (issubclass(each, Sampler) and "__init__" in vars(each)):
            continue
        for name, parameter in inspect.signature(vars(each)["__init__"]).parameters.items():
            hint = parameter.annotation if parameter.kind is inspect.Parameter.KEYWORD_ONLY else None
            if isinstance(hint, str):
                hint = eval(hint, vars(each)["__init__"].__globals__)  # noqa: S307  (an annotation in source code)
            if get_origin(hint) is Annotated and name not in found:
                _, field, text = get_args(hint)
                found[name] = Option(field, text, parameter.default)
    return {"levels": found["levels"], **found}


def stored_options(net: Score, sampler: str) -> dict[str, Any] | None:
    """The options of the first settings for a kind of sampler that are stored with a network, or None."""
    settings = attribute(net, "sampler_settings")
    for each in () if settings is None else (settings, *settings.alternatives):
        if each.sampler == sampler:
            each.check_origin(net)
            options: dict[str, Any] = each.options
            return options
    return None


def restoring_method(net: Score, restore: Restore | None) -> Method | None:
    """The method of a sampler that restores; None if it draws, or the network was trained to restore."""
    if restore is None or takes_image(net):
        return None
    check_choice("restore", restore, METHODS)
    return METHODS[restore]


def own_options(net: Score, sampler: str, options: SamplerOptions, *chosen: object) -> dict[str, Any] | None:
    """The stored options of a kind of sampler, with those of ``options`` that are given in place of theirs.

    None if there are none, or levels or any of ``chosen`` are given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.keys() & {"levels", "sigma_max", "sigma_min"} or any(each is not None for each in chosen):
        return None
    stored = stored_options(net, sampler)
    return None if stored is None else {**stored, **given}
