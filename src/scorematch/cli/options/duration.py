"""What a command will do, and how long it takes, as text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from scorematch.core.conditions import Parts, map_parts
from scorematch.core.processes import this_process
from scorematch.core.scores import attribute, device_of, inference_copy_of
from scorematch.data.pictures import is_picture
from scorematch.evaluation.features import Extractor
from scorematch.sampling import ODESampler, Sampler
from scorematch.sampling.bulk import Classes

_MANY_CALLS = 250  # with more, a sampler with fewer is named
_FEW = 8  # images of the call that is timed


def announce(sampler: Sampler, n: int = 0, condition: Classes | Tensor | Parts = None) -> None:
    """Prints the sampler, the estimated time for n images without an observation, and a much faster sampler.

    Only the first process prints. ``condition`` is the class or the rule of ``--class``, or that of the first
    sample.
    """
    process = this_process()
    if process.rank > 0:
        return
    print(sampler, flush=True)
    word = "image" if is_picture(attribute(sampler.net, "sample_shape") or (3, 1, 1)) else "sample"
    if n:
        seconds = _seconds_per_call(sampler, condition) * len(sampler) * n / process.world_size
        where = f" in {process.world_size} processes" if process.world_size > 1 else ""
        print(f"about {duration(seconds)} for {count(n, word)}{where}", flush=True)
    few_levels = getattr(attribute(sampler.net, "preconditioning"), "discrete", False)  # and no flow between them
    if len(sampler) > _MANY_CALLS and not few_levels and not isinstance(sampler, ODESampler):
        print(f"faster: --sampler ode, with {len(ODESampler(sampler.net))} network calls", flush=True)


@torch.no_grad()
def _seconds_per_call(sampler: Sampler, condition: Classes | Tensor | Parts) -> float:
    """The seconds of a network call per image."""
    net = inference_copy_of(sampler.net) if sampler.precision == "auto" else sampler.net  # as it samples
    x = torch.rand(_FEW, *attribute(net, "sample_shape"), device=device_of(net))
    if isinstance(condition, int | str):
        condition = {"class": torch.full((1,), 0 if isinstance(condition, str) else condition)}
    condition = map_parts(lambda part: part.expand(_FEW, *part.shape[1:]).to(x.device), condition)
    given = () if condition is None else (condition,)
    net(x, 1.0, *given)  # the first call prepares the kernels
    begin = time.perf_counter()
    net(x, 1.0, *given).sum().item()  # waits for the device
    return (time.perf_counter() - begin) / _FEW


def announce_features(extractors: Sequence[Extractor], shape: Sequence[int], n: int) -> None:
    """Prints the estimated time for the features of n images of a shape (C, H, W), and of those of the reference."""
    process = this_process()
    if process.rank > 0 or not extractors:
        return
    images = torch.randint(256, (_FEW, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first call prepares the kernels
        begin = time.perf_counter()
        for extractor in extractors:
            extractor.extract(images).features.sum().item()  # waits for the device
    each = (time.perf_counter() - begin) / _FEW / process.world_size
    print(
        f"about {duration(each * n)} for the features of {count(n)}, and {duration(each * 1000)} for each 1,000 of the "
        "reference, whose statistics are kept",
        flush=True,
    )


def count(n: int, word: str = "image") -> str:
    """A number of images as text, such as "1 image" or "5,000 images"."""
    return f"{n:,} {word}{'s' if n > 1 else ''}"


def duration(seconds: float) -> str:
    """A duration as text, such as "5 s", "2 min", "3.0 h" or "4 days"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{round(seconds / 86_400):,} days"
