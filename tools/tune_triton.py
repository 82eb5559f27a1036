"""Measure every tile of the Triton product on this GPU and write the best per shape into backends/triton/tiles/.

python tools/tune_triton.py [--network ddpm_cifar10 ...] [--batch 1 2 8] [--weight-bits 8 4] [--dry-run]

Needs a GPU, which nothing else should use meanwhile. Works on scratch tensors of the layers' shapes, so no state is
touched; a tile whose sums differ from the reference in one place is refused and never timed. Shapes that are tuned
already are kept unless they are measured again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shapes import SMALL_NETWORKS, Layer, layer_table
from modiff_kernels.backends import reference, triton
from modiff_kernels.quant.packing import KPACK_V1, pack

TIMED_MS = 50  # per tile, after a quarter of it for warming up


def layers_of(networks: list[str]) -> list[Layer]:
    """Every Linear and Conv2d shape of `networks`, each once."""
    return list(dict.fromkeys(layer for network in networks for layer in layer_table(network)))


class Scratch:
    """Tensors of one layer on `device`, and the update of its output in any tile."""

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        conv = layer.kind == "conv"
        shape = (batch, layer.c_in, layer.h, layer.w) if conv else (batch * layer.h, layer.c_in)
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        self.codes = (codes.contiguous(memory_format=torch.channels_last) if conv else codes).to(device)
        k = layer.c_in * layer.kernel**2
        low = 1 << (weight_bits - 1)
        rows = torch.randint(-low, low, (layer.c_out, k), dtype=torch.int8, generator=generator)
        self.weight = (pack(rows, weight_bits).to(device), torch.ones(layer.c_out, device=device))
        self.weight_bits = weight_bits
        pair = ((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
        self.conv = pair if conv else None
        self.scale = torch.full((1,), 2.0**-12, device=device)  # keeps float16 finite; a power of two rounds nothing
        self.expected = self._reference()

    def _reference(self) -> torch.Tensor:
        from modiff_kernels.backends.triton.products import output_shape

        shape = output_shape(self.codes, self.weight[1].shape[0], self.conv)
        self.y_hat = torch.zeros(shape, dtype=torch.float16, device=self.codes.device)
        if self.conv:
            self.y_hat = self.y_hat.contiguous(memory_format=torch.channels_last)
        function = reference.accumulate_linear if self.conv is None else reference.accumulate_conv2d
        y_hat = self.y_hat.clone()
        function(
            self.codes, self.scale, *self.weight, y_hat, None, self.weight_bits, -1, KPACK_V1, *(self.conv or ()),
            torch.float16, False,
        )  # fmt: skip
        return y_hat

    def update(self, config) -> Callable[[], None]:
        """One update of the scratch output in the tile `config`."""
        from modiff_kernels.backends.triton.product_kernel import ACCUMULATE
        from modiff_kernels.backends.triton.products import integer_product

        def call() -> None:
            integer_product(
                self.codes, self.scale, None, *self.weight, None, ACCUMULATE, self.y_hat, None, False, torch.float16,
                self.weight_bits, -1, self.conv, config,
            )  # fmt: skip

        return call

    def is_exact(self, config) -> bool:
        """Whether `config` gives the reference's output, bit for bit: all sums are integers times a power of two."""
        self.y_hat.zero_()
        self.update(config)()
        return torch.equal(self.y_hat, self.expected)

    def shape(self):
        """The key of this problem."""
        from modiff_kernels.backends.triton.products import geometry
        from modiff_kernels.backends.triton.tile_configs import Shape

        geo = geometry(self.codes, self.y_hat.shape, self.conv)
        return Shape(geo.m, self.y_hat.shape[1 if self.conv else -1], geo.channels, geo.taps, 1, self.weight_bits, -1)


def best_tile(scratch: Scratch, gpu, time_ms: Callable[[Callable[[], None]], float]):
    """(config, time in ms) of the fastest exact tile for `scratch`. RuntimeError if one is not exact."""
    from modiff_kernels.backends.triton.tile_configs import ranked

    times = {}
    for config in ranked(scratch.shape(), gpu):
        if not scratch.is_exact(config):
            raise RuntimeError(f"tile {config} computes {scratch.shape()} wrongly; nothing was written")
        times[config] = time_ms(scratch.update(config))
    best = min(times, key=times.__getitem__)
    return best, times[best]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["ddpm_cifar10"], choices=SMALL_NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--weight-bits", type=int, nargs="+", default=[8, 4], choices=(3, 4, 8))
    parser.add_argument("--dry-run", action="store_true", help="print the choices, write nothing")
    args = parser.parse_args()
    reason = triton.unavailable()
    if reason is not None:
        print(f"tune_triton: nothing to tune here: {reason}", file=sys.stderr)
        return 2

    from triton.testing import do_bench

    from modiff_kernels.backends.triton.products import gpu_of
    from modiff_kernels.backends.triton.tile_configs import save, tuned

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    choices = dict(tuned(gpu.name))
    for layer in layers_of(args.network):
        for batch in args.batch:
            for weight_bits in args.weight_bits:
                if weight_bits != 8 and layer.kernel > 1 and layer.c_in % 8 != 0:
                    continue  # a tap of a packed weight begins at a byte
                scratch = Scratch(layer, batch, weight_bits, device)
                config, time_ms = best_tile(
                    scratch, gpu, lambda call: do_bench(call, warmup=TIMED_MS // 4, rep=TIMED_MS, return_mode="median")
                )
                choices[scratch.shape()] = config
                print(f"{layer} batch {batch} w{weight_bits}: {config}, {1e3 * time_ms:.1f} us", flush=True)
    if not args.dry_run:
        import triton as triton_package

        command = shlex.join(["python", "tools/tune_triton.py", *sys.argv[1:]])
        about = {"triton": triton_package.__version__, "torch": torch.__version__, "command": command}
        print(f"written: {save(choices, gpu.name, about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
