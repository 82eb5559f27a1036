"""The int8 products of oneDNN: exact sums, padding with zero points, and the check that refuses CPUs that saturate."""

import os
import platform
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import modiff_kernels as mk
from modiff_kernels import ops
from modiff_kernels.backends import onednn
from modiff_kernels.metrics import sqnr
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem

UNAVAILABLE = onednn.unavailable()
needs_onednn = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

PROBLEM = Problem(
    op="accumulate_conv2d",
    device_type="cpu",
    dtype=torch.float32,
    state_dtype=torch.float32,
    m=128,
    n=24,
    k=144,
    kernel_size=(3, 3),
    padding=(1, 1),
    weight_bits=8,
    granularity="per_sample",
    layout="kpack_v1",
)


@pytest.fixture
def forget_the_check(fresh_dispatch):
    onednn.unavailable.cache_clear()
    yield
    onednn.unavailable.cache_clear()


def codes(*shape):
    drawn = torch.randint(-128, 128, shape, dtype=torch.int8)
    return drawn.to(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def random_conv(rng):
    groups = rng.choice((1, 1, 2, 3))
    c_in, c_out = groups * rng.randint(1, 40), groups * rng.randint(1, 20)
    kernel_size, stride = (rng.randint(1, 5), rng.randint(1, 5)), (rng.randint(1, 3), rng.randint(1, 3))
    dilation = (rng.randint(1, 2), rng.randint(1, 2))
    padding = tuple(rng.randint(0, size // 2 * d) for size, d in zip(kernel_size, dilation, strict=True))
    h, w = (d * (size - 1) + rng.randint(1, 8) for size, d in zip(kernel_size, dilation, strict=True))
    conv = kernel_size, stride, padding, dilation, groups
    return (rng.randint(1, 3), c_in, h, w), (c_out, c_in // groups, *kernel_size), conv


def packed(weight):
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if weight.ndim == 4 else weight
    return ops.pack_weight(rows.contiguous(), 8)


def quantized(x_q, zero_point, weight, conv=()):
    """The sums of codes - zero_point, by the op with scales of one."""
    op = ops.quantized_conv2d if conv else ops.quantized_linear
    scale, ones = torch.ones(zero_point.shape), torch.ones(weight.shape[0])
    arguments = (x_q, scale, zero_point, packed(weight), ones, None, None, 8, -1, "kpack_v1", *conv, torch.float32)
    return op(*arguments, backend="onednn")


@needs_onednn
@pytest.mark.parametrize("granularity", ["symmetric", "per_tensor", "per_sample"])
@pytest.mark.parametrize("seed", range(20))
def test_random_convolutions_are_exact(seed, granularity):
    """Padding stands for x = 0, whose code is the zero point of the sample."""
    x_shape, weight_shape, conv = random_conv(random.Random(seed))
    x_q, weight = codes(*x_shape), codes(*weight_shape)
    count = x_shape[0] if granularity == "per_sample" else 1
    zero_point = torch.randint(-128, 128, (count,), dtype=torch.int32)
    if granularity == "symmetric":
        zero_point.zero_()
    values = x_q.double() - zero_point.reshape(-1, 1, 1, 1)
    expected = F.conv2d(values, weight.double(), None, *conv[1:])
    assert torch.equal(quantized(x_q, zero_point, weight, conv), expected.float())


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 5), (3, 7, 64, 65), (2, 5, 320, 33)], ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token"])
def test_linear_is_exact(shape, granularity):
    *x_shape, n = shape
    x_q, weight = codes(*x_shape), codes(n, x_shape[-1])
    rows = x_q.numel() // x_shape[-1]
    count = {"per_tensor": 1, "per_sample": x_shape[0], "per_token": rows}[granularity]
    zero_point = torch.randint(-128, 128, (count,), dtype=torch.int32)
    values = x_q.double() - zero_point.repeat_interleave(rows // count).reshape(*x_shape[:-1], 1)
    assert torch.equal(quantized(x_q, zero_point, weight), F.linear(values, weight.double()).float())


@needs_onednn
def test_zero_points_per_pixel():
    x_q, weight = codes(2, 19, 3, 5), codes(7, 19, 1, 1)
    zero_point = torch.randint(-128, 128, (30,), dtype=torch.int32)
    values = x_q.double() - zero_point.reshape(2, 1, 3, 5)
    got = quantized(x_q, zero_point, weight, ((1, 1), (1, 1), (0, 0), (1, 1), 1))
    assert torch.equal(got, F.conv2d(values, weight.double()).float())


@needs_onednn
@pytest.mark.parametrize("k", [4608, onednn._MAX_K])
@pytest.mark.parametrize("weight_code", [-128, -127, 127])
@pytest.mark.parametrize("code", [-128, 127])
def test_largest_sums(code, weight_code, k):
    x_q, weight = torch.full((2, k), code, dtype=torch.int8), torch.full((16, k), weight_code, dtype=torch.int8)
    assert (quantized(x_q, torch.zeros(1, dtype=torch.int32), weight) == code * weight_code * k).all()
    channels = 512
    image = torch.full((1, channels, 3, 3), code, dtype=torch.int8).to(memory_format=torch.channels_last)
    kernel = torch.full((16, channels, 3, 3), weight_code, dtype=torch.int8)
    out = quantized(image, torch.zeros(1, dtype=torch.int32), kernel, ((3, 3), (1, 1), (1, 1), (1, 1), 1))
    taps = torch.tensor([2.0, 3.0, 2.0])
    assert torch.equal(out, (code * weight_code * channels * torch.outer(taps, taps)).expand_as(out))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_size": 64}, "group_size 64: only one weight scale per output channel"),
        ({"layout": "vnni_v1"}, "layout vnni_v1 is not kpack_v1"),
        ({"granularity": "per_token"}, "per_token scales do not factor out"),
        ({"k": onednn._MAX_K + 1}, "int32 sums may overflow"),
    ],
)
def test_what_it_cannot_do(changes, reason):
    assert reason in onednn.KERNELS[PROBLEM.op].why_not(replace(PROBLEM, **changes))
    assert onednn.KERNELS[PROBLEM.op].why_not(PROBLEM) is None


def test_layouts():
    weight = torch.zeros(2, 4, dtype=torch.int8)
    assert onednn.prepare_weight(weight, 8, 2, 4, "kpack_v1", "kpack_v1") is weight
    with pytest.raises(ValueError, match="vnni_v1"):
        onednn.prepare_weight(weight, 8, 2, 4, "kpack_v1", "vnni_v1")


def test_a_failed_check_is_a_reason_and_dispatch_goes_on(monkeypatch, forget_the_check):
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    monkeypatch.setattr(onednn, "_is_exact", lambda: False)
    dispatch.reset()
    assert onednn.unavailable() == "int8 products saturate on this CPU (no VNNI)"
    selection = dispatch.select(PROBLEM)  # cpu reads another layout
    assert selection.backend == "reference"
    assert ("onednn", onednn.unavailable()) in selection.rejected
    with pytest.raises(ops.BackendUnavailable, match="onednn: int8 products saturate"):
        dispatch.select(PROBLEM, "onednn")


def test_an_error_in_the_check_is_a_reason(monkeypatch, forget_the_check):
    def broken(*arguments):
        raise RuntimeError("could not create a primitive descriptor\nmore")

    monkeypatch.setattr(onednn, "_sums", broken)
    assert onednn.unavailable().endswith("do not run on this CPU: could not create a primitive descriptor")


def test_without_mkldnn(monkeypatch, forget_the_check):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "built without oneDNN" in onednn.unavailable()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
def test_the_check_finds_saturation():
    """oneDNN held to AVX2 multiplies in int16 pairs."""
    code = "from modiff_kernels.backends import onednn; print(onednn.unavailable())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "saturate on this CPU" in result.stdout


@needs_onednn
def test_takes_over_where_the_compiled_backend_has_no_product(monkeypatch, fresh_dispatch):
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    dispatch.reset()
    assert dispatch.select(PROBLEM).backend == "onednn"


@needs_onednn
@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
def test_accelerated_unet_stays_close_to_float(monkeypatch, fresh_dispatch, fuse):
    from diffusers import UNet2DModel

    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    dispatch.reset()
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    noise = torch.randn(2, 3, 8, 8)
    inputs = [(noise * (1 - 0.1 * i), 900 - 50 * i) for i in range(4)]
    with torch.no_grad():
        expected = [unet(x, t).sample for x, t in inputs]
        handle = mk.accelerate(unet, mk.ModiffConfig(weight_bits=8, act_bits=8, backend="onednn", fuse=fuse))
        with handle.sampling_run():
            got = [unet(x, t).sample for x, t in inputs]
    assert all(sqnr(a, b) > 25.0 for a, b in zip(got, expected, strict=True))
