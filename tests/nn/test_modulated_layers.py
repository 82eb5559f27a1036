import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels.config import BACKENDS, ModiffConfig
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight
from modiff_kernels.quant.calibrated import CalibratedLayer

STEPS = 100

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


def build(kind, **options):
    """The float module, its low-bit layer with a state, and an input shape."""
    make, shape = LAYERS[kind]
    module = make().requires_grad_(False)
    config = ModiffConfig(**options)
    state = ModulationState(config.state_dtype)
    calibrated = CalibratedLayer(act_scale=torch.tensor([0.05]) if config.scale_mode == "static" else None)
    if isinstance(module, nn.Conv2d):
        layer = ModulatedConv2d.from_conv2d(module, config, state, "block.layer", calibrated=calibrated)
    else:
        layer = ModulatedLinear.from_linear(module, config, state, "block.layer", calibrated=calibrated)
    return module, layer, shape


def trajectory(shape, steps, dtype=torch.float32):
    """A slowly turning input, as along a sampling trajectory."""
    start, end = torch.randn(shape), torch.randn(shape)
    for step in range(steps):
        angle = step / steps * math.pi / 2
        yield ((1 + step / steps) * (math.cos(angle) * start + math.sin(angle) * end)).to(dtype)


def run(layer, inputs):
    """Output of the last of `inputs`, one call each."""
    layer.state.begin_run()
    for x in inputs:
        with layer.state.call():
            out = layer(x)
    return out


def dequantized(module, weight_bits=8, group_size=-1):
    weight_q, weight_scale = quantize_weight(module.weight, weight_bits, group_size)
    return dequantize_weight(weight_q, weight_scale, group_size, module.weight.shape)


def float_operator(module, x, weight, bias):
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    return F.linear(x, weight, bias)


def assert_invariant(module, layer, steps, weight_bits=8, group_size=-1):
    """y_hat == A(x_hat) + bias up to the rounding of `steps` updates of both in the state dtype."""
    x_hat, y_hat = layer.edge.slots["default"].tensor, layer.output.slots["default"].tensor
    weight = dequantized(module, weight_bits, group_size).double()
    bias = None if module.bias is None else module.bias.double()
    expected = float_operator(module, x_hat.double(), weight, bias)
    terms = float_operator(module, x_hat.double().abs(), weight.abs(), None if bias is None else bias.abs())
    bound = torch.finfo(x_hat.dtype).eps * max(math.sqrt(steps), 4.0) * terms
    assert ((y_hat.double() - expected).abs() <= bound).all()


def test_config_knows_the_backends():
    assert ("auto", *dispatch.BACKENDS) == BACKENDS


@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scale_mode", ["dynamic", "delayed", "static"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token"])
@pytest.mark.parametrize("act_bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_invariant_after_many_steps(kind, act_bits, granularity, scale_mode, state_dtype, backend):
    module, layer, shape = build(
        kind,
        act_bits=act_bits,
        granularity=granularity,
        scale_mode=scale_mode,
        state_dtype=state_dtype,
        backend=backend,
    )
    run(layer, trajectory(shape, STEPS))
    assert_invariant(module, layer, STEPS)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("weight_bits", "group_size"), [(8, None), (4, None), (3, 4)])
def test_all_geometries(kind, weight_bits, group_size, backend, poisoned_empty):
    if backend != "reference" and group_size is not None:
        pytest.skip("only the reference has group_size")
    module, layer, shape = build(
        kind, weight_bits=weight_bits, act_bits=8, group_size=group_size, granularity="per_token", backend=backend
    )
    groups = -1 if group_size is None else group_size
    out = run(layer, trajectory(shape, 1))
    assert_invariant(module, layer, 1, weight_bits, groups)
    out = run(layer, trajectory(shape, 5))
    assert_invariant(module, layer, 5, weight_bits, groups)
    *_, x = trajectory(shape, 5)
    torch.manual_seed(1)
    expected = float_operator(module, x, dequantized(module, weight_bits, groups), module.bias)
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=layer.memory_format)


@pytest.mark.parametrize("act_bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_a_constant_input_is_reached_exactly(kind, act_bits, backend):
    module, layer, shape = build(kind, act_bits=act_bits, backend=backend)
    x = torch.randn(shape)
    out = run(layer, [torch.zeros(shape), *[x] * 16])
    torch.testing.assert_close(out, float_operator(module, x, dequantized(module), module.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_error_compensation_beats_plain_quantisation(kind, backend):
    errors = {}
    for mode in ("modulated", "quantized"):
        torch.manual_seed(0)
        module, layer, shape = build(kind, act_bits=4, mode=mode, backend=backend)
        *_, x = inputs = list(trajectory(shape, 20))
        out = run(layer, inputs)
        errors[mode] = (out - float_operator(module, x, dequantized(module), module.bias)).square().mean().item()
    assert errors["modulated"] < 0.1 * errors["quantized"]


@pytest.mark.parametrize("kind", LAYERS)
def test_plain_quantisation_is_close(kind, backend):
    module, layer, shape = build(kind, act_bits=8, mode="quantized", backend=backend)
    x = torch.randn(shape)
    expected = float_operator(module, x, dequantized(module), module.bias)
    assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert layer.state.nbytes() == 0


@pytest.mark.parametrize("kind", LAYERS)
def test_float_activations_use_dequantised_weights(kind):
    module, layer, shape = build(kind, weight_bits=4, act_bits=None)
    x = torch.randn(shape)
    expected = float_operator(module, x, dequantized(module, 4), module.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.mode == "float"


def test_untouched_weights():
    module, layer, shape = build("linear", weight_bits=None, act_bits=None)
    x = torch.randn(shape)
    assert torch.equal(layer(x), module(x))


@pytest.mark.parametrize("first_step_bits", [3, 4, 8])
def test_quantised_first_step_keeps_the_invariant(first_step_bits, backend):
    module, layer, shape = build("conv3x3", act_bits=4, first_step_bits=first_step_bits, backend=backend)
    inputs = list(trajectory(shape, 3))
    run(layer, inputs[:1])
    x_hat = layer.edge.slots["default"].tensor
    assert not torch.equal(x_hat, inputs[0])
    assert_invariant(module, layer, 1)
    run(layer, inputs)
    assert_invariant(module, layer, 3)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(kind, dtype, backend):
    _, layer, shape = build(kind, act_bits=8, backend=backend)
    out = run(layer, trajectory(shape, 4, dtype))
    assert out.dtype == dtype
    assert layer.output.slots["default"].tensor.dtype == torch.float32


def test_delayed_scales_begin_dynamic(backend):
    inputs = list(trajectory(LAYERS["linear"][1], 3))
    outs = {}
    for scale_mode in ("dynamic", "delayed"):
        torch.manual_seed(0)
        _, layer, _ = build("linear", act_bits=4, scale_mode=scale_mode, granularity="per_sample", backend=backend)
        outs[scale_mode] = [run(layer, inputs[:calls]) for calls in (1, 2, 3)]
    for calls in (0, 1):
        assert torch.equal(outs["dynamic"][calls], outs["delayed"][calls])
    assert not torch.equal(outs["dynamic"][2], outs["delayed"][2])


def test_memory_formats_give_the_same_numbers(backend):
    _, layer, shape = build("conv3x3", backend=backend)
    inputs = list(trajectory(shape, 3))
    out = run(layer, inputs)
    again = run(layer, [x.contiguous(memory_format=torch.channels_last) for x in inputs])
    assert torch.equal(out, again)
    _, layer, shape = build("linear", backend=backend)
    inputs = list(trajectory(shape, 3))
    out = run(layer, inputs)
    assert torch.equal(out, run(layer, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]))


def test_outputs_do_not_alias_the_state(backend):
    _, layer, shape = build("linear", backend=backend)
    inputs = list(trajectory(shape, 4))
    expected = run(layer, inputs)
    layer.state.begin_run()
    for x in inputs:
        x = x.clone()
        with layer.state.call():
            out = layer(x)
        last = out.clone()
        out.fill_(float("nan"))
        x.fill_(float("nan"))
    assert torch.equal(last, expected)


def test_update_path_has_no_float_operator(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a float operator ran on a low-bit layer")

    for kind in ("linear", "conv3x3"):
        module, layer, shape = build(kind, act_bits=4, backend="reference")
        for owner, name in (
            (type(module), "forward"),
            (ModulatedLayer, "float_forward"),
            (type(layer), "float_forward"),
        ):
            monkeypatch.setattr(owner, name, refuse)
        run(layer, trajectory(shape, 3))


class _FloatProducts(TorchDispatchMode):
    """Collects the float products that torch runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and any(word in name for word in ("convolution", "mm", "matmul", "linear")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
@pytest.mark.parametrize("kind", ["linear", "conv3x3", "conv1x1-no-bias"])
def test_compiled_update_path_runs_no_float_product(kind, mode):
    reason = dispatch.why_unavailable("cpu")
    if reason is not None:
        pytest.skip(f"backend cpu: {reason}")
    _, layer, shape = build(kind, act_bits=4, mode=mode, backend="cpu")
    first, second = trajectory(shape, 2)
    layer.state.begin_run()
    with layer.state.call():
        layer(first)
    with layer.state.call(), _FloatProducts() as products:
        layer(second)
    assert products.seen == []


def test_lora_compatible_call_signature():
    _, layer, shape = build("linear")
    layer.state.begin_run()
    with layer.state.call():
        assert layer(torch.randn(shape), 1.0).shape == (2, 5, 20)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "padding='same' with an even kernel"),
    ],
)
def test_impossible_convolutions(conv, reason):
    with pytest.raises(ValueError, match=rf"layer 'c': {reason}.*leave it float"):
        ModulatedConv2d.from_conv2d(conv, ModiffConfig(), ModulationState(), "c")


def test_per_token_of_a_wide_kernel_is_per_sample():
    assert build("conv3x3", granularity="per_token")[1].edge.granularity == "per_sample"
    assert build("conv1x1-no-bias", granularity="per_token")[1].edge.granularity == "per_token"


def test_static_scales_are_checked():
    linear = nn.Linear(4, 4)
    config = ModiffConfig(scale_mode="static")
    with pytest.raises(ValueError, match=r"layer 'l': scale_mode='static' needs a calibrated scale"):
        ModulatedLinear.from_linear(linear, config, ModulationState(), "l")
    for scale in (torch.zeros(1), torch.tensor([float("nan")]), torch.ones(2, 1), torch.ones(0)):
        calibrated = CalibratedLayer(act_scale=scale)
        with pytest.raises(ValueError, match=r"(?s)layer 'l': static scale .* give one positive finite number"):
            ModulatedLinear.from_linear(linear, config, ModulationState(), "l", calibrated=calibrated)
    state = ModulationState()
    one, two = (CalibratedLayer(act_scale=torch.tensor([value])) for value in (1.0, 2.0))
    ModulatedLinear.from_linear(linear, config, state, "a", edge="e", calibrated=one)
    with pytest.raises(ValueError, match=r"layer 'b': static scale \[2.0\] differs from \[1.0\]"):
        ModulatedLinear.from_linear(linear, config, state, "b", edge="e", calibrated=two)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_name_the_layer(kind, bad, backend):
    _, layer, shape = build(kind, backend=backend)
    x = torch.randn(shape)
    run(layer, [x])
    layer.state.begin_run()
    with layer.state.call():
        layer(x)
    x_hat = layer.edge.slots["default"].tensor.clone()
    x.view(-1)[3] = bad
    with pytest.raises(ValueError, match=r"layer 'block.layer': .*NaN or Inf"), layer.state.call():
        layer(x)
    assert torch.equal(layer.edge.slots["default"].tensor, x_hat)


def test_bad_weights_name_the_layer():
    linear = nn.Linear(4, 4)
    linear.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 'l': .*NaN or Inf"):
        ModulatedLinear.from_linear(linear, ModiffConfig(), ModulationState(), "l")


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_gradients_are_refused(mode):
    _, layer, shape = build("linear", mode=mode)
    layer.state.begin_run()
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"layer 'block.layer' has no gradient"), layer.state.call():
        layer(x)
    layer.state.begin_run()
    with torch.no_grad(), layer.state.call():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_state_dict_is_that_of_the_original(kind):
    module, layer, _ = build(kind)
    original, ours = module.state_dict(), layer.state_dict()
    assert list(original) == list(ours)
    assert all(torch.equal(original[key], ours[key]) for key in original)
    assert layer.weight is module.weight
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign, backend):
    module, layer, shape = build("linear", backend=backend)
    x = torch.randn(shape)
    run(layer, [x])
    other = nn.Linear(24, 20)
    layer.load_state_dict(other.state_dict(), assign=assign)
    with pytest.raises(RuntimeError, match=r"outside a run \(weights were loaded\)"):
        layer.state.begin_call()
    out = run(layer, [x])
    torch.testing.assert_close(out, F.linear(x, dequantized(other), other.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.weight, other.weight)


def test_dtype_conversion_derives_the_weights_again():
    module, layer, shape = build("linear")
    layer.to(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert module.weight is layer.weight
    assert layer.weight_scale.dtype == torch.float32
    assert run(layer, trajectory(shape, 3, torch.float16)).dtype == torch.float16


def test_attributes_of_the_original_are_there():
    conv, layer, _ = build("conv-groups-dilation")
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(conv, name)
    linear, layer, _ = build("linear")
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
    assert "block.layer" in repr(layer)


def test_compiled_layers_give_the_same_numbers(backend):
    """Graphs: the first call, the first update (its scale is dynamic), later updates; a second run compiles nothing."""
    torch._dynamo.reset()
    config = ModiffConfig(act_bits=4, scale_mode="delayed", backend=backend)
    state = ModulationState()
    layers = [ModulatedLinear.from_linear(nn.Linear(8, 8), config, state, name, "q") for name in "qkv"]
    layers.append(ModulatedConv2d.from_conv2d(nn.Conv2d(1, 4, 3), config, state, "conv"))

    def net(x):
        q, k, v = (layer(x) for layer in layers[:3])
        return layers[3]((q * k + v).view(2, 1, 4, 8))

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    inputs = list(trajectory((2, 4, 8), 4))
    compiled = torch.compile(net, backend=count, fullgraph=True)
    results = []
    with torch.no_grad():
        for function in (net, compiled, compiled):
            state.begin_run()
            for x in inputs:
                with state.call():
                    out = function(x)
            results.append((out, len(graphs)))
    expected, (first, compiled_graphs), (second, graphs_in_the_end) = results[0][0], *results[1:]
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert compiled_graphs == graphs_in_the_end == 3
