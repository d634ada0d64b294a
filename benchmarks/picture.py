"""The time from starting ``python`` to a saved picture, for 16 images from a network with random weights.

    python benchmarks/picture.py                    # the 1,000 steps of diffusers are extrapolated from a few
    python benchmarks/picture.py --all-steps        # all 1,000 steps run
    python benchmarks/picture.py --calls 8          # the solvers with few calls take 8

The network has the architecture of google/ddpm-cifar10-32. Each run is a separate process: it imports the library,
loads the same folder in the layout of diffusers, draws the images, and writes a picture. diffusers runs its
DDPMPipeline as its model page shows, and with its schedulers for few calls, whose DPM-Solver++ also runs in bfloat16;
this package follows the probability flow with the same number of calls. Without ``--all-steps``, the time of the 1,000
steps is extrapolated from that of ``--few`` steps, measured after one warm-up step. With ``--threads 1`` on a CPU, the
times are CPU times of the processes.

"per call" is the ratio of the times per network call, including imports and loading.
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
from common import parser, ratio, report
from networks import DDPM

STEPS = 1000
PIPELINE = """
import time
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained({folder!r}).to({device!r})
pipeline.set_progress_bar_config(disable=True)
for steps in {steps}:
    begin = time.{clock}()
    images = pipeline(batch_size={n}, num_inference_steps=steps).images
    taken = time.{clock}() - begin
images[0].save({picture!r})
print(taken)
"""
SCHEDULER = """
import torch
from diffusers import UNet2DModel, {scheduler} as Scheduler
from diffusers.utils import make_image_grid, pt_to_pil
unet = UNet2DModel.from_pretrained({folder!r}, subfolder="unet", torch_dtype=torch.{dtype}).to({device!r})
scheduler = Scheduler.from_pretrained({folder!r}, subfolder="scheduler")
scheduler.set_timesteps({steps})
x = torch.randn({n}, 3, 32, 32, device={device!r}, dtype=unet.dtype)
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
make_image_grid(pt_to_pil(x.float()), 1, {n}).save({picture!r})
"""
OURS = """
from scorematch import ScoreNet
from scorematch.data import save_grid
from scorematch.sampling import ODESampler
net = ScoreNet.from_pretrained({folder!r}).to({device!r})
images = ODESampler(net, levels={steps}, method={method!r}).sample({n}, progress=False)
save_grid(images, {picture!r})
"""


# The row, the program and what it needs. UniPC and DEIS do not fit the DDPMPipeline, which passes a generator.
FEW: dict[str, tuple[str, dict[str, str]]] = {
    "diffusers, DPM-Solver++": (SCHEDULER, {"scheduler": "DPMSolverMultistepScheduler", "dtype": "float32"}),
    "diffusers, DPM-Solver++, bfloat16": (SCHEDULER, {"scheduler": "DPMSolverMultistepScheduler", "dtype": "bfloat16"}),
    "diffusers, UniPC": (SCHEDULER, {"scheduler": "UniPCMultistepScheduler", "dtype": "float32"}),
    "diffusers, DEIS": (SCHEDULER, {"scheduler": "DEISMultistepScheduler", "dtype": "float32"}),
    "scorematch, DPM-Solver++": (OURS, {"method": "dpm-solver++"}),
    "scorematch, UniPC": (OURS, {"method": "unipc"}),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--calls", type=int, default=18, help="network calls of the solvers with few (default: 18)")
    options.add_argument("--few", type=int, default=20, help="number of steps of diffusers that are timed")
    options.add_argument("--all-steps", action="store_true", help="run all 1,000 steps of diffusers")
    args = options.parse_args(argv)
    n, widths = 16, DDPM["block_out_channels"]
    if args.smoke:
        n, widths, args.repeats, args.few, args.calls = 2, (32, 32, 32, 32), 1, 1, 2
    programs = dict(list(FEW.items())[::4]) if args.smoke else FEW  # one of each library

    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    environment = None if args.threads is None else os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    cpu_time = args.device == "cpu" and args.threads == 1

    def clock() -> float:
        """The seconds that have passed, or those that the processes so far have spent on the CPU."""
        spent = os.times()
        return spent.children_user + spent.children_system if cpu_time else time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        unet = UNet2DModel(sample_size=32, **{**DDPM, "block_out_channels": widths})
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)

        def run(program: str, **values: object) -> tuple[float, str]:
            """The seconds that a program takes in a new process, and its output."""
            values |= {"folder": folder, "device": args.device, "n": n}
            values["picture"] = str(Path(folder) / f"{time.monotonic_ns()}.png")
            begin = clock()
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-c", program.format(**values)], capture_output=True, text=True, env=environment
            )
            seconds = clock() - begin
            if done.returncode:
                sys.exit(done.stderr)
            return seconds, done.stdout

        def thousand() -> float:
            inner = "process_time" if cpu_time else "perf_counter"
            if args.all_steps:
                return run(PIPELINE, steps=[STEPS], clock=inner)[0]
            seconds, few = run(PIPELINE, steps=[1, args.few], clock=inner)
            return seconds - float(few) + (STEPS - 1) * float(few) / args.few

        first = f"diffusers, DDPMPipeline{'' if args.all_steps else f' ({args.few} timed)'}"
        times: dict[str, list[float]] = {first: [], **{name: [] for name in programs}}
        for _ in range(args.repeats):
            times[first].append(thousand())
            for name, (program, values) in programs.items():
                times[name].append(run(program, steps=args.calls, **values)[0])
    title, rows = f"{n} images, from `python` to the picture", []
    for name, seconds in times.items():
        calls, faster = STEPS if name == first else args.calls, ratio(times, first, name)
        row = {title: name, "calls": calls, "seconds": statistics.median(seconds), "ratio": faster}
        rows.append({**row, "per call": faster * calls / STEPS})
    report("picture", args, rows, bars="seconds")


if __name__ == "__main__":
    main()
