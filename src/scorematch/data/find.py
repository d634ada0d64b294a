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
from scorematch.data.pictures import ENDINGS
from scorematch.data.sources import Source, Wanted
from scorematch.data.tables import REFERENCES, Items, Table, array_keys

_HINTS = {".npy": ' Write np.savez("data.npz", array).'}  # what to write instead of files of other kinds
_HINTS |= dict.fromkeys(ENDINGS, " Write its folder.")
_HINTS |= dict.fromkeys((".csv", ".tsv"), ' Write its numbers as an array, np.savez("data.npz", array).')
_HINTS |= dict.fromkeys((".zip", ".tar", ".gz", ".tgz"), " Unpack it.")


def find(data: Any, wanted: Wanted, workers: int) -> Source:
    """Creates the source for the argument of ``open_images``."""
    if isinstance(data, str | os.PathLike):
        path, data = data, _of_path(data, wanted)
        if isinstance(data, Path):
            return Folder(data, wanted, workers)
        if isinstance(data, dict):
            try:
                return find(data, wanted, workers)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error
    if isinstance(data, Tensor | np.ndarray):
        return Array(data, None, wanted, "the array")
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return Array(*data, wanted, "the array")
    if isinstance(data, Mapping):
        if data and all(hasattr(value, "column_names") for value in data.values()):  # the splits of a data set
            if "train" not in data:
                raise ValueError(
                    f'the data set has no split "train"; the splits are {", ".join(map(repr, data))}. Pass one of them.'
                )
            return Table(data["train"], wanted, workers)
        key, *rest = array_keys(list(data), wanted)
        return Array(data[key], data[rest[0]] if rest else None, wanted, f"the array {key!r}")
    if hasattr(data, "column_names") and hasattr(data, "__getitem__"):
        return Table(data, wanted, workers)
    if hasattr(data, "__getitem__"):
        return Items(data, wanted, workers)
    hint = " Pass its data set, loader.dataset." if isinstance(data, DataLoader) else ""
    raise TypeError(
        f"data must be a folder, an .npz file, a tensor or an array, a Dataset, or a data set of Hugging Face, got "
        f"{type(data).__name__}.{hint}"
    )


def _of_path(data: str | os.PathLike[str], wanted: Wanted) -> Any:
    """The path of a folder, the images and labels of an .npz file, or the data set with this name."""
    path = Path(data).expanduser()
    if path.is_dir():
        return samples_in(path)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            hint = _HINTS.get(path.suffix.lower(), "")
            raise ValueError(f"data must be a folder of images or an .npz file, got the file {path}.{hint}")
        return _archive(path, wanted)
    check_path(data)
    from datasets import load_dataset

    name, split = REFERENCES.get(str(data), (data, "train"))
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{data} is not a file or a folder, and the data set {name} cannot be loaded from the Hub: {error}"
        ) from error


def check_path(data: str | os.PathLike[str]) -> None:
    """Checks, without a request, that a path exists or may be the name of a data set on the Hub.

    Raises:
        FileNotFoundError: if it does not exist and is not the name of a data set.
        ImportError: if it may be the name of a data set, and the package datasets is not installed.
    """
    path = Path(data).expanduser()
    if path.exists():
        return
    file = path.suffix.lower() in (".npz", ".h5", ".hdf5", ".nc", ".zarr", *_HINTS)
    if file or not isinstance(data, str) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data):
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{data} is neither a file nor a folder, and loading a data set from the Hub needs the package datasets: "
            "pip install datasets."
        ) from error


def _archive(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """The images of an .npz file, and the labels if they are wanted; other arrays may have any type."""
    names = array_names(path)
    try:
        keys = array_keys(names, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return read_arrays(path, keys)
