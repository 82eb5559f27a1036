"""Insides of the backend onednn: the check that refuses CPUs that saturate, and what it refuses."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from modiff_kernels.backends import onednn
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import Window

PROBLEM = Problem("product", "cpu", m=128, n=24, k=144, window=Window((3, 3), padding=(1, 1)), weight_bits=8,
                  granularity="per_sample", dtype=torch.float32, layout="kpack_v1")  # fmt: skip


@pytest.fixture
def forget_the_check(fresh_dispatch, monkeypatch):
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    onednn.unavailable.cache_clear()
    yield
    onednn.unavailable.cache_clear()


def test_reasons():
    assert onednn.why_not(PROBLEM) is None
    for changes, reason in (
        ({"layout": "vnni_v1"}, "layout vnni_v1 is not kpack_v1"),
        ({"k": 65537, "window": None}, "k=65537 products can overflow int32"),
        ({"window": Window((3, 3), padding=(1, 3))}, "padding (1, 3) exceeds the window"),
    ):
        assert reason in onednn.why_not(replace(PROBLEM, **changes))


def test_a_failed_check_is_a_reason_and_dispatch_goes_on(monkeypatch, forget_the_check):
    monkeypatch.setattr(onednn, "_inexact", lambda: "int8 products saturate")
    dispatch.reset()
    assert onednn.unavailable() == "int8 products saturate"
    selection = dispatch.select(PROBLEM)  # cpu reads another layout
    assert selection.backend == "reference"
    assert ("onednn", onednn.unavailable()) in selection.rejected


def test_an_error_in_the_check_and_a_torch_without_onednn_are_reasons(monkeypatch, forget_the_check):
    def broken(*arguments):
        raise RuntimeError("could not create a primitive descriptor\nmore")

    monkeypatch.setattr(onednn, "_sums", broken)
    assert onednn.unavailable().endswith("do not run on this CPU: could not create a primitive descriptor")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    onednn.unavailable.cache_clear()
    assert "built without oneDNN" in onednn.unavailable()


def test_the_check_finds_saturation():
    """oneDNN held to AVX2 multiplies in int16 pairs."""
    code = "from modiff_kernels.backends import onednn; print(onednn.unavailable())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "saturate on this CPU" in result.stdout
