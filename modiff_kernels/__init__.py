"""Low-bit kernels with fused modulation and error compensation, as drop-in layers for diffusion UNets.

Public names are imported on first use: `import modiff_kernels` needs neither diffusers nor the compiled library.
diffusers learns the quantization method "modiff" when it is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from modiff_kernels._version import __version__ as __version__
from modiff_kernels.integrations.registration import register_with_diffusers

if TYPE_CHECKING:  # so that type checkers see what __getattr__ gives
    from modiff_kernels.calibration import CalibrationResult as CalibrationResult
    from modiff_kernels.calibration import calibrate as calibrate
    from modiff_kernels.config import LayerPlan as LayerPlan
    from modiff_kernels.config import ModiffConfig as ModiffConfig
    from modiff_kernels.config import StepSchedule as StepSchedule
    from modiff_kernels.integrations.accelerate import accelerate as accelerate
    from modiff_kernels.integrations.fitting import fit_schedule as fit_schedule
    from modiff_kernels.integrations.handle import Handle as Handle
    from modiff_kernels.integrations.planner import make_plan as make_plan
    from modiff_kernels.nn import ModulatedConv2d as ModulatedConv2d
    from modiff_kernels.nn import ModulatedLinear as ModulatedLinear
    from modiff_kernels.nn import ModulationState as ModulationState

_HOME_OF = {
    "CalibrationResult": "modiff_kernels.calibration.result",
    "Handle": "modiff_kernels.integrations.handle",
    "LayerPlan": "modiff_kernels.config",
    "ModiffConfig": "modiff_kernels.config",
    "ModulatedConv2d": "modiff_kernels.nn",
    "ModulatedLinear": "modiff_kernels.nn",
    "ModulationState": "modiff_kernels.nn",
    "StepSchedule": "modiff_kernels.config",
    "accelerate": "modiff_kernels.integrations.accelerate",
    "calibrate": "modiff_kernels.calibration",
    "fit_schedule": "modiff_kernels.integrations.fitting",
    "make_plan": "modiff_kernels.integrations.planner",
}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_with_diffusers()
