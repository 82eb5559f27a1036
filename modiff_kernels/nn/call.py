"""How denoisers are called, and which part of a pipeline is one."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

PLACES = ("unet", "transformer", "transformer_2", "prior", "decoder")
"""Where pipelines of diffusers have their denoisers."""
TIMES = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma", "sigmas", "noise_labels", "noise_level")
"""What the timestep is called by those who do not take it as second argument, by the name or not."""


class CallForm:
    """Where sample and timestep stand among the arguments of a denoiser's forward. Within the package all calls are
    like those of a UNet of diffusers: (sample, timestep), the others by keyword, which may have any names.

    sample: name of the first argument, timestep: of the timestep; None where calls are as UNets', or unknown."""

    def __init__(self, denoiser: nn.Module) -> None:
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(denoiser.forward).parameters.values()
        self._names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        self.sample, self.timestep = next(iter(self._names), None), None
        if self._names[1:2] != ["timestep"] or self.sample != "sample":
            self.timestep = next((name for name in TIMES if name in self._names[1:]), None)

    @property
    def takes_timestep(self) -> bool:
        return self.timestep is not None or self._names[1:2] == ["timestep"]

    def as_unet(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call in the form of UNets; as they are where the timestep is not found."""
        if self.timestep is None:
            return args, kwargs
        given = dict(zip(self._names, args)) | kwargs
        if len(args) > len(self._names) or self.sample not in given or self.timestep not in given:
            return args, kwargs
        return (given.pop(self.sample), given.pop(self.timestep)), given

    def adapted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, which is called in its own form, for calls in the form of UNets."""
        if self.timestep is None:
            return forward
        sample, timestep = self.sample, self.timestep

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(**dict(zip((sample, timestep), args)), **kwargs)

        return call


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, by the names that it has for them."""
    found = {name: getattr(pipe, name, None) for name in PLACES}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    return {name: each for name, each in modules.items() if name == "unet" or CallForm(each).takes_timestep}


def denoiser_of(where: str, target: Any) -> nn.Module:
    """`target` itself, or the one denoiser of a pipeline. TypeError for anything else; where: who says so."""
    if isinstance(target, nn.Module):
        return target
    found = denoisers_of(target)
    if len(found) != 1:
        has = f"which has {' and '.join(found)}; give one of them" if found else "which has no denoiser; give one"
        text = f"{has} (torch.nn.Module), or a pipeline with a `unet` or `transformer`"
        raise TypeError(f"{where}: got {type(target).__name__}, {text}")
    return next(iter(found.values()))
