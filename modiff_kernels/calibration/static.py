"""Calibration from full-precision activations: methods "minmax", "mse", "percentile", "ndtc" (PTQ4DM) and "distill".

Weight codes come from `weights`, activation scales from `scales`: of the layer's input in mode "quantized", of its
change since the call before (MoDiff's residual) in mode "modulated".
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modiff_kernels.calibration import scales
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.methods import Job, Options, batches_of, check_choice, check_positive, register
from modiff_kernels.calibration.network import learn_network
from modiff_kernels.calibration.streaming import input_rows, stream
from modiff_kernels.calibration.weights import NEED_DATA, WEIGHT_METHODS, default_weight_method
from modiff_kernels.quant.affine import weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

HESSIAN_BYTES = 2**30  # second moments of so many layers are summed in one pass over the data
HESSIAN_ROWS = 2**15  # of the im2col input of a layer, drawn at random from all data


@dataclasses.dataclass(frozen=True)
class StaticOptions(Options):
    """Options of the layer-wise methods.

    weight_method: a name of WEIGHT_METHODS; "auto" is "rtn" at 8 bits, "gptq" below. scale_search: "minmax", "mse" (the
    scale with the least L_p error) or "percentile". p: of "mse". percentile: per cent of the values that are not
    clipped. table: one scale per call of the run instead of one per layer; between the calls that gave data it is
    interpolated. network_iterations: steps of learning the codes of the whole network at once (see `network`), 0 for
    none. network_lr: first rate of Adam, in code steps. learn_batch: points of an iteration.
    """

    weight_method: str = "auto"
    scale_search: str = "mse"
    p: float = 2.4
    percentile: float = 99.9
    table: bool = False
    network_iterations: int = 0
    network_lr: float = 0.003
    learn_batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weight_method", self.weight_method, ("auto", *WEIGHT_METHODS))
        check_choice("scale_search", self.scale_search, scales.SEARCHES)
        check_choice("table", self.table, (True, False))
        for name in ("p", "network_lr", "learn_batch"):
            check_positive(name, getattr(self, name))
        if self.network_iterations < 0:
            raise ValueError(f"calibrate: network_iterations={self.network_iterations} is not allowed; give 0 or more")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"calibrate: percentile={self.percentile} is not allowed; give above 50 and up to 100")


@register("distill", StaticOptions, "mse, and codes learnt with the whole network", network_iterations=1200)
@register("ndtc", StaticOptions, "PTQ4DM: time steps from a clipped normal, least L_2.4 error", time_steps="ndtc")
@register("percentile", StaticOptions, "uniform time steps, scales that clip 0.1 %", scale_search="percentile")
@register("mse", StaticOptions, "uniform time steps, scales with the least L_p error (p = 2.4)")
@register("minmax", StaticOptions, "uniform time steps, scales that clip nothing", scale_search="minmax")
def static(job: Job) -> dict[str, CalibratedLayer]:
    """Weight codes and activation scales of every layer, from full-precision activations."""
    data = job.data()
    if job.weights is not None:
        layers = dict(job.weights)
    else:
        weights = calibrated_weights(job, data, job.options.weight_method)
        layers = {path: CalibratedLayer(weights[path]) for path in job.layers}
        if job.options.network_iterations:
            layers = learn_network(job, data, layers)
    activations = activation_scales(job, data) if needs_scales(job) else {}
    return {path: dataclasses.replace(layer, **activations.get(path, {})) for path, layer in layers.items()}


def needs_scales(job: Job) -> bool:
    """Whether the config asks for static activation scales."""
    return job.config.act_bits is not None and job.config.scale_mode == "static"


def calibrated_weights(job: Job, data: CalibrationData, method: str) -> dict[str, QuantizedWeight]:
    """Codes of every layer by a method of WEIGHT_METHODS, or "auto"."""
    bits = job.config.weight_bits
    name = default_weight_method(bits) if method == "auto" else method
    whole = -1 if job.config.group_size is None else job.config.group_size
    group_sizes = {path: job.splits[path].group_size if path in job.splits else whole for path in job.layers}
    found: dict[str, QuantizedWeight] = {}
    for number, paths in enumerate(_memory_groups(job.layers, name in NEED_DATA)):

        def compute(paths: Sequence[str] = paths) -> dict[str, Tensor]:
            hessians = second_moments(job, data, paths) if name in NEED_DATA else {}
            tensors: dict[str, Tensor] = {}
            for path in job.bar(paths, name, unit="layer"):
                scale, hessian = job.input_scale(path), hessians.pop(path, None)
                weight = quantize_layer(job.layers[path], hessian, name, bits, group_sizes[path], scale)
                tensors.update({f"{path}/codes": weight.codes, f"{path}/scale": weight.scale})
            return tensors

        tensors = job.workspace.once(f"weights-{name}-{number}", compute)
        for path in paths:
            found[path] = QuantizedWeight(tensors[f"{path}/codes"], tensors[f"{path}/scale"], bits, group_sizes[path])
    return found


def quantize_layer(
    module: nn.Module,
    hessian: Tensor | None,
    method: str,
    bits: int,
    group_size: int,
    input_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Codes of one layer, for inputs that are multiplied by input_scale (then of weight / input_scale).

    hessian: float32 [K, K], of the inputs as they are, or [groups, K, K] for a convolution with groups.
    """
    rows = weight_rows(module.weight.detach()).float()
    function = WEIGHT_METHODS[method]
    if input_scale is not None:
        scale = input_scale.repeat(rows.shape[1] // len(input_scale))  # K runs in (r, s, c) order
        rows = rows / scale
        hessian = None if hessian is None else hessian * torch.outer(scale, scale)
    if hessian is None or hessian.ndim == 2:
        return function(rows, hessian, bits, group_size)
    parts = [function(part, own, bits, group_size) for part, own in zip(rows.chunk(len(hessian)), hessian)]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    return QuantizedWeight(codes, scale, bits, group_size)


def second_moments(job: Job, data: CalibrationData, paths: Sequence[str]) -> dict[str, Tensor]:
    """X^T X / rows, float32 [K, K], of about HESSIAN_ROWS rows of the im2col inputs X of each layer over all data."""
    layers = {path: job.layers[path] for path in paths}
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(paths, 0)
    generators = {path: job.workspace.generator(path) for path in paths}
    share = -(-HESSIAN_ROWS * job.batch // len(data))

    def add(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
        operand = input_rows(layers[path], x)
        if operand.shape[-2] > share:
            drawn = torch.randperm(operand.shape[-2], generator=generators[path])[:share].to(x.device)
            operand = operand.index_select(-2, drawn)
        product = operand.transpose(-1, -2) @ operand
        sums[path] = sums[path].add_(product) if path in sums else product
        rows[path] += operand.shape[-2]

    stream(job.unet, data, layers, add, batches_of(job, data, "second moments"))
    return {path: total / rows[path] for path, total in sums.items()}


def activation_scales(job: Job, data: CalibrationData) -> dict[str, dict[str, Tensor]]:
    """act_scale, float32 [1] or [calls], and in mode "quantized" act_zero_point, of every layer by path."""
    options, bits = job.options, job.config.act_bits
    pairs = job.config.mode == "modulated"

    def compute() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, by_call in _histograms(job, data, pairs).items():
            if pairs:
                found = {
                    call: (
                        scales.symmetric_scale(histogram, bits, options.scale_search, options.p, options.percentile),
                    )
                    for call, histogram in by_call.items()
                }
            else:
                found = {
                    call: scales.affine_scale(histogram, bits, options.scale_search, options.p, options.percentile)
                    for call, histogram in by_call.items()
                }
            names = ("act_scale",) if pairs else ("act_scale", "act_zero_point")
            for name, *values in zip(names, *found.values()):
                tensors[f"{path}/{name}"] = (
                    _over_calls(list(found), torch.cat(values), data) if options.table else values[0]
                )
        return tensors

    tensors = job.workspace.once("activations", compute)
    found: dict[str, dict[str, Tensor]] = {path: {} for path in job.layers}
    for key, value in tensors.items():
        path, _, name = key.rpartition("/")
        found[path][name] = value
    return found


def _histograms(job: Job, data: CalibrationData, pairs: bool) -> dict[str, dict[int, scales.Histogram]]:
    """By layer and call (0 for all of them without `table`), the histogram of its inputs or of their changes."""
    ranges: dict[tuple[str, int], scales.Range] = {}
    histograms: dict[str, dict[int, scales.Histogram]] = {path: {} for path in job.layers}

    def each(use: Callable[[tuple[str, int], Tensor], None]) -> Callable[..., None]:
        def on_input(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
            values = (x if previous is None else x - previous).float()
            scale = job.input_scale(path)
            if scale is not None:
                values = values * scale.view(1, -1, *[1] * (values.ndim - 2))
            if not job.options.table:
                use((path, 0), values)
                return
            calls = data.call[points].repeat_interleave(len(values) // len(points))
            for call in calls.unique().tolist():
                use((path, call), values[calls == call])

        return on_input

    def widen(key: tuple[str, int], values: Tensor) -> None:
        ranges.setdefault(key, scales.Range()).add(values)

    def count(key: tuple[str, int], values: Tensor) -> None:
        path, call = key
        if call not in histograms[path]:
            histograms[path][call] = scales.Histogram(ranges[key].low, ranges[key].high)
        histograms[path][call].add(values)

    stream(job.unet, data, job.layers, each(widen), batches_of(job, data, "ranges"), pairs)
    stream(job.unet, data, job.layers, each(count), batches_of(job, data, "histograms"), pairs)
    return {path: dict(sorted(by_call.items())) for path, by_call in histograms.items()}


def _over_calls(known: list[int], values: Tensor, data: CalibrationData) -> Tensor:
    """`values` at the calls `known`, over all calls of a run: linear in between, constant outside."""
    calls = torch.arange(len(data.timesteps), dtype=torch.float64)
    positions = torch.tensor(known, dtype=torch.float64)
    right = (
        torch.searchsorted(positions, calls).clamp(1, len(known) - 1)
        if len(known) > 1
        else torch.zeros_like(calls).long()
    )
    left = (right - 1).clamp_min(0)
    width = (positions[right] - positions[left]).clamp_min(1)
    part = ((calls - positions[left]) / width).clamp(0, 1)
    between = values[left].double() * (1 - part) + values[right].double() * part
    return between.round().int() if values.dtype == torch.int32 else between.float()


def _memory_groups(layers: dict[str, nn.Module], need_data: bool) -> list[list[str]]:
    """The paths in order, split so that the second moments of a part take at most HESSIAN_BYTES (or one layer)."""
    if not need_data:
        return [list(layers)]
    groups: list[list[str]] = [[]]
    taken = 0
    for path, module in layers.items():
        size = 4 * getattr(module, "groups", 1) * module.weight[0].numel() ** 2
        if groups[-1] and taken + size > HESSIAN_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(path)
        taken += size
    return groups
