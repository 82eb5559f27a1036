"""How the calls of an accelerated UNet are run: its forward as it is, compiled, or as CUDA graphs.

It stands below a step schedule, so calls that are held or forecast do not come here. Graphs are the default on a GPU,
unless something may do otherwise at the next call (`obstacle_of`). Calls whose Python does what later ones rely on stay
as they are: the first one of a run, which allocates state, those with other encoder states than the call before, which
compute constants, and, where others are compiled, the first with other weights, which stacks them.
Calls that run as they are, and compiled code, take what follows from the timestep alone from a table
(`nn.cache.TimeTable`); a graph is captured for all timesteps."""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff_kernels.integrations.compiled import CompiledCalls
from modiff_kernels.integrations.graphs import GraphedCalls
from modiff_kernels.integrations.hooks import obstacle_of, set_attribute, wrap_forward
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.blocks.concatenation import forward_without_concatenation
from modiff_kernels.nn.cache import TimeTable, tensor_version
from modiff_kernels.nn.call import CallForm
from modiff_kernels.ops.dispatch import torch_must_see
from modiff_kernels.planning import clock

MAKES_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile."""
OF_TIME = {"time_proj": ("Timesteps", "GaussianFourierProjection"), "time_embedding": ("TimestepEmbedding",)}
"""Modules of a UNet whose outputs follow from the timestep alone if they are of these classes of diffusers."""


class UNetForward:
    """Takes the place of the forward of `unet`. own_paths: of low-bit layers and fused blocks there. graphs: for CUDA
    graphs, or None. timesteps: reads those of calls."""

    def __init__(
        self, unet: nn.Module, form: CallForm, state: ModulationState, own_paths: Iterable[str],
        graphs: GraphedCalls | None,
    ) -> None:  # fmt: skip
        self.state = state
        self.graphs = graphs
        self.timesteps = HostTimesteps()
        self._unet, self._form = unet, form
        # Hooks of Hugging Face's accelerate, which move the weights of the whole UNet, stay outside.
        self._name = "_old_forward" if "_hf_hook" in unet.__dict__ and hasattr(unet, "_old_forward") else "forward"
        self._plain = form.adapted(getattr(unet, self._name))
        self._compiled: CompiledCalls | None = None
        self._own_paths = tuple([f"{path}." for path in own_paths])
        self._relocations = -1  # of the state, after the last call that was run as it is
        self._encoders: dict[str, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}
        self._owners = [module._parameters for module in unet.modules() if module._parameters]
        self._attention: list[Any] = []
        self._signs: Any = None  # of other Python than in the call before
        self._seen: Any = None  # with addresses of weights

    def install(self, undo: contextlib.ExitStack) -> None:
        if self._form.timestep is not None:
            wrap_forward(self._unet, lambda _, *args, **kwargs: self._plain(*args, **kwargs), undo, self._name)
        wrap_forward(self._unet, self._forward, undo, self._name)
        for block in self._unet.modules():
            if (forward := forward_without_concatenation(block)) is not None:
                wrap_forward(block, functools.partial(_unless_compiling, forward), undo)
        for name in ("enable_freeu", "disable_freeu"):
            if callable(method := getattr(self._unet, name, None)):
                set_attribute(self._unet, name, functools.partial(self._then_capture_again, method), undo)

    def keep_time_table(self, undo: contextlib.ExitStack) -> None:
        """Let calls that run as they are take what follows from the timestep alone from a table, until `undo`."""
        modules = [getattr(self._unet, name, None) for name in OF_TIME]
        for kind, names in zip(map(type, modules), OF_TIME.values()):
            if kind.__module__ != "diffusers.models.embeddings" or kind.__name__ not in names:
                return
        table = self.state.time_table = TimeTable(self.state, *modules)
        wrap_forward(modules[0], table.features, undo)
        wrap_forward(modules[1], table.embedding, undo)

    def compile(self, **options: Any) -> None:
        """Compile the calls that are not excepted above, with the options of torch.compile (`CompiledCalls`)."""
        if options.get("mode") in MAKES_GRAPHS or "triton.cudagraphs" in options.get("options", {}):
            self.graphs = None  # torch makes its own
        on_cpu = device_of(self._owners).type == "cpu"
        self._compiled = CompiledCalls(self._unet, self._plain, self.state, self._own_paths, on_cpu, **options)

    def _then_capture_again(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """`method`, which sets numbers that a graph has taken into its kernels, and makes other outputs of the UNet."""
        method(*args, **kwargs)
        self.state.relocations += 1
        self.state.begin_anew()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        graphs = self._graphs_now()
        if self._compiled is None and graphs is None:
            return self._with_time_table(original, args, kwargs)
        args, kwargs = _with_tensor_timestep(args, kwargs)
        calls = None
        if graphs is not None:
            args, kwargs, calls = graphs.static(args, kwargs, device_of(self._owners))
        if self._is_first(args, kwargs):
            output = original(*args, **kwargs) if graphs is not None else self._with_time_table(original, args, kwargs)
            self._relocations = self.state.relocations
            if self._compiled is not None:
                self._compiled.check_again()
            return output
        step = original if self._compiled is None else self._compiled
        if self._compiled is not None and self.state.time_table is not None:
            self._load_time_table(self.state.time_table, calls is None, args, kwargs)
        return step(*args, **kwargs) if graphs is None or calls is None else graphs.call(step, args, kwargs, calls)

    def _graphs_now(self) -> GraphedCalls | None:
        """The graphs, if this call may be one."""
        graphs, unet, state = self.graphs, self._unet, self.state
        if graphs is None or device_of(self._owners).type != graphs.device_type:
            return None
        signs = [RemovableHandle.next_id, unet.training, *[module.processor for module in self._attention]]
        if state.is_first or signs != self._signs:
            self._attention = [module for module in unet.modules() if hasattr(module, "processor")]
            addresses = [tensor.data_ptr() for tensor in itertools.chain(unet.parameters(), unet.buffers())]
            self._signs = [*signs[:2], *[module.processor for module in self._attention]]
            if (addresses, self._signs) != self._seen:  # of float weights, which graphs read too
                state.relocations += 1
                self._seen = addresses, self._signs
            graphs.obstacle = obstacle_of(unet)
        if graphs.obstacle is not None:
            graphs.warn(graphs.obstacle)
            return None
        state.fixed_addresses = True
        return graphs

    def describe(self) -> list[str]:
        """How calls were run, as far as it is not as they are."""
        found, device = [], device_of(self._owners).type
        if self.graphs is not None and device == self.graphs.device_type:
            found = [self.graphs.describe()]
        elif self.graphs is not None and device != "cpu":
            found = [f"CUDA graphs: off on {device}"]
        return found + (self._compiled.describe() if self._compiled is not None else [])

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, float | None]:
        """Sample and timestep of a call, and that as a number where it may come from a table."""
        sample = args[0] if args else kwargs.get("sample")
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        return sample, timestep, None if torch_must_see(sample) else self.timesteps.value(timestep)

    def _load_time_table(self, table: TimeTable, may: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep, value = self._timestep(args, kwargs)
        if may and value is not None:
            table.load(value, timestep, len(sample), sample.device)
        else:
            table.for_compiled = None

    def _with_time_table(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table = self.state.time_table
        timestep = None if table is None else self._timestep(args, kwargs)[2]
        if table is None or timestep is None:
            return original(*args, **kwargs)
        table.begin_call(timestep)
        try:
            return original(*args, **kwargs)
        finally:
            table.end_call()

    def _is_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call leaves something to later ones that they do not compute again."""
        state = self.state
        encoder = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        changed = False
        if isinstance(encoder, Tensor) and not encoder.is_inference():
            seen, version = self._encoders.get(state.context_name), (encoder._version, state.kept.losses)
            changed = seen is None or seen[0]() is not encoder or seen[1] != version
            if changed:
                self._encoders[state.context_name] = weakref.ref(encoder), version
        moved = self._compiled is not None and self._relocations != state.relocations  # weights will be stacked anew
        return changed or moved or state.is_first


class HostTimesteps:
    """The timesteps of calls as numbers on the host, without waiting for a device within a run. Known are numbers,
    tensors on the CPU, and elements of a schedule on a device that was announced: by their place in its memory, which a
    loop over `scheduler.timesteps` or over a slice of it gives. scheduler: that announced last."""

    def __init__(self) -> None:
        self.scheduler: Any = None
        self._schedule: Tensor | None = None
        self._version = 0
        self._values: list[float] = []

    def announce(self, scheduler: Any) -> list[float]:
        """The timesteps that the scheduler has set, read if they are others than before."""
        self.scheduler, timesteps = scheduler, getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor):
            return [] if timesteps is None else clock.host_timesteps(scheduler)
        if timesteps is not self._schedule or tensor_version(timesteps) != self._version:
            self._values = clock.host_timesteps(scheduler)
            self._schedule, self._version = timesteps, tensor_version(timesteps)
        return self._values

    def value(self, timestep: Any) -> float | None:
        """`timestep`, a number or a tensor of one element or of equal ones, as a number; None if it is not known."""
        on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        return clock.host_timestep(timestep) if on_host else self._value_in_schedule(timestep)

    def _value_in_schedule(self, timestep: Tensor) -> float | None:
        schedule = self._schedule
        if schedule is None or tensor_version(schedule) != self._version:
            return None
        if timestep.numel() != 1 and any(timestep.stride()):
            return None
        if timestep.untyped_storage()._cdata != schedule.untyped_storage()._cdata or timestep.dtype != schedule.dtype:
            return None
        index, rest = divmod(timestep.storage_offset() - schedule.storage_offset(), schedule.stride(0))
        return self._values[index] if rest == 0 and 0 <= index < len(self._values) else None


def device_of(owners: list[dict[str, Any]]) -> torch.device:
    """That of the first parameter, or meta, on which nothing runs; owners: the `_parameters` of modules."""
    found = (tensor.device for owner in owners for tensor in owner.values() if tensor is not None)
    return next(found, torch.device("meta"))


def _unless_compiling(forward: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (original if torch.compiler.is_compiling() else forward)(*args, **kwargs)


def _with_tensor_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the timestep as a tensor: code is compiled for a number, and a graph captured with it."""
    timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
    if isinstance(timestep, (int, float)):
        tensor = torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)
        if len(args) > 1:
            args = (args[0], tensor, *args[2:])
        else:
            kwargs = {**kwargs, "timestep": tensor}
    return args, kwargs
