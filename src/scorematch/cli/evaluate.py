"""``scorematch evaluate``: measures the quality of samples, of images in a folder, or of restorations."""

from __future__ import annotations

import argparse
from typing import get_args

from scorematch.cli.options import Commands, given, refuse
from scorematch.cli.options.classes import (
    GUIDED_CLASSES,
    add_classes,
    add_condition,
    add_guidance,
    find_classes,
    find_condition,
    guide,
)
from scorematch.cli.options.duration import announce, announce_features, count
from scorematch.cli.options.networks import load
from scorematch.cli.options.operators import add_operators, add_restore_method, read_operator
from scorematch.cli.options.outputs import check_folder_name
from scorematch.cli.options.reference import add_reference, find_reference_arrays, reference_options
from scorematch.cli.options.samplers import add_sampling, make_sampler
from scorematch.cli.options.values import amount, filled, image_count
from scorematch.core.conditions import takes_image
from scorematch.core.messages import about
from scorematch.core.processes import find_device, this_process
from scorematch.core.scores import device_of
from scorematch.data.tables import REFERENCES
from scorematch.evaluation.evaluate import Evaluation, check_evaluation_folder, evaluate
from scorematch.evaluation.metrics import METRICS
from scorematch.evaluation.reference import check_sources
from scorematch.evaluation.restored_images import DEFAULT_N_RESTORED, Truth, evaluate_restoration
from scorematch.evaluation.subject import DEFAULT_N, conditions_of, is_network
from scorematch.restoration.methods import Restore
from scorematch.sampling import SAMPLERS
from scorematch.sampling.bulk import Job
from scorematch.sampling.folder import SampleFolder
from scorematch.sampling.sampler import options_of


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the quality of samples, images or restorations",
        description="Compares samples of a network, or images, with real images. The figures are the Fréchet distance\n"
        "(FID with the features of inception), the kernel distance, the Inception Score, precision and recall,\n"
        "density and coverage. The distances of held-out real images are a floor for those of samples, and the\n"
        "distances of images from a Gaussian fitted to the real images a ceiling.\n\n"
        "FOLDER/evaluation.md has the tables, evaluation.json all settings and figures, FOLDER/samples the samples.\n"
        "The same command again continues after an interruption. torchrun and accelerate launch run it on many\n"
        "devices.\n\n"
        "Data that are not pictures, which are floating-point arrays in any units, are compared by the sliced\n"
        "Wasserstein distance, the energy distance, the maximum mean discrepancy, a classifier (C2ST), and the power\n"
        "spectrum. A network that takes a condition draws with those of the reference, or with --condition.\n\n"
        "With --restore real images are degraded and restored, and the restorations are measured.",
        epilog="Examples:\n"
        "  %(prog)s mnist mnist-train --held-out mnist-test --features efficientnet-lite0\n"
        "  %(prog)s ./cifar10 cifar10-train -n 50k --out runs/fid\n"
        "  %(prog)s samples/ photos/ --features inception dinov2\n"
        "  %(prog)s mnist --restore hole --data digits.npz --features pixels\n"
        "  %(prog)s runs/fields fields.npy --held-out more.npy\n"
        "  accelerate launch -m scorematch evaluate ./cifar10 cifar10-train -n 50k --out runs/fid",
    )
    parser.add_argument(
        "model",
        type=filled,
        metavar="what",
        help="a network, by name or folder as for sample; a folder of images, also one written by sample; or a file of "
        "images or of other arrays",
    )
    parser.add_argument(
        "reference",
        nargs="?",
        type=filled,
        help="the real images: a folder, an .npz file of images or of statistics, a data set owner/name on the Hub, or "
        f"{', '.join(REFERENCES)}; or for other data a file of arrays",
    )
    parser.add_argument(
        "-n",
        type=image_count,
        help=f"the number of images (default: {DEFAULT_N:,} samples, {DEFAULT_N_RESTORED} restored images, else all)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"the metrics to measure: {', '.join(METRICS)} (default: all that can be measured, except classes)",
    )
    parser.add_argument(
        "--no-gaussian", action="store_true", help="do not measure images from the Gaussian of the reference"
    )
    restoration = add_operators(parser, "restoration")
    restoration.add_argument(
        "--restore", type=filled, metavar="OPERATOR", help="degrade the images with this operator and restore them"
    )
    restoration.add_argument(
        "--data", type=filled, help="the images to degrade and to restore (default: the reference)"
    )
    restoration.add_argument("--draws", type=image_count, help="restorations of each image (default: 2)")
    restoration.add_argument(
        "--sigma", type=amount, help="the standard deviation of the noise in the degraded images (default: 0)"
    )
    restoration.add_argument(
        "--truth",
        choices=get_args(Truth),
        help="what is degraded and restored: the images, or draws of the network itself, for which its prior is right "
        "(default: data)",
    )
    add_restore_method(restoration)
    restoration.add_argument(
        "--labels",
        action="store_true",
        help="measure the accuracy of the classes of the images; needs an extractor that classifies them",
    )
    add_reference(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read (default: leave it out, list it at the end, and exit with "
        "status 2)",
    )
    add_classes(parser)
    add_condition(parser)
    add_guidance(parser)
    add_sampling(parser)
    advice = "Write the real images after what is measured, without --reference"
    parser.set_defaults(run=_run, instead={**parser.get_default("instead"), "--reference": advice})


def _run(args: argparse.Namespace) -> None:
    network, restoring = is_network(args.model), args.restore is not None
    _check(args, network, restoring)
    check_sources(args.reference, args.held_out, args.data)  # before the network is loaded
    if args.out is not None:
        check_folder_name(args.out)
        check_evaluation_folder(args.out)
    data = None if restoring else find_reference_arrays(args)
    arrays = data is not None
    common = {"metrics": args.metrics, "out": args.out, "name": args.model, "strict": args.strict}
    sets = {"held_out": args.held_out, "gaussian": not args.no_gaussian}
    if not network:
        common |= reference_options(args, find_device(args.device), arrays=arrays)
        _show(args, evaluate(args.model, args.reference, n=args.n, **sets, **common))
        return
    net = guide(args, load(args, pictures=not arrays))
    if not (restoring or arrays) and takes_image(net):
        raise ValueError(f"{args.model} restores images. Add the operator to measure, such as --restore gray.")
    classes = None if restoring else find_classes(args, net)
    common |= reference_options(args, device_of(net), arrays=arrays)
    method: Restore = args.restore_method or "auto"
    sampler = make_sampler(args, net, restore=method if restoring else None)
    n = args.n or DEFAULT_N
    if restoring or arrays:
        args.continues = "the same command begins anew"
    if restoring:
        announce(sampler, 0)
        images, reference = (args.reference, None) if args.data is None else (args.data, args.reference)
        options = given(args, ("n", "draws", "sigma", "truth", "labels"))
        result = evaluate_restoration(sampler, images, args.restore, reference=reference, **options, **common)
    else:
        condition = find_condition(args, net, optional=True)
        if condition is None and data is not None:
            condition = conditions_of(data, net, n, args.seed, classes)
        if condition is None:
            find_condition(args, net)  # raises if the network needs one
        drawn = {"classes": classes, "n_classes": args.n_classes, "condition": condition}
        job, missing = Job(sampler, seed=args.seed, batch_size=args.batch_size, **drawn), n
        if args.out is not None and not arrays:
            missing = SampleFolder(job, args.out / "samples", n, format="npz").missing
        announce(sampler, missing, job.condition_of(range(1)))
        measured = n * (1 + sets["gaussian"] + (args.held_out is not None))
        announce_features(() if arrays else common["features"], net.sample_shape or (), measured)
        result = evaluate(sampler, args.reference, n=n, **drawn, **sets, **common)
    _show(args, result)


def _check(args: argparse.Namespace, network: bool, restoring: bool) -> None:
    """Checks that the options fit together."""
    if not network:
        sampling = ("sampler", *(name for kind in SAMPLERS.values() for name in options_of(kind)))
        refuse(args, ("condition", *GUIDED_CLASSES, *sampling), f"is for networks, but {args.model} is a set of images")
    if not restoring:
        refuse(args, ("data", "draws", "sigma", "truth", "restore_method", "labels"), "is for --restore")
        if args.reference is None:
            args.parser.error("the following arguments are required: reference")
    else:
        with about("--restore"):
            args.restore = read_operator(args.restore)  # raises before the network is loaded
        if not network:
            raise ValueError(f"--restore needs a network, but {args.model} is a set of images.")
        if args.data is None and args.reference is None:
            args.parser.error("the following arguments are required: --data DATA")
        refuse(args, ("held_out", "no_gaussian", "condition", *GUIDED_CLASSES), "is not for --restore")


def _show(args: argparse.Namespace, result: Evaluation) -> None:
    if this_process().rank == 0:
        print(result.table(), end="")
        for name, reason in result.left_out.items():
            print(f"not measured: {name}, which {reason}")
        if args.out is not None:
            print(args.out / "evaluation.md")
        for name in result.skipped:
            print(f"left out, since it cannot be read: {name}")
    if result.skipped:
        raise ValueError(f"{count(len(result.skipped))} left out, as listed above.")
