"""`ModiffConfig`: everything `accelerate` can be told about bits, scales and state, with a JSON round trip."""

import dataclasses
import enum
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from modiff_kernels.config.check import is_int, not_allowed, read_json
from modiff_kernels.config.plan import MODULATED, QUANTIZED, LayerPlan
from modiff_kernels.config.schedule import AUTO, StepSchedule
from modiff_kernels.log import logger
from modiff_kernels.quant.spec import ACT_BITS, BITS, GRANULARITIES

BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
FIRST, LAST, TIME, MODULATION = ": the first layer", ": the last layer", ": of the timestep", ": modulation"
DEFAULT_SKIP_MODULES = {
    **dict.fromkeys(("conv_in", "init_conv", "x_embedder", "img_in", "patch_embed"), FIRST),
    **dict.fromkeys(("^pos_embed", "^proj_in", "^embed", "^embedding"), FIRST),
    **dict.fromkeys(("conv_out", "out_conv", "^proj_out", "^out", "final_", "^clf", "^mlm_layer"), LAST),
    **dict.fromkeys(("time", "temb", "t_embedder", "emb_layers", "map_layer", "affine", "guidance"), TIME),
    **dict.fromkeys(("norm.linear", "adaln", "modulation", "img_mod", "txt_mod", "mapper"), MODULATION),
}
"""With what they stand for: the names of diffusers, guided-diffusion, LDM, EDM and DiT for layers that are small, or
compute one row per sample, and whose errors are in all that follows."""
FIRST_CALL = "a run begins with two 8-bit updates of every layer, which measures as well as a float first call"

_error = functools.partial(not_allowed, "ModiffConfig")
Check = tuple[Callable[[Any], bool], str]


def _one_of(*allowed: Any) -> Check:
    known = [(type(value), value) for value in allowed]  # True is not 1, and 8.0 not 8
    return lambda value: (type(value), value) in known, f"one of {', '.join(map(repr, allowed))}"


# By field: what it may be, and how that is called in an error.
CHECKS: dict[str, Check] = {
    "weight_bits": _one_of(*BITS, None),
    "act_bits": _one_of(*ACT_BITS, None),
    "granularity": _one_of(*GRANULARITIES, None),
    "scale_mode": _one_of("dynamic", "delayed", "static"),
    "mode": _one_of("modulated", "quantized"),
    "backend": _one_of(*BACKENDS),
    "state_dtype": _one_of("float32", "float16", "bfloat16", None),
    "fuse": _one_of(True, False),
    "cuda_graphs": _one_of(True, False, None),
    "group_size": (lambda v: v is None or is_int(v, 1), "a positive number, or None for one scale per output channel"),
    "max_state_bytes": (lambda v: v is None or is_int(v, 0), "a number of bytes, 0 or more, or None for no limit"),
    "clip_ratio": (lambda v: isinstance(v, (int, float)) and v is not True and 0 < v <= 1, "above 0 and up to 1"),
    "skip_modules": (
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(part, str) and all(part.split(".")) for part in v),
        "a list or tuple of parts of module paths without empty names, such as ('conv_in', 'attentions.0')",
    ),
}


class QuantizationMethod(str, enum.Enum):
    """What diffusers asks a quantization_config for; it reads `.value` too."""

    MODIFF = "modiff"


@dataclasses.dataclass(frozen=True)
class ModiffConfig:
    """How the layers of a UNet are computed.

    Immutable. Every impossible value raises ValueError naming the field, the value and what is allowed.

    weight_bits: 3, 4, 8, or None (weights untouched; then act_bits must be None too).
    act_bits: bits of the residual codes (mode "modulated") or activation codes ("quantized"): 3, 4, 7, 8, or
        None (float activations with dequantised weights: the ceiling that weight quantisation alone sets). 7 are
        faster than 8 on CPUs without VNNI, and nowhere else.
    granularity: how many activation scales a tensor has: "per_tensor", "per_sample", "per_token" or "per_block" (one
        per sample, input channel and 16 rows or pixels; dynamic scales of residuals only). None is "per_block" where it
        can be had at 3 and 4 bits, else "per_sample"; "per_token" for plain Linears and 1x1 convolutions on a GPU, and
        for plain, 7- and 8-bit layers of transformers; and "per_sample" for W4A4 on sm_80 to sm_89, whose 4-bit tensor
        cores take it, and for 8-bit weights on CPUs without VNNI, which multiply codes of few bits faster. A
        convolution whose scale per pixel does not factor out of its sum (anything but 1x1 with stride 1 and no padding)
        takes "per_sample" in place of "per_token".
    scale_mode: where residual scales come from. "dynamic": absmax of this residual. "delayed": absmax of the last
        update (the first update of a run is dynamic). "static": calibrated, given to `accelerate` as `calibration`;
        in mode "quantized" it is the scale of the activation itself.
    state_dtype: "float32", "float16", "bfloat16" or the torch dtype; None is float32 on the CPU, float16 on CUDA.
    group_size: None for one weight scale per output channel, else the number of weights along K that share one.
    skip_modules: parts of module paths that stay float. A part "a.b" fits a path with consecutive names that
        contain "a" and "b"; a number must be equal ("down_blocks.1" does not fit "down_blocks.10"). "^a" fits a path
        whose first name is "a", or "a" and a number ("^proj_out" fits "proj_out_1"). The default names first, last,
        timestep and modulation layers.
    backend: "auto", or a backend by name, which then never falls back.
    mode: "modulated", or "quantized" (plain low-bit layers without state: clip_ratio and state_dtype are not
        used, and scale_mode "delayed" is "dynamic").
    clip_ratio: above 0 and up to 1: dynamic and delayed scales cover this part of the absmax.
    schedule: which calls of a run compute the network and what takes the place of the others: None (all do), a
        StepSchedule or its text, such as "forecast every=3" or "U3F2UF2U", or "auto": what `modiff calibrate` stored in
        the model's folder for this sampler and these timesteps, else by sampler and number of calls.
    plan: a mode for every layer or block in the place of `mode` and `act_bits`: a LayerPlan, the path of one as JSON,
        or "auto": the newest one that `make_plan` has stored for this device, model and configuration, else one
        estimated from shapes, in which what would be slower in low bits stays float, and what loses no fidelity in
        plain low bits has no state. None: "auto" on a GPU, elsewhere all layers are in `mode`. "modulated" or
        "quantized": all layers in this mode, on a GPU too.
    max_state_bytes: with a plan: bytes that x_hat and y_hat may take; the units that gain least are not modulated.
    fuse: replace whole blocks where a fused form (normalisation, activation, residual quantisation in one pass)
        exists.
    cuda_graphs: whether the calls of a UNet on a GPU run as CUDA graphs, after two warm-up calls of each kind. None: if
        nothing stands against it (a LoRA, hooks, attention processors of others; `explain` says so). True: it is an
        error then. State of three shapes of samples is kept; with max_state_bytes of one."""

    weight_bits: int | None = 8
    act_bits: int | None = 8
    granularity: str | None = None
    scale_mode: str = "dynamic"
    state_dtype: str | None = None
    group_size: int | None = None
    skip_modules: tuple[str, ...] = tuple(DEFAULT_SKIP_MODULES)
    backend: str = "auto"
    mode: str = "modulated"
    clip_ratio: float = 1.0
    fuse: bool = True
    schedule: StepSchedule | str | None = None
    plan: LayerPlan | str | None = None
    max_state_bytes: int | None = None
    cuda_graphs: bool | None = None
    first_step_bits: dataclasses.InitVar[int | None] = None  # gone; refused with the reason

    quant_method: ClassVar[QuantizationMethod] = QuantizationMethod.MODIFF

    def __post_init__(self, first_step_bits: int | None) -> None:
        if first_step_bits is not None:
            raise _error("first_step_bits", first_step_bits, f"nothing: {FIRST_CALL}")
        if self.state_dtype is not None:
            object.__setattr__(self, "state_dtype", str(self.state_dtype).removeprefix("torch."))
        for field, (fits, allowed) in CHECKS.items():
            if not fits(getattr(self, field)):
                raise _error(field, getattr(self, field), allowed)
        object.__setattr__(self, "schedule", _checked_schedule(self.schedule))
        object.__setattr__(self, "plan", _checked_plan(self.plan))
        if self.plan in (MODULATED, QUANTIZED):
            object.__setattr__(self, "mode", self.plan)
        object.__setattr__(self, "skip_modules", tuple(self.skip_modules))
        object.__setattr__(self, "clip_ratio", float(self.clip_ratio))
        dynamic, unquantised = self.scale_mode == "dynamic", self.weight_bits is None
        every_layer = self.plan in (None, MODULATED, QUANTIZED)
        for field, refused, allowed in (
            ("max_state_bytes", every_layer, "None; plan='auto' or a LayerPlan says what to leave out"),
            ("granularity", self.granularity == "per_block" and not dynamic, "another one, or scale_mode='dynamic'"),
            ("act_bits", unquantised, "None as long as weight_bits is None: integer kernels need quantised weights"),
        ):
            if refused and getattr(self, field) is not None:
                raise _error(field, getattr(self, field), allowed)

    @property
    def layer_granularity(self) -> str:
        """The granularity that layers use: `granularity`, or what None stands for."""
        blockwise = self.mode == "modulated" and self.scale_mode == "dynamic" and self.act_bits in (3, 4)
        if self.granularity in (None, "per_block"):
            return "per_block" if blockwise else "per_sample"
        return self.granularity

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, and `quant_method`; `from_dict` gives an equal config back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["skip_modules"] = list(self.skip_modules)
        values["schedule"] = None if self.schedule is None else str(self.schedule)
        values["plan"] = json.loads(self.plan.to_json()) if isinstance(self.plan, LayerPlan) else self.plan
        return {"quant_method": self.quant_method.value, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModiffConfig":
        """Build a config from field names and values; missing ones take defaults, unknown ones raise ValueError.
        `first_step_bits`, which older versions wrote, is dropped, with a warning where it was a number."""
        if not isinstance(values, Mapping):
            raise ValueError(f"ModiffConfig: expected a mapping of field names to values, got {type(values).__name__}")
        values = dict(values)
        if (method := values.pop("quant_method", cls.quant_method.value)) != cls.quant_method.value:
            raise _error("quant_method", method, repr(cls.quant_method.value))
        if (bits := values.pop("first_step_bits", None)) is not None:
            logger.warning("first_step_bits=%s is not used any more: %s", bits, FIRST_CALL)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in values if key not in known]:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"ModiffConfig: unknown field {names}; the fields are {', '.join(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """The config as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModiffConfig":
        """Read what `to_json` wrote; raises ValueError on text that is not a JSON object of known fields."""
        return cls.from_dict(read_json("ModiffConfig", text))

    def skips(self, path: str) -> str | None:
        """The first of `skip_modules` that fits the dotted module path, or None."""
        names = path.split(".")
        first = f"^{names[0].rstrip('_0123456789')}"
        for pattern in self.skip_modules:
            parts = pattern.split(".")
            if pattern == first:
                return pattern
            for start in range(len(names) - len(parts) + 1):
                pairs = zip(parts, names[start:])
                if all(part == name if part.isdigit() else part in name for part, name in pairs):
                    return pattern
        return None


def _checked_schedule(schedule: Any) -> StepSchedule | str | None:
    if schedule is None or isinstance(schedule, StepSchedule):
        return schedule
    if isinstance(schedule, str) and AUTO.fullmatch(schedule):
        return schedule
    try:
        return StepSchedule.parse(schedule)
    except ValueError as error:
        raise _error("schedule", schedule, f"None, 'auto', 'auto 8', a StepSchedule or its text ({error})") from error


def _checked_plan(plan: Any) -> LayerPlan | str | None:
    if plan is None or isinstance(plan, LayerPlan):
        return plan
    if isinstance(plan, Mapping):
        return LayerPlan.from_json(json.dumps(plan))
    if not isinstance(plan, (str, os.PathLike)) or not str(plan):
        raise _error("plan", plan, "None, 'auto', 'modulated', 'quantized', a LayerPlan or the path of one as JSON")
    return str(plan)
