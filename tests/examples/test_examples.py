"""The short examples run as they stand, on small models with random weights or on the shipped one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lora_file(sd_folder, tmp_path):
    peft = pytest.importorskip("peft", reason="diffusers loads LoRAs through peft; pip install peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder)
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_v", "to_out.0"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return tmp_path / "pytorch_lora_weights.safetensors"


def run(name, *words):
    importlib.import_module(f"examples.{name}").main([str(word) for word in words])


@pytest.mark.parametrize("bits", [4, 8])
def test_transformer(dit_folder, tmp_path, capsys, bits):
    out = tmp_path / "a.png"
    run("transformer", "--model", dit_folder, "--classes", 1, 2, 3, "--steps", 3, "--act-bits", bits, "--out", out)
    assert Image.open(out).size == (24, 8)
    assert f"{'quantized' if bits == 8 else 'modulated'}  w8a{bits}" in capsys.readouterr().out


def test_custom_loop(tmp_path, capsys):
    for options in ([], ["--schedule", "auto 8"]):
        run("custom_loop", "--batch", 2, "--out", tmp_path / "a.png", *options)
        assert Image.open(tmp_path / "a.png").size == (2 * 16 * 8, 16 * 8)
    assert "8 update, 17 forecast" in capsys.readouterr().out


def test_own_network(capsys):
    importlib.import_module("examples.own_network").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["W8A8", "W8A4", "W8A3"]
    assert all(float(line.split()[1]) > 40 for line in lines)


def test_lora_changes_the_picture_and_may_stand_beside(sd_folder, lora_file, tmp_path):
    pictures = []
    for place, options in enumerate(([], ["--beside"], ["--scale", 0])):
        out = tmp_path / f"{place}.png"
        run("lora", "--model", sd_folder, "--lora", lora_file, "--steps", 6, "--out", out, *options)
        pictures.append(torch.frombuffer(bytearray(Image.open(out).tobytes()), dtype=torch.uint8).float())
    near, far = [(pictures[0] - other).abs().mean() for other in pictures[1:]]  # of 255
    assert near < 1.5 < 4 < far


@pytest.mark.slow
def test_batch_job_shares_and_resumes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [str(ROOT / "examples/batch_job.py"), "--images", "5", "--batch", "2", "--steps", "2", "--out", str(tmp_path)]
    for seed in (0, 3):
        (tmp_path / f"{seed:05}.png").touch()  # of an earlier job
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *job], env=env, capture_output=True, text=True, check=True)
    assert f"3 pictures by 2 processes in {tmp_path}, 2 were there already" in done.stdout
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {name for name, size in sizes.items() if size} == {"00001.png", "00002.png", "00004.png"}


def test_notebook(capsys):
    notebook = json.loads((ROOT / "examples/quick_start.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear it before it is committed"
            exec("".join(cell["source"]), names)
    assert names["together"].size == (768, 288)
    assert "8 update, 42 forecast" in capsys.readouterr().out
