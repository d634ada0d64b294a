"""The peak memory of sampling for several numbers of images, each measured in a separate process.

    python benchmarks/memory.py

The network is NCSNv2 for images of CIFAR-10's size, with 32 channels by default. Samplers pass 341 images of this size
through the network at a time; for more images the additional memory is mainly that of the result. On a CPU the peak is
the largest resident set size of the process, on CUDA the largest memory that torch allocated on the device.
"""

import resource
import subprocess
import sys
from collections.abc import Sequence

from common import parser, report


def peak(count: int, width: int, device: str) -> float:
    """The peak memory in MB of a process that draws ``count`` images."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, "--count", str(count), "--width", str(width), "--device", device],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def draw(count: int, width: int, device: str) -> None:
    import torch

    from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet

    net = ScoreNet.ncsnv2(3, 32, width=width).to(device)
    schedule = NoiseSchedule.geometric(50, 0.01, 2)
    AnnealedLangevinSampler(net, schedule, steps_per_level=1).sample(count, progress=False)
    if device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in kilobytes on Linux and in bytes on macOS
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=32, help="channels of the network")
    options.add_argument("--counts", type=int, nargs="+", default=[1, 64, 341, 4096], help="numbers of images")
    options.add_argument("--count", type=int, help="draw this many images in this process, and print its peak memory")
    args = options.parse_args(argv)
    if args.count is not None:
        draw(args.count, args.width, args.device)
        return
    if args.smoke:
        args.width, args.counts = 4, [1, 2]
    rows = [
        {"images": str(count), "MB": peak(count, args.width, args.device), "MB of the result": count * 3072 * 4 / 2**20}
        for count in args.counts
    ]
    report("memory", args, rows, bars="MB")


if __name__ == "__main__":
    main()
