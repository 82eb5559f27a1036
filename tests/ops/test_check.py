"""Arguments that do not fit: the error names the op, what was given and what is allowed, and nothing is mutated."""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.ops import Prologue, Window
from tests.ops.arguments import WINDOW, calls, changed, tensors, zeros

NAN = float("nan")
FLAT = torch.randn(3, 10, 4).transpose(1, 2)
ANY_BITS = "is not supported; choose one of 3, 4,"
VALUE, TYPE = ValueError, TypeError
# fmt: off
QUANTIZE = [
    ("residual plain update", "bits", 5, VALUE, f"bits=5 {ANY_BITS} 7, 8"),
    ("residual plain update", "granularity", "per_pixel", VALUE, r"'per_pixel' is not known; choose one of"),
    ("residual update", "clip_ratio", 0.0, VALUE, r"clip_ratio=0\.0 is not allowed"),
    ("plain", "granularity", "per_block", VALUE, r"'per_block' is for residuals only; choose 'per_sample'"),
    ("plain", "scale", torch.ones(3), VALUE, r"a scale is for residuals only; without x_hat leave it None"),
    ("residual-image", "granularity", "per_block", VALUE, r"per_block.* finds its scales itself; leave scale None"),
    ("residual update", "scale", torch.ones(5), VALUE, r"scale has shape \(5,\).* of length 3 .*or 1"),
    ("residual-group_norm", "scale", torch.ones(3), VALUE, r"scale and last_absmax are given"),
    ("residual update", "last_absmax", torch.ones(1), VALUE, r"last_absmax has shape \(1,\).* of length 3 "),
    ("plain", "last_absmax", torch.ones(3), VALUE, r"a scale is for residuals only"),
    ("residual-group_norm", "granularity", "per_block", VALUE, r"per_block.* finds its scales itself"),
    ("residual", "scale", torch.ones(3).double(), TYPE, r"scale is torch\.float64; it must be torch\.float32"),
    ("residual plain update", "h", torch.randn(3, 4, 10).double(), TYPE, r"h is torch\.float64; allowed are float32"),
    ("residual plain update", "h", FLAT, VALUE, r"h is not contiguous.*call \.contiguous\(\) first"),
    ("residual plain", "h", torch.randn(10), VALUE, r"h has 1 dimensions"),
    ("plain", "h", torch.randn(0, 4, 10), VALUE, r"h is empty"),
    ("residual-image plain-image", "h", torch.randn(2, 4, 5, 5), VALUE, r"h is not channels_last.*convert it with"),
    ("residual-geglu plain-geglu", "h", torch.randn(3, 4, 21), VALUE, r"expected \[\.\.\., 2K\]"),
    ("residual update", "x_hat", torch.zeros(3, 4, 9), VALUE, r"x_hat has shape \(3, 4, 9\); it must be \(3, 4, 10\)"),
    ("residual", "x_hat", zeros(3, 10, 4).transpose(1, 2), VALUE, r"x_hat is not contiguous"),
    ("residual update", "x_hat", zeros(3, 4, 10).double(), TYPE, r"x_hat is torch\.float64"),
    ("residual", "x_hat", torch.zeros(3, 4, 10, device="meta"), VALUE, r"x_hat is on meta, the first argument on cpu"),
    ("residual-image", "x_hat", torch.zeros(2, 4, 5, 5), VALUE, r"x_hat is not channels_last"),
    ("plain", "prologue", Prologue("batch_norm"), VALUE, r"'batch_norm' is not known; choose one of 'identity'"),
    ("plain", "prologue", Prologue("group_norm", num_groups=3), VALUE, r"num_groups=3 does not divide the 10"),
    ("residual-group_norm", "prologue.gamma", torch.ones(7), VALUE, r"gamma has .*\(7,\).*vector of length 10"),
    ("residual-layer_norm", "prologue.beta", torch.ones(7), VALUE, r"beta has .*vector of length 10"),
    ("residual-group_norm", "prologue.shift", torch.ones(3, 7), VALUE, r"shift has .*\(3, 7\).*\(3, 10\)"),
    ("residual-group_norm", "prologue.shift", torch.ones(10, 3).T, VALUE, r"shift has .*contiguous rows"),
    ("residual-layer_norm", "prologue.shift", torch.ones(3, 10), VALUE, r"'layer_norm' takes no shift"),
    ("residual-further", "prologue.further", torch.ones(2, 3, 5, 4), VALUE, r"further has .*must be \(2, 3, 5, 5\)"),
    ("residual-further", "prologue.further", torch.ones(2, 3, 5, 5).half(), TYPE, r"further is .*float16; it must be"),
    ("residual-layer_norm", "prologue.further", torch.ones(3, 4, 3), VALUE, r"takes no further channels"),
    ("residual-layer_norm", "prologue.eps", -1e-5, VALUE, r"eps=-1e-05 is not allowed"),
]
Y_MUST = r"it must be \(3, 4, 6\)"
PRODUCT = [
    ("accumulate output", "codes", torch.zeros(3, 4, 10), TYPE, r"codes is torch\.float32; it must be torch\.int8"),
    ("output-image", "codes", torch.zeros(2, 4, 5, 5).to(torch.int8), VALUE, r"codes is not channels_last"),
    ("accumulate", "scale", torch.ones(5), VALUE, r"scale has shape \(5,\).*divide the 12 rows of codes"),
    ("accumulate-image", "scale", torch.ones(5), VALUE, r"1-D of length 1 or 2 or 50"),
    ("output", "zero_point", torch.zeros(3), TYPE, r"zero_point is torch\.float32; it must be torch\.int32"),
    ("output", "zero_point", zeros(1, dtype=torch.int32), VALUE, r"zero_point has .*length 3"),
    ("accumulate", "zero_point", zeros(3, dtype=torch.int32), VALUE, r"zero_point does not go with y_hat"),
    ("accumulate", "bias", torch.zeros(6), VALUE, r"bias does not go with y_hat, which holds the bias"),
    ("output", "bias", torch.zeros(7), VALUE, r"bias has .*vector of length 6"),
    ("output", "write_out", False, VALUE, r"write_out=False leaves nothing without y_hat"),
    ("accumulate update", "y_hat", torch.zeros(3, 4, 7), VALUE, rf"y_hat has shape \(3, 4, 7\); {Y_MUST}"),
    ("accumulate update", "y_hat", zeros(3, 6, 4).transpose(1, 2), VALUE, r"y_hat is not contiguous"),
    ("accumulate-image update-image", "y_hat", torch.zeros(2, 6, 5, 5), VALUE, r"y_hat is not channels_last"),
    ("accumulate output update", "skip", torch.zeros(3, 4, 7), VALUE, rf"skip has shape \(3, 4, 7\); {Y_MUST}"),
    ("accumulate output update", "skip", zeros(3, 4, 6).half(), TYPE, r"skip is .*float16; .* torch\.float32"),
    ("output without-out update", "out_dtype", torch.int8, TYPE, r"out_dtype=torch\.int8 is not allowed"),
    ("output accumulate output-image", "weight.geglu", True, VALUE, r"geglu is of a Linear.* leave geglu False"),
    ("output update", "weight.bits", 7, VALUE, f"weight.bits=7 {ANY_BITS} 8"),
    ("output update", "weight.group_size", 0, VALUE, r"group_size=0 is not allowed"),
    ("output update", "weight.group_size", 4, VALUE, r"group_size=4 with k=10 needs a contiguous \[N, 3\]"),
    ("output update", "weight.scale", torch.ones(6).half(), TYPE, r"weight.scale is torch\.float16"),
    ("output update", "weight.scale", torch.ones(6, 2), VALUE, r"weight.scale has shape \(6, 2\)"),
    ("output update", "weight.packed", zeros(6, 4, dtype=torch.uint8), VALUE, r"weight has shape \(6, 4\).*\(6, 5\)"),
    ("output update", "weight.layout", "kpack_v9", ops.BackendUnavailable,
     r"reads weights in layout 'kpack_v1', not 'kpack_v9'"),
    ("output-image update-image", "window", Window((2, 2)), VALUE, r"the packed weight has .*k=16 needs"),
    ("output-image update-image", "window", WINDOW._replace(stride=(0, 1)), VALUE, r"stride=\[0, 1\] is not allowed"),
    ("output-image update-image", "window", WINDOW._replace(padding=(-1, 1)), VALUE, r"padding=\[-1, 1\].* at least 0"),
    ("output-image", "window", WINDOW._replace(groups=3), VALUE, r"groups=3 does not divide the 4 input channels"),
    ("output-image", "window", Window((3, 3), dilation=(3, 1)), VALUE, r"an input of \(5, 5\) is too small for"),
    ("output", "window", WINDOW, VALUE, r"codes has 3 dimensions .*expected an image"),
    ("output-image", "window", None, VALUE, r"codes has 4 dimensions .*flatten it first"),
]
OTHERS = [
    ("attention", "heads", 3, VALUE, "heads=3 does not divide the 10 columns"),
    ("attention", "k", torch.randn(3, 7, 12), VALUE, r"both must be \[3, tokens, 10\]"),
    ("attention", "q", torch.randn(3, 10, 4).transpose(1, 2), VALUE, "contiguous rows"),
    ("attention", "v", torch.randn(3, 7, 10).double(), TYPE, r"v is torch\.float64"),
    ("attention", "score_scale", NAN, VALUE, "score_scale=nan is not allowed"),
]
# fmt: on


@pytest.mark.parametrize(("forms", "name", "value", "error", "message"), QUANTIZE + PRODUCT + OTHERS)
def test_what_does_not_fit_is_refused(forms, name, value, error, message):
    for form in forms.split():
        op, arguments = calls()[form]
        arguments = changed(arguments, {name: value})
        before = {key: t.clone() for key, t in tensors(arguments).items()}
        with pytest.raises(error, match=message) as raised:
            getattr(ops, op)(**arguments, backend="reference")
        named = op in str(raised.value) or (op == "modulate" and str(raised.value).startswith("quantize: "))
        assert named, "which op?"
        for key, t in tensors(arguments).items():
            assert t.device.type == "meta" or torch.equal(t, before[key]), f"{key} was changed"


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf")])
def test_the_reference_refuses_unusable_scales(value):
    x_hat = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="not positive and finite; calibrate it again"):
        ops.quantize(torch.randn(2, 4, 8), x_hat=x_hat, scale=torch.tensor([value]), backend="reference")
    assert not x_hat.any()


@pytest.mark.parametrize("backend", ["gpu", "", "Reference"])
def test_unknown_backend(backend):
    names = "auto, cpu, triton, cuda, reference"
    with pytest.raises(ValueError, match=f"backend='{backend}' is not known; choose one of {names}"):
        ops.quantize(torch.randn(2, 4), backend=backend)


def test_wrong_calls_raise_type_errors():
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match="missing a required argument: 'weight'"):
        ops.product(x, torch.ones(1), None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'act_bits'"):
        ops.quantize(x, act_bits=4)
    with pytest.raises(TypeError, match="multiple values for argument 'h'"):
        ops.quantize(x, h=x)
    with pytest.raises(TypeError, match="too many positional arguments"):
        ops.attention(x, x, x, 1, 1.0, "auto", 1)
    with pytest.raises((TypeError, RuntimeError), match="quantize"):
        ops.quantize(x, x_hat=3)
