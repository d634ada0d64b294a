"""How good digits are for what they cost: every sampler, at several numbers of network calls.

    python benchmarks/quality.py --data FOLDER --out runs/quality

The network is the one that ships as "mnist"; the figures are those of ``examples/evaluate_mnist.py``, of the same seed
for every line, the test digits' own last. The table is printed as it grows, and written to ``quality.json`` and
``quality.png``. At the end stands the line that the most samples of can be read, among those of at most 250 calls that
keep the data's balance and contrast: no digit rarer than 5 %, and a deviation of the pixels within 0.02 of the data's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from evaluate_mnist import figures, load_classifier, read
from mnist import load_digits

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler, Sampler

_CALLS, _RAREST, _CONTRAST = 250, 0.05, 0.02


def lines(net: ScoreNet, counts: list[int] | None) -> Iterator[tuple[str, Sampler]]:
    """A family and a sampler for each line; ``counts`` stands in for the numbers of levels."""
    own = net.schedule

    def levels(*ladders: int) -> list[NoiseSchedule]:
        return [own.respaced(n) for n in counts or ladders]

    recommended = (
        AnnealedLangevinSampler(net, levels(0)[0], steps_per_level=1) if counts else AnnealedLangevinSampler(net)
    )
    yield "recommended", recommended
    for n in counts or (10, 18, 36):
        yield "Heun", ODESampler(net, levels=n)
    for n in counts or (18, 36, 72):
        yield "DPM-Solver++(2M)", ODESampler(net, levels=n, method="dpm-solver++")
    rules: dict[str, Callable[[float], float]] = {  # of the ratio of levels: near the published one, ancestral, fixed
        "1 - r^1.5": lambda r: 1 - r**1.5,
        "1 - r^2": lambda r: 1 - r**2,
        "0.35": lambda r: 0.35,
        "0.5": lambda r: 0.5,
    }
    for rule, a in rules.items():
        for schedule in levels(50, 100, 200):
            step_size = a(schedule[1] / schedule[0]) * schedule.sigma_min**2
            sampler = AnnealedLangevinSampler(net, schedule, step_size=step_size, consistent=True)
            yield f"consistent, {rule}", sampler
    for n in counts or (50, 100):
        yield "ancestral, large variance", AncestralSampler(net, levels=n)
    for schedule in levels(25, 50, 100):
        yield "corrected reverse step", PredictorCorrectorSampler(net, schedule, predictor="reverse-diffusion")
    for schedule in levels(25, 50, 100):
        yield "corrected ancestral step", PredictorCorrectorSampler(net, schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--model", default="mnist", help='a short name or a folder ("mnist")')
    parser.add_argument("--n", type=int, default=200, help="samples of each line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--classifier", type=Path, default=Path("runs/digit_classifier.pt"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", type=int, nargs="+", help="which lines, by their number")
    parser.add_argument("--smoke", action="store_true", help="few samples on few levels, to see that it runs")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    classifier = load_classifier(args.classifier, args.data)
    train = load_digits(args.data, "train")[0].float() / 255
    reference, contrast = read(classifier, train)[1], float(train.std())
    test = load_digits(args.data, "test")[0].float() / 255
    net = ScoreNet.from_pretrained(args.model)
    n = 4 if args.smoke else args.n
    rows: list[dict[str, Any]] = []
    print(f"{'':>2} {'':<25} {'calls':>5} | confident rarest frechet   std variation | seconds", flush=True)
    for number, (family, sampler) in enumerate(lines(net, [20] if args.smoke else None)):
        if args.only is not None and number not in args.only:
            continue
        begin = time.perf_counter()
        samples = sampler.sample(n, generator=torch.Generator().manual_seed(args.seed), progress=False)
        seconds = time.perf_counter() - begin
        row = {"family": family, "sampler": str(sampler), "calls": len(sampler), "seconds": seconds}
        rows.append(row | figures(classifier, samples, reference))
        print(f"{number:>2} {_row(rows[-1])} | {seconds:>7.1f}", flush=True)
    chosen = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))[:n]]
    data = {"family": "test digits", "calls": 0} | figures(classifier, chosen, reference)
    print(f"{'':>2} {_row(data)}")
    (args.out / "quality.json").write_text(
        json.dumps({"model": args.model, "n": n, "seed": args.seed, "rows": rows, "test digits": data}, indent=1)
    )
    _plot(rows, data, args.out / "quality.png")
    faithful = [
        row
        for row in rows
        if row["calls"] <= _CALLS and row["rarest"] >= _RAREST and abs(row["pixel std"] - contrast) <= _CONTRAST
    ]
    best = max(faithful, key=lambda row: (row["confident"], -row["calls"]), default=None)
    print(f"best within {_CALLS} calls: {'none' if best is None else best['sampler']}")


def _row(found: dict[str, Any]) -> str:
    return (
        f"{found['family']:<25} {found['calls']:>5} | {found['confident']:>9.1%} {found['rarest']:>6.1%} "
        f"{found['frechet']:>7.2f} {found['pixel std']:.3f} {found['variation']:>9.4f}"
    )


def _plot(rows: list[dict[str, Any]], data: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, label in zip(
        axes, ("frechet", "confident"), ("Fréchet distance", "share over 0.9 confident"), strict=True
    ):
        for family in dict.fromkeys(row["family"] for row in rows):
            own = sorted((row["calls"], row[name]) for row in rows if row["family"] == family)
            axis.plot(*zip(*own, strict=True), "o-", label=family)
        axis.axhline(data[name], color="gray", linestyle=":", label="test digits")
        axis.set(xscale="log", xlabel="network calls", ylabel=label)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
