"""The raw quantising passes of the CPU library: every instruction set, odd shapes, limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.backends.cpu.cases import (
    CHANNELS,
    DTYPES,
    EPS32,
    GEGLU,
    GRANULARITIES,
    GROUP_NORM,
    HALVES,
    IDENTITY,
    ISAS,
    LAYER_NORM,
    SAMPLES,
    SHAPES,
    SMALLEST_SCALE,
    THREAD_SHAPES,
    UNAVAILABLE,
    dtype_id,
    equal,
)
from tests.ops import op_cases

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def quantize(
    x,
    isa,
    *,
    granularity="per_sample",
    act_bits=8,
    x_hat=None,
    scale=None,
    affine=False,
    clip_ratio=1.0,
    prologue=IDENTITY,
    gamma=None,
    beta=None,
    shift=None,
    num_groups=0,
    eps=0.0,
    silu=False,
):
    """codes, scale, absmax, zero_point of x [samples, rows, channels]; x_hat is changed."""
    samples, rows, width = x.shape
    channels = width // 2 if prologue == GEGLU else width
    return torch.ops.modiff_cpu.quantize(
        x, prologue, gamma, beta, shift, num_groups, eps, silu, x_hat, affine, act_bits,
        GRANULARITIES.index(granularity), clip_ratio, scale, samples, rows, channels, isa,
    )  # fmt: skip


def per_granule(values, shape):
    """Scales [granules], broadcast over [samples, rows, channels]."""
    samples, rows, _ = shape
    return values.double().view({1: (1, 1, 1), samples: (-1, 1, 1)}.get(values.numel(), (samples, rows, 1)))


def assert_updated(x_hat, old, codes, scale):
    """x_hat == old + scale * codes: at most two roundings in float32, then one to the state dtype."""
    step = per_granule(scale, codes.shape) * codes.double()
    exact = old.double() + step
    finfo = torch.finfo(x_hat.dtype)
    allowed = (
        EPS32 * (old.double().abs() + step.abs()) + finfo.eps / 2 * exact.abs() + finfo.smallest_normal * finfo.eps
    )
    assert ((x_hat.double() - exact).abs() <= allowed).all()


def oracle_residual(x, x_hat, act_bits, granularity, clip_ratio=1.0, given=None):
    """codes, scale and absmax in numpy, from `op_cases`, which the reference backend is tested with too."""
    residual = op_cases.granules(x.float() - x_hat.float(), granularity, False)
    absmax = abs(residual).max(axis=1)
    scale = op_cases.oracle_scale(absmax, act_bits, clip_ratio)
    if given is not None:
        scale[:] = given.numpy()
    codes = op_cases.oracle_codes(residual, scale, act_bits)
    return torch.from_numpy(codes).view(x.shape), torch.from_numpy(scale), torch.from_numpy(absmax)


class TestQuantizeIdentity:
    """The residual and plain forms of x itself: nothing in them depends on the order of a sum, so all is bit-exact."""

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("state_dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_residual_is_bit_exact(self, dtype, state_dtype, granularity, poisoned_empty):
        self.check_residual(SHAPES, dtype, state_dtype, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16], ids=dtype_id)
    def test_residual_is_bit_exact_with_two_threads(self, state_dtype, granularity, two_threads, poisoned_empty):
        self.check_residual(THREAD_SHAPES, torch.float32, state_dtype, granularity)

    @staticmethod
    def check_residual(shapes, dtype, state_dtype, granularity):
        for shape in shapes:
            x, old = torch.randn(shape).to(dtype), torch.randn(shape).to(state_dtype)
            codes, scale, absmax = oracle_residual(x, old, 8, granularity)
            for isa in ISAS.values():
                where = shape, isa
                x_hat = old.clone()
                got = quantize(x, isa, granularity=granularity, x_hat=x_hat)
                equal(got[1], scale, "scale", where)
                equal(got[2], absmax, "absmax", where)
                equal(got[0], codes, "codes", where)
                assert_updated(x_hat, old, codes, scale)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
    def test_plain_is_bit_exact(self, affine, dtype, granularity, poisoned_empty):
        self.check_plain(SHAPES, affine, dtype, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_affine_is_bit_exact_with_two_threads(self, granularity, two_threads, poisoned_empty):
        self.check_plain(THREAD_SHAPES, True, torch.float32, granularity)

    @staticmethod
    def check_plain(shapes, affine, dtype, granularity):
        for shape in shapes:
            x = (torch.randn(shape) + 0.7).to(dtype)
            flat = torch.from_numpy(op_cases.granules(x, granularity, False))
            lo, hi = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
            if affine:
                scale = ((hi - lo) / 255.0).clamp(min=SMALLEST_SCALE)
                zero_point = ((-lo * (1 / scale)).round() - 128).clamp(-128, 127)
            else:
                scale = torch.from_numpy(op_cases.oracle_scale(flat.abs().amax(1).numpy(), 8))
                zero_point = torch.zeros_like(scale)
            codes = ((flat * (1 / scale)[:, None]).round() + zero_point[:, None]).clamp(-128, 127)
            for isa in ISAS.values():
                got = quantize(x, isa, granularity=granularity, affine=affine)
                equal(got[1], scale, "scale", (shape, isa))
                equal(got[3], zero_point.to(torch.int32), "zero_point", (shape, isa))
                equal(got[0], codes.to(torch.int8).view(shape), "codes", (shape, isa))

    @pytest.mark.parametrize("clip_ratio", [1.0, 0.5])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("act_bits", [3, 4, 8])
    def test_all_bits_and_clipping(self, act_bits, granularity, clip_ratio, isa):
        x, old = torch.randn(3, 35, 65), torch.randn(3, 35, 65)
        codes, scale, absmax = oracle_residual(x, old, act_bits, granularity, clip_ratio)
        x_hat = old.clone()
        got = quantize(x, isa, granularity=granularity, act_bits=act_bits, clip_ratio=clip_ratio, x_hat=x_hat)
        equal(got[1], scale, "scale", isa)
        equal(got[2], absmax, "absmax", isa)
        equal(got[0], codes, "codes", isa)
        if clip_ratio < 1:
            assert (codes.min(), codes.max()) == (-(2 ** (act_bits - 1)), 2 ** (act_bits - 1) - 1)
        assert_updated(x_hat, old, codes, scale)

    @pytest.mark.parametrize("single", [True, False], ids=["one-scale", "scale-per-granule"])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("samples", SAMPLES)
    def test_given_scales(self, samples, granularity, single, isa, threads, poisoned_empty):
        shape = (samples, 35, 1030 if torch.get_num_threads() > 1 else 65)
        granules = 1 if single else {"per_tensor": 1, "per_sample": samples, "per_token": samples * 35}[granularity]
        given = torch.rand(granules) * 0.02 + 0.005
        x, old = torch.randn(shape), torch.randn(shape)
        codes, scale, absmax = oracle_residual(x, old, 8, granularity, given=given)
        x_hat = old.clone()
        got = quantize(x, isa, granularity=granularity, x_hat=x_hat, scale=given)
        equal(got[1], scale, "scale", isa)
        equal(got[2], absmax, "absmax", isa)
        equal(got[0], codes, "codes", isa)
        assert_updated(x_hat, old, codes, scale)

    def test_ties_go_to_the_even_code(self, isa):
        # With a scale of 1 the residuals n + 0.5 are exact ties.
        x = (torch.arange(-130, 130) + 0.5).view(1, 4, 65)
        codes = quantize(x, isa, x_hat=torch.zeros_like(x), scale=torch.ones(1))[0]
        equal(codes, x.round().clamp(-128, 127).to(torch.int8), "codes", isa)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_a_zero_residual_gets_the_smallest_scale(self, granularity, isa):
        x = torch.randn(2, 5, 33)
        x_hat = x.clone()
        codes, scale, absmax, _ = quantize(x, isa, granularity=granularity, x_hat=x_hat)
        assert (scale == SMALLEST_SCALE).all()
        assert not absmax.any()
        assert not codes.any()
        assert torch.equal(x_hat, x)

    def test_an_instruction_set_that_is_missing_is_refused(self):
        with pytest.raises(RuntimeError, match="instruction set 9 is not available"):
            quantize(torch.zeros(1, 1, 1), 9)


class TestStateConversion:
    """float16 and bfloat16 to float32 and back, seen through x, x_hat and absmax, against torch's conversions."""

    @pytest.mark.parametrize("channels", [1, 19], ids=["scalar", "vector-and-tail"])
    @pytest.mark.parametrize("where", ["input", "state"])
    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_every_finite_value_is_read_exactly(self, dtype, where, channels, isa):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = every[every.isfinite()].view(1, -1, 1).expand(-1, -1, channels).contiguous()
        zeros = torch.zeros_like(values)
        x, x_hat = (values, zeros) if where == "input" else (zeros, values.clone())
        absmax = quantize(x, isa, granularity="per_token", x_hat=x_hat)[2]
        equal(absmax, values[0, :, 0].float().abs(), "absmax", isa)

    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_every_finite_value_survives_an_update_by_zero(self, dtype, isa):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = every[every.isfinite()]
        values = values[: values.numel() // 19 * 19].view(1, -1, 19)
        x_hat = values.clone()
        codes = quantize(values, isa, granularity="per_token", x_hat=x_hat)[0]
        assert not codes.any()
        # Adding +0 turns -0 into +0, as IEEE arithmetic has it.
        assert torch.equal(x_hat.view(torch.int16), (values + 0.0).view(torch.int16))

    @pytest.mark.parametrize("channels", [1, 19], ids=["scalar", "vector-and-tail"])
    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_writing_rounds_as_torch_does(self, dtype, channels, isa):
        """Subnormals, the largest values, the ties between all neighbours, and the float32 values next to the ties."""
        every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = every[every.isfinite()].float()
        past_the_end = finite[-1] + (finite[-1] - finite[-2])
        ties = (finite.double() + torch.cat([finite[1:], past_the_end[None]]).double()) / 2
        ties = ties.float()
        near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, math.inf)]
        values = torch.cat([finite, ties, *near])
        # The scale is the value itself and the code 1 or -1, so exactly the value is stored; scales end at 2^-100.
        values = values[values.isfinite() & (values > SMALLEST_SCALE)]
        values = torch.cat([values, -values])
        x = values.view(1, -1, 1).expand(-1, -1, channels).contiguous()
        x_hat = torch.zeros_like(x, dtype=dtype)
        codes = quantize(x, isa, granularity="per_token", x_hat=x_hat, scale=values.abs())[0]
        assert torch.equal(codes.float(), x.sign())
        equal(x_hat.view(torch.int16), x.to(dtype).view(torch.int16), "x_hat", isa)


def assert_half_a_step(x, error, codes, scale, old, x_hat):
    """x_hat was updated by the codes and is now half a step away from the oracle x, give or take `error` in x."""
    assert_updated(x_hat, old, codes, scale)
    reached = old.double() + per_granule(scale, codes.shape) * codes.double()
    # The residual itself is rounded to float32 too.
    slack = error + EPS32 * (x.abs() + old.double().abs())
    excess = ((x - reached).abs() - per_granule(scale, codes.shape) / 2 - slack).max().item()
    assert excess <= 0, excess


def assert_scale(x, old, error, scale, granularity, act_bits=8):
    residual = (
        (x - old.double()).abs().view({"per_tensor": 1, "per_sample": len(x)}.get(granularity, x.shape[:2].numel()), -1)
    )
    expected = residual.amax(1) / (2 ** (act_bits - 1) - 0.5)
    # error may lie between the largest residuals; the division and the residual add roundings.
    slack = (error.max().item() + 4 * EPS32 * (x.abs().max() + old.double().abs().max()).item()) / 2 ** (act_bits - 1)
    assert ((scale.double() - expected).abs() <= 1.1 * slack).all()


def silu_derivative_bound(error, z):
    """Error of silu(z): its slope stays below 1.1, and exp and the reciprocal add 2e-7 of the value each."""
    return 1.1 * error + 6e-7 * z.abs()


NORM_CASES = {
    "plain": {"shape": (2, 35, 64), "groups": 8},
    "shift": {"shape": (3, 35, 64), "groups": 32, "shift": True},
    "shift-1-sample": {"shape": (1, 35, 66), "groups": 6, "shift": True},
    "8-samples": {"shape": (8, 5, 65), "groups": 13, "shift": True},
    "large-mean": {"shape": (2, 35, 64), "groups": 8, "mean": 1e3, "spread": 1e-2},
    "large-mean-1-sample": {"shape": (1, 35, 64), "groups": 8, "mean": -1e3, "spread": 1e-2, "shift": True},
    "one-row": {"shape": (2, 1, 63), "groups": 7},
    "one-group": {"shape": (2, 35, 65), "groups": 1, "shift": True},
    "groups-are-channels": {"shape": (2, 35, 65), "groups": 65},
    "wide": {"shape": (1, 35, 1030), "groups": 10},
    "wide-3-samples": {"shape": (3, 12, 1030), "groups": 10, "shift": True},
    "no-affine": {"shape": (2, 35, 64), "groups": 8, "affine": False},
}


class TestGroupNorm:
    """x = silu?(group_norm(h + shift)) against float64."""

    @pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("case", NORM_CASES)
    def test_residual_is_half_a_step_from_the_oracle(self, case, granularity, dtype, silu, poisoned_empty):
        self.check_residual(case, granularity, dtype, silu)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("case", NORM_CASES)
    def test_two_threads(self, case, granularity, two_threads, poisoned_empty):
        self.check_residual(case, granularity, torch.float32, True)

    def check_residual(self, case, granularity, dtype, silu):
        h, options, x, error = self.build(dtype=dtype, silu=silu, **NORM_CASES[case])
        for isa in ISAS.values():
            old = torch.randn(h.shape)
            x_hat = old.clone()
            codes, scale, _, _ = quantize(h, isa, granularity=granularity, x_hat=x_hat, **options)
            assert_half_a_step(x, error, codes, scale, old, x_hat)
            assert_scale(x, old, error, scale, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("case", ["shift", "shift-1-sample", "large-mean", "one-row"])
    def test_affine_codes_are_half_a_step_from_the_oracle(self, case, granularity, isa, poisoned_empty):
        h, options, x, error = self.build(dtype=torch.float32, silu=True, **NORM_CASES[case])
        codes, scale, _, zero_point = quantize(h, isa, granularity=granularity, affine=True, **options)
        step = per_granule(scale, h.shape)
        reached = step * (codes.double() - per_granule(zero_point, h.shape))
        # The top code may be clamped where both ends of the range round up: a tie of x * inv_scale, whose rounding is
        # relative to the code, so up to 2 * 255 * eps of a step.
        assert ((x - reached).abs() <= step * (0.5 + 512 * EPS32) + error).all()
        assert codes.max() > 100  # the range is used

    def test_a_constant_input_is_not_divided_by_zero(self, isa, threads):
        h = torch.full((1, 35, 16), 1e3)
        beta = torch.randn(16)
        x_hat = torch.zeros_like(h)
        _, scale, _, _ = quantize(h, isa, x_hat=x_hat, prologue=GROUP_NORM, beta=beta, num_groups=4, eps=1e-5)
        # The variance is exactly 0, so x = 1e3 * rstd - 1e3 * rstd + beta: two roundings of 1e3 * rstd remain.
        error = 2 * EPS32 * 1e3 / math.sqrt(1e-5)
        assert ((x_hat - beta).abs() <= scale / 2 + error).all()

    @staticmethod
    def build(shape, groups, dtype, silu, shift=False, mean=0.0, spread=1.0, affine=True, eps=1e-5):
        samples, rows, channels = shape
        h = (torch.randn(shape) * spread + mean).to(dtype)
        shift = torch.randn(samples, channels) * spread if shift else None
        gamma, beta = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
        options = {
            "prologue": GROUP_NORM,
            "gamma": gamma,
            "beta": beta,
            "shift": shift,
            "num_groups": groups,
            "eps": eps,
            "silu": silu,
        }
        shifted = h.double() + (0 if shift is None else shift.double()[:, None])
        grouped = shifted.view(samples, rows, groups, -1)
        centred = grouped - grouped.mean((1, 3), keepdim=True)
        rstd = (centred.square().mean((1, 3), keepdim=True) + eps).rsqrt()
        z = (centred * rstd).view(shape)
        # x = a * h + b in float32: a, b and their parts each carry roundings of the size of the large terms that
        # cancel, |h + shift| * rstd; the sums of squares in float32 put a relative rows * eps / 2 at most on rstd.
        large = ((h.double().abs() + shifted.abs()).view_as(grouped) * rstd).view(shape)
        large = large + (grouped.mean((1, 3), keepdim=True).abs() * rstd).expand_as(grouped).reshape(shape)
        error = EPS32 * (4 * large + rows * z.abs())
        if affine:
            error = error * gamma.double().abs() + 2 * EPS32 * beta.double().abs()
            z = z * gamma.double() + beta.double()
        if silu:
            return h, options, z * z.sigmoid(), silu_derivative_bound(error, z)
        return h, options, z, error


class TestLayerNorm:
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
    @pytest.mark.parametrize("mean", [0.0, 1e3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("channels", [3, 63, 64, 65, 1030])
    def test_residual_is_half_a_step_from_the_oracle(self, channels, granularity, dtype, mean, affine, poisoned_empty):
        shape, eps = (3, 5, channels), 1e-5
        h = (torch.randn(shape) + mean).to(dtype)
        gamma, beta = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
        exact = h.double()
        centred = exact - exact.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        x = centred * rstd
        # The mean is rounded to float32, and so is the row; the sums add up to sqrt(channels) roundings at random.
        error = EPS32 * (2 * exact.abs() * rstd + (8 + channels**0.5) * (1 + x.abs()))
        if affine:
            error = error * gamma.double().abs() + 2 * EPS32 * beta.double().abs()
            x = x * gamma.double() + beta.double()
        for isa in ISAS.values():
            old = torch.randn(shape)
            x_hat = old.clone()
            codes, scale, _, _ = quantize(
                h, isa, granularity=granularity, x_hat=x_hat, prologue=LAYER_NORM, gamma=gamma, beta=beta, eps=eps
            )
            assert_half_a_step(x, error, codes, scale, old, x_hat)
            assert_scale(x, old, error, scale, granularity)


class TestGeglu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_residual_is_half_a_step_from_the_oracle(self, channels, granularity, dtype, poisoned_empty):
        h = (torch.randn(3, 5, 2 * channels) * 3).to(dtype)
        value, gate = h.double().chunk(2, dim=-1)
        x = value * F.gelu(gate)
        # erf is good to 1.5e-7 in absolute terms, so gelu to half of |gate| times that, plus a few roundings.
        error = value.abs() * gate.abs() * (0.75e-7 + 4 * EPS32) + EPS32 * x.abs()
        for isa in ISAS.values():
            old = torch.randn(x.shape)
            x_hat = old.clone()
            codes, scale, _, _ = quantize(h, isa, granularity=granularity, x_hat=x_hat, prologue=GEGLU)
            assert codes.shape == x.shape
            assert_half_a_step(x, error, codes, scale, old, x_hat)
            assert_scale(x, old, error, scale, granularity)
