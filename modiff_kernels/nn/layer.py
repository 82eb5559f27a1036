"""`ModulatedLinear`, `ModulatedConv2d` and `LinearStack`: low-bit layers in the place of float ones."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn import step
from modiff_kernels.nn import weight as weights
from modiff_kernels.nn.tensors import InputState, ModulationState, OutputState
from modiff_kernels.ops import IDENTITY, PackedWeight, Window, dispatch
from modiff_kernels.ops.problem import Problem, capability
from modiff_kernels.quant.affine import all_finite
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.spec import row_count

NOMINAL_ROWS = 4096  # rows assumed for the choice of a weight layout, before the first input is seen


class ModulatedLayer(nn.Module):
    """A low-bit layer in the place of a float one.

    mode "modulated": the residual against x_hat is quantised and its product added onto y_hat; "quantized": plain
    low-bit activations; "float": float activations with dequantised weights; "constant": computed once for an input
    that does not change along a run, for fused blocks, which keep the output.

    `weight` and `bias` are the parameters of the module in `original`, so the state_dict keeps its keys and values; the
    quantised weight is derived from them again after load_state_dict, `.to(...)` and the like. No gradients.

    packed: the quantised weight, None in mode "float". float_weight: the dequantised one, in mode "float" alone. Where
    `free_original` was called, or the original's weight is a `weight.placeholder`, they are all that is kept: `weight`
    is None. weight_shape: its shape even then. like: a tensor of its dtype and device.
    bias_data: the bias that is computed with, in the order of packed's rows. input_scale: calibrated scale of every
    input channel, or None. feeds_geglu: see `fuse_geglu`."""

    memory_format: ClassVar[torch.memory_format]
    mirrored: ClassVar[tuple[str, ...]]  # attributes of the original that others may read
    weight: Any
    window: Window | None = None
    stack: "LinearStack | None" = None
    packed: PackedWeight | None = None
    output: OutputState | None = None
    feeds_geglu = has_more_uses = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if (kwargs and not args) or not all(isinstance(arg, nn.Module) for arg in args[:1]):
            maker = "from_conv2d" if cls is ModulatedConv2d else "from_linear"
            raise TypeError(f"{cls.__name__} takes the place of a layer; use {cls.__name__}.{maker}(layer, ...)")
        return super().__new__(cls)

    def __init__(
        self, original: nn.Module, config: ModiffConfig, state: ModulationState | None, name: str,
        shared_input: str | None = None, calibrated: CalibratedLayer = NOT_CALIBRATED, makes_codes: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.__dict__["original"] = original  # not a child: its parameters are ours, under the same keys
        if isinstance(original, nn.Conv2d):
            self.window = window_of(original)
        self.register_parameter("weight", original.weight)
        self.weight_shape: torch.Size = original.weight.shape
        self._like: Tensor | None = None
        self.register_parameter("bias", original.bias)
        for attribute in ("training", *self.mirrored):
            setattr(self, attribute, getattr(original, attribute))
        self.owns_state = state is None
        self.name, self.state = name, (state := state or ModulationState(config.state_dtype))
        if self.owns_state:
            state.advice = "put `with mk.sampling_run(network):` around the calls of one picture"
        self.mode = "float" if config.act_bits is None else config.mode
        self.act_bits, known = config.act_bits, calibrated.weight
        self.weight_bits = config.weight_bits if known is None else known.bits
        self.group_size = (config.group_size or -1) if known is None else known.group_size
        self.backend = config.backend
        self.granularity = self._granularity(config)
        self.calibrated = calibrated
        self.kernels: dict[Any, Callable[..., Any]] = {}
        self._last_use = 0  # call
        self.has_learnt_codes = calibrated.weight is not None
        with self._named_errors():
            calibrated.check(self.weight_shape, self.bias is not None)
            if calibrated.input_scale is not None and self.window is not None and self.window.groups != 1:
                raise ValueError("a convolution with groups takes no input_scale; calibrate again")
        self.adopt_parameters()
        (self.refresh_weight if makes_codes else self._checked_weight)()
        self.input: InputState | None = None
        if self.mode != "float":
            self.input = state.input_of(shared_input or name, config, self.granularity)
            if self.input.scale_mode == "static":
                with self._named_errors():
                    self._set_static_scale(self.input)
        if self.mode == "modulated":
            self.add_onto(state.output_of(name))

    def _granularity(self, config: ModiffConfig) -> str:
        """How many scales the layer's input has. Where the config leaves it open, plain codes on a GPU have one per
        token or pixel, as far as those factor out of the sum: it spares a pass for the range there, and costs up to a
        tenth of the speed on a CPU. Where codes of few bits multiply faster, they are not made 8-bit ones by blocks."""
        pointwise = self.window is None or self.window.is_pointwise
        granularity = config.layer_granularity
        if config.granularity is None and self.mode == "quantized" and is_gpu(self.like.device):
            granularity = "per_token"
        elif config.granularity is None and few_bits_pay(self.like.device, config):
            granularity = "per_sample"
        return granularity if pointwise or granularity != "per_token" else "per_sample"

    def add_onto(self, output: OutputState) -> None:
        """Add the products onto this y_hat, which other layers may add onto too."""
        if self.output is not None:
            self.state.outputs.pop(self.name, None)
        self.output = output
        output.writers.append(self)

    def output_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        n = self.packed.n
        return (*x_shape[:-1], n) if self.window is None else self.window.output_shape(x_shape, n)

    @property
    def like(self) -> Tensor:
        return self.weight if self._like is None else self._like

    def canonical(self, x: Tensor) -> Tensor:
        """`x` as the ops take it, [N, K], [N, L, K] or an image in its memory format; `x` itself where it is so."""
        tokens = x.flatten(1, -2) if self.window is None and x.ndim > 3 else x
        return tokens.contiguous(memory_format=self.memory_format)

    def refresh_weight(self) -> None:
        """Derive the quantised weight from `weight`, if it is kept, again, as the network does by itself where it finds
        that `weight` has changed. Raises ValueError on weights that hold NaN or Inf."""
        if self.weight is not None:
            self.packed = None
        self.adopt_parameters()
        if self.weight is None:
            return
        weight = self.weight.detach()
        self.kernels.clear()
        self.float_weight = weight if self.weight_bits is None else None
        if self.weight_bits is None:
            return
        quantized = self._quantized_weight()
        if self.mode == "float":
            dequantized = quantized.dequantized(weight.shape).to(weight.dtype)
            self.float_weight = dequantized.contiguous(memory_format=self.memory_format)
            return
        with self._named_errors():
            self.packed = weights.pack(quantized, self.problem("product", NOMINAL_ROWS), self.backend)
        self.fuse_geglu(self.feeds_geglu)

    def fuse_geglu(self, feeds_geglu: bool) -> None:
        """Whether the columns, values and then gates, are wanted as value * gelu(gate). Where the mode is plain and the
        backend computes that in the epilogue of its products, `packed.geglu` says that this layer gives it."""
        self.feeds_geglu, packed = feeds_geglu, self.packed
        if packed is not None and self.mode == "quantized" and self.output is None:
            problem = self.problem("product", NOMINAL_ROWS)
            wanted = weights.with_geglu(packed, problem, self.backend) if feeds_geglu else weights.without_geglu(packed)
            if wanted is not packed:
                self.packed = wanted
                self.kernels.clear()
                self.adopt_parameters()

    def become_constant(self) -> None:
        self.input.consumers -= 1
        if self.input.consumers == 0:
            del self.state.inputs[self.input.key]
        self.state.outputs.pop(self.name, None)
        self.mode, self.act_bits, self.input, self.output = "constant", None, None, None

    def stored(self) -> CalibratedLayer:
        """What this layer computes with: `calibrated`, and the codes of its weight where calibration gave none."""
        codes = self.calibrated.weight
        if self.weight is not None:
            codes = self._quantized_weight()
        elif codes is None:
            codes = weights.codes_of(self.packed, self.problem("product", NOMINAL_ROWS))
        return dataclasses.replace(self.calibrated, weight=codes)

    def free_original(self) -> None:
        """Let go of the float weight, here and in the original, which computes with dequantised codes from now on."""
        if self.weight_bits is None or self.weight is None:
            return
        # Without a packed form the codes are all that a file can be made of.
        codes = None if self.packed is not None else self.stored().weight
        self.calibrated = dataclasses.replace(self.calibrated, weight=codes, is_optional=False)
        self._like = self.weight.detach().new_empty(0)
        self.weight = self.original.weight = None
        self.original.forward = lambda x: self._in_float(x, self._dequantized(), self.bias)

    def restore_original(self) -> None:
        """Give the original what the codes stand for, if its float weight was let go of."""
        if self.weight is None:
            self.weight = self.original.weight = nn.Parameter(self._dequantized())
            self._like = None
            del self.original.forward

    def _dequantized(self) -> Tensor:
        known = self.stored()
        values = known.weight.dequantized(self.weight_shape)
        if known.input_scale is not None:
            values = values * known.input_scale.view((1, -1, 1, 1) if values.ndim == 4 else (-1,))
        return values.to(self.like.dtype)

    def _in_float(self, *args: Any) -> Tensor:
        return F.linear(*args) if self.window is None else F.conv2d(*args, *self.window[1:])

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of what is computed inside name the layer."""
        try:
            yield
        except (ValueError, dispatch.BackendUnavailable) as error:
            raise type(error)(f"layer '{self.name}': {error}") from error

    def _set_static_scale(self, state: InputState) -> None:
        scale, zero_point, device = self.calibrated.act_scale, self.calibrated.act_zero_point, self.like.device
        if scale is None and state.static_scale is None:
            text = "give accelerate() a calibration that has one, or use scale_mode='dynamic' or 'delayed'"
            raise ValueError(f"scale_mode='static' needs a calibrated scale for its input and none was given; {text}")
        if scale is not None:
            zero_point = None if zero_point is None else zero_point.to(device)
            state.set_static(scale.detach().to(device, torch.float32), zero_point)

    def _checked_weight(self) -> Tensor:
        """What codes are made of; raises all that making them may raise."""
        weight = self.weight.detach()
        with self._named_errors():
            scaled = weight if self.input_scale is None else weight / self.input_scale
            if self.calibrated.weight is None and not all_finite(scaled):
                raise ValueError("the weight holds NaN or Inf; repair the checkpoint before quantising it")
            if self.calibrated.weight is not None and weight.untyped_storage().nbytes() >= weight.nbytes:
                self.calibrated.weight.to(weight.device).check_belongs(scaled)  # else it is a placeholder
            if self.mode != "float":
                ops.preferred_layout(self.problem("product", NOMINAL_ROWS), self.backend)
        return scaled

    def _quantized_weight(self) -> QuantizedWeight:
        weight, known = self._checked_weight(), self.calibrated.weight
        if known is None:
            return QuantizedWeight.rounded(weight, self.weight_bits, self.group_size)
        return known.to(weight.device)

    def problem(self, op: str, rows: int) -> Problem:
        """The dispatch key of `op` ("modulate" or "product") with `rows` output rows."""
        dtype, n, k = self.like.dtype, self.weight_shape[0], self.weight_shape[1:].numel()
        device = (self.like if self.packed is None else self.packed.packed).device  # the weight may be offloaded
        state_dtype = self.state.dtype_on(device) if self.mode == "modulated" else None
        layout = None if self.packed is None else self.packed.layout
        formats = self.act_bits, self.weight_bits, self.group_size, self.granularity, "identity", False, layout
        kind = device.type, capability(device)
        update = Problem("modulate", *kind, dtype, state_dtype, rows, n, k, self.window, *formats)
        geglu = self.packed is not None and self.packed.geglu
        return update if op == "modulate" else dataclasses.replace(dispatch.parts_of(update)[1], geglu=geglu)

    def backend_in_use(self) -> str:
        """Name of the backend that computes this layer at the shape of the last run (or a nominal one)."""
        if self.mode == "float":
            return "torch"
        held = [] if self.output is None else list(self.output.contexts.values())
        rows = row_count(held[0].shape, self.window is not None) if held else NOMINAL_ROWS
        op = "modulate" if self.mode == "modulated" else "product"
        return dispatch.select(self.problem(op, rows), self.backend).backend

    def forward(self, input: Tensor | None = None, *unused: Any, hidden_states: Tensor | None = None) -> Tensor:
        """Output of the layer for `input`, in its dtype, under autocast too; a new tensor (channels_last for images).

        Mode "modulated" mutates x_hat and y_hat of the current context at its first use in a call; others in it, as
        some attention processors make, are computed like a first call, without state. LoRA-compatible layers say
        hidden_states and add a scale, which is `unused`. Errors name the layer: RuntimeError outside a UNet call of a
        run, on a changed shape, dtype or device within a run and on inputs that need a gradient; ValueError on NaN."""
        x: Any = hidden_states if input is None else input
        if self.owns_state and self.state.action is None:
            with self.state.call():
                return self.forward(x)
        if x.requires_grad and torch.is_grad_enabled() and self.mode != "float":
            text = "call the UNet inside `with torch.no_grad():`, or handle.remove() first to train or differentiate"
            raise RuntimeError(f"layer '{self.name}' has no gradient but its input asks for one; {text}")
        try:
            if self.feeds_geglu:
                self.fuse_geglu(False)  # by itself; its block goes on with GEGLU as a prologue
            scaled = self.scaled(x)
            if self.mode == "float":
                return self._in_float(scaled, self.float_weight, self.bias_data)
            canonical = self.canonical(scaled)
            if self.mode == "constant" or self._is_used_again():
                out = step.run_once(self, canonical)
            elif self.input.consumers == 1:
                out = step.run(self, IDENTITY, canonical, x.dtype)
            else:
                out = step.run_shared(self, x, canonical)
        except (ValueError, TypeError, dispatch.BackendUnavailable) as error:
            raise type(error)(f"layer '{self.name}': {error}") from error
        return out if canonical.ndim == x.ndim else out.view(*x.shape[:-1], -1)

    def _is_used_again(self) -> bool:
        """Whether this call has used the layer before, so that the state is that of another tensor. Code is compiled
        for all uses of a layer; where the first call of the run, which is not, had several, none has the state."""
        if self.output is None or torch.compiler.is_compiling():
            return self.has_more_uses
        held = self.output.contexts.get(self.state.context_name)
        before, self._last_use = self._last_use, self.state.serial
        again = held is not None and held.written and before == self._last_use
        if again:
            self.has_more_uses = True
        return again

    def scaled(self, x: Tensor) -> Tensor:
        """`x` times the calibrated scale of every input channel; `x` itself where there is none."""
        return x if self.input_scale is None else x * self.input_scale

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ModulatedLayer":
        before = [self.like.dtype, self.like.device, *self._addresses()]
        super()._apply(fn, recurse)
        if self._like is not None:
            self._like = fn(self._like)
        dtype, device = self.like.dtype, self.like.device
        if before == [dtype, device, *self._addresses()]:
            return self
        self.adopt_parameters()
        if before[0] != dtype and self.weight is not None:
            self.refresh_weight()
        elif before[:2] != [dtype, device]:
            self._move_weight(dtype, device)
        if before[1] != device and self.input is not None:
            self.input.move_static(device)
        return self

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._parameters.values() if tensor is not None]

    def _move_weight(self, dtype: torch.dtype, device: torch.device) -> None:
        """Bring what was made of the weight to `device`: codes in the layout that is liked there, not made again."""
        if self.float_weight is not None:
            self.float_weight = self.float_weight.to(device, dtype)
        self.kernels.clear()
        if (packed := self.packed) is not None:
            self.packed = None
            self.packed = weights.moved(packed, self.problem("product", NOMINAL_ROWS), self.backend, device)
            if self.feeds_geglu:
                self.adopt_parameters()
                self.fuse_geglu(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        incoming = state_dict.get(f"{prefix}weight")
        if incoming is not None and self.weight is None:
            text = "but its own is not kept (keep_original=False); load the whole model again, then accelerate it"
            raise ValueError(f"layer '{self.name}': a float weight was given, {text}")
        if self.calibrated.weight is not None and incoming is not None and incoming.shape == self.weight.shape:
            old = self.weight.detach()
            if not torch.equal(old, incoming.detach().to(old.device, old.dtype)) and not self.give_up_codes():
                text = "calibrated for the ones it has; handle.remove() first, then load and calibrate them"
                raise ValueError(f"layer '{self.name}': other weights were given, but its codes are {text}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh_weight()
        self.state.invalidate("weights were loaded")

    def give_up_codes(self) -> bool:
        """Round the weight from now on, if the calibrated codes are optional; whether they are."""
        if is_optional := self.calibrated.is_optional:
            self.calibrated, self.has_learnt_codes = dataclasses.replace(self.calibrated, weight=None, bias=None), False
        return is_optional

    def adopt_parameters(self) -> None:
        """Take the parameters as they are now for those of the original, without making codes of them."""
        self.state.relocations += 1
        self.state.weight_changes += 1
        self.original.weight, self.original.bias = self.weight, self.bias
        self.bias_data = None if self.bias is None else self.bias.detach()
        if self.calibrated.bias is not None:
            self.bias_data = self.calibrated.bias.to(self.like.device, self.like.dtype)
        if (factors := self.calibrated.input_scale) is not None:
            factors = factors.to(self.like.device, self.like.dtype).view(-1, *[1] * (len(self.weight_shape) - 2))
        self.input_scale = factors
        if self.packed is not None and self.packed.geglu and self.bias_data is not None:
            self.bias_data = weights.interleaved(self.bias_data)
        if self.stack is not None:
            self.stack.refresh_weight()

    def extra_repr(self) -> str:
        return f"{self.name!r}, mode={self.mode}, weight_bits={self.weight_bits}, act_bits={self.act_bits}"


class ModulatedLinear(ModulatedLayer):
    """y = x W^T + b on x [..., in_features], two dimensions or more; dimension 0 counts the samples."""

    memory_format = torch.contiguous_format
    mirrored = ("in_features", "out_features")

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: ModiffConfig | None = None, state: ModulationState | None = None,
        name: str = "linear", *more: Any, **options: Any,
    ) -> "ModulatedLinear":  # fmt: skip
        """The low-bit form of `linear`, which is kept inside and not changed.

        config: None for ModiffConfig(). state: None for one of its own: every forward is then a call of the run that
        `sampling_run` has begun. name: the path of the layer, unique in `state`. more: shared_input, key of the tensor
        it reads (layers that always get the very same tensor share one; None: a tensor of its own), and calibrated:
        codes, scales and bias. ValueError on weights that hold NaN or Inf, on a missing or impossible static scale, and
        on a calibration of another layer."""
        return cls(linear, config or ModiffConfig(), state, name, *more, **options)


class ModulatedConv2d(ModulatedLayer):
    """2-D convolution with zero padding on x [N, C, H, W]; computes in channels_last and returns channels_last."""

    memory_format = torch.channels_last
    mirrored = ("in_channels", "out_channels", "padding_mode", *Window._fields)
    window: Window

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, config: ModiffConfig | None = None, state: ModulationState | None = None,
        name: str = "conv2d", *more: Any, **options: Any,
    ) -> "ModulatedConv2d":  # fmt: skip
        """The low-bit form of `conv`, from the arguments of `ModulatedLinear.from_linear`. Raises ValueError also on
        padding that is not the same number of zeros on both sides."""
        reason = why_not_conv2d(conv)
        if reason is not None:
            raise ValueError(f"layer '{name}': {reason}; leave it float")
        return cls(conv, config or ModiffConfig(), state, name, *more, **options)


def low_bit(layer: nn.Module, *args: Any) -> ModulatedLayer:
    """The low-bit form of a Linear or Conv2d, whose codes `refresh_weight` is to make; arguments of `from_linear`."""
    make: Any = ModulatedConv2d.from_conv2d if isinstance(layer, nn.Conv2d) else ModulatedLinear.from_linear
    return make(layer, *args, makes_codes=False)


@contextlib.contextmanager
def sampling_run(network: nn.Module) -> Iterator[None]:
    """One run of the layers in `network` that have a state of their own: each forward is a call."""
    with contextlib.ExitStack() as runs:
        for module in network.modules():
            if isinstance(module, ModulatedLayer) and module.owns_state:
                runs.enter_context(module.state.sampling_run())
        yield


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def has_int4_cores(device: torch.device) -> bool:
    """Whether the GPU multiplies 4-bit codes at twice the rate of 8-bit ones: sm_80 to sm_89."""
    return is_gpu(device) and (8, 0) <= (capability(device) or (0, 0)) < (9, 0)


def few_bits_pay(device: torch.device, config: ModiffConfig) -> bool:
    """Whether codes of few bits multiply faster than the 8-bit ones that per_block makes of them: on 4-bit cores, with
    4-bit weights (whose own error is larger than that of coarser scales), and on CPUs without VNNI, with 8-bit weights
    (W8A4 is 1.4 times as fast there for 9 dB, docs/cpu_kernels.md; for 4-bit weights, codes need not be small)."""
    if is_gpu(device):
        return config.weight_bits == config.act_bits == 4 and has_int4_cores(device)
    return config.weight_bits == 8 and not cpu.has_vnni()


def why_not_conv2d(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported, only 'zeros'"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size)):
        return "padding='same' with an even kernel pads the two sides differently"
    return None


def window_of(conv: nn.Conv2d) -> Window:
    padding: Any = conv.padding
    if padding == "valid":
        padding = 0, 0
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return Window(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)


class LinearStack:
    """Layers of one input as one Linear: weights stacked along the output channels, one y_hat [..., sum of widths]. Its
    weight is made of the packed weights of its layers, again whenever one of them changes."""

    window = None
    output_shape = ModulatedLayer.output_shape

    @staticmethod
    def fits(layers: Sequence[ModulatedLayer]) -> bool:
        """Whether the layers are of one kind: input, mode, bits, groups, backend and dtype. Layers that scale the
        channels of their input do not read one tensor."""
        formats = {(layer.weight_bits, layer.group_size, layer.weight_shape[1], layer.like.dtype) for layer in layers}
        kinds = {(layer.input, layer.mode, layer.backend, layer.input_scale) for layer in layers}
        return len(formats) == len(kinds) == 1 and layers[0].mode != "float" and layers[0].input_scale is None

    def __init__(self, layers: Sequence[ModulatedLayer]) -> None:
        first = layers[0]
        self.layers = tuple(layers)
        self.widths = [layer.weight_shape[0] for layer in layers]
        self.name = "+".join([first.name, *(layer.name.rpartition(".")[2] for layer in layers[1:])])
        self.state, self.mode, self.input = first.state, first.mode, first.input
        self.backend, self.memory_format = first.backend, first.memory_format
        self.kernels: dict[Any, Callable[..., Any]] = {}
        self.output: OutputState | None = None
        if first.mode == "modulated":
            self.output = self.state.output_of(self.name)
            for layer in layers:
                layer.add_onto(self.output)
            self.output.writers = [self]
        for layer in layers:
            layer.stack = self
        self._packed: PackedWeight | None = None
        self._bias: Tensor | None = None

    @property
    def packed(self) -> PackedWeight:
        if self._packed is None:
            parts = [layer.packed for layer in self.layers]
            self._packed = weights.stack(parts, self.layers[0].weight_shape[1])
            for layer, part in zip(self.layers, weights.parts_of(self._packed, parts)):
                layer.packed = part
            biases = [layer.bias_data for layer in self.layers]
            self._bias = None
            if any(bias is not None for bias in biases):
                zeros = self._packed.scale.new_zeros
                self._bias = torch.cat([zeros(n) if b is None else b for n, b in zip(self.widths, biases)])
        return self._packed

    @property
    def bias_data(self) -> Tensor | None:
        """The stacked bias, zero for a layer without; None if no layer has one."""
        return self._bias if self.packed is not None else None

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        return out.split_with_sizes(self.widths, -1)

    def refresh_weight(self) -> None:
        self._packed = None
        self.kernels.clear()
