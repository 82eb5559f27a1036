"""The traffic model against a table that was worked out by hand for an H200's data sheet, batch by batch."""

import pytest

from modiff_kernels.config.plan import Mode
from modiff_kernels.planning.roofline import LayerShape, Machine, seconds

H200 = Machine(float_ops=989e12, int8_ops=1979e12, bandwidth=4.8e12)
FLOAT, PLAIN, MODULATED = Mode("float"), Mode("quantized", 8), Mode("modulated", 8)

# kind, c_in, c_out, pixels or tokens, batch: bf16 us, modulated us with the residual in a pass of its own and with it
# in the norm, speed-up over bf16 of plain W8A8 in the norm, and of modulation with float32 state
ROWS = [
    ("conv", 320, 320, 4096, 1, 7.63, 5.73, 4.63, 2.00, 1.12),
    ("conv", 640, 640, 1024, 2, 15.27, 9.54, 8.45, 2.00, 1.44),
    ("conv", 1280, 1280, 64, 1, 6.21, 3.28, 3.21, 1.99, 1.80),
    ("conv", 1280, 1280, 64, 16, 30.53, 17.17, 16.08, 2.00, 1.67),
    ("linear", 320, 320, 4096, 1, 1.13, 3.30, 2.21, 1.35, 0.19),
    ("linear", 320, 2560, 4096, 8, 54.28, 87.55, 78.81, 1.46, 0.27),
    ("linear", 640, 5120, 1024, 1, 6.79, 6.14, 5.60, 2.00, 0.51),
    ("linear", 1280, 1280, 256, 1, 0.96, 1.16, 0.89, 1.75, 0.52),
    ("linear", 1280, 10240, 256, 2, 13.57, 8.19, 7.65, 2.00, 0.89),
]


def shape_of(kind, c_in, c_out, rows, batch):
    k = c_in * (9 if kind == "conv" else 1)
    return LayerShape(batch * rows * c_in, batch * rows * c_out, c_out * k, batch * rows * c_out * k)


def us(shape, mode, state_bytes=2, fused=True, weight_bits=8):
    sizes = {"float_bytes": 2, "state_bytes": state_bytes, "weight_bits": weight_bits}
    return 1e6 * seconds(shape, mode, H200, **sizes, fused=fused)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:5])))
def test_layers(row):
    *problem, bf16, separate, fused, plain_speedup, float32_speedup = row
    shape = shape_of(*problem)
    rounding = 0.006  # the table has two decimals
    assert us(shape, FLOAT) == pytest.approx(bf16, abs=rounding)
    assert us(shape, MODULATED, fused=False) == pytest.approx(separate, abs=rounding)
    assert us(shape, MODULATED) == pytest.approx(fused, abs=rounding)
    assert us(shape, FLOAT) / us(shape, PLAIN) == pytest.approx(plain_speedup, abs=rounding)
    assert us(shape, FLOAT) / us(shape, MODULATED, 4, False) == pytest.approx(float32_speedup, abs=rounding)


def test_low_bit_weights_pay_where_weights_are_the_traffic():
    shape = shape_of("conv", 1280, 1280, 64, 1)
    assert us(shape, FLOAT) / us(shape, MODULATED) == pytest.approx(1.94, abs=0.006)
    assert us(shape, FLOAT) / us(shape, MODULATED, weight_bits=4) == pytest.approx(3.7, abs=0.05)
