"""`fit_schedule`: fits a step schedule to a UNet and the way it is sampled."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modiff_kernels.calibration.data import Sampler, sampler_of
from modiff_kernels.integrations.handle import HANDLE
from modiff_kernels.integrations.hooks import wrap_forward
from modiff_kernels.integrations.scheduled import in_form, sample_of
from modiff_kernels.nn.call import CallForm, denoiser_of
from modiff_kernels.planning import clock, stored
from modiff_kernels.planning.fit import Answer, Fit, Target, fitted

TARGETS = ("own", "converged")
CONVERGED = 250  # calls, or ten for one of the run, or as many as the network was trained on
RUNS = 2  # of the sampler, for each call and squared evaluation: fits of small models took 1 to 3
NEIGHBOURS = 4  # calls of the converged run between which its states are interpolated


def fit_schedule(
    target: Any,
    evaluations: int | None = None,
    *,
    budget_db: float | None = None,
    steps: int = 50,
    towards: str = "own",
    images: int = 16,
    seed: int = 0,
    scheduler: Any = None,
    sample: Callable[[Sequence[int], int], Any] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    known: MutableMapping[str, Any] | None = None,
    on_progress: Callable[[], Any] = lambda: None,
    quiet: bool = False,
) -> stored.StoredSchedule:
    """Fit which calls of a run compute the network, and what every call returns (`planning.fit`); for
    `ModiffConfig(schedule=...)`, or to be stored beside the model (`stored.add`).

    target: a diffusers pipeline; or a UNet, then with `scheduler` (of diffusers) and sample(seeds, steps), which
    samples with the UNet from the noise of these seeds and returns pictures [N, ...]. It is not accelerated: a fit
    holds at any bits. Exactly one of evaluations (computed calls of a run) and budget_db (the fewest that have it).
    steps: of the sampler. towards: "own", the same sampler computed at every call, or "converged", the sampler with at
    least CONVERGED calls. images: fitted on, all at once; half as many stop the fit, and as many others judge it. seed:
    of the noise of the first. call_kwargs: more arguments of the pipeline's call, such as a prompt. known: what an
    interrupted fit has found, read and added to; on_progress: called when something was added.

    The same arguments give the same fit. ValueError for what is not allowed, and where no schedule is found."""
    if (evaluations is None) == (budget_db is None):
        raise ValueError("fit_schedule: give exactly one of evaluations and budget_db")
    if towards not in TARGETS:
        raise ValueError(f"fit_schedule: towards={towards!r} is not allowed; give one of {', '.join(TARGETS)}")

    def sampler(steps: int) -> Sampler:
        of_steps = sample and (lambda seeds: sample(seeds, steps))
        return sampler_of("fit_schedule", target, steps, scheduler, of_steps, call_kwargs or {})

    def sampled(seeds: Sequence[int], steps: int) -> Any:
        pictures = sampler(steps).run(seeds)
        return pictures if target is unet else pictures[0]

    unet = denoiser_of("fit_schedule", target)
    if hasattr(unet, HANDLE):
        raise ValueError("fit_schedule: the UNet is accelerated; call remove() on its handle before")
    if clock.is_stochastic(own := sampler(steps).scheduler):
        raise ValueError(f"fit_schedule: {type(own).__name__} adds noise at its steps; choose another sampler")
    started = time.perf_counter()
    run, log_snr = _described(sampler(steps))
    total = evaluations and RUNS * len(log_snr) * evaluations**2
    with tqdm(desc="fit", total=total, unit="run", disable=quiet, leave=False, mininterval=1) as bar, torch.no_grad():

        def fit_on(first: int, count: int, *more: Any) -> Fit:
            seeds = range(seed + first, seed + first + count)
            passes = _Passes(unet, functools.partial(sampled, seeds, steps), len(log_snr))
            wanted = Target(*passes.states(), log_snr)
            if towards == "converged":
                longest = getattr(own.config, "num_train_timesteps", 1000)
                fine = min(longest, max(CONVERGED, 10 * steps))
                fine_snr = _described(sampler(fine))[1]
                finer = _Passes(unet, functools.partial(sampled, seeds, fine), len(fine_snr))
                wanted = _between(finer, fine_snr, log_snr)
            return Fit(passes, wanted, bar.update, *more)

        fitting, validation = fit_on(0, images, known, on_progress), fit_on(images, max(1, images // 2))
        found = fitted(fitting, validation, evaluations, budget_db)
        held_out = fit_on(images + max(1, images // 2), images)
        held_out_db, polynomial_db = held_out.fidelity(found.computed, found.rows), held_out.fidelity(found.computed)
    values = {"fitting_db": found.fitting_db, "held_out_db": held_out_db, "polynomial_db": polynomial_db}
    notes = {"evaluations": len(found.computed), "towards": towards, "images": images, "seed": seed}
    notes |= {name: round(db, 2) for name, db in values.items()}
    notes["seconds"] = round(time.perf_counter() - started, 1)
    return stored.StoredSchedule(found.schedule, run, None, notes)


class _Passes:
    """Samples with the outputs of another in the place of the network's (`planning.fit.Fit`). sample: one run of the
    sampler, with `steps` timesteps; where it calls the UNet several times at each, these are passes of one call."""

    def __init__(self, unet: nn.Module, sample: Callable[[], Any], steps: int) -> None:
        self._unet, self._sample, self._steps = unet, sample, steps
        self._passes = 1
        self._forms: dict[bool, Any] = {}

    def states(self, wanted: Callable[[int], bool] = lambda call: True) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Sample and output of the first pass of every call that is wanted, with the network computed, and the
        picture. ValueError if the network is not called as often at every timestep."""
        states: list[Tensor] = []
        outputs: list[Tensor] = []
        count = 0

        def answer(number: int, part: int, sample: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            nonlocal count
            count, output = count + 1, compute()
            states.append(sample.clone())
            outputs.append(output.clone())
            return output

        picture = self(answer)
        if count == 0 or count % self._steps:
            text = f"the UNet was called {count} times in a run of {self._steps} timesteps"
            raise ValueError(f"fit_schedule: {text}; a fit needs as many calls at each of them")
        self._passes = count // self._steps
        kept = [call for call in range(self._steps) if wanted(call)]
        return [states[call * self._passes] for call in kept], [outputs[call * self._passes] for call in kept], picture

    def __call__(self, answer: Answer) -> Tensor:
        number, form = itertools.count(), CallForm(self._unet)

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call, part = divmod(next(number), self._passes)
            asked = kwargs.get("return_dict", True)

            def compute() -> Tensor:
                self._forms[asked] = original(*args, **kwargs)
                return sample_of(self._forms[asked])

            sample = next(iter(form.as_unet(args, kwargs)[0]), kwargs.get("sample"))
            output = answer(call, part, sample, compute)
            return in_form(self._forms[asked], output)

        with contextlib.ExitStack() as undo:
            wrap_forward(self._unet, forward, undo)
            picture = self._sample()
        return picture if isinstance(picture, Tensor) else torch.as_tensor(np.asarray(picture))


def _described(sampler: Sampler) -> tuple[dict[str, Any], list[float]]:
    """What a stored schedule says of its run, and the log-SNR of its calls."""
    own = sampler.new_scheduler()
    timesteps = clock.host_timesteps(own)
    if (log_snr := clock.log_snr(timesteps, own)) is None:
        raise ValueError(f"fit_schedule: {type(own).__name__} does not tell its noise levels; choose another sampler")
    return stored.run_of(own, timesteps), log_snr


def _between(finer: _Passes, fine_snr: Sequence[float], log_snr: Sequence[float]) -> Target:
    """The trajectory of a finer run where calls of these log-SNR are: cubic between its calls."""
    places = np.clip(np.searchsorted(fine_snr, log_snr) - NEIGHBOURS // 2, 0, len(fine_snr) - NEIGHBOURS)
    needed = sorted({int(first) + k for first in places for k in range(NEIGHBOURS)})
    states, outputs, picture = finer.states(set(needed).__contains__)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, place in zip(places, log_snr):
        near = range(first, first + NEIGHBOURS)
        weights = clock.polynomial([fine_snr[call] for call in near], place)
        for values, into in zip((states, outputs), found):
            into.append(clock.combine(weights, [values[needed.index(call)] for call in near]))
    return Target(*found, picture, log_snr)
