"""DeepCache (Ma et al., CVPR 2024): the deep features of every N-th call serve the calls in between.

Which modules a call in between leaves out is decided by the package `DeepCache` of the authors (cache_branch_id 0, the
fastest). As it is, it reads the timestep from the device at every call, cannot be compiled and leaves skipped
concatenations in. So there is a second form that is as fast as it can be: the two kinds of calls are known by their
number, each is compiled for itself, and on a GPU each is a CUDA graph."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from modiff_kernels.integrations.graphs import WARM_UP_CALLS, Capture
from modiff_kernels.integrations.handle import channels_last

FULL, SHALLOW = 0, 1
"""Kinds of calls, as the timestep that the package is told: it computes everything at multiples of the interval."""


class CachedUNet:
    """Installs DeepCache on `unet` inside `run`; outside, the UNet is as it was.

    compiled: the second form, by torch.compile with `options`. capture: makes CUDA graphs of its calls, or None."""

    def __init__(
        self,
        unet: torch.nn.Module,
        interval: int,
        compiled: bool = False,
        options: dict[str, Any] | None = None,
        capture: Capture | None = None,
    ) -> None:
        from DeepCache import DeepCacheSDHelper

        self.interval = interval
        self.calls_full = 0
        self._unet = unet
        self._pipe = types.SimpleNamespace(unet=unet, scheduler=None)
        self._helper = DeepCacheSDHelper(self._pipe)
        self._helper.set_params(cache_interval=interval, cache_branch_id=0)
        self._calls = 0
        self._step: Callable[..., Any] | None = None
        self._plain: Callable[..., Any] = unet.forward
        if compiled:
            self._install(options or {}, capture)

    def _install(self, options: dict[str, Any], capture: Capture | None) -> None:
        """The second form, which stays installed: compiled code belongs to the wrapped modules."""
        plain = self._plain
        self._helper.enable()
        self._unet.forward = plain  # not the one that reads the timestep from the device
        self._helper.start_timestep = FULL
        compiled = torch.compile(plain, dynamic=False, **options)
        self._step = compiled if capture is None else _Graphs(compiled, capture)
        self._unet.forward = self._forward

    @contextlib.contextmanager
    def run(self, scheduler: Any) -> Iterator[None]:
        """One sampling run, with `scheduler`."""
        self._calls = self.calls_full = 0
        if self._step is not None:
            yield
            return
        self._pipe.scheduler = scheduler
        self._helper.enable()
        count = self._unet.conv_out.register_forward_hook(self._count)
        try:
            yield
        finally:
            count.remove()
            self._helper.disable()

    def _count(self, *_: Any) -> None:
        self.calls_full += self._calls % self.interval == 0
        self._calls += 1

    def _forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        kind = FULL if self._calls % self.interval == 0 else SHALLOW
        self._count()
        self._helper.cur_timestep = kind
        timestep = torch.as_tensor(timestep).to(sample.device)
        arguments = (channels_last(sample), timestep, *args)
        if not self._helper.cached_output:  # compiled code for an empty cache would serve this call alone
            return self._plain(*arguments, **kwargs)
        if isinstance(self._step, _Graphs):
            return self._step(kind, arguments, kwargs)
        return self._step(*arguments, **kwargs)


class _Graphs:
    """A CUDA graph for each kind of calls; that of the shallow ones reads what the full one writes."""

    def __init__(self, step: Callable[..., Any], capture: Capture) -> None:
        self._step = step
        self._capture = capture
        self._warm_ups = {FULL: 0, SHALLOW: 0}
        self._graphs: dict[int, tuple[Callable[[], None], Any]] = {}
        self._places: list[torch.Tensor] = []
        self._placed: tuple[Any, Any] = ((), {})

    def __call__(self, kind: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not self._places:
            self._places = [torch.empty_like(tensor) for tensor in tensors]
            places = iter(self._places)
            held = [next(places) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            self._placed = torch.utils._pytree.tree_unflatten(held, spec)
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        args, kwargs = self._placed
        if kind not in self._graphs:
            if self._warm_ups[kind] < WARM_UP_CALLS or (kind == SHALLOW and FULL not in self._graphs):
                self._warm_ups[kind] += 1
                return self._step(*args, **kwargs)
            self._graphs[kind] = self._capture(lambda: self._step(*args, **kwargs), self._places[0].device)
        replay, outputs = self._graphs[kind]
        replay()
        return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, outputs)
