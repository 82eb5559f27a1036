"""What `ModulatedLinear` and `ModulatedConv2d` have in common: weights, modes, and the way through the state."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.state import ModulationState
from modiff_kernels.nn.state_tensors import INITIALIZE, Edge, StateTensor
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem, capability
from modiff_kernels.quant import passes
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.packing import KPACK_V1
from modiff_kernels.quant.spec import row_count

if TYPE_CHECKING:
    from modiff_kernels.nn.stack import LinearStack

NOMINAL_ROWS = 4096  # rows assumed for the choice of a weight layout, before the first input is seen


class ModulatedLayer(nn.Module):
    """A low-bit layer in the place of a float one.

    mode "modulated": the residual against x_hat is quantised and its product added onto y_hat; "quantized": plain
    low-bit activations; "float": float activations with dequantised weights; "constant": the same from packed weights,
    for inputs that do not change along a run, whose outputs fused blocks keep.

    `weight` and `bias` are the parameters of the original module, so the state_dict keeps its keys and values; the
    quantised weight is derived from them again after load_state_dict, `.to(...)` and the like. The original module
    itself is in `original`. Layers have no gradient.
    """

    op_suffix: ClassVar[str]
    memory_format: ClassVar[torch.memory_format]
    initialize_op: ClassVar[Callable[..., Any]]
    modulated_op: ClassVar[Callable[..., Any]]
    accumulate_op: ClassVar[Callable[..., Any]]
    quantized_op: ClassVar[Callable[..., Any]]
    stack: "LinearStack | None" = None

    def __init__(
        self,
        original: nn.Module,
        config: ModiffConfig,
        state: ModulationState,
        name: str,
        edge: str | None,
        granularity: str,
        calibrated: CalibratedLayer = NOT_CALIBRATED,
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a child: its parameters are ours, under the same keys
        self.register_parameter("weight", original.weight)
        self.register_parameter("bias", original.bias)
        self.training = original.training
        self.name = name
        self.state = state
        self.mode = "float" if config.act_bits is None else config.mode
        self.weight_bits = config.weight_bits
        self.group_size = -1 if config.group_size is None else config.group_size
        self.act_bits = config.act_bits
        self.first_step_bits = config.first_step_bits or 0
        self.backend = config.backend
        self.granularity = granularity
        self.calibrated = calibrated
        self._check_calibrated()
        self.refresh_weight()
        self.edge: Edge | None = None
        self.output: StateTensor | None = None
        if self.mode != "float":
            self.edge = state.edge(edge or name, config, granularity)
            _set_static_scale(self.edge, name, calibrated, self.weight.device)
            state.add_consumer(self.edge)
        if self.mode == "modulated":
            self.output = state.y_hat(name)

    def conv_arguments(self) -> tuple[Any, ...]:
        """kernel_size, stride, padding, dilation and groups of a convolution, nothing for a Linear."""
        return ()

    def output_shape(self, x_shape: torch.Size) -> tuple[int, ...]:
        """Shape of y_hat for an input of `x_shape`."""
        raise NotImplementedError

    def canonical(self, x: Tensor) -> Tensor:
        """`x` in the shape and memory format of the ops; `x` itself where it has them."""
        raise NotImplementedError

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operator."""
        raise NotImplementedError

    def refresh_weight(self) -> None:
        """Derive the quantised weight from `weight` again. Call it after changing `weight` in place, between runs.

        Sets weight_packed (layout `layout`), weight_scale (float32) and, in mode "float", float_weight. Raises
        ValueError on weights that hold NaN or Inf.
        """
        weight = self.weight.detach()
        self._refresh_bias()
        self.input_scale = None
        if self.calibrated.input_scale is not None:
            channels = (1, -1, 1, 1) if weight.ndim == 4 else (-1,)
            self.input_scale = self.calibrated.input_scale.to(weight.device, weight.dtype).view(channels)
        self.layout = KPACK_V1
        self.weight_packed = self.weight_scale = self.float_weight = None
        self.state.addresses += 1
        if self.stack is not None:
            self.stack.refresh_weight()
        if self.weight_bits is None:
            self.input_scale = None
            self.float_weight = weight
            return
        quantized = self._quantized_weight(weight)
        self.weight_bits, self.group_size = quantized.bits, quantized.group_size
        self.weight_scale = quantized.scale
        if self.mode == "float":
            dequantized = quantized.dequantized(weight.shape).to(weight.dtype)
            self.float_weight = dequantized.contiguous(memory_format=self.memory_format)
            return
        weight_q = quantized.codes
        packed = ops.pack_weight(weight_q, self.weight_bits)
        self.layout = self._common_layout()
        if self.layout != KPACK_V1:
            n, k = weight_q.shape
            conv = self.conv_arguments()
            kernel_size, groups = (conv[0], conv[-1]) if conv else ((1, 1), 1)
            packed = ops.prepare_weight(
                packed, self.weight_bits, n, k, layout_to=self.layout, kernel_size=kernel_size, groups=groups
            )
        self.weight_packed = packed
        self.weight_arguments = (self.weight_bits, self.group_size, self.layout, *self.conv_arguments())

    def become_constant(self) -> None:
        """Take mode "constant" and give up x_hat and y_hat."""
        self.state.drop_consumer(self.edge)
        self.state.outputs.pop(self.name, None)
        self.mode, self.edge, self.output = "constant", None, None
        self.act_bits, self.first_step_bits = None, 0

    def stored(self) -> CalibratedLayer:
        """What this layer computes with: `calibrated`, and the codes of its weight where calibration gave none."""
        return dataclasses.replace(self.calibrated, weight=self._quantized_weight(self.weight.detach()))

    def _check_calibrated(self) -> None:
        calibrated, conv = self.calibrated, self.conv_arguments()
        try:
            calibrated.check(self.weight.shape, self.bias is not None)
            if calibrated.input_scale is not None and conv and conv[-1] != 1:
                raise ValueError("a convolution with groups takes no input_scale; calibrate again")
        except ValueError as error:
            raise ValueError(f"layer '{self.name}': {error}") from error

    def _quantized_weight(self, weight: Tensor) -> QuantizedWeight:
        scaled = weight if self.input_scale is None else weight / self.input_scale
        try:
            if self.calibrated.weight is None:
                return QuantizedWeight.rounded(scaled, self.weight_bits, self.group_size)
            quantized = self.calibrated.weight.to(weight.device)
            quantized.check_belongs(scaled)
            return quantized
        except ValueError as error:
            raise ValueError(f"layer '{self.name}': {error}") from error

    def _refresh_bias(self) -> None:
        self.bias_data = None if self.bias is None else self.bias.detach()
        if self.calibrated.bias is not None:
            self.bias_data = self.calibrated.bias.to(self.weight.device, self.weight.dtype)

    def problem(self, op: str, rows: int) -> Problem:
        """The dispatch key of `op` ("modulated", "accumulate", "initialize" or "quantized") with `rows` output rows."""
        device = self.weight.device
        conv = self.conv_arguments()
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        stateless = op == "quantized"
        return Problem(
            op=f"{op}_{self.op_suffix}",
            device_type=device.type,
            capability=capability(device),
            dtype=self.weight.dtype,
            state_dtype=None if stateless else self.state.dtype_on(device),
            m=rows,
            n=self.weight.shape[0],
            k=self.weight[0].numel(),
            act_bits={"modulated": self.act_bits, "initialize": self.first_step_bits}.get(op),
            weight_bits=self.weight_bits,
            group_size=self.group_size,
            granularity="per_sample" if op == "initialize" else self.granularity,
            layout=self.layout,
            **dict(zip(names, conv)),
        )

    def backend_in_use(self) -> str:
        """Name of the backend that computes this layer at the shape of the last run (or a nominal one)."""
        if self.mode == "float":
            return "torch"
        slots = [] if self.output is None else list(self.output.slots.values())
        rows = row_count(slots[0].shape, slots[0].tensor.ndim == 4) if slots else NOMINAL_ROWS
        return dispatch.select(self.problem(self._repeated_op(), rows), self.backend).backend

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        """Output of the layer for `x`, in x's dtype; a new tensor (channels_last for images).

        Mode "modulated" mutates x_hat and y_hat of the current context. `unused` takes the scale that LoRA-
        compatible layers are called with. Raises RuntimeError outside a UNet call of a run, on a changed shape,
        dtype or device within a run and on inputs that need a gradient; ValueError on NaN or Inf; all of them name
        the layer.
        """
        if x.requires_grad and torch.is_grad_enabled() and self.mode != "float":
            raise RuntimeError(
                f"layer '{self.name}' has no gradient but its input asks for one; call the UNet inside "
                f"`with torch.no_grad():`, or handle.remove() first to train or differentiate"
            )
        try:
            if self.mode == "modulated":
                return self._modulated_forward(x)
            if self.mode == "quantized":
                return self._quantized_forward(x)
            if self.mode == "constant":
                return stateless_output(self, self.canonical(self.scaled(x))).view(*x.shape[:-1], -1)
            return self.float_forward(self.scaled(x), self.float_weight, self.bias_data)
        except (ValueError, TypeError, dispatch.BackendUnavailable) as error:
            raise type(error)(f"layer '{self.name}': {error}") from error

    def scaled(self, x: Tensor) -> Tensor:
        """`x` times the calibrated scale of every input channel; `x` itself where there is none."""
        return x if self.input_scale is None else x * self.input_scale

    def _modulated_forward(self, source: Tensor) -> Tensor:
        edge, state = self.edge, self.state
        x = self.canonical(self.scaled(source))
        if state.action is INITIALIZE:
            if edge.consumers > 1 and edge.codes_of(source) is None:
                if edge.uses:
                    edge = self.edge = state.split_edge(edge, self.name)
                else:
                    edge.keep(source, True)
            x_hat = edge.ensure(x.shape, x.dtype, x.device, self.memory_format)
            y_hat = self.output.ensure(self.output_shape(x.shape), x.dtype, x.device, self.memory_format)
            out = self.initialize_op(
                x,
                x_hat,
                y_hat,
                self.weight_packed,
                self.weight_scale,
                self.bias_data,
                None,
                *self.weight_arguments,
                self.first_step_bits,
                True,
                self.backend,
            )
        elif edge.consumers == 1:
            x_hat = edge.ensure(x.shape, x.dtype, x.device, self.memory_format)
            out, _, absmax = self.modulated_op(
                x,
                x_hat,
                edge.scale(),
                self.weight_packed,
                self.weight_scale,
                self.output.current(),
                None,
                edge.act_bits,
                edge.granularity,
                edge.clip_ratio,
                *self.weight_arguments,
                True,
                self.backend,
            )
            edge.record(absmax)
        else:
            residual_q, scale = self._shared_residual(source, x)
            out = self.accumulate_op(
                residual_q,
                scale,
                self.weight_packed,
                self.weight_scale,
                self.output.current(),
                None,
                *self.weight_arguments,
                x.dtype,
                True,
                self.backend,
            )
        return out if x is source or x.ndim == source.ndim else out.view(*source.shape[:-1], -1)

    def _shared_residual(self, source: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        edge = self.edge
        codes = edge.codes_of(source)
        if codes is None:
            edge.refuse_second_source()
            x_hat = edge.ensure(x.shape, x.dtype, x.device, self.memory_format)
            residual_q, scale, absmax = ops.quantize_residual(
                x, x_hat, edge.scale(), edge.act_bits, edge.granularity, edge.clip_ratio, False, self.backend
            )
            edge.record(absmax)
            codes = residual_q, scale
            edge.keep(source, codes)
        return codes

    def _quantized_forward(self, source: Tensor) -> Tensor:
        edge = self.edge
        codes = edge.codes_of(source) if edge.consumers > 1 else None
        if codes is None:
            codes = self.activation_codes(source)
            if edge.consumers > 1:
                edge.keep(source, codes)
        x_q, scale, zero_point = codes
        out = self.quantized_op(
            x_q,
            scale,
            zero_point,
            self.weight_packed,
            self.weight_scale,
            self.bias_data,
            None,
            *self.weight_arguments,
            source.dtype,
            self.backend,
        )
        return out if x_q.ndim == source.ndim else out.view(*source.shape[:-1], -1)

    def activation_codes(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero point of the input of a layer in mode "quantized"."""
        x, edge = self.canonical(self.scaled(source)), self.edge
        if edge.scale_mode == "static":
            scale, zero_point = edge.static_scale, edge.static_zero_point
            return passes.static_activation_codes(x, scale, zero_point, edge.act_bits, x.ndim == 4)
        return ops.quantize_activation(x, edge.act_bits, edge.granularity, True, self.backend)

    def _repeated_op(self) -> str:
        if self.mode in ("quantized", "constant"):
            return {"quantized": "quantized", "constant": "initialize"}[self.mode]
        return "modulated" if self.edge.consumers == 1 else "accumulate"

    def _common_layout(self) -> str:
        """The layout that all ops of this layer like best, or the portable one where they differ."""
        ops_used = ("quantized",) if self.mode == "quantized" else ("initialize", "modulated", "accumulate")
        try:
            layouts = {dispatch.preferred_layout(self.problem(op, NOMINAL_ROWS), self.backend) for op in ops_used}
        except dispatch.BackendUnavailable as error:
            raise dispatch.BackendUnavailable(f"layer '{self.name}': {error}") from error
        return layouts.pop() if len(layouts) == 1 else KPACK_V1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ModulatedLayer":
        before = self.weight.dtype, self.weight.device
        super()._apply(fn, recurse)
        self._adopt_parameters()
        if before != (self.weight.dtype, self.weight.device):
            self.refresh_weight()
            if self.edge is not None:
                self.edge.move_static(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        incoming = state_dict.get(f"{prefix}weight")
        if self.calibrated.weight is not None and incoming is not None and incoming.shape == self.weight.shape:
            old = self.weight.detach()
            if not torch.equal(old, incoming.detach().to(old.device, old.dtype)):
                raise ValueError(
                    f"layer '{self.name}': other weights were given, but its codes are calibrated for the ones it has; "
                    "handle.remove() first, then load and calibrate them"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._adopt_parameters()
        self.refresh_weight()
        self.state.invalidate("weights were loaded")

    def _adopt_parameters(self) -> None:
        self.state.addresses += 1
        self.original.weight = self.weight
        if self.bias is not None:
            self.original.bias = self.bias
            self._refresh_bias()

    def extra_repr(self) -> str:
        """Name, mode and bits."""
        return f"{self.name!r}, mode={self.mode}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"


def stateless_output(layer: "ModulatedLayer | LinearStack", x: Tensor) -> Tensor:
    """The layer on x [..., K] from float activations and dequantised weights, in x's dtype; no state is touched."""
    x_hat = torch.empty_like(x, dtype=layer.state.dtype_on(x.device))
    y_hat = x_hat.new_empty(layer.output_shape(x.shape))
    return layer.initialize_op(
        x,
        x_hat,
        y_hat,
        layer.weight_packed,
        layer.weight_scale,
        layer.bias_data,
        None,
        *layer.weight_arguments,
        0,
        True,
        layer.backend,
    )


def _set_static_scale(edge: Edge, name: str, calibrated: CalibratedLayer, device: torch.device) -> None:
    scale = calibrated.act_scale
    if edge.scale_mode != "static":
        return
    if scale is None and edge.static_scale is None:
        raise ValueError(
            f"layer '{name}': scale_mode='static' needs a calibrated scale for its input and none was given; calibrate "
            f"with scale_mode='static' or pass static_scales[{name!r}], or use scale_mode='dynamic' or 'delayed'"
        )
    if scale is None:
        return
    try:
        zero_point = calibrated.act_zero_point
        edge.set_static(scale.detach().to(device, torch.float32), None if zero_point is None else zero_point.to(device))
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error
