"""Marks in the time of a device, so that parts of a step can be timed while the whole step runs."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """Sets marks, and tells the seconds between two of them once `wait` was called."""

    def mark(self) -> Any:
        """A mark at this point of the device's work."""
        ...

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks."""
        ...


class HostTimer:
    """Marks of a device that computes while the host waits: readings of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.mark = clock

    def wait(self) -> None:
        """Nothing to wait for."""

    def seconds(self, start: float, end: float) -> float:
        """Difference of two readings."""
        return end - start


class CudaTimer:
    """Marks in the current stream of a CUDA device, current or not, set without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event, recorded now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time between two events."""
        return start.elapsed_time(end) / 1e3


def timer_of(device: torch.device, clock: Callable[[], float] | None = None) -> Timer:
    """The timer of `device`; with a clock, one that reads it."""
    if clock is not None:
        return HostTimer(clock)
    return CudaTimer(device) if device.type == "cuda" else HostTimer()
