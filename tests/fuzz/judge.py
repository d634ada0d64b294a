"""One case: what it does with damaged files, and whether this is allowed."""

import contextlib
import os
import random
import sys
import time
import warnings
from pathlib import Path

from scorematch.evaluation import evaluate  # noqa: F401  (imports take memory and time, which no case should have)
from tests.fuzz.kinds import KINDS, damage

ALLOWED = ValueError | OSError | ImportError
LONGEST = 400  # characters of a message, without paths
SECONDS = 5
MEMORY = 200_000_000  # bytes, and four times the size of the files
_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
# The changes of a folder: each with the places of its paths and of the descriptors of the folders that they are in.
_CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, 0),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _full(path, folder):
    """The full path of a file that is given relative to the descriptor of a folder, or by its own descriptor."""
    if isinstance(path, int):
        return os.path.realpath(f"/proc/self/fd/{path}")
    where = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
    return os.path.realpath(Path(where, os.fsdecode(path)))


class _Guard:
    """Watches a call with an audit hook, which stays in the process: no code is run, and only one folder is changed."""

    def __init__(self):
        self.allowed, self.events = None, []
        sys.addaudithook(self._look)

    def _look(self, event, arguments):
        if self.allowed is None:
            return
        paths = [_full(arguments[i], arguments[k]) for i, k in _CHANGES.get(event, ())]
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            paths = [_full(arguments[0], None)]
        outside = [path for path in paths if not path.startswith(self.allowed) and "__pycache__" not in path]
        if event in _CODE or outside:
            self.events.append(f"{event} {arguments[:2]}")
            raise PermissionError(f"the fuzzer does not allow {event}")

    @contextlib.contextmanager
    def watching(self, folder):
        """Allows changes in one folder only."""
        self.allowed, self.events = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.allowed = None


_GUARD = _Guard()


def _peak():
    """The largest resident memory of the process since the last call, in bytes; 0 if it is not known."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def complaints(error, folder):
    """What is wrong with an error or a warning about files in a folder."""
    text = str(error)
    if str(folder) not in text:
        yield "it does not name the file"
    if not text.isprintable():
        yield "it has line breaks or other control characters"
    length = len(" ".join(word for word in text.split(" ") if str(folder) not in word))
    if length > LONGEST:
        yield f"it has {length} characters"


class Outcome:
    """What one case did.

    Attributes:
        faults: what is not allowed, as lines of text.
        error: the exception, or None.
    """

    def __init__(self):
        self.faults, self.error = [], None

    def blame(self, fault, about=None):
        """Adds a fault."""
        self.faults.append(fault if about is None else f"{fault}: {type(about).__name__}: {str(about)[:600]!r}")


def run(kind, seed, folder, *, timed=True):
    """Runs one case.

    Args:
        kind: a key of KINDS.
        seed: the seed of the damage.
        folder: an empty folder for the damaged files; files are written to its subfolder ``out`` only.
        timed: whether to check the time that the call takes.

    Returns:
        The Outcome.
    """
    case, rng = KINDS[kind], random.Random(f"{kind}:{seed}")  # noqa: S311
    files = damage(case, rng)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(content))
    return judge(case.read, folder, timed=timed)


def _error(read, folder):
    try:
        read(folder)
    except Exception as error:
        return error  # and not a variable, which its traceback would keep
    return None


def judge(read, folder, *, timed=True):
    """Calls a function that reads a folder.

    Args:
        read: the function.
        folder: the folder.
        timed: whether to check the time that the call takes.

    Returns:
        The Outcome.
    """
    outcome, size = Outcome(), sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _peak()
    before, began = _peak(), time.process_time()
    with warnings.catch_warnings(record=True) as seen, _GUARD.watching(folder / "out"):
        warnings.simplefilter("always")
        outcome.error = _error(read, folder)
    seconds, memory = time.process_time() - began, _peak() - before
    for event in _GUARD.events:
        outcome.blame(f"it did {event}")
    if not isinstance(outcome.error, ALLOWED | None):
        outcome.blame("the exception is of another type", outcome.error)
    elif outcome.error is not None:
        for fault in complaints(outcome.error, folder):
            outcome.blame(fault, outcome.error)
    for warning in seen:
        if "PIL" in Path(warning.filename).parts:
            continue
        faults = list(complaints(warning.message, folder))
        if not issubclass(warning.category, UserWarning):
            faults.append("it is no UserWarning")
        for fault in faults:
            outcome.blame(f"a warning: {fault}", warning.message)
    if timed and seconds > SECONDS:
        outcome.blame(f"it took {seconds:.1f} seconds")
    if memory > MEMORY + 4 * size:
        outcome.blame(f"it took {memory / 1e6:.0f} MB of memory for {size / 1e6:.1f} MB of files")
    return outcome
