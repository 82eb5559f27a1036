"""The tensors of a `ModulationState`: y_hat of a layer (`StateTensor`), and x_hat with its scales (`Edge`)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from modiff_kernels.config import ModiffConfig
from modiff_kernels.ops.registry import Op, torch_must_see
from modiff_kernels.quant.affine import residual_scale

if TYPE_CHECKING:
    from modiff_kernels.nn.state import ModulationState

R = TypeVar("R")

INITIALIZE = "initialize"
UPDATE = "update"

NEW_RUN = "begin a new run (scheduler.set_timesteps() of an accelerated pipeline, or `with handle.sampling_run():`)"


class Slot:
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
        self.slots: dict[str, Slot] = {}

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
            slot = self.slots[state.context_name] = Slot(tensor, dtype)
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
            f"{NEW_RUN} and call the UNet itself (or use `with state.call():` around single layers)"
        )

    def _refuse_uninitialised(self) -> NoReturn:
        raise RuntimeError(
            f"layer '{self.key}' has no state in context {self.state.context_name!r}: the first call of this run "
            f"did not reach it; {NEW_RUN} whose first call runs every layer, or leave the layer out with skip_modules"
        )

    def _refuse_change(self, slot: Slot, shape: Any, dtype: torch.dtype, device: torch.device) -> NoReturn:
        raise RuntimeError(
            f"layer '{self.key}' got {tuple(shape)} {dtype} on {device} in a run that began with {tuple(slot.shape)} "
            f"{slot.dtype} on {slot.device}; the state fits one shape per run: {NEW_RUN} before the change, or give "
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
