"""Reading a folder of samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from scorematch.bulk.batches import Batch, Share, checked_share, ranges
from scorematch.bulk.formats import FORMATS, Format
from scorematch.schema import Field, check, check_count, read_object

METADATA_FILE, LABELS_FILE, IMAGES = "samples.json", "labels.csv", "images"
_METADATA: Mapping[str, Field] = {
    "format_version": Field(int, required=True, choices=(1,)),
    "n": Field(int, required=True, low=1, high=2**48),
    "settings": Field(dict, required=True),
    "versions": Field(dict, required=True),
    "about": Field(dict, required=True),
}
_SETTINGS: Mapping[str, Field] = {
    "batch_size": Field(int, required=True, low=1, high=2**31),
    "format": Field(str, required=True, choices=get_args(Format)),
    "shape": Field(list, required=True, low=3, high=3, each=Field(int, low=1, high=65_536)),
}


def read_samples(folder: str | os.PathLike[str], n: int) -> Tensor:
    """Reads the first n images of a folder that ``sample_to`` wrote.

    Args:
        folder: the folder, with samples.json.
        n: the number of images, at least 1.

    Returns:
        The images (n, C, H, W), float32 in [0, 1].

    Raises:
        OSError, TypeError, ValueError: as ``stored_samples``.
    """
    return torch.cat([batch.images for batch in stored_samples(folder, n, share=(0, 1))])


def stored_samples(
    folder: str | os.PathLike[str], n: int | None = None, *, share: Share | None = None
) -> Iterator[Batch]:
    """Reads the images of a folder that ``sample_to`` wrote, batch by batch, as ``bulk_samples`` yields them.

    Args:
        folder: the folder, with samples.json.
        n: the number of images, at least 1; None is all of them.
        share: (k, m), the share k of m equal shares; None is the share of this process, see ``this_process``.

    Yields:
        ``Batch(indices, images, None)``, with the images float32 in [0, 1] on the CPU.

    Raises:
        OSError: if there is no samples.json, or an image is missing.
        TypeError: if n is not an integer.
        ValueError: if samples.json is not valid, n is below 1, or the folder has fewer than n images.
    """
    stored = stored_settings(folder)
    n = stored["n"] if n is None else check_count("n", n)
    if n > stored["n"]:
        raise ValueError(f"{folder} has {stored['n']} samples, fewer than n={n}.")
    settings = stored["settings"]
    files, channels = FORMATS[settings["format"]](Path(folder, IMAGES).expanduser()), settings["shape"][0]
    batches = list(ranges(n, settings["batch_size"], checked_share(share)))
    if not all(map(files.exist, batches)):
        found = sum(map(files.count, ranges(n, settings["batch_size"], (0, 1))))
        raise FileNotFoundError(
            f"{folder} is not complete: {found} of the first {n} images exist. Repeat the command that draws them, or "
            "pass a smaller n."
        )
    return (Batch(indices, files.read(indices, channels), None) for indices in batches)


def stored_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads samples.json of a folder that ``sample_to`` wrote: the keys "n", "settings", "versions" and "about".

    Raises:
        OSError: if there is no samples.json.
        ValueError: if it is not valid.
    """
    stored = read_metadata(Path(folder).expanduser())
    if stored is None:
        raise FileNotFoundError(f"{folder} has no {METADATA_FILE}. Pass a folder that sample_to wrote.")
    return stored


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The checked content of samples.json, or None if there is no such file.

    Raises:
        ValueError: if it is not valid.
    """
    path = folder / METADATA_FILE
    try:
        content = read_object(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error} Pass another folder.") from error
    check(content, _METADATA, str(path))
    settings = content["settings"]
    check(settings, _SETTINGS, f"{path}: settings")
    if settings["format"] == "png" and settings["shape"][0] not in (1, 3):
        raise ValueError(f"{path}: settings: shape must have 1 or 3 channels in png files, got {settings['shape'][0]}.")
    return content
