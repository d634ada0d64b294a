"""The files and folders that a command writes: checks before the work begins."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from scorematch.core.files import check_writable
from scorematch.data.pictures import ENDINGS
from scorematch.pretrained.configuration import CONFIG_FILE


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--overwrite``, which ``check_new`` and ``check_new_network`` take; ``what`` says what it replaces."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def check_new(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises if one of the files cannot be written, or exists, unless it is to be overwritten."""
    for path in paths:
        check_writable(path.absolute().parent)
        if overwrite and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder and cannot be replaced by a file. Choose another name.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already. Choose another name, or add --overwrite to replace it.")


def check_new_network(folder: Path, overwrite: bool) -> None:
    """Raises if a folder has a network, unless it is to be overwritten."""
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} has a network already. Choose another folder, or add --overwrite to replace the network."
        )


def check_folder_name(folder: Path) -> None:
    """Raises if the name of a folder to write is that of a picture, or the folder cannot be written."""
    if folder.suffix.lower() in ENDINGS:
        raise ValueError(
            f"the output must be a folder, got the name of a picture, {folder}. Write {folder.with_suffix('')}."
        )
    check_writable(folder.absolute())
