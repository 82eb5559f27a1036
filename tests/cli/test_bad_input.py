import json
import subprocess
import sys

import pytest
import torch

from modiff_kernels.cli import main


def refused(capsys, *argv):
    """The single line on stderr of a refused command."""
    try:
        code = main([str(item) for item in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert "error: " in err
    return err


@pytest.mark.parametrize("command", ["compare", "sample"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--scheduler", "euler"], "'ddim', 'ddpm', 'pndm', 'dpmsolver++', 'unipc'"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--steps", "-3"], "--steps: must be at least 1, got -3"),
        (["--steps", "many"], "--steps"),
        (["--steps", "1001"], "trained on 1000 steps"),
        (["--batch", "0"], "--batch: must be at least 1"),
        (["--images", "0"], "--images: must be at least 1"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--seed", "-1"], "--seed: must be at least 0 and at most"),
        (["--weight-bits", "5"], "'5' is not a supported number of bits; allowed: 3, 4, 8"),
        (["--act-bits", "16"], "'16' is not a supported number of bits; allowed: 3, 4, 8"),
        (["--device", "tpu"], "--device"),
        (["--schedule", "hold every=1"], "every=1 is not allowed; give a whole number, 2 or more; or auto, or none"),
        (["--prompt", "a cat"], "takes no text"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_options(capsys, command, options, message):
    assert message in refused(capsys, command, *options)


def test_no_command_and_unknown_command(capsys):
    refused(capsys)
    refused(capsys, "compute")


def test_unknown_row_lists_the_rows(capsys):
    assert "modulated-w8a4" in refused(capsys, "compare", "--rows", "float,fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(capsys):
    assert "no CUDA device" in refused(capsys, "compare", "--device", "cuda")


@pytest.mark.parametrize("option", ["--json", "--grid", "--out"])
def test_output_that_cannot_be_written(capsys, tmp_path, option):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    assert "cannot write" in refused(capsys, "compare", option, blocked / "below")
    assert blocked.read_text() == "kept"


def test_output_that_is_a_folder(capsys, tmp_path):
    assert "Is a directory" in refused(capsys, "compare", "--json", tmp_path)


def test_nothing_is_left_behind_by_a_refused_command(capsys, tmp_path):
    refused(capsys, "compare", "--json", tmp_path / "a.json", "--model", "/nowhere/at/all")
    assert not (tmp_path / "a.json").exists()


def test_folder_without_a_model(capsys, tmp_path):
    assert "neither config.json" in refused(capsys, "compare", "--model", tmp_path)


def test_broken_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "cannot read" in refused(capsys, "compare", "--model", tmp_path)


def test_config_without_weights(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert "cannot load it" in refused(capsys, "compare", "--model", tmp_path)


def test_conditional_unet_without_its_pipeline(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert "give the folder of its pipeline" in refused(capsys, "compare", "--model", tmp_path)


def test_pipeline_without_a_unet(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "transformer": ["a", "b"]}))
    assert "holds no unet (it holds transformer)" in refused(capsys, "compare", "--model", tmp_path)


def test_weights_with_nan(capsys, tmp_path, tiny_unet):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path)
    assert "parameter conv_in.weight holds NaN" in refused(capsys, "compare", "--model", tmp_path)


def test_learned_variance(capsys, tmp_path, tiny_unet):
    tiny_unet(out_channels=6).save_pretrained(tmp_path)
    assert "3 input and 6 output channels" in refused(capsys, "compare", "--model", tmp_path)


def test_help_answers_without_torch():
    code = "import sys; from modiff_kernels.cli import main\ntry: main(['compare', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "avg bits" in done.stdout
    assert "modulated-w8a4" in done.stdout
