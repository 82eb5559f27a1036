import pytest
import torch

from benchmarks import bounds, shapes
from benchmarks.shapes import Layer
from modiff_kernels.planning.roofline import Machine


@pytest.fixture
def one_layer(monkeypatch):
    """A network of one convolution with two input and four output channels, twice.

    3 images: 600 inputs, 4 x 5 x 5 x 3 = 300 outputs, 72 weights, 2 x 18 x 300 = 10800 operations.
    """
    monkeypatch.setattr(bounds, "layer_table", lambda network: {Layer("conv", 2, 4, 10, 10, 3, 2, 1): 2})


@pytest.mark.parametrize("mode", ["float", "weight_only"])
def test_bound_where_traffic_decides(one_layer, mode):
    machine = Machine(float_ops=1e9, int8_ops=4e9, bandwidth=1e8)
    bytes_moved = (600 + 72 + 300) * 4
    assert bounds.bound_ms("any", 3, mode, machine, 4, 4) == pytest.approx(2 * 1e3 * bytes_moved / 1e8)


def test_bound_of_codes_where_traffic_decides(one_layer):
    machine = Machine(float_ops=1e9, int8_ops=4e9, bandwidth=1e8)
    bytes_moved = 600 + 72 + 300 * 4  # codes, weights in 8 bits, output
    assert bounds.bound_ms("any", 3, "quantized", machine, 4, 4) == pytest.approx(2 * 1e3 * bytes_moved / 1e8)


def test_bound_where_arithmetic_decides(one_layer):
    slow = Machine(float_ops=1e6, int8_ops=2e6, bandwidth=1e12)
    assert bounds.bound_ms("any", 3, "float", slow, 4, 4) == pytest.approx(2 * 10.8)
    assert bounds.bound_ms("any", 3, "quantized", slow, 4, 4) == pytest.approx(2 * 5.4)
    assert bounds.bound_ms("any", 3, "modulated", slow, 4, 4) == pytest.approx(2 * 5.4, rel=1e-3)


def test_rates_of_a_cpu_are_measured(monkeypatch):
    monkeypatch.setattr(bounds, "measured_machine", lambda device, config: Machine(1.0, 2.0, 3.0))
    assert bounds.machine(torch.device("cpu")) == (
        Machine(1.0, 2.0, 3.0),
        "measured on a large product, convolution and copy",
    )


def test_a_network_without_weights():
    layers = {str(layer): count for layer, count in shapes.layer_table("ldm8_churches").items()}
    assert layers["conv3x3-4-192@32x32-s1"] == layers["conv3x3-192-4@32x32-s1"] == 1
    # Both of two down resnets, and the second one of three up resnets, whose first one takes the skip too.
    assert layers["conv3x3-192-192@32x32-s1"] == 2 * 2 + 3


def test_conditions_of_sdxl():
    unet = shapes.build_unet("sdxl", "meta")
    keywords = shapes.conditions(unet, 2)
    assert keywords["encoder_hidden_states"].shape == (2, 77, 2048)
    assert keywords["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)
    assert shapes.conditions(shapes.build_unet("cifar10_small16"), 2) == {}
