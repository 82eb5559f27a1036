"""What `accelerate` changes on objects of diffusers while a handle is alive, each with its way back."""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modiff_kernels.nn import ModulationState


class SetTimesteps:
    """In the place of `set_timesteps` on one scheduler: ends the old run, calls the original, begins the new run.

    announce: gets the scheduler when its timesteps are set.
    """

    def __init__(self, scheduler: Any, state: ModulationState, announce: Callable[[Any], None]) -> None:
        original = getattr(scheduler, "set_timesteps", None)
        if not callable(original):
            raise ValueError(
                f"the pipeline's scheduler ({type(scheduler).__name__}) has no set_timesteps() to begin runs with; "
                "accelerate pipe.unet instead and open runs with `with handle.sampling_run():`"
            )
        functools.update_wrapper(self, original)
        self.scheduler = scheduler
        self._original = original
        self._state = state
        self._announce = announce
        self._active = False
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Put the wrapper on the scheduler."""
        self._active = True
        set_attribute(self.scheduler, "set_timesteps", self, self._undo)

    def restore(self) -> None:
        """Take the wrapper off; where something else has been put over it, it only calls through from now on."""
        self._active = False
        outermost = self.scheduler.__dict__.get("set_timesteps")
        while isinstance(outermost, SetTimesteps) and not outermost._active:
            outermost._undo.close()
            outermost = self.scheduler.__dict__.get("set_timesteps")

    def is_on(self, pipe: Any) -> bool:
        """Whether `pipe` still has the scheduler that this wraps."""
        return pipe.scheduler is self.scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._original(*args, **kwargs)
        self._state.end_run()
        result = self._original(*args, **kwargs)
        self._announce(self.scheduler)
        self._state.begin_run(len(self.scheduler.timesteps))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.scheduler))
        return self if copied is None else types.MethodType(type(copied).set_timesteps, copied)


def set_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` at `path` and return what was there."""
    parent_path, _, name = path.rpartition(".")
    children = root.get_submodule(parent_path)._modules
    previous = children[name]
    children[name] = module
    return previous


def set_attribute(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an instance attribute; `undo` puts back the instance's own one, or uncovers that of the class."""
    attributes = owner.__dict__
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = value


def answer_dtype_quickly(unet: nn.Module, undo: contextlib.ExitStack) -> None:
    """Give `unet` a subclass of its class whose `dtype` is that of its first floating parameter; `undo` takes it back.

    diffusers' property first looks at every module, whether a hook changes the dtype, and UNets ask at every call,
    which small ones feel. UNets that have such hooks, or modules kept in float32, keep the property.
    """
    plain = type(unet)
    if not isinstance(getattr(plain, "dtype", None), property) or getattr(unet, "_keep_in_fp32_modules", None):
        return
    if any("_diffusers_hook" in module.__dict__ for module in unet.modules()):
        return
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    unet.__class__ = type(plain.__name__, (plain,), {**names, "dtype": property(_first_floating_dtype)})
    undo.callback(setattr, unet, "__class__", plain)


def _first_floating_dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
