"""The time of a sampler's step in addition to its network call, in percent of the call.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --width 128

The network is NCSNv2 for images of CIFAR-10's size, with 64 channels by default.
"""

import statistics
from collections.abc import Sequence

import torch
from common import alternate, parser, ratio, report

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=64, help="channels of the network")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="batch sizes")
    args = options.parse_args(argv)
    if args.smoke:
        args.width, args.batches, args.repeats = 4, [1, 2], 1

    # The bare calls and the sampler use the same inference copy.
    net = ScoreNet.ncsnv2(3, 32, width=args.width).to(args.device).eval().inference_copy()
    schedule = NoiseSchedule.geometric(50, 0.01, 5)
    sampler = AnnealedLangevinSampler(net, schedule, steps_per_level=1, exact_noise=True, denoise=False)
    rows = []
    for batch in args.batches:
        x = torch.rand(batch, 3, 32, 32, device=args.device)

        @torch.no_grad()
        def calls(x: torch.Tensor = x) -> None:
            for sigma in schedule:
                net(x, sigma)

        def chain(x: torch.Tensor = x) -> None:
            sampler.sample(init=x, progress=False)

        seconds = alternate({"calls": calls, "chain": chain}, args.repeats, args.device)
        milliseconds = {name: statistics.median(times) / len(sampler) * 1000 for name, times in seconds.items()}
        rows.append(
            {
                "batch": str(batch),
                "ms per call": milliseconds["calls"],
                "ms per step": milliseconds["chain"],
                "overhead %": 100 * (ratio(seconds, "chain", "calls") - 1),
            }
        )
    report("overhead", args, rows, bars="overhead %")


if __name__ == "__main__":
    main()
