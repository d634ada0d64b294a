"""The first hour on a GPU: is everything right there, does the host wait for it, how fast is it, how much memory?

    python benchmarks/gpu.py --device cuda                                   # everything; needs diffusers, accelerate
    python benchmarks/gpu.py --device cuda --only speed train --page docs/speed.md
    python benchmarks/gpu.py --device cpu --quick                            # the smallest sizes, as a test

It has these sections:

correct   Networks of every kind, samplers, guidance, restoration, likelihoods, gradients and Palette's tasks, compared
          with the CPU: the largest relative difference of each, and the limit (correct.py).
waits     How often the host waits for the device in a call of a network, a sampler, and training steps.
speed     Images per second of a network call and of a sampler with the architecture of DDPM for CIFAR-10, compared with
          diffusers in float32, bfloat16 and float16, under autocast, in channels_last, and compiled.
train     Images per second of training steps and their peak memory, compared with diffusers.
memory    The peak memory of network calls by precision and number of images, and what is left after them.

A line that begins with FAIL is an error to correct; the exit status is their number. Each section prints a table and
writes it into the folder ``--out``, and all tables together into ``gpu.md``, in the form that docs/speed.md has.
``--page`` writes them into that page.
"""

import argparse
import collections
import contextlib
import copy
import functools
import json
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from all import block, replace
from common import Row, alternate, machine, parser, report
from correct import SAMPLERS, Failures, at, correct, place
from memory import peak
from networks import DDPM, LAST
from tests.helpers import HostReads, seed
from tests.networks import images
from torch import Tensor, nn

from scorematch import ScoreNet
from scorematch.core.precision import exact_float32, native_dtype
from scorematch.data import open_images
from scorematch.restoration.palette import Inpainting
from scorematch.sampling import AncestralSampler
from scorematch.training import Settings, train_steps

# -- Waits ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted(device: str) -> Iterator[collections.Counter[str]]:
    """Counts by place how often the host waits for the device; on a CPU, how often it reads a value of a tensor."""
    found: collections.Counter[str] = collections.Counter()
    if device == "cpu":
        with HostReads() as reads:
            yield found
        found["somewhere"] += reads.count
        return

    def show(message: Warning | str, *_: Any) -> None:
        if "synchroniz" in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(args: argparse.Namespace, failures: Failures) -> dict[str, list[Row]]:
    rows: list[Row] = []

    def measure(what: str, calls: int, limit: float, run: Callable[[], object]) -> None:
        run()
        with counted(args.device) as found:
            run()
        total = sum(found.values())
        where = ", ".join(f"{n} at {at_}" for at_, n in found.most_common(3))
        rows.append({"what": what, "network calls": calls, "waits": total, "limit": limit, "where": where})
        if total > limit:
            failures.add(f"{what}: the host waits {total} times, the limit is {limit:g}; {where}")

    copied = at("unet", args.device).inference_copy()
    x = images(8, seed(), size=16).to(args.device)
    levels = {"a float": 0.3, "(8,)": torch.full((8,), 0.3, device=args.device)}
    for label, sigma in levels.items():
        measure(f"an inference copy, sigma is {label}", 1, 2, lambda: copied(x, sigma))  # noqa: B023
    for name, make in SAMPLERS.items():
        sampler = make(copied, levels=5 if args.smoke else 33)
        for label, generator in {"no generator": None, "a seed": 0, "a list of seeds": [0, 1]}.items():
            run = functools.partial(sampler.sample, 2, generator=generator, progress=False)
            measure(f"{name}, {label}", len(sampler), 4 + len(sampler) / 8, run)
    steps = 2 if args.smoke else 8
    for label, options in {
        "": {},
        ", inpainting": {"condition": Inpainting()},
        ", microbatches": {"microbatch": 4},
    }.items():
        net = ScoreNet.unet(3, 16, widths=(8,), condition_channels=3 if "condition" in options else 0)
        data = open_images(images(64, seed(), channels=3, size=16))
        iterator = train_steps(net, data, Settings(images=10**6, batch_size=16, **options))
        next(iterator)

        def several() -> None:
            for _ in range(steps):
                next(iterator)  # noqa: B023

        measure(f"{steps} steps of training{label}", steps, 2 * steps, several)
        iterator.close()
    return {"waits": rows}


# -- Speed ------------------------------------------------------------------------------------------------------------


def pair(args: argparse.Namespace) -> tuple[ScoreNet, Any, Tensor]:
    """A network on the device, that of diffusers with the same weights, and a batch of images."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of each conversion of a network to half precision
    n, size = (2, 16) if args.smoke else (128, 32)
    widths = {"block_out_channels": (32,) * 4} if args.smoke else {}
    theirs = UNet2DModel(sample_size=size, **{**DDPM, **widths})
    net = ScoreNet.from_diffusers(theirs, DDPMScheduler(1000)).to(args.device).eval()
    return net, theirs.to(args.device).eval(), torch.rand(n, 3, size, size, device=args.device)


def measured(runs: Mapping[str, Callable[[], Callable[[], object]]], args: argparse.Namespace) -> dict[str, float]:
    """The seconds of each run, from functions that make them; a run that fails is left out with a message."""
    ready = {}
    for name, make in runs.items():
        try:
            run = make()
            run()
            ready[name] = run
        except Exception as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error)[:160]}", flush=True)
    seconds = alternate(ready, args.repeats, args.device)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rates(title: str, n: int, seconds: Mapping[str, float]) -> list[Row]:
    best = min(value for name, value in seconds.items() if name.startswith("diffusers"))
    return [
        {title: name, "images/s": n / value, "of the best of diffusers": best / value}
        for name, value in seconds.items()
    ]


def speed(args: argparse.Namespace, failures: Failures) -> dict[str, list[Row]]:
    from diffusers import DDPMPipeline, DDPMScheduler

    net, unet, x = pair(args)
    n, level = len(x), torch.full((len(x),), 500.0, device=args.device)

    def theirs(dtype: torch.dtype, last: bool, compiled: bool = False, low: bool = False) -> Callable[[], object]:
        model = copy.deepcopy(unet).to(dtype=torch.float32 if low else dtype)
        given = x if low else x.to(dtype)
        if last:
            model, given = model.to(memory_format=LAST), given.to(memory_format=LAST)
        called = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

        def call() -> object:
            with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=low):
                torch.compiler.cudagraph_mark_step_begin()
                return called(given, level).sample

        return call

    def ours(precision: str, compiled: bool = False) -> Callable[[], object]:
        if precision == "auto":
            return functools.partial(torch.no_grad()(net.inference_copy(compile=compiled)), x, 0.5)
        return torch.no_grad()(exact_float32()(functools.partial(net, x, 0.5)))

    runs: dict[str, Callable[[], Callable[[], object]]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f"diffusers, {str(dtype).removeprefix('torch.')}"
        for last, label in ((False, ""), (True, ", channels_last")):
            runs[name + label] = functools.partial(theirs, dtype, last)
            if dtype != torch.float32:
                runs[f"{name} autocast{label}"] = functools.partial(theirs, dtype, last, low=True)
                if not args.smoke:
                    runs[f"{name}{label}, compiled"] = functools.partial(theirs, dtype, last, compiled=True)
    runs["scorematch, float32"] = functools.partial(ours, "float32")
    runs["scorematch, auto"] = functools.partial(ours, "auto")
    if not args.smoke:
        runs["scorematch, auto, compiled"] = functools.partial(ours, "auto", compiled=True)
    calls = measured(runs, args)
    best = min(value for name, value in calls.items() if name.startswith("diffusers") and "compiled" not in name)
    if args.device != "cpu" and calls["scorematch, auto"] > 1.1 * best:
        failures.add("speed: the inference copy is slower than the best of diffusers without compilation")

    steps, half = 3 if args.smoke else 50, torch.float32 if args.device == "cpu" else torch.float16
    pipeline = DDPMPipeline(copy.deepcopy(unet).to(dtype=half), DDPMScheduler(1000))  # whose images NumPy must know
    pipeline.set_progress_bar_config(disable=True)
    sampler = AncestralSampler(net.inference_copy(), levels=steps)
    theirs_ = functools.partial(pipeline, batch_size=n, num_inference_steps=steps, output_type="np")
    samplers = {f"diffusers, {half}".replace("torch.", ""): lambda: theirs_}
    for label, generator in {"no generator": None, "a seed": 0, "a list of seeds": list(range(n))}.items():
        run = functools.partial(sampler.sample, n, generator=generator, batch_size=n, progress=False)
        samplers[f"scorematch, auto, {label}"] = functools.partial(lambda run: run, run)
    return {
        "speed": rates(f"a network call, batch {n}", n, calls),
        "samplers": rates(f"{steps} ancestral steps, batch {n}", n, measured(samplers, args)),
    }


# -- Training and memory ----------------------------------------------------------------------------------------------


def reset(device: str) -> None:
    """Frees what is not in use, and begins to measure the peak of the memory again."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def train(args: argparse.Namespace, _: Failures) -> dict[str, list[Row]]:
    net, unet, x = pair(args)
    n = len(x)

    def theirs(dtype: torch.dtype, last: bool = False, compiled: bool = False) -> Callable[[], object]:
        layout = LAST if last else torch.contiguous_format
        model, clean = copy.deepcopy(unet).to(memory_format=layout).train(), x.to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler(clean.device.type, enabled=dtype == torch.float16)
        called, t = torch.compile(model) if compiled else model, torch.randint(1000, (n,), device=args.device)

        def step() -> None:
            z = torch.randn_like(clean)
            with torch.autocast(clean.device.type, dtype, enabled=dtype != torch.float32):
                loss = F.mse_loss(called(clean + z, t).sample.float(), z)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return step

    def ours(precision: str, compiled: bool = False) -> Callable[[], object]:
        settings = Settings(images=10**9, batch_size=n, precision=precision, compile=compiled)
        return functools.partial(next, train_steps(copy.deepcopy(net), open_images(x.cpu()), settings))

    runs = {"diffusers, float32": functools.partial(theirs, torch.float32)}
    for dtype in (torch.bfloat16,) if args.smoke else (torch.bfloat16, torch.float16):
        name = f"diffusers, {str(dtype).removeprefix('torch.')} autocast"
        runs[name] = functools.partial(theirs, dtype)
        runs[f"{name}, channels_last"] = functools.partial(theirs, dtype, last=True)
        if not args.smoke:
            runs[f"{name}, compiled"] = functools.partial(theirs, dtype, compiled=True)
    runs |= {f"scorematch, {precision}": functools.partial(ours, precision) for precision in ("float32", "auto")}
    if not args.smoke:
        runs["scorematch, auto, compiled"] = functools.partial(ours, "auto", compiled=True)
    seconds, peaks = {}, {}
    for name, make in runs.items():  # one after another, for the memory
        reset(args.device)
        seconds |= measured({name: make}, args)
        peaks[name] = peak(args.device)
    return {
        "train": [
            {**row, "peak MB": peaks[str(next(iter(row.values())))]}
            for row in rates(f"training, batch {n}", n, seconds)
        ]
    }


def memory(args: argparse.Namespace, failures: Failures) -> dict[str, list[Row]]:
    net, unet, one = pair(args)
    rows: list[Row] = []
    for n in (1, 2) if args.smoke else (1, 64, 512):
        x, level = one[:1].repeat(n, 1, 1, 1), torch.full((n,), 500.0, device=args.device)
        for name in ("diffusers, bfloat16", "scorematch, float32", "scorematch, auto"):
            reset(args.device)
            own = copy.deepcopy(unet if "diffusers" in name else net).to(args.device).eval()
            score = own.bfloat16() if "diffusers" in name else own.inference_copy() if "auto" in name else own
            call = (
                functools.partial(score, x.bfloat16(), level)
                if "diffusers" in name
                else functools.partial(score, x, 0.5)
            )
            held = []
            with torch.no_grad():
                for _ in range(5):
                    call()
                    held.append(0 if args.device == "cpu" else torch.cuda.memory_allocated(args.device))
            rows.append(
                {
                    "a network call": f"{name}, batch {n}",
                    "peak MB": peak(args.device),
                    "MB afterwards": held[-1] / 2**20,
                }
            )
            if held[-1] > held[1]:
                failures.add(f"memory: {name}, batch {n}: {held[-1] - held[1]:,} bytes more after three calls")
    return {"memory": rows}


SECTIONS = {section.__name__: section for section in (correct, waits, speed, train, memory)}
BARS = {"correct": "largest difference", "waits": "waits", "memory": "peak MB"}  # the column that is drawn
TABLES = tuple(f"gpu-{name}" for name in ("correct", "waits", "speed", "samplers", "train", "memory"))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--quick", dest="smoke", action="store_true", help="the same as --smoke")
    options.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="run only these sections")
    options.add_argument("--page", type=Path, help="also write the tables into this page, such as docs/speed.md")
    args = options.parse_args(argv)
    args.repeats = 1 if args.smoke else args.repeats
    warnings.simplefilter("ignore")
    print(f"{machine(args.device)}, fast precision: {native_dtype(args.device)}", flush=True)
    failures, blocks = Failures(), {}
    for name in args.only:
        print(f"\n== {name}", flush=True)
        try:
            tables = SECTIONS[name](args, failures)
        except Exception:
            failures.add(f"{name}: {traceback.format_exc(limit=-4)}")
            continue
        for table, rows in tables.items():
            report(f"gpu-{table}", args, rows, bars=BARS.get(table, "images/s"))
            blocks[f"gpu-{table}"] = json.loads((args.out / f"gpu-{table}.json").read_text(encoding="utf-8"))
    (args.out / "gpu.md").write_text("\n\n".join(map(block, blocks, blocks.values())) + "\n", encoding="utf-8")
    if args.page is not None:
        page = args.page.read_text(encoding="utf-8")
        for name, result in blocks.items():
            page = replace(page, name, result)
        args.page.write_text(page, encoding="utf-8")
    print(f"\n{len(failures)} failures; the tables are in {args.out / 'gpu.md'}")
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
