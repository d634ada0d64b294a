"""Loads MNIST for the examples, from a folder or with torchvision.

``load_digits(folder, "train")`` looks in ``folder`` for, in this order:

- the original files, ``train-images-idx3-ubyte`` and so on, with or without .gz, at any depth. torchvision keeps them
  like this;
- ``mnist_train.npz``, an archive with the arrays ``images`` (N, 28, 28) uint8 and ``labels`` (N,); or with tiled
  pictures of several digits: ``blob`` (the encoded pictures, concatenated), ``ends`` (the offset at which each one
  ends), ``shape`` (N, 28, 28, 1), ``per`` (digits per picture), ``cols`` (digits per row) and ``labels``.

Without a folder torchvision downloads the data into ``./data``.
"""

import gzip
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILES = {"train": "train", "test": "t10k"}


def load_digits(folder: str | Path | None, split: str) -> tuple[Tensor, Tensor]:
    """The digits (N, 1, 28, 28) as uint8 and their labels (N,) as int64."""
    if folder is None:
        try:
            from torchvision.datasets import MNIST
        except ImportError as error:
            raise ImportError("Pass --data, a folder with MNIST, or pip install torchvision to download it.") from error

        digits = MNIST("data", train=split == "train", download=True)
        return digits.data[:, None], digits.targets
    folder = Path(folder)
    archive = folder / f"mnist_{split}.npz"
    originals = sorted(folder.rglob(f"{_FILES[split]}-images*idx3-ubyte*"))
    if originals:
        images = _read_idx(originals[0])
        labels = _read_idx(
            originals[0].with_name(originals[0].name.replace("images", "labels").replace("idx3", "idx1"))
        )
    elif archive.is_file():
        images, labels = read_archive(archive)
    else:
        raise FileNotFoundError(f"{folder} contains neither {_FILES[split]}-images-idx3-ubyte nor {archive.name}.")
    return torch.from_numpy(images.reshape(-1, 1, 28, 28)), torch.from_numpy(labels.astype(np.int64))


def _read_idx(path: Path) -> np.ndarray:
    """An array in MNIST's own format: the number of axes in the fourth byte, big-endian sizes, then bytes."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = data[3]
    sizes = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sizes).copy()


def read_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of an archive, (N, H, W, C) or as they are stored, and the labels (N,)."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as archive:
        if "images" in archive:
            return archive["images"], archive["labels"]
        n, height, width, channels = (int(size) for size in archive["shape"])
        per, columns, blob, ends = int(archive["per"]), int(archive["cols"]), archive["blob"], archive["ends"]
        labels = archive["labels"]
    images = np.empty((n, height, width, channels), np.uint8)
    for k, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        encoded = Image.open(io.BytesIO(blob[begin:end].tobytes()))
        picture = np.asarray(encoded.convert("L" if channels == 1 else "RGB"))
        tiles = picture.reshape(-1, height, columns, width, channels).swapaxes(1, 2)
        block = images[k * per : (k + 1) * per]
        block[...] = tiles.reshape(-1, height, width, channels)[: len(block)]
    return images, labels
