"""Values that say how a UNet is computed: immutable, with text or JSON forms; no torch, no files."""

from modiff_kernels.config.modiff import BACKENDS, DEFAULT_SKIP_MODULES, ModiffConfig
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.config.schedule import StepSchedule

__all__ = ["BACKENDS", "DEFAULT_SKIP_MODULES", "LayerPlan", "ModiffConfig", "StepSchedule"]
