"""Adapters such as LoRA, which peft puts around layers."""

from torch import nn


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` stands around a layer, its `base_layer`, and adds to its output: by weights of its own, times a
    number that may change at any time. peft itself is not imported."""
    return "base_layer" in module._modules and type(module).__module__.startswith("peft.")
