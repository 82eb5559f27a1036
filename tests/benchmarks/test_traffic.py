"""What a UNet call launches and moves on a GPU, counted without one: the numbers that the default plan promises."""

import dataclasses

import pytest
import torch

import modiff_kernels as mk
from benchmarks import shared
from benchmarks.shapes import build_unet
from benchmarks.studies import traffic
from modiff_kernels.config.plan import Mode
from modiff_kernels.evaluation import psnr
from modiff_kernels.integrations import plans, replacements
from modiff_kernels.nn import layer
from modiff_kernels.planning import cost

COMPILED_GB, MODULATED_GB = 30.3, 58.5
"""Of a call of SD 1.5 with 16 samples in float16, counted independently of this code: as a fusing compiler runs it, and
modulated with dynamic scales."""


@pytest.fixture(scope="module")
def sd15_plan():
    with traffic.pretended_gpu():
        return traffic.default_plan(build_unet("sd15", "meta").half(), "H100")


def test_sd15_moves_less_than_a_compiler(sd15_plan):
    found = traffic.counted("sd15", 16, sd15_plan)
    assert found["gigabytes"] <= 27
    assert not {"aten zeros", "aten fill_", "aten copy_", "weight_sums_kernel"} & set(found["kernels"])


def test_launches_of_sd15(sd15_plan):
    plan, modulated = (traffic.counted("sd15", 2, modes)["launches"] for modes in (sd15_plan, "modulated"))
    assert plan <= 451  # of 944 before they were counted
    assert modulated <= 680


def model_of(network, batch, mode, compiled=False):
    with traffic.pretended_gpu():
        unet = build_unet(network, "meta").half()
        replaced = replacements.replacements_of(unet, traffic.mk.ModiffConfig(plan="modulated"), {}, True)
        _, shapes = plans.traced_shapes(unet, batch)
    layers = [plans._described(name, replaced, shapes[name]) for held in replaced.units().values() for name in held]
    sizes = cost.Sizes(2, 2, 8)  # with dynamic scales
    return sum(each.bytes for layer in layers for each in cost.passes(layer, mode, sizes, compiled)) / 1e9


def test_the_model_counts_what_is_launched():
    assert model_of("sd15", 16, Mode("float"), compiled=True) == pytest.approx(COMPILED_GB, rel=0.01)
    assert model_of("sd15", 16, Mode("modulated", 8)) == pytest.approx(MODULATED_GB, rel=0.03)
    for mode in ("modulated", "quantized"):
        counted = traffic.counted("sd15", 16, mode)["gigabytes"]
        assert model_of("sd15", 16, Mode(mode, 8)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("gpu", traffic.GPUS)
def test_the_default_is_not_slower_than_a_compiler_by_the_model(gpu):
    least = {("sd15", 1): 1.25, ("sd15", 64): 1.4, ("ldm8_churches", 1): 1.2, ("ddpm_cifar10", 1): 1.15}
    least |= {("ddpm_cifar10", 64): 1.05, ("cifar10_small16", 64): 1.0}
    for (network, batch), ratio in least.items():
        found = traffic.modelled(network, batch, gpu)
        assert found["compiled_ms"] / found["plan_ms"] >= ratio, (network, batch)


@pytest.mark.parametrize(("calibration", "least_db"), [(None, 49.5), ("auto", 55.0)])
def test_pictures_of_the_default_plan(monkeypatch, calibration, least_db):
    """The plan of an H100 for the shipped model, computed here: the same codes. As it is chosen unit by unit: in
    float32, as the model is here, all would stay float, for the plan is 0.96x as fast as compiled float at batch 64."""
    for module in (plans, replacements):
        monkeypatch.setattr(module, "runs_on_gpu", lambda unet: True)
    monkeypatch.setattr(layer, "is_gpu", lambda device: True)
    model = shared.load_model(None, None, torch.device("cpu"))
    plan = plans.estimated(model.unet, mk.ModiffConfig(), {}, True, traffic.rates("H100"), compared_at=())
    exact = shared.sample_images(model, model.unet, "ddim", 50, range(4))
    config = mk.ModiffConfig(plan=dataclasses.replace(plan, key=None))
    handle = mk.accelerate(model.unet, config, calibration=calibration)
    assert len({layer.mode for layer in handle.layers.values()}) > 1
    pictures = shared.sample_images(model, model.unet, "ddim", 50, range(4), run=lambda _: handle.sampling_run())
    assert psnr(pictures, exact).mean() >= least_db
