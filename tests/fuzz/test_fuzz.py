"""Damaged files of every kind are read, or refused as documented; and the fuzzer finds what is not allowed."""

import json
import os
import pickle
import random
import subprocess
import warnings
from pathlib import Path

import pytest

from tests.fuzz import mutators
from tests.fuzz.judge import _peak, judge, run
from tests.fuzz.kinds import KINDS

QUICK, ALL = 8, 24  # cases of each kind, more than 400 together


@pytest.mark.parametrize("cases", [range(QUICK), pytest.param(range(QUICK, ALL), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, cases, tmp_path):
    """``python -m tests.fuzz --case KIND:SEED`` runs one case again, and ``--cases 10000`` many."""
    faulty = {}
    for seed in cases:
        folder = tmp_path / str(seed)
        folder.mkdir()
        faulty[f"{kind}:{seed}"] = run(kind, seed, folder, timed=False).faults
    assert {case: faults for case, faults in faulty.items() if faults} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_files_are_read(kind, tmp_path):
    for i, files in enumerate(KINDS[kind].files()):
        folder = tmp_path / str(i)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes(content))
        outcome = judge(KINDS[kind].read, folder, timed=False)
        bomb = isinstance(outcome.error, OSError) and "t.png" in files
        assert bomb or (outcome.error, outcome.faults) == (None, []), files.keys()


def test_the_same_seed_damages_in_the_same_way(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run("config", 3, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# -- What the fuzzer finds


def _raise(error):
    raise error


def _warn(folder):
    warnings.warn(f"{folder}: overflow", RuntimeWarning, stacklevel=1)


def _take_memory(folder):
    memory = bytearray(300_000_000)
    memory[::4096] = b"x" * len(memory[::4096])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "out").mkdir(), None),
        (lambda folder: _raise(ValueError(f"{folder}/config.json lacks family.")), None),
        (lambda folder: _raise(KeyError(f"{folder}")), "of another type: KeyError"),
        (lambda folder: _raise(RecursionError(f"{folder}")), "of another type: RecursionError"),
        (lambda folder: _raise(ValueError("channels must be 1 or 3.")), "does not name the file"),
        (lambda folder: _raise(OSError(f"{folder}\nis bad")), "line breaks"),
        (lambda folder: _raise(ValueError(f"{folder} " + "x" * 500)), "has 500 characters"),
        (_warn, "it is no UserWarning"),
        pytest.param(
            _take_memory,
            "MB of memory",
            marks=pytest.mark.skipif(_peak() == 0, reason="the system does not tell the peak of the memory"),
        ),
        (lambda folder: (folder / "config.json").write_text(""), "it did open"),
        (lambda folder: (folder / "other").mkdir(), "it did os.mkdir"),
        (lambda folder: os.system("true"), "it did os.system"),  # noqa: S605, S607
        (lambda folder: subprocess.run(["true"], check=True), "it did subprocess.Popen"),  # noqa: S607
        (lambda folder: pickle.loads(pickle.dumps(Path)), "it did pickle.find_class"),  # noqa: S301
    ],
)
def test_the_judge_finds_what_is_not_allowed(read, fault, tmp_path):
    faults = judge(read, tmp_path, timed=False).faults
    assert faults == [] if fault is None else any(fault in found for found in faults), faults


def test_damage_does_not_change_the_values_that_later_cases_draw():
    before = repr(mutators.POOL)
    for number in range(300):
        tree = {"a": [1, {"b": "x"}], "c": {"d": 1}}
        mutators.change_tree(tree, random.Random(number))  # noqa: S311
        mutators.change_tree(tree, random.Random(number + 1))  # noqa: S311
    assert repr(mutators.POOL) == before


def test_keys_can_be_written_twice():
    assert json.dumps({"a": 1, mutators.Again("a"): 2}) == '{"a": 1, "a": 2}'
