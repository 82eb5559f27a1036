"""Keys and values of cross-attention: computed once per run as long as the encoder states are the same tensor."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import modiff_kernels as mk
from modiff_kernels.nn import step
from tests.unets import WIDTH, text


class Net(nn.Module):
    """Two blocks that read the same encoder states."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(BasicTransformerBlock(32, 2, 16, cross_attention_dim=WIDTH) for _ in range(2))

    def forward(self, x, encoder=None):
        for block in self.blocks:
            x = block(x, encoder_hidden_states=encoder)
        return x


@pytest.fixture
def computed(monkeypatch):
    """The name of the layer for each computed output of one with a constant input."""
    names, original = [], step.run_once
    monkeypatch.setattr(step, "run_once", lambda layer, x: names.append(layer.name) or original(layer, x))
    return names


def accelerated(**config):
    torch.manual_seed(0)
    net = Net().eval()
    return net, mk.accelerate(net, mk.ModiffConfig(**{"plan": "modulated", **config}))


def tokens(seed=0, batch=2):
    return torch.randn(batch, 9, 32, generator=torch.Generator().manual_seed(seed))


def last_output(x, encoders, **config):
    """Output of the last call of a fresh run over `encoders`, each a tensor of its own."""
    net, handle = accelerated(**config)
    with handle.sampling_run():
        return [net(x, encoder) for encoder in encoders][-1]


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
class TestWhenTheyAreComputed:
    def test_again_in_every_call_for_inference_tensors(self, mode, computed):
        net, handle = accelerated(mode=mode)
        with torch.inference_mode(), handle.sampling_run():
            encoder = text()
            net(tokens(), encoder)
            encoder.mul_(2)  # nothing counts this
            changed = net(tokens(), encoder)
        assert len(computed) == 2 * 2
        assert torch.equal(changed, last_output(tokens(), [text(), 2 * text()], mode=mode))


def test_values_keep_their_address_and_are_counted():
    net, handle = accelerated()
    addresses = []
    for seed in (1, 2):
        with handle.sampling_run():
            net(tokens(), text(seed=seed))
            addresses.append([kept.value.data_ptr() for kept in handle.state.kept._kept.values()])
    assert addresses[0] == addresses[1]
    assert handle.state.kept.nbytes() == 2 * (2 * 5 * 64 * 4)
    assert handle.state.nbytes() > handle.state.kept.nbytes()
    handle.state.begin_run()
    assert all(kept.source is None for kept in handle.state.kept._kept.values())  # tensors of a finished run
    handle.state.release()
    assert handle.state.kept.nbytes() == 0
