"""Backends. Each module (or package) of this folder computes the ops under one name and says what it cannot do.

A backend has two functions and a reason, and its name stands in `BACKENDS`::

    quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None)
                                                                        -> (codes, scale, absmax or zero_point)
    product(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out) -> out
    why_not(problem) -> str | None                 why it cannot solve `problem` (of op "quantize", "product", ...)

The arguments are those of `ops.schema`, which has their types, already checked. Where it has more to offer, also::

    unavailable() -> str | None                    why the whole backend cannot run here; loads what it needs
    attention(q, k, v, heads, score_scale)         the op
    modulate(...)                                  `ops.modulate` in one piece: a private fusion, for problems of op
                                                   "modulate" that why_not accepts
    goes_first(problem) -> bool                    whether it is asked before those that stand above it in `BACKENDS`
    preferred_layout(problem) -> str               the weight layout that suits the problem best, if it is not kpack_v1
    prepare_weight(weight, k, window, layout)      `weight` in another layout; ValueError if it knows not both
    TRACEABLE = True                               the functions consist of torch ops that have fakes, so that compiled
                                                   code can call these and not the op
    build_info() -> dict[str, str] | str           what its library was built with, or why that is not known

A backend may import `reference` and the formats in `quant`, and nothing else of the package."""

import hashlib
import json
from pathlib import Path
from typing import Any

BACKENDS: dict[str, str | None] = {
    "cpu": "cpu",
    # Not measured yet: triton comes first because it needs no compiler and has group scales, groups and channels that
    # are no multiple of 16, but for what cuda is the faster one for by its machine code (`cuda.goes_first`).
    "triton": "cuda",
    "cuda": "cuda",
    "reference": None,
}
"""Every backend and the device type it is for (None: all), in the order in which they are asked."""

LEAST_CAPABILITY = (8, 0)  # of a GPU, for both backends that run there
MAX_K = 1 << 16  # 255 * 128 * MAX_K < 2^31: no sum of codes minus a zero point leaves int32


def why_no_gpu() -> str | None:
    """Why no GPU of this machine is one that kernels are made for, or None."""
    import torch  # names of backends are read where torch must not be loaded yet

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return why_too_old(max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())))


def why_too_old(capability: tuple[int, int] | None) -> str | None:
    """Why the kernels do not run on a GPU of this compute capability, or None."""
    if capability is None or capability >= LEAST_CAPABILITY:
        return None
    return f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 (A100) or newer"


def int8_products(capability: tuple[int, int]) -> str:
    """How products run on a GPU of this compute capability, in words (`modiff doctor`)."""
    if capability == (9, 0):
        return "cuda (wgmma under way while the next one is issued), then triton (waits for every wgmma)"
    if capability == (10, 0):
        return "triton (tcgen05), then cuda (mma.sync, the kernels of sm_80); neither was ever run there"
    four_bits = "" if capability > (9, 0) else "; modulated W4A4: cuda, on 4-bit tensor cores"
    return f"triton, then cuda, both with mma.sync{four_bits}"


def why_no_sums(problem: Any, grouped: bool = False) -> str | None:
    """Why int32 cannot hold a product's sums, or scales do not leave them, or None. grouped: groups' need not."""
    if problem.group_size != -1 and not grouped:
        return f"group_size={problem.group_size}: only one weight scale per output channel; use group_size=-1"
    if problem.k > MAX_K:
        return f"k={problem.k} products can overflow int32; at most {MAX_K} are summed"
    if problem.granularity == "per_token" and not problem.is_pointwise:
        return "per_token scales do not factor out of a convolution larger than 1x1, stride 1"
    return None


def source_hash() -> str | None:
    """Hash of csrc in this checkout as in the key `sources` of `build_info`; None where there are no sources."""
    root = Path(__file__).resolve().parents[2] / "csrc"
    if not root.is_dir():
        return None
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    lines = "".join(f"{hashlib.sha256((root / name).read_bytes()).hexdigest()} {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def load_library(library: Path, causes: str) -> str | None:
    """Load a compiled library; why that fails, or None. causes: why one may not be there."""
    import torch

    if not library.exists():
        return f"{library.name} was not built: {causes}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def library_build_info(namespace: str) -> dict[str, str] | str:
    """What the loaded library of a private namespace was built with (csrc/common/build_info.h), or what to do."""
    import torch

    op = getattr(getattr(torch.ops, namespace), "build_info", None)
    if op is None:
        return "the library is older than this package; build it again with `python setup.py build_ext --inplace`"
    return json.loads(op())
