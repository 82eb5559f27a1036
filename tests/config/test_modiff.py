import dataclasses

import pytest
import torch

from modiff_kernels.config import ModiffConfig
from modiff_kernels.config.schedule import StepSchedule

IMPOSSIBLE = {
    "weight_bits": (5, True, 8.0),
    "act_bits": (2, "4"),
    "granularity": ("per_row",),
    "scale_mode": ("learned",),
    "state_dtype": ("float64", torch.int8),
    "group_size": (0, -1, True),
    "skip_modules": ("conv_in", ("",), ("a..b",), (3,)),
    "backend": ("gpu",),
    "mode": ("float",),
    "clip_ratio": (0.0, 1.5, float("nan")),
    "fuse": (1,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in IMPOSSIBLE for value in IMPOSSIBLE[field]])
def test_impossible_values_name_field_value_and_choice(field, value):
    with pytest.raises(ValueError, match=rf"ModiffConfig: {field}=.*not allowed; give ") as error:
        ModiffConfig(**{field: value})
    assert repr(value if not isinstance(value, tuple) else value[0]).removeprefix("torch.") in str(error.value)


def test_what_does_not_fit_together_or_is_no_schedule():
    for options, message in (
        ({"weight_bits": None}, "act_bits=8 is not allowed; give None as long as weight_bits is None"),
        ({"schedule": "hold every=1"}, "ModiffConfig: schedule='hold every=1' is not allowed; .*every=1"),
        ({"schedule": 3}, "ModiffConfig: schedule=3 is not allowed; give None, 'auto', 'auto 8', a StepSchedule"),
    ):
        with pytest.raises(ValueError, match=message):
            ModiffConfig(**options)
    assert ModiffConfig(weight_bits=None, act_bits=None).weight_bits is None


def test_json_round_trip():
    bits = {"weight_bits": 4, "act_bits": 3, "granularity": "per_token", "scale_mode": "delayed", "group_size": 64}
    rest = {"state_dtype": torch.float16, "skip_modules": ["mid_block"], "backend": "reference", "mode": "quantized"}
    config = ModiffConfig(**bits, **rest, clip_ratio=1, fuse=False, schedule="forecast  every=3 last=2")
    assert config.schedule == StepSchedule("forecast", every=3, last=2)
    assert config.to_dict()["schedule"] == "forecast every=3 last=2"
    assert ModiffConfig(schedule="auto").to_dict()["schedule"] == "auto"
    assert (config.state_dtype, config.skip_modules) == ("float16", ("mid_block",))
    assert ModiffConfig.from_json(config.to_json()) == config
    assert ModiffConfig.from_dict(config.to_dict()) == config
    assert ModiffConfig.from_dict({}) == ModiffConfig()
    assert hash(config) != hash(ModiffConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.act_bits = 4


def test_first_step_bits_is_refused_with_the_reason_and_dropped_from_what_was_saved(caplog):
    with pytest.raises(ValueError, match=r"first_step_bits=4 is not allowed; .*begins with two 8-bit updates"):
        ModiffConfig(first_step_bits=4)
    config = ModiffConfig(act_bits=4)
    assert dataclasses.replace(config, act_bits=3).act_bits == 3
    saved = config.to_dict()
    assert "first_step_bits" not in saved
    assert ModiffConfig.from_dict({**saved, "first_step_bits": None}) == config
    assert not caplog.messages
    assert ModiffConfig.from_dict({**saved, "first_step_bits": 8}) == config
    assert len(caplog.messages) == 1
    assert "first_step_bits=8 is not used any more" in caplog.text


def test_unreadable_json():
    unknown = "unknown field 'bits'; the fields are weight_bits, act_bits"
    for text, message in (('{"bits": 4}', unknown), ("{", "not JSON"), ("[1]", "mapping")):
        with pytest.raises(ValueError, match=message):
            ModiffConfig.from_json(text)


def test_skip_patterns():
    for pattern, path, fits in (
        ("conv_in", "conv_in", True),
        ("time_emb", "down_blocks.0.resnets.1.time_emb_proj", True),
        ("down_blocks.1", "down_blocks.1.resnets.0.conv1", True),
        ("down_blocks.1", "down_blocks.10.resnets.0.conv1", False),
        ("attentions.to_q", "attentions.0.to_q", False),
        ("resnets.0.conv", "up_blocks.2.resnets.0.conv_shortcut", True),
        ("a.b.c", "b.c", False),
    ):
        assert ModiffConfig(skip_modules=(pattern,)).skips(path) == (pattern if fits else None)
