"""From a name to the folder that holds the network."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from scorematch.pretrained import cards, hub

_SHIPPED = Path(__file__).parent.parent / "weights"


def locate(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, cards.Card | None]:
    """The folder with a network of that name, downloaded from the Hub if need be, and its card, if it has one.

    A Path is a folder. A string without a slash is a short name. A string with a slash is the folder of that path, if
    it exists, or else a repository of the Hub.

    Raises:
        TypeError: if it is neither a string nor a path.
        FileNotFoundError: if there is no such name, folder or repository.
        ValueError: if it is a file.
    """
    if not isinstance(name_or_folder, str | os.PathLike):
        raise TypeError(f"the name of a network must be a string or a path, got {type(name_or_folder).__name__}.")
    path = Path(name_or_folder)
    card = cards.find(name_or_folder) if isinstance(name_or_folder, str) else None
    if card is None and path.is_file():
        raise ValueError(_about_a_file(path))
    if not isinstance(name_or_folder, str):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}.")
        return path, None
    name = name_or_folder
    if _is_path(name):
        if path.is_dir():
            return path, None
        if not hub.is_repository(name):
            raise FileNotFoundError(f"there is no folder {name!r}, and a repository of the Hub is written owner/name.")
    elif card is None:
        known = ", ".join(repr(each.name) for each in cards.CARDS if each.name is not None)
        hint = f"Write './{name}' for the folder of that name."
        if not path.is_dir():
            hint = "Write './folder' for a folder, or 'owner/name' for a repository of the Hub."
        raise FileNotFoundError(f"{name!r} is not the short name of a network; known are {known}. {hint}")
    elif path.is_dir():
        warnings.warn(
            f"{name!r} is the network of that name, not the folder; write './{name}' for the folder.", stacklevel=4
        )
    if card is not None and card.repository is None:
        return _SHIPPED / str(card.name), card
    if card is not None:
        name, revision = str(card.repository), card.revision if revision is None else revision
    folder = hub.fetch(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return folder, card


def _is_path(name: str) -> bool:
    """Whether a string is written as a path."""
    return "/" in name or os.sep in name or name in (os.curdir, os.pardir)


def _about_a_file(path: Path) -> str:
    if path.suffix in (".json", ".safetensors"):
        return f"{path} is a file of a network. Pass the folder that holds it, {str(path.parent)!r}."
    return f"{path} is a checkpoint file. Convert it with python -m scorematch convert {path} FOLDER, and load FOLDER."
