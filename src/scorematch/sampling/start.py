r"""The start of a run: the checks of the arguments of ``Sampler.sample``, and the noise from which it begins.

Noise of the highest level, :math:`\sigma z` around the middle m of the value range, is nearly the distribution of the
state there. Its mean is wrong by the distance from m to the mean of the data, and its variance by that of the data. The
probability flow keeps both errors, in units of the deviation. A restoration method with ``centers = True`` gives the
mean of the posterior from the first call on. A run with it begins, with one more call of the network, at

.. math:: x = D\Bigl(m + \tfrac12 \sigma z + \tfrac{\sqrt3}{2} \sigma z'\Bigr) + \sigma z .

For a normal posterior with the variance :math:`\lambda` along an axis, D is the mean plus :math:`\lambda / \sigma^2`
times the distance of its argument, up to higher powers of :math:`\lambda / \sigma^2`. The error of the mean is
multiplied by that number. The argument has the distribution that the network knows, and its correlation of 1/2 with z
adds :math:`\lambda` to the variance :math:`\sigma^2`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scorematch.core.arguments import check_count, check_sizes
from scorematch.core.batches import check_data, without_history
from scorematch.core.conditions import as_class, check_type, class_of_each, lengths, map_parts
from scorematch.core.derived import ratios_of
from scorematch.core.randomness import Generator, as_generator, standard_normal, uniform
from scorematch.core.scores import Given, Score, attribute, device_of, middle_of, variance_of
from scorematch.noise import NoiseSchedule
from scorematch.restoration.method import Restoration
from scorematch.restoration.observation import Observation
from scorematch.sampling.chain import Run


class Configured(Protocol):
    """What the start of a run uses of a sampler."""

    net: Score
    schedule: NoiseSchedule
    clamp: bool
    particles: int

    def start(self, z: Tensor) -> Tensor:
        """The states at the highest level from standard normal noise z (n, ...), without an observation."""

    def restoration(self, observation: Observation) -> Restoration:
        """The restoration method for an observation."""


# The largest number of values in one network call by default: those of 1,337 MNIST digits, 341 CIFAR-10 images or 5 RGB
# images of 256 x 256 pixels.
_BATCH_VALUES = 2**20

Generators = torch.Generator | tuple[torch.Generator, ...] | None


def start(
    sampler: Configured,
    n: int | None,
    shape: Sequence[int] | None,
    init: Tensor | None,
    condition: Given,
    observation: Observation | None,
    generator: Generator,
    noise_source: Callable[[Tensor], Tensor] | None,
    batch_size: int | None,
) -> tuple[Tensor, Run]:
    """The noise to start from (n, ...), float32 on the network's device, and the other arguments of the run, checked.

    Arguments and errors are those of ``Sampler.sample``.
    """
    if observation is not None and not isinstance(observation, Observation):
        raise TypeError(
            f"observation must be an Observation, got {type(observation).__name__}. "
            "Write scorematch.restoration.Observation(operator, y)."
        )
    condition = as_class(condition)
    check_type(condition)
    if init is not None:
        check_data(init, "init")
        if not bool(init.isfinite().all()):
            raise ValueError("init must be finite, got NaN or infinite values.")
    generators = as_generator(generator)
    n = _count(n, init, condition, observation, generators)
    shape = None if shape is None else as_shape(shape)
    sample_shape = _sample_shape(sampler.net, shape, init, observation)
    if batch_size is None:
        batch_size = max(1, _BATCH_VALUES // max(1, math.prod(sample_shape)))
    batch_size = check_count("batch_size", batch_size)

    # A plain function has no device: the run is on that of init, or else of the generator, or else on the CPU.
    source = init if init is not None else generators[0] if isinstance(generators, tuple) else generators
    device = device_of(sampler.net, "cpu" if source is None else source.device)
    method, particles = Restoration(), 1
    if observation is not None:
        particles = sampler.particles
        method = _restoration(sampler, observation.of_shape(sample_shape).to(device), particles)
    rows = n * particles

    def normal(x_shape: Sequence[int]) -> Tensor:
        grouped = (n, x_shape[0] // n, *x_shape[1:])  # with a list of generators, each draws those of its sample
        return standard_normal(grouped, generators, device).view(x_shape)

    noise: Tensor | None = None
    offset: Tensor | None = None
    if init is not None:
        x = without_history(init).to(device, torch.float32).repeat_interleave(particles, 0)
        x = x / ratios_of(sampler.net, x)
    else:
        noise = normal((rows, *sample_shape))
        middle, sigma = middle_of(sampler.net, noise), sampler.schedule.sigma_max
        if method.centers:
            offset = sigma * noise
            noise = noise / 2 + math.sqrt(0.75) * normal((rows, *sample_shape))
        x = sampler.start(noise) if observation is None else method.start(middle + sigma * noise, sigma, middle)
    own = noise_source and (lambda x: noise_source(x * ratios_of(sampler.net, x)))
    given = class_of_each(condition, x[::particles])
    return x, Run(
        map_parts(lambda part: without_history(part).to(device).repeat_interleave(particles, 0), given),
        method,
        batch_size,
        own or (lambda x: normal(x.shape)),
        noise if method.sigma > 0 else None,
        offset,
        particles,
        lambda: uniform((n,), generators, device),
        {},
    )


def as_shape(shape: Any) -> tuple[int, ...]:
    """The shape of one sample, checked; () is that of single numbers."""
    if isinstance(shape, tuple) and not shape:
        return ()
    return check_sizes("shape", shape, "the shape of one sample, such as (3, 32, 32)")


def _count(
    n: int | None, init: Tensor | None, condition: Given, observation: Observation | None, generators: Generators
) -> int:
    """The number of samples; all arguments must agree on it."""
    counts = [
        ("n", n),
        ("init", None if init is None else len(init)),
        *(("condition", count) for count in lengths(condition)),
        ("observation", None if observation is None or len(observation) == 1 else len(observation)),
        ("generator", len(generators) if isinstance(generators, tuple) else None),
    ]
    given = [(name, count) for name, count in counts if count is not None]
    if len({count for _, count in given}) > 1:
        listed = ", ".join(f"{count} from {name}" for name, count in given)
        one = ("condition", 1) in given
        hint = " To draw n samples for one condition, write condition.repeat_interleave(n, 0)." if one else ""
        raise ValueError(f"the arguments disagree on the number of samples: {listed}.{hint}")
    return check_count("n", given[0][1] if given else 1)


def _sample_shape(
    net: object, shape: Sequence[int] | None, init: Tensor | None, observation: Observation | None
) -> tuple[int, ...]:
    """The shape of one sample; ``shape``, ``init`` and the observation must agree on it."""
    if init is not None and shape is not None and tuple(shape) != tuple(init.shape[1:]):
        raise ValueError(
            f"shape must be the shape of one sample of init, {tuple(init.shape[1:])}, got {tuple(shape)}. Leave it out."
        )
    found = init.shape[1:] if init is not None else shape
    if found is None and observation is not None:
        found = observation.shape
    if found is None:
        found = attribute(net, "sample_shape")
        if observation is not None and (found is None or not observation.fits(found)):
            found = observation.y.shape[1:] if observation.fits(observation.y.shape[1:]) else found
    if found is None:
        raise ValueError("the shape of a sample is not known: pass shape=, without the batch axis.")
    return tuple(found)


def _restoration(sampler: Configured, observation: Observation, particles: int) -> Restoration:
    """The method by which the samples agree with an observation, which is on the device of the network."""
    net, needed = sampler.net, observation.operator.value_range
    value_range = attribute(net, "value_range")
    if needed is not None and value_range is not None and tuple(value_range) != needed:
        raise ValueError(
            f"{observation.operator!r} is for images in {needed}, but the network's value_range is "
            f"{tuple(value_range)}."
        )
    if sampler.clamp and value_range is not None and isinstance(observation.sigma, float) and observation.sigma == 0:
        _warn_of_clamping(observation, value_range)
    like = observation.y.new_zeros((1, *(observation.shape or ())))
    observation = observation.scaled(ratios_of(net, like), middle_of(net, like), variance_of(net) ** 0.5)
    if particles > 1 and len(observation) > 1:
        observation = observation.rows(torch.arange(len(observation), device="cpu").repeat_interleave(particles))
    return sampler.restoration(observation)


def _warn_of_clamping(observation: Observation, value_range: tuple[float, float]) -> None:
    """Warns if observed values are outside the range to which the result is clamped.

    A measurement in other units than the image, such as sums of pixels, is not compared: it does not map an image of
    one value to this value.
    """
    y, top = observation.y, value_range[1]
    mask = torch.ones((), dtype=torch.bool, device=y.device) if observation.mask is None else observation.mask
    bright = y.new_full((len(observation), *(observation.shape or ())), top)
    measured = torch.where(mask, observation.operator.measure(bright), top)
    if not bool(((measured - top).abs() <= 0.02 * (top - value_range[0])).all()):
        return
    low = float(torch.where(mask, y, math.inf).min())
    high = float(torch.where(mask, y, -math.inf).max())
    if low < value_range[0] - 1e-6 or high > value_range[1] + 1e-6:
        warnings.warn(
            f"y has no noise (sigma 0), but its values range from {low:.3g} to {high:.3g}, outside the network's "
            f"value_range {value_range}, to which the result is clamped. Pass the noise level of y, "
            "Observation(operator, y, sigma=...), or create the sampler with clamp=False.",
            stacklevel=5,
        )
