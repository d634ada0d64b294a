r"""A picture of any size as an observation of the images that a network draws, and the restorations as pictures again.

Let y = A x be the measurement of a picture x of any size, and let R resize a part of x, the box, to the size of the
network's images. The sampler restores :math:`z = R x`, and U enlarges the result to the box:

=================  =============================  ======================================================================
what y has         what the sampler is given      the restored picture
=================  =============================  ======================================================================
pixels, with a     R y, where at least half of    y where it is known, with the same bits, and U z where it is not
hole or borders    a pixel is known
luma               R y                            the luma of y with the colors of U z. Colors that no pixel can have
                                                  with this luma are made paler
anything else      D y with the operator D A U.   :math:`U z + B\,(y - A U z)`: U z, and what its measurement lacks of
                   D is R if y has the size of    y. B is ``as_image`` of the operator
                   x, otherwise nothing
=================  =============================  ======================================================================

Outside of the box the restored picture is y, or B y. The network adds details down to the size of its own pixels; finer
ones come from y alone. In tiles (``scorematch.guidance.Tiled``) the network draws at the resolution of the picture
instead, without R and U.

R is bilinear interpolation with antialiasing, as for training data, and U is bicubic.

References:
    Irani & Peleg, 1991, Improving Resolution by Image Registration (the correction B, back-projection).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import matmul
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from scorematch.core.arguments import argument, check_count
from scorematch.data.pictures import CELEBA_SIDE, check_range
from scorematch.restoration.decomposition import Decomposition
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Operator, kind_of
from scorematch.restoration.operators import Grayscale, Mask, Uncrop
from scorematch.restoration.resize import decomposed, products, weights

__all__ = ["Photograph"]

_LONGEST = 4  # times as long as wide, relative to the network's images, for a picture that is resized as a whole
_SMALLEST = 8  # times smaller than the network's images

Crop = Literal["center", "celeba"] | Sequence[int] | None


class Box(NamedTuple):
    """A part of a picture in pixels; it may extend beyond the picture."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def largest(cls, size: Sequence[int], own: Sequence[int], missing: Box | None = None) -> Box | None:
        """The largest part of a picture of a size with the aspect ratio of the network's images.

        Args:
            size: (height, width) of the picture.
            own: (height, width) of the network's images.
            missing: what it has to contain. It is as near to the middle as this allows.

        Returns:
            The part, or None if ``missing`` does not fit into it.
        """
        (height, width), (h, w) = size, own
        scale = min(width / w, height / h)
        wide, tall = min(width, max(1, round(scale * w))), min(height, max(1, round(scale * h)))
        left, top = (width - wide) // 2, (height - tall) // 2
        if missing is not None:
            if missing.width > wide or missing.height > tall:
                return None
            left = min(max(left, missing.left + missing.width - wide), missing.left)
            top = min(max(top, missing.top + missing.height - tall), missing.top)
        return cls(left, top, wide, tall)

    def of(self, x: Tensor) -> Tensor:
        """The part of images (N, C, H, W), with zeros outside of them."""
        height, width = x.shape[-2:]
        right, bottom = self.left + self.width - width, self.top + self.height - height
        return pad(x, (-self.left, right, -self.top, bottom))

    def back(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The picture of a size, (height, width), whose part this is, with zeros outside of the box."""
        height, width = size
        right, bottom = width - self.left - self.width, height - self.top - self.height
        return pad(x, (self.left, right, self.top, bottom))

    def inside(self, x: Tensor) -> Tensor:
        """Where pictures (N, C, H, W) have this part, bool (1, 1, H, W)."""
        return self.back(x.new_ones(1, 1, self.height, self.width), x.shape[-2:]) > 0


class Photograph:
    """A picture of any size that is restored by a network for images of one size.

    Args:
        operator: what was done to the picture, for one picture.
        y: the picture (1, ...), what the operator measured, in [0, 1].
        shape: the shape (C, h, w) of the network's images, or with ``tile`` of the tiles.
        sigma: the standard deviation of the noise in y.
        crop: the part that is resized to h x w: "center", the largest one in the middle; "celeba", the 140 x 140 pixels
            in the middle of an aligned image of CelebA; or (left, top, width, height) in pixels. None is the largest
            part with the aspect ratio of h x w that has all missing pixels, nearest to the middle. If there is no such
            part, or less than half of it is known, it is the whole picture with borders, which are missing too.
        tile: whether the network draws at the resolution of the picture, in tiles. None chooses tiles, without
            ``crop``, in two cases: y is smaller than the picture but at least as large as the network's images, as
            after ``Resize``; or the picture is more than four times as long as wide, relative to the network's images,
            and no part with their aspect ratio has all missing pixels.
        feather: over how many pixels around a hole the known pixels are blended with the restoration. They are then not
            kept bit for bit.

    Attributes:
        observation: what a sampler is given: that of an image of the network, or of a part of the picture with
            ``tile``; then the sampler needs the score ``Tiled(net, (h, w))``.
        shape: the shape (C, H, W) of the whole picture.
        box: the part (left, top, width, height) that is restored.
        tile: whether it is restored in tiles.
        resized: whether it is resized.

    Raises:
        TypeError: if ``feather`` is not an integer.
        ValueError: if y is not one picture in [0, 1] or does not fit the operator, nothing is known or nothing is
            missing, or the sizes, ``crop``, ``tile`` or ``feather`` do not fit.

    Example:
        >>> known = torch.ones(300, 400, dtype=torch.bool)
        >>> known[100:150, 100:200] = False
        >>> photo = Photograph(Mask(known), torch.rand(1, 3, 300, 400), (3, 64, 64))
        >>> photo.box, photo.observation.shape
        (Box(left=50, top=0, width=300, height=300), (3, 64, 64))
        >>> photo.restored(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 300, 400])
    """

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        shape: Sequence[int],
        *,
        sigma: float = 0.0,
        crop: Crop = None,
        tile: bool | None = None,
        feather: int = 0,
    ) -> None:
        if not isinstance(y, Tensor) or not y.is_floating_point() or len(y) != 1:
            raise ValueError(
                f"y must be one picture, a tensor (1, C, H, W), floating point in [0, 1], got {kind_of(y)}. Write "
                "y[None] for (C, H, W), and y / 255 for 8-bit values."
            )
        if len(shape) != 3:
            raise ValueError(f"shape must be that of the network's images, (C, h, w), got {tuple(shape)}.")
        operator = fitted(operator, y.shape[-2:])
        channels, *own = shape
        self._operator, self._y, self._own = operator, y, (own[0], own[1])
        self._feather = check_count("feather", feather, 0)
        self._pixels = _pixels(operator, y)
        size = _size(operator, y, shape) if self._pixels is None else self._pixels.values.shape[-2:]
        self.shape = (channels, int(size[0]), int(size[1]))
        if self._pixels is not None:
            self._pixels.check(operator)
            if not sigma:  # noise may leave the range
                check_range(self._pixels.values, "y")
        self.tile = crop is None and self._needs_tiles() if tile is None else tile
        self.resized = not self.tile and self.shape[1:] != self._own
        if self._feather and not (self.resized and self._pixels is not None and not self._pixels.luma):
            raise ValueError(
                f"{argument('feather')} is for a hole in a picture that is resized. Otherwise the restoration fits its "
                f"known pixels. Leave it out."
            )
        # The center of a picture of the network's size is the whole picture.
        if crop is not None and not self.resized and (self.tile or crop != "center"):
            raise ValueError(f"{argument('crop')} is for a picture that is resized, but this one is not. Leave it out.")
        whole = Box(0, 0, self.shape[2], self.shape[1])
        self.box = self._placed(crop) if self.resized else self._around(sigma) if self.tile else whole
        if self.resized:
            self.observation = self._small(sigma)
        elif self.box == whole:
            self.observation = Observation(operator, y, sigma)
        else:
            assert self._pixels is not None  # noqa: S101  (or the box is the whole picture)
            self.observation = self._pixels.part(self.box).observation(sigma)

    # -- The part that is restored ------------------------------------------------------------------------------------

    def _needs_tiles(self) -> bool:
        (height, width), (h, w) = self.shape[1:], self._own
        long = max(height * w, width * h) > _LONGEST * min(height * w, width * h)
        large = (height, width) != (h, w) and height >= h and width >= w
        return large and (self._is_fine() or (long and Box.largest(self.shape[1:], self._own, self._missing()) is None))

    def _is_fine(self) -> bool:
        """Whether y has fewer pixels than the picture, but at least as many as an image of the network."""
        size = self._y.shape[-2:]
        smaller = self._pixels is None and size != self.shape[1:]
        return smaller and size[0] >= self._own[0] and size[1] >= self._own[1]

    def _missing(self) -> Box:
        """The smallest box with all pixels that are not known completely."""
        if self._pixels is None or self._pixels.luma:
            return Box(0, 0, self.shape[2], self.shape[1])
        missing = ~self._pixels.known[0].all(0)
        rows, columns = missing.any(1).nonzero().flatten(), missing.any(0).nonzero().flatten()
        top, left = int(rows[0]), int(columns[0])
        return Box(left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)

    def _around(self, sigma: float) -> Box:
        """The part for tiles: all that a tile with a missing pixel near its middle sees."""
        (height, width), (h, w) = self.shape[1:], self._own
        if height < h or width < w:
            raise ValueError(
                f"a tile of {h}x{w} pixels is larger than the picture, which has {height}x{width}. Write a smaller "
                f"{argument('tile')}, or leave it out."
            )
        missing = self._missing()
        if sigma or missing == (0, 0, width, height):
            return Box(0, 0, width, height)
        left, right = _widened(missing.left, missing.width, w, width)
        top, bottom = _widened(missing.top, missing.height, h, height)
        return Box(left, top, right - left, bottom - top)

    def _placed(self, crop: Crop) -> Box:
        """The part that is resized."""
        (height, width), (h, w) = self.shape[1:], self._own
        if self._is_fine():
            raise ValueError(
                f"a network for {h}x{w} pixels cannot enlarge a picture of {self._y.shape[-2]}x{self._y.shape[-1]}, "
                f"which is resized. Write {argument('tile', True)}."
            )
        if max(height / h, width / w) < 1 / _SMALLEST:
            raise ValueError(f"a picture of {height}x{width} pixels is too small for a network for {h}x{w}.")
        if crop is None:
            box = Box.largest(self.shape[1:], self._own, self._missing())
            return self._padded() if box is None or self._known(box) < 0.5 else box
        if crop == "center":
            box = Box.largest(self.shape[1:], self._own)
        elif crop == "celeba":
            box = Box((width - CELEBA_SIDE) // 2, (height - CELEBA_SIDE) // 2, CELEBA_SIDE, CELEBA_SIDE)
        else:
            box = self._given(crop)
        assert box is not None  # noqa: S101
        if box.left < 0 or box.top < 0 or box.left + box.width > width or box.top + box.height > height:
            raise ValueError(
                f"{argument('crop')} must be inside of the picture, which has {height}x{width} pixels, got "
                f"{box.width}x{box.height} pixels at left {box.left}, top {box.top}."
            )
        if not self._can_be_cropped():
            raise ValueError(f"{argument('crop')} is not for {self._operator}. Crop the picture itself.")
        if self._pixels is not None and not self._pixels.luma:
            known = self._pixels.known[0].all(0)
            inside = torch.zeros_like(known)
            inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
            outside = int((~known & ~inside).sum())
            if outside:
                raise ValueError(
                    f"{outside} missing pixels are outside of {argument('crop')}. Move it, or leave it out."
                )
        return box

    def _can_be_cropped(self) -> bool:
        """Whether the measurement of a part of the picture is a part of y."""
        return self._pixels is not None or self._y.shape[-2:] == self.shape[1:]

    def _known(self, box: Box) -> float:
        """The share of a box that is known."""
        known = None if self._pixels is None else self._pixels.part(box).known
        return 1.0 if known is None else float(known.float().mean())

    def _given(self, crop: object) -> Box:
        four = isinstance(crop, Sequence) and len(crop) == 4 and all(isinstance(each, int) for each in crop)
        if not four or min(crop[2:]) < 1:  # type: ignore[index]
            raise ValueError(
                f"{argument('crop')} must be center, celeba or (left, top, width, height) in pixels, got {crop!r}."
            )
        box, (h, w) = Box(*crop), self._own  # type: ignore[misc]
        if abs(box.width * h - box.height * w) > max(h, w):
            raise ValueError(
                f"{argument('crop')} must have the aspect ratio of the network's images, {w}:{h}, got "
                f"{box.width}x{box.height} pixels."
            )
        return box

    def _padded(self) -> Box:
        """The whole picture with borders."""
        (height, width), (h, w) = self.shape[1:], self._own
        scale = max(width / w, height / h)
        wide, tall = max(width, round(scale * w)), max(height, round(scale * h))
        if max(wide / width, tall / height) > _LONGEST:
            part = f"Choose a part with {argument('crop')}" if self._can_be_cropped() else "Crop the picture itself"
            or_tile = f", or write {argument('tile', True)}" if height >= h and width >= w else ""
            raise ValueError(
                f"a picture of {height}x{width} pixels is too long to be resized to {h}x{w}. {part}{or_tile}."
            )
        return Box((width - wide) // 2, (height - tall) // 2, wide, tall)

    # -- To the size of the network and back --------------------------------------------------------------------------

    def _small(self, sigma: float) -> Observation:
        """The observation of an image of the network."""
        operator, y = self._operator, self._y
        kept = self._pixels is None and (y.shape[-2:] != self.shape[1:] or y.shape[1] not in (1, self.shape[0]))
        if sigma and not kept:
            sigma = sigma * _spread(self.box.width, self._own[1]) * _spread(self.box.height, self._own[0])
        if self._pixels is not None:
            return self._pixels.part(self.box).resized(self._own).observation(sigma)
        reduce, enlarge = self._reduce(), self._enlarge()
        if all(part.separable for part in operator.parts()):  # A U is a product of small matrices
            matrices = [operator.measure(u.T[:, None])[:, 0].T for u in enlarge.matrices]
            small: Operator = _Products(*matrices, look=lambda y: reduce.measure(operator.pseudo_inverse(y)))
        else:
            small = operator @ (_Products(*enlarge.matrices, look=reduce.measure) if kept else enlarge)
        return Observation(small, y, sigma) if kept else Observation(reduce @ small, reduce.measure(y), sigma)

    def _reduce(self) -> _Products:
        """R."""
        parts = ((weights(n, m, cubic=False), start, end) for start, n, end, m in self._axes())
        return _Products(*(pad(matrix, (start, end)) for matrix, start, end in parts))

    def _enlarge(self) -> _Products:
        """U z, and outside of the box its nearest value, so that what lies near the box is not black."""
        parts = ((weights(m, n), torch.arange(-start, n + end, device="cpu")) for start, n, end, m in self._axes())
        return _Products(*(matrix[places.clamp(0, len(matrix) - 1)] for matrix, places in parts))

    def _axes(self) -> Iterator[tuple[int, int, int, int]]:
        """For each axis the pixels before the box, in it and after it, and those of the network's images."""
        (height, width), box = self.shape[1:], self.box
        yield box.top, box.height, height - box.top - box.height, self._own[0]
        yield box.left, box.width, width - box.left - box.width, self._own[1]

    def restored(self, images: Tensor) -> Tensor:
        """The restored pictures.

        Args:
            images: the restorations (K, ...) of ``observation`` by a sampler.

        Returns:
            The pictures (K, C, H, W), in [0, 1] if the images are, on the device of y.
        """
        images = images.to(self._y)
        if self.resized:
            full = self._enlarge().measure(images)
        elif images.shape[-2:] == self.shape[1:]:
            return images
        else:
            full = self.box.back(images, self.shape[1:])
        if self._pixels is not None:
            return self._pixels.pasted(full, self.box, self._feather)
        lacking = self._operator.as_image(self._y - self._operator.measure(full))
        return torch.where(self.box.inside(full), full + lacking, self._operator.as_image(self._y)).clamp(0, 1)


class _Products(Operator):
    """The product with a matrix along the rows of images, and with another one along their columns.

    Attributes:
        matrices: both, (m, n) each.
        look: the function ``pseudo_inverse``, which makes an image to look at of a measurement.
    """

    linear = True

    def __init__(self, *matrices: Tensor, look: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        self.matrices, self.look = matrices, look

    def __repr__(self) -> str:
        return f"resizing from {' x '.join(str(len(each.T)) for each in self.matrices)} pixels"

    def __matmul__(self, inner: Operator) -> Operator:
        if not isinstance(inner, _Products):
            return super().__matmul__(inner)
        return _Products(*(a @ b for a, b in zip(self.matrices, inner.matrices, strict=True)))

    def measure(self, x: Tensor) -> Tensor:
        return products(x, self.matrices)

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        return products(y, [matrix.T for matrix in self.matrices])

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.look(y)

    def to(self, device: torch.device | str) -> _Products:
        return _Products(*(matrix.to(torch.float32).to(device) for matrix in self.matrices), look=self.look)

    def decomposition(self, x: Tensor) -> Decomposition:
        return decomposed(x, [torch.linalg.svd(matrix.cpu().double(), full_matrices=False) for matrix in self.matrices])


class _Pixels(NamedTuple):
    """The pixels of a picture.

    Attributes:
        values: (1, C, H, W), or (1, 1, H, W) for the luma of a color picture; 0 where they are not known.
        known: which values are known, bool, of the same shape.
        luma: whether the values are the luma of a color picture.
    """

    values: Tensor
    known: Tensor
    luma: bool

    def check(self, operator: Operator) -> None:
        """Raises ValueError if nothing is known, or nothing is missing."""
        if not bool(self.known.any()):
            raise ValueError(
                f"nothing of the picture is observed with {operator}. Mark less of it as missing: a mask is white "
                "where the picture is observed."
            )
        if not self.luma and bool(self.known.all()):
            raise ValueError(f"nothing of the picture is missing with {operator}, so that there is nothing to restore.")

    def part(self, box: Box) -> _Pixels:
        return _Pixels(box.of(self.values), box.of(self.known.float()) > 0, self.luma)

    def resized(self, size: Sequence[int]) -> _Pixels:
        """R y: each pixel is the mean of what is known of it, and is known if that is at least half of it."""
        share = resized(self.known.to(self.values), size)
        known = share > 0.5 - 1e-3
        if not bool(self.known.any()):
            raise ValueError("nothing of the part that is resized is observed. Mark less of it as missing.")
        if not bool(known.any()):
            raise ValueError(
                f"the known pixels are so far apart that no pixel is known at the size of the network. Write "
                f"{argument('tile', True)}."
            )
        mean = resized(self.values, size) / share.clamp(min=1e-3)
        return _Pixels(torch.where(known, mean, 0), known, self.luma)

    def observation(self, sigma: float) -> Observation:
        mask = Mask(self.known[0])
        if not self.luma:
            return Observation(mask, self.values, sigma)
        return Observation(Grayscale() if bool(self.known.all()) else Grayscale() @ mask, self.values, sigma)

    def pasted(self, full: Tensor, box: Box, feather: int) -> Tensor:
        """The pixels, with those of pictures (K, C, H, W) where they are not known, and with their colors for luma."""
        if not self.luma:
            mixed = torch.where(self.known, self.values, full).clamp(0, 1)
            share = _feathered(~self.known, feather)
            return mixed if share is None else torch.lerp(mixed, full.clamp(0, 1), share)
        own = Grayscale().measure(full)
        luma = torch.where(self.known, self.values, own.clamp(0, 1))
        color = torch.where(box.inside(full), full - own, 0)
        room = torch.where(color > 0, 1 - luma, luma) / color.abs().clamp(min=1e-6)
        return (luma + color * room.amin(1, keepdim=True).clamp(max=1)).clamp(0, 1)


def fitted(operator: Operator, size: Sequence[int]) -> Operator:
    """The operator for a picture of a size, (height, width): masks of another size, but its aspect ratio, are resized.

    Raises:
        ValueError: if a mask has another aspect ratio.
    """
    parts = operator.parts()
    if not all(isinstance(part, Mask | Grayscale) for part in parts):
        return operator
    new = [part.of_size(size[0], size[1]) if isinstance(part, Mask) else part for part in parts]
    same = all(one is other for one, other in zip(parts, new, strict=True))
    return operator if same else functools.reduce(matmul, new)


def _size(operator: Operator, y: Tensor, shape: Sequence[int]) -> Sequence[int]:
    """The size of the picture that was measured; that of the network's images or of y if the operator does not say."""
    found = operator.sample_shape(y)
    if found is None:
        fits = Observation(operator, y).fits
        found = next((tuple(each) for each in (shape, (shape[0], *y.shape[2:])) if fits(each)), None)
    if found is None:
        raise ValueError(
            f"the size of the picture that {operator!r} measured is not known. Define its method sample_shape."
        )
    return found[-2:]


def _pixels(operator: Operator, y: Tensor) -> _Pixels | None:
    """The pixels that y has; None if the operator does more than hiding pixels and colors."""
    known, luma = torch.ones_like(y), False
    for part in operator.parts():
        if isinstance(part, Grayscale):
            luma = True
        elif isinstance(part, Mask | Uncrop):
            y, known = part.pseudo_inverse(y), part.pseudo_inverse(known)
        else:
            return None
    return _Pixels(y, known.expand_as(y) > 0, luma)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """R x, images (N, C, H, W) of another size, (height, width)."""
    return products(x, [weights(n, m, cubic=False) for n, m in zip(x.shape[-2:], size, strict=True)])


def _spread(n: int, m: int) -> float:
    """The standard deviation of independent noise of 1 on n pixels that are resized to m."""
    return float(weights(n, m, cubic=False).square().sum(1).mean().sqrt())


def _widened(start: int, length: int, side: int, whole: int) -> tuple[int, int]:
    """A part of an axis, widened by half of a tile on both sides and to at least one tile, within the whole axis."""
    low, high = max(0, start - side // 2), min(whole, start + length + side // 2)
    return max(0, min(low, high - side)), min(whole, max(high, low + side))


def _feathered(missing: Tensor, feather: int) -> Tensor | None:
    """The share of the restoration: from 1 at missing pixels to 0 at known ones that are farther than ``feather``."""
    if not feather:
        return None
    share = near = missing.any(1, keepdim=True).float()
    for _ in range(feather):
        near = max_pool2d(near, 3, 1, 1)
        share = share + near
    return share / (feather + 1)
