"""The settings of the test run, and fixtures that several files use.

The tests run in two processes with one torch thread each. OpenMP's threads wait in a busy loop, and the networks in the
tests are small: with several threads per process, tests take many times as long while another process computes.

The functions here import torch themselves, because a third process, which only starts the two, does not need it.
"""

import functools
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # must be set before torch is imported; processes that tests start inherit it
os.environ["MPLBACKEND"] = "Agg"  # plots open no windows

from pathlib import Path

import pytest

gc.disable()  # while modules are imported and tests are collected: that makes millions of objects and little garbage

FIXTURES = Path(__file__).parent / "fixtures"
SECONDS = {"slow": 600, "cuda": 300, "network": 600}  # per test; other tests have the limit of pyproject.toml


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads these options
def pytest_cmdline_main(config):
    """Runs two processes unless the command line sets the number. An option in addopts would require pytest-xdist."""
    option = config.option
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    if getattr(option, "numprocesses", 0) is None and not (in_worker or option.usepdb or option.collectonly):
        option.numprocesses, option.dist = 2, "worksteal"
        if config.pluginmanager.has_plugin("hypothesispytest"):  # this process would import the library at its end
            config.pluginmanager.unregister(name="hypothesispytest")


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    for item in items:
        seconds = [seconds for name, seconds in SECONDS.items() if item.get_closest_marker(name)]
        if seconds and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(seconds)))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Lets garbage collections begin. They are rare, and skip the objects of now, which exist until the end."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_synchronization_with_the_disk():
    """Turns off fsync, which takes milliseconds per file on some disks and matters only when the power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def forks():
    from tests.forks import Forks

    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    started = Forks()
    yield started
    started.stop()


@pytest.fixture
def few_levels(monkeypatch):
    """Samplers without settings have few levels in place of a hundred, in tests of other things than the samples."""
    for name in ("_FEWEST_LEVELS", "_MOST_LEVELS"):
        monkeypatch.setattr(f"scorematch.sampling.langevin.{name}", 4)


@pytest.fixture(scope="module")
def no_plots():
    """Runs write the numbers of their samples in place of a plot, for which Matplotlib takes a second."""
    import numpy as np

    def numbers(x, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.ascontiguousarray(x.cpu()).tobytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scorematch.training.report.save_plot", numbers)
        yield


@pytest.fixture
def world():
    from scorematch.evaluation.exact import Gaussian

    return Gaussian([0.3, -0.7, 1.1], [[0.50, 0.20, 0.00], [0.20, 0.30, 0.05], [0.00, 0.05, 0.10]])


@pytest.fixture
def mixture():
    from scorematch.evaluation.exact import GaussianMixture

    return GaussianMixture([0.8, 0.2], [[1.5, 1.5], [-1.5, -1.5]], 0.25)


@pytest.fixture
def rng():
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def published():
    """A function that loads a fixture by its name; every call returns new dicts and lists with the same tensors."""
    import torch
    from torch.utils._pytree import tree_map

    load = functools.cache(lambda name: torch.load(FIXTURES / f"{name}.pt", weights_only=True))
    return lambda name: tree_map(lambda leaf: leaf, load(name))
