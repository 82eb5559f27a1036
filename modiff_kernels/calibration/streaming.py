"""Inputs of layers as the network computes them, a batch at a time: nothing but sums over them is kept."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData

OnInput = Callable[[str, Tensor, Tensor | None, Tensor], None]


def stream(
    unet: nn.Module,
    data: CalibrationData,
    layers: Mapping[str, nn.Module],
    on_input: OnInput,
    batches: Iterable[Tensor],
    pairs: bool = False,
) -> None:
    """Call on_input(path, x, previous, points) for every layer and batch, in the order of computation.

    layers: modules of `unet`, by any path. x: the input of the layer at `points` (int64) of the data. previous: with
    `pairs`, its input at the calls before; else None. In memory at a time: with `pairs` the inputs of all `layers` for
    one batch, else one input. No gradient.
    """
    before: dict[str, Tensor] = {}
    points = torch.empty(0)
    keep = False

    def observe(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if keep:
                before[path] = x.clone()
            else:
                on_input(path, x, before.pop(path, None), points)

        return hook

    hooks = [module.register_forward_pre_hook(observe(path)) for path, module in layers.items()]
    try:
        with torch.no_grad():
            for points in batches:
                if pairs:
                    keep = True
                    args, kwargs = data.arguments(points, previous=True)
                    unet(*args, **kwargs)
                    keep = False
                args, kwargs = data.arguments(points)
                unet(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The GEMM operand of a Linear or Conv2d on `x`: float32 [M, K] (im2col; K in (r, s, c) order for a convolution).

    A convolution with groups gives [groups, M, K].
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).float()
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size))
    columns = nn.functional.unfold(x.float(), module.kernel_size, module.dilation, padding, module.stride)
    n, _, pixels = columns.shape
    groups, channels = module.groups, x.shape[1] // module.groups
    rows = columns.view(n, groups, channels, -1, pixels).permute(1, 0, 4, 3, 2).reshape(groups, n * pixels, -1)
    return rows if groups > 1 else rows[0]
