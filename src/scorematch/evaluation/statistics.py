"""Statistics of the features of a data set, in files: the mean, the covariance, and optionally the features.

A file is an ``.npz`` without pickles, with the arrays

==================  ==================================================================
mu, sigma           the mean (D,) and the covariance (D, D), float64
n                   the number of images
extractor           the name of the extractor
fingerprint         its fingerprint
preprocessing       its preprocessing
features            all features (n, D), optional
==================  ==================================================================

pytorch-fid can read these files, and files of pytorch-fid and ADM (guided-diffusion) with the arrays ``mu`` and
``sigma`` can be read here. They do not name their extractor, which is Inception: they are read as statistics of the
extractor that the caller passes. Files that name another extractor than the caller's are an error.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_count
from scorematch.core.messages import about, plain
from scorematch.core.processes import gathered, group_process
from scorematch.core.records import hash_of_bytes
from scorematch.data.arrays import array_names, read_arrays, write_arrays
from scorematch.data.images import open_images
from scorematch.evaluation.accumulate import Moments, Rows
from scorematch.evaluation.features import Extractor
from scorematch.evaluation.rows import check_features, different_dimensions, is_symmetric


@dataclass(frozen=True, eq=False)
class Statistics:
    """The mean and the covariance of the features of a data set, and the extractor that computed them.

    Args:
        mean: (D,), float64.
        covariance: (D, D), float64.
        n: the number of images; None if it is not known.
        extractor: the name of the extractor.
        fingerprint: the fingerprint of the extractor.
        preprocessing: the preprocessing of the extractor.
        features: all features (n, D), float32 or float64, which all metrics except the Fréchet distance need; or None.

    Raises:
        ValueError: if a shape is wrong, a value is not finite, or the covariance is not symmetric.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None
    extractor: str
    fingerprint: str
    preprocessing: str
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or not len(self.mean) or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"the mean must be (D,) and the covariance (D, D), D at least 1, got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}."
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the mean and the covariance must be finite, got NaN or infinity.")
        if not is_symmetric(self.covariance):
            raise ValueError("the covariance must be symmetric.")
        if self.features is not None and self.features.shape != (self.n, len(self.mean)):
            raise ValueError(
                f"the features must be (n, D) = ({self.n}, {len(self.mean)}), got {tuple(self.features.shape)}."
            )

    @classmethod
    def of(cls, features: Moments | Tensor, extractor: Extractor) -> Statistics:
        """Computes the statistics of features.

        Args:
            features: the moments of the features; or all features (n, D), which the statistics then keep.
            extractor: the extractor that computed the features.

        Raises:
            ValueError: if there are fewer than two features, or the extractor has no fingerprint.
        """
        moments = features if isinstance(features, Moments) else Moments.of([features])
        kept = features.detach().cpu() if isinstance(features, Tensor) else None
        return cls(moments.mean.cpu(), moments.covariance.cpu(), moments.n, *_identity(extractor), features=kept)

    def check(self, extractor: Extractor) -> None:
        """Checks that an extractor computed the statistics.

        Raises:
            ValueError: if the name, the fingerprint or the preprocessing differs, or it has no fingerprint.
        """
        own = (self.extractor, self.fingerprint, self.preprocessing)
        for what, mine, other in zip(("name", "fingerprint", "preprocessing"), own, _identity(extractor), strict=True):
            if mine != other:
                raise ValueError(
                    f"the statistics were computed by the extractor {plain(self.extractor)} with the {what} "
                    f"{mine[:200]!r}, but the extractor {extractor.name} has the {what} {other!r}. "
                    "Use the same extractor for both."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to an ``.npz`` file, atomically. Missing folders are created."""
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise ValueError(f"the name of a file of statistics must end in .npz, got {path}.")
        values = {
            "mu": self.mean.cpu(),
            "sigma": self.covariance.cpu(),
            "extractor": self.extractor,
            "fingerprint": self.fingerprint,
            "preprocessing": self.preprocessing,
            "n": self.n,
            "features": None if self.features is None else self.features.cpu(),
        }
        write_arrays(path, {name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str], extractor: Extractor) -> Statistics:
        """Reads statistics from a file.

        Args:
            path: an ``.npz`` file of this package, of pytorch-fid or of ADM, or another with arrays ``mu`` and
                ``sigma``.
            extractor: the extractor that must have computed the statistics. A file that does not name its extractor
                is read as statistics of this one, with ``n`` None.

        Raises:
            OSError: if the file does not exist or cannot be read.
            ValueError: if it is not a file of statistics, or another extractor computed them.
        """
        path = Path(path).expanduser()
        names = ("mu", "sigma", "n", "extractor", "fingerprint", "preprocessing", "features")
        arrays = read_arrays(path, names)
        absent = [name for name in ("mu", "sigma") if name not in arrays]
        if absent:
            raise ValueError(f"{path} is not a file of statistics: it has no array {' and no array '.join(absent)}.")
        with about(path):
            result = cls(*_content(arrays, extractor))
            result.check(extractor)
        return result


def _identity(extractor: Extractor) -> tuple[str, str, str]:
    if extractor.fingerprint is None:
        raise ValueError(
            f"statistics in files need an extractor with a fingerprint, but {extractor.name} has none. Write "
            "Extractor(function, name, fingerprint)."
        )
    return extractor.name, extractor.fingerprint, extractor.preprocessing


def _content(arrays: dict[str, np.ndarray], extractor: Extractor) -> tuple[Any, ...]:
    """The arguments of ``Statistics`` from the arrays of a file."""
    for name in ("mu", "sigma", "features"):
        if name in arrays and arrays[name].dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64, got {arrays[name].dtype}.")
    mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    if "extractor" not in arrays:
        return mean, covariance, None, *_identity(extractor)
    for name, kinds in {"fingerprint": "U", "preprocessing": "U", "extractor": "U", "n": "iu"}.items():
        if name in arrays and (arrays[name].ndim or arrays[name].dtype.kind not in kinds):
            found = f"{arrays[name].dtype} of shape {arrays[name].shape}"
            raise ValueError(f"{name} must be {'a string' if kinds == 'U' else 'an integer'}, got {found}.")
        if name not in arrays and name != "n":
            raise ValueError(f"{name} is missing.")
    n = int(arrays["n"]) if "n" in arrays else None
    if n is not None and n < 2:
        raise ValueError(f"n must be at least 2, got {n}.")
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    identity = (str(arrays[name]) for name in ("extractor", "fingerprint", "preprocessing"))
    return mean, covariance, n, *identity, features


def is_statistics_file(source: Any) -> bool:
    """Whether a source is an ``.npz`` file of statistics, not of images: it has an array ``mu`` or ``sigma``."""
    if not isinstance(source, str | os.PathLike) or Path(source).suffix != ".npz":
        return False
    try:
        return not {"mu", "sigma"}.isdisjoint(array_names(Path(source).expanduser()))
    except (OSError, ValueError):  # absent or damaged, which is reported when it is read
        return False


# -- Of a data set ----------------------------------------------------------------------------------------------------


def statistics_of(
    data: Any,
    extractor: Extractor,
    *,
    keep_features: bool = False,
    cache: bool | str | os.PathLike[str] = False,
    batch_size: int = 256,
    progress: bool = True,
) -> Statistics:
    """Computes the statistics of a data set, or reads them from a cache.

    Under ``torch.distributed`` every process must call it; each computes a share of the features.

    Args:
        data: an ``ImageData``, or what ``scorematch.data.open_images`` takes: a folder, arrays, an ``.npz`` file, a
            data set. To choose the size or the number of channels, call ``open_images`` first.
        extractor: the extractor, with a fingerprint.
        keep_features: whether to keep all features, which all metrics except the Fréchet distance need.
        cache: a folder. If it has statistics of the same images by the same extractor, they are read; otherwise they
            are written to it, with a warning if that fails. True is the folder in the environment variable
            SCOREMATCH_CACHE, or else ``~/.cache/scorematch``; False uses no cache.
        batch_size: the number of images that are read at once, at least 1.
        progress: whether to show a progress bar.

    Returns:
        The statistics of all images.

    Raises:
        OSError, TypeError, ValueError: as ``open_images``; also a ValueError if there are fewer than two images, or
            ``batch_size`` is below 1.
    """
    batch_size = check_count("batch_size", batch_size)
    images = open_images(data, progress=progress)
    path = stored = None
    if cache is not False:
        folder = cache_folder() if cache is True else Path(cache).expanduser()
        # The name has a hash of all pixels, which are read when first hashed.
        key = repr((images.content, *_identity(extractor), keep_features))
        path = folder / f"{hash_of_bytes(key.encode())}.npz"
        with suppress(OSError, ValueError):  # there is no such file, or it is damaged
            stored = Statistics.load(path, extractor)
    # All processes must make the same choice: if one reads the file, the others would wait for it in a collective call.
    if all(gathered(stored is not None)) and stored is not None:
        return stored
    rank, processes = group_process()
    found: Moments | Rows = Rows() if keep_features else Moments()
    starts = range(rank * batch_size, len(images), processes * batch_size)
    for start in tqdm(starts, "features", unit="batch", leave=False, disable=not progress or rank > 0):
        batch, _ = images.read(range(start, min(start + batch_size, len(images))))
        found.update(extractor(batch))
    result = Statistics.of(found.gather() if isinstance(found, Rows) else found.reduce(), extractor)
    if path is not None:
        try:
            result.save(path)
        except OSError as error:
            warnings.warn(
                f"the statistics could not be cached in {path.parent}: {error.strerror or error}.", stacklevel=2
            )
    return result


def cache_folder() -> Path:
    """The default cache: ``$SCOREMATCH_CACHE``, else ``$XDG_CACHE_HOME/scorematch``, else ``~/.cache/scorematch``.

    Raises:
        FileNotFoundError: if there is neither one of these variables nor a home folder, as in some containers.
    """
    named = os.environ.get("SCOREMATCH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named) if named else Path(home or Path.home() / ".cache") / "scorematch"
    except RuntimeError as error:
        raise FileNotFoundError(
            "there is no home folder for the cache of statistics. Set the environment variable SCOREMATCH_CACHE to a "
            f"folder, or pass {argument('cache', False)}."
        ) from error


Features = Tensor | Statistics


def pair_of(features: Features, reference: Features) -> tuple[Tensor, Tensor]:
    """Checks two sets of features, and moves the second to the device of the first."""
    a, b = features_of(features, "features"), features_of(reference, "reference")
    if a.shape[1] != b.shape[1]:
        raise different_dimensions(a.shape[1], b.shape[1])
    return a, b.to(a.device)


def features_of(features: Features, name: str) -> Tensor:
    """Checks features, or takes those of statistics."""
    if isinstance(features, Statistics):
        if features.features is None:
            raise ValueError(
                f"{name} must be features, but the statistics have none. Compute them with statistics_of(..., "
                "keep_features=True)."
            )
        features = features.features
    return check_features(features, name)
