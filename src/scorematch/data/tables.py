"""Data sets as sources of images: those of ``torch``, and those of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scorematch.core.arguments import argument
from scorematch.core.messages import few, plain
from scorematch.core.threads import ordered_map
from scorematch.data.folders import Pictures
from scorematch.data.memory import channels_first, check_axes, check_values, class_numbers, fitting_shape, to_array
from scorematch.data.pictures import UnfitError, as_picture, channels_and_size, fit_picture, is_deep
from scorematch.data.sources import Source, Wanted

# Short names of data sets on the Hugging Face Hub, each with its split.
REFERENCES: Mapping[str, tuple[str, str]] = {
    "mnist-train": ("ylecun/mnist", "train"),
    "mnist-test": ("ylecun/mnist", "test"),
    "fashion-mnist-train": ("zalando-datasets/fashion_mnist", "train"),
    "fashion-mnist-test": ("zalando-datasets/fashion_mnist", "test"),
    "cifar10-train": ("uoft-cs/cifar10", "train"),
    "cifar10-test": ("uoft-cs/cifar10", "test"),
}
_IMAGE_KEYS = ("image", "images", "img", "x", "x_train", "arr_0")
_LABEL_KEYS = ("label", "labels", "fine_label", "y", "y_train", "arr_1")


class Table(Pictures):
    """A data set of Hugging Face's ``datasets``: rows with named columns."""

    def __init__(self, table: Any, wanted: Wanted, workers: int) -> None:
        self.name, self.table = "the data set", table
        if not hasattr(table, "__len__"):
            raise TypeError("the data set must have a length, got a streamed one. Load it without streaming=True.")
        if len(table) == 0:
            raise ValueError("the data set is empty.")
        features = getattr(table, "features", None) or {}
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        columns = list(table.column_names)
        self.key = _choose(wanted.image_key, columns, "image", _IMAGE_KEYS, kinds, "Image")
        self.identity = ["table", len(table), self.key]
        if wanted.labels:
            key = _choose(wanted.label_key, columns, "label", _LABEL_KEYS, kinds, "ClassLabel")
            self.labels, self.classes = class_numbers(list(table[key]), len(table), self.name)
            names = getattr(features.get(key), "names", None)
            self.classes = tuple(map(str, names)) if names else self.classes
        self.set_shape(wanted, workers)

    def __len__(self) -> int:
        return len(self.table)

    def state(self) -> object:  # noqa: D102
        return [str(getattr(self.table, "_fingerprint", "")), super().state()]

    def open(self, i: int) -> Any:  # noqa: D102
        return as_picture(self.table[i][self.key])


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
        without = f", or leave out {argument('labels', True)}" if what == "label" else ""
        raise ValueError(
            f"the data have no {what}s{given}; the names are {names}. Pass {argument(f'{what}_key')}{without}."
        )
    return found[0]


def array_keys(names: Sequence[str], wanted: Wanted) -> list[str]:
    """The names in a mapping or an .npz file of the images, and of the labels if they are wanted."""
    if not names:
        raise ValueError("the mapping or .npz file of the data is empty. It must have an array of images.")
    images = _choose(wanted.image_key, names, "image", _IMAGE_KEYS, {}, "")
    return [images, *([_choose(wanted.label_key, names, "label", _LABEL_KEYS, {}, "")] if wanted.labels else [])]


class Items(Source):
    """A ``torch`` Dataset, whose items are images or tuples (image, label). Its transforms may be random."""

    constant = False

    def __init__(self, dataset: Any, wanted: Wanted, workers: int) -> None:
        self.name, self.dataset, self.crop = f"the {type(dataset).__name__}", dataset, wanted.crop
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"{self.name} must have a length, so that it can be shuffled. Pass a Dataset with __len__.")
        if len(dataset) == 0:
            raise ValueError(f"{self.name} is empty.")
        first = self._image(0)
        if hasattr(first, "getexif"):
            channels, size = channels_and_size(first)
            self.from_color, self.deep = wanted.channels == 1 and channels == 3, is_deep(first)
            square = size if wanted.crop is None else (min(size), min(size))
            self.shape = (wanted.channels or channels, *(wanted.size or square))
        else:
            values = _values(first)
            self.shape = fitting_shape(values.shape, wanted, self.name)
            try:
                check_values(values, self.shape, "it", wanted.value_range)
            except ValueError as error:
                raise ValueError(f"{self.name_of(0)}: {error}") from error
        self._keeps_color = wanted.channels is None and self.shape[0] == 1
        self.identity = [type(dataset).__name__, len(dataset)]
        if wanted.labels:
            # The labels and classes of torchvision's data sets, which are those before the transform of their items.
            known = dataset if getattr(dataset, "target_transform", None) is None else None
            labels, names = getattr(known, "targets", None), getattr(known, "classes", None)
            labels = list(ordered_map(self._label, range(len(dataset)), workers)) if labels is None else labels
            self.labels, self.classes = class_numbers(labels, len(dataset), self.name)
            self.classes = self.classes if names is None else tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.dataset)

    def pixels(self, i: int) -> np.ndarray:  # noqa: D102
        image = self._image(i)
        if hasattr(image, "getexif"):
            if self._keeps_color and channels_and_size(image)[0] == 3:
                raise UnfitError(
                    f"{self.name} mixes gray and color images: item 0 is gray, and item {i} is in color. Write "
                    f"{argument('channels', 3, of='open_images')} or {argument('channels', 1, of='open_images')}."
                )
            return fit_picture(image, self.shape, self.crop, deep=self.deep)
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
    array = to_array(image)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(channels_first(array[None], "an item of the Dataset")[0])
    if not np.issubdtype(array.dtype, np.floating):
        got = array.dtype if array.dtype.kind in "biu" else type(image).__name__
        raise TypeError(
            "an item of the Dataset must be an image or a tuple (image, label), where an image is a picture of Pillow "
            f"or an array, uint8 or floating point in [0, 1], got {got}."
        )
    check_axes((1, *array.shape), "the Dataset")
    return np.ascontiguousarray(array, np.float32)
