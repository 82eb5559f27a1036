"""Calibration data: inputs of the UNet on the trajectories of the full-precision sampler, at chosen calls of a run."""

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.nn.call import CallForm, denoiser_of

TIME_STEPS = ("uniform", "ndtc")
CONDITIONS = "conditions."  # before the names of conditions among other tensors


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the full-precision network `unet` is sampled, in `steps` of a diffusers scheduler, used through copies.
    run(seeds): one sampling run, image i from the noise of seeds[i]; it calls `unet` once per time step of the
    scheduler, with a batch whose size is that of `seeds` or a multiple of it (classifier-free guidance).
    sets_timesteps: whether `run` sets the time steps of `scheduler` in a way of its own."""

    unet: nn.Module
    scheduler: Any
    steps: int
    run: Callable[[Sequence[int]], Any]
    sets_timesteps: bool = False

    def new_scheduler(self) -> Any:
        """A scheduler at the beginning of a run."""
        return copy.deepcopy(self._begun)

    @functools.cached_property
    def _begun(self) -> Any:
        if self.sets_timesteps:
            with self.unet.register_forward_pre_hook(_stop, prepend=True), contextlib.suppress(StopIteration):
                self.run([0])
            return copy.deepcopy(self.scheduler)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def timesteps(self) -> Tensor:
        """Time steps of the calls of a run, float32 [calls], the noisiest first."""
        return torch.as_tensor(self.new_scheduler().timesteps, dtype=torch.float32).cpu()

    def check_input(self, method: str) -> None:
        """Raise ValueError where the scheduler scales the UNet's input, which `method` makes steps from."""
        scheduler, probe = self.new_scheduler(), torch.ones(1)
        if not torch.equal(scheduler.scale_model_input(probe, scheduler.timesteps[0]), probe):
            what = f"the UNet's input, which {type(scheduler).__name__} scales"
            raise ValueError(f"calibrate: {method} steps from {what}; use DDIMScheduler or DPMSolverMultistepScheduler")


def _stop(*call: Any) -> None:
    raise StopIteration


def sampler_of(
    where: str, target: Any, steps: int, scheduler: Any, sample: Any, call_kwargs: Mapping[str, Any]
) -> Sampler:
    """The sampler of a pipeline, or of a UNet with `scheduler` and sample(seeds)."""
    if isinstance(target, nn.Module):
        if scheduler is None or sample is None:
            raise ValueError(f"{where}: a bare UNet does not sample; give scheduler= and sample=, or its pipeline")
        return Sampler(target, scheduler, steps, sample)
    denoiser_of(where, target)
    if scheduler is not None or sample is not None:
        raise ValueError(f"{where}: a pipeline has a scheduler and samples by itself; leave scheduler and sample out")
    return pipeline_sampler(target, steps, call_kwargs)


def pipeline_sampler(pipe: Any, steps: int, call_kwargs: Mapping[str, Any]) -> Sampler:
    """The sampler of a diffusers pipeline. call_kwargs: more arguments of its call, the same for all images."""
    accepted = inspect.signature(pipe.__call__).parameters
    if unknown := [name for name in call_kwargs if name not in accepted]:
        raise ValueError(f"calibrate: {type(pipe).__name__} takes no {unknown[0]}; it takes {', '.join(accepted)}")
    if "prompt" in accepted and not {"prompt", "prompt_embeds"} & set(call_kwargs):
        raise ValueError(f"calibrate: {type(pipe).__name__} takes a text; give call_kwargs={{'prompt': ...}}")
    options = {"output_type": "latent" if "prompt" in accepted else "np", **call_kwargs}
    denoiser = denoiser_of("calibrate", pipe)
    shifts = "mu" in inspect.signature(pipe.scheduler.set_timesteps).parameters  # with the size of the picture
    return Sampler(denoiser, pipe.scheduler, steps, lambda seeds: run_pipeline(pipe, steps, seeds, options), shifts)


def run_pipeline(pipe: Any, steps: int, seeds: Sequence[int], options: Mapping[str, Any]) -> Any:
    """What a diffusers pipeline gives for the noise of `seeds`. options: more arguments; one prompt is for all images.
    Of a pipeline with classes, image i has the class seeds[i] modulo 1000."""
    accepted = inspect.signature(pipe.__call__).parameters
    more: dict[str, Any] = {"num_inference_steps": steps, **options}
    more["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(more.get("prompt"), str):
        more["prompt"] = [more["prompt"]] * len(seeds)
    elif isinstance(more.get("prompt_embeds"), Tensor) and len(more["prompt_embeds"]) == 1:
        ones = {name: value for name, value in more.items() if isinstance(value, Tensor) and len(value) == 1}
        more |= {name: value.repeat_interleave(len(seeds), 0) for name, value in ones.items()}
    elif "batch_size" in accepted:
        more["batch_size"] = len(seeds)
    elif "class_labels" in accepted:
        more.setdefault("class_labels", [seed % 1000 for seed in seeds])
    return pipe(**more)


def uniform_calls(calls: int, per_sample: int, samples: int) -> Tensor:
    """int64 [samples, per_sample]: for every sample the same calls, equally spaced over those that have a predecessor.
    They are the middles of `per_sample` equal parts of 1 .. calls - 1."""
    if not 1 <= per_sample < calls:
        raise ValueError(f"calls_per_sample={per_sample} is not allowed; give 1 to {calls - 1} for {calls} calls")
    middles = (torch.arange(per_sample, dtype=torch.float64) + 0.5) * (calls - 1) / per_sample
    return (1 + middles.floor().long()).expand(samples, -1).clone()


def ndtc_calls(
    timesteps: Tensor, train_steps: int, per_sample: int, samples: int, mean: float, std: float, generator: Any
) -> Tensor:
    """int64 [samples, per_sample]: calls whose time steps follow PTQ4DM's clipped normal distribution (Algorithm 1)::

        t ~ Normal(mean * T, std * T),    t_i = clamp(floor(t), 0, T - 1),    the call with the time step nearest to t_i

    T = train_steps; t = 0 is the image, so a mean below 0.5 prefers steps close to it, as the paper wants (its released
    code counts from the noise instead). Every draw of the paper has a noise of its own: per_sample 1."""
    if not (0 <= mean <= 1 and std > 0):
        raise ValueError(f"mean={mean}, std={std} are not allowed; give 0 <= mean <= 1 and std > 0")
    drawn = torch.randn(samples, per_sample, generator=generator, dtype=torch.float64) * std + mean
    clipped = (drawn * train_steps).floor().clamp_(0, train_steps - 1)
    return (timesteps.double()[None, None] - clipped[..., None]).abs().argmin(-1).clamp_min(1)


@dataclasses.dataclass
class CalibrationData:
    """Points on trajectories: `P` inputs of the UNet, each with that of the call before.

    sample, previous_sample: float [P, C, H, W]. timestep, previous_timestep: float32 [P]. call: int64 [P], number of
    the call in its run. row: int64 [P], where the point's conditions are. conditions: other inputs of the UNet by
    name, [R, ...] ("added_cond_kwargs.text_embeds" for those inside a dict). timesteps: float32 [calls] of a whole run.
    """

    sample: Tensor
    previous_sample: Tensor
    timestep: Tensor
    previous_timestep: Tensor
    call: Tensor
    row: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.sample)

    def arguments(self, points: Tensor, previous: bool = False) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """args and kwargs of a UNet call at `points` (int64), or at the calls before them."""
        sample, timestep = self.sample, self.timestep
        if previous:
            sample, timestep = self.previous_sample, self.previous_timestep
        kwargs: dict[str, Any] = {}
        for name, values in self.conditions.items():
            outer, _, inner = name.partition(".")
            holder = kwargs.setdefault(outer, {}) if inner else kwargs
            holder[inner or outer] = values[self.row[points]].to(sample.device)
        return (sample[points], timestep[points]), kwargs

    def run(self, unet: nn.Module, points: Tensor, previous: bool = False) -> Any:
        """What `unet` gives at `points`, or at the calls before them; its [0] is the output."""
        args, kwargs = self.arguments(points, previous)
        return CallForm(unet).adapted(unet)(*args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one flat dict, for `from_tensors`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "conditions"}
        return own | {CONDITIONS + name: value for name, value in self.conditions.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "CalibrationData":
        names = [name for name in tensors if name.startswith(CONDITIONS)]
        conditions = {name.removeprefix(CONDITIONS): tensors[name] for name in names}
        return cls(**{name: value for name, value in tensors.items() if name not in names}, conditions=conditions)


def collect(
    sampler: Sampler, calls: Tensor, seeds: Sequence[int], batch: int, on_run: Callable[[int], Any] = lambda n: None
) -> CalibrationData:
    """Run the full-precision sampler and keep, of the image from seeds[i], the calls calls[i] (int64 [samples, k]).
    on_run(images): called after each run. ValueError unless the UNet is called once a time step, on rows per image."""
    timesteps = sampler.timesteps()
    parts: list[dict[str, Tensor]] = []
    rows = 0
    for start in range(0, len(seeds), batch):
        points, conditions = _run(sampler, calls[start : start + batch], seeds[start : start + batch])
        if len(points) != len(timesteps):
            called = f"a run called the UNet {len(points)} times, but the scheduler has {len(timesteps)} time steps"
            raise ValueError(f"calibrate: {called}; calibration needs one call per time step (guidance in one batch)")
        part = {name: torch.cat([point[name] for point in points]) for name in points[0]}
        parts.append({**part, "row": part["row"] + rows, **conditions})
        rows += int(part["row"].max()) + 1
        on_run(len(seeds[start : start + batch]))
    stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return CalibrationData.from_tensors({**stacked, "timesteps": timesteps})


def _run(sampler: Sampler, chosen: Tensor, seeds: Sequence[int]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The points that one run gives at each of its calls, `chosen` (int64 [images, k]) alone, and its conditions."""
    signature, form = inspect.signature(sampler.unet.forward), CallForm(sampler.unet)
    points: list[dict[str, Tensor]] = []
    conditions: dict[str, Tensor] = {}
    previous: dict[str, Tensor] = {}

    def keep(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal conditions, previous
        args, kwargs = form.as_unet(args, kwargs)
        names = signature.parameters if form.timestep is None else ("sample", "timestep")
        arguments = dict(zip(names, args)) | kwargs
        sample = arguments.pop("sample").detach().clone()
        timestep = torch.as_tensor(arguments.pop("timestep"), dtype=torch.float32).detach().cpu()
        current = {"sample": sample, "timestep": timestep.reshape(-1).expand(len(sample))}
        conditions = conditions or _conditions(arguments, len(sample))
        wanted = (chosen == len(points)).sum(1).repeat(len(sample) // len(chosen))
        rows = torch.arange(len(sample)).repeat_interleave(wanted)
        both = current | {f"previous_{name}": value for name, value in (previous or current).items()}
        point = {name: value[rows] for name, value in both.items()}
        points.append({**point, "call": torch.full((len(rows),), len(points)), "row": rows})
        previous = current

    with sampler.unet.register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        sampler.run(seeds)
    return points, conditions


def _conditions(arguments: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """The tensors among the other inputs of the UNet, flat. ValueError for one that is not per image."""
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): item.detach().clone() for key, item in inner if isinstance(item, Tensor)}
    for name, value in flat.items():
        if value.ndim == 0 or len(value) != rows:
            raise ValueError(f"calibrate: input {name} has shape {tuple(value.shape)}, which is not one per image")
    return {CONDITIONS + name: value for name, value in flat.items()}


@contextlib.contextmanager
def watched(modules: Mapping[str, nn.Module], on_call: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Let on_call(path, args) see the arguments of every call of `modules`; nothing is differentiated meanwhile."""
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path, module in modules.items():
            hook = module.register_forward_pre_hook(lambda module, args, path=path: on_call(path, args))
            hooks.enter_context(hook)
        yield


def stream(
    unet: nn.Module, data: CalibrationData, layers: Mapping[str, nn.Module],
    on_input: Callable[[str, Tensor, Tensor | None, Tensor], None], batches: Iterable[Tensor], pairs: bool = False,
) -> None:  # fmt: skip
    """Call on_input(path, x, previous, points) for every layer and batch, in the order of computation. layers: modules
    of `unet`. x: input of the layer at `points` (int64) of the data. previous: with `pairs` its input at the calls
    before, else None. In memory at a time: with `pairs` the inputs of all layers for one batch, else one."""
    before: dict[str, Tensor] = {}
    points = torch.empty(0)
    keep = False

    def observe(path: str, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if keep:
            before[path] = x.clone()
        else:
            on_input(path, x, before.pop(path, None), points)

    with watched(layers, observe):
        for points in batches:
            for keep in (True, False) if pairs else (False,):
                data.run(unet, points, previous=keep)
