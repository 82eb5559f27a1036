"""Arguments that do not fit: the error says what was given and what is allowed, and nothing is mutated."""

import pytest
import torch

from modiff_kernels import ops

CHANNELS_LAST = torch.channels_last


def image(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=CHANNELS_LAST)


def linear_arguments():
    """Valid arguments by name for every op, Linear form."""
    weight_q = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
    packed, weight_scale = ops.pack_weight(weight_q, 4), torch.ones(6)
    weight = {
        "weight_packed": packed,
        "weight_scale": weight_scale,
        "weight_bits": 4,
        "group_size": -1,
        "layout": "kpack_v1",
    }
    x, x_hat = torch.randn(3, 4, 10), torch.zeros(3, 4, 10)
    y_hat, skip = torch.zeros(3, 4, 6), torch.randn(3, 4, 6)
    codes = {"scale": torch.ones(3), "skip": skip, "out_dtype": torch.float32}
    quantise = {"scale": None, "act_bits": 4, "granularity": "per_sample", "clip_ratio": 1.0}
    norm = {"gamma": torch.ones(10), "beta": torch.zeros(10), "eps": 1e-5}
    state = {"x_hat": x_hat, "y_hat": y_hat}
    residual_q = torch.zeros(3, 4, 10, dtype=torch.int8)
    plain = {"act_bits": 4, "granularity": "per_sample", "affine": True}
    group_norm = {"h": x, "shift": torch.randn(3, 10), "num_groups": 5, "silu": True, **norm}
    return {
        "quantize_residual": {"x": x, "x_hat": x_hat, **quantise},
        "group_norm_silu_quantize_residual": {**group_norm, "x_hat": x_hat, **quantise},
        "layer_norm_quantize_residual": {"h": x, **norm, "x_hat": x_hat, **quantise},
        "geglu_quantize_residual": {"h": torch.randn(3, 4, 20), "x_hat": x_hat, **quantise},
        "quantize_activation": {"x": x, **plain},
        "group_norm_silu_quantize_activation": {**group_norm, **plain},
        "layer_norm_quantize_activation": {"h": x, **norm, **plain},
        "geglu_quantize_activation": {"h": torch.randn(3, 4, 20), **plain},
        "accumulate_linear": {"residual_q": residual_q, "y_hat": y_hat, **codes, **weight},
        "initialize_linear": {"x": x, **state, "bias": torch.randn(6), "skip": skip, **weight},
        "modulated_linear": {"x": x, **state, "skip": skip, **quantise, **weight},
        "quantized_linear": {
            "x_q": residual_q,
            "zero_point": torch.zeros(3, dtype=torch.int32),
            "bias": torch.randn(6),
            **codes,
            **weight,
        },
        "attention": {"q": x, "k": torch.randn(3, 7, 10), "v": torch.randn(3, 7, 10), "heads": 2, "score_scale": 0.5},
        "pack_weight": {"weight_q": weight_q, "weight_bits": 4, "layout": "kpack_v1"},
        "unpack_weight": {"weight_packed": packed, "weight_bits": 4, "n": 6, "k": 10, "layout": "kpack_v1"},
    }


def conv_arguments():
    """Valid arguments by name for the conv ops, and for those that also take images."""
    weight_q = torch.randint(-8, 8, (6, 36), dtype=torch.int8)
    weight = {
        "weight_packed": ops.pack_weight(weight_q, 4),
        "weight_scale": torch.ones(6),
        "weight_bits": 4,
        "group_size": -1,
        "layout": "kpack_v1",
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
    }
    x, x_hat = image(2, 4, 5, 5), torch.zeros(2, 4, 5, 5).to(memory_format=CHANNELS_LAST)
    y_hat, skip = torch.zeros(2, 6, 5, 5).to(memory_format=CHANNELS_LAST), image(2, 6, 5, 5)
    residual_q = torch.zeros_like(x, dtype=torch.int8)
    quantise = {"scale": None, "act_bits": 4, "granularity": "per_sample", "clip_ratio": 1.0}
    codes = {"scale": torch.ones(2), "skip": skip, "out_dtype": torch.float32}
    state = {"x_hat": x_hat, "y_hat": y_hat}
    return {
        "quantize_residual": {"x": x, "x_hat": x_hat, **quantise},
        "accumulate_conv2d": {"residual_q": residual_q, "y_hat": y_hat, **codes, **weight},
        "initialize_conv2d": {"x": x, **state, "bias": torch.randn(6), "skip": skip, **weight},
        "modulated_conv2d": {"x": x, **state, "skip": skip, **quantise, **weight},
        "quantized_conv2d": {
            "x_q": residual_q,
            "zero_point": torch.zeros(2, dtype=torch.int32),
            "bias": torch.randn(6),
            **codes,
            **weight,
        },
    }


def call(op, arguments, **changes):
    return getattr(ops, op)(**{**arguments, **changes}, backend="reference")


@pytest.mark.parametrize("op", linear_arguments())
def test_valid_linear_arguments_are_taken(op):
    call(op, linear_arguments()[op])


@pytest.mark.parametrize("op", conv_arguments())
def test_valid_conv_arguments_are_taken(op):
    call(op, conv_arguments()[op])


WRONG_LINEAR = [
    ("act_bits", 5, ValueError, r"act_bits=5 is not supported; choose one of 3, 4, 8"),
    ("act_bits", 0, ValueError, r"act_bits=0 is not supported; choose one of 3, 4, 8"),
    ("weight_bits", 2, ValueError, r"weight_bits=2 is not supported; choose one of 3, 4, 8"),
    ("first_step_bits", 5, ValueError, r"first_step_bits=5 is not supported; choose one of 0, 3, 4, 8"),
    ("granularity", "per_pixel", ValueError, r"granularity='per_pixel' is not known; choose one of 'per_tensor'"),
    ("group_size", 0, ValueError, r"group_size=0 is not allowed"),
    ("group_size", 4, ValueError, r"group_size=4 with k=10 needs a contiguous \[N, 3\]"),
    ("clip_ratio", 0.0, ValueError, r"clip_ratio=0\.0 is not allowed"),
    ("clip_ratio", float("nan"), ValueError, r"clip_ratio=nan is not allowed"),
    ("eps", -1e-5, ValueError, r"eps=-1e-05 is not allowed"),
    ("num_groups", 3, ValueError, r"num_groups=3 does not divide the 10 channels"),
    ("num_groups", 0, ValueError, r"num_groups=0 does not divide"),
    ("scale", torch.ones(5), ValueError, r"scale has shape \(5,\)"),
    ("scale", torch.ones(3, 1), ValueError, r"scale has shape \(3, 1\)"),
    ("scale", torch.ones(3).double(), TypeError, r"scale is torch\.float64; it must be torch\.float32"),
    ("x", torch.randn(3, 4, 10).double(), TypeError, r"x is torch\.float64; allowed are float32, float16 and bfloat16"),
    ("x", torch.randn(3, 10, 4).transpose(1, 2), ValueError, r"x is not contiguous"),
    ("x", torch.randn(10), ValueError, r"x has 1 dimensions"),
    ("x", torch.randn(2, 3, 4, 4, 10), ValueError, r"x has 5 dimensions"),
    ("x", torch.randn(0, 4, 10), ValueError, r"x is empty"),
    ("h", torch.randn(3, 10, 4).transpose(1, 2), ValueError, r"h is not contiguous"),
    ("x_hat", torch.zeros(3, 4, 9), ValueError, r"x_hat has shape \(3, 4, 9\); it must be \(3, 4, 10\)"),
    ("x_hat", torch.zeros(3, 10, 4).transpose(1, 2), ValueError, r"x_hat is not contiguous"),
    ("x_hat", torch.zeros(3, 4, 10, dtype=torch.float64), TypeError, r"x_hat is torch\.float64"),
    ("y_hat", torch.zeros(3, 4, 7), ValueError, r"y_hat has shape \(3, 4, 7\); it must be \(3, 4, 6\)"),
    ("y_hat", torch.zeros(3, 6, 4).transpose(1, 2), ValueError, r"y_hat is not contiguous"),
    ("skip", torch.zeros(3, 4, 7), ValueError, r"skip has shape \(3, 4, 7\); it must be \(3, 4, 6\)"),
    ("skip", torch.zeros(3, 4, 6).half(), TypeError, r"skip is torch\.float16; it must be torch\.float32"),
    ("bias", torch.zeros(7), ValueError, r"bias has shape \(7,\).*vector of length 6"),
    ("gamma", torch.zeros(7), ValueError, r"gamma has shape \(7,\).*vector of length 10"),
    ("shift", torch.zeros(3, 7), ValueError, r"shift has shape \(3, 7\).*\(3, 10\)"),
    ("out_dtype", torch.float64, TypeError, r"out_dtype=torch\.float64 is not allowed"),
    ("out_dtype", torch.int8, TypeError, r"out_dtype=torch\.int8 is not allowed"),
    ("residual_q", torch.zeros(3, 4, 10), TypeError, r"residual_q is torch\.float32; it must be torch\.int8"),
    ("x_q", torch.zeros(3, 4, 10), TypeError, r"x_q is torch\.float32; it must be torch\.int8"),
    ("zero_point", torch.zeros(3), TypeError, r"zero_point is torch\.float32; it must be torch\.int32"),
    ("zero_point", torch.zeros(1, dtype=torch.int32), ValueError, r"zero_point has shape \(1,\).*length 3"),
    ("weight_scale", torch.ones(6).half(), TypeError, r"weight_scale is torch\.float16; it must be torch\.float32"),
    ("weight_scale", torch.ones(6, 2), ValueError, r"weight_scale has shape \(6, 2\)"),
    ("weight_packed", torch.zeros(6, 4, dtype=torch.uint8), ValueError, r"weight_packed has shape \(6, 4\).*\(6, 5\)"),
    ("weight_packed", torch.zeros(6, 5, dtype=torch.int8), ValueError, r"weight_packed has .*torch\.uint8 \(6, 5\)"),
    ("weight_q", torch.zeros(6, 10), TypeError, r"weight_q is torch\.float32; it must be torch\.int8"),
    ("weight_q", torch.zeros(6, 2, 5, dtype=torch.int8), ValueError, r"expected \[N, K\]"),
    ("layout", "kpack_v9", ops.BackendUnavailable, r"it reads weights in layout 'kpack_v1', not 'kpack_v9'"),
    (
        "h",
        torch.randn(3, 4, 21),
        ValueError,
        r"expected \[\.\.\., 2K\]|x_hat has shape|gamma has shape|does not divide",
    ),
]
LINEAR_CASES = [
    pytest.param(op, *wrong, id=f"{op}-{wrong[0]}-{i}")
    for i, wrong in enumerate(WRONG_LINEAR)
    for op, arguments in linear_arguments().items()
    if wrong[0] in arguments or (wrong[0] == "first_step_bits" and op == "initialize_linear")
]

WRONG_CONV = [
    ("x", torch.randn(2, 4, 5, 5), ValueError, r"x is not channels_last.*convert it with \.to\(memory_format"),
    ("x_hat", torch.randn(2, 4, 5, 5), ValueError, r"x_hat is not channels_last"),
    ("y_hat", torch.randn(2, 6, 5, 5), ValueError, r"y_hat is not channels_last"),
    ("skip", torch.randn(2, 6, 5, 5), ValueError, r"skip is not channels_last"),
    ("residual_q", torch.zeros(2, 4, 5, 5, dtype=torch.int8), ValueError, r"residual_q is not channels_last"),
    ("x_q", torch.zeros(2, 4, 5, 5, dtype=torch.int8), ValueError, r"x_q is not channels_last"),
    ("scale", torch.ones(25), ValueError, r"scale has shape \(25,\).*1-D of length"),
    ("kernel_size", (3,), ValueError, r"kernel_size=\[3\] is not allowed; give two integers of at least 1"),
    ("kernel_size", (0, 3), ValueError, r"kernel_size=\[0, 3\] is not allowed"),
    ("stride", (0, 1), ValueError, r"stride=\[0, 1\] is not allowed"),
    ("padding", (-1, 0), ValueError, r"padding=\[-1, 0\] is not allowed; give two integers of at least 0"),
    ("dilation", (1, 0), ValueError, r"dilation=\[1, 0\] is not allowed"),
    ("dilation", (9, 9), ValueError, r"an input of \(5, 5\) is too small"),
    ("groups", 3, ValueError, r"groups=3 does not divide the 4 input channels"),
    ("groups", 0, ValueError, r"groups=0 does not divide the 4 input channels"),
    ("groups", 4, ValueError, r"weight_packed has|does not divide the 6 output channels"),
    ("padding", (0, 0), ValueError, r"(y_hat|skip) has shape \(2, 6, 5, 5\); it must be \(2, 6, 3, 3\)"),
]
CONV_CASES = [
    pytest.param(op, *wrong, id=f"{op}-{wrong[0]}-{i}")
    for i, wrong in enumerate(WRONG_CONV)
    for op, arguments in conv_arguments().items()
    if wrong[0] in arguments
]


def assert_refused(op, arguments, name, value, error, message):
    tensors = {key: t for key, t in arguments.items() if isinstance(t, torch.Tensor)}
    before = {key: t.clone() for key, t in tensors.items()}
    with pytest.raises(error, match=message) as raised:
        call(op, arguments, **{name: value})
    assert op in str(raised.value)
    for key, t in tensors.items():
        assert torch.equal(t, before[key]), f"{key} was changed"


@pytest.mark.parametrize(("op", "name", "value", "error", "message"), LINEAR_CASES)
def test_linear_arguments(op, name, value, error, message):
    assert_refused(op, linear_arguments()[op], name, value, error, message)


@pytest.mark.parametrize(("op", "name", "value", "error", "message"), CONV_CASES)
def test_conv_arguments(op, name, value, error, message):
    assert_refused(op, conv_arguments()[op], name, value, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"act_bits": 8}, ValueError, r"packed=True with act_bits=8 and .*have 8 bits.*choose act_bits 3 or 4 and"),
        ({"granularity": "per_block"}, ValueError, r"granularity='per_block', whose codes have 8 bits.*'per_token'"),
        ({"packed": "cpu"}, TypeError, r"packed='cpu' is not allowed; give True or False, and backend after it"),
    ],
)
@pytest.mark.parametrize("arguments", [linear_arguments, conv_arguments])
def test_what_cannot_be_packed(arguments, changes, error, message):
    given = arguments()["quantize_residual"]
    with pytest.raises(error, match=message):
        call("quantize_residual", given, **{"packed": True, **changes})
    assert not given["x_hat"].any()


@pytest.mark.parametrize("op", ["modulated_linear", "initialize_linear"])
def test_state_has_one_dtype(op):
    arguments = linear_arguments()[op]
    with pytest.raises(TypeError, match=r"x_hat is torch\.float16 and y_hat torch\.float32; both must have one"):
        call(op, arguments, x_hat=arguments["x_hat"].half())


def test_tensors_of_two_devices():
    arguments = linear_arguments()["quantize_residual"]
    with pytest.raises(ValueError, match="x_hat is on meta, the first argument on cpu; move all to one device"):
        call("quantize_residual", arguments, x_hat=arguments["x_hat"].to("meta"))


def test_pack_weight_refuses_codes_out_of_range():
    with pytest.raises(ValueError, match="codes from -8 to 7, but 3 bits hold -4 to 3"):
        ops.pack_weight(torch.tensor([[-8, 7]], dtype=torch.int8), 3)


@pytest.mark.parametrize("backend", ["gpu", "", "Reference"])
def test_unknown_backend(backend):
    with pytest.raises(
        ValueError, match=f"backend='{backend}' is not known; choose one of auto, cpu, onednn, triton, cuda, reference"
    ):
        ops.quantize_activation(torch.randn(2, 4), 8, "per_tensor", backend=backend)


def test_wrong_calls_raise_type_errors():
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match="missing a required argument: 'granularity'"):
        ops.quantize_activation(x, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bits'"):
        ops.quantize_activation(x, 8, "per_tensor", bits=4)
    with pytest.raises(TypeError, match="multiple values for argument 'act_bits'"):
        ops.quantize_activation(x, 8, "per_tensor", act_bits=4)
    with pytest.raises(TypeError, match="too many positional arguments"):
        ops.quantize_activation(x, 8, "per_tensor", True, "auto", 1)
    with pytest.raises((TypeError, RuntimeError), match="quantize_residual"):
        ops.quantize_residual(x, 3, None, 4, "per_tensor")
