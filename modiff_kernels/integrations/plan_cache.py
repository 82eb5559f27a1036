"""Plans in the user's cache folder, by what they were made for: one JSON file each, written as a whole."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff_kernels._version import __version__
from modiff_kernels.calibration.result import replace_file
from modiff_kernels.config import ModiffConfig
from modiff_kernels.config.plan import LayerPlan, PlanKey, digest

# How calls are left out and where a plan comes from do not change what a unit costs.
NOT_IN_KEY = ("schedule", "plan")


def folder() -> Path:
    """Where plans are kept: $MODIFF_CACHE, else modiff_kernels in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("MODIFF_CACHE"):
        return Path(named) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modiff_kernels" / "plans"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def key_of(unet: nn.Module, config: ModiffConfig, shape: Sequence[int]) -> PlanKey:
    """What a plan for `unet` (not accelerated), `config` and samples of `shape` is kept under."""
    device = next(unet.parameters()).device
    isa = os.environ.get("MODIFF_CPU_ISA", "")
    threads = f", {torch.get_num_threads()} threads {isa}".rstrip() if device.type == "cpu" else ""
    weights = [(name, list(value.shape), str(value.dtype)) for name, value in unet.named_parameters()]
    own: Any = getattr(unet, "config", None)
    not_own = ("_", "quantization_config")  # where it was loaded from, by which version, and how
    settings = {name: str(value) for name, value in dict(own or {}).items() if not name.startswith(not_own)}
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_KEY}
    model = digest([type(unet).__name__, settings, weights])
    versions = f"modiff_kernels {__version__}, torch {torch.__version__}"
    return PlanKey(device_name(device) + threads, model, tuple(shape), digest(values), versions)


def path_of(key: PlanKey) -> Path:
    return folder() / key.digest / f"{'x'.join(map(str, key.shape))}.json"


def store(plan: LayerPlan) -> Path:
    """Write `plan`, which has a key; gives the file. OSError where the folder cannot be written."""
    path = path_of(plan.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda new: new.write_text(plan.to_json()))
    return path


def newest(key: PlanKey) -> LayerPlan | None:
    """The plan of any shape that was stored last for what else `key` says, or None."""
    files = sorted(path_of(key).parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((plan for path in files if (plan := stored(key, path)) is not None), None)


def stored(key: PlanKey, path: Path | None = None) -> LayerPlan | None:
    """The plan in `path` (None: that of `key`) if it can be read and is for `key`, whatever its shape."""
    try:
        plan = LayerPlan.from_json((path or path_of(key)).read_text())
    except (OSError, ValueError):
        return None
    return plan if plan.key is not None and plan.key.digest == key.digest else None
