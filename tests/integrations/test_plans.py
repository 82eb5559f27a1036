"""`ModiffConfig(plan=...)`: what a plan does to a UNet, where it comes from, what is refused."""

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch

import modiff_kernels as mk
from modiff_kernels.backends import cpu
from modiff_kernels.config.plan import LayerPlan, Mode, ModeCost, UnitPlan
from modiff_kernels.evaluation.configurations import Quantised, Row
from modiff_kernels.integrations import plan_cache, plans, replacements
from modiff_kernels.integrations.planner import Bench
from modiff_kernels.nn import layer
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.planning.cost import Machine
from tests.unets import SDXL, outputs, unet2d_condition

FLOAT, PLAIN, MODULATED = Mode("float"), Mode("quantized", 8), Mode("modulated", 4)
SLOW_INT8 = Machine(float_ops=1e12, int8_ops=1e10, bandwidth=1e12)
FAST_INT8 = Machine(float_ops=1e10, int8_ops=1e13, bandwidth=1e13)
pytestmark = pytest.mark.usefixtures("cache")


def run(unet, handle=None):
    return torch.stack(outputs(unet, handle, calls=3))


def modes_of(handle):
    return {row.name: row.mode for row in handle.rows()}


@pytest.mark.parametrize("fuse", [True, False])
def test_modes_of_a_mixed_plan(unet, fuse):
    """Also of layers that read one input."""
    exact = run(unet)
    resnet, attention = "up_blocks.1.resnets.0", "up_blocks.1.attentions.0"
    modes = {"mid_block": "float", "down_blocks.0": "quantized 8", resnet: "modulated 8"}
    modes |= {f"{attention}.to_q": "float", f"{attention}.to_k": "quantized 8"}
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, plan=LayerPlan.of(modes), fuse=fuse))
    rows = {row.name: row for row in handle.rows()}
    conv = "mid_block.resnets.0.conv1"
    assert (rows[conv].mode, rows[conv].reason) == ("float", "plan: float")
    assert rows["down_blocks.0.resnets.0.conv1"].mode == "quantized"
    assert (rows[f"{resnet}.conv1"].mode, handle.layers[f"{resnet}.conv1"].act_bits) == ("modulated", 8)
    assert handle.layers["up_blocks.0.resnets.0.conv1"].act_bits == 4  # not in the plan: as the config says
    assert [rows[f"{attention}.to_{name}"].mode for name in "qkv"] == ["float", "quantized", "modulated"]
    out = run(unet, handle)
    assert ((out - exact).square().sum() / exact.square().sum()).item() < 2e-3
    assert "plan (given): as given" in handle.explain()
    handle.remove()
    assert torch.equal(run(unet), exact)


def test_float_units_among_learnt_codes_take_their_own(unet):
    path = "mid_block.resnets.0.conv1"
    handle = mk.accelerate(unet, mk.ModiffConfig())
    config, layers = handle.config, {name: layer.stored() for name, layer in handle.layers.items()}
    handle.remove()
    exact, weight = run(unet), unet.get_submodule(path).weight.detach().clone()
    result = mk.CalibrationResult("given", config, layers)
    handle = mk.accelerate(unet, mk.ModiffConfig(plan=LayerPlan.of({"mid_block": "float"})), calibration=result)
    layer, codes = handle.layers[path], layers[path].weight
    assert torch.equal(layer.float_weight, codes.dequantized(weight.shape))
    assert {row.name: row.reason for row in handle.rows()}[path].startswith(
        "plan: float, beside codes that were learnt"
    )
    assert 0 < (run(unet, handle) - exact).square().mean() / exact.square().mean() < 2e-3
    handle.remove()
    everything = LayerPlan.of(dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), "float"))
    assert not mk.accelerate(unet, mk.ModiffConfig(plan=everything), calibration=result).layers


def test_an_all_float_plan_leaves_the_unet_alone(unet):
    exact = run(unet)
    units = ("down_blocks", "mid_block", "up_blocks")
    handle = mk.accelerate(unet, mk.ModiffConfig(plan=LayerPlan.of(dict.fromkeys(units, "float"))))
    assert not any(isinstance(module, ModulatedLayer) for module in unet.modules())
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    unet(torch.randn(2, 3, 8, 8), 10)  # no run needed: there is no state
    assert seen[0].is_contiguous()
    assert not seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(unet, handle), exact)
    assert handle.state.nbytes() == 0


def test_a_plan_in_a_file(unet, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"units": {"mid_block": "float"}}')
    handle = mk.accelerate(unet, mk.ModiffConfig(plan=path))
    assert modes_of(handle)["mid_block.resnets.0.conv1"] == "float"
    handle.remove()
    path.write_text("{}")
    for name, reason in (("plan.json", ".* no object with 'units'"), ("none.json", "")):
        with pytest.raises(ValueError, match=rf"plan: .*{name} cannot be read as a layer plan: {reason}"):
            mk.accelerate(unet, mk.ModiffConfig(plan=str(tmp_path / name)))


def stored_plan(unet, config, shape, modes):
    plan = LayerPlan.of({"down_blocks": "modulated 4", "up_blocks": "modulated 4", "mid_block": "modulated 4", **modes})
    plan_cache.store(dataclasses.replace(plan, key=plan_cache.key_of(unet, config, shape), source="measured"))


def test_auto_takes_the_newest_stored_plan(unet, cache):
    config = mk.ModiffConfig(act_bits=4, plan="auto", schedule="forecast every=2")
    stored_plan(unet, config, (2, 3, 8, 8), {"mid_block": "float"})
    stored_plan(unet, mk.ModiffConfig(act_bits=8), (2, 3, 8, 8), {"down_blocks": "float"})  # another configuration
    handle = mk.accelerate(unet, dataclasses.replace(config, schedule=None))
    assert handle.plan.source == "measured"
    assert modes_of(handle)["mid_block.resnets.0.conv1"] == "float"
    assert modes_of(handle)["down_blocks.0.resnets.0.conv1"] == "modulated"
    handle.remove()
    assert len(list(cache.rglob("2x3x8x8.json"))) == 2


def test_auto_estimates_where_nothing_is_stored(unet, monkeypatch):
    monkeypatch.setattr(plans, "measured_machine", lambda device, config: SLOW_INT8)
    handle = mk.accelerate(unet, mk.ModiffConfig(plan="auto"))
    assert handle.plan.source == "estimated"
    assert handle.plan.is_float
    assert re.search(r"nothing was measured: \d+ float; 1.00x as fast", handle.explain())
    handle.remove()


@pytest.mark.parametrize(("option", "is_float"), [({}, True), ({"plan": "auto"}, True), ({"plan": "modulated"}, False),
                                                  ({"backend": "reference"}, False)])  # fmt: skip
def test_layers_stay_float_by_default_without_the_kernels_for_this_cpu(unet, monkeypatch, caplog, option, is_float):
    monkeypatch.setattr(cpu, "why_slow", lambda: "no kernels here")
    monkeypatch.setattr(plans, "measured_machine", lambda device, config: FAST_INT8)
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    exact = run(unet)
    handle = mk.accelerate(unet, mk.ModiffConfig(**option))
    assert (set(modes_of(handle).values()) == {"float"}) == is_float
    assert ("slower than float without the kernels of this package: no kernels here" in handle.explain()) == is_float
    assert caplog.text.count("all layers stay float") == is_float
    assert torch.equal(run(unet, handle), exact) == is_float


@pytest.mark.parametrize("plan", [None, "modulated", "quantized"])
def test_modes_by_default_on_a_gpu(unet, monkeypatch, plan):
    """Attention is plain, with scales per token; convolutions near the output are modulated, if they are not float."""
    for module in (plans, replacements):
        monkeypatch.setattr(module, "runs_on_gpu", lambda unet: True)
    monkeypatch.setattr(layer, "is_gpu", lambda device: True)
    monkeypatch.setattr(plans, "measured_machine", lambda device, config: FAST_INT8)
    exact = run(unet)
    handle = mk.accelerate(unet, mk.ModiffConfig(plan=plan))
    modes, granularities = modes_of(handle), {name: layer.granularity for name, layer in handle.layers.items()}
    last, attention = "up_blocks.1.resnets.1.conv1", "mid_block.attentions.0.to_q"
    assert handle.config.mode == (plan or "modulated")
    assert modes[last] == (plan or "modulated")
    assert modes[attention] == (plan or "quantized")
    assert granularities[attention] == ("per_sample" if plan == "modulated" else "per_token")
    assert granularities[last] == "per_sample"
    if plan is None:
        assert handle.plan.source == "estimated"
        assert handle.layers[last].input.scale_mode == "delayed"
        assert "its errors weigh more" in handle.explain()
        out = run(unet, handle)
        assert ((out - exact).square().sum() / exact.square().sum()).item() < 1e-3
        held = sum(unit.cost(Mode("modulated", 8)).state_bytes for unit in handle.plan.units if unit.mode.act_bits)
        assert 0 < handle.state.nbytes() < held  # less than if all of them were modulated
    else:
        assert handle.plan is None


def test_a_network_stays_float_where_the_compiled_one_is_faster(unet, monkeypatch, caplog):
    """Launches alone count here: low bits have fewer than float layers, and more than compiled ones."""
    monkeypatch.setattr(plans, "runs_on_gpu", lambda unet: True)
    machine = Machine(float_ops=1e12, int8_ops=1e12, bandwidth=1e12, launch=1e-3)
    assert not plans.estimated(unet, mk.ModiffConfig(), {}, True, machine, compared_at=()).is_float
    assert not caplog.text
    plan = plans.estimated(unet, mk.ModiffConfig(), {}, True, machine)
    assert plan.is_float
    assert re.search(r"float; low bits are 0\.9\dx as fast as the compiled float network at batch 1;", plan.summary)
    assert caplog.text.count("all layers stay float") == 1


def test_what_is_in_one_mode_is_so_on_a_gpu(unet, monkeypatch):
    """Rows of a report, and the single modes that make_plan compares."""
    monkeypatch.setattr(plans, "runs_on_gpu", lambda unet: True)
    monkeypatch.setattr(plans, "estimated", None)  # not called
    for mode in ("modulated", "quantized"):
        handle = Quantised(unet, Row(mode, mode, mode, 8, 8)).handle
        assert handle.plan is None
        assert {layer.mode for layer in handle.layers.values()} == {mode}
        handle.remove()
    modes, zeros = (PLAIN, Mode("modulated", 8)), np.zeros((1, 8, 8, 3))
    bench = Bench(unet, mk.ModiffConfig(), modes, None, None, [], zeros, None, lambda: None)
    found = [{layer.mode for layer in subject.handle.layers.values()} for subject in bench.subjects.values()]
    assert found == [{"quantized"}, {"modulated"}]


def test_a_unet_that_comes_to_a_gpu_later_is_told(unet, caplog):
    class OnGpu(torch.Tensor):
        is_cuda = True

    sample = torch.randn(2, 3, 8, 8)
    for plan, told in ((None, 1), ("modulated", 1)):  # once, and not where it is meant
        handle = mk.accelerate(unet, mk.ModiffConfig(plan=plan))
        handle._look_at_call((sample,), {})
        for _ in range(2):
            with handle.sampling_run():
                handle._look_at_call((sample.as_subclass(OnGpu), 5), {})
        assert caplog.text.count("accelerated before it came to the GPU") == told
        handle.remove()


def test_shapes_that_are_not_known_on_a_gpu_are_told(monkeypatch, caplog):
    monkeypatch.setattr(plans, "runs_on_gpu", lambda unet: True)
    network = torch.nn.Sequential(torch.nn.Linear(32, 32))
    assert mk.accelerate(network).plan is None
    assert "all layers are modulated, for modes could not be chosen by their cost: plan: the inputs of" in caplog.text


def test_shapes_are_seen_without_computing(unet):
    shape, shapes = plans.traced_shapes(unet, batch=3)
    assert shape == (3, 3, 8, 8)
    conv = shapes["down_blocks.0.resnets.0.conv1"]
    assert (conv.inputs, conv.outputs) == (3 * 16 * 64, 3 * 16 * 64)
    assert (conv.weights, conv.multiply_adds) == (16 * 16 * 9, 3 * 64 * 16 * 16 * 9)
    linear = shapes["mid_block.attentions.0.to_q"]
    assert (linear.inputs, linear.multiply_adds) == (3 * 16 * 32, 3 * 16 * 32 * 32)
    assert not any(parameter.is_meta for parameter in unet.parameters())
    _, shapes = plans.traced_shapes(unet2d_condition(**SDXL).to("meta"), batch=2)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"].inputs == 2 * 77 * 24
    with pytest.raises(ValueError, match=r"the inputs of Sequential could not be made up .* make_plan"):
        plans.traced_shapes(torch.nn.Sequential(torch.nn.Linear(3, 3)))


def costed_plan(unet):
    units = mk.accelerate(unet, mk.ModiffConfig(act_bits=4))
    run(unet, units)
    layers, state = units.replaced.units(), units.state.nbytes()
    units.remove()
    own = []
    for i, (path, held) in enumerate(layers.items()):
        costs = (ModeCost(FLOAT, 100.0), ModeCost(MODULATED, 90.0 - i, 40.0, state // len(layers)))
        own.append(UnitPlan(path, MODULATED, held, costs))
    key = plan_cache.key_of(unet, mk.ModiffConfig(act_bits=4), (2, 3, 8, 8))
    return LayerPlan(tuple(own), key, "measured")


def test_max_state_bytes(unet, monkeypatch):
    plan = costed_plan(unet)
    limit = plan.state_bytes // 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, plan=plan, max_state_bytes=limit))
    monkeypatch.undo()
    assert handle._forward.graphs.most_shapes == 1
    left = [unit.mode == FLOAT for unit in handle.plan.units]
    assert left == sorted(left, reverse=True)  # the later units gain more
    assert 0 < sum(left) < len(left)
    assert handle.plan.state_bytes <= limit
    needs = r"max_state_bytes=\d+: a sample \(64, 3, 8, 8\) in 1 context\(s\) needs about"
    with handle.sampling_run(), pytest.raises(ValueError, match=needs):
        unet(torch.randn(64, 3, 8, 8), 5)
    with handle.sampling_run():
        unet(torch.randn(2, 3, 8, 8), 5)
        with handle.context("uncond"), pytest.raises(ValueError, match=r"in 2 context\(s\)"):
            unet(torch.randn(2, 3, 8, 8), 5)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({"mid_block": "float"}, "the plan says nothing of 'down_blocks.0.attentions.0.to_q'"),
        ({"mid_block": "modulated 8"}, "the plan does not say for which shape it is"),
    ],
)
def test_state_that_is_not_known_is_not_allowed(unet, modes, message):
    config = mk.ModiffConfig(plan=LayerPlan.of(modes), max_state_bytes=10**9)
    with pytest.raises(ValueError, match=rf"max_state_bytes=1000000000: {message}"):
        mk.accelerate(unet, config)
    plain = dataclasses.replace(config, plan=LayerPlan.of({"mid_block": "float"}), mode="quantized", max_state_bytes=0)
    handle = mk.accelerate(unet, plain)
    run(unet, handle)
    assert handle.state.nbytes() == 0


def test_a_plan_made_elsewhere_is_told(unet, caplog):
    plan = costed_plan(unet)
    elsewhere = dataclasses.replace(plan, key=dataclasses.replace(plan.key, device="x", model="0"))
    for made, text in ((plan, ""), (elsewhere, "made for another device (x) and UNet, so")):
        mk.accelerate(unet, mk.ModiffConfig(act_bits=4, plan=made)).remove()
        assert text in caplog.text
        assert bool(text) == bool(caplog.text)


def test_another_shape_than_the_planned_one_is_told(unet, caplog):
    plan = costed_plan(unet)
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, plan=plan))
    with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
        for _ in range(2):
            with handle.sampling_run():
                unet(torch.randn(3, 3, 8, 8), 5)
    assert caplog.text.count("made for samples (2, 3, 8, 8) and is used for (3, 3, 8, 8)") == 1
