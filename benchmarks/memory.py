"""The peak memory of sampling for several numbers of images, and whether long runs need more memory than short ones.

    python benchmarks/memory.py
    python benchmarks/memory.py --long

Each row is measured in a separate process. The network of the first command is NCSNv2 for images of CIFAR-10's size,
with 32 channels by default. Samplers pass 341 images of this size through the network at a time; for more images the
additional memory is mainly that of the result. On a CPU the peak is the largest resident set size of the process, on
CUDA the largest memory that torch allocated on the device.

With ``--long`` a small network for images of 8 x 8 pixels draws 100,000 images in a stream (``bulk_samples``), draws
images in 1,000 calls of ``sample``, and is trained for 1,000 steps (``train_steps``). The peak is measured after a
tenth of the run and at its end; without a leak they are equal, except for the overhead of the allocator.
"""

import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence

from common import parser, report

# Name of a long run -> the number of its repetitions.
LONG = {"images in a stream": 100_000, "calls of sample": 1_000, "training steps": 1_000}


def measured(*arguments: object) -> list[float]:
    """The numbers that this program prints in a separate process with the arguments."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


def peak(device: str) -> float:
    """The peak memory of this process in MB."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in kilobytes on Linux and in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def draw(count: int, width: int, device: str) -> None:
    """Draws images, and prints the peak memory."""
    from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet

    net = ScoreNet.ncsnv2(3, 32, width=width).to(device)
    schedule = NoiseSchedule.geometric(50, 0.01, 2)
    AnnealedLangevinSampler(net, schedule, steps_per_level=1).sample(count, progress=False)
    print(peak(device))


def repetitions(name: str, count: int, device: str) -> Iterator[int]:
    """Executes a long run, and yields the number of repetitions so far."""
    import torch

    from scorematch import NoiseSchedule, ScoreNet
    from scorematch.data import open_images
    from scorematch.sampling import ODESampler, bulk_samples
    from scorematch.training import Settings, train_steps

    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, attention=[False], schedule=NoiseSchedule([1.0, 0.1]))
    net = net.to(device)
    if name == "images in a stream":
        for batch in bulk_samples(ODESampler(net), count, batch_size=500):
            yield batch.indices.stop
    elif name == "calls of sample":
        for i in range(count):
            ODESampler(net).sample(8, progress=False)
            yield i + 1
    else:
        data = open_images(torch.rand(64, 1, 8, 8))
        for step in train_steps(net, data, Settings(images=8 * count, batch_size=8)):
            yield step.state.step


def repeat(name: str, count: int, device: str) -> None:
    """Executes a long run, and prints the peak memory after a tenth of it and at its end."""
    begun = False
    for done in repetitions(name, count, device):
        if done >= count / 10 and not begun:
            begun = True
            print(peak(device))
    print(peak(device))


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=32, help="channels of the network")
    options.add_argument("--counts", type=int, nargs="+", default=[1, 64, 341, 4096], help="numbers of images")
    options.add_argument("--long", action="store_true", help="measure long runs")
    options.add_argument("--part", type=float, default=1, help="shorten the long runs to this part, such as 0.1")
    options.add_argument("--run", choices=["draw", *LONG], help="execute one run in this process, and print its memory")
    args = options.parse_args(argv)
    if args.smoke:
        args.width, args.counts, args.part = 4, [1, 2], 0.01
    device = ["--device", args.device]
    if args.run == "draw":
        draw(args.counts[0], args.width, args.device)
    elif args.run is not None:
        repeat(args.run, max(2, int(LONG[args.run] * args.part)), args.device)
    elif args.long:
        rows = []
        for name, count in LONG.items():
            early, late = measured("--run", name, "--part", args.part, *device)
            row = {"run": f"{int(count * args.part):,} {name}", "MB after a tenth": early, "MB at the end": late}
            rows.append({**row, "difference": late - early})
        report("memory", args, rows, bars="MB at the end")
    else:
        rows = []
        for count in args.counts:
            (megabytes,) = measured("--run", "draw", "--counts", count, "--width", args.width, *device)
            rows.append({"images": str(count), "MB": megabytes, "MB of the result": count * 3072 * 4 / 2**20})
        report("memory", args, rows, bars="MB")


if __name__ == "__main__":
    main()
