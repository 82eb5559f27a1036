"""`CalibrationResult`: what a calibration found, in memory and as `calibration.safetensors` + `calibration.json`."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modiff_kernels.config import ModiffConfig
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.packing import KPACK_V1, check_packed, pack, unpack

TENSORS, DESCRIPTION = "calibration.safetensors", "calibration.json"
FOLDER_NAME = "modiff_calibration"  # of the one in the folder of a model, which `accelerate` takes by itself
VERSION = 1
OPTIONAL = ("act_scale", "act_zero_point", "input_scale", "bias", "weight_sample")  # tensors of CalibratedLayer


@dataclasses.dataclass
class CalibrationResult:
    """Calibrated layers by path, and how they came about.

    method: name of the method. config: what was calibrated for; `accelerate` takes its weight_bits, act_bits, mode and
    group_size from here. metadata: JSON values: sampler, steps, samples, seed, options, seconds."""

    method: str
    config: ModiffConfig
    layers: dict[str, CalibratedLayer]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write both files into `folder`, which is made; codes are packed (kpack_v1)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for path, layer in self.layers.items():
            described[path], weight = {}, layer.weight
            own = {name: getattr(layer, name) for name in OPTIONAL}
            if weight is not None:
                own |= {"weight_packed": pack(weight.codes, weight.bits), "weight_scale": weight.scale}
                shape = list(weight.codes.shape)
                described[path] = {"bits": weight.bits, "group_size": weight.group_size, "shape": shape}
            tensors |= {f"{path}.{name}": v.cpu().contiguous() for name, v in own.items() if v is not None}
        report = {"version": VERSION, "layout": KPACK_V1, "method": self.method, "config": self.config.to_dict()}
        report |= {"metadata": self.metadata, "layers": described}
        replace_file(folder / TENSORS, lambda new: save_file(tensors, new))
        replace_file(folder / DESCRIPTION, lambda new: new.write_text(json.dumps(report, indent=1) + "\n"))

    @classmethod
    def load(cls, folder: str | Path) -> "CalibrationResult":
        """Read what `save` wrote. ValueError on files that are missing, of another version, or do not fit together."""
        folder = Path(folder)
        try:
            report = json.loads((folder / DESCRIPTION).read_text())
            tensors = load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"cannot read a calibration from {folder} ({error}); give one that was saved") from error
        if not isinstance(report, Mapping) or report.get("version") != VERSION or report.get("layout") != KPACK_V1:
            raise ValueError(f"{folder / DESCRIPTION} is not a calibration of version {VERSION}; calibrate again")
        try:
            layers = {path: _layer(path, entry, tensors) for path, entry in report["layers"].items()}
            config = ModiffConfig.from_dict(report["config"])
            return cls(report["method"], config, layers, report["metadata"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{folder}: {DESCRIPTION} and {TENSORS} do not fit together ({error!r})") from error


def _layer(path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CalibratedLayer:
    weight = None
    if "bits" in entry:
        bits, (n, k) = entry["bits"], entry["shape"]
        packed = tensors[f"{path}.weight_packed"]
        check_packed(path, packed, bits, n, k)
        weight = QuantizedWeight(unpack(packed, bits, k), tensors[f"{path}.weight_scale"], bits, entry["group_size"])
    return CalibratedLayer(weight, **{name: tensors.get(f"{path}.{name}") for name in OPTIONAL})


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a new file, which then takes the place of `path`: an interruption or a full disk leaves the old
    one, or none. OSError where it cannot be written."""
    # Links and devices, such as /dev/stdout, are written themselves, as are files in a folder that takes no new ones.
    plain = not path.is_symlink() and (path.is_file() or not path.exists()) and os.access(path.parent, os.W_OK)
    new = path.with_name(f"{path.name}.{os.getpid()}.new") if plain else path
    try:
        write(new)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}; give another place") from error
    finally:
        if plain:
            new.unlink(missing_ok=True)


def read_result(calibration: "CalibrationResult | str | Path") -> CalibrationResult:
    if isinstance(calibration, CalibrationResult):
        return calibration
    if isinstance(calibration, (str, Path)):
        return CalibrationResult.load(calibration)
    raise TypeError(f"calibration is a {type(calibration).__name__}; give a CalibrationResult or the folder of one")


def layers_for(calibration: "CalibrationResult", config: ModiffConfig) -> dict[str, CalibratedLayer]:
    """The calibrated layers as `config` uses them: activation scales with scale_mode "static" only. ValueError where
    `config` asks for something else than was calibrated."""
    static = config.scale_mode == "static" and config.act_bits is not None
    for field in ("weight_bits", "group_size", *(("act_bits", "mode") if static else ())):
        asked, known = getattr(config, field), getattr(calibration.config, field)
        if asked != known:
            made = f"but the calibration ({calibration.method}) is for {known!r}"
            raise ValueError(f"config has {field}={asked!r}, {made}; use {field}={known!r}, or calibrate again")
    if static:
        return dict(calibration.layers)
    without = {"act_scale": None, "act_zero_point": None}
    return {path: dataclasses.replace(layer, **without) for path, layer in calibration.layers.items()}
