"""The one place where a layer's mode and the call of the run choose what is executed. Blocks and single layers are
equations in `run`::

    run(layer, prologue, h, dtype, skip=skip) = layer(prologue(h)) + skip

- mode "modulated": an update of x_hat and y_hat, `ops.modulate`; in the first call of a run two of 8 bits, the second
  on what the first left over, which together are as good as a float first call.
- mode "quantized": the plain quantiser and the product.
- mode "constant": computed when the input is another tensor than in the call before."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from modiff_kernels import ops
from modiff_kernels.nn.tensors import InputState, ModulationState, OutputState, fill_with_bias
from modiff_kernels.ops import IDENTITY, PackedWeight, Prologue, Window
from modiff_kernels.ops.dispatch import torch_must_see
from modiff_kernels.ops.naive import FIRST_BITS, FIRST_UPDATES
from modiff_kernels.quant import affine

Codes = tuple[Tensor, Tensor]  # of a residual, and their scales
PlainCodes = tuple[Tensor, Tensor, Tensor]  # of an input itself, with zero points


class Layer(Protocol):
    """What a step reads of a `ModulatedLayer` or a `LinearStack`. kernels: what it executes without a state, by key."""

    name: str
    state: ModulationState
    mode: str
    input: InputState | None
    output: OutputState | None
    packed: PackedWeight
    bias_data: Tensor | None
    window: Window | None
    backend: str
    memory_format: torch.memory_format
    kernels: dict[Any, Callable[..., Any]]

    def output_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]: ...


class Spread(NamedTuple):
    """What a block does to the codes of its input before the product: `codes` does it, `shape` to the shape."""

    codes: Callable[[Tensor], Tensor]
    shape: Callable[[Sequence[int]], tuple[int, ...]]


def run(
    layer: Layer, prologue: Prologue, h: Tensor, dtype: torch.dtype, *, skip: Tensor | None = None,
    write_out: bool = True, spread: Spread | None = None,
) -> Tensor:  # fmt: skip
    """layer(spread(prologue(h))) + skip, in `dtype`, that of the activations around; mutates the layer's state.

    h may have another dtype: that of a y_hat. write_out False: the reader takes any float dtype and changes nothing, so
    in mode "modulated" y_hat itself is returned."""
    if layer.mode == "quantized":
        return plain_product(layer, plain_codes(layer, prologue, h), skip, dtype, spread)
    if layer.state.is_first or spread is not None:
        return accumulate(layer, residual_codes(layer, prologue, h, dtype), skip, dtype, write_out, spread)
    source: Any = layer.input
    x_hat = source.ensure(prologue.shape(h), dtype, h.device, layer.memory_format)
    held = layer.output.current()
    scale, last_absmax, ratio = source.scale()
    args = (
        h, prologue, x_hat, scale, layer.packed, held.tensor, skip, layer.window, dtype, source.act_bits,
        source.granularity, ratio, write_out, last_absmax,
    )  # fmt: skip
    if torch_must_see(h):
        out, _, absmax = ops.modulate(*args, layer.backend)
    else:
        kernel = held.kernels.get((layer.name, last_absmax is None))
        if kernel is None:
            kernel = held.kernels[layer.name, last_absmax is None] = ops.modulate_kernel(*args, layer.backend)
        out, _, absmax = kernel(*args)
    source.record(absmax)
    return out if write_out else held.tensor


def residual_codes(layer: Layer, prologue: Prologue, h: Tensor, dtype: torch.dtype) -> tuple[Codes, ...]:
    """Codes of the residual of prologue(h), for the input of `layer`: of one update or a first call; x_hat follows."""
    source: Any = layer.input
    x_hat = source.ensure(prologue.shape(h), dtype, h.device, layer.memory_format)
    if layer.state.is_first:
        args = (h, prologue, x_hat, None, FIRST_BITS, source.granularity, 1.0, True, None)
        key = "first", prologue.shift is None, h.shape, h.dtype, h.device
        first = [repeated(layer.kernels, key, ops.quantize, args, layer.backend) for _ in range(FIRST_UPDATES)]
        return tuple([(codes, used) for codes, used, _ in first])
    scale, last_absmax, ratio = source.scale()
    args = (h, prologue, x_hat, scale, source.act_bits, source.granularity, ratio, True, last_absmax)
    kernels = source.current().kernels
    codes, used, absmax = repeated(kernels, (layer.name, last_absmax is None), ops.quantize, args, layer.backend)
    source.record(absmax)
    return ((codes, used),)


def accumulate(
    layer: Layer, updates: Sequence[Codes], skip: Tensor | None, dtype: torch.dtype, write_out: bool = True,
    spread: Spread | None = None,
) -> Tensor:  # fmt: skip
    """Adds the products of the codes onto y_hat; its value plus `skip`, or y_hat itself if nothing is written."""
    shape = updates[0][0].shape
    out_shape = layer.output_shape(shape if spread is None else spread.shape(shape))
    output: Any = layer.output
    y_hat = output.ensure(out_shape, dtype, updates[0][0].device, layer.memory_format)
    key: tuple[Any, ...]
    out = y_hat
    for i, (codes, scale) in enumerate(updates):
        last = i == len(updates) - 1
        codes = codes if spread is None else spread.codes(codes)
        args = (
            codes, scale, None, layer.packed, y_hat, None, skip if last else None, layer.window, dtype,
            write_out and last,
        )  # fmt: skip
        kernels, key = output.current().kernels, (layer.name, "product")
        if layer.state.is_first:
            kernels, key = layer.kernels, ("first product", skip is None, last, shape, dtype, codes.device, write_out)
        out = repeated(kernels, key, ops.product, args, layer.backend)
    return out if write_out else y_hat


def plain_codes(layer: Layer, prologue: Prologue, h: Tensor) -> PlainCodes:
    """Codes, scale and zero point of prologue(h) for a layer in mode "quantized"."""
    source: Any = layer.input
    if source.scale_mode == "static":
        codes = affine.static_codes(h, source.static_scale, source.static_zero_point, source.act_bits)
        return codes, source.static_scale, source.static_zero_point
    args = (h, prologue, None, None, source.act_bits, source.granularity, 1.0, True, None)
    key = "quantize", prologue.shift is None, h.shape, h.dtype, h.device
    return repeated(layer.kernels, key, ops.quantize, args, layer.backend)


def plain_product(
    layer: Layer, codes: PlainCodes, skip: Tensor | None, dtype: torch.dtype, spread: Spread | None = None
) -> Tensor:
    values, scale, zero_point = codes
    values = values if spread is None else spread.codes(values)
    args = (values, scale, zero_point, layer.packed, None, layer.bias_data, skip, layer.window, dtype, True)
    key = "product", skip is None, values.shape, dtype, values.device, scale.shape
    return repeated(layer.kernels, key, ops.product, args, layer.backend)


def run_each(
    layers: Sequence[Layer], prologue: Prologue, h: Tensor, dtype: torch.dtype, write_out: bool = True
) -> tuple[Tensor, ...]:
    """`run` of layers that share an input, which is quantised once."""
    first = layers[0]
    if first.mode == "quantized":
        plain = plain_codes(first, prologue, h)
        return tuple([plain_product(layer, plain, None, dtype) for layer in layers])
    updates = residual_codes(first, prologue, h, dtype)
    return tuple([accumulate(layer, updates, None, dtype, write_out) for layer in layers])


def run_shared(layer: Layer, source: Tensor, x: Tensor) -> Tensor:
    """`run` of a layer that finds its input by itself: x is `source` in the form of the ops. The first reader of a
    shared input quantises it, the others take its codes; in the first call of a run, one that reads another tensor gets
    an input of its own."""
    shared: Any = layer.input
    codes = shared.shared_codes(source)
    if codes is None:
        modulated = layer.mode == "modulated"
        if modulated and shared.uses:
            if not layer.state.is_first:
                text = "in one UNet call, but not in the first one of this run; accelerate with share_inputs=False"
                raise RuntimeError(f"the layers that share the input of '{shared.key}' got different tensors {text}")
            layer.input = layer.state.separate_input(shared, layer.name)
            return run(layer, IDENTITY, x, x.dtype)
        codes = residual_codes(layer, IDENTITY, x, x.dtype) if modulated else plain_codes(layer, IDENTITY, x)
        shared.share(source, codes)
    if layer.mode == "quantized":
        return plain_product(layer, codes, None, x.dtype)
    return accumulate(layer, codes, None, x.dtype)


def run_once(layer: Layer, x: Tensor) -> Tensor:
    """The layer on x [..., K] as a first call of a run computes it, in x's dtype, on a state that nobody keeps."""
    x_hat = torch.zeros_like(x, dtype=torch.float32)
    y_hat = x_hat.new_empty(layer.output_shape(x.shape))
    fill_with_bias(y_hat, [layer])
    out = y_hat
    for _ in range(FIRST_UPDATES):
        codes, scale, _ = ops.quantize(x, IDENTITY, x_hat, None, FIRST_BITS, "per_sample", backend=layer.backend)
        args = codes, scale, None, layer.packed, y_hat, None, None, layer.window, x.dtype
        out = ops.product(*args, backend=layer.backend)
    return out


def constant(layer: Layer, source: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of a layer in mode "constant", computed when `source` is another tensor than in the call before; in
    `dtype`, which under autocast is not that of `source`."""
    state, weight = layer.state, layer.packed.packed
    value = state.kept.find(state.context_name, layer.name, source, weight, dtype)
    if value is None:
        value = run_once(layer, source.to(dtype).contiguous())
        value = state.kept.keep(state.context_name, layer.name, source, weight, value)
    return value


def repeated(kernels: dict[Any, Callable[..., Any]], key: Any, op: Any, args: tuple[Any, ...], backend: str) -> Any:
    """op(*args, backend), checked and given a kernel once per `key`, whose calls have tensors of the same formats."""
    if torch_must_see(args[0]):
        return op(*args, backend)
    kernel = kernels.get(key)
    if kernel is None:
        kernel = kernels[key] = op.kernel_for(*args, backend)
    return kernel(*args)
