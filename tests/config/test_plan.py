import json

import pytest

from modiff_kernels.config.plan import Candidate, LayerPlan, Mode, ModeCost, PlanKey, UnitPlan

FLOAT, PLAIN, MODULATED = Mode("float"), Mode("quantized", 8), Mode("modulated", 4)
UNIT = UnitPlan(
    "mid_block.resnets.0",
    MODULATED,
    ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"),
    (ModeCost(FLOAT, 300.5), ModeCost(PLAIN, 120.25, 40.5), ModeCost(MODULATED, 125.0, 51.0, 4096, 8192.0)),
    "quantized 8 is faster, but fidelity would leave the limits",
)
KEY = PlanKey("a CPU, 2 threads", "0123", (8, 3, 16, 16), "4567", "modiff_kernels 0, torch 0")
PLAN = LayerPlan(
    (UNIT, UnitPlan("up_blocks.0", FLOAT)),
    KEY,
    "measured",
    (Candidate("float", 900.0, None), Candidate("all modulated 4", 410.0, 49.5, 4096)),
    "all modulated 4: 2.20x as fast as float",
    0.5,
)


def test_modes():
    for text in ("float", "quantized 8", "modulated 3"):
        assert str(Mode.parse(text)) == text
        assert Mode.parse(Mode.parse(text)) == Mode.parse(text)
    for text in ("", "fast", "float 8", "constant", "quantized", "modulated 5", "modulated x", 8, None):
        with pytest.raises(ValueError, match=r"LayerPlan: mode .* is not allowed; give float, or quantized"):
            Mode.parse(text)


def test_json_round_trip_and_a_plan_by_hand():
    again = LayerPlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert hash(again) == hash(PLAN)
    assert again.key.digest == KEY.digest
    plan = LayerPlan.from_json('{"units": {"mid_block": "float", "up_blocks.0": "quantized 8"}}')
    assert plan == LayerPlan.of({"mid_block": "float", "up_blocks.0": "quantized 8"})
    assert (plan.source, plan.key, plan.state_bytes, plan.is_float) == ("given", None, 0, False)
    assert LayerPlan.of({"mid_block": "float"}).is_float
    assert not LayerPlan(()).is_float


def units(*texts):
    return '{"units": [' + ", ".join(texts) + "]}"


def test_bad_json():
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "no object with 'units'"),
        ('{"units": [{"mode": "float"}]}', "not a plan as to_json"),
        (units('{"path": 3, "mode": "float"}'), "path 3 is not allowed"),
        ('{"units": {"a": "fast"}}', "mode 'fast' is not allowed"),
        ('{"units": {"a": "float"}, "colour": 1}', "not a plan as to_json.* 'colour'"),
        (units(*['{"path": "a", "mode": "float"}'] * 2), "'a' is there twice"),
        (units('{"path": "a", "mode": "float", "costs": [{"mode": "float", "time_us": "x"}]}'), "time_us='x' of 'a'"),
        (units('{"path": "a", "mode": "float", "costs": [{"mode": "float", "speed": 1}]}'), "not a plan as to_json"),
        ('{"units": [], "source": "guessed"}', "source='guessed' is not allowed"),
        ('{"units": [], "key": {"device": "x"}}', "not a plan as to_json"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerPlan.from_json(text)


def test_the_longest_path_decides():
    plan = LayerPlan.of({"mid_block": "float", "mid_block.resnets.1": "quantized 8"})
    assert plan.unit_of("mid_block.resnets.0.conv1").mode == FLOAT
    assert plan.unit_of("mid_block.resnets.1.conv1").mode == PLAIN
    assert plan.unit_of("mid_block.resnets.10.conv1").mode == FLOAT
    assert plan.unit_of("mid_block2.conv") is None
    shared = LayerPlan((UnitPlan("attn.to_q", MODULATED, ("attn.to_q", "attn.to_k")), UnitPlan("attn", FLOAT)))
    assert shared.unit_of("attn.to_k").mode == MODULATED
    assert shared.unit_of("attn.to_v").mode == FLOAT


def plain_unit(other):
    return LayerPlan((UnitPlan("down", PLAIN, ("down.conv", other)),))


REPLACEABLE = ("down.conv", "attn2.to_k", "attn2.to_v")
REASONS = {"down.time_emb_proj": "skip_modules has 'time_emb_proj'", "conv_in": "skip_modules has 'conv_in'"}


def test_what_fits_the_network():
    LayerPlan.of({"down": "modulated 8", "conv_in": "float"}).check(REPLACEABLE, REASONS)
    for plan, message in (
        (LayerPlan.of({"down.conv9": "float"}), "'down.conv9' is no Linear, Conv2d or block"),
        (LayerPlan.of({"conv_in": "modulated 8"}), "'conv_in' cannot be modulated 8: conv_in stays float .skip_mod"),
        (plain_unit("down.time_emb_proj"), "'down' cannot be quantized 8: down.time_emb_proj stays float"),
        (plain_unit("down.conv2"), "'down.conv2' is no Linear"),
        (LayerPlan((UnitPlan("attn2", PLAIN),), KEY), "for a UNet, or skip_modules, without the layer 'down.conv'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.check(REPLACEABLE, REASONS)


def test_table():
    header, rows = PLAN.table()
    assert header[:5] == ("unit", "mode", "float us", "quantized 8 us", "modulated 4 us")
    assert rows[0][2:] == ("300", "120", "125", "2.40x", "51.0", "4.1", "8.2", UNIT.reason)
    assert rows[1][1:] == ("float", *"-------", "")


def test_the_key_tells_everything_but_the_shape_apart():
    other_shape = PlanKey(**{**vars(KEY), "shape": (1, 3, 16, 16)})
    assert other_shape.digest == KEY.digest
    for field in ("device", "model", "config", "versions"):
        assert PlanKey(**{**vars(KEY), field: "other"}).digest != KEY.digest
    assert json.loads(PLAN.to_json())["key"]["shape"] == [8, 3, 16, 16]
