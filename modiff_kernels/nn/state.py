"""`ModulationState`: the owner of every x_hat and y_hat of one accelerated UNet, and of the boundaries of its runs.

A *run* is one sampling trajectory. Its first UNet call initialises (overwrites) the state, the later ones update
it, so a reset touches no memory. A *context* is an independent trajectory inside a run: two for classifier-free
guidance in two passes. x_hat belongs to an `Edge`, a tensor that one or several layers read; y_hat to a layer. Both
are allocated at the first call of a run when shape, dtype or device changed, else used again: addresses stay.
Everything here is decided on the host; nothing reads the device.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.constants import Constants
from modiff_kernels.nn.gaps import Gaps
from modiff_kernels.nn.history import Trajectory
from modiff_kernels.ops.registry import Op, torch_must_see
from modiff_kernels.quant.affine import residual_scale

R = TypeVar("R")

INITIALIZE = "initialize"
UPDATE = "update"
HOLD = "hold"
FORECAST = "forecast"
DEFAULT_CONTEXT = "default"

_NEW_RUN = "begin a new run (scheduler.set_timesteps() of an accelerated pipeline, or `with handle.sampling_run():`)"


class _Slot:
    """The tensor of one context, what it was allocated for, and whether this run has written it."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.dtype = dtype
        self.device = tensor.device
        self.written = False
        self.call = 0
        self.gap = 1
        self.updated = False
        self.factor: Tensor | None = None
        self.absmax: Tensor | None = None
        self.buffer: Tensor | None = None
        self.kernels: dict[str, Callable[..., Any]] = {}

    def kept_absmax(self, absmax: Tensor) -> Tensor:
        """`absmax` in a tensor whose address stays."""
        self.buffer = absmax.clone() if self.buffer is None else self.buffer.copy_(absmax)
        return self.buffer


class StateTensor:
    """One x_hat or y_hat: a tensor per context, at a fixed address from the first call of a run on."""

    def __init__(self, state: "ModulationState", key: str) -> None:
        self.state = state
        self.key = key
        self.slots: dict[str, _Slot] = {}

    def ensure(
        self,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """The tensor of the current context, of `shape`, in the state dtype.

        dtype: of the activation, not of the state. In the first call of a run the tensor is allocated where anything
        differs from what is there, and its content is undefined; later the arguments must be those of the first call.
        Raises RuntimeError outside a UNet call, for a layer that the first call of the run left out, and on a change.
        """
        state = self.state
        slot = self.slots.get(state.context_name)
        if state.action is UPDATE:
            if slot is None or not slot.written:
                self._refuse_uninitialised()
            if slot.shape != shape or slot.dtype is not dtype or slot.device != device:
                self._refuse_change(slot, shape, dtype, device)
            return slot.tensor
        if state.action is None:
            self._refuse_outside()
        state_dtype = state.dtype_on(device)
        if slot is None or slot.shape != shape or slot.tensor.dtype is not state_dtype or slot.device != device:
            tensor = torch.empty(shape, dtype=state_dtype, device=device, memory_format=memory_format)
            slot = self.slots[state.context_name] = _Slot(tensor, dtype)
            state.addresses += 1
        slot.dtype = dtype
        slot.written = True
        slot.call = state.call_index
        slot.absmax = slot.factor = None
        slot.kernels.clear()
        return slot.tensor

    def call(self, name: str, op: Op[..., R], *arguments: Any) -> R:
        """op(*arguments) in an update call, checked and given a backend in the first one of the run only.

        For what `ensure` vouches for: in a run the formats of tensors do not change. name: of the layer, or whatever
        else tells its calls on this tensor apart.
        """
        if torch_must_see(arguments[0]):
            return op(*arguments)
        kernels = self.slots[self.state.context_name].kernels
        kernel = kernels.get(name)
        if kernel is None:
            kernel = kernels[name] = op.plan(*arguments)
        return kernel(*arguments[:-1])

    def current(self) -> Tensor:
        """The tensor of the current context in an update call. Raises RuntimeError where `ensure` does."""
        state = self.state
        slot = self.slots.get(state.context_name)
        if state.action is not UPDATE:
            self._refuse_outside()
        if slot is None or not slot.written:
            self._refuse_uninitialised()
        return slot.tensor

    def _refuse_outside(self) -> NoReturn:
        raise RuntimeError(
            f"layer '{self.key}' was called outside a UNet call of a run, so it has no state to work on; "
            f"{_NEW_RUN} and call the UNet itself (or use `with state.call():` around single layers)"
        )

    def _refuse_uninitialised(self) -> NoReturn:
        raise RuntimeError(
            f"layer '{self.key}' has no state in context {self.state.context_name!r}: the first call of this run "
            f"did not reach it; {_NEW_RUN} whose first call runs every layer, or leave the layer out with skip_modules"
        )

    def _refuse_change(self, slot: _Slot, shape: Any, dtype: torch.dtype, device: torch.device) -> NoReturn:
        raise RuntimeError(
            f"layer '{self.key}' got {tuple(shape)} {dtype} on {device} in a run that began with {tuple(slot.shape)} "
            f"{slot.dtype} on {slot.device}; the state fits one shape per run: {_NEW_RUN} before the change, or give "
            f"each shape its own context (`with handle.context('name'):`)"
        )


class Edge(StateTensor):
    """A tensor that one or several layers read: its x_hat and how its residual is quantised.

    A shared edge (`consumers` > 1) is quantised once per call, by the first consumer; the others take the same
    codes. In a call all of them must read the very same tensor::

        codes = edge.codes_of(x)          # None: nobody has quantised x in this call
        if codes is None:
            edge.refuse_second_source()   # update calls; an initialising call may split_edge instead
            codes = quantise(x, edge.ensure(...), edge.scale(), ...)
            edge.keep(x, codes)
    """

    def __init__(self, state: "ModulationState", key: str, config: ModiffConfig, granularity: str) -> None:
        super().__init__(state, key)
        self.act_bits = config.act_bits
        self.granularity = granularity
        self.clip_ratio = config.clip_ratio
        self.scale_mode = config.scale_mode
        self.static_scale: Tensor | None = None  # float32 [1], of this call
        self.static_zero_point: Tensor | None = None  # int32 [1]
        self._static: tuple[Tensor, Tensor] | None = None  # both, of all calls together or of every one
        self.consumers = 0
        self.uses = 0
        self._memo: tuple[Tensor, int, Any] | None = None

    def scale(self) -> Tensor | None:
        """Scale for the quantising op of this call: None (dynamic), or float32 [1] (static) or [granules] (delayed).

        Where a schedule leaves calls out, they are multiplied by a factor (`nn.gaps`).
        """
        if self.scale_mode == "dynamic":
            return None
        slot = self.slots[self.state.context_name]
        factor = slot.factor
        if self.scale_mode == "static":
            return self.static_scale if factor is None else self.static_scale * factor
        if slot.absmax is None:
            return None
        return residual_scale(slot.absmax if factor is None else slot.absmax * factor, self.act_bits, self.clip_ratio)

    def set_static(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take a calibrated scale, float32 [1] or [calls], and its zero point, int32.

        ValueError if another layer that reads the same tensor, or another table, has set something else.
        """
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        old = self._static
        if old is not None and not (_equal(old[0], scale) and _equal(old[1], zero_point)):
            raise ValueError(
                f"static scale {scale.tolist()} differs from {old[0].tolist()} of another layer that reads the same "
                f"tensor ('{self.key}'), or its zero point does; give them one value"
            )
        if scale.numel() > 1:
            self.state.expect_calls(scale.numel())
        self._static = scale, zero_point
        with torch.inference_mode(False):  # tensors that every call may write
            self.static_scale, self.static_zero_point = scale[:1].clone(), zero_point[:1].clone()

    def move_static(self, device: torch.device) -> None:
        """Bring the calibrated values, if there are some, to `device`."""
        if self._static is not None and self.static_scale.device != device:
            scale, zero_point = self._static
            self._static = scale.to(device), zero_point.to(device)
            self.static_scale = self.static_scale.to(device)
            self.static_zero_point = self.static_zero_point.to(device)

    @property
    def static_table(self) -> tuple[Tensor, Tensor] | None:
        """Calibrated scale and zero point of every call, [calls] each; None if they are the same in all calls."""
        return self._static if self._static is not None and self._static[0].numel() > 1 else None

    def record(self, absmax: Tensor) -> None:
        """Note this update, and its absmax (float32 [granules]) for the delayed scale of the next one."""
        if self.scale_mode == "dynamic":
            return
        slot = self.slots[self.state.context_name]
        slot.updated = True
        slot.factor = None  # of a second use in the same call
        if self.scale_mode == "delayed":
            slot.absmax = slot.kept_absmax(absmax) if self.state.fixed_addresses else absmax

    def codes_of(self, source: Tensor) -> Any:
        """What `keep` got for this very tensor, unchanged since, in this call; else None."""
        memo = self._memo
        if memo is None or memo[0] is not source or memo[1] != tensor_version(source):
            return None
        self.uses += 1
        if self.uses >= self.consumers:
            self._memo = None
        return memo[2]

    def keep(self, source: Tensor, codes: Any) -> None:
        """Offer the codes of `source` to the other consumers of this call."""
        self.uses = 1
        self._memo = (source, tensor_version(source), codes)

    def forget(self) -> None:
        """Drop what was shared in the last call."""
        self.uses = 0
        self._memo = None

    def refuse_second_source(self) -> None:
        """Raise RuntimeError if this edge has been quantised in this call already, from another tensor."""
        if self.uses:
            raise RuntimeError(
                f"the layers that share the input of '{self.key}' got different tensors in one UNet call (they got "
                "the same one in the first call of this run), so their common x_hat cannot follow; accelerate with "
                "share_edges=False"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def tensor_version(tensor: Tensor) -> int:
    """A number that grows with every in-place change of `tensor`; 0 for inference tensors, which do not count."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class ModulationState:
    """Owner of the state of one accelerated UNet. Layers hold an `Edge` and a `StateTensor`, never a tensor.

    action: "initialize" in the first call of a context in a run, "update" in later ones, "hold" or "forecast" in those
        that a schedule skips, None outside a call.
    call_index: number of the call in its context and run, from 0.
    trajectories: by context, what a schedule remembers of this run.
    scheduled: whether calls need a run even if no layer has a state.
    constants: outputs of layers whose input does not change along a run.
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
            raise RuntimeError(f"the UNet was called outside a run ({self._over}); {_NEW_RUN}")
        if thread is not self._runner:
            raise RuntimeError(
                f"the run was begun by thread {self._runner.name!r} but {thread.name!r} calls the UNet; one thread "
                f"samples with one accelerated UNet at a time: {_NEW_RUN} in this thread, or give every thread its "
                "own UNet"
            )
        if self._num_calls is not None and self._calls.get(self.context_name, 0) >= self._num_calls:
            raise RuntimeError(
                f"call {self._num_calls + 1} of the UNet in context {self.context_name!r}, but the scheduler announced "
                f"{self._num_calls}; {_NEW_RUN} for a new picture, and put passes of one step into contexts "
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
