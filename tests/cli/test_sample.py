import pytest
from PIL import Image

from modiff_kernels.cli import main


@pytest.mark.parametrize("mode", ["float", "weight_only", "quantized", "modulated"])
def test_every_mode_writes_a_grid(unet_folder, tmp_path, capsys, mode):
    out = tmp_path / "grid.png"
    options = ["--steps", "3", "--images", "3", "--batch", "2", "--act-bits", "4", "--out", str(out), "--quiet"]
    assert main(["sample", "--model", str(unet_folder), "--mode", mode, *options]) == 0
    assert Image.open(out).size == (16, 16)
    assert capsys.readouterr().out == ""


def test_folder_gets_one_file_per_seed(unet_folder, tmp_path, capsys):
    out = tmp_path / "images"
    options = ["--steps", "2", "--images", "3", "--batch", "2", "--seed", "5", "--out", str(out)]
    assert main(["sample", "--model", str(unet_folder), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["image_0005.png", "image_0006.png", "image_0007.png"]
    assert "3 images in" in capsys.readouterr().out


def test_images_depend_on_the_seed_alone(unet_folder, tmp_path):
    for name, options in (("a", ["--batch", "1"]), ("b", ["--batch", "3"])):
        command = ["sample", "--model", str(unet_folder), "--steps", "3", "--images", "3", "--mode", "float", "--quiet"]
        assert main([*command, *options, "--out", str(tmp_path / name)]) == 0
    for image in (tmp_path / "a").iterdir():
        one, three = Image.open(image), Image.open(tmp_path / "b" / image.name)
        assert max(abs(a - b) for a, b in zip(one.tobytes(), three.tobytes(), strict=True)) <= 1
