"""Denoisers as research code writes them, in its names and ways, accelerated without a change::

    python examples/research_networks.py           a line for each: low-bit layers, and dB to the float network
    python examples/research_networks.py --time    a DiT of the shape S/2 at batch 8, in turn: CPU time of a call

The four UNets have the layers of guided-diffusion, of EDM and NCSN++, of CompVis' latent diffusion and DDPM, and of
denoising-diffusion-pytorch, at the places where these have them; the DiT is that of facebookresearch/DiT."""

import contextlib
import copy
import math
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr


def time_features(t, width):
    angles = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class Names(NamedTuple):
    """Of a UNet: layers of the timestep, first and last convolution; within a block those of the timestep, the two with
    norm and convolution and the shortcut; the projections of attention."""

    times: str
    first: str
    last: str
    emb: str
    convs: tuple[str, str]
    shortcut: str
    qkv: tuple[str, ...]
    out: str
    scales: bool = True
    attention: type = nn.Conv2d


class Block(nn.Module):
    def __init__(self, names, c_in, c_out, width):
        super().__init__()
        self.names = names
        parts = {name: nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))
                 for name, c in zip(names.convs, (c_in, c_out))}  # fmt: skip
        emb = nn.Sequential(nn.SiLU(), nn.Linear(width, (1 + names.scales) * c_out))
        shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        for name, part in {**parts, names.emb: emb, names.shortcut: shortcut}.items():
            self.add_module(name, part)

    def forward(self, x, emb):
        first, second, shift, shortcut = (
            self._modules[name] for name in (*self.names.convs, self.names.emb, self.names.shortcut)
        )
        h, shift = first(x), shift(emb)[:, :, None, None]
        if self.names.scales:
            scale, shift = shift.chunk(2, 1)
            h = second[0](h) * (1 + scale) + shift
            return shortcut(x) + second[1:](h)
        return shortcut(x) + second(h + shift)


class PixelAttention(nn.Module):
    def __init__(self, names, channels):
        super().__init__()
        self.names, self.norm = names, nn.GroupNorm(4, channels)
        for name in names.qkv:
            self.add_module(name, names.attention(channels, 3 // len(names.qkv) * channels, 1))
        self.add_module(names.out, names.attention(channels, channels, 1))

    def forward(self, x):
        flat = [2] if self.names.attention is nn.Conv1d else []
        h = self.norm(x).flatten(*flat) if flat else self.norm(x)
        q, k, v = torch.cat([self._modules[name](h) for name in self.names.qkv], 1).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, -1)
        h = (v @ weights.transpose(1, 2)).reshape(h.shape)
        return x + self._modules[self.names.out](h).reshape(x.shape)


class ResearchUNet(nn.Module):
    def __init__(self, names, width=32):
        super().__init__()
        names = Names(*names)
        times = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))
        first = nn.Conv2d(4, width, 3, padding=1)
        self.names, self.width = names, width
        for name, part in {names.times: times, names.first: first, names.last: last}.items():
            self.add_module(name, part)
        sizes = (width, width), (width, 2 * width), (2 * width, 2 * width), (3 * width, width), (2 * width, width)
        self.down_1, self.down_2, self.middle, self.up_1, self.up_2 = (Block(names, *c, 4 * width) for c in sizes)
        self.attn, self.down = PixelAttention(names, 2 * width), nn.Conv2d(width, width, 3, 2, 1)
        self.up = nn.Conv2d(2 * width, 2 * width, 3, padding=1)

    def forward(self, x, t, y=None):
        times, first, last = (self._modules[name] for name in self.names[:3])
        emb, h = times(time_features(t, self.width)), first(x)
        one = self.down_1(h, emb)
        two = self.down_2(self.down(one), emb)
        middle = self.attn(self.middle(two, emb))
        h = self.up_1(torch.cat([F.interpolate(self.up(middle), scale_factor=2.0), one], 1), emb)
        return last(self.up_2(torch.cat([h, one], 1), emb))


class DiTBlock(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        qkv = self.attn["qkv"](self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1))
        h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + gate * self.attn["proj"](h)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    def __init__(self, width=32, depth=2, size=8, channels=4):
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Conv2d(channels, width, 2, 2), nn.Embedding(11, width)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 2) ** 2, width))
        self.blocks = nn.ModuleList(DiTBlock(width, max(2, width // 64)) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        norm = nn.LayerNorm(width, elementwise_affine=False)
        parts = {"norm": norm, "linear": nn.Linear(width, 8 * channels), "adaLN_modulation": modulation}
        self.final_layer = nn.ModuleDict(parts)

    def forward(self, x, t, y):
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](time_features(t, 256)) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = self.final_layer["linear"](self.final_layer["norm"](h) * (1 + scale) + shift)
        side = x.shape[-1] // 2
        return h.unflatten(1, (side, side)).unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


RESEARCH = {
    "guided-diffusion": ("time_embed", "input_blocks", "out", "emb_layers", ("in_layers", "out_layers"),
                         "skip_connection", ("qkv",), "proj_out", True, nn.Conv1d),
    "EDM, NCSN++": ("map_layer0", "conv_in", "out_conv", "affine", ("conv0", "conv1"), "skip", ("qkv",), "proj"),
    "CompVis LDM, DDPM": ("temb", "conv_in", "conv_out", "temb_proj", ("conv1", "conv2"), "nin_shortcut",
                          ("q", "k", "v"), "proj_out", False),
    "denoising-diffusion-pytorch": ("time_mlp", "init_conv", "final_conv", "mlp", ("block1", "block2"), "res_conv",
                                    ("to_qkv",), "to_out"),
}  # fmt: skip


def main():
    torch.manual_seed(0)
    networks = {name: ResearchUNet(names) for name, names in RESEARCH.items()} | {"DiT": DiT()}
    start, end, y = *torch.randn(2, 2, 4, 8, 8), torch.tensor([1, 2])
    calls = [(torch.lerp(start, end, i / 50), torch.full((2,), 500 - 20 * i), y) for i in range(6)]
    for name, network in networks.items():
        exact = network.eval()(*calls[-1])
        handle = mk.accelerate(network, mk.ModiffConfig(act_bits=4))
        with handle.sampling_run():
            out = [network(*call) for call in calls][-1]
        low = [row.mode != "float" for row in handle.rows()]
        print(f"{name:30} {sum(low)} of {len(low)} layers W8A4, {sqnr(out, exact):.1f} dB to float")


def time_modes(calls=9):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = DiT(384, 12, 32).eval().requires_grad_(False)
    for parameter in base.parameters():
        if parameter.ndim < 2:
            parameter += 0.1 * torch.randn_like(parameter)
    modes = {
        "float32": None,
        "float32, torch.compile": None,
        "plain W8A8 per token (default)": mk.ModiffConfig(),
        "modulated W8A8": mk.ModiffConfig(plan="modulated"),
        "modulated W8A4": mk.ModiffConfig(act_bits=4),
    }
    networks = {name: (copy.deepcopy(base), config) for name, config in modes.items()}
    handles = {name: mk.accelerate(net, config) for name, (net, config) in networks.items() if config is not None}
    forwards = {name: torch.compile(net) if "compile" in name else net for name, (net, _) in networks.items()}
    start, end = torch.randn(2, 8, 4, 32, 32)
    seconds = {name: [] for name in modes}
    with contextlib.ExitStack() as runs:
        for handle in handles.values():
            runs.enter_context(handle.sampling_run())
        for i in range(3 + calls):
            call = torch.lerp(start, end, i / 50), torch.full((8,), 500 - 20 * i), torch.arange(8)
            outs = {}
            for name, forward in forwards.items():
                began = time.thread_time()
                outs[name] = forward(*call)
                seconds[name].append(time.thread_time() - began)
        medians = {name: statistics.median(each[3:]) for name, each in seconds.items()}
        for name, median in medians.items():
            state = handles[name].state.nbytes() / 2**20 if name in handles else 0
            near = f"{sqnr(outs[name], outs['float32']):.1f} dB" if name in handles else ""
            print(f"{name:32} {1e3 * median:7.0f} ms {medians['float32'] / median:5.2f}x {state:5.0f} MiB  {near}")


if __name__ == "__main__":
    with torch.no_grad():
        time_modes() if "--time" in sys.argv[1:] else main()
