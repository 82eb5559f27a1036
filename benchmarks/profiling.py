"""Where the time of a UNet call goes, by kind of work.

The profiler's own times of the ops of several calls are summed, and what is left of the same calls without profiler is
*Python and dispatch*: layers, blocks and the UNet's forward, and torch's way to each op. On a GPU the times are those
of kernels and copies, and what is left are gaps between them.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "codes": r"modiff(_\w+)?::\w*quantize|range_kernel|quantize_kernel|statistics_kernel|coefficients_kernel"
    r"|modiff::.*(Pass|Moments|Statistics|Coefficients)\b",
    "integer products": r"modiff(_\w+)?::\w*(product|modulate|convolve)|modiff::cuda::|product_kernel"
    r"|modiff::.*(Product|FinishSplits|WeightSums)|finish_kernel|weight_sums_kernel|modulated_linear_kernel",
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


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Of one call. whole_ms: without profiler. names_ms: of each op or kernel itself, by name."""

    whole_ms: float
    names_ms: dict[str, float]

    def parts(self) -> dict[str, float]:
        """Milliseconds by kind, REST included; their sum is the call's time without profiler.

        REST is 0 where the profiler, whose events cost time, has counted more than the whole.
        """
        result = dict.fromkeys(PARTS, 0.0)
        for name, ms in self.names_ms.items():
            result[kind_of(name)] += ms
        result[REST] = max(0.0, self.whole_ms - sum(result.values()))
        return result


def profiled(
    run: Callable[[], AbstractContextManager], calls: Sequence[Callable[[], float]], device: torch.device
) -> StepProfile:
    """run: opens a sampling run. calls: those of a run, which return their seconds; the first one is left out."""
    on_cuda = device.type == "cuda"
    # On a GPU without the ops of the host: recording them would slow it down, and count kernels twice.
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    whole = []
    for _ in range(REPEATS):
        with run():
            whole += [call() for call in calls][1:]
    names: Counter[str] = Counter()
    for _ in range(REPEATS):
        with run():
            calls[0]()
            with profile(activities=[activity]) as trace:
                for call in calls[1:]:
                    call()
        for name, ms in _kernels_ms(trace) if on_cuda else _ops_ms(trace):
            names[name] += ms / (REPEATS * (len(calls) - 1))
    return StepProfile(1e3 * statistics.median(whole), dict(names))


def _ops_ms(trace: profile) -> list[tuple[str, float]]:
    return [(event.key, event.self_cpu_time_total / 1e3) for event in trace.key_averages()]


def _kernels_ms(trace: profile) -> list[tuple[str, float]]:
    """Everything that ran on the device. Read from kineto itself: torch's own list takes minutes for a whole run."""
    events = trace.profiler.kineto_results.events()
    ours = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    return [(event.name(), event.duration_ns() / 1e6) for event in ours]
