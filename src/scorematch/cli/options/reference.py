"""The real images that images are compared with, and how."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from scorematch.cli.options.values import expanded, filled, image_count
from scorematch.data.array_data import ArrayData
from scorematch.evaluation.arrays import VALUES, reference_arrays
from scorematch.evaluation.features import EXTRACTORS, as_extractor


def add_reference(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that compare images with real ones; ``reference_options`` reads them."""
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--features",
        nargs="+",
        choices=(*EXTRACTORS, "none", VALUES),
        metavar="NAME",
        default=["inception"],
        help="the extractor, or several: inception (FID; the default), dinov2, efficientnet-lite0 or pixels; none "
        "measures no features, and values says that the data are not pictures",
    )
    group.add_argument(
        "--weights", type=expanded, metavar="FILE", help="the weights of inception or dinov2, if downloaded"
    )
    group.add_argument(
        "--held-out",
        type=filled,
        metavar="DATA",
        help="real images that are not in the reference; their distances are the lowest that samples are "
        "expected to reach",
    )
    group.add_argument(
        "--crop",
        choices=("center", "celeba", "none"),
        default="center",
        help="how real images are cropped before they are resized for the network: center, celeba (140x140 pixels in "
        "the center) or none (default: center)",
    )
    group.add_argument(
        "--batch-size", type=image_count, default=64, metavar="IMAGES", help="images per network call (default: 64)"
    )
    group.add_argument("--out", type=expanded, metavar="FOLDER", help="the folder to write to (default: only print)")
    group.add_argument("--cache", type=expanded, metavar="FOLDER", help="the folder for statistics of the reference")
    group.add_argument("--no-cache", action="store_true", help="store no statistics of the reference")


def find_reference_arrays(args: argparse.Namespace) -> ArrayData | None:
    """The reference if its data are not pictures, and no features of pictures are asked for; None otherwise."""
    asked = args.features == [VALUES]
    by_default = args.features == ["inception"] and args.weights is None
    return reference_arrays(args.reference, named=asked) if asked or by_default else None


def reference_options(args: argparse.Namespace, device: torch.device, *, arrays: bool = False) -> dict[str, Any]:
    """The arguments of ``evaluate`` and ``tune`` that ``add_reference`` adds, except ``held_out``, by name.

    With ``arrays`` the reference has no pictures, and no extractor is made.

    Raises:
        ImportError, OSError, ValueError: if an extractor cannot be made.
    """
    if args.weights is not None and len(args.features) > 1:
        raise ValueError("--weights is for one extractor. Name one with --features.")
    if args.cache is not None and args.no_cache:
        raise ValueError("--cache and --no-cache cannot be combined. Leave out one.")
    return {
        "features": VALUES
        if arrays
        else [as_extractor(name, weights=args.weights, device=device) for name in args.features if name != "none"],
        "crop": None if args.crop == "none" else args.crop,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "cache": False if args.no_cache else True if args.cache is None else args.cache,
        "device": device,
        "progress": not args.quiet,
    }
