"""What is done to an accelerated UNet behind the package's back: other weights are followed, the rest works or is
refused with a way out that works."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
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
    @pytest.mark.parametrize("config", [{}, {"fuse": False, "act_bits": None}, {"mode": "quantized"}], ids=str)
    def test_are_followed(self, way, config):
        unet, other = unet2d_condition(), unet2d_condition(seed=1)
        handle = mk.accelerate(unet, mk.ModiffConfig(**config))
        outputs(unet, handle, calls=2)
        WAYS[way](unet, other)
        assert_equal(outputs(unet, handle, calls=2), outputs(other, mk.accelerate(other, mk.ModiffConfig(**config)), 2))
        handle.remove()
        assert_equal(outputs(unet, calls=1), outputs(unet2d_condition(seed=1), calls=1))

    @pytest.mark.parametrize("way", WAYS)
    def test_are_followed_without_runs(self, way):
        unet, other = unet2d(), unet2d(seed=1)
        mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        unet(noise(), 5)
        WAYS[way](unet, other)
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

    @pytest.mark.parametrize("fuse", [True, False])
    def test_another_device_gets_the_codes_that_there_are(self, fuse, monkeypatch):
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        monkeypatch.setattr(QuantizedWeight, "rounded", None)
        unet.to("meta")
        assert all(layer.packed.packed.is_meta for layer in handle.layers.values())


def hooked(kind, factor=0.5):
    def change(unet):
        for module in unet.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda module, args, output: factor * output)

    return change


def patched(unet):
    """As HyperTile does it."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.forward = lambda *args, _old=module.forward, **keywords: 0.5 * _old(*args, **keywords)


def swapped(unet):
    """As token merging does it."""
    for module in unet.modules():
        if any(kind.__name__ == "BasicTransformerBlock" for kind in module.__class__.__mro__):
            forward = lambda self, x, **keywords: 0.5 * super(self.__class__, self).forward(x, **keywords)  # noqa: E731
            module.__class__ = type("Merged", (module.__class__,), {"forward": forward})


class TestModules:
    @pytest.mark.parametrize(
        ("change", "refusal"),
        [
            (hooked(Attention), None),
            (hooked(BasicTransformerBlock), None),
            (hooked(FeedForward), None),
            (patched, None),
            (lambda unet: hooked(nn.Linear)(unet.down_blocks[0].resnets[0]), None),  # of the time embedding
            (swapped, "is fused and cannot become a Merged"),
            (hooked(nn.GroupNorm), "is computed without being called"),
            (
                lambda unet: hooked(nn.Module)(unet.mid_block.resnets[0].conv1),
                "'mid_block.resnets.0.conv1' is computed without",
            ),
        ],
    )
    def test_what_is_put_on_them(self, change, refusal):
        plain, expected = outputs(unet2d_condition(), calls=2)[-1], unet2d_condition()
        change(expected)
        expected = outputs(expected, calls=2)[-1]
        assert sqnr(expected, plain) < 50
        for fuse in (True, False):
            unet = unet2d_condition()
            handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
            outputs(unet, handle, calls=1)
            if fuse and refusal:
                with pytest.raises(RuntimeError, match=rf"{refusal}.*use ModiffConfig\(fuse=False\)"):
                    outputs(change(unet) or unet, handle, calls=1)
            else:
                change(unet)
                assert sqnr(outputs(unet, handle, calls=2)[-1], expected) > 34.5

    def test_dropout_in_training_is_refused(self):
        unet = unet2d(dropout=0.1)
        handle = mk.accelerate(unet)
        before = outputs(unet, handle)
        unet.train()
        with pytest.raises(RuntimeError, match=r"resnets.0.dropout' is computed without .* dropout in training"):
            outputs(unet, handle)
        unet.eval()
        assert_equal(outputs(unet, handle), before)
