"""Arrays as a source of images, and the checks of arrays and labels that other sources share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.core.batches import is_outside
from scorematch.core.records import hash_of_bytes
from scorematch.data.pictures import as_picture, check_range, fit_picture, is_picture
from scorematch.data.sources import Source, Wanted

_MOST_CLASSES = 1_000_000


class Array(Source):
    """Images in memory."""

    def __init__(self, images: Any, labels: Any, wanted: Wanted, name: str) -> None:
        array = to_array(images)
        if array.ndim < 2 or array.size == 0:
            raise ValueError(
                f"{name} must be images (N, C, H, W) or data (N, ...) with at least one sample, got shape "
                f"{array.shape}."
            )
        if array.dtype == np.uint8:
            array = channels_first(array, name)
            self.from_color = wanted.channels == 1 and array.shape[1] == 3
            shape = (wanted.channels or array.shape[1], *(wanted.size or array.shape[2:]))
            if shape != array.shape[1:]:
                array = np.stack(
                    [fit_picture(as_picture(each), shape, wanted.crop) for each in array.transpose(0, 2, 3, 1)]
                )
        elif not np.issubdtype(array.dtype, np.floating):
            raise TypeError(
                f"{name} must be uint8, or floating point in [0, 1], got {array.dtype}. Write x.astype(np.uint8) for "
                "values up to 255, x / 65535 for 16-bit images, or x.astype(np.float32) for data that are not images."
            )
        else:
            check_axes(array.shape, name)
        with np.errstate(over="ignore"):  # of float64, which become infinite and are reported below
            array = np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
        self.name, self.array = name, array
        self.shape = fitting_shape(self.array.shape[1:], wanted, name)
        check_values(self.array, self.shape, name, wanted.value_range)
        self.identity = hash_of_bytes(self.array.data)
        if wanted.labels:
            if labels is None:
                raise ValueError(f"{name} has no labels. Pass a pair (images, labels).")
            self.labels, self.classes = class_numbers(labels, len(array), name)
            self.identity = (self.identity, self.labels.tolist())

    def __len__(self) -> int:
        return len(self.array)

    def pixels(self, i: int) -> np.ndarray:  # noqa: D102
        return self.array[i]


def to_array(values: Any) -> np.ndarray:
    """Values as an array in the byte order of this machine.

    bfloat16, which NumPy does not have, becomes float32. Values of a masked array that are masked become NaN.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.numpy())
    if isinstance(values, np.ma.MaskedArray) and np.issubdtype(values.dtype, np.floating):
        values = values.filled(np.nan)
    array = np.asarray(values)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """Converts images (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W)."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} must be gray or RGB images (N, C, H, W), (N, H, W, C) or (N, H, W), got shape {array.shape}. Pass "
            "data with other numbers of channels as floating point (N, C, H, W): write x / 255."
        )
    return array


def check_axes(shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError if floating-point data have the shape of images (N, H, W, C)."""
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3) and min(shape[1:3]) > shape[3]:
        raise ValueError(
            f"{name} must have floating-point images (N, C, H, W) in [0, 1], got shape {shape}. Write "
            "x.transpose(0, 3, 1, 2), or x.permute(0, 3, 1, 2) for a tensor, or pass uint8 (N, H, W, C)."
        )


def check_values(array: np.ndarray, shape: tuple[int, ...], name: str, value_range: tuple[float, float] | None) -> None:
    """Raises ValueError if floating-point images of a shape are not in the range, or other data are not finite."""
    if array.dtype == np.uint8:
        return
    values = torch.from_numpy(array)
    if is_picture(shape) and value_range == (0, 1):
        try:
            check_range(values)
        except ValueError as error:
            raise ValueError(f"{error} In Python, pass value_range= for data of another range.") from error
        return
    low, high = map(float, values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
    if is_picture(shape) and value_range is not None and is_outside(low, high, value_range):
        raise ValueError(
            f"{name} must have values in [{value_range[0]:g}, {value_range[1]:g}], got values from {low:.3g} to "
            f"{high:.3g}. Pass another value_range=."
        )


def fitting_shape(shape: tuple[int, ...], wanted: Wanted, name: str) -> tuple[int, ...]:
    """Returns the shape of floating-point data, which are not resized, if it is the wanted one."""
    if wanted.size is None and wanted.channels is None:
        return shape
    if wanted.size is not None and len(shape) != 3:
        hint = " Write x[:, None] for gray images (N, H, W)." if len(shape) == 2 else ""
        raise ValueError(f"{name} must have images (C, H, W), got samples of shape {shape}.{hint}")
    expected = (wanted.channels or shape[0], *(wanted.size or shape[1:]))
    if shape != expected:
        raise ValueError(f"{name} must have images of shape {expected}, got {shape}. Resize them, or use uint8.")
    return shape


def class_numbers(labels: Any, n: int, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts n labels to integers from 0, int64 (n,), and returns them and the names of the classes."""
    array = to_array(labels)
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        hint = (
            " Write labels.argmax(1) for one-hot labels, and .float() for vectors."
            if array.ndim == 2 and len(array) == n
            else ""
        )
        raise ValueError(f"the labels of {name} must be one per image, ({n},), got shape {array.shape}.{hint}")
    if array.dtype.kind in "SO" and all(isinstance(each, str | bytes) for each in array):  # as h5py reads strings
        texts = [each.decode(errors="backslashreplace") if isinstance(each, bytes) else each for each in array]
        array = np.array(texts, str)
    if array.dtype.kind == "U":
        names, numbers = np.unique(array, return_inverse=True)
        return numbers.astype(np.int64), tuple(map(str, names))
    if array.dtype.kind not in "iub":
        raise ValueError(f"the labels of {name} must be integers from 0, or strings, got {array.dtype}. Convert them.")
    if array.min() < 0:
        raise ValueError(f"the labels of {name} must be integers from 0, got {array.min()}. Number the classes from 0.")
    if array.max() >= _MOST_CLASSES:
        raise ValueError(
            f"the labels of {name} must be below {_MOST_CLASSES:,}, got {array.max():,}. Number the classes from 0."
        )
    return array.astype(np.int64), tuple(map(str, range(int(array.max()) + 1)))
