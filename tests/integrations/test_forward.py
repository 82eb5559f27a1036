"""Compiled calls and CUDA graphs of an accelerated UNet, against the same calls in plain Python."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.torch_version import TorchVersion

import modiff_kernels as mk
from modiff_kernels.backends import cpu
from modiff_kernels.integrations.graphs import WARM_UP_CALLS
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.registry import is_about_values
from tests.integrations.fake_capture import capture_calls

WIDTH = 24
CALLS = 6
SCHEDULE = "forecast every=3 axis=timestep"


class Net(nn.Module):
    """A resnet and a transformer in the form of a UNet."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.resnet = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=8)
        self.transformer = Transformer2DModel(2, 16, 32, norm_num_groups=8, cross_attention_dim=WIDTH)
        self.conv_out = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        steps = torch.as_tensor(timestep).float() / 1000
        temb = torch.cos(steps * torch.arange(16, device=sample.device))[None]
        h = self.resnet(self.conv_in(sample), temb)
        h = self.transformer(h, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return (self.conv_out(h),)


@pytest.fixture(autouse=True)
def no_grad_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def accelerated(scale_mode="dynamic", table=0, **config):
    """table: calls that have static scales of their own."""
    torch.manual_seed(0)
    net = Net().eval()
    scales = None
    if scale_mode == "static":
        kinds = nn.Linear, nn.Conv2d
        paths = [path for path, module in net.named_modules() if isinstance(module, kinds)]
        paths = [path for path in paths if not any(name in path for name in ("conv_in", "conv_out", "time_emb"))]
        scales = {path: torch.linspace(0.03, 0.01, table) if table else 0.02 for path in paths}
    return net, mk.accelerate(net, mk.ModiffConfig(scale_mode=scale_mode, **config), static_scales=scales)


def text(seed=1, batch=2):
    return torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def samples(calls=CALLS, batch=2):
    generator = torch.Generator().manual_seed(2)
    x, change = (torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(2))
    return [x + 0.1 * call * change for call in range(calls)]


def run(net, handle, encoder, timestep=lambda call: 500 - 10 * call, calls=CALLS, batch=2):
    """Outputs of one run."""
    with handle.sampling_run(num_calls=calls):
        return [
            net(x, timestep(call), encoder_hidden_states=encoder)[0] for call, x in enumerate(samples(calls, batch))
        ]


def assert_same(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def counting(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


CONFIGS = [
    ({}, 1),
    ({"scale_mode": "static"}, 1),
    ({"scale_mode": "static", "table": CALLS}, 1),
    ({"scale_mode": "static", "mode": "quantized"}, 1),
    ({"scale_mode": "delayed"}, 2),  # the first update has no scale yet
    ({"mode": "quantized"}, 1),
    ({"scale_mode": "static", "schedule": SCHEDULE}, 1),
    ({"scale_mode": "static", "schedule": SCHEDULE, "table": 2 * CALLS}, 1),
    ({"scale_mode": "delayed", "schedule": SCHEDULE}, 2),
]


class TestCompile:
    """fullgraph=True is the default: a graph break would raise."""

    @pytest.mark.parametrize(("options", "graphs"), CONFIGS, ids=str)
    def test_nothing_is_compiled_again_between_updates(self, options, graphs):
        calls = 2 * CALLS if "schedule" in options else CALLS
        encoder = text()
        net, handle = accelerated(**options)
        expected = [run(net, handle, encoder, calls=calls) for _ in range(2)]
        net, handle = accelerated(**options)
        compiled = []
        handle.compile(backend=counting(compiled))
        for outputs in expected:
            for got, wanted in zip(run(net, handle, encoder, calls=calls), outputs, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert len(compiled) == graphs

    def test_functionalised_code_updates_the_state(self):
        encoder = text()
        net, handle = accelerated()
        expected = run(net, handle, encoder)
        net, handle = accelerated()
        handle.compile(backend="aot_eager")
        for got, wanted in zip(run(net, handle, encoder), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_compiled_code_calls_the_kernels_and_not_the_ops(self, mode):
        if (reason := dispatch.why_unavailable("cpu")) is not None or dispatch.forced_backend() is not None:
            pytest.skip(f"the ops are not computed by the backend cpu: {reason or 'MODIFF_BACKEND is set'}")
        if cpu.isa() != "AVX-512 VNNI":
            pytest.skip(f"products of the backend cpu need AVX-512 VNNI, this CPU has {cpu.isa()}")
        called = []

        def keep(graph, inputs):
            called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            called.extend(str(node.args[0]) for node in graph.graph.nodes if "auto_functionalized" in str(node.target))
            return make_boxed_func(graph.forward)

        net, handle = accelerated(mode=mode)
        handle.compile(backend=aot_autograd(fw_compiler=keep))
        run(net, handle, text())
        assert {"modiff_cpu.quantize.default", "modiff_cpu.convolve.default"} <= set(called)
        assert not [name for name in called if name.startswith("modiff.")]

    @pytest.mark.parametrize(("version", "from_cpp"), [("2.11.0", False), ("2.13.0+cpu", True)])
    def test_what_inductor_is_asked_for(self, monkeypatch, version, from_cpp):
        """Nothing where the user asks for something."""
        asked = []
        monkeypatch.setattr(torch, "compile", lambda fn, **options: asked.append(options))
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        _, handle = accelerated()
        handle.compile()
        handle.compile(mode="max-autotune")
        assert asked[0]["options"].get("cpp_wrapper", False) == from_cpp
        assert "guard_filter_fn" in asked[0]["options"]
        assert asked[1] == {"fullgraph": True, "dynamic": False, "mode": "max-autotune"}

    def test_nan_in_a_compiled_call(self):
        encoder = text()
        net, handle = accelerated()
        handle.compile()
        with handle.sampling_run():
            for call, x in enumerate(samples(3)):
                net(x, 500 - 10 * call, encoder_hidden_states=encoder)
            with pytest.raises(ValueError, match="got NaN or Inf; check the model's input"):
                net(x.fill_(torch.nan), 460, encoder_hidden_states=encoder)

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ("quantize, csrc/cpu/ops.cpp:169, holds NaN or Inf", True),
            ('aoti_torch_call_dispatcher("modiff_cpu::quantize", "", vars) API call failed', True),
            ('aoti_torch_call_dispatcher("modiff_cpu::convolve", "", vars) API call failed', False),
        ],
    )
    def test_errors_of_compiled_code_about_values(self, message, expected):
        assert is_about_values(RuntimeError(message)) is expected

    def test_encoder_states_changed_in_place_are_seen(self):
        results = []
        for compiled in (False, True):
            net, handle = accelerated()
            if compiled:
                handle.compile(backend="eager")
            results.append(changing_text(net, handle))
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_a_unet_of_diffusers(self):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ).eval()
        handle = mk.accelerate(unet)
        expected = run(unet, handle, text(), calls=4)
        compiled = []
        handle.compile(backend=counting(compiled))
        for got, wanted in zip(run(unet, handle, text(), calls=4), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert len(compiled) == 1

    def test_a_removed_handle_refuses(self):
        _, handle = accelerated()
        handle.remove()
        with pytest.raises(RuntimeError, match="handle was removed"):
            handle.compile()


def changing_text(net, handle):
    """Outputs of a run in which the encoder states change once in place and once as an object."""
    encoder, outputs = text(), []
    with handle.sampling_run():
        for call, x in enumerate(samples(9)):
            if call == 4:
                encoder.copy_(text(7))
            if call == 6:
                encoder = text(8)
            outputs.append(net(x, 500 - 10 * call, encoder_hidden_states=encoder)[0])
    return outputs


def graphed(**options):
    net, handle = accelerated(**options)
    return net, handle, capture_calls(handle)


class TestGraphs:
    @pytest.mark.parametrize("options", [options for options, _ in CONFIGS if "schedule" not in options], ids=str)
    def test_replays_equal_plain_calls(self, options):
        net, handle = accelerated(**options)
        encoder = text()
        expected = [run(net, handle, encoder) for _ in range(4)]
        net, handle, graphs = graphed(**options)
        for outputs in expected:
            assert_same(run(net, handle, encoder), outputs)
        kinds = 2 if options.get("scale_mode") == "delayed" else 1
        assert graphs.captured == kinds
        assert graphs.eager == kinds * WARM_UP_CALLS
        first_calls = 4
        assert graphs.replayed == 4 * CALLS - first_calls - graphs.eager
        assert f"{kinds} captured" in handle.explain()

    @pytest.mark.parametrize("scale_mode", ["static", "delayed"])
    def test_a_graph_per_gap_of_a_schedule(self, scale_mode):
        options = {"scale_mode": scale_mode, "schedule": SCHEDULE}
        encoder = text()
        net, handle = accelerated(**options)
        expected = [run(net, handle, encoder, calls=20) for _ in range(4)]
        net, handle, graphs = graphed(**options)
        for outputs in expected:
            assert_same(run(net, handle, encoder, calls=20), outputs)
        assert 2 <= graphs.captured <= 5
        assert graphs.replayed > 0

    def test_changed_encoder_states(self):
        expected = changing_text(*accelerated())
        net, handle, graphs = graphed()
        assert_same(changing_text(net, handle), expected)
        assert graphs.replayed > 0

    def test_contexts_have_their_own_graphs(self):
        def passes(net, handle):
            outputs = []
            encoders = {"cond": text(), "uncond": text(3)}
            with handle.sampling_run():
                for call, x in enumerate(samples()):
                    for name, encoder in encoders.items():
                        with handle.context(name):
                            outputs.append(net(x, 500 - 10 * call, encoder_hidden_states=encoder)[0])
            return outputs

        expected = passes(*accelerated())
        net, handle, graphs = graphed()
        assert_same(passes(net, handle), expected)
        assert graphs.captured == 2

    def test_another_batch_and_back(self):
        net, handle = accelerated()
        encoders = {2: text(), 3: text(batch=3)}
        order = (2, 3, 2)
        expected = [run(net, handle, encoders[batch], batch=batch) for batch in order]
        net, handle, graphs = graphed()
        for batch, outputs in zip(order, expected):
            assert_same(run(net, handle, encoders[batch], batch=batch), outputs)
        assert graphs.captured == 3  # state has moved each time

    def test_loaded_weights_are_captured_again(self):
        net, handle, graphs = graphed()
        encoder = text()
        run(net, handle, encoder)
        weights = {key: value * 1.1 for key, value in net.state_dict().items()}
        net.load_state_dict(weights)
        got = run(net, handle, encoder)
        assert graphs.captured == 2
        net, handle = accelerated()
        net.load_state_dict(weights)
        assert_same(got, run(net, handle, encoder))

    def test_timesteps_in_any_form(self):
        expected = run(*accelerated(), text())
        for form in (float, torch.tensor, lambda call: torch.tensor(float(call))):
            net, handle, _ = graphed()
            got = run(net, handle, text(), timestep=lambda call, form=form: form(500 - 10 * call))
            assert_same(got, expected)

    def test_outputs_are_not_overwritten_by_later_calls(self):
        net, handle, _ = graphed()
        got = run(net, handle, text(), calls=8)
        assert len({tensor.data_ptr() for tensor in got}) == 8


class TestRefused:
    def test_on_the_cpu(self):
        net = Net()
        with pytest.raises(ValueError, match=r"cuda_graphs=True is not possible for a UNet on cpu; move it to a GPU"):
            mk.accelerate(net, mk.ModiffConfig(cuda_graphs=True))
        assert type(net.resnet) is ResnetBlock2D

    def test_with_a_schedule_that_cannot_be_captured(self):
        with pytest.raises(ValueError, match=r"cuda_graphs=True is not possible with schedule .* whole calls"):
            mk.accelerate(Net(), mk.ModiffConfig(cuda_graphs=True, schedule="deep-hold every=2"))
