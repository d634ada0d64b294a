r"""The base class of all samplers: the start, noise, batches, observations, progress and the final denoising.

A sampler follows a score from noise of the highest level to data. A new sampler overrides ``__len__``, the number of
network calls, and one of

- ``step``: the state at the next lower level, from the state, its score and noise; or
- ``steps``: a generator of states, for samplers with another structure than one call per level.

Everything else belongs to this class. The last act of every sampler is one step of Tweedie's formula at the lowest
level, :math:`x + \sigma_L^2 s(x, \sigma_L)`. It removes the noise that the chain leaves by construction; invisible to
the eye, it changed the FID of NCSNv2 on CIFAR-10 from 31.8 to 10.9.

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
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scorematch.nets.inference import InferenceScore
from scorematch.noise import NoiseSchedule
from scorematch.observe import Observation
from scorematch.precision import exact_float32
from scorematch.protocol import Score, attribute, check_score, evaluating, middle_of, schedule_of
from scorematch.randomness import Generator, as_generator, standard_normal
from scorematch.sampling.restoration import Restoration, Restore, restoration

if TYPE_CHECKING:
    pass

Precision = Literal["auto", "float32"]
Generators = torch.Generator | tuple[torch.Generator, ...] | None

# Values of the data that go through the network at once: 1,337 MNIST digits, 341 CIFAR-10 images, 5 faces of 256 px.
_BATCH_VALUES = 2**20
# Steps between two looks at whether the state is finite; a look waits for the device.
_LOOK_EVERY = 16


class SamplerOptions(TypedDict, total=False):
    """The options that all samplers share; see ``Sampler``."""

    levels: int | None
    denoise: bool
    clamp: bool
    restore: Restore
    precision: Precision
    compile: bool


class Sampler(ABC):
    """The interface of every sampler: ``sample`` and ``iterate``.

    ``len(sampler)`` is the number of network calls that one image takes, and ``print(sampler)`` shows the settings.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable. A callable
            is given sigma as a tensor () on x's device.
        schedule: the noise levels that the sampler descends; None is the sampler's default for the levels that the
            network was trained on. They need not be those of training.
        levels: the number of noise levels, to which the schedule is respaced; None keeps it.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the lowest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: how the samples are made to agree with an observation: "replace" (an operator without a gain is
            guided), "guide" or "guide-jacobian", which takes about twice as long; see
            ``scorematch.sampling.restoration``.
        precision: "auto" uses the network's inference copy, the fastest whose samples are statistically the same;
            "float32" calls the network as it is, with TF32 turned off during the call, and does not take an inference
            copy as net. Scores that have no inference copy are called as they are.
        compile: whether to run the inference copy through ``torch.compile``, at each call of ``sample``. To compile
            once, pass ``net.inference_copy(compile=True)`` as net.

    Raises:
        TypeError, ValueError: for a schedule that is missing, an option that is not known, or compilation of a score
            that has no inference copy.
    """

    draws_noise = True  # False: the noise of every step is that of the start, as on a path of the probability flow

    def __init_subclass__(cls) -> None:
        """Shows the shared options in the signature of a sampler that passes them on as ``**options``."""
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
                    "a plain callable has no noise levels of its own: pass a schedule, such as "
                    "NoiseSchedule.geometric(50, 0.01, 232)."
                )
            schedule = self.default_schedule(own, levels)
        elif not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}. Write NoiseSchedule(sigmas)."
            )
        elif levels is not None:
            schedule = schedule.respaced(levels)
        if restore not in get_args(Restore):
            raise ValueError(f"restore must be one of {', '.join(map(repr, get_args(Restore)))}, got {restore!r}.")
        if precision not in get_args(Precision):
            raise ValueError(f'precision must be "auto" or "float32", got {precision!r}.')
        if compile and (precision == "float32" or not hasattr(type(net), "inference_copy")):
            raise ValueError(
                'compile=True is for a ScoreNet at precision="auto". Pass torch.compile(net) for any other score.'
            )
        if precision == "float32" and isinstance(net, InferenceScore):
            raise ValueError(
                'precision="float32" calls the network itself, but net is its inference copy. Pass the network.'
            )
        self.schedule = schedule
        self.denoise = denoise
        self.clamp = clamp
        self.restore: Restore = restore
        self.precision = precision
        self.compile = compile

    # -- What a sampler defines ---------------------------------------------------------------------------------------

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The noise levels to descend where no schedule is given.

        Args:
            own: the levels that the network was trained on.
            levels: the number of levels that was asked for, or None.
        """
        return own if levels is None else own.respaced(levels)

    @abstractmethod
    def __len__(self) -> int:
        """The number of network calls that one image takes."""

    def settings(self) -> list[str]:
        """The settings that ``print(sampler)`` shows beside the schedule."""
        return []

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
        """The state at the next lower level.

        Args:
            x: the state (n, ...) at ``sigma``. It must not be written to.
            score: of x at ``sigma``. It may be overwritten, for example with the result.
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
            x: the start (n, ...), float32.
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
            n: the number of samples; None is 1, or the length of ``init``, ``condition``, ``observation`` or the list
                of generators.
            shape: the shape of one sample, without the batch; None is that of ``init``, of the observed image, or the
                network's own.

            Rarely needed:

            init: the noisy start (n, ...), instead of one drawn from N(m, sigma_max^2), m being the middle of the
                network's value range, or 0. It is not modified.
            condition: passed to the network as its third argument, (n, ...), or an int, the class of all samples.
            observation: what was measured of the samples, which are then drawn to agree with it; of one image, for all
                samples, or of n. The sampler's ``restore`` selects the method.
            generator: the source of all random numbers: a ``torch.Generator``, or a seed; None is torch's global
                generator. Numbers are drawn on its device. A list holds one for each sample, which then does not depend
                on the others.
            noise: a function of the state x that returns z, standard normal and of x's shape, instead of drawn noise.
                It is called once per step, in order, before the score; never by a sampler that draws no noise.
            batch_size: how many samples go through the network at once; None is as many as have 2^20 values together.
                The result does not depend on it, except for the rounding of the network's own sums.
            progress: whether to show a progress bar.

        Returns:
            The samples (n, ...), float32, in the network's value range if it has one, on its device.

        Raises:
            ValueError: for arguments that do not fit together, or if the shape of a sample is not known.
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
        """Yields the state after every step, to watch the chain or to stop it early.

        Arguments and errors are those of ``sample``; the arguments are checked at the call, before the first step.

        Yields:
            ``(x, sigma)`` after every step, and last, where the sampler denoises, the result of ``sample`` with sigma
            0. A yielded tensor is never written to again.
        """
        with _without_gradients():
            x, run = self._start(n, shape, init, condition, observation, generator, batch_size)
        return self._run(x, run, _source(noise, run.generator), progress)

    # -- The run ------------------------------------------------------------------------------------------------------

    def _run(
        self, x: Tensor, run: _Run, noise: Callable[[Tensor], Tensor], progress: bool
    ) -> Iterator[tuple[Tensor, float]]:
        with _without_gradients():
            net = self._inference_net()
        path = None if self.draws_noise else (x - middle_of(self.net)) / self.schedule.sigma_max
        # A sampler runs with gradients off and the network in eval mode, but only within a step: between two steps of
        # ``iterate`` the caller's own modes hold.
        with tqdm(total=len(self), disable=not progress, desc="sampling", unit="call") as bar:
            chain = Chain(net, run, noise if path is None else lambda x: path, bar.update)
            finite = _FiniteCheck(self.schedule)
            states = self.steps(x, chain)
            while True:
                with self._computing(net):
                    state = next(states, None)
                    if state is None:
                        break
                    x = state[0]
                    finite.record(x, state[1])
                yield state
            with self._computing(net):
                if self.denoise:
                    x = chain.denoised(x, self.schedule.sigma_min)
                    finite.record(x, self.schedule.sigma_min)
                finite.look()
                if self.denoise:
                    x = self._result(x, run.restoration)
            if self.denoise:
                yield x, 0.0

    @contextmanager
    def _computing(self, net: Score) -> Iterator[None]:
        exact = exact_float32() if self.precision == "float32" else nullcontext()
        with _without_gradients(), evaluating(net), exact:
            yield

    def _inference_net(self) -> Score:
        """The network, or with precision "auto" its inference copy if it has one: made for one run, and not kept."""
        if self.precision == "float32" or not hasattr(type(self.net), "inference_copy"):
            return self.net
        return self.net.inference_copy(compile=self.compile)  # type: ignore[attr-defined]

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
        """The start (n, ...), float32 and on the network's device, and the other arguments of the run."""
        if observation is not None and not isinstance(observation, Observation):
            raise TypeError(
                f"observation must be an Observation, got {type(observation).__name__}. "
                "Write Observation(operator, y), of scorematch.observe."
            )
        if not isinstance(condition, Tensor | int | None) or isinstance(condition, bool):
            raise TypeError(f"condition must be a tensor (n, ...) or an int, got {type(condition).__name__}.")
        if init is not None and not isinstance(init, Tensor):
            raise TypeError(f"init must be a tensor (n, ...), got {type(init).__name__}. Write torch.as_tensor(init).")
        if init is not None and not init.is_floating_point():
            raise TypeError(f"init must be floating point, got {init.dtype}. Write init.float().")
        generators = as_generator(generator)
        n = _count(n, init, condition, observation, generators)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        sample_shape = self._sample_shape(shape, init, observation)
        device = self._device(init, generators)
        if init is not None:
            x = (init.clone() if init.is_inference() else init.detach()).to(device, torch.float32)
        else:
            noise = standard_normal((n, *sample_shape), generators, device)
            x = middle_of(self.net) + self.schedule.sigma_max * noise
        if isinstance(condition, int):
            condition = torch.full((n,), condition)
        values = max(1, math.prod(sample_shape))
        return x, _Run(
            None if condition is None else condition.to(device),
            self._restoration(observation, device),
            max(1, _BATCH_VALUES // values) if batch_size is None else batch_size,
            generators,
        )

    def _sample_shape(
        self, shape: Sequence[int] | None, init: Tensor | None, observation: Observation | None
    ) -> tuple[int, ...]:
        if init is not None and shape is not None and tuple(shape) != tuple(init.shape[1:]):
            raise ValueError(
                f"shape, that of one sample without the batch, is {tuple(shape)}, but that of init is "
                f"{tuple(init.shape[1:])}."
            )
        observed = None if observation is None else observation.operator.lift(observation.y).shape[1:]
        found = init.shape[1:] if init is not None else shape
        if found is None:
            found = attribute(self.net, "sample_shape") if observed is None else observed
        if found is None:
            raise ValueError("the shape of a sample is not known: pass shape=, that of one sample without the batch.")
        if observed is not None and tuple(observed) != tuple(found):
            raise ValueError(f"{observation!r} is of images of shape {tuple(observed)}, not {tuple(found)}.")
        return tuple(found)

    def _restoration(self, observation: Observation | None, device: torch.device) -> Restoration:
        value_range = attribute(self.net, "value_range")
        if observation is None:
            return Restoration()
        observation = observation.to(device)
        if self.clamp and value_range is not None and observation.sigma == 0:
            operator, y = observation.operator, observation.y
            y = y if operator.gain is None else operator.measure(operator.lift(y))  # without the hidden values
            low, high = float(y.min()), float(y.max())
            if low < value_range[0] - 1e-6 or high > value_range[1] + 1e-6:
                warnings.warn(
                    f"y has sigma 0, no noise, but its values go from {low:.3g} to {high:.3g}, beyond the network's "
                    f"range {value_range}, to which the result is clamped. Pass the noise level of y, "
                    "Observation(operator, y, sigma=...), or sample with clamp=False.",
                    stacklevel=4,
                )
        # The standard deviation of image data about the middle of its range is a quarter of it, as in the row "karras".
        variance = 1.0 if value_range is None else ((value_range[1] - value_range[0]) / 4) ** 2
        return restoration(observation, self.restore, variance)

    def _device(self, init: Tensor | None, generators: Generators) -> torch.device:
        """The network's device; for a plain callable that of the start, else of the generator."""
        if isinstance(self.net, nn.Module):
            parameter = next(self.net.parameters(), None)
            if parameter is not None:
                return parameter.device
        device = getattr(self.net, "device", None)
        if isinstance(device, torch.device):
            return device
        if init is not None:
            return init.device
        one = generators[0] if isinstance(generators, tuple) else generators
        return torch.device("cpu") if one is None else one.device


# -- What the steps of one run are given ------------------------------------------------------------------------------


class _Run(NamedTuple):
    """The checked arguments of one run, except the start, which is kept apart so that it can be freed early."""

    condition: Tensor | None
    restoration: Restoration
    batch_size: int
    generator: Generators


class Chain:
    """The score, the noise and the observation of one run, as ``Sampler.steps`` uses them.

    Calling it does what most steps begin with: ``x, score, z = chain(x, sigma)`` draws the noise of the step, puts what
    was observed into the state, and takes the score there.
    """

    def __init__(self, net: Score, run: _Run, noise: Callable[[Tensor], Tensor], count: Callable[[], object]) -> None:
        self._net, self._run, self._noise, self._count = net, run, noise, count
        self._takes_floats = hasattr(type(net), "inference_copy")  # a network of this package
        self._sigmas: dict[float, Tensor] = {}
        self._z: Tensor | None = None  # the noise of the last step, if it has not been used for an observation since

    def __call__(self, x: Tensor, sigma: float, *, stay: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The state with the observation, its score, and the noise of the step.

        Args:
            x: the state (n, ...).
            sigma: its noise level.
            stay: whether the step stays at its level, as those of Langevin dynamics do; with an observation its score
                and noise are then those of the posterior.
        """
        z = self.noise(x)
        x = self.observe(x, sigma, z)
        score = self.score(x, sigma)
        if stay:
            score, z = self.settle(x, score, z, sigma)
        return x, score, z

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape; for a sampler with ``draws_noise = False``, the noise of its start."""
        z = self._noise(x)
        if z.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}.")
        self._z = z.to(x)
        return self._z

    def observe(self, x: Tensor, sigma: float, z: Tensor) -> Tensor:
        """The state with what was observed put in, at the noise level sigma with the noise z."""
        return self._run.restoration.project(x, sigma, z)

    def settle(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The score and the noise of a step that stays at its level; unchanged without an observation."""
        return self._run.restoration.settle(x, score, z, sigma)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """The score of x (n, ...) at a noise level: one network call for each sample. The result may be overwritten."""
        run = self._run
        scores = torch.empty_like(x)
        level = sigma if self._takes_floats else self._tensor(sigma, x)
        for i in range(0, len(x), run.batch_size):
            part = slice(i, i + run.batch_size)
            scores[part] = check_score(run.restoration.score(self._network(part), x[part], level, part), x[part])
        self._count()
        return scores

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """One step of Tweedie's formula, on the state with what was observed at the last level."""
        if self._z is not None:
            x = self.observe(x, sigma, self._z)
            self._z = None
        scores = self.score(x, sigma)
        return torch.add(x, scores, alpha=sigma**2, out=scores)

    def _tensor(self, sigma: float, x: Tensor) -> Tensor:
        if sigma not in self._sigmas:
            self._sigmas[sigma] = torch.full((), sigma, dtype=x.dtype, device=x.device)
        return self._sigmas[sigma]

    def _network(self, part: slice) -> Callable[[Tensor, Any], Tensor]:
        net, condition = self._net, self._run.condition
        return net if condition is None else lambda x, sigma: net(x, sigma, condition[part])


class _FiniteCheck:
    """Notices that a state has left the finite numbers, without waiting for the device at every step.

    The number of the first such step is recorded on the device, and read now and then.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.sigmas: list[float] = []  # after each step
        self.first: Tensor | None = None  # the first step with a value that is not finite, or a great number

    def record(self, x: Tensor, sigma: float) -> None:
        step = len(self.sigmas)
        self.sigmas.append(sigma)
        here = torch.where(torch.isfinite(x).all(), torch.iinfo(torch.int32).max, step)
        self.first = here if self.first is None else torch.minimum(self.first, here)
        if len(self.sigmas) % _LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        first = torch.iinfo(torch.int32).max if self.first is None else int(self.first)
        if first < len(self.sigmas):
            sigma = self.sigmas[first]
            level = min(range(len(self.schedule)), key=lambda i: abs(self.schedule[i] - sigma))
            raise RuntimeError(
                f"the state has NaN or infinite values from level {level} of {len(self.schedule)} on, sigma "
                f"{sigma:.4g}: the score is wrong there, or the step is too large for it."
            )


def _count(
    n: int | None,
    init: Tensor | None,
    condition: Tensor | int | None,
    observation: Observation | None,
    generators: Generators,
) -> int:
    """The number of samples, on which all arguments must agree."""
    counts = {
        "n": n,
        "init": None if init is None else len(init),
        "condition": len(condition) if isinstance(condition, Tensor) else None,
        "observation": None if observation is None or len(observation) == 1 else len(observation),
        "generator": len(generators) if isinstance(generators, tuple) else None,
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in given.items())
        raise ValueError(f"the arguments disagree on the number of samples: {listed}.")
    n = next(iter(given.values()), 1)
    if not isinstance(n, int):
        raise TypeError(f"n must be an integer, got {n!r}.")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    return n


def _source(noise: Callable[[Tensor], Tensor] | None, generators: Generators) -> Callable[[Tensor], Tensor]:
    """The user's noise, or standard normal noise from the generator."""
    if noise is not None:
        return noise
    return lambda x: standard_normal(x.shape, generators, x.device)


# -- Modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _without_gradients() -> Iterator[None]:
    """Gradients off; not inference mode, since "guide-jacobian" takes derivatives of its own."""
    with torch.inference_mode(False), torch.no_grad():
        yield
