"""The sources of training data, with one interface: folders, arrays, Datasets and data sets of Hugging Face.

In this module a picture is a ``PIL.Image.Image``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scorematch.arrays import array_names, read_arrays
from scorematch.bulk.stored import IMAGES, stored_samples, stored_settings
from scorematch.images import ENDINGS, UNREAD, check_range, gray_or_rgb, is_picture, open_picture, to_uint8, why_none
from scorematch.noise import is_outside
from scorematch.schema import few, plain, reason

Crop = Literal["center", "celeba"] | None
_A = TypeVar("_A")
_T = TypeVar("_T")

# Short names of data sets on the Hugging Face Hub, each with its split.
REFERENCES: Mapping[str, tuple[str, str]] = {
    "mnist-train": ("ylecun/mnist", "train"),
    "mnist-test": ("ylecun/mnist", "test"),
    "fashion-mnist-train": ("zalando-datasets/fashion_mnist", "train"),
    "fashion-mnist-test": ("zalando-datasets/fashion_mnist", "test"),
    "cifar10-train": ("uoft-cs/cifar10", "train"),
    "cifar10-test": ("uoft-cs/cifar10", "test"),
}
CELEBA_SIDE = 140  # pixels; the aligned images have 178 x 218 (Song & Ermon, arXiv:1907.05600, App. B.1)
_CLASSES = 1_000_000  # the largest number of classes
_IMAGE_KEYS = ("image", "images", "img", "x", "x_train", "arr_0")
_LABEL_KEYS = ("label", "labels", "fine_label", "y", "y_train", "arr_1")
_HINTS = {".npy": ' Write np.savez("data.npz", array).'}  # what to write instead of files of other kinds
_HINTS |= dict.fromkeys((".zip", ".tar", ".gz", ".tgz"), " Unpack it.")


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


class UnfitError(ValueError):
    """An image that is not damaged but does not fit the arguments of ``open_images``."""


def _fit(picture: Any, shape: tuple[int, ...], crop: Crop) -> np.ndarray:
    """Crops and resizes a picture; returns its pixels (C, H, W), uint8."""
    from PIL.Image import Resampling

    channels, height, width = shape
    image = gray_or_rgb(picture, channels)
    wide, tall = image.size
    if crop == "celeba":
        if min(wide, tall) < CELEBA_SIDE:
            raise UnfitError(
                f'crop="celeba" needs images of at least {CELEBA_SIDE} x {CELEBA_SIDE} pixels, got {tall} x {wide}. '
                'Write crop="center" for images that are already cropped.'
            )
        inner = (CELEBA_SIDE, CELEBA_SIDE)
    elif crop == "center":
        scale = min(wide / width, tall / height)
        inner = (min(wide, max(1, round(scale * width))), min(tall, max(1, round(scale * height))))
    else:
        inner = (wide, tall)
    left, top = (wide - inner[0]) // 2, (tall - inner[1]) // 2
    image = image.crop((left, top, left + inner[0], top + inner[1]))
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _channels_and_size(picture: Any) -> tuple[int, tuple[int, int]]:
    """The number of channels, 1 or 3, and the (height, width) of a picture, from its header."""
    gray = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith(("I", "F"))
    on_its_side = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap height and width
    size = picture.size
    if on_its_side and picture.format == "TIFF":  # newer versions of Pillow have swapped them already
        size = picture.tag_v2[256], picture.tag_v2[257]
    return 1 if gray else 3, size if on_its_side else size[::-1]


def _picture_of(image: Any) -> Any:
    """Converts an array (H, W), (H, W, C) or (C, H, W), uint8, to a picture; a picture is returned unchanged."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UnfitError(f"an image must be a picture of Pillow or a uint8 array, got {array.dtype}.")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # a tensor of a data set in the format "torch"
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array)


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
                array = np.stack([_fit(_picture_of(each), shape, options.crop) for each in array.transpose(0, 2, 3, 1)])
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


class _Pictures(Source):
    """A source of pictures, which may have any size and mode."""

    crop: Crop

    @abstractmethod
    def open(self, i: int) -> Any:
        """Opens picture i; its pixels may be read later."""

    def pixels(self, i: int) -> np.ndarray:
        with self.open(i) as picture:
            return _fit(picture, self.shape, self.crop)

    def set_shape(self, options: Options, workers: int) -> None:
        """Sets the crop and the shape; what the options do not give is taken from the pictures."""
        self.crop = options.crop
        channels, size = options.channels, options.size
        if channels == 1:
            with suppress(Exception), self.open(0) as picture:  # a damaged image is reported when it is decoded
                self.from_color = _channels_and_size(picture)[0] == 3
        if channels is None or size is None:
            kinds, sizes = self._all_channels_and_sizes(workers)
            channels = self._common_channels(kinds) if channels is None else channels
            if size is None:
                size = self._common_size(sizes)
                size = size if options.crop is None else (min(size), min(size))
        self.shape = (channels, *size)

    def _all_channels_and_sizes(self, workers: int) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
        """All numbers of channels and all sizes in the source, each with the index of the first picture that has it."""

        def header(i: int) -> tuple[int, tuple[int, int]] | Exception:
            try:
                with self.open(i) as picture:
                    return _channels_and_size(picture)
            except (UnfitError, ImportError):
                raise
            except Exception as error:  # a damaged image, which is reported when it is decoded
                return error

        kinds: dict[int, int] = {}
        sizes: dict[tuple[int, int], int] = {}
        for i, seen in enumerate(ordered_map(header, range(len(self)), workers)):
            if not isinstance(seen, Exception):
                kinds.setdefault(seen[0], i)
                sizes.setdefault(seen[1], i)
        if not sizes and isinstance(seen, Exception):
            raise OSError(f"none of the {len(self)} images of {self.name} can be read: {reason(seen)}.") from seen
        return kinds, sizes

    def _common_channels(self, kinds: dict[int, int]) -> int:
        if len(kinds) > 1:
            raise ValueError(
                f"{self.name} mixes gray and color images: {self.name_of(kinds[1])} is gray, and "
                f"{self.name_of(kinds[3])} is in color. Convert the pictures, or in "
                "Python pass channels=3 or channels=1 to open_images."
            )
        return next(iter(kinds))

    def _common_size(self, sizes: dict[tuple[int, int], int]) -> tuple[int, int]:
        if len(sizes) > 1:
            (one, i), (other, k) = itertools.islice(sizes.items(), 2)
            raise ValueError(
                f"{self.name} has images of different sizes: {self.name_of(i)} has {one[0]} x {one[1]} pixels, and "
                f"{self.name_of(k)} has {other[0]} x {other[1]}. Resize the pictures, or in Python "
                "pass image_size= to open_images."
            )
        return next(iter(sizes))


class _Folder(_Pictures):
    """The image files of a folder and its subfolders."""

    def __init__(self, folder: Path, options: Options, workers: int) -> None:
        files = _walk(folder)
        self.name, self.folder = str(folder), folder
        self.paths = [path for path in files if path.suffix.lower() in ENDINGS]
        unread = [path for path in files if path.suffix.lower() in UNREAD]
        self.unread = [str(folder / path) for path in unread]
        if not self.paths:
            raise FileNotFoundError(f"{folder} and its subfolders contain no image files{why_none(unread)}")
        if options.labels:
            names = [path.parts[0] for path in self.paths]
            loose = next((path for path in self.paths if len(path.parts) == 1), None)
            if loose is not None:
                raise ValueError(
                    f"labels=True needs all images in subfolders, whose names are the classes, got {folder / loose}. "
                    "Move it into a subfolder, or leave out labels=True."
                )
            self.labels, self.classes = _classes(names, len(names), self.name)
        states = [(folder / path).stat() for path in self.paths]
        self.identity = [[path.as_posix(), state.st_size] for path, state in zip(self.paths, states, strict=True)]
        self._times = [state.st_mtime_ns for state in states]
        self.set_shape(options, workers)

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, i: int) -> str:
        return str(self.folder / self.paths[i])

    def state(self) -> object:
        return self._times

    def open(self, i: int) -> Any:
        return open_picture(self.folder / self.paths[i])


def _walk(folder: Path) -> list[Path]:
    """The paths of the pictures in a folder and its subfolders, sorted and relative to the folder.

    Symbolic links are followed, but no folder is visited twice.

    Raises:
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise OSError(
            error.errno, f"{error.strerror}; make this folder readable, or move it out of {folder}", error.filename
        ) from error

    found, entered = [], set()
    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = Path(where).stat()
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in files if not name.startswith("."))
        pictures = (path for path in paths if path.suffix.lower() in (*ENDINGS, *UNREAD) and path.is_file())
        found += [path.relative_to(folder) for path in pictures]
    return sorted(found)


class _Table(_Pictures):
    """A data set of Hugging Face's ``datasets``: rows with named columns."""

    def __init__(self, table: Any, options: Options, workers: int) -> None:
        self.name, self.table = "the data set", table
        if not hasattr(table, "__len__"):
            raise TypeError("the data set must have a length, got a streamed one. Load it without streaming=True.")
        if len(table) == 0:
            raise ValueError("the data set is empty.")
        features = getattr(table, "features", None) or {}
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        columns = list(table.column_names)
        self.key = _choose(options.image_key, columns, "image", _IMAGE_KEYS, kinds, "Image")
        self.identity = ["table", len(table), self.key]
        if options.labels:
            key = _choose(options.label_key, columns, "label", _LABEL_KEYS, kinds, "ClassLabel")
            self.labels, self.classes = _classes(list(table[key]), len(table), self.name)
            names = getattr(features.get(key), "names", None)
            self.classes = tuple(map(str, names)) if names else self.classes
        self.set_shape(options, workers)

    def __len__(self) -> int:
        return len(self.table)

    def state(self) -> object:
        return [str(getattr(self.table, "_fingerprint", "")), super().state()]

    def open(self, i: int) -> Any:
        return _picture_of(self.table[i][self.key])


def _choose(
    key: str | None, keys: Sequence[str], what: str, common: Sequence[str], kinds: Mapping[str, str], kind: str
) -> str:
    """The key of the images or of the labels: the given key, or the first of the given kind or with a common name."""
    found = [key] if key is not None else [each for each in keys if kinds.get(each) == kind]
    found = found or [each for each in common if each in keys]
    if not found and what == "image" and len(keys) == 1:
        found = list(keys)
    if not found or found[0] not in keys:
        given = "" if key is None else f" named {key!r}"
        names = few((repr(plain(name)) for name in keys), 10)
        without = ", or leave out labels=True" if what == "label" else ""
        raise ValueError(f"the data have no {what}s{given}; the names are {names}. Pass {what}_key={without}.")
    return found[0]


def _keys(names: Sequence[str], options: Options) -> list[str]:
    """The names in a mapping or an .npz file of the images, and of the labels if the options ask for them."""
    if not names:
        raise ValueError("the mapping or .npz file of the data is empty. It must have an array of images.")
    images = _choose(options.image_key, names, "image", _IMAGE_KEYS, {}, "")
    return [images, *([_choose(options.label_key, names, "label", _LABEL_KEYS, {}, "")] if options.labels else [])]


class _Items(Source):
    """A ``torch`` Dataset, whose items are images or tuples (image, label). Its transforms may be random."""

    constant = False

    def __init__(self, dataset: Any, options: Options, workers: int) -> None:
        self.name, self.dataset, self.crop = f"the {type(dataset).__name__}", dataset, options.crop
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"{self.name} must have a length, so that it can be shuffled. Pass a Dataset with __len__.")
        if len(dataset) == 0:
            raise ValueError(f"{self.name} is empty.")
        first = self._image(0)
        if hasattr(first, "getexif"):
            channels, size = _channels_and_size(first)
            self.from_color = options.channels == 1 and channels == 3
            square = size if options.crop is None else (min(size), min(size))
            self.shape = (options.channels or channels, *(options.size or square))
        else:
            values = _values(first)
            self.shape = _checked(values.shape, options, self.name)
            try:
                _check_values(values, self.shape, "it", options.value_range)
            except ValueError as error:
                raise ValueError(f"{self.name_of(0)}: {error}") from error
        self._keeps_color = options.channels is None and self.shape[0] == 1
        self.identity = [type(dataset).__name__, len(dataset)]
        if options.labels:
            # The labels and classes of torchvision's data sets, which are those before the transform of their items.
            known = dataset if getattr(dataset, "target_transform", None) is None else None
            labels, names = getattr(known, "targets", None), getattr(known, "classes", None)
            labels = list(ordered_map(self._label, range(len(dataset)), workers)) if labels is None else labels
            self.labels, self.classes = _classes(labels, len(dataset), self.name)
            self.classes = self.classes if names is None else tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.dataset)

    def pixels(self, i: int) -> np.ndarray:
        image = self._image(i)
        if hasattr(image, "getexif"):
            if self._keeps_color and _channels_and_size(image)[0] == 3:
                raise UnfitError(
                    f"{self.name} mixes gray and color images: item 0 is gray, and item {i} is in color. Pass "
                    "channels=3 or channels=1 to open_images."
                )
            return _fit(image, self.shape, self.crop)
        values = _values(image)
        if values.shape != self.shape:
            raise UnfitError(
                f"all items of {self.name} must have the same shape, but item {i} has {values.shape} and item 0 has "
                f"{self.shape}."
            )
        return values

    def _image(self, i: int) -> Any:
        item = self.dataset[i]
        return item[0] if isinstance(item, tuple | list) else item

    def _label(self, i: int) -> Any:
        item = self.dataset[i]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise ValueError(f"items of {self.name} must be (image, label), but item {i} has no label.")
        return item[1]


def _values(image: Any) -> np.ndarray:
    """Converts an item of a Dataset, a tensor or an array, to an array (C, H, W), uint8 or float32."""
    array = _numpy(image)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(_channels_first(array[None], "an item of the Dataset")[0])
    if not np.issubdtype(array.dtype, np.floating):
        got = array.dtype if array.dtype.kind in "biu" else type(image).__name__
        raise TypeError(
            "an item of the Dataset must be an image or a tuple (image, label), where an image is a picture of Pillow "
            f"or an array, uint8 or floating point in [0, 1], got {got}."
        )
    _check_axes((1, *array.shape), "the Dataset")
    return np.ascontiguousarray(array, np.float32)


# -- Which source it is -----------------------------------------------------------------------------------------------


def find(source: Any, options: Options, workers: int) -> Source:
    """Creates the source for the argument of ``open_images``."""
    if isinstance(source, str | os.PathLike):
        path, source = source, _of_path(source, options)
        if isinstance(source, Path):
            return _Folder(source, options, workers)
        if isinstance(source, dict):
            try:
                return find(source, options, workers)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error
    if isinstance(source, Tensor | np.ndarray):
        return Array(source, None, options, "the array")
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor | np.ndarray):
        return Array(*source, options, "the array")
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):  # the splits of a data set
            if "train" not in source:
                raise ValueError(
                    f'the data set has no split "train"; the splits are {", ".join(map(repr, source))}. Pass one of '
                    "them."
                )
            return _Table(source["train"], options, workers)
        key, *rest = _keys(list(source), options)
        return Array(source[key], source[rest[0]] if rest else None, options, f"the array {key!r}")
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        return _Table(source, options, workers)
    if hasattr(source, "__getitem__"):
        return _Items(source, options, workers)
    hint = " Pass its data set, loader.dataset." if isinstance(source, DataLoader) else ""
    raise TypeError(
        f"data must be a folder, an .npz file, a tensor or an array, a Dataset, or a data set of Hugging Face, got "
        f"{type(source).__name__}.{hint}"
    )


def _of_path(source: str | os.PathLike[str], options: Options) -> Any:
    """The path of a folder, the images and labels of an .npz file, or the data set with this name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _samples_in(path)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            hint = _HINTS.get(path.suffix.lower(), "")
            raise ValueError(f"data must be a folder of images or an .npz file, got the file {path}.{hint}")
        return _archive(path, options)
    check_path(source)
    from datasets import load_dataset

    name, split = REFERENCES.get(str(source), (source, "train"))
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is not a file or a folder, and the data set {name} cannot be loaded from the Hub: {error}"
        ) from error


def check_path(source: str | os.PathLike[str]) -> None:
    """Checks, without a request, that a path exists or may be the name of a data set on the Hub.

    Raises:
        FileNotFoundError: if it does not exist and is not the name of a data set.
        ImportError: if it may be the name of a data set, and the package datasets is not installed.
    """
    path = Path(source).expanduser()
    if path.exists():
        return
    file = path.suffix.lower() in (".npz", *ENDINGS)
    if file or not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{source} is neither a file nor a folder, and loading a data set from the Hub needs the package datasets: "
            "pip install datasets."
        ) from error


def _archive(path: Path, options: Options) -> dict[str, np.ndarray]:
    """The images of an .npz file, and the labels if the options ask for them; other arrays may have any type."""
    names = array_names(path)
    try:
        wanted = _keys(names, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return read_arrays(path, wanted)


def _samples_in(folder: Path) -> Any:
    """The samples in a folder that ``sample_to`` wrote, without the sheet beside them; any other folder unchanged."""
    try:
        stored = stored_settings(folder)
    except (OSError, ValueError):  # no samples.json, or one of another program
        return folder
    if stored["settings"]["format"] == "png":
        return folder / IMAGES
    return {"images": to_uint8(torch.cat([batch.images for batch in stored_samples(folder, share=(0, 1))]))}


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
