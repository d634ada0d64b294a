"""The sources of training data, with one interface: folders, arrays, Datasets and data sets of Hugging Face.

In this module a picture is a ``PIL.Image.Image``.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from scorematch.core.batches import is_outside
from scorematch.data.pictures import (
    Crop,
    as_picture,
    check_range,
    fit_picture,
    is_picture,
)

_A = TypeVar("_A")
_T = TypeVar("_T")
_CLASSES = 1_000_000  # the largest number of classes


# -- From a picture to pixels -----------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The arguments of ``open_images`` that determine the images and labels."""

    size: tuple[int, int] | None
    channels: int | None
    crop: Crop
    labels: bool
    image_key: str | None
    label_key: str | None
    value_range: tuple[float, float] | None


# -- The sources ------------------------------------------------------------------------------------------------------


class Source(ABC):
    """The interface of all sources of images.

    Attributes:
        name: the name of the source in messages.
        shape: the shape of one image.
        identity: a JSON value that identifies the source, for the fingerprint.
        labels: the labels, int64 (N,), or None.
        classes: the names of the classes, or None.
        unread: the names of pictures that are left out, since their format cannot be read.
        from_color: whether the images are gray and the first picture is in color.
        constant: whether an image has the same pixels each time it is read, so that it can be decoded once and kept.
    """

    name: str
    shape: tuple[int, ...]
    identity: object
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    unread: Sequence[str] = ()
    from_color = False
    constant = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, i: int) -> np.ndarray:
        """The pixels of image i. Any exception other than ``UnfitError`` means that the image is damaged."""

    def name_of(self, i: int) -> str:
        """The name of image i in messages."""
        return f"item {i} of {self.name}"

    def state(self) -> object:
        """A JSON value that changes if images change, even if ``identity`` does not: hashes of up to 16 images."""
        digests = []
        for i in sorted({round(k * (len(self) - 1) / 15) for k in range(16)}):
            try:
                digests.append(hashlib.blake2b(self.pixels(i).tobytes(), digest_size=16).hexdigest())
            except Exception:  # a damaged picture
                digests.append("damaged")
        return digests


class Array(Source):
    """Images in memory."""

    def __init__(self, images: Any, labels: Any, options: Options, name: str) -> None:
        array = _numpy(images)
        if array.ndim < 2 or array.size == 0:
            raise ValueError(
                f"{name} must be images (N, C, H, W) or data (N, ...) with at least one sample, got shape "
                f"{array.shape}."
            )
        if array.dtype == np.uint8:
            array = _channels_first(array, name)
            self.from_color = options.channels == 1 and array.shape[1] == 3
            shape = (options.channels or array.shape[1], *(options.size or array.shape[2:]))
            if shape != array.shape[1:]:
                array = np.stack(
                    [fit_picture(as_picture(each), shape, options.crop) for each in array.transpose(0, 2, 3, 1)]
                )
        elif not np.issubdtype(array.dtype, np.floating):
            raise TypeError(
                f"{name} must be uint8, or floating point in [0, 1], got {array.dtype}. Write x.astype(np.uint8) for "
                "values up to 255, or x / 65535 for 16-bit images."
            )
        else:
            _check_axes(array.shape, name)
        with np.errstate(over="ignore"):  # of float64, which become infinite and are reported below
            array = np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
        self.name, self.array = name, array
        self.shape = _checked(self.array.shape[1:], options, name)
        _check_values(self.array, self.shape, name, options.value_range)
        self.identity = hashlib.blake2b(self.array.data, digest_size=16).hexdigest()
        if options.labels:
            if labels is None:
                raise ValueError(f"{name} has no labels. Pass a pair (images, labels).")
            self.labels, self.classes = _classes(labels, len(array), name)
            self.identity = (self.identity, self.labels.tolist())

    def __len__(self) -> int:
        return len(self.array)

    def pixels(self, i: int) -> np.ndarray:  # noqa: D102
        return self.array[i]


def _numpy(values: Any) -> np.ndarray:
    """Values as an array; bfloat16, which NumPy does not have, becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
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


def _check_axes(shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError if floating-point data have the shape of images (N, H, W, C)."""
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3) and min(shape[1:3]) > shape[3]:
        raise ValueError(
            f"{name} must have floating-point images (N, C, H, W) in [0, 1], got shape {shape}. Write "
            "x.transpose(0, 3, 1, 2), or x.permute(0, 3, 1, 2) for a tensor, or pass uint8 (N, H, W, C)."
        )


def _check_values(
    array: np.ndarray, shape: tuple[int, ...], name: str, value_range: tuple[float, float] | None
) -> None:
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


def _checked(shape: tuple[int, ...], options: Options, name: str) -> tuple[int, ...]:
    """Returns the shape of floating-point data, which are not resized, if it fits the options."""
    if options.size is None and options.channels is None:
        return shape
    if options.size is not None and len(shape) != 3:
        hint = " Write x[:, None] for gray images (N, H, W)." if len(shape) == 2 else ""
        raise ValueError(f"{name} must have images (C, H, W), got samples of shape {shape}.{hint}")
    wanted = (options.channels or shape[0], *(options.size or shape[1:]))
    if shape != wanted:
        raise ValueError(f"{name} must have images of shape {wanted}, got {shape}. Resize them, or use uint8.")
    return shape


def _classes(labels: Any, n: int, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts n labels to integers from 0, int64 (n,), and returns them and the names of the classes."""
    array = _numpy(labels)
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        hint = " Write labels.argmax(1) for one-hot labels." if array.ndim == 2 and len(array) == n else ""
        raise ValueError(f"the labels of {name} must be one per image, ({n},), got shape {array.shape}.{hint}")
    if array.dtype.kind in "US":
        names, numbers = np.unique(array, return_inverse=True)
        return numbers.astype(np.int64), tuple(map(str, names))
    if array.dtype.kind not in "iub":
        raise ValueError(f"the labels of {name} must be integers from 0, or strings, got {array.dtype}. Convert them.")
    if array.min() < 0:
        raise ValueError(f"the labels of {name} must be integers from 0, got {array.min()}. Number the classes from 0.")
    if array.max() >= _CLASSES:
        raise ValueError(
            f"the labels of {name} must be below {_CLASSES:,}, got {array.max():,}. Number the classes from 0."
        )
    return array.astype(np.int64), tuple(map(str, range(int(array.max()) + 1)))


# -- Threads ----------------------------------------------------------------------------------------------------------


def ordered_map(
    function: Callable[[_A], _T], arguments: Iterable[_A], workers: int, *, ahead: int | None = None
) -> Generator[_T, None, None]:
    """Like ``map``, but the function is called in threads, a limited number of results ahead.

    Args:
        function: the function to call.
        arguments: its arguments, read as they are needed.
        workers: the number of threads.
        ahead: the largest number of results that are computed in advance; None is 16 per thread.

    Yields:
        The results, in the order of the arguments.
    """
    ahead = 16 * workers if ahead is None else ahead
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="scorematch") as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
