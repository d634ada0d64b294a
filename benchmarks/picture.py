"""The time from starting ``python`` to a saved picture, for 16 images from a network with random weights.

    python benchmarks/picture.py                    # the 1,000 steps of diffusers are extrapolated from a few
    python benchmarks/picture.py --all-steps        # all 1,000 steps run

The network has the architecture of google/ddpm-cifar10-32. Each run is a separate process: it imports the library,
loads the same folder in the layout of diffusers, draws the images, and writes a picture. diffusers runs its
DDPMPipeline as its model page shows; this package follows the probability flow with DPM-Solver++ on 18 levels. Without
``--all-steps``, the time of the 1,000 steps is extrapolated from that of ``--few`` steps, measured after one warm-up
step.

Most of the ratio comes from the number of network calls. "per call" is the ratio of the times per network call,
including imports and loading.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser, report
from networks import DDPM

STEPS, CALLS = 1000, 18
THEIRS = """
import time
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained({folder!r}).to({device!r})
pipeline.set_progress_bar_config(disable=True)
for steps in {steps}:
    begin = time.perf_counter()
    images = pipeline(batch_size={n}, num_inference_steps=steps).images
    taken = time.perf_counter() - begin
images[0].save({picture!r})
print(taken)
"""
OURS = """
from scorematch import ScoreNet
from scorematch.data import save_grid
from scorematch.sampling import ODESampler
net = ScoreNet.from_pretrained({folder!r}).to({device!r})
images = ODESampler(net, levels={steps}, method="dpm-solver++").sample({n}, progress=False)
save_grid(images, {picture!r})
"""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--few", type=int, default=20, help="number of steps of diffusers that are timed")
    options.add_argument("--all-steps", action="store_true", help="run all 1,000 steps of diffusers")
    args = options.parse_args(argv)
    n, widths = 16, DDPM["block_out_channels"]
    if args.smoke:
        n, widths, args.repeats, args.few = 2, (32, 32, 32, 32), 1, 1

    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    environment = None if args.threads is None else os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        unet = UNet2DModel(sample_size=32, **{**DDPM, "block_out_channels": widths})
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)

        def run(program: str, steps: object) -> tuple[float, str]:
            """The seconds that a program takes in a new process, and its output."""
            picture = str(Path(folder) / f"{time.monotonic_ns()}.png")
            code = program.format(folder=folder, device=args.device, n=n, steps=steps, picture=picture)
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)  # noqa: S603
            seconds = time.perf_counter() - begin
            if done.returncode:
                sys.exit(done.stderr)
            return seconds, done.stdout

        def theirs() -> float:
            if args.all_steps:
                return run(THEIRS, [STEPS])[0]
            seconds, few = run(THEIRS, [1, args.few])
            return seconds - float(few) + (STEPS - 1) * float(few) / args.few

        pairs = [(theirs(), run(OURS, CALLS)[0]) for _ in range(args.repeats)]
    faster = statistics.median(a / b for a, b in pairs)
    name = f"{n} images, from `python` to the picture"
    timed = "" if args.all_steps else f" ({args.few} timed)"
    report(
        "picture",
        args,
        [
            {
                name: f"diffusers, DDPMPipeline{timed}",
                "calls": STEPS,
                "seconds": statistics.median(a for a, _ in pairs),
                "ratio": 1.0,
                "per call": 1.0,
            },
            {
                name: "scorematch, DPM-Solver++",
                "calls": CALLS,
                "seconds": statistics.median(b for _, b in pairs),
                "ratio": faster,
                "per call": faster * CALLS / STEPS,
            },
        ],
        bars="seconds",
    )


if __name__ == "__main__":
    main()
