"""One UNet run in every way there is: fused blocks, single layers, compiled, as graphs; two runs of 20 steps each.

What the ways may differ by: float results agree up to rounding, in another order of summation or with another fused
multiplication. So a code may differ by one where a residual lies next to the middle of two codes; from there on both
ways round independently of each other. Each stays within its own rounding error of the exact run (the same low-bit
weights, float activations), because what rounding loses is in the next residual: their distance is that of two
independent errors, 3 dB above one of them, and does not grow.
"""

import functools
import math

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.integrations.fake_capture import capture_calls

STEPS = 20
WIDTH = 24
INDEPENDENT_DB = 3.0
SPREAD_DB = 3.0
"""The error of one step at one place, an 8x8 sample of two: single steps lie up to 2.6 dB beside their mean."""

FLOAT_DB = 100.0
"""More than this is asked nowhere: the first call is not quantised, and float32 rounds differently from way to way."""

EARLY, LATE = slice(3, 8), slice(STEPS - 5, STEPS)  # around step 5, and the last ones
COMMON = {"sample_size": 8, "block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8}
NETWORKS = {
    "cross-attention": lambda: UNet2DConditionModel(
        **COMMON,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ),
    "unconditional": lambda: UNet2DModel(
        **COMMON,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ),
}
CONFIGS = {
    "modulated-a8": {},
    "modulated-a4": {"act_bits": 4},
    "modulated-delayed": {"scale_mode": "delayed"},
    "quantized": {"mode": "quantized"},
}


@pytest.fixture(autouse=True)
def no_code_is_left():
    yield
    torch._dynamo.reset()


def make(network):
    torch.manual_seed(0)
    return NETWORKS[network]().eval()


def two_runs(network, way="fused", **config):
    """Outputs of all calls of two runs along one trajectory."""
    unet = make(network)
    handle = mk.accelerate(unet, mk.ModiffConfig(fuse=way != "layers", **config))
    if way == "graphs":
        graphs = capture_calls(handle)
    elif way not in ("fused", "layers"):
        handle.compile(backend=way)
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    keywords = {}
    if network == "cross-attention":
        keywords["encoder_hidden_states"] = torch.randn(2, 7, WIDTH, generator=generator)
    runs = []
    for _ in range(2):
        outputs = []
        with handle.sampling_run(STEPS):
            for call in range(STEPS):
                angle = math.pi / 2 * call / STEPS
                x = math.cos(angle) * start + math.sin(angle) * end
                outputs.append(unet(x, 900 - 40 * call, **keywords).sample)
        runs.append(outputs)
    if way == "graphs":
        assert graphs.replayed > STEPS
    return runs


@functools.cache
def exact(network):
    """A run with the same weights and float activations."""
    return two_runs(network, act_bits=None)[0]


@functools.cache
def fused(network, name):
    return two_runs(network, **CONFIGS[name])


def sqnr_db(outputs, reference):
    """Of every step, as a tensor, up to FLOAT_DB."""
    pairs = zip(outputs, reference, strict=True)
    return torch.tensor([sqnr(ours, theirs) for ours, theirs in pairs]).clamp(max=FLOAT_DB)


def check(network, name, way):
    runs = two_runs(network, way, **CONFIGS[name])
    for outputs, base in zip(runs, fused(network, name), strict=True):
        own, of_base = sqnr_db(outputs, exact(network)), sqnr_db(base, exact(network))
        between = sqnr_db(outputs, base)
        assert (own > of_base - SPREAD_DB).all()
        assert (between > of_base - INDEPENDENT_DB - SPREAD_DB).all()
        # Ways that have rounded alike so far may still part; those that have parted stay as close as they are.
        parted = torch.minimum(between[EARLY], of_base[EARLY] - INDEPENDENT_DB).mean()
        assert between[LATE].mean() > parted - SPREAD_DB
        assert own[LATE].mean() > own[EARLY].mean() - SPREAD_DB  # nothing adds up
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["layers", "graphs"])
def test_plain_python(network, name, way):
    check(network, name, way)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["modulated-a4", "quantized"])
def test_compiled(network, name):
    """Code is functionalised as for inductor, and run by torch's own kernels."""
    check(network, name, "aot_eager")


def test_compiled_by_inductor():
    check("unconditional", "modulated-a8", "inductor")


@pytest.mark.parametrize("network", NETWORKS)
def test_graphs_repeat_the_very_same_kernels(network):
    for outputs, base in zip(two_runs(network, "graphs"), fused(network, "modulated-a8"), strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, base, strict=True))
