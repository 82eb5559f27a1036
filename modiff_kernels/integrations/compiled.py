"""Calls of an accelerated UNet as torch.compile makes them, whose guards are checked once a run.

Before each call torch checks thousands of facts that its code relies on and looks up every parameter, which is a good
part of a small call. Within a run none of them changes but what `_key_of` names. So the first update of a run goes
through torch, which checks or compiles; later ones call the code that it chose with the tensors that it found."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from modiff_kernels.integrations.hooks import obstacle_of
from modiff_kernels.log import logger
from modiff_kernels.nn import ModulationState
from modiff_kernels.ops.dispatch import torch_must_see
from modiff_kernels.ops.registry import inline_kernels, is_about_values

MORE_SIZES = "calls with more sizes than torch.compile keeps code for are not compiled"
OPTIONS = "not possible with fullgraph=False, a mode or options"
KNOWN = ("modiff_kernels.", "diffusers.", "torch.nn.")
"""Packages of modules whose forward leaves nothing behind that repeated code would miss."""

Code = Callable[..., Sequence[Any]]


@dataclasses.dataclass
class _Repetition:
    """Code that a call has run. tensors: its inputs, None where the call's own belong, `places` of those as pairs of an
    index here and among the call's leaves; outputs: where those of the code stand in that of the call."""

    code: Code
    tensors: list[Any]
    places: list[tuple[int, int]]
    outputs: list[int]
    spec: Any

    def __call__(self, leaves: list[Any]) -> Any:
        tensors = self.tensors.copy()
        for here, there in self.places:
            tensors[here] = leaves[there]
        found = self.code(*tensors)
        return pytree.tree_unflatten([found[index] for index in self.outputs], self.spec)


class CompiledCalls:
    """`plain`, the forward of `unet`, compiled. own_paths: of low-bit layers and fused blocks there, as prefixes.

    options: of torch.compile. If neither mode nor options are among them, whole graphs are checked once a run, and on a
    CPU inductor calls the kernels from C++ (torch before 2.13 would go through Python for some even so).
    guarded, repeated, uncompiled: numbers of calls, the last of those that ran as they are. obstacle: why those of this
    run are not repeated, or None."""

    def __init__(
        self, unet: nn.Module, plain: Callable[..., Any], state: ModulationState, own_paths: tuple[str, ...],
        on_cpu: bool, **options: Any,
    ) -> None:  # fmt: skip
        inline_kernels()
        self.guarded = self.repeated = self.uncompiled = 0
        self.obstacle: str | None = None
        self._unet, self._plain, self._state, self._own_paths = unet, plain, state, own_paths
        self._watched: tuple[list[dict[str, Any]], list[Any]] = [], []
        self._run_index = -1
        self._said: set[str] = set()
        self._ran: list[tuple[Code, tuple[Any, ...], Sequence[Any]]] | None = None
        whole, chosen = options.get("fullgraph", True), not options.keys() & {"mode", "options"}
        if chosen and whole:
            backend, more = options.get("backend", "inductor"), {}
            if backend == "inductor" and on_cpu and torch.__version__ >= (2, 13):
                # The calls apart from the kernels: in one file, gcc takes minutes for what it need not optimise.
                more["config_patches"] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
            options["backend"] = self._recording(torch._dynamo.lookup_backend(backend), more)
        else:
            self.obstacle = OPTIONS

        def hooked(hooks: str, *args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if hooks else None  # read, or it is not guarded

        compiled = torch.compile(hooked if whole else plain, **{"fullgraph": True, "dynamic": False, **options})
        self._compiled = compiled if whole else lambda _, *args, **kwargs: compiled(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._state.run_index != self._run_index:
            self.check_again()
        leaves, key = self._key_of(args, kwargs)
        repetitions: dict[Hashable, _Repetition | None] = self._state.repetitions
        repetition = repetitions.get(key)
        try:
            if repetition is not None:
                output = repetition(leaves)
                self.repeated += 1
                return output
            new = key is not None and key not in repetitions and self._may_repeat()
            self._ran = [] if new else None
            output = self._compiled(self._hooks(), *args, **kwargs)
            self.guarded += 1
            if new:
                repetitions[key] = self._repetition_of(leaves, output)
                if repetitions[key] is None:
                    self._tell("not possible for a call that leaves more behind than its output")
            return output
        except Exception as error:
            if "RecompileLimit" in type(error).__name__:  # raised before anything has run
                if self.uncompiled == 0:
                    logger.warning("%s; raise torch._dynamo.config.recompile_limit to compile for more", MORE_SIZES)
                self.uncompiled += 1
                return self._plain(*args, **kwargs)
            if not isinstance(error, RuntimeError) or not is_about_values(error):
                raise
            raise ValueError(
                "a layer of the compiled UNet got NaN or Inf; check the model's input and weights, then start a new run"
            ) from error
        finally:
            self._ran = None

    def check_again(self) -> None:
        """Have torch check its guards at the next call."""
        self._run_index, self._state.repetitions = self._state.run_index, {}
        self.obstacle = OPTIONS if self.obstacle == OPTIONS else None
        named = [(f"{path}.", module) for path, module in self._unet.named_modules()]
        outside = [module for path, module in named if not path.startswith(self._own_paths)]
        attention = [module for module in self._unet.modules() if hasattr(module, "processor")]
        self._watched = [module._parameters for module in outside if module._parameters], attention

    def describe(self) -> list[str]:
        reason = f" ({self.obstacle})" if self.obstacle else ""
        text = f"compiled calls: guards checked at {self.guarded}, not at {self.repeated}{reason}"
        return [text, *[f"{MORE_SIZES} ({self.uncompiled} so far)"] * bool(self.uncompiled)]

    def _recording(self, backend: Callable[..., Any], more: dict[str, Any]) -> Callable[..., Code]:
        """`backend` of torch.compile, with code that notes in `_ran` what it was called with."""

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Code:
            code: Code = backend(graph, inputs, **more)

            def run(*tensors: Any) -> Sequence[Any]:
                outputs = code(*tensors)
                if self._ran is not None:
                    self._ran.append((code, tensors, outputs))
                return outputs

            return run

        return compile_graph

    def _key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
        """The arguments as leaves, and all that a repetition relies on; None for a call that cannot be one."""
        state, scales = self._state, self._state.forms_of_scales()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.obstacle or not state.is_open or not scales <= {(False, False)} or (scales and state.scheduled):
            return leaves, None  # the last two: an update would leave more behind than tensors
        if any(map(torch_must_see, tensors)) or len({*map(id, tensors)}) < len(tensors):
            return leaves, None
        formats: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                formats.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad))
            elif isinstance(leaf, (int, float, str, NoneType)):
                formats.append((type(leaf), leaf))
            else:
                return leaves, None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        kinds = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
        weights, attention = self._watched
        objects = map(id, chain.from_iterable(map(dict.values, weights)))  # whose ids the repetition keeps taken
        moved = state.relocations, state.weight_changes, RemovableHandle.next_id, *objects
        table = state.time_table
        of_run = state.context_name, state.free_mode, scales, table and (id(table.rows), table.for_compiled is None)
        processors = [module.processor for module in attention]
        return leaves, (spec, *formats, *modes, *kinds, self._unet.training, *moved, *processors, *of_run)

    def _may_repeat(self) -> bool:
        """Whether nothing in the UNet may do more than compute, which repeated code would miss. Logs what may."""
        strange = [kind for kind in map(type, self._unet.modules()) if not f"{kind.__module__}.".startswith(KNOWN)]
        self.obstacle = obstacle_of(self._unet)
        if strange:
            self.obstacle = f"not possible with a {strange[0].__name__}, whose forward may do more than compute"
        if self.obstacle is not None:
            self._tell(self.obstacle)
        return self.obstacle is None

    def _tell(self, obstacle: str) -> None:
        """Repeat no call of this run; the log says why, once."""
        self.obstacle = obstacle
        if obstacle not in self._said:
            self._said.add(obstacle)
            logger.info("compiled calls without a check of their guards: %s", obstacle)

    def _repetition_of(self, leaves: list[Any], output: Any) -> _Repetition | None:
        """The call that has just been recorded; None if its output holds not just what its code gave."""
        found, spec = pytree.tree_flatten(output)
        if self._ran is None or len(self._ran) != 1:
            return None
        code, tensors, outputs = self._ran[0]
        given = [id(tensor) for tensor in outputs]
        of_output = [id(leaf) for leaf in found]
        of_call = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        if sorted(given) != sorted(of_output):
            return None
        places = [(i, of_call[id(tensor)]) for i, tensor in enumerate(tensors) if id(tensor) in of_call]
        held = [None if id(tensor) in of_call else tensor for tensor in tensors]
        return _Repetition(code, held, places, [*map(given.index, of_output)], spec)

    def _hooks(self) -> str:
        """Names those of all modules: torch guards none that are made later."""
        hooks = [(path, *m._forward_hooks, *m._forward_pre_hooks) for path, m in self._unet.named_modules()]
        return str([each for each in hooks if len(each) > 1])
