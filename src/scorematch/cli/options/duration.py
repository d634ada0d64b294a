"""What a command will do, and how long it takes, as text."""

from __future__ import annotations

from scorematch.core.processes import this_process
from scorematch.core.scores import attribute
from scorematch.sampling import ODESampler, Sampler

_MANY_CALLS = 250  # with more, a sampler with fewer is named


def announce(sampler: Sampler) -> None:
    """Prints the sampler with its number of network calls, in the first process, and a much faster sampler."""
    if this_process().rank > 0:
        return
    print(sampler, flush=True)
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
