"""The timesteps of UNet calls as numbers on the host, without waiting for a device within a run."""

from typing import Any

from torch import Tensor

from modiff_kernels.nn.cache import tensor_version
from modiff_kernels.planning import clock


class HostTimesteps:
    """Knows numbers, tensors on the CPU, and elements of the schedule on a device that it has been told before.

    Such an element is known by its place in the schedule's memory, which a loop over `scheduler.timesteps` or over a
    slice of it gives.
    """

    def __init__(self) -> None:
        self._schedule: Tensor | None = None
        self._version = 0
        self._values: list[float] = []

    def announce(self, scheduler: Any) -> None:
        """Read the timesteps that the scheduler has just set."""
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor) and timesteps.device.type != "cpu":
            self._remember(timesteps, clock.host_timesteps(scheduler))

    def _remember(self, timesteps: Tensor, values: list[float]) -> None:
        self._schedule = timesteps
        self._version = tensor_version(timesteps)
        self._values = values

    def value(self, timestep: Any) -> float | None:
        """`timestep`, a number or a tensor of one element, as a number; None for others, or if it is on a device."""
        if not isinstance(timestep, Tensor):
            return float(timestep) if isinstance(timestep, (int, float)) else None
        if timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return clock.host_timestep(timestep)
        return self._value_in_schedule(timestep)

    def _value_in_schedule(self, timestep: Tensor) -> float | None:
        schedule = self._schedule
        if schedule is None or tensor_version(schedule) != self._version:
            return None
        if timestep.untyped_storage()._cdata != schedule.untyped_storage()._cdata or timestep.dtype != schedule.dtype:
            return None
        index, rest = divmod(timestep.storage_offset() - schedule.storage_offset(), schedule.stride(0))
        return self._values[index] if rest == 0 and 0 <= index < len(self._values) else None
