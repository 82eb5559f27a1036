"""mk.calibrate on a tiny pipeline: determinism, resumption, what is saved, what accelerate makes of it."""

import dataclasses
import json

import pytest
import torch

import modiff_kernels as mk
from modiff_kernels.calibration import METHODS, reconstruction, sampling_aware
from modiff_kernels.calibration import static as static_module
from modiff_kernels.calibration import weights as weights_module
from modiff_kernels.cli.arguments import METHODS as CLI_METHODS
from modiff_kernels.quant.calibrated import QuantizedWeight
from modiff_kernels.quant.packing import pack
from tests.calibration.conftest import assert_equal, difference_of, interrupt

STATIC = mk.ModiffConfig(weight_bits=4, act_bits=4, scale_mode="static")
SMALL = {"steps": 4, "samples": 4, "batch": 2, "quiet": True, "calls_per_sample": 2, "weight_method": "rtn"}


def images(pipe, steps=4):
    return pipe(batch_size=2, num_inference_steps=steps, generator=torch.manual_seed(7), output_type="np").images


def test_the_command_line_knows_every_method():
    assert tuple(METHODS) == CLI_METHODS


FEW = {"samples": 2, "act_iterations": 2}
LEARNT = {**FEW, "weight_iterations": 2, "learn_batch": 2}
SHORT = {"distill": {"network_iterations": 2}, "qdiffusion": LEARNT, "sampling_aware": LEARNT}
SHORT["accuquant"] = {**FEW, "network_iterations": 0, "group_steps": 2, "group_iterations": 2}
STOPPED = {"qdiffusion": (reconstruction, "learn", 7), "accuquant": (reconstruction, "learn", 3)}
STOPPED["sampling_aware"] = sampling_aware, "reconstruct_blocks", 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method(pipe, calibrated, tmp_path, monkeypatch, method):
    """The same result again, also after an interruption, without sampling twice; the UNet is as before, and low-bit
    layers draw nearly the same."""
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    options = {**SMALL, **SHORT.get(method, {})}
    interrupt(monkeypatch, *STOPPED.get(method, (static_module, "with_scales", 1)))
    with pytest.raises(KeyboardInterrupt):
        mk.calibrate(pipe, method, STATIC, folder=tmp_path, **options)
    assert not (tmp_path / "calibration.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "__call__", lambda *args, **kwargs: 1 / 0)
        patch.setattr(sampling_aware, "_run", lambda job: 1 / 0)  # its own trajectories
        found = mk.calibrate(pipe, method, STATIC, folder=tmp_path, **options)
    assert_equal(found, calibrated(method, STATIC, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.json", "calibration.safetensors"]
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert not any("Fake" in type(module).__name__ for module in pipe.unet.modules())
    kinds = torch.nn.Linear, torch.nn.Conv2d
    names = {name for name, module in pipe.unet.named_modules() if isinstance(module, kinds)}
    assert (found.method, set(found.layers)) == (method, {name for name in names if STATIC.skips(name) is None})
    assert difference_of(pipe, tmp_path, 4) < 0.1


def test_parts_of_another_request_are_not_used(pipe, calibrated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(static_module, "with_scales", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mk.calibrate(pipe, "mse", STATIC, folder=tmp_path, seed=3, **SMALL)
    assert_equal(mk.calibrate(pipe, "mse", STATIC, folder=tmp_path, **SMALL), calibrated("mse", STATIC, **SMALL))


def test_what_is_saved_is_what_was_found(pipe, tmp_path):
    config = dataclasses.replace(STATIC, group_size=16, skip_modules=("block", "conv_out"))
    result = mk.calibrate(pipe, "minmax", config, folder=tmp_path, **{**SMALL, "weight_method": "gptq"})
    loaded = mk.CalibrationResult.load(tmp_path)
    assert_equal(result, loaded)
    assert (loaded.method, loaded.config, loaded.metadata) == (result.method, result.config, result.metadata)
    assert loaded.metadata["options"]["scale_search"] == "minmax"


@pytest.mark.parametrize("method", ["mse", "qdiffusion"])
def test_scales_alone_for_known_codes(pipe, method, monkeypatch):
    few = {"weight_iterations": 3, "act_iterations": 2} if method == "qdiffusion" else {}
    whole = mk.calibrate(pipe, method, dataclasses.replace(STATIC, mode="quantized"), **SMALL, **few)
    monkeypatch.setattr(weights_module, "quantize_layer", lambda *args: 1 / 0)
    config = dataclasses.replace(STATIC, mode="quantized", act_bits=8)
    scales = mk.calibrate(pipe, method, config, weights=whole, **SMALL, **few)
    for path, layer in whole.layers.items():
        other = scales.layers[path]
        assert torch.equal(layer.weight.codes, other.weight.codes)
        assert layer.input_scale is other.input_scale
        assert other.act_scale < layer.act_scale  # 8 bits in place of 4
    with pytest.raises(ValueError, match="config has weight_bits=8, but the calibration"):
        mk.calibrate(pipe, method, mk.ModiffConfig(8, 8), weights=whole, **SMALL)
    with pytest.raises(ValueError, match="weights holds no codes for conv_in"):
        mk.calibrate(pipe, method, dataclasses.replace(config, skip_modules=()), weights=whole, **SMALL)


class TestAccelerate:
    def test_layers_take_codes_and_scales(self, pipe, calibrated, tmp_path):
        result = calibrated("mse", STATIC, **SMALL)
        result.save(tmp_path)
        handle = mk.accelerate(pipe, calibration=tmp_path)
        assert handle.config == STATIC
        for path, layer in handle.layers.items():
            known = result.layers[path]
            assert torch.equal(layer.packed.scale, known.weight.scale)
            assert torch.equal(layer.input.static_scale, known.act_scale)
            if layer.packed.layout == "kpack_v1":
                assert torch.equal(layer.packed.packed, pack(known.weight.codes, 4))
        handle.remove()

    def test_weights_alone_with_other_scales(self, pipe, calibrated):
        result = calibrated("mse", dataclasses.replace(STATIC, scale_mode="dynamic"), **SMALL)
        assert all(layer.act_scale is None for layer in result.layers.values())
        for config in (mk.ModiffConfig(4, 8), mk.ModiffConfig(4, None), mk.ModiffConfig(4, 8, mode="quantized")):
            handle = mk.accelerate(pipe, config, calibration=result)
            for path, layer in handle.layers.items():
                assert torch.equal(layer.stored().weight.scale, result.layers[path].weight.scale)
            handle.remove()

    def test_another_config(self, pipe, calibrated):
        result = calibrated("minmax", STATIC, **SMALL)
        for changes, message in (
            ({"weight_bits": 8}, "config has weight_bits=8, but the calibration"),
            ({"group_size": 16}, "config has group_size=16, but the calibration"),
            ({"act_bits": 8}, "config has act_bits=8, but the calibration"),
            ({"mode": "quantized"}, "config has mode='quantized', but the calibration"),
            ({"skip_modules": ("conv_in",), "scale_mode": "dynamic"}, "'time_embedding.* were not calibrated"),
        ):
            with pytest.raises(ValueError, match=message):
                mk.accelerate(pipe, dataclasses.replace(STATIC, **changes), calibration=result)
        assert not any("Modulated" in type(module).__name__ for module in pipe.unet.modules())

    def test_another_checkpoint(self, pipe, calibrated):
        result = calibrated("minmax", STATIC, **SMALL)
        handle = mk.accelerate(pipe, calibration=result)
        state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(state)
        with pytest.raises(ValueError, match=r"its codes are calibrated for the ones it has; handle.remove\(\) first"):
            pipe.unet.load_state_dict({name: value + 0.01 for name, value in state.items()})
        handle.remove()
        weight = pipe.unet.mid_block.resnets[0].conv1.weight
        weight.copy_(torch.randn_like(weight) * weight.std())
        with pytest.raises(ValueError, match=r"conv1'.* away from the weight of the layer; calibrate this checkpoint"):
            mk.accelerate(pipe, calibration=result)


class TestSavedModels:
    @pytest.mark.parametrize(("method", "mode"), [("distill", "modulated"), ("mse", "quantized")])
    def test_codes_tables_biases_and_zero_points_come_back(self, pipe, calibrated, tmp_path, method, mode):
        options = {"network_iterations": 2} if method == "distill" else {}
        result = calibrated(method, dataclasses.replace(STATIC, mode=mode), table=True, **SMALL, **options)
        handle = mk.accelerate(pipe, calibration=result)
        expected = images(pipe)
        handle.save_pretrained(tmp_path)
        handle.remove()
        assert (result.layers["mid_block.resnets.0.conv1"].bias is None) == (method == "mse")
        pipe.unet = type(pipe.unet).from_pretrained(tmp_path)
        mk.accelerate(pipe)
        assert (images(pipe) == expected).all()

    def test_layers_that_differ_in_bits_are_refused(self, pipe, calibrated, tmp_path):
        result = calibrated("minmax", STATIC, **SMALL)
        path = "mid_block.resnets.0.conv1"
        weight = QuantizedWeight.rounded(pipe.unet.get_submodule(path).weight, 8)
        result.layers[path] = dataclasses.replace(result.layers[path], weight=weight)
        handle = mk.accelerate(pipe, calibration=result)
        with pytest.raises(ValueError, match=r"conv1' have 8 bits and group size -1, but files hold .* 4 and -1"):
            handle.save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()
        handle.remove()


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_one_scale_per_call(pipe, calibrated, mode):
    table = calibrated("mse", dataclasses.replace(STATIC, mode=mode), table=True, **SMALL)
    handle, used, path = mk.accelerate(pipe, calibration=table), [], "mid_block.resnets.0.conv1"
    layer = handle.layers[path]
    pipe.unet.register_forward_hook(lambda *args: used.append(layer.input.static_scale.clone()))
    images(pipe)
    assert torch.equal(torch.cat(used), table.layers[path].act_scale)
    with pytest.raises(RuntimeError, match="calibrated for the 4 UNet calls of a run, but this run has 5"):
        images(pipe, steps=5)
    handle.remove()


def test_bad_requests(pipe):
    called = []
    pipe.unet.register_forward_hook(lambda *args: called.append(args))
    for changes, message in (
        ({"method": "mes"}, "method='mes' is not allowed; choose one of 'minmax', 'mse'"),
        ({"no_such": 1}, "method 'mse' has no option 'no_such'; its options are time_steps"),
        ({"time_steps": "often"}, "time_steps='often' is not allowed; choose one of 'uniform', 'ndtc'"),
        ({"samples": 0}, "samples=0 is not allowed"),
        ({"config": mk.ModiffConfig(None, None)}, "weight_bits=None"),
        ({"config": mk.ModiffConfig(skip_modules=("block", "conv", "time"))}, "leaves no Linear and no Conv2d"),
        ({"method": "accuquant", "gradient": "none"}, "gradient='none' is not allowed; choose one of 'identity'"),
        ({"method": "accuquant", "group_steps": 0}, "group_steps=0 is not allowed"),
        ({"method": "accuquant", "table": False}, "table=False is not allowed"),
        ({"call_kwargs": {"prompt": "a cat"}}, "DDPMPipeline takes no prompt; it takes batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.calibrate(pipe, **{"config": STATIC, **SMALL, **changes})
    assert not called


def test_bad_targets(pipe):
    with pytest.raises(TypeError, match="got str, which has no denoiser; give one"):
        mk.calibrate("model")
    with pytest.raises(ValueError, match="a bare UNet does not sample; give scheduler= and sample="):
        mk.calibrate(pipe.unet)
    handle = mk.accelerate(pipe)
    with pytest.raises(ValueError, match="the UNet is accelerated"):
        mk.calibrate(pipe)
    handle.remove()


def test_files_that_cannot_be_read(calibrated, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            mk.CalibrationResult.load(tmp_path)

    refused("cannot read a calibration from")
    calibrated("minmax", STATIC, **SMALL).save(tmp_path)
    described, tensors = tmp_path / "calibration.json", tmp_path / "calibration.safetensors"
    report = json.loads(described.read_text())
    described.write_text(json.dumps({**report, "version": 99}))
    refused("is not a calibration of version 1")
    report["layers"]["mid_block.resnets.0.conv1"]["bits"] = 8
    described.write_text(json.dumps(report))
    refused(r"kpack_v1 with 8 bits, n=\d+, k=\d+ needs")
    tensors.write_bytes(tensors.read_bytes()[:-5])
    refused("cannot read a calibration from")
