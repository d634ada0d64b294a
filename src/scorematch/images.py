"""Pictures on disk, through Pillow (the extra ``images``): the one place where tensors and files of pictures meet."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Images side by side in one, row by row, on a black ground.

    Args:
        images: (N, C, H, W) in [0, 1].
        columns: how many a row; None makes the grid about square.
        padding: black pixels around each image.

    Returns:
        One image (C, H', W') in [0, 1].

    Example:
        >>> grid(torch.ones(6, 1, 28, 28), columns=3).shape
        torch.Size([1, 62, 92])
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (N, C, H, W), at least one, got {tuple(images.shape)}.")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    rows = math.ceil(len(images) / columns)
    padded = torch.nn.functional.pad(images, (0, padding, 0, padding))
    cells = padded.new_zeros(rows * columns, *padded.shape[1:])
    cells[: len(images)] = padded
    whole = rearrange(cells, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return torch.nn.functional.pad(whole, (padding, 0, padding, 0))


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises what ``save_image`` would raise for this name, before there is an image.

    Raises:
        ImportError: without Pillow.
        ValueError: for a name that says no kind of picture.
        OSError: for a folder that cannot be made or written to; it is made if it does not exist.
    """
    Image = _pillow("writing")  # noqa: N806
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{os.fspath(path)} does not end with a kind of picture, such as .png.")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=Path(path).parent):
            pass
    except OSError as error:
        raise OSError(f"{Path(path).parent} cannot be written to: {error.strerror}.") from error


def save_image(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes one image (C, H, W), gray or RGB, in [0, 1], to a file of the kind that its name ends with.

    Values are clamped to [0, 1] and rounded to 8 bits. The file is whole or not there at all.

    Raises:
        ImportError: without Pillow.
        ValueError: for another shape, or a name that says no kind.
    """
    check_picture(path)
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image to save is (1, H, W) or (3, H, W), got {tuple(image.shape)}.")
    path = Path(path)
    pixels = image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    array = rearrange(pixels, "c h w -> h w c").numpy()
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as staging:
        staged = Path(staging) / f"image{path.suffix}"
        Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(staged)
        os.replace(staged, path)


def list_pictures(path: str | os.PathLike[str]) -> list[Path]:
    """The picture itself, or the pictures of a folder in the order of their names.

    Raises:
        ImportError: without Pillow.
        FileNotFoundError: for no such file or folder, or a folder without pictures.
    """
    Image = _pillow("reading")  # noqa: N806
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a picture nor a folder.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in Image.registered_extensions())
    if not found:
        raise FileNotFoundError(f"{path} holds no pictures.")
    return found


def read_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """An image (channels, H, W) in [0, 1], of a file of any kind that Pillow reads.

    Args:
        path: the file. A turned photograph is turned upright; where it is transparent, black shows through.
        channels: 1 for luma, 3 for RGB.

    Raises:
        ImportError: without Pillow.
        ValueError: for other channels.
        OSError: for a file that is missing or no picture.
    """
    Image = _pillow("reading")  # noqa: N806
    from PIL import ImageOps

    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 channel or 3, not {channels}.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            array = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        if getattr(error, "filename", None) is not None:  # no such file, or not allowed to read it
            raise
        raise OSError(f"{os.fspath(path)} is no picture that can be read: {error}") from error
    return rearrange(torch.from_numpy(array), "h w ... -> (...) h w").float() / 255


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """A mask (H, W), bool, True where its picture is white.

    Raises:
        ImportError: without Pillow.
        ValueError: for a picture of other colors than black and white, such as a mask that was stored as JPEG.
        OSError: for a file that is missing or no picture.
    """
    mask = read_image(path, 1)[0]
    gray = int(((mask > 0) & (mask < 1)).sum())
    if gray:
        raise ValueError(
            f"{os.fspath(path)} is no mask: {gray} of its {mask.numel()} pixels are neither black nor white. Draw it "
            "without soft edges, and save it as PNG."
        )
    return mask > 0


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Writes images (N, C, H, W) in [0, 1] as one picture; see ``grid`` and ``save_image``."""
    save_image(grid(images, columns), path)


def _pillow(doing: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f'{doing} pictures needs Pillow: pip install "scorematch[images]".') from error
    return Image
