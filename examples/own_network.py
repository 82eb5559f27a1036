"""A network of your own, in plain PyTorch, with low-bit layers: no diffusers, no pipeline.

    python examples/own_network.py

`accelerate` takes any module that is called with the sample first and with a timestep. This one is not trained. What is
printed is how near the low-bit trajectory stays to that of the float network."""

import torch
from torch import nn

import modiff_kernels as mk


class Denoiser(nn.Module):
    """A residual convolutional network that predicts a velocity from x [N, 3, H, W] and a time in 0..1."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x) + self.time(timestep.view(-1, 1))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.conv_out(h)


@torch.no_grad()
def sample(network: nn.Module, steps: int = 30) -> torch.Tensor:
    """Euler steps from noise."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in torch.linspace(1, 0, steps):
        x = x - network(x, t) / steps
    return x


def main() -> None:
    torch.manual_seed(0)
    network = Denoiser().eval()
    exact = sample(network)
    for bits in (8, 4, 3):
        handle = mk.accelerate(network, mk.ModiffConfig(weight_bits=8, act_bits=bits))
        with handle.sampling_run():
            x = sample(network)
        error_db = 10 * torch.log10(exact.square().sum() / (x - exact).square().sum())
        print(f"W8A{bits}: {error_db:.1f} dB to float, {handle.state.nbytes() / 1e6:.1f} MB of state")
        handle.remove()  # the float layers are back


if __name__ == "__main__":
    main()
