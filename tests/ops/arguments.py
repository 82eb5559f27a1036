"""Valid arguments of every op, by name, for the tests of checks and registration."""

import torch

from modiff_kernels import ops
from modiff_kernels.ops import PackedWeight, Prologue, Window

WINDOW = Window((3, 3), padding=(1, 1))


def image(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def zeros(*shape, dtype=torch.float32):
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=order).zero_()


def weight(k):
    codes = torch.randint(-8, 8, (6, k), dtype=torch.int8)
    return PackedWeight(ops.pack_weight(codes, 4), torch.rand(6) + 0.5, 4)


def calls():
    """{name of the form: (op, arguments)}."""
    x, norm = torch.randn(3, 4, 10), {"gamma": torch.ones(10), "beta": torch.zeros(10), "eps": 1e-5}
    layer_norm, pixels_in = Prologue("layer_norm", **norm), {"h": image(2, 4, 5, 5)}
    group_norm = Prologue("group_norm", shift=torch.randn(3, 10), num_groups=5, silu=True, **norm)
    rows = {"codes": zeros(3, 4, 10, dtype=torch.int8), "scale": torch.ones(3), "weight": weight(10)}
    pixels = {"codes": zeros(2, 4, 5, 5, dtype=torch.int8), "scale": torch.ones(2), "weight": weight(36)}
    pixels["window"] = WINDOW
    y_rows = {"y_hat": zeros(3, 4, 6), "skip": torch.randn(3, 4, 6)}
    y_pixels = {"y_hat": zeros(2, 6, 5, 5), "skip": image(2, 6, 5, 5)}
    plain = {"zero_point": None}
    update = {"scale": None, "bits": 4, "granularity": "per_sample", "prologue": Prologue()}
    return {
        "residual": ("quantize", {"h": x, "x_hat": zeros(3, 4, 10), "bits": 4}),
        "residual-image": ("quantize", {**pixels_in, "x_hat": zeros(2, 4, 5, 5), "scale": torch.ones(2), "bits": 4}),
        "residual-group_norm": ("quantize", {"h": x, "prologue": group_norm, "x_hat": zeros(3, 4, 10), "bits": 4,
                                             "last_absmax": torch.ones(3)}),
        "residual-further": ("quantize", {**pixels_in, "prologue": Prologue(further=image(2, 3, 5, 5)),
                                          "x_hat": zeros(2, 7, 5, 5)}),
        "residual-layer_norm": ("quantize", {"h": x, "prologue": layer_norm, "x_hat": zeros(3, 4, 10)}),
        "residual-geglu": ("quantize", {"h": torch.randn(3, 4, 20), "prologue": ops.GEGLU, "x_hat": zeros(3, 4, 10)}),
        "plain": ("quantize", {"h": x, "bits": 4}),
        "plain-image": ("quantize", {"h": image(2, 4, 5, 5), "granularity": "per_token"}),
        "plain-geglu": ("quantize", {"h": torch.randn(3, 4, 20), "prologue": ops.GEGLU}),
        "accumulate": ("product", {**rows, **plain, **y_rows}),
        "accumulate-image": ("product", {**pixels, **plain, **y_pixels}),
        "output": ("product", {**rows, "zero_point": zeros(3, dtype=torch.int32), "bias": torch.randn(6),
                               "skip": y_rows["skip"]}),
        "output-image": ("product", {**pixels, "zero_point": zeros(2, dtype=torch.int32), "bias": torch.randn(6)}),
        "without-out": ("product", {**pixels, **plain, "y_hat": y_pixels["y_hat"], "write_out": False}),
        "update": ("modulate", {**update, "h": x, "x_hat": zeros(3, 4, 10), "weight": weight(10), **y_rows}),
        "update-image": ("modulate", {**update, **pixels_in, "x_hat": zeros(2, 4, 5, 5), "weight": weight(36),
                                      "window": WINDOW, **y_pixels}),
        "attention": ("attention", {"q": x, "k": torch.randn(3, 7, 10), "v": torch.randn(3, 7, 10), "heads": 2,
                                    "score_scale": 0.5}),
    }  # fmt: skip


FORMS = tuple(calls())


def call(form, backend="reference", **changes):
    """Call the op of `form` with some arguments changed; names like "weight.scale" change a field."""
    op, arguments = calls()[form]
    return getattr(ops, op)(**changed(arguments, changes), backend=backend)


def changed(arguments, changes):
    arguments = dict(arguments)
    for name, value in changes.items():
        name, _, field = name.partition(".")
        arguments[name] = arguments[name]._replace(**{field: value}) if field else value
    return arguments


def tensors(arguments):
    """All tensors among arguments, those inside of named tuples too, by name."""
    found = {}
    for name, value in arguments.items():
        if hasattr(value, "_asdict"):
            found.update({f"{name}.{field}": t for field, t in tensors(value._asdict()).items()})
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found
