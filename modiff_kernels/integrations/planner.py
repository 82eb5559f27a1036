"""`make_plan`: measures every mode of every unit of a UNet in real sampling on this device, and chooses.

Plans are chosen by the sums of their units' times and errors (measurement.py), which are estimates; so what a plan does
to whole calls and pictures is measured before it is taken, against float and against all units in one mode."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from modiff_kernels.calibration.result import CalibrationResult, read_result
from modiff_kernels.config import LayerPlan, ModiffConfig
from modiff_kernels.config.plan import FLOAT_MODE, UnitPlan, noise_of
from modiff_kernels.integrations import plan_cache
from modiff_kernels.integrations.accelerate import resolve
from modiff_kernels.integrations.measurement import Bench, Sample, Subject, recorded
from modiff_kernels.integrations.plans import low_bit_modes
from modiff_kernels.nn.call import CallForm, denoisers_of
from modiff_kernels.planning import choice
from modiff_kernels.planning.choice import Costs

logger = logging.getLogger("modiff_kernels")

MAX_LOSS_DB = 0.5
LEAST_GAIN = 1.02  # a measured difference below 2 % is noise, and float is exact
CHOICES = 3  # plans whose pictures are looked at before one mode for all is taken
LEAST_STEP = 1.05  # by which an estimate that did not hold becomes worse, so that the next plan is another one
LEAST_REPEAT_DB = 60.0  # of two float samplings from the same noise in different memory formats


def make_plan(
    target: Any,
    config: ModiffConfig | None = None,
    *,
    sample: Sample | None = None,
    call: Mapping[str, Any] | None = None,
    max_loss_db: float = MAX_LOSS_DB,
    rounds: int = 5,
    calibration: CalibrationResult | str | Path | None = "auto",
    use_cache: bool = True,
    progress: bool = True,
    clock: Callable[[], float] | None = None,
) -> LayerPlan:
    """The fastest layer plan for `target` on this device whose pictures are nearly as good as low bits allow.

    target: a pipeline or UNet that is not accelerated; it is not changed. config: bits, scales and the rest; its
    schedule is not used, its max_state_bytes is respected. sample: takes a UNet, samples with it from the same noise at
    every call and returns the pictures, floats [N, H, W, C] in 0..1 in an array or on the CPU; batch and size must be
    those that the plan is for. Without it a pipeline is called with the arguments `call` and a generator of seed 0.
    max_loss_db: how far the mean PSNR may fall below that of the best single mode. rounds: how often the trajectory is
    timed. calibration: as for `accelerate`. use_cache: take the plan that was stored for this device,
    model, shape, configuration, versions and max_loss_db, if there is one, and store a new one; what is sampled and
    calibrated is not part of that. progress: show a bar. clock: gives seconds, in the place of the device's own.

    The plan is all float where nothing is faster than the best float form by 2 %. Errors: TypeError for a target
    without a UNet; ValueError for a UNet without a layer that can be replaced, a missing `sample`, one that gives other
    pictures every time, and impossible values; RuntimeError if the UNet is accelerated."""
    result = calibration if calibration in (None, "auto") else read_result(calibration)
    if config is None:
        config = result.config if isinstance(result, CalibrationResult) else ModiffConfig()
    unet, pipe = resolve(target)
    modes = low_bit_modes(config)
    if not max_loss_db > 0 or rounds < 1:
        raise ValueError(f"make_plan: max_loss_db={max_loss_db!r}, rounds={rounds!r} are not allowed; give more than 0")
    if sample is None:
        if pipe is None:
            raise ValueError("make_plan: a UNet alone cannot be sampled; give sample=, a function of a UNet")
        sample = _sampler_of(pipe, dict(call or {}))
    own = dataclasses.replace(config, schedule=None, plan=None, max_state_bytes=None, cuda_graphs=False)
    with tqdm(desc="plan", unit="run", disable=not progress, leave=False) as bar, torch.no_grad():
        calls, pictures = recorded(unet, sample)
        args, kwargs = calls[0]
        args = CallForm(unet).as_unet(args, kwargs)[0]
        key = plan_cache.key_of(unet, config, (args[0] if args else kwargs["sample"]).shape)
        known = plan_cache.stored(key) if use_cache else None
        if known is not None and known.source == "measured" and known.max_loss_db == max_loss_db:
            return known
        bench = Bench(unet, own, modes, result, sample, calls, pictures, clock, bar.update)
        bar.reset(2 + len(modes) + CHOICES + 2 * rounds)
        plan = _measured(bench, max_loss_db, config.max_state_bytes, rounds)
        plan = dataclasses.replace(plan, key=key, max_loss_db=max_loss_db)
    if use_cache:
        try:
            plan_cache.store(plan)
        except OSError as error:
            logger.warning("the plan could not be stored in %s (%s); set MODIFF_CACHE", plan_cache.folder(), error)
    return plan


def _measured(bench: Bench, max_loss_db: float, max_state_bytes: int | None, rounds: int) -> LayerPlan:
    bench.sample_with(bench.float)
    if bench.float.psnr_db < LEAST_REPEAT_DB:
        text = "let `sample` begin from the same noise at every call"
        raise ValueError(f"make_plan: two float samplings differ ({bench.float.psnr_db:.1f} dB); {text}")
    costs = bench.costs(rounds)
    for subject in bench.subjects.values():
        bench.sample_with(subject)
    least_db = max(subject.psnr_db for subject in bench.subjects.values()) - max_loss_db
    limit = math.inf if max_state_bytes is None else max_state_bytes
    plans = [each for each in bench.subjects.values() if each.psnr_db >= least_db and each.state_bytes <= limit]
    mixed = _verified(bench, costs, least_db, limit)
    if mixed is not None and all(mixed.modes != plan.modes for plan in plans):
        plans.append(mixed)
    floats = bench.float_subjects()
    bench.time([*floats, *plans], rounds)
    return _decided(bench, costs, floats, plans, limit < math.inf)


def _verified(bench: Bench, costs: Costs, least_db: float, limit: float) -> Subject | None:
    """The fastest plan by the estimate whose pictures are good enough; None if no estimate held. A plan whose pictures
    are worse than estimated makes the estimates worse by as much for the next one."""
    gains = choice.gains_of(costs, {mode: noise_of(subject.psnr_db) for mode, subject in bench.subjects.items()})
    for _ in range(CHOICES):
        chosen = choice.choose(costs, gains, noise_of(least_db), limit)
        if all(mode == FLOAT_MODE for mode in chosen.values()):
            return None
        subject = bench.planned(chosen)
        bench.sample_with(subject)
        if subject.psnr_db >= least_db:
            return subject
        worse = noise_of(subject.psnr_db) / choice.error_of(costs, chosen, gains)
        gains = {mode: gain * max(worse, LEAST_STEP) for mode, gain in gains.items()}
    return None


def _decided(
    bench: Bench, costs: Costs, floats: Sequence[Subject], plans: Sequence[Subject], limited: bool
) -> LayerPlan:
    """The fastest of `plans` if it gains over the best float form, else float. Of those that are as fast, up to what is
    noise, it is the one with the least state."""
    candidates = tuple(subject.candidate for subject in (*floats, *plans))
    best = min(floats, key=lambda subject: statistics.median(subject.steps))
    gains = [statistics.median(map(truediv, best.steps, plan.steps)) for plan in plans]
    most = max(gains, default=0.0)
    as_fast = [pair for pair in zip(gains, plans) if pair[0] >= max(most / LEAST_GAIN, min(most, LEAST_GAIN))]
    gain, chosen = min(as_fast, key=lambda pair: (pair[1].state_bytes, -pair[0]), default=(0.0, None))
    if chosen is None or gain < LEAST_GAIN:
        found = "no plan is within the limits"
        if chosen is not None:
            found = f"the fastest plan ({chosen.name}) is {gain:.3f}x as fast as {best.name}"
        summary = f"all float: {found}; {LEAST_GAIN}x is asked for"
        decided = dict.fromkeys(costs, (FLOAT_MODE, "nothing gains"))
    else:
        summary = f"{chosen.name}: {gain:.2f}x as fast as {best.name}, {chosen.psnr_db:.1f} dB to float"
        decided = {path: (mode, choice.reason_of(costs[path], mode, limited)) for path, mode in chosen.modes.items()}
        if len(set(chosen.modes.values())) == 1:
            whole = "one mode for all is the fastest as a whole"
            decided = {path: (mode, why if why == "fastest" else whole) for path, (mode, why) in decided.items()}
    left_out = [each for each in bench.subjects.values() if each not in plans]
    if left_out:
        listed = (f"{each.name} ({each.psnr_db:.1f} dB, state {each.state_bytes / 1e6:.1f} MB)" for each in left_out)
        summary += f"; not within the limits: {', '.join(listed)}"
    units = [UnitPlan(path, mode, bench.units[path], tuple(costs[path]), why) for path, (mode, why) in decided.items()]
    return LayerPlan(tuple(units), None, "measured", candidates, summary)


def _sampler_of(pipe: Any, options: dict[str, Any]) -> Sample:
    """Pictures of a pipeline with another UNet in it, always from the same noise."""

    def sample(unet: nn.Module) -> Any:
        [(name, own)] = denoisers_of(pipe).items()
        setattr(pipe, name, unet)
        try:
            generator = torch.Generator().manual_seed(0)
            return pipe(**{"generator": generator, "output_type": "np", **options}).images
        finally:
            setattr(pipe, name, own)

    return sample
