"""What only a GPU can show, through the public ops: launches, no wait for the device, graphs, the whole UNet."""

import pytest
import torch

import modiff_kernels as mk
from modiff_kernels import ops
from modiff_kernels.cli import main
from tests.backends.layer_calls import BITS, assert_agrees, layer_tensors, modulated, quantized
from tests.ops.op_cases import CASES, DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_agree_with_the_reference(case, bits, group_size, dtype):
    tensors, formats = layer_tensors(case, dtype, bits, group_size)
    call = modulated(case, tensors, formats, "cuda", "triton")
    try:
        found = call()
    except ops.BackendUnavailable as error:
        pytest.skip(str(error))
    assert_agrees(found, modulated(case, tensors, formats, "cpu", "reference")())


@pytest.mark.parametrize("op", ["modulated", "quantized"])
@pytest.mark.parametrize("case", [CASES[5], CASES[-1]], ids=str)
def test_no_step_waits_for_the_device(case, op):
    tensors, formats = layer_tensors(case, torch.float16)
    call = (modulated if op == "modulated" else quantized)(case, tensors, formats, "cuda", "triton")
    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_can_be_captured_in_a_graph():
    case = CASES[-1]
    tensors, formats = layer_tensors(case, torch.float16)
    eager, captured = (modulated(case, tensors, formats, "cuda", "triton") for _ in range(2))
    expected = [t.clone() for _ in range(3) for t in eager()[-2:]][-2:]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured()  # compiles, and is the first update
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = captured()[-2:]
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(state, expected):
        assert torch.equal(got, wanted)


def test_the_doctor_finds_the_backend_healthy(capsys):
    assert main(["doctor"]) == 0
    assert "triton" in capsys.readouterr().out


def test_the_shipped_model_follows_the_reference():
    diffusers = pytest.importorskip("diffusers", reason="the shipped model is a diffusers UNet")
    from modiff_kernels.models import shipped_model_path

    outputs = []
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        unet = diffusers.UNet2DModel.from_pretrained(shipped_model_path()).to(device)
        unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config = mk.ModiffConfig(act_bits=8, backend=backend, state_dtype="float16", fuse=False)
        handle = mk.accelerate(unet, config)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 16, 16)
        with handle.sampling_run(), torch.no_grad():
            for t in (900, 880, 860):
                out = unet(x.to(device), t).sample.cpu()
                x = x + 0.02 * torch.randn(x.shape)
        outputs.append(out)
    noise = (outputs[0] - outputs[1]).square().mean()
    # 40 dB. Float sums differ in their last bits, and with them 8-bit codes near a tie in every later layer.
    assert noise < outputs[1].square().mean() * 1e-4
