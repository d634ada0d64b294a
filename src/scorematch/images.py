"""Image files, read and written with Pillow (the extra ``images``)."""

from __future__ import annotations

import io
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# Values that are outside [0, 1] by less are rounded to 0 or 255 anyway.
_HALF_A_GRAY_LEVEL = 0.5 / 255


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Images side by side in one image, row by row, on a black background.

    Args:
        images: (N, C, H, W) in [0, 1].
        columns: the number of images in a row; None makes the grid about square.
        padding: width in pixels of the black border around each image.

    Returns:
        One image (C, H', W') in [0, 1].

    Raises:
        ValueError: for another shape, or fewer than one column.

    Example:
        >>> grid(torch.ones(6, 1, 28, 28), columns=3).shape
        torch.Size([1, 62, 92])
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be (N, C, H, W) with at least one image, got shape {tuple(images.shape)}.")
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
    """Raises what ``save_image`` would raise for this path, to be called before the image is computed.

    Nothing is written, and no folder is created.

    Raises:
        ImportError: without Pillow.
        ValueError: for a name without the extension of an image format.
        OSError: for a folder that cannot be created or written to.
    """
    _format(path)
    folder = Path(path).absolute().parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be written to: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: there is no permission to write in {existing}.")


def save_image(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes one image, gray or RGB, in the format of the file name's extension.

    Values are rounded to 8 bits. Folders are created, and the file is complete or not there at all.

    Args:
        image: (1, H, W) or (3, H, W), floating point, in [0, 1] up to half a gray level.
        path: of the file, such as "digits.png".

    Raises:
        ImportError: without Pillow.
        TypeError: for integer images.
        ValueError: for another shape, values outside [0, 1], NaN, or a name without the extension of an image format.
        OSError: if the file cannot be written.
    """
    kind = _format(path)
    pixels = _to_8_bits(image)
    encoded = io.BytesIO()
    _pillow("writing").fromarray(pixels).save(encoded, format=kind)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".saving-{uuid.uuid4().hex}")
    try:
        staged.write_bytes(encoded.getvalue())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def list_pictures(path: str | os.PathLike[str]) -> list[Path]:
    """The image file itself, or the image files of a folder sorted by name.

    Raises:
        ImportError: without Pillow.
        FileNotFoundError: for a path that does not exist, or a folder without image files.
    """
    extensions = _pillow("reading").registered_extensions()
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither an image file nor a folder.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in extensions)
    if not found:
        raise FileNotFoundError(f"{path} contains no image files.")
    return found


def read_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """Reads an image from a file of any format that Pillow supports.

    Args:
        path: of the file. The orientation in the EXIF data of a photograph is applied. Transparent pixels become black.
        channels: 1 for luma, 3 for RGB.

    Returns:
        The image (channels, H, W), float32 in [0, 1]. 16-bit gray keeps its precision; 16-bit colors are read with
        8 bits.

    Raises:
        ImportError: without Pillow.
        ValueError: for another number of channels.
        OSError: for a file that does not exist or is not an image, or pixel values whose range is not known.
    """
    pillow = _pillow("reading")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}.")
    try:
        with pillow.open(path) as file:
            if _is_deep(file):
                gray = torch.from_numpy(_deep_gray(_upright(file)))
                return gray.expand(channels, *gray.shape).clone()
            array = np.array(gray_or_rgb(file, channels))
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        if getattr(error, "filename", None) is not None:  # the file does not exist or may not be read
            raise
        raise OSError(f"{os.fspath(path)} cannot be read as an image: {error}") from error
    return rearrange(torch.from_numpy(array), "h w ... -> (...) h w").float() / 255


def open_picture(path: str | os.PathLike[str]) -> Any:
    """A picture of Pillow, of which only the header is read.

    Raises:
        ImportError: without Pillow.
        OSError: for a file that does not exist or is not an image.
    """
    return _pillow("reading").open(path)


def gray_or_rgb(picture: Any, channels: int) -> Any:
    """A picture of Pillow as 8-bit gray (mode "L", ``channels`` = 1) or RGB (3), with the rules of ``read_image``.

    Raises:
        ImportError: without Pillow.
        OSError, ValueError: for a damaged file, or pixel values whose range is not known.
    """
    pillow, image = _pillow("reading"), _upright(picture)
    if _is_deep(image):
        image = pillow.fromarray((_deep_gray(image) * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "black"), image)
    return image.convert("L" if channels == 1 else "RGB")


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Reads a mask (H, W), bool, True where the image is white.

    Raises:
        ImportError: without Pillow.
        ValueError: for an image with other colors than black and white, such as a mask that was saved as JPEG.
        OSError: for a file that does not exist or is not an image.
    """
    mask = read_image(path, 1)[0]
    gray = int(((mask > 0) & (mask < 1)).sum())
    if gray:
        raise ValueError(
            f"{os.fspath(path)} is not a mask: {gray} of its {mask.numel()} pixels are neither black nor white. Draw "
            "it without soft edges, and save it as PNG."
        )
    return mask > 0


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Writes images (N, C, H, W) in [0, 1] as one image; see ``grid`` and ``save_image``."""
    save_image(grid(images, columns), path)


def _pillow(doing: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f'{doing} images needs Pillow: pip install "scorematch[images]".') from error
    return Image


def _format(path: str | os.PathLike[str]) -> str:
    """The image format of a file name's extension."""
    pillow = _pillow("writing")
    kind = pillow.registered_extensions().get(Path(path).suffix.lower())
    if kind not in pillow.SAVE:
        raise ValueError(
            f"the name of an image file must have the extension of its format, such as .png, got {os.fspath(path)}."
        )
    return kind


def _to_8_bits(image: Tensor) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3), uint8, of a checked image (C, H, W)."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"image must be a floating-point tensor in [0, 1], got {kind}. Write image / 255 for 8-bit images."
        )
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise ValueError(f"image must be (1, H, W) or (3, H, W), got shape {tuple(image.shape)}.")
    image = image.detach().float().cpu()
    low, high = (float(value) for value in image.aminmax())
    if math.isnan(low):
        raise ValueError("image must have values in [0, 1], got NaN.")
    if low < -_HALF_A_GRAY_LEVEL or high > 1 + _HALF_A_GRAY_LEVEL:
        raise ValueError(
            f"image must have values in [0, 1], got values from {low:.3g} to {high:.3g}. Write (image + 1) / 2 for "
            "images in [-1, 1], image / 255 for 8-bit values, or image.clamp(0, 1)."
        )
    array = rearrange(image.clamp(0, 1).mul(255).round().to(torch.uint8), "c h w -> h w c").numpy()
    return array.squeeze(2) if array.shape[2] == 1 else array


def _upright(picture: Any) -> Any:
    """A picture, rotated as its EXIF data say."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _is_deep(picture: Any) -> bool:
    """Whether a picture is gray with more than 8 bits, which ``convert("L")`` would clip to white."""
    return picture.mode.startswith(("I", "F"))


def _deep_gray(image: Any) -> np.ndarray:
    """The pixels (H, W), float32 in [0, 1], of an image of one of Pillow's gray modes with more than 8 bits."""
    array = np.array(image).astype(np.float64)
    # Mode "I" has 32 bits, but older versions of Pillow read files of 16 bits in it.
    largest = 1.0 if image.mode == "F" else 65535.0
    if not (array.min() >= 0 and array.max() <= largest):  # written so that NaN is refused
        raise ValueError(
            f"its pixels have values from {array.min():g} to {array.max():g}, whose range is not known; expected 0 to "
            f"{largest:g}"
        )
    if "transparency" in image.info:  # the gray value of transparent pixels
        array[array == image.info["transparency"]] = 0
    return (array / largest).astype(np.float32)
