"""What the tests of quantising kernels share, whatever backend they are of: calls at a place, and the comparison with
the reference backend.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from modiff_kernels.backends import reference
from tests.ops.op_cases import is_image

FLOATS = (torch.float32, torch.float16)
DTYPES = (*FLOATS, torch.bfloat16)
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
GRANULARITIES = ("per_tensor", "per_sample", "per_token")


class Place(NamedTuple):
    """Kernels and where they run: a GPU, or the CPU that stands in for one and takes its time."""

    kernels: Mapping[str, Callable[..., Any]]
    device: torch.device
    no_bfloat16: str | None = None  # why this dtype cannot be tested here

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def skip_bfloat16(place, *dtypes):
    if place.no_bfloat16 is not None and torch.bfloat16 in dtypes:
        pytest.skip(place.no_bfloat16)


def to_device(argument, device):
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument


def run(op, *arguments, place):
    """The kernel's results and the tensors of its arguments afterwards, on the CPU. `arguments` stay as they are."""
    moved = [to_device(a.clone() if isinstance(a, torch.Tensor) else a, place.device) for a in arguments]
    results = place.kernels[op](*moved)
    for result in results:
        assert result.device.type == place.device.type
    return [to_device(t, "cpu") for t in results], [to_device(a, "cpu") for a in moved]


def expected(op, *arguments):
    """The same from the backend reference."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    return list(reference.KERNELS[op].fn(*copies)), copies


def granule_count(shape, granularity):
    rows = shape[0] * shape[2] * shape[3] if is_image(shape) else torch.Size(shape[:-1]).numel()
    return {"per_tensor": 1, "per_sample": shape[0], "per_block": shape[0], "per_token": rows}[granularity]


def scales(shape, granularity):
    """None (dynamic), one scale for all, and one for every granule: about a quarter of them clip."""
    count = granule_count(shape, granularity)
    return None, torch.tensor([0.3]), torch.rand(count) * 0.3 + 0.2


def spread(values, shape):
    """Values of granules, float64, broadcastable to a tensor of `shape`."""
    values = values.double()
    if values.numel() == 1:
        return values
    if values.numel() == shape[0]:
        return values.view(-1, *[1] * (len(shape) - 1))
    return values.view(shape[0], 1, *shape[2:]) if is_image(shape) else values.view(*shape[:-1], 1)


def assert_results_like(results, wanted, memory_format):
    """Shapes, dtypes and memory format of the contract."""
    for got, want in zip(results, wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
    assert results[0].is_contiguous(memory_format=memory_format)


def assert_updated(x_hat, before, codes, scale):
    """x_hat == before + scale * codes: at most two roundings in float32, then one to the state dtype."""
    step = spread(scale, codes.shape) * codes.double()
    exact = before.double() + step
    finfo = torch.finfo(x_hat.dtype)
    float32 = torch.finfo(torch.float32).eps * (before.double().abs() + step.abs())
    allowed = float32 + finfo.eps / 2 * exact.abs() * (1 + 1e-6) + finfo.smallest_normal * finfo.eps
    assert ((x_hat.double() - exact).abs() <= allowed).all()
