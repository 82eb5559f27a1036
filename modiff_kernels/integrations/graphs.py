"""UNet calls as CUDA graphs: one graph per kind of call, input formats, shape of the sample and context.

A graph repeats kernels at fixed addresses and no Python, so what the Python of an update leaves to the next one is done
here. The first calls of a kind run as they are and are the warm-up; capturing runs nothing, so the captured call is
done by the first replay, and no state is updated twice (docs/fused_blocks.md)."""

import collections
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modiff_kernels.log import logger
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.tensors import ContextTensor
from modiff_kernels.planning import clock

WARM_UP_CALLS = 2
MOST_SHAPES = 3  # of samples, in a context, whose graphs and state are kept
MOST_FORMATS = 8  # of the other inputs, for one shape

Capture = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]
"""Records a step, whose kernels are for this device, without running them: what repeats them, and the step's outputs,
which each repetition writes anew."""


class CudaCapture:
    """Captures on the device of the call, whichever is current; all graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if device not in self._streams:  # torch's own stream for captures is on the device of the first one
            self._streams[device] = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile. After an error torch leaves its stream for captures the current one.
        options = {"pool": self._pool, "stream": self._streams[device], "capture_error_mode": "thread_local"}
        current = torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(current), torch.cuda.graph(graph, **options):
            outputs = step()
        return graph.replay, outputs


@dataclasses.dataclass
class _Input:
    """The fixed place of an input, and which tensor it holds: its object and version."""

    place: Tensor
    source: Tensor | None = None
    version: int = 0

    def take(self, tensor: Tensor) -> None:
        """Copy it where it is another than before, without waiting for the device."""
        if tensor is self.source and tensor._version == self.version:
            return
        on_host = tensor.device.type == "cpu"
        if on_host and tensor.numel() == 1 and not tensor.is_complex():
            self.place.fill_(clock.host_timestep(tensor))
        else:  # of memory that is not pinned, copying returns once all is read
            self.place.copy_(tensor, non_blocking=not (on_host and tensor.is_pinned()))
        counts = not tensor.is_inference()  # inference tensors count no changes in place
        self.source, self.version = (tensor, tensor._version) if counts else (None, 0)


@dataclasses.dataclass
class _Graph:
    replay: Callable[[], None]
    outputs: Any
    updated: list[ContextTensor]  # inputs with given scales that the call updates


@dataclasses.dataclass
class Calls:
    """What there is for calls with inputs of one format; graphs and numbers of warm-up calls by kind of call."""

    inputs: list[_Input]
    warm_ups: collections.Counter[Hashable] = dataclasses.field(default_factory=collections.Counter)
    graphs: dict[Hashable, _Graph] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Shape:
    """What there is for samples of one shape. stamp: of the state that the graphs are for."""

    stamp: tuple[int, ...]
    formats: dict[Hashable, Calls] = dataclasses.field(default_factory=dict)


class GraphedCalls:
    """The graphs of one accelerated UNet. captured, replayed, eager: numbers of calls so far; captured ones are
    replayed too. device_type: where there are graphs. most_shapes: see MOST_SHAPES. obstacle: why calls run as they
    are, or None. error: that of a capture, after which there are no others."""

    def __init__(self, state: ModulationState, capture: Capture, device_type: str = "cuda") -> None:
        self.captured = self.replayed = self.eager = 0
        self.device_type, self.most_shapes = device_type, MOST_SHAPES
        self.obstacle: str | None = None
        self.error: str | None = None
        self._state, self._capture = state, capture
        self._shapes: dict[str, dict[Hashable, _Shape]] = {}  # by context; the last used last
        self._warned: set[str] = set()

    def static(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any], Calls | None]:
        """The arguments in their fixed places on `device`, that of the weights, and what there is for such calls; as
        they are and None, where an argument cannot be told from others."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        autocast = torch.is_autocast_enabled(self.device_type) and torch.get_autocast_dtype(self.device_type)
        formats = [(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
        key = (spec, device, autocast, *formats)
        sample: Any = args[0] if args else kwargs.get("sample")
        form = (sample.shape, sample.dtype, sample.device) if isinstance(sample, Tensor) else None
        try:
            known = self._shape_of(form).formats
            calls = known.pop(key, None)
        except TypeError:  # of a key that cannot be hashed
            self.warn("not possible for calls with arguments that cannot be hashed")
            return args, kwargs, None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if calls is None:
            with torch.inference_mode(False):
                calls = Calls([_Input(torch.empty_like(tensor, device=device)) for tensor in tensors])
        known[key] = calls
        if len(known) > MOST_FORMATS:
            del known[next(iter(known))]
        for held, tensor in zip(calls.inputs, tensors):
            held.take(tensor)
        places = iter(calls.inputs)
        placed = [next(places).place if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return *pytree.tree_unflatten(placed, spec), calls

    def call(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], calls: Calls) -> Any:
        """step(*args, **kwargs), which `static` gave: by itself at first, then captured, then replayed."""
        state = self._state
        shape = next(reversed(self._shapes[state.context_name].values()))
        if shape.stamp != self._stamp():  # what the graphs read and write has moved
            for each in shape.formats.values():
                each.graphs.clear()
                each.warm_ups.clear()
            shape.stamp = self._stamp()
        kind = state.kind_of_call()
        graph = calls.graphs.get(kind)
        if graph is None:
            if calls.warm_ups[kind] >= WARM_UP_CALLS and self.error is None:
                graph = self._captured(lambda: step(*args, **kwargs), calls.inputs[0].place.device)
            if graph is None:
                calls.warm_ups[kind] += 1
                self.eager += 1
                return step(*args, **kwargs)
            calls.graphs[kind] = graph
        graph.replay()
        self.replayed += 1
        for tensor in graph.updated:
            tensor.updated, tensor.factor, tensor.absmax = True, None, tensor.fixed_absmax
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, graph.outputs)

    def describe(self) -> str:
        reason = f"; {self.obstacle or self.error}" if self.obstacle or self.error else ""
        return f"CUDA graphs: {self.captured} captured, {self.replayed} calls replayed, {self.eager} others{reason}"

    def _captured(self, step: Callable[[], Any], device: torch.device) -> _Graph | None:
        state, caches = self._state, torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # whose tensors are gone with the context of autocast
        try:
            with state.undone_on_error():
                replay, outputs = self._capture(step, device)
        except Exception as error:
            self.error = f"no more, after an error in a capture ({type(error).__name__}: {error})"
            self.warn(self.error)
            return None
        finally:
            torch.set_autocast_cache_enabled(caches)
        held = [source.contexts.get(state.context_name) for source in state.inputs.values()]
        self.captured += 1
        return _Graph(replay, outputs, [tensor for tensor in held if tensor is not None and tensor.updated])

    def _shape_of(self, form: Hashable) -> _Shape:
        """What there is for samples of this form in the context of the call, with their state in its place."""
        state, context = self._state, self._state.context_name
        begins = state.is_first or not state.needs_run  # else state of before would be missing, or come back
        shapes = self._shapes.setdefault(context, {})
        if shapes and form == next(reversed(shapes)):
            return shapes[form]
        if shapes:
            last, old = shapes.popitem()
            if begins and old.stamp == self._stamp() and any(calls.graphs for calls in old.formats.values()):
                state.set_aside(context, last)
                shapes[last] = old
        found = shapes.pop(form, None)
        if found is None or not (begins and state.put_back(context, form)):
            state.shelves.pop((context, form), None)
            found = _Shape(self._stamp())
        found.stamp = (*found.stamp[:-1], state.moves[context])
        shapes[form] = found
        for oldest in [*shapes][: -self.most_shapes]:
            del shapes[oldest]
            state.shelves.pop((context, oldest), None)
        return found

    def _stamp(self) -> tuple[int, ...]:
        state = self._state
        return state.relocations, state.weight_changes, state.moves[state.context_name]

    def warn(self, text: str) -> None:
        """Say once that calls run as they are."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("CUDA graphs: %s; calls run as they are", text)
