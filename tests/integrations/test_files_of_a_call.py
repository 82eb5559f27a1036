"""The way of one convolution from `pipe()` to the kernel: few files, so that a reader can follow it."""

import functools
import sys
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler

import modiff_kernels as mk
from modiff_kernels.nn.blocks import FusedResnetBlock2D
from tests.unets import unet2d

PACKAGE = Path(mk.__file__).parent
COMPILED = ("csrc/cpu/ops.cpp", "csrc/cpu/quantize_kernels.h", "csrc/cpu/product_avx512.cpp")
MOST = 12


def files_of(call, *args):
    """Files of the package of which code runs in call(*args), with what it returns."""
    seen = set()

    def note(frame, event, arg):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = call(*args)
    finally:
        sys.setprofile(before)
    return {str(Path(name).relative_to(PACKAGE)) for name in seen if Path(name).is_relative_to(PACKAGE)}, result


def stack_files():
    """Files of the package that the caller was called through."""
    frame, files = sys._getframe(1), set()
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))
        frame = frame.f_back
    return files


def test_a_convolution_passes_few_files(monkeypatch):
    """Those between the pipeline and the last convolution of a residual block, and those that run within it."""
    pipe = DDIMPipeline(unet2d(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    mk.accelerate(pipe)
    block = pipe.unet.mid_block.resnets[1]
    assert isinstance(block, FusedResnetBlock2D)
    ways = []
    step = sys.modules[FusedResnetBlock2D.__module__].step
    run = step.run

    def traced(layer, *args, **kwargs):
        if layer is not block.conv2:
            return run(layer, *args, **kwargs)
        inside, out = files_of(functools.partial(run, layer, *args, **kwargs))
        ways.append(inside | stack_files())
        return out

    monkeypatch.setattr(step, "run", traced)
    pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    files = sorted(ways[-1]) + list(COMPILED)
    assert len(files) <= MOST, "\n".join(files)
    assert "backends/reference.py" not in files
