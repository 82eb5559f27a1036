"""A stand-in for CUDA graphs on the CPU."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels.integrations.graphs import GraphedCalls


def capture_calls(handle):
    """Let the calls of `handle` be captured and replayed by the stand-in; returns the GraphedCalls."""
    handle._forward.graphs = GraphedCalls(handle.state, FakeCapture(handle.state), "cpu")
    return handle._forward.graphs


class FakeCapture:
    """What CudaCapture does, on the CPU: kernels are recorded with the tensors that they read and write, run only by a
    replay, and write the same tensors each time."""

    def __init__(self, state):
        self.state = state

    def __call__(self, step, device):
        assert device.type == "cpu"
        before = [(tensor, tensor.clone()) for tensor in self._state_tensors()]
        try:
            with Tape() as tape:
                outputs = step()
        finally:
            for tensor, value in before:  # as if nothing had run
                tensor.copy_(value)
        for tensor in pytree.tree_leaves(outputs):
            tensor.fill_(float("nan"))
        return tape.replay, outputs

    def _state_tensors(self):
        for holder in [*self.state.inputs.values(), *self.state.outputs.values()]:
            for held in holder.contexts.values():
                yield held.tensor
                if held.fixed_absmax is not None:
                    yield held.fixed_absmax
        for kept in self.state.kept._kept.values():
            yield kept.value


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.kernels:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
