"""Calls of accelerated UNets on device meta: shapes, dtypes and strides are those that torch's operators give on a GPU.
They differ from the CPU's: a group norm of a channels_last image comes out contiguous, for one. The ops check that."""

import pytest
import torch
from torch import Tensor, nn

import modiff_kernels as mk
from tests.unets import NETWORKS, conditions_of

CALLS = 8  # enough for a schedule to skip some


def onto_meta(unet):
    """Puts every tensor of the UNet and of the package's objects there, where `.to` would derive weights again."""
    moved, seen = {}, set()

    def tensor(value):
        if id(value) not in moved:
            there = value.to("meta")
            moved[id(value)] = nn.Parameter(there, False) if isinstance(value, nn.Parameter) else there, value
        return moved[id(value)][0]

    def visit(value):
        if isinstance(value, Tensor):
            return tensor(value)
        if type(value) is dict:
            value.update({key: visit(item) for key, item in value.items()})
        elif isinstance(value, (list, tuple)):
            items = [visit(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        elif (isinstance(value, nn.Module) or type(value).__module__.startswith("modiff_kernels")) and (
            id(value) not in seen and hasattr(value, "__dict__")
        ):
            seen.add(id(value))
            for name, item in list(vars(value).items()):
                if name != "state":
                    vars(value)[name] = visit(item)
        return value

    visit(unet)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"fuse": False}, torch.bfloat16),
        ({"mode": "quantized"}, torch.bfloat16),
        ({"scale_mode": "delayed", "schedule": "hold every=2"}, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("network", ["unet2d", "sd15"])
def test_a_run(network, config, dtype):
    unet = NETWORKS[network]().to(dtype).requires_grad_(False)
    conditions = conditions_of(unet)
    handle = mk.accelerate(unet, mk.ModiffConfig(backend="reference", state_dtype="float16", **config))

    def run(device):
        x = torch.randn(2, unet.config.in_channels, 8, 8, dtype=dtype, device=device)
        there = {name: value.to(device) for name, value in conditions.items()}
        timesteps = torch.arange(900, 100, -100, device=device)
        with handle.sampling_run(num_calls=CALLS):
            return [unet(x, timestep, **there).sample for timestep in timesteps]

    expected = run("cpu")  # makes what is made at the first call from values
    onto_meta(unet)
    for found, wanted in zip(run("meta"), expected, strict=True):
        assert found.is_meta
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    states = [held.tensor for output in handle.state.outputs.values() for held in output.contexts.values()]
    assert all(state.is_meta and state.dtype == torch.float16 for state in states)
