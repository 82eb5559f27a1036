"""A limit of time for a whole benchmark, and what becomes of a step that fails or does not end."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
REPEAT_S = 5.0
"""After this time the alarm comes again: an exception is lost where Python is in a destructor."""


class OutOfTime(BaseException):
    """The budget is used up. No Exception, so that code which handles errors, such as a compiler, lets it pass."""


class Budget:
    """Seconds from now on; None is no limit. `clock` is another one in tests."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = float("inf") if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, below 0 if more than all were taken."""
        return self._end - self._clock()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """OutOfTime is raised inside when nothing is left. For the main thread, and not nested."""
        if self._end == float("inf"):
            yield
            return

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), REPEAT_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def attempt(name: str, step: Callable[[], T], budget: Budget) -> T | None:
    """What `step` gives, or None where it failed, ran out of memory or of time; stderr then says so and for what."""
    reason = ""
    try:
        with budget.limit():
            return step()
    except OutOfTime:
        reason = "the budget was used up before it was done"
    except torch.OutOfMemoryError as error:
        reason = f"out of memory ({_first_line(error)})"
    except Exception as error:
        traceback.print_exc()
        reason = f"failed: {_first_line(error)}"
    print(f"{name}: {reason}; left out", file=sys.stderr, flush=True)
    free_memory()  # here, where the exception and the frames it holds are gone
    return None


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
