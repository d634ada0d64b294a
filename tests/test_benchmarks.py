"""The benchmarks run, at their smallest size; how fast anything is, no test says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _run(out, name, *arguments):
    command = [sys.executable, "-W", "ignore", BENCHMARKS / f"{name}.py", "--smoke", "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 1000
    for row in result["rows"]:
        assert all(str(key) in done.stdout for key in row) and next(iter(row.values())) in done.stdout
    return result["rows"]


@pytest.mark.parametrize("shape", ["ddpm-cifar10-32", "ncsnpp-celebahq-256", "ncsnv2"])
def test_networks(tmp_path, shape):
    rows = _run(tmp_path, "networks", "--shape", shape)
    assert len(rows) == (2 if shape == "ncsnv2" else 5)
    assert rows[0]["ratio"] == 1 and all(row["images/s"] > 0 and row["of peak"] > 0 for row in rows)


def test_training(tmp_path):
    assert len(_run(tmp_path, "networks", "--shape", "unet", "--train")) == 3


def test_overhead(tmp_path):
    assert [row["batch"] for row in _run(tmp_path, "overhead")] == ["1", "2"]


def test_picture(tmp_path):
    rows = _run(tmp_path, "picture")
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0


def test_memory(tmp_path):
    rows = _run(tmp_path, "memory")
    assert all(row["MB"] > 100 for row in rows)  # torch alone takes more


def test_imports(tmp_path):
    assert _run(tmp_path, "imports")[0]["import"] == "scorematch"


def test_ratios_are_of_neighbors(monkeypatch):
    """A machine that slows down by and by changes no ratio."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from common import ratio

    assert ratio({"slow": [2, 4, 20], "fast": [1, 2, 10]}, "slow", "fast") == 2
