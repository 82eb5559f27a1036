"""Method "accuquant" (AccuQuant, Lee et al., NeurIPS 2025): the error that several denoising steps add up to.

Both networks start a group of M calls from the same x_t of the float trajectory and run on their own outputs::

    L = mean (x'_{t-M} - x_{t-M})^2,    x'_{k+1} = step_k(x'_k, eps'(x'_k)),    g_k = dL/dx'_k

A step is computed again when its turn comes, so that the activations of one step are in memory whatever M is. What g is
at the steps before the end is the option `gradient`; the paper approximates it from the end, and the form is not
published:

    identity                  g_k = g_{k+1}
    scheduler-coefficients    g_k = (dstep_k/dx)^T g_{k+1}, the network's output held fixed
    exact                     also through the network: what back-propagation through all steps gives

The paper does not say what it learns, nor with which norm, M and numbers of iterations."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modiff_kernels.calibration import reconstruction
from modiff_kernels.calibration.data import CalibrationData, Sampler
from modiff_kernels.calibration.job import Job, Layers, choice, number
from modiff_kernels.calibration.reconstruction import FakeLayer, remember
from modiff_kernels.calibration.static import StaticOptions, learnt_layers, with_scales

GRADIENTS = ("identity", "scheduler-coefficients", "exact")
STATELESS = ("DDIMScheduler", "DDPMScheduler")  # a step of theirs is known by its time; others have set_begin_index


@dataclasses.dataclass(frozen=True)
class AccuQuantOptions(StaticOptions):
    """Options of "accuquant".

    group_steps: M, calls of a group. gradient: of GRADIENTS. group_iterations: steps of Adam on all codes, weight
    scales and biases, 0 for none; group_lr: its first rate, in code steps. act_iterations, act_lr: on the activation
    scales, of every group (see `reconstruction.learn`). table: always True."""

    table: bool = choice(True, (True,))
    group_steps: int = number(4)
    gradient: str = choice("identity", GRADIENTS)
    group_iterations: int = number(300, least=0)
    group_lr: float = number(0.003)
    act_iterations: int = number(10, least=0)
    act_lr: float = number(0.1)


class Groups(NamedTuple):
    """Starts of all groups on float trajectories.

    calls: of every group. data: their first calls. points: for every group int64 [samples], its points in the data.
    target: float [P, C, H, W], where the float network is after the group of each point."""

    calls: list[range]
    data: CalibrationData
    points: list[Tensor]
    target: Tensor


def accuquant(job: Job) -> Layers:
    scheduler, options = job.sampler.scheduler, job.options
    if not (hasattr(scheduler, "set_begin_index") or (name := type(scheduler).__name__) in STATELESS):
        raise ValueError(f"calibrate: accuquant starts in the middle of a run, which {name} cannot; use DDIMScheduler")
    job.sampler.check_input("accuquant")
    data = job.data()
    groups = collect_groups(job)
    layers = learnt_layers(job, data)
    if job.weights is None and options.group_iterations:
        rate = (options.group_iterations, options.group_lr)
        layers = _learn(job, "codes", groups, layers, reconstruction.WEIGHTS, None, *rate)
    return _group_scales(job, data, groups, layers) if job.needs_scales else layers


def scheduler_at(sampler: Sampler, call: int) -> Any:
    """A new scheduler whose next step is that of `call`; multistep solvers start there with first order."""
    scheduler = sampler.new_scheduler()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(call)
    return scheduler


def collect_groups(job: Job) -> Groups:
    """Groups of `group_steps` calls (the last may be shorter), started from the float trajectories of all samples."""
    total, size = len(job.sampler.timesteps()), job.options.group_steps
    calls = [range(first, min(first + size, total)) for first in range(0, total, size)]
    firsts = torch.tensor([group.start for group in calls])
    data = job.collected("groups", firsts.expand(job.samples, -1), "group starts")
    if len(data) != job.samples * len(calls):
        raise ValueError("calibrate: accuquant needs one row of the UNet's batch per image; sample without guidance")
    points = [torch.nonzero(data.call == first)[:, 0] for first in firsts.tolist()]

    def ends() -> dict[str, Tensor]:
        target = torch.empty_like(data.sample)
        for own, group in zip(job.bar(points, "group ends", unit="group"), calls):
            for part in own.split(job.batch):
                target[part] = Rollout(job.sampler, data, part, group).run()
        return {"target": target}

    return Groups(calls, data, points, job.once("targets", ends)["target"])


class Rollout:
    """The steps of one group, `calls`, from `points` of the data, each on the outcome of the one before. before(run):
    called ahead of every call of the network; run() is the call before it, for layers that need it."""

    def __init__(
        self, sampler: Sampler, data: CalibrationData, points: Tensor, calls: range, before: Callable = lambda run: None
    ) -> None:
        self.unet, self.sampler, self.calls, self.before = sampler.unet, sampler, calls, before
        (self.start, _), self.conditions = data.arguments(points)
        (self.previous, previous_timestep), _ = data.arguments(points, previous=True)
        self.timesteps = {call: data.timesteps[call].expand(len(points)) for call in calls}
        self.timesteps[calls.start - 1] = previous_timestep

    def run(self, form: str | None = None) -> Tensor:
        """The sample at the end. With a form of GRADIENTS `backward` goes through it, and computes every step again."""
        self.scheduler, previous = scheduler_at(self.sampler, self.calls.start), self.previous
        with torch.set_grad_enabled(form is not None):
            sample = self.start.detach().requires_grad_(form is not None)
            for call in self.calls:
                step = functools.partial(self._step, form, call, self.scheduler, previous)
                previous = sample.detach()
                sample = step(sample) if form is None else checkpoint(step, sample, use_reentrant=True)
        return sample

    def _step(self, form: str | None, call: int, scheduler: Any, previous: Tensor, sample: Tensor) -> Tensor:
        """What follows `sample`, by a copy of `scheduler`, which is left for the next step."""
        fixed = sample.detach()
        self.before(lambda: self.unet(previous, self.timesteps[call - 1], **self.conditions))
        seen, given = sample if form == "exact" else fixed, fixed if form == "identity" else sample
        output = self.unet(seen, self.timesteps[call], **self.conditions, return_dict=False)[0]
        noise = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # the same noise for both networks
            noise["generator"] = torch.Generator().manual_seed(call)
        self.scheduler = copy.deepcopy(scheduler)
        after = self.scheduler.step(output, scheduler.timesteps[call], given, **noise, return_dict=False)[0]
        return after + (sample - fixed) if form == "identity" else after


def _learn(
    job: Job, part: str, groups: Groups, layers: Layers, names: Sequence[str], group: int | None, *rate: Any
) -> Layers:
    """Learn `names` of all layers by the end of `group`, None: of one drawn in each iteration. rate: as `learn`."""
    generator = job.generator("group")

    def loss_of(drawn: Tensor, fakes: Mapping[str, FakeLayer]) -> Tensor:
        index = int(torch.randint(len(groups.calls), (1,), generator=generator)) if group is None else group
        points, before = groups.points[index][drawn], functools.partial(remember, fakes)
        rollout = Rollout(job.sampler, groups.data, points, groups.calls[index], before)
        return (rollout.run(job.options.gradient) - groups.target[points]).square().mean()

    settings = (job, part, layers, names, loss_of, groups.data, job.samples, *rate)
    return job.layers_once(part, functools.partial(reconstruction.learn, *settings))


def _group_scales(job: Job, data: CalibrationData, groups: Groups, layers: Layers) -> Layers:
    options, tabled = job.options, with_scales(job, data, layers)
    names = ("act_scale",) if job.config.mode == "modulated" else ("act_scale", "act_zero_point")
    found: dict[str, dict[str, list[Tensor]]] = {path: {name: [] for name in names} for path in layers}
    for index, calls in enumerate(job.bar(groups.calls, "group scales", unit="group")):
        middle = calls[len(calls) // 2]
        own = {
            path: dataclasses.replace(layer, **{name: getattr(layer, name)[middle, None] for name in names})
            for path, layer in tabled.items()
        }
        if options.act_iterations:
            rate = (options.act_iterations, options.act_lr)
            own = _learn(job, f"scales-{index}", groups, own, ("act_scale",), index, *rate)
        for path, entries in found.items():
            for name, values in entries.items():
                values += [getattr(own[path], name)] * len(calls)
    return {
        path: dataclasses.replace(layer, **{name: torch.cat(values) for name, values in found[path].items()})
        for path, layer in layers.items()
    }
