"""What is in the folder of --model, told from its JSON files alone: a wrong one is refused without loading torch."""

import json
from pathlib import Path
from typing import Any

from modiff_kernels.config import ModiffConfig

DENOISERS = {"unet", "transformer", "transformer_2", "prior", "decoder"}


def look_into(folder: Path, low_bit: bool) -> tuple[Path, bool, bool]:
    """The folder of the denoiser, whether a pipeline has to be loaded around it, and whether it was saved in low bits.
    low_bit: whether such a one will do. ValueError for a folder that cannot be sampled."""
    unet, with_pipe = folder, False
    if (folder / "model_index.json").is_file():
        parts = {key for key in read_config(folder / "model_index.json") if not key.startswith("_")}
        if len(found := sorted(parts & DENOISERS)) != 1 or found[0] not in ("unet", "transformer"):
            held = f"the pipeline holds {' and '.join(found) or 'no denoiser'} (of {', '.join(sorted(parts))})"
            raise ValueError(f"{held}; `modiff` takes one unet or transformer, mk.accelerate(pipe) in Python any")
        unet = folder / found[0] if (folder / found[0]).is_dir() else folder
        with_pipe = not parts <= {found[0], "scheduler"}
    elif not (folder / "config.json").is_file():
        raise ValueError("neither config.json (a UNet) nor model_index.json (a pipeline) in this folder")
    config = read_config(unet / "config.json")
    method, kind = (config.get("quantization_config") or {}).get("quant_method"), config.get("_class_name")
    if method is not None and not (low_bit and method == ModiffConfig.quant_method.value):
        raise ValueError(f"was saved in low bits ({method}); give the model in full precision")
    if not with_pipe and kind not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise ValueError(f"{kind or 'this network'} cannot be sampled by itself; give the folder of a pipeline")
    return unet, with_pipe, method is not None


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return config
