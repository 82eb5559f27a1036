"""Products whose results are exact integers, for tests of one backend's tiles, splits and orders of work."""

import math

import torch

from modiff_kernels.backends import reference
from modiff_kernels.quant.operands import PackedWeight, Window
from modiff_kernels.quant.packing import pack
from modiff_kernels.quant.spec import quant_max, quant_min

THREE, DOWN, POINT = Window((3, 3), padding=(1, 1)), Window((3, 3), (2, 2), (1, 1)), Window((1, 1))


class ExactProduct:
    """Random codes and weights with scales of 1."""

    def __init__(self, x_shape, n, window=None, bits=8, code_bits=8):
        self.x_shape, self.n, self.window, self.bits, self.code_bits = x_shape, n, window, bits, code_bits

    def __str__(self):
        window = "" if self.window is None else "-" + "".join(map(str, self.window.to_ints()))
        return f"{'x'.join(map(str, self.x_shape))}-{self.n}{window}-w{self.bits}a{self.code_bits}"

    def draw(self):
        """codes, weight."""
        low, high = quant_min(self.code_bits), quant_max(self.code_bits)
        codes, k = torch.randint(low, high + 1, self.x_shape, dtype=torch.int8), self.x_shape[-1]
        if self.window is not None:
            codes = codes.to(memory_format=torch.channels_last)
            k = self.x_shape[1] // self.window.groups * math.prod(self.window.kernel_size)
        rows = torch.randint(quant_min(self.bits), quant_max(self.bits) + 1, (self.n, k), dtype=torch.int8)
        return codes, PackedWeight(pack(rows, self.bits), torch.ones(self.n), self.bits)

    def check(self, product, packed_codes=None, **more):
        """`product` of the ops' arguments is the reference's: onto a state of threes, and plain with zero points."""
        codes, weight = self.draw()
        given = codes if packed_codes is None else packed_codes(codes)
        one, samples = torch.ones(1), self.x_shape[0]
        zero_points = torch.randint(-128, 128, (samples,), dtype=torch.int32)
        tail = (None, self.window, torch.float32, True)
        sums = reference.product(codes, one, None, weight, None, None, *tail)
        assert sums.abs().max() < 2**24
        y_hat = torch.full_like(sums, 3.0)
        out = product(given, one, None, weight, y_hat, None, *tail, **more)
        assert torch.equal(y_hat, sums + 3)
        assert torch.equal(out, y_hat)
        assert out.stride() == sums.stride()
        if packed_codes is None:
            wanted = reference.product(codes, one.expand(samples), zero_points, weight, None, None, *tail)
            scale = torch.ones(samples)
            assert torch.equal(product(codes, scale, zero_points, weight, None, None, *tail, **more), wanted)


def check_largest_sum(product, k, **more):
    """Of k products: within int32."""
    codes, rows = (torch.full((1, k), -128, dtype=torch.int8) for _ in range(2))
    zero_point, one = torch.full((1,), 127, dtype=torch.int32), torch.ones(1)
    weight = PackedWeight(rows, one, 8)
    out = product(codes, one, zero_point, weight, None, None, None, None, torch.float32, True, **more)
    assert out.item() == 255 * 128 * k
