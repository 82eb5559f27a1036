"""The state of one accelerated network: x_hat of the tensors that layers read, y_hat of the layers, and their owner.

Tensors are allocated at the first call of a run when shape, dtype or device changed, else used again: addresses stay.
A run begins with x_hat = 0 and y_hat = bias, which is written at the first use in its first call."""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.cache import KeptOutputs, TimeTable, tensor_version
from modiff_kernels.nn.run import NEW_RUN, Run

# Of delayed scales of 7 and 8 bits over the last absmax: clipping a residual that has grown loses far more than a bit.
# Shipped model, DDIM-50, learnt codes, 8 bits: 56.7 dB at 1, 62.2 at 1.5, 62.8 at 2, 63.2 with dynamic scales; 7 bits:
# 55.7, 61.1, 61.2, 62.6. 4-bit codes lose by a margin (50.0 dB at 1, 49.2 at 1.25).
DELAYED_MARGIN = 2.0


class ContextTensor:
    """The tensor of one context: what it was allocated for, and what this run did with it.

    written: whether this run has begun it. kernels: what the update calls of this run execute on it, by layer.
    Of an input whose scale is not dynamic: last_update, the call that updated it last; interval, the calls from the
    update before to that one; updated in this call; factor and absmax, of which its next scale is made; fixed_absmax,
    where absmax lies if addresses must stay."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape, self.device = tensor.shape, tensor.device
        self.kernels: dict[Any, Callable[..., Any]] = {}
        self.written = self.updated = False
        self.fixed_absmax: Tensor | None = None

    def begin(self, dtype: torch.dtype, call_index: int) -> None:
        self.dtype = dtype
        self.written = True
        self.kernels.clear()
        self.last_update, self.interval = call_index, 1
        self.factor: Tensor | None = None
        self.absmax: Tensor | None = None


class StateTensor:
    def __init__(self, state: "ModulationState", key: str) -> None:
        self.state = state
        self.key = key
        self.contexts: dict[str, ContextTensor] = {}

    def fill(self, tensor: Tensor) -> None:
        """Write what a run begins with. Abstract: of the two kinds below."""
        raise NotImplementedError

    def ensure(
        self, shape: Any, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
    ) -> Tensor:
        """The tensor of the current context, of `shape`, in the state dtype; `dtype` is that of the activation.

        In the first call of a run it is allocated where anything differs from what is there, and filled at its first
        use; later the arguments must be those of the first call. Raises RuntimeError outside a call, for a layer that
        the first call of the run left out, and on a change."""
        state = self.state
        held = self.contexts.get(state.context_name)
        if held is not None and held.written:
            if held.shape != shape or held.dtype is not dtype or held.device != device:
                raise RuntimeError(
                    f"layer '{self.key}' got {tuple(shape)} {dtype} on {device} in a run that began with "
                    f"{tuple(held.shape)} {held.dtype} on {held.device}; the state fits one shape per run: {NEW_RUN} "
                    "before the change, or give each shape its own context (`with handle.context('name'):`)"
                )
            if state.action is None:
                self._refuse()
            return held.tensor
        if state.action is None or not state.is_first:
            self._refuse()
        state_dtype = state.dtype_on(device)
        if held is None or held.shape != shape or held.tensor.dtype is not state_dtype or held.device != device:
            with torch.inference_mode(False):  # later runs may write it in any mode
                tensor = torch.empty(shape, dtype=state_dtype, device=device, memory_format=memory_format)
            held = self.contexts[state.context_name] = ContextTensor(tensor)
            state.moves[state.context_name] += 1
        held.begin(dtype, state.call_index)
        self.fill(held.tensor)
        return held.tensor

    def current(self) -> ContextTensor:
        """That of the current context, in a call. Raises RuntimeError where `ensure` does."""
        held = self.contexts.get(self.state.context_name)
        if self.state.action is None or held is None or not held.written:
            self._refuse()
        return held

    def _refuse(self) -> NoReturn:
        if self.state.action is None:
            text = f"to work on; {NEW_RUN} and call the UNet itself (or use `with state.call():` around single layers)"
            raise RuntimeError(f"layer '{self.key}' was called outside a UNet call of a run, so it has no state {text}")
        text = f"the first call of this run did not reach it; {NEW_RUN} whose first call does, or use skip_modules"
        raise RuntimeError(f"layer '{self.key}' has no state in context {self.state.context_name!r}: {text}")


class OutputState(StateTensor):
    """y_hat of a layer, or of several whose outputs leave a block as one sum. writers: the layers whose products are
    added onto it; their `bias_data` is [N] or None."""

    def __init__(self, state: "ModulationState", key: str) -> None:
        super().__init__(state, key)
        self.writers: list[Any] = []

    def fill(self, tensor: Tensor) -> None:
        fill_with_bias(tensor, self.writers)


def fill_with_bias(tensor: Tensor, writers: list[Any]) -> None:
    """Write the sum of the biases of `writers` into every row [..., N] or pixel [N, C, H, W]."""
    biases = [writer.bias_data for writer in writers if writer.bias_data is not None]
    if biases:
        total = biases[0] if len(biases) == 1 else torch.stack(biases).sum(0)
        tensor.copy_(total.view(1, -1, 1, 1) if tensor.ndim == 4 else total)
    else:
        tensor.zero_()


class InputState(StateTensor):
    """x_hat of a tensor that one or several layers read, and how its residual is quantised. A shared one (`consumers` >
    1) is quantised once per call, by the first consumer; the others, who read the very same tensor, take these."""

    def __init__(self, state: "ModulationState", key: str, config: ModiffConfig, granularity: str) -> None:
        super().__init__(state, key)
        self.act_bits, self.granularity = config.act_bits, granularity
        self.clip_ratio, self.scale_mode = config.clip_ratio, config.scale_mode
        self.delayed_ratio = config.clip_ratio * (DELAYED_MARGIN if (config.act_bits or 0) > 4 else 1.0)
        self.static_scale: Tensor | None = None  # float32 [1], of this call
        self.static_zero_point: Tensor | None = None  # int32 [1]
        self.static: tuple[Tensor, Tensor] | None = None  # both, [1] for all calls together or [calls]
        self.consumers = self.uses = 0
        self._shared: tuple[Tensor, int, Any] | None = None

    def fill(self, tensor: Tensor) -> None:
        tensor.zero_()

    def scale(self) -> tuple[Tensor | None, Tensor | None, float]:
        """`scale`, `last_absmax` and `clip_ratio` of `ops.quantize` for this call's residual: no tensor (dynamic), the
        first one, float32 [1] (static), or the second, [granules] (delayed).

        Where a schedule leaves calls out, the residual has grown over all of them: a static scale (of one call) is
        multiplied by the number of calls since the last update, a delayed one by the ratio of that number to the one
        before. The factor is a tensor: compiled code sees no number that changes."""
        if self.scale_mode == "dynamic":
            return None, None, self.clip_ratio
        held, static = self.contexts[self.state.context_name], self.scale_mode == "static"
        given = self.static_scale if static else held.absmax
        if given is not None and held.factor is not None:
            given = given * held.factor
        if static:
            return given, None, self.clip_ratio
        return None, given, self.clip_ratio if given is None else self.delayed_ratio

    def record(self, absmax: Tensor) -> None:
        """Note this update, and its absmax (float32 [granules]) for a delayed scale, if the op did not."""
        if self.scale_mode == "dynamic":
            return
        held = self.contexts[self.state.context_name]
        held.updated = True
        if self.scale_mode == "delayed" and (held.absmax is None or held.factor is not None):
            place = held.fixed_absmax if self.state.fixed_addresses else None
            if place is None:
                with torch.inference_mode(False):  # later calls may write it in any mode
                    place = held.fixed_absmax = torch.empty_like(absmax)
            held.absmax = place.copy_(absmax)
        held.factor = None  # of a second use in the same call

    def set_static(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take a calibrated scale, float32 [1] or [calls], and its zero point, int32. ValueError if another layer that
        reads the same tensor, or another table, has set something else."""
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        old = self.static
        if old is not None and not (torch.equal(old[0], scale) and torch.equal(old[1], zero_point)):
            raise ValueError(
                f"static scale {scale.tolist()} differs from {old[0].tolist()} of another layer that reads the same "
                f"tensor ('{self.key}'), or its zero point does; give them one value"
            )
        if scale.numel() > 1:
            self.state.expect_calls(scale.numel())
        self.static = scale, zero_point
        with torch.inference_mode(False):  # tensors that every call may write
            self.static_scale, self.static_zero_point = scale[:1].clone(), zero_point[:1].clone()

    def move_static(self, device: torch.device) -> None:
        """Bring the calibrated values, if there are some, to `device`."""
        if self.static is not None and self.static_scale.device != device:
            with torch.inference_mode(False):
                here = [t.to(device) for t in (*self.static, self.static_scale, self.static_zero_point)]
            self.static, self.static_scale, self.static_zero_point = (here[0], here[1]), here[2], here[3]

    def shared_codes(self, source: Tensor) -> Any:
        """What `share` got for this very tensor, unchanged since, in this call; else None."""
        shared = self._shared
        if shared is None or shared[0] is not source or shared[1] != tensor_version(source):
            return None
        self.uses += 1
        if self.uses >= self.consumers:
            self._shared = None
        return shared[2]

    def share(self, source: Tensor, codes: Any) -> None:
        self.uses = 1
        self._shared = (source, tensor_version(source), codes)


class ModulationState(Run):
    """Owner of the state of one accelerated network. Layers hold an `InputState` and an `OutputState`, never a tensor.

    inputs, outputs: by key. kept: outputs of layers whose input does not change along a run.
    trajectories: by context, what a schedule remembers of this run; they have `nbytes()` and `forget()`.
    repetitions: compiled calls of this run, which hold all tensors that they read.
    time_table: what the network derives from the timestep alone, None where it is computed at every call.
    fixed_addresses: whether what one call leaves to the next must stay at one address, as CUDA graphs need it.
    free_mode: that of layers whose mode the number of calls decides.
    relocations: grows whenever weights move, or anything else that calls read; moves: tensors of a context.
    weight_changes: when weights change or move. serial: with every call. shelves: by context and shape, what waits."""

    def __init__(self, state_dtype: torch.dtype | str | None = None) -> None:
        super().__init__()
        self.state_dtype = getattr(torch, state_dtype) if isinstance(state_dtype, str) else state_dtype
        self.inputs: dict[str, InputState] = {}
        self.outputs: dict[str, OutputState] = {}
        self.kept = KeptOutputs()
        self.trajectories: dict[str, Any] = {}
        self.repetitions: dict[Hashable, Any] = {}
        self.time_table: TimeTable | None = None
        self.fixed_addresses = False
        self.free_mode = "modulated"
        self.relocations = self.weight_changes = self.serial = 0
        self.moves: Counter[str] = self.kept.moves
        self.shelves: dict[tuple[str, Hashable], tuple[dict[StateTensor, ContextTensor], dict[Any, Any]]] = {}
        self._factors: dict[tuple[float, torch.device], Tensor] = {}
        self._factors_in_use: frozenset[float] = frozenset()

    def input_of(self, key: str, config: ModiffConfig, granularity: str) -> InputState:
        """The input of `key`, made on first use, with one more consumer."""
        if key not in self.inputs:
            self.inputs[key] = InputState(self, key, config, granularity)
        found = self.inputs[key]
        found.consumers += 1
        return found

    def separate_input(self, shared: InputState, key: str) -> InputState:
        """Give the layer `key` an input of its own, because it does not read the tensor of the `shared` one."""
        own = InputState.__new__(InputState)
        own.__dict__.update(shared.__dict__, key=key, contexts={}, consumers=1, uses=0, _shared=None)
        shared.consumers -= 1
        self.inputs[key] = own
        return own

    def output_of(self, key: str) -> OutputState:
        """The y_hat of the layer `key`, made on first use; calls need a run from then on."""
        if key not in self.outputs:
            self.outputs[key] = OutputState(self, key)
        return self.outputs[key]

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.state_dtype or (torch.float16 if device.type == "cuda" else torch.float32)

    @property
    def needs_run(self) -> bool:
        return self.scheduled or bool(self.outputs) or self.calls_calibrated is not None

    def kind_of_call(self) -> tuple[Any, ...]:
        """What else but the inputs decides which kernels this call runs: whether it is the first, the factors of
        scales, and whether a delayed scale is yet to come (the first update is dynamic)."""
        given = self._inputs_with_given_scales()
        pending = any(state.scale_mode == "delayed" and held.absmax is None for state, held in given)
        return self.is_first, self._factors_in_use, pending

    def forms_of_scales(self) -> frozenset[tuple[bool, bool]]:
        """Of scales that are not dynamic: whether they are yet to come, and else whether a factor multiplies them."""
        given = self._inputs_with_given_scales()
        pending = [(held, state.scale_mode == "delayed" and held.absmax is None) for state, held in given]
        return frozenset((late, not late and held.factor is not None) for held, late in pending)

    def begin_call(self, look: Callable[[], str | None] = lambda: None) -> None:
        self.kept.expire()
        self.serial += 1
        super().begin_call(look)
        if self.scheduled:
            self._set_scale_factors()
        if self.calls_calibrated is not None:
            self._take_static_values()

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """What is done inside launches nothing: if it fails, the call begins again."""
        held = [tensor for _, tensor in self._inputs_with_given_scales()]
        before = [(tensor.updated, tensor.factor, tensor.absmax) for tensor in held]
        try:
            yield
        except Exception:
            for tensor, values in zip(held, before):
                tensor.updated, tensor.factor, tensor.absmax = values
            self._stop_sharing()
            self.serial += 1
            raise

    def set_aside(self, context: str, shape: Hashable) -> None:
        """Take the tensors of `context` for calls of `shape` out; they keep their addresses."""
        held = {holder: holder.contexts.pop(context) for holder in self._holders() if context in holder.contexts}
        self.shelves[context, shape] = held, self.kept.take(context)

    def put_back(self, context: str, shape: Hashable) -> bool:
        """Bring them back for calls that begin anew; whether they are still there."""
        held, kept = self.shelves.pop((context, shape), (None, {}))
        for holder, tensor in (held or {}).items():
            tensor.written = False
            holder.contexts[context] = tensor
        self.kept.put_back(kept)
        return held is not None

    def begin_anew(self, context: str | None = None) -> None:
        super().begin_anew(context)
        for holder in self._holders():
            for name, held in holder.contexts.items():
                held.written = held.written and context not in (None, name)
        for name, trajectory in self.trajectories.items():
            if context in (None, name):
                trajectory.forget()

    def contexts(self) -> set[str]:
        return {name for holder in self._holders() for name in holder.contexts}

    def nbytes(self) -> int:
        """Bytes of all x_hat, y_hat and kept outputs of all contexts and shapes, and of what a schedule keeps."""
        tensors = [held.tensor for holder in self._holders() for held in holder.contexts.values()]
        for shelf, kept in self.shelves.values():
            tensors += [*(held.tensor for held in shelf.values()), *(each.value for each in kept.values())]
        others = [self.kept, *self.trajectories.values()]
        return sum(tensor.nbytes for tensor in tensors) + sum(other.nbytes() for other in others)

    def release(self) -> None:
        with self._between_calls("release the state"):
            self.invalidate("the state was released")
            self.trajectories, self.repetitions = {}, {}
            self.kept.release()
            self.shelves.clear()
            if self.time_table is not None:
                self.time_table.release()
            for holder in self._holders():
                holder.contexts.clear()

    def begin_run(self, num_calls: int | None = None) -> None:
        super().begin_run(num_calls)
        self.trajectories, self.repetitions = {}, {}
        self.kept.forget()

    def invalidate(self, reason: str) -> None:
        super().invalidate(reason)
        self.kept.forget()

    def _on_leave_call(self, ended: bool) -> None:
        self._stop_sharing()
        for _, held in self._inputs_with_given_scales() if ended and self.scheduled else ():
            if held.updated:
                held.interval, held.last_update = max(self.call_index - held.last_update, 1), self.call_index
                held.updated = False

    def _stop_sharing(self) -> None:
        for source in self.inputs.values():
            if source.uses:
                source.uses, source._shared = 0, None

    def _inputs_with_given_scales(self) -> list[tuple[InputState, ContextTensor]]:
        """Inputs with a static or delayed scale, and their tensors in this run."""
        given = [state for state in self.inputs.values() if state.scale_mode != "dynamic"]
        pairs = [(state, state.contexts.get(self.context_name)) for state in given]
        return [(state, held) for state, held in pairs if held is not None and held.written]

    def _set_scale_factors(self) -> None:
        """See `InputState.scale`. Set around a call, never inside."""
        values = set()
        for state, held in self._inputs_with_given_scales():
            calls = max(self.call_index - held.last_update, 1)
            value = calls if state.scale_mode == "static" else calls / held.interval
            if (value, held.device) not in self._factors:
                self._factors[value, held.device] = torch.full((1,), value, dtype=torch.float32, device=held.device)
            held.factor = self._factors[value, held.device]
            values.add(value)
        self._factors_in_use = frozenset(values)

    def _take_static_values(self) -> None:
        """Put the calibrated values of this call where layers, compiled code and graphs read them: at one address."""
        call = slice(self.call_index, self.call_index + 1)
        states = [state for state in self.inputs.values() if state.static is not None and state.static[0].numel() > 1]
        if states:
            scales, zero_points = zip(*[state.static for state in states])
            torch._foreach_copy_([state.static_scale for state in states], [table[call] for table in scales])
            torch._foreach_copy_([state.static_zero_point for state in states], [table[call] for table in zero_points])

    def _holders(self) -> list[StateTensor]:
        return [*self.inputs.values(), *self.outputs.values()]

    def __deepcopy__(self, *unused: Any) -> NoReturn:
        raise TypeError("an accelerated UNet cannot be copied or pickled: call handle.remove() first")

    __reduce__ = __deepcopy__
