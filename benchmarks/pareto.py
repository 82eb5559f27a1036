"""What step schedules cost and what they lose, against fewer steps, better samplers and DeepCache.

    python benchmarks/pareto.py --json benchmarks/results/pareto.json

Every row samples the same noise with the shipped model (or --model). Its cost is counted in evaluations of the network,
a part of one where only the shallow levels run, in multiply-accumulates of Conv2d and Linear for one picture (macs),
and in seconds. Its error is the mean PSNR in dB against the same network and sampler computed at every call (own_db)
and against the converged trajectory, DDIM with as many steps as the model was trained on, in float32 (converged_db).
Samplers do not clip, so that all of them follow the same trajectory.

Rows of the method "searched" take the schedules that `modiff_kernels.planning.search` finds, in float32 and from other
noise than that of the rows, for as many computed calls as the uniform rules have; the report lists the searches.
DeepCache rows need `pip install DeepCache`; without it they are left out, and the report says so.

The report is written after every row. `--resume` keeps the rows and searches that it has and measures only those
that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.configurations import has
from benchmarks.deepcache import CachedUNet
from modiff_kernels.config.schedule import UPDATE, StepSchedule
from modiff_kernels.evaluation import command_line, psnr, to_json
from modiff_kernels.evaluation import networks as models
from modiff_kernels.evaluation.configurations import Quantised, Row
from modiff_kernels.planning.search import search

NETWORKS = {
    "float32": Row("float32", "float32", "float"),
    "W8A8": Row("w8a8", "W8A8", "modulated", 8, 8),
    "W8A4": Row("w8a4", "W8A4", "modulated", 8, 4),
}
SCHEDULES = {
    "hold": [f"hold every={n}" for n in (2, 3, 5)],
    "forecast": [f"forecast every={n}{more}" for n in (2, 3) for more in ("", " axis=sigma")],
    "forecast deep": [f"deep-forecast every={n}" for n in (2, 3, 5)],
    "auto": ["auto"],
}
DEEPCACHE_INTERVALS = (2, 3, 5)
SEARCHED_EVERY = (2, 3, 5)  # schedules are searched for the number of calls that these uniform rules compute
SEARCH_SEED = 1000  # the rows are measured on seeds from 0 on, the search sees others


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name on the command line, the options of its scheduler, and the numbers of steps to try.

    scheduled: those of the steps that schedules are tried on; the others stand for taking fewer steps. searched: those
    of the scheduled ones that schedules are searched for.
    """

    label: str
    name: str
    steps: tuple[int, ...]
    scheduled: tuple[int, ...]
    searched: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


UNCLIPPED = {"clip_sample": False}
LINSPACE = {"timestep_spacing": "linspace"}
# Every number of steps that a schedule may cost, so that none is compared with a sampler that was given less.
FEW = (*range(7, 30), 34, 38, 50)
SAMPLERS = (
    Sampler("DDIM", "ddim", (*FEW, 100), (20, 50, 100), (20, 50), UNCLIPPED),
    Sampler("DPM-Solver++", "dpmsolver++", FEW, (20, 25, 50), (20, 25), LINSPACE),
    Sampler("DPM-Solver++ Karras", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "use_karras_sigmas": True}),
    Sampler("DPM-Solver++ Lu", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "use_lu_lambdas": True}),
    Sampler("DPM-Solver++(3)", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "solver_order": 3}),
    Sampler("UniPC", "unipc", FEW, (20, 25), (20, 25), LINSPACE),
    Sampler("DDPM (adds noise)", "ddpm", (50,), (50,)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a UNet folder (default: the shipped model)")
    parser.add_argument("--images", type=int, default=16, help="pictures, one batch (%(default)s)")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of %(default)s")
    parser.add_argument("--samplers", default="", help="parts of sampler names, separated by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what the report has and add what is missing")
    parser.add_argument("--json", type=Path, required=True, help="the report")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    model = models.load_model(args.model, None, torch.device("cpu"))
    report = _begun(args, model.name)
    study = Study(model, args.images, report["searches"])
    wanted = [part for part in args.samplers.split(",") if part]
    samplers = [s for s in SAMPLERS if not wanted or any(part in s.label for part in wanted)]
    for name in tqdm(args.networks.split(","), desc="networks"):
        for sampler in tqdm(samplers, desc=name, leave=False):
            known = {key(row) for row in report["rows"]}
            for row in study.rows(NETWORKS[name], sampler, known):
                report["rows"].append(row)
                _write(report, study, args.json)
    _write(report, study, args.json)
    return 0


def _begun(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The report to add to: a new one, or with --resume the one that was written. SystemExit if that is of others."""
    command = command_line([item for item in sys.argv[1:] if item != "--resume"])
    report = {
        "model": model,
        "images": args.images,
        "threads": args.threads,
        "torch": torch.__version__,
        "command": command.replace("modiff", "python benchmarks/pareto.py", 1),
        "searches": [],
        "rows": [],
    }
    if not args.resume or not args.json.exists():
        return report
    kept = json.loads(args.json.read_text())
    for name in ("model", "images", "threads", "torch"):
        if kept[name] != report[name]:
            raise SystemExit(
                f"--resume: {args.json} has {name} {kept[name]!r}, this run {report[name]!r}; repeat the command "
                f"that is in it ({kept['command']}), or leave --resume out to measure everything anew"
            )
    return {**report, "searches": kept.get("searches", []), "rows": kept["rows"]}


def _write(report: dict[str, Any], study: Study, path: Path) -> None:
    per_evaluation = sum(study.macs.values())
    rows = [{**row, "macs": round(row["evaluations"] * per_evaluation)} for row in report["rows"]]
    missing = not study.has_deepcache and all(row["method"] != "DeepCache" for row in rows)
    notes = ["DeepCache is not installed (pip install DeepCache): its rows are left out."] if missing else []
    new = path.with_suffix(".new")
    new.write_text(to_json({**report, "macs_per_evaluation": per_evaluation, "notes": notes, "rows": rows}))
    new.replace(path)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row of the report from all others."""
    return tuple(row[name] for name in ("network", "sampler", "steps", "method", "schedule"))


class Study:
    """Samples one batch of `images` pictures in every way. searches: those made before, new ones are appended."""

    def __init__(self, model: models.Model, images: int, searches: list[dict[str, Any]]) -> None:
        self.model = model
        self.seeds = range(images)
        self.searches = searches
        self.has_deepcache = has("DeepCache")
        self.macs = _multiplications(model.unet)
        longest = models.make_scheduler(model, "ddim").config.num_train_timesteps
        unet = models.share_copy(model.unet).to(memory_format=torch.channels_last)
        self.converged, _ = self._sample(unet, Sampler("", "ddim", (), (), (), UNCLIPPED), longest)

    def rows(self, network: Row, sampler: Sampler, known: Container[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
        """All rows of one network and sampler but those whose `key` is known."""
        for steps in sampler.steps:
            dense = None
            for method, text in self._trials(network, sampler, steps):
                if (network.name, sampler.label, steps, method, text) in known:
                    continue
                if dense is None:
                    dense, dense_row = self._scheduled(network, sampler, steps, None)
                if method == "every call":
                    pictures, row = dense, dense_row
                elif method == "DeepCache":
                    pictures, row = self._deepcache(sampler, steps, text)
                else:
                    pictures, row = self._scheduled(network, sampler, steps, text)
                yield self._row(network, sampler, steps, method, row, pictures, dense)

    def _trials(self, network: Row, sampler: Sampler, steps: int) -> Iterator[tuple[str, str | None]]:
        """Method and schedule of every row with so many steps."""
        yield "every call", None
        if steps not in sampler.scheduled:
            return
        for method, texts in SCHEDULES.items():
            yield from ((method, text) for text in texts)
        if network.mode == "float" and self.has_deepcache:
            yield from (("DeepCache", f"interval {interval}") for interval in DEEPCACHE_INTERVALS)
        if steps in sampler.searched:
            yield from (("searched", found["schedule"]) for found in self._searched(sampler, steps))

    def _searched(self, sampler: Sampler, steps: int) -> Iterator[dict[str, Any]]:
        """The searches for one sampler, most computed calls first; made where they were not yet."""
        made = {
            found["computed"]: found
            for found in self.searches
            if (found["sampler"], found["steps"]) == (sampler.label, steps)
        }
        calls = self._calls(sampler, steps)
        sizes = {StepSchedule.uniform(every).actions(calls).count(UPDATE) for every in SEARCHED_EVERY}
        fidelity: Callable[[StepSchedule], float] | None = None
        tried: dict[str, float] = {}
        for computed in sorted(sizes, reverse=True):
            if computed not in made:
                fidelity = fidelity or self._fidelity_of_search(sampler, steps)
                found = search(fidelity, calls, computed=computed, known=tried)
                made[computed] = {
                    "sampler": sampler.label,
                    "steps": steps,
                    "computed": computed,
                    "schedule": str(found.schedule),
                    "search_db": found.fidelity_db,
                    "tried": len(tried),
                }
                self.searches.append(made[computed])
            yield made[computed]

    def _fidelity_of_search(self, sampler: Sampler, steps: int) -> Callable[[StepSchedule], float]:
        """Mean PSNR of a schedule against every call, in float32 and on seeds that no row has."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + len(self.seeds))
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        quantised = Quantised(unet, Row("search", "search", "float", schedule="forecast"))

        def pictures(schedule: StepSchedule | None) -> np.ndarray:
            quantised.handle.set_schedule(schedule)
            return self._sample(unet, sampler, steps, quantised.sampling_run, seeds)[0]

        dense = pictures(None)
        return lambda schedule: float(psnr(pictures(schedule), dense).mean())

    def _row(self, network, sampler, steps, method, row, pictures, dense) -> dict[str, Any]:
        return {
            "network": network.name,
            "sampler": sampler.label,
            "steps": steps,
            "method": method,
            **row,
            "own_db": None if pictures is dense else float(psnr(pictures, dense).mean()),
            "converged_db": float(psnr(pictures, self.converged).mean()),
        }

    def _scheduled(self, network: Row, sampler: Sampler, steps: int, text: str | None):
        stochastic = " stochastic=True" if text not in (None, "auto") and sampler.name == "ddpm" else ""
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        row = Row(network.key, network.name, network.mode, network.weight_bits, network.act_bits)
        quantised = None
        run = None
        if text is not None or network.mode != "float":
            schedule = None if text is None else text + stochastic
            row = Row(network.key, network.name, network.mode, network.weight_bits, network.act_bits, schedule=schedule)
            quantised = Quantised(unet, row)
            run = quantised.sampling_run
        pictures, seconds = self._sample(unet, sampler, steps, run)
        calls = self._calls(sampler, steps)
        cost = float(calls)
        if quantised is not None:
            skipped = {path: quantised.handle.skipped_calls(path) for path in self.macs}
            cost -= sum(self.macs[path] * skipped[path] for path in self.macs) / sum(self.macs.values())
        return pictures, {"schedule": text, "evaluations": cost, "time_s": seconds}

    def _deepcache(self, sampler: Sampler, steps: int, text: str):
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        done = dict.fromkeys(self.macs, 0)
        for path in self.macs:
            unet.get_submodule(path).register_forward_hook(_Counter(done, path))
        pictures, seconds = self._sample(unet, sampler, steps, CachedUNet(unet, int(text.split()[1])).run)
        cost = sum(self.macs[path] * done[path] for path in self.macs) / sum(self.macs.values())
        return pictures, {"schedule": text, "evaluations": cost, "time_s": seconds}

    def _calls(self, sampler: Sampler, steps: int) -> int:
        scheduler = models.make_scheduler(self.model, sampler.name, **sampler.options)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)

    def _sample(
        self, unet: nn.Module, sampler: Sampler, steps: int, run=None, seeds: range | None = None
    ) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        options = {"run": run} if run is not None else {}
        pictures = models.sample_images(
            self.model, unet, sampler.name, steps, seeds or self.seeds, scheduler_options=sampler.options, **options
        )
        return pictures, time.perf_counter() - started


class _Counter:
    """A forward hook that counts the calls of the module at `path`."""

    def __init__(self, done: dict[str, int], path: str) -> None:
        self.done = done
        self.path = path

    def __call__(self, *_: Any) -> None:
        self.done[self.path] += 1


def _multiplications(unet: nn.Module) -> dict[str, int]:
    """Multiply-accumulates of each Conv2d and Linear in one call for one picture."""
    counted: dict[str, int] = {}
    hooks = []
    for path, module in unet.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue

        def count(module, args, output, path=path):
            rows = output.numel() // module.weight.shape[0]
            counted[path] = rows * module.weight.numel()

        hooks.append(module.register_forward_hook(count))
    size = unet.config.sample_size
    with torch.inference_mode():
        unet(torch.zeros(1, unet.config.in_channels, size, size), 0)
    for hook in hooks:
        hook.remove()
    return counted


if __name__ == "__main__":
    sys.exit(main())
