"""How the calls of an accelerated UNet are run: its forward as it is, compiled, or as CUDA graphs.

It stands below a step schedule, so calls that are held or forecast do not come here. Calls whose Python does what later
ones rely on stay as they are: the first one of a run, which allocates state, those with other encoder states than the
call before, which compute constants, and, where others are compiled, the first with other weights, which stacks them.
Calls that run as they are take what follows from the timestep alone from a table (`nn.time_table`); a graph is
captured, and code compiled, for all timesteps.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.integrations.graphs import GraphedCalls
from modiff_kernels.integrations.hooks import set_attribute, wrap_forward
from modiff_kernels.integrations.timesteps import HostTimesteps
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.cache import TimeTable
from modiff_kernels.ops.dispatch import torch_must_see
from modiff_kernels.ops.registry import inline_kernels, is_about_values

TIME_PROJECTIONS = ("Timesteps", "GaussianFourierProjection")


class UNetForward:
    """Takes the place of the forward of `unet`. graphs: for CUDA graphs, or None. timesteps: reads those of calls."""

    def __init__(self, unet: nn.Module, state: ModulationState, graphs: GraphedCalls | None) -> None:
        self.state = state
        self.graphs = graphs
        self._plain = unet.forward
        self._compiled: Callable[..., Any] | None = None
        self._unet = unet
        self._relocations = -1  # of the state, after the last call that was run as it is
        self._encoders: dict[str, tuple[weakref.ref[Tensor], int, int]] = {}
        self.timesteps = HostTimesteps()

    def install(self, undo: contextlib.ExitStack) -> None:
        """Put it in; `undo` takes it out."""
        if self.graphs is not None:
            self.state.fixed_addresses = True
        wrap_forward(self._unet, self._forward, undo)
        for name in ("enable_freeu", "disable_freeu"):
            if callable(method := getattr(self._unet, name, None)):
                set_attribute(self._unet, name, self._then_capture_again(method), undo)

    def keep_time_table(self, undo: contextlib.ExitStack) -> None:
        """Let calls that run as they are take what follows from the timestep alone from a table, until `undo`."""
        time_proj, time_embedding = (getattr(self._unet, name, None) for name in ("time_proj", "time_embedding"))
        if _is_of_diffusers(time_proj, TIME_PROJECTIONS) and _is_of_diffusers(time_embedding, ("TimestepEmbedding",)):
            table = self.state.time_table = TimeTable(time_proj, time_embedding)
            wrap_forward(time_proj, table.features, undo)
            wrap_forward(time_embedding, table.embedding, undo)

    def compile(self, **options: Any) -> None:
        """Compile the calls that are not excepted above, with the options of torch.compile."""
        inline_kernels()
        if not options.keys() & {"backend", "mode", "options"}:
            options["options"] = _inductor_options(self._unet)
        self._compiled = torch.compile(self._plain, **{"fullgraph": True, "dynamic": False, **options})

    def _then_capture_again(self, method: Callable[..., None]) -> Callable[..., None]:
        """`method`, which sets numbers that a graph has taken into its kernels."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> None:
            method(*args, **kwargs)
            self.state.relocations += 1

        return call

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None and self.graphs is None:
            return self._with_time_table(original, args, kwargs)
        args, kwargs = _with_tensor_timestep(args, kwargs)
        if self.graphs is None:
            if self._is_first(args, kwargs):
                return self._as_it_is(original, args, kwargs)
            return self._call_compiled(*args, **kwargs)
        args, kwargs, inputs = self.graphs.static(args, kwargs)
        if self._is_first(args, kwargs):
            return self._as_it_is(original, args, kwargs)
        return self.graphs.call(original if self._compiled is None else self._call_compiled, args, kwargs, inputs)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except RuntimeError as error:
            if is_about_values(error):
                raise ValueError(
                    "a layer of the compiled UNet got NaN or Inf; check the model's input and weights, then start a "
                    "new run"
                ) from error
            raise

    def _with_time_table(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table = self.state.time_table
        sample = args[0] if args else kwargs.get("sample")
        if table is None or torch_must_see(sample):
            return original(*args, **kwargs)
        timestep = self.timesteps.value(args[1] if len(args) > 1 else kwargs.get("timestep"))
        if timestep is None:
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
            seen = self._encoders.get(state.context_name)
            changed = seen is None or seen[0]() is not encoder or seen[1:] != (encoder._version, state.kept.losses)
            if changed:
                self._encoders[state.context_name] = (weakref.ref(encoder), encoder._version, state.kept.losses)
        moved = self._compiled is not None and self._relocations != state.relocations  # weights will be stacked anew
        return changed or moved or state.is_first

    def _as_it_is(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        self._relocations = self.state.relocations
        return output


def _with_tensor_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the timestep as a tensor: code is compiled for a number, and a graph captured with it."""
    timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
    if not isinstance(timestep, (int, float)):
        return args, kwargs
    tensor = torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)
    if len(args) > 1:
        return (args[0], tensor, *args[2:]), kwargs
    return args, {**kwargs, "timestep": tensor}


def _inductor_options(unet: nn.Module) -> dict[str, Any]:
    """What handle.compile() asks of inductor where the user asks for nothing.

    Attributes of torch's own layers are not looked at before every call; nobody changes them within a run, and weights
    are read anew at every call all the same. On a CPU the kernels are called from C++, since a call from Python costs
    about as much as a small kernel; torch before 2.13 would go through Python for some of them even so.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    if next(unet.parameters()).device.type == "cpu" and torch.__version__ >= (2, 13):
        options["cpp_wrapper"] = True
    return options


def _is_of_diffusers(module: nn.Module | None, names: tuple[str, ...]) -> bool:
    """Whether `module` is of one of those classes of diffusers, which need not be imported."""
    kind = type(module)
    return kind.__module__ == "diffusers.models.embeddings" and kind.__name__ in names
