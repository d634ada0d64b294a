"""The measured samplers of ``tune``, in memory and in the file tune.json, from which an interrupted call continues."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorematch.core.messages import about, plain
from scorematch.core.processes import this_process
from scorematch.core.records import as_stored, differences, hash_of, read_record, refuse, write_record
from scorematch.core.schema import Field, check
from scorematch.evaluation.estimate import Estimate, Figures, as_dicts
from scorematch.sampling import SamplerSettings

TABLE = "tune.json"
_RECORD: Mapping[str, Field] = {
    "format_version": Field(int, required=True, choices=(1,)),
    "settings": Field(dict, required=True),
    "rows": Field(list, required=True, each=Field(dict)),
}
_ROW: Mapping[str, Field] = {
    "settings": Field(dict, required=True),
    "sampler": Field(str, required=True),
    "calls": Field(int, required=True, low=1, high=2**31),
    "seconds": Field(float, required=True, low=0),
    "figures": Field(dict, required=True),
}
_ESTIMATE: Mapping[str, Field] = {
    "value": Field(float, required=True),
    "error": Field(float, required=True, optional=True),
}


@dataclass(frozen=True)
class MeasuredSampler:
    """A sampler and the figures of its images: a row of the table.

    Attributes:
        sampler: the sampler in words.
        calls: the number of network calls per image.
        seconds: the time of sampling and measuring.
        figures: the figures of its images, from ``Evaluator.measure``.
        settings: its settings, or None if the sampler was not created from settings.
    """

    sampler: str
    calls: int
    seconds: float
    figures: Figures
    settings: SamplerSettings | None = None


class MeasuredTable:
    """The measured samplers, which are also stored in tune.json if a folder is given.

    Args:
        folder: the folder, or None.
        settings: everything that determines the figures.
        figures: the names of the figures that each of them must have, by their source.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], figures: Mapping[str, Collection[str]]
    ) -> None:
        self._path = None if folder is None else folder / TABLE
        self._settings = as_stored(settings)
        self.rows: dict[SamplerSettings | None, MeasuredSampler] = {}
        stored = None if self._path is None else read_record(self._path, _RECORD)
        if stored is None:
            return
        differing = differences({key: stored["settings"].get(key) for key in self._settings}, self._settings)
        advice = "Pass the same settings to continue, or another folder."
        refuse(f"{self._path} was measured with other settings", differing, advice)
        for i, row in enumerate(stored["rows"]):
            found = _read_row(row, figures, f"{self._path}: rows[{i}]")
            self.rows[found.settings] = found

    def add(self, row: MeasuredSampler) -> None:
        """Adds a row, and writes all rows to tune.json."""
        self.rows[row.settings] = row
        if self._path is not None and this_process().rank == 0:
            content = {
                "format_version": 1,
                "settings": self._settings,
                "hash": hash_of(self._settings, size=8),
                "rows": [_write_row(each) for each in self.rows.values()],
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_record(self._path, content)


def _write_row(row: MeasuredSampler) -> dict[str, Any]:
    return {
        "settings": None if row.settings is None else row.settings.to_dict(),
        "sampler": row.sampler,
        "calls": row.calls,
        "seconds": row.seconds,
        "figures": as_dicts(row.figures),
    }


def _read_row(row: Mapping[str, Any], needed: Mapping[str, Collection[str]], where: str) -> MeasuredSampler:
    check(row, _ROW, where)
    check(row["figures"], dict.fromkeys(needed, Field(dict, required=True)), f"{where}: figures")
    figures: Figures = {}
    for source, found in row["figures"].items():
        place = f"{where}: figures: {plain(source)}"
        check(found, dict.fromkeys(needed.get(source, ()), Field(dict, required=True)), place)
        for name, figure in found.items():
            check(figure, _ESTIMATE, f"{place}: {plain(name)}", closed=True)
        figures[source] = {name: Estimate(**figure) for name, figure in found.items()}
    with about(where):
        settings = SamplerSettings.from_dict(row["settings"])
    return MeasuredSampler(row["sampler"], row["calls"], row["seconds"], figures, settings)
