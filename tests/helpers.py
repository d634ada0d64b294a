"""Helpers of several test files: exact scores, generators, refused commands, threads, and separate processes."""

import contextlib
import math
import subprocess
import sys
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scorematch import ScoreNet
from scorematch.cli import main
from scorematch.evaluation.exact import Gaussian
from scorematch.pretrained.loading import WithoutValues


def seed(number=0):
    """A new generator with this seed."""
    return torch.Generator().manual_seed(number)


def run(sampler, n=None, **arguments):
    """Samples without a progress bar."""
    return sampler.sample(n, progress=False, **arguments)


def convert(checkpoint, folder, **options):
    """Converts a checkpoint of another project into a folder, as the command does; returns the network."""
    net = ScoreNet.from_checkpoint(checkpoint, **options)
    net.save_pretrained(folder)
    return net


def python(*arguments, timeout=120, check=True, **options):
    """Runs Python with the arguments, such as ``"-c", code``, and returns the CompletedProcess with output as text.

    Tests that use process groups, or may leave threads running for another reason, use such a separate process, in
    which a deadlock ends with the timeout.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=timeout, **options
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def in_threads(functions, seconds=60):
    """Calls functions in threads at the same time; returns their results, or raises the first error."""
    results, errors, barrier = [None] * len(functions), [], threading.Barrier(len(functions))

    def call(i):
        try:
            barrier.wait(seconds)
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def refused(arguments, capsys, unprinted=None):
    """The line with which the command line refuses arguments, from argparse or from a command.

    ``unprinted`` is a text that is not printed before, such as one that shows that sampling has begun.
    """
    try:
        status = main([*map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2 and (unprinted is None or unprinted not in printed.out)
    assert printed.err.startswith("scorematch: ") and printed.err.count("\n") == 1
    return printed.err


# -- Exact scores


def point(x, sigma):
    """The score of data that are all zero."""
    return -x / sigma**2


def gaussian_images(shape, variance=None, seed=0):
    """A normal distribution of images with a random mean; the covariance is random, or ``variance`` times 1."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    mean = torch.rand(size, generator=generator, dtype=torch.float64)
    if variance is not None:
        return Gaussian(mean, variance, shape)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return Gaussian(mean, 0.3 * root @ root.T / size + 0.02 * torch.eye(size, dtype=torch.float64), shape)


# -- Requirements of accelerators


@contextlib.contextmanager
def on_meta():
    """Networks are built on the meta device, where weights have neither memory nor values."""
    with torch.device("meta"), WithoutValues():
        yield


class NoFloat64(TorchDispatchMode):
    """Fails if a float64 tensor is created on another device than the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 and leaf.device.type != "cpu":
                raise TypeError(f"{function} made a float64 tensor on {leaf.device}")
        return result


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a value, which on CUDA means waiting for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal")
        return function(*arguments, **(keywords or {}))
