"""The interface of the sources of images, and what a user wants of their images.

The sources are ``memory.Array``, ``folders.Folder``, ``tables.Table`` and ``tables.Items``; ``find`` chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scorematch.core.records import hash_of_bytes
from scorematch.data.pictures import Crop


class Wanted(NamedTuple):
    """The arguments of ``open_images`` that determine the images and labels."""

    size: tuple[int, int] | None
    channels: int | None
    crop: Crop
    labels: bool
    image_key: str | None
    label_key: str | None
    value_range: tuple[float, float] | None


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
        deep: whether the first picture has more than 8 bits; all are then read as float32 in [0, 1].
        constant: whether an image has the same pixels each time it is read, so that it can be decoded once and kept.
    """

    name: str
    shape: tuple[int, ...]
    identity: object
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    unread: Sequence[str] = ()
    from_color = False
    deep = False
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
                digests.append(hash_of_bytes(self.pixels(i).tobytes()))
            except Exception:  # a damaged picture
                digests.append("damaged")
        return digests
