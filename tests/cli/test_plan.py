"""`modiff calibrate --plan`, `modiff explain`, and `--plan` of the other commands."""

import json
from xml.etree import ElementTree

import pytest
from PIL import Image

from modiff_kernels.cli import main
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.integrations import plans
from modiff_kernels.planning.cost import Machine

SAMPLING = ["--steps", "4", "--batch", "2", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def by_hand(tmp_path):
    path = tmp_path / "by_hand.json"
    path.write_text('{"units": {"mid_block": "float", "up_blocks": "quantized 8"}}')
    return path


def test_calibrate_then_use(unet_folder, tmp_path, cache, capsys):
    out = tmp_path / "plan.json"
    model = ["--model", str(unet_folder)]
    assert main(["calibrate", "--plan", *model, *SAMPLING, "--rounds", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    plan = LayerPlan.from_json(out.read_text())
    assert plan.source == "measured"
    assert plan.summary in printed
    assert all(unit.path in printed for unit in plan.units)
    assert LayerPlan.from_json(next(cache.rglob("2x3x8x8.json")).read_text()) == plan
    compare = ["compare", *model, *SAMPLING, "--images", "2", "--repeats", "1", "--rows", "planned"]
    assert main([*compare, "--plan", str(out), "--json", str(tmp_path / "c.json")]) == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert [(row["name"], row["plan"]) for row in report["rows"]] == [("W8 planned", str(out))]
    assert any(note.startswith("W8 planned (measured): ") for note in report["notes"])
    assert main(["sample", *model, *SAMPLING, "--plan", str(out), "--out", str(tmp_path / "s.png")]) == 0
    capsys.readouterr()
    assert main(["explain", *model, "--threads", "1", "--quiet", "--json", str(tmp_path / "e.json")]) == 0
    assert plan.summary in capsys.readouterr().out
    explained = json.loads((tmp_path / "e.json").read_text())
    assert LayerPlan.from_json(json.dumps(explained["plan"])) == plan


def test_explain_estimates_where_nothing_is_stored(unet_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plans, "measured_machine", lambda *_: Machine(1e12, 1e10, 1e12))
    drawn = ["--plot", str(tmp_path / "e.svg"), "--schedule", "auto"]
    assert main(["explain", "--model", str(unet_folder), "--quiet", *drawn]) == 0
    assert ElementTree.parse(tmp_path / "e.svg").getroot().tag.endswith("svg")
    printed = capsys.readouterr().out
    assert "calls are computed (#): ###" in printed
    assert "plan (estimated): estimated from shapes" in printed
    assert "times are microseconds" not in printed
    for mode in ("float", "weight_only"):
        assert main(["explain", "--model", str(unet_folder), "--mode", mode]) == 0
        assert "plan (" not in capsys.readouterr().out


def test_a_plan_by_hand(unet_folder, by_hand, tmp_path, capsys):
    """Modulated layers count 16 bits in the first of 4 calls, then 8; plain ones 8; float ones are not counted."""
    out = tmp_path / "c.json"
    options = ["--images", "2", "--repeats", "1", "--rows", "planned", "--json", str(out)]
    planned = ["--model", str(unet_folder), "--plan", str(by_hand)]
    assert main(["compare", *planned, *SAMPLING, *options]) == 0
    drawn = ["--plot", str(tmp_path / "e.png"), "--schedule", "U2F2", "--steps", "4"]
    assert main(["explain", *planned, *drawn, "--batch", "2", "--json", str(tmp_path / "e.json")]) == 0
    assert Image.open(tmp_path / "e.png").width > 800
    printed = capsys.readouterr().out
    assert "2 of 4 calls are computed (#): ##..\n" in printed
    assert "plan (given)" in printed
    assert "times are microseconds" in printed
    explained, row = json.loads((tmp_path / "e.json").read_text()), json.loads(out.read_text())["rows"][0]
    assert explained["state_bytes"] == row["state_bytes"] > 10_000, "what it will be, and what it was"
    mode_of = {layer["name"]: layer["mode"] for layer in explained["layers"]}
    for block, mode in {"mid_block": "float", "up_blocks.0": "quantized", "down_blocks.0": "modulated"}.items():
        assert mode_of[f"{block}.resnets.0.conv1"] == mode
    modes = [*mode_of.values()]
    modulated, plain = modes.count("modulated"), modes.count("quantized")
    expected = (modulated * (16 + 3 * 8) / 4 + plain * 8) / (modulated + plain)
    assert row["average_bits"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("calibrate --plan --schedule", "not allowed with argument"),
        ("calibrate --plan --speedup 2", "--plan: --evaluations, --budget-db and --speedup are for"),
        ("calibrate", "one of the arguments --method --schedule --plan is required"),
        ("calibrate --plan --max-loss-db 0", "--max-loss-db: must be above 0"),
        ("calibrate --plan --mode float", "leave no low-bit mode to choose"),
        ("calibrate --plan --steps 1", "called the UNet 1 times"),
        ("explain --plan none.json", "cannot read none.json as a layer plan"),
        ("explain --mode float --plan BY_HAND", "--mode float has no low bits to plan"),
        ("explain --plan FOREIGN", "'no_such_block' is no Linear, Conv2d or block"),
        ("explain --plan MODULATED --max-state-bytes 0", "does not say for which shape"),
        ("sample --scale 2", "--scale 2: pictures in a folder keep their size; give a PNG file as --out"),
        ("sample --plan README.md", "cannot read README.md as a layer plan"),
    ],
)
def test_bad_requests(unet_folder, by_hand, tmp_path, refused, arguments, message):
    names = {"BY_HAND": by_hand, "FOREIGN": tmp_path / "foreign.json", "MODULATED": tmp_path / "modulated.json"}
    names["FOREIGN"].write_text('{"units": {"no_such_block": "float"}}')
    names["MODULATED"].write_text('{"units": {"mid_block": "modulated 8"}}')
    command, *options = arguments.split()
    out = ["--out", tmp_path / "out"] if command in ("calibrate", "sample") else []
    options = [names.get(option, option) for option in options]
    assert message in refused(command, "--model", unet_folder, *options, *out, "--quiet")
