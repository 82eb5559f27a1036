"""The raw kernels of the CPU library, below the checks of the ops: every instruction set, odd shapes, limits."""

import itertools
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.packing import pack
from tests.ops import op_cases

UNAVAILABLE = cpu.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

BEST_ISA = 0 if UNAVAILABLE else torch.ops.modiff_cpu.isa()
HAS_VNNI = BEST_ISA >= 3
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="the integer products need AVX-512 VNNI")
ISAS = {name: isa for isa, name in enumerate(("plain", "avx2", "avx512")) if isa <= BEST_ISA}

GRANULARITIES = ("per_tensor", "per_sample", "per_token")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
CHANNELS = (1, 3, 63, 64, 65, 1030)
SAMPLES = (1, 2, 3, 8)
THREAD_SHAPES = [*itertools.product(SAMPLES, (1, 35), (65,)), *itertools.product(SAMPLES, (35,), (1030,))]
SHAPES = [
    *itertools.product(SAMPLES, (1, 5, 35), CHANNELS[:-1]),
    (1, 35, 1030),
    (2, 1, 1030),
    (3, 5, 1030),
    (8, 1, 1030),
]
EPS32 = torch.finfo(torch.float32).eps
IDENTITY, GROUP_NORM, LAYER_NORM, GEGLU = range(4)
ACCUMULATE, INITIALIZE, OUTPUT = range(3)
SMALLEST_SCALE = 2.0**-100


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(autouse=True)
def one_thread():
    """The default here: the cases with two threads ask for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    """Other cuts of the work: samples of 2^15 values and more are split into chunks of rows, products into rows and
    ranges of channels.
    """
    torch.set_num_threads(2)


@pytest.fixture(params=["one_thread", "two_threads"])
def threads(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=ISAS.values(), ids=ISAS.keys())
def isa(request):
    return request.param


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


def equal(got, expected, name, where):
    """Bit-exact; `where` tells the shape and the instruction set."""
    assert got.dtype == expected.dtype, (name, where)
    assert torch.equal(got, expected), (name, where, (got != expected).sum().item())


def test_build_info():
    info = cpu.build_info()
    assert set(info) == {"compiler", "oldest_torch"}
    assert re.fullmatch(r"[A-Za-z]+ \d+(\.\d+)+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+", info["oldest_torch"])


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


GEOMETRIES = 60


class Geometry:
    """A random convolution that has at least one output pixel."""

    def __init__(self, seed):
        choose = random.Random(seed).choice
        while True:
            self.groups = choose([1, 1, 1, 2, 3])
            self.c_in, self.c_out = (choose([1, 3, 17, 33, 64, 130]) * self.groups for _ in range(2))
            self.samples = choose([1, 2, 3, 8])
            self.size = choose([1, 2, 5, 8, 13]), choose([1, 3, 7, 16, 33])
            self.kernel = choose([1, 2, 3, 3, 4, 5]), choose([1, 2, 3, 3, 4, 5])
            self.stride = choose([1, 1, 2, 3]), choose([1, 1, 2, 3])
            self.padding = choose([0, 1, 2, 4]), choose([0, 1, 2, 5])
            self.dilation = choose([1, 1, 2, 3]), choose([1, 1, 2, 3])
            span = [
                n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(self.size, self.padding, self.dilation, self.kernel)
            ]
            if min(span) >= 0:
                break
        self.out_size = tuple(s // stride + 1 for s, stride in zip(span, self.stride))

    @property
    def weight_shape(self):
        return self.c_out, self.c_in // self.groups, *self.kernel

    @property
    def arguments(self):
        sizes = [self.samples, *self.size, self.c_in, self.c_out]
        return [*sizes, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    def apply(self, x, weight):
        return F.conv2d(x.double(), weight.double(), None, self.stride, self.padding, self.dilation, self.groups)


class Pointwise(Geometry):
    """1x1 with stride 1, where a scale per pixel is allowed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.kernel, self.stride, self.padding, self.dilation = (1, 1), (1, 1), (0, 0), (1, 1)
        self.out_size = self.size


def image(shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(memory_format=torch.channels_last)


def weight_codes(shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def pack_vnni(weight_q, groups):
    return torch.ops.modiff_cpu.pack_vnni(weight_q.permute(0, 2, 3, 1).contiguous(), groups)


def convolve(
    geometry,
    codes,
    scale,
    granularity,
    weight_q,
    weight_scale,
    epilogue,
    *,
    zero_point=None,
    bias=None,
    y_hat=None,
    skip=None,
    write_out=True,
    out_dtype=torch.float32,
):
    return torch.ops.modiff_cpu.convolve(
        codes, scale, GRANULARITIES.index(granularity), zero_point, pack_vnni(weight_q, geometry.groups), weight_scale,
        bias, epilogue, y_hat, skip, write_out, out_dtype, geometry.arguments,
    )  # fmt: skip


class Guarded:
    """A channels_last tensor in the middle of a larger buffer of a known value, at an odd address."""

    MARGIN, SENTINEL = 131, 77.0

    def __init__(self, values, dtype):
        n, c, h, w = values.shape
        self.buffer = torch.full((values.numel() + 2 * self.MARGIN,), self.SENTINEL, dtype=dtype)
        inside = self.buffer[self.MARGIN : self.MARGIN + values.numel()]
        self.tensor = inside.view(n, h, w, c).permute(0, 3, 1, 2)
        self.tensor.copy_(values)

    def assert_untouched_around(self):
        for end in (self.buffer[: self.MARGIN], self.buffer[-self.MARGIN :]):
            assert (end == self.SENTINEL).all()


def scales_for(granularity, geometry):
    rows = geometry.samples * geometry.out_size[0] * geometry.out_size[1]
    count = {"per_tensor": 1, "per_sample": geometry.samples, "per_token": rows}[granularity]
    return torch.rand(count) * 0.1 + 0.01, torch.randint(-128, 128, (count,), dtype=torch.int32)


def over_pixels(values, geometry):
    """Scales or zero points [granules], broadcast over an NCHW image."""
    shape = {1: (1, 1, 1, 1), geometry.samples: (-1, 1, 1, 1)}
    return values.double().view(shape.get(values.numel(), (geometry.samples, 1, *geometry.size)))


def assert_rounded(got, exact, terms, *dtypes):
    """got == exact up to float32 arithmetic on `terms` and one rounding to each of `dtypes`."""
    rounding = sum(torch.finfo(dtype).eps / 2 * terms for dtype in dtypes)
    smallest = sum(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in dtypes)
    # Int to float, two scales, two additions: five roundings of half an eps.
    excess = ((got.double() - exact).abs() - 2.5 * EPS32 * terms - rounding - smallest).max().item()
    assert excess <= 0, excess  # fails on NaN too


@needs_vnni
class TestConvolve:
    @pytest.mark.parametrize("seed", range(GEOMETRIES))
    def test_sums_are_exact(self, seed, poisoned_empty):
        self.check_sums(seed)

    @pytest.mark.parametrize("seed", range(1, GEOMETRIES, 3))
    def test_sums_are_exact_with_two_threads(self, seed, two_threads, poisoned_empty):
        self.check_sums(seed)

    @staticmethod
    def check_sums(seed):
        geometry = Geometry(seed)
        codes, weight_q = image((geometry.samples, geometry.c_in, *geometry.size)), weight_codes(geometry.weight_shape)
        ones = torch.ones(geometry.c_out)
        for granularity in ("per_tensor", "per_sample"):
            scale, zero_point = scales_for(granularity, geometry)
            for zero in (None, zero_point):
                # Padding is x = 0, whose code is the zero point: conv2d pads the shifted codes with 0.
                shifted = codes.double() - (0 if zero is None else over_pixels(zero, geometry))
                out = convolve(
                    geometry, codes, torch.ones_like(scale), granularity, weight_q, ones, OUTPUT, zero_point=zero
                )
                assert out.is_contiguous(memory_format=torch.channels_last)
                equal(out, geometry.apply(shifted, weight_q).float(), "sums", granularity)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("state_dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("seed", range(0, GEOMETRIES, 5))
    def test_epilogues(self, seed, state_dtype, dtype, poisoned_empty):
        geometry = Geometry(seed)
        self.check_epilogues(geometry, "per_sample" if seed % 2 else "per_tensor", state_dtype, dtype)

    @pytest.mark.parametrize("seed", range(2, GEOMETRIES, 9))
    def test_epilogues_with_two_threads(self, seed, two_threads, poisoned_empty):
        self.check_epilogues(Geometry(seed), "per_sample", torch.float16, torch.float32)

    @pytest.mark.parametrize("state_dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("seed", range(6))
    def test_epilogues_with_a_scale_per_pixel(self, seed, state_dtype, poisoned_empty):
        self.check_epilogues(Pointwise(seed), "per_token", state_dtype, torch.float32)

    @staticmethod
    def check_epilogues(geometry, granularity, state_dtype, dtype):
        codes, weight_q = image((geometry.samples, geometry.c_in, *geometry.size)), weight_codes(geometry.weight_shape)
        weight_scale, bias = torch.rand(geometry.c_out) * 0.01 + 1e-3, torch.randn(geometry.c_out)
        scale, zero_point = scales_for(granularity, geometry)
        factor = over_pixels(scale, geometry) * weight_scale.double().view(1, -1, 1, 1)
        product = geometry.apply(codes, weight_q) * factor
        offset = bias.double().view(1, -1, 1, 1)
        old = torch.randn(product.shape).to(state_dtype)
        skip = torch.randn(product.shape).to(dtype).to(memory_format=torch.channels_last)
        arguments = geometry, codes, scale, granularity, weight_q, weight_scale

        for epilogue, start, before in ((ACCUMULATE, old.double(), old), (INITIALIZE, offset, old * torch.nan)):
            exact = product + start
            terms = product.abs() + start.abs()
            for skipped, write_out in ((None, True), (skip, True), (None, False)):
                y_hat = Guarded(before, state_dtype)
                out = convolve(
                    *arguments,
                    epilogue,
                    bias=None if epilogue == ACCUMULATE else bias,
                    y_hat=y_hat.tensor,
                    skip=skipped,
                    write_out=write_out,
                    out_dtype=dtype,
                )
                assert_rounded(y_hat.tensor, exact, terms, state_dtype)
                y_hat.assert_untouched_around()
                assert out.dtype == dtype
                if not write_out:
                    assert out.numel() == 0
                    continue
                added = torch.zeros(()) if skipped is None else skipped
                assert_rounded(out, exact + added.double(), terms + added.double().abs(), state_dtype, dtype)

        shifted = codes.double() - over_pixels(zero_point, geometry)
        product = geometry.apply(shifted, weight_q) * factor
        for skipped, added in ((None, None), (skip, bias)):
            out = convolve(*arguments, OUTPUT, zero_point=zero_point, bias=added, skip=skipped, out_dtype=dtype)
            extra = torch.zeros((), dtype=torch.double) if added is None else offset
            more = torch.zeros((), dtype=torch.double) if skipped is None else skipped.double()
            assert_rounded(out, product + extra + more, product.abs() + extra.abs() + more.abs(), dtype)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (3, 300, 17)], ids=str)
    @pytest.mark.parametrize("c_out", [1, 17, 130])
    def test_rows_of_a_linear(self, shape, c_out, granularity, threads, poisoned_empty):
        rows = math.prod(shape[:-1])
        samples = shape[0]
        codes = torch.randint(-128, 128, shape, dtype=torch.int8)
        weight_q = weight_codes((c_out, shape[-1], 1, 1))
        count = {"per_tensor": 1, "per_sample": samples, "per_token": rows}[granularity]
        zero_point = torch.randint(-128, 128, (count,), dtype=torch.int32)
        spread = zero_point.repeat_interleave(rows // count).view(-1, 1)
        out = torch.ops.modiff_cpu.convolve(
            codes, torch.ones(count), GRANULARITIES.index(granularity), zero_point, pack_vnni(weight_q, 1),
            torch.ones(c_out), None, OUTPUT, None, None, True, torch.float32,
            [samples, rows // samples, 1, shape[-1], c_out, 1, 1, 1, 1, 0, 0, 1, 1, 1],
        )  # fmt: skip
        expected = (codes.view(rows, -1).double() - spread) @ weight_q.view(c_out, -1).double().T
        assert out.shape == (*shape[:-1], c_out)
        equal(out.view(rows, c_out), expected.float(), "sums", granularity)

    @pytest.mark.parametrize("zero_point", [None, -128, 127])
    @pytest.mark.parametrize("weight_value", [127, -127])
    @pytest.mark.parametrize("code", [-128, 127])
    def test_largest_magnitudes_are_exact(self, code, weight_value, zero_point, poisoned_empty):
        geometry = Geometry(0)
        geometry.groups, geometry.samples, geometry.c_in, geometry.c_out = 1, 2, 512, 20
        geometry.size = geometry.out_size = (4, 3)
        geometry.kernel, geometry.stride, geometry.padding, geometry.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        codes = torch.full((2, 512, 4, 3), code, dtype=torch.int8).to(memory_format=torch.channels_last)
        weight_q = torch.full((20, 512, 3, 3), weight_value, dtype=torch.int8)
        zero = None if zero_point is None else torch.full((2,), zero_point, dtype=torch.int32)
        out = convolve(geometry, codes, torch.ones(2), "per_sample", weight_q, torch.ones(20), OUTPUT, zero_point=zero)
        exact = geometry.apply(codes.double() - (zero_point or 0), weight_q)
        largest = abs(code - (zero_point or 0)) * 127 * 512 * 9
        assert exact.abs().max() == largest
        # Beyond 2^24 the int32 sum is rounded once, when it becomes a float.
        equal(out, exact.float(), "sums", largest)

    @pytest.mark.parametrize("groups", [1, 2, 3])
    @pytest.mark.parametrize(("n", "c"), [(1, 1), (3, 17), (16, 4), (17, 33), (33, 64), (130, 5)])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
    def test_packing_round_trip(self, kernel, n, c, groups, poisoned_empty):
        weight_q = torch.randint(-128, 128, (n * groups, *kernel, c), dtype=torch.int8)
        packed = torch.ops.modiff_cpu.pack_vnni(weight_q, groups)
        equal(torch.ops.modiff_cpu.unpack_vnni(packed, list(weight_q.shape), groups), weight_q, "weight", groups)
        scale = torch.rand(n * groups)
        weight = torch.ops.modiff_cpu.dequantize_vnni(packed, scale, list(weight_q.shape), groups)
        equal(weight, scale[:, None, None, None] * weight_q, "dequantised weight", groups)
        # Panels of 16 output channels by 4 input channels, padded with zeros, then an int32 sum per channel.
        panels = groups * math.ceil(n / 16)
        assert packed.numel() == panels * 16 * (math.prod(kernel) * math.ceil(c / 4) * 4 + 4)
        sums = packed[-panels * 16 * 4 :].view(torch.int32).view(groups, -1)
        equal(sums[:, :n].flatten(), weight_q.flatten(1).sum(1, dtype=torch.int32), "sums", groups)
        assert not sums[:, n:].any()

    def test_a_weight_of_another_shape_is_refused(self):
        geometry = Pointwise(0)
        codes = image((geometry.samples, geometry.c_in, *geometry.size))
        weight_q = weight_codes((geometry.c_out + 16, geometry.c_in // geometry.groups, 1, 1))
        geometry.groups = 1
        with pytest.raises(RuntimeError, match="layout vnni_v1"):
            convolve(geometry, codes, torch.ones(1), "per_tensor", weight_q, torch.ones(geometry.c_out), OUTPUT)

    def test_dequantisation_refuses_what_does_not_fit(self):
        packed = torch.ops.modiff_cpu.pack_vnni(torch.ones(5, 3, 3, 4, dtype=torch.int8), 1)
        for sizes, scales, message in (([5, 3, 3, 9], 5, "bytes expected"), ([5, 3, 3, 4], 4, "per output channel")):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.modiff_cpu.dequantize_vnni(packed, torch.ones(scales), sizes, 1)


QUANTISING_OPS = {
    "quantize_residual": lambda x, x_hat: (x, x_hat, None, 8, "per_sample"),
    "group_norm_silu_quantize_residual": lambda x, x_hat: (
        x, None, None, None, 4, 1e-5, True, x_hat, None, 8, "per_sample"
    ),
    "layer_norm_quantize_residual": lambda x, x_hat: (x, None, None, 1e-5, x_hat, None, 8, "per_sample"),
    "geglu_quantize_residual": lambda x, x_hat: (x, x_hat[..., :8].contiguous(), None, 8, "per_sample"),
    "quantize_activation": lambda x, x_hat: (x, 8, "per_sample"),
    "group_norm_silu_quantize_activation": lambda x, x_hat: (x, None, None, None, 4, 1e-5, True, 8, "per_sample"),
    "layer_norm_quantize_activation": lambda x, x_hat: (x, None, None, 1e-5, 8, "per_sample"),
    "geglu_quantize_activation": lambda x, x_hat: (x, 8, "per_sample"),
}  # fmt: skip


PRODUCTS = ("accumulate", "initialize", "modulated", "quantized")
REFUSED = {
    "taps": ({"kernel_size": (5, 10)}, r"kernel_size \(5, 10\) has more than 49 taps"),
    "overflow": ({"k": 65537}, "k=65537 products can overflow int32; at most 65536"),
    "group-size": ({"group_size": 32}, "group_size 32: only one weight scale per output channel"),
    "kpack": ({"layout": "kpack_v1"}, "layout kpack_v1 is not vnni_v1"),
    "per-token": ({"granularity": "per_token"}, "per_token scales do not factor out"),
}


class TestBackendErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("op", QUANTISING_OPS)
    def test_nan_and_inf_are_reported_with_the_name_of_the_op(self, op, value, threads):
        for position in (0, 7, -1):
            x, x_hat = torch.randn(1, 35, 16), torch.randn(1, 35, 16)
            x.view(-1)[position] = value
            before = x_hat.clone()
            with pytest.raises(ValueError, match=rf"^{op}: .* holds NaN or Inf"):
                getattr(ops, op)(*QUANTISING_OPS[op](x, x_hat), backend="cpu")
            assert torch.equal(x_hat, before)

    @needs_vnni
    @pytest.mark.parametrize("first_step_bits", [0, 8])
    @pytest.mark.parametrize("op", ["modulated_linear", "initialize_linear"])
    def test_nan_and_inf_are_reported_by_products(self, op, first_step_bits):
        x, x_hat, y_hat = torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 4)
        x[1, 3] = math.nan
        weight = pack_vnni(weight_codes((4, 8, 1, 1)), 1), torch.ones(4)
        arguments = {
            "modulated_linear": (x, x_hat, None, *weight, y_hat, None, 8, "per_tensor", 1.0, 8, -1, cpu.VNNI_V1),
            "initialize_linear": (x, x_hat, y_hat, *weight, None, None, 8, -1, cpu.VNNI_V1, first_step_bits),
        }[op]
        with pytest.raises(ValueError, match=rf"^{op}: .* holds NaN or Inf"):
            getattr(ops, op)(*arguments, backend="cpu")

    @needs_vnni
    @pytest.mark.parametrize("product", PRODUCTS)
    @pytest.mark.parametrize("why", REFUSED)
    def test_a_named_backend_refuses_with_the_reason(self, why, product, fresh_dispatch):
        sizes = {
            "m": 64,
            "n": 16,
            "k": 64 * 9,
            "weight_bits": 8,
            "group_size": -1,
            "granularity": "per_sample",
            "layout": cpu.VNNI_V1,
        }
        conv = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        changes, reason = REFUSED[why]
        common = {
            "op": f"{product}_conv2d",
            "device_type": "cpu",
            "capability": None,
            "dtype": torch.float32,
            "state_dtype": torch.float32,
        }
        assert dispatch.select(Problem(**common, **{**sizes, **conv}), "cpu").backend == "cpu"
        with pytest.raises(ops.BackendUnavailable, match=reason):
            dispatch.select(Problem(**common, **{**sizes, **conv, **changes}), "cpu")

    @needs_vnni
    def test_an_op_refuses_the_portable_layout_before_it_changes_anything(self):
        weight_q = weight_codes((4, 8))
        x, x_hat, y_hat = torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 4)
        with pytest.raises(ops.BackendUnavailable, match="layout kpack_v1 is not vnni_v1; prepare the weight"):
            ops.modulated_linear(
                x, x_hat, None, pack(weight_q, 8), torch.ones(4), y_hat, None, 8, "per_sample", 1.0, 8, -1, "kpack_v1",
                backend="cpu",
            )  # fmt: skip
        assert not x_hat.any()
        assert not y_hat.any()
