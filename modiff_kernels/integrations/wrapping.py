"""Taking the place of a module's forward, and giving it back."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def wrap_forward(module: nn.Module, replacement: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """Let `replacement(original forward, ...)` stand for the module's forward until `undo`.

    Where another wrapper has been put over it by then, it stays and only calls through.
    """
    original = module.forward
    own = module.__dict__.get("forward")
    active = True

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs) if active else original(*args, **kwargs)

    def restore() -> None:
        nonlocal active
        active = False
        if module.__dict__.get("forward") is not forward:
            return
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

    module.__dict__["forward"] = forward
    undo.callback(restore)
