"""Code that all benchmarks share: options, timing that is robust to other load, and the output of the results.

The alternatives that are compared run in turn within one process, many times, so other load on the machine slows all of
them equally. Times are medians, and a ratio is the median of the ratios of neighboring runs. With ``--threads 1`` on a
CPU, the time is the CPU time of the process, which excludes the time during which other processes run.

A benchmark prints a table and writes ``NAME.json`` and ``NAME.png`` into the folder ``--out``.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, str | float]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the table and the plot")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--repeats", type=int, default=7, help="timed runs of each alternative")
    made.add_argument("--threads", type=_threads, help="number of CPU threads (default: torch's choice)")
    made.add_argument("--smoke", action="store_true", help="run at the smallest size, as a test")
    return made


def _threads(value: str) -> int:
    torch.set_num_threads(int(value))
    return int(value)


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """The seconds of each run: all runs in turn, ``repeats`` times, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            begin = now(device)
            run()
            if i >= 2:
                seconds[name].append(now(device) - begin)
    return seconds


def now(device: str) -> float:
    """The clock, in seconds, when the device has finished what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """The median ratio of the times of two runs, slow / fast."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def matmul_peak(dtype: torch.dtype, device: str, size: int) -> float:
    """The FLOP/s of the fastest of twenty products of two size x size matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"": lambda: a @ b}, 20, device)[""])


# -- Machines and results ---------------------------------------------------------------------------------------------


def kind(device: str) -> str:
    """The kind of machine: "CUDA", "AMX", "AVX512-BF16", or the vector instructions of another CPU, such as "AVX2"."""
    if device != "cpu":
        return torch.device(device).type.upper()
    for name, attribute in [("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")]:
        check = getattr(torch.cpu, attribute, None)  # some versions of torch have only one of them
        if check is not None and check():
            return name
    return torch.backends.cpu.get_cpu_capability()


def machine(device: str) -> dict[str, Any]:
    """The machine that a result was measured on."""
    cuda = device.startswith("cuda")
    return {
        "kind": kind(device),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    }


def _processor() -> str:
    """The name of the CPU from /proc/cpuinfo, or its architecture if there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def report(name: str, args: argparse.Namespace, rows: Sequence[Row], *, bars: str) -> None:
    """Prints the rows as a table, writes them and the machine as JSON, and draws one column as bars."""
    columns = list(rows[0])
    cells = [columns] + [[shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(line)))

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    result = {"benchmark": name, "machine": machine(args.device), "settings": settings, "rows": list(rows)}
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([str(row[columns[0]]) for row in rows], [float(row[bars]) for row in rows], color="0.4")
    axes.invert_yaxis()
    axes.set(xlabel=bars, title=name)
    figure.savefig(args.out / f"{name}.png", dpi=120)


def shown(value: str | float) -> str:
    """The text of a table cell: numbers from 999.5 as integers, smaller ones with three significant digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"  # 999.7 with three digits would be 1e+03
