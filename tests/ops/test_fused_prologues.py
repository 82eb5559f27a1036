"""GroupNorm+SiLU, LayerNorm and GEGLU in front of the two quantisers.

The float32 norms of two backends differ in their last bits, so a value close to a rounding boundary may get another
code. The rest is tested exactly: codes, scales and state fit together, and the quantised value lies within half a step
(and a little) of the float64 oracle.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.ops.op_cases import DTYPES, GRANULARITIES, activation, is_image, memory_format_of, per_row, run

pytestmark = pytest.mark.usefixtures("poisoned_empty")

GROUP_NORM_SHAPES = [
    ((2, 8, 4, 4), 4),
    ((1, 1, 1, 1), 1),
    ((2, 6, 5, 3), 6),
    ((2, 63, 4, 4), 7),
    ((2, 96, 8, 8), 32),
    ((2, 9, 12), 3),
    ((2, 64, 64), 32),
]


class GroupNorm:
    name = "group_norm_silu"

    def __init__(self, shape, groups, dtype=torch.float32, silu=True, shift=True, affine=True, eps=1e-5):
        self.h = activation(shape, dtype) + 0.5
        channels = shape[1] if is_image(shape) else shape[-1]
        self.shift = torch.randn(shape[0], channels).to(dtype) if shift else None
        self.gamma = torch.rand(channels).to(dtype) + 0.5 if affine else None
        self.beta = torch.randn(channels).to(dtype) if affine else None
        self.arguments = (self.shift, self.gamma, self.beta, groups, eps, silu)
        self.image = is_image(shape)

    def x(self):
        h = self.h.double() if self.image else self.h.double().transpose(1, 2)
        shift, gamma, beta = (None if t is None else t.double() for t in self.arguments[:3])
        if shift is not None:
            h = h + shift.view(*shift.shape, *[1] * (h.ndim - 2))
        x = torch.group_norm(h.contiguous(), self.arguments[3], gamma, beta, self.arguments[4])
        x = F.silu(x) if self.arguments[5] else x
        return x if self.image else x.transpose(1, 2)


class LayerNorm:
    name = "layer_norm"
    image = False

    def __init__(self, shape, dtype=torch.float32, affine=True, eps=1e-5):
        self.h = activation(shape, dtype, image=False) + 0.5
        self.gamma = torch.rand(shape[-1]).to(dtype) + 0.5 if affine else None
        self.beta = torch.randn(shape[-1]).to(dtype) if affine else None
        self.arguments = (self.gamma, self.beta, eps)

    def x(self):
        gamma, beta = (None if t is None else t.double() for t in self.arguments[:2])
        return F.layer_norm(self.h.double(), self.h.shape[-1:], gamma, beta, self.arguments[2])


class Geglu:
    name = "geglu"
    image = False
    arguments = ()

    def __init__(self, shape, dtype=torch.float32):
        self.h = activation((*shape[:-1], 2 * shape[-1]), dtype, image=False)

    def x(self):
        values, gates = self.h.double().chunk(2, dim=-1)
        return values * F.gelu(gates)


FORMATS = [(3, "per_sample"), (4, "per_tensor"), (4, "per_token"), (8, "per_sample")]


def prologues(dtype=torch.float32):
    cases = [GroupNorm(shape, groups, dtype) for shape, groups in GROUP_NORM_SHAPES]
    cases += [LayerNorm(shape, dtype) for shape in [(1, 1), (2, 7), (3, 5, 63), (2, 16, 320)]]
    return cases + [Geglu(shape, dtype) for shape in [(1, 1), (2, 7), (3, 5, 63), (2, 16, 128)]]


PROLOGUES = {f"{case.name}-{'x'.join(map(str, case.h.shape))}": i for i, case in enumerate(prologues())}


def check_residual(backend, case, state_dtype, bits, granularity, scale=None, clip_ratio=1.0):
    x = case.x()
    x_hat = (x + 0.2 * torch.randn_like(x)).to(state_dtype).contiguous(memory_format=memory_format_of(case.image))
    before, h_before = x_hat.clone(), case.h.clone()
    arguments = (x_hat, scale, bits, granularity, clip_ratio)

    residual_q, used, absmax = run(
        f"{case.name}_quantize_residual", case.h, *case.arguments, *arguments, backend=backend
    )

    assert torch.equal(case.h, h_before)
    assert residual_q.dtype == torch.int8
    assert residual_q.shape == x.shape
    assert residual_q.is_contiguous(memory_format=memory_format_of(case.image))
    count = {"per_tensor": 1, "per_sample": x.shape[0], "per_token": x.numel() // x.shape[1 if case.image else -1]}
    assert used.shape == absmax.shape == (count[granularity],)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= residual_q.min()
    assert residual_q.max() <= high
    step = per_row(used.double(), x.shape, case.image)
    eps = torch.finfo(state_dtype).eps
    moved = before.double() + step * residual_q
    assert ((x_hat.double() - moved).abs() <= eps * (moved.abs() + (step * residual_q).abs() + step)).all()
    exact = x - before.double()
    limit = per_row(absmax.double(), x.shape, case.image)
    noise = 2e-5 * (1 + x.abs() + limit)
    assert (exact.abs() <= limit + noise).all()
    if scale is None:
        torch.testing.assert_close(used, (clip_ratio * absmax / (high + 0.5)).clamp_min(2.0**-100), rtol=1e-6, atol=0)
    else:
        assert torch.equal(used, scale.expand_as(used))
    wanted = (exact / step).clamp(low, high)
    assert ((residual_q - wanted).abs() * step <= step * 0.5001 + noise).all()


@pytest.mark.parametrize(("bits", "granularity"), FORMATS)
@pytest.mark.parametrize("case", PROLOGUES.values(), ids=PROLOGUES.keys())
def test_residual(backend, case, bits, granularity):
    check_residual(backend, prologues()[case], torch.float32, bits, granularity)


@pytest.mark.parametrize(("dtype", "state_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: GroupNorm((2, 32, 5, 4), 8, dtype),
        lambda dtype: LayerNorm((2, 9, 40), dtype),
        lambda dtype: Geglu((2, 9, 40), dtype),
    ],
    ids=["group_norm", "layer_norm", "geglu"],
)
def test_residual_dtypes(backend, make, dtype, state_dtype):
    check_residual(backend, make(dtype), state_dtype, 4, "per_sample")


@pytest.mark.parametrize(("silu", "shift", "affine"), list(itertools.product([True, False], repeat=3)))
def test_group_norm_options(backend, silu, shift, affine):
    for shape, groups in [((2, 24, 4, 4), 4), ((2, 5, 24), 4)]:
        case = GroupNorm(shape, groups, silu=silu, shift=shift, affine=affine, eps=1e-3)
        check_residual(backend, case, torch.float32, 8, "per_sample")


def test_layer_norm_without_weights(backend):
    check_residual(backend, LayerNorm((2, 5, 24), affine=False, eps=1e-3), torch.float32, 8, "per_token")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "make", [lambda: GroupNorm((2, 8, 3, 3), 4), lambda: LayerNorm((2, 9, 8)), lambda: Geglu((2, 9, 8))]
)
def test_given_scale_and_clip_ratio(backend, make, granularity):
    check_residual(backend, make(), torch.float32, 4, granularity, clip_ratio=0.8)
    check_residual(backend, make(), torch.float32, 4, granularity, scale=torch.tensor([0.03]))
    count = {"per_tensor": 1, "per_sample": 2, "per_token": 18}[granularity]
    check_residual(backend, make(), torch.float32, 4, granularity, scale=torch.rand(count) * 0.05 + 0.01)


@pytest.mark.parametrize(("granularity", "affine"), [("per_tensor", True), ("per_sample", True), ("per_token", False)])
@pytest.mark.parametrize("case", PROLOGUES.values(), ids=PROLOGUES.keys())
def test_activation(backend, case, granularity, affine):
    case = prologues()[case]
    x = case.x()
    bits = 8
    arguments = (case.h, *case.arguments, bits, granularity, affine)
    x_q, scale, zero_point = run(f"{case.name}_quantize_activation", *arguments, backend=backend)
    assert x_q.dtype == torch.int8
    assert x_q.shape == x.shape
    assert x_q.is_contiguous(memory_format=memory_format_of(case.image))
    assert zero_point.dtype == torch.int32
    assert affine or not zero_point.any()
    step, zero = (per_row(t.double(), x.shape, case.image) for t in (scale, zero_point))
    error = (step * (x_q.double() - zero) - x).abs()
    assert (error <= step * 0.5001 + 2e-5 * (1 + x.abs())).all()


@pytest.mark.parametrize(
    "make", [lambda: GroupNorm((2, 8, 3, 3), 4), lambda: LayerNorm((2, 9, 8)), lambda: Geglu((2, 9, 8))]
)
def test_non_finite_input_raises_before_the_state_changes(backend, make):
    case = make()
    case.h[(0,) * case.h.ndim] = torch.nan
    x_hat = torch.zeros(case.x().shape).to(memory_format=memory_format_of(case.image))
    with pytest.raises(ValueError, match=f"{case.name}_quantize_residual: x holds NaN or Inf"):
        run(f"{case.name}_quantize_residual", case.h, *case.arguments, x_hat, None, 4, "per_sample", backend=backend)
    assert not (x_hat if backend == "reference" else x_hat[0]).any()
    with pytest.raises(ValueError, match=f"{case.name}_quantize_activation: x holds NaN or Inf"):
        run(f"{case.name}_quantize_activation", case.h, *case.arguments, 4, "per_sample", backend=backend)
