"""Weight methods: the objective against its definition, exhaustive search on tiny layers, errors on other inputs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modiff_kernels.calibration.weights import WEIGHT_METHODS, input_rows, quantize_layer
from modiff_kernels.quant.affine import rows_to_weight, weight_rows


def correlated(rows, k):
    """Inputs with a decaying spectrum, as activations have."""
    basis = torch.linalg.qr(torch.randn(k, k))[0]
    return torch.randn(rows, k) * (0.7 ** torch.arange(k)) @ basis


def test_rows_times_weight_is_the_layer():
    for module, shape in (
        (nn.Linear(5, 3), (2, 7, 5)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 5)),
        (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 6, 6)),
        (nn.Conv2d(4, 6, 1), (1, 4, 3, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    ):
        x = torch.randn(shape)
        rows, weight = input_rows(module, x), weight_rows(module.weight)
        if rows.ndim == 2:
            product = rows @ weight.t()
        else:
            product = torch.cat([part @ own.t() for part, own in zip(rows, weight.chunk(2))], dim=1)
        out = module(x) - (module.bias if x.ndim == 3 else module.bias[:, None, None])
        expected = out.reshape(-1, out.shape[-1]) if x.ndim == 3 else out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_learnt_codes_beat_rounding_on_other_inputs(bits, group_size):
    x = correlated(4000, 72)
    train, test = x[:2000], x[2000:]
    weight = torch.randn(24, 72)
    errors = {}
    for name in ("rtn", "mse", "gptq"):
        found = WEIGHT_METHODS[name](weight, train.t() @ train / len(train), bits, group_size)
        found.check(weight.shape)
        errors[name] = (test @ (found.dequantized() - weight).t()).square().mean().item()
    assert errors["gptq"] < 0.5 * min(errors["rtn"], errors["mse"])


def test_gptq_is_close_to_the_best_codes_of_a_tiny_layer():
    x = correlated(200, 4)
    hessian, weight = x.t() @ x, torch.randn(8, 4)
    found = WEIGHT_METHODS["gptq"](weight, hessian, 3, -1)
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=4))).float()
    for row, codes, scale in zip(weight, found.codes, found.scale):
        differences = every * scale - row, (codes * scale - row)[None]
        errors, reached = (((part @ hessian) * part).sum(1) for part in differences)
        assert reached <= 2 * errors.min() + 1e-6
        assert (errors < reached).sum() < 40  # of 4096


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_convolution_with_groups_is_quantised_group_by_group(method):
    conv = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.randn(6, 4, 8, 8) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None, None]
    rows = input_rows(conv, x)
    hessian = rows.transpose(1, 2) @ rows if method == "gptq" else None
    found = quantize_layer(conv, hessian, method, 4, -1)
    weight = rows_to_weight(found.dequantized(), conv.weight.shape)
    expected = F.conv2d(x, conv.weight, groups=2)
    assert (F.conv2d(x, weight, groups=2) - expected).norm() / expected.norm() < 0.15
