"""Runs every benchmark at full size, and writes its tables into docs/speed.md.

    python benchmarks/all.py --data FOLDER                  # FOLDER contains MNIST
    python benchmarks/all.py --device cuda --data FOLDER
    python benchmarks/all.py --only picture imports
    python benchmarks/all.py --smoke --page copy.md         # the smallest sizes, as a test

Each kind of machine (AVX2, AVX512-BF16, AMX, CUDA, ...) has its own tables on the page. Comments mark a table:

    <!-- table: ddpm-cifar10-32 kind: AVX2 -->
    ...
    <!-- end -->

A run replaces the tables of its own kind and leaves all other tables unchanged. If the page has no table of this kind
for a benchmark, the new table is inserted after the last table of the benchmark, or at the end of the page. On two
cores all benchmarks take about an hour. If a benchmark fails, the others still run, and the failure is reported at the
end. Without ``--data`` the benchmarks that evaluate digits are skipped.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import kind, shown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"


class Benchmark(NamedTuple):
    """A benchmark program with its options. Its key in BENCHMARKS is the name of its table."""

    program: str
    options: str = ""
    gpu_options: str | None = None  # replace the options on a GPU; None: the same options
    needs_data: bool = False
    in_page: bool = True


BENCHMARKS = {
    "ddpm-cifar10-32": Benchmark("networks", "--compile", "--compile --batch 256"),
    "ncsnpp-celebahq-256": Benchmark(
        "networks", "--shape ncsnpp-celebahq-256 --batch 1", "--shape ncsnpp-celebahq-256 --batch 16"
    ),
    "ncsn": Benchmark("networks", "--shape ncsn", "--shape ncsn --batch 256"),
    "ncsnv2": Benchmark("networks", "--shape ncsnv2", "--shape ncsnv2 --batch 256"),
    "training": Benchmark("networks", "--shape unet --train --batch 64", "--shape unet --train --batch 256"),
    "engine": Benchmark("engine", "", "--batch 128"),
    "picture": Benchmark("picture", "", "--all-steps"),
    "overhead": Benchmark("overhead", "", "--width 128"),
    "memory": Benchmark("memory"),
    "imports": Benchmark("imports"),
    "precision": Benchmark("precision", needs_data=True),
    "quality": Benchmark("quality", needs_data=True, in_page=False),  # does not depend on the machine
}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a result as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([shown(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(name: str, result: Mapping[str, Any]) -> str:
    """The table of a benchmark between its comments, with the machine that it was measured on."""
    machine = result["machine"]
    where = f"{machine['kind']} ({machine['device']}"
    where += ")" if machine["kind"] == "CUDA" else f", {machine['threads']} threads)"
    return (
        f"<!-- table: {name} kind: {machine['kind']} -->\n"
        f"{where}, torch {machine['torch']}:\n\n{markdown(result['rows'])}\n<!-- end -->"
    )


def replace(page: str, name: str, result: Mapping[str, Any]) -> str:
    """The page with the table of one benchmark replaced or added, for the kind of machine of the result."""
    made = block(name, result)

    def marked(kind: str) -> str:
        return rf"<!-- table: {re.escape(name)} kind: {kind} -->.*?<!-- end -->"

    own = re.compile(marked(re.escape(result["machine"]["kind"])), re.DOTALL)
    if own.search(page):
        return own.sub(lambda _: made, page)
    others = list(re.finditer(marked(r"[^ ]+"), page, re.DOTALL))
    end = others[-1].end() if others else len(page.rstrip())
    return f"{page[:end]}\n\n{made}\n{page[end:].removeprefix(chr(10))}"


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options.add_argument("--threads", type=int, help="number of CPU threads (default: torch's choice)")
    options.add_argument("--data", type=Path, help="folder with MNIST")
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options.add_argument(
        "--page", type=Path, default=PAGE, help="the page to write the tables into (default: docs/speed.md)"
    )
    options.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="run only these")
    options.add_argument("--smoke", action="store_true", help="run at the smallest sizes, as a test")
    args = options.parse_args(argv)

    failed = []
    for name in args.only:
        benchmark, out = BENCHMARKS[name], args.out / name
        if benchmark.needs_data and args.data is None:
            print(f"== {name}: skipped, it needs --data", flush=True)
            continue
        own = benchmark.options if args.device == "cpu" or benchmark.gpu_options is None else benchmark.gpu_options
        command = [sys.executable, str(HERE / f"{benchmark.program}.py"), *own.split()]
        command += ["--out", str(out), "--device", args.device]
        command += ["--threads", str(args.threads)] if args.threads is not None else []
        command += ["--data", str(args.data)] if benchmark.needs_data else []
        command += ["--smoke"] if args.smoke else []
        print(f"== {name} on {kind(args.device)}", flush=True)
        begin = time.perf_counter()
        if subprocess.run(command, check=False).returncode:  # noqa: S603
            failed.append(name)
            continue
        print(f"   {time.perf_counter() - begin:.0f} s", flush=True)
        if benchmark.in_page:
            (file,) = out.glob("*.json")
            page = args.page.read_text(encoding="utf-8")
            result = json.loads(file.read_text(encoding="utf-8"))
            args.page.write_text(replace(page, name, result), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
