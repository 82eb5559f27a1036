"""What the backend triton refuses and why, without a GPU and without triton."""

import re
import subprocess
import sys
from dataclasses import replace

import torch

from modiff_kernels.backends import triton as backend
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import Window
from modiff_kernels.quant.packing import KPACK_V1

SIZES = {"m": 4096, "n": 320, "k": 9 * 320, "window": Window((3, 3), padding=(1, 1)), "weight_bits": 4}
HALF = {"dtype": torch.float16, "state_dtype": torch.float16}
CONV = Problem("product", "cuda", (9, 0), granularity="per_sample", layout=KPACK_V1, **SIZES, **HALF)
LINEAR = replace(CONV, window=None, k=1280)
QUANTIZE = Problem("quantize", "cuda", m=4, k=320, granularity="per_token", prologue="identity")


def test_reasons():
    for problem, words in (
        (replace(CONV, capability=(7, 5)), "compute capability 7.5: the kernels need 8.0 .A100. or newer"),
        (replace(CONV, layout="vnni_v1"), "reads weights in layout 'kpack_v1', not 'vnni_v1'"),
        (replace(LINEAR, k=65537), "k=65537 products can overflow int32; at most 65536 are summed"),
        (replace(LINEAR, m=1 << 31), "rows; they are counted in int32"),
        (replace(CONV, k=9 * 20), "4-bit weights with 20 input channels per tap.*use weight_bits=8"),
        (replace(LINEAR, group_size=48), "group_size=48 .* must be divisible by 32"),
        (replace(CONV, k=9 * 48, group_size=32), "group_size=32 with 48 input channels.* must be divisible by 32"),
        (replace(QUANTIZE, k=8193), "8193 channels: rows are held in registers"),
        (replace(QUANTIZE, k=8192), None),
        (replace(QUANTIZE, k=8193, granularity="per_sample"), None),  # rows of other scales may have any length
        (replace(QUANTIZE, k=8193, granularity="per_tensor", prologue="layer_norm"), "rows are held in registers"),
    ):
        found = backend.why_not(problem)
        assert found is None if words is None else re.search(words, found)


def test_unavailable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ask = backend.unavailable.__wrapped__
    assert ask() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    assert ask() is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'modiff-kernels[triton]'" in ask()


def test_the_package_needs_triton_only_for_its_kernels():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from modiff_kernels.backends import triton as backend\n"
        "from modiff_kernels.ops import dispatch\n"
        "assert isinstance(dispatch.why_unavailable('triton'), str)\n"
        "assert not hasattr(backend, 'attention')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
