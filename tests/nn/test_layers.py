"""`ModulatedLinear` and `ModulatedConv2d` alone, rounded or calibrated, against their definition in float64."""

import pytest
import torch
from torch import nn

from modiff_kernels.backends import cpu
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState, sampling_run
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer, QuantizedWeight
from tests.unets import assert_invariant, operator, trajectory, x_hat_of

LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (2, 5, 24)),
    "linear-no-bias-2d": (lambda: nn.Linear(7, 9, bias=False), (3, 7)),
    "linear-4d": (lambda: nn.Linear(16, 3), (2, 3, 2, 16)),
    "conv3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 4)),
    "conv3x3-stride2": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (1, 5, 7, 6)),
    "conv1x1-no-bias": (lambda: nn.Conv2d(8, 6, 1, bias=False), (2, 8, 3, 3)),
    "conv-groups-dilation": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=2, groups=2), (2, 4, 6, 5)),
    "conv-same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (1, 3, 6, 6)),
    "conv-valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (1, 3, 4, 5)),
}


def make(module, calibrated=NOT_CALIBRATED, state=None, name="block.layer", shared_input=None, **options):
    """The low-bit form of `module`, in a state of its own."""
    config = ModiffConfig(**options)
    state = state or ModulationState(config.state_dtype)
    form = ModulatedConv2d.from_conv2d if isinstance(module, nn.Conv2d) else ModulatedLinear.from_linear
    return form(module, config, state, name, shared_input, calibrated)


def build(kind, calibrated=NOT_CALIBRATED, **options):
    """A low-bit layer and the shape of an input."""
    module, shape = LAYERS[kind][0]().requires_grad_(False), LAYERS[kind][1]
    if options.get("scale_mode") == "static" and calibrated is NOT_CALIBRATED:
        calibrated = CalibratedLayer(act_scale=torch.tensor([0.05]))
    return make(module, calibrated, **options), shape


def run(layer, inputs):
    """Output of the last of `inputs`, one call each."""
    layer.state.begin_run()
    for x in inputs:
        with layer.state.call():
            out = layer(x)
    return out


def on(layer, x):
    """What the layer's weight gives for x."""
    return operator(layer, layer.scaled(x))[0].to(x.dtype)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_with_a_state_of_its_own(kind):
    """Every forward is a call, within a run of the network around; the same as in a state that is given."""
    module, shape = LAYERS[kind][0]().requires_grad_(False), LAYERS[kind][1]
    form = ModulatedConv2d.from_conv2d if kind == "conv3x3" else ModulatedLinear.from_linear
    alone, given, xs = form(module), make(module), trajectory(shape, 3)
    with pytest.raises(RuntimeError, match=r"outside a run .*mk.sampling_run.network."):
        alone(xs[0])
    for _ in range(2):  # the second run begins anew
        with sampling_run(nn.Sequential(nn.Identity(), alone)):
            outs = [alone(x) for x in xs]
        assert torch.equal(outs[-1], run(given, xs))
    assert_invariant([alone], 4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("weight_bits", "group_size"), [(8, None), (4, None), (3, 4)])
def test_all_geometries(kind, weight_bits, group_size, poisoned_empty):
    """auto: whatever solves it. group_size: only the reference has it."""
    options = {"weight_bits": weight_bits, "group_size": group_size, "granularity": "per_token"}
    layer, shape = build(kind, backend="auto" if group_size is None else "reference", **options)
    inputs = trajectory(shape, 4)
    out = run(layer, inputs)
    assert_invariant([layer], 5)
    assert (out - on(layer, inputs[-1])).abs().max() < 0.02 * out.abs().max()  # 8-bit residuals
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=layer.memory_format)
    plain, _ = build(kind, mode="quantized", weight_bits=weight_bits, group_size=group_size, backend=layer.backend)
    # codes of 8 bits, each half a step off at most; sums of a few dozen stay within 2 % of the largest
    assert (plain(inputs[0]) - on(plain, inputs[0])).abs().max() < 0.02 * out.abs().max()
    assert plain.state.nbytes() == 0
    exact, _ = build(kind, act_bits=None, weight_bits=weight_bits, group_size=group_size)
    torch.testing.assert_close(exact(inputs[0]), on(exact, inputs[0]), rtol=1e-5, atol=1e-5)  # float32 sums
    assert exact.mode == "float"


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_low_bit_layers_keep_no_float_copy_of_the_weight(mode):
    """Beside the parameter of the original module, which the state_dict needs."""
    for kind in ("linear", "conv3x3"):
        layer, shape = build(kind, mode=mode, weight_bits=4)
        run(layer, trajectory(shape, 3))
        assert layer.float_weight is None
        held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)] + list(layer.packed[:2])
        held += [part for part in layer.kernels if isinstance(part, torch.Tensor)]
        floats = [tensor for tensor in held if tensor.is_floating_point() and tensor.numel() >= layer.weight.numel()]
        assert not floats
        assert layer.packed.packed.dtype in (torch.uint8, torch.int8)


def test_delayed_scales_begin_dynamic():
    """Also after the first call: its scales are of two other updates."""
    inputs = trajectory(LAYERS["linear"][1], 3)
    outs = {}
    for scale_mode in ("dynamic", "delayed"):
        torch.manual_seed(0)
        layer, _ = build("linear", act_bits=4, scale_mode=scale_mode, granularity="per_sample")
        outs[scale_mode] = [run(layer, inputs[:calls]) for calls in (1, 2, 3)]
    assert [torch.equal(a, b) for a, b in zip(*outs.values())] == [True, True, False]


def test_per_token_of_a_wide_kernel_is_per_sample():
    assert build("conv3x3", granularity="per_token")[0].input.granularity == "per_sample"
    assert build("conv1x1-no-bias", granularity="per_token")[0].input.granularity == "per_token"


@pytest.mark.parametrize(
    ("vnni", "bits", "granularity"),
    [(True, (8, 4), "per_block"), (False, (8, 4), "per_sample"), (False, (4, 4), "per_block")],
)
def test_few_bits_stay_few_on_a_cpu_without_vnni(monkeypatch, vnni, bits, granularity):
    monkeypatch.setattr(cpu, "has_vnni", lambda: vnni)
    weight_bits, act_bits = bits
    of_linear = {"weight_bits": weight_bits, "act_bits": act_bits}
    assert build("linear", **of_linear)[0].granularity == granularity
    assert build("linear", granularity="per_block", **of_linear)[0].granularity == "per_block"


def test_static_scales_are_checked():
    linear = nn.Linear(4, 4)
    static = {"scale_mode": "static", "name": "l"}
    with pytest.raises(ValueError, match=r"layer 'l': scale_mode='static' needs a calibrated scale"):
        make(linear, **static)
    for scale in (torch.zeros(1), torch.tensor([float("nan")]), torch.ones(2, 1), torch.ones(0)):
        with pytest.raises(ValueError, match=r"(?s)layer 'l': static scale .* give one positive finite number"):
            make(linear, CalibratedLayer(act_scale=scale), **static)
    state = ModulationState()
    one, two = (CalibratedLayer(act_scale=torch.tensor([value])) for value in (1.0, 2.0))
    make(linear, one, state, "a", "e", scale_mode="static")
    with pytest.raises(ValueError, match=r"layer 'b': static scale \[2.0\] differs from \[1.0\]"):
        make(linear, two, state, "b", "e", scale_mode="static")
    make(linear, CalibratedLayer(act_scale=torch.ones(3)), state, "c", scale_mode="static")
    with pytest.raises(ValueError, match=r"layer 'd': a table of 5 scales.* tables of 3"):
        make(linear, CalibratedLayer(act_scale=torch.ones(5)), state, "d", scale_mode="static")


def test_a_layer_looks_like_the_original():
    layer, _ = build("conv-groups-dilation")
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert all(getattr(layer, name) == getattr(layer.original, name) for name in names)
    layer, shape = build("linear", mode="quantized")
    assert (layer.in_features, layer.out_features) == (24, 20)
    assert "block.layer" in repr(layer)
    assert layer(torch.randn(shape), 1.0).shape == (2, 5, 20)  # as layers of LoRA are called
    assert layer(input=torch.ones(shape)).equal(layer(hidden_states=torch.ones(shape)))
    for kind, arguments in ((ModulatedLinear, (24, 20)), (ModulatedConv2d, (4, 6, 3))):
        with pytest.raises(TypeError, match=rf"{kind.__name__} takes the place of a layer; use .*from_"):
            kind(*arguments)


class TestCalibrated:
    KINDS = ("linear", "conv3x3", "conv1x1")

    def layer(self, kind, **options):
        """With codes of the scaled weight, a static scale with zero point, an input scale and a bias."""
        module = {"linear": nn.Linear(20, 6), "conv3x3": nn.Conv2d(20, 6, 3, padding=1), "conv1x1": nn.Conv2d(20, 6, 1)}
        module = module[kind].requires_grad_(False)
        scale = torch.linspace(0.5, 2.0, 20)
        shape = (1, -1, 1, 1) if module.weight.ndim == 4 else (-1,)
        weight = QuantizedWeight.rounded(module.weight / scale.view(shape), 4)
        zero_point = torch.tensor([-3], dtype=torch.int32)
        known = CalibratedLayer(weight, torch.tensor([0.02]), zero_point, scale, torch.randn(6))
        x = torch.randn(3, 5, 20) if kind == "linear" else torch.randn(2, 20, 5, 5)
        return make(module, known, weight_bits=4, **options), x

    @pytest.mark.parametrize("kind", KINDS)
    def test_plain_codes(self, kind):
        layer, x = self.layer(kind, mode="quantized", scale_mode="static")
        scaled = x * layer.calibrated.input_scale.view((-1, 1, 1) if x.ndim == 4 else (-1,))
        codes = torch.clamp(torch.round(scaled * (1 / torch.tensor(0.02))).double() - 3, -128, 127)
        expected = operator(layer, (codes + 3) * 0.02)[0]
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)  # float32 scales and sums

    @pytest.mark.parametrize("kind", KINDS)
    def test_updates_keep_the_invariant_and_follow_the_scaled_input(self, kind):
        layer, x = self.layer(kind, act_bits=4, scale_mode="static")
        run(layer, [x + 0.02 * call for call in range(4)])
        assert_invariant([layer], 5)
        assert (x_hat_of(layer) - layer.scaled(x + 0.06)).abs().max() <= 0.02 * 0.5 + 1e-5
        layer, x = self.layer(kind, act_bits=None)
        torch.testing.assert_close(layer(x), on(layer, x), rtol=1e-4, atol=1e-4)  # float32 sums

    CODES = staticmethod(lambda value=0: torch.full((6, 20), value, dtype=torch.int8))

    @pytest.mark.parametrize(
        ("known", "message"),
        [
            (lambda c: {"weight": QuantizedWeight.rounded(torch.randn(6, 19), 4)}, r"the layer needs int8 \(6, 20\)"),
            (lambda c: {"weight": QuantizedWeight(c(9), torch.ones(6), 4)}, r"codes from 9 to 9 do not fit 4 bits"),
            (lambda c: {"weight": QuantizedWeight(c(), torch.zeros(6), 4)}, r"a scale is not positive and finite"),
            (lambda c: {"weight": QuantizedWeight.rounded(torch.randn(6, 20), 4)}, r"away from the weight"),
            (lambda c: {"input_scale": torch.ones(19)}, r"input_scale \(19,\) does not fit 20 input channels"),
            (lambda c: {"act_zero_point": torch.zeros(1, dtype=torch.int32)}, r"zero point needs a static scale"),
        ],
    )
    def test_what_does_not_fit(self, known, message):
        with pytest.raises(ValueError, match=rf"(?s)layer 'l': .*{message}"):
            make(nn.Linear(20, 6).requires_grad_(False), CalibratedLayer(**known(self.CODES)), name="l")
