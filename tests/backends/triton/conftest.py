"""Triton kernels on both of their devices: its interpreter, which checks the logic on any machine, and a GPU.

A process has one of them: `@triton.jit` decides at import. Without a CUDA device this sets TRITON_INTERPRET before
anything imports triton, which is why no other test module may import it at its top.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from modiff_kernels.backends.triton.launch import INTERPRETED


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run; the one that this process does not have is skipped."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip(
                "the kernels are compiled for the GPU in this process; set TRITON_INTERPRET=1 to interpret them"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted in this process")
    return torch.device("cuda")
