"""Insides of the backend cpu: its build, conversions of 16-bit state, its weight layout, what it refuses."""

import itertools
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import IDENTITY, PackedWeight, Window
from modiff_kernels.quant.packing import pack
from tests.contract.cases import ACT_BITS, MIN_SCALE, oracle_codes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

OP = "quantize"
PLACES = ("cpu", "cpu-avx2", "cpu-plain")

THREE = Window((3, 3), padding=(1, 1))
PROBLEM = Problem("product", "cpu", m=64, n=16, k=9 * 64, window=THREE, weight_bits=8, granularity="per_sample",
                  dtype=torch.float32, state_dtype=torch.float32, layout=cpu.VNNI_V1)  # fmt: skip


def test_build_info():
    info = cpu.build_info()
    assert {"compiler", "oldest_torch"} <= set(info)
    assert re.fullmatch(r"[A-Za-z]+ \d+(\.\d+)+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+", info["oldest_torch"])


def test_reasons():
    assert cpu.why_not(PROBLEM) is None
    for changes, reason in (
        ({"window": Window((5, 10)), "k": 50 * 64}, r"kernel_size \(5, 10\) has more than 49 taps"),
        ({"k": 65537, "window": None}, "k=65537 products can overflow int32; at most 65536"),
        ({"layout": "kpack_v1"}, "layout kpack_v1 is not vnni_v1; prepare the weight"),
        ({"op": "attention", "dtype": torch.float16, "k": 64}, "takes float32 only"),
        ({"op": "attention", "k": 1025}, "heads of up to 1024 values, got 1025"),
    ):
        assert re.search(reason, cpu.why_not(replace(PROBLEM, **changes)))


def test_an_older_cpu_keeps_quantize(monkeypatch):
    monkeypatch.setattr(cpu, "_isa", 0)
    assert cpu.why_not(replace(PROBLEM, op="quantize")) is None
    assert "need AVX2" in cpu.why_not(PROBLEM)
    assert "needs AVX-512" in cpu.why_not(replace(PROBLEM, op="attention"))


def test_the_instruction_set_is_the_best_or_the_one_asked_for(monkeypatch):
    for asked, available, chosen in (("", [0, 1, 3], "avx_vnni"), ("avx2", [0, 1, 3], "avx2"), ("plain", [0], "plain")):
        monkeypatch.setenv("MODIFF_CPU_ISA", asked)
        assert cpu.ISAS[cpu._chosen_isa(available)] == chosen
    for asked in ("avx512", "sse"):
        monkeypatch.setenv("MODIFF_CPU_ISA", asked)
        with pytest.raises(ValueError, match=f"MODIFF_CPU_ISA={asked} is not .* this CPU; choose of plain, avx2$"):
            cpu._chosen_isa([0, 1])


@pytest.mark.parametrize("isa", [0, 9])
def test_an_instruction_set_that_is_missing_is_refused(monkeypatch, isa):
    weight = PackedWeight(pack(torch.ones(16, 4, dtype=torch.int8), 8), torch.ones(16), 8)
    weight = ops.prepare_weight(weight, 4, None, cpu.VNNI_V1, "cpu")
    monkeypatch.setattr(cpu, "_isa", isa)
    with pytest.raises(RuntimeError, match=f"instruction set {isa} is not available"):
        cpu.product(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1), None, weight, None, None, None, None,
                    torch.float32, True)  # fmt: skip


def every(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("channels", [1, 19], ids=["scalar", "vector-and-tail"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
class TestStateConversion:
    """float16 and bfloat16 to float32 and back, seen through x, x_hat and absmax, against torch's conversions."""

    def test_every_finite_value_is_read_exactly(self, place, dtype, channels):
        values = every(dtype).view(1, -1, 1).expand(-1, -1, channels).contiguous()
        zeros = torch.zeros_like(values)
        for x, x_hat in ((values, zeros.clone()), (zeros, values.clone())):
            absmax = place.quantize(x, IDENTITY, x_hat, None, 8, "per_token")[2]
            assert torch.equal(absmax, values[0, :, 0].float().abs())

    def test_every_finite_value_survives_an_update_by_zero(self, place, dtype, channels):
        values = every(dtype)
        values = values[: values.numel() // channels * channels].view(1, -1, channels)
        x_hat = values.clone()
        assert not place.quantize(values, IDENTITY, x_hat, None, 8, "per_token")[0].any()
        # Adding +0 turns -0 into +0, as IEEE arithmetic has it.
        assert torch.equal(x_hat.view(torch.int16), (values + 0.0).view(torch.int16))

    def test_writing_rounds_as_torch_does(self, place, dtype, channels):
        """Subnormals, the largest values, the ties between all neighbours, and the float32 values next to the ties."""
        finite = every(dtype).float().abs().unique()
        past_the_end = finite[-1] + (finite[-1] - finite[-2])
        ties = ((finite.double() + torch.cat([finite[1:], past_the_end[None]]).double()) / 2).float()
        near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, math.inf)]
        values = torch.cat([finite, ties, *near])
        # The scale is the value itself and the code 1 or -1, so exactly the value is stored; scales end at 2^-100.
        values = values[values.isfinite() & (values > MIN_SCALE)]
        values = torch.cat([values, -values])
        x = values.view(1, -1, 1).expand(-1, -1, channels).contiguous()
        x_hat = torch.zeros_like(x, dtype=dtype)
        codes = place.quantize(x, IDENTITY, x_hat, values.abs(), 8, "per_token")[0]
        assert torch.equal(codes.float(), x.sign())
        assert torch.equal(x_hat.view(torch.int16), x.to(dtype).view(torch.int16))


def test_codes_of_every_float16(place):
    x = every(torch.float16).view(1, -1, 1)
    for bits, scale in itertools.product(ACT_BITS, (MIN_SCALE, 0.1, 1.0, 3.7, 1e30)):
        found = place.quantize(x, IDENTITY, torch.zeros(x.shape), torch.full((1,), scale), bits, "per_tensor")[0]
        wanted = oracle_codes(x.float().view(1, -1).numpy(), np.full(1, scale, np.float32), bits)
        assert (found.numpy().ravel() == wanted).all()


def test_the_layout_of_weights():
    """Panels of 16 output channels by 4 input channels, zero padding, an int32 sum per channel, 1024 bytes more."""
    for (kernel, c, n), groups in [(((1, 1), 1, 1), 1), (((3, 3), 17, 33), 2), (((2, 5), 64, 130), 3)]:
        window = Window(kernel, groups=groups)
        k, n = math.prod(kernel) * c, n * groups
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        weight = ops.prepare_weight(PackedWeight(pack(codes, 8), torch.ones(n), 8), k, window, cpu.VNNI_V1, "cpu")
        panels = groups * math.ceil(n / groups / 16)
        bytes_of = {"weight": panels * 16 * math.prod(kernel) * math.ceil(c / 4) * 4, "sums": panels * 16 * 4, "": 1024}
        assert weight.packed.numel() == sum(bytes_of.values())
        sums = weight.packed.split(list(bytes_of.values()))[1].view(torch.int32).view(groups, -1)
        assert torch.equal(sums[:, : n // groups].flatten(), codes.sum(1, dtype=torch.int32))
        assert not sums[:, n // groups :].any()


def test_a_weight_of_another_shape_is_refused():
    codes = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    weight = ops.prepare_weight(PackedWeight(pack(codes, 8), torch.ones(32), 8), 64, None, cpu.VNNI_V1, "cpu")
    with pytest.raises(RuntimeError, match="layout vnni_v1"):
        ops.product(torch.zeros(2, 64, dtype=torch.int8), torch.ones(1), None, weight._replace(scale=torch.ones(16)),
                    backend="cpu")  # fmt: skip
    with pytest.raises(ValueError, match=r"'vnni_v1' to 'other'; the layouts known here"):
        cpu.prepare_weight(weight, 64, None, "other")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump was not found")
@pytest.mark.skipif("GNU" not in str(cpu.build_info()), reason="the loops were counted in GCC's code")
def test_loops_of_16_registers_have_the_instructions_that_were_counted():
    """By micro-kernel, for 12 sums, with 2 loads of weights and 6 broadcasts; vpdpbusd also in its form of AVX-VNNI."""
    counted = [{"vpdpbusd": 12}, {"vpmaddubsw": 12, "vpaddw": 12}, {"vpmaddubsw": 12, "vpmaddwd": 12, "vpaddd": 12}]
    counted.append({"vpmaddwd": 12, "vpaddd": 12})
    library = Path(cpu.__file__).parent.parent / "_lib" / "libmodiff_cpu.so"
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    functions = re.findall(r"<\w+multiply\w+ArithmeticE(\d)ELi6ELi1E\w*>:\n(.*?)\n\n", code.stdout, re.S)
    seen = set()
    for kernel, body in functions:
        rows = re.findall(r"^ *(\w+):\t([^\n]*)", body, re.M)
        index = {address: i for i, (address, _) in enumerate(rows)}
        jumps = [(index.get(row.split()[1], i), i) for i, (_, row) in enumerate(rows) if row.startswith("j")]
        loops = ([row for _, row in rows[first:last]] for first, last in jumps if first < last)
        loop = min((rows for rows in loops if any("vpm" in row or "vpd" in row for row in rows)), key=len)
        if not any("%ymm" in row for row in loop):
            continue
        for name, count in counted[int(kernel)].items():
            assert sum(name in row for row in loop) == count, (kernel, loop)
        assert len(loop) <= sum(counted[int(kernel)].values()) + 2 + 6 + 6, (kernel, loop)
        seen.add((kernel, any("{vex}" in row for row in loop)))
    assert seen >= {("0", True), ("0", False), ("1", False), ("2", False), ("3", False)}
