"""Low-bit kernels with fused modulation and error compensation, as drop-in layers for diffusion UNets.

Public names are imported on first use: `import modiff_kernels` needs neither diffusers nor the compiled library.
diffusers learns the quantization method "modiff" when it is imported."""

import importlib
from typing import TYPE_CHECKING, Any

from modiff_kernels._version import __version__
from modiff_kernels.integrations.registration import register_with_diffusers

if TYPE_CHECKING:  # so that type checkers see what __getattr__ gives
    from modiff_kernels.calibration import CalibrationResult, calibrate
    from modiff_kernels.config import LayerPlan, ModiffConfig, StepSchedule
    from modiff_kernels.integrations.accelerate import accelerate
    from modiff_kernels.integrations.fitting import fit_schedule
    from modiff_kernels.integrations.handle import Handle
    from modiff_kernels.integrations.planner import make_plan
    from modiff_kernels.models import load_shipped
    from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState

_NAMES = {
    "calibration": ("calibrate",),
    "calibration.result": ("CalibrationResult",),
    "config": ("LayerPlan", "ModiffConfig", "StepSchedule"),
    "integrations.accelerate": ("accelerate",),
    "integrations.fitting": ("fit_schedule",),
    "integrations.handle": ("Handle",),
    "integrations.planner": ("make_plan",),
    "models": ("load_shipped",),
    "nn": ("ModulatedConv2d", "ModulatedLinear", "ModulationState"),
}
_HOME_OF = {name: f"modiff_kernels.{module}" for module, names in _NAMES.items() for name in names}

__all__ = ["CalibrationResult", "Handle", "LayerPlan", "ModiffConfig", "ModulatedConv2d", "ModulatedLinear"]
__all__ += ["ModulationState", "StepSchedule", "__version__", "accelerate", "calibrate", "fit_schedule"]
__all__ += ["load_shipped", "make_plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_with_diffusers()
