"""The benchmarks run at their smallest size. No test measures time."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def measure(module, tmp_path, capsys):
    """Runs a benchmark at its smallest size, and returns the rows of its result."""

    def run(name, *arguments):
        with torch.random.fork_rng():
            module(name).main(["--smoke", "--out", str(tmp_path), *arguments])
        printed = capsys.readouterr().out
        (path,) = tmp_path.glob("*.json")
        result = json.loads(path.read_text())
        assert result["machine"]["kind"] == module("common").kind("cpu")
        assert path.with_suffix(".png").stat().st_size > 1000
        for row in result["rows"]:
            assert all(str(key) in printed for key in row) and next(iter(row.values())) in printed
        return result["rows"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ddpm-cifar10-32", "ncsnpp-celebahq-256", "ncsnv2"])
def test_networks_benchmark_runs(measure, shape):
    rows = measure("networks", "--shape", shape)
    names = [next(iter(row.values())) for row in rows]
    ours = ['scorematch, "float32"', 'scorematch, "auto"']
    assert names[-2:] == ours and (names == ours) == (shape == "ncsnv2")
    assert rows[0]["ratio"] == 1 and all(row["images/s"] > 0 and row["of peak"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_benchmark_runs(measure, module, monkeypatch, dtype):
    monkeypatch.setattr(module("networks"), "native_dtype", lambda device: dtype)
    rows = measure("networks", "--shape", "unet", "--train")
    assert len(rows) == (3 if dtype == torch.bfloat16 else 2)


@pytest.mark.slow
def test_overhead_benchmark_runs(measure):
    assert [row["batch"] for row in measure("overhead")] == ["1", "2"]


@pytest.mark.slow
def test_engine_benchmark_runs(measure):
    bare, engine, decoded, cached = measure("engine")
    assert bare["time"] == 1 and all(row["time"] > 0 and row["images/s"] > 0 for row in (engine, decoded, cached))


@pytest.mark.slow
def test_picture_benchmark_runs(measure):
    pipeline, *few = measure("picture")
    assert pipeline["ratio"] == pipeline["per call"] == 1 and pipeline["calls"] == 1000
    assert len(few) == 2 and {row["calls"] for row in few} == {2}
    assert all(row["per call"] == pytest.approx(row["ratio"] * 2 / 1000) for row in few)


@pytest.mark.slow
def test_memory_benchmark_runs(measure):
    rows = measure("memory")
    assert all(row["MB"] > 100 for row in rows)  # torch alone needs more


@pytest.mark.slow
def test_memory_benchmark_of_long_runs_runs(measure):
    rows = measure("memory", "--long")
    assert [row["run"] for row in rows] == ["1,000 images in a stream", "10 calls of sample", "10 training steps"]
    assert all(100 < row["MB after a tenth"] <= row["MB at the end"] for row in rows)


@pytest.mark.slow
def test_imports_benchmark_runs(measure):
    assert measure("imports")[0]["import"] == "scorematch"


@pytest.mark.slow
def test_the_first_hour_on_a_gpu_runs_on_a_cpu(module, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Speed\n")
    with torch.random.fork_rng():
        status = module("gpu").main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--page", str(page)])
    printed = capsys.readouterr().out
    assert status == 0 and "FAIL" not in printed and "left out" not in printed and "0 failures" in printed
    assert page.read_text() == f"# Speed\n\n{(tmp_path / 'gpu.md').read_text()}"
    kind = module("common").kind("cpu")
    assert re.findall(r"<!-- table: (\S+) kind: (\S+) -->", page.read_text()) == [
        (name, kind) for name in module("gpu").TABLES
    ]
    rows = json.loads((tmp_path / "gpu-correct.json").read_text())["rows"]
    assert len(rows) > 10 and all(row["cases"] and row["largest difference"] <= row["limit"] for row in rows)


def test_differences_and_errors_on_a_device_are_failures(module):
    correct = module("correct")
    failures = correct.Failures()
    compare = correct.Comparison("other", failures)
    compare("equal", 0, "one", lambda device: torch.ones(2))
    compare("different", 0.1, "one", lambda device: torch.full((2,), 1.2 if device == "other" else 1.0))
    compare("not a number", 0.1, "one", lambda device: torch.full((2,), float("nan")))
    compare("refused", 0.1, "one", lambda device: torch.ones(2, device="nonsense"))
    assert [text.partition(",")[0] for text in failures] == ["different", "not a number", "refused"]
    assert compare.rows["different"]["largest difference"] == pytest.approx(0.2)


@pytest.mark.slow
def test_the_benchmark_of_posteriors_measures_only_what_is_missing(module, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist_test.npz", images=images, labels=np.zeros(6, np.int64))
    options = ["--out", str(tmp_path), "--data", str(tmp_path), "--worlds", "digits", "--tasks", "hole", "jpeg"]
    options += ["--images", "2", "--draws", "3", "--budget", "16"]
    for methods in (["guide"], ["guide", "guide-jacobian"]):
        module("posterior").main([*options, "--methods", *methods])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:3] for line in printed] == [
        [task, method] for method in ("guide", "guide-jacobian") for task in ("hole", "jpeg")
    ]
    rows = [json.loads(line) for line in (tmp_path / "posterior.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows[:2]] == [16, 16] and all(8 < row["cost"] <= 16 for row in rows)
    assert all(float(row["ratio"].split()[0]) > 0 for row in rows)
    table = (tmp_path / "posterior.md").read_text()
    assert table.startswith("## digits\n\n| task | method | rmse |") and table.count("| guide-jacobian |") == 2


def test_ratios_compare_neighboring_measurements(module):
    """The ratio does not change if the machine becomes slower during the measurement."""
    ratio = module("common").ratio
    assert ratio({"slow": [2, 4, 20], "fast": [1, 2, 10]}, "slow", "fast") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the covariance of 10 features", "ignore:__array__:DeprecationWarning")
def test_the_benchmark_of_schedulers_runs(measure, tmp_path):
    pytest.importorskip("diffusers")
    np.savez(
        tmp_path / "pictures.npz", images=np.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype="uint8")
    )
    rows = measure("schedulers", "--reference", str(tmp_path / "pictures.npz"))
    assert [(row["calls"], row["Frechet distance"] > 0) for row in rows] == [(4, True), (3, True), (3, True)]


# -- All benchmarks


def _result(kind, value):
    machine = {"kind": kind, "device": "x86_64", "threads": 2, "torch": "2.13.0"}
    return {"machine": machine, "rows": [{"what": "first", "seconds": value}, {"what": "second", "seconds": 1234.5}]}


def test_a_table_replaces_only_the_table_of_the_same_benchmark_and_machine(module):
    replace = module("all").replace
    page = "# Speed\n\nText.\n\n## After\n\nThe end.\n"
    page = replace(page, "imports", _result("AVX2", 0.25))
    assert page.endswith(
        "The end.\n\n<!-- table: imports kind: AVX2 -->\nAVX2 (x86_64, 2 threads), torch 2.13.0:\n\n"
        "| what | seconds |\n| --- | --- |\n| first | 0.25 |\n| second | 1,234 |\n<!-- end -->\n"
    )
    page = replace(page, "memory", _result("AVX2", 7.0))
    page = replace(page, "imports", _result("AMX", 0.125))
    assert re.findall(r"<!-- table: (\S+) kind: (\S+) -->", page) == [
        ("imports", "AVX2"),
        ("imports", "AMX"),
        ("memory", "AVX2"),
    ]
    again = replace(page, "imports", _result("AVX2", 0.75))
    assert again == page.replace("| first | 0.25 |", "| first | 0.75 |")
    assert replace(again, "imports", _result("AVX2", 0.25)) == page


def test_the_tables_on_the_page_are_those_of_the_benchmarks(module):
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- table: (\S+) kind: (\S+) -->\n.*?<!-- end -->", page, re.DOTALL)
    assert len(found) == len(set(found)) == page.count("<!-- table") == page.count("<!-- end") > 0
    known = {name for name, benchmark in module("all").BENCHMARKS.items() if benchmark.in_page}
    assert known <= {name for name, _ in found} <= known | set(module("gpu").TABLES)


@pytest.mark.slow
def test_all_benchmarks_write_their_tables(module, tmp_path, capfd, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# Speed\n")
    options = ["--smoke", "--page", str(page), "--out", str(tmp_path / "runs")]
    everything = module("all")
    assert everything.main([*options, "--only", "overhead", "quality"]) == 0
    assert "quality: skipped, it needs --data" in capfd.readouterr().out
    kind = module("common").kind("cpu")
    assert re.findall(r"<!-- table: (\S+) kind: (\S+) -->", page.read_text()) == [("overhead", kind)]
    before = page.read_text()
    monkeypatch.setitem(everything.BENCHMARKS, "overhead", everything.Benchmark("overhead", "--nonsense"))
    assert everything.main([*options, "--only", "overhead"]) == 1
    assert "failed: overhead" in capfd.readouterr().out and page.read_text() == before


def test_numbers_in_tables_have_no_exponent_near_1000(module):
    values = [0.0123456, 12.345, 999.4, 999.5, 999.7, 1000, 12345.6, "text"]
    assert " ".join(map(module("common").shown, values)) == "0.0123 12.3 999 1,000 1,000 1,000 12,346 text"
