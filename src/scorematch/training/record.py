"""The record of a training run, config.json: its settings, its network and its data, which must not change."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from scorematch.core.arguments import argument
from scorematch.core.files import check_own
from scorematch.core.processes import Process, SharedFolder
from scorematch.core.provenance import versions
from scorematch.core.records import as_stored, differences, read_record, refuse, write_record
from scorematch.core.schema import Field
from scorematch.data.images import Data
from scorematch.noise import NoiseSchedule
from scorematch.pretrained import load, locate
from scorematch.pretrained.configuration import FREE_KEYS
from scorematch.score import ScoreNet
from scorematch.training import checkpoint
from scorematch.training.accelerator import wait
from scorematch.training.augment import augmentations
from scorematch.training.ema import SNAPSHOTS
from scorematch.training.levels import LevelMixture
from scorematch.training.settings import Settings, TrainSettings
from scorematch.training.start import growth

FOLDERS = ("checkpoints", "network", SNAPSHOTS, "samples", "report")  # the subfolders of the folder of a run
_FILE = "config.json"
_SCHEMA = dict.fromkeys(("settings", "network", "data"), Field(dict, required=True))
# What may change when a run continues: the distribution of its result does not depend on it.
_FREE = {each.name for each in fields(Settings) if each.metadata["free"]}
_NAMES = {LevelMixture: "Mixture"}  # the names of classes in the files, if they are others
_FEW = 2  # the most differences of a network that an error lists


def check_files(folder: Path) -> None:
    """Checks that the files that a run writes replace only those of an earlier one; see ``check_own``."""
    check_own(folder, _FILE, (*FOLDERS, "log.jsonl", "report.md"))


def check_run(folder: Path, net: ScoreNet, data: Data, settings: TrainSettings) -> None:
    """Checks that ``train`` can begin a run in a folder or continue it, without writing anything.

    Raises:
        FileNotFoundError: if there is no network ``settings.start``.
        ValueError: if the folder contains a run with other settings, or a new run cannot begin with this network.
    """
    before = read_record(folder / _FILE, _SCHEMA)
    if before is not None:
        _check_same(folder, before, as_stored(_parts(net, data, settings)))
    elif settings.start is not None:
        growth(net, load(locate(settings.start), weights=False).config, settings.start)


def network_of(folder: Path) -> dict[str, Any] | None:
    """The configuration of the network of the run in a folder; None if there is no run."""
    before = read_record(folder / _FILE, _SCHEMA)
    return None if before is None else before["network"]


def length_of(folder: Path) -> tuple[int, int] | None:
    """The number of images of the run in a folder, and the number of its later stages; None if there is no run."""
    before = settings_of(folder)
    return None if before is None else (int(before["images"]), len(before.get("growth", ())))


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if there is no run."""
    before = read_record(folder / _FILE, _SCHEMA)
    return None if before is None else _renamed(before["settings"])


def stage_of(network: Path) -> str | None:
    """The stage of a run, from its folder or that of its network, as text; None if there is no run with stages."""
    folder = network.parent if network.name == "network" else network
    try:
        before = read_record(folder / _FILE, _SCHEMA)
    except ValueError:  # that of a network
        return None
    growth = [] if before is None else before["settings"].get("growth", [])
    if before is None or not growth:
        return None
    images = max(checkpoint.numbers(folder / "checkpoints"), default=0)
    stage = 1 + sum(images > each["begins"] for each in growth)
    last = max(images, before["settings"]["images"])  # whose last batch may have more
    return f"{stage} of {1 + len(growth)}, at image {images:,} of {last:,}"


def write_config(folder: Path, net: ScoreNet, data: Data, settings: TrainSettings, accelerator: Any) -> dict[str, Any]:
    """Writes config.json if it does not exist, and compares it with the settings otherwise; returns its content.

    Raises:
        FileNotFoundError: if the processes do not share the folder.
        ValueError: if the folder contains a run with other settings.
    """
    parts = _parts(net, data, settings)
    config = {**parts, "versions": versions(accelerator.device, "accelerate", "safetensors", "numpy")}
    shared = SharedFolder(folder, Process(accelerator.process_index, accelerator.num_processes))
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _FILE).exists():
            write_record(folder / _FILE, config, durable=True)
    wait(accelerator, "all have opened the data")
    shared.wait()
    now: dict[str, Any] = as_stored(config)
    _check_same(folder, read_record(folder / _FILE, _SCHEMA) or now, now)
    return now


def _parts(net: ScoreNet, data: Data, settings: TrainSettings) -> dict[str, dict[str, Any]]:
    """The parts of config.json that must not change."""
    values = {each.name: described(getattr(settings, each.name)) for each in fields(Settings)}
    values["start"] = None if settings.start is None else os.fspath(settings.start)
    values["augment"] = list(augmentations(net, data, settings.augment))
    if settings.growth:  # so that the records of runs without growth have no new key
        begins = itertools.accumulate(stage.total for stage in settings.stages())
        values["growth"] = [
            {"begins": first, "network": dict(stage.network), "training": described(dict(stage.training))}
            for first, stage in zip(begins, settings.growth, strict=False)
        ]
    of_data = {"images": len(data), "shape": list(data.shape), "fingerprint": data.fingerprint}
    return {"settings": values, "network": net.config, "data": of_data}


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    settings = differences(_renamed(before["settings"]), now["settings"], free=_FREE)
    network = differences(before["network"], now["network"], free=FREE_KEYS)
    network = network if len(network) <= _FEW else ["the network is different"]
    of_data = [{f"{key} of the data": value for key, value in each["data"].items()} for each in (before, now)]
    # The fingerprint changes with the others.
    data = differences(*of_data, free=["fingerprint of the data"]) or differences(*of_data)
    advice = (
        "To continue it use its settings, on the command line its options such as --recipe; otherwise use another "
        "folder."
    )
    if (folder / "report.md").exists():
        start = argument("start", (folder / "network").as_posix())
        advice = f"This run is complete. To train longer, start a new run with {start}."
    elif not any(checkpoint.numbers(folder / "checkpoints")):  # it has no checkpoint, or only that of image 0
        advice += " Nothing of that run is saved yet: if it has ended, delete the folder to begin again."
    refuse(f"{folder} contains a run with other settings", [*settings, *network, *data], advice, most=6)


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a record, in which "augment" may have been "flip", and later options are missing."""
    flips = {"augment": ["flip"] if settings["flip"] else []} if "flip" in settings else {}
    own = {key: value for key, value in settings.items() if key != "flip"}
    return {"optimizer": "adamw", "fixed_norms": False, **own, **flips}


def described(value: Any) -> Any:
    """Converts a setting to a JSON value that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, NoiseSchedule):
        return value.to_dict()
    if isinstance(value, partial):
        given = {"function": described(value.func), "args": described(value.args)}
        return {**given, **{key: described(entry) for key, entry in value.keywords.items()}}
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    kind: Any = type(value)
    options: Mapping[str, Any] | None = None
    if is_dataclass(value):
        options = {field.name: getattr(value, field.name) for field in fields(value)}
    elif kind.__repr__ is object.__repr__:
        options = getattr(value, "__dict__", {})
    if options is not None:
        arguments = ", ".join(f"{name}={described(entry)}" for name, entry in options.items())
        return f"{_NAMES.get(kind, kind.__name__)}({arguments})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
