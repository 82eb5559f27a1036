"""The backend's entry in the dispatch table: what it has, what it refuses and why, without a GPU and without triton."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends import triton as backend
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.packing import KPACK_V1

CONV = Problem(
    op="accumulate_conv2d",
    device_type="cuda",
    capability=(9, 0),
    dtype=torch.float16,
    state_dtype=torch.float16,
    m=4096,
    n=320,
    k=9 * 320,
    kernel_size=(3, 3),
    padding=(1, 1),
    weight_bits=4,
    granularity="per_sample",
    layout=KPACK_V1,
)
LINEAR = replace(CONV, op="accumulate_linear", kernel_size=None, padding=(0, 0), k=1280)


def why_not(problem):
    return backend.KERNELS[problem.op].why_not(problem)


def test_it_has_every_op_but_the_conversions():
    assert set(backend.KERNELS) == set(reference.KERNELS) - set(dispatch.REFERENCE_OPS)
    assert backend.KERNELS is backend.KERNELS


def test_ops_take_the_arguments_of_the_schema():
    import inspect

    for name, kernel in backend.KERNELS.items():
        expected = inspect.signature(reference.KERNELS[name].fn).parameters
        found = inspect.signature(kernel.fn).parameters
        assert list(found) == list(expected), name
        assert [p.default for p in found.values()] == [p.default for p in expected.values()], name


@pytest.mark.parametrize("op", ["accumulate", "initialize", "modulated", "quantized"])
@pytest.mark.parametrize("problem", [CONV, LINEAR], ids=["conv", "linear"])
def test_it_solves_the_layers_of_a_unet(problem, op):
    problem = replace(problem, op=f"{op}_{problem.op.split('_')[1]}", act_bits=8)
    for bits, capability in ((8, (8, 0)), (4, (9, 0)), (3, (8, 9)), (8, (10, 0)), (4, (12, 0))):
        assert why_not(replace(problem, weight_bits=bits, capability=capability)) is None
    assert why_not(replace(problem, group_size=64)) is None
    assert why_not(replace(problem, m=0)) is None, "the number of rows may not be known yet"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (replace(CONV, capability=(7, 5)), "compute capability 7.5: the kernels need 8.0 or newer"),
        (replace(CONV, layout="vnni_v1"), "reads weights in layout 'kpack_v1', not 'vnni_v1'"),
        (replace(LINEAR, k=65537), "k=65537 products can overflow int32; at most 65536 are summed"),
        (replace(LINEAR, m=1 << 31), "rows; they are counted in int32"),
        (replace(CONV, granularity="per_token"), "per_token scales do not factor out"),
        (replace(CONV, op="modulated_conv2d", granularity="per_token"), "per_token scales do not factor out"),
        (replace(CONV, k=9 * 20), "4-bit weights with 20 input channels per tap.*use weight_bits=8"),
        (replace(LINEAR, group_size=48), "group_size=48 .* must be divisible by 32"),
        (replace(CONV, k=9 * 48, group_size=32), "group_size=32 with 48 input channels.* must be divisible by 32"),
        (replace(CONV, op="quantize_residual", capability=(7, 0)), "compute capability 7.0"),
        (replace(LINEAR, op="modulated_linear", k=20480, granularity="per_token"), "rows are held in registers"),
    ],
)
def test_reasons(problem, words):
    import re

    assert re.search(words, why_not(problem))


def test_float_first_calls_have_no_limits_of_the_product():
    problem = replace(CONV, op="initialize_conv2d", act_bits=0, k=9 * 20)
    assert why_not(problem) is None
    assert "reads weights in layout" in why_not(replace(problem, layout="vnni_v1"))
    assert "input channels per tap" in why_not(replace(problem, act_bits=8))


def test_unavailable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ask = backend.unavailable.__wrapped__
    assert ask() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (6, 1))[index])
    assert ask() == "compute capability 7.5, 6.1: the kernels need 8.0 (A100) or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    assert ask() is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'modiff-kernels[triton]'" in ask()


def test_weights_stay_in_the_portable_layout():
    packed = torch.zeros(4, 8, dtype=torch.int8)
    assert backend.preferred_layout(CONV) == KPACK_V1
    assert backend.prepare_weight(packed, 8, 4, 8, KPACK_V1, KPACK_V1) is packed
    with pytest.raises(ValueError, match="layout='vnni_v1' is not known here"):
        backend.prepare_weight(packed, 8, 4, 8, KPACK_V1, "vnni_v1")


def test_the_package_needs_triton_only_for_its_kernels():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from modiff_kernels.backends import triton as backend\n"
        "from modiff_kernels.ops import dispatch\n"
        "assert isinstance(dispatch.why_unavailable('triton'), str)\n"
        "assert not any(name.startswith('modiff_kernels.backends.triton.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'KERNEL'"):
        backend.KERNEL  # noqa: B018 (the access is what is tested)


@pytest.fixture
def interpreted_backend(fresh_dispatch, monkeypatch):
    """`triton` as a backend of the CPU, with interpreted kernels."""
    from modiff_kernels.backends.triton.common import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the kernels are compiled for the GPU in this process")
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch, "PRIORITY", {"cpu": ("triton", "reference")})
    fresh_dispatch.reset()


@pytest.mark.parametrize(("weight_bits", "mode", "calls"), [(4, "modulated", 2), (8, "quantized", 1)])
def test_a_unet_runs_through_the_table(interpreted_backend, weight_bits, mode, calls):
    diffusers = pytest.importorskip("diffusers", reason="the network is a diffusers UNet")
    import modiff_kernels as mk

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=8, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    noise = torch.randn(calls, 1, 3, 8, 8)
    outputs = []
    for name in ("triton", "reference"):
        config = mk.ModiffConfig(weight_bits=weight_bits, act_bits=8, backend=name, mode=mode, state_dtype="float32")
        handle = mk.accelerate(unet, config)
        assert {row.backend for row in handle.rows() if row.bits != "-"} == {name}
        with handle.sampling_run(), torch.no_grad():
            for i in range(calls):
                out = unet(noise[0] + 0.02 * noise[i], 900 - 20 * i).sample
        outputs.append(out)
        handle.remove()
    error = (outputs[0] - outputs[1]).square().mean() / outputs[1].square().mean()
    # 45 dB. Float sums differ in their last bits, and with them 8-bit codes near a tie in every later layer.
    assert error < 10**-4.5
