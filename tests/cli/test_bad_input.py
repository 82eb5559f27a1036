"""What the commands refuse: one line that says what, exit code 2, and nothing left behind."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch

from modiff_kernels.cli import main


@pytest.mark.parametrize("command", ["compare", "sample"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--scheduler euler",
            "'ddim', 'ddpm', 'pndm', 'dpmsolver++', 'dpmsolver++-karras', 'dpmsolver++-lu', 'unipc', 'flow-euler'",
        ),
        ("--steps many", "--steps: invalid number value: 'many'"),
        ("--steps 1001", "trained on 1000 steps"),
        ("--threads 0", "--threads: must be at least 1"),
        ("--threads 100000", "--threads: must be at least 1 and at most"),
        ("--backend fast", "invalid choice: 'fast' (choose from 'auto', 'cpu'"),
        ("--seed -1", "--seed: must be at least 0 and at most"),
        ("--weight-bits 7", "'7' is not a supported number of bits; allowed: 3, 4, 8"),
        ("--act-bits 5", "'5' is not a supported number of bits; allowed: 3, 4, 7, 8"),
        ("--schedule none.json", "none.json is no schedule of this version (FileNotFoundError"),
        ("--prompt cat", "takes no text"),
        ("--scheduler flow-euler", "flow-euler is for models of flow matching alone; this has a "),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_options_of_sampling(refused, command, options, message):
    assert message in refused(command, *options.split())


def test_commands_and_schedules(refused):
    refused()
    refused("compute")
    message = "every=1 is not allowed; give a whole number, 2 or more; or auto, or none"
    assert message in refused("compare", "--schedule", "hold every=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(refused):
    assert "no CUDA device" in refused("compare", "--device", "cuda")


def test_outputs_that_cannot_be_written(refused, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    for option in ("--json", "--grid", "--out"):
        assert "cannot write" in refused("compare", option, blocked / "below.png")
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
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "give the folder of a pipeline"),
        ("model_index.json", {"vae": ["a", "b"]}, "holds no denoiser (of vae); `modiff` takes one unet or transformer"),
        ("model_index.json", {"transformer": ["a"], "transformer_2": ["a"]}, "transformer and transformer_2"),
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


def test_what_needs_no_torch_is_answered_without():
    answers = {
        "compare --help": "avg bits",
        "sample --steps 0": "--steps: must be at least 1",
        "sample --model /nowhere": "/nowhere: no such folder",
        "sample --out a.jpg": "a.jpg: pictures are written as PNG; give a name that ends in .png, or the name of",
        "compare --grid a.txt": "a.txt: pictures are written as PNG",
        "compare --rows float,fast": "--rows: no row 'fast'; allowed: float-contiguous",
        "sample --model /": "--model /: neither config.json (a UNet) nor model_index.json",
        "sample --calibration /nowhere": "--calibration: cannot read a calibration from /nowhere ([Errno 2]",
        "calibrate --method mse --weights /nowhere": "--weights: cannot read a calibration from /nowhere ([Errno 2]",
        f"calibrate --plan --out {__file__}/a.json": "a.json: File exists; give another path",
        "calibrate --schedule": "one of --evaluations, --budget-db and --speedup is required",
    }
    code = "import sys; from modiff_kernels.cli import main\nfor words in sys.argv[1:]:\n    try: main(words.split())\n"
    code += "    except SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *answers], capture_output=True, text=True, check=True)
    assert [text for text in answers.values() if text not in done.stdout + done.stderr] == []


@pytest.mark.parametrize("command", ["sample --out OUT/a.png", "sample --out OUT", "compare --rows plain --out OUT"])
def test_a_full_disk(unet_folder, tmp_path, capsys, command):
    words = f"{command} --model {unet_folder} --images 2 --batch 2 --steps 3 --threads 1 --quiet"
    words = words.replace("OUT", f"{tmp_path}/out").split()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(f"modiff [a-z]*: error: cannot write {tmp_path}/out/.*: .*\n", capsys.readouterr().err)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("output", "code"), [("closed", 141), ("/dev/full", 2)])
def test_output_that_nobody_takes(monkeypatch, capsys, output, code):
    read, write = os.pipe()
    os.close(read)
    with open(write if output == "closed" else output, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["doctor"]) == code
    assert capsys.readouterr().err.count("\n") == (code == 2)
