"""Which layers of a UNet are replaced by what, decided and made before anything is touched."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modiff_kernels.calibration.job import layers_of
from modiff_kernels.calibration.result import FOLDER_NAME, CalibrationResult, layers_for
from modiff_kernels.config import DEFAULT_SKIP_MODULES, ModiffConfig
from modiff_kernels.config.plan import FLOAT_MODE, MODULATED, QUANTIZED, LayerPlan, Mode
from modiff_kernels.log import logger
from modiff_kernels.nn import ModulationState, blocks
from modiff_kernels.nn.blocks import FusedBlock
from modiff_kernels.nn.blocks.base import Calibrated, is_adapter, is_as_written
from modiff_kernels.nn.cache import sample_of
from modiff_kernels.nn.layer import ModulatedLayer, is_gpu, low_bit, why_not_conv2d
from modiff_kernels.ops.check import FLOAT_DTYPES
from modiff_kernels.planning.stored import place_beside
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer


@dataclasses.dataclass
class Replacements:
    """What will be put where, by path.

    state: that of all new layers. originals: every Linear and Conv2d. replacements: the modules to put in, layers or
    whole fused blocks. layers: the low-bit layers, those inside fused blocks too. fused: the fused blocks.
    reasons: why a layer stays as it is. plan, share_inputs: what they were made for."""

    state: ModulationState
    originals: dict[str, nn.Module]
    replacements: dict[str, nn.Module]
    layers: dict[str, ModulatedLayer]
    fused: dict[str, FusedBlock]
    reasons: dict[str, str]
    plan: LayerPlan | None
    share_inputs: bool

    def units(self) -> dict[str, tuple[str, ...]]:
        """The paths of what a plan gives modes to, with the layers in it: fused blocks, layers that share their input,
        and the other layers one by one; in the order of the UNet."""
        units: dict[str, tuple[str, ...]] = {}
        for path in self.originals:
            layer = self.layers.get(path)
            if layer is None:
                continue
            around = [block for block in self.fused if path.startswith(f"{block}.")]
            block = min(around, key=len, default=None)  # the outermost: its calls hold those of the blocks in it
            unit = block or (layer.input.key if layer.input is not None else layer.name)
            units[unit] = (*units.get(unit, ()), path)
        return units


def replacements_of(
    unet: nn.Module, config: ModiffConfig, calibrated: Calibrated, share_inputs: bool, plan: LayerPlan | None = None
) -> Replacements:
    """What `accelerate` puts into `unet`, which is only read. calibrated: what is known of its layers. plan: what
    config.plan stands for. ValueError where there is nothing to replace, a scale is missing or unknown, or the plan
    does not fit; BackendUnavailable if config.backend cannot do it."""
    modules = dict(unet.named_modules(remove_duplicate=False))
    originals = {path: module for path, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    if not originals:
        raise ValueError(f"accelerate: {type(unet).__name__} holds no Linear and no Conv2d; give the UNet itself")
    unknown = [path for path in calibrated if path not in originals]
    if unknown:
        text = f"which is no Linear or Conv2d of the UNet; use module paths such as {next(iter(originals))!r}"
        raise ValueError(f"accelerate: the calibration names {', '.join(map(repr, unknown[:5]))}, {text}")
    for pattern in config.skip_modules:
        alone = dataclasses.replace(config, skip_modules=(pattern,))
        if pattern not in DEFAULT_SKIP_MODULES and not any(alone.skips(path) for path in modules):
            logger.warning("skip_modules: %r fits no module of the UNet", pattern)
    around = _reasons_around(modules)
    why_float = {path: around.get(path) or _why_float(path, module, config) for path, module in originals.items()}
    reasons = {path: reason for path, reason in why_float.items() if reason is not None}
    if len(reasons) == len(originals) and config.weight_bits is not None:
        listed = "; ".join(f"{path}: {reason}" for reason, path in {reasons[path]: path for path in reasons}.items())
        raise ValueError(f"accelerate: none of the {len(originals)} layers can be replaced ({listed})")
    learnt = {path for path, known in calibrated.items() if known.weight is not None}
    modes = {} if plan is None else _planned(plan, originals, reasons, learnt)
    unplanned = [path for path in originals if path not in reasons and path not in modes]
    if config.max_state_bytes is not None and unplanned and config.mode == MODULATED:
        text = "which would be modulated; give a plan of the whole UNet (make_plan), or mode='quantized'"
        raise ValueError(f"max_state_bytes={config.max_state_bytes}: the plan says nothing of {unplanned[0]!r}, {text}")
    state = ModulationState(config.state_dtype)
    replacements: dict[str, nn.Module] = {}
    fused: dict[str, FusedBlock] = {}
    made: dict[int, ModulatedLayer] = {}
    for mode in dict.fromkeys(modes.get(path) for path in originals if path not in reasons):
        own = config if mode is None else config_of(config, mode)
        if plan is not None and plan.source == "estimated" and has_delayed_scales(unet, own):
            own = dataclasses.replace(own, scale_mode="delayed")
        left = {path for path in originals if path in reasons or modes.get(path) != mode}
        static_codes = own.mode == "quantized" and own.scale_mode == "static"  # no fused pass makes them
        fuse = config.fuse and own.act_bits is not None and not static_codes
        whole = blocks.fuse(unet, state, own, left, calibrated) if fuse else {}
        shared = _shared_inputs(modules, left, calibrated) if share_inputs else {}
        replacements.update(whole)
        fused.update(whole)
        for path, module in originals.items():
            if path in left or blocks.covering(path, whole) is not None:
                continue
            if id(module) not in made:
                known = calibrated.get(path, NOT_CALIBRATED)
                made[id(module)] = low_bit(module, own, state, path, shared.get(path), known)
            replacements[path] = made[id(module)]
    # Outer blocks first: a layer or block that one leaves out is put into that one.
    replacements = dict(sorted(replacements.items(), key=lambda item: item[0].count(".")))
    inner = (part for block in fused.values() for part in block.modules() if isinstance(part, ModulatedLayer))
    layers = {layer.name: layer for layer in inner}
    layers.update({path: module for path, module in replacements.items() if isinstance(module, ModulatedLayer)})
    return Replacements(state, originals, replacements, layers, fused, reasons, plan, share_inputs)


def runs_on_gpu(unet: nn.Module) -> bool:
    return is_gpu(next(unet.parameters()).device)


def for_kind(unet: nn.Module, config: ModiffConfig) -> tuple[ModiffConfig, str]:
    """`config` as its defaults are meant for this network, and what that changes. A transformer has attention, and no
    convolution but of patches and single channels."""
    is_plain, of_kind = QUANTIZED in (config.mode, config.plan), config.plan in (None, MODULATED, QUANTIZED)
    bits_that_count = config.act_bits is not None and (is_plain or config.act_bits >= 7)  # else per_block
    if config.scale_mode != "dynamic" or not (of_kind and bits_that_count):
        return config, ""
    names = " ".join(f"{path} {type(each).__name__}" for path, each in unet.named_modules()).lower()
    attends = "attention" in names or "attn" in names
    convs = [each for path, each in unet.named_modules() if isinstance(each, nn.Conv2d) and not config.skips(path)]
    if not attends or any(conv.groups == 1 and conv.kernel_size > conv.stride for conv in convs):
        return config, ""
    text = "" if config.granularity else "layers of a transformer have a scale per token"
    config = dataclasses.replace(config, granularity=config.granularity or "per_token")
    if config.plan is not None or is_plain:
        return config, text
    text = "modulating them moves more bytes than it saves; plan='modulated' modulates them"
    text = f"{config.act_bits}-bit layers of a transformer are plain, with a scale per token: {text}"
    return dataclasses.replace(config, mode=QUANTIZED), text


def has_delayed_scales(unet: nn.Module, config: ModiffConfig) -> bool:
    """Whether plans that are estimated give delayed scales where `config` has dynamic ones: on a GPU, where finding the
    range takes a pass of its own, for 8-bit residuals, which have bits to spare for a margin (`nn.tensors`)."""
    return (config.mode, config.act_bits, config.scale_mode) == (MODULATED, 8, "dynamic") and runs_on_gpu(unet)


def config_of(config: ModiffConfig, mode: Mode) -> ModiffConfig:
    """`config` for layers in `mode`; with dynamic scales where the static ones are for another mode or other bits."""
    scale_mode = config.scale_mode
    if scale_mode == "static" and mode != Mode(config.mode, config.act_bits):
        scale_mode = "dynamic"
    kind = config.mode if mode == FLOAT_MODE else mode.kind
    own = {"mode": kind, "act_bits": mode.act_bits, "scale_mode": scale_mode}
    return dataclasses.replace(config, **own, schedule=None, plan=None, max_state_bytes=None)


def calibrated_beside(config: ModiffConfig, unet: nn.Module, pipe: Any) -> tuple[dict[str, CalibratedLayer], str]:
    """What the calibration beside a model gives its layers, as optional codes, and where it lies; nothing, and why, for
    other weights, layers or bits, which nobody asked about."""
    place = None if config.weight_bits is None else place_beside(FOLDER_NAME, unet, pipe)
    if place is None:
        return {}, ""
    layers = layers_of(unet, config)
    try:
        known = layers_for(result := CalibrationResult.load(place), config)
        for path, module in layers.items():
            layer, now = known.get(path, NOT_CALIBRATED), sample_of(module.weight.detach())
            layer.check(module.weight.shape, module.bias is not None)
            was = layer.weight_sample
            if layer.weight is None or was is None or now.is_meta or not torch.equal(was.to(now), now):  # after a cast
                raise ValueError(f"it has no codes for the weight of layer '{path}'")
    except ValueError as error:
        logger.info("weights are rounded, for the calibration in %s is not used: %s", place, error)
        return {}, f"rounded, for {place} is not used: {error}"
    return {path: dataclasses.replace(known[path], is_optional=True) for path in layers}, f"{result.method}, {place}"


def _planned(
    plan: LayerPlan, originals: Mapping[str, nn.Module], reasons: dict[str, str], learnt: Set[str]
) -> dict[str, Mode]:
    """The modes of the layers that the plan replaces; those that it leaves as they are are added to `reasons`. A float
    layer among others whose codes were `learnt` with its own takes those, as floats: what others learnt to make good is
    missing without them (the shipped model: 56.7 dB with two float units, 62.6 dB with their codes)."""
    plan.check([path for path in originals if path not in reasons], reasons)
    units = {path: plan.unit_of(path) for path in originals if path not in reasons}
    modes = {path: unit.mode for path, unit in units.items() if unit is not None}
    low_bit = any(modes.get(path) != FLOAT_MODE for path in units)
    kept = learnt if low_bit else set()
    for path, mode in modes.items():
        if mode == FLOAT_MODE and path not in kept:
            reasons[path] = f"plan: {units[path].reason or 'float'}"
    return {path: mode for path, mode in modes.items() if path not in reasons}


def _reasons_around(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules stay as they are for what is around them, by path."""
    reasons: dict[str, str] = {}
    for path, module in modules.items():
        if is_adapter(module):  # its layers are small, and each would need a state as large as that of the base layer
            reason = "it belongs to an adapter; fuse_lora() and unload_lora() before accelerate() make it free"
            names = [name for name, _ in module.named_modules() if name.partition(".")[0] != "base_layer"]
        elif getattr(module, "_chunk_size", None) is not None:  # one state cannot follow several chunks
            reason = "its tokens come in chunks; set_chunk_feed_forward(None) before accelerate()"
            names = [f"ff.{name}" for name, _ in module.ff.named_modules()]
        else:
            continue
        reasons.update({f"{path}.{name}": reason for name in names})
    return reasons


def _why_float(path: str, module: nn.Module, config: ModiffConfig) -> str | None:
    if (pattern := config.skips(path)) is not None:
        return f"skip_modules has {pattern!r}{DEFAULT_SKIP_MODULES.get(pattern, '')}"
    if config.weight_bits is None:
        return "weight_bits is None"
    plain = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    kind = type(module)
    if kind.__name__ in ("LoRACompatibleLinear", "LoRACompatibleConv"):
        if module.lora_layer is not None:
            return "it has a LoRA layer; fuse it into the weight first"
    elif parametrize.is_parametrized(module):
        return "its weight is parametrised"
    elif kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "torch.nn.MultiheadAttention reads its weight without calling it"
    elif kind.forward is not plain.forward:
        return f"{kind.__name__} has a forward of its own"
    if "_conv_forward" in module.__dict__ or not is_as_written(kind):
        return "it does not compute as its class was written"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks; accelerate() with ModiffConfig(fuse=False) before they are added"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {module.weight.dtype}"
    if module.weight.is_meta:
        return "its weight is not loaded (meta device)"
    return why_not_conv2d(module) if isinstance(module, nn.Conv2d) else None


def _shared_inputs(modules: Mapping[str, nn.Module], left: Set[str], calibrated: Calibrated) -> dict[str, str]:
    """Key of the shared input of the attention projections that read one tensor. left: paths that share nothing, as do
    layers that scale their input channels before it is quantised."""
    shared: dict[str, str] = {}
    for path, module in modules.items():
        readers = ["to_k", "to_v"] if getattr(module, "is_cross_attention", False) else ["to_q", "to_k", "to_v"]
        paths = [f"{path}.{name}" if path else name for name in readers]
        projections = [modules[name] for name in paths if isinstance(modules.get(name), nn.Linear)]
        scaled = any(calibrated.get(name, NOT_CALIBRATED).input_scale is not None for name in paths)
        if scaled or len(projections) < len(paths) or not left.isdisjoint(paths):
            continue
        if len({projection.in_features for projection in projections}) == 1:
            shared.update(dict.fromkeys(paths, paths[0]))
    return shared
