"""The compiled library of the CUDA kernels and its ops, in the private namespace `modiff_cuda`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import library_build_info, load_library, why_no_gpu

LIBRARY = Path(__file__).resolve().parents[2] / "_lib" / "libmodiff_cuda.so"


@lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Why the library is not there, or None. It is loaded at the first call."""
    causes = "no nvcc was found at installation, or MODIFF_CUDA=OFF or MODIFF_SKIP_BUILD=1 was set"
    return load_library(LIBRARY, causes)


def build_info() -> dict[str, str] | str:
    return why_not_loaded() or library_build_info("modiff_cuda")


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return why_not_loaded() or why_no_gpu()
    return why_no_gpu() or why_not_loaded()


# The ops of the library, loaded by `why_not_loaded`; tests put an emulation in their place.
def quantize_op() -> Any:
    return torch.ops.modiff_cuda.quantize.default


def product_op() -> Any:
    return torch.ops.modiff_cuda.product.default


def tiles_op() -> Any:
    return torch.ops.modiff_cuda.tiles.default


def form(*values: float) -> torch.Tensor:
    """What an op is told besides tensors of data (csrc/cuda/ops.cpp)."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
