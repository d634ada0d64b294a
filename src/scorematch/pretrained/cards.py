"""Cards: facts about published networks, and what is not known about them.

A card names the source of each quality figure, and says whether the sampler settings were measured with these weights.
A network whose license or origin is unclear has no short name. The facts are in published.json, to which a network is
added as one more entry; so are the published options of networks whose checkpoints do not hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorematch.core.json_files import read_object
from scorematch.sampling.settings import SamplerSettings

SHIPPED = Path(__file__).parent.parent / "weights"  # the networks that ship with the package, each with a README.md


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts about one network.

    Attributes:
        name: the short name for ``ScoreNet.from_pretrained``, or None.
        repository: ``owner/name`` on the Hugging Face Hub, or None for a network that ships with the package.
        revision: the commit to load, or None for the main branch.
        license: the license of the weights.
        shape: the shape of a sample, (C, H, W).
        data: the training data.
        sigmas: the highest and the lowest noise level, in units of images in [0, 1].
        levels: the number of noise levels.
        parameters: the number of parameters.
        settings: the recommended sampler settings, or None to use the settings that the loader of its file format
            recommends.
        settings_source: where the settings come from.
        quality: what is known about the quality of its samples, with the source.
        correction: whether ``sigmas`` and ``levels`` replace those of the repository's configuration, which may store
            the defaults of its scheduler's class instead of those of the training.
    """

    name: str | None = None
    repository: str | None = None
    revision: str | None = None
    license: str
    shape: tuple[int, int, int]
    data: str
    sigmas: tuple[float, float]
    levels: int
    parameters: int
    settings: SamplerSettings | None = None
    settings_source: str
    quality: str
    correction: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """The facts about one published checkpoint of another project, which ``python -m scorematch convert`` reads.

    Attributes:
        name: the name of the file, or of the folder in which the authors keep it.
        config: the name of its configuration for ``--config``, or None if the file contains its options.
        address: where it can be downloaded.
        license: the license of the weights.
        shape: the shape of a sample, (C, H, W).
        data: the training data.
        quality: what is known about the quality of its samples, with the source.
    """

    name: str
    config: str | None = None
    address: str
    license: str
    shape: tuple[int, int, int]
    data: str
    quality: str


_PUBLISHED = read_object(Path(__file__).with_name("published.json"))


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return facts | ({"settings": SamplerSettings.from_dict(entry["settings"])} if "settings" in entry else {})


CARDS = tuple(Card(**_facts(entry)) for entry in _PUBLISHED["networks"])
CHECKPOINTS = tuple(CheckpointCard(**_facts(entry)) for entry in _PUBLISHED["checkpoints"])


def configurations(project: str) -> dict[str, dict[str, Any]]:
    """The published options of the networks of ``score_sde`` or ``improved_diffusion``, by name.

    An entry has the options of the entry that it is ``like``, except for those that it changes.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in _PUBLISHED["configurations"][project].items():
        options = dict(found[entry["like"]]) if "like" in entry else {}
        for key, value in entry.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
        options.pop("like", None)
        found[name] = options
    return found


def find(name: str) -> Card | None:
    """The card with this short name or repository, or None."""
    return next((card for card in CARDS if name in (card.name, card.repository)), None)


def table() -> str:
    """All cards and checkpoints as text, for a terminal."""
    indent = 2 + max(len(card.name or "-") for card in CARDS)
    networks = [
        f"{card.name or '-':<{indent}}{_place(card)}\n"
        f"{'':<{indent}}{_shape(card)}, {card.data}; {card.parameters:,} parameters; {card.levels} levels "
        f"{card.sigmas[0]:g} -> {card.sigmas[1]:g}; license {card.license}\n"
        f"{'':<{indent}}sampler settings: {card.settings_source}\n"
        f"{'':<{indent}}quality: {card.quality}\n"
        for card in CARDS
    ]
    checkpoints = [
        f"{card.name}  {card.address}\n"
        f"    {_shape(card)}, {card.data}; license {card.license}{f'; --config {card.config}' if card.config else ''}\n"
        f"    quality: {card.quality}"
        for card in CHECKPOINTS
    ]
    title = "Checkpoints to download, and to convert with scorematch convert FILE FOLDER [--config NAME]:"
    return "".join(networks) + "\n".join(["", title, *checkpoints])


def _place(card: Card) -> str:
    if card.repository is None:
        return f"ships with the package in {SHIPPED / str(card.name)}"
    return card.repository + (f" at {card.revision[:12]}" if card.revision else "")


def _shape(card: Card | CheckpointCard) -> str:
    return "x".join(map(str, card.shape))
