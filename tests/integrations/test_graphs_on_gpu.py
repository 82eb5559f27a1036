"""CUDA graphs on a GPU: whole runs in graphs are those of plain calls, with the kernels of either backend."""

import math

import pytest
import torch
from diffusers import UNet2DModel

import modiff_kernels as mk
from modiff_kernels.integrations.graphs import CudaCapture
from modiff_kernels.models import shipped_model_path
from modiff_kernels.ops import dispatch
from tests.integrations.test_forward import Net
from tests.unets import static_scales, text, trajectory

BACKENDS = [name for name, device in dispatch.BACKENDS.items() if device == "cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
CALLS = 20
WIDTH = 32  # of encoder states: the backend cuda takes multiples of 16


@pytest.mark.parametrize("scale_mode", ["dynamic", "static", "delayed"])
def test_a_network_with_attention(backend, scale_mode):
    encoder = text(width=WIDTH).cuda()
    results = []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        net = Net(width=WIDTH).eval().cuda()
        config = mk.ModiffConfig(scale_mode=scale_mode, cuda_graphs=cuda_graphs, backend=backend)
        handle = mk.accelerate(net, config, calibration=static_scales(net, config))
        outputs = []
        for _ in range(4):
            with handle.sampling_run():
                xs = trajectory((2, 4, 8, 8), 6)
                outputs += [net(x.cuda(), 980 - 40 * i, encoder_hidden_states=encoder)[0] for i, x in enumerate(xs)]
        results.append(outputs)
    assert isinstance(handle._forward.graphs._capture, CudaCapture)
    assert handle._forward.graphs.replayed > 0
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("act_bits", "dtype"), [(8, torch.float32), (4, torch.float32), (4, torch.bfloat16)], ids=str)
def test_the_shipped_model(backend, act_bits, dtype):
    """Inputs change much from call to call: a graph that reads those of another call is far off."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 3, 16, 16, dtype=dtype).cuda()
    inputs = [a * math.cos(0.7 * call) + b * math.sin(0.7 * call) for call in range(CALLS)]
    runs = []
    for cuda_graphs in (False, True):
        unet = UNet2DModel.from_pretrained(shipped_model_path()).to("cuda", dtype).eval().requires_grad_(False)
        handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=act_bits, backend=backend, cuda_graphs=cuda_graphs))
        with handle.sampling_run():
            runs.append([unet(x, 980 - 40 * call).sample.float() for call, x in enumerate(inputs)])
    graphs = handle._forward.graphs
    assert (graphs.captured, graphs.replayed) == (1, CALLS - 1 - graphs.eager)
    for got, wanted in zip(*runs, strict=True):
        # 30 dB: codes at a tie may fall to the other side where sums of float layers have another order.
        assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()
