r"""``tune``: measures sampler settings on a network, and stores the best ones with it.

All settings draw images from the same seeds, so that their differences have smaller errors than their figures. The best
settings are those with the smallest distance to the reference. Settings whose distances differ by less than the errors
are equally good: choose the one with the fewest network calls. ``calls=`` limits their number.

Data that are not pictures are compared without features. A network that was trained to restore restores degraded images
instead, with ``operators``, and the best settings are those with the smallest error. For several operators it is the
geometric mean of their errors, which gives all operators the same weight.

The folder of a result contains the network with its new ``sampler_settings``, the table in ``tune.json``, and a section
with the table in the card, ``README.md``. The first settings are those with the fewest network calls within 2 % of the
smallest distance. The others are the best of each kind of sampler, by the same rule, and the ladder: rows that are
better than all with fewer calls. The same call continues an interrupted one.
"""

from __future__ import annotations

import copy
import math
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_count, check_integer
from scorematch.core.charts import table as markdown_table
from scorematch.core.conditions import takes_image
from scorematch.core.files import check_own, delete_unfinished, write_whole
from scorematch.core.json_files import native
from scorematch.core.messages import about, plain
from scorematch.core.processes import local_device, process_group, this_process
from scorematch.core.provenance import identity
from scorematch.core.records import as_stored, differences, hash_of, read_record, refuse, write_record
from scorematch.core.schema import Field, check
from scorematch.core.scores import device_of
from scorematch.data.pictures import Crop
from scorematch.evaluation.arrays import VALUES, reference_arrays
from scorematch.evaluation.criteria import Distance, Kind, distance_of, of_arrays, of_pictures, of_restorations
from scorematch.evaluation.estimate import IMAGES, Estimate, Figures, as_dicts
from scorematch.evaluation.features import Extractor
from scorematch.evaluation.restored_images import single_operator
from scorematch.guidance import GuidedScore
from scorematch.pretrained.configuration import CONFIG_FILE
from scorematch.pretrained.model_card import model_card
from scorematch.restoration.operator import Operator
from scorematch.sampling import AnnealedLangevinSampler, Sampler, SamplerSettings, recommended_sampler
from scorematch.sampling.bulk import Classes, description_of
from scorematch.sampling.origin import origin_of
from scorematch.score import ScoreNet

_BEGIN, _END = "<!-- sampler settings, by scorematch tune -->", "<!-- end of sampler settings -->"
TABLE = "tune.json"
_TRADE = 0.02  # a distance that is larger by this share is as good, if it takes fewer calls
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
        settings: its settings.
    """

    sampler: str
    calls: int
    seconds: float
    figures: Figures
    settings: SamplerSettings


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
        self.rows: dict[SamplerSettings, MeasuredSampler] = {}
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
        "settings": row.settings.to_dict(),
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


@dataclass(frozen=True)
class Tuning:
    """The result of ``tune``.

    Attributes:
        rows: one for each of the settings.
        held_out: the figures of held-out images, or None.
        source: the name of the extractor; "restoration" for the error of pixels.
        by: the name of the distance.
        operators: the names of the operators; empty if images were drawn and not restored.
    """

    rows: Sequence[MeasuredSampler]
    held_out: Figures | None
    source: str
    by: str
    operators: Sequence[str] = ()

    @property
    def best(self) -> MeasuredSampler:
        """The row with the smallest distance; of equal ones, that with the fewest network calls."""
        return min(self.rows, key=lambda row: (self.distance(row), row.calls))

    @property
    def ladder(self) -> list[MeasuredSampler]:
        """The rows that are better than all with fewer network calls; the fewest first, and the best last."""
        found: list[MeasuredSampler] = []
        for row in sorted(self.rows, key=lambda row: (row.calls, self.distance(row))):
            if not found or self.distance(row) < self.distance(found[-1]):
                found.append(row)
        return found

    @property
    def recommended(self) -> MeasuredSampler:
        """The row with the fewest network calls within 2 % of the smallest distance."""
        return self._fewest(self.rows)

    def stored(self) -> SamplerSettings:
        """The settings for the network: the recommended ones; the others are the best of each kind, and the ladder."""
        kinds: dict[str, list[MeasuredSampler]] = {}
        for row in self.rows:
            kinds.setdefault(row.settings.sampler, []).append(row)
        rows = [self.recommended, *map(self._fewest, kinds.values()), *self.ladder]
        first, *others = dict.fromkeys(row.settings.alone() for row in rows)
        return first.alone(others)

    def _fewest(self, rows: Sequence[MeasuredSampler]) -> MeasuredSampler:
        least = min(map(self.distance, rows))
        near = [row for row in rows if self.distance(row) <= least + _TRADE * abs(least)]
        return min(near, key=lambda row: (row.calls, self.distance(row)))

    def distance(self, row: MeasuredSampler) -> float:
        """The distance of a row; for several operators the geometric mean of their distances."""
        values = [row.figures[source][self.by].value for source in self.operators or [self.source]]
        return math.prod(max(value, 0) for value in values) ** (1 / len(values)) if self.operators else values[0]

    @property
    def what(self) -> str:
        """What was measured: "images", or "data" that are not pictures."""
        return "data" if self.source == VALUES else "images"

    def table(self) -> str:
        """The rows as a table in Markdown, the recommended one in bold."""
        pixels = ["std", "variation"] if IMAGES in self.rows[0].figures else []
        restored = [*self.operators, *(["mean"] if len(self.operators) > 1 else [])]
        measured = [f"{name}: {self.by}" for name in restored] or [f"{self.by}, {self.source}", *pixels]
        lines, recommended = [], self.recommended
        for row in self.rows:
            cells = [str(row.settings), str(row.calls), *self._cells(row.figures)]
            cells += [f"{self.distance(row):.4g}"] if len(self.operators) > 1 else []
            cells += [f"{row.seconds:.0f}"]
            lines.append([f"**{cell}**" for cell in cells] if row is recommended else cells)
        if self.held_out is not None:
            lines.append([f"held-out {self.what}", "", *self._cells(self.held_out), ""])
        return markdown_table(["sampler settings", "calls", *measured, "seconds"], lines)

    def _cells(self, figures: Figures) -> list[str]:
        if self.operators:
            return [str(figures[name][self.by]) for name in self.operators]
        distance = figures[self.source].get(self.by, "")  # held-out images may be too few for it
        pixels = [figures[IMAGES][name] for name in ("std", "variation")] if IMAGES in figures else []
        return [str(figure) for figure in (distance, *pixels)]


def tune(
    net: ScoreNet | GuidedScore | str | os.PathLike[str],
    reference: Any,
    *,
    settings: Sequence[SamplerSettings] | None = None,
    calls: int = 250,
    n: int = 1000,
    features: str | Extractor = "inception",
    by: Distance | None = None,
    held_out: Any = None,
    operators: str | Operator | Sequence[str | Operator] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: str | os.PathLike[str] | None = None,
    classes: Classes = None,
    n_classes: int | None = None,
    crop: Crop = "center",
    cache: bool | str | os.PathLike[str] = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tuning:
    """Measures many sampler settings on a network, and stores the best with it.

    Under ``torchrun`` or ``accelerate launch`` every process must call it.

    Args:
        net: the network, or its name or folder, as for ``ScoreNet.from_pretrained``. It is not changed. With guidance,
            such as ``classifier_free(net, 2.0)``, the settings are measured with it, and the network is stored.
        reference: the real images or other data, as for ``evaluate``; with ``operators`` the clean images, of which n
            are degraded, or all if there are fewer.
        settings: the settings to measure; None is ``settings_table(net, calls)``.
        calls: the largest number of network calls per image; settings with more are left out.
        n: the number of images for each of the settings.
        features: the extractor: a name from ``EXTRACTORS``, or an ``Extractor``. For images unlike photographs, such as
            digits, a classifier of their classes is best.
        by: the distance that the best settings minimize. None is "frechet"; "kernel" needs n of at least 1,000. With
            ``operators`` None is "rmse", the root mean square error, which prefers smooth restorations; "perceptual" is
            the mean distance of the features of a restoration and its original, and "frechet" that of both sets. For
            data that are not pictures None is "energy"; "sliced-wasserstein", "spectrum" and "frechet" are measured on
            the values, too.
        held_out: real images that are not in the reference, for comparison, as for ``evaluate``.
        operators: for a network that was trained to restore, which needs them: one or more operators or their texts,
            as for ``evaluate_restoration``.
        seed: the seed of all images.
        batch_size: the number of images that go through the network at once.
        out: the folder for the network with the best settings, and the table. It may be the folder of the network
            itself. None writes nothing.

        Rarely needed:

        classes: for class-conditional networks: a class, "random" or "cycle", as for ``bulk_samples``.
        n_classes: the number of classes for "random" and "cycle".
        crop: how real images are cropped before they are resized, as for ``open_images``.
        cache: the folder for the statistics of the reference, as for ``evaluate``.
        device: the device of the network and of an extractor that is given by name; None is that of the network, or the
            CPU.
        progress: whether to show progress bars.

    Returns:
        The figures of all settings, and the best.

    Raises:
        ImportError, OSError, TypeError, ValueError: if an input does not exist, is damaged or does not fit the others;
            or if ``out`` has another network, or a table that was measured with other settings.
        RuntimeError: if a sample has NaN or infinite values.
    """
    n, seed, batch_size = check_integer("n", n), check_integer("seed", seed), check_count("batch_size", batch_size)
    classes, n_classes = native(classes), native(n_classes)
    given = [operators] if isinstance(operators, str | Operator) else list(operators or ())
    named, listed = list(map(str, given)), list(map(single_operator, given))
    if len(set(named)) < len(named):
        raise ValueError(f"operators must differ in their names, got {', '.join(named)}.")
    guidance = origin_of(net)["guidance"] if isinstance(net, GuidedScore) else None
    for_samples = {"held_out": held_out, "classes": classes, "n_classes": n_classes, "guidance": guidance}
    for name, value in for_samples.items():
        if named and value is not None:
            raise ValueError(f"{name} is for samples. Leave it out with operators.")
    if isinstance(net, str | os.PathLike):
        net = ScoreNet.from_pretrained(net).to(local_device("cpu" if device is None else device))
    arrays, network = None, _network(net)
    if not named and isinstance(features, str) and features in ("inception", VALUES):
        arrays = reference_arrays(reference, network, named=features == VALUES)
    kind: Kind = "restorations" if named else "pictures" if arrays is None else "data that are not pictures"
    distance = distance_of(by, kind)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_folder(folder, net)
    shape = net.sample_shape
    if shape is None or (arrays is None and len(shape) != 3):
        raise ValueError(f"the network must draw images (C, H, W), but its sample_shape is {shape}.")
    samplers = samplers_within(net, settings_table(net, calls) if settings is None else list(settings), calls)
    if takes_image(net) and not named and arrays is None:
        raise ValueError("the network restores images: name the operators to measure, such as operators=['gray'].")
    if named and not takes_image(net):
        raise ValueError(
            "operators are for networks that were trained to restore, and this one draws: its settings are those for "
            "drawing. Write evaluate_restoration(ODESampler(net, levels=25, restore='auto'), ...) to compare."
        )
    device = local_device(device_of(net) if device is None else device)
    drawing: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "classes": classes, "n_classes": n_classes}
    options = {"features": features, "shape": shape, "crop": crop, "cache": cache, "device": device}
    options["progress"] = progress
    with process_group(device):
        if named:
            degraded = dict(zip(named, listed, strict=True))
            criterion = of_restorations(reference, distance, n, drawing, degraded, options)
        elif arrays is not None:
            criterion = of_arrays(arrays, distance, net, n, drawing, held_out, progress)
        else:
            criterion = of_pictures(reference, distance, n, drawing, held_out, options)
        context = {"n": n, "seed": seed, "batch_size": batch_size, "condition": classes, "classes": n_classes}
        context["network"] = description_of(next(iter(samplers.values())))["network"]
        kept = MeasuredTable(folder, {**context, **criterion.settings}, criterion.names)
        for each, sampler in tqdm(samplers.items(), "settings", disable=not progress or this_process().rank > 0):
            if each in kept.rows:
                continue
            begin, name = time.perf_counter(), repr(sampler)
            found = criterion.measure(sampler)
            kept.add(MeasuredSampler(name, len(sampler), time.perf_counter() - begin, found, each))
        result = Tuning([kept.rows[each] for each in samplers], criterion.held_out, criterion.source, distance, named)
        if folder is not None and this_process().rank == 0:
            _store(net, folder, result, criterion.n)
            delete_unfinished(folder)
    return result


def samplers_within(
    net: ScoreNet | GuidedScore, settings: Sequence[SamplerSettings], calls: int
) -> dict[SamplerSettings, Sampler]:
    """The samplers with at most ``calls`` network calls, by their settings."""
    samplers = {each: sampler for each in settings if len(sampler := recommended_sampler(net, each)) <= calls}
    if not samplers:
        fewest = min(len(recommended_sampler(net, each)) for each in settings or settings_table(net))
        raise ValueError(
            f"no settings have at most {calls} network calls per image: the fewest are {fewest}. Write "
            f"{argument('calls', fewest)}."
        )
    return samplers


def settings_table(net: ScoreNet | GuidedScore, calls: int = 250) -> list[SamplerSettings]:
    """Settings that are worth measuring on any network, with at most ``calls`` network calls per image.

    The first are the network's own settings and their alternatives, if it has any. The others are the probability flow
    with Heun's method and DPM-Solver++; consistent sampling on several numbers of levels, with steps of 0.36 and
    0.5 sigma^2 and of (1 - r^p) sigma^2 for p = 1.1, 1.5 and 2, where r is the smallest ratio of a level to the one
    before; ancestral sampling with the variances "large" and "small"; and predictor-corrector sampling.

    Args:
        net: the network.
        calls: the largest number of network calls per image.

    Raises:
        ValueError: if the network has one noise level.

    Example:
        >>> net = ScoreNet.from_pretrained("mnist")
        >>> settings_table(net, calls=20)[0]
        SamplerSettings('ode', levels=18, method='dpm-solver++')
    """
    if len(net.schedule) == 1:
        raise ValueError("the network has one noise level, so there are no settings to compare.")
    own = net.sampler_settings
    listed = [] if own is None else [own.alone(), *own.alternatives]
    listed += [SamplerSettings("ode", levels=levels, method="heun") for levels in (10, 18, 36)]
    listed += [SamplerSettings("ode", levels=levels, method="dpm-solver++") for levels in (18, 36, 72)]
    for levels in (50, 100, 250):
        schedule = AnnealedLangevinSampler(net, levels=levels, consistent=True).schedule
        ratio = schedule.smallest_ratio
        steps = [1 - ratio**1.1, 1 - ratio**1.5, 1 - ratio**2, *(a for a in (0.36, 0.5) if a >= 1 - ratio)]
        listed += [
            SamplerSettings(levels=levels, step_size=float(f"{step * schedule.sigma_min**2:.5g}"), consistent=True)
            for step in steps
        ]
    for variance in ("large", "small"):
        listed += [SamplerSettings("ancestral", levels=levels, variance=variance) for levels in (50, 100)]
    listed += [SamplerSettings("predictor-corrector", levels=levels) for levels in (50, 100)]
    return [each for each in dict.fromkeys(listed) if len(recommended_sampler(net, each)) <= calls]


# -- The folder -------------------------------------------------------------------------------------------------------


def _network(score: object) -> ScoreNet:
    """The network of a score with guidance, or the network itself."""
    while isinstance(score, GuidedScore):
        score = score.net
    if not isinstance(score, ScoreNet):
        raise TypeError(f"net must be a ScoreNet, or one with guidance, got {type(score).__name__}.")
    return score


def check_folder(folder: Path, net: ScoreNet | GuidedScore) -> None:
    """Checks that a folder has no other network, unless an earlier call wrote it; see ``check_own``."""
    net = _network(net)
    backbone = copy.deepcopy(net.backbone) if net.config["family"] == "custom" else None
    try:
        same = identity(ScoreNet.from_pretrained(folder, backbone=backbone)) == identity(net)
    except (OSError, ValueError):
        same = False
    if not same:
        check_own(folder, TABLE, [CONFIG_FILE])


def _as_name(folder: PurePath) -> str:
    """A folder as the name of a network in code, where the backslashes of Windows would be escapes."""
    name = folder.as_posix()
    return name if "/" in name else f"./{name}"


def _store(score: ScoreNet | GuidedScore, folder: Path, result: Tuning, n: int) -> None:
    """Saves the network with the best settings, and writes its card."""
    net = copy.copy(_network(score))  # with the same weights
    net.sampler_settings = result.stored()
    net.save_pretrained(folder)
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")  # keeps bytes in another encoding
    else:
        count = sum(parameter.numel() for parameter in net.parameters())
        name, takes = _as_name(folder), net.conditioning
        text = model_card(name, net.config, count, conditioning=takes, license=None, datasets=None)
    measured, guidance = f"{n:,} {result.what} for each row", origin_of(score)["guidance"]
    section = (
        f"{_BEGIN}\n## Sampler settings\n\nMeasured with `scorematch tune` on {measured}, all from the same seeds"
        f"{f', with {guidance}' if guidance else ''}. The row in bold has the fewest network calls within 2 % of the "
        "smallest distance; its settings are those of the network. The best of each kind, and those that are better "
        "than all with fewer calls, are stored too.\n\n"
        f"{result.table()}{_END}"
    )
    old = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    text = old.sub(lambda _: section, text) if old.search(text) else f"{text.rstrip()}\n\n{section}\n"
    write_whole(card, text.encode(errors="surrogateescape"))
