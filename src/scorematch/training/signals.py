"""Signals that end a training: they wait until the end of a step."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

# A cluster may send a signal to torchrun and to all of its processes, and torchrun passes it on to them.
_SAME = 2.0  # seconds within which further signals are taken to be the first one


class Stop:
    """Delays SIGTERM and Ctrl-C until the end of a step; another signal, two seconds later, takes effect immediately.

    Args:
        announce: whether to print at the first signal that the run stops after this step, which may take minutes.

    Attributes:
        asked: whether a signal was received.
    """

    def __init__(self, *, announce: bool) -> None:
        self.asked = False
        self._since = 0.0
        self._announce = announce
        self._number = int(signal.SIGTERM)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers there only
            for number in (signal.SIGTERM, signal.SIGINT):
                # A handler of another language, None, could not be restored, and a signal may be ignored on purpose.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def leave(self) -> NoReturn:
        """Exits the program as the signal would."""
        self._restore()
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._since > _SAME:
                self._restore()
                signal.raise_signal(number)
            return
        self.asked, self._number, self._since = True, number, time.monotonic()
        if self._announce:
            with suppress(OSError, RuntimeError, ValueError):  # it is closed, or the signal interrupted its own writing
                print(
                    "\nstopping after this step; another signal more than two seconds later stops without a checkpoint",
                    file=sys.stderr,
                )

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
