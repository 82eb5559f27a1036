"""What `ModiffConfig.plan` stands for: a plan that is given, one from the cache, or one estimated from shapes."""

import copy
import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modiff_kernels.backends import cpu
from modiff_kernels.backends.triton.quantize_tiling import tiling, tiling_by_groups
from modiff_kernels.config import ModiffConfig
from modiff_kernels.config.plan import CONSTANT, FLOAT_MODE, MODULATED, QUANTIZED, LayerPlan, Mode, ModeCost, UnitPlan
from modiff_kernels.integrations import plan_cache
from modiff_kernels.integrations.replacements import Replacements, has_delayed_scales, replacements_of, runs_on_gpu
from modiff_kernels.log import logger
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState
from modiff_kernels.nn.blocks.base import ALONE
from modiff_kernels.nn.blocks.resample import FusedResample, FusedUpsample2D
from modiff_kernels.nn.layer import has_int4_cores
from modiff_kernels.ops import dispatch
from modiff_kernels.planning import choice
from modiff_kernels.planning import cost as cost_model
from modiff_kernels.planning.cost import LayerShape, Machine, Sizes
from modiff_kernels.quant.calibrated import CalibratedLayer

BATCH = 8  # of the UNet: four pictures with guidance. Modes hardly depend on it
TEXT_TOKENS = 77  # of a text encoder, where a model does not say it; keys and values are a small part of its time
COMPARED_AT = 1, 64  # where launches weigh most, and where products do
COMPILE = (
    "compile the UNet itself, measure your batch with make_plan(), or give plan='modulated' for low bits all the same"
)
PROBE_ROWS, PROBE_FEATURES = 4096, 1024  # compute-bound on everything this runs on
PROBE_IMAGE = (8, 256, 32, 32)  # the same, of a 3x3 convolution
PROBE_BYTES = 2**26  # above the caches
PROBE_REPEATS = 5
GRAPH_LAUNCH = 1.5e-6  # seconds between two kernels of a CUDA graph: an assumption, nothing was measured
LEAD_CYCLES = 100_000_000  # 50 ms or more: longer than the host takes for a call of a large UNet


NORMS = {"conv1": "norm1", "conv2": "norm2"}  # before the layers of a residual block


def plan_of(
    unet: nn.Module, config: ModiffConfig, calibrated: Mapping[str, CalibratedLayer], share_inputs: bool
) -> LayerPlan | None:
    """The plan that `config` asks for, within its max_state_bytes, or None. plan=None is "auto" on a GPU, where
    modulating all layers moves more bytes than float does, and on a CPU where low bits are slow. Logs where a given one
    was made elsewhere. ValueError for a file that is no plan, and where nothing is stored and shapes are not known."""
    plan: Any = config.plan
    by_default = plan is None and None not in (config.weight_bits, config.act_bits)
    by_default = by_default and (runs_on_gpu(unet) or why_slow(unet, config) is not None)
    if plan in (MODULATED, QUANTIZED):
        return None
    if by_default or plan == "auto":
        plan = plan_cache.newest(plan_cache.key_of(unet, config, ()))
        try:
            plan = plan or estimated(unet, config, calibrated, share_inputs)
        except ValueError as error:
            if not by_default:
                raise
            logger.warning("all layers are %s, for modes could not be chosen by their cost: %s", config.mode, error)
    elif isinstance(plan, str):
        try:
            plan = LayerPlan.from_json(Path(plan).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"plan: {config.plan} cannot be read as a layer plan: {error}") from error
    if isinstance(plan, LayerPlan) and plan.key is not None and not (by_default or config.plan == "auto"):
        here, made = vars(plan_cache.key_of(unet, config, ())), vars(plan.key)
        others = {"device": f"device ({made['device']})", "model": "UNet", "versions": f"version ({made['versions']})"}
        if found := [text for name, text in others.items() if made[name] != here[name]]:
            text = "the layer plan was made for another %s, so what it says of time and fidelity may not hold; %s"
            logger.warning(text, " and ".join(found), "make_plan() or `modiff calibrate --plan` makes one for this")
    if plan is None or config.max_state_bytes is None:
        return plan
    if plan.key is None and any(unit.mode.kind == MODULATED for unit in plan.units):
        text = "the plan does not say for which shape it is; give one of make_plan() or `modiff calibrate --plan`"
        raise ValueError(f"max_state_bytes={config.max_state_bytes}: {text}")
    return choice.within_state(plan, config.max_state_bytes)


def why_slow(unet: nn.Module, config: ModiffConfig) -> str | None:
    """Why low bits do not pay on the CPU of `unet`, where no backend is named."""
    named = config.backend != dispatch.AUTO or dispatch.forced_backend() is not None
    return None if named or next(unet.parameters()).device.type != "cpu" else cpu.why_slow()


def low_bit_modes(config: ModiffConfig) -> tuple[Mode, ...]:
    """The low-bit modes that a plan may take besides float, that of `config` last. ValueError where it leaves none."""
    if config.weight_bits is None or config.act_bits is None:
        text = f"act_bits={config.act_bits} leave no low-bit mode to choose; give both, or no plan"
        raise ValueError(f"plan: weight_bits={config.weight_bits}, {text}")
    if config.mode == QUANTIZED:
        return (Mode(QUANTIZED, config.act_bits),)
    return Mode(QUANTIZED, 8), Mode(MODULATED, config.act_bits)


def estimated(
    unet: nn.Module, config: ModiffConfig, calibrated: Mapping[str, CalibratedLayer], share_inputs: bool,
    machine: Machine | None = None, batch: int = BATCH, compared_at: Sequence[int] = COMPARED_AT,
) -> LayerPlan:  # fmt: skip
    """A plan from shapes: of every unit the mode that is fastest by the cost model (planning/cost.py), after what its
    errors weigh in the pictures. machine: None for the rates of the UNet's device, which take a second to measure.
    compared_at: all stays float if on a GPU the plan loses to the compiled float network at one of these batches."""
    modes = (FLOAT_MODE, *low_bit_modes(config))
    own = dataclasses.replace(config, schedule=None, plan=None, max_state_bytes=None)
    replaced = replacements_of(unet, own, calibrated, share_inputs)
    shape, shapes = traced_shapes(unet, batch)
    parameter = next(unet.parameters())
    machine = machine or measured_machine(parameter.device, config)
    state_bytes = replaced.state.dtype_on(parameter.device).itemsize
    sizes = Sizes(parameter.element_size(), state_bytes, config.weight_bits, has_delayed_scales(unet, own))
    units, shapes_of, totals = [], [], dict.fromkeys(modes, 0.0)
    grouped = replaced.units()
    last = [".".join(path.split(".")[:2]) for path in grouped][-1]
    for path, layers in grouped.items():
        described = [_described(name, replaced, shapes[name]) for name in layers if name in shapes]
        shapes_of.append(described)
        costs = []
        for mode in modes:
            time_us = 1e6 * sum(cost_model.seconds(layer, mode, sizes, machine) for layer in described)
            state = state_bytes_of(layers, replaced, shapes) if mode.kind == MODULATED else 0
            moved = sum(each.bytes for layer in described for each in cost_model.passes(layer, mode, sizes))
            costs.append(ModeCost(mode, time_us, None, state, moved))
        windowed = any(layer.windowed for layer in described)
        kind = "tokens" if not windowed else "last" if path.startswith(f"{last}.") else "images"
        best = min(costs, key=lambda cost: cost.time_us * (1 + cost_model.weight_of_error(kind, cost.mode)))
        fastest = min(costs, key=lambda cost: cost.time_us)
        why = "fastest" if best is fastest else f"{fastest.mode} is faster, but its errors weigh more than that"
        units.append(UnitPlan(path, best.mode, layers, tuple(costs), f"estimated: {why}"))
        for cost in costs:
            totals[cost.mode] += cost.time_us
    gains, gain = {}, ""
    for count in compared_at if runs_on_gpu(unet) and {unit.mode for unit in units} != {FLOAT_MODE} else ():
        pairs = [(unit, shape.scaled(count / batch)) for unit, held in zip(units, shapes_of) for shape in held]
        compiled = sum(cost_model.seconds(shape, FLOAT_MODE, sizes, machine, compiled=True) for _, shape in pairs)
        gains[compiled / sum(cost_model.seconds(shape, unit.mode, sizes, machine) for unit, shape in pairs)] = count
    if gains and min(gains) < 1:
        gain = f"low bits are {min(gains):.2f}x as fast as the compiled float network at batch {gains[min(gains)]}"
        logger.warning("all layers stay float: by the model %s; %s", gain, COMPILE)
    elif (slow := why_slow(unet, config)) is not None:
        gain = f"low bits are slower than float without the kernels of this package: {slow}"
        logger.warning("all layers stay float, for %s; plan='modulated' has low bits nevertheless", gain)
    if gain:
        units = [dataclasses.replace(unit, mode=FLOAT_MODE, reason=f"estimated: {gain}") for unit in units]
    took = sum(unit.cost(unit.mode).time_us for unit in units)
    counts = ", ".join(f"{count} {mode}" for mode, count in Counter(str(unit.mode) for unit in units).items())
    gain = gain or f"{totals[FLOAT_MODE] / max(took, 1e-9):.2f}x as fast as float layers by the model"
    text = f"estimated from shapes at batch {batch}, nothing was measured: {counts}; {gain}"
    summary = f"{text}; make_plan() or `modiff calibrate --plan` measures"
    return LayerPlan(tuple(units), plan_cache.key_of(unet, config, shape), "estimated", (), summary)


def _described(name: str, replaced: Replacements, shape: LayerShape) -> LayerShape:
    """`shape` with what is around the layer."""
    layer, blocks = replaced.layers[name], [block for block in replaced.fused if name.startswith(f"{block}.")]
    block = max(blocks, key=len, default=None)
    role = ALONE if block is None else replaced.fused[block].layers.get(name[len(block) + 1 :], ALONE)
    is_reader = layer.input is not None and layer.input.key != name
    norm: Any = getattr(replaced.fused.get(block or ""), NORMS.get(name.rpartition(".")[2], ""), None)
    fits = False
    if norm is not None:
        tiles = tiling(1, shape.rows, norm.num_channels, "per_sample", 8, "group_norm", torch.half.itemsize)
        fits = tiling_by_groups(tiles, norm.num_groups, torch.half.itemsize).width > 0
    return shape._replace(role=role, is_reader=is_reader, is_constant=layer.mode == CONSTANT, norm_fits=fits)


def state_bytes_of(layers: Iterable[str], replaced: Replacements, shapes: Mapping[str, LayerShape]) -> int:
    """Bytes that the state of these layers takes in a run, x_hat, y_hat and outputs that are computed once."""
    x_hat: dict[int, int] = {}
    y_hat: dict[int, Counter[int]] = defaultdict(Counter)
    kept = 0
    for name in layers:
        layer, shape, weight = replaced.layers[name], shapes.get(name), replaced.originals[name].weight
        if shape is not None and layer.mode == CONSTANT:
            kept += shape.outputs * weight.element_size()
        if shape is None or layer.mode != MODULATED:
            continue
        inputs, block = shape.inputs, replaced.fused.get(name.rpartition(".")[0])
        if isinstance(block, FusedResample):  # which keeps the image as it was before
            inputs = shape.outputs // weight.shape[0] * weight.shape[1]
            inputs = inputs // 4 if isinstance(block, FusedUpsample2D) else inputs * 4
        x_hat[id(layer.input)] = inputs
        y_hat[id(layer.output)][id(layer.input)] += shape.outputs
    # Layers that share a y_hat and read different tensors add onto it; those that read the same one have parts of it.
    elements = sum(x_hat.values()) + sum(max(parts.values()) for parts in y_hat.values())
    return kept + elements * replaced.state.dtype_on(weight.device).itemsize if elements else kept


def traced_shapes(unet: nn.Module, batch: int = 1) -> tuple[tuple[int, ...], dict[str, LayerShape]]:
    """Shape of a sample, and by path what the Linear and Conv2d layers compute in one call, found without computing.
    Layers that a call does not reach are missing. ValueError for a UNet whose inputs cannot be made up."""
    memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in unet.buffers()}
    for parameter in unet.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    hollow = copy.deepcopy(unet, memo).eval()
    shapes: dict[str, LayerShape] = {}

    def record(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight, outputs = module.weight, output.numel()
        windowed = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        multiply_adds = outputs * weight[0].numel()
        rows = inputs[0][:, 0].numel() // len(inputs[0]) if inputs[0].ndim == 4 else inputs[0][0, ..., 0].numel()
        sizes = inputs[0].numel(), outputs, weight.numel(), multiply_adds
        shapes[path] = LayerShape(*sizes, windowed=windowed, rows=rows)

    for path, module in hollow.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(partial(record, path))
    try:
        sample, arguments = _example_inputs(hollow, batch)
        with torch.inference_mode():
            hollow(sample, **arguments)
    except Exception as error:
        text = f"to see its shapes ({error}); measure with make_plan(), which takes them from a run"
        raise ValueError(f"plan: the inputs of {type(unet).__name__} could not be made up {text}") from error
    return tuple(sample.shape), shapes


def _example_inputs(unet: nn.Module, batch: int) -> tuple[Tensor, dict[str, Any]]:
    """Sample and keyword arguments of one call of a diffusers UNet, on the meta device."""
    config: Any = unet.config
    dtype = next(unet.parameters()).dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    size = config.sample_size
    sample = empty(config.in_channels, *((size, size) if isinstance(size, int) else size))
    arguments: dict[str, Any] = {"timestep": torch.empty(batch, device="meta")}
    if any(getattr(config, name, None) is not None for name in ("num_class_embeds", "num_embeds_ada_norm")):
        arguments["class_labels"] = torch.empty(batch, dtype=torch.long, device="meta")
    width = getattr(config, "cross_attention_dim", None)
    if width is not None:
        arguments["encoder_hidden_states"] = empty(TEXT_TOKENS, width if isinstance(width, int) else width[0])
    if getattr(config, "addition_embed_type", None) == "text_time":
        times = 6
        text = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": empty(text), "time_ids": empty(times)}
    return sample, arguments


class Timer(NamedTuple):
    """Sets marks in the time of a device, and tells the seconds between two of them once `wait` was called. lead: keeps
    the device busy while the host launches what is timed, so that kernels are and not the Python between them."""

    lead: Callable[[], None]
    mark: Callable[[], Any]
    wait: Callable[[], None]
    seconds: Callable[[Any, Any], float]

    def timed(self, function: Callable[..., Any], *inputs: Any) -> float:
        """Seconds that function(*inputs) takes."""
        self.lead()
        start = self.mark()
        function(*inputs)
        end = self.mark()
        self.wait()
        return self.seconds(start, end)


def timer_of(device: torch.device, clock: Callable[[], float] | None = None) -> Timer:
    """The timer of `device`, current or not: events in its current stream, set without waiting, or readings of `clock`
    in seconds, by default of the host, for a device that computes while the host waits."""
    if clock is not None or device.type != "cuda":
        return Timer(lambda: None, clock or time.perf_counter, lambda: None, lambda start, end: end - start)

    def lead() -> None:
        with torch.cuda.device(device):
            torch.cuda._sleep(LEAD_CYCLES)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    wait = partial(torch.cuda.synchronize, device)
    return Timer(lead, mark, wait, lambda start, end: start.elapsed_time(end) / 1e3)


def measured_machine(device: torch.device, config: ModiffConfig) -> Machine:
    """The three numbers of `device`: from products and 3x3 convolutions, float and low-bit, and a copy. The faster of
    product and convolution counts, the best of a few repeats each: libraries differ by a factor of three between the
    two on some CPUs, and a bound must be one for both."""
    timer = timer_of(device)
    options: Any = {"device": device, "dtype": torch.float16 if device.type == "cuda" else torch.float32}
    channels = PROBE_IMAGE[1]
    linear = nn.Linear(PROBE_FEATURES, PROBE_FEATURES, **options).requires_grad_(False)
    conv = nn.Conv2d(channels, channels, 3, padding=1, **options).requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    plain = ModiffConfig(config.weight_bits, 8, mode=QUANTIZED, group_size=config.group_size, backend=config.backend)
    low_bit_linear = ModulatedLinear.from_linear(linear, plain, ModulationState(), "probe")
    low_bit_conv = ModulatedConv2d.from_conv2d(conv, plain, ModulationState(), "probe")
    x = torch.randn(PROBE_ROWS, PROBE_FEATURES, **options)
    image = torch.randn(PROBE_IMAGE, **options).to(memory_format=torch.channels_last)
    source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(function: Callable[..., Any], *inputs: Tensor) -> float:
        return max(min(timer.timed(function, *inputs) for _ in range(PROBE_REPEATS)), 1e-9)

    def rate(linear: nn.Module, conv: nn.Module) -> float:
        product = 2 * PROBE_ROWS * PROBE_FEATURES**2 / best(linear, x)
        return max(product, 2 * 9 * channels * image.numel() / best(conv, image))

    with torch.inference_mode():
        bandwidth = 2 * PROBE_BYTES / best(target.copy_, source)
        rates = rate(linear, conv), rate(low_bit_linear, low_bit_conv)
    int4_ops = 2 * rates[1] if has_int4_cores(device) else 0.0  # by data sheets
    return Machine(*rates, bandwidth, GRAPH_LAUNCH if device.type == "cuda" else 0.0, int4_ops)
