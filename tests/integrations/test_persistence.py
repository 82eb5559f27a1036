"""Low-bit models in files: saved and loaded bit by bit, within pipelines too; what is damaged or does not fit."""

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import modiff_kernels as mk
from modiff_kernels.config import DEFAULT_SKIP_MODULES
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.integrations import quantizer
from modiff_kernels.models import shipped_model_path
from modiff_kernels.nn.layer import ModulatedLayer
from tests.unets import FLOAT, calibrated_layer, outputs, snapshot, unet2d, unet2d_condition

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
STEPS = 4


@pytest.fixture(autouse=True)
def nothing_to_warn_of(caplog):
    """diffusers only warns of missing and unexpected keys."""
    loggers = [logging.getLogger("diffusers.models.modeling_utils"), logging.getLogger("diffusers.configuration_utils")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def sample(handle):
    """The last call of a run."""
    return outputs(handle.unet, handle, calls=STEPS)[-1]


def load(folder, kind=UNet2DModel, **options):
    return mk.accelerate(kind.from_pretrained(folder, **options))


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """Folder of a low-bit model, and a sample of it."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.no_grad():
        handle = mk.accelerate(unet2d(), mk.ModiffConfig(weight_bits=4))
        handle.save_pretrained(folder)
        return folder, sample(handle)


@pytest.fixture
def folder(saved_once, tmp_path):
    """A copy of the folder of `saved_once` to spoil."""
    return Path(shutil.copytree(saved_once[0], tmp_path / "saved"))


def rewrite(folder, name, value):
    """Change a tensor of the file in `folder`, or metadata, whose names begin with modiff; None leaves it out."""
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    changed = metadata if name.startswith("modiff") else tensors
    changed[name] = value
    if value is None:
        del changed[name]
    elif changed is tensors:
        metadata["modiff_crc32"] = json.dumps({**json.loads(metadata["modiff_crc32"]), name: 0})
    save_file(tensors, path, metadata=metadata)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("make", "options"),
        [
            (unet2d, {"weight_bits": 3, "act_bits": 3, "scale_mode": "delayed"}),
            (lambda: unet2d().half(), {"weight_bits": 4, "act_bits": 4, "backend": "reference"}),
            (unet2d_condition, {"weight_bits": 4, "act_bits": None}),
            (unet2d_condition, {"weight_bits": 3, "group_size": 24, "backend": "reference"}),
            (unet2d_condition, {"skip_modules": ("attentions",), "schedule": "hold every=2 first=1"}),
        ],
        ids=["delayed", "float16", "weight-only", "groups", "schedule"],
    )
    def test_samples_are_bit_identical(self, tmp_path, make, options):
        handle = mk.accelerate(make(), mk.ModiffConfig(**options))
        before, dtype = sample(handle), handle.unet.dtype
        handle.save_pretrained(tmp_path)
        assert load_file(tmp_path / WEIGHTS)["conv_norm_out.weight"].dtype == dtype
        loaded = load(tmp_path, type(handle.unet), torch_dtype=dtype)
        assert loaded.config == handle.config
        assert [row.mode for row in loaded.rows()] == [row.mode for row in handle.rows()]
        assert all(layer.packed.scale.dtype == torch.float32 for layer in loaded.layers.values() if layer.packed)
        assert torch.equal(sample(loaded), before)

    @pytest.mark.parametrize("plan", [None, LayerPlan.of({"mid_block": "float", "down_blocks.1": "quantized 8"})])
    def test_calibrated_layers(self, tmp_path, plan):
        """Codes that are not the nearest, scaled input channels, a bias, own inputs, and scales per call, which
        are those of the modulated layers of a plan: the others have dynamic ones, and keep what they were given."""
        config = mk.ModiffConfig(weight_bits=3, scale_mode="static", plan=plan)
        plain = mk.accelerate(unet2d(), mk.ModiffConfig(weight_bits=3))
        layers = {path: calibrated_layer(layer, 3, (0.01, 0.02, STEPS)) for path, layer in plain.layers.items()}
        result = mk.CalibrationResult("test", config, layers)
        handle = mk.accelerate(unet2d(), config, calibration=result, share_inputs=False)
        modes = {layer.mode: layer.input and layer.input.scale_mode for layer in handle.layers.values()}
        assert modes == {"modulated": "static", **({"quantized": "dynamic", "float": None} if plan else {})}
        before = sample(handle)
        assert not torch.equal(before, sample(plain))
        handle.save_pretrained(tmp_path / "a")
        loaded = load(tmp_path / "a")
        assert not loaded.share_inputs
        assert torch.equal(sample(loaded), before)
        loaded.unet.save_pretrained(tmp_path / "b")
        first, again = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())

    def test_shards(self, tmp_path):
        handle = mk.accelerate(unet2d(), mk.ModiffConfig(weight_bits=4))
        before = sample(handle)
        handle.save_pretrained(tmp_path)
        handle.save_pretrained(tmp_path, max_shard_size=9_000)
        assert not (tmp_path / WEIGHTS).exists()
        shard_of = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        layers = [key.removesuffix("_packed") for key in shard_of if key.endswith("weight_packed")]
        assert any(shard_of[key + "_packed"] != shard_of[key + "_scale"] for key in layers)
        loaded = load(tmp_path)
        assert torch.equal(sample(loaded), before)
        loaded.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
        assert torch.equal(sample(load(tmp_path)), before)


@pytest.mark.parametrize("bits", [8, 3])
def test_size_of_the_file(tmp_path, bits):
    unet = UNet2DModel.from_pretrained(shipped_model_path())
    total = sum(parameter.numel() for parameter in unet.parameters())
    handle = mk.accelerate(unet, mk.ModiffConfig(weight_bits=bits, fuse=False))
    low_bit = sum(layer.weight.numel() for layer in handle.layers.values())
    assert low_bit > 0.8 * total
    handle.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size <= 1.03 * (low_bit * bits / 8 + 4 * (total - low_bit))


class TestLoadedUNet:
    def test_pipeline(self, tmp_path):
        """Quantise while loading, sample, save the pipeline, load it again."""
        pipe = DDIMPipeline(unet2d(), DDIMScheduler())
        pipe.save_pretrained(tmp_path / "float")
        config = mk.ModiffConfig(weight_bits=4, act_bits=4)
        handle = mk.accelerate(pipe, config)
        before = pictures(pipe)
        handle.remove()

        quantization_config = PipelineQuantizationConfig(quant_mapping={"unet": config})
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=quantization_config).to("cpu")
        with pytest.raises(RuntimeError, match=r"loaded in low bits: `handle = modiff_kernels.accelerate\(pipe\)`"):
            pictures(pipe)
        handle = mk.accelerate(pipe)
        assert handle.config == config
        assert mk.accelerate(pipe.unet) is handle
        assert torch.equal(pictures(pipe), before)
        pipe.save_pretrained(tmp_path / "low")
        assert (tmp_path / "low/unet" / WEIGHTS).stat().st_size < (tmp_path / "float/unet" / WEIGHTS).stat().st_size

        pipe = DiffusionPipeline.from_pretrained(tmp_path / "low")
        mk.accelerate(pipe)
        assert torch.equal(pictures(pipe), before)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        mk.accelerate(pipe)
        assert torch.equal(pictures(pipe), before)

    def test_is_what_was_saved(self, saved_once):
        """With the config, the weights and the dtype it was saved with; what is refused changes nothing."""
        loaded = load(saved_once[0])
        arguments = {"config": mk.ModiffConfig(), "calibration": "folder", "share_inputs": False}
        for name, value in arguments.items():
            with pytest.raises(ValueError, match="was loaded in low bits, with the config it was saved"):
                mk.accelerate(loaded.unet, **{name: value})
        with pytest.raises(ValueError, match="has no set_timesteps"):
            mk.accelerate(types.SimpleNamespace(unet=loaded.unet, scheduler=object()))
        assert loaded.pipe is None
        with pytest.raises(ValueError, match="Casting a quantized model"):
            loaded.unet.to(torch.float16)
        assert mk.accelerate(loaded.unet) is loaded
        assert torch.equal(sample(loaded), saved_once[1])
        with pytest.raises(ValueError, match=r"a float weight was given, but .*; load the whole model again"):
            loaded.unet.load_state_dict(unet2d().state_dict())

    def test_back_to_full_precision(self, tmp_path, saved_once):
        """The weights are scale * code, and diffusers takes the UNet for one in full precision."""
        unet = unet2d()
        loaded = load(saved_once[0])
        assert loaded.unet.is_quantized
        with pytest.raises(RuntimeError, match=r"not kept \(keep_original=False\); load it again; unet.dequantize\(\)"):
            loaded.remove()
        assert loaded.unet.dequantize() is loaded.unet
        loaded.unet.save_pretrained(tmp_path / "float")
        assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
        plain = UNet2DModel.from_pretrained(tmp_path / "float").state_dict()
        assert plain.keys() == unet.state_dict().keys()
        weight = unet.mid_block.resnets[0].conv1.weight
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 7
        torch.testing.assert_close(plain["mid_block.resnets.0.conv1.weight"], scale * torch.round(weight / scale))
        assert torch.equal(plain["conv_in.weight"], unet.conv_in.weight)
        loaded.unet.to(torch.float64)


def live_bytes():
    """Of all tensors there are."""
    gc.collect()
    with warnings.catch_warnings(action="ignore"):
        storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}.values())


class TestWithoutOriginals:
    """accelerate(keep_original=False)."""

    CONFIGS = ({"fuse": False}, {"mode": "quantized"}, {"weight_bits": 4, "group_size": 16})

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_a_run_and_what_is_refused(self, config, tmp_path):
        config = mk.ModiffConfig(**config)
        kept = mk.accelerate(unet2d_condition(), config)
        handle = mk.accelerate(unet2d_condition(), config, keep_original=False)
        unet, expected = handle.unet, sample(kept)
        assert torch.equal(sample(handle), expected)
        assert (unet.dtype, unet.device, handle.rows()) == (kept.unet.dtype, kept.unet.device, kept.rows())
        for do, error, message in (
            (handle.remove, RuntimeError, r"not kept \(keep_original=False\); load it again"),
            (handle.refresh, RuntimeError, "the float weights are not there"),
            (unet.fuse_lora, RuntimeError, "changes layers of a UNet that is accelerated"),
            (lambda: unet.save_pretrained(tmp_path), RuntimeError, r"call handle.save_pretrained\(\)"),
            (lambda: unet.load_state_dict(kept.unet.state_dict()), ValueError, "a float weight was given, but its own"),
        ):
            with pytest.raises(error, match=message):
                do()
        missing = {f"{path}.weight" for path in handle.layers}
        assert unet.state_dict().keys() == kept.unet.state_dict().keys() - missing
        unet.load_state_dict(unet.state_dict())
        assert torch.equal(sample(handle), expected)
        handle.save_pretrained(tmp_path)
        assert torch.equal(sample(load(tmp_path, type(unet))), expected)
        processor = type("Other", (AttnProcessor2_0,), {})  # for which fused attention is that of diffusers
        for each in (unet, kept.unet):
            each.set_attn_processor(processor())
        torch.testing.assert_close(sample(handle), sample(kept), atol=0.05, rtol=0.05)

    def test_memory(self, tmp_path, monkeypatch):
        """At 8 bits of float16: no float weights of low-bit layers, when loaded nor later, nor all beside codes."""
        options = {"block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        unet = unet2d_condition(**options, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).half()
        everything, before = sum(p.nbytes for p in unet.parameters()), live_bytes()
        free, found = ModulatedLayer.free_original, []
        look = lambda layer: [found or found.append(live_bytes()), free(layer)]  # noqa: E731
        monkeypatch.setattr(ModulatedLayer, "free_original", look)
        handle = mk.accelerate(unet, mk.ModiffConfig(backend="reference"), keep_original=False)
        low_bit = sum(layer.weight_shape.numel() for layer in handle.layers.values())
        expected = everything - low_bit  # one byte instead of two
        assert found[0] - before < low_bit / 4
        assert live_bytes() - before + everything < 1.1 * expected
        handle.save_pretrained(tmp_path)
        del unet, handle
        before = live_bytes()
        loaded = load(tmp_path, diffusers.UNet2DConditionModel, torch_dtype=torch.float16)
        assert live_bytes() - before < 1.1 * expected
        assert loaded.unet.dtype is torch.float16

    def test_nothing_is_let_go_of_on_an_error(self):
        unet = unet2d_condition()
        before = snapshot(unet), [*map(id, unet.parameters())]
        last = unet.up_blocks[-1].resnets[-1].conv2.weight
        last.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"conv2': the weight holds NaN or Inf; repair"):
            mk.accelerate(unet, keep_original=False)
        assert (snapshot(unet), [*map(id, unet.parameters())]) == before


def pictures(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    return torch.from_numpy(pipe(**options, generator=torch.Generator().manual_seed(0)).images)


class TestRefusedFiles:
    LAYER = "mid_block.resnets.0.conv1"

    @pytest.mark.parametrize("key", [f"{LAYER}.weight_packed", f"{LAYER}.weight_scale", "conv_in.weight"])
    def test_damaged_bytes(self, folder, key):
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            raw = file.get_tensor(key).view(torch.uint8).numpy().tobytes()
        content = bytearray((folder / WEIGHTS).read_bytes())
        assert content.count(raw) == 1
        content[content.index(raw) + len(raw) // 2] ^= 0x10
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: '{key}' is damaged: the CRC-32"):
            UNet2DModel.from_pretrained(folder)

    def test_truncated(self, tmp_path):
        handle = mk.accelerate(unet2d(), mk.ModiffConfig())
        handle.save_pretrained(tmp_path, max_shard_size=60_000)
        file = sorted(tmp_path.glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises((OSError, ValueError), match=file.name):
            UNet2DModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("modiff_format", "2", r"modiff_format is '2' .* reads '1' and 'kpack_v1'"),
            ("modiff_layout", "kpack_v2", r"modiff_layout 'kpack_v2'"),
            ("modiff_crc32", "{}", r"'modiff_crc32' in the metadata has no sum of "),
            ("modiff_crc32", "{", r"'modiff_crc32' or 'modiff_share_edges' in the metadata is damaged"),
            ("conv_out.bias", None, "the key 'conv_out.bias' .*is missing"),
            (f"{LAYER}.weight_scale", None, f"the key '{LAYER}.*is missing"),
            (f"{LAYER}.weight_packed", None, f"the key '{LAYER}.*is missing"),
            ("extra.weight", torch.zeros(2), "the key 'extra.weight' is not known"),
            ("modiff_format", None, r"the metadata has no 'modiff_format', so this is no low-bit model"),
        ],
    )
    def test_keys_and_metadata(self, folder, name, value, message):
        rewrite(folder, name, value)
        with pytest.raises(ValueError, match=f"{WEIGHTS}: .*{message}"):
            UNet2DModel.from_pretrained(folder)

    def test_config_of_another_model(self, folder):
        text = (folder / "config.json").read_text()
        for change, message in (
            ({"block_out_channels": [16, 16]}, rf"{WEIGHTS}: '.*' is .* asks for"),
            ({"weight_bits": 8}, rf"{WEIGHTS}: '.*weight_packed' is U8 .*weight_bits=8.* asks for I8 "),
            ({"group_size": 16}, rf"{WEIGHTS}: '.*weight_scale' is F32 .*group_size=16"),
            ({"skip_modules": [*DEFAULT_SKIP_MODULES, "conv1"]}, r"weight' is low-bit in the files, but not so"),
            ({"skip_modules": []}, r"config.json does not fit the files: .*'conv_in'.* were not calibrated"),
            ({"weight_bits": 5}, r"weight_bits=5 is not allowed"),
        ):
            config = json.loads(text)
            (config if "block_out_channels" in change else config["quantization_config"]).update(change)
            (folder / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match=message):
                UNet2DModel.from_pretrained(folder)

    def test_pickled_files(self, tmp_path, saved_once):
        loading = quantizer.ModiffQuantizer(mk.ModiffConfig(), pre_quantized=True)
        with pytest.raises(ValueError, match=r"model.bin: low-bit models are stored in safetensors"):
            loading.maybe_update_loaded_keys([], [tmp_path / "model.bin"])
        loaded = load(saved_once[0])
        with pytest.raises(ValueError, match="safe_serialization=False is not allowed"):
            loaded.unet.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        assert not list((tmp_path / "pickled").glob("*.bin"))


class TestRefusedSaving:
    def test_what_cannot_be_saved(self, tmp_path):
        for make, error, message in (
            (lambda: mk.accelerate(torch.nn.Sequential(torch.nn.Linear(8, 8))), TypeError, "Sequential is no model of"),
            (lambda: mk.accelerate(unet2d(), mk.ModiffConfig(**FLOAT)), ValueError, "weight_bits is None"),
        ):
            handle = make()
            with pytest.raises(error, match=message):
                handle.save_pretrained(tmp_path / "out")
            assert not (tmp_path / "out").exists()
            handle.remove()
            with pytest.raises(RuntimeError, match="this handle was removed"):
                handle.save_pretrained(tmp_path)

    def test_a_file_is_in_the_way_and_the_unet_is_as_before(self, tmp_path):
        (tmp_path / "file").write_text("kept")
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(weight_bits=4))
        config, attributes = dict(unet.config), sorted(unet.__dict__)
        with pytest.raises(NotADirectoryError, match="file is a file; give a folder"):
            handle.save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "kept"
        handle.save_pretrained(tmp_path / "low")
        assert (dict(unet.config), sorted(unet.__dict__)) == (config, attributes)


class TestLoadingOptions:
    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu", "mid_block": "cuda"}, {"": "disk"}])
    def test_several_devices(self, saved_once, device_map):
        with pytest.raises(ValueError, match="is not allowed for a low-bit UNet, which has its state on one device"):
            UNet2DModel.from_pretrained(saved_once[0], device_map=device_map)

    def test_one_device(self, saved_once):
        folder, before = saved_once
        assert torch.equal(sample(load(folder, device_map={"": "cpu"})), before)
        assert torch.equal(sample(load(folder, disable_mmap=True)), before)

    def test_without_hugging_face_accelerate(self, saved_once, monkeypatch):
        monkeypatch.setattr(quantizer.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="loads low-bit models by accelerate"):
            UNet2DModel.from_pretrained(saved_once[0])


def test_diffusers_knows_the_method_whatever_is_imported_first(saved_once):
    """modiff_kernels first; this file imports diffusers first."""
    code = (
        "import sys, modiff_kernels\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "from diffusers import UNet2DModel\n"
        "unet = UNet2DModel.from_pretrained(sys.argv[1])\n"
        "print(modiff_kernels.accelerate(unet).config.weight_bits)\n"
        "assert 'modiff' not in type(sys.meta_path[0]).__module__\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, saved_once[0]], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"
