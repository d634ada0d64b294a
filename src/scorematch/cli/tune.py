"""``scorematch tune``: measures sampler settings on a network, and stores the best with it."""

from __future__ import annotations

import argparse
from typing import get_args

from scorematch.cli.options import Commands, refuse
from scorematch.cli.options.classes import add_classes, add_guidance, find_classes, guide
from scorematch.cli.options.networks import add_model, load
from scorematch.cli.options.operators import add_operators, read_operator
from scorematch.cli.options.outputs import check_folder_name
from scorematch.cli.options.reference import add_reference, find_reference_arrays, reference_options
from scorematch.cli.options.samplers import add_computation
from scorematch.cli.options.values import filled, fitting, image_count
from scorematch.core.conditions import takes_image
from scorematch.core.messages import about
from scorematch.core.processes import this_process
from scorematch.core.schema import Field
from scorematch.core.scores import device_of
from scorematch.evaluation.arrays import some_values_of
from scorematch.evaluation.criteria import Distance, Kind, distance_of
from scorematch.evaluation.few_calls import settings_learned, settings_of_paths, settings_with_few_calls
from scorematch.evaluation.reference import check_sources, first_images
from scorematch.evaluation.subject import conditions_of
from scorematch.evaluation.tune import check_folder, samplers_within, settings_table, tune


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        help="find the best sampler settings of a network",
        description="Draws samples with many sampler settings, compares them with real data, and writes the\n"
        "network with the best settings into a folder, with a table of all settings in its README.md. The other\n"
        "commands then use these settings. The same command again continues after an interruption.",
        epilog="Examples:\n"
        "  %(prog)s ./cifar10 --reference cifar10-train --out ./cifar10-tuned\n"
        "  %(prog)s mnist --reference digits/ --features efficientnet-lite0 --calls 50 --out tuned",
    )
    add_model(parser)
    parser.add_argument(
        "--reference", required=True, type=filled, metavar="DATA", help="the real data, as for the command evaluate"
    )
    parser.add_argument(
        "-n", type=image_count, default=1000, help="the number of samples for each of the settings (default: 1,000)"
    )
    parser.add_argument(
        "--calls", type=int, default=250, help="the largest number of network calls per sample (default: 250)"
    )
    parser.add_argument(
        "--learn",
        nargs="+",
        type=fitting(Field(int, low=3, high=59)),
        metavar="N",
        help="also measure settings with these numbers of network calls, such as 4 6 8: with levels that are chosen "
        "from paths of the network, with levels and coefficients that are learned, and with the usual levels, also "
        "with new noise or steps that are exact for normal data",
    )
    parser.add_argument(
        "--by",
        choices=get_args(Distance),
        help="the distance to minimize: frechet or kernel for pictures; rmse, perceptual or frechet for restorations; "
        "energy, sliced-wasserstein, spectrum or frechet for data that are not pictures (default: the first)",
    )
    restoration = add_operators(parser, "restoration")
    restoration.add_argument(
        "--restore",
        nargs="+",
        type=filled,
        metavar="OPERATOR",
        help="for a network that was trained to restore, which needs it: degrade the images of --reference with these "
        "operators, and measure the restorations",
    )
    add_computation(parser)
    add_reference(parser)
    add_classes(parser)
    add_guidance(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if len(args.features) > 1:
        raise ValueError("--features must be one extractor: the best settings minimize one distance.")
    if args.restore:
        refuse(args, ("held_out", "classes", "n_classes", "weight", "interval", "rescale"), "is not for --restore")
    with about("--restore"):
        args.restore = args.restore and list(map(read_operator, args.restore))  # raises before the network is loaded
    if args.learn and max(args.learn) > args.calls:
        most = max(args.learn)
        raise ValueError(f"--learn {most} has more network calls than --calls {args.calls}. Write --calls {most}.")
    check_sources(args.reference, args.held_out)  # before the network is loaded
    if args.out is not None:
        check_folder_name(args.out)
    data = None if args.restore else find_reference_arrays(args)
    net = guide(args, load(args, pictures=data is None))
    if args.out is not None:
        check_folder(args.out, net)  # before weights are downloaded
    if takes_image(net) and not args.restore and data is None:
        raise ValueError(f"{args.model} restores images. Add the operators to measure, such as --restore gray.")
    if args.restore and not takes_image(net):
        raise ValueError(
            f"--restore is for networks that were trained to restore, and {args.model} draws: its settings are those "
            "for drawing. Compare with evaluate --restore OPERATOR --levels 25."
        )
    classes = None if args.restore else find_classes(args, net)
    kind: Kind = "restorations" if args.restore else "pictures" if data is None else "data that are not pictures"
    if distance_of(args.by, kind) == "rmse":
        args.features = []  # not needed
    options = reference_options(args, device_of(net), arrays=data is not None)
    if data is None:
        options["features"] = options["features"][0] if options["features"] else []
    settings = settings_table(net, args.calls)
    if args.learn:
        images, condition = None, None
        if data is not None:
            images = some_values_of(data, 4096, args.seed)
            condition = conditions_of(data, net, args.n, args.seed)
        elif not args.restore:
            images = first_images(args.reference, net.sample_shape, crop=options["crop"])
        fitted = {"condition": condition, "seed": args.seed, "progress": not args.quiet}
        settings += settings_learned(net, args.learn, out=args.out, **fitted)
        settings += settings_of_paths(net, args.learn, **fitted) + settings_with_few_calls(net, args.learn, images)
    samplers = samplers_within(net, settings, args.calls)
    if this_process().rank == 0:
        calls = sum(map(len, samplers.values())) * len(args.restore or [""])
        number = f"{len(samplers)} settings" if len(samplers) != 1 else "1 setting"
        print(f"{number} with {calls:,} network calls per sample", flush=True)
    result = tune(
        net,
        args.reference,
        settings=list(samplers),
        calls=args.calls,
        n=args.n,
        by=args.by,
        operators=args.restore,
        held_out=args.held_out,
        out=args.out,
        classes=classes,
        n_classes=args.n_classes,
        **options,
    )
    if this_process().rank == 0:
        print(result.table(), end="")
        print(f"recommended: {result.recommended.settings}")
        if args.out is not None:
            print(args.out)
