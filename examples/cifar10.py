"""CIFAR-10 for the examples: the images from a folder of the user's own, or from torchvision.

``load_images(folder, "train")`` looks in ``folder``, in this order, for

- the original files of the binary version, ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, at any
  depth;
- ``cifar10_train.npz``, an archive with the arrays ``images`` (N, 32, 32, 3) uint8 and ``labels`` (N,), or with
  pictures of several images, as ``mnist.py`` describes them;
- ``cifar-10-batches-py``, as torchvision keeps the set and reads it.

Without a folder torchvision downloads the set into ``./data``.
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
            raise ImportError("pass --data, a folder with CIFAR-10, or pip install torchvision to fetch it.") from error

        images = CIFAR10("data" if folder is None else folder, train=split == "train", download=folder is None)
        return torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)
    folder = Path(folder)
    archive = folder / f"cifar10_{split}.npz"
    originals = sorted(folder.rglob(_FILES[split]))
    if originals:  # a byte for the label, then the red, the green and the blue of 1,024 pixels
        rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in originals])
        return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, 0].astype(np.int64))
    if not archive.is_file():
        raise FileNotFoundError(f"{folder} holds neither {_FILES[split]} nor {archive.name}.")
    pixels, labels = read_archive(archive)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))
