"""`ModulationState`: the owner of every x_hat and y_hat of one accelerated UNet, and of the boundaries of its runs.

A *run* is one sampling trajectory. Its first UNet call initialises (overwrites) the state, the later ones update
it, so a reset touches no memory. A *context* is an independent trajectory inside a run: two for classifier-free
guidance in two passes. x_hat belongs to an `Edge`, a tensor that one or several layers read; y_hat to a layer. Both
are allocated at the first call of a run when shape, dtype or device changed, else used again: addresses stay.
Everything here is decided on the host; nothing reads the device.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.constants import Constants
from modiff_kernels.nn.gaps import Gaps
from modiff_kernels.nn.history import Trajectory
from modiff_kernels.nn.state_tensors import INITIALIZE, NEW_RUN, UPDATE, Edge, StateTensor
from modiff_kernels.nn.time_table import TimeTable

HOLD = "hold"
FORECAST = "forecast"
DEFAULT_CONTEXT = "default"


class ModulationState:
    """Owner of the state of one accelerated UNet. Layers hold an `Edge` and a `StateTensor`, never a tensor.

    action: "initialize" in the first call of a context in a run, "update" in later ones, "hold" or "forecast" in those
        that a schedule skips, None outside a call.
    call_index: number of the call in its context and run, from 0.
    trajectories: by context, what a schedule remembers of this run.
    scheduled: whether calls need a run even if no layer has a state.
    constants: outputs of layers whose input does not change along a run.
    time_table: what the UNet derives from the timestep alone, None where it is computed at every call.
    fixed_addresses: whether what one call leaves to the next must stay at one address, as CUDA graphs need it.
    addresses: grows whenever a tensor that calls read has moved.
    calls_calibrated: UNet calls of a run, where scales are tables over them; None: any number.

    One thread samples at a time: the one that began the run. Every misuse raises RuntimeError; after a failed or
    interrupted call the run is over, because its layers hold a mix of two steps.
    """

    def __init__(self, state_dtype: torch.dtype | str | None = None) -> None:
        if isinstance(state_dtype, str):
            state_dtype = getattr(torch, state_dtype)
        self.state_dtype = state_dtype
        self.action: str | None = None
        self.context_name = DEFAULT_CONTEXT
        self.call_index = 0
        self.scheduled = False
        self.calls_calibrated: int | None = None
        self.trajectories: dict[str, Trajectory] = {}
        self.edges: dict[str, Edge] = {}
        self.outputs: dict[str, StateTensor] = {}
        self.constants = Constants()
        self.time_table: TimeTable | None = None
        self.fixed_addresses = False
        self.addresses = 0
        self._shared: list[Edge] = []
        self._busy = threading.Lock()
        self._caller: threading.Thread | None = None
        self._runner: threading.Thread | None = None
        self._calls: dict[str, int] = {}
        self._gaps = Gaps()
        self._num_calls: int | None = None
        self._over: str | None = "no run has begun"

    def edge(self, key: str, config: ModiffConfig, granularity: str | None = None) -> Edge:
        """The edge of `key`, made on first use; `add_consumer` it once per layer that reads it."""
        edge = self.edges.get(key)
        if edge is None:
            edge = self.edges[key] = Edge(self, key, config, granularity or config.layer_granularity)
        return edge

    def add_consumer(self, edge: Edge) -> None:
        """Count one more layer that reads `edge`."""
        edge.consumers += 1
        if edge.consumers == 2:
            self._shared.append(edge)

    def drop_consumer(self, edge: Edge) -> None:
        """Count one layer less that reads `edge`; the edge goes with its last one."""
        edge.consumers -= 1
        if edge.consumers == 0:
            del self.edges[edge.key]
            self._shared = [shared for shared in self._shared if shared is not edge]

    def split_edge(self, edge: Edge, key: str) -> Edge:
        """Give the layer `key` an edge of its own, because it does not read the tensor of the shared `edge`."""
        own = Edge.__new__(Edge)
        own.__dict__.update(edge.__dict__, key=key, slots={}, consumers=1, uses=0, _memo=None)
        edge.consumers -= 1
        self.edges[key] = own
        return own

    def y_hat(self, key: str) -> StateTensor:
        """The y_hat of the layer `key`, made on first use; needs a run from then on."""
        output = self.outputs.get(key)
        if output is None:
            output = self.outputs[key] = StateTensor(self, key)
        return output

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Dtype of x_hat and y_hat on `device`."""
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float16 if device.type == "cuda" else torch.float32

    def kind_of_call(self) -> tuple[Any, ...]:
        """What else but the inputs decides which kernels this call runs: action, factors of scales, first update."""
        return self.action, *self._gaps.kind_of_call(self.edges.values(), self.context_name)

    @property
    def needs_run(self) -> bool:
        """Whether a UNet call outside a run is an error."""
        return self.scheduled or bool(self.outputs) or self.calls_calibrated is not None

    def expect_calls(self, calls: int) -> None:
        """From now on runs have `calls` UNet calls: scales are given for each. ValueError if it was another number."""
        if self.calls_calibrated not in (None, calls):
            raise ValueError(
                f"a table of {calls} scales, one per call, in a UNet with tables of {self.calls_calibrated}; give all "
                "layers one table length"
            )
        self.calls_calibrated = calls

    def begin_run(self, num_calls: int | None = None) -> None:
        """Begin a run in this thread: the next call of every context initialises.

        num_calls: UNet calls per context that the sampler announced; one more raises. None = any number.
        Raises RuntimeError while another thread is inside a UNet call, and on a number other than that of calibrated
        tables of scales.
        """
        if self.calls_calibrated is not None:
            if num_calls not in (None, self.calls_calibrated):
                raise RuntimeError(
                    f"the scales are calibrated for the {self.calls_calibrated} UNet calls of a run, but this run has "
                    f"{num_calls}; sample with as many steps as in calibration, or calibrate for these"
                )
            num_calls = self.calls_calibrated
        with self._between_calls("begin a run"):
            for holder in self._holders():
                for slot in holder.slots.values():
                    slot.written = False
            self._runner = threading.current_thread()
            self._calls = {}
            self.trajectories = {}
            self.constants.forget()
            self._num_calls = num_calls
            self._over = None

    def end_run(self) -> None:
        """End the run, if there is one. Tensors stay allocated for the next run; `release` frees them."""
        with self._between_calls("end a run"):
            self._end("the run has ended")

    def reset_after_pipeline(self) -> None:
        """End the run of this thread; leave that of another live thread alone."""
        if self._runner is threading.current_thread() or self._runner is None or not self._runner.is_alive():
            self.end_run()

    @contextlib.contextmanager
    def sampling_run(self, num_calls: int | None = None) -> Iterator["ModulationState"]:
        """One run: `begin_run` on entry, `end_run` on exit."""
        self.begin_run(num_calls)
        try:
            yield self
        finally:
            self.end_run()

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Calls inside belong to the trajectory `name`, for example "cond" and "uncond"."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"context: name={name!r} is not allowed; give a non-empty string such as 'cond'")
        if self.action is not None:
            raise RuntimeError("context: a UNet call is in progress; enter contexts around whole UNet calls")
        previous, self.context_name = self.context_name, name
        try:
            yield
        finally:
            self.context_name = previous

    def begin_call(self) -> None:
        """Enter a UNet call and decide its action. Raises RuntimeError where a call would give a wrong picture."""
        self.constants.expire()
        if not self.needs_run:
            return
        thread = threading.current_thread()
        if not self._busy.acquire(blocking=False):
            self._refuse_or_recover("call the UNet")
            self._busy.acquire()
        try:
            self._check_run(thread)
        except RuntimeError:
            self._busy.release()
            raise
        self.call_index = self._calls.get(self.context_name, 0)
        self.action = UPDATE if self.call_index else INITIALIZE
        self._caller = thread
        if self.scheduled:
            self._gaps.begin_call(self.edges.values(), self.context_name, self.call_index)
        if self.calls_calibrated is not None:
            self._take_static_values()

    def _take_static_values(self) -> None:
        """Put the calibrated values of this call where layers read them: one address for all calls, which compiled code
        and graphs rely on."""
        call = self.call_index
        edges = [edge for edge in self.edges.values() if edge.static_table is not None]
        if edges:
            scales, zero_points = zip(*[edge.static_table for edge in edges])
            torch._foreach_copy_([edge.static_scale for edge in edges], [t[call : call + 1] for t in scales])
            torch._foreach_copy_([edge.static_zero_point for edge in edges], [t[call : call + 1] for t in zero_points])

    def end_call(self, failed: bool = False) -> None:
        """Leave the UNet call of this thread, if it is in one; a failed one ends the run."""
        if self.needs_run and self._caller is not threading.current_thread():
            return
        for edge in self._shared:
            edge.forget()
        if not self.needs_run:
            return
        if failed:
            self._end("a UNet call failed")
        else:
            self._calls[self.context_name] = self.call_index + 1
            if self.scheduled:
                self._gaps.end_call(self.edges.values(), self.context_name, self.call_index)
        self._leave()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One UNet call, for layers that are used without a UNet."""
        self.begin_call()
        try:
            yield
        except BaseException:
            self.end_call(failed=True)
            raise
        self.end_call()

    def invalidate(self, reason: str) -> None:
        """End the run because `reason` made its state worthless."""
        self._end(reason)

    def contexts(self) -> set[str]:
        """Names of the contexts that have state tensors."""
        return {name for holder in self._holders() for name in holder.slots}

    def nbytes(self) -> int:
        """Bytes of all x_hat, y_hat and constant outputs of all contexts, and of the values that a schedule keeps."""
        tensors = [slot.tensor for holder in self._holders() for slot in holder.slots.values()]
        values = self.constants.nbytes() + sum(trajectory.nbytes() for trajectory in self.trajectories.values())
        return values + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def release(self) -> None:
        """Free all state tensors and end the run."""
        with self._between_calls("release the state"):
            self._end("the state was released")
            self.trajectories = {}
            self.constants.release()
            if self.time_table is not None:
                self.time_table.release()
            for holder in self._holders():
                holder.slots.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("an accelerated UNet cannot be copied or pickled: call handle.remove() first")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an accelerated UNet cannot be copied or pickled: call handle.remove() first")

    def _holders(self) -> list[StateTensor]:
        return [*self.edges.values(), *self.outputs.values()]

    def _check_run(self, thread: threading.Thread) -> None:
        if self._over is not None:
            raise RuntimeError(f"the UNet was called outside a run ({self._over}); {NEW_RUN}")
        if thread is not self._runner:
            raise RuntimeError(
                f"the run was begun by thread {self._runner.name!r} but {thread.name!r} calls the UNet; one thread "
                f"samples with one accelerated UNet at a time: {NEW_RUN} in this thread, or give every thread its "
                "own UNet"
            )
        if self._num_calls is not None and self._calls.get(self.context_name, 0) >= self._num_calls:
            raise RuntimeError(
                f"call {self._num_calls + 1} of the UNet in context {self.context_name!r}, but the scheduler announced "
                f"{self._num_calls}; {NEW_RUN} for a new picture, and put passes of one step into contexts "
                f"(`with handle.context('cond'):` and 'uncond')"
            )

    @contextlib.contextmanager
    def _between_calls(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            self._refuse_or_recover(what)
            self._busy.acquire()
        try:
            yield
        finally:
            self._busy.release()

    def _refuse_or_recover(self, what: str) -> None:
        """The state is in a call. Free it if that call cannot be running any more, else raise RuntimeError."""
        owner = self._caller
        if owner is threading.current_thread() or (owner is not None and not owner.is_alive()):
            self._end("a UNet call was interrupted")
            self._leave()
            return
        raise RuntimeError(
            f"cannot {what}: another thread is inside a call of this UNet; one thread samples with one accelerated "
            "UNet at a time, give every thread its own"
        )

    def _end(self, reason: str) -> None:
        self.constants.forget()
        if self._over is None:
            self._over = reason
            self._num_calls = None

    def _leave(self) -> None:
        self.action = None
        self._caller = None
        self._busy.release()
