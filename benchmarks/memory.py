"""The most memory that sampling takes, by the number of images, each count in a process of its own.

    python benchmarks/memory.py

The network is NCSNv2 at CIFAR-10's size, narrower by default. "beyond one batch" is what the largest count takes more
than a count that is one batch of the sampler's default, 341 images of this size: its result, and little else.
"""

import resource
import subprocess
import sys

from common import parser, report


def peak(count: int, width: int) -> float:
    """Megabytes resident at most in a process that draws ``count`` images."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, "--count", str(count), "--width", str(width)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def draw(count: int, width: int) -> None:
    from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet

    net = ScoreNet.ncsnv2(3, 32, width=width)
    schedule = NoiseSchedule.geometric(50, 0.01, 2)
    AnnealedLangevinSampler(net, schedule, steps_per_level=1).sample(count, progress=False)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # kilobytes on Linux
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--counts", type=int, nargs="+", default=[1, 64, 341, 4096])
    options.add_argument("--count", type=int, help="draw so many in this process, and say what it took")
    args = options.parse_args()
    if args.count is not None:
        draw(args.count, args.width)
        return
    if args.smoke:
        args.width, args.counts = 4, [1, 2]
    rows = [
        {"images": str(count), "MB": peak(count, args.width), "MB of the result": count * 3072 * 4 / 2**20}
        for count in args.counts
    ]
    report("memory", args, rows, bars="MB")


if __name__ == "__main__":
    main()
