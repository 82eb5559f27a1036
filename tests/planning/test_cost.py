"""The cost model against traffic that was worked out by hand, pass by pass."""

import pytest

from modiff_kernels.config.plan import Mode
from modiff_kernels.nn.blocks.base import ALONE, Role
from modiff_kernels.planning.cost import LayerShape, Machine, Sizes, passes, seconds, weight_of_error

FLOAT, PLAIN, MODULATED = Mode("float"), Mode("quantized", 8), Mode("modulated", 8)
HALF = Sizes(float_bytes=2, state_bytes=2, weight_bits=8)
NORMED, ADDING = Role("group_norm", silu=True), Role("group_norm", silu=True, adds=True)
TOKENS, GATED, GEGLU = Role("layer_norm"), Role("layer_norm", is_gated=True), Role("geglu", adds=True)


def layer(role, inputs=100, outputs=50, weights=8, **more):
    return LayerShape(inputs, outputs, weights, 1000, role, **more)


# role and more, mode, whether compiled: bytes of every pass, in order, with 100 inputs, 50 outputs and 8 weights
ROWS = [
    (ALONE, {}, PLAIN, [100 * 2 + 100, 8 + 100 + 50 * 2]),
    (ALONE, {"windowed": True}, PLAIN, [200, 300, 208]),  # a range before
    (NORMED, {"windowed": True}, PLAIN, [200, 300, 208]),  # whose range comes with the statistics
    (ADDING, {"windowed": True}, PLAIN, [200, 300, 208 + 100]),
    (TOKENS, {}, PLAIN, [300, 208]),
    (TOKENS, {"is_reader": True}, PLAIN, [8 + 100]),
    (TOKENS, {"is_constant": True}, PLAIN, []),
    (GATED, {}, PLAIN, [300, 8 + 100 + 50]),  # half of the outputs leave the product
    (GEGLU, {}, PLAIN, [300, 208 + 100]),
    (NORMED, {"windowed": True}, MODULATED, [200, 400, 200 + 400 + 100, 8 + 100 + 200]),
    (ADDING, {"windowed": True}, MODULATED, [200, 400, 700, 308 + 100 + 100]),
    (ALONE, {}, MODULATED, [400, 700, 308 + 100]),
    (GEGLU, {}, MODULATED, [400 + 200, 400 + 400 + 100, 308 + 200]),
    (NORMED, {"windowed": True}, FLOAT, [200, 400, 400, 200 + 16 + 100, 200]),  # norm, silu, product, bias
    (ADDING, {"windowed": True}, FLOAT, [200, 400, 400, 400, 316, 200, 300]),
    (GEGLU, {}, FLOAT, [400, 600, 316, 300]),
    (TOKENS, {"is_constant": True, "is_reader": True}, FLOAT, [316]),
]


@pytest.mark.parametrize(("role", "more", "mode", "expected"), ROWS)
def test_passes(role, more, mode, expected):
    found = passes(layer(role, **more), mode, HALF)
    assert [each.bytes for each in found] == expected
    assert sum(each.multiply_adds for each in found) == (1000 if expected else 0)
    assert sum(each.launches for each in found) == len(expected) - (more.get("is_reader", False) and mode != FLOAT)


def test_one_launch_of_a_norm_and_codes():
    for fits, expected in ((False, [200, 700, 308]), (True, [700, 308])):
        found = passes(layer(NORMED, windowed=True, norm_fits=fits), MODULATED, HALF._replace(delayed=True))
        assert [each.bytes for each in found] == expected


def test_what_a_compiler_fuses():
    compiled = [each.bytes for each in passes(layer(ADDING, windowed=True), FLOAT, HALF, compiled=True)]
    assert compiled == [200, 400, 316, 200]
    assert [each.bytes for each in passes(layer(GEGLU), FLOAT, HALF, compiled=True)] == [600, 316, 200]


def test_seconds():
    machine = Machine(float_ops=1000.0, int8_ops=2000.0, bandwidth=1e9, launch=0.5, int4_ops=4000.0)
    shape = layer(ALONE)
    assert seconds(shape, FLOAT, HALF, machine) == pytest.approx(2 + 0.5)
    assert seconds(shape, PLAIN, HALF, machine) == pytest.approx(1 + 2 * 0.5, abs=1e-5)
    w4a4 = HALF._replace(weight_bits=4), Mode("modulated", 4)
    assert seconds(shape, w4a4[1], w4a4[0], machine) == pytest.approx(0.5 + 3 * 0.5, abs=1e-5)
    assert seconds(shape, PLAIN, w4a4[0], machine) == pytest.approx(1 + 2 * 0.5, abs=1e-5)
    slow = machine._replace(bandwidth=10.0, launch=0.0)
    assert seconds(shape, PLAIN, HALF, slow) == pytest.approx((300 + 208) / 10)


def test_errors_weigh_most_near_the_output():
    kinds = ("tokens", "images", "last")
    plain = [weight_of_error(kind, PLAIN) for kind in kinds]
    assert plain == sorted(plain)
    for kind in kinds:
        eight, seven, four, three = (weight_of_error(kind, Mode("modulated", bits)) for bits in (8, 7, 4, 3))
        assert weight_of_error(kind, FLOAT) == 0 < eight < seven < four < weight_of_error(kind, PLAIN) < three
