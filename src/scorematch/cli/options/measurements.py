"""Measurements of many samples on the disk: damaged pictures with masks, or arrays with gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scorematch.core.messages import reason
from scorematch.data.arrays import read_arrays
from scorematch.data.folders import walk
from scorematch.data.pictures import channels_and_size, open_picture, read_image, read_mask
from scorematch.restoration import Observation


def read_measurements(data: Path, masks: Path | None, sigma: float, channels: int | None) -> Observation:
    """Reads an observation of many samples, each with gaps of its own.

    Args:
        data: a folder of pictures of the same size; or a file ``.npz`` with y (N, ...) and, if there is one, ``mask``;
            or ``.npy`` with y. NaN in y is a gap.
        masks: a folder with a mask for each picture, under the same name without its ending, which is white where the
            picture is observed; None for an array.
        sigma: the standard deviation of the noise.
        channels: 1 for gray, 3 for RGB pictures; None is that of the first picture.

    Raises:
        FileNotFoundError: if a file or folder does not exist, or a picture has no mask.
        ValueError: if sizes differ, an array has another type, or options do not fit together.
    """
    if not data.exists():
        raise FileNotFoundError(f"there is no file or folder {data}.")
    if data.is_dir():
        y, mask = _pictures(data, masks, channels)
    else:
        if masks is not None:
            raise ValueError(
                f"--observed-where is for a folder of pictures. Write the mask of {data} into it, as mask."
            )
        y, mask = _arrays(data)
    try:
        return Observation.with_gaps(y, sigma, mask)
    except ValueError as error:
        raise ValueError(f"{data}: {reason(error)}.") from error


def _pictures(data: Path, masks: Path | None, channels: int | None) -> tuple[Tensor, Tensor | None]:
    if masks is None:
        raise ValueError("a folder of pictures needs its masks: add --observed-where MASKS.")
    names = walk(data)
    if not names:
        raise FileNotFoundError(f"{data} and its subfolders contain no image files.")
    found = {path.with_suffix(""): masks / path for path in walk(masks)} if masks.is_dir() else {}
    missing = next((name for name in names if name.with_suffix("") not in found), None)
    if missing is not None:
        raise FileNotFoundError(f"{data / missing} has no mask {masks / missing.with_suffix('.png')}.")
    if channels is None:
        with open_picture(data / names[0]) as first:
            channels, _ = channels_and_size(first)
    pictures: list[Tensor] = []
    seen: list[Tensor] = []
    for name in names:
        picture, mask = read_image(data / name, channels), read_mask(found[name.with_suffix("")])
        if picture.shape != (pictures or [picture])[0].shape:
            raise ValueError(f"{data / name} has another size than {data / names[0]}. Write them to separate folders.")
        if mask.shape != picture.shape[1:]:
            raise ValueError(
                f"the mask {found[name.with_suffix('')]} must have {picture.shape[1]} x {picture.shape[2]} pixels, as "
                f"its picture has, got {mask.shape[0]} x {mask.shape[1]}."
            )
        pictures.append(picture)
        seen.append(mask[None])
    return torch.stack(pictures), torch.stack(seen)


def _arrays(data: Path) -> tuple[Tensor, Tensor | None]:
    try:
        found = read_arrays(data) if data.suffix == ".npz" else {"y": np.load(data, allow_pickle=False)}
    except (ValueError, EOFError) as error:
        raise ValueError(f"{data} must be a folder of pictures, or an .npz or .npy file: {reason(error)}.") from error
    y, mask = found.get("y"), found.get("mask")
    if y is None or not np.issubdtype(y.dtype, np.floating) or y.ndim < 2:
        kind = f"{y.dtype} of shape {y.shape}" if y is not None else f"the arrays {', '.join(sorted(found))}"
        raise ValueError(f"{data} must have measurements y (N, ...), floating point, got {kind}.")
    if mask is not None and mask.dtype != np.bool_:
        raise ValueError(f"mask of {data} must be of type bool, True where y is measured, got {mask.dtype}.")
    return torch.from_numpy(np.asarray(y, np.float32)), None if mask is None else torch.from_numpy(mask)
