"""The product of csrc/cuda/sm90 on a GPU of capability 9.0, through the public ops: layers of UNets that reach every
kernel, bit for bit with the backend reference; races; graphs.
"""

import pytest
import torch

from benchmarks import shapes
from benchmarks.tile_tuning import Scratch
from modiff_kernels import ops
from modiff_kernels.backends import cuda
from modiff_kernels.quant.operands import PackedWeight
from modiff_kernels.quant.packing import pack
from modiff_kernels.quant.spec import quant_max, quant_min
from tests.backends.exact_product import DOWN, POINT, THREE
from tools import tune_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable())),
]

LAYERS = [
    (1, 1, 128, 64, POINT, 8),  # the simplest: one k-block of one tile
    (2, 8, 128, 160, POINT, 8),
    (2, 8, 64, 64, THREE, 8),  # boxes of 64 codes
    (2, 64, 320, 320, THREE, 8),
    (2, 64, 320, 320, DOWN, 8),
    (8, 32, 640, 640, THREE, 8),  # 256 x 160
    (2, 16, 1280, 1280, THREE, 8),  # splits of K
    (1, 8, 1280, 1280, THREE, 8),
    (2, 16, 2560, 1280, POINT, 8),
    (8, 16, 1280, 1280, THREE, 4),
    (1, 8, 1280, 1280, THREE, 4),
    (8, 16, 1280, 1280, THREE, 3),
    (1, 8, 1280, 1280, THREE, 3),
    (64, 16, 256, 256, THREE, 8),  # DDPM
    (3, 9, 80, 72, THREE, 8),
]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"these kernels are for capability 9.0, this GPU has {torch.cuda.get_device_capability()}")


class Layer:
    """A layer with random codes, weight and state on `device`."""

    def __init__(self, n, side, c_in, c_out, window, bits, device="cuda"):
        draw = torch.Generator().manual_seed(0)
        self.window = window
        kernel, out_side = window.kernel_size[0], window.output_shape((n, c_in, side, side), c_out)[2]
        weight_q = torch.randint(
            quant_min(bits), quant_max(bits) + 1, (c_out, kernel**2 * c_in), dtype=torch.int8, generator=draw
        )
        codes = torch.randint(-128, 128, (n, side, side, c_in), dtype=torch.int8, generator=draw)
        states = torch.randn((2, n, out_side, out_side, c_out), generator=draw, dtype=torch.float32).half()
        self.codes = codes.permute(0, 3, 1, 2).to(device)
        self.y_hat, self.skip = states.permute(0, 1, 4, 2, 3).to(device)
        self.scale = (torch.rand(n, generator=draw) * 0.01 + 0.001).to(device)
        weight_scale = (torch.rand(c_out, generator=draw) * 0.01 + 0.001).to(device)
        self.weight = PackedWeight(pack(weight_q, bits).to(device), weight_scale, bits)

    def update(self, y_hat, backend):
        return ops.product(
            self.codes, self.scale, None, self.weight, y_hat, None, self.skip, self.window, torch.float16,
            backend=backend,
        )  # fmt: skip

    def results(self, backend):
        y_hat = self.y_hat.clone()
        return self.update(y_hat, backend), y_hat


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(layer):
    layer = Layer(*layer)
    for found, wanted in zip(layer.results("cuda"), layer.results("reference")):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(
    "layer", [shapes.Layer("conv", 128, 328, 17, 17, 3, 1, 1), shapes.Layer("linear", 1280, 328, 77, 1, 1)], ids=str
)
def test_every_tile_is_exact(layer, bits):
    """All tiles and splits of sm_90 and sm_80 that tools/tune_cuda.py may measure."""
    device = torch.device("cuda", torch.cuda.current_device())
    tunable, scratch = tune_cuda.products_on(device), Scratch(layer, 3, bits, device)
    tiles = tunable.candidates(scratch)
    assert {tile.architecture for tile in tiles} == {90, 80}
    assert [tile for tile in tiles if not scratch.is_exact(tunable.update(scratch, tile))] == []


@pytest.mark.parametrize("layer", [LAYERS[5], LAYERS[6], LAYERS[10], LAYERS[12]], ids=str)
def test_results_are_the_same_every_time(layer):
    """A race shows as a result that changes."""
    layer = Layer(*layer)
    first = layer.results("cuda")
    for _ in range(50):
        assert all(torch.equal(found, wanted) for found, wanted in zip(layer.results("cuda"), first))


def test_splits_of_k_in_a_graph():
    """Sums and counters in scratch are cleared with every replay."""
    layer = Layer(*LAYERS[7])
    wanted, state = layer.results("reference")
    layer.results("cuda")  # loads what is loaded once
    y_hat, graph = layer.y_hat.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer.update(y_hat, "cuda")
    for _ in range(3):
        y_hat.copy_(layer.y_hat)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)
        assert torch.equal(y_hat, state)
