"""Checkpoints: everything that a run needs to continue, written so that the last one is always whole.

A checkpoint is a folder, named by the number of images seen, of safetensors files and ``state.json``. It is written
under another name, made durable, and renamed. Whatever happens meanwhile, the earlier checkpoints stay as they were;
the remains of a write that was interrupted are deleted when the run starts again. state.json holds a hash of each file,
so that a checkpoint that was damaged later is found, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

_STATE = "state.json"
_UNFINISHED = ".writing-"

Parts = Mapping[str, Mapping[str, Tensor]]


class Checkpoint(NamedTuple):
    """A checkpoint.

    Attributes:
        images: the number of images that the run had seen.
        parts: the tensors of each file, by the name of the file without its ending.
        state: the other values.
    """

    images: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, images: int, parts: Parts, state: Mapping[str, Any], *, keep: int) -> None:
    """Writes a checkpoint, and then deletes all but the last ones.

    Args:
        folder: of all checkpoints of the run; created if it does not exist.
        images: the number of images seen.
        parts: the tensors, by the name of the file and their own.
        state: plain values for JSON.
        keep: how many checkpoints stay, at least 1.

    Raises:
        OSError: if it cannot be written; the earlier checkpoints are then all there.
    """
    try:
        with new_folder(folder / name_of(images)) as staged:
            hashes = {}
            for part, tensors in parts.items():
                content = save({key: _plain(tensor) for key, tensor in tensors.items()}, metadata={"format": "pt"})
                hashes[f"{part}.safetensors"] = _hash(content)
                write_file(staged / f"{part}.safetensors", content)
            text = json.dumps({**state, "images": images, "files": hashes}, indent=2)
            write_file(staged / _STATE, text.encode())
    except OSError as error:
        older = _numbers(folder)
        last = f"the checkpoint at image {older[-1]:,} is whole" if older else "there is no earlier one"
        raise OSError(
            error.errno,
            f"the checkpoint at image {images:,} could not be written to {folder} ({error.strerror or error}); {last}. "
            "Free some space and run the same command again",
        ) from error
    numbers = _numbers(folder)
    newer = [number for number in numbers if number > images]  # damaged, since the run continued from an earlier one
    for number in newer + [number for number in numbers if number <= images][:-keep]:
        shutil.rmtree(folder / name_of(number))


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none.

    Warns:
        UserWarning: for a newer one that is damaged.
    """
    for images in reversed(_numbers(folder)):
        path = folder / name_of(images)
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            parts = {}
            for name, expected in state.pop("files").items():
                content = (path / name).read_bytes()
                if _hash(content) != expected:
                    raise ValueError(f"{name} was changed after it was written")
                parts[name.removesuffix(".safetensors")] = load(content)
            return Checkpoint(state.pop("images"), parts, state)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"the checkpoint {path} is damaged ({error}), and the one before is used.", stacklevel=2)
    return None


def name_of(images: int) -> str:
    """A number of images as part of a name; names sort as the numbers do."""
    return f"{images:09d}"


def clean(folder: Path) -> None:
    """Deletes what writes that were interrupted have left in a folder; ``.saving-`` is the prefix of other modules."""
    for path in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(".saving-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which has its own name only when everything is written; replaces one that is there."""
    staged = path.with_name(f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex}")
    try:
        staged.mkdir(parents=True)
        yield staged
        for file in staged.rglob("*"):
            _sync(file)
        _sync(staged)
        if path.exists():
            shutil.rmtree(path)
        staged.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it, so that it is complete or as it was."""
    staged = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        write_file(staged, content)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, and waits until it is on the disk."""
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where the system can tell."""
    if os.name == "nt":  # nothing can be opened there to be read and synchronized
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, whose memory no other tensor shares, as safetensors needs it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _numbers(folder: Path) -> list[int]:
    """The images seen of all checkpoints of a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
