"""Rivals on the CPU beside torch in float32: OpenVINO, with stand-ins for its packages, bfloat16, and their rows."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import configurations
from benchmarks.bench_unet_step import least_sqnr_db, trajectory
from benchmarks.configurations import BFLOAT16, InBfloat16, Networks, importable, run_rows, step_rows
from benchmarks.openvino_unet import PRECISIONS, OpenVinoUNet
from benchmarks.shapes import build_unet
from modiff_kernels.evaluation import sqnr

CPU = torch.device("cpu")


@pytest.fixture
def packages(monkeypatch):
    """openvino and nncf whose models are the traced modules themselves; `seen` tells what they were given."""
    seen = {}

    class Core:
        def compile_model(self, model, device, options):
            seen.update(device=device, options=options)

            def infer(arrays, share_outputs):
                assert all(isinstance(array, np.ndarray) for array in arrays)
                with torch.no_grad():
                    return [model(*map(torch.from_numpy, map(np.asarray, arrays))).numpy()]

            return SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer))

    def convert_model(module, example_input, input):
        seen.update(example=example_input, input=input)
        return module

    def quantize(model, dataset, subset_size):
        seen.update(dataset=dataset, subset_size=subset_size)
        return model

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, convert_model=convert_model))
    monkeypatch.setitem(sys.modules, "nncf", SimpleNamespace(Dataset=list, quantize=quantize))
    return seen


@pytest.mark.parametrize("key", PRECISIONS)
def test_the_unet_in_openvino(packages, key):
    unet = build_unet("cifar10_small16")
    networks = Networks(unet)
    networks.shown = trajectory(16, 2, 3)
    row = next(row for row in step_rows(CPU, torch.float32, compiled=False) if row.key == key)
    network = networks.make(row)
    assert isinstance(network.unet, OpenVinoUNet)
    x, t = networks.shown[-1]
    with torch.no_grad():
        expected = unet(x, t, return_dict=False)[0]
    got = network.unet(x.to(memory_format=torch.channels_last), t, return_dict=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert packages["device"] == "CPU"
    assert packages["input"] == [(2, 3, 16, 16), ()]
    assert packages["options"]["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert packages["options"]["INFERENCE_PRECISION_HINT"] == ("bf16" if "bfloat16" in key else "f32")
    if "int8" not in key:
        assert "dataset" not in packages
        return
    assert packages["subset_size"] == 3, "it may calibrate with every call of the run that it is timed on"
    for arrays, call in zip(packages["dataset"], networks.shown, strict=True):
        assert all(np.array_equal(array, tensor) for array, tensor in zip(arrays, call, strict=True))


def test_the_unet_in_bfloat16(monkeypatch):
    monkeypatch.setattr(configurations, "compile_calls", lambda unet, options: None)
    unet = build_unet("cifar10_small16")
    x, t = trajectory(16, 1, 2)[-1]
    with torch.no_grad():
        expected = unet(x, t, return_dict=False)[0]
        got = InBfloat16(unet)(x, t, return_dict=False)[0]
    assert got.dtype == torch.float32
    assert 30 < sqnr(got, expected) < 70
    assert next(unet.parameters()).dtype == torch.float32


def test_rows_of_rivals_are_for_steps_in_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    rivals = {BFLOAT16, *PRECISIONS}
    rows = {row.key: row for row in step_rows(CPU, torch.float32, compiled=True)}
    assert rivals <= set(rows)
    least = {key: least_sqnr_db(rows[key], torch.float32) for key in rivals}
    assert least.pop("openvino-float32") == 80
    assert least == {key: 15 if "int8" in key else 25 for key in least}
    assert not rivals & {row.key for row in step_rows(CPU, torch.bfloat16, compiled=True)}
    assert not rivals & {row.key for row in step_rows(torch.device("cuda"), torch.bfloat16, compiled=True)}
    assert not rivals & {row.key for row in run_rows(CPU, torch.float32, compiled=True)}


@pytest.mark.parametrize(
    ("installed", "left"),
    [
        ((), {"float-channels_last"}),
        (("openvino",), {"float-channels_last", "openvino-float32", "openvino-bfloat16"}),
        (("openvino", "nncf"), {"float-channels_last", *PRECISIONS}),
    ],
)
def test_rows_of_packages_that_are_missing_are_left_out(monkeypatch, capsys, installed, left):
    monkeypatch.setattr(configurations, "has", lambda package: package in installed)
    rows = [
        row for row in step_rows(CPU, torch.float32, compiled=False) if row.key in ("float-channels_last", *PRECISIONS)
    ]
    assert {row.key for row in importable(rows)} == left
    assert ("nncf is not installed (pip install nncf)" in capsys.readouterr().err) == ("nncf" not in installed)
