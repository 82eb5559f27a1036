"""Loading a network named on a command line, and sampling from it."""

import argparse
import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modiff_kernels as mk
from modiff_kernels.calibration.data import run_pipeline
from modiff_kernels.config.schedule import AUTO, UPDATE, StepSchedule
from modiff_kernels.evaluation import SCHEDULERS, UserError
from modiff_kernels.evaluation.folders import look_into, read_config
from modiff_kernels.integrations.planner import share_copy as share_copy
from modiff_kernels.models import SHIPPED, shipped_model_path
from modiff_kernels.nn.call import denoiser_of, denoisers_of
from modiff_kernels.planning.clock import automatic, host_timesteps
from modiff_kernels.planning.stored import beside, best_of, run_of

MULTISTEP = {"algorithm_type": "dpmsolver++"}
OWN_OPTIONS: dict[str, Any] = {
    "pndm": {"skip_prk_steps": True},
    "dpmsolver++": MULTISTEP,
    "dpmsolver++-karras": {**MULTISTEP, "use_karras_sigmas": True},
    "dpmsolver++-lu": {**MULTISTEP, "use_lu_lambdas": True},
}


@dataclass
class Model:
    """A UNet and what it takes to sample from it. `pipe` is None for a UNet or DiT on pixels, which is sampled
    by the loop in this module, and otherwise the pipeline that holds the UNet. `handle` is that of a UNet that was
    saved in low bits, else None. `calls` of the UNet in a run are known where a command samples."""

    name: str
    unet: Any
    scheduler_config: dict[str, Any]
    pipe: Any = None
    prompt: str | None = None
    handle: mk.Handle | None = None
    calls: int = 0


def open_model(
    args: argparse.Namespace, low_bit: bool = False, local: int | None = None, channels_last: bool = True
) -> Model:
    """The model that --model, --prompt, --device and --threads stand for, after a look at --scheduler, --steps and
    --schedule where they are given. low_bit: as of `load_model`, local: as of `choose_device`."""
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.model, args.prompt, choose_device(args.device, local), low_bit)
    if hasattr(args, "steps"):
        model.calls = check_steps(model, args.scheduler, args.steps)
        if stored := getattr(args, "stored", None):
            args.schedule = str(_stored_schedule(model, args.scheduler, args.steps, stored))
            rows = getattr(args, "rows", ())
            args.rows = [replace(row, schedule=row.schedule and args.schedule) for row in rows]
    if channels_last:
        model.unet.to(memory_format=torch.channels_last)
    return model


def choose_device(name: str, local: int | None = None) -> torch.device:
    """The device of --device; `local` is the number of this process on its machine, where there are several."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local is None:
        return torch.device("cuda")
    if local >= (count := torch.cuda.device_count()):
        own = f"process {local + 1} on this machine has no device of its own, torch sees {count}"
        raise UserError(f"{own}; start as many processes as devices, or give --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _find_folder(name: str | None) -> tuple[str, Path]:
    """Name for reports and local folder of --model; a hub id is downloaded first."""
    if name is None or name == SHIPPED:
        return SHIPPED, shipped_model_path()
    if Path(name).is_dir():
        return Path(name).resolve().name, Path(name)
    import diffusers

    try:
        return name, Path(diffusers.DiffusionPipeline.download(name))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no such folder, and the hub gave no pipeline of this name ({reason})") from error


def load_model(name: str | None, prompt: str | None, device: torch.device, low_bit: bool = False) -> Model:
    """Load --model in float32 onto `device`. UserError for what cannot be loaded or sampled, and for NaN weights.
    low_bit: whether a UNet that was saved in low bits will do."""
    try:
        return _load_folder(*_find_folder(name), prompt, device, low_bit)
    except (UserError, ValueError) as error:
        raise UserError(f"--model {name or SHIPPED}: {error}") from error


def _load_folder(label: str, folder: Path, prompt: str | None, device: torch.device, low_bit: bool) -> Model:
    unet_folder, with_pipe, is_low_bit = look_into(folder, low_bit)
    import diffusers

    kind = "DiffusionPipeline" if with_pipe else read_config(unet_folder / "config.json")["_class_name"]
    place = folder if with_pipe else unet_folder
    try:
        loaded = getattr(diffusers, kind).from_pretrained(place, torch_dtype=torch.float32).to(device)
    except Exception as error:
        raise UserError(f"diffusers cannot load it: {str(error).strip().splitlines()[0]}") from error
    unet: Any = denoiser_of("modiff", loaded)  # itself, where it is no pipeline
    for key, parameter in unet.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"parameter {key} holds NaN or Inf; repair or re-download the model")
    takes_text = with_pipe and "prompt" in inspect.signature(loaded.__call__).parameters
    if takes_text and prompt is None:
        raise UserError(f"{type(loaded).__name__} takes a text; give --prompt")
    if prompt is not None and not takes_text:
        raise UserError(f"--prompt {prompt!r}: this model takes no text")
    if not with_pipe and unet.config.out_channels not in (None, unet.config.in_channels):
        channels = f"{unet.config.in_channels} input and {unet.config.out_channels} output channels"
        raise UserError(f"{channels}; only UNets that predict the noise alone can be sampled (no learned variance)")
    scheduler_config = dict(loaded.scheduler.config) if with_pipe else _scheduler_config(folder)
    handle = mk.accelerate(unet) if is_low_bit else None
    pipe = loaded if with_pipe else None
    return Model(label, unet.eval().requires_grad_(False), scheduler_config, pipe, prompt, handle)


def _scheduler_config(folder: Path) -> dict[str, Any]:
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return read_config(path)
    return {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def make_scheduler(model: Model, name: str, **more: Any):
    """A fresh diffusers scheduler on the noise schedule of the model; `more` options are those of its class."""
    on_pixels = {"clip_sample": True} if model.pipe is None and name in ("ddim", "ddpm") else {}
    config = {key: value for key, value in model.scheduler_config.items() if not key.startswith("_")}
    options = {**OWN_OPTIONS.get(name, on_pixels), **more}
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(config, **options)


def check_steps(model: Model, scheduler: str, steps: int) -> int:
    """Number of UNet calls that `steps` make; UserError if the scheduler cannot do them."""
    own = model.scheduler_config.get("_class_name", "")
    if ("FlowMatch" in own) != (scheduler == "flow-euler"):
        raise UserError(f"--scheduler {scheduler}: flow-euler is for models of flow matching alone; this has a {own}")
    schedule = make_scheduler(model, scheduler)
    longest = schedule.config.num_train_timesteps
    if steps > longest:
        raise UserError(f"--steps {steps}: the model was trained on {longest} steps; give at most {longest}")
    try:
        schedule.set_timesteps(steps)
        schedule.step(torch.zeros(1, 1, 1, 1), schedule.timesteps[0], torch.zeros(1, 1, 1, 1))
    except Exception as error:
        raise UserError(f"--scheduler {scheduler}, --steps {steps}: not for this model ({error})") from error
    return len(schedule.timesteps)


def _stored_schedule(model: Model, scheduler: str, steps: int, stored: Sequence[Any]) -> StepSchedule:
    """That of the `stored` ones which is for this run; UserError if none is."""
    own = make_scheduler(model, scheduler)
    own.set_timesteps(steps)
    timesteps = host_timesteps(own)
    if (found := best_of(stored, own, timesteps)) is None:
        last = stored[-1]
        text = f"it was fitted to a run with {last.difference(run_of(own, timesteps))}"
        advice = f"fit one with `modiff calibrate --schedule`, or give --schedule {last.schedule.without_weights()!r}"
        raise UserError(f"--schedule {last.path}: {text}; {advice}")
    return found.schedule


def actions_of(model: Model, scheduler: str, steps: int, schedule: str) -> str:
    """A letter for every call of a run with this --schedule."""
    own = make_scheduler(model, scheduler)
    own.set_timesteps(steps)
    if not AUTO.fullmatch(schedule):
        return StepSchedule.parse(schedule).actions(model.calls)
    asked = int(schedule.split()[1]) if " " in schedule else None
    found = best_of(beside(model.unet, model.pipe), own, host_timesteps(own), asked)
    chosen = found.schedule if found else None if asked else automatic(own, model.calls)
    return chosen.actions(model.calls) if chosen else UPDATE * model.calls


def tells_steps(model: Model) -> bool:
    """Whether sampling can tell of its steps: not through every pipeline of diffusers."""
    return model.pipe is None or "callback_on_step_end" in inspect.signature(model.pipe.__call__).parameters


def sample_images(
    model: Model, unet: Any, scheduler: str, steps: int, seeds: Sequence[int], channels_last: bool = True,
    run: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext,
    on_step: Callable[[], Any] = lambda: None, scheduler_options: Mapping[str, Any] | None = None, latent: bool = False,
) -> np.ndarray:  # fmt: skip
    """One sampling run: float32 images [N, H, W, C] in 0..1, image i from the noise of seeds[i]. `unet` takes the place
    of the model's own, `run(scheduler)` is entered around the calls of the UNet, `on_step` is called after each step
    where `tells_steps(model)`. scheduler_options: as `make_scheduler` takes them. latent: of a text pipeline with a
    VAE, the latents that it would decode."""
    device = next(model.unet.parameters()).device
    schedule = make_scheduler(model, scheduler, **(scheduler_options or {}))
    if model.pipe is not None:
        setattr(model.pipe, next(iter(denoisers_of(model.pipe))), unet)
        model.pipe.scheduler = schedule
        model.pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {} if model.prompt is None else {"prompt": model.prompt}
        if tells_steps(model):
            options["callback_on_step_end"] = lambda pipe, step, t, tensors: (on_step(), tensors)[1]
        with run(schedule):
            kind = "latent" if latent and model.prompt is not None and hasattr(model.pipe, "vae") else "np"
            images = run_pipeline(model.pipe, steps, seeds, {"output_type": kind, **options}).images
        if kind == "latent":
            return images.float().cpu().numpy()
        return np.asarray(images, dtype=np.float32)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    config, size = unet.config, unet.config.sample_size
    if size is None:
        raise UserError("the UNet's config.json has no sample_size; add it")
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    conditions, is_dit = {}, "num_embeds_ada_norm" in config
    if (classes := config.num_embeds_ada_norm if is_dit else config.num_class_embeds) is not None:
        conditions["class_labels"] = torch.tensor([seed % classes for seed in seeds], device=device)
    extra = {"generator": generators} if "generator" in inspect.signature(schedule.step).parameters else {}
    with torch.inference_mode(), run(schedule):
        schedule.set_timesteps(steps, device=device)
        x = x * schedule.init_noise_sigma
        for t in schedule.timesteps:
            timestep = t.expand(len(x)) if is_dit else t
            predicted = unet(schedule.scale_model_input(x, t), timestep, return_dict=False, **conditions)[0]
            x = schedule.step(predicted, t, x, return_dict=False, **extra)[0]
            on_step()
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()


def quiet_libraries() -> None:
    """Keep progress bars, advice and logged errors of other libraries out of the terminal; exceptions tell enough."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # the name that all versions know
    import diffusers

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
