"""What the benchmarks share: timing that a busy machine cannot fool, and one form of result.

What is compared runs in turn within one process, again and again, so that whatever else the machine does slows all of
it alike; figures are medians, and a ratio is the median of the ratios of neighbors. With ``--threads 1`` on a CPU the
clock is the process's own: it stands still while others compute.

A benchmark prints a table and writes ``NAME.json`` and ``NAME.png`` into its ``--out`` folder.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Row = Mapping[str, str | float]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the table and the plot")
    made.add_argument("--device", default="cpu")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--threads", type=_threads, help="of the processor; none given, torch decides")
    made.add_argument("--smoke", action="store_true", help="the smallest size, to see that all runs")
    return made


def _threads(said: str) -> int:
    torch.set_num_threads(int(said))
    return int(said)


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times in turn, after two rounds that do not count."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            _wait(device)
            begin = clock()
            run()
            _wait(device)
            if i >= 2:
                seconds[name].append(clock() - begin)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times as long one takes as another."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def matmul_peak(dtype: torch.dtype, device: str, size: int) -> float:
    """FLOP/s of the best of twenty products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"": lambda: a @ b}, 20, device)[""])


def report(name: str, args: argparse.Namespace, rows: Sequence[Row], *, bars: str) -> None:
    """Prints the rows as a table, writes them and what they were measured on as JSON, and draws one column as bars."""
    columns = list(rows[0])
    cells = [columns] + [[_said(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(line)))

    args.out.mkdir(parents=True, exist_ok=True)
    cuda = args.device.startswith("cuda")
    machine = {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    settings = {key: str(value) for key, value in vars(args).items()}
    result = {"benchmark": name, "machine": machine, "settings": settings, "rows": list(rows)}
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 0.6 + 0.35 * len(rows)), layout="constrained")
    axes.barh([str(row[columns[0]]) for row in rows], [float(row[bars]) for row in rows], color="0.4")
    axes.invert_yaxis()
    axes.set(xlabel=bars, title=name)
    figure.savefig(args.out / f"{name}.png", dpi=120)


def _said(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
