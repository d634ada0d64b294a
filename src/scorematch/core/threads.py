"""Work in threads, in order and a limited number of results ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_A = TypeVar("_A")
_T = TypeVar("_T")


def ordered_map(
    function: Callable[[_A], _T], arguments: Iterable[_A], workers: int, *, ahead: int | None = None
) -> Generator[_T, None, None]:
    """Like ``map``, but the function is called in threads, a limited number of results ahead.

    Args:
        function: the function to call.
        arguments: its arguments, read as they are needed.
        workers: the number of threads.
        ahead: the largest number of results that are computed in advance; None is 16 per thread.

    Yields:
        The results, in the order of the arguments.
    """
    ahead = 16 * workers if ahead is None else ahead
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="scorematch") as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
