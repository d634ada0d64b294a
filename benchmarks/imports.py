"""The time in seconds of ``import scorematch`` after ``import torch``, each measured in a new process.

python benchmarks/imports.py
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence

from common import parser, report

CODE = "import time, torch; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
NAMES = ["scorematch", "numpy", "einops", "safetensors.torch", "tqdm.auto"]  # the package, and packages that it imports


def main(argv: Sequence[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    names = NAMES
    if args.smoke:
        args.repeats, names = 1, NAMES[:2]
    rows = []
    for name in names:
        command = [sys.executable, "-c", CODE.format(name)]
        seconds = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603
            for _ in range(args.repeats + 1)
        ]
        rows.append({"import": name, "seconds": statistics.median(seconds[1:])})
    report("imports", args, rows, bars="seconds")


if __name__ == "__main__":
    main()
