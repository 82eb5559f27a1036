"""Every layer of the networks that benchmarks run on: codes and int32 sums are those of the definition, bit for bit.

On a GPU layers have their full size; elsewhere images are cut to a few pixels, as sums along K do not depend on them.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import NETWORKS, SMALL_NETWORKS, layer_table
from modiff_kernels import ops
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import rows_to_weight
from modiff_kernels.quant.packing import pack
from modiff_kernels.quant.spec import quant_max, quant_min

PIXELS_OFF_GPU = 4
REFUSED_AT_MOST = 0.1  # of the layers: the first and the last convolution, and what has no multiple of 16 channels


@pytest.fixture(scope="module")
def layers():
    """By network, its different layers; tables are made once."""
    tables = {}

    def of(network):
        if network not in tables:
            tables[network] = list(layer_table(network))
        return tables[network]

    return of


def image(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


class Operands:
    """Codes and weight of a layer on the device of `at`, and the layer's window."""

    def __init__(self, layer, batch, bits, at):
        limit = max(layer.h, layer.w) if at.on_gpu else PIXELS_OFF_GPU
        height, width = min(layer.h, limit), min(layer.w, limit)
        self.is_image = layer.kind == "conv"
        self.shape = (batch, layer.c_in, height, width) if self.is_image else (batch, height, layer.c_in)
        codes = torch.randint(-128, 128, self.shape, dtype=torch.int8, device=at.device)
        self.codes = image(codes) if self.is_image else codes
        side = (layer.kernel, layer.kernel)
        k = layer.kernel**2 * layer.c_in
        span = quant_min(bits), quant_max(bits) + 1
        self.rows = torch.randint(*span, (layer.c_out, k), dtype=torch.int8, device=at.device)
        self.window = (side, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1) if self.is_image else ()
        self.dense = rows_to_weight(self.rows, (layer.c_out, layer.c_in, *side)) if self.is_image else self.rows
        self.suffix = "conv2d" if self.is_image else "linear"
        self.sizes = {"n": layer.c_out, "k": k, "weight_bits": bits}

    def expected(self):
        """The sums, in float64, which holds them exactly; rounded, as an algorithm may not be a sum of products."""
        operands = self.codes.double(), self.dense.double()
        sums = F.conv2d(*operands, None, *self.window[1:]) if self.window else F.linear(*operands)
        return sums.round()

    def accumulate(self, at, bits):
        """The same from `at`: with scales of 1 and a state of 0 the output is the sums, below 2^24."""
        kept = {"kernel_size": self.window[0], "groups": 1} if self.window else {}
        window = dict(zip(("kernel_size", "stride", "padding", "dilation", "groups"), self.window))
        op = f"accumulate_{self.suffix}"
        layout = ops.preferred_layout(op, at.device, **self.sizes, **window, backend=at.backend)
        sizes = (bits, *self.rows.shape)
        packed = ops.prepare_weight(pack(self.rows, bits), *sizes, layout_to=layout, **kept, backend=at.backend)
        expected = self.expected()
        assert expected.abs().max() < 2**24
        y_hat = torch.zeros_like(expected, dtype=torch.float32)
        y_hat = image(y_hat) if self.is_image else y_hat
        ones = torch.ones(self.rows.shape[0], device=at.device)
        arguments = (self.codes, ones[:1].clone(), packed, ones, y_hat, None, bits, -1, layout, *self.window)
        found = getattr(ops, op)(*arguments, torch.float32, backend=at.backend)
        return found.double(), y_hat.double(), expected


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_sums_are_exact(at, layers, network, batch, bits):
    if not at.on_gpu and (network not in SMALL_NETWORKS or batch != 2):
        pytest.skip("other networks and batches have the same kernels, and take minutes without a GPU")
    wrong, refused = [], []
    for layer in layers(network):
        try:
            found, state, expected = Operands(layer, batch, bits, at).accumulate(at, bits)
        except ops.BackendUnavailable as error:
            refused.append(f"{layer}: {error}")
            continue
        if not (torch.equal(found, expected) and torch.equal(state, expected)):
            wrong.append(f"{layer}: {int((found != expected).sum())} of {expected.numel()} sums differ")
    assert not wrong, "\n".join(wrong)
    assert len(refused) <= max(2, REFUSED_AT_MOST * len(layers(network))), "\n".join(refused)


@pytest.mark.parametrize(("granularity", "bits"), [("per_sample", 8), ("per_block", 4), ("per_token", 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_codes_are_those_of_the_reference(at, layers, network, batch, granularity, bits):
    if not at.on_gpu and (network not in SMALL_NETWORKS or batch != 2):
        pytest.skip("other networks and batches have the same kernels, and take minutes without a GPU")
    wrong = []
    for shape in sorted({Operands(layer, batch, 8, at).shape for layer in layers(network)}, key=str):
        x, x_hat = (torch.randn(shape, device=at.device).half() for _ in range(2))
        x, x_hat = (image(t) if len(shape) == 4 else t for t in (x, x_hat))
        results = [
            ops.quantize_residual(x, x_hat.clone(), None, bits, granularity, backend=backend)
            for backend in (at.backend, dispatch.REFERENCE)
        ]
        for name, found, wanted in zip(("codes", "scale", "absmax"), *results):
            if not torch.equal(found, wanted):
                wrong.append(f"{name} of {shape}: {int((found != wanted).sum())} of {wanted.numel()} differ")
    assert not wrong, "\n".join(wrong)
