"""quantize at every place: codes, scales, zero points and absmax bit for bit against numpy where there is no prologue,
within half a step and float32 arithmetic of float64 where there is one; the state follows the codes."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.quant.operands import IDENTITY
from tests.contract import cases
from tests.contract.cases import ACT_BITS, EPS32, GRANULARITIES, activation, granules, memory_format, over_granules

OP = "quantize"

# 1, odd, one below, at and above a tile in rows (13 * 5 = 65) and channels; blocks of 16 rows with rests up to 15.
FEW = [(1, 1), (3, 5, 63), (9, 65), (1, 1, 1, 1), (2, 7, 3, 5), (2, 32, 13, 5), (2, 33, 64)]
MORE = [(2, 7), (65, 65), (2, 64, 320), (3, 9, 47), (2, 17, 48), (3, 70, 15), (8, 1, 1030)]
MORE += [(1, 63, 4, 4), (2, 64, 8, 8), (3, 65, 5, 1), (1, 130, 16, 9), (2, 1030, 5, 7), (2, 128, 16, 16)]
SHARED = [(2, 33, 64), (3, 35, 1030), (1, 1030, 5, 7), (2, 128, 16, 16)]  # 2^15 values are more than one thread's
LAYERS = [(2, 320, 64, 64), (2, 1280, 8, 8), (2, 1024, 640), (77, 768)]  # in full on a GPU

# numpy, which the interpreter of Triton computes with, reports arithmetic with NaN.
with_nan = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def shapes(place):
    if place.threads > 1:
        return SHARED
    return FEW if place.few else FEW + MORE + LAYERS * (place.device == "cuda")


def scale_for(source, granularity, x):
    """None (dynamic), one scale for all, or one for every granule; about a quarter of the codes clip at 4 bits."""
    if source == "dynamic":
        return None
    return torch.rand(1 if source == "one" else len(granules(x, granularity))) * 0.3 + 0.2


def residual_oracle(x, x_hat, scale, bits, granularity, clip_ratio):
    """Codes, used scales and absmax; the codes of per_block are times multipliers."""
    residual = granules(x, granularity) - granules(x_hat, granularity)
    absmax = np.abs(residual).max(1)
    if granularity == "per_block":
        codes, used, _ = cases.oracle_blocks(x, x_hat, bits, clip_ratio)
        return codes.astype(np.int8), used, absmax
    used = cases.oracle_scale(absmax, bits, clip_ratio) if scale is None else np.resize(scale.numpy(), absmax.shape)
    return cases.oracle_codes(residual, used, bits), used, absmax


def check_residual(place, x, x_hat, scale=None, bits=4, granularity="per_sample", clip_ratio=1.0):
    """Everything bit for bit; returns the results."""
    wanted = residual_oracle(x, x_hat, scale, bits, granularity, clip_ratio)
    where = f"{tuple(x.shape)} {x.dtype} {x_hat.dtype} {bits} bits {granularity} clip {clip_ratio} scale {scale}"
    before, state = x.clone(), x_hat.clone()
    codes, used, absmax = place.quantize(x, IDENTITY, state, scale, bits, granularity, clip_ratio)
    assert torch.equal(x, before)
    np.testing.assert_array_equal(absmax.numpy(), wanted[2], err_msg=where)
    np.testing.assert_array_equal(used.numpy(), wanted[1], err_msg=where)
    np.testing.assert_array_equal(granules(codes, granularity), wanted[0].reshape(len(wanted[2]), -1), err_msg=where)
    assert (codes.dtype, used.dtype, absmax.dtype) == (torch.int8, torch.float32, torch.float32)
    assert codes.is_contiguous(memory_format=memory_format(x.shape))
    assert scale is None or used.data_ptr() != scale.data_ptr()
    cases.assert_updated(state, x_hat, over_granules(used, x) * codes.double())
    return codes, used, absmax, state


def check_plain(place, x, bits, granularity, affine):
    values = granules(x, granularity)
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    wanted_scale, wanted_zero = cases.oracle_scale(np.abs(values).max(1), bits), np.zeros(len(low), np.int32)
    if affine:
        wanted_scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(cases.MIN_SCALE))
        zero = np.rint(-low * (np.float32(1) / wanted_scale)) - 2 ** (bits - 1)
        wanted_zero = np.clip(zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int32)
    where = f"{tuple(x.shape)} {x.dtype} {bits} bits {granularity} affine {affine}"
    codes, scale, zero_point = place.quantize(x, bits=bits, granularity=granularity, affine=affine)
    np.testing.assert_array_equal(scale.numpy(), wanted_scale, err_msg=where)
    np.testing.assert_array_equal(zero_point.numpy(), wanted_zero, err_msg=where)
    wanted = cases.oracle_codes(values, wanted_scale, bits, wanted_zero)
    np.testing.assert_array_equal(granules(codes, granularity), wanted, err_msg=where)
    assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert codes.is_contiguous(memory_format=memory_format(x.shape))


SOURCES = [*itertools.product(GRANULARITIES, ("dynamic", "one", "each")), ("per_block", "dynamic")]


def test_residuals(place):
    """Shapes times sources of the scale, with formats drawn at random; on fast places every width for each."""
    draw = random.Random(0).choice
    for shape, (granularity, source) in itertools.product(shapes(place), SOURCES):
        for bits in [draw(ACT_BITS)] if place.few else ACT_BITS:
            x, x_hat = activation(shape, draw(place.dtypes)), activation(shape, draw(place.dtypes))
            scale = scale_for(source, granularity, x)
            check_residual(place, x, x_hat, scale, bits, granularity, draw([1.0, 1.0, 0.7, 1.25]))


def test_every_pair_of_dtypes(place):
    for dtype, state_dtype in itertools.product(place.dtypes, place.dtypes):
        for shape in [(2, 33, 5, 4), (2, 9, 40)]:
            check_residual(place, activation(shape, dtype), activation(shape, state_dtype))


def test_plain_codes(place):
    draw = random.Random(1).choice
    for shape, granularity, affine in itertools.product(shapes(place), GRANULARITIES, (True, False)):
        offset = draw([-3.0, 0.0, 0.3, 3.0])
        for bits in [draw(ACT_BITS)] if place.few else ACT_BITS:
            check_plain(place, activation(shape, draw(place.dtypes)) + offset, bits, granularity, affine)


def test_extreme_values(place):
    x = torch.rand(2, 6, 20)
    kinds = [x + 1, -x - 1, x * 0, x * 0 + 2.5, x.index_fill(2, torch.tensor([3]), 1e5), x * 1e-38, x * 1e38]
    for values, affine in itertools.product(kinds, (True, False)):
        check_plain(place, values, 8, "per_sample", affine)
    for exponent in (-40, -30, 10, 37):
        x = activation((2, 3, 32)) * 10.0**exponent
        check_residual(place, x, torch.zeros_like(x), bits=8)


def test_ties_go_to_the_even_code_and_ends_clamp(place):
    for bits in ACT_BITS:
        steps = torch.arange(-(2**bits), 2**bits + 1) / 2  # every code, every tie, both ends beyond the range
        x = steps.repeat(1, 3, 1).contiguous()
        codes, *_ = check_residual(place, x, torch.zeros_like(x), torch.ones(1), bits, "per_tensor")
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert codes[0, 1].tolist() == [min(max(round(v), low), high) for v in steps.tolist()]  # half to even too


def test_channels_of_uneven_range(place):
    """per_block: multipliers from 1 to their largest; a last block of 16, 17 and 31 rows; none."""
    some = [(2, 32, 13, 5), (2, 31, 40), (3, 48, 33), (2, 32, 7, 9), (2, 9, 40)]
    for shape, bits in zip(some, (3, 4, 7, 3, 8)) if place.few else itertools.product(some, ACT_BITS):
        ranges = 10.0 ** torch.linspace(-3, 0, shape[1 if len(shape) == 4 else -1])
        x = activation(shape, spread=ranges.view(-1, 1, 1) if len(shape) == 4 else ranges)
        for clip_ratio in [0.7] if place.few else [1.0, 0.7]:
            check_residual(place, x, torch.zeros_like(x, dtype=torch.float16), None, bits, "per_block", clip_ratio)


def test_no_change_costs_no_code(place):
    for granularity, dtype in itertools.product((*GRANULARITIES, "per_block"), place.dtypes):
        x = activation((2, 32, 4, 4), dtype)
        assert torch.equal(check_residual(place, x, x.clone(), None, 4, granularity)[3], x)


@with_nan
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(place, value):
    """Refused before the granule's state changes; or, where no value is read on the host, seen in absmax and scale."""
    x, x_hat = activation((2, 32, 5, 5)), activation((2, 32, 5, 5))
    bad = x.clone()
    bad[1, 3, 2, 1] = value
    for granularity in (*GRANULARITIES, "per_block"):
        state = x_hat.clone()
        if place.raises:
            with pytest.raises(ValueError, match="quantize: x holds NaN or Inf"):
                place.quantize(bad, IDENTITY, state, None, 4, granularity)
            whole = granularity == "per_tensor" or place.backend == "reference"
            assert torch.equal(state if whole else state[1, :, 2, 1], x_hat if whole else x_hat[1, :, 2, 1])
            continue
        codes, used, absmax = place.quantize(bad, IDENTITY, state, None, 4, granularity)
        at = {"per_tensor": 0, "per_token": 25 + 11}.get(granularity, 1)
        assert not absmax[at].isfinite()
        assert not used[at].isfinite()
        assert state[1, 3, 2, 1].isnan()
        good = torch.arange(len(absmax)) != at
        wanted = residual_oracle(x, x_hat, None, 4, granularity, 1.0)
        assert torch.equal(used[good], torch.from_numpy(wanted[1])[good])
        if granularity != "per_tensor":
            assert torch.equal(codes[0], cases.like(wanted[0], x)[0])
    for affine in (True, False):
        if place.raises:
            with pytest.raises(ValueError, match="quantize: x holds NaN or Inf"):
                place.quantize(bad, affine=affine)
        else:
            assert place.quantize(bad, affine=affine)[1].isfinite().tolist() == [True, False]


GROUP_NORMS = [((2, 96, 8, 8), 8), ((1, 32, 13, 5), 8), ((2, 9, 12), 3)]
MORE_GROUP_NORMS = [((1, 1, 1, 1), 1), ((2, 63, 4, 4), 7), ((8, 65, 5, 1), 13), ((2, 64, 64), 32)]
MORE_GROUP_NORMS += [((2, 65, 7, 5), 65), ((3, 1030, 4, 3), 10), ((1, 1030, 5, 7), 10)]  # groups are channels in one


def prologues(few):
    """Functions of a dtype."""
    for shape, groups in GROUP_NORMS + MORE_GROUP_NORMS * (not few):
        yield functools.partial(cases.group_norm, shape, groups, shift=shape != (1, 32, 13, 5))
    for shape in [(3, 5, 63), (2, 16, 320), *[(2, 7), (3, 5, 1030)] * (not few)]:
        yield functools.partial(cases.layer_norm, shape)
    for shape, spread in [((3, 5, 63), 1), ((2, 9, 128), 3), *[((2, 7), 1), ((3, 5, 1030), 3)] * (not few)]:
        yield functools.partial(cases.geglu, shape, spread=spread)


def check_prologue(place, given, x_hat, scale=None, bits=4, granularity="per_sample", clip_ratio=1.0):
    """The residual of given.x, half a step from float64 give or take the arithmetic of the prologue in float32."""
    h, prologue, x, error = given
    before, h_before = x_hat.clone(), h.clone()
    codes, used, absmax = place.quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio)
    assert torch.equal(h, h_before)
    assert codes.shape == x.shape
    assert codes.is_contiguous(memory_format=memory_format(x.shape))
    cases.assert_updated(x_hat, before, over_granules(used, x) * codes.double())
    residual = x - before.double()
    error = error + EPS32 * (x.abs() + before.double().abs())
    largest = granules(residual.abs(), granularity).max(1)
    np.testing.assert_allclose(absmax.numpy(), largest, rtol=2 * EPS32, atol=error.max().item())
    if granularity == "per_block":
        wanted, wanted_scale, multiplier = cases.oracle_blocks(x.float(), before, bits, clip_ratio)
        np.testing.assert_allclose(used.numpy(), wanted_scale, 4 * EPS32, error.max().item() / (2 ** (bits - 1) - 1))
        # Rounding moves a value over a tie, or a maximum so that a multiplier's ceiling jumps: rarely, and by a step.
        apart = np.abs(granules(codes, granularity) - wanted) / multiplier
        assert apart.max() <= 2
        assert (apart > 0).sum() < 2 + 0.02 * apart.size  # the largest value lies at a tie where there are no blocks
        return
    if scale is None:
        np.testing.assert_array_equal(used.numpy(), cases.oracle_scale(absmax.numpy(), bits, clip_ratio))
    else:
        assert torch.equal(used, scale.expand_as(used))
    step = over_granules(used, x)
    wanted = (residual / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert ((codes - wanted).abs() * step <= 0.5001 * step + error).all()


def test_prologues_of_residuals(place):
    draw = random.Random(2).choice
    for make, (granularity, source) in itertools.product(prologues(place.few), SOURCES):
        if place.few and draw([True, True, False]):
            continue
        given = make(draw(place.dtypes))
        x_hat = (given.x + 0.2 * torch.randn_like(given.x)).to(draw(place.dtypes))
        x_hat = x_hat.contiguous(memory_format=memory_format(x_hat.shape))
        clip_ratio = draw([1.0, 0.8]) if source == "dynamic" else 1.0
        scale, bits = scale_for(source, granularity, x_hat), draw(ACT_BITS)
        check_prologue(place, given, x_hat, scale, bits, granularity, clip_ratio)


def test_group_norm_options(place):
    shifts = ("one row", "columns of more", False)
    options = itertools.product([True, False], shifts, [True, False])
    for silu, shift, affine in (*options, (True, "columns of more", "by sample"), (False, False, "by sample")):
        for shape, groups in [((2, 24, 4, 4), 4), ((2, 5, 24), 1), ((2, 6, 3, 3), 6)][: 1 if place.few else 3]:
            given = cases.group_norm(shape, groups, silu=silu, shift=shift, affine=affine, eps=1e-3)
            check_prologue(place, given, activation(shape), bits=8)
    given = cases.layer_norm((2, 5, 24), affine=False, eps=1e-3)
    check_prologue(place, given, activation((2, 5, 24)), None, 8, "per_token")


def test_norms_of_values_far_from_zero(place):
    """Statistics of 1, 5 and 20 blocks of rows, merged: the variance of 1000 +- 1 does not cancel."""
    for height in [8, 40] if place.few else [8, 40, 160]:
        given = cases.group_norm((1, 32, height, 4), 4, mean=1000.0, shift=False)
        check_prologue(place, given, torch.zeros_like(given.h), bits=8)
    given = cases.group_norm((2, 64, 5, 7), 8, mean=-1e3, spread=1e-2)
    check_prologue(place, given, torch.zeros_like(given.h), bits=8)
    given = cases.group_norm((1, 64, 40, 24), 2, mean=-300.0)  # triton: four programs share the rows of a group
    check_prologue(place, given, torch.zeros_like(given.h), torch.full((1,), 0.05), bits=8)
    given = cases.layer_norm((3, 5, 64), mean=1e3)
    check_prologue(place, given, torch.zeros_like(given.h), bits=8, granularity="per_token")


def test_prologues_of_plain_codes(place):
    draw = random.Random(3).choice
    for make, granularity, affine in itertools.product(prologues(place.few), GRANULARITIES, (True, False)):
        if place.few and draw([True, True, False]):
            continue
        (h, prologue, x, error), bits = make(draw(place.dtypes)), draw(ACT_BITS)
        codes, scale, zero_point = place.quantize(h, prologue, bits=bits, granularity=granularity, affine=affine)
        assert codes.is_contiguous(memory_format=memory_format(x.shape))
        assert zero_point.dtype == torch.int32
        assert affine or not zero_point.any()
        values = granules(x, granularity)
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        wanted = (high - low) / (2**bits - 1) if affine else np.abs(values).max(1) / (2 ** (bits - 1) - 0.5)
        largest = wanted
        if prologue.silu and place.backend == "triton" and granularity == "per_sample":  # low may be silu's bound
            low = np.where(low < 0, np.minimum(low, -0.27846455), low)
            largest = (high - low) / (2**bits - 1) if affine else np.maximum(high, -low) / (2 ** (bits - 1) - 0.5)
        assert (scale.numpy() >= wanted * (1 - 4 * EPS32) - error.max().item()).all()
        assert (scale.numpy() <= largest * (1 + 4 * EPS32) + error.max().item()).all()
        step, zero = over_granules(scale, x), over_granules(zero_point, x)
        assert ((step * (codes.double() - zero) - x).abs() <= 0.5001 * step + error).all()


def test_the_range_behind_a_silu(place):
    """That of the elements, where some come near silu's least value."""
    h, prologue, *_ = cases.group_norm((2, 32, 16, 16), 4)
    for sign in (1, -1):
        prologue = prologue._replace(gamma=prologue.gamma * sign)
        wanted = reference.quantize(h, prologue, None, None, 8, "per_sample", 1.0, True)[1]
        torch.testing.assert_close(place.quantize(h, prologue)[1], wanted, rtol=1e-5, atol=0)


def test_further_channels(place):
    """Two tensors give what their concatenation gives, bit for bit; the border lies anywhere in a tile."""
    draw = random.Random(4).choice
    shapes = [((2, 96, 5, 7), 8, 64), ((1, 40, 13, 5), 5, 24), ((2, 15, 3, 3), 3, 7)]
    for (shape, groups, own), dtype in (
        zip(shapes, itertools.cycle(place.dtypes)) if place.few else itertools.product(shapes, place.dtypes)
    ):
        h, norm, x, _ = cases.group_norm(shape, groups, dtype)
        parts = [part.contiguous(memory_format=torch.channels_last) for part in (h[:, :own], h[:, own:])]
        for prologue, granularity in itertools.product((norm, IDENTITY), (*GRANULARITIES, "per_block")):
            scale, last = None, None
            if granularity == "per_sample":
                scale = draw([None, torch.ones(1)])
                last = draw([None, torch.ones(len(h))]) if scale is None else None
            found = []
            for of, further in ((h, None), parts):
                x_hat = x.to(dtype).contiguous(memory_format=torch.channels_last) * 0.9
                args = of, prologue._replace(further=further)
                last_absmax = None if last is None else last.clone()
                found.append([*place.quantize(*args, x_hat, scale, 4, granularity, last_absmax=last_absmax), x_hat])
                if granularity != "per_block":
                    found[-1] += place.quantize(*args, granularity=granularity)
            assert all(map(torch.equal, *found))
            assert found[1][0].is_contiguous(memory_format=torch.channels_last)


@with_nan
def test_nan_under_a_prologue(place):
    for given in (cases.group_norm((2, 8, 3, 3), 4), cases.layer_norm((2, 9, 8)), cases.geglu((2, 9, 8))):
        given.h[(1,) * given.h.ndim] = torch.nan
        x_hat = activation(given.x.shape)
        before = x_hat.clone()
        if place.raises:
            with pytest.raises(ValueError, match="quantize: x holds NaN or Inf"):
                place.quantize(given.h, given.prologue, x_hat)
            assert torch.equal(x_hat[1], before[1])
        else:
            assert place.quantize(given.h, given.prologue, x_hat)[2].isfinite().tolist() == [True, False]
