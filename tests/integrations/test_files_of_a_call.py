"""The way of one convolution from `pipe()` to the kernel: few files, so that a reader can follow it."""

import sys
import traceback
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler

import modiff_kernels as mk
from modiff_kernels.nn.blocks import FusedResnetBlock2D
from tests.unets import unet2d

PACKAGE = Path(mk.__file__).parent
COMPILED = ("csrc/cpu/ops.cpp", "csrc/cpu/quantize_kernels.h", "csrc/cpu/product_avx512.cpp")
MOST = 12


def test_a_convolution_passes_few_files(monkeypatch):
    """Those between the pipeline and the last convolution of a residual block, and those that run within it."""
    pipe = DDIMPipeline(unet2d(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    mk.accelerate(pipe)
    block = pipe.unet.mid_block.resnets[1]
    assert isinstance(block, FusedResnetBlock2D)
    seen = set()
    step = sys.modules[FusedResnetBlock2D.__module__].step
    run = step.run

    def traced(layer, *args, **kwargs):
        if layer is not block.conv2:
            return run(layer, *args, **kwargs)
        seen.clear()
        seen.update(frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe()))
        before = sys.getprofile()
        sys.setprofile(lambda frame, *_: seen.add(frame.f_code.co_filename))
        try:
            return run(layer, *args, **kwargs)
        finally:
            sys.setprofile(before)

    monkeypatch.setattr(step, "run", traced)
    pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    files = sorted(str(Path(name).relative_to(PACKAGE)) for name in seen if Path(name).is_relative_to(PACKAGE))
    assert files
    assert "backends/reference.py" not in files
    assert len(files) + len(COMPILED) <= MOST, "\n".join(files)
