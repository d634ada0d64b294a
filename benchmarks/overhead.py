"""What a sampler's step costs beyond the network call, as a share of it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --width 128

The network is NCSNv2 at CIFAR-10's size, narrower by default: a laptop is done in a minute.
"""

import statistics

import torch
from common import alternate, parser, ratio, report

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    args = options.parse_args()
    if args.smoke:
        args.width, args.batches, args.repeats = 4, [1, 2], 1

    net = ScoreNet.ncsnv2(3, 32, width=args.width).to(args.device).eval()
    schedule = NoiseSchedule.geometric(50, 0.01, 5)
    # The exact path, so that both call the very same network.
    sampler = AnnealedLangevinSampler(net, schedule, steps_per_level=1, denoise=False, precision="float32")
    rows = []
    for batch in args.batches:
        x, sigma = torch.rand(batch, 3, 32, 32, device=args.device), torch.tensor(1.0, device=args.device)

        @torch.no_grad()
        def calls(x: torch.Tensor = x, sigma: torch.Tensor = sigma) -> None:
            for _ in range(len(sampler)):
                net(x, sigma)

        def chain(x: torch.Tensor = x) -> None:
            sampler.sample(init=x, progress=False)

        seconds = alternate({"calls": calls, "chain": chain}, args.repeats, args.device)
        milliseconds = {name: statistics.median(times) / len(sampler) * 1000 for name, times in seconds.items()}
        rows.append(
            {
                "batch": str(batch),
                "ms a call": milliseconds["calls"],
                "ms a step": milliseconds["chain"],
                "overhead %": 100 * (ratio(seconds, "chain", "calls") - 1),
            }
        )
    report("overhead", args, rows, bars="overhead %")


if __name__ == "__main__":
    main()
