"""What only a GPU can show, through the public ops: streams, no wait for the device, graphs."""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cuda
from tests.backends.layer_calls import BITS, assert_agrees, layer_tensors, modulated, quantized
from tests.ops.op_cases import CASES, DTYPES, ConvCase, LinearCase, activation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable())),
]


def tensors(shape=(2, 320, 32, 32)):
    return activation(shape, torch.float16).cuda(), activation(shape, torch.float16).cuda()


def quantize(x, x_hat, backend="cuda", granularity="per_sample"):
    return ops.quantize_residual(x, x_hat, None, 4, granularity, backend=backend)


def test_launches_follow_the_current_stream():
    x, x_hat = tensors()
    expected = quantize(x, x_hat.clone())
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = quantize(late, x_hat)
    stream.synchronize()
    for got, wanted in zip(found, expected):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token", "per_block"])
def test_no_call_waits_for_the_device(granularity):
    x, x_hat = tensors()
    quantize(x, x_hat, granularity=granularity)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize(x, x_hat, granularity=granularity)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_can_be_captured_in_a_graph():
    x, x_hat = tensors()
    captured = x_hat.clone()
    for _ in range(2):
        expected = quantize(x, x_hat)
    quantize(x, torch.zeros_like(x))  # loads what is loaded once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quantize(x, captured)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip((*found, captured), (*expected, x_hat)):
        assert torch.equal(got, wanted)


def test_tensors_on_addresses_that_are_not_aligned():
    x, x_hat = (activation((1, 33 * 320 + 1)).cuda()[0, 1:].view(33, 320) for _ in range(2))
    assert x.data_ptr() % 16 != 0
    found, expected = quantize(x, x_hat.clone()), quantize(x.cpu(), x_hat.cpu(), "reference")
    for got, wanted in zip(found, expected):
        assert torch.equal(got.cpu(), wanted)


# Large enough for every tile and for splits of K, and the two ends of Stable Diffusion's UNet.
LARGE_CASES = [
    ConvCase((2, 320, 64, 64), 320),
    ConvCase((8, 640, 32, 32), 640),
    ConvCase((1, 1280, 8, 8), 1280),
    ConvCase((2, 320, 64, 64), 320, stride=(2, 2)),
    LinearCase((2, 1024, 640), 5120),
    LinearCase((2, 77, 768), 320),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_agree_with_the_reference(case, bits, group_size, dtype):
    tensors, formats = layer_tensors(case, dtype, bits, group_size)
    try:
        found = modulated(case, tensors, formats, "cuda", "cuda")()
    except ops.BackendUnavailable as error:
        pytest.skip(str(error))
    assert_agrees(found, modulated(case, tensors, formats, "cpu", "reference")())


@pytest.mark.parametrize("call", [modulated, quantized])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_layers_agree_with_the_reference(case, bits, call):
    """The reference on the GPU, in float64: exact sums in seconds."""
    tensors, formats = layer_tensors(case, torch.float16, bits)
    found = call(case, tensors, formats, "cuda", "cuda")()
    expected = call(case, tensors, formats, "cuda", "reference")()
    assert_agrees(found, [t.cpu() for t in expected])


@pytest.mark.parametrize("call", [modulated, quantized])
@pytest.mark.parametrize("case", [LARGE_CASES[2], LARGE_CASES[5]], ids=str)
def test_no_product_waits_for_the_device(case, call):
    tensors, formats = layer_tensors(case, torch.float16)
    step = call(case, tensors, formats, "cuda", "cuda")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_products_are_the_same_in_every_run():
    tensors, formats = layer_tensors(LARGE_CASES[2], torch.float16)
    runs = [modulated(LARGE_CASES[2], tensors, formats, "cuda", "cuda")() for _ in range(3)]
    for other in runs[1:]:
        for got, wanted in zip(other, runs[0]):
            assert torch.equal(got, wanted)


def test_a_layer_can_be_captured_in_a_graph():
    case = LARGE_CASES[2]
    tensors, formats = layer_tensors(case, torch.float16)
    eager, captured = (modulated(case, tensors, formats, "cuda", "cuda") for _ in range(2))
    expected = [t.clone() for _ in range(3) for t in eager()[-2:]][-2:]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured()  # loads what is loaded once, and is the first update
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = captured()[-2:]
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(state, expected):
        assert torch.equal(got, wanted)
