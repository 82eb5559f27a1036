"""What only a GPU can show of both backends for CUDA, through the public ops: streams, no wait for the device, graphs,
tensors on odd addresses, the same results in every run; and the product of csrc/cuda/sm90 in layers that reach each of
its kernels, bit for bit with the reference. (Agreement of everything else with the reference: the contract.)"""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends.cuda import library, product_launch
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.operands import IDENTITY, PackedWeight, Prologue, Window
from modiff_kernels.quant.packing import pack
from tests.backends.exact_product import DOWN, POINT, THREE, ExactProduct

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
GRANULARITIES = ["per_tensor", "per_sample", "per_token", "per_block"]
SPLIT, LINEAR = ((1, 1280, 8, 8), 1280, THREE), ((2, 77, 768), 320, None)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if (reason := dispatch.why_unavailable(request.param)) is not None:
        pytest.skip(reason)
    return request.param


def random(shape):
    t = torch.randn(shape, device="cuda", dtype=torch.float16)
    return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t


def update(backend, x_shape=SPLIT[0], n=SPLIT[1], window=SPLIT[2], granularity="per_sample", prologue=IDENTITY):
    """A function that makes an update of a layer on the state that it gives."""
    k = x_shape[-1] if window is None else x_shape[1] * window.kernel_size[0] * window.kernel_size[1]
    codes, scale = quantize_weight(torch.randn(n, k, device="cuda") / k**0.5, 8, -1)
    weight = PackedWeight(pack(codes, 8), scale, 8)
    h, x_hat = random(x_shape), random(x_shape)
    y_hat = random((*x_shape[:-1], n) if window is None else window.output_shape(x_shape, n))
    rest = (None, window, torch.float16, 4, granularity, 1.0, True, None, backend)

    def run():
        return (*ops.modulate(h, prologue, x_hat, None, weight, y_hat, *rest), x_hat, y_hat)

    return run, (x_hat, y_hat)


def assert_equal(found, wanted):
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layer", [SPLIT, LINEAR], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_update_waits_for_the_device(backend, layer, granularity):
    if granularity == "per_token" and layer is SPLIT:
        layer = (*layer[:2], Window((1, 1)))
    run, _ = update(backend, *layer, granularity)
    run()  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layer", [SPLIT, LINEAR], ids=str)
def test_updates_follow_the_stream_and_can_be_captured_in_a_graph(backend, layer):
    prologue = Prologue("group_norm", num_groups=32, eps=1e-5, silu=True)
    run, state = update(backend, *layer, prologue=prologue)
    start = [t.clone() for t in state]
    for _ in range(3):
        wanted = [t.clone() for t in run()]
    for t, value in zip(state, start):
        t.copy_(value)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        run()
        torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(found, wanted)


def test_results_are_the_same_in_every_run(backend):
    run, state = update(backend)
    start, first = [t.clone() for t in state], None
    for _ in range(3):
        for t, value in zip(state, start):
            t.copy_(value)
        found = [t.clone() for t in run()]
        assert_equal(found, first or found)
        first = found


def test_tensors_on_addresses_that_are_not_aligned(backend):
    h, x_hat = (random((1, 33 * 320 + 1))[0, 1:].view(33, 320) for _ in range(2))
    assert h.data_ptr() % 16 != 0
    codes, used, absmax = ops.quantize(h, IDENTITY, x_hat.clone(), bits=4, backend=backend)
    wanted = ops.quantize(h.cpu(), IDENTITY, x_hat.cpu(), bits=4, backend="reference")
    assert_equal([t.cpu() for t in (codes, used, absmax)], wanted)


LAYERS = [
    (1, 1, 128, 64, POINT, 8),  # the simplest: one k-block of one tile
    (2, 8, 128, 160, POINT, 8),
    (2, 8, 64, 64, THREE, 8),  # boxes of 64 codes
    (2, 64, 320, 320, THREE, 8),  # two splits of K, in clusters
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


@pytest.fixture
def hopper():
    if (reason := dispatch.why_unavailable("cuda")) is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"these kernels are for capability 9.0, this GPU has {torch.cuda.get_device_capability()}")


class Layer:
    """A convolution of random codes and weights, on a state of random numbers."""

    def __init__(self, n, side, c_in, c_out, window, bits):
        codes, weight = ExactProduct((n, c_in, side, side), c_out, window, bits).draw()
        self.codes, self.window = codes.cuda(), window
        self.weight = PackedWeight(weight.packed.cuda(), torch.rand(c_out, device="cuda") * 0.01 + 0.001, bits)
        self.scale = torch.rand(n, device="cuda") * 0.01 + 0.001
        self.y_hat, self.skip = (random(window.output_shape(codes.shape, c_out)) for _ in range(2))

    def results(self, backend, *tile):
        y_hat = self.y_hat.clone()
        args = (self.codes, self.scale, None, self.weight, y_hat, None, self.skip, self.window, torch.float16)
        return product_launch.product(*args, True, *tile) if tile else ops.product(*args, backend=backend), y_hat


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_unets(hopper, layer):
    layer = Layer(*layer)
    assert_equal(layer.results("cuda"), layer.results("reference"))


@pytest.mark.parametrize("quantizer", ["auto", "cuda"])  # triton, and csrc/cuda/common
@pytest.mark.parametrize("layer", [LINEAR, ((8, 640, 32, 32), 640, THREE)], ids=str)
def test_a_product_waits_for_its_quantiser(hopper, quantizer, layer):
    """Products that begin before the end of the quantiser, which the first of a weight does not; in graphs, too."""
    runs = {}
    for name in (quantizer, "reference"):
        torch.manual_seed(0)
        runs[name] = update(name, *layer)
    run, state = runs[quantizer]
    start = [t.clone() for t in state]
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    wanted = [[t.clone() for t in runs["reference"][0]()] for _ in range(10)][-1]
    for replay in (graph.replay, run):
        for t, value in zip(state, start):
            t.copy_(value)
        for _ in range(10):
            found = replay() or found
        assert_equal(found, wanted)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("layer", [(3, 17, 128, 328, THREE), (3, 9, 1280, 328, POINT)], ids=str)
def test_every_tile_is_exact(hopper, layer, bits):
    """All tiles and splits of sm_90 and sm_80 that may be asked for."""
    layer = Layer(*layer, bits)
    geometry = product_launch.geometry_of(layer.codes.shape, False, layer.weight.n, layer.window)
    values = library.tiles_op()(geometry, bits, 8, 90, torch.cuda.get_device_properties(0).multi_processor_count)
    tiles = [product_launch.Tile(*values[i : i + 4]) for i in range(0, len(values), 4)]
    wanted = layer.results("reference")
    assert {tile.architecture for tile in tiles} == {90, 80}
    for tile in tiles:
        assert_equal(layer.results("cuda", tile), wanted)


@pytest.mark.parametrize("layer", [LAYERS[5], LAYERS[6], LAYERS[10], LAYERS[12]], ids=str)
def test_no_race_shows(hopper, layer):
    layer = Layer(*layer)
    first = layer.results("cuda")
    for _ in range(50):
        assert_equal(layer.results("cuda"), first)
