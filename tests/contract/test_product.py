"""product at every place: exact integer sums, scales of every length, groups, zero points, states, skip and dtypes."""

import itertools
import random

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.quant.packing import pack
from tests.contract import cases
from tests.contract.cases import ACT_BITS, BITS, CONVS, EPS32, LAYERS, LINEARS, SMALL, Case, conv, weight_of
from tests.places import LIMITS

OP = "product"

# A place that solves fewer of LINEARS + CONVS + LAYERS in 8 bits is not worth its name.
LEAST = 18


def codes_of(case, bits=8):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, case.x_shape, dtype=torch.int8)
    return codes.contiguous(memory_format=cases.memory_format(case.x_shape))


def zero_points(count):
    return torch.randint(-128, 128, (count,), dtype=torch.int32)


def granularities(case):
    """Scales of single pixels leave the sum under a pointwise window only."""
    pointwise = case.window is None or case.window.is_pointwise
    return ["per_tensor", "per_sample", *["per_token"] * pointwise]


def check_sums(place, case, bits, granularity, zero_point):
    """Scales of one show the integer sums, in out or, without zero points, in the state. False: not solved."""
    weight = weight_of(place, case, bits, granularity=granularity, unit=True)
    if weight is None:
        return False
    codes, count = codes_of(case), case.scales(granularity)
    zero = zero_points(count) if zero_point else None
    values = codes.double() if zero is None else codes.double() - case.over_rows(zero)
    # Padding stands for x = 0, whose code is the zero point: the operator pads the shifted codes with 0.
    expected = case.apply(values, weight.dense).contiguous(memory_format=cases.memory_format(case.x_shape))
    assert expected.abs().max() < 2**24
    y_hat, untouched = cases.guarded(torch.zeros(case.y_shape), torch.float32)
    state = None if zero_point else y_hat
    out = place.product(codes, torch.ones(count), zero, weight.packed, state, window=case.window)
    untouched()
    where = f"{case} {bits} bits {granularity} zero point {zero_point}"
    assert torch.equal(out.double(), expected), f"{where}: {(out != expected).sum()} of {out.numel()} sums differ"
    assert zero_point or torch.equal(y_hat.double(), expected), where
    assert out.stride() == expected.stride()
    return True


def test_sums_are_exact(place):
    draw = random.Random(0).choice
    if place.few:
        chosen = [*LINEARS, *CONVS, *LAYERS[:1], *LAYERS[-1:]]
        assert sum(check_sums(place, c, draw(BITS), draw(granularities(c)), draw([False, True])) for c in chosen) > 10
        return
    solved = set()
    for case, bits in itertools.product(LINEARS + CONVS + LAYERS, BITS):
        for granularity, zero_point in itertools.product(granularities(case), (False, True)):
            if check_sums(place, case, bits, granularity, zero_point) and bits == 8:
                solved.add(case)
    assert len(solved) >= LEAST


def test_sums_of_random_convolutions_are_exact(place):
    if place.few:
        chosen = [c for c in map(cases.random_conv, range(400)) if c.channels % 16 == 0 and c.window.groups == 1][:4]
    else:
        chosen = [cases.random_conv(seed) for seed in range(60)]
    for i, case in enumerate(chosen):
        check_sums(place, case, 8, granularities(case)[i % 2], i % 4 >= 2)


def test_largest_sums_do_not_saturate(place):
    """Beyond 2^24 the int32 sum is rounded once, when it becomes a float."""
    codes_of_all = [(-128, -128, 127), (-128, 127, -128), (127, -128, None), (-127, 127, None)]  # weight, code, zero
    large = [conv((1, 512, 3, 3), 16), Case((2, 4608), 16), Case((1, 1 << 16), 1)]
    for case in [Case((1, 1 << 12), 1)] if place.few else large:  # tests/backends have the longest sums of these
        for weight_code, code, zero in codes_of_all[:1] if place.few else codes_of_all:
            rows = torch.full(case.weight_shape, weight_code).to(torch.int8)
            weight = weight_of(place, case, 8, unit=True, codes=rows)
            codes = cases.activation(case.x_shape).to(torch.int8).fill_(code)
            zeros = None if zero is None else torch.full((1,), zero, dtype=torch.int32)
            out = place.product(codes, torch.ones(1), zeros, weight.packed, window=case.window)
            assert torch.equal(out, case.apply(codes.double() - (zero or 0), weight.dense).float())


def test_sums_of_few_bits_do_not_saturate(place):
    """Codes at both ends of every range and weights at the ends of theirs: int16 sums of a kernel hold so many."""
    case = conv((1, 64 if place.few else 512, 3, 3), 16)
    for bits, weight_bits in itertools.product((4,) if place.few else range(2, 9), (8,) if place.few else BITS):
        ends = torch.tensor([-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1], dtype=torch.int8)
        rows = ends[torch.arange(16) % 2].view(16, 1, 1, 1).expand(case.weight_shape).contiguous()
        weight = weight_of(place, case, weight_bits, unit=True, codes=rows)
        codes = torch.full(case.x_shape, 2 ** (bits - 1) - 1, dtype=torch.int8)
        codes[..., 0] = -(2 ** (bits - 1))
        codes = codes.contiguous(memory_format=torch.channels_last)
        out = place.product(codes, torch.ones(1), None, weight.packed, window=case.window)
        assert torch.equal(out, case.apply(codes.double(), weight.dense).float()), f"{bits} bits, W{weight_bits}"


def check_floats(place, case, draw, group_size=-1):
    """Scales, state, bias, skip and dtypes drawn at random; within the roundings of the epilogue. False: not solved."""
    granularity, bits, with_state = draw(granularities(case)), draw(BITS), draw([True, False])
    weight = weight_of(place, case, bits, group_size, granularity)
    if weight is None:
        return False
    state_dtype, out_dtype = draw(place.dtypes), draw(place.dtypes)
    codes, count = codes_of(case, draw(ACT_BITS)), case.scales(granularity)
    scale = torch.rand(count) * 0.1 + 0.01
    zero = None if with_state or draw([True, False]) else zero_points(count)
    bias = None if with_state or draw([True, False]) else torch.randn(case.n).to(draw(place.dtypes))
    skip = None if draw([True, False]) else cases.activation(case.y_shape, out_dtype)
    values = (codes.double() - (0 if zero is None else case.over_rows(zero))) * case.over_rows(scale)
    exact, magnitude = case.apply(values, weight.dense), case.apply(values.abs(), weight.dense.abs())
    if zero is not None:  # a kernel may subtract zero * sum(weight) from the sum of codes
        moved = (codes.double().abs() + case.over_rows(zero).abs()) * case.over_rows(scale)
        magnitude = case.apply(moved, weight.dense.abs())
    # With scales inside of it, the sum over groups is one of floats.
    extra = 0.0 if group_size == -1 else (2 + case.k / group_size) * EPS32
    before = cases.activation(case.y_shape, state_dtype)
    y_hat, untouched = cases.guarded(before, state_dtype)
    kept = [None if t is None else t.clone() for t in (codes, scale, zero, skip, bias)]
    arguments = (codes, scale, zero, weight.packed, y_hat if with_state else None, bias, skip, case.window, out_dtype)
    out = place.product(*arguments)
    untouched()
    assert (out.dtype, out.stride()) == (out_dtype, before.stride())
    for now, then in zip((codes, scale, zero, skip, bias), kept):
        assert now is None or torch.equal(now, then)
    if with_state:
        cases.assert_close(y_hat, before.double() + exact, magnitude + before.double().abs(), extra)
        exact = before.double() + exact + (0 if skip is None else skip.double())
        total = y_hat.float() if skip is None else y_hat.float() + skip.float()
        # Made from y_hat as it was stored, or, on the CPU, before it was rounded.
        if place.backend == "cpu":
            cases.assert_close(out, exact, magnitude + before.double().abs() + exact.abs(), extra)
        else:
            assert torch.equal(out, total.to(out_dtype))
        again = before.clone()
        nothing = place.product(*arguments[:4], again, *arguments[5:], write_out=False)
        assert nothing.shape == (0,)
        assert torch.equal(again, y_hat)
        changed = y_hat.clone()
        out.fill_(torch.nan)
        assert torch.equal(y_hat, changed), "out shares memory with y_hat"
        return True
    for term in (None if bias is None else case.over_columns(bias), None if skip is None else skip.double()):
        if term is None:
            continue
        exact, magnitude = exact + term, magnitude + term.abs()
    cases.assert_close(out, exact, magnitude, extra)
    return True


def test_epilogues(place):
    draw = random.Random(1).choice
    for case in SMALL + LINEARS + CONVS:
        for _ in range(1 if place.few else 6):
            check_floats(place, case, draw)
    for case in SMALL:  # every place solves these
        for _ in range(4 if place.few else 20):
            assert check_floats(place, case, draw)


def test_groups_of_weight_scales(place):
    """Where a backend has them: sums times scales along K, also with a last group that is not full."""
    draw = random.Random(2).choice
    solved = 0
    for case, group_size in itertools.product([*SMALL, Case((3, 200), 33)], (4, 32, 33, 64, 2000)):
        solved += check_floats(place, case, draw, group_size)
    assert solved >= (0 if place.backend in ("cpu", "cuda") else 3)


def test_geglu_of_pairs_of_columns(place):
    """value * gelu(gate) of neighbouring columns, with bias and zero points, at odd sizes, also with splits of K."""
    gelu, draw = torch.nn.functional.gelu, random.Random(3).choice
    for case in (Case((3, 64), 34), Case((2, 5, 320), 130), Case((65, 32), 66)):
        weight = weight_of(place, case, draw(BITS), granularity="per_token")
        codes, scale, zero = codes_of(case), torch.rand(case.rows) * 0.1, zero_points(case.rows)
        bias, dtype = draw([None, torch.randn(case.n)]), draw(place.dtypes)
        packed = weight.packed._replace(geglu=True)
        if LIMITS[place.backend](place.problem("product", codes, scale, zero, packed)):
            with pytest.raises(ops.BackendUnavailable, match="its epilogue has no GEGLU"):
                place.product(codes, scale, zero, packed)
            continue
        out = place.product(codes, scale, zero, packed, bias=bias, out_dtype=dtype)
        apart = place.product(codes, scale, zero, weight.packed, bias=bias).double()
        value, gate = apart[..., ::2], apart[..., 1::2]
        assert (out.dtype, out.shape) == (dtype, (*case.x_shape[:-1], case.n // 2))
        cases.assert_close(out, value * gelu(gate), 4 * value.abs() * (1 + gate.abs()))


def test_linear_scales_cover_consecutive_rows(place):
    """A Linear flattened to two dimensions keeps its scales per sample."""
    flat, full = Case((12, 64), 8), Case((3, 4, 64), 8)
    weight, codes, scale = weight_of(place, full, 8), codes_of(full), torch.rand(3)
    rows = codes.view(12, 64)
    out = place.product(rows, scale, None, weight.packed)
    assert torch.equal(out, place.product(codes, scale, None, weight.packed).view(12, 8))
    values = rows.double() * scale.double().repeat_interleave(4)[:, None]
    cases.assert_close(out, flat.apply(values, weight.dense), flat.apply(values.abs(), weight.dense.abs()))


def test_zero_codes_leave_the_state(place):
    for case in SMALL:
        weight, y_hat, skip = weight_of(place, case, 8), cases.activation(case.y_shape), cases.activation(case.y_shape)
        before = y_hat.clone()
        codes = torch.zeros_like(codes_of(case))
        out = place.product(codes, torch.rand(case.x_shape[0]), None, weight.packed, y_hat, None, skip, case.window)
        assert torch.equal(y_hat, before)
        assert torch.equal(out, before + skip)


@pytest.mark.parametrize("bits", BITS)
def test_prepared_weights_lead_back(place, bits):
    """Every layout of a backend leads back to the portable one: a checkpoint never depends on a backend."""
    for case in (conv((1, 16, 4, 4), 24), conv((1, 5, 4, 4), 7, 1, padding=0), conv((1, 16, 4, 4), 8, groups=2),
                 conv((1, 33, 2, 5), 17, (2, 5), padding=0), Case((1, 64), 65), Case((1, 17), 130)):  # fmt: skip
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), case.weight_shape, dtype=torch.int8)
        weight = weight_of(place, case, bits, codes=codes)
        if weight is None:
            continue
        back = ops.prepare_weight(weight.packed, case.k, case.window, "kpack_v1", place.backend)
        rows = codes.permute(0, 2, 3, 1).reshape(case.n, -1) if case.window else codes
        assert torch.equal(back.packed, pack(rows.contiguous(), bits))
        assert back._replace(packed=None) == weight.packed._replace(packed=None, layout="kpack_v1")
