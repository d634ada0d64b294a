"""Loading a network: its checked configuration and weights by name, and the backbone that they describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from scorematch.core.files import reading
from scorematch.core.messages import quote, reason
from scorematch.nets import FAMILIES
from scorematch.pretrained import diffusers
from scorematch.pretrained.cards import Card
from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE, Stored, architecture, checked, read_json
from scorematch.pretrained.names import Place
from scorematch.pretrained.weights import DIFFUSERS_WEIGHTS_FILES, WEIGHTS_FILE, fill, read_weights


def load(place: Place, *, weights: bool = True) -> Stored:
    """Loads the configuration and the weights of a network, with the errors of ``ScoreNet.from_pretrained``.

    Args:
        place: where the network is, from ``locate``.
        weights: whether to read the weights; otherwise only the configuration of a repository is downloaded.
    """
    with reading(_home(place.folder)) as home:
        return _read(home, place.card, place.complete if weights else None)


def _read(home: Path, card: Card | None, complete: Callable[[Sequence[str]], None] | None) -> Stored:
    path = home / CONFIG_FILE
    config = read_json(path)
    # diffusers keeps the keys of this package when it saves a network again, but not the noise levels.
    lost = config.get("schedule") == SCHEDULE_FILE and not (home / SCHEDULE_FILE).is_file()
    if "format_version" in config and not (lost and "_diffusers_version" in config):
        stored = _read_own(home, config, complete)
    elif config.get("_class_name") in diffusers.CLASSES:
        stored = diffusers.read(home, config, card, complete)
    else:
        raise ValueError(
            f"{path} has no format_version, so it was not written by save_pretrained, and its _class_name must be "
            f"{' or '.join(diffusers.CLASSES)}, the supported classes of diffusers, got "
            f"{quote(config.get('_class_name'))}."
        )
    if card is None or card.settings is None:
        return stored
    return stored._replace(config={**stored.config, "sampler_settings": card.settings.to_dict()})


def _read_own(home: Path, config: dict[str, Any], complete: Callable[[Sequence[str]], None] | None) -> Stored:
    """A network that ``save_pretrained`` wrote, in either layout."""
    if config.get("schedule") == SCHEDULE_FILE:
        config["schedule"] = read_json(home / SCHEDULE_FILE)
    if config.get("scheduler") == diffusers.SCHEDULER_FILE:
        path = home / diffusers.SCHEDULER_FILE
        config["scheduler"] = read_json(path) if path.is_file() else None
    files = (WEIGHTS_FILE, *DIFFUSERS_WEIGHTS_FILES)
    if "_class_name" in config:
        files = (*DIFFUSERS_WEIGHTS_FILES, WEIGHTS_FILE)
    config = checked(config, home / CONFIG_FILE)
    if complete is None:
        return Stored(config, {}, home, has_weights=False)
    complete(files)
    return Stored(config, read_weights(home, files), home)


def _home(folder: Path) -> Path:
    """The folder that holds the network: the folder itself, unet/ in it of a pipeline, or network/ of a run."""
    unet, network = ((folder / name / CONFIG_FILE).is_file() for name in ("unet", "network"))
    if not (unet or network):
        return folder
    # Beside it there may be another config.json, with the options of a training program; that of a run is its record.
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    own = "format_version" in config or "_class_name" in config
    if own and unet:
        raise ValueError(f"{folder} holds two networks, one in it and one in unet/. Move one into a folder of its own.")
    return folder / "unet" if unet else folder if own else folder / "network"


class WithoutValues(TorchFunctionMode):
    """Skips initial values, which tensors on the meta device do not have; torch would import its compiler for some."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build(stored: Stored, backbone: nn.Module | None = None, condition_encoder: nn.Module | None = None) -> nn.Module:
    """Builds the backbone of a stored network on the CPU, with its weights; on the meta device without them.

    The backbone is first built on the meta device: no weights are initialized, no random numbers are drawn, and no
    memory is allocated before the shapes of the weights are checked.

    Args:
        stored: the network.
        backbone: for a network of the user's own class, an instance of this class, into which the weights are loaded.
        condition_encoder: for a network with an encoder of its condition, an instance of its class, in the same way.

    Returns:
        The backbone; ``backbone`` itself if it was given.

    Raises:
        TypeError: if ``backbone`` is not a module.
        ValueError: if no network can be built from the configuration, the weights do not fit it, or ``backbone`` or
            ``condition_encoder`` is missing for a network that needs it or given for another.
    """
    if backbone is not None and not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, an instance of your class, got {backbone!r}.")
    family = FAMILIES.get(stored.config["family"])
    if family is None:
        if backbone is None:
            raise ValueError(
                f"{stored.source} holds a network of your own class, whose code is not stored. In Python, pass an "
                "instance of the class as backbone=."
            )
    elif backbone is not None:
        raise ValueError(f"{stored.source} holds a network of the family {family.name!r}: leave out backbone=.")
    else:
        values = architecture(stored.config)
        del values["family"]
        if bool(values.get("condition_encoder")) != (condition_encoder is not None):
            raise ValueError(
                f"{stored.source} holds a network with an encoder of its condition, whose code is not stored. In "
                "Python, pass an instance of its class as condition_encoder=."
                if condition_encoder is None
                else f"{stored.source} holds a network without an encoder of its condition: leave out "
                "condition_encoder=."
            )
        values |= {} if condition_encoder is None else {"condition_encoder": condition_encoder}
        where = Path(stored.source, CONFIG_FILE) if Path(stored.source).is_dir() else stored.source
        try:
            with torch.device("meta"), WithoutValues():
                backbone = family.build(
                    values, levels=len(stored.config["schedule"]["sigmas"]), precondition=stored.config["precondition"]
                )
        except ValueError as error:
            raise ValueError(f"{where}: {reason(error)}.") from error
    if stored.has_weights:
        # In float32 before it is filled: weights would be rounded to torch's default dtype, if that is another one.
        fill(backbone.float(), stored.weights, stored.source)
    return backbone
