"""Compiled calls and CUDA graphs of an accelerated UNet, against the same calls in plain Python."""

import contextlib
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import modiff_kernels as mk
from modiff_kernels.integrations import compiled
from modiff_kernels.integrations.graphs import WARM_UP_CALLS, GraphedCalls
from modiff_kernels.nn import ModulationState
from modiff_kernels.ops import dispatch
from tests import unets
from tests.integrations.fake_capture import capture_calls
from tests.unets import WIDTH, assert_close, assert_equal, static_scales, text, trajectory

CALLS = 6
SCHEDULE = "forecast every=3"


class Net(nn.Module):
    """A resnet and a transformer, or a resnet alone, in the form of a UNet."""

    def __init__(self, attention=True, width=WIDTH):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.resnet = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=16, groups=4)
        if attention:
            self.transformer = Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=width)
        self.attention = attention
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        steps = torch.as_tensor(timestep).float() / 1000
        temb = torch.cos(steps * torch.arange(16, device=sample.device))[None]
        h = self.resnet(self.conv_in(sample), temb)
        if self.attention:
            h = self.transformer(h, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return (self.conv_out(h),)


@pytest.fixture(autouse=True)
def no_code_is_left():
    yield
    torch._dynamo.reset()


def accelerated(scale_mode="dynamic", table=0, attention=True, **config):
    """table: calls that have static scales of their own."""
    torch.manual_seed(0)
    net = Net(attention).eval()
    config = mk.ModiffConfig(scale_mode=scale_mode, **config)
    scales = static_scales(net, config, torch.linspace(0.03, 0.01, table) if table else 0.02)
    return net, mk.accelerate(net, config, calibration=scales)


def graphed(**options):
    net, handle = accelerated(**options)
    return net, handle, capture_calls(handle)


def run(net, handle, encoder=None, timestep=lambda call: 500 - 10 * call, calls=CALLS, batch=2):
    """Outputs of one run."""
    encoder = text(batch) if encoder is None else encoder
    with handle.sampling_run(num_calls=calls):
        xs = trajectory((batch, 4, 8, 8), calls)
        return [net(x, timestep(call), encoder_hidden_states=encoder)[0] for call, x in enumerate(xs)]


def changing_text(net, handle):
    """Outputs of a run in which the encoder states change once in place and once as an object."""
    encoder, found = text(), []
    with handle.sampling_run():
        for call, x in enumerate(trajectory((2, 4, 8, 8), 9)):
            if call == 4:
                encoder.copy_(text(seed=7))
            if call == 6:
                encoder = text(seed=8)
            found.append(net(x, 500 - 10 * call, encoder_hidden_states=encoder)[0])
    return found


PLAIN = [
    {},
    {"scale_mode": "static", "table": CALLS},
    {"scale_mode": "delayed"},
    {"mode": "quantized"},
    {"scale_mode": "static", "mode": "quantized"},
]
SCHEDULED = [
    {"scale_mode": "static", "schedule": SCHEDULE, "table": 2 * CALLS},
    {"scale_mode": "delayed", "schedule": SCHEDULE},
]
WEIGHTS = {
    "moved weights": lambda net: net.to(torch.float64).to(torch.float32),
    "loaded weights": lambda net: net.load_state_dict({key: value * 1.1 for key, value in net.state_dict().items()}),
}


def kinds_of(options):
    """Of calls: the first update of delayed scales has no scale yet."""
    return 2 if options.get("scale_mode") == "delayed" else 1


class TestCompile:
    """fullgraph=True is the default: a graph break would raise."""

    @pytest.mark.parametrize("options", [{}, PLAIN[-1], *SCHEDULED], ids=str)
    def test_nothing_is_compiled_again_between_updates(self, options):
        calls = 2 * CALLS if "schedule" in options else CALLS
        encoder = text()
        net, handle = accelerated(**options)
        expected = [run(net, handle, encoder, calls=calls) for _ in range(2)]
        net, handle = accelerated(**options)
        graphs = []
        handle.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        for wanted in expected:
            assert_close(run(net, handle, encoder, calls=calls), wanted)
        assert len(graphs) == kinds_of(options)

    def test_what_no_guard_of_a_layer_looks_at(self):
        """Contexts in turn, the mode that the number of calls decides, a hook, another layer, size and attribute."""

        def outputs(net, handle):
            found, xs = [], trajectory((2, 4, 8, 8), CALLS)
            scheduler = DDIMScheduler()
            handle.wrap_scheduler(SimpleNamespace(scheduler=scheduler))
            for calls in (CALLS, 3, CALLS):
                scheduler.set_timesteps(calls)
                for call, x in enumerate(xs[:calls]):
                    for context in ("cond", "uncond"):
                        with handle.context(context):
                            x = x + (context == "cond")
                            found.append(net(x, 500 - 10 * call, encoder_hidden_states=None)[0])
                if calls == 3:
                    hook = net.conv_out.register_forward_hook(lambda module, args, output: output.tanh())
            hook.remove()
            net.conv_out = nn.Sequential(net.conv_out, nn.Tanh())
            found += run(net, handle, calls=CALLS, batch=3)
            net.conv_out[0].stride = (2, 2)
            return found + run(net, handle, calls=CALLS, batch=3)

        expected = outputs(*accelerated(attention=False))
        net, handle = accelerated(attention=False)
        graphs = []
        handle.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        assert_close(outputs(net, handle), expected)
        assert len(graphs) == 7  # two contexts modulated and hooked, plain in any, and the last runs

    @torch._dynamo.config.patch(recompile_limit=2)
    def test_more_sizes_than_code_is_kept_for(self, caplog):
        net, handle = accelerated(attention=False)
        handle.compile(backend="eager")
        for size in (4, 6, 8, 4, 10):
            plain, by_plain = accelerated(attention=False)
            xs, results = trajectory((1, 4, size, size), 3), []
            for each, run in ((net, handle), (plain, by_plain)):
                with run.sampling_run():
                    results.append([each(x, 500 - i, encoder_hidden_states=None)[0] for i, x in enumerate(xs)])
            assert_close(*results)
        assert caplog.text.count("are not compiled; raise torch._dynamo.config.recompile_limit") == 1
        assert "keeps code for are not compiled (4 so far)" in handle.explain()

    @pytest.mark.parametrize(
        ("do", "message"),
        [
            (lambda net, x: torch.compile(net, backend="eager")(x, 5, None), r"is not possible; .* handle.compile\(\)"),
            (lambda net, x: net.compile(), r"is not possible; .* handle.compile\(\)"),
            (
                lambda net, x: torch.export.export(net, (x, torch.tensor(5), None)),
                r"cannot be traced or exported; call handle.remove\(\)",
            ),
            (lambda net, x: torch.jit.trace(net, (x, torch.tensor(5), x)), r"cannot be traced or exported"),
        ],
    )
    def test_what_would_compile_or_trace_the_bookkeeping_is_refused(self, do, message):
        net, handle = accelerated(attention=False)
        with handle.sampling_run(), pytest.raises(RuntimeError, match=message):
            do(net, torch.randn(1, 4, 8, 8))

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_functionalised_code_calls_the_kernels_and_not_the_ops(self, mode):
        called = []

        def keep(graph, inputs):
            called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            called.extend(str(node.args[0]) for node in graph.graph.nodes if "auto_functionalized" in str(node.target))
            return make_boxed_func(graph.forward)

        expected = run(*accelerated(mode=mode, attention=False))
        net, handle = accelerated(mode=mode, attention=False)
        handle.compile(backend=aot_autograd(fw_compiler=keep))
        assert_close(run(net, handle), expected)
        problem = handle.layers["resnet.conv1"].problem("product", 128)
        if dispatch.select(problem).traceable:
            product = "product" if mode == "modulated" else "product_plain"  # which inductor needs
            assert {"modiff_cpu.quantize.default", f"modiff_cpu.{product}.default"} <= set(called)
            assert not [name for name in called if name.startswith("modiff.")]

    def test_inductor_and_nan_in_its_code(self):
        """The one test that waits for a C++ compiler."""
        exact, expected = (run(*accelerated(attention=False, act_bits=act_bits)) for act_bits in (None, 8))
        net, handle = accelerated(attention=False)
        handle.compile()
        unets.assert_same_run(run(net, handle), expected, exact)
        with handle.sampling_run():
            for call, x in enumerate(trajectory((2, 4, 8, 8), 2)):
                net(x, 500 - 10 * call, encoder_hidden_states=None)
            with pytest.raises(ValueError, match="got NaN or Inf; check the model's input"):
                net(x.fill_(torch.nan), 460, encoder_hidden_states=None)


class Doubled(AttnProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return 2 * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Keeping(AttnProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        self.kept = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return self.kept


CHANGES = {
    "float weights": lambda net: setattr(net.conv_in, "weight", nn.Parameter(net.conv_in.weight * 1.5)),
    "float values": lambda net: net.conv_in.weight.data.mul_(1.5),
    "low-bit weights": lambda net: net.down_blocks[0].resnets[0].conv1.weight.mul_(1.5),
    "a processor": lambda net: net.mid_block.attentions[0].set_processor(Doubled()),
    "training": lambda net: net.train(),
    "threads": lambda net: torch.set_num_threads(1),
}


class TestGuardsOnceARun:
    """Code that torch has checked is called again past its guards, unless what it relies on may have changed."""

    @pytest.mark.parametrize("network", unets.NETWORKS)
    def test_the_same_outputs(self, network):
        net = unets.NETWORKS[network]()
        handle = mk.accelerate(net)
        expected = [unets.outputs(net, handle, batch=batch) for batch in (2, 2, 2)]
        handle.compile(backend="eager")
        for batch, wanted in zip((2, 2, 2), expected):
            assert_close(unets.outputs(net, handle, batch=batch), wanted)
        assert "compiled calls: guards checked at 3, not at 9" in handle.explain()

    @pytest.mark.parametrize("change", CHANGES)
    def test_what_changes_within_a_run(self, change):
        def outputs(compiled):
            net = unets.unet2d()
            handle = mk.accelerate(net)
            if compiled:
                handle.compile(backend="eager")
            found, threads = [], torch.get_num_threads()
            with handle.sampling_run():
                for call, x in enumerate(trajectory((2, 3, 8, 8), 9)):
                    if call == 5:
                        CHANGES[change](net)
                    found.append(net(x, 500 - 10 * call).sample)
            torch.set_num_threads(threads)
            return found, handle._forward._compiled

        expected, _ = outputs(compiled=False)
        found, calls = outputs(compiled=True)
        assert_close(found, expected)
        assert calls.repeated >= 3

    def test_gradients_are_refused_as_ever(self):
        net = unets.unet2d()
        handle = mk.accelerate(net)
        handle.compile(backend="eager")
        xs = trajectory((2, 3, 8, 8), 5)
        with handle.sampling_run():
            for call, x in enumerate(xs[:4]):
                net(x, 500 - 10 * call)
            with pytest.raises(RuntimeError, match="has no gradient but its input asks for one"), torch.enable_grad():
                net(xs[4].requires_grad_(), 460)

    def test_what_has_to_see_every_call(self, caplog):
        caplog.set_level("INFO")
        net, factor = unets.unet2d(), {"value": 1.0}

        def outputs():
            factor["value"], found = 2.0, []
            with handle.sampling_run():
                for call, x in enumerate(trajectory((2, 3, 8, 8), 6)):
                    factor["value"] = 2.0 if call < 4 else 3.0
                    found.append(net(x, 500 - 10 * call).sample)
            return found

        handle = mk.accelerate(net)
        hook = net.conv_out.register_forward_hook(lambda module, args, output: output * factor["value"])
        expected = outputs()
        hook.remove()
        handle.compile(backend="eager")
        outputs()
        hook = net.conv_out.register_forward_hook(lambda module, args, output: output * factor["value"])
        for _ in range(2):
            assert_close(outputs(), expected)
        assert caplog.text.count("without a check of their guards: not possible with a hook") == 1
        assert "at 11, not at 4 (not possible with a hook or a forward of its own on 'conv_out'" in handle.explain()
        hook.remove()
        outputs()
        assert "at 12, not at 8\n" in handle.explain()

    def test_plain_calls_outside_a_run_are_checked(self):
        net = unets.unet2d()
        handle = mk.accelerate(net, mk.ModiffConfig(mode="quantized"))
        expected = unets.outputs(net)
        handle.compile(backend="eager")
        for run in (None, None, handle, handle):
            assert_close(unets.outputs(net, run), expected)
        assert "guards checked at 11, not at 8" in handle.explain()

    def test_the_state_can_be_released(self):
        net = unets.unet2d()
        handle = mk.accelerate(net)
        handle.compile(backend="eager")
        unets.outputs(net, handle)
        held = [weakref.ref(tensor.contexts["default"].tensor) for tensor in handle.state.outputs.values()]
        assert all(each() is not None for each in held)
        handle.state.release()
        assert all(each() is None for each in held)

    def test_classes_that_are_not_known(self):
        class Counting(nn.Conv2d):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return super().forward(x)

        net = unets.unet2d()
        net.conv_out.__class__ = Counting
        handle = mk.accelerate(net)
        handle.compile(backend="eager")
        unets.outputs(net, handle)
        assert net.conv_out.calls == 5
        assert "not possible with a Counting, whose forward may do more than compute" in handle.explain()

    def test_a_call_that_leaves_more_behind(self, monkeypatch):
        monkeypatch.setattr(compiled, "obstacle_of", lambda net: None)  # that would be the processor
        kept = []
        for is_compiled in (False, True):
            net, processor = unets.unet2d(), Keeping()
            net.mid_block.attentions[0].set_processor(processor)
            handle = mk.accelerate(net)
            if is_compiled:
                handle.compile(backend="eager")
            unets.outputs(net, handle)
            kept.append(processor.kept)
        assert_close([kept[1]], [kept[0]])
        assert "not at 0 (not possible for a call that leaves more behind than its output)" in handle.explain()

    @pytest.mark.parametrize("options", [{"fullgraph": False}, {"options": {}}], ids=str)
    def test_options_of_the_user(self, options):
        net = unets.unet2d()
        handle = mk.accelerate(net)
        expected = unets.outputs(net, handle)
        handle.compile(backend="eager", **options)
        assert_close(unets.outputs(net, handle), expected)
        assert "at 4, not at 0 (not possible with fullgraph=False, a mode or options)" in handle.explain()


class TestGraphs:
    @pytest.mark.parametrize("options", PLAIN, ids=str)
    def test_replays_equal_plain_calls(self, options):
        net, handle = accelerated(**options)
        encoder, runs = text(), 3
        expected = [run(net, handle, encoder) for _ in range(runs)]
        net, handle, graphs = graphed(**options)
        for wanted in expected:
            assert_equal(run(net, handle, encoder), wanted)
        kinds = kinds_of(options)
        assert graphs.captured == kinds
        assert graphs.eager == kinds * WARM_UP_CALLS
        assert graphs.replayed == runs * (CALLS - 1) - graphs.eager  # the first call of a run is run as it is
        assert f"{kinds} captured" in handle.explain()

    @pytest.mark.parametrize("options", SCHEDULED, ids=str)
    def test_a_graph_per_scale_factor_of_a_schedule(self, options):
        options = {**options, "table": 20} if "table" in options else options
        encoder = text()
        net, handle = accelerated(**options)
        expected = [run(net, handle, encoder, calls=20) for _ in range(4)]
        net, handle, graphs = graphed(**options)
        for wanted in expected:
            assert_equal(run(net, handle, encoder, calls=20), wanted)
        assert 2 <= graphs.captured <= 5
        assert graphs.replayed > 0

    def test_changed_encoder_states(self):
        net, handle, graphs = graphed()
        assert_equal(changing_text(net, handle), changing_text(*accelerated()))
        assert graphs.replayed > 0

    def test_contexts_have_their_own_graphs(self):
        def passes(net, handle):
            found, encoders = [], {"cond": text(), "uncond": text(seed=3)}
            with handle.sampling_run():
                for call, x in enumerate(trajectory((2, 4, 8, 8), CALLS)):
                    for name, encoder in encoders.items():
                        with handle.context(name):
                            found.append(net(x, 500 - 10 * call, encoder_hidden_states=encoder)[0])
            return found

        net, handle, graphs = graphed()
        assert_equal(passes(net, handle), passes(*accelerated()))
        assert graphs.captured == 2

    @pytest.mark.parametrize("form", [float, lambda call: torch.tensor(float(call))])
    def test_timesteps_in_any_form_and_outputs_of_their_own(self, form):
        net, handle, graphs = graphed()
        got = run(net, handle, timestep=lambda call: form(500 - 10 * call))
        assert_equal(got, run(*accelerated()))
        assert graphs.replayed > 1
        assert len({tensor.data_ptr() for tensor in got}) == CALLS  # later calls do not write onto them

    @pytest.mark.parametrize("at", [1, 2])
    @pytest.mark.parametrize("options", [*PLAIN[1:3], SCHEDULED[1], {"fuse": False}], ids=str)
    def test_an_error_in_a_capture(self, at, options, caplog):
        """The same call runs as it is, though half of its Python has run before, and nothing is captured after it: with
        layers by themselves, between the readers of a shared input."""
        runs = {"calls": 20, "encoder": text()} if "schedule" in options else {"encoder": text()}
        plain = accelerated(**options)
        expected = [run(*plain, **runs) for _ in range(4)]
        net, handle, graphs = graphed(**options)
        capture, tried, reader = graphs._capture, [], "transformer.transformer_blocks.0.attn1.to_k"

        def failing(step, device):
            tried.append(device)
            if len(tried) == at:
                with mock.patch.object(handle.layers[reader], "forward", None):
                    capture(lambda: [step(), 1 / 0], device)
            return capture(step, device)

        graphs._capture = failing
        for wanted in expected:
            assert_equal(run(net, handle, **runs), wanted)
        assert (graphs.captured, len(tried)) in ((at - 1, at), (1, 1))
        if len(tried) == at:
            assert "no more, after an error in a capture (" in handle.explain()
            assert caplog.text.count("an error in a capture") == 1

    def test_shapes_in_turn_keep_graphs_and_state(self):
        def runs(net, handle, batches):
            return [run(net, handle, texts[batch], batch=batch) for batch in batches]

        texts = {batch: text(batch) for batch in (1, 2, 3, 4)}
        net, handle, graphs = graphed()
        turns = (2, 3, 2, 3, 2, 1, 3)
        for got, wanted in zip(runs(net, handle, turns), runs(*accelerated(), turns), strict=True):
            assert_equal(got, wanted)
        assert (graphs.captured, len(handle.state.shelves)) == (3, 2)
        in_use = sum(held.tensor.nbytes for holder in handle.state._holders() for held in holder.contexts.values())
        assert handle.state.nbytes() > 1.9 * in_use  # of batches 1, 2 and 3
        place = weakref.ref(next(iter(graphs._shapes["default"].values())).formats.popitem()[1].inputs[0].place)
        runs(net, handle, [4])
        assert (place(), len(handle.state.shelves)) == (None, 2)
        handle.state.release()
        assert (handle.state.nbytes(), handle.state.shelves) == (0, {})
        assert_equal(runs(net, handle, [2])[0], runs(*accelerated(), [2])[0])

    @pytest.mark.parametrize("during", ["halved", "autocast", "offload before", "offload after", *WEIGHTS])
    def test_what_pipelines_do(self, during):
        """A callback halves the batch; weights move between runs; arguments come in any order."""

        def offload(net, when):
            return [cpu_offload_with_hook(net, torch.device("cpu"))[1]] if during == when else []

        def outputs(capture):
            torch.manual_seed(0)
            net = Net().eval()
            hooks = offload(net, "offload before")
            handle = mk.accelerate(net)
            hooks += offload(net, "offload after")
            found, graphs, encoders = [], capture(handle), {2: text(), 1: text(1)}
            for index in range(3):
                autocast = torch.autocast("cpu", torch.bfloat16, during == "autocast" and index < 2)
                with handle.sampling_run(), autocast:
                    for call, x in enumerate(trajectory((2, 4, 8, 8), 9)):
                        batch = 1 if during == "halved" and call > 4 else 2
                        rest = {"encoder_hidden_states": encoders[batch], "sample": x[:batch]}
                        found.append(net(timestep=torch.tensor(500 - call), **rest)[0])
                for hook in hooks:
                    hook.offload()
                WEIGHTS.get(during, id)(net)
            return found, graphs

        expected, _ = outputs(lambda handle: None)
        got, graphs = outputs(capture_calls)
        assert_equal(got, expected)
        assert graphs.captured == {"halved": 2, "autocast": 2, **dict.fromkeys(WEIGHTS, 3)}.get(during, 1)

    @pytest.mark.parametrize(
        ("obstacle", "reason"),
        [
            (lambda net: net.conv_in.register_forward_hook(print), "a hook or a forward of its own on 'conv_in'"),
            (lambda net: setattr(net.conv_in, "forward", net.conv_in.forward), "a forward of its own on 'conv_in'"),
            (lambda net: net.transformer.transformer_blocks[0].attn1.set_processor(len), "attention processor builtin"),
        ],
    )
    def test_obstacles(self, obstacle, reason, caplog, capsys):
        net, handle, graphs = graphed(fuse=False)
        run(net, handle)
        replayed = graphs.replayed
        obstacle(net)
        for _ in range(2):
            with contextlib.suppress(TypeError):
                run(net, handle)
        assert graphs.replayed == replayed > 0
        assert reason in handle.explain()
        assert caplog.text.count(reason) == 1

    def test_inputs_are_placed_without_waiting(self):
        """On the device of the weights, whichever argument comes first; of one value, it is written."""
        graphs, ops = GraphedCalls(ModulationState(), None), []

        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                ops.append((func.name(), args[2:]))
                return func(*args, **(kwargs or {}))

        given = {"timestep": torch.tensor([5]), "ids": torch.ones(2), "sample": torch.ones(2, 3), "scale": 0.5}
        _, placed, _ = graphs.static((), given, torch.device("meta"))
        assert all(value.is_meta for value in placed.values() if isinstance(value, torch.Tensor))
        with Log():
            graphs.static((), {**given, "timestep": torch.tensor([6]), "ids": torch.ones(2)}, torch.device("meta"))
        written = [op for op in ops if op[0][:11] in ("aten::fill_", "aten::copy_")]
        assert written == [("aten::fill_.Scalar", ()), ("aten::copy_", (True,))]
        assert graphs.static((), {**given, "scale": [{}, {1}]}, torch.device("meta"))[2] is None  # cannot be hashed

    def test_refused(self):
        net = Net()
        with pytest.raises(ValueError, match="cuda_graphs=True is not possible for a UNet on cpu; move it to a GPU"):
            mk.accelerate(net, mk.ModiffConfig(cuda_graphs=True))
        assert type(net.resnet) is ResnetBlock2D
