"""The cost of the training engine: a run of ``train`` and its loader against a bare loop with the same network.

    python benchmarks/engine.py
    python benchmarks/engine.py --device cuda --batch 128

The bare loop has its batch ready on the device. A step of it computes the loss and its gradient, clips the gradient,
and moves fused AdamW and two averages of the weights. The run and the bare loop take turns of a few steps: at each line
of its log the run waits for the bare loop. The run reads files, draws noise, looks for NaN and writes its log.
Checkpoints and pictures of samples are not part of it: a run writes a checkpoint every ten minutes, and pictures take
at most 2 % of its time.

The loader reads batches from a folder of JPEG files with the size of the images, in the order of a run. It decodes them
each time, or reads the memory-mapped cache. "time" is the time per image, divided by that of the bare loop. The engine
reads ahead in a thread, so that a loader is fast enough if its time is below 1.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from common import alternate, now, parser, ratio, report

from scorematch import ScoreNet, dsm_loss
from scorematch.core.precision import autocast
from scorematch.data import ImageData, open_images, save_image
from scorematch.data import cache as loader
from scorematch.training import RECIPES, train
from scorematch.training.levels import levels_for, weighting_for
from scorematch.training.steps import Order

NEVER = 10**12  # images between two events that are not measured


def pictures(folder: Path, n: int, size: int) -> None:
    """Writes JPEG files of smooth random pictures."""
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
        save_image(image[0], folder / f"{i:04d}.jpg")


def bare_loop(net: ScoreNet, x: torch.Tensor, steps: int) -> Callable[[], None]:
    """A function that takes so many training steps on one batch."""
    net.to(x.device, memory_format=torch.channels_last).train()
    x = x.contiguous(memory_format=torch.channels_last)
    sigma = levels_for(net, None).quantile(torch.linspace(0.01, 0.99, len(x), dtype=torch.float64)).to(x)
    noise, weighting, parameters = torch.randn_like(x), weighting_for(net, None, 2), list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    averages = [[parameter.detach().clone() for parameter in parameters] for _ in range(2)]

    def run() -> None:
        for _ in range(steps):
            with autocast(x.device):
                loss = dsm_loss(net, x, sigma=sigma, noise=noise, weighting=weighting)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, x[0].numel() / 2)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for average in averages:
                    torch._foreach_lerp_(average, parameters, 0.001)

    return run


class Turns(GeneralTracker):
    """A tracker of Accelerate that runs the bare loop at each line of the log, and keeps the seconds of both."""

    name, requires_logging_directory, tracker = "turns", False, None

    def __init__(self, bare: Callable[[], None], device: str) -> None:
        super().__init__()
        self.bare, self.device = bare, device
        self.seconds: dict[str, list[float]] = {"train": [], "bare": []}
        self.since: float | None = None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keeps nothing."""

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Ends a turn of the run, and runs the bare loop."""
        end = now(self.device)
        self.bare()
        after = now(self.device)
        if self.since is not None:
            self.seconds["train"].append(end - self.since)
            self.seconds["bare"].append(after - end)
        self.since = after


def run_by_turns(
    net: ScoreNet, data: ImageData, bare: Callable[[], None], args: Any, out: Path
) -> dict[str, list[float]]:
    """The seconds of each turn of ``train`` and of the bare loop."""
    turns = Turns(bare, args.device)
    accelerator = Accelerator(cpu=args.device == "cpu", log_with=turns)
    accelerator.init_trackers("engine")
    turn = args.steps * args.batch
    every = {"sample_every": NEVER, "snapshot_every": NEVER, "checkpoint_every": NEVER, "log_every": turn}
    options = {"images": (args.repeats + 3) * turn, "batch_size": args.batch, "progress": False}
    train(net, data, out, **options, **every, accelerator=accelerator)
    return {name: seconds[-args.repeats :] for name, seconds in turns.seconds.items()}  # without the first two


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--recipe", default="small-64", choices=RECIPES)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=2, help="in a turn")
    options.add_argument("--files", type=int, default=1024, help="JPEG files that the loader reads")
    args = options.parse_args(argv)
    size = RECIPES[args.recipe].image_size
    if args.smoke:
        args.recipe, size, args.batch, args.steps, args.files, args.repeats = "tiny", 16, 4, 1, 8, 1

    torch.manual_seed(0)
    net = RECIPES[args.recipe].build(3, size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures(folder / "pictures", args.files, size)
        cached = open_images(folder / "pictures", cache=folder / "cache", progress=False)
        kept, loader._IN_MEMORY = loader._IN_MEMORY, 0  # as of a set that is too large to be kept in memory
        decoded = open_images(folder / "pictures", progress=False)
        loader._IN_MEMORY = kept

        x = cached.read(range(args.batch))[0].to(args.device).float() / 255
        bare = bare_loop(copy.deepcopy(net), x, args.steps)
        turns = run_by_turns(net, cached, bare, args, folder / "run")

        def read(data: ImageData) -> Callable[[], None]:
            order, turn = Order(len(data), seed=0), args.steps * args.batch
            return lambda: [data.read(order(first, first + args.batch)) for first in range(0, turn, args.batch)]

        runs = {"bare": bare, "loader, JPEG files decoded each time": read(decoded), "loader, cache": read(cached)}
        loads = alternate(runs, args.repeats, args.device)
    rows = []
    for name, seconds in [("bare", turns), ("train", turns), *((name, loads) for name in list(runs)[1:])]:
        rows.append(
            {
                f"{args.recipe}, batch {args.batch}": "bare loop" if name == "bare" else name,
                "images/s": args.steps * args.batch / statistics.median(seconds[name]),
                "time": ratio(seconds, name, "bare"),
            }
        )
    report("engine", args, rows, bars="time")


if __name__ == "__main__":
    main()
