"""Other weights of an accelerated UNet are followed, however they come."""

import pytest
import torch
from torch import nn

import modiff_kernels as mk
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from tests.unets import assert_equal, low_bit_paths, noise, outputs, unet2d, unet2d_condition


def pairs(unet, other):
    return zip(unet.parameters(), other.parameters(), strict=True)


def new_parameters(unet, other):
    for name, value in other.named_parameters():
        path, _, name = name.rpartition(".")
        setattr(unet.get_submodule(path), name, nn.Parameter(value.clone()))


WAYS = {
    "write to .data": lambda unet, other: [old.data.copy_(new) for old, new in pairs(unet, other)],  # as EMAModel does
    "another .data": lambda unet, other: [setattr(old, "data", new.clone()) for old, new in pairs(unet, other)],
    "in place": lambda unet, other: [old.copy_(new) for old, new in pairs(unet, other)],
    "new parameters": new_parameters,
    "assigned": lambda unet, other: unet.load_state_dict(other.state_dict(), assign=True),
}


class TestOtherWeights:
    @pytest.mark.parametrize("way", WAYS)
    def test_are_followed(self, way):
        config = mk.ModiffConfig(mode="quantized") if way == "in place" else mk.ModiffConfig(fuse=False, act_bits=None)
        unet, other = unet2d_condition(), unet2d_condition(seed=1)
        handle = mk.accelerate(unet, config)
        outputs(unet, handle, calls=2)
        WAYS[way](unet, other)
        assert_equal(outputs(unet, handle, calls=2), outputs(other, mk.accelerate(other, config), 2))
        handle.remove()
        assert_equal(outputs(unet, calls=1), outputs(unet2d_condition(seed=1), calls=1))

    def test_are_followed_without_runs(self):
        unet, other = unet2d(), unet2d(seed=1)
        mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        unet(noise(), 5)
        WAYS["write to .data"](unet, other)
        mk.accelerate(other, mk.ModiffConfig(mode="quantized"))
        assert torch.equal(unet(noise(), 5).sample, other(noise(), 5).sample)

    def test_single_values_are_followed_when_asked(self):
        def change(unet):
            unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 1] += 3

        unet, other = unet2d(), unet2d()
        handle = mk.accelerate(unet)
        outputs(unet, handle, calls=1)
        change(unet)
        change(other)
        handle.refresh()
        assert_equal(outputs(unet, handle), outputs(other, mk.accelerate(other)))

    def test_calibrated_codes_are_kept(self):
        unet = unet2d()
        weights = {path: QuantizedWeight.rounded(unet.get_submodule(path).weight, 4) for path in low_bit_paths(unet)}
        config, layers = mk.ModiffConfig(weight_bits=4), {path: CalibratedLayer(q) for path, q in weights.items()}
        handle = mk.accelerate(unet, calibration=mk.CalibrationResult("test", config, layers))
        before = outputs(unet, handle)
        unet.mid_block.resnets[0].conv1.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"codes come from a calibration; call handle.remove\(\), then load"):
            outputs(unet, handle)
        unet.mid_block.resnets[0].conv1.weight.div_(2)
        assert_equal(outputs(unet, handle), before)

    @pytest.mark.parametrize("way", ["another .data", "assigned", "one value", "refresh"])
    def test_codes_beside_the_model_are_given_up(self, way, calibration_beside):
        unet, other = unet2d(), unet2d(seed=way in WAYS)
        calibration_beside(unet)
        handle = mk.accelerate(unet)
        outputs(unet.half(), handle)
        outputs(unet.float(), handle)
        assert f"codes of {len(handle.layers)} layers from a calibration" in handle.explain(), "a cast is no change"
        other.load_state_dict({key: value.half() for key, value in other.state_dict().items()})
        if way in WAYS:
            WAYS[way](unet, other)
        else:
            for weight in (net.mid_block.resnets[0].conv1.weight for net in (unet, other)):
                (weight if way == "one value" else weight.data)[0, 0, 0, 1] = 3
            handle.refresh() if way == "refresh" else None
        assert_equal(outputs(unet, handle), outputs(other, mk.accelerate(other)))
        assert "codes of 0 layers from a calibration" in handle.explain()

    @pytest.mark.parametrize("fuse", [True, False])
    def test_another_device_gets_the_codes_that_there_are(self, fuse, monkeypatch):
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        monkeypatch.setattr(QuantizedWeight, "rounded", None)
        unet.to("meta")
        assert all(layer.packed.packed.is_meta for layer in handle.layers.values())


def test_dropout_in_training_is_refused():
    unet = unet2d(dropout=0.1)
    handle = mk.accelerate(unet)
    before = outputs(unet, handle)
    unet.train()
    with pytest.raises(RuntimeError, match=r"resnets.0.dropout' is computed without .* dropout in training"):
        outputs(unet, handle)
    unet.eval()
    assert_equal(outputs(unet, handle), before)
