"""How the tests run, and the fixtures that several files use.

The tests run in two processes, with one torch thread each. Networks in tests are small, and OpenMP's threads wait in a
busy loop: with several threads per process a test takes many times as long as soon as another process computes too.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that tests start inherit it
os.environ["MPLBACKEND"] = "Agg"  # no windows

from pathlib import Path

import pytest
import torch

from tests.helpers import Gaussian, Mixture

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
SECONDS = {"slow": 600, "cuda": 300, "network": 600}  # per test; others have the limit of pyproject.toml


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads these options
def pytest_cmdline_main(config):
    """Two processes, unless the command line says how many. Not in addopts, which would need pytest-xdist."""
    option = config.option
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    if getattr(option, "numprocesses", 0) is None and not (in_worker or option.usepdb or option.collectonly):
        option.numprocesses, option.dist = 2, "worksteal"


def pytest_collection_modifyitems(items):
    for item in items:
        seconds = [seconds for name, seconds in SECONDS.items() if item.get_closest_marker(name)]
        if seconds and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(seconds)))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def world():
    return Gaussian([0.3, -0.7, 1.1], [[0.50, 0.20, 0.00], [0.20, 0.30, 0.05], [0.00, 0.05, 0.10]])


@pytest.fixture
def mixture():
    return Mixture([0.8, 0.2], [[1.5, 1.5], [-1.5, -1.5]], 0.5)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def published():
    return lambda name: torch.load(FIXTURES / f"{name}.pt", weights_only=True)
