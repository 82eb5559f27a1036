"""Time of a layer in every mode from its shape alone: what a plan starts from where nothing has been measured.

Time = prologue bytes / bandwidth + max(operations / rate, product bytes / bandwidth), without launches and caches.
"""

from typing import NamedTuple

from modiff_kernels.config.plan import FLOAT, MODULATED, Mode


class Machine(NamedTuple):
    """A device in three numbers: float and int8 operations per second (a multiply-add is two), bytes per second."""

    float_ops: float
    int8_ops: float
    bandwidth: float


class LayerShape(NamedTuple):
    """A Linear or Conv2d: elements of its input, output and weight, and multiply-adds, each for the whole batch."""

    inputs: int
    outputs: int
    weights: int
    multiply_adds: int


def seconds(
    layer: LayerShape, mode: Mode, machine: Machine, float_bytes: int, state_bytes: int, weight_bits: int, fused: bool
) -> float:
    """Time of `layer` in `mode`, float, quantized or modulated. float_bytes, state_bytes: of an element of the
    activations and of x_hat and y_hat. fused: the pass that makes the codes is part of one that a float network makes
    too (a norm), and only what it moves in addition counts."""
    prologue = 0  # bytes per input element that making the codes moves
    if mode.kind == FLOAT:
        operations = machine.float_ops
        moved: float = float_bytes * (layer.inputs + layer.weights + layer.outputs)
    else:
        operations, per_output = machine.int8_ops, float_bytes
        if mode.kind == MODULATED:
            norm = 2 * float_bytes if fused else 0  # read and written by the norm that is there anyway
            prologue = float_bytes + 2 * state_bytes + 1 - norm
            # y_hat itself is read on where it has the right dtype
            per_output = 2 * state_bytes + (0 if state_bytes == float_bytes else float_bytes)
        elif not fused:
            prologue = float_bytes + 1
        moved = layer.inputs + layer.weights * weight_bits / 8 + per_output * layer.outputs
    product = max(2 * layer.multiply_adds / operations, moved / machine.bandwidth)
    return prologue * layer.inputs / machine.bandwidth + product
