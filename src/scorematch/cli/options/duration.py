"""How long a command will take."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from scorematch.core.conditions import takes_image
from scorematch.core.scores import attribute, device_of
from scorematch.sampling import ODESampler, Sampler
from scorematch.sampling.bulk import Classes

_MANY_CALLS = 250  # with more, a sampler with fewer is named


def announce(
    sampler: Sampler,
    n: int,
    classes: Classes = None,
    *,
    seconds: float | None = None,
    process: tuple[int, int] = (0, 1),
    most: bool = False,
) -> None:
    """Prints the sampler and the estimated duration for n images, in the first process, and a much faster sampler.

    Args:
        sampler: the sampler.
        n: the number of images.
        classes: the class or the rule of ``--class``.
        seconds: the seconds in one process; None measures them.
        process: the rank and the number of the processes, which draw equally many images.
        most: whether n is only the largest number of images.
    """
    rank, processes = process
    if rank > 0:
        return
    seconds = estimate(sampler, n, classes) if seconds is None else seconds
    where = f" in {processes} processes" if processes > 1 else ""
    print(sampler)
    print(f"{'at most' if most else 'about'} {duration(seconds / processes)} for {count(n)}{where}", flush=True)
    few_levels = getattr(attribute(sampler.net, "preconditioning"), "discrete", False)  # and no flow between them
    if len(sampler) > _MANY_CALLS and not few_levels and not isinstance(sampler, ODESampler):
        print(f"faster: --sampler ode, with {len(ODESampler(sampler.net))} network calls", flush=True)


def count(n: int) -> str:
    """A number of images as text, such as "1 image" or "5,000 images"."""
    return f"{n:,} image{'s' if n > 1 else ''}"


def duration(seconds: float) -> str:
    """A duration as text, such as "5 s", "2 min", "3.0 h" or "4 days"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{round(seconds / 86_400):,} days"


def estimate(sampler: Sampler, n: int, classes: Classes = None, shape: tuple[int, ...] | None = None) -> float:
    """Estimates the seconds for n images, from the measured duration of one network call with a few images.

    Args:
        sampler: the sampler, preferably of an inference copy, which is then made only once.
        n: the number of images.
        classes: the class or the rule of ``--class``; a network that restores images gets black images.
        shape: the shape (C, H, W) of an image; None is that of the network.
    """
    net, device = sampler.net, device_of(sampler.net)
    shape = attribute(net, "sample_shape") if shape is None else shape
    few = min(n, max(1, 2**16 // math.prod(shape)))
    x = torch.rand(few, *shape, device=device)
    arguments: tuple[Any, ...] = () if classes is None else (0 if isinstance(classes, str) else classes,)
    if takes_image(net):
        arguments = (torch.zeros(few, attribute(net, "conditioning").channels, *shape[1:], device=device),)
    backward = sampler.restore == "guide-jacobian"  # which has a backward pass in each call

    def call() -> None:
        with torch.set_grad_enabled(backward):
            total = net(x.requires_grad_(backward), 1.0, *arguments).sum()
        if backward:
            (total,) = torch.autograd.grad(total, x)
        total.sum().item()  # waits for the device

    call()  # the first call prepares the kernels
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * len(sampler) * n / few
