"""What only a GPU can show of both backends for CUDA, through the public ops: streams, no wait for the device, graphs,
tensors on odd addresses, the same results in every run. (Agreement with the reference: the contract.)
"""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.operands import IDENTITY, PackedWeight, Prologue, Window
from modiff_kernels.quant.packing import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GRANULARITIES = ["per_tensor", "per_sample", "per_token", "per_block"]
SPLIT, LINEAR = ((1, 1280, 8, 8), 1280, Window((3, 3), padding=(1, 1))), ((2, 77, 768), 320, None)


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
    rest = (None, window, torch.float16, 4, granularity, 1.0, True, backend)

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
