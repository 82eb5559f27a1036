"""UNet calls as CUDA graphs: one graph per kind of call, input formats and context.

A graph repeats kernels at fixed addresses and no Python. So inputs are copied into tensors of their own (those that are
the same objects as in the call before stay), outputs are cloned, state has fixed addresses anyway, and what the Python
of an update leaves to the next one is done here. The first calls of a kind run as they are: steps of a run like any
other, which warm up what may not happen while a graph is captured (compiling kernels, choosing algorithms). Capturing
runs nothing, so the captured call is done by the first replay, and no state is updated twice.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.tensors import ContextTensor

WARM_UP_CALLS = 2

Capture = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]
"""Records a step, whose kernels are for this device, without running them: what repeats them, and the step's outputs,
which each repetition writes anew."""


class CudaCapture:
    """Captures on the device of the call, whichever is current; all graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if device not in self._streams:  # torch's own stream for captures is on the device of the first one
            self._streams[device] = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, stream=self._streams[device]):
            outputs = step()
        return graph.replay, outputs


@dataclasses.dataclass
class _Input:
    """The fixed place of an input, and which tensor it holds: its object and version."""

    place: Tensor
    source: Tensor | None = None
    version: int = 0

    def take(self, tensor: Tensor) -> None:
        if tensor is not self.source or tensor._version != self.version:
            self.place.copy_(tensor)
            counts = not tensor.is_inference()  # inference tensors count no changes in place
            self.source, self.version = (tensor, tensor._version) if counts else (None, 0)


@dataclasses.dataclass
class _Graph:
    replay: Callable[[], None]
    outputs: Any
    updated: list[ContextTensor]  # inputs with given scales that the call updates


class GraphedCalls:
    """The graphs of one accelerated UNet. captured, replayed, eager: numbers of calls so far; captured ones are
    replayed too."""

    def __init__(self, state: ModulationState, capture: Capture) -> None:
        self.captured = self.replayed = self.eager = 0
        self._state, self._capture = state, capture
        self._inputs: dict[Hashable, list[_Input]] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: collections.Counter[Hashable] = collections.Counter()
        self._relocations = state.relocations

    def static(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Hashable]:
        """The arguments in their fixed places, and a key that stands for them."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (self._state.context_name, spec, tuple([_format(leaf) for leaf in leaves]))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = self._inputs.get(key)
        if inputs is None:  # on the device of the first one, the sample
            with torch.inference_mode(False):
                inputs = self._inputs[key] = [_Input(torch.empty_like(t, device=tensors[0].device)) for t in tensors]
        for held, tensor in zip(inputs, tensors):
            held.take(tensor)
        places = iter(inputs)
        placed = [next(places).place if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return *pytree.tree_unflatten(placed, spec), key

    def call(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Hashable) -> Any:
        """step(*args, **kwargs), which `static` gave: by itself at first, then captured, then replayed."""
        state = self._state
        if self._relocations != state.relocations:  # what the graphs read and write has moved
            self._graphs.clear()
            self._calls.clear()
            self._relocations = state.relocations
        key = inputs, state.kind_of_call()
        graph = self._graphs.get(key)
        if graph is None:
            if self._calls[key] < WARM_UP_CALLS:
                self._calls[key] += 1
                self.eager += 1
                return step(*args, **kwargs)
            device = self._inputs[inputs][0].place.device
            replay, outputs = self._capture(lambda: step(*args, **kwargs), device)
            held = [source.contexts.get(state.context_name) for source in state.inputs.values()]
            updated = [tensor for tensor in held if tensor is not None and tensor.updated]
            graph = self._graphs[key] = _Graph(replay, outputs, updated)
            self.captured += 1
        graph.replay()
        self.replayed += 1
        for tensor in graph.updated:
            tensor.updated, tensor.factor, tensor.absmax = True, None, tensor.fixed_absmax
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, graph.outputs)

    def describe(self) -> str:
        return f"CUDA graphs: {self.captured} captured, {self.replayed} calls replayed, {self.eager} calls to warm up"


def _format(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
