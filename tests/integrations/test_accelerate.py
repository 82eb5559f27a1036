"""`accelerate` and its handle: what is replaced, what stays, errors that change nothing, and the way back."""

import logging
import types
from collections import OrderedDict

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear, LoRALinearLayer
from torch import nn

import modiff_kernels as mk
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.evaluation import sqnr
from modiff_kernels.ops import BackendUnavailable, dispatch
from modiff_kernels.quant.calibrated import CalibratedLayer
from tests.unets import NETWORKS, assert_equal, noise, outputs, pipeline, sample, snapshot, unet2d, unet2d_condition


class TestReplacement:
    @pytest.mark.parametrize("options", [{}, {"act_bits": None}, {"mode": "quantized", "fuse": False}], ids=str)
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

    @pytest.mark.parametrize("fuse", [True, False])
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
        for method in (handle.sampling_run, handle.compile):
            with pytest.raises(RuntimeError, match="was removed"):
                method()
        own = pipe.unet._reset_stateful_cache = lambda: None
        mk.accelerate(pipe).remove()
        assert pipe.unet.__dict__.pop("_reset_stateful_cache") is own
        assert snapshot(pipe.unet) == before

    def test_twice(self):
        unet = unet2d()
        mk.accelerate(unet)
        for target in (unet, unet.mid_block, nn.Sequential(unet)):
            with pytest.raises(RuntimeError, match=r"accelerated already; call remove\(\)"):
                mk.accelerate(target)

    @pytest.mark.parametrize(
        ("target", "error", "text"),
        [
            (lambda: None, TypeError, "got NoneType, which has no denoiser; give one .torch.nn.Module., or a pipeline"),
            (lambda: types.SimpleNamespace(transformer=nn.Linear(1, 1)), TypeError, "pipeline with a `unet` or `trans"),
            (lambda: nn.Sequential(nn.GroupNorm(1, 4)), ValueError, "holds no Linear and no Conv2d"),
            (lambda: nn.Sequential(OrderedDict(conv_in=nn.Conv2d(3, 4, 1))), ValueError, "none of the 1 .* 'conv_in'"),
            (lambda: nn.Linear(4, 4), TypeError, "Linear is a single layer; give the network around it"),
            (lambda: nn.ModuleList([nn.Linear(4, 4)]), TypeError, "ModuleList is a container without a forward"),
            (lambda: torch.compile(unet2d()), TypeError, "the UNet is compiled; accelerate the UNet itself"),
            (lambda: [unet := unet2d(), unet.mid_block.compile()][0], TypeError, "'mid_block' of the UNet is compiled"),
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
        plan = mk.ModiffConfig(plan=LayerPlan.of({"conv_in": "modulated 8"}))
        refused(ValueError, "'conv_in' cannot be modulated 8: conv_in stays float", config=plan)
        static = mk.ModiffConfig(scale_mode="static")
        refused(ValueError, "needs a calibrated scale", config=static)
        result = mk.CalibrationResult("given", static, {"conv": CalibratedLayer(act_scale=torch.ones(1))})
        refused(ValueError, "names 'conv', which is no .*such as 'conv_in'", config=static, calibration=result)
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

    def test_a_calibration_beside_the_model(self, calibration_beside, caplog):
        caplog.set_level("INFO")
        unet, other = unet2d(), unet2d(seed=1)
        result = calibration_beside(unet, other)

        def accelerated(config=None, unet=unet, **options):
            handle = mk.accelerate(unet, config, **options)
            found = outputs(unet, handle), handle.explain().split("\n")[1]
            handle.remove()
            return found

        (codes, told), (rounded, not_told) = accelerated(), accelerated(calibration=None)
        assert "from a calibration: test, " in told
        assert "calibration" not in not_told
        assert not torch.equal(codes[-1], rounded[-1])
        assert_equal(codes, accelerated(calibration=result)[0])
        for reason, config, net in (
            ("weight_bits=4, but", mk.ModiffConfig(4), unet),
            ("no codes for the weight of layer 'conv_in'", mk.ModiffConfig(skip_modules=()), unet),
            ("no codes for the weight of layer 'down_", None, other),
        ):
            assert reason in accelerated(config, net)[1]
            assert reason in caplog.text

    def test_projections_share_their_input(self):
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        names = [f"{block}.attn{i}.to_{projection}" for i in (1, 2) for projection in "qkv"]
        keys = [handle.layers[name].input.key for name in names]
        assert keys == [names[i] for i in (0, 0, 0, 3, 4, 4)]
        outputs(unet, handle)
        shared = handle.state.nbytes()
        handle.remove()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False), share_inputs=False)
        outputs(unet, handle)
        assert shared < handle.state.nbytes()

    def test_layers_that_stay_float(self):
        class OwnForward(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        hooked = nn.Linear(2, 2)
        hooked.register_forward_hook(lambda *_: None)
        weight_norm = nn.utils.parametrizations.weight_norm
        layers = {
            "own": (OwnForward(2, 2), "OwnForward has a forward of its own"),
            "hooked": (hooked, "it has hooks"),
            "parametrised": (weight_norm(nn.Linear(2, 2)), "its weight is parametrised"),
            "meta": (nn.Linear(2, 2, device="meta"), "its weight is not loaded (meta device)"),
            "float64": (nn.Linear(2, 2).double(), "its weight is torch.float64"),
            "reflect": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
            "even": (nn.Conv2d(4, 4, 2, padding="same"), "padding='same' with an even kernel"),
            "lora": (LoRACompatibleLinear(4, 4, lora_layer=LoRALinearLayer(4, 4)), "it has a LoRA layer; fuse it"),
            "good": (nn.Linear(2, 2), ""),
            "lora_free": (LoRACompatibleLinear(4, 4), ""),
            "lora_free_conv": (LoRACompatibleConv(4, 4, 1), ""),
        }
        net = nn.Sequential(OrderedDict({name: layer for name, (layer, _) in layers.items()}))
        net.attention = nn.MultiheadAttention(4, 2)
        reasons = {name: reason for name, (_, reason) in layers.items()}
        reasons["attention.out_proj"] = "MultiheadAttention reads its weight without calling it"
        rows = {row.name: row for row in mk.accelerate(net).rows() if not row.name.startswith("lora.")}
        assert rows.keys() == reasons.keys()
        for name, reason in reasons.items():
            assert reason in rows[name].reason
            assert bool(rows[name].reason) == bool(reason)
        assert all((row.mode == "modulated") == (not row.reason) for row in rows.values())


class TestExplain:
    @pytest.mark.parametrize("fuse", [True, False])
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
        assert (row.kind, row.shape, row.mode) == ("Conv2d 3x3", "16->16", "modulated")
        assert (row.bits, row.backend) == ("w8a4", "reference")
        row = rows["conv_in"]
        assert (row.mode, row.bits, row.reason) == ("float", "-", "skip_modules has 'conv_in': the first layer")

    def test_skipped_and_constant_layers(self, caplog):
        config = mk.ModiffConfig(skip_modules=("conv_in", "mid_block", "no_such"))
        with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
            handle = mk.accelerate(unet2d_condition(), config)
        assert "'no_such' fits no module" in caplog.text
        assert not any("mid_block" in name for name in handle.layers)
        assert "time_embedding.linear_1" in handle.layers
        rows = {row.name: row for row in handle.rows()}
        row = rows["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
        assert (row.mode, row.bits) == ("constant", "w8a-")

    def test_any_module_may_be_the_root(self):
        conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        net = nn.Sequential(conv, nn.SiLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Linear(1, 7))
        net.again = conv  # one module under two names stays one
        x = noise(size=6)
        reference = net[:4](x)
        handle = mk.accelerate(net)
        assert net.again is net[0]
        assert [row.shape for row in handle.rows()][:3] == ["3->8 /2", "8->4 groups 2", "1->7"]
        with handle.state.sampling_run():
            for _ in range(3):
                with handle.state.call():
                    out = net[:4](x)
        assert sqnr(out, reference) > 30  # weights of 8 bits
        handle.remove()
        rows = mk.accelerate(net, mk.ModiffConfig(weight_bits=4, act_bits=None)).rows()
        assert all((row.mode, row.bits, row.backend) == ("float", "w4a-", "torch") for row in rows)
        assert all("dequantised weights" in row.reason for row in rows)
