"""The network that a command uses, and its device."""

from __future__ import annotations

import argparse
import os
from typing import Any

from scorematch.core.processes import find_device
from scorematch.core.scores import Score, attribute
from scorematch.data.pictures import is_picture
from scorematch.pretrained import load as load_stored
from scorematch.pretrained import locate
from scorematch.score import ScoreNet

_OTHERS = "Other data are for sample, restore, evaluate and tune without --restore and --features, and for Python."


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``; ``find_device`` reads its value."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the first of CUDA, MPS, CPU)"
    )


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds the positional argument ``model``; ``load`` reads it."""
    text = "a name, such as mnist or owner/name on the Hugging Face Hub, or a folder, such as ./cifar10 or runs/faces"
    optional: dict[str, Any] = {} if default is None else {"nargs": "?", "default": default}
    parser.add_argument("model", help=text if default is None else f"{text} (default: {default})", **optional)


def load_network(name: str | os.PathLike[str]) -> ScoreNet:
    """Any network of the package by its name, or from a folder; ValueError if it is of the user's own class."""
    stored = load_stored(locate(name))
    if stored.config["family"] == "custom":
        raise ValueError(
            f"{name} has a network of your own class, whose code is not stored. Load it in Python: "
            f'ScoreNet.from_pretrained("{name}", backbone=YourClass()).'
        )
    return ScoreNet.from_stored(stored)


def load(args: argparse.Namespace, *, pictures: bool = True) -> ScoreNet:
    """The network ``model`` on the device of ``--device``.

    Raises:
        ValueError: if the shape of its samples is not known, or, with ``pictures``, they are not pictures in [0, 1].
    """
    device = find_device(args.device)
    net = load_network(args.model).to(device)
    shape = net.sample_shape
    if shape is None:
        raise ValueError(
            f"the size of the images of {args.model} is not stored with it. Convert the checkpoint with --config, or "
            "sample from the network in Python with shape=."
        )
    if pictures and not is_picture(shape):
        raise ValueError(
            f"the network must draw images (C, H, W) with 1 or 3 channels, but the sample_shape of {args.model} is "
            f"{shape}. {_OTHERS}"
        )
    if pictures and net.value_range != (0, 1):
        raise ValueError(
            f"the network must draw images in [0, 1], but the value_range of {args.model} is {net.value_range}. "
            f"{_OTHERS}"
        )
    return net


def draws_pictures(net: Score) -> bool:
    """Whether the samples of a network are gray or RGB images in [0, 1]."""
    return is_picture(attribute(net, "sample_shape")) and attribute(net, "value_range") == (0, 1)
