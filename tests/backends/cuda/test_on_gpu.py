"""What only a GPU can show, through the public ops: streams, no wait for the device, graphs."""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cuda
from tests.ops.op_cases import activation

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
