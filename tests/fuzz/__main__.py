"""Runs many cases, or one: ``python -m tests.fuzz --cases 10000``, ``python -m tests.fuzz --case config:17``."""

import argparse
import collections
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.fuzz.judge import run
from tests.fuzz.kinds import KINDS

_ADDRESSES = 4_000_000_000  # bytes of address space beyond that of the process: an end for what would take all memory


def _limit():
    """Limits the address space of this process, on Linux."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESSES, resource.RLIM_INFINITY))


def _one(kind, seed, folder):
    """Runs one case, prints what it did, and returns whether it was faulty."""
    outcome = run(kind, seed, folder)
    print(f"{kind}:{seed}: {'read' if outcome.error is None else 'refused'}; the files are in {folder}")
    if outcome.error is not None:
        traceback.print_exception(outcome.error)
    print(*outcome.faults, sep="\n")
    return bool(outcome.faults)


def _many(cases, first, kinds):
    """Runs cases of all kinds in turn, prints the faulty ones and a table, and returns whether there was one."""
    counts, faulty = {kind: collections.Counter() for kind in kinds}, 0
    seconds = collections.Counter()
    for i in range(cases):
        kind, seed = kinds[i % len(kinds)], first + i // len(kinds)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(kind, seed, Path(folder))
        seconds[kind] += time.process_time() - began
        counts[kind]["faulty" if outcome.faults else "read" if outcome.error is None else "refused"] += 1
        if outcome.faults:
            faulty += 1
            print(f"{kind}:{seed}", *outcome.faults, sep="\n    ", flush=True)
    for kind, count in counts.items():
        print(f"{kind:<12}" + "".join(f"{count[word]:>8} {word}" for word in ("read", "refused", "faulty")), end="")
        print(f"{1000 * seconds[kind] / max(1, count.total()):>8.1f} ms per case")
    return faulty > 0


def main():
    """Returns 1 if a case was faulty, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="the number of cases, over all kinds (default: 500)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    parser.add_argument("--case", metavar="KIND:SEED", help="run one case, show its traceback, and keep its files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _limit()
    if args.case is not None:
        kind, _, seed = args.case.partition(":")
        if kind not in KINDS or not seed.isdecimal():
            parser.error(
                f"--case must be KIND:SEED, such as config:17, with one of {', '.join(KINDS)}, got {args.case}"
            )
        return _one(kind, int(seed), Path(tempfile.mkdtemp()))
    return _many(args.cases, args.first, args.kind or list(KINDS))


if __name__ == "__main__":
    sys.exit(main())
