"""Loads CIFAR-10 for the examples, from a folder or with torchvision.

``load_images(folder, "train")`` looks in ``folder`` for, in this order:

- ``cifar-10-batches-py``, the folder in which torchvision keeps the data, and reads it;
- the files of the binary version, ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, at any depth;
- ``cifar10_train.npz``, an archive with the arrays ``images`` (N, 32, 32, 3) uint8 and ``labels`` (N,), or with tiled
  pictures as described in ``mnist.py``.

Without a folder torchvision downloads the data into ``./data``.
"""

from pathlib import Path

import numpy as np
import torch
from mnist import read_archive
from torch import Tensor

_FILES = {"train": "data_batch_*.bin", "test": "test_batch.bin"}


def load_images(folder: str | Path | None, split: str) -> tuple[Tensor, Tensor]:
    """The images (N, 3, 32, 32) as uint8 and their labels (N,) as int64."""
    if folder is None or (Path(folder) / "cifar-10-batches-py").is_dir():
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise ImportError(
                "Pass --data, a folder with CIFAR-10 in its binary version, or pip install torchvision."
            ) from error

        images = CIFAR10("data" if folder is None else folder, train=split == "train", download=folder is None)
        return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)
    folder = Path(folder)
    archive = folder / f"cifar10_{split}.npz"
    originals = sorted(folder.rglob(_FILES[split]))
    if originals:  # per image one byte for the label, then the red, green and blue values of 1,024 pixels
        rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in originals])
        return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, 0].astype(np.int64))
    if not archive.is_file():
        raise FileNotFoundError(f"{folder} contains neither {_FILES[split]} nor {archive.name}.")
    pixels, labels = read_archive(archive)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))
