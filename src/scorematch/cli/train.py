"""``scorematch train``: trains a network on pictures, and continues an interrupted run."""

from __future__ import annotations

import argparse
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from scorematch.cli.options import Commands, given, refuse
from scorematch.cli.options.duration import count, duration
from scorematch.cli.options.measurements import read_measurements
from scorematch.cli.options.networks import load_network
from scorematch.cli.options.outputs import check_folder_name
from scorematch.cli.options.values import add_declared, amount, expanded, filled, image_count
from scorematch.core.conditions import describe_classes
from scorematch.core.files import write_whole
from scorematch.core.messages import few, quote
from scorematch.core.records import as_stored
from scorematch.data import ArrayData, ImageData, open_images
from scorematch.data.array_data import find_arrays
from scorematch.data.tables import REFERENCES
from scorematch.evaluation import memorization_of
from scorematch.nets.family import check_size
from scorematch.nets.reconditioning import difference
from scorematch.nets.space import PADDINGS
from scorematch.pretrained import load, locate
from scorematch.pretrained.configuration import Stored, architecture
from scorematch.score import ScoreNet
from scorematch.training import RECIPES, Recipe, Settings, checkpoint, network_for, train, train_from_observations
from scorematch.training.checks import check_stages
from scorematch.training.flops import training_flop
from scorematch.training.incomplete import check_observation
from scorematch.training.record import check_run, network_of, settings_of
from scorematch.training.report import expectation, sampler_of
from scorematch.training.run import check_possible
from scorematch.training.settings import RunSettings, StageSettings, TrainSettings
from scorematch.training.speed import mean_seconds, seconds_per_image, with_images
from scorematch.training.start import SMALL, fine_tuning, with_condition
from scorematch.training.units import take_units

_DEFAULT = "small-64"
_DEFAULTS = {"label_drop": "0.1 with --labels"}  # of options that are not those of train
_LONG = 600  # seconds of a run for which several processes are proposed
_PART = 8  # images of a batch that each of them has at least
_SAMPLES = 64  # to compare with the pictures of a small folder
_LABEL_DROP = 0.1  # Ho & Salimans, 2022, arXiv:2207.12598
_SIDES = {
    1: " values",
    2: " (channels x length)",
    3: " (channels x height x width)",
    4: " (channels x depth x height x width)",
}
_FOR_PICTURES = ("recipe", "image_size", "channels", "crop", "strict", "cache", "no_cache", "workers")
_INSTEAD = {  # of options of other programs
    "--epochs": "Write the number of images, --images 500k; an epoch is the number of pictures in the data",
    "--steps": "Write the number of images, --images 500k; a step has --batch-size images",
    "--learning-rate": "Write --lr 1e-4",
    "--resume": "Repeat the command of the run: it continues",
}


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train a network on a folder of pictures, or on arrays",
        description="Trains a network on pictures or other data. To continue an interrupted run, repeat the command; "
        "the result is\nthe same as without the interruption. OUT/network has the latest averaged network.\n\n"
        "DATA is a folder (all pictures in it and its subfolders), an .npz file, or a data set of the Hugging Face "
        "Hub.\nOther data are floating-point arrays (N, C, ...) of any range in .npy, .npz, .h5, .nc or .zarr: the "
        "array x, and\nvectors (N, K) or images (N, K, ...) as condition, if there are any. The network is then chosen "
        "by the shape, and\nhas the units of the data. All N are whole numbers, such as 50000, 50k or 5M.",
        epilog="Recipes:\n"
        + "".join(f"  {name:<16}{recipe.image_size} px; {recipe.source}\n" for name, recipe in RECIPES.items())
        + "\nExamples:\n"
        "  %(prog)s faces --out runs/faces\n"
        "  %(prog)s faces --out runs/trial --recipe tiny --images 20k\n"
        "  %(prog)s faces --out runs/night --recipe growing --image-size 64 --hours 8\n"
        "  %(prog)s cats --out runs/cats --start runs/faces/network\n"
        "  %(prog)s damaged --observed-where masks --sigma 0.1 --out runs/prior\n"
        "  %(prog)s fields.npz --out runs/fields --padding circular\n"
        "  accelerate launch -m scorematch train faces --out runs/faces --images 50M --batch-size 512",
    )
    parser.add_argument(
        "data",
        type=filled,
        metavar="DATA",
        help="a folder of pictures, a file of arrays, owner/name on the Hub, or a short name such as cifar10-train",
    )
    parser.add_argument(
        "--out", required=True, type=expanded, help="the folder of the run, created if it does not exist"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        metavar="RECIPE",
        help=f"the network and its settings, see below (default: {_DEFAULT})",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="the device; auto (the default) is the first of CUDA, MPS, CPU; CUDA_VISIBLE_DEVICES selects one of "
        "several GPUs",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the data, the network and the estimated time, and stop"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--image-size",
        type=_size,
        metavar="SIZE",
        help="the size of the images in pixels: a side, or HEIGHTxWIDTH such as 48x64 (default: the recipe's; "
        "for growing that of the images in an .npz file or in a data set with a short name)",
    )
    data.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 for gray, 3 for RGB (default: the recipe's, or the data's)"
    )
    data.add_argument(
        "--crop",
        choices=("center", "celeba", "none"),
        help="how pictures are cropped before they are resized: center, celeba (140x140 pixels in the center) or none "
        "(default: the recipe's)",
    )
    data.add_argument("--labels", action="store_true", help="train on classes: the subfolders, or the data's labels")
    data.add_argument("--strict", action="store_true", help="stop at a damaged picture instead of leaving it out")
    data.add_argument("--cache", type=expanded, help="the folder for decoded pictures (default: OUT/cache)")
    data.add_argument(
        "--no-cache",
        action="store_true",
        help="write no cache; more than 1 GiB of pictures is decoded again in each epoch",
    )
    data.add_argument("--image-key", metavar="KEY", help="the key of the images or the array in a file or a data set")
    data.add_argument("--label-key", metavar="KEY", help="the key of the labels, or of the vectors as conditions")
    data.add_argument(
        "--padding",
        nargs="+",
        choices=PADDINGS,
        help="for signals, fields and volumes: what lies beyond the ends of all axes, or of each; circular is for "
        "periodic data (default: zeros)",
    )
    data.add_argument("--workers", type=image_count, help="threads that decode pictures (default: one per CPU)")

    training = parser.add_argument_group("training", "Defaults: the settings of the recipe, or else those given here.")
    written = parser.add_argument_group("start and results")
    written.add_argument(
        "--start",
        "--start-from",  # torchrun takes --start for an abbreviation of its own --start-method
        metavar="NAME_OR_FOLDER",
        help="begin with the weights of a trained network; without --recipe, this network is trained. With torchrun "
        "write --start-from",
    )
    measured = parser.add_argument_group(
        "incomplete data",
        "With --sigma, DATA are noisy measurements with gaps: a folder of pictures with masks; an .npz, .h5, .nc or\n"
        ".zarr file with y and, if there is one, mask; or an .npy file. NaN in y is a gap. The options of training\n"
        "are those of each stage.",
    )
    measured.add_argument("--sigma", type=amount, help="the standard deviation of the noise, in the units of DATA")
    measured.add_argument(
        "--observed-where",
        type=expanded,
        metavar="MASKS",
        help="a folder with a mask for each picture, of the same name: white where the picture is observed",
    )
    own, of_run = ({option.name for option in fields(settings)} for settings in (Settings, RunSettings))
    own.add("hours")
    for option in dict.fromkeys([*fields(TrainSettings), *fields(StageSettings)]):
        if option.name != "progress" and option.metadata["value"] is not None:
            meaning = option.metadata["meaning"].replace("``", "").replace("None", "none").replace("%", "%%")
            default = _DEFAULTS.get(option.name, option.default)
            group = training if option.name in own else written if option.name in of_run else measured
            add_declared(group, option.name, option.metadata["value"], meaning, default)
    parser.set_defaults(run=_run, instead=_INSTEAD)


def _run(args: argparse.Namespace) -> None:
    recipe = RECIPES[_DEFAULT if args.recipe is None else args.recipe].resized(args.image_size)
    if args.sigma is not None or args.observed_where is not None:
        _run_stages(args, recipe)
        return
    refuse(args, ["stages", "draw_batch", "held_out"], "is for measurements with --sigma")
    arrays = find_arrays(args.data, key=args.image_key, condition_key=args.label_key)
    if arrays is not None:
        gray = ": write x[:, None] for gray images (N, H, W)" if len(arrays.shape) == 2 else ""
        refuse(args, _FOR_PICTURES, f"is for pictures, and {args.data} has samples of shape {arrays.shape}{gray}")
    own = given(args, (each.name for each in fields(TrainSettings)))
    if "hours" in own:
        refuse(args, ["images"], "cannot be combined with --hours")
    conditional = args.labels or (arrays is not None and arrays.features > 0)
    if arrays is None:
        refuse(args, ["padding"], "is for data that are not pictures")
    if not conditional:
        refuse(args, ["label_drop"], "is for training on classes with --labels")
        if arrays is None or not arrays.channels:
            refuse(args, ["label_key"], "is for training on classes with --labels")
    if args.cache is not None and args.no_cache:
        raise ValueError("--cache and --no-cache cannot be combined. Leave out one.")
    check_folder_name(args.out)
    before = settings_of(args.out)
    if before is not None and "augment" not in own:  # a run continues as it began
        own["augment"] = before.get("augment")
    label_drop = _LABEL_DROP if conditional else 0.0
    settings = TrainSettings(**{"label_drop": label_drop, **recipe.options(), **own}, progress=not args.quiet)
    accelerator = _accelerator(args, args.out, settings)
    device: torch.device = accelerator.device
    start = _start(args)
    if arrays is not None:
        data: ImageData | ArrayData = arrays
    else:  # one process decodes, and the others wait for the lock of the cache
        data = images = _open(args, recipe, start)
        recipe = recipe.resized((images.shape[1], images.shape[2]))
        if "images" in own and args.start is None:
            recipe = recipe.of_length(own["images"])
    options = {"label_drop": label_drop, **recipe.options(), **own}
    if start is not None:
        options |= {name: value for name, value in fine_tuning(start, data, settings).items() if name not in own}
    settings = TrainSettings(**options, progress=not args.quiet)
    trackers = options.pop("trackers", ())  # which this function starts, since it creates the accelerator
    if arrays is not None:
        net = _network_of_arrays(args, start, arrays, settings)
    else:
        net = _network(args, recipe, start, images, settings)
    check_stages(net, data, settings, accelerator.num_processes)
    shown = accelerator.is_main_process and not args.quiet
    take_units(net, data, network_of(args.out), settings.start, progress=shown)
    if settings.hours is not None:
        of_hours, short = settings, recipe.short if start is None and arrays is None else None
        fewest = {} if short is None else {"fewest_steps": 0}  # the network of the short recipe is faster
        settings = with_images(args.out, net.to(device), data, settings, accelerator, **fewest)
        if short is not None and not settings.growth:
            recipe = short
            net = _network(args, recipe, start, images, settings).to(device)
            settings = with_images(args.out, net, data, replace(of_hours, growth=()), accelerator)
        options |= {name: getattr(settings, name) for name in ("hours", "images", "growth")}
    check_run(args.out, net, data, settings)
    if accelerator.is_main_process:
        net.to(device)
        _announce(args, recipe, data, net, settings, accelerator)
    if args.dry_run:
        return
    if trackers:
        accelerator.init_trackers("scorematch")
    try:
        trained = train(net, data, args.out, **options, progress=not args.quiet, accelerator=accelerator)
    finally:
        if trackers:
            accelerator.end_training()
    if accelerator.is_main_process:
        if isinstance(data, ImageData) and 1 < len(data) < SMALL and trained.value_range == (0, 1):
            print(_report_copies(args.out, trained, data, progress=not args.quiet))
        print(args.out / "report.md")
        print(args.out / "network")


def _accelerator(args: argparse.Namespace, folder: Path, settings: RunSettings) -> Any:
    """The accelerator of the device that was asked for, after checks of the folder."""
    accelerator = check_possible(folder, args.data, settings, cpu=args.device == "cpu")
    if args.device not in ("auto", accelerator.device.type):
        raise ValueError(
            f"--device {args.device} is not available: Accelerate uses {accelerator.device.type} here. Leave out "
            "--device."
        )
    return accelerator


def _report_copies(folder: Path, net: ScoreNet, data: ImageData, *, progress: bool) -> str:
    """Adds to the report of a run how many samples are copies of its pictures, and returns the sentence."""
    takes = net.conditioning
    classes = None if takes is None or takes.classes is None else torch.arange(_SAMPLES) % takes.classes
    try:
        samples = sampler_of(net).sample(_SAMPLES, condition=classes, generator=0, progress=progress).cpu()
    except RuntimeError as error:  # the network is not trained enough yet
        return f"the samples are not compared with the pictures: {error}"
    found = memorization_of(samples, data, neighbors=2, flips=True, progress=False)
    found.save_picture(folder / "report" / "nearest.png", samples, data, rows=8)
    copies = round(found.copies()[0].value * _SAMPLES)
    text = (
        f"{copies} of {_SAMPLES} samples are copies: less than a third as far from one of the pictures, or from its "
        "mirror image, as from every other."
    )
    text += " Train on more pictures, or for fewer images." if copies > _SAMPLES // 16 else ""
    parts = ["", text, "", found.table(), "![samples and the nearest pictures](report/nearest.png)", ""]
    report = folder / "report.md"
    write_whole(report, report.read_bytes() + "\n".join(parts).encode())
    return text


def _run_stages(args: argparse.Namespace, recipe: Recipe) -> None:
    """Trains on measurements."""
    if args.sigma is None:
        raise ValueError("--observed-where needs the noise of the pictures: add --sigma, such as --sigma 0.1.")
    of_pictures = ["image_size", "crop", "labels", "strict", "cache", "no_cache", "image_key", "label_key", "workers"]
    refuse(args, [*of_pictures, "trackers", "hours"], "is not for measurements, which are used as they are")
    check_folder_name(args.out)
    if "growth" in recipe.training:
        raise ValueError(f"--recipe {recipe.name} is not for measurements. Write --recipe small-64.")
    options = {**recipe.options(), **given(args, (each.name for each in fields(StageSettings)))}
    settings = StageSettings(**options, progress=not args.quiet)
    accelerator = _accelerator(args, args.out / "stage-001", settings)
    observation = read_measurements(expanded(args.data), args.observed_where, args.sigma, args.channels)
    shape = tuple(observation.y.shape[1:])
    if args.observed_where is None:
        refuse(args, ["channels"], "is for pictures with --observed-where")
    if len(shape) != 3:
        refuse(args, ["recipe"], f"is for pictures, and {args.data} has measurements of samples of shape {shape}")
    pictures = len(shape) == 3 and (args.observed_where is not None or args.recipe is not None)
    if pictures or args.start is not None:
        refuse(args, ["padding"], "is for a new network of data that are not pictures")
    if args.start is None or args.recipe is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            net = recipe.build(*cast(Any, (shape[0], shape[1:]))) if pictures else _network_for(args, shape)
        if args.observed_where is None:
            net.value_range = None  # arrays are in units of their own
    else:
        net = load_network(args.start)
    check_observation(net, observation)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(
        f"data      {count(len(observation.y), 'measurement')} of shape {shape} from {args.data}, noise {args.sigma:g}"
    )
    print(f"network   {parameters:,} parameters")
    print(f"training  {count(settings.stages, 'stage')} of {settings.total:,} images")
    print(f"out       {args.out}", flush=True)
    if not args.dry_run:
        train_from_observations(net, observation, args.out, **options, progress=not args.quiet, accelerator=accelerator)
        print(args.out / "report.md")
        print(args.out / "network")


def _network(
    args: argparse.Namespace, recipe: Recipe, start: ScoreNet | None, data: ImageData, settings: Settings
) -> ScoreNet:
    """The network of ``--start`` for images of the size of the data, or a new one of the recipe."""
    classes = None if data.classes is None else len(data.classes)
    if start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            size = data.shape[1], data.shape[2]
            net = recipe.build(data.shape[0], size, classes=classes, null_class=settings.label_drop > 0)
    else:
        net = _with_condition(args, start, data, settings)
        assert start.sample_shape is not None  # noqa: S101  (_open checks it)
        net.sample_shape = (start.sample_shape[0], *data.shape[1:])  # its convolutions take other sizes, too
        check_size(net.backbone, data.shape[1:])
    return net


def _with_condition(
    args: argparse.Namespace, start: ScoreNet, data: ImageData | ArrayData, settings: Settings
) -> ScoreNet:
    """The network of ``--start`` with the classes and the vectors of the data as its condition, if there are any."""
    takes, classes = start.conditioning, data.classes if args.labels else None
    features = data.features if isinstance(data, ArrayData) else 0
    if takes is None or takes.encoder or not (takes.classes or takes.vector or features or classes):
        return start
    assert start.family is not None  # noqa: S101  (load_network checks it)
    now = {**start.config, "num_class_embeds": None, "null_class": False, "class_names": None}
    now["condition_features"] = features
    if classes is not None:
        if "num_class_embeds" not in start.family.keys:
            raise ValueError(f"the network {args.start} cannot take classes. Leave out --labels.")
        names = None if classes == tuple(map(str, range(len(classes)))) else list(classes)
        now |= {"num_class_embeds": len(classes), "null_class": settings.label_drop > 0, "class_names": names}
    own: dict[str, torch.Tensor] = {}
    if features:  # its embedding is new, unless it has the same length
        keys = {key: value for key, value in architecture(as_stored(now)).items() if key != "family"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            build = start.family.build
            own = build(keys, levels=len(start.schedule), precondition=start.precondition).state_dict()
    stored = Stored(as_stored(start.config), start.backbone.state_dict(), args.start)
    return ScoreNet.from_stored(with_condition(stored, now, own))


def _network_of_arrays(
    args: argparse.Namespace, start: ScoreNet | None, data: ArrayData, settings: Settings
) -> ScoreNet:
    """The network of ``--start``, or a new one for data of this shape, with the vectors or classes as conditions."""
    if args.labels and data.classes is None:
        raise ValueError(f"--labels needs an array of labels in {args.data}, which has none. Leave it out.")
    if start is not None:
        own = start.sample_shape
        if own is not None and (len(own) != len(data.shape) or own[0] != data.shape[0]):
            raise ValueError(
                f"--start must be a network for {args.data}, whose samples have the shape {data.shape}, but "
                f"{args.start} is one for the shape {own}. Leave out --start, or take another network."
            )
        if own is not None and len(data.shape) > 1:
            check_size(start.backbone, data.shape[1:])
            start.sample_shape = data.shape
        return _with_condition(args, start, data, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _network_for(
            args,
            data.shape,
            condition_features=data.features,
            condition_channels=data.channels,
            classes=len(data.classes) if args.labels and data.classes is not None else None,
            null_class=settings.label_drop > 0,
        )


def _network_for(args: argparse.Namespace, shape: tuple[int, ...], **conditions: Any) -> ScoreNet:
    """A new network for data that are not pictures, with the padding that was asked for."""
    if len(shape) == 1:
        refuse(args, ["padding"], "is for signals, fields and volumes, and these data are vectors")
    padding = args.padding or ["zeros"]
    return network_for(shape, padding=padding[0] if len(padding) == 1 else padding, **conditions)


def _start(args: argparse.Namespace) -> ScoreNet | None:
    """The network of ``--start``, or None if the recipe says which network is trained.

    A run that continues has its own network, of the same kind, so that the one that it began with may be gone.
    """
    if args.start is None or args.recipe is not None:
        return None
    own = args.out / "network"
    return load_network(own if own.is_dir() else args.start)


def _open(args: argparse.Namespace, recipe: Recipe, start: ScoreNet | None) -> ImageData:
    channels, size = recipe.channels, args.image_size
    if size is None and (recipe.of_side is None or not _has_one_size(args.data)):
        size = recipe.image_size
    if start is not None:
        if start.sample_shape is None or len(start.sample_shape) != 3:
            raise ValueError(f"--start must be a network of images (C, H, W), got samples {start.sample_shape}.")
        if start.conditioning is not None and start.conditioning.channels:
            raise ValueError(
                f'{args.start} restores images. Train it in Python: train(net, data, out, start="{args.start}", '
                "condition=MultiTask([...])); see docs/palette.md."
            )
        channels = start.sample_shape[0]
        size = start.sample_shape[1:] if args.image_size is None else size
        if args.channels not in (None, channels):
            raise ValueError(f"--channels must be {channels}, as {args.start} has, got {args.channels}. Leave it out.")
    crop = recipe.crop if args.crop is None else None if args.crop == "none" else args.crop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about damaged pictures: _announce prints them
        data = open_images(
            args.data,
            image_size=size,
            channels=channels if args.channels is None else args.channels,
            crop=crop,
            labels=args.labels,
            cache=None if args.no_cache or args.dry_run else args.out / "cache" if args.cache is None else args.cache,
            strict=args.strict,
            value_range=(0, 1) if start is None else start.value_range,
            image_key=args.image_key,
            label_key=args.label_key,
            workers=args.workers,
            progress=not args.quiet,
        )
    if len(data.shape) != 3:
        raise ValueError(f"the data must be images (C, H, W), got samples of shape {data.shape}.")
    return data


def _has_one_size(data: str) -> bool:
    """Whether the data are sure to have images of one size: an .npz file, or a short name such as mnist-train."""
    return data in REFERENCES or Path(data).suffix.lower() == ".npz"


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
    data: ImageData | ArrayData,
    net: ScoreNet,
    settings: TrainSettings,
    accelerator: Any,
) -> None:
    """Prints the data, the network, its cost per image, and the estimated duration of the run."""
    size = " x ".join(map(str, data.shape))
    name, word = recipe.name, "image"
    if isinstance(data, ArrayData):
        word, name = "sample", ScoreNet.mlp.__name__ if len(data.shape) == 1 else ScoreNet.unet.__name__
        vectors = f", each with a vector of {data.features} values," if data.features else ""
        print(f"data      {count(len(data), 'sample')} of {size}{_SIDES[len(data.shape)]}{vectors} from {args.data}")
        if net.units is not None:
            print(f"          {net.units}")
    else:
        color = ", converted from color," if data.from_color else ""
        print(f"data      {count(len(data))} of {size}{color} from {args.data}")
        if data.skipped:
            print(f"          left out: {count(len(data.skipped))} that cannot be read, {few(data.skipped)}")
    if data.classes is not None and args.labels:
        print(f"          {describe_classes(data.classes, 10)}")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    name = name if args.start is None or args.recipe is not None else args.start
    print(f"network   {name}: {parameters:,} parameters, {training_flop(net) / 1e9:.3g} GFLOP per {word}")
    if args.start is not None:
        begins = f"          begins with the weights of {args.start}"
        if not (args.out / "network").is_dir():  # otherwise that network may be gone
            kept = difference(load(locate(args.start), weights=False).config, as_stored(net.config))
            begins += "" if kept is None else f"; {kept}"
        print(begins)
    print(
        f"training  {settings.total:,} images in {settings.steps:,} steps of {settings.batch_size}, "
        f"{_epochs(settings.total / len(data))} epochs"
    )
    if "nonleaking" in (settings.augment or ()):
        print("          augmented: pictures are mirrored, scaled, turned and moved, and the network is told how")
    done = max(checkpoint.numbers(args.out / "checkpoints"), default=0)
    if done:
        print(f"          continues at image {done:,}")
    processes, device = accelerator.num_processes, accelerator.device
    seconds = [each / processes for each in seconds_per_image(net, data, settings, accelerator)]
    remaining, first = 0.0, 0
    for number, (stage, each) in enumerate(zip(settings.stages(), seconds, strict=True)):
        if settings.growth:
            change = quote(dict(settings.growth[number - 1].network)) if number else "the network above"
            print(f"          stage {number + 1} from image {first:,}, {1 / each:.3g} images/s: {change}")
        first += stage.total
        remaining += max(0, min(stage.total, first - done)) * each
    where = str(device) if processes == 1 else f"{processes} x {device.type}"
    speed = 1 / mean_seconds(seconds, settings.growth)
    print(f"time      about {duration(remaining)} on {where}, {speed:.3g} images/s")
    parts = range(1, min(torch.get_num_threads(), settings.batch_size // _PART) + 1)
    most = max((n for n in parts if settings.batch_size % n == 0), default=1)
    if device.type == "cpu" and processes == 1 < most and remaining > _LONG:
        print(f"          {most} processes may be faster: torchrun --nproc-per-node {most} -m scorematch train ...")
    expected = expectation(settings.total, 1 / speed, data.shape, settings.start)
    if expected is not None:
        print(f"          {expected}")
    print(f"out       {args.out}", flush=True)


def _epochs(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
