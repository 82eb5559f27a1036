"""Times of calls: on a GPU of the device's work alone with a cold L2 cache, on a CPU of single calls."""

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # five times the L2 cache of an H200
WARM_UP = 4
LEAST_ROUNDS = 7
AHEAD = 1.5
CYCLES_PER_US = 2000
"""Of torch.cuda._sleep; no GPU runs much faster than 2 GHz."""


class CallTimer:
    """`timer(call)` gives the seconds of one call by the clock."""

    columns = {"cache": "warm", "timer": "perf_counter"}  # noqa: RUF012 (of result rows)

    def __call__(self, call: Callable[[], object]) -> list[float]:
        began = time.perf_counter()
        call()
        return [time.perf_counter() - began]


class ColdTimer:
    """`timer(call)` gives seconds of `rounds` calls on the current CUDA device; of fewer where they would take more
    than `seconds` together, but of 7 at least.

    Before every call a buffer larger than the L2 cache is written, then the device waits until the host has issued the
    call (1.5 times as long as that took in the warm-up): what is timed is the device's work, without gaps in which it
    waits for Python. In a network that runs eagerly such gaps exist; in a CUDA graph they do not."""

    columns = {"cache": "cold", "timer": "cuda_event"}  # noqa: RUF012 (of result rows)

    def __init__(self, rounds: int = 50, seconds: float = 0.05) -> None:
        self.rounds, self.seconds = rounds, seconds
        self._flush: torch.Tensor | None = None

    def __call__(self, call: Callable[[], object]) -> list[float]:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        issued_us, began = 0.0, 0.0
        for index in range(WARM_UP):  # the first call may compile or choose
            if index == WARM_UP - 2:
                torch.cuda.synchronize()
                began = time.perf_counter()
            before = time.perf_counter()
            call()
            issued_us = 1e6 * (time.perf_counter() - before)
        torch.cuda.synchronize()
        each = (time.perf_counter() - began) / 2
        rounds = max(LEAST_ROUNDS, min(self.rounds, int(self.seconds / each)))
        events = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(int(AHEAD * issued_us * CYCLES_PER_US))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in events]


def timer_of(device: torch.device, rounds: int) -> ColdTimer | CallTimer:
    """The timer for `device`; on a CPU, where configurations take turns, it times a call at a time."""
    return ColdTimer(rounds) if device.type == "cuda" else CallTimer()
