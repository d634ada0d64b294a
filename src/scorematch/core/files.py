"""Atomic writes of files, and of several files of a folder together; checks of files and folders."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

# The prefix of the names of temporary files and folders, which an interruption may leave behind.
UNFINISHED = ".saving-"
# The folder with the previous files while ``new_files`` replaces them.
_PREVIOUS = ".previous"


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file atomically: under a temporary name in the same folder, which is then renamed to ``path``.

    Missing folders are created.

    Args:
        path: the path of the file.
        content: its content.
        durable: whether the content is on the disk before the file is renamed, so that it survives a power failure.

    Raises:
        OSError: if the file cannot be written; a file at ``path`` is then unchanged.
    """
    staged = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content)
        if durable:
            synchronize(staged)
        os.replace(staged, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # with the name of the file
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_outside(out: str | os.PathLike[str], *sources: Any) -> None:
    """Checks that a folder of results does not lie in a folder of data, where its images would later be read as data.

    Args:
        out: the folder of the results.
        sources: the data. Those that are not paths of folders are ignored.

    Raises:
        ValueError: if ``out`` is one of these folders, or lies in one.
    """
    for source in sources:
        if isinstance(source, str | os.PathLike) and Path(source).expanduser().is_dir():
            folder = Path(source).expanduser().resolve()
            if Path(out).expanduser().resolve().is_relative_to(folder):
                raise ValueError(
                    f"the output folder {os.fspath(out)} is inside the data folder {os.fspath(source)}, so its images "
                    "would be read as data. Write to another folder."
                )


def check_own(folder: Path, record: str, names: Iterable[str]) -> None:
    """Checks that a folder has no files with the names of results, unless an earlier call wrote them.

    Args:
        folder: the folder to write.
        record: the file by which the folders of earlier calls are recognized.
        names: the names of the results.

    Raises:
        FileExistsError: if the folder has such a file and not the record.
        NotADirectoryError: if the folder is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file. Pass a folder.")
    foreign = [] if (folder / record).exists() else [folder / name for name in names if (folder / name).exists()]
    if foreign:
        raise FileExistsError(f"{foreign[0]} exists already and would be replaced. Choose another folder.")


def check_writable(folder: Path) -> None:
    """Raises OSError if a folder, given as an absolute path, cannot be created or written to. Nothing is written."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be written to: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: you have no write permission for {existing}.")


def delete_unfinished(folder: Path, *, folders: bool = False) -> None:
    """Deletes the temporary files in a folder that processes left when they were killed, and ``folders`` if wanted.

    No other process may be writing to the folder.
    """
    for remains in folder.glob(f"{UNFINISHED}*"):
        if not remains.is_dir():
            remains.unlink(missing_ok=True)
        elif folders:
            shutil.rmtree(remains)


def synchronize(path: Path) -> None:
    """Writes a file, or the entries of a folder, from the cache to the disk (fsync); does nothing on Windows."""
    if os.name == "nt":  # fsync needs a file opened for writing there, and folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- Several files together -------------------------------------------------------------------------------------------


@contextmanager
def new_files(folder: Path, replaced: Callable[[Path], Iterable[Path]]) -> Iterator[Path]:
    """A temporary folder to write files into, which at the end replace files of ``folder`` all together.

    Before the first file is replaced, the folder gets a subfolder ``.previous`` with hard links to the old files. It is
    removed after the last file. ``reading`` uses this subfolder if it exists. A process that is killed at any moment
    therefore leaves either all the old files or all the new files for ``reading``. If there is an error or a
    KeyboardInterrupt, the old files are put back.

    The folder is locked. Other calls, and calls of ``reading``, wait until the end. What earlier calls of processes
    that were killed left behind is deleted. There are no locks on Windows and on some network file systems.

    Args:
        folder: an existing folder.
        replaced: returns those files of a folder that the new files replace, under the same or other names.

    Yields:
        The temporary folder, in ``folder``.

    Raises:
        OSError: if the files cannot be written; those of ``folder`` are then unchanged.
    """
    with _locked(folder) as locked:
        if locked:  # the temporary folders are not those of other processes that are running
            for remains in folder.glob(f"{UNFINISHED}*/"):
                shutil.rmtree(remains, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        try:
            new = staged / "new"
            new.mkdir()
            yield new
            for path in new.iterdir():
                synchronize(path)
            _replace(folder, new, replaced)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[Path]:
    """The folder from which the files of a folder are read, which is a subfolder after an interrupted replacement.

    Until the end, ``new_files`` replaces no files of the folder.
    """
    with _locked(folder, shared=True):
        previous = folder / _PREVIOUS
        yield previous if previous.is_dir() else folder


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Locks a folder for this process until the end. There are no locks on Windows and on some network file systems.

    Args:
        folder: an existing folder that neither ``new_files`` nor ``reading`` uses.

    Raises:
        BlockingIOError: if another process, or another call in this process, has locked it.
    """
    with _locked(folder, wait=False):
        yield


def _replace(folder: Path, new: Path, replaced: Callable[[Path], Iterable[Path]]) -> None:
    """Moves the files of ``new`` to ``folder``, and deletes the others that are replaced; either all or none."""
    previous, old = folder / _PREVIOUS, new.with_name("old")
    if not previous.is_dir():  # it exists if a process was killed here; it then has the old files
        old.mkdir()
        for path in replaced(folder):
            _link(path, old / path.name)
        old.rename(previous)
    try:
        names = {path.name for path in new.iterdir()}
        for name in names:
            os.replace(new / name, folder / name)
        _delete(replaced(folder), names)
    except BaseException:  # Ctrl-C too
        names = {path.name for path in previous.iterdir()}
        again = new.with_name("again")
        again.mkdir()
        for name in names:
            _link(previous / name, again / name)
            os.replace(again / name, folder / name)
        _delete(replaced(folder), names)
        previous.rename(old)
        raise
    previous.rename(old)


def _delete(paths: Iterable[Path], kept: set[str]) -> None:
    for path in paths:
        if path.name not in kept:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy on a file system without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Locks a folder for this process, or ``shared`` with others, and yields whether that was possible.

    If another process has locked it, the call waits, or raises BlockingIOError if ``wait`` is False.
    """
    if os.name == "nt":
        yield False
        return
    import fcntl

    with ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
            # Closing would not be enough: a process that is forked meanwhile has the descriptor too.
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            held = True
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks, or a folder that cannot be listed
            held = False
        yield held
