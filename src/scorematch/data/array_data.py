"""Training data that are not pictures: ``open_arrays`` opens signals, fields, volumes or vectors as an ``ArrayData``.

It accepts

- an array or a tensor (N, C, ...) or (N, D), floating point, of any range; alone, as a pair (x, condition), or in a
  mapping with the names "x" and "condition". A condition is a vector for each sample, float (N, K), or an image with
  the sides of x, float (N, K, ...), or a class, (N,), or a dict of these, {"class": ..., "features": ..., "image":
  ...}; beside another condition a mapping may have classes as "label", and an image as "image". For a network with an
  encoder of its condition, float (N, ...) of any shape;
- the file of such an array, ``.npy``; a file with several, ``.npz``; an HDF5 file (extra ``arrays``), which may be
  that of netCDF4; or a folder of zarr (extra ``arrays``). The values of ``.npy``, of uncompressed ``.npz``, HDF5 and
  zarr stay on the disk, and are read batch by batch; conditions are read at once;
- a dataset of ``h5py``, an array of zarr, or any object with ``shape``, ``dtype`` and ``x[i]``;
- a ``torch.utils.data.Dataset`` with a length, whose items are x (C, ...) or pairs (x, condition).

Values are read as float32 in the units that they have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.core.batches import is_outside
from scorematch.core.conditions import Parts, rows_of
from scorematch.core.messages import about, few, plain, quote, reason
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.data.arrays import array_names, map_array
from scorematch.data.memory import class_numbers, to_array
from scorematch.data.pictures import is_picture

_COMPARED = 16  # the samples of an array on the disk that identify it
_MOST_GRAY = 255
_CONDITIONS = ("condition", "label", "labels")  # names of conditions, the preferred first


class ArrayData:
    """Training data that are not pictures, created by ``open_arrays``. ``len(data)`` is the number of samples.

    Attributes:
        shape: the shape of one sample, (C, ...) or (D,).
        features: K, the number of values of the condition of a sample; 0 without vectors.
        channels: the number of channels of an image with the sides of x as the condition; 0 without.
        axes: the names of the axes of x, the first of which is that of the samples; None if they have none.
        classes: the names of the classes, or None without classes.
        fingerprint: a hash that identifies the data: of the values in memory, or of the shape and of 16 samples of an
            array on the disk.
    """

    axes: tuple[str, ...] | None = None

    def __init__(self, x: Any, condition: Any = None, name: str = "x") -> None:
        self.name, self._x, self._n, self._gaps = name, x, int(x.shape[0]), gaps_of(x)
        self.shape = tuple(map(int, x.shape[1:]))
        self.features = self.channels = 0
        self.classes: tuple[str, ...] | None = None
        self._condition: Tensor | Parts | None = None
        if isinstance(condition, Mapping):
            self._condition = self._parts(condition)
        elif condition is not None:
            self._condition = self._checked(to_array(condition))
        if isinstance(x, np.ndarray) and not isinstance(x, np.memmap):
            self._x = np.ascontiguousarray(to_array(x), np.float32)
            check_finite(torch.from_numpy(self._x), name)
            identity: Any = hash_of_bytes(self._x.data)
        else:
            rows = sorted({round(k * (self._n - 1) / (_COMPARED - 1)) for k in range(_COMPARED)})
            identity = [self._n, *(hash_of_bytes(np.ascontiguousarray(self._row(i)).tobytes()) for i in rows)]
        parts = self._condition.values() if isinstance(self._condition, dict) else [self._condition]
        for values in parts:
            if values is not None:
                of_condition = values.tolist() if values.ndim == 1 else hash_of_bytes(values.numpy().data)
                identity = (identity, of_condition)
        # That of ``open_images`` for arrays in memory.
        self.fingerprint = hash_of([identity, self.shape, "center", self.classes is not None])

    def _parts(self, condition: Mapping[str, Any]) -> Parts:
        """The parts of a dict."""
        found = {}
        for name, values in condition.items():
            array = to_array(values)
            if name not in (("features", "image") if np.issubdtype(array.dtype, np.floating) else ("class",)):
                raise ValueError(
                    f'the condition of {self.name} must be {{"class": integers (N,), "features": floating-point '
                    f'vectors (N, K), "image": floating-point (N, K, ...)}}, got {quote(name)} of {array.dtype}.'
                )
            found[name] = self._checked(array, image=name == "image")
        return found

    def _checked(self, values: np.ndarray, *, image: bool = False) -> Tensor:
        if not np.issubdtype(values.dtype, np.floating):
            numbers, self.classes = class_numbers(values, self._n, self.name)
            return torch.from_numpy(numbers)
        if values.ndim < 2 or len(values) != self._n or 0 in values.shape:
            hint = " Write condition[:, None] for one number for each sample." if values.shape == (self._n,) else ""
            raise ValueError(
                f"the condition of {self.name} must be a vector for each of {self._n:,} samples, ({self._n}, K), got "
                f"shape {values.shape}.{hint}"
            )
        vectors = torch.from_numpy(np.array(values, np.float32))
        check_finite(vectors, f"the condition of {self.name}", data=False)
        if has_sides(vectors, self.shape):
            self.channels = values.shape[1]
        elif image:
            sides = ", ".join(map(str, self.shape[1:]))
            raise ValueError(
                f"the image as the condition of {self.name} must have the sides of the data, ({self._n}, K, {sides}), "
                f"got shape {values.shape}."
            )
        else:
            self.features = math.prod(values.shape[1:])
        return vectors

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"ArrayData({self._n:,} x {self.shape} from {self.name})"

    def _row(self, i: int) -> np.ndarray:
        return to_array(self._x[i])

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | Parts | None]:
        """Reads samples by index.

        Args:
            indices: n indices from 0 to ``len(self) - 1``; they may repeat.

        Returns:
            A tuple (x, condition): x (n, ...), float32; and the condition, float32 (n, K), int64 (n,) for classes, a
            dict of both, or None.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if isinstance(self._x, np.ndarray):
            x = self._x[rows]
        elif len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            x = to_array(self._x[int(rows[0]) : int(rows[-1]) + 1])
        else:
            x = np.stack([self._row(i) for i in rows.tolist()])
        condition = rows_of(self._condition, torch.from_numpy(rows))
        return torch.from_numpy(with_nan(np.ascontiguousarray(x, np.float32), self._gaps)), condition


class _ItemData(ArrayData):
    """A ``torch`` Dataset, whose items are x or (x, condition)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.name, self._n = dataset, f"the {type(dataset).__name__}", len(dataset)
        x, condition = self.read([0])
        self.shape, self.classes, self.features, self.channels = tuple(x.shape[1:]), None, 0, 0
        for part in condition.values() if isinstance(condition, dict) else [condition]:
            if part is not None and has_sides(part, self.shape):
                self.channels = part.shape[1]
            elif part is not None and part.ndim > 1:
                self.features = math.prod(part.shape[1:])
        described = [type(dataset).__name__, self._n, self.shape, self.features]
        self.fingerprint = hash_of([*described, self.channels] if self.channels else described)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | Parts | None]:
        items = [self.dataset[int(i)] for i in indices]
        pairs = [item if isinstance(item, tuple | list) else (item, None) for item in items]
        x, first = self._stacked("x", [pair[0] for pair in pairs]).float(), pairs[0][1]
        if isinstance(first, Mapping):
            return x, {name: self._stacked(name, [pair[1][name] for pair in pairs]) for name in first}
        return x, None if first is None else self._stacked("the condition", [pair[1] for pair in pairs])

    def _stacked(self, part: str, values: Sequence[Any]) -> Tensor:
        arrays = list(map(to_array, values))
        if arrays[0].dtype.kind not in "biuf":
            raise TypeError(
                f"{part} of an item of {self.name} must be numbers, got {values[0]!r}. Number the classes from 0."
            )
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"{part} of all items of {self.name} must have one shape, got {shapes[0]} and {shapes[1]}."
            )
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked.float() if stacked.is_floating_point() else stacked.long()


def has_sides(condition: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a condition (N, K, ...) is an image with the sides of samples of a shape (C, ...)."""
    return condition.is_floating_point() and len(shape) > 1 and condition.shape[2:] == shape[1:]


_LEARN_FROM_GAPS = (
    " To learn from incomplete data, in which NaN is a gap, write in Python train_from_observations(net, "
    "Observation.with_gaps(x, sigma), folder), and on the command line --sigma."
)


def check_finite(x: Tensor, name: str, first: int | Tensor = 0, *, data: bool = True) -> None:
    """Raises ValueError if samples (n, ...) have NaN or infinite values.

    ``first`` is the number of the first sample, or has the numbers of all. ``data`` says whether they are training
    data, which may also have gaps.
    """
    wrong = ~torch.isfinite(x)
    if bool(wrong.any()):
        row, *others = wrong.nonzero()[0].tolist()
        number = first + row if isinstance(first, int) else int(first[row])
        where = ", ".join(map(str, (number, *others)))
        samples = int(wrong.flatten(1).any(1).sum())
        raise ValueError(
            f"{name} must be finite, but {samples} of {len(x):,} samples have NaN or infinite values, the first at "
            f"[{where}]. Leave these samples out.{_LEARN_FROM_GAPS if data else ''}"
        )


# -- Opening ----------------------------------------------------------------------------------------------------------


def open_arrays(data: Any, *, key: str | None = None, condition_key: str | None = None) -> ArrayData:
    """Opens training data that are not pictures; ``train`` takes what this function takes.

    Args:
        data: one of the kinds listed in the module docstring.
        key: the name of the array in a file or a mapping; None is "x", or the only floating-point array.
        condition_key: the name of the conditions; None is "condition", if there is one.

    Returns:
        The data.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: without ``h5py`` or zarr, for their files.
        TypeError: if the values are not floating point.
        ValueError: if an array has another shape, NaN or infinite values.

    Example:
        >>> data = open_arrays((250 + 30 * torch.randn(100, 2, 64), torch.rand(100, 3)))
        >>> data, data.features
        (ArrayData(100 x (2, 64) from x), 3)
    """
    opened = find_arrays(data, key=key, condition_key=condition_key, pictures=False)
    if opened is None:
        if isinstance(data, str | os.PathLike) and not Path(data).expanduser().exists():
            raise FileNotFoundError(f"{data} does not exist.")
        raise TypeError(
            f"data must be an array (N, C, ...) or (N, D), a pair (x, condition), the file of one, or a Dataset, got "
            f"{type(data).__name__}."
        )
    return opened


def find_arrays(
    data: Any, *, key: str | None = None, condition_key: str | None = None, pictures: bool = True
) -> ArrayData | None:
    """Opens data that are not pictures; None for pictures, and for anything that ``open_images`` opens.

    Args:
        data: as for ``open_arrays``.
        key: as for ``open_arrays``.
        condition_key: as for ``open_arrays``.
        pictures: whether data may be pictures: uint8, or gray or RGB images in [0, 1] without vectors.
    """
    if isinstance(data, ArrayData):
        return data
    if not isinstance(data, str | os.PathLike):
        return _of_values(data, key, condition_key, pictures, "x")
    path = Path(data).expanduser()
    opener = FILES.get(path.suffix.lower())
    if opener is None or not path.exists():
        return None
    opened = opener(path)
    with about(path):
        found = _of_values(opened, key, condition_key, pictures, "x")
    if found is None and isinstance(opened, Mapping) and not isinstance(opened, Archive):  # which may have pictures
        pictures_of = _names(opened, key, condition_key)
        if pictures_of is not None:
            raise ValueError(
                f"{path} has uint8 images, {pictures_of[0]!r}, which are read from a folder or an .npz file. Write "
                'np.savez("data.npz", x=array).'
            )
        names = few((repr(plain(each)) for each in opened), 10)
        raise ValueError(
            f"{path} must have a floating-point array x, or only one of data (N, C, ...), got {names}. Write "
            "open_arrays(path, key=...), or on the command line --image-key, with the name of one."
        )
    return found


def _of_values(data: Any, key: str | None, condition_key: str | None, pictures: bool, name: str) -> ArrayData | None:
    condition, axes = None, None
    if isinstance(data, Mapping):
        found = _names(data, key, condition_key)
        if found is None:
            return None
        name, of_parts = found
        given = {part: with_gaps(data[each]) for part, each in of_parts.items()}
        condition = given if len(given) > 1 else next(iter(given.values()), None)
        axes = data["axes"][...] if "axes" in list(data) else None
        data = data[name]
    elif isinstance(data, tuple) and len(data) == 2:
        data, condition = data
    data = data.to_numpy() if hasattr(data, "to_numpy") else data  # of pandas, polars, xarray
    if not _is_array(data):
        return _of_items(data, pictures)
    dtype, shape = _type_of(data), tuple(data.shape)
    parts = condition.values() if isinstance(condition, Mapping) else [] if condition is None else [condition]
    vectors = any(np.issubdtype(to_array(part).dtype, np.floating) for part in parts)
    if pictures and not vectors and (dtype == "uint8" or _are_images(data, shape)):
        return None
    if "float" not in dtype:
        hint = (
            "x.astype(np.float32) for data that are not pictures, x.astype(np.uint8) for pictures with values up to "
            "255, or x / 65535 for 16-bit pictures"
        )
        hint = "np.concatenate([x.real, x.imag], 1)" if "complex" in dtype else hint
        packed = "scale_factor" in getattr(data, "attrs", ())
        hint = "x * scale_factor + add_offset, the numbers that the file packs" if packed else hint
        raise TypeError(f"{name} must be floating point, got {dtype}. Write {hint}.")
    if len(shape) < 2 or 0 in shape:
        hint = " Write x[:, None] for one number for each sample." if len(shape) == 1 else ""
        raise ValueError(f"{name} must be data (N, C, ...) or (N, D) with at least one sample, got {shape}.{hint}")
    opened = ArrayData(to_array(data) if isinstance(data, Tensor) else data, condition, name)
    names = [str(each) for each in (_axes(data) if axes is None else axes)]
    opened.axes = tuple(names) if len(names) == len(shape) and all(names) else None
    return opened


def _axes(x: Any) -> list[Any]:
    """The names of the axes of an array of HDF5 or zarr, as netCDF and xarray write them; empty without."""
    if hasattr(x, "dims"):  # the label of an axis, or the place of its scale, whose name may be a sentence of netCDF
        return [axis.label or (axis[0].name.rpartition("/")[2] if len(axis) else "") for axis in x.dims]
    names = getattr(getattr(x, "metadata", None), "dimension_names", None) or dict(getattr(x, "attrs", {})).get(
        "_ARRAY_DIMENSIONS"
    )
    return [each or "" for each in names or ()]


def _type_of(x: Any) -> str:
    """The type of the values of an array or a tensor, such as float32, without the byte order."""
    dtype = getattr(x, "dtype", None)
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def gaps_of(x: Any) -> list[np.float32]:
    """The values of an array that stand for missing ones, as netCDF states them."""
    attributes = getattr(x, "attrs", {})
    found = [attributes[name] for name in ("_FillValue", "missing_value") if name in attributes]
    return [np.float32(each) for value in found if not isinstance(value, str) for each in np.ravel(value)]


def with_nan(x: np.ndarray, gaps: Sequence[np.float32]) -> np.ndarray:
    """An array of float32 with NaN in place of the values of ``gaps_of``."""
    return np.where(np.isin(x, gaps), np.float32(np.nan), x) if gaps else x


def with_gaps(values: Any) -> Any:
    """The values of an array; those of floating point as float32, with NaN for missing ones."""
    gaps, values = gaps_of(values), values[...]
    return with_nan(values.astype(np.float32), gaps) if gaps and values.dtype.kind == "f" else values


def _is_array(data: Any) -> bool:
    """Whether something is an array in memory, or on the disk as those of h5py and zarr."""
    return all(hasattr(data, name) for name in ("shape", "dtype", "__getitem__"))


def _are_images(x: Any, shape: tuple[int, ...]) -> bool:
    """Whether x are gray or RGB images in memory, in [0, 1] or, by mistake, with the integers from 0 to 255."""
    if not isinstance(x, Tensor | np.ndarray) or not is_picture(shape[1:]) or 0 in shape:
        return False
    low, high = float(x.min()), float(x.max())
    if not is_outside(low, high, (0, 1)):
        return True
    values = to_array(x)
    return low >= 0 and high <= _MOST_GRAY and bool((values == values.round()).all())


def _of_items(dataset: Any, pictures: bool) -> ArrayData | None:
    """A Dataset whose items are arrays that are not pictures, or None."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or hasattr(dataset, "column_names"):
        return None
    if isinstance(dataset, str | tuple | list | Mapping) or len(dataset) == 0:
        return None
    item = dataset[0]
    x, condition = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    if not _is_array(x) or "float" not in _type_of(x):
        return None
    parts = condition.values() if isinstance(condition, Mapping) else [condition]
    vectors = any("float" in _type_of(part) for part in parts)
    return None if pictures and not vectors and _are_images(x, (1, *x.shape)) else _ItemData(dataset)


def _names(arrays: Mapping[str, Any], key: str | None, condition_key: str | None) -> tuple[str, dict[str, str]] | None:
    """The names of the data, and of the parts of their condition, in a mapping; None if it has no data."""
    names = list(arrays)
    for given in (key, condition_key):
        if given is not None and given not in names:
            listed = few((repr(plain(each)) for each in names), 10)
            raise ValueError(f"there is no array {given!r}; the names are {listed}.")
    conditions = [each for each in _CONDITIONS if each in names] if condition_key is None else [condition_key]
    found = ["x"] if "x" in names else []
    found = found or [each for each in names if each not in conditions and len(getattr(arrays[each], "shape", ())) > 1]
    found = [each for each in found if "/" not in each] or found  # those of no group
    found = found if key is None else [key]
    if len(found) != 1:
        return None
    sides, parts = getattr(arrays[found[0]], "shape", ())[2:], dict[str, str]()
    for each in conditions:  # the first, and the classes beside it
        values = arrays[each]
        part = "class" if "float" not in _type_of(values) else "features"
        if not parts or part == "class":
            parts.setdefault("image" if part == "features" and values.shape[2:] == sides != () else part, each)
    if parts and condition_key is None and "image" in names and found != ["image"]:
        parts.setdefault("image", "image")
    return found[0], parts


# -- Files ------------------------------------------------------------------------------------------------------------


class Archive(Mapping[str, np.ndarray]):
    """The arrays of an ``.npz`` file, which are read when they are used."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, array_names(path)

    def __getitem__(self, name: str) -> np.ndarray:
        return map_array(self.path, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file: {error}") from error


def _hdf5(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'reading {path} needs h5py: pip install "scorematch[arrays]".') from error
    try:
        return _arrays(h5py.File(path, "r"))
    except OSError as error:
        raise OSError(f"{path} cannot be read as an HDF5 file: {error}") from error


def _zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f'reading {path} needs zarr: pip install "scorematch[arrays]".') from error
    try:
        opened: Any = zarr.open(str(path), mode="r")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a folder of zarr: {reason(error)}.") from error
    return opened if _is_array(opened) else _arrays(opened)


def _arrays(group: Any, prefix: str = "", above: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The arrays of HDF5 or zarr by their names, those of a group as "group/x".

    A link of HDF5 to one of the groups ``above``, in which the group is, is left out.
    """
    found: dict[str, Any] = {}
    for name in group:
        each = group.get(name)  # None for a link to nothing
        if _is_array(each):
            found[prefix + name] = each
        elif hasattr(each, "keys") and each not in (*above, group):
            found |= _arrays(each, f"{prefix}{name}/", (*above, group))
    return found


FILES: Mapping[str, Callable[[Path], Any]] = {
    ".npy": _npy,
    ".npz": Archive,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".nc": _hdf5,
    ".zarr": _zarr,
}
