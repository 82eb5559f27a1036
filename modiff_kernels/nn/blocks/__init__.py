"""Fused forms of diffusers' blocks: what stands between two products becomes one pass that ends in int8 codes.

`fuse` finds the blocks that have exactly the form that the fused ones compute; every other block stays as it is, with
single layers replaced, and the same results up to float rounding. docs/fused_blocks.md has the passes."""

from collections.abc import Container

from torch import nn

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.blocks.attention import FusedAttention
from modiff_kernels.nn.blocks.base import Calibrated, FusedBlock, Parts
from modiff_kernels.nn.blocks.resample import FusedDownsample2D, FusedUpsample2D
from modiff_kernels.nn.blocks.resnet import FusedResnetBlock2D, TimeProjections
from modiff_kernels.nn.blocks.transformer import FusedBasicTransformerBlock, FusedFeedForward, FusedTransformer2DModel
from modiff_kernels.nn.tensors import ModulationState
from modiff_kernels.quant.calibrated import NOT_CALIBRATED

OF_IMAGES = FusedResnetBlock2D, FusedUpsample2D, FusedDownsample2D
OF_TOKENS = FusedAttention, FusedBasicTransformerBlock, FusedFeedForward, FusedTransformer2DModel
FORMS: dict[str, type[FusedBlock]] = {f"diffusers.models.{form.stands_for}": form for form in (*OF_IMAGES, *OF_TOKENS)}


def fuse(
    unet: nn.Module, state: ModulationState, config: ModiffConfig, left_float: Container[str], calibrated: Calibrated
) -> dict[str, FusedBlock]:
    """The fused form of every block of `unet` that has one, by path, outer blocks first. The UNet is only read.
    left_float: paths of layers that must stay float; a block that holds one is not fused. calibrated: by path of the
    layer. Codes that a fused pass computes take no input_scale: a block that needs it is not fused either."""
    fused: dict[str, FusedBlock] = {}
    for path, module in unet.named_modules():
        form = FORMS.get(f"{type(module).__module__}.{type(module).__name__}")
        if form is None or covering(path, fused) is not None or not form.fits(module):
            continue
        below = dict(module.named_modules(remove_duplicate=False))
        names = [name for name in form.layers if name in below]
        if not all(isinstance(below[name], (nn.Linear, nn.Conv2d)) for name in names):
            continue  # something is around a layer, such as a LoRA, and would not be called
        passed = [calibrated.get(f"{path}.{name}", NOT_CALIBRATED) for name in names if name not in form.scalable]
        scaled = any(known.input_scale is not None for known in passed)
        if not scaled and not any(f"{path}.{name}" in left_float for name in names):
            fused[path] = form(Parts(module, config, state, path, calibrated))
    resnets = [block for block in fused.values() if isinstance(block, FusedResnetBlock2D)]
    TimeProjections.share([block for block in resnets if type(block.time_emb_proj) is nn.Linear])
    return fused


def covering(path: str, fused: dict[str, FusedBlock]) -> str | None:
    """Path of the fused block that stands for the module at `path` too, None if there is none."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        outer = ".".join(names[:end])
        if outer in fused and names[end] not in fused[outer].left_out:
            return outer
    return None
