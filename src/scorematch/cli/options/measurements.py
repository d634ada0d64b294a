"""Measurements of many samples on the disk: damaged pictures with masks, or arrays with gaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scorematch.core.messages import reason
from scorematch.data.array_data import FILES, gaps_of, with_nan
from scorematch.data.folders import walk
from scorematch.data.memory import to_array
from scorematch.data.pictures import channels_and_size, open_picture, read_image, read_mask
from scorematch.restoration import Observation


def read_measurements(data: Path, masks: Path | None, sigma: float, channels: int | None) -> Observation:
    """Reads an observation of many samples, each with gaps of its own.

    Args:
        data: a folder of pictures of the same size; or a file ``.npz``, HDF5 or zarr with y (N, ...) and, if there is
            one, ``mask``; or with y alone, such as ``.npy``. NaN in y is a gap.
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
    if data.is_dir() and data.suffix.lower() not in FILES:
        y, mask = _pictures(data, masks, channels)
    else:
        if masks is not None:
            raise ValueError(
                f"--observed-where is for a folder of pictures, got {data}. Write an .npz file with y and mask."
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
    opener = FILES.get(data.suffix.lower())
    if opener is None:
        raise ValueError(f"{data} must be a folder of pictures, or a file of arrays: {', '.join(FILES)}.")
    opened = opener(data)
    found = opened if isinstance(opened, Mapping) else {"y": opened}
    y, mask = (to_array(found[name][...]) if name in list(found) else None for name in ("y", "mask"))
    if y is None or not np.issubdtype(y.dtype, np.floating) or y.ndim < 2:
        kind = f"{y.dtype} of shape {y.shape}" if y is not None else f"the arrays {', '.join(sorted(found))}"
        raise ValueError(f"{data} must have measurements y (N, ...), floating point, got {kind}.")
    if mask is not None and mask.dtype != np.bool_:
        raise ValueError(f"mask of {data} must be of type bool, True where y is measured, got {mask.dtype}.")
    y = with_nan(np.array(y, np.float32), gaps_of(found["y"]))
    return torch.from_numpy(y), None if mask is None else torch.from_numpy(np.array(mask))
