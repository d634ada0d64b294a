"""Every branch for CUDA and MPS, on a simulated device that a small extension in C++ gives to torch.

The tests in the files ``on_*.py`` run in processes of their own: the device has to exist before torch is imported.
``simulated.py`` says what it checks.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import python

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FILES = sorted(FOLDER.glob("on_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs a compiler for POSIX")
@pytest.mark.parametrize(
    ("kind", "files"),
    [*(pytest.param("cuda", [path], id=f"cuda {path.stem}") for path in FILES), pytest.param("mps", FILES, id="mps")],
)
def test_on_a_simulated_device(kind, files):
    if torch.backends.cuda.is_built() if kind == "cuda" else torch.backends.mps.is_built():
        pytest.skip("torch is built for the real device")
    options = ("-o", "addopts=", "-o", "filterwarnings=ignore", "--import-mode=importlib", "-n", "0", "-q")
    command = ("-m", "pytest", "-p", "tests.devices.simulated", *options, *files)
    done = python(*command, cwd=ROOT, env={**os.environ, "SIMULATED": kind}, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
