r"""What all samplers share: the start, the noise, batches, progress, and the final denoising.

A sampler follows a score from noise of the loudest level to data. It is a generator at heart: ``iterate`` yields the
state after every step, and ``sample`` is its last word. A sampler of its own kind implements one method, ``_chain``,
and is handed the four things that it needs: a start, a score, a source of noise, and what is to be done about an
observation (``scorematch.sampling.restoration``), of which it need not know.

The last act is one step of Tweedie's formula at the quietest level, :math:`x + \sigma_L^2 s(x, \sigma_L)`. It removes
the noise that the chain leaves by construction; invisible to the eye, it changed the FID of NCSNv2 on CIFAR-10 from
31.8 to 10.9 (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475; Song & Ermon 2020, arXiv:2006.09011).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scorematch.noise import NoiseSchedule, own, own_middle, own_schedule, standard_normal
from scorematch.observe import Observation
from scorematch.sampling.restoration import Restoration, Restore, restoration

Generator = torch.Generator | Sequence[torch.Generator] | None
Precision = Literal["auto", "float32"]

# Values of the data that go through the network at once: 1,337 MNIST digits, 341 CIFAR-10 images, 5 faces of 256 px.
_BATCH_VALUES = 2**20


class _Start(NamedTuple):
    """The checked arguments of one run, but for the start itself: who holds that, holds as much as all samples take."""

    condition: Tensor | None
    restoration: Restoration
    batch_size: int


class Sampler(ABC):
    """The interface of every sampler: ``sample`` and ``iterate``.

    ``len(sampler)`` is the number of network calls that one image takes, ``print(sampler)`` says what will be run.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule | None,
        *,
        denoise: bool,
        clamp: bool,
        restore: Restore,
        precision: Precision,
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        if not callable(net):
            raise TypeError(f"net must be a score, called as net(x, sigma), got {type(net).__name__}.")
        schedule = own_schedule(net) if schedule is None else schedule
        if schedule is None:
            raise ValueError(
                "a plain callable has no ladder of its own: pass a schedule, NoiseSchedule.geometric(...)."
            )
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}. Write NoiseSchedule(sigmas)."
            )
        if restore not in get_args(Restore):
            raise ValueError(f"restore must be one of {', '.join(map(repr, get_args(Restore)))}, got {restore!r}.")
        if precision not in ("auto", "float32"):
            raise ValueError(f'precision must be "auto" or "float32", got {precision!r}.')
        self.net = net
        self.schedule = schedule
        self.denoise = denoise
        self.clamp = clamp
        if compile and (precision == "float32" or not hasattr(type(net), "inference_copy")):
            raise ValueError(
                'compile=True is for a ScoreNet at precision="auto". Pass torch.compile(net) for any other score.'
            )
        self.restore = restore
        self.precision = precision
        self.compile = compile

    @abstractmethod
    def __len__(self) -> int:
        """The network calls that one image takes."""

    def __repr__(self) -> str:
        schedule = self.schedule
        ladder = f"{len(schedule)} levels {schedule.sigma_max:.3g} -> {schedule.sigma_min:.3g}"
        if len(schedule) == 1:
            ladder = f"1 level {schedule.sigma_max:.3g}"
        return f"{type(self).__name__}({', '.join([ladder, *self._settings()])}, {len(self)} network calls)"

    @abstractmethod
    def _settings(self) -> list[str]:
        """What there is to say of a sampler beside its ladder."""

    @abstractmethod
    def _chain(
        self,
        x: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        seen: Restoration,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yields (x, sigma) after every step, x a tensor that is not written to again, sigma the level it has come to.

        Args:
            x: the start, (n, ...) float32.
            score: the score of x at a noise level given as () on x's device.
            noise: standard normal noise of x's shape, taken once per step, before the score.
            seen: what was seen of the samples. ``seen.project`` is called on the state before the score is taken of
                it, and ``seen.settle`` on the score and the noise of a step that stays at its level.
        """

    def sample(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Tensor | None = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: how many; None is 1, or as many as ``init``, ``condition``, ``observation`` or the list of generators
                has.
            shape: the shape of one sample, without the batch; None is that of ``init``, of the observed image, or the
                network's own.

            Rarely needed:

            init: the noisy start (n, ...), instead of one drawn from N(m, sigma_max^2), m being the middle of the
                network's value range, or 0. It is not modified.
            condition: handed to the network as its third argument, (n, ...).
            observation: what was seen of the samples, which are then drawn to agree with it; of one image, which counts
                for all samples, or of n. The sampler's ``restore`` says how.
            generator: what is drawn is drawn from it, on its device; None takes torch's global one. A list holds one
                for each sample, which then does not depend on its neighbors.
            noise: a function of the state x that gives z, standard normal and of x's shape, instead of drawn noise.
                Called once per step, in order, before the score; never by a sampler that draws no noise.
            batch_size: how many samples go through the network at once; None is as many as have 2^20 values together.
                The result does not depend on it, but for the rounding of the network's own sums.
            progress: whether to show a bar.

        Returns:
            The samples (n, ...), float32, in the network's value range if it has one, on its device.

        Raises:
            ValueError: for arguments that do not fit together, or no shape at all.
            RuntimeError: if the chain leaves the finite numbers; the message names the level.
        """
        with _without_gradients():
            x, start = self._start(n, shape, init, condition, observation, generator, batch_size)
            for x, _ in self._run(x, start, _source(noise, generator), progress):  # noqa: B007, B020
                pass
        return x if self.denoise else self._result(x, start.restoration)

    def iterate(
        self,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        condition: Tensor | None = None,
        observation: Observation | None = None,
        generator: Generator = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after every step, for pictures of the way or a stop before its end.

        Arguments and errors are those of ``sample``; the arguments are checked at the call, before the first step.

        Yields:
            ``(x, sigma)`` after every step, and last, where the sampler denoises, the result of ``sample`` with sigma
            0. A yielded tensor is never written to again.
        """
        with _without_gradients():
            start = self._start(n, shape, init, condition, observation, generator, batch_size)
        return self._run(*start, _source(noise, generator), progress)

    def _run(
        self, x: Tensor, start: _Start, noise: Callable[[Tensor], Tensor], progress: bool
    ) -> Iterator[tuple[Tensor, float]]:
        with _without_gradients():
            net = self._inference_net()
        parts = [slice(i, i + start.batch_size) for i in range(0, len(x), start.batch_size)]
        seen, z = start.restoration, None

        def network(part: slice) -> Callable[[Tensor, Tensor], Tensor]:
            if start.condition is None:
                return net
            condition = start.condition[part]
            return lambda x, sigma: net(x, sigma, condition)

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            scores = torch.empty_like(x)  # the chain's own, to write the next state into
            for part in parts:
                scores[part] = seen.score(network(part), x[part], sigma, part)
            bar.update()
            return scores

        def checked_noise(x: Tensor) -> Tensor:
            nonlocal z
            z = noise(x)
            if z.shape != x.shape:
                raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}.")
            z = z.to(x)
            return z

        with evaluating(self.net), tqdm(total=len(self), disable=not progress, desc="sampling", unit="call") as bar:
            chain = self._chain(x, score, checked_noise, seen)
            while True:
                # Gradients are off within a step only: between two of them the caller's own mode holds.
                with _without_gradients():
                    step = next(chain, None)
                if step is None:
                    break
                x = step[0]
                yield step
            if self.denoise:
                with _without_gradients():
                    sigma_min = self.schedule.sigma_min
                    if z is not None:  # what was seen at the last level, with the noise of the last step
                        x, z = seen.project(x, sigma_min, z), None
                    scores = score(x, torch.tensor(sigma_min, dtype=x.dtype, device=x.device))
                    x = torch.add(x, scores, alpha=sigma_min**2, out=scores)
                    self._check_finite(x, len(self.schedule) - 1)
                    x = self._result(x, seen)
                yield x, 0.0

    def _ladder(self, x: Tensor) -> tuple[Tensor, ...]:
        """The levels beside x, one tensor each: what depends on a level alone is computed once for as long as it is."""
        return self.schedule.sigmas.to(x.dtype).to(x.device).unbind()

    def _inference_net(self) -> Callable[..., Tensor]:
        """The network, or with precision "auto" its copy for sampling if it has one: made for one run, and not kept."""
        if self.precision == "float32" or not hasattr(type(self.net), "inference_copy"):
            return self.net
        return self.net.inference_copy(compile=self.compile)  # type: ignore[attr-defined]

    def _result(self, x: Tensor, seen: Restoration) -> Tensor:
        x = seen.finish(x)
        value_range = own(self.net, "value_range")
        return x.clamp(*value_range) if self.clamp and value_range is not None else x

    def _start(
        self,
        n: int | None,
        shape: Sequence[int] | None,
        init: Tensor | None,
        condition: Tensor | None,
        observation: Observation | None,
        generator: Generator,
        batch_size: int | None,
    ) -> tuple[Tensor, _Start]:
        """The start (n, ...), float32 and on the network's device, and the other arguments."""
        if observation is not None and not isinstance(observation, Observation):
            raise TypeError(
                f"observation must be an Observation, got {type(observation).__name__}. "
                "Write Observation(operator, y), of scorematch.observe."
            )
        counts = {
            "n": n,
            "init": None if init is None else len(init),
            "condition": None if condition is None else len(condition),
            "observation": None if observation is None or len(observation) == 1 else len(observation),
            "generator": len(generator) if isinstance(generator, Sequence) else None,
        }
        said = {name: count for name, count in counts.items() if count is not None}
        if len(set(said.values())) > 1:
            counted = ", ".join(f"{name} has {count}" for name, count in said.items())
            raise ValueError(f"the number of samples is said more than once, and differently: {counted}.")
        n = next(iter(said.values()), 1)
        if not isinstance(n, int):
            raise TypeError(f"n must be an integer, got {n!r}.")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        for one in generator if isinstance(generator, Sequence) else (generator,):
            if not isinstance(one, torch.Generator | None):
                raise TypeError(
                    f"generator must be a torch.Generator, got {one!r}. Write torch.Generator().manual_seed(0)."
                )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if init is not None and not init.is_floating_point():
            raise TypeError(f"init must be floating point, got {init.dtype}. Write init.float().")
        if init is not None and shape is not None and tuple(shape) != tuple(init.shape[1:]):
            raise ValueError(
                f"shape, one sample's without the batch, is {tuple(shape)}, but init's is {tuple(init.shape[1:])}."
            )
        seen_shape = None if observation is None else observation.operator.lift(observation.y).shape[1:]
        sample_shape = init.shape[1:] if init is not None else shape
        if sample_shape is None:
            sample_shape = own(self.net, "sample_shape") if seen_shape is None else seen_shape
        if sample_shape is None:
            raise ValueError(
                "the score does not say what a sample looks like: pass shape=, one sample's without the batch."
            )
        if seen_shape is not None and tuple(seen_shape) != tuple(sample_shape):
            raise ValueError(f"{observation!r} is of images {tuple(seen_shape)}, not of {tuple(sample_shape)}.")
        device = self._device(init, generator)
        if init is not None:
            x = (init.clone() if init.is_inference() else init.detach()).to(device, torch.float32)
        else:
            x = own_middle(self.net) + self.schedule.sigma_max * standard_normal((n, *sample_shape), generator, device)
        values = max(1, math.prod(sample_shape))
        return x, _Start(
            None if condition is None else condition.to(device),
            self._restoration(observation, device),
            max(1, _BATCH_VALUES // values) if batch_size is None else batch_size,
        )

    def _restoration(self, observation: Observation | None, device: torch.device) -> Restoration:
        value_range = own(self.net, "value_range")
        if observation is None:
            return Restoration()
        observation = observation.to(device)
        if self.clamp and value_range is not None and observation.sigma == 0:
            operator, y = observation.operator, observation.y
            y = y if operator.gain is None else operator.measure(operator.lift(y))  # nothing of what is hidden
            low, high = float(y.min()), float(y.max())
            if low < value_range[0] - 1e-6 or high > value_range[1] + 1e-6:
                warnings.warn(
                    f"y, said to be without noise, goes from {low:.3g} to {high:.3g}, beyond the network's range "
                    f"{value_range}, to which the result is clamped. Say how much noise it has, "
                    "Observation(operator, y, sigma=...), or sample with clamp=False.",
                    stacklevel=4,
                )
        # The deviation of image data about the middle of its range is a quarter of it, as in the row "karras".
        variance = 1.0 if value_range is None else ((value_range[1] - value_range[0]) / 4) ** 2
        return restoration(observation, self.restore, variance)

    def _device(self, init: Tensor | None, generator: Generator) -> torch.device:
        """The network's; a plain callable's is that of the start, else of the generator."""
        parameter = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        if parameter is not None:
            return parameter.device
        if init is not None:
            return init.device
        one = generator[0] if isinstance(generator, Sequence) else generator
        return torch.device("cpu") if one is None else one.device

    def _check_finite(self, x: Tensor, level: int) -> None:
        """Stops a chain that has left the finite numbers. It waits for the device: once a level, not once a step."""
        if not torch.isfinite(x).all():
            raise RuntimeError(
                f"the chain left the finite numbers at level {level} of {len(self.schedule)}, sigma "
                f"{self.schedule[level]:.4g}: the score is wrong there, or the step too large for it."
            )


def _source(noise: Callable[[Tensor], Tensor] | None, generator: Generator) -> Callable[[Tensor], Tensor]:
    """The user's noise, or standard normal noise from the generator."""
    if noise is not None:
        return noise
    generators = tuple(generator) if isinstance(generator, Sequence) else generator
    return lambda x: standard_normal(x.shape, generators, x.device)


@contextmanager
def _without_gradients() -> Iterator[None]:
    """Not in inference mode: "guide-jacobian" takes derivatives of its own, and a level's tensor knows its version."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluating(net: object) -> Iterator[None]:
    """Puts a network into eval mode, and afterwards each of its modules back into its own."""
    training = [m for m in net.modules() if m.training] if isinstance(net, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
