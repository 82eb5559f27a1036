import json
import math

import numpy as np
import pytest
from PIL import Image

from modiff_kernels.evaluation import markdown_table, text_table, to_json
from modiff_kernels.evaluation.images import image_grid

ROWS = [["plain W8A8", "45.1", "1.02"], ["a", "9", "-"]]


def test_tables():
    assert text_table(["configuration", "PSNR", "speed-up"], ROWS).splitlines() == [
        "configuration  PSNR  speed-up",
        "-------------  ----  --------",
        "plain W8A8     45.1      1.02",
        "a                 9         -",
    ]
    assert markdown_table(["a", "b", "c"], ROWS).splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| plain W8A8 | 45.1 | 1.02 |",
        "| a | 9 | - |",
    ]
    for table in (text_table, markdown_table):
        with pytest.raises(ValueError, match="has 3 cells"):
            table(["a", "b"], ROWS)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_every_image(tmp_path, channels):
    dark, bright = np.zeros((3, 16, 16, channels)), np.ones((3, 16, 16, channels))
    image_grid({"dark": dark, "bright": bright}, tmp_path / "grid.png", cell=64, columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 2 * 68 + 4
    assert (grid[4:68, -68:-4] == 0).all()
    assert (grid[72:136, -68:-4] == 255).all()
    assert (grid[4:68, -136:-72] == 0).all()
    assert (grid[:68, :20] == 0).any(), "no label drawn"


def test_image_grid_keeps_large_images_and_survives_nan(tmp_path):
    image_grid({"nan": np.full((1, 100, 80, 3), np.nan)}, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").height == 108
    with pytest.raises(ValueError, match="no rows"):
        image_grid({}, tmp_path / "grid.png")


def test_json_is_standard():
    text = to_json({"rows": [{"psnr_db": math.inf, "ssim": np.float32(0.5), "n": np.int64(3)}], "x": (1.5, "a")})
    assert json.loads(text) == {"rows": [{"psnr_db": None, "ssim": 0.5, "n": 3}], "x": [1.5, "a"]}
