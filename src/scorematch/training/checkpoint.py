"""Checkpoints, with which an interrupted training run continues. They are written atomically.

A checkpoint is a folder with safetensors files and ``state.json``; its name is the number of images seen. It is written
under a temporary name, synchronized to the disk (fsync), and renamed. An interruption or an error does not affect the
earlier checkpoints; the incomplete folder is deleted when the run is started again. state.json contains a hash of each
file and of its own values. If the newest checkpoint does not match its hashes, the checkpoint before is used.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scorematch.core.files import UNFINISHED, synchronize
from scorematch.core.json_files import read_object
from scorematch.core.messages import plain, reason
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.core.schema import Field, check

_STATE = "state.json"
_FIELDS: Mapping[str, Field] = {
    "images": Field(int, required=True, low=0, high=2**62),
    "files": Field(dict, required=True),
    "hash": Field(str, required=True),
}

Parts = Mapping[str, Mapping[str, Tensor]]


class Checkpoint(NamedTuple):
    """A checkpoint.

    Attributes:
        images: the number of images that the run had seen.
        parts: the tensors of each file by name, by the name of the file without its extension.
        state: the other values, from state.json.
    """

    images: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, images: int, parts: Parts, state: Mapping[str, Any], *, keep: int) -> None:
    """Writes a checkpoint, and then deletes all but the ``keep`` newest ones.

    Args:
        folder: the folder of all checkpoints of the run; created if it does not exist.
        images: the number of images seen.
        parts: the tensors of each file by name, by the name of the file without its extension.
        state: other values, which JSON supports.
        keep: the number of checkpoints to keep, at least 1.

    Raises:
        OSError: if the checkpoint cannot be written; the earlier checkpoints are unchanged.
    """
    try:
        with new_folder(folder / name_of(images)) as staged:
            hashes = {}
            for part, tensors in parts.items():
                content = save({key: _plain(tensor) for key, tensor in tensors.items()}, metadata={"format": "pt"})
                hashes[f"{part}.safetensors"] = hash_of_bytes(content)
                write_file(staged / f"{part}.safetensors", content)
            values = {**state, "images": images, "files": hashes}
            text = json.dumps({**values, "hash": hash_of(values)}, indent=2)
            write_file(staged / _STATE, text.encode())
    except OSError as error:
        older = numbers(folder)
        last = f"the checkpoint at image {older[-1]:,} is complete" if older else "there is no earlier one"
        raise OSError(
            error.errno,
            f"the checkpoint at image {images:,} could not be written to {folder} ({error.strerror or error}); {last}. "
            "Correct the cause, such as a full disk, and start again with the same arguments",
        ) from error
    for number in numbers(folder):
        if number > images:  # damaged: the run continued from an earlier checkpoint
            shutil.rmtree(folder / name_of(number))
    prune(folder, images, keep=keep)


def prune(folder: Path, images: int, *, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints at or before a number of images."""
    for number in [number for number in numbers(folder) if number <= images][:-keep]:
        shutil.rmtree(folder / name_of(number))


def latest(folder: Path, fields: Mapping[str, Field] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, or None if there is none.

    Args:
        folder: the folder of all checkpoints of the run.
        fields: the schema of the other values in state.json; None does not check them.

    Warns:
        UserWarning: if a newer checkpoint is damaged.

    Raises:
        ValueError: if all checkpoints are damaged.
    """
    damaged = ""
    for images in reversed(numbers(folder)):
        path = folder / name_of(images)
        try:
            state = read_object(path / _STATE)
            check(state, {**_FIELDS, **(fields or {})}, _STATE)
            if state.pop("hash") != hash_of(state):
                raise ValueError(f"{_STATE} was changed after it was written")
            if state.pop("images") != images:
                raise ValueError(f"{_STATE} belongs to another checkpoint")
            parts = {}
            for name, expected in state.pop("files").items():
                if Path(name).name != name:
                    raise ValueError(f"{plain(name)} is not the name of a file")
                content = (path / name).read_bytes()
                if hash_of_bytes(content) != expected:
                    raise ValueError(f"{name} was changed after it was written")
                parts[name.removesuffix(".safetensors")] = load(content)
            return Checkpoint(images, parts, state)
        except (OSError, ValueError, SafetensorError) as error:
            damaged = f"the checkpoint {path} is damaged ({reason(error)})"
            if images > min(numbers(folder)):
                warnings.warn(f"{damaged}; the checkpoint before it is used instead.", stacklevel=2)
    if damaged:
        raise ValueError(f"{damaged}, and there is no earlier one. Delete {folder} to begin the run again.")
    return None


def name_of(images: int) -> str:
    """A number of images with leading zeros, for names that sort in the order of the numbers."""
    return f"{images:09d}"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is renamed to ``path`` at the end; an existing folder is replaced."""
    staged = path.with_name(f"{UNFINISHED}{path.name}-{uuid.uuid4().hex}")
    try:
        staged.mkdir(parents=True)
        yield staged
        for file in staged.rglob("*"):
            synchronize(file)
        synchronize(staged)
        if path.exists():
            shutil.rmtree(path)
        staged.rename(path)
        synchronize(path.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and synchronizes it to the disk."""
    path.write_bytes(content)
    synchronize(path)


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory with other tensors, as safetensors requires."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def numbers(folder: Path) -> list[int]:
    """The numbers of images of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
