"""The classes of images, and guidance with them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from scorematch.cli.options import given
from scorematch.cli.options.values import amount, filled
from scorematch.core.conditions import Parts
from scorematch.core.messages import about, quote
from scorematch.core.scores import attribute
from scorematch.data.array_data import FILES, check_finite, with_gaps
from scorematch.guidance import GuidedScore, classifier_free
from scorematch.nets.blocks import without_trained_null
from scorematch.sampling.bulk import Classes, Rule
from scorematch.score import ScoreNet

GUIDED_CLASSES = ("classes", "n_classes", "weight", "interval", "rescale")  # the names of all these options


def add_classes(parser: argparse.ArgumentParser, *, rules: bool = True) -> None:
    """Adds ``--class``, a class or with ``rules`` also a rule for the class of each image, and ``--n-classes``."""
    rule = "; random draws a class for each image, and cycle takes all classes in turn" if rules else ""
    parser.add_argument(
        "--class",
        dest="classes",
        metavar="K",
        help=f"for a class-conditional network: the class to draw, its number or its name{rule}",
    )
    if rules:
        parser.add_argument(
            "--n-classes",
            type=int,
            metavar="COUNT",
            help="the number of classes for --class random and cycle (default: all of the network)",
        )


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Adds ``--guidance`` and its options, which have the names of the arguments of ``classifier_free``."""
    parser.add_argument(
        "--guidance",
        dest="weight",
        type=float,
        metavar="W",
        help="classifier-free guidance, for a network with a null class, such as one trained with train --labels: "
        "0 is the network without the class, 1 with the class, and above 1 is guidance",
    )
    parser.add_argument(
        "--guidance-interval",
        dest="interval",
        type=amount,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the noise levels with guidance, LOW < sigma <= HIGH for images in [0, 1] (default: all)",
    )
    parser.add_argument(
        "--guidance-rescale",
        dest="rescale",
        type=float,
        metavar="PHI",
        help="reduce the contrast of guided images, from 0, not at all (the default), to 1, the contrast without "
        "guidance",
    )


def guide(args: argparse.Namespace, net: ScoreNet) -> ScoreNet | GuidedScore:
    """The network, with the guidance of ``--guidance`` if it is given."""
    options = given(args, ("interval", "rescale"))
    if args.weight is None:
        if options:
            raise ValueError(f"--guidance-{next(iter(options))} needs the weight of the guidance. Add --guidance W.")
        return net
    if net.conditioning is None or not net.conditioning.null_class:
        raise ValueError(
            f"--guidance needs a network with a null class, such as one trained with train --labels, but {args.model} "
            "has none. Leave out --guidance."
        )
    return classifier_free(net, args.weight, **options)


def add_condition(parser: argparse.ArgumentParser) -> None:
    """Adds ``--condition``; ``find_condition`` reads its value."""
    parser.add_argument(
        "--condition",
        type=filled,
        metavar="VALUES",
        help="for a network that takes a vector: its values for all samples, such as 0.3,0.7; or a file of arrays, "
        "such as .npy or .npz (with the array condition), with one vector, or for a network that takes an image one "
        "image, for each sample. For a network that takes both the file has the vectors as condition, and the array "
        "image",
    )


def find_condition(
    args: argparse.Namespace, net: ScoreNet | GuidedScore, *, optional: bool = False
) -> Tensor | Parts | None:
    """The vectors of ``--condition``, float (m, K), or the images, float (m, K, ...), or a dict of both, or None.

    Without ``optional`` a network that takes an image, or a vector in every sample, needs the option.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the network takes no such condition, or one of another shape, or values are not finite.
    """
    takes, text = net.conditioning, args.condition
    sides = (attribute(net, "sample_shape") or ())[1:]
    wanted: dict[str, tuple[int, ...]] = {}
    if takes is not None and takes.vector:
        wanted["features"] = (takes.vector,)
    if takes is not None and takes.channels:
        wanted["image"] = (takes.channels, *sides)
    if text is None:
        if "image" in wanted and not optional:
            raise ValueError(f"{args.model} takes an image as its condition. Add --condition FILE with the images.")
        if "features" in wanted and not optional:
            how = f"Add --condition with {wanted['features'][0]} values."
            if isinstance(net, GuidedScore):
                raise ValueError(f"--guidance needs a condition. {how}")
            if without_trained_null(net.backbone):
                raise ValueError(f"{args.model} takes a vector as its condition. {how}")
        return None
    if not wanted:
        instead = " Write --class K." if takes is not None and takes.classes is not None else " Leave it out."
        raise ValueError(
            f"--condition is for networks that take a vector or an image, and {args.model} does not.{instead}"
        )
    path = Path(text).expanduser()
    if path.suffix.lower() in FILES:
        found = _of_file(path, tuple(wanted))
    elif "image" in wanted:
        raise ValueError(
            f"--condition must be a file of arrays, such as .npz or .npy, with the images that {args.model} takes, got "
            f"{quote(text)}."
        )
    else:
        try:
            found = {"features": torch.tensor([[float(word) for word in text.split(",")]])}
        except ValueError as error:
            raise ValueError(
                "--condition must be numbers, such as 0.3,0.7, or a file of arrays, such as .npz or .npy, got "
                f"{quote(text)}."
            ) from error
    for name, values in found.items():
        if values.shape[1:] != wanted[name]:
            kind = f"{wanted[name][0]} values" if name == "features" else f"an image of shape {wanted[name]}"
            raise ValueError(
                f"--condition must have {kind} for each sample, as {args.model} takes, got shape {tuple(values.shape)}."
            )
        check_finite(values, "--condition", data=False)
    return found if len(wanted) > 1 else next(iter(found.values()))


def _of_file(path: Path, wanted: Sequence[str]) -> Parts:
    """The parts of a condition in a file; those of a vector and an image are ``condition`` and ``image``."""
    opened = FILES[path.suffix.lower()](path)
    arrays: Mapping[str, Any] = opened if isinstance(opened, Mapping) else {"condition": opened}
    names = {"features": "condition", "image": "image"}
    if len(wanted) == 1:
        names = {wanted[0]: "condition" if "condition" in arrays or len(arrays) != 1 else next(iter(arrays))}
    if missing := sorted(set(names.values()) - set(arrays)):
        both = "the vectors as condition and the array image" if len(names) > 1 else "the array condition"
        raise ValueError(f"{path} must have {both}, but has no {' and no '.join(missing)}.")
    with about(path):
        return {part: torch.from_numpy(np.array(with_gaps(arrays[name]), np.float32)) for part, name in names.items()}


def find_classes(args: argparse.Namespace, net: ScoreNet | GuidedScore) -> Classes:
    """The class or the rule of ``--class``; None for a network without classes, or with a null class.

    Raises:
        ValueError: if the network needs a class and none is given, or does not take the given one.
    """
    takes, label = net.conditioning, args.classes
    rules = get_args(Rule) if "n_classes" in args else ()
    count = args.n_classes if rules and label in rules else None
    if rules and args.n_classes is not None and count is None:
        raise ValueError("--n-classes is for --class random and --class cycle. Leave it out.")
    if takes is None or takes.classes is None:
        if label is not None:
            raise ValueError(f"--class is for class-conditional networks, and {args.model} is not one. Leave it out.")
        return None
    last, names = takes.classes - 1, net.class_names or ()
    if label in rules:
        if count is not None and not 1 <= count <= takes.classes:
            raise ValueError(f"--n-classes must be from 1 to {takes.classes} for {args.model}, got {count}.")
        return label
    if label is None:
        if isinstance(net, GuidedScore):
            raise ValueError(f"--guidance needs a class. Add --class K, with K from 0 to {last}.")
        if not takes.null_class:
            raise ValueError(f"{args.model} is class-conditional. Write --class K, with K from 0 to {last}.")
        return None
    if names.count(label) == 1:
        return names.index(label)
    number = int(label) if re.fullmatch(r"-?\d{1,9}", label) else -1
    if not 0 <= number <= last:
        wanted = [f"a number from 0 to {last}", *([f"a name such as {quote(names[0])}"] if names else []), *rules]
        listed = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
        raise ValueError(f"--class must be {listed} for {args.model}, got {label}.")
    return number
