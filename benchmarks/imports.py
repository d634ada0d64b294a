"""Seconds that ``import scorematch`` takes beyond ``import torch``, in fresh processes.

python benchmarks/imports.py
"""

import statistics
import subprocess
import sys

from common import parser, report

CODE = "import time, torch; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
NAMES = ["scorematch", "numpy", "einops", "safetensors.torch", "tqdm.auto"]  # the package, and what it needs


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.smoke:
        args.repeats = 1
    rows = []
    for name in NAMES:
        command = [sys.executable, "-c", CODE.format(name)]
        seconds = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603
            for _ in range(args.repeats + 1)
        ]
        rows.append({"import": name, "seconds": statistics.median(seconds[1:])})
    report("imports", args, rows, bars="seconds")


if __name__ == "__main__":
    main()
