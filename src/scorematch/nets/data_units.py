"""The units of the data of a network, which ``ScoreNet`` inherits: a range, or the mean and deviation of each channel.

The network works in units of its own; the preconditioning converts (``scorematch.nets.precondition``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from scorematch.core.batches import check_data
from scorematch.core.conditions import Condition
from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.schema import Field
from scorematch.data.array_data import ArrayData
from scorematch.data.images import Data
from scorematch.data.memory import to_array
from scorematch.data.moments import Moments, moments
from scorematch.nets.blocks import VectorEmbedding
from scorematch.nets.precondition import ROWS, Preconditioning, Units
from scorematch.noise import NoiseSchedule

Range = tuple[float, float]
_ENDS = Field(list, low=2, high=2, each=Field(float))
_NUMBERS = Field(list, low=1, each=Field(float))


class DataUnits:
    """The range and the units of the data."""

    backbone: nn.Module
    schedule: NoiseSchedule
    precondition: str
    sample_shape: tuple[int, ...] | None
    axes: tuple[str, ...] | None
    sampler_settings: Any
    _value_range: Range | None
    _units: Units | None

    @property
    def preconditioning(self) -> Preconditioning:
        """The row of the preconditioning table with the values of this network."""
        raise NotImplementedError

    @property
    def conditioning(self) -> Condition | None:
        """The condition that the network takes."""
        raise NotImplementedError

    @property
    def value_range(self) -> Range | None:
        """(low, high) of the data, or None for data without a fixed range.

        If another range is assigned, and the preconditioning maps the range to [-1, 1], the noise levels are multiplied
        by the ratio of the widths of the ranges, and the sampler settings are converted: it is the same network in
        other units.
        """
        return self._value_range

    @value_range.setter
    def value_range(self, value_range: Range | None) -> None:
        ends = native(value_range)
        if ends is not None and not (_ENDS.fits(ends) and ends[0] < ends[1]):
            raise ValueError(
                f"value_range must be (low, high), finite with low < high, or None for data without a fixed range, got "
                f"{value_range!r}."
            )
        before: Preconditioning | None = self.preconditioning if hasattr(self, "_units") else None
        self._value_range = None if ends is None else (float(ends[0]), float(ends[1]))
        if before is not None and ends is not None:
            (k, middle), (new_k, new_middle) = before.units, self.preconditioning.units
            scale, shift = k / new_k, new_middle - k / new_k * middle
            self.schedule = self.schedule if scale == 1 else NoiseSchedule(self.schedule.sigmas * scale)
            if self.sampler_settings is not None and (scale, shift) != (1, 0):
                self.sampler_settings = self.sampler_settings.in_units(scale, shift)

    @property
    def units(self) -> Units | None:
        """The mean and the standard deviation of each channel of data without a range, or None; see ``fit_units``."""
        return self._units

    @units.setter
    def units(self, units: Units | None) -> None:
        if units is not None:
            if not ROWS[self.precondition].centered:
                raise ValueError(f"units need a preconditioning such as 'karras', got {self.precondition!r}.")
            units = _checked(Units(*units))
            units = units if units.image is None else units._replace(image=_checked(units.image))
            self.value_range = None
        self._units = units

    def fit_units(self, data: Tensor | Data, condition: Tensor | None = None, *, progress: bool = False) -> None:
        """Measures the mean and the standard deviation of each channel of data that are not images.

        They are stored as ``units``, and are applied inside the network, so that x, sigma and samples are in the units
        of the data. The noise of a channel is sigma times the ratio of its standard deviation to the geometric mean of
        all of them, to which the noise levels are scaled. A ``value_range`` is kept if all data are in it.
        ``train`` calls this method for new networks; call it once before a training loop of your own.

        Args:
            data: (N, C, ...) or (N, D), floating point, all data or a large random part; or the result of
                ``open_arrays``. For (N, D) each of the D values is a channel.
            condition: the vectors (N, K) of a network with ``condition_features``, or the images (N, K, ...) of one
                with ``condition_channels``, which are standardized too. Those of ``open_arrays`` need not be passed.
            progress: whether to show a progress bar.

        Raises:
            TypeError: if data is not a floating-point tensor.
            ValueError: if it has NaN or infinite values, or a channel that is constant.
        """
        if isinstance(data, Tensor):
            if not data.is_floating_point():
                raise TypeError(f"data must be floating point, got {data.dtype}. Write data.float().")
            check_data(data, "data")
            data = ArrayData(to_array(data), condition, "data")
        elif not hasattr(data, "read"):
            raise TypeError(
                "data must be a floating-point tensor (N, ...) or the result of open_arrays, got "
                f"{type(data).__name__}. Write torch.as_tensor(data)."
            )
        own = self.sample_shape
        if own is not None and (len(data.shape), data.shape[0]) != (len(own), own[0]):
            raise ValueError(f"data must have samples like those of the network, {own}, got {tuple(data.shape)}.")
        takes = self.conditioning
        found, of_condition = moments(data, takes=takes, progress=progress)
        if (
            isinstance(condition, Tensor)
            and condition.is_floating_point()
            and not (of_condition or (takes and takes.encoder))
        ):
            raise TypeError("this network takes no vector as its condition, and no image. Leave out condition.")
        self.take_moments(found, of_condition)

    def take_moments(self, found: Moments, of_condition: Mapping[str, Moments]) -> None:
        """Stores the moments of data and of their conditions, as ``fit_units`` does."""
        vectors, image = of_condition.get("features"), of_condition.get("image")
        if vectors is not None and self._vectors is not None:
            self._vectors.mean.copy_(vectors.mean)
            self._vectors.std.copy_(vectors.std)
        expected, own, ends = 0.5 / self.preconditioning.units[0], self.schedule, self.value_range
        units = Units(*_numbers(found), len(found.std) > 1, None if image is None else Units(*_numbers(image)))
        self.units, ratio = units, units.typical / expected
        self.schedule = NoiseSchedule(own.sigmas * ratio)
        if ends is not None and ends[0] <= float(found.low.min()) and float(found.high.max()) <= ends[1]:
            self._value_range = ends

    @property
    def _vectors(self) -> VectorEmbedding | None:
        modules = self.backbone.modules()
        return next((module for module in modules if isinstance(module, VectorEmbedding)), None)

    def take_units(self, config: Mapping[str, Any]) -> None:
        """Takes the units, the range, the noise levels and the names of the axes of a configuration with units."""
        if "units" in config:
            self.units = Units.from_dict(config["units"])
            self._value_range = None if config["value_range"] is None else tuple(config["value_range"])
            self.schedule = NoiseSchedule.from_dict(config["schedule"])
            self.axes = tuple(config["axes"]) if "axes" in config else None


def _numbers(found: Moments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(found.mean.tolist()), tuple(found.std.tolist())


def _checked(units: Units) -> Units:
    mean, std = (native(list(part)) for part in units[:2])
    if not (_NUMBERS.fits(mean) and _NUMBERS.fits(std) and len(mean) == len(std) and min(std) > 0):
        raise ValueError(
            "units must have a mean and a positive standard deviation for each channel, finite numbers, got "
            f"{quote((mean, std))}."
        )
    return units._replace(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
