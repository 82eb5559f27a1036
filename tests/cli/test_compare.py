import base64
import io
import json
import runpy
import sys
from xml.etree import ElementTree

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, LDMPipeline, VQModel
from PIL import Image

from modiff_kernels.cli import main

REQUIRED = {"model", "device", "steps", "batch", "scheduler", "threads", "rows", "command", "versions"}
REQUIRED_ROW = {"name", "weight_bits", "act_bits", "mode", "psnr_db", "ssim", "time_s", "speedup"}
REQUIRED_ROW |= {"state_bytes", "backend"}


def compare(*argv):
    assert main(["compare", "--quiet", "--repeats", "1", "--threads", "1", "--no-compile", *map(str, argv)]) == 0


def rows_of(path, *argv):
    compare(*argv, "--images", 2, "--batch", 2, "--json", path)
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def report(unet_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    compare("--model", unet_folder, "--steps", 12, "--images", 3, "--batch", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def rows(report):
    return {row["name"]: row for row in json.loads((report / "compare.json").read_text())["rows"]}


def test_json_has_the_promised_fields(report):
    data = json.loads((report / "compare.json").read_text())
    assert set(data) >= REQUIRED
    assert all(set(row) >= REQUIRED_ROW for row in data["rows"])
    assert (data["model"], data["steps"], data["batch"], data["scheduler"]) == ("tiny", 12, 2, "ddim")
    assert data["command"].startswith("modiff compare --quiet")
    assert "--out" not in data["command"]
    assert data["versions"]["torch"] == torch.__version__
    modes = [row["mode"] for row in data["rows"]]
    assert modes == ["float"] * 2 + ["weight_only"] + ["quantized"] * 2 + ["modulated"] * 4 + ["quantized"]


def test_distances_and_times(rows):
    reference, channels_last = rows["float32 eager contiguous"], rows["float32 eager channels_last"]
    assert reference["psnr_db"] is None
    assert channels_last["psnr_db"] is None or channels_last["psnr_db"] > 90
    assert max(reference["speedup"], channels_last["speedup"]) == 1
    assert channels_last["state_bytes"] == 0
    ceiling = rows["W8 float activations"]["psnr_db"]
    assert rows["modulated W8A8"]["psnr_db"] > ceiling - 4  # of a network with random weights, in 12 steps
    assert rows["modulated W8A4"]["psnr_db"] > rows["plain W8A4"]["psnr_db"]
    for row in rows.values():
        assert 0 < row["ssim"] <= 1
        assert row["time_s"] > 0


def test_state_and_average_bits(rows):
    assert rows["plain W8A8"]["state_bytes"] == rows["W8 float activations"]["state_bytes"] == 0
    assert rows["modulated W8A8"]["state_bytes"] == rows["modulated W8A3"]["state_bytes"] > 10_000
    updates = {"modulated W8A8": (16 + 11 * 8) / 12, "modulated W8A3": (16 + 11 * (3 + 5 / 16)) / 12}
    for name, bits in {"plain W8A4": 4, "W8 float activations": 32, **updates}.items():
        assert rows[name]["average_bits"] == pytest.approx(bits)


def test_scheduled_row_skips_calls(rows, report):
    row = rows["modulated W8A8 scheduled"]
    assert row["schedule"] == "auto"
    assert row["calls_computed"] == 8  # of 12: the first three, every second one, the last
    assert row["average_bits"] == pytest.approx((16 + 7 * 8) / 12)
    assert rows["modulated W8A8"]["calls_computed"] == 12
    assert row["psnr_db"] > 20
    outputs = 3 * 2 * 3 * 8 * 8 * 4  # three values of a batch of two
    assert row["state_bytes"] == rows["modulated W8A8"]["state_bytes"] + outputs
    notes = json.loads((report / "compare.json").read_text())["notes"]
    assert any("modulated W8A8 scheduled: auto, last forecast: skips calls" in note for note in notes)


def test_given_schedule_rows_and_bits(unet_folder, tmp_path):
    options = ["--steps", 9, "--images", 2, "--batch", 2, "--rows", "scheduled", "--act-bits", "8,4"]
    schedule = "UUHHUHHFU stochastic=False"
    compare("--model", unet_folder, *options, "--schedule", schedule, "--json", tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert f"--schedule '{schedule}'" in data["command"]
    assert [row["name"] for row in data["rows"]] == ["modulated W8A8 scheduled", "modulated W8A4 scheduled"]
    assert data["rows"][0]["schedule"] == "U2H2UH2FU"
    assert data["rows"][0]["calls_computed"] == 4
    assert data["rows"][0]["average_bits"] == pytest.approx((16 + 3 * 8) / 9)
    options = ["--steps", 2, "--rows", "modulated", "--schedule", "none", "--weight-bits", "8,4", "--act-bits", 4]
    rows = rows_of(tmp_path / "b.json", "--model", unet_folder, *options)
    assert [(row["name"], row["speedup"]) for row in rows] == [("modulated W8A4", None), ("modulated W4A4", None)]


@pytest.mark.parametrize("quiet", [True, False])
def test_a_schedule_that_leaves_nothing_out(unet_folder, capsys, quiet):
    options = ["--steps", "5", "--images", "2", "--batch", "2", "--rows", "scheduled", "--repeats", "1"]
    assert main(["compare", "--model", str(unet_folder), *options, *(["--quiet"] if quiet else [])]) == 0
    out, err = capsys.readouterr()
    assert "modulated W8A8 scheduled (no call left out)  " in out
    line = "modiff compare: warning: schedule 'auto': every call is computed, because 5 calls are few\n"
    assert err == "" if quiet else line in err.replace("\r", "\n")
    assert "UserWarning" not in err


def test_markdown_and_grid(report):
    text = (report / "compare.md").read_text()
    assert text.startswith("| configuration | PSNR dB | SSIM | s/image | speed-up | state MB | avg bits | backend |")
    assert "| float32 eager contiguous | reference | 1 |" in text
    assert "Warm-up of 2 steps" in text
    assert Image.open(report / "compare_grid.png").height == 7 * (96 + 4) + 4  # full precision, three rows and errors
    assert Image.open(report / "speed_quality.png").width > 400


def test_the_page_needs_no_other_file(report, rows):
    page = ElementTree.parse(report / "compare.html")
    images = [image.get("src").split(";base64,") for image in page.iter("img")]
    assert [kind for kind, _ in images] == ["data:image/png"] * (7 * 3) + ["data:image/svg+xml"]
    assert {element.tag for element in page.iter()}.isdisjoint({"script", "link", "iframe"})
    assert Image.open(io.BytesIO(base64.b64decode(images[0][1]))).size == (8, 8)
    assert ElementTree.fromstring(base64.b64decode(images[-1][1])).tag.endswith("svg")
    actions = rows["modulated W8A8 scheduled"]["actions"]
    assert actions == "UUUFUFUFUFUU"
    calls = [call.get("title").partition(": ")[2] for call in page.iter("i")]
    assert calls == [{"U": "computed", "F": "forecast"}[letter] for letter in actions] * 2  # modulated and plain


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddpm", "pndm", "unipc"])
def test_every_scheduler_samples(unet_folder, tmp_path, scheduler):
    options = ["--steps", 3, "--rows", "modulated-w8a8", "--scheduler", scheduler]
    assert rows_of(tmp_path / "a.json", "--model", unet_folder, *options)[0]["psnr_db"] > 15


def test_a_failing_torch_compile_is_left_out_and_said(unet_folder, tmp_path, monkeypatch, capsys):
    def broken(module):
        module.forward = lambda *args, **kwargs: 1 / 0

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    options = ["--steps", "2", "--images", "1", "--rows", "float", "--repeats", "1"]
    assert main(["compare", "--model", str(unet_folder), *options]) == 0
    out = capsys.readouterr().out
    assert "float32 torch.compile channels_last is left out, torch.compile failed: division by zero" in out


DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 4}


@pytest.mark.parametrize("kind", ["classes", "pixels", "latents", "dit"])
def test_other_kinds_of_models(tiny_unet, tmp_path, kind):
    model = unet = tiny_unet(num_class_embeds=4 if kind == "classes" else None)
    if kind == "pixels":
        model = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    elif kind == "latents":
        torch.manual_seed(0)
        vqvae = VQModel(block_out_channels=(16,), norm_num_groups=8, latent_channels=3)
        model = LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    elif kind == "dit":
        model = DiTTransformer2DModel(in_channels=3, **DIT)
    model.save_pretrained(tmp_path / "model")
    options = ["--steps", 3, "--rows", "float-contiguous,modulated-w8a8"]
    reference, modulated = rows_of(tmp_path / "a.json", "--model", tmp_path / "model", *options)
    assert reference["psnr_db"] is None
    assert modulated["psnr_db"] > 20
    assert modulated["state_bytes"] > 10_000
    assert main(["explain", "--model", str(tmp_path / "model"), "--quiet"]) == 0


def test_python_m_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modiff", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("modiff_kernels", run_name="__main__")
    assert capsys.readouterr().out.startswith("modiff_kernels ")
