"""The configuration of a network: its schema, and how to read it.

The ``config.json`` that this package writes has the keys

- ``format_version``: the version of this format;
- ``family``, and the keys of that family, which say how to build the backbone;
- ``precondition``, ``sample_shape``, ``value_range`` and ``predicts_variance``: the arguments of ``ScoreNet``;
- ``units``, the mean and the standard deviation of each channel of data that are not images, if they are known;
- ``precondition_options``, another argument of ``ScoreNet``, if there are any;
- ``sampler_settings``: the recommended SamplerSettings, or null;
- ``class_names``, the names of the classes, if they are known;
- ``axes``, the names of the axes of the data, if they are known;
- ``scheduler``, the configuration of the scheduler of diffusers that the network came with, if there was one, or
  ``"scheduler_config.json"``, the name of the file in the same folder that holds it; only diffusers uses it;
- ``schedule``: the noise levels, or ``"schedule.json"``, the name of the file in the same folder that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from scorematch.core.json_files import read_object
from scorematch.core.messages import about, plain
from scorematch.core.schema import Field, check
from scorematch.nets import FAMILIES
from scorematch.nets.precondition import ROWS, check_options
from scorematch.noise import NoiseSchedule
from scorematch.sampling.settings import SamplerSettings

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
SCHEDULE_FILE = "schedule.json"

# The keys that do not affect the score.
FREE_KEYS = frozenset({"sampler_settings", "class_names", "axes", "scheduler"})
_LISTED = 8  # the largest number of file names in a message
_LARGEST = 1e30  # the largest absolute value of a floating-point number
_FAMILY = Field(str, required=True, choices=(*FAMILIES, "custom"))
_COMMON: Mapping[str, Field] = {
    "sample_shape": Field(list, required=True, optional=True, low=1, high=16, each=Field(int, low=1, high=2**31)),
    "value_range": Field(
        list, required=True, optional=True, low=2, high=2, each=Field(float, low=-_LARGEST, high=_LARGEST)
    ),
    "predicts_variance": Field(bool, required=True),
    "precondition_options": Field(dict),
    "units": Field(dict),
    "sampler_settings": Field(dict, required=True, optional=True),
    "class_names": Field(list, optional=True, low=1, each=Field(str)),
    "axes": Field(list, low=2, each=Field(str)),
    "scheduler": Field(dict, optional=True),
    "schedule": Field(dict, required=True),
}
_CHANNELS = Field(list, required=True, low=1, each=Field(float, low=-_LARGEST, high=_LARGEST))
_UNITS: Mapping[str, Field] = {"mean": _CHANNELS, "std": _CHANNELS, "relative": Field(bool), "image": Field(dict)}
_NO_UNITS = {"mean": [0.0], "std": [1.0]}
_SCHEDULE: Mapping[str, Field] = {
    "sigmas": Field(list, required=True, low=1, high=1_000_000, each=Field(float, low=0, high=_LARGEST))
}


class Stored(NamedTuple):
    """A network as it is stored.

    Attributes:
        config: the checked configuration, with the keys of ``ScoreNet.config``.
        weights: the tensors of the backbone by name.
        source: the folder or file that the network comes from, for error messages.
        has_weights: False if only the configuration was read; ``weights`` is then empty.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    source: Path | str
    has_weights: bool = True


def checked(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """Checks a configuration, and returns a copy of it.

    Args:
        config: a mapping with the keys of ``ScoreNet.config``; other keys are kept without a check.
        where: the name of the configuration in error messages.

    Raises:
        ValueError: if a key is missing or a value is invalid; the message names the key.
    """
    where = str(where)
    check(config, {"format_version": Field(int, required=True)}, where)
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version is {config['format_version']}, but this version of scorematch reads "
            f"{FORMAT_VERSION}. Install a newer scorematch."
        )
    check(config, {"family": _FAMILY}, where)
    family = FAMILIES.get(config["family"])
    rows = tuple(ROWS) if family is None else family.preconditions
    check(config, {} if family is None else family.keys, where)
    check(config, {"precondition": Field(str, required=True, choices=rows), **_COMMON}, where)
    check_options(config["precondition"], config.get("precondition_options", {}), f"{where}: precondition_options")
    if config["value_range"] is not None and not config["value_range"][0] < config["value_range"][1]:
        raise ValueError(f"{where}: value_range must be [low, high] with low < high, got {config['value_range']}.")
    units = config.get("units", _NO_UNITS)
    check(units, _UNITS, f"{where}: units", closed=True)
    check(units.get("image", _NO_UNITS), _UNITS, f"{where}: units: image", closed=True)
    check(config["schedule"], _SCHEDULE, f"{where}: schedule", closed=True)
    with about(where):
        NoiseSchedule.from_dict(config["schedule"])
        if config["sampler_settings"] is not None:
            SamplerSettings.from_dict(config["sampler_settings"])
    return dict(config)


def translated(
    config: Mapping[str, Any], schedule: NoiseSchedule, settings: SamplerSettings | None, where: Path | str
) -> dict[str, Any]:
    """The checked configuration of a network of images in [0, 1] in another format, from the keys that it determines.

    Raises:
        ValueError: as ``checked``.
    """
    shared = {
        "format_version": FORMAT_VERSION,
        "value_range": [0.0, 1.0],
        "predicts_variance": False,
        "sampler_settings": None if settings is None else settings.to_dict(),
        "schedule": schedule.to_dict(),
    }
    return checked({**shared, **config}, where)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says how to build the backbone: "family" and the keys of that family."""
    family = FAMILIES.get(config["family"])
    keys = () if family is None else family.keys
    return {"family": config["family"], **{key: config[key] for key in keys if key in config}}


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is too large, not valid JSON or nested too deeply, or holds another value than an object.
    """
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise missing(path) from error
    except ValueError as error:
        raise ValueError(f"{error} {remedy(path)}") from error


def remedy(path: Path) -> str:
    """The end of a message about a damaged file: what to do. A symbolic link is a file in the Hub's cache."""
    if path.is_symlink():
        return f"Delete {path.resolve()} and load the network again, which downloads it again."
    return "Save or download it again."


def missing(path: Path) -> FileNotFoundError:
    """The error for a file that is missing in a network's folder."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    return FileNotFoundError(
        f"{path.parent} has no {plain(path.name)}; it holds {listed(names)}. A network is a folder with {CONFIG_FILE} "
        "and its weights."
    )


def listed(names: Iterable[str]) -> str:
    """The names of files in a message: the first eight in alphabetical order, and the number of the others."""
    words = [plain(name) for name in sorted(names)]
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more if words else "nothing"
