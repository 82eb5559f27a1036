"""Launches of the backend triton's `quantize`, and its counters."""

import threading

import pytest
import torch

from modiff_kernels.backends.triton import launch
from modiff_kernels.backends.triton.quantize_launch import quantize
from modiff_kernels.quant.operands import GEGLU, IDENTITY, Prologue
from tests.integrations.fake_capture import Tape

IMAGE, LARGE, TOKENS, WIDE = (2, 64, 16, 16), (2, 64, 64, 64), (2, 128, 64), (2, 128, 128)
SHIFT = torch.empty(1, 64, device="meta").expand(2, -1)
NORM, LAYER_NORM = Prologue("group_norm", shift=SHIFT, num_groups=8, silu=True), Prologue("layer_norm")
# fmt: off
FORMS = [  # h, prologue, has x_hat, granularity, source of the scale: kernels
    (IMAGE, IDENTITY, True, "per_sample", None, "range quantize"),
    (IMAGE, IDENTITY, True, "per_tensor", "given", "quantize"),
    (IMAGE, IDENTITY, True, "per_sample", "delayed", "quantize"),
    (IMAGE, NORM, False, "per_sample", None, "group_norm quantize"),
    (IMAGE, NORM, False, "per_tensor", None, "group_norm range quantize"),
    (IMAGE, NORM, False, "per_token", None, "group_norm quantize"),
    (IMAGE, NORM, True, "per_sample", None, "group_norm range quantize"),
    (IMAGE, NORM, True, "per_sample", "delayed", "quantize"),
    (LARGE, NORM, True, "per_sample", "delayed", "group_norm quantize"),
    (IMAGE, NORM, True, "per_token", "given", "group_norm quantize"),
    (TOKENS, LAYER_NORM, True, "per_token", None, "quantize"),
    (TOKENS, LAYER_NORM, True, "per_block", None, "range quantize"),
    (WIDE, GEGLU, False, "per_token", None, "quantize"),
    (WIDE, GEGLU, True, "per_token", "delayed", "quantize"),
]
# fmt: on


@pytest.mark.parametrize(("shape", "prologue", "residual", "granularity", "source", "kernels"), FORMS)
def test_launches(monkeypatch, shape, prologue, residual, granularity, source, kernels):
    """No other kernel runs: nothing is cleared, converted or made contiguous."""
    launched = []
    monkeypatch.setattr(launch, "record", lambda kernel, args, keywords: launched.append(kernel.__name__))
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    h = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=order)
    x_hat = torch.empty_like(h[..., : shape[-1] // 2] if prologue is GEGLU else h) if residual else None
    rows = h.numel() // shape[1 if len(shape) == 4 else 2]
    values = torch.empty({"per_sample": 2, "per_tensor": 1}.get(granularity, rows), device="meta")
    scale, last_absmax = values if source == "given" else None, values if source == "delayed" else None
    for _ in range(2):  # the counters are made once
        launched.clear()
        with Tape() as tape:
            quantize(h, prologue, x_hat, scale, 4, granularity, 1.0, True, last_absmax)
    assert launched == [f"{name}_kernel" for name in kernels.split()]
    names = {func.__name__.split(".")[0] for func, *_ in tape.kernels if not func.is_view}
    assert names <= {"empty", "new_empty", "empty_like"}


def test_scratch_is_one_memory_of_a_thread():
    def take(*sizes):
        return launch.scratch(torch.device("cpu"), (5, 0, sizes[0]), sizes[1:], 3)

    first, nothing, second, real, _ = take(200, 7)
    for i, part in enumerate((first, second, real)):
        part.fill_(i)
    assert [set(part.tolist()) for part in (first, second, real)] == [{0}, {1}, {2.0}]
    assert (nothing, real.dtype, (second.data_ptr() - first.data_ptr()) % 512) == (None, torch.float32, 0)
    assert take(200, 7)[0] is first
    assert take(9, 7)[0].data_ptr() == first.data_ptr()
    assert take(100_000, 7)[0].data_ptr() != first.data_ptr()
    found = []
    thread = threading.Thread(target=lambda: found.append(take(9, 7)[0].data_ptr()))
    thread.start()
    thread.join()
    assert found[0] != take(9, 7)[0].data_ptr()
