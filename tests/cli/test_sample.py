import json
import shutil

import pytest
import torch
from PIL import Image

import modiff_kernels as mk
from modiff_kernels.cli import main
from modiff_kernels.cli.sample import Process
from modiff_kernels.evaluation import UserError, networks


def sample(folder, out, *options, quiet=("--quiet",)):
    command = ["sample", "--model", folder, "--steps", "3", "--batch", "2", *quiet, "--out", out, *options]
    return main([str(item) for item in command])


def pixels(folder):
    images = {path.name: Image.open(path).tobytes() for path in folder.glob("*.png")}
    assert len(set(images.values())) == len(images)
    return images


@pytest.mark.parametrize("mode", ["weight_only", "modulated"])
def test_every_mode_writes_a_grid(unet_folder, tmp_path, capsys, mode):
    out = tmp_path / "grid.png"
    assert sample(unet_folder, out, "--images", "3", "--mode", mode, "--act-bits", "4") == 0
    assert Image.open(out).size == (512, 512)
    own = tmp_path / "own.png"
    assert sample(unet_folder, own, "--images", "3", "--mode", mode, "--act-bits", "4", "--scale", "1") == 0
    assert Image.open(out).resize((16, 16), Image.Resampling.NEAREST).tobytes() == Image.open(own).tobytes()
    assert capsys.readouterr().out == ""


def test_pipeline_of_a_transformer(dit_folder, tmp_path):
    """It takes no text: a fit looks at its pictures, not at latents."""
    fit, report = tmp_path / "fit.json", tmp_path / "report.json"
    common = f"--model {dit_folder} --batch 2 --steps 8 --threads 1 --images 2 --quiet"
    assert main(f"calibrate --schedule --evaluations 5 --out {fit} {common}".split()) == 0
    assert main(f"compare --no-compile --repeats 1 --schedule {fit} --json {report} {common}".split()) == 0
    rows = {row["key"]: row for row in json.loads(report.read_text())["rows"]}
    assert min(rows[key]["psnr_db"] for key in ("plain-w8a8", "modulated-w8a8")) > 30
    assert rows["scheduled-w8a8"]["calls_computed"] == 5
    assert sample(dit_folder, tmp_path / "a", "--images", "2") == 0
    assert len(pixels(tmp_path / "a")) == 2


def test_images_depend_on_the_seed_alone(unet_folder, tmp_path):
    """Up to rounding: kernels are chosen by the size of the batch."""
    for name, options in (("a", ["--batch", "1"]), ("b", ["--batch", "3"])):
        assert sample(unet_folder, tmp_path / name, "--images", "3", "--seed", "5", "--mode", "float", *options) == 0
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert sorted(a) == sorted(b) == ["image_0005.png", "image_0006.png", "image_0007.png"]
    assert all(max(abs(i - j) for i, j in zip(a[name], b[name], strict=True)) <= 1 for name in a)


def test_images_do_not_depend_on_how_many_there_are(unet_folder, tmp_path):
    """Per tensor, a scale depends on the whole batch: the last one is filled up. The dearest case for independence."""
    for images in ("3", "6"):
        options = ("--images", images, "--granularity", "per_tensor", "--act-bits", "4")
        assert sample(unet_folder, tmp_path / images, *options) == 0
    few, many = pixels(tmp_path / "3"), pixels(tmp_path / "6")
    assert len(few) == 3
    assert few == {name: many[name] for name in few}


def test_two_processes_share_the_images(unet_folder, tmp_path, monkeypatch, capsys):
    assert sample(unet_folder, tmp_path / "one", "--images", "5") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("0", 3), ("1", 2)):
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        assert sample(unet_folder, tmp_path / "two", "--images", "5", quiet=()) == 0
        printed = capsys.readouterr().out
        assert f"{count} images in" in printed
        assert f"process {int(rank) + 1} of 2" in printed
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")


class TestResuming:
    @pytest.fixture(scope="class")
    def sampled(self, unet_folder, tmp_path_factory):
        out = tmp_path_factory.mktemp("sampled") / "out"
        assert sample(unet_folder, out, "--images", "4") == 0
        return out

    @pytest.fixture
    def out(self, sampled, tmp_path):
        return shutil.copytree(sampled, tmp_path / "out")

    def test_whole_images_are_kept_and_others_sampled_again(self, unet_folder, out, capsys, monkeypatch):
        before, (missing, damaged, short, kept) = pixels(out), sorted(out.glob("*.png"))
        content, written = bytearray(damaged.read_bytes()), kept.stat().st_mtime_ns
        content[content.index(b"IDAT") + 20] ^= 1  # a pixel
        missing.unlink()
        damaged.write_bytes(content)
        short.write_bytes(short.read_bytes()[:-20])
        assert sample(unet_folder, out, "--images", "4", quiet=()) == 0
        assert "3 images in" in (text := capsys.readouterr().out)
        assert "1 were there already" in text
        assert (pixels(out), kept.stat().st_mtime_ns) == (before, written)
        monkeypatch.setattr(networks, "sample_images", None)  # nothing is sampled where all is there
        assert sample(unet_folder, out, "--images", "4") == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "4"], "was sampled with steps 3, but this run has 4"),
            (["--act-bits", "4"], "was sampled with config {"),
            (["--batch", "4"], "was sampled with batch 2, but this run has 4"),
            (["--seed", "1"], "was sampled with batch_start 2, but this run has 1"),
            (["--scheduler", "ddpm"], "was sampled with scheduler 'ddim', but this run has 'ddpm'"),
        ],
    )
    def test_images_of_another_run(self, unet_folder, out, capsys, options, message):
        before = pixels(out)
        (out / "image_0001.png").unlink()
        assert sample(unet_folder, out, "--images", "4", *options) == 2
        assert message in capsys.readouterr().err
        assert sorted(pixels(out)) == sorted(set(before) - {"image_0001.png"})

    def test_images_of_other_weights(self, unet_folder, out, tmp_path, tiny_unet, capsys):
        other = tmp_path / "other" / unet_folder.name
        unet = tiny_unet()
        unet.conv_out.bias.data += 1e-3
        unet.save_pretrained(other)
        shutil.copytree(unet_folder / "scheduler", other / "scheduler")
        assert sample(other, out, "--images", "4") == 2
        assert "was sampled with weights '" in capsys.readouterr().err

    def test_images_of_something_else(self, unet_folder, out, capsys):
        Image.new("RGB", (8, 8)).save(out / "image_0002.png")
        assert sample(unet_folder, out, "--images", "4") == 2
        assert "image_0002.png was not written by `modiff sample`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def low_bit_folder(tmp_path_factory, tiny_unet, unet_folder):
    folder = tmp_path_factory.mktemp("low")
    mk.accelerate(tiny_unet(), mk.ModiffConfig(weight_bits=4, act_bits=4)).save_pretrained(folder)
    (folder / "scheduler").symlink_to(unet_folder / "scheduler")
    return folder


class TestSavedInLowBits:
    def test_is_sampled_as_it_was_saved(self, unet_folder, low_bit_folder, tmp_path):
        assert sample(unet_folder, tmp_path / "a", "--images", "2", "--weight-bits", "4", "--act-bits", "4") == 0
        assert sample(low_bit_folder, tmp_path / "b", "--images", "2") == 0
        assert pixels(tmp_path / "a") == pixels(tmp_path / "b")

    @pytest.mark.parametrize("option", [("--act-bits", "8"), ("--mode", "float"), ("--backend", "reference")])
    def test_has_its_own_configuration(self, low_bit_folder, tmp_path, capsys, option):
        assert sample(low_bit_folder, tmp_path / "out", *option) == 2
        assert f"{option[0]}: the model was saved in low bits" in capsys.readouterr().err

    def test_cannot_be_compared(self, low_bit_folder, capsys):
        assert main(["compare", "--model", str(low_bit_folder), "--quiet"]) == 2
        assert "was saved in low bits (modiff); give the model in full precision" in capsys.readouterr().err


class TestProcess:
    def test_of_the_environment(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert Process.launched() == Process(0, 1, 0)
        monkeypatch.setenv("LOCAL_RANK", "1")
        for rank, count in (("5", "8"), ("2", "2"), ("-1", "2"), ("0", "many"), ("0", "0")):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", count)
            if count == "8":
                assert Process.launched() == Process(5, 8, 1)
                continue
            with pytest.raises(UserError, match=f"RANK={rank}, WORLD_SIZE={count}, .*start with torchrun"):
                Process.launched()

    def test_cannot_share_one_file(self, monkeypatch, unet_folder, tmp_path, capsys):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert sample(unet_folder, tmp_path / "grid.png") == 2
        assert "2 processes cannot write one file; give a folder" in capsys.readouterr().err
        assert not (tmp_path / "grid.png").exists()

    def test_every_process_has_its_device(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert networks.choose_device("auto", 1) == torch.device("cuda", 1)
        assert chosen == [1]
        with pytest.raises(UserError, match="process 3 on this machine has no device of its own, torch sees 2"):
            networks.choose_device("cuda", 2)
        assert networks.choose_device("cpu", 2) == torch.device("cpu")
