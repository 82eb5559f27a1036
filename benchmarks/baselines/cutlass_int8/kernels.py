"""CUTLASS's int8 kernels as a baseline: products with scales of rows and columns and float16 outputs, the best of a few
tiles. `build.py` compiles them, once; what is not built is left out.

What they compute is less than what ours do: no zero points, and one scale per convolution, because a scale per image is
no epilogue that CUTLASS has for convolutions. Convolutions with a window have two kinds of kernels, by wgmma in the one
schedule that CUTLASS 4.2 has for it (sm90) and by mma.sync (sm80, without splits of K); the faster one counts. 1x1
convolutions are matrices."""

import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.cutlass_int8.build import FOLDER, KERNELS, Kernel
from benchmarks.layers import PEER_FORM, Check, Tensors, is_matrix
from benchmarks.runner import LeftOut

Timer = Callable[[Callable[[], Tensor]], list[float]]


class Cutlass:
    """The kernels that are built in `folder`; `open_library` is ctypes.CDLL but in tests."""

    def __init__(self, folder: Path = FOLDER, open_library: Callable[[str], Any] = ctypes.CDLL) -> None:
        self._libraries = {}
        for kernel in KERNELS:
            if not kernel.library(folder).exists():
                continue
            try:
                self._libraries[kernel] = _typed(open_library(str(kernel.library(folder))))
            except OSError as error:  # built for another machine
                print(f"cutlass_int8: {kernel.name} does not load: {error}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self._libraries)

    def call(self, kernel: Kernel, tensors: Tensors) -> Callable[[], Tensor] | None:
        """A call of `kernel` on the operands, which returns its output, or None if it does not take them."""
        library = self._libraries[kernel]
        layer, batch = tensors.layer, tensors.codes.shape[0]
        if is_matrix(layer):
            rows = tensors.code_rows()
            sizes = (rows.shape[0], layer.c_out, layer.c_in)
            scale = tensors.scale.repeat_interleave(rows.shape[0] // batch)
        else:
            sizes = (batch, layer.h, layer.w, layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.padding)
            scale = tensors.scale[:1]
        array = (ctypes.c_int64 * len(sizes))(*sizes)
        workspace_bytes = library.workspace_bytes(array)
        if workspace_bytes < 0:
            return None
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=tensors.codes.device)
        out = torch.full_like(tensors.y_hat, torch.nan, dtype=torch.float16)
        pointers = [t.data_ptr() for t in (tensors.codes, tensors.weight_q, scale, tensors.weight_scale, out)]
        kept = (scale, workspace)  # alive as long as the call is
        stream = torch.cuda.current_stream().cuda_stream if tensors.codes.is_cuda else None

        def run() -> Tensor:
            status = library.run(*pointers, array, kept[1].data_ptr(), stream)
            if status != 0:
                raise RuntimeError(f"{kernel.name} returned cutlass::Status {status}")
            return out

        run.kernel = f"cutlass-{kernel.name}"  # type: ignore[attr-defined]  (how rows name it)
        return run

    def fastest(self, tensors: Tensors, timer: Timer) -> Callable[[], Tensor]:
        """The fastest right kernel by `timer`; LeftOut says why there is none."""
        kind = "gemm" if is_matrix(tensors.layer) else "conv"
        check = Check(PEER_FORM, tensors)  # no kernel changes the state
        right: list[tuple[float, int, Callable[[], Tensor]]] = []
        reasons = []
        for kernel in self._libraries:
            if not kernel.source.startswith(kind):
                continue
            call = self.call(kernel, tensors)
            if call is None:
                reasons.append(f"{kernel.name} does not take these sizes")
                continue
            try:
                check.sqnr_db(call)
            except (AssertionError, RuntimeError) as error:
                reasons.append(f"{kernel.name}: {error}")
                continue
            right.append((statistics.median(timer(call)), len(right), call))
        if not right:
            raise LeftOut(f"no kernel of CUTLASS: {'; '.join(reasons) or 'none is built'}")
        return min(right)[2]


def _typed(library: Any) -> Any:
    library.workspace_bytes.argtypes = [ctypes.POINTER(ctypes.c_int64)]
    library.workspace_bytes.restype = ctypes.c_int64
    pointer = ctypes.c_void_p
    library.run.argtypes = [*[pointer] * 5, ctypes.POINTER(ctypes.c_int64), pointer, pointer]
    library.run.restype = ctypes.c_int
    return library
