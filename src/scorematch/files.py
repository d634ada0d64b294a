"""Atomic writes of files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

# The prefix of the names of temporary files, which an interruption may leave behind.
UNFINISHED = ".saving-"


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file atomically: under a temporary name in the same folder, which is then renamed to ``path``.

    Args:
        path: the path of the file.
        content: its content.
        durable: whether the content is on the disk before the file is renamed, so that it survives a power failure.

    Raises:
        OSError: if the file cannot be written; a file at ``path`` is then unchanged.
    """
    staged = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        staged.write_bytes(content)
        if durable:
            synchronize(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Writes a file, or the entries of a folder, from the cache to the disk (fsync); does nothing on Windows."""
    if os.name == "nt":  # fsync needs a file opened for writing there, and folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
