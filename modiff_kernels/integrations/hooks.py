"""What `accelerate` changes on objects of diffusers while a handle is alive, each with its way back."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.blocks.base import is_adapter

NOISE = ("eta", "s_churn")
"""Arguments of step() of diffusers' schedulers that are above 0 where it adds noise."""


class Wrapper:
    """In the place of a method of one object until `restore`: calls `around` with the original and the arguments. Where
    another wrapper is over it then, it stays and only calls through."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        self.__code__ = getattr(original, "__code__", None)  # for torch.export, which is refused by a call then
        self.owner, self._name, self._original, self._around = owner, name, original, around
        self._active = True
        self._undo = contextlib.ExitStack()
        set_attribute(owner, name, self, self._undo)

    def restore(self) -> None:
        self._active = False
        while isinstance(top := self.owner.__dict__.get(self._name), Wrapper) and not top._active:
            top._undo.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, *args, **kwargs) if self._active else self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner))
        return self if copied is None else types.MethodType(getattr(type(copied), self._name), copied)


def obstacle_of(unet: nn.Module) -> str | None:
    """What stands against repeating kernels of `unet` without its Python, be it as CUDA graphs or as compiled code."""
    for path, module in unet.named_modules():
        own, processor = module.__dict__, getattr(module, "processor", None)
        if is_adapter(module):
            text = "whose weight may change; call fuse_lora() and unload_lora() before accelerate()"
            return f"not possible with a LoRA, {text}"
        hooked = not isinstance(own.get("forward"), Wrapper | None) or own.keys() & {"_hf_hook", "_diffusers_hook"}
        if path and (hooked or module._forward_hooks or module._forward_pre_hooks):
            text = f"on '{path}', which has to see every call; remove it"
            return f"not possible with a hook or a forward of its own {text}"
        of_diffusers = type(processor).__module__.startswith("diffusers.models.")
        if processor is not None and (not of_diffusers or isinstance(processor, nn.Module)):
            text = f"{type(processor).__name__} of '{path}', which may change; call set_default_attn_processor()"
            return f"not possible with the attention processor {text}"
    return None


def wrap_scheduler(
    scheduler: Any, state: ModulationState, announce: Callable[[Any], Any], tell_noise: Callable[[str], None]
) -> list[Wrapper]:
    """Let set_timesteps() end the old run and begin the new one, and step() tell what makes it add noise. announce:
    gets the scheduler in between. ValueError for a scheduler without set_timesteps()."""

    def set_timesteps(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state.end_run()
        result = original(*args, **kwargs)
        announce(scheduler)
        state.begin_run(None if state.calls_calibrated is None else len(scheduler.timesteps))
        return result

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for place, given in noise:
            if value := kwargs.get(given.name, args[place] if len(args) > place else given.default):
                tell_noise(f"{type(scheduler).__name__}.step({given.name}={value})")
        return original(*args, **kwargs)

    if not callable(getattr(scheduler, "set_timesteps", None)):
        text = "accelerate pipe.unet instead and open runs with `with handle.sampling_run():`"
        raise ValueError(f"scheduler {type(scheduler).__name__} has no set_timesteps() to begin runs with; {text}")
    wrappers = [Wrapper(scheduler, "set_timesteps", set_timesteps)]
    parameters = inspect.signature(getattr(scheduler, "step", list)).parameters.values()
    noise = [(place, given) for place, given in enumerate(parameters) if given.name in NOISE]
    if noise:
        wrappers.append(Wrapper(scheduler, "step", step))
    return wrappers


def set_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` at `path` and return what was there."""
    parent_path, _, name = path.rpartition(".")
    children = root.get_submodule(parent_path)._modules
    previous, children[name] = children[name], module
    return previous


def set_attribute(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an instance attribute; `undo` puts back the instance's own one, or uncovers that of the class."""
    attributes = owner.__dict__
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = value


def wrap_forward(
    module: nn.Module, replacement: Callable[..., Any], undo: contextlib.ExitStack, name: str = "forward"
) -> None:
    """Let `replacement(original forward, ...)` stand for the module's forward, which has this name, until `undo`."""
    undo.callback(Wrapper(module, name, replacement).restore)


REFUSED = ("load_lora_adapter", "add_adapter", "unload_lora", "fuse_lora", "unfuse_lora", "fuse_qkv_projections")
REFUSED_IF_MERGED = ("disable_adapters", "disable_lora")
REFUSED_BY_ADAPTERS = ("merge", "unmerge")
COMPILING = ("__call__", "compile", "compile_repeated_blocks")
"""Methods of diffusers' UNets that exchange layers, or weights without a trace; those where fuse_lora() was called
before, since peft takes the LoRA out of the weights again; those of peft's layers, which pipelines call too; and what
compiles the UNet from outside."""
CHANGES = (
    "{0}() changes layers of a UNet that is accelerated, and their low-bit form would not follow; call "
    "handle.remove(), then {0}(), then accelerate() again"
)
SAVES = "{0}() would write a file without the float weights, which were not kept; call handle.save_pretrained()"
COMPILES = "torch.compile() of an accelerated UNet is not possible; use it as it is and call handle.compile()"


def refuse_methods(unet: nn.Module, undo: contextlib.ExitStack, may_save: bool) -> None:
    """Let such methods of `unet` raise until `undo`: low-bit layers would be dropped, or keep old codes, or the run's
    bookkeeping would be compiled, or files lack weights. torch.compile(unet) takes the instance's `__call__`; its calls
    that of the class."""

    def refuse(text: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(text)

    adapters = [module for module in unet.modules() if is_adapter(module)]
    merged = any(getattr(adapter, "merged", False) for adapter in adapters)
    methods = [(unet, name, CHANGES) for name in REFUSED + REFUSED_IF_MERGED * merged]
    methods += [(adapter, name, CHANGES) for adapter in adapters for name in REFUSED_BY_ADAPTERS]
    methods += [(unet, name, COMPILES) for name in COMPILING]
    methods += [] if may_save else [(unet, "save_pretrained", SAVES)]
    for owner, name, text in methods:
        if callable(getattr(owner, name, None)):
            set_attribute(owner, name, functools.partial(refuse, text.format(name)), undo)


def answer_dtype_quickly(unet: nn.Module, undo: contextlib.ExitStack) -> None:
    """Let `dtype` of `unet` be that of its first floating parameter while it is called, until `undo`.

    diffusers' property first looks at every module, whether a hook changes the dtype, and UNets ask at every call,
    which small ones feel. A property belongs to a class, so the UNet is of a subclass of its own, but only within
    calls: pipelines look at its type (`from_pipe` takes over components of the very class it asks for). UNets that
    have such hooks, or modules kept in float32, keep the property."""
    plain: Any = type(unet)
    if not isinstance(getattr(plain, "dtype", None), property) or getattr(unet, "_keep_in_fp32_modules", None):
        return
    if any("_diffusers_hook" in module.__dict__ for module in unet.modules()):
        return

    def first_dtype(module: Any) -> Any:
        found = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return found if found.itemsize > 1 else plain.dtype.fget(module)  # layerwise casting stores it in float8

    dtype = property(first_dtype)
    quick = type(plain.__name__, (plain,), {"__module__": plain.__module__, "__doc__": plain.__doc__, "dtype": dtype})

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        unet.__class__ = quick
        try:
            return original(*args, **kwargs)
        finally:
            unet.__class__ = plain

    wrap_forward(unet, forward, undo)
