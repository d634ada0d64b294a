"""Sampling into a folder: only missing batches are drawn, and every existing file is complete."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.conditions import Parts
from scorematch.core.files import delete_unfinished, write_whole
from scorematch.core.messages import reason
from scorematch.core.precision import device_name
from scorematch.core.processes import CHECK_SECONDS, Process, SharedFolder, checked_process
from scorematch.core.records import as_stored, differences, refuse, write_record
from scorematch.core.scores import attribute, device_of
from scorematch.data.pictures import is_picture
from scorematch.data.samples import (
    FORMATS,
    IMAGES,
    LABELS_FILE,
    METADATA_FILE,
    Batch,
    Format,
    ranges,
    read_metadata,
    stem,
)
from scorematch.sampling.bulk import Classes, Job
from scorematch.sampling.sampler import Sampler

__all__ = ["sample_to"]


_FIRST = ("network", "sampler", "sampler.name")  # the settings that an error lists before others


def sample_to(
    sampler: Sampler,
    folder: str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    classes: Classes = None,
    n_classes: int | None = None,
    condition: Tensor | Parts | None = None,
    shape: Sequence[int] | None = None,
    format: Format = "png",  # noqa: A002  (Pillow's word)
    about: Mapping[str, str] | None = None,
    process: tuple[int, int] | None = None,
    progress: bool = True,
) -> Path:
    """Draws many samples into a folder; a call with the same arguments continues an interrupted one.

    Only missing batches are drawn, and a call with a larger ``n`` adds images. The files are the same as after a single
    uninterrupted call; for that an incomplete last batch is drawn again. Under ``torchrun`` or ``accelerate launch``
    each process draws its own batches into the same folder, which must be on a disk that all processes
    share; otherwise an error is raised after two minutes. At the end each process waits until all images exist; if one
    of them dies, these programs end the others.

    If the folder has samples of another score, an error is raised. A score of your own is compared by its public
    attributes, and a plain function by its code. An object with private state, in attributes that begin with an
    underscore, should define ``definition()``, which returns what determines the score.

    Args:
        sampler: the sampler. Its network must draw images (C, H, W) in [0, 1] with 1 or 3 channels, unless ``format``
            is "float".
        folder: the folder to write, new, empty, or with samples of the same settings; see ``scorematch.data.samples``.
        n: the number of images, over all processes together.
        seed: the seed of all images.
        batch_size: the number of images that go through the network at once.
        classes: the class of all images, "random" or "cycle", as for ``bulk_samples``.
        n_classes: the number of classes for "random" and "cycle", as for ``bulk_samples``.
        condition: the conditions of the samples, as for ``bulk_samples``.
        shape: the shape of one sample, for a score without ``sample_shape``.
        format: "png", one file per image; "npz", one file per batch, with 8 bits per value; or "float", one ``.npz``
            file per batch with the values as they are, for samples of any shape and range.
        about: remarks to store in samples.json, such as the command and the name of the network.
        process: whose batches to draw, as (rank, world size), for processes that are started at different times; a
            call then returns as soon as its own batches are drawn. None is this process.
        progress: whether the first process shows a progress bar. It counts the images of all processes.

    Returns:
        The folder with the image files, ``folder / "images"``.

    Raises:
        ImportError: if ``format`` is "png" and Pillow is not installed.
        TypeError, ValueError: if arguments do not fit together, or the folder contains other files or samples with
            other settings.
        RuntimeError: if an image has NaN or infinite values.
        OSError: if a file cannot be written, or the processes do not share the folder. All existing files are complete.
        SystemExit: after SIGTERM, with status 143. All existing files are complete.
    """
    job = Job(
        sampler,
        seed=seed,
        batch_size=batch_size,
        classes=classes,
        n_classes=n_classes,
        condition=condition,
        shape=shape,
    )
    return SampleFolder(job, folder, n, format=format, about=about).fill(process=process, progress=progress)


class SampleFolder:
    """A folder of samples, possibly incomplete, for ``sample_to``.

    The arguments of ``Job`` and of this class are those of ``sample_to``, as are the errors. They are checked at once;
    nothing is written before ``fill``.

    Attributes:
        missing: the number of images that ``fill`` has to draw, over all processes together, in whole batches.
        found: the number of images that exist.
    """

    def __init__(
        self,
        job: Job,
        folder: str | os.PathLike[str],
        n: int,
        *,
        format: Format = "png",  # noqa: A002  (Pillow's word)
        about: Mapping[str, str] | None = None,
    ) -> None:
        n = check_count("n", n)
        job.check(n)
        check_choice("format", format, FORMATS)
        value_range = attribute(job.sampler.net, "value_range")
        pictures = format != "float"
        if pictures and not is_picture(job.shape):
            raise ValueError(
                f"the samples must be images (C, H, W) with 1 or 3 channels, but their shape is {job.shape}. Write "
                f"{argument('format', 'float')}."
            )
        if pictures and value_range is not None and tuple(value_range) != (0, 1):
            raise ValueError(
                f"the samples must be images in [0, 1], but the network's value_range is {value_range}. Write "
                f"{argument('format', 'float')}."
            )
        self._job, self._folder, self._n, self._format = job, Path(folder).expanduser(), n, format
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file. Pass a folder.")
        self._files = FORMATS[format](self._folder / IMAGES, attribute(job.sampler.net, "axes"))
        self._files.check()
        self._about = dict(about or {})
        self._stored = self._check_folder()
        incomplete = [indices for indices in self._ranges(Process(0, 1)) if not self._files.exist(indices)]
        self.missing = sum(map(len, incomplete))
        self.found = n - self.missing + sum(map(self._files.count, incomplete))

    def fill(self, *, process: tuple[int, int] | None = None, progress: bool = True) -> Path:
        """Draws the missing images; arguments, result and errors as for ``sample_to``."""
        own = checked_process(process)
        self._begin(main=own.rank == 0)
        shared = SharedFolder(self._folder, own if process is None else Process(0, 1))
        every = [Process(rank, own.world_size) for rank in range(own.world_size)]
        count = _Count([self._ranges(each) for each in every], self._files.exist)
        shown = progress and own.rank == 0
        with (
            _exit_after_sigterm(),
            tqdm(total=self._n, initial=count.new(), desc="sampling", unit="img", disable=not shown) as bar,
        ):
            missing = (indices for indices in self._ranges(own) if not self._files.exist(indices))
            for batch in self._job.draw(missing):
                self._write(batch)
                bar.update(count.new())
                shared.check()
            self._check_written(own)
            shared.waiting(count.remaining, progress=True)
            while process is None and not count.complete:
                shared.check()
                time.sleep(CHECK_SECONDS)
                new = count.new()
                bar.update(new)
                shared.waiting(count.remaining, progress=new > 0)
        if count.complete:
            for folder in (self._folder, self._folder / IMAGES):
                delete_unfinished(folder)
        return self._folder / IMAGES

    def _ranges(self, process: Process) -> Iterator[range]:
        return ranges(self._n, self._job.batch_size, process)

    def _write(self, batch: Batch) -> None:
        try:
            self._files.write(batch)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the images from {batch.indices.start} on could not be written to {self._folder} "
                f"({error.strerror or error}); all existing files are complete. Correct the cause, such as a "
                "full disk, and start again with the same arguments",
            ) from error
        except ValueError as error:  # of a score without a value range, to which samples would be clamped
            raise ValueError(
                f"the samples are not images in [0, 1] ({reason(error).partition('. ')[0]}). Write score.value_range = "
                "(0, 1) to clamp them to this range, or use bulk_samples."
            ) from error

    def _check_written(self, process: Process) -> None:
        """Checks that the images of this process still exist. No process would draw them again."""
        lost = next((indices for indices in self._ranges(process) if not self._files.exist(indices)), None)
        if lost is not None:
            raise FileNotFoundError(
                f"the images from {lost.start} on were written to {self._folder} and have been removed since. Start "
                "again with the same arguments, in a new folder if other files are missing too."
            )

    # -- samples.json -------------------------------------------------------------------------------------------------

    def _metadata(self) -> dict[str, Any]:
        return as_stored(
            {
                "format_version": 1,
                "n": self._n,
                "settings": {**self._job.settings(), "format": self._format},
                "versions": {"torch": torch.__version__, "device": device_name(device_of(self._job.sampler.net))},
                "about": self._about,
            }
        )

    def _check_folder(self) -> dict[str, Any] | None:
        """Returns the metadata of the existing samples, or None if there are no samples yet.

        Raises:
            ValueError: if the folder has other files, samples with other settings, or more than n samples.
        """
        folder = self._folder
        # Other processes may be writing to the folder. They write samples.json first, so it is read last.
        found = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
        begun = IMAGES in found and any(path.name[0] != "." for path in (folder / IMAGES).iterdir())
        stored = read_metadata(folder)
        if stored is None:
            if found:
                raise ValueError(f"{folder} has other files, such as {min(found)}. Pass a new or an empty folder.")
            return None
        if not begun:
            return None
        refuse(
            f"{folder} has samples with other settings",
            differences(_named(stored["settings"]), _named(self._metadata()["settings"]), first=_FIRST),
            f"Pass those settings, which are in {METADATA_FILE}, to continue, or another folder.",
        )
        if stored["n"] > self._n:
            raise ValueError(
                f"{folder} has {stored['n']} samples, more than n={self._n}. Pass n={stored['n']} or more, or another "
                "folder."
            )
        return stored

    def _begin(self, *, main: bool) -> None:
        """Writes all files except the images. All processes write the same samples.json, and none waits."""
        now, before = self._metadata(), self._stored
        changed = [] if before is None else differences(before["versions"], now["versions"])
        if main and changed:
            warnings.warn(
                f"{self._folder} continues with another version or device, which changes rounding: "
                f"{'; '.join(changed)}.",
                stacklevel=4,
            )
        if before is None or before["n"] < self._n:
            write_record(self._folder / METADATA_FILE, now)
        (self._folder / IMAGES).mkdir(exist_ok=True)
        if main and self._format == "png" and (classes := self._job.classes_of(range(self._n))) is not None:
            rows = (f"{stem(i)}.png,{one}\n" for i, one in enumerate(classes.tolist()))
            write_whole(self._folder / LABELS_FILE, "".join(["file,class\n", *rows]).encode())


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of samples.json by the names of the arguments, for messages."""
    return {{"condition": "classes", "classes": "n_classes"}.get(key, key): value for key, value in settings.items()}


class _Count:
    """Counts the existing images of all processes.

    Each process draws its batches in ascending order. It is therefore enough to check, for each process, the first
    batch that was missing at the last check.
    """

    def __init__(self, batches: Sequence[Iterator[range]], exist: Callable[[range], bool]) -> None:
        self._exist = exist
        self._remaining = batches
        self._due = [next(own, None) for own in batches]

    @property
    def complete(self) -> bool:
        return not any(self._due)

    @property
    def remaining(self) -> list[int]:
        """The ranks of the processes of which images are missing."""
        return [rank for rank, due in enumerate(self._due) if due is not None]

    def new(self) -> int:
        """The number of images that were found since the last call."""
        found = 0
        for k, own in enumerate(self._remaining):
            while (due := self._due[k]) is not None and self._exist(due):
                found += len(due)
                self._due[k] = next(own, None)
        return found


@contextmanager
def _exit_after_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the program by an exception, as Ctrl-C does, so that no unfinished file remains."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # Only the main thread can set a handler, and a handler that the user has set is kept.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
