"""The integer product alone: the package's AVX-512 VNNI kernel against oneDNN's int8 and float32 convolutions.

Every form adds onto an existing float32 tensor, as modulation does. Sums are checked to be exact first; then the forms
take turns call by call, so that a slow spell of the machine hits all of them.

python -m benchmarks.bench_integer_conv [--network NAME] [--batch N] [--threads N] [--rounds N] [--record]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.shapes import SMALL_NETWORKS, Layer, layer_table
from modiff_kernels import ops
from modiff_kernels.evaluation import text_table

WARM_UP = 3


def forms(layer: Layer, batch: int) -> dict[str, Callable[[], object]]:
    """kernel, onednn (int8 with its sum epilogue) and float32 of one convolution, verified against each other."""
    generator = torch.Generator().manual_seed(0)
    side, k = (layer.kernel, layer.kernel), layer.c_in * layer.kernel**2
    shape = (batch, layer.c_in, layer.h, layer.w)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    codes = codes.to(memory_format=torch.channels_last)
    weight_q = torch.randint(-127, 128, (layer.c_out, *side, layer.c_in), dtype=torch.int8, generator=generator)
    conv = (side, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
    unit, scale = torch.ones(layer.c_out), torch.ones(batch)

    packed = ops.pack_weight(weight_q.view(layer.c_out, k), 8)
    packed = ops.prepare_weight(packed, 8, layer.c_out, k, layout_to="vnni_v1", kernel_size=side, backend="cpu")
    x = codes.float()
    weight = weight_q.float().permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), None, *conv[1:])
    y_hat = torch.zeros(exact.shape).contiguous(memory_format=torch.channels_last)

    def kernel() -> torch.Tensor:
        ops.accumulate_conv2d(
            codes, scale, packed, unit, y_hat, None, 8, -1, "vnni_v1", *conv, torch.float32, False, "cpu"
        )  # fmt: skip
        return y_hat

    spatial = [list(values) for values in conv[1:4]]
    codes_u8 = (codes.int() + 128).to(torch.uint8)
    weight_nchw = weight_q.permute(0, 3, 1, 2).contiguous()
    prepacked = torch.ops.onednn.qconv_prepack(weight_nchw, unit, 1.0, 128, *spatial, 1, list(shape))
    zero = torch.zeros(layer.c_out, dtype=torch.int32)
    target = torch.zeros_like(y_hat)

    def onednn() -> torch.Tensor:
        return torch.ops.onednn.qconv2d_pointwise.binary(
            codes_u8, 1.0, 128, prepacked, unit, zero, target, None, *spatial, 1, 1.0, 0, torch.float32, 1.0, 0, "sum",
            1.0, "none", [], "",
        )  # fmt: skip

    for name, form in (("kernel", kernel), ("onednn", onednn)):
        error = ((form().double() - exact).abs() / exact.abs().clamp_min(2.0**24)).max()
        if error > 2.0**-24:  # exact up to 2^24, one float32 rounding beyond
            raise SystemExit(f"{layer}: {name} differs from the exact sums by {error:.1e}")
    return {"kernel": kernel, "onednn": onednn, "float32": lambda: F.conv2d(x, weight, None, *conv[1:])}


def measure(layer: Layer, batch: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of every form, `rounds` of each."""
    functions = forms(layer, batch)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(WARM_UP + rounds):
        for name, form in functions.items():
            begin = time.perf_counter()
            form()
            elapsed = time.perf_counter() - begin
            if index >= WARM_UP:
                times[name].append(1e6 * elapsed)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="ddpm_cifar10", choices=SMALL_NETWORKS, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each form (%(default)s)")
    parser.add_argument("--record", action="store_true", help="append the results to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, table = [], []
    with torch.inference_mode():
        for layer in layer_table(args.network):
            if layer.kind == "linear" or min(layer.c_in, layer.c_out) < 16:
                continue
            times = measure(layer, args.batch, args.rounds)
            medians = {name: record.percentiles(values)["p50"] for name, values in times.items()}
            out = (layer.h + 2 * layer.padding - layer.kernel) // layer.stride + 1
            operations = 2 * args.batch * out * out * layer.c_out * layer.c_in * layer.kernel**2
            table.append(
                [str(layer), *[f"{medians[name]:.0f}" for name in times], f"{operations / medians['kernel'] / 1e3:.0f}",
                 f"{medians['onednn'] / medians['kernel']:.2f}x", f"{medians['float32'] / medians['kernel']:.2f}x"]
            )  # fmt: skip
            for name, values in times.items():
                rows.append(
                    {
                        "op": "integer_conv",
                        "problem": f"{layer}-b{args.batch}",
                        "backend": name,
                        "metric": "time",
                        "unit": "us",
                        "cache": "warm",
                        "timer": "perf_counter",
                        "verified": True,
                        **record.percentiles(values),
                    }
                )
    header = ["convolution", "kernel us", "onednn us", "float32 us", "kernel GOP/s", "onednn/kernel", "float32/kernel"]
    print(text_table(header, table))
    if args.record:
        print(f"recorded in {record.append(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
