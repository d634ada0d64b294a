"""``python -m scorematch train``: trains a network on pictures, and continues where it was interrupted."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from scorematch.cli.options import Commands, duration, image_count
from scorematch.loss import dsm_loss
from scorematch.precision import autocast
from scorematch.score import ScoreNet
from scorematch.training import ImageData, open_images, train
from scorematch.training.recipes import RECIPES, Recipe
from scorematch.training.steps import Settings, make_accelerator

_TIMED_VALUES = 2**16  # in the images of the step that is timed on a CPU
_LABEL_DROP = 0.1  # Ho & Salimans, 2022, arXiv:2207.12598


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train a network on a folder of pictures",
        description="Trains a network on pictures. The same command again continues a run that was interrupted, and "
        "ends\nwith the same network. OUT/network is the latest averaged network, for the other commands.\n\n"
        "DATA is a folder (all pictures in it and its subfolders), an .npz file, or a data set of the Hugging Face "
        "Hub.\nCounts are images, such as 50000, 50k or 5M.",
        epilog="Recipes:\n"
        + "".join(f"  {name:<16}{recipe.image_size} px; {recipe.source}\n" for name, recipe in RECIPES.items())
        + "\nExamples:\n"
        "  python -m scorematch train faces --out runs/faces\n"
        "  python -m scorematch train faces --out runs/trial --recipe tiny --images 20k\n"
        "  accelerate launch -m scorematch train faces --out runs/faces --images 50M --batch-size 512",
    )
    parser.add_argument("data", metavar="DATA", help="a folder of pictures, an .npz file, or owner/name on the Hub")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the run, created if it does not exist")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="small-64", metavar="RECIPE", help="see below (default: small-64)"
    )
    parser.add_argument(
        "--images", type=image_count, help="the number of images that the run sees (default: the recipe's)"
    )
    parser.add_argument(
        "--batch-size", type=image_count, help="images per step, over all devices (default: the recipe's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="default: auto, the first of CUDA, MPS, CPU; CUDA_VISIBLE_DEVICES chooses among several",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")

    data = parser.add_argument_group("data")
    data.add_argument("--image-size", type=_size, metavar="SIZE", help="64, or height x width as 48x64")
    data.add_argument("--channels", type=int, choices=(1, 3), help="1 for gray, 3 for RGB (default: as the pictures)")
    data.add_argument("--crop", choices=("center", "celeba", "none"), help="how pictures are cropped before resizing")
    data.add_argument("--labels", action="store_true", help="train on classes, the names of the subfolders")
    data.add_argument("--no-flip", action="store_true", help="do not mirror half of the pictures")
    data.add_argument("--strict", action="store_true", help="stop at a damaged picture instead of leaving it out")
    data.add_argument("--cache", type=Path, help="the folder for decoded pictures (default: OUT/cache)")
    data.add_argument("--no-cache", action="store_true", help="decode the pictures in each epoch, if they are many")
    data.add_argument("--image-key", metavar="KEY", help="the name of the images in an .npz file or a data set")
    data.add_argument("--label-key", metavar="KEY", help="the name of the labels")
    data.add_argument("--workers", type=image_count, help="threads that decode pictures (default: one per processor)")

    training = parser.add_argument_group("training", "By default the recipe's.")
    training.add_argument("--lr", type=float, help="the highest learning rate")
    training.add_argument("--warmup-images", type=image_count, metavar="IMAGES", help="while the learning rate rises")
    training.add_argument("--label-drop", type=float, metavar="SHARE", help="of labels left out (default: 0.1)")
    training.add_argument(
        "--microbatch", type=image_count, metavar="IMAGES", help="the most that a device computes at once"
    )
    training.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto")
    training.add_argument("--compile", action="store_true", help="compile the network with torch.compile")

    written = parser.add_argument_group("what is written")
    for name, what in [
        ("log", "lines of the log"),
        ("sample", "pictures of samples"),
        ("snapshot", "snapshots"),
        ("checkpoint", "checkpoints"),
    ]:
        written.add_argument(f"--{name}-every", type=image_count, metavar="IMAGES", help=f"images between {what}")
    written.add_argument(
        "--tracker", action="append", default=[], help="of Accelerate, such as tensorboard; repeatable"
    )
    written.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the network at the end")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    recipe = RECIPES[args.recipe]
    if args.label_drop is not None and not args.labels:
        raise ValueError("--label-drop is for training on classes. Add --labels.")
    if args.cache is not None and args.no_cache:
        raise ValueError("--cache and --no-cache exclude each other.")
    accelerator = make_accelerator(cpu=args.device == "cpu", trackers=args.tracker, folder=args.out)
    device: torch.device = accelerator.device
    if args.device not in ("auto", device.type):
        raise ValueError(f"--device {args.device}: Accelerate chooses {device.type} on this machine.")
    with accelerator.main_process_first():  # the others find the cache
        data = _open(args, recipe)
    label_drop = (_LABEL_DROP if args.label_drop is None else args.label_drop) if args.labels else 0.0
    classes = None if data.classes is None else len(data.classes) + (label_drop > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        net = recipe.build(data.shape[0], (data.shape[1], data.shape[2]), classes=classes)
    options = {**recipe.options(), **_given(args), "label_drop": label_drop}
    settings = Settings(**options)
    if accelerator.is_main_process:
        net.to(device)
        _announce(args, recipe, data, net, settings, device, accelerator.num_processes)
    if args.dry_run:
        return
    if args.tracker:
        accelerator.init_trackers("scorematch")
    events = {f"{name}_every": getattr(args, f"{name}_every") for name in ("log", "sample", "snapshot", "checkpoint")}
    try:
        train(
            net,
            data,
            args.out,
            **options,
            **events,
            push_to_hub=args.push_to_hub,
            progress=not args.quiet,
            accelerator=accelerator,
        )
    finally:
        if args.tracker:
            accelerator.end_training()
    if accelerator.is_main_process:
        print(args.out / "report.md")
        print(args.out / "network")


def _open(args: argparse.Namespace, recipe: Recipe) -> ImageData:
    crop = recipe.crop if args.crop is None else None if args.crop == "none" else args.crop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of damaged pictures, which are announced
        data = open_images(
            args.data,
            image_size=recipe.image_size if args.image_size is None else args.image_size,
            channels=recipe.channels if args.channels is None else args.channels,
            crop=crop,
            labels=args.labels,
            cache=None if args.no_cache or args.dry_run else args.out / "cache" if args.cache is None else args.cache,
            strict=args.strict,
            image_key=args.image_key,
            label_key=args.label_key,
            workers=args.workers,
            progress=not args.quiet,
        )
    if len(data.shape) != 3:
        raise ValueError(f"the data must be images (C, H, W), got samples of shape {data.shape}.")
    return data


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``train`` that were given on the command line."""
    names = ("images", "batch_size", "microbatch", "lr", "warmup_images")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.no_flip:
        given["flip"] = False
    return {**given, "seed": args.seed, "precision": args.precision, "compile": args.compile}


def _size(text: str) -> int | tuple[int, int]:
    """A size such as 64 or 48x64."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a side such as 64, or height x width such as 48x64, got {text!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


# -- What will be done ------------------------------------------------------------------------------------------------


def _announce(
    args: argparse.Namespace,
    recipe: Recipe,
    data: ImageData,
    net: ScoreNet,
    settings: Settings,
    device: torch.device,
    processes: int,
) -> None:
    """Prints the data, the network, its cost, and how long the run will take."""
    size = " x ".join(map(str, data.shape))
    classes = "" if data.classes is None else f" of {len(data.classes)} classes"
    print(f"data      {len(data):,} images of {size}{classes} from {args.data}")
    if data.skipped:
        few = ", ".join(data.skipped[:3]) + (", ..." if len(data.skipped) > 3 else "")
        print(f"          {len(data.skipped)} cannot be read and are left out: {few}")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    flop = _flop(net)
    print(f"network   {recipe.name}: {parameters:,} parameters, {flop / 1e9:.3g} GFLOP per image")
    print(
        f"training  {settings.total:,} images in {settings.steps:,} steps of {settings.batch_size}, "
        f"{settings.total / len(data):.3g} epochs"
    )
    done = max((int(path.name) for path in (args.out / "checkpoints").glob("[0-9]*")), default=0)
    if done:
        print(f"          continues at image {done:,}")
    seconds = _seconds_per_image(net, data, settings, device)
    where = str(device) if processes == 1 else f"{processes} x {device.type}"
    remaining = max(0, settings.total - done) * seconds / processes
    print(f"time      about {duration(remaining)} on {where}, {processes / seconds:.3g} images/s")
    print(f"out       {args.out}", flush=True)


def _flop(net: ScoreNet) -> int:
    """The floating-point operations of a training step per image, counted without computing anything."""
    takes = net.conditioning
    if net.sample_shape is None or takes is None:
        raise ValueError("the network must be one of a recipe.")
    named = itertools.chain(net.backbone.named_parameters(), net.backbone.named_buffers())
    weights = {name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for name, tensor in named}
    inputs = [torch.empty(1, *net.sample_shape, device="meta"), torch.empty(1, device="meta")]
    if takes.channels:
        inputs.append(torch.empty(1, takes.channels, *net.sample_shape[1:], device="meta"))
    elif takes.classes is not None:
        inputs.append(torch.empty(1, dtype=torch.int64, device="meta"))
    with FlopCounterMode(display=False) as counter:
        functional_call(net.backbone, weights, tuple(inputs)).sum().backward()
    return counter.get_total_flops()


def _seconds_per_image(net: ScoreNet, data: ImageData, settings: Settings, device: torch.device) -> float:
    """The duration of the forward and the backward pass on one device, per image."""
    most = _TIMED_VALUES // math.prod(data.shape) if device.type == "cpu" else settings.batch_size
    few = max(1, min(most, settings.microbatch or settings.batch_size, len(data)))
    images, labels = data.read(range(few))
    x = (images.float() / 255 if images.dtype == torch.uint8 else images).to(device)
    given: dict[str, Any] = {} if labels is None else {"condition": labels.to(device)}
    if settings.condition is not None:
        made = settings.condition(x, torch.Generator(device).manual_seed(0))
        given = {"condition": made} if isinstance(made, Tensor) else {"condition": made[0], "region": made[1]}

    def step() -> None:
        with autocast(device, settings.precision):
            loss = dsm_loss(net, x, generator=0, **given)
        loss.backward()
        last = next(parameter.grad for parameter in net.parameters() if parameter.grad is not None)
        last.sum().item()  # waits for the device
        net.zero_grad(set_to_none=True)

    step()  # the first call prepares the kernels
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) / few
