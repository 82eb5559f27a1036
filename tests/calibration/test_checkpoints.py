"""The importer against Q-Diffusion's own arithmetic (their AdaRoundQuantizer, written out), other names and shapes."""

import pytest
import torch
from torch import nn

import modiff_kernels as mk
from examples.research_networks import RESEARCH, ResearchUNet
from modiff_kernels.calibration.checkpoints import import_qdiffusion


def quantiser(weight, bits, zero_point=None):
    """Random but valid parameters of their per-channel asymmetric AdaRound quantiser, and the weight that it gives."""
    low, high = weight.flatten(1).min(1)[0].clamp_max(0), weight.flatten(1).max(1)[0].clamp_min(0)
    delta = ((high - low) / (2**bits - 1)).view(-1, *[1] * (weight.ndim - 1))
    points = torch.round(-low.view_as(delta) / delta)
    if zero_point is not None:
        delta = (torch.maximum(-low, high) / (zero_point - 0.5)).view_as(delta)
        points = torch.full_like(delta, zero_point)
    alpha = torch.randn_like(weight)
    code = torch.floor(weight / delta) + (alpha >= 0).float() + points
    given = (torch.clamp(code, 0, 2**bits - 1) - points) * delta
    return {"alpha": alpha, "delta": delta, "zero_point": points}, given


def checkpoint_of(unet, config, bits, split=(), zero_point=None):
    """A checkpoint with other names and q, k, v in one tensor, and the weights that it stands for."""
    tensors, expected = {}, {}

    def put(path, weight, parts):
        tensors[f"model.{path}.weight"] = weight
        given = []
        for name, part in zip(("weight_quantizer", "weight_quantizer_0"), parts):
            values, own = quantiser(part, bits, zero_point)
            tensors.update({f"model.{path}.{name}.{key}": value for key, value in values.items()})
            given.append(own)
        tensors[f"model.{path}.act_quantizer.delta"] = torch.tensor(0.1)
        return torch.cat(given, 1)

    for number, (path, module) in enumerate(unet.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or config.skips(path) or ".to_k" in path or ".to_v" in path:
            continue
        weight = module.weight.detach().clone()
        if path.endswith(".to_q"):
            names = [path, path.replace("to_q", "to_k"), path.replace("to_q", "to_v")]
            joint = torch.cat([unet.get_submodule(name).weight for name in names])[:, :, None]  # a Conv1d
            given = put(f"layer{number}", joint, [joint])[..., 0]
            expected.update(zip(names, given.chunk(3)))
            continue
        parts = weight.split([32, weight.shape[1] - 32], 1) if path in split else [weight]
        expected[path] = put(f"layer{number}", weight, parts)
    return tensors, expected


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_are_exactly_those_of_the_checkpoint(pipe, tmp_path, bits):
    split = ("up_blocks.0.resnets.0.conv_shortcut", "up_blocks.1.resnets.0.conv_shortcut")
    config = mk.ModiffConfig(bits, None)
    tensors, expected = checkpoint_of(pipe.unet, config, bits, split)
    torch.save(tensors, tmp_path / "c.pth")
    result = import_qdiffusion(tmp_path / "c.pth", pipe.unet, bits)
    assert set(result.layers) == set(expected)
    for path, layer in result.layers.items():
        shape = pipe.unet.get_submodule(path).weight.shape
        assert torch.equal(layer.weight.dequantized(shape), expected[path].view(shape)), path
    assert [result.layers[path].weight.group_size for path in split] == [32, 16]
    result.save(tmp_path / "saved")
    handle = mk.accelerate(pipe, calibration=tmp_path / "saved")
    layer = handle.layers["mid_block.attentions.0.to_k"]
    assert torch.equal(layer.float_weight, expected["mid_block.attentions.0.to_k"])
    handle.remove()


def test_network_of_research_code_gets_the_weights_too():
    torch.manual_seed(0)
    names = RESEARCH["CompVis LDM, DDPM"]
    theirs, mine = ResearchUNet(names), ResearchUNet(names).requires_grad_(False)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in theirs.state_dict().items()}
    for path, module in theirs.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            values, given = quantiser(module.weight.detach(), 4)
            tensors.update({f"model.{path}.weight_quantizer.{key}": value for key, value in values.items()})
            if not mk.ModiffConfig().skips(path):
                module.weight.data = given
    with pytest.raises(ValueError, match="does not hold the weights of"):
        import_qdiffusion(tensors, mine, 4)
    result = import_qdiffusion(tensors, mine, 4, load_weights=True)
    call = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        mk.accelerate(mine, calibration=result)
        assert torch.allclose(mine(*call), theirs(*call), atol=1e-4)
    del tensors["model.conv_in.bias"]
    with pytest.raises(ValueError, match=r"has no 'model.conv_in.bias'; give the network"):
        import_qdiffusion(tensors, ResearchUNet(names), 4, load_weights=True)


def test_channels_of_eight_bits_that_do_not_fit_are_rounded_again(pipe):
    tensors, expected = checkpoint_of(pipe.unet, mk.ModiffConfig(8, None), 8)
    result = import_qdiffusion(tensors, pipe.unet, 8)
    again = 0
    for path, layer in result.layers.items():
        shape = pipe.unet.get_submodule(path).weight.shape
        error = (layer.weight.dequantized(shape) - expected[path].view(shape)).abs().flatten(1).amax(1)
        again += int((error > 0).sum())
        assert (error <= 0.5 * layer.weight.scale * 1.001).all()
    assert 0 < again <= result.metadata["channels_rounded_again"]


def test_what_is_refused(pipe, tmp_path):
    config = mk.ModiffConfig(4, None)
    tensors, _ = checkpoint_of(pipe.unet, config, 4, zero_point=8)
    assert {layer.weight.bits for layer in import_qdiffusion(tensors, pipe.unet, 4).layers.values()} == {4}
    with pytest.raises(ValueError, match="bits=4 is not allowed; choose one of 8"):
        import_qdiffusion(tensors, pipe.unet, 4, mk.ModiffConfig(8, 8))
    (tmp_path / "c.pth").write_bytes(b"nothing")
    name = next(name for name in tensors if name.endswith(".alpha"))
    for checkpoint, message in (
        ({"model.conv.weight": torch.ones(2, 2)}, "no weight quantiser"),
        (tmp_path / "c.pth", "cannot read .*c.pth as a PyTorch checkpoint"),
        ({**tensors, name: tensors[name][..., :1]}, "the checkpoint is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            import_qdiffusion(checkpoint, pipe.unet, 4)
    pipe.unet.mid_block.resnets[0].conv1.weight.add_(0.1)
    with pytest.raises(ValueError, match=r"does not hold the weights of mid_block.resnets.0.conv1; give the UNet"):
        import_qdiffusion(tensors, pipe.unet, 4)
