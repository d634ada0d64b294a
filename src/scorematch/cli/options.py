"""What several commands share: the device, the network, the sampler's options, and the estimate of the duration."""

from __future__ import annotations

import argparse
import math
import re
import time
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorematch.sampling import Sampler
from scorematch.score import ScoreNet

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# The options that are passed on to AnnealedLangevinSampler, by the names of its arguments.
_SAMPLER = ("levels", "steps_per_level", "step_size", "exact_noise", "consistent")


# -- Options ----------------------------------------------------------------------------------------------------------


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``; ``find_device`` reads its value."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the first of CUDA, MPS, CPU)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument ``model``; ``load`` reads it."""
    parser.add_argument(
        "model", help="a name, such as mnist or owner/name on the Hugging Face Hub, or a folder, such as ./cifar10"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that sample, except ``-n``, whose default they do not share."""
    parser.add_argument(
        "--class", dest="label", type=int, metavar="K", help="the class to draw, for a class-conditional network"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (default: 0)")
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    sampler = parser.add_argument_group(
        "sampler", "Settings of annealed Langevin dynamics; by default those that are recommended for the network."
    )
    sampler.add_argument("--levels", type=int, help="the number of noise levels")
    sampler.add_argument("--steps-per-level", type=int, metavar="STEPS", help="Langevin steps at each noise level")
    sampler.add_argument("--step-size", type=float, metavar="EPSILON", help="the step size at the lowest noise level")
    sampler.add_argument(
        "--exact-noise",
        action=argparse.BooleanOptionalAction,
        help="whether the noise of a step has variance 2a - a^2/sigma^2 instead of 2a",
    )
    sampler.add_argument(
        "--consistent",
        action=argparse.BooleanOptionalAction,
        help="whether to take one step from each level to the next, with the noise that is missing there",
    )


def sampler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampler's arguments that were given on the command line."""
    return {name: value for name in _SAMPLER if (value := getattr(args, name)) is not None}


def image_count(text: str) -> int:
    """The ``type`` of options that count images: "50000", "50k" or "5M".

    Raises:
        argparse.ArgumentTypeError: for anything else, or less than one image.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    number = 0.0 if match is None else float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    if number < 1 or number != round(number):
        raise argparse.ArgumentTypeError(f"must be a count such as 50000, 50k or 5M, got {text!r}")
    return round(number)


# -- What they mean ---------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where there is a device, else MPS, else the CPU.

    Raises:
        ValueError: for another name, or a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no CUDA device. Leave out --device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: the last CUDA device is cuda:{torch.cuda.device_count() - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch finds no MPS device. Leave out --device.")
    return device


def load(args: argparse.Namespace) -> tuple[ScoreNet, tuple[int, int, int], torch.device]:
    """The network that is named, the shape (C, H, W) of its images, and the device of ``--device``, which it is on.

    Raises:
        ValueError: for a bad ``-n`` or ``--device``, or a network that does not draw gray or RGB images.
    """
    if args.n < 1:
        raise ValueError(f"-n must be at least 1, got {args.n}.")
    device = find_device(args.device)
    net = ScoreNet.from_pretrained(args.model).to(device)
    shape = net.sample_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"the network must draw images (C, H, W) with 1 or 3 channels, but the sample_shape of {args.model} is "
            f"{shape}."
        )
    if net.value_range != (0, 1):
        raise ValueError(
            f"the network must draw images in [0, 1], but the value_range of {args.model} is {net.value_range}. Sample "
            "from it in Python."
        )
    return net, (shape[0], shape[1], shape[2]), device


def find_class(args: argparse.Namespace, net: ScoreNet) -> int | None:
    """The class of ``--class``, or None for a network without classes.

    Raises:
        ValueError: if the network needs a class and none is given, or the other way round, or it is out of range.
    """
    classes = None if net.conditioning is None else net.conditioning.classes
    label: int | None = args.label
    if classes is None and label is not None:
        raise ValueError(f"--class is for class-conditional networks, and {args.model} is not one. Leave it out.")
    if classes is not None and label is None:
        raise ValueError(f"{args.model} is class-conditional. Write --class K, with K from 0 to {classes - 1}.")
    if classes is not None and label is not None and not 0 <= label < classes:
        raise ValueError(f"--class must be from 0 to {classes - 1} for {args.model}, got {label}.")
    return label


# -- How long it takes ------------------------------------------------------------------------------------------------


def announce(
    sampler: Sampler, n: int, shape: tuple[int, ...], device: torch.device, condition: Tensor | int | None
) -> None:
    """Prints the sampler and an estimate of how long n images of that shape will take."""
    print(sampler)
    print(f"about {duration(_estimate(sampler, n, shape, device, condition))} for {count(n)}")


def count(n: int) -> str:
    """Such as "1 image" or "4 images"."""
    return f"{n} image{'s' if n > 1 else ''}"


def duration(seconds: float) -> str:
    """Such as "5 s", "2 min" or "3.0 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _estimate(
    sampler: Sampler, n: int, shape: tuple[int, ...], device: torch.device, condition: Tensor | int | None
) -> float:
    """The seconds that n images will take, from the duration of one network call with a few of them."""
    few = min(len(condition) if isinstance(condition, Tensor) else n, max(1, 2**16 // math.prod(shape)))
    x = torch.rand(few, *shape, device=device)
    given = condition[:few].to(device) if isinstance(condition, Tensor) else condition
    arguments = () if given is None else (given,)
    with torch.no_grad():
        sampler.net(x, 1.0, *arguments).sum().item()  # the first call prepares the kernels
        begin = time.perf_counter()
        sampler.net(x, 1.0, *arguments).sum().item()  # item waits for the device
    return (time.perf_counter() - begin) * len(sampler) * n / few
