"""``scorematch diagnose``: measures a network at each noise level, all samplers, or restoration methods."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from scorematch.cli.options import Commands, given, refuse
from scorematch.cli.options.networks import add_model, load
from scorematch.cli.options.operators import add_operators, read_operator
from scorematch.cli.options.samplers import add_computation
from scorematch.cli.options.values import filled, image_count
from scorematch.data import open_images
from scorematch.evaluation import level_losses, posterior_calibration, sampler_distances
from scorematch.evaluation.estimate import Report
from scorematch.evaluation.exact import Empirical, Gaussian
from scorematch.restoration import as_operator


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "diagnose",
        help="measure a network at each noise level, all samplers, or restoration methods",
        description="Without an option, measures the network on images at 16 noise levels: its loss, the norm of its\n"
        "score, and its denoised images. The other measurements use the noise levels of the network, and the exact\n"
        "score of the normal distribution that is fitted to the images, so that all errors are those of the method.",
        epilog="Examples:\n"
        "  %(prog)s mnist digits.npz\n"
        "  %(prog)s mnist digits.npz --samplers\n"
        "  %(prog)s mnist digits.npz --posterior pool:2 --sigma 0.1",
    )
    add_model(parser)
    parser.add_argument("data", type=filled, help="images, as for the command evaluate")
    what = add_operators(parser, "what is measured").add_mutually_exclusive_group()
    what.add_argument(
        "--samplers",
        action="store_true",
        help="the distances of samples from the normal distribution, for every sampler and several numbers of levels",
    )
    what.add_argument(
        "--posterior",
        type=filled,
        metavar="OPERATOR",
        help="how far the restorations of each method are from draws from the posterior, for a linear operator",
    )
    parser.add_argument(
        "--sigma", type=float, default=0.0, help="the standard deviation of the noise for --posterior (default: 0)"
    )
    parser.add_argument(
        "--size",
        type=image_count,
        default=8,
        help="the height and width of the images for --samplers and --posterior, whose time grows with its sixth power "
        "(default: 8)",
    )
    parser.add_argument(
        "-n",
        type=image_count,
        help="the number of images (default: 1,024), of samples (2,000) or of observations (200)",
    )
    add_computation(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.posterior is None:
        refuse(args, ["sigma"], "is for --posterior")
    fitting = args.samplers or args.posterior is not None
    if not fitting:
        refuse(args, ["size"], "is for --samplers and --posterior")
    operator = None if args.posterior is None else as_operator(read_operator(args.posterior))
    net = load(args)
    parts = {} if fitting or net.conditioning is None else net.conditioning.parts()
    if not all(part.null_class for part in parts.values()):
        raise ValueError(
            f"{args.model} needs a condition for each image. Write level_losses(net, data, condition=...) in Python, "
            "or add --samplers or --posterior OPERATOR."
        )
    channels, *size = net.sample_shape or ()
    size = [args.size] * 2 if fitting else size
    data = open_images(
        args.data, image_size=(size[0], size[1]), channels=channels, strict=True, progress=not args.quiet
    )
    options = {"seed": args.seed, "progress": not args.quiet, **given(args, ["n"])}
    if not fitting:
        report: Report[Any] = level_losses(net, data, **options)
    else:
        images = data.read(torch.arange(len(data)))[0]
        exact = Gaussian.like(Empirical(images, schedule=net.schedule, value_range=net.value_range))
        if operator is None:
            report = sampler_distances(exact, **options)
        else:
            options["observations"] = options.pop("n", 200)
            report = posterior_calibration(exact, operator, sigma=args.sigma, **options)
    print(report.table(), end="")
