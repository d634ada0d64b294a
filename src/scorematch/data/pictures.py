"""Images as tensors and as pixels, and image files, which Pillow reads and writes (the extra ``images``)."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.files import check_writable, write_whole
from scorematch.core.messages import few, reason

# The extensions of image files. In a folder, files with other extensions are ignored.
ENDINGS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# The extensions of pictures of cameras and editors that are not read. They are left out with a message.
UNREAD = (
    *(".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".hif", ".jxl"),
    *(".nef", ".orf", ".psd", ".raf", ".rw2", ".tga"),
)
# The tolerance for values outside [0, 1], which are rounded to 0 or 255.
_HALF_A_GRAY_LEVEL = 0.5 / 255
# More pixels per byte than deflate can compress black and white pixels to, for images that are not small.
_PIXELS_PER_BYTE, _MANY_PIXELS = 8000, 2**23
# The formats in which Pillow writes no gray or RGB images, or only icons, which it scales to other sizes.
_NOT_PICTURES = {"BLP", "BUFR", "GRIB", "HDF5", "ICNS", "ICO", "MSP", "PALM", "WMF", "XBM"}
_LUMA = (0.299, 0.587, 0.114)  # of R, G and B
DAMAGED = (OSError, ValueError, SyntaxError, RuntimeError)  # what Pillow raises for a damaged file


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Arranges images in a grid, row by row, on a black background.

    Args:
        images: (N, C, H, W) in [0, 1], N at least 1.
        columns: the number of images in a row, at least 1; None is the square root of N, rounded up.
        padding: the width in pixels of the black border around each image.

    Returns:
        One image (C, H', W') in [0, 1].

    Raises:
        TypeError: if the images are not a tensor, or ``columns`` is not an integer.
        ValueError: if the images have another shape, or ``columns`` is below 1.

    Example:
        >>> grid(torch.ones(6, 1, 28, 28), columns=3).shape
        torch.Size([1, 62, 92])
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor (N, C, H, W), got {type(images).__name__}. Write torch.as_tensor(images), or "
            "torch.stack(images) for a list of tensors."
        )
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be (N, C, H, W) with at least one image, got shape {tuple(images.shape)}.")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    columns = check_count("columns", columns)
    rows = math.ceil(len(images) / columns)
    padded = torch.nn.functional.pad(images, (0, padding, 0, padding))
    cells = padded.new_zeros(rows * columns, *padded.shape[1:])
    cells[: len(images)] = padded
    whole = rearrange(cells, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return torch.nn.functional.pad(whole, (padding, 0, padding, 0))


def to_uint8(images: Tensor, name: str = "images") -> Tensor:
    """Converts images to 8 bits: values in [0, 1] are rounded to 0, ..., 255. uint8 images are returned unchanged.

    Args:
        images: uint8, or floating point in [0, 1], of any shape, with at least one value; values outside by up to half
            a gray level, 0.5 / 255, are clamped.
        name: the name of the images in messages.

    Raises:
        TypeError: if the images have another dtype.
        ValueError: if values are outside [0, 1], or NaN.

    Example:
        >>> to_uint8(torch.tensor([0.0, 0.5, 1.0]))
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"{name} must be uint8, or floating point in [0, 1], got {images.dtype}.")
    images = images.detach().float()
    check_range(images, name)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pixels(image: Tensor) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3), uint8, of an image, as Pillow takes them.

    Args:
        image: (1, H, W) or (3, H, W), uint8, or floating point in [0, 1].

    Raises:
        TypeError: if the image has another dtype.
        ValueError: if it has another shape or values outside [0, 1].
    """
    if not is_picture(image.shape) or image.numel() == 0:
        raise ValueError(f"image must be (1, H, W) or (3, H, W), got shape {tuple(image.shape)}.")
    array = rearrange(to_uint8(image, "image").cpu(), "c h w -> h w c").numpy()
    return array.squeeze(2) if array.shape[2] == 1 else array


def to_float(images: Tensor) -> Tensor:
    """Converts uint8 images to float32 in [0, 1]; floating-point images are returned unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_range(images: Tensor, name: str = "images") -> None:
    """Checks that floating-point images are in [0, 1], up to half a gray level.

    Args:
        images: floating point, of any shape, with at least one value.
        name: the name of the images in messages.

    Raises:
        ValueError: if values are outside [0, 1], or NaN.
    """
    low, high = (float(value) for value in images.aminmax())
    if math.isnan(low):
        raise ValueError(f"{name} must have values in [0, 1], got NaN.")
    if low < -_HALF_A_GRAY_LEVEL or high > 1 + _HALF_A_GRAY_LEVEL:
        raise ValueError(
            f"{name} must have values in [0, 1], got values from {low:.3g} to {high:.3g}. Write ({name} + 1) / 2 for "
            f"images in [-1, 1], {name} / 255 for 8-bit values, or {name}.clamp(0, 1)."
        )


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a shape is that of a gray or an RGB image, (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Checks that ``save_image`` can write to a path, so that an error is raised before the image is computed.

    Nothing is written, and no folder is created.

    Args:
        path: the path of the image file.

    Raises:
        ImportError: without Pillow.
        ValueError: if the name does not have the extension of an image format.
        OSError: if the folder cannot be created or written to.
    """
    _format(path)
    check_writable(Path(path).expanduser().absolute().parent)


def save_image(image: Tensor, path: str | os.PathLike[str], *, comment: str | None = None) -> None:
    """Writes one image, gray or RGB, in the format given by the extension of the file name.

    Values are rounded to 8 bits. Missing folders are created. The file is written atomically: after an error the path
    is unchanged.

    Args:
        image: (1, H, W) or (3, H, W), floating point, in [0, 1]; values outside by up to half a gray level, 0.5 / 255,
            are clamped.
        path: the path of the file, such as "digits.png".
        comment: a text that a PNG file has beside the pixels; other formats leave it out.

    Raises:
        ImportError: without Pillow.
        TypeError: if the image is not a floating-point tensor.
        ValueError: for another shape, values outside [0, 1], NaN, or a name without the extension of an image format.
        OSError: if the file cannot be written.
    """
    kind = _format(path)
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found, hint = type(image).__name__, "torch.as_tensor(image)"
        if isinstance(image, Tensor):
            found, hint = str(image.dtype), "image / 255 for 8-bit images"
        raise TypeError(f"image must be a floating-point tensor in [0, 1], got {found}. Write {hint}.")
    picture = _pillow("writing").fromarray(to_pixels(image))
    if kind == "QOI":  # which has no gray images
        picture = picture.convert("RGB")
    options: dict[str, Any] = {}
    if comment is not None and kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Comment", comment)
    _save(picture, path, format=kind, **options)


def list_pictures(path: str | os.PathLike[str]) -> list[Path]:
    """Lists the image files at a path: the file itself, or the image files in a folder, sorted by name.

    Subfolders are ignored. Pictures in formats that cannot be read, such as HEIC, are left out with a warning.

    Raises:
        ImportError: without Pillow.
        FileNotFoundError: if the path does not exist, or the folder has no image files.
    """
    _pillow("reading")
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither an image file nor a folder.")
    files = [file for file in path.iterdir() if not file.name.startswith(".") and file.is_file()]
    files.sort(key=lambda file: file.name)
    found = [file for file in files if file.suffix.lower() in ENDINGS]
    unread = [file for file in files if file.suffix.lower() in UNREAD]
    if not found:
        raise FileNotFoundError(f"{path} contains no image files{why_none(unread)}")
    if unread:
        warnings.warn(
            f"{len(unread)} of the {len(found) + len(unread)} pictures in {path} have formats that cannot be read, and "
            f"are left out: {few([file.name for file in unread], 1)}",
            stacklevel=2,
        )
    return found


def why_none(unread: Sequence[Path]) -> str:
    """The end of a message that there are no image files, with pictures in formats that cannot be read."""
    return f" that can be read. Convert pictures such as {unread[0].name} to PNG or JPEG." if unread else "."


def read_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """Reads an image from a file of any format that Pillow supports.

    Args:
        path: the path of the file. The EXIF orientation is applied. Transparent pixels become black. Of an animation or
            a TIFF file with several pages the first picture is read.
        channels: 1 for luma, 3 for RGB.

    Returns:
        The image (channels, H, W), float32 in [0, 1]. Gray images and PNG files of 16 bits keep their precision; other
        colors of 16 bits are read with 8 bits.

    Raises:
        ImportError: without Pillow.
        ValueError: if ``channels`` is neither 1 nor 3.
        OSError: if the file does not exist or is not an image, or the range of its pixel values is not known.
    """
    pillow = _pillow("reading")
    check_choice("channels", channels, (1, 3))
    try:
        with open_picture(path) as file:
            if is_deep(file):
                return torch.from_numpy(_deep_values(file, channels))
            array = np.array(gray_or_rgb(file, channels))
    except (*DAMAGED, pillow.DecompressionBombError) as error:
        if getattr(error, "filename", None) is not None:  # the file does not exist or may not be read
            raise
        raise OSError(f"{os.fspath(path)} cannot be read as an image: {reason(error)}.") from error
    return rearrange(torch.from_numpy(array), "h w ... -> (...) h w").float().div_(255)


def open_picture(path: str | os.PathLike[str]) -> Any:
    """Opens an image file as a ``PIL.Image.Image``; only the header is read.

    Raises:
        ImportError: without Pillow.
        OSError: if the file does not exist or is not an image.
        ValueError: if it has more than 2^23 pixels, and more than 8,000 pixels per byte of the file; or more than
            Pillow allows.
    """
    pillow, path = _pillow("reading"), Path(path).expanduser()
    try:
        picture = pillow.open(path)
    except pillow.DecompressionBombError as error:
        raise ValueError(f"it has too many pixels: {error}") from error
    width, height = picture.size
    size = path.stat().st_size
    if width * height > max(_MANY_PIXELS, _PIXELS_PER_BYTE * size):
        picture.close()
        raise ValueError(
            f"it has {height} x {width} pixels, too many for a file of {size} bytes: it may be a decompression bomb"
        )
    return picture


def gray_or_rgb(picture: Any, channels: int) -> Any:
    """Converts a ``PIL.Image.Image`` to 8-bit gray (``channels`` = 1, mode "L") or RGB (``channels`` = 3).

    Orientation, transparency and gray images of more than 8 bits are treated as in ``read_image``.

    Raises:
        ImportError: without Pillow.
        OSError, ValueError: if the file is damaged, or the range of its pixel values is not known.
    """
    pillow, image = _pillow("reading"), _upright(picture)
    if _is_deep_gray(image):
        image = pillow.fromarray((_deep_gray(image) * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "black"), image)
    if channels == 1 and image.mode == "LAB":  # Pillow has no direct conversion
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Reads a mask from an image file of any kind: True where it is at least half as bright as white.

    Colors count by their luma, and transparent pixels are black. A warning has the number of pixels between a quarter
    and three quarters, such as those of soft edges.

    Returns:
        The mask (H, W), bool.

    Raises:
        ImportError: without Pillow.
        ValueError: if more than half of the pixels are between a quarter and three quarters, as in a photograph; or if
            some are brighter than black, but none is brighter than a quarter, as in a mask of the numbers 0 and 1.
        OSError: if the file does not exist or is not an image.
    """
    luma = read_image(path, 1)[0]
    undecided = int(((luma > 0.25) & (luma < 0.75)).sum())
    if 2 * undecided > luma.numel():
        raise ValueError(
            f"a mask must be black and white, but {undecided} of the {luma.numel()} pixels of {os.fspath(path)} are "
            "neither dark nor bright. Paint it white where the picture is observed, and black elsewhere."
        )
    brightest = float(luma.max())
    if 0 < brightest <= 0.25:  # such as a mask of the numbers 0 and 1
        raise ValueError(
            f"a mask must be black and white, but the brightest pixel of {os.fspath(path)} has {100 * brightest:.2g} % "
            "of white. Write 255 in place of 1 where the picture is observed."
        )
    if undecided:
        warnings.warn(
            f"{undecided} of the {luma.numel()} pixels of the mask {os.fspath(path)} are undecided, between a quarter "
            "and three quarters of white: those of at least one half count as white.",
            stacklevel=2,
        )
    return luma >= 0.5


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Writes images as a grid in one image file; errors are those of ``grid`` and ``save_image``.

    Args:
        images: (N, C, H, W) in [0, 1], C being 1 or 3.
        path: the path of the file, such as "digits.png".
        columns: the number of images in a row; None is the square root of N, rounded up.
    """
    whole = grid(images, columns)
    if not is_picture(whole.shape):
        raise ValueError(f"images must be (N, 1, H, W) or (N, 3, H, W), got shape {tuple(images.shape)}.")
    save_image(whole, path)


def save_animation(
    frames: Sequence[Tensor], path: str | os.PathLike[str], *, seconds: float = 3.0, hold: float = 2.0
) -> None:
    """Writes images as an animated GIF, which repeats and shows the last image for a longer time.

    GIF has 256 colors per image: gray images are exact, colors are approximate. The file is written atomically, as by
    ``save_image``.

    Args:
        frames: at least one image, all of the same shape (1, H, W) or (3, H, W), uint8, or floating point in [0, 1].
        path: the path of the file, such as "digits.gif".
        seconds: the duration of all images before the last one, shown for equal times of at least 0.02 seconds.
        hold: the duration of the last image in seconds.

    Raises:
        ImportError: without Pillow.
        TypeError: if the images have another dtype.
        ValueError: for no images, images of several shapes or values outside [0, 1], or a name that does not end in
            .gif.
        OSError: if the file cannot be written.
    """
    if _format(path) != "GIF":
        raise ValueError(f"the path of an animation must end in .gif, got {os.fspath(path)}.")
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) != 1:
        raise ValueError(f"frames must be at least one image, all of the same shape, got shapes {shapes}.")
    first, *others = [_pillow("writing").fromarray(to_pixels(frame)) for frame in frames]
    # In milliseconds. GIF has units of 10 milliseconds, and browsers show frames of 10 more slowly.
    each = max(20, 10 * round(100 * seconds / max(1, len(others))))
    durations = [each] * len(others) + [round(1000 * hold)]
    _save(first, path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _save(picture: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes a picture atomically, with options of Pillow. Missing folders are created."""
    encoded = io.BytesIO()
    picture.save(encoded, **options)
    write_whole(Path(path).expanduser(), encoded.getvalue())


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
    if kind not in pillow.SAVE or kind in _NOT_PICTURES:
        raise ValueError(f"the path must end in the extension of an image format, such as .png, got {os.fspath(path)}.")
    return kind


def _upright(picture: Any) -> Any:
    """The picture, rotated by its EXIF orientation."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def is_deep(picture: Any) -> bool:
    """Whether a picture, whose pixels are not read yet, has more than 8 bits that ``fit_picture`` can read."""
    return _is_deep_gray(picture) or _is_deep_png(picture)


def _is_deep_gray(picture: Any) -> bool:
    """Whether a picture is gray with more than 8 bits, which ``convert("L")`` would clip at 255."""
    return picture.mode.startswith(("I", "F"))


def _is_deep_png(picture: Any) -> bool:
    """Whether a picture is a PNG file in color with 16 bits, of which Pillow reads the high bytes."""
    tiles: list[Any] = getattr(picture, "tile", [])
    modes = [tile[3] for tile in tiles] if picture.format == "PNG" and "transparency" not in picture.info else []
    return modes in (["RGB;16B"], ["RGBA;16B"])


def _deep_values(picture: Any, channels: int) -> np.ndarray:
    """The values (channels, H, W), float32 in [0, 1], of a picture with more than 8 bits."""
    if _is_deep_gray(picture):
        gray = _deep_gray(_upright(picture))
        return np.repeat(gray[None], channels, 0)
    # The raw mode of the other byte order gives the low bytes.
    low = _pillow("reading").open(picture.filename or io.BytesIO(picture.fp.getvalue()))
    low.tile = [(*tile[:3], tile[3].replace("16B", "16L")) for tile in low.tile]
    bytes_ = [np.array(_upright(each)).astype(np.float32) for each in (picture, low)]
    values = rearrange((256 * bytes_[0] + bytes_[1]) / 65535, "h w c -> c h w")
    color = values[:3] * values[3:] if len(values) == 4 else values  # transparent pixels are black
    luma = np.array(_LUMA, np.float32)[:, None, None]
    return color if channels == 3 else (luma * color).sum(0, keepdims=True)


def _deep_gray(image: Any) -> np.ndarray:
    """The pixels (H, W), float32 in [0, 1], of an image of one of Pillow's gray modes with more than 8 bits."""
    with np.errstate(invalid="ignore"):  # of NaN, which is an error below
        array = np.array(image).astype(np.float64)
    # Mode "I" has 32 bits, but older versions of Pillow use it for 16-bit files.
    largest = 1.0 if image.mode == "F" else 65535.0
    if not (array.min() >= 0 and array.max() <= largest):  # also true for NaN
        raise ValueError(
            f"its pixel values must be from 0 to {largest:g}, got values from {array.min():g} to {array.max():g}"
        )
    if "transparency" in image.info:  # the gray value that marks transparent pixels
        array[array == image.info["transparency"]] = 0
    return (array / largest).astype(np.float32)


Crop = Literal["center", "celeba"] | None
CELEBA_SIDE = 140  # pixels; the aligned images have 178 x 218 (Song & Ermon, arXiv:1907.05600, App. B.1)


class UnfitError(ValueError):
    """An image that is not damaged but does not fit the arguments of ``open_images``."""


def fit_picture(picture: Any, shape: tuple[int, ...], crop: Crop, *, deep: bool = False) -> np.ndarray:
    """Crops and resizes a picture; returns its pixels (C, H, W), uint8, or float32 in [0, 1] if they are ``deep``."""
    from PIL.Image import Resampling, fromarray

    channels, height, width = shape
    of_16_bits = deep and is_deep(picture)
    images = [*map(fromarray, _deep_values(picture, channels))] if of_16_bits else [gray_or_rgb(picture, channels)]
    wide, tall = images[0].size
    if crop == "celeba":
        if min(wide, tall) < CELEBA_SIDE:
            raise UnfitError(
                f"{argument('crop', 'celeba')} needs images of at least {CELEBA_SIDE} x {CELEBA_SIDE} pixels, got "
                f"{tall} x {wide}. Write {argument('crop', 'center')} for images that are already cropped."
            )
        inner = (CELEBA_SIDE, CELEBA_SIDE)
    elif crop == "center":
        scale = min(wide / width, tall / height)
        inner = (min(wide, max(1, round(scale * width))), min(tall, max(1, round(scale * height))))
    else:
        inner = (wide, tall)
    left, top = (wide - inner[0]) // 2, (tall - inner[1]) // 2
    parts = []
    for image in images:
        part = image.crop((left, top, left + inner[0], top + inner[1]))
        if part.size != (width, height):
            part = part.resize((width, height), Resampling.BILINEAR)
        pixels = np.array(part)
        parts.append(pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return found.astype(np.float32) / 255 if deep and not of_16_bits else found


def channels_and_size(picture: Any) -> tuple[int, tuple[int, int]]:
    """The number of channels, 1 or 3, and the (height, width) of a picture, from its header."""
    gray = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith(("I", "F"))
    on_its_side = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap height and width
    size = picture.size
    if on_its_side and picture.format == "TIFF":  # newer versions of Pillow have swapped them already
        size = picture.tag_v2[256], picture.tag_v2[257]
    return 1 if gray else 3, size if on_its_side else size[::-1]


def as_picture(image: Any) -> Any:
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
