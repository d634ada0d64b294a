"""``scorematch info``: describes a network, from its configuration."""

from __future__ import annotations

import argparse
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from scorematch.cli.options import Commands
from scorematch.cli.options.networks import add_model
from scorematch.core.conditions import describe_classes
from scorematch.core.messages import plain, reason
from scorematch.data.pictures import is_picture
from scorematch.noise import NoiseSchedule
from scorematch.pretrained import Place, load, locate
from scorematch.sampling import SamplerSettings, recommended_sampler
from scorematch.score import ScoreNet
from scorematch.training.flops import sampling_flop
from scorematch.training.record import stage_of


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "info",
        help="describe a network",
        description="Describes a network: what it draws, its noise levels, its size, what a network call costs, its "
        "sampler\nsettings, its license and where its weights come from. Only the configuration of a "
        "repository on\nthe Hub is downloaded.",
        epilog="Examples:\n  %(prog)s mnist\n  %(prog)s google/ddpm-cifar10-32\n  %(prog)s runs/faces/network",
    )
    add_model(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    place = locate(args.model)
    stored, card = load(place, weights=False), place.card
    config = stored.config
    # The code of a network of the user's own class is not stored.
    net = None if config["family"] == "custom" else ScoreNet.from_stored(stored)
    schedule, settings = NoiseSchedule.from_dict(config["schedule"]), config["sampler_settings"]
    defaults = "the defaults" if settings is None else str(SamplerSettings.from_dict(settings))
    with warnings.catch_warnings():  # guidance is chosen when the network is used
        warnings.filterwarnings("ignore", "these sampler settings were learned for")
        sampler, others = (defaults, {}) if net is None else (str(recommended_sampler(net)), _alternatives(net))
    lines = {
        "network": args.model,
        "weights": _origin(place),
        "stage": stage_of(place.folder),
        "license": _license(place) if card is None else card.license,
        "data": None if card is None else card.data,
        "quality": None if card is None else card.quality,
        "family": f'{config["family"]}, preconditioning "{config["precondition"]}"',
        "class": "your own; ScoreNet.from_pretrained needs it as backbone=YourClass()" if net is None else None,
        "parameters": None if net is None else f"{sum(each.numel() for each in net.parameters()):,}",
        "computation": None if net is None else _cost(net),
        "images" if is_picture(config["sample_shape"] or (3, 1, 1)) else "samples": _images(config),
        "units": None if net is None or net.units is None else f"{net.units}, of each channel",
        "condition": None if net is None else _condition(net),
        "noise levels": f"{len(schedule)}, sigma from {schedule.sigma_max:.6g} to {schedule.sigma_min:.6g}",
        "sampler": sampler,
        "": None if card is None else card.settings_source,
        **others,
    }
    for name, text in lines.items():
        if text is not None:  # it is known
            print(f"{name:<13}{text}")


def _alternatives(net: ScoreNet) -> dict[str, str]:
    """The other stored samplers, by the option that chooses them; the fewest network calls first."""
    stored = [] if net.sampler_settings is None else net.sampler_settings.alternatives
    samplers = sorted((recommended_sampler(net, each) for each in stored), key=len)
    return {f"--calls {len(sampler)}": str(sampler) for sampler in samplers}


def _origin(place: Place) -> str:
    if place.repository is not None:  # the folder in the client's cache has the name of the commit
        return f"https://huggingface.co/{place.repository}, commit {place.folder.name[:12]}"
    return f"the folder {place.folder}" if place.card is None else f"part of the package, in {place.folder}"


def _license(place: Place) -> str:
    """The license in the metadata of a README.md."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    text = ""
    with suppress(HfHubHTTPError, OSError, ValueError):  # there is none, or the Hub cannot be reached
        readme = place.folder / "README.md"
        if place.repository is not None:
            readme = Path(hf_hub_download(place.repository, "README.md", revision=place.folder.name))
        text = readme.read_text(encoding="utf-8")
    metadata = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    found = None if metadata is None else re.search(r"^license: *(\S.*)$", metadata[1], re.MULTILINE)
    return "not stated" if found is None else plain(found[1])


def _cost(net: ScoreNet) -> str | None:
    if net.sample_shape is None:
        return None
    try:
        return f"{sampling_flop(net) / 1e9:.3g} GFLOP per network call and image"
    except ValueError as error:  # the size in a configuration of diffusers does not fit the network
        return f"unknown: {reason(error)}"


def _images(config: dict[str, Any]) -> str:
    shape, ends = config["sample_shape"], config["value_range"]
    size = "of any shape" if shape is None else "x".join(map(str, shape))
    return f"{size}, {'values of any size' if ends is None else f'values in [{ends[0]:g}, {ends[1]:g}]'}"


def _condition(net: ScoreNet) -> str | None:
    takes = net.conditioning
    if takes is None:
        return None
    texts = []
    if takes.classes is not None:
        names = net.class_names
        text = f"{takes.classes} classes, 0 to {takes.classes - 1}" if names is None else describe_classes(names)
        texts.append(text + (", or no class" if takes.null_class else ""))
    if takes.vector:
        texts.append(f"a vector of {takes.vector} values")
    if takes.channels:
        texts.append(f"an image with {takes.channels} channels, such as the degraded image for the command restore")
    return "; and ".join(texts) or "none"
