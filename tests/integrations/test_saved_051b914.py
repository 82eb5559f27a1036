"""Folders that commit 051b914 saved load and sample as they did there (tests/data/saved_051b914)."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

import modiff_kernels as mk
from modiff_kernels.metrics import sqnr

SAVED = Path(__file__).resolve().parents[1] / "data" / "saved_051b914"


def unet_of(name):
    return UNet2DModel.from_pretrained(SAVED / name, torch_dtype=torch.float32).eval().requires_grad_(False)


def calls_of(handle):
    """The outputs of all calls of a run, as the script of the folder samples."""
    scheduler = DDIMScheduler(beta_end=0.002)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    with torch.no_grad(), handle.sampling_run(scheduler=scheduler):
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            outputs.append(handle.unet(x, t).sample)
            x = scheduler.step(outputs[-1], t, x).prev_sample
    return torch.stack(outputs)


def check(handle, name, least_db):
    """Every call is `least_db` close to what it was, and far from float, so that an unused folder fails."""
    recorded = np.load(SAVED / "calls.npz")
    for found, before, exact in zip(calls_of(handle), torch.tensor(recorded[name]), torch.tensor(recorded["float"])):
        assert sqnr(found, before) >= least_db
        assert sqnr(found, exact) < 20


# The first call made one update with float activations, or with 8 bits; it makes two of 8 bits now. What that moves is
# far below the rounding of later calls, whose codes it may change: 4-bit codes move the output by more than 8-bit ones.
def test_a_low_bit_model():
    check(mk.accelerate(unet_of("low_bit")), "low_bit", 18)


def test_a_calibration(caplog):
    result = mk.CalibrationResult.load(SAVED / "calibration")
    assert "first_step_bits=8 is not used any more" in caplog.text
    check(mk.accelerate(unet_of("float"), result.config, calibration=result), "calibrated", 25)
