"""What the commands refuse: one line that says what, exit code 2, and nothing left behind."""

import json
import subprocess
import sys

import pytest
import torch


@pytest.mark.parametrize("command", ["compare", "sample"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model /nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("--scheduler euler", "'ddim', 'ddpm', 'pndm', 'dpmsolver++', 'unipc'"),
        ("--steps many", "--steps: invalid number value: 'many'"),
        ("--steps 1001", "trained on 1000 steps"),
        ("--threads 0", "--threads: must be at least 1"),
        ("--seed -1", "--seed: must be at least 0 and at most"),
        ("--weight-bits 5", "'5' is not a supported number of bits; allowed: 3, 4, 8"),
        ("--schedule none.json", "none.json as `modiff calibrate` writes it (FileNotFoundError"),
        ("--prompt cat", "takes no text"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_options_of_sampling(refused, command, options, message):
    assert message in refused(command, *options.split())


def test_commands_and_rows(refused):
    refused()
    refused("compute")
    message = "every=1 is not allowed; give a whole number, 2 or more; or auto, or none"
    assert message in refused("compare", "--schedule", "hold every=1")
    assert "modulated-w8a4" in refused("compare", "--rows", "float,fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(refused):
    assert "no CUDA device" in refused("compare", "--device", "cuda")


def test_outputs_that_cannot_be_written(refused, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    for option in ("--json", "--grid", "--out"):
        assert "cannot write" in refused("compare", option, blocked / "below")
    assert "Is a directory" in refused("compare", "--json", tmp_path)
    refused("compare", "--json", tmp_path / "a.json", "--model", "/nowhere/at/all")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert blocked.read_text() == "kept"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("other.json", "{}", "neither config.json"),
        ("config.json", "{", "cannot read"),
        ("config.json", {"_class_name": "UNet2DModel"}, "cannot load it"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "give the folder of its pipeline"),
        ("model_index.json", {"_class_name": "DiT", "transformer": ["a", "b"]}, "no unet (it holds transformer)"),
    ],
)
def test_folders_without_a_unet(refused, tmp_path, file, text, message):
    (tmp_path / file).write_text(text if isinstance(text, str) else json.dumps(text))
    assert message in refused("compare", "--model", tmp_path)


def test_networks_that_cannot_be_sampled(refused, tmp_path, tiny_unet):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path / "nan")
    assert "parameter conv_in.weight holds NaN" in refused("compare", "--model", tmp_path / "nan")
    tiny_unet(out_channels=6).save_pretrained(tmp_path / "variance")
    assert "3 input and 6 output channels" in refused("compare", "--model", tmp_path / "variance")


def test_help_answers_without_torch():
    code = "import sys; from modiff_kernels.cli import main\ntry: main(['compare', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "avg bits" in done.stdout
    assert "modulated-w8a4" in done.stdout
