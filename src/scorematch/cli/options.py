"""Options and functions that several commands share: device, network, sampler, and the estimate of the duration."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from scorematch.core.conditions import takes_image
from scorematch.core.messages import quote
from scorematch.core.schema import Field
from scorematch.core.scores import Score, attribute, device_of
from scorematch.data.pictures import is_picture
from scorematch.evaluation import EXTRACTORS, as_extractor
from scorematch.evaluation.restoration import degradation_of
from scorematch.guidance import GuidedScore, classifier_free
from scorematch.pretrained import load as load_stored
from scorematch.pretrained import locate
from scorematch.pretrained.configuration import CONFIG_FILE
from scorematch.sampling import SAMPLERS, Sampler, SamplerSettings, recommended_sampler
from scorematch.sampling.bulk import Classes, Rule
from scorematch.score import ScoreNet

_PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"}

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--overwrite``; ``what`` says what it replaces. ``check_new`` and ``check_new_network`` take its value."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_sampling(parser: argparse.ArgumentParser, default: str = "the recommended one") -> None:
    """Adds the options of all commands that sample, except ``-n`` and ``--class``, which differ between commands.

    ``default`` describes the sampler that is used without ``--sampler``; see ``make_sampler``.
    """
    parser.add_argument(
        "--seed", type=int, default=0, help="the random seed; the same seed gives the same images (default: 0)"
    )
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    group = parser.add_argument_group(
        "sampler", "Default options: those that are recommended for the network, or else those of the sampler."
    )
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help=f"the sampler (default: the one to which a given option belongs, or {default})",
    )
    groups = {"all": group} | {name: parser.add_argument_group(f"options of --sampler {name}") for name in SAMPLERS}
    for option in fields(SamplerSettings)[1:]:
        value = option.metadata["value"]
        kinds: dict[type, dict[str, Any]] = {
            bool: {"action": argparse.BooleanOptionalAction},
            int: {"type": fitting(value)},
            float: {"type": fitting(value)},
            str: {"choices": value.choices},
        }
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        groups[option.metadata["sampler"]].add_argument(flag, help=text, **kinds[value.kind])


def add_class(parser: argparse.ArgumentParser) -> None:
    """Adds ``--class``, one class for all images; ``find_class`` reads it."""
    parser.add_argument(
        "--class",
        dest="label",
        metavar="K",
        help="the class to draw, for a class-conditional network: its number, or its name",
    )


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Adds ``--class``, one class or a rule for the class of each image, and ``--classes``; see ``find_classes``."""
    parser.add_argument(
        "--class",
        dest="label",
        metavar="K",
        help="for a class-conditional network: the class to draw, its number or its name; random draws a class for "
        "each image, and cycle takes all classes in turn",
    )
    parser.add_argument(
        "--classes",
        type=int,
        metavar="COUNT",
        help="the number of classes for --class random and cycle (default: all of the network)",
    )


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Adds ``--guidance`` and its options; ``guide`` reads them."""
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="classifier-free guidance, for a network with a null class, such as one trained with train --labels: "
        "0 is the network without the class, 1 with the class, and above 1 is guidance",
    )
    parser.add_argument(
        "--guidance-interval",
        type=amount,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the noise levels with guidance, LOW < sigma <= HIGH for images in [0, 1] (default: all)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="PHI",
        help="reduce the contrast of guided images, from 0, not at all (the default), to 1, the contrast without "
        "guidance",
    )


def add_reference(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that compare images with real ones; ``reference_options`` reads them."""
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--features",
        nargs="+",
        choices=(*EXTRACTORS, "none"),
        metavar="NAME",
        default=["inception"],
        help="the extractor, or several: inception (FID; the default), dinov2, efficientnet-lite0 or pixels; none "
        "measures no features",
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
    group.add_argument("--cache", type=expanded, metavar="FOLDER", help="the folder for statistics of the reference")
    group.add_argument("--no-cache", action="store_true", help="store no statistics of the reference")


def reference_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The arguments of ``evaluate`` and ``tune`` that ``add_reference`` adds, except ``held_out``, by name.

    Raises:
        ImportError, OSError, ValueError: if an extractor cannot be made.
    """
    if args.weights is not None and len(args.features) > 1:
        raise ValueError("--weights is for one extractor. Name one with --features.")
    return {
        "features": [
            as_extractor(name, weights=args.weights, device=device) for name in args.features if name != "none"
        ],
        "crop": None if args.crop == "none" else args.crop,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "cache": False if args.no_cache else True if args.cache is None else args.cache,
        "device": device,
        "progress": not args.quiet,
    }


def given_sampling(args: argparse.Namespace) -> list[str]:
    """The options of samplers, classes and guidance that were given on the command line, as they are written."""
    names = ["label", "classes", "guidance", "guidance_interval", "guidance_rescale"]
    given = _given(args, [*names, *SamplerSettings.SCHEMA])
    return [f"--{'class' if name == 'label' else name.replace('_', '-')}" for name in given]


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def fitting(field: Field) -> Callable[[str], Any]:
    """The ``type`` of options whose values have the type and the range of a field."""

    def parse(text: str) -> Any:
        try:
            value = field.kind(text)
        except ValueError:
            value = None
        if not field.fits(value):
            raise argparse.ArgumentTypeError(f"must be {field}, got {text!r}")
        return value

    return parse


amount = fitting(Field(float, low=0))  # the ``type`` of options that are a finite number of at least 0


def filled(text: str) -> str:
    """The ``type`` of arguments that are a name or a path, and must not be empty.

    Raises:
        argparse.ArgumentTypeError: for an empty text, such as an unset variable of a shell. As a path it would be the
            current folder. Also for a path in an unknown home folder, such as ~name without a user of this name.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"the home folder {Path(text).parts[0]} is not known; for another file or folder write ./{text}"
        ) from error
    return text


def expanded(text: str) -> Path:
    """The ``type`` of options that are paths; shells replace the ~ of ``--out ~/runs`` but not of ``--out=~/runs``.

    Raises:
        argparse.ArgumentTypeError: as ``filled``.
    """
    return Path(filled(text)).expanduser()


def task(text: str) -> str:
    """The ``type`` of ``--restore``: the name of a degradation, such as "pool-4".

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    try:
        degradation_of(text, seed=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("task ").removesuffix(".")) from error
    return text


def image_count(text: str) -> int:
    """The ``type`` of options that are a number of images, such as "50000", "50k" or "5M".

    Raises:
        argparse.ArgumentTypeError: for any other text, or a number that is below 1 or not whole.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    number = Decimal(0) if match is None else Decimal(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    if number < 1 or number != round(number):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, such as 64, 50k or 5M, got {text!r}")
    return round(number)


# -- Their values -----------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA if available, else MPS if available, else the CPU.

    Processes that ``torchrun`` or ``accelerate launch`` started on one machine get different CUDA devices.

    Raises:
        ValueError: for an unknown name, or a device that this machine does not have.
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
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch finds no MPS device. Leave out --device.")
    return device


def load_network(name: str | os.PathLike[str]) -> ScoreNet:
    """Loads any network of the package by its name, or from a folder.

    Raises:
        OSError, ValueError: as ``ScoreNet.from_pretrained``, or if the network is of the user's own class.
    """
    stored = load_stored(locate(name))
    if stored.config["family"] == "custom":
        raise ValueError(
            f"{name} has a network of your own class, whose code is not stored. Load it in Python: "
            f'ScoreNet.from_pretrained("{name}", backbone=YourClass()).'
        )
    return ScoreNet.from_stored(stored)


def load(args: argparse.Namespace) -> ScoreNet:
    """Loads the network ``model`` to the device of ``--device``.

    Raises:
        ValueError: for a bad ``--device``, or if the network does not draw gray or RGB images in [0, 1], or the size of
            its images is not known.
    """
    device = find_device(args.device)
    net = load_network(args.model).to(device)
    shape = net.sample_shape
    if shape is None:
        raise ValueError(
            f"the size of the images of {args.model} is not stored with it. Convert the checkpoint with --config, or "
            "sample from the network in Python with shape=."
        )
    if not is_picture(shape):
        raise ValueError(
            f"the network must draw images (C, H, W) with 1 or 3 channels, but the sample_shape of {args.model} is "
            f"{shape}."
        )
    if net.value_range != (0, 1):
        raise ValueError(
            f"the network must draw images in [0, 1], but the value_range of {args.model} is {net.value_range}. Sample "
            "from it in Python."
        )
    return net


def check_new(paths: Iterable[Path], overwrite: bool) -> None:
    """Checks that the files that a command writes do not exist, or that ``overwrite`` is True.

    Raises:
        FileExistsError: if one exists.
        IsADirectoryError: if ``overwrite`` is True and one is a folder.
    """
    for path in paths:
        if overwrite and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder and cannot be replaced by a file. Choose another name.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already. Choose another name, or add --overwrite to replace it.")


def check_new_network(folder: Path, overwrite: bool) -> None:
    """Checks that a folder has no network, or that ``overwrite`` is True.

    Raises:
        FileExistsError: if it has one.
    """
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} has a network already. Choose another folder, or add --overwrite to replace the network."
        )


def check_folder_name(folder: Path) -> None:
    """Checks that the name of a folder to write is not that of a picture.

    Raises:
        ValueError: if it is.
    """
    if folder.suffix.lower() in _PICTURES:
        raise ValueError(
            f"the output must be a folder, got the name of a picture, {folder}. Write {folder.with_suffix('')}."
        )


def guide(args: argparse.Namespace, net: ScoreNet) -> ScoreNet | GuidedScore:
    """The network, with the guidance of ``--guidance`` if it is given.

    Raises:
        ValueError: if the network has no null class, the weight is not a finite number, the interval is empty, the
            rescaling is not from 0 to 1, or one of them is given without a weight.
    """
    if args.guidance is None:
        for name in ("interval", "rescale"):
            if getattr(args, f"guidance_{name}") is not None:
                raise ValueError(f"--guidance-{name} needs the weight of the guidance. Add --guidance W.")
        return net
    if net.conditioning is None or not net.conditioning.null_class:
        raise ValueError(
            f"--guidance needs a network with a null class, such as one trained with train --labels, but {args.model} "
            "has none. Leave out --guidance."
        )
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance must be a finite number such as 1.5, got {args.guidance}.")
    interval = args.guidance_interval
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"--guidance-interval must be LOW HIGH with LOW < HIGH, got {interval[0]:g} {interval[1]:g}.")
    rescale = 0.0 if args.guidance_rescale is None else args.guidance_rescale
    if not 0 <= rescale <= 1:
        raise ValueError(f"--guidance-rescale must be from 0 to 1, got {rescale:g}.")
    return classifier_free(net, args.guidance, interval=interval, rescale=rescale)


def find_class(args: argparse.Namespace, net: ScoreNet | GuidedScore, rules: Sequence[str] = ()) -> int | None:
    """The class of ``--class``, or None for a network without classes, or with a null class.

    Args:
        args: the parsed command line.
        net: the score whose class it is.
        rules: other values of ``--class`` that the command accepts, for the error message.

    Raises:
        ValueError: if the network needs a class and none is given, if a class is given and the network takes none, or
            if the class is out of range.
    """
    takes, label = net.conditioning, args.label
    if takes is None or takes.classes is None:
        if label is not None:
            raise ValueError(f"--class is for class-conditional networks, and {args.model} is not one. Leave it out.")
        return None
    last = takes.classes - 1
    if label is None and isinstance(net, GuidedScore):
        raise ValueError(f"--guidance needs a class. Add --class K, with K from 0 to {last}.")
    if label is None and not takes.null_class:
        raise ValueError(f"{args.model} is class-conditional. Write --class K, with K from 0 to {last}.")
    if label is None:
        return None
    names = net.class_names or ()
    if names.count(label) == 1:
        return names.index(label)
    number = int(label) if re.fullmatch(r"-?\d{1,9}", label) else -1
    if not 0 <= number <= last:
        wanted = [f"a number from 0 to {last}", *([f"a name such as {quote(names[0])}"] if names else []), *rules]
        listed = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
        raise ValueError(f"--class must be {listed} for {args.model}, got {label}.")
    return number


def find_classes(args: argparse.Namespace, net: ScoreNet | GuidedScore) -> Classes:
    """The class or the rule of ``--class``, or None for a network without classes.

    Raises:
        ValueError: as ``find_class``, or for a bad ``--classes``.
    """
    if args.classes is not None and args.label not in get_args(Rule):
        raise ValueError("--classes is for --class random and --class cycle. Leave it out.")
    classes = None if net.conditioning is None else net.conditioning.classes
    if classes is None or args.label not in get_args(Rule):
        return find_class(args, net, get_args(Rule))
    if args.classes is not None and not 1 <= args.classes <= classes:
        raise ValueError(f"--classes must be from 1 to {classes} for {args.model}, got {args.classes}.")
    return args.label


def make_sampler(args: argparse.Namespace, net: Score, *, restoring: bool = False) -> Sampler:
    """The sampler of ``--sampler`` and of the options of samplers, or else the one recommended for the network.

    Args:
        args: the parsed command line.
        net: the score that it samples.
        restoring: whether it restores images. The recommended sampler of a network that draws images may be that of an
            ODE, which restores less well; "langevin" is then used instead.

    Raises:
        ValueError: for an option of another sampler, or a value that is out of range.
    """
    owners = {option: name for name, options in SamplerSettings.OPTIONS.items() for option in _given(args, options)}
    noise = _given(args, SamplerSettings.NOISE)
    default = "langevin" if restoring and not takes_image(net) else None
    name = next(iter(owners.values()), default) if args.sampler is None else args.sampler
    if name is None:
        return recommended_sampler(net, **noise)
    for option, owner in owners.items():
        if owner != name:
            raise ValueError(f"--{option.replace('_', '-')} is an option of --sampler {owner}, not of {name}.")
    given = _given(args, owners)
    own: SamplerSettings | None = attribute(net, "sampler_settings")
    # AnnealedLangevinSampler reads the network's own settings itself, and adapts them to other options.
    if own is not None and own.sampler == name != "langevin":
        given, noise = {**own.options, **given}, {**own.noise, **noise}
    return recommended_sampler(net, SamplerSettings(name, **given), **noise)


# -- How long it takes ------------------------------------------------------------------------------------------------


def announce(sampler: Sampler, seconds: float, n: int, processes: int = 1, *, most: bool = False) -> None:
    """Prints the sampler and the estimated duration for n images, of which each process draws an equal share.

    Args:
        sampler: the sampler.
        seconds: the estimated seconds in one process, from ``estimate``.
        n: the number of images.
        processes: the number of processes.
        most: whether n is only the largest number of images.
    """
    print(sampler)
    where = f" in {processes} processes" if processes > 1 else ""
    print(f"{'at most' if most else 'about'} {duration(seconds / processes)} for {count(n)}{where}", flush=True)


def count(n: int) -> str:
    """A number of images as text, such as "1 image" or "5,000 images"."""
    return f"{n:,} image{'s' if n > 1 else ''}"


def duration(seconds: float) -> str:
    """A duration as text, such as "5 s", "2 min", "3.0 h" or "4 days"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{round(seconds / 86_400):,} days"


def estimate(
    sampler: Sampler,
    n: int,
    condition: Tensor | Classes = None,
    shape: tuple[int, ...] | None = None,
) -> float:
    """Estimates the seconds for n images, from the measured duration of one network call with a few images.

    Args:
        sampler: the sampler, preferably of an inference copy, which is then made only once.
        n: the number of images.
        condition: a condition for each image, or the class or the rule of ``--class``; None for a network that restores
            images is a black image.
        shape: the shape (C, H, W) of an image; None is that of the network.
    """
    shape = attribute(sampler.net, "sample_shape") if shape is None else shape
    device = device_of(sampler.net)
    few = min(len(condition) if isinstance(condition, Tensor) else n, max(1, 2**16 // math.prod(shape)))
    x = torch.rand(few, *shape, device=device)
    given = condition[:few].to(device) if isinstance(condition, Tensor) else condition
    given = 0 if isinstance(given, str) else given  # one class takes as long as another
    if given is None and takes_image(sampler.net):
        given = torch.zeros(few, attribute(sampler.net, "conditioning").channels, *shape[1:], device=device)
    arguments = () if given is None else (given,)
    backward = sampler.restore == "guide-jacobian"  # which has a backward pass in each call

    def call() -> None:
        with torch.set_grad_enabled(backward):
            total = sampler.net(x.requires_grad_(backward), 1.0, *arguments).sum()
        if backward:
            (total,) = torch.autograd.grad(total, x)
        total.sum().item()  # waits for the device

    call()  # the first call prepares the kernels
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * len(sampler) * n / few
