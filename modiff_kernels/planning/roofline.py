"""Time of a layer in every mode from its shape alone: what a plan starts from where nothing has been measured.

Traffic model: time = prologue bytes / bandwidth + max(operations / rate, product bytes / bandwidth). It knows no
launches, no tile sizes and no caches.
"""

import dataclasses

from modiff_kernels.config.plan import FLOAT, MODULATED, Mode


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device in three numbers: float and int8 operations per second (a multiply-add is two), bytes per second."""

    float_ops: float
    int8_ops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A Linear or Conv2d: elements of its input, output and weight, and multiply-adds, each for the whole batch."""

    inputs: int
    outputs: int
    weights: int
    multiply_adds: int


def seconds(
    layer: LayerShape,
    mode: Mode,
    machine: Machine,
    *,
    float_bytes: int,
    state_bytes: int,
    weight_bits: int,
    fused: bool,
) -> float:
    """Time of `layer` in `mode`, float, quantized or modulated.

    float_bytes, state_bytes: of an element of the activations and of x_hat and y_hat. fused: the pass that makes the
    codes is part of one that a float network makes too (a norm), and only what it moves in addition counts.
    """
    if mode.kind == FLOAT:
        elements = layer.inputs + layer.weights + layer.outputs
        return max(2 * layer.multiply_adds / machine.float_ops, float_bytes * elements / machine.bandwidth)
    prologue, per_output = _bytes_per_element(mode, float_bytes, state_bytes, fused)
    moved = layer.inputs + layer.weights * weight_bits / 8 + per_output * layer.outputs
    product = max(2 * layer.multiply_adds / machine.int8_ops, moved / machine.bandwidth)
    return prologue * layer.inputs / machine.bandwidth + product


def _bytes_per_element(mode: Mode, float_bytes: int, state_bytes: int, fused: bool) -> tuple[int, int]:
    """Bytes that making the codes moves per input element, and that the product moves per output element."""
    normalised = 2 * float_bytes if fused else 0  # read and written by the norm that is there anyway
    if mode.kind != MODULATED:
        return (0 if fused else float_bytes + 1), float_bytes
    copy = 0 if state_bytes == float_bytes else float_bytes  # y_hat itself is read on where it has the right dtype
    return float_bytes + 2 * state_bytes + 1 - normalised, 2 * state_bytes + copy
