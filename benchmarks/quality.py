"""The quality of digits against the number of network calls, for every sampler.

    python benchmarks/quality.py --data FOLDER --out runs/quality

The network is "mnist", which ships with the package. The columns are those of ``examples/tune_mnist.py``, with the
same seed for every row; the last row is for test digits. The program prints each row when it is measured, and writes
``quality.json`` and ``quality.png``. At the end it prints the sampler with the largest share of confident samples,
among the rows with at most 250 calls that keep the balance and the contrast of the data: no digit rarer than 5 %, and a
standard deviation of the pixels within 0.02 of that of the data.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import machine, parser

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digit_classifier import add_options
from mnist import load_digits
from tune_mnist import digit_figures, row, some_test_digits

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.evaluation import image_figures
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler, Sampler

CALLS, RAREST, CONTRAST = 250, 0.05, 0.02  # the conditions on the best row


def lines(net: ScoreNet, counts: list[int] | None) -> Iterator[tuple[str, Sampler]]:
    """The name and the sampler of each row; ``counts`` replaces the numbers of levels."""

    def schedules(*levels: int) -> list[NoiseSchedule]:
        return [net.schedule.respaced(n) for n in counts or levels]

    yield "recommended", AnnealedLangevinSampler(net, levels=counts[0] if counts else None)
    for n in counts or (10, 18, 36):
        yield "Heun", ODESampler(net, levels=n)
    for n in counts or (18, 36, 72):
        yield "DPM-Solver++", ODESampler(net, levels=n, method="dpm-solver++")
    rules: dict[str, Callable[[float], float]] = {  # the step, given the ratio of neighboring levels
        "1 - r^1.5": lambda r: 1 - r**1.5,
        "1 - r^2": lambda r: 1 - r**2,
        "0.35": lambda r: 0.35,
        "0.5": lambda r: 0.5,
    }
    for rule, a in rules.items():
        for schedule in schedules(50, 100, 200):
            step_size = a(schedule[1] / schedule[0]) * schedule.sigma_min**2
            sampler = AnnealedLangevinSampler(net, schedule, step_size=step_size, consistent=True)
            yield f"consistent, {rule}", sampler
    for n in counts or (50, 100):
        yield "ancestral, large variance", AncestralSampler(net, levels=n)
    for schedule in schedules(25, 50, 100):
        yield (
            "predictor-corrector, reverse diffusion",
            PredictorCorrectorSampler(net, schedule, predictor="reverse-diffusion"),
        )
    for schedule in schedules(25, 50, 100):
        yield "predictor-corrector, ancestral", PredictorCorrectorSampler(net, schedule)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_options(options)
    options.set_defaults(out=Path("runs/quality"))
    options.add_argument("--n", type=int, default=200, help="samples per row")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", type=int, nargs="+", help="measure only the rows with these numbers")
    args = options.parse_args(argv)
    if args.smoke:
        args.n = 4

    args.out.mkdir(parents=True, exist_ok=True)
    figures = digit_figures(args.data, args.classifier)
    net = ScoreNet.from_pretrained(args.model).to(args.device)
    rows: list[dict[str, Any]] = []
    print(f"{'':>2} {'':<25} {'calls':>5} | confident rarest frechet   std variation | seconds", flush=True)
    for number, (family, sampler) in enumerate(lines(net, [20] if args.smoke else None)):
        if args.only is not None and number not in args.only:
            continue
        begin = time.perf_counter()
        samples = sampler.sample(args.n, generator=args.seed, progress=False).cpu()
        seconds = time.perf_counter() - begin
        measured = {"family": family, "sampler": str(sampler), "calls": len(sampler), "seconds": seconds}
        rows.append(measured | figures(samples))
        print(f"{number:>2} {_row(rows[-1])} | {seconds:>7.1f}", flush=True)
    data = {"family": "test digits", "calls": 0} | figures(some_test_digits(args.data, args.n, args.seed))
    print(f"{'':>2} {_row(data)}")
    result = {"model": args.model, "n": args.n, "seed": args.seed, "machine": machine(args.device), "rows": rows}
    (args.out / "quality.json").write_text(json.dumps(result | {"test digits": data}, indent=1) + "\n", "utf-8")
    _plot(rows, data, args.out / "quality.png")
    std = image_figures(load_digits(args.data, "train")[0].split(1000))["std"].value
    faithful = [
        each
        for each in rows
        if each["calls"] <= CALLS and each["rarest"] >= RAREST and abs(each["std"] - std) <= CONTRAST
    ]
    best = max(faithful, key=lambda each: (each["confident"], -each["calls"]), default=None)
    print(f"best within {CALLS} calls: {'none' if best is None else best['sampler']}")


def _row(found: dict[str, Any]) -> str:
    return f"{found['family']:<25} {found['calls']:>5} | {row(found)}"


def _plot(rows: list[dict[str, Any]], data: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(
        axes, ("frechet", "confident"), ("Fréchet distance", "share over 0.9 confident"), strict=True
    ):
        for family in dict.fromkeys(each["family"] for each in rows):
            line = sorted((each["calls"], each[name]) for each in rows if each["family"] == family)
            axis.plot(*zip(*line, strict=True), "o-", label=family)
        axis.axhline(data[name], color="gray", linestyle=":", label="test digits")
        axis.set(xscale="log", xlabel="network calls", ylabel=label)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
