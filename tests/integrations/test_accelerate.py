"""`accelerate` and its handle: what is replaced, what stays, errors that change nothing, and the way back."""

import logging
import types

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models import modeling_utils
from diffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear, LoRALinearLayer
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.ops import BackendUnavailable, dispatch
from tests.unets import (
    FLOAT,
    NETWORKS,
    assert_equal,
    both_ways,
    noise,
    outputs,
    pipeline,
    sample,
    snapshot,
    static_scales,
    unet2d,
    unet2d_condition,
)


class TestReplacement:
    @pytest.mark.parametrize("options", [{}, {"mode": "quantized"}, {"act_bits": None}, {"fuse": False}], ids=str)
    def test_state_dict_stays(self, options, tmp_path):
        unet, other = unet2d(), unet2d(seed=1)
        before = {key: value.clone() for key, value in unet.state_dict().items()}
        handle = mk.accelerate(unet, mk.ModiffConfig(**options))
        after = unet.state_dict()
        assert list(after) == list(before) == [name for name, _ in unet.named_parameters()]
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert unet.dtype == torch.float32
        unet.save_pretrained(tmp_path)
        loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[key], before[key]) for key in before)
        unet.load_state_dict(other.state_dict())
        handle.remove()
        assert_equal(outputs(unet, calls=1), outputs(other, calls=1))

    @both_ways
    @pytest.mark.parametrize("network", NETWORKS)
    def test_remove_restores_the_very_same_modules(self, network, fuse):
        pipe = pipeline(unet=NETWORKS[network]())
        before, reference = snapshot(pipe.unet), outputs(pipe.unet, calls=2)
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        assert snapshot(pipe.unet) != before
        outputs(pipe.unet, handle, calls=2)
        handle.remove()
        handle.remove()
        assert snapshot(pipe.unet) == before
        assert handle.state.nbytes() == 0
        assert_equal(outputs(pipe.unet, calls=2), reference)
        with pytest.raises(RuntimeError, match="was removed"):
            handle.sampling_run()
        with pytest.raises(RuntimeError, match="was removed"):
            handle.compile()
        mk.accelerate(pipe).remove()
        assert snapshot(pipe.unet) == before

    def test_remove_puts_an_own_reset_back(self):
        unet = unet2d()
        own = unet._reset_stateful_cache = lambda: None
        mk.accelerate(unet).remove()
        assert unet.__dict__["_reset_stateful_cache"] is own

    @both_ways
    def test_twice(self, fuse):
        unet = unet2d()
        mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        for target in (unet, unet.mid_block, nn.Sequential(unet)):
            with pytest.raises(RuntimeError, match=r"accelerated already; call remove\(\)"):
                mk.accelerate(target)

    @pytest.mark.parametrize(
        ("target", "error", "text"),
        [
            (lambda: None, TypeError, "got NoneType; give a UNet"),
            (lambda: types.SimpleNamespace(transformer=nn.Linear(1, 1)), TypeError, "pipeline with a `unet`"),
            (lambda: nn.Sequential(nn.GroupNorm(1, 4)), ValueError, "holds no Linear and no Conv2d"),
            (lambda: nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 1)}), ValueError, "none of the 1 .*has 'conv_in'"),
            (lambda: torch.compile(unet2d()), TypeError, "the UNet is compiled; accelerate the UNet itself"),
        ],
    )
    def test_impossible_targets(self, target, error, text):
        with pytest.raises(error, match=text):
            mk.accelerate(target())

    def test_errors_leave_everything_as_it_was(self, monkeypatch):
        pipe = pipeline()
        before, reference = snapshot(pipe.unet), sample(pipe)

        def refused(error, match, target=pipe, **options):
            with pytest.raises(error, match=match):
                mk.accelerate(target, **options)
            assert snapshot(pipe.unet) == before
            assert "set_timesteps" not in pipe.scheduler.__dict__

        refused(TypeError, "config is a dict; give a ModiffConfig", config={"act_bits": 4})
        for scheduler in (None, object()):
            target = types.SimpleNamespace(unet=pipe.unet, scheduler=scheduler)
            refused(ValueError, r"has no set_timesteps\(\)", target)
        static = mk.ModiffConfig(scale_mode="static")
        refused(ValueError, "needs a calibrated scale", config=static)
        refused(ValueError, "scale_mode='dynamic' does not use them", static_scales={"conv_in": 1.0})
        refused(ValueError, "names 'conv', which is no .*such as 'conv_in'", config=static, static_scales={"conv": 1.0})
        refused(
            ValueError, "cuda_graphs=True is not possible for a UNet on cpu", config=mk.ModiffConfig(cuda_graphs=True)
        )
        monkeypatch.setattr(dispatch, "load", lambda name: "it is broken")
        dispatch.reset()
        refused((BackendUnavailable, ValueError), "it is broken", config=mk.ModiffConfig(backend="reference"))
        monkeypatch.undo()
        dispatch.reset()
        weight = pipe.unet.up_blocks[1].resnets[1].conv2.weight
        old = weight[0, 0, 0, 0].item()
        weight[0, 0, 0, 0] = float("nan")
        refused(ValueError, r"'up_blocks.1.resnets.1.conv2': .*NaN or Inf")
        weight[0, 0, 0, 0] = old
        assert torch.equal(sample(pipe), reference)

    def test_skip_modules(self, caplog):
        unet = unet2d()
        with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
            handle = mk.accelerate(unet, mk.ModiffConfig(skip_modules=("conv_in", "mid_block", "no_such")))
        assert "'no_such' fits no module" in caplog.text
        assert not any("mid_block" in name for name in handle.layers)
        assert "time_embedding.linear_1" in handle.layers
        assert outputs(unet, handle)[-1].isfinite().all()

    def test_a_module_under_two_names_stays_one(self):
        conv = nn.Conv2d(3, 3, 1)
        net = nn.ModuleDict({"a": conv, "b": conv, "c": nn.Linear(2, 2)})
        mk.accelerate(net)
        assert net["a"] is net["b"]
        assert isinstance(net["a"], ModulatedLayer)

    def test_projections_share_their_input(self):
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        keys = {name.removeprefix(f"{block}."): layer.input.key for name, layer in handle.layers.items()}
        assert {keys[f"attn1.{name}"] for name in ("to_q", "to_k", "to_v")} == {f"{block}.attn1.to_q"}
        assert {keys[f"attn2.{name}"] for name in ("to_k", "to_v")} == {f"{block}.attn2.to_k"}
        assert keys["attn2.to_q"] == f"{block}.attn2.to_q"
        outputs(unet, handle)
        shared = handle.state.nbytes()
        handle.remove()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False), share_inputs=False)
        outputs(unet, handle)
        assert shared < handle.state.nbytes()

    @both_ways
    def test_static_scales(self, fuse):
        unet = unet2d()
        config = mk.ModiffConfig(scale_mode="static", fuse=fuse)
        reference = outputs(unet)
        handle = mk.accelerate(unet, config, static_scales=static_scales(unet))
        assert sqnr(outputs(unet, handle)[-1], reference[-1]) > 25  # a scale that is not the best for any layer

    def test_layers_that_stay_float(self):
        class OwnForward(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        hooked = nn.Linear(2, 2)
        hooked.register_forward_hook(lambda *_: None)
        layers = {
            "own": (OwnForward(2, 2), "OwnForward has a forward of its own"),
            "hooked": (hooked, "it has hooks; accelerate() before they are added"),
            "parametrised": (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "its weight is parametrised"),
            "meta": (nn.Linear(2, 2, device="meta"), "its weight is not loaded (meta device)"),
            "float64": (nn.Linear(2, 2).double(), "its weight is torch.float64"),
            "reflect": (
                nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
                "padding_mode='reflect' is not supported, only 'zeros'",
            ),
            "lora": (
                LoRACompatibleLinear(4, 4, lora_layer=LoRALinearLayer(4, 4)),
                "it has a LoRA layer; fuse it into the weight first",
            ),
            "good": (nn.Linear(2, 2), ""),
            "lora_free": (LoRACompatibleLinear(4, 4), ""),
            "lora_free_conv": (LoRACompatibleConv(4, 4, 1), ""),
        }
        net = nn.ModuleDict({name: layer for name, (layer, _) in layers.items()})
        net["attention"] = nn.MultiheadAttention(4, 2)
        reasons = {name: reason for name, (_, reason) in layers.items()}
        reasons["attention.out_proj"] = "torch.nn.MultiheadAttention reads its weight without calling it"
        rows = {row.name: row for row in mk.accelerate(net).rows() if not row.name.startswith("lora.")}
        assert {name: row.reason for name, row in rows.items()} == reasons
        assert all((row.mode == "modulated") == (not row.reason) for row in rows.values())


class TestExplain:
    @both_ways
    def test_every_layer_has_a_line(self, fuse):
        unet = unet2d()
        paths = [path for path, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, backend="reference", fuse=fuse))
        outputs(unet, handle, calls=1)
        rows = {row.name: row for row in handle.rows()}
        assert list(rows) == paths
        lines = handle.explain().splitlines()
        assert len(lines) == len(paths) + 3
        assert f"{len(handle.layers)} of {len(paths)} layers low-bit" in lines[0]
        assert f"{handle.state.nbytes() / 2**20:.1f} MiB" in lines[0]
        row = rows["down_blocks.0.resnets.0.conv1"]
        assert (row.kind, row.shape, row.mode, row.bits, row.backend) == (
            "Conv2d 3x3", "16->16", "modulated", "w8a4", "reference"
        )  # fmt: skip
        row = rows["conv_in"]
        assert (row.mode, row.bits, row.reason) == ("float", "-", "skip_modules has 'conv_in'")

    def test_shapes_and_modes(self):
        net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, stride=2, groups=2), "linear": nn.Linear(5, 7)})
        rows = mk.accelerate(net, mk.ModiffConfig(weight_bits=4, act_bits=None)).rows()
        assert [row.shape for row in rows] == ["4->6 /2 groups 2", "5->7"]
        assert all((row.mode, row.bits, row.backend) == ("float", "w4a-", "torch") for row in rows)
        assert all("dequantised weights" in row.reason for row in rows)


class TestCalls:
    def test_plain_and_float_modes_need_no_run(self):
        unet = unet2d()
        reference = unet(noise(), 5).sample
        for options in ({"mode": "quantized"}, {"act_bits": None}, FLOAT):
            handle = mk.accelerate(unet, mk.ModiffConfig(**options))
            assert sqnr(unet(noise(), 5).sample, reference) > 25  # weights of 8 bits: some 35 dB
            assert handle.state.nbytes() == 0
            handle.remove()
        assert torch.equal(unet(noise(), 5).sample, reference)

    def test_output_is_contiguous_in_every_form(self):
        unet = unet2d()
        with mk.accelerate(unet).sampling_run():
            assert unet(noise(), 5).sample.is_contiguous()
            assert unet(sample=noise(), timestep=5, return_dict=False)[0].is_contiguous()

    def test_a_plain_module_as_root(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))
        reference = net(noise())
        with mk.accelerate(net).sampling_run():
            for _ in range(3):
                out = net(noise())
        assert sqnr(out, reference) > 30  # weights of 8 bits

    def test_addresses_of_the_state_stay_from_run_to_run(self):
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(scale_mode="delayed"))
        seen = set()
        for _ in range(3):
            outputs(unet, handle, calls=3)
            holders = [*handle.state.inputs.values(), *handle.state.outputs.values()]
            addresses = [held.tensor.data_ptr() for holder in holders for held in holder.contexts.values()]
            seen.add((*addresses, handle.state.relocations))
        assert len(seen) == 1

    def test_the_dtype_is_answered_without_a_walk_over_the_modules(self, monkeypatch):
        walks, seen = [], []
        walk = modeling_utils.get_parameter_dtype
        monkeypatch.setattr(modeling_utils, "get_parameter_dtype", lambda unet: walks.append(unet) or walk(unet))
        unet = unet2d()
        plain = type(unet)
        handle = mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        unet.conv_in.register_forward_pre_hook(lambda *_: seen.append((isinstance(unet, plain), unet.dtype)))
        for dtype in (torch.float32, torch.bfloat16):
            unet.to(dtype)
            walks.clear()
            unet(noise().to(dtype), 1)
            assert seen.pop() == (True, dtype)
            assert not walks
            assert unet.dtype == dtype
            assert type(unet) is plain  # outside a call
        with pytest.raises(TypeError):
            unet(noise().to(dtype), None)
        assert type(unet) is plain  # after a call that failed
        handle.remove()
        walks.clear()
        unet(noise().to(dtype), 1)
        assert walks

    def test_hooks_that_change_the_dtype_are_still_asked(self):
        unet = unet2d()
        apply_layerwise_casting(unet.conv_out, storage_dtype=torch.float16, compute_dtype=torch.float32)
        plain = type(unet)
        mk.accelerate(unet, mk.ModiffConfig())
        assert type(unet) is plain
        assert unet.dtype == torch.float32

    def test_a_device_move_takes_the_static_scales_along(self):
        """Device meta: no values, but tensors that say where they are."""
        unet = unet2d_condition()
        config = mk.ModiffConfig(scale_mode="static", backend="reference")
        handle = mk.accelerate(unet, config, static_scales=static_scales(unet))
        inputs = handle.state.inputs.values()
        for source in inputs:
            source.move_static(torch.device("meta"))
        assert all(source.static_scale.is_meta and source.static_zero_point.is_meta for source in inputs)
