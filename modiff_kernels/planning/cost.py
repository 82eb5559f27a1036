"""Time of a layer in every mode from its shape alone, all passes counted: for plans where nothing has been measured.

A pass takes a launch, and the longer of its operations at the rate of their precision and its bytes at the bandwidth.
Float counts as torch computes it operation by operation, or, for comparison, as a compiler that fuses all elementwise
work into as few passes as its reductions allow. What every mode has in common (attention, time embedding) is left out.
"""

from typing import NamedTuple

from modiff_kernels.config.plan import FLOAT, MODULATED, QUANTIZED, Mode
from modiff_kernels.nn.blocks.base import ALONE, Role


class Machine(NamedTuple):
    """A device: float and int8 operations per second (a multiply-add is two), bytes per second, seconds per launch;
    int4_ops: where it multiplies 4-bit codes faster, else 0."""

    float_ops: float
    int8_ops: float
    bandwidth: float
    launch: float = 0.0
    int4_ops: float = 0.0


class LayerShape(NamedTuple):
    """A Linear or Conv2d: elements of its input, output and weight, and multiply-adds, each for the whole batch.

    role: what its block does around it. windowed: a convolution of more than single pixels. is_reader: its input is
    quantised by another layer, in whose product it takes part. is_constant: in low bits computed once a run. rows:
    pixels or tokens of a sample. norm_fits: with delayed scales, its group norm needs no pass for the statistics."""

    inputs: int
    outputs: int
    weights: int
    multiply_adds: int
    role: Role = ALONE
    windowed: bool = False
    is_reader: bool = False
    is_constant: bool = False
    rows: int = 0
    norm_fits: bool = False

    def scaled(self, factor: float) -> "LayerShape":
        """That of `factor` times as many samples."""
        inputs, outputs, multiply_adds = (round(n * factor) for n in (self.inputs, self.outputs, self.multiply_adds))
        return self._replace(inputs=inputs, outputs=outputs, multiply_adds=multiply_adds)


class Sizes(NamedTuple):
    """Bytes of an element of the activations and of x_hat and y_hat; bits of a weight in low-bit modes; whether the
    scales of residuals are delayed, so that their range is not needed before."""

    float_bytes: int
    state_bytes: int
    weight_bits: int
    delayed: bool = False


class Pass(NamedTuple):
    """bytes that it moves, multiply-adds, and kernels that are launched."""

    bytes: float
    multiply_adds: int = 0
    launches: int = 1


def passes(layer: LayerShape, mode: Mode, sizes: Sizes, compiled: bool = False) -> list[Pass]:
    """Everything that a call executes for the layer in `mode`. compiled: float as a fusing compiler runs it."""
    if mode.kind == FLOAT:
        return _float_passes(layer, sizes.float_bytes, compiled)
    if layer.is_constant:
        return []
    number, state = sizes.float_bytes, sizes.state_bytes
    inputs, outputs, prologue = layer.inputs, layer.outputs, layer.role.prologue
    modulated = mode.kind != QUANTIZED
    found = []
    if not layer.is_reader:
        if prologue == "group_norm" and not (modulated and sizes.delayed and layer.norm_fits):
            found.append(Pass(number * inputs))  # statistics, and the range of plain codes
        read = number * inputs * (2 if prologue == "geglu" and modulated else 1)
        if not sizes.delayed if modulated else (prologue == "identity" and layer.windowed):
            found.append(Pass(read + (state * inputs if modulated else 0)))  # the range of what is quantised
        found.append(Pass(read + inputs + (2 * state * inputs if modulated else 0)))
    moved = layer.weights * sizes.weight_bits / 8 + (0 if layer.is_reader else inputs)
    moved += number * outputs if layer.role.adds else 0
    if modulated:
        writes_out = layer.role.adds or prologue == "identity" or state != number
        moved += 2 * state * outputs + (number * outputs if writes_out else 0)
    else:
        moved += number * outputs // (2 if layer.role.is_gated else 1)
    return [*found, Pass(moved, layer.multiply_adds, 0 if layer.is_reader else 1)]


def _float_passes(layer: LayerShape, number: int, compiled: bool) -> list[Pass]:
    inputs, outputs, (prologue, silu, adds, _) = number * layer.inputs, number * layer.outputs, layer.role
    found = []
    if not layer.is_reader and prologue == "group_norm":
        found = [Pass(inputs), Pass(2 * inputs)]
        if silu and not compiled:
            found += [Pass(2 * inputs), *([Pass(2 * inputs)] if adds else [])]  # and the shift before the second norm
    elif not layer.is_reader and prologue == "layer_norm":
        found = [Pass(2 * inputs)]
    elif prologue == "geglu":
        found = [Pass(3 * inputs)] if compiled else [Pass(2 * inputs), Pass(3 * inputs)]
    found.append(Pass(inputs + number * layer.weights + outputs, layer.multiply_adds))
    if layer.windowed and not compiled:
        found.append(Pass(2 * outputs))  # the bias, which cuDNN leaves to a kernel of its own
    if adds:
        found.append(Pass(2 * outputs, launches=0) if compiled else Pass(3 * outputs))
    return found


def seconds(layer: LayerShape, mode: Mode, sizes: Sizes, machine: Machine, compiled: bool = False) -> float:
    """Time of what `passes` lists."""
    found = passes(layer, mode, sizes, compiled)
    rate = machine.float_ops if mode.kind == FLOAT else machine.int8_ops
    if mode.act_bits == sizes.weight_bits == 4 and mode.kind == MODULATED and machine.int4_ops:
        rate = machine.int4_ops
    longer = (max(2 * each.multiply_adds / rate, each.bytes / machine.bandwidth) for each in found)
    return sum(longer) + machine.launch * sum(each.launches for each in found)


# What the error of plain 8-bit activations weighs, as a part of the time of a unit. On the shipped model (DDIM-50,
# learnt codes, 63.2 dB where all is modulated) a single plain unit leaves 54.6 or 56.4 dB in the two convolution blocks
# of the last level, near the output, 60 to 63 in the others, and 62.8 to 63.2 in attention.
ERRORS = {"tokens": 0.02, "images": 0.25, "last": 2.5}
RESIDUAL_ERRORS = {8: 0.02, 7: 0.08, 4: 0.4, 3: 1.6}
"""Of a modulated unit, as a part of that, by bits of the codes: its noise over the plain unit's. 7: 8, and 6 dB."""


def weight_of_error(kind: str, mode: Mode) -> float:
    """What is added to the time of a unit in `mode` before modes are compared, as a part of it. kind: of ERRORS."""
    if mode.kind == MODULATED:
        return ERRORS[kind] * RESIDUAL_ERRORS[mode.act_bits or 8]
    return ERRORS[kind] if mode.kind == QUANTIZED else 0.0
