"""Weight codes by name: round to nearest, least squared error, and GPTQ.

GPTQ minimises the error of the layer's output on its inputs X, which depends on X through its second moment only::

    sum over rows of X of |x W^T - x W_q^T|^2  =  tr((W - W_q) H (W - W_q)^T),    H = X^T X   (im2col for convolutions)

so H, summed over a stream of batches, is all the data that it needs."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData, stream
from modiff_kernels.calibration.job import Job, Layers, Tensors
from modiff_kernels.nn.layer import window_of
from modiff_kernels.quant.affine import expand_weight_scale, quantize_weight, weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.spec import quant_max, quant_min

DAMPING = 0.01  # of the mean diagonal of H, added to it (GPTQ, section 3.3)
BLOCK = 64  # columns whose errors GPTQ hands on at once
SWEEPS = 6
HESSIAN_BYTES = 2**30  # second moments of so many layers are summed in one pass over the data
HESSIAN_ROWS = 2**15  # of the im2col input of a layer, drawn at random from all data


def rtn(rows: Tensor, hessian: Tensor | None, bits: int, group_size: int, scale: str = "absmax") -> QuantizedWeight:
    """Round to nearest. scale: "absmax", or "mse" with the least squared error of the weight."""
    return QuantizedWeight(*quantize_weight(rows, bits, group_size, scale), bits, group_size)


def gptq(rows: Tensor, hessian: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """GPTQ (Frantar et al., ICLR 2023), then coordinate descent on the same objective, scales refitted in between.

    Columns are rounded in the order of falling diag(H); with U the upper Cholesky factor of (H + damping)^-1 the error
    of a column is handed on to the others: w[:, j:] -= (w_j - scale q_j) / U_jj * U[j, j:]. Scales are those of `mse`.
    """
    start = rtn(rows, None, bits, group_size, "mse")
    k = rows.shape[1]
    scales = expand_weight_scale(start.scale, k, group_size).expand(-1, k)
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order].double()))
    factor = torch.linalg.cholesky(inverse, upper=True).to(rows.dtype)
    left, steps = rows[:, order].clone(), scales[:, order]
    codes = torch.empty_like(left)
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        errors = torch.empty_like(left[:, begin:end])
        for j in range(begin, end):
            step = steps[:, j]
            codes[:, j] = _codes(left[:, j] / step, bits)
            errors[:, j - begin] = (left[:, j] - codes[:, j] * step) / factor[j, j]
            left[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
        left[:, end:] -= errors @ factor[begin:end, end:]
    return _descend(rows, damped, codes[:, order.argsort()], start)


def _descend(rows: Tensor, hessian: Tensor, codes: Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """Coordinate descent: every code in turn takes its best value, the others fixed, until none changes. The scale of a
    whole channel is refitted after each sweep: s = (w H q) / (q H q). The error never grows."""
    bits, group_size, scale = start.bits, start.group_size, start.scale
    k, diagonal = rows.shape[1], hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True).tolist()
    for _ in range(SWEEPS):
        steps = expand_weight_scale(scale, k, group_size).expand(-1, k)
        gradient = ((rows - steps * codes) @ hessian).t().contiguous()
        before = codes.clone()
        for j in order:
            step = steps[:, j]
            best = _codes(codes[:, j] + gradient[j] / (diagonal[j] * step), bits)
            gradient -= hessian[:, j, None] * ((best - codes[:, j]) * step)
            codes[:, j] = best
        if group_size == -1:
            product = codes @ hessian
            fit, size = (product * rows).sum(1), (product * codes).sum(1)
            scale = torch.where((fit > 0) & (size > 0), fit / size.clamp_min(torch.finfo(size.dtype).tiny), scale)
        if torch.equal(before, codes):
            break
    return QuantizedWeight(codes.to(torch.int8), scale, bits, group_size)


def _codes(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp(quant_min(bits), quant_max(bits))


mse = functools.partial(rtn, scale="mse")
WEIGHT_METHODS: dict[str, Callable[..., QuantizedWeight]] = {"rtn": rtn, "mse": mse, "gptq": gptq}


def layers_with_codes(job: Job, data: CalibrationData) -> Layers:
    """All layers with codes by the option weight_method, "auto": rounding loses nothing at 8 bits and 20 dB at 4."""
    bits, name = job.config.weight_bits, job.options.weight_method
    if name == "auto":
        name = "rtn" if bits == 8 else "gptq"
    whole = -1 if job.config.group_size is None else job.config.group_size
    group_sizes = {path: job.splits[path].group_size if path in job.splits else whole for path in job.layers}

    def compute(paths: Sequence[str]) -> Layers:
        hessians, layers = second_moments(job, data, paths) if name == "gptq" else {}, {}
        for path in job.bar(paths, name, unit="layer"):
            scale, hessian = job.input_scale(path), hessians.pop(path, None)
            weight = quantize_layer(job.layers[path], hessian, name, bits, group_sizes[path], scale)
            layers[path] = CalibratedLayer(weight, input_scale=scale)
        return layers

    layers: Layers = {}
    for number, paths in enumerate(_memory_groups(job.layers) if name == "gptq" else [list(job.layers)]):
        layers |= job.layers_once(f"weights-{name}-{number}", functools.partial(compute, paths))
    return layers


def quantize_layer(
    layer: nn.Module, hessian: Tensor | None, method: str, bits: int, group_size: int, input_scale: Tensor | None = None
) -> QuantizedWeight:
    """Codes of one layer, for inputs that are multiplied by input_scale (then of weight / input_scale). hessian:
    float32 [K, K], of the inputs as they are, or [groups, K, K] for a convolution with groups."""
    rows = weight_rows(layer.weight.detach()).float()
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


def second_moments(job: Job, data: CalibrationData, paths: Sequence[str]) -> Tensors:
    """X^T X / rows, float32 [K, K], of about HESSIAN_ROWS rows of the im2col inputs X of each layer over all data."""
    layers = {path: job.layers[path] for path in paths}
    sums: Tensors = {}
    rows = dict.fromkeys(paths, 0)
    generators = {path: job.generator(path) for path in paths}
    share = -(-HESSIAN_ROWS * job.batch // len(data))

    def add(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
        operand = input_rows(layers[path], x)
        if operand.shape[-2] > share:
            drawn = torch.randperm(operand.shape[-2], generator=generators[path])[:share].to(x.device)
            operand = operand.index_select(-2, drawn)
        product = operand.transpose(-1, -2) @ operand
        sums[path] = sums[path].add_(product) if path in sums else product
        rows[path] += operand.shape[-2]

    stream(job.unet, data, layers, add, job.batches(data, "second moments"))
    return {path: total / rows[path] for path, total in sums.items()}


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The GEMM operand of a Linear or Conv2d on `x`: float32 [M, K] (im2col; K in (r, s, c) order for a convolution). A
    convolution with groups gives [groups, M, K]."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).float()
    window = window_of(module)
    columns = nn.functional.unfold(x.float(), window.kernel_size, window.dilation, window.padding, window.stride)
    n, _, pixels = columns.shape
    groups, channels = window.groups, x.shape[1] // window.groups
    rows = columns.view(n, groups, channels, -1, pixels).permute(1, 0, 4, 3, 2).reshape(groups, n * pixels, -1)
    return rows if groups > 1 else rows[0]


def _memory_groups(layers: dict[str, nn.Module]) -> list[list[str]]:
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
