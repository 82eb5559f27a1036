"""Weight codes by name: round to nearest, least squared error, GPTQ and AdaRound.

GPTQ and layer-wise AdaRound minimise the error of the layer's output on its inputs X, which depends on X through its
second moment only::

    sum over rows of X of |x W^T - x W_q^T|^2  =  tr((W - W_q) H (W - W_q)^T),    H = X^T X   (im2col for convolutions)

so H, summed over a stream of batches, is all the data that they need.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modiff_kernels.quant.affine import expand_weight_scale, quantize_weight
from modiff_kernels.quant.calibrated import QuantizedWeight
from modiff_kernels.quant.spec import quant_max, quant_min

DAMPING = 0.01  # of the mean diagonal of H, added to it (GPTQ, section 3.3)
BLOCK = 64  # columns whose errors GPTQ hands on at once
SWEEPS = 6
ADAROUND_STEPS, ADAROUND_LR, ADAROUND_WEIGHT = 1000, 0.03, 0.1
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # AdaRound's gamma and zeta


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """diag(D H D^T), float [N]: squared error of every output channel for a weight difference D [N, K]."""
    return ((difference @ hessian) * difference).sum(1)


def rtn(rows: Tensor, hessian: Tensor | None, bits: int, group_size: int) -> QuantizedWeight:
    """Round to nearest, scale from the absmax."""
    return QuantizedWeight(*quantize_weight(rows, bits, group_size), bits, group_size)


def mse(rows: Tensor, hessian: Tensor | None, bits: int, group_size: int) -> QuantizedWeight:
    """Round to nearest, the scale with the least squared error of the weight."""
    return QuantizedWeight(*quantize_weight(rows, bits, group_size, "mse"), bits, group_size)


def gptq(rows: Tensor, hessian: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """GPTQ (Frantar et al., ICLR 2023), then coordinate descent on the same objective, scales refitted in between.

    Columns are rounded in the order of falling diag(H); with U the upper Cholesky factor of (H + damping)^-1 the error
    of a column is handed on to the others: w[:, j:] -= (w_j - scale q_j) / U_jj * U[j, j:]. Scales are those of `mse`.
    """
    start = mse(rows, None, bits, group_size)
    k = rows.shape[1]
    scales = expand_weight_scale(start.scale, k, group_size).expand(-1, k)
    damped = _damped(hessian)
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
    """Coordinate descent: every code in turn takes its best value, the others fixed, until none changes.

    The scale of a whole channel is refitted after each sweep: s = (w H q) / (q H q). The error never grows.
    """
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


def adaround(rows: Tensor, hessian: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """AdaRound (Nagel et al., ICML 2020) on the layer-wise objective: learn for every weight whether to round up.

    W_q = scale * clamp(floor(W / scale) + h(V)), h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1), V by Adam on the output
    error + lambda sum(1 - |2 h(V) - 1|^beta), beta from 20 to 2 after a fifth of the steps; then h(V) is rounded.
    """
    start = mse(rows, None, bits, group_size)
    k = rows.shape[1]
    steps = expand_weight_scale(start.scale, k, group_size).expand(-1, k)
    damped = _damped(hessian)
    damped = damped / output_error(rows, damped).mean().clamp_min(torch.finfo(rows.dtype).tiny)
    floor = (rows / steps).floor()
    with torch.enable_grad():
        logits = rounding_logits(rows / steps - floor).requires_grad_(True)
        optimiser = torch.optim.Adam([logits], lr=ADAROUND_LR)
        for step in range(ADAROUND_STEPS):
            up = rounding(logits)
            codes = (floor + up).clamp(quant_min(bits), quant_max(bits))
            loss = output_error(codes * steps - rows, damped).sum()
            loss = loss + ADAROUND_WEIGHT * rounding_penalty(up, step / ADAROUND_STEPS) / k
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    codes = _codes(floor + (logits.detach() >= 0), bits)
    return QuantizedWeight(codes.to(torch.int8), start.scale, bits, group_size)


def rounding(logits: Tensor) -> Tensor:
    """AdaRound's rectified sigmoid h(V), in 0..1."""
    return (torch.sigmoid(logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def rounding_logits(part: Tensor) -> Tensor:
    """V with h(V) = part, in 0..1: the inverse of `rounding`."""
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (part - STRETCH_LOW) - 1)


def rounding_penalty(up: Tensor, progress: float) -> Tensor:
    """sum(1 - |2 h - 1|^beta), which draws h to 0 or 1: 0 in the first fifth, then beta falls from 20 to 2."""
    if progress < 0.2:
        return up.new_zeros(())
    beta = 20 - 18 * (progress - 0.2) / 0.8
    return (1 - (2 * up - 1).abs() ** beta).sum()


def _codes(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp(quant_min(bits), quant_max(bits))


def _damped(hessian: Tensor) -> Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny))
    return damped


WeightFunction = Callable[[Tensor, Tensor, int, int], QuantizedWeight]
WEIGHT_METHODS: dict[str, WeightFunction] = {"rtn": rtn, "mse": mse, "gptq": gptq, "adaround": adaround}
NEED_DATA = ("gptq", "adaround")


def default_weight_method(bits: int) -> str:
    """Rounding to nearest loses nothing at 8 bits and 20 dB at 4."""
    return "rtn" if bits == 8 else "gptq"
