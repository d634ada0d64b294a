"""What a sampler's step costs beyond the network call, as a share of it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --width 128

The chain and the bare network calls alternate within one run, so that a busy machine slows both; the figure is the
median of the ratios. The network is NCSNv2 at CIFAR-10's size, narrower by default: a laptop is done in a minute.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    net = ScoreNet.ncsnv2(3, 32, width=args.width).to(args.device).eval()
    sampler = AnnealedLangevinSampler(net, NoiseSchedule.geometric(50, 0.01, 5), steps_per_level=1, denoise=False)
    print(f"{'batch':>5}  {'ms a call':>9}  {'ms a step':>9}  {'overhead':>8}")
    for batch in args.batches:
        x, sigma = torch.rand(batch, 3, 32, 32, device=args.device), torch.tensor(1.0, device=args.device)

        @torch.no_grad()
        def calls(x: torch.Tensor = x, sigma: torch.Tensor = sigma) -> None:
            for _ in range(len(sampler)):
                net(x, sigma)

        def chain(x: torch.Tensor = x) -> None:
            sampler.sample(init=x, progress=False)

        seconds(calls, args.device), seconds(chain, args.device)  # warm
        pairs = [(seconds(calls, args.device), seconds(chain, args.device)) for _ in range(args.repeats)]
        bare, whole = (statistics.median(pair[i] for pair in pairs) / len(sampler) * 1000 for i in (0, 1))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{batch:>5}  {bare:>9.2f}  {whole:>9.2f}  {ratio - 1:>8.1%}")


if __name__ == "__main__":
    main()
