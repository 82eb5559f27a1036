"""Low-bit models in safetensors files: what stands in them, and how it is checked.

A file holds the state_dict of the UNet; a low-bit layer at `path` has there, in the place of `path.weight`,

- `path.weight_packed`: codes in kpack_v1 (`packing`), int8 (8 bits) or uint8 [N, packed_width(bits, K)],
- `path.weight_scale`: float32 [N] (one per output channel) or [N, ceil(K / group_size)],
- the other tensors of its `CalibratedLayer`, where it has them: `path.act_scale` float32 and `path.act_zero_point`
  int32, [1] or [calls], `path.input_scale` float32 [C], `path.calibrated_bias` float32 [N].

The metadata of every file says `modiff_format` (a version), `modiff_layout`, `modiff_share_edges` (the argument
share_inputs of `accelerate`), and `modiff_crc32`: as a JSON object, the CRC-32 of the bytes of every tensor, little
endian and row-major. Files hold tensors and text only: nothing in them is run."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .calibrated import CalibratedLayer, QuantizedWeight
from .packing import KPACK_V1, pack, packed_dtype, packed_width, unpack
from .spec import group_count

FORMAT_VERSION = "1"
FORMAT = "modiff_format"
LAYOUT = "modiff_layout"
SHARE_INPUTS = "modiff_share_edges"  # the key of version 1 of the format
CRC32 = "modiff_crc32"

WEIGHT, WEIGHT_PACKED, WEIGHT_SCALE = ".weight", ".weight_packed", ".weight_scale"
_OPTIONAL = {field: f".{field}" for field in ("act_scale", "act_zero_point", "input_scale")}  # of CalibratedLayer
_OPTIONAL["bias"] = ".calibrated_bias"
_OF_LAYER = (WEIGHT_PACKED, WEIGHT_SCALE, *_OPTIONAL.values())

_ADVICE = "save the model again with handle.save_pretrained(), or copy its folder again"


def encoded_layer(path: str, layer: CalibratedLayer) -> dict[str, Tensor]:
    """The tensors of one low-bit layer, which has codes (`ModulatedLayer.stored`)."""
    assert layer.weight is not None
    codes = pack(layer.weight.codes, layer.weight.bits)
    optional = {path + suffix: getattr(layer, field) for field, suffix in _OPTIONAL.items()}
    # Layers that read one tensor may hold one scale, and safetensors stores no memory twice.
    copies = {key: value.clone() for key, value in optional.items() if value is not None}
    return {path + WEIGHT_PACKED: codes, path + WEIGHT_SCALE: layer.weight.scale, **copies}


def encode(
    state_dict: Mapping[str, Tensor], layers: Mapping[str, CalibratedLayer], share_inputs: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the files: from the state_dict of a UNet and its low-bit layers by path, which are all of
    the same bits and group size. The tensors are contiguous, and share memory with the state_dict if they can."""
    tensors = dict(state_dict)
    for path, layer in layers.items():
        tensors.pop(path + WEIGHT, None)
        tensors.update(encoded_layer(path, layer))
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    sums = json.dumps({key: crc32(tensor) for key, tensor in tensors.items()}, sort_keys=True)
    metadata = {FORMAT: FORMAT_VERSION, LAYOUT: KPACK_V1, SHARE_INPUTS: json.dumps(share_inputs), CRC32: sums}
    return tensors, metadata


def crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)


class _Stored(NamedTuple):
    file: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int


class Checkpoint:
    """The files of one saved model. Reads their headers; `decode` gets their tensors.

    share_inputs: the argument of `accelerate` it was saved with. layers: those decoded so far, by path.

    ValueError, naming file and key, for files that are no safetensors, are cut off, were not written by
    `handle.save_pretrained` or by a version with another format."""

    def __init__(self, files: Iterable[Any]) -> None:
        self.layers: dict[str, CalibratedLayer] = {}
        self.share_inputs = True
        self._stored: dict[str, _Stored] = {}
        self._waiting: dict[str, Tensor] = {}
        for file in files:
            self._read_header(str(file))

    def state_dict_keys(self) -> list[str]:
        stems = [key.removesuffix(WEIGHT_PACKED) for key in self._stored if key.endswith(WEIGHT_PACKED)]
        own = {stem + suffix for stem in stems for suffix in _OF_LAYER}
        return [key for key in self._stored if key not in own] + [stem + WEIGHT for stem in stems]

    def check(self, shapes: Mapping[str, Sequence[int]], weight_bits: int, group_size: int) -> None:
        """Compare the files with a model. shapes: of its state_dict, by key. Raises ValueError, naming file and key."""
        expected: dict[str, tuple[tuple[int, ...], str | None]] = {}
        for key, shape in shapes.items():
            stem = key.removesuffix(WEIGHT)
            if stem == key or stem + WEIGHT_PACKED not in self._stored:
                expected[key] = (tuple(shape), None)
                continue
            n, k = shape[0], math.prod(shape[1:])
            codes = "I8" if packed_dtype(weight_bits) is torch.int8 else "U8"
            scale = self._stored.get(stem + _OPTIONAL["act_scale"])
            calls = (1,) if scale is None else scale.shape
            forms = {
                WEIGHT_PACKED: ((n, packed_width(weight_bits, k)), codes),
                WEIGHT_SCALE: ((n,) if group_size == -1 else (n, group_count(k, group_size)), "F32"),
                _OPTIONAL["act_scale"]: (calls, "F32"),
                _OPTIONAL["act_zero_point"]: (calls, "I32"),
                _OPTIONAL["input_scale"]: ((shape[1],), "F32"),
                _OPTIONAL["bias"]: ((n,), "F32"),
            }
            for suffix, form in forms.items():
                if suffix == WEIGHT_SCALE or stem + suffix in self._stored:
                    expected[stem + suffix] = form
        for key, (shape, dtype) in expected.items():
            found = self._stored.get(key)
            if found is None:
                files = ", ".join(dict.fromkeys(stored.file for stored in self._stored.values()))
                raise ValueError(f"{files}: the key {key!r} is missing, which the model of config.json has; {_ADVICE}")
            if found.shape != shape or dtype not in (None, found.dtype):
                config = f"(weight_bits={weight_bits}, group_size={None if group_size == -1 else group_size})"
                wanted = f"config.json {config} asks for {dtype or found.dtype} {list(shape)}"
                is_there = f"{key!r} is {found.dtype} {list(found.shape)}"
                raise ValueError(f"{found.file}: {is_there}, but {wanted}; {_ADVICE}")
        for key, stored in self._stored.items():
            if key not in expected:
                raise ValueError(f"{stored.file}: the key {key!r} is not known to the model of config.json; {_ADVICE}")
        self._shapes, self._weight_bits, self._group_size = shapes, weight_bits, group_size

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of the state_dict that the tensors of one file stand for, after `check`.

        Weights of low-bit layers are on device meta, and their codes go into `layers`; a layer whose tensors are spread
        over files comes with the last of them. ValueError, naming file and key, for bytes that were not saved so."""
        state_dict = {}
        for key, tensor in tensors.items():
            found, stored = crc32(tensor.contiguous()), self._stored[key]
            if found != stored.crc32:
                sums = f"the CRC-32 of its bytes is {found:08x}, that of what was saved is {stored.crc32:08x}"
                raise ValueError(f"{stored.file}: {key!r} is damaged: {sums}; {_ADVICE}")
            tensor = tensor if key.endswith(WEIGHT_PACKED) else tensor.clone()  # codes alone stand in the mapped file
            stem, dot, name = key.rpartition(".")
            if dot + name not in _OF_LAYER or stem + WEIGHT_PACKED not in self._stored:
                state_dict[key] = tensor
                continue
            self._waiting[key] = tensor
            parts = [suffix for suffix in _OF_LAYER if stem + suffix in self._stored]
            if all(stem + suffix in self._waiting for suffix in parts):
                own = {suffix: self._waiting.pop(stem + suffix) for suffix in parts}
                shape = tuple(self._shapes[stem + WEIGHT])
                codes, bits = own[WEIGHT_PACKED], self._weight_bits
                codes = codes if bits == 8 else unpack(codes, bits, math.prod(shape[1:]))
                weight = QuantizedWeight(codes, own[WEIGHT_SCALE], bits, self._group_size)
                optional: dict[str, Any] = {field: own.get(suffix) for field, suffix in _OPTIONAL.items()}
                self.layers[stem] = CalibratedLayer(weight, **optional)
                state_dict[stem + WEIGHT] = torch.empty(shape, device="meta")
        return state_dict

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(file, framework="pt") as header:
                metadata = header.metadata() or {}
                parts = {key: header.get_slice(key) for key in header.keys()}  # noqa: SIM118 (it is no mapping)
                forms = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors ({error}); {_ADVICE}") from error
        version, layout = metadata.get(FORMAT), metadata.get(LAYOUT)
        if version is None:
            text = "load it without quant_method 'modiff' in the quantization_config of config.json"
            raise ValueError(f"{file}: the metadata has no {FORMAT!r}, so this is no low-bit model; {text}")
        if version != FORMAT_VERSION or layout != KPACK_V1:
            reads = f"but this version of modiff_kernels reads {FORMAT_VERSION!r} and {KPACK_V1!r}"
            advice = "take the version that wrote it, or save the model again"
            raise ValueError(f"{file}: {FORMAT} is {version!r} and {LAYOUT} {layout!r}, {reads}; {advice}")
        try:
            sums, share_inputs = json.loads(metadata[CRC32]), json.loads(metadata[SHARE_INPUTS])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: {CRC32!r} or {SHARE_INPUTS!r} in the metadata is damaged; {_ADVICE}") from error
        for key, (shape, dtype) in forms.items():
            if not isinstance(sums, dict) or not isinstance(sums.get(key), int):
                raise ValueError(f"{file}: {CRC32!r} in the metadata has no sum of {key!r}; {_ADVICE}")
            self._stored[key] = _Stored(file, shape, dtype, sums[key])
        self.share_inputs = bool(share_inputs)
