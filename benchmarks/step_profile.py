"""Where the time of a UNet call goes, by kind of work.

The profiler's own times of the ops of several calls are summed by kind, and what is left of the same calls without
profiler is *Python and dispatch*: layers, blocks and the UNet's forward, and torch's way to each op. On a GPU the
times are those of kernels, and what is left are gaps between them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "codes": r"modiff(_\w+)?::\w*quantize|range_kernel|quantize_kernel|statistics_kernel|coefficients_kernel"
    r"|modiff::.*(Pass|Statistics|Coefficients)",
    "integer products": r"modiff(_\w+)?::(convolve|accumulate|modulated|quantized)|product_kernel|finish_kernel"
    r"|modiff::.*(Product|FinishSplits|WeightSums)|weight_sums_kernel|modulated_linear_kernel",
    "attention": r"attention|fmha|flash|aten::(bmm|baddbmm|_softmax)",
    "float layers": r"convolution|conv2d|aten::(addmm|mm|linear)|gemm|cudnn|cublas|cutlass|nvjet|xmma",
    "norms and activations": r"norm|silu|gelu",
    "additions and copies": r"aten::(add|mul|div|cat|copy_|clone|upsample|index|sub)|elementwise|CatArray|memcpy",
}
"""Kinds by name of op, looked through in this order; everything else is `OTHER`."""
OTHER = "other ops"
REST = "Python and dispatch"
PARTS = (*KINDS, OTHER, REST)
REPEATS = 5


def kind_of(op: str) -> str:
    """The kind of the op that the profiler calls `op`."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, op, re.IGNORECASE)), OTHER)


def parts(
    run: Callable[[], AbstractContextManager], calls: Sequence[Callable[[], float]], device: torch.device
) -> dict[str, float]:
    """Milliseconds of one call by kind, REST included; their sum is the call's time without profiler.

    run: opens a sampling run. calls: those of a run, which return their seconds; the first one is left out. REST is 0
    where the profiler, whose events cost time, has counted more than the whole.
    """
    whole = []
    for _ in range(REPEATS):
        with run():
            whole += [call() for call in calls][1:]
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    result = dict.fromkeys(PARTS, 0.0)
    for _ in range(REPEATS):
        with run():
            calls[0]()
            with profile(activities=activities) as trace:
                for call in calls[1:]:
                    call()
        for event in trace.key_averages():
            if cuda and event.device_type is not DeviceType.CUDA:
                continue  # the op that launched a kernel, which has the kernel's time too
            own_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            result[kind_of(event.key)] += own_us / (REPEATS * (len(calls) - 1)) / 1e3
    result[REST] = max(0.0, 1e3 * statistics.median(whole) - sum(result.values()))
    return result
