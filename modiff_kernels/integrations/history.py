"""What a schedule remembers of a run: the last computed values of a tensor, and their extrapolation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def lagrange_weights(nodes: Sequence[float], position: float) -> list[float]:
    """Weights of the values at `nodes` (distinct) in the value at `position` of the polynomial through them."""
    weights = []
    for i, node in enumerate(nodes):
        weight = 1.0
        for j, other in enumerate(nodes):
            if i != j:
                weight *= (position - other) / (node - other)
        weights.append(weight)
    return weights


class History:
    """The last `length` computed values of one tensor, each with its position on the axis of the schedule.

    It owns its memory. Extrapolations are new tensors in the dtype of the values, computed in float32.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.values: list[tuple[float, Tensor]] = []

    def push(self, position: float, value: Tensor) -> None:
        """Keep a copy of `value`. It takes the place of one at the same position, and of all those of another shape."""
        kept = [(at, old) for at, old in self.values if at != position and old.shape == value.shape]
        self.values = [*kept, (position, value.detach().clone())][-self.length :]

    def hold(self) -> Tensor:
        """The last value. There must be one."""
        return self.values[-1][1].clone()

    def forecast(self, position: float, order: int) -> Tensor:
        """The polynomial of degree `order` through the last values, or of the highest degree that they allow."""
        known = self.values[-(order + 1) :]
        if len(known) == 1:
            return self.hold()
        weights = lagrange_weights([at for at, _ in known], position)
        total = known[0][1].float() * weights[0]
        for weight, (_, value) in zip(weights[1:], known[1:]):
            total.add_(value.float(), alpha=weight)
        return total.to(known[0][1].dtype)

    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(value.numel() * value.element_size() for _, value in self.values)


@dataclasses.dataclass
class Trajectory:
    """One context of a scheduled run: its plan, what was done so far, and what a skipped call is made of.

    planned: a letter per call. positions: of every call on the axis. done: a letter per call so far. output, boundary:
    histories of the network's output and of the tensor that enters the first up block that is always computed. form:
    the network's last output as it returned it.
    """

    planned: str
    positions: Sequence[float]
    output: History
    boundary: History
    done: list[str] = dataclasses.field(default_factory=list)
    form: Any = None

    def nbytes(self) -> int:
        """Bytes of both histories."""
        return self.output.nbytes() + self.boundary.nbytes()
