"""Calibration: weight codes and activation scales from data of the full-precision sampler, by methods with names."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from modiff_kernels.calibration import accuquant, qdiffusion, sampling_aware, static
from modiff_kernels.calibration.checkpoints import import_qdiffusion
from modiff_kernels.calibration.data import sampler_of
from modiff_kernels.calibration.job import Job, Layers, Options, check_choice, layers_of
from modiff_kernels.calibration.result import CalibrationResult, layers_for, read_result
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.cache import sample_of
from modiff_kernels.nn.layer import ModulatedLayer

__all__ = ["METHODS", "CalibrationResult", "Method", "calibrate", "import_qdiffusion"]


class Method(NamedTuple):
    """A method by name. options: class of its options. defaults: values of options that differ from the class's."""

    run: Callable[[Job], Layers]
    options: type[Options]
    defaults: Mapping[str, Any] = {}


METHODS = {
    "minmax": Method(static.static, static.StaticOptions, {"scale_search": "minmax"}),
    "mse": Method(static.static, static.StaticOptions),
    "percentile": Method(static.static, static.StaticOptions, {"scale_search": "percentile"}),
    "ndtc": Method(static.static, static.StaticOptions, {"time_steps": "ndtc"}),
    "distill": Method(static.static, static.StaticOptions, {"network_iterations": 1200}),
    "qdiffusion": Method(qdiffusion.qdiffusion, qdiffusion.QDiffusionOptions),
    "accuquant": Method(accuquant.accuquant, accuquant.AccuQuantOptions, {"network_iterations": 600}),
    "sampling_aware": Method(sampling_aware.sampling_aware, qdiffusion.QDiffusionOptions, {"split": False}),
}


def calibrate(
    target: Any,
    method: str = "mse",
    config: ModiffConfig | None = None,
    *,
    steps: int = 50,
    samples: int = 64,
    batch: int = 16,
    seed: int = 0,
    folder: str | Path | None = None,
    quiet: bool = False,
    scheduler: Any = None,
    sample: Callable[[Sequence[int]], Any] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    weights: CalibrationResult | str | Path | None = None,
    **options: Any,
) -> CalibrationResult:
    """Calibrate the layers of a UNet that `config` makes low-bit; the UNet is as before afterwards.

    target: a diffusers pipeline; or a UNet, then with `scheduler` (of diffusers) and sample(seeds), which samples with
    the UNet from the noise of these seeds. method: a name of METHODS. config: bits, mode, group_size and
    skip_modules; scale_mode "static" (and no schedule) also calibrates activation scales. steps: of the sampler.
    samples: trajectories. batch: images at once. seed: the noise of trajectory i has seed + i. folder: where the result
    is saved, and finished parts are kept until then: the same call goes on where it was interrupted. call_kwargs: more
    arguments of the pipeline's call, such as a prompt. weights: a calibration of this UNet for the same weight_bits,
    group_size and skip_modules, whose codes are kept: only activation scales are calibrated. options: of
    the method, see METHODS[method].options.

    The same arguments give the same result. ValueError or TypeError for what is not allowed, ahead of all sampling."""
    check_choice("method", method, METHODS)
    chosen = METHODS[method]
    config = ModiffConfig() if config is None else config
    if config.weight_bits is None:
        raise ValueError("calibrate: config has weight_bits=None, so no layer is low-bit; give 3, 4 or 8")
    known = [field.name for field in dataclasses.fields(chosen.options)]
    if unknown := [name for name in options if name not in known]:
        allowed = f"its options are {', '.join(known)}"
        raise ValueError(f"calibrate: method {method!r} has no option {unknown[0]!r}; {allowed}")
    parsed = chosen.options(**{**chosen.defaults, **options})
    for name, value in (("steps", steps), ("samples", samples), ("batch", batch)):
        if not (isinstance(value, int) and value > 0):
            raise ValueError(f"calibrate: {name}={value!r} is not allowed; give a positive number")
    sampler = sampler_of("calibrate", target, steps, scheduler, sample, call_kwargs or {})
    unet = sampler.unet
    if any(isinstance(module, ModulatedLayer) for module in unet.modules()):
        raise ValueError("calibrate: the UNet is accelerated; call remove() on its handle before")
    layers = layers_of(unet, config)
    if not layers:
        raise ValueError("calibrate: config leaves no Linear and no Conv2d to calibrate; look at its skip_modules")
    given = None if weights is None else read_result(weights)
    kept = None if given is None else _weights_of(given, config, layers)
    metadata = {"scheduler": type(sampler.scheduler).__name__, "steps": steps, "samples": samples, "seed": seed}
    metadata["options"] = dataclasses.asdict(parsed)
    request = {**metadata, "method": method, "config": config.to_dict(), "batch": batch, "layers": list(layers)}
    if given is not None:
        request["weights"] = given.metadata
    place = None if folder is None else Path(folder)
    started = time.perf_counter()
    job = Job(unet, sampler, config, parsed, samples, batch, seed, request, place, quiet, layers, kept)
    calibrated = {
        path: dataclasses.replace(layer, weight_sample=sample_of(layers[path].weight.detach()).clone())
        for path, layer in chosen.run(job).items()
    }
    metadata["seconds"] = round(time.perf_counter() - started, 1)
    result = CalibrationResult(method, config, calibrated, metadata)
    if place is not None:
        result.save(place)
        job.clear()
    return result


def _weights_of(result: CalibrationResult, config: ModiffConfig, layers: Mapping[str, nn.Module]) -> Layers:
    known = layers_for(result, dataclasses.replace(config, scale_mode="dynamic"))
    missing = [path for path in layers if path not in known or known[path].weight is None]
    if missing:
        raise ValueError(f"calibrate: weights holds no codes for {', '.join(missing[:5])}; calibrate without weights")
    for path, module in layers.items():
        known[path].check(module.weight.shape, module.bias is not None)
    return {path: known[path] for path in layers}
