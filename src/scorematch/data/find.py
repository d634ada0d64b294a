"""Finds the source of images for what a user passes as data: a path, an array, a Dataset, or a name on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from scorematch.data.arrays import array_names, read_arrays
from scorematch.data.folders import Folder, samples_in
from scorematch.data.memory import Array
from scorematch.data.pictures import (
    ENDINGS,
)
from scorematch.data.sources import Source, Wanted
from scorematch.data.tables import REFERENCES, Items, Table, array_keys

_HINTS = {".npy": ' Write np.savez("data.npz", array).'}  # what to write instead of files of other kinds
_HINTS |= dict.fromkeys((".zip", ".tar", ".gz", ".tgz"), " Unpack it.")


def find(source: Any, options: Wanted, workers: int) -> Source:
    """Creates the source for the argument of ``open_images``."""
    if isinstance(source, str | os.PathLike):
        path, source = source, _of_path(source, options)
        if isinstance(source, Path):
            return Folder(source, options, workers)
        if isinstance(source, dict):
            try:
                return find(source, options, workers)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error
    if isinstance(source, Tensor | np.ndarray):
        return Array(source, None, options, "the array")
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor | np.ndarray):
        return Array(*source, options, "the array")
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):  # the splits of a data set
            if "train" not in source:
                raise ValueError(
                    f'the data set has no split "train"; the splits are {", ".join(map(repr, source))}. Pass one of '
                    "them."
                )
            return Table(source["train"], options, workers)
        key, *rest = array_keys(list(source), options)
        return Array(source[key], source[rest[0]] if rest else None, options, f"the array {key!r}")
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        return Table(source, options, workers)
    if hasattr(source, "__getitem__"):
        return Items(source, options, workers)
    hint = " Pass its data set, loader.dataset." if isinstance(source, DataLoader) else ""
    raise TypeError(
        f"data must be a folder, an .npz file, a tensor or an array, a Dataset, or a data set of Hugging Face, got "
        f"{type(source).__name__}.{hint}"
    )


def _of_path(source: str | os.PathLike[str], options: Wanted) -> Any:
    """The path of a folder, the images and labels of an .npz file, or the data set with this name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return samples_in(path)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            hint = _HINTS.get(path.suffix.lower(), "")
            raise ValueError(f"data must be a folder of images or an .npz file, got the file {path}.{hint}")
        return _archive(path, options)
    check_path(source)
    from datasets import load_dataset

    name, split = REFERENCES.get(str(source), (source, "train"))
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is not a file or a folder, and the data set {name} cannot be loaded from the Hub: {error}"
        ) from error


def check_path(source: str | os.PathLike[str]) -> None:
    """Checks, without a request, that a path exists or may be the name of a data set on the Hub.

    Raises:
        FileNotFoundError: if it does not exist and is not the name of a data set.
        ImportError: if it may be the name of a data set, and the package datasets is not installed.
    """
    path = Path(source).expanduser()
    if path.exists():
        return
    file = path.suffix.lower() in (".npz", *ENDINGS)
    if file or not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{source} is neither a file nor a folder, and loading a data set from the Hub needs the package datasets: "
            "pip install datasets."
        ) from error


def _archive(path: Path, options: Wanted) -> dict[str, np.ndarray]:
    """The images of an .npz file, and the labels if the options ask for them; other arrays may have any type."""
    names = array_names(path)
    try:
        wanted = array_keys(names, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return read_arrays(path, wanted)
