"""`accelerate`: puts low-bit layers into a denoiser in place; its `Handle` explains them and takes them out.

`set_timesteps` of `pipe.scheduler` (that instance) begins a run and announces the number of calls."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, cast

from torch import nn

from modiff_kernels.calibration.result import CalibrationResult, layers_for, read_result
from modiff_kernels.config import ModiffConfig
from modiff_kernels.integrations.forward import device_of
from modiff_kernels.integrations.handle import HANDLE, Handle, Handles
from modiff_kernels.integrations.hooks import obstacle_of
from modiff_kernels.integrations.plans import plan_of, why_slow
from modiff_kernels.integrations.replacements import calibrated_beside, for_kind, replacements_of
from modiff_kernels.log import logger
from modiff_kernels.nn.call import denoiser_of, denoisers_of
from modiff_kernels.nn.layer import ModulatedLayer


def accelerate(
    target: Any,
    config: ModiffConfig | None = None,
    *,
    calibration: CalibrationResult | str | Path | None = "auto",
    share_inputs: bool = True,
    keep_original: bool | None = None,
    vae: bool = False,
) -> Handle:
    """Replace the Linear and Conv2d layers of a denoiser in place; returns the handle that explains and removes it all.

    target: a pipeline of diffusers with a `unet` or `transformer`, whose scheduler's `set_timesteps` then begins the
    runs; of one with several denoisers the handle is one for all. Or any network (torch.nn.Module) that is called with
    the sample first, and with a timestep; runs are opened with `with handle.sampling_run():`. Errors and texts call
    every denoiser a UNet. calibration: a CalibrationResult or its folder: weight codes and, for scale_mode "static",
    activation scales; config None is then the one it was calibrated for. "auto": the one in the folder
    `modiff_calibration` beside the model, if there is one for these weights, layers and weight_bits; None: round.
    share_inputs: let to_q/to_k/to_v of self-attention and to_k/to_v of cross-attention share one quantised input.
    keep_original: whether the float weights of low-bit layers stay in memory beside their codes. Without them, the
    state_dict has none, `remove()`, `refresh()` and other weights are refused, and attention processors other than the
    UNet's compute with what the codes stand for. None is True; a UNet that is loaded in low bits keeps none.
    vae: of a pipeline: whether the decoder of its VAE gets plain W8A8 layers too, all but the first and the last. Its
    handle is `handle.vae`, which `explain()` and `remove()` of the other include; its float weights are kept.

    A UNet that diffusers loaded in low bits (`from_pretrained` of a saved folder, or with a ModiffConfig as
    quantization_config) is accelerated already: its handle is returned, and the scheduler of the pipeline begins the
    runs from now on. The other arguments must be left out then.

    The UNet computes in channels_last inside and returns a contiguous sample. Its state_dict, config and attributes
    stay. On any error nothing is replaced (keep_original=False: see docs/saving.md): TypeError for no UNet, ValueError
    where there is nothing to replace, a scale is missing, the calibration does not fit or cuda_graphs are not possible,
    RuntimeError if the UNet is accelerated already, BackendUnavailable if config.backend cannot do it."""
    options: Any = {"share_inputs": share_inputs, "keep_original": keep_original, "calibration": calibration}
    if vae:
        with contextlib.ExitStack() as undo:
            if (decoder := _decoder_of(target, config)) is not None:
                undo.callback(decoder.remove)
            handle = accelerate(target, config, **options)
            undo.pop_all()
        first = next(iter(handle.handles.values())) if isinstance(handle, Handles) else handle
        first.vae = decoder
        return handle
    if not isinstance(target, nn.Module) and len(several := denoisers_of(target)) > 1:
        if calibration not in (None, "auto"):
            raise ValueError(f"accelerate: a calibration is of one denoiser; give {' or '.join(several)} alone")
        handles = {}
        with contextlib.ExitStack() as undo:
            for name, denoiser in several.items():
                handles[name] = accelerate(denoiser, config, **options)
                undo.callback(handles[name].remove)
                handles[name].attach(target)
            undo.pop_all()
        return cast(Handle, Handles(handles))
    unet, pipe = resolve(target, allow_loaded=True)
    loaded: Handle | None = unet.__dict__.get(HANDLE)
    if loaded is not None:
        if (config, calibration, keep_original) != (None, "auto", None) or not share_inputs:
            text = "it was saved or loaded with; leave out the other arguments, or call remove() on the handle before"
            raise ValueError(f"accelerate: this {type(unet).__name__} was loaded in low bits, with the config {text}")
        if pipe is not None:
            loaded.attach(pipe)
        return loaded
    result = None if calibration in (None, "auto") else read_result(calibration)
    if config is None:
        config = ModiffConfig() if result is None else result.config
    if not isinstance(config, ModiffConfig):
        raise TypeError(f"accelerate: config is a {type(config).__name__}; give a ModiffConfig, as from_dict() does")
    if config.cuda_graphs:
        device = device_of([module._parameters for module in unet.modules()])
        obstacle = obstacle_of(unet)
        if obstacle is None and device.type != "cuda":
            obstacle = f"not possible for a UNet on {device}; move it to a GPU before accelerate()"
        if obstacle is not None:
            raise ValueError(f"ModiffConfig: cuda_graphs=True is {obstacle}, or leave cuda_graphs out")
    calibrated, origin = ({}, "") if result is None else (layers_for(result, config), result.method)
    if calibration == "auto":
        calibrated, origin = calibrated_beside(config, unet, pipe)
    config, by_kind = (config, "") if result is not None else for_kind(unet, config)
    plan = plan_of(unet, config, calibrated, share_inputs)
    replaced = replacements_of(unet, config, calibrated, share_inputs, plan)
    missing = [] if result is None else [path for path in replaced.layers if path not in result.layers]
    if missing:
        text = f"({result.method}); name them in skip_modules, or calibrate with the skip_modules that are used here"
        raise ValueError(f"accelerate: {', '.join(map(repr, missing[:5]))} were not calibrated {text}")
    handle = Handle(unet, pipe, config, replaced, keep_original is not False)
    handle.calibration, handle.by_kind = origin, by_kind
    handle.install()
    return handle


def _decoder_of(pipe: Any, config: ModiffConfig | None) -> Handle | None:
    """Put plain W8A8 layers into the decoder of the pipeline's VAE; None where they are slower than float."""
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if not isinstance(decoder, nn.Module):
        text = "give a pipeline whose `vae` has a `decoder`, or leave vae out"
        raise TypeError(f"accelerate: vae=True is not possible, {type(pipe).__name__} has none to decode with; {text}")
    like = config if isinstance(config, ModiffConfig) else ModiffConfig()
    own = ModiffConfig(mode="quantized", cuda_graphs=False, backend=like.backend, fuse=like.fuse)
    if (slow := why_slow(decoder, own)) is not None:
        logger.warning("vae=True: the decoder stays float, for %s", slow)
        return None
    convs = [path for path, module in decoder.named_modules() if isinstance(module, nn.Conv2d)]
    ends = convs[:1] + convs[-1:]  # which other decoders than AutoencoderKL's do not call conv_in and conv_out
    own = dataclasses.replace(own, plan="quantized", skip_modules=(*own.skip_modules, *ends))
    return accelerate(decoder, own, calibration=None)


def resolve(target: Any, allow_loaded: bool = False) -> tuple[nn.Module, Any]:
    """The denoiser of `target`, and the pipeline around it or None. TypeError for anything else, RuntimeError for one
    that is accelerated already; `allow_loaded` lets those pass that diffusers loaded in low bits."""
    unet, pipe = denoiser_of("accelerate", target), None if isinstance(target, nn.Module) else target
    single = isinstance(unet, (nn.Linear, nn.Conv2d))
    if single or getattr(unet.forward, "__func__", None) is nn.Module.forward:
        what = f"{type(unet).__name__} is a {'single layer' if single else 'container without a forward'}"
        raise TypeError(f"accelerate: {what}; give the network around it (nn.Sequential will do)")
    for path, module in unet.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            text = "is compiled; accelerate the UNet itself before anything is compiled, then call handle.compile()"
            raise TypeError(f"accelerate: {f'the part {path!r} of the' if path else 'the'} UNet {text}")
    handle = unet.__dict__.get(HANDLE)
    if handle is not None and handle.is_loaded and allow_loaded:
        return unet, pipe
    if handle is not None or any(isinstance(module, ModulatedLayer) for module in unet.modules()):
        raise RuntimeError(f"{type(unet).__name__} is accelerated already; call remove() on its handle before")
    return unet, pipe
