"""`Handle`: what `accelerate` did to one UNet, the runs on it, and the way back."""

import contextlib
import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.config import ModiffConfig
from modiff_kernels.config.check import text_table
from modiff_kernels.config.plan import MODULATED, QUANTIZED
from modiff_kernels.config.schedule import ACTION_NAMES, UPDATE, StepSchedule
from modiff_kernels.integrations import hooks
from modiff_kernels.integrations.forward import UNetForward
from modiff_kernels.integrations.graphs import CudaCapture, GraphedCalls
from modiff_kernels.integrations.replacements import Replacements, runs_on_gpu
from modiff_kernels.integrations.scheduled import ScheduledUNet
from modiff_kernels.integrations.steps import Steps
from modiff_kernels.integrations.watch import Watch
from modiff_kernels.log import logger
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.blocks import covering
from modiff_kernels.nn.call import CallForm
from modiff_kernels.nn.run import DEFAULT_CONTEXT
from modiff_kernels.planning.stored import beside

MOVED = (
    "the UNet was accelerated before it came to the GPU, so all of its layers are modulated, which moves more bytes "
    "there than float does; call accelerate() after .to('cuda'), or give a plan ('modulated' says that this is meant)"
)

OTHERS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear)
FEW_CALLS = 4
FEW = (
    f"runs of up to {FEW_CALLS} calls are plain W8A8: the first call costs two updates, and too few follow; "
    "plan='modulated' modulates them"
)
HANDLE = "_modiff_handle"  # attribute of a UNet: the handle that is alive for it


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One line of `Handle.explain`: what became of a Linear or Conv2d. reason: why it is float, else empty."""

    name: str
    kind: str
    shape: str
    mode: str
    bits: str
    backend: str
    reason: str


class Handle:
    """What `accelerate` did to one UNet. plan: what config.plan stands for, or None. layers: the low-bit layers by
    path. replaced: what was put where. calibration: where weight codes come from, or why not from beside the model.
    by_kind: what the kind of network has changed in the config that was asked for, and why.
    vae: the handle of the decoder of the pipeline's VAE, or None where that is float.
    is_loaded: whether diffusers loaded the UNet in low bits. keep_original: whether float weights are kept."""

    calibration = by_kind = ""
    vae: "Handle | None" = None

    def __init__(
        self, unet: nn.Module, pipe: Any, config: ModiffConfig, replaced: Replacements, keep_original: bool = True
    ) -> None:
        self.keep_original = keep_original
        self.unet, self.pipe, self.config, self.replaced = unet, pipe, config, replaced
        self.state, self.layers = replaced.state, replaced.layers
        self.plan, self.share_inputs = replaced.plan, replaced.share_inputs
        self._untouched = self.plan is not None and not replaced.replacements
        self._planned_shape = None if self.plan is None or self.plan.key is None else self.plan.key.shape
        self.is_loaded = False
        self._seen: tuple[torch.Size, str] | None = None
        by_default = config.plan is None and config.mode == MODULATED and bool(self.layers)
        self._is_for_cpu = by_default and not runs_on_gpu(unet)  # all layers modulated, which no GPU has by default
        free = self._is_for_cpu and (config.act_bits, config.scale_mode) == (8, "dynamic")
        modulated = [layer for layer in self.layers.values() if free and layer.mode == MODULATED]
        self._by_calls: set[Any] = {*modulated, *[layer.stack for layer in modulated if layer.stack is not None]}
        self._told_of_few = False
        self._pipes: list[Any] = []  # whose schedulers begin runs
        self._wrappers: list[hooks.Wrapper] = []
        self._own_runs: list[tuple[int | None, Any]] = []
        wanted = torch.cuda.is_available() if config.cuda_graphs is None else config.cuda_graphs
        graphs = GraphedCalls(self.state, CudaCapture()) if wanted else None
        if graphs is not None and config.max_state_bytes is not None:
            graphs.most_shapes = 1
        self._form = CallForm(unet)
        self._forward = UNetForward(unet, self._form, self.state, replaced.replacements, graphs)
        self._steps: Steps | None = None
        self._scheduled: ScheduledUNet | None = None
        if config.schedule is not None:
            stored = beside(unet, pipe) if isinstance(config.schedule, str) else ()
            self._scheduled = ScheduledUNet(unet, self.state, config.schedule, lambda: self._steps, stored)
        self._undo: contextlib.ExitStack | None = None

    def sampling_run(
        self, num_calls: int | None = None, scheduler: Any = None
    ) -> contextlib.AbstractContextManager[ModulationState]:
        """One run of an own sampler: all UNet calls of one picture go inside.

        num_calls: more of them raise. scheduler: the one that samples; a step schedule reads its timesteps and noise
        levels at the first call, so `set_timesteps` may come inside. On a GPU, set them before: the embeddings of
        timesteps that are known when the run begins are kept from run to run."""
        self._require_active()
        return self._own_run(num_calls, scheduler)

    def context(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A trajectory of its own for the UNet calls inside, such as "cond" and "uncond". Without it, calls of one step
        are told apart by their conditions or their order: "default", "default/1" and so on."""
        self._require_active()
        return self.state.context(name)

    def wrap_scheduler(self, pipe: Any = None) -> None:
        """Let the scheduler that the pipeline has now begin the runs. Call it after replacing `pipe.scheduler`, and
        with every other pipeline that has this UNet and a scheduler of its own."""
        self._require_active()
        pipe = self.pipe if pipe is None else pipe
        if not hasattr(pipe, "scheduler"):
            what = "accelerate() got a bare UNet" if pipe is None else f"a {type(pipe).__name__} has no scheduler"
            text = "give a pipeline with this UNet, or use `with handle.sampling_run():`"
            raise RuntimeError(f"wrap_scheduler: {what}; {text}")
        self.attach(pipe)

    def remove(self) -> None:
        """Put the original modules and scheduler methods back and free the state; the second call does nothing.
        RuntimeError where their float weights were not kept."""
        if self._undo is None:
            return
        if not self.keep_original:
            text = "load it again; unet.dequantize() of one that was loaded in low bits gives what its codes stand for"
            raise RuntimeError(f"remove: the float weights of this UNet were not kept (keep_original=False); {text}")
        self.state.release()
        for layer in self.layers.values():
            layer.original._parameters.update(layer._parameters)  # which a user may have set
        undo, self._undo = self._undo, None
        undo.close()
        if self.vae is not None:
            self.vae.remove()

    def refresh(self) -> None:
        """Make the codes of all weights again, but for those of a calibration that you gave, and all else that is kept
        of weights. Needed only after changes of single values through `.data`: others are noticed and followed.
        RuntimeError where the float weights were not kept."""
        self._require_active()
        if not self.keep_original:
            text = "(keep_original=False); load the UNet again, change it, then accelerate it"
            raise RuntimeError(f"refresh: the float weights are not there to make codes of {text}")
        self._watch.follow(asked=True)

    def save_pretrained(self, directory: str | os.PathLike[str], max_shard_size: int | str = "10GB") -> None:
        """Write the UNet with its packed weights into a folder that `from_pretrained` of its diffusers class loads.

        config.json gets this handle's config as `quantization_config`; `quant.checkpoint` has the format of the
        safetensors files. More than `max_shard_size` (bytes, or text such as "5GB") goes into several of them. Files of
        an earlier save there are replaced. The state of a run is not saved.

        TypeError for a UNet that is no diffusers model, ValueError where nothing is low-bit, NotADirectoryError."""
        self._require_active()
        from modiff_kernels.integrations.saving import save  # which imports diffusers

        save(self, directory, max_shard_size)

    def mark_as_loaded(self, on_remove: Callable[[nn.Module], None]) -> None:
        """Let `accelerate` return this handle for its UNet, until `remove`, which calls `on_remove` with the UNet."""
        self.is_loaded = True
        self.unet.__dict__.pop("save_pretrained", None)  # which knows low bits there
        self._undo.callback(on_remove, self.unet)

    def compile(self, **options: Any) -> None:
        """Compile the UNet's calls with torch.compile, whose options these are; fullgraph=True where not given.

        In the place of torch.compile(unet), which would see the run's bookkeeping. The first call of a run and the
        first one with other encoder states run as they are; a step schedule stays outside. Nothing is compiled again
        between updates: pass timesteps in any form, and the same tensor of encoder states at every call. Where neither
        mode nor options are given, torch checks its guards once a run, which saves time on the host: then modules and
        attributes that are changed within a run are seen at the next run; weights and hooks at once."""
        self._require_active()
        self._forward.compile(**options)

    def rows(self) -> list[LayerRow]:
        """What became of every Linear and Conv2d of the original UNet, in its order."""
        return [self._row(path, module) for path, module in self.replaced.originals.items()]

    def explain(self, state: str | None = None) -> str:
        """A table of `rows`, and why layers stay float. state: its size, where no run has allocated it yet."""
        rows = self.rows()
        names = [field.name for field in dataclasses.fields(LayerRow)]
        table = text_table(names, [*map(dataclasses.astuple, rows)], left=names)
        low_bit = sum(row.mode != "float" for row in rows)
        state = f"{low_bit} of {len(rows)} layers low-bit, state {state or f'{self.state.nbytes() / 2**20:.1f} MiB'}"
        if self.state.time_table is not None:
            state += f", time table {self.state.time_table.nbytes() / 2**20:.1f} MiB"
        summary = [f"{type(self.unet).__name__}: {state}"]
        if self.calibration:
            learnt = sum(layer.has_learnt_codes for layer in self.layers.values())
            summary.append(f"codes of {learnt} layers from a calibration: {self.calibration}")
        if self._scheduled is not None:
            summary.append(f"schedule: {self.explain_schedule()}")
        if self.plan is not None:
            summary.append(f"{self.plan.describe()}\n")
        summary += [text for text in (self.by_kind, FEW * self._told_of_few) if text]
        others = Counter(type(module).__name__ for module in self.unet.modules() if isinstance(module, OTHERS))
        if others:
            listed = ", ".join(f"{count} {kind}" for kind, count in others.items())
            summary.append(f"float besides: {listed}, for which there are no low-bit kernels")
        summary += self._forward.describe()
        vae = [] if self.vae is None else [f"\nVAE, {self.vae.explain()}"]
        return "\n".join([*summary, table, *vae])

    def set_schedule(self, schedule: StepSchedule | str | None) -> None:
        """Take another schedule, "auto" or None from the next run on. RuntimeError if `accelerate` got none."""
        self._require_active()
        if self._scheduled is None:
            raise RuntimeError("set_schedule: accelerate() got no schedule; give one in its ModiffConfig")
        if isinstance(schedule, str):
            self._scheduled.stored = beside(self.unet, *self._pipes)
        self._scheduled.schedule = schedule

    def explain_schedule(self) -> str:
        """The step schedule, what it skips, and what the calls of the last run did; empty without a schedule."""
        return "" if self._scheduled is None else self._scheduled.describe()

    def actions(self, context: str = DEFAULT_CONTEXT) -> tuple[str, ...]:
        """What the calls of the last run did in `context`: "update", "hold", "forecast"; empty without a schedule."""
        trajectory = self.state.trajectories.get(context)
        return () if trajectory is None else tuple([ACTION_NAMES[letter] for letter in trajectory.done])

    def skipped_calls(self, context: str = DEFAULT_CONTEXT) -> int:
        """How many calls of the last run in `context` did not compute the UNet."""
        return sum(action != ACTION_NAMES[UPDATE] for action in self.actions(context))

    @contextlib.contextmanager
    def _own_run(self, num_calls: int | None, scheduler: Any) -> Iterator[ModulationState]:
        with self.state.sampling_run(num_calls), contextlib.ExitStack() as own:
            self._own_runs.append((num_calls, scheduler))
            own.callback(self._own_runs.pop)
            if scheduler is not None:
                self._forward.timesteps.announce(scheduler)
                known = self._is_wrapped(scheduler) or not hasattr(scheduler, "set_timesteps")
                for wrapper in () if known else self._wrapped(scheduler):
                    own.callback(wrapper.restore)
            yield self.state

    def _require_active(self) -> None:
        if self._undo is None:
            raise RuntimeError("this handle was removed; call accelerate() again")

    def install(self) -> None:
        """Put everything in; on any error nothing is left of it."""
        unet = self.unet
        with contextlib.ExitStack() as undo:
            hooks.set_attribute(unet, HANDLE, self, undo)
            for path, module in self.replaced.replacements.items():
                undo.callback(hooks.set_module, unet, path, hooks.set_module(unet, path, module))
            undo.callback(unet.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            undo.callback(unet.register_forward_hook(self._leave, always_call=True).remove)
            hooks.set_attribute(unet, "_reset_stateful_cache", lambda *_, **__: self.state.reset_after_pipeline(), undo)
            hooks.refuse_methods(unet, undo, self.keep_original)
            self._forward.install(undo)
            hooks.answer_dtype_quickly(unet, undo)
            if not self._untouched:
                self._forward.keep_time_table(undo)
            if self._scheduled is not None:
                self._scheduled.install(undo)
            undo.callback(self._detach)
            if self.pipe is not None:
                self.attach(self.pipe)
            for layer in self.layers.values():
                layer.refresh_weight()
                if not self.keep_original:
                    layer.free_original()
            self._watch = Watch(unet, self.replaced)
            self._undo = undo.pop_all()

    def attach(self, pipe: Any) -> None:
        """Let the scheduler of `pipe` begin runs, beside those of the other pipelines."""
        pipes = [*(other for other in self._pipes if other is not pipe), pipe]
        schedulers = {id(pipe.scheduler): pipe.scheduler for pipe in pipes}
        wrappers = [wrapper for scheduler in schedulers.values() for wrapper in self._wrapped(scheduler)]
        self._detach()
        self.pipe, self._pipes, self._wrappers = pipe, pipes, wrappers

    def _wrapped(self, scheduler: Any) -> list[hooks.Wrapper]:
        tell = self._scheduled.hear_of_noise if self._scheduled is not None else lambda _: None
        return hooks.wrap_scheduler(scheduler, self.state, self._announce, tell)

    def _announce(self, scheduler: Any) -> None:
        """Take note of the calls that a scheduler has set, whose number decides the mode of layers that are free."""
        calls = len(self._forward.timesteps.announce(scheduler))
        mode = QUANTIZED if 0 < calls <= FEW_CALLS else MODULATED
        if mode == QUANTIZED and self._by_calls and not self._told_of_few:
            self._told_of_few = True
            logger.warning("%s", FEW)
        self.state.free_mode = mode
        for layer in self._by_calls:
            self.state.relocations += layer.mode != mode
            layer.mode = mode

    def _is_wrapped(self, scheduler: Any) -> bool:
        return any(wrapper.owner is scheduler for wrapper in self._wrappers)

    def _detach(self) -> None:
        for wrapper in self._wrappers:
            wrapper.restore()

    def _enter(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._watch.look()
        args, kwargs = self._form.as_unet(args, kwargs)
        replaced = not all(self._is_wrapped(pipe.scheduler) for pipe in self._pipes)
        if replaced and self.state.needs_run and not self._own_runs:
            text = "call handle.wrap_scheduler() once after the change, before set_timesteps()"
            raise RuntimeError(f"pipe.scheduler was replaced after accelerate(), so it does not begin runs; {text}")
        try:
            self.state.begin_call(functools.partial(self._look_at_call, args, kwargs))
        except RuntimeError as error:
            if self._pipes or not self.is_loaded:
                raise
            text = "accelerate(pipe)`, once after loading, lets the scheduler of the pipeline begin the runs"
            raise RuntimeError(f"{error}. This UNet was loaded in low bits: `handle = modiff_kernels.{text}") from error
        if self._untouched:
            return args, kwargs
        if args:
            return (channels_last(args[0]), *args[1:]), kwargs
        return args, {name: channels_last(value) for name, value in kwargs.items()}

    def _leave(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.state.end_call(failed=output is None)
        return output if self._untouched else _contiguous(output)

    def _look_at_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Before a call, when no other is in progress: what it stands on, and its context."""
        state, context = self.state, DEFAULT_CONTEXT
        if state.needs_run:
            if self._steps is None or self._steps.run_index != state.run_index:
                timesteps = self._forward.timesteps
                self._steps = Steps(state, timesteps, *[(None, timesteps.scheduler), *self._own_runs][-1])
            context = self._steps.place(args, kwargs)
        sample = args[0] if args else kwargs.get("sample")
        if self._is_for_cpu and getattr(sample, "is_cuda", False):
            self._is_for_cpu = False
            logger.warning(MOVED)
        if self._planned_shape is not None:
            self._look_at_shape(sample.shape, context)
        return context

    def _look_at_shape(self, shape: torch.Size, context: str) -> None:
        """Where the shape is not the one that the plan was made for: warn once, refuse more state than is allowed."""
        if (shape, context) == self._seen:
            return
        planned, limit = tuple(self._planned_shape), self.config.max_state_bytes
        contexts = len({*self.state.contexts(), context})
        needed = self.plan.state_bytes * math.prod(shape) / math.prod(planned) * contexts
        if limit is not None and needed > limit:
            text = f"about {needed:.0f} bytes of state; give a plan for this shape (make_plan), or a higher limit"
            raise ValueError(f"max_state_bytes={limit}: a sample {tuple(shape)} in {contexts} context(s) needs {text}")
        if tuple(shape) != planned and self._seen is None and self.plan.source == "measured":
            text = "the layer plan was made for samples %s and is used for %s; make_plan() makes one for these"
            logger.warning(text, planned, tuple(shape))
        self._seen = shape, context

    def _row(self, path: str, module: nn.Module) -> LayerRow:
        groups, layer = getattr(module, "groups", 1), self.layers.get(path)
        n, k = (module.weight.shape if layer is None else layer.weight_shape)[:2]
        kind, shape = "Linear", f"{k * groups}->{n}"
        if isinstance(module, nn.Conv2d):
            kind = f"Conv2d {module.kernel_size[0]}x{module.kernel_size[1]}"
            shape += f" /{module.stride[0]}" if module.stride != (1, 1) else ""
            shape += f" groups {groups}" if groups != 1 else ""
        reason = self.replaced.reasons.get(path)
        if layer is not None:
            bits = f"w{layer.weight_bits}a{layer.act_bits if layer.act_bits is not None else '-'}"
            why = "act_bits is None" if self.config.act_bits is None else "plan: float, beside codes that were learnt"
            reason = f"{why}: dequantised weights" if layer.mode == "float" else ""
            return LayerRow(path, kind, shape, layer.mode, bits, layer.backend_in_use(), reason)
        if reason is not None:
            return LayerRow(path, kind, shape, "float", "-", "torch", reason)
        bits = f"w{self.config.weight_bits}a{self.config.act_bits}"
        reason = f"part of the fused block {covering(path, self.replaced.fused)}"
        return LayerRow(path, kind, shape, "fused", bits, self.config.backend, reason)


class Handles:
    """The handles of a pipeline with several denoisers, by their names there. What is called here is called on each,
    and gives the results by name, `explain` in one text."""

    def __init__(self, handles: dict[str, Handle]) -> None:
        self.handles = handles

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = {key: getattr(handle, name)(*args, **kwargs) for key, handle in self.handles.items()}
            return "\n\n".join(map("{0[0]}: {0[1]}".format, found.items())) if name == "explain" else found

        return call


def channels_last(value: Any) -> Any:
    """`value` in channels_last if it is a tensor of four dimensions, else as it is."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _contiguous(output: Any) -> Any:
    """The UNet's output with a contiguous sample: a tensor, a tuple, or an output object with a `sample`."""
    if isinstance(output, Tensor):
        return output.contiguous()
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (output[0].contiguous(), *output[1:])
    if isinstance(getattr(output, "sample", None), Tensor):
        output.sample = output.sample.contiguous()
    return output
