"""Finding the folder of a network by its name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scorematch.data.array_data import FILES
from scorematch.data.pictures import ENDINGS
from scorematch.pretrained import cards, hub


class Place(NamedTuple):
    """Where a network is.

    Attributes:
        folder: the folder. That of a repository has only the configurations at first.
        card: the card of the network, or None if it has none.
        repository: ``owner/name`` on the Hub, or None for a folder and for a network that ships with the package.
        complete: downloads the first of the named files of weights that a repository has; does nothing for other
            networks.
    """

    folder: Path
    card: cards.Card | None = None
    repository: str | None = None
    complete: Callable[[Sequence[str]], None] = lambda files: None


def locate(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Place:
    """Finds the folder of a network, and downloads its configurations from the Hub if necessary.

    Args:
        name_or_folder: a short name (a string without a slash), a folder (a ``Path``, or a string with a slash), or a
            repository ``owner/name`` of the Hub. A string with a slash is a folder if that folder exists.
        revision: a branch, a tag or a commit of the repository; None is the commit on the card, or the main branch.
        token: a token for private and gated repositories; None uses the token of ``hf auth login``, if there is one.
        cache_dir: the folder of the cache; None is the client's default.
        local_files_only: whether to use only the cache, without any request.

    Raises:
        TypeError: if ``name_or_folder`` is neither a string nor a path.
        FileNotFoundError: if there is no such name, folder or repository, or the Hub cannot be reached.
        PermissionError: if the repository is gated.
        OSError: if a download fails for another reason.
        ValueError: if ``name_or_folder`` is a file, or ``token`` or a name in the repository is not valid, or the
            network with a ``revision`` is not on the Hub.
    """
    if not isinstance(name_or_folder, str | os.PathLike):
        raise TypeError(f"the name of a network must be a string or a path, got {type(name_or_folder).__name__}.")
    path = Path(name_or_folder).expanduser()
    card = cards.find(name_or_folder) if isinstance(name_or_folder, str) else None
    if card is None and path.is_file():
        raise ValueError(_about_a_file(path))
    if not isinstance(name_or_folder, str):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}.")
        return _local(path, revision)
    name = name_or_folder
    if _is_path(name):
        if path.is_dir():
            return _local(path, revision)
        if not hub.is_repository(name):
            raise FileNotFoundError(f"there is no folder {name!r}. For a repository of the Hub write owner/name.")
    elif card is None:
        known = ", ".join(repr(each.name) for each in cards.CARDS if each.name is not None)
        hint = f"Write './{name}' for the folder with this name."
        if not path.is_dir():
            hint = "Write './folder' for a folder, or 'owner/name' for a repository of the Hub."
        raise FileNotFoundError(f"{name!r} is not the short name of a network; the short names are {known}. {hint}")
    elif path.is_dir():
        warnings.warn(
            f"{name!r} loads the network with this name, not the folder; write './{name}' for the folder.", stacklevel=3
        )
    if card is not None and card.repository is None:
        return _local(cards.SHIPPED / str(card.name), revision, card)
    if card is not None:
        name, revision = str(card.repository), card.revision if revision is None else revision
    home = None if cache_dir is None else Path(cache_dir).expanduser()
    repository = hub.Repository(name, revision, token, home, local_files_only)
    return Place(repository.configurations(), card, name, repository.weights)


def _local(folder: Path, revision: str | None, card: cards.Card | None = None) -> Place:
    """A folder of this computer, which has no revisions."""
    if revision is not None:
        raise ValueError(f"revision is for repositories of the Hub, got {revision!r} for {folder}. Leave it out.")
    return Place(folder, card)


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or name in (os.curdir, os.pardir)


def _about_a_file(path: Path) -> str:
    if path.suffix in (".json", ".safetensors"):
        return f"{path} is one file of a network. Pass the folder that holds it, {str(path.parent)!r}."
    if path.suffix.lower() in (*ENDINGS, *FILES):
        return f"{path} is not a network. Pass the name of a network, such as 'mnist', or its folder."
    return (
        f"{path} is a file, and a network is a folder. If it is a checkpoint, convert it with scorematch convert "
        f"{path} FOLDER, and load FOLDER."
    )
