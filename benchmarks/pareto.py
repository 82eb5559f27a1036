"""What step schedules cost and what they lose, against fewer steps, better samplers and DeepCache.

    python benchmarks/pareto.py --json benchmarks/results/pareto.json

Every row samples the same noise with the shipped model (or --model). Its cost is counted in evaluations of the network,
a part of one where only the shallow levels run (by multiplications of Conv2d and Linear), and in seconds. Its error is
the mean PSNR in dB against the same network and sampler computed at every call (own_db) and against the converged
trajectory, DDIM with as many steps as the model was trained on, in float32 (converged_db). Samplers do not clip, so
that all of them follow the same trajectory. DeepCache rows need
`pip install DeepCache`; without it they are left out, and the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modiff_kernels.cli import models
from modiff_kernels.cli.arguments import command_line
from modiff_kernels.cli.quantised import Quantised
from modiff_kernels.cli.rows import Row
from modiff_kernels.evaluation import psnr, to_json

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
    "adaptive": [f"forecast every=4 tolerance={tolerance}" for tolerance in (0.01, 0.03)],
}
DEEPCACHE_INTERVALS = (2, 3, 5)


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name on the command line, the options of its scheduler, and the numbers of steps to try.

    scheduled: those of the steps that schedules are tried on; the others stand for taking fewer steps.
    """

    label: str
    name: str
    steps: tuple[int, ...]
    scheduled: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


UNCLIPPED = {"clip_sample": False}
LINSPACE = {"timestep_spacing": "linspace"}
# Every number of steps that a schedule may cost, so that none is compared with a sampler that was given less.
FEW = (*range(7, 30), 34, 38, 50)
SAMPLERS = (
    Sampler("DDIM", "ddim", (*FEW, 100), (20, 50, 100), UNCLIPPED),
    Sampler("DPM-Solver++", "dpmsolver++", FEW, (20, 25, 50), LINSPACE),
    Sampler("DPM-Solver++ Karras", "dpmsolver++", FEW, (20, 25), {**LINSPACE, "use_karras_sigmas": True}),
    Sampler("DPM-Solver++ Lu", "dpmsolver++", FEW, (20, 25), {**LINSPACE, "use_lu_lambdas": True}),
    Sampler("DPM-Solver++(3)", "dpmsolver++", FEW, (20, 25), {**LINSPACE, "solver_order": 3}),
    Sampler("UniPC", "unipc", FEW, (20, 25), LINSPACE),
    Sampler("DDPM (adds noise)", "ddpm", (50,), (50,)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a UNet folder (default: the shipped model)")
    parser.add_argument("--images", type=int, default=16, help="pictures, one batch (%(default)s)")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of %(default)s")
    parser.add_argument("--samplers", default="", help="parts of sampler names, separated by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    model = models.load_model(args.model, None, torch.device("cpu"))
    study = Study(model, args.images)
    wanted = [part for part in args.samplers.split(",") if part]
    samplers = [s for s in SAMPLERS if not wanted or any(part in s.label for part in wanted)]
    rows = []
    for name in tqdm(args.networks.split(","), desc="networks"):
        for sampler in samplers:
            rows += study.rows(NETWORKS[name], sampler)
    notes = (
        [] if study.has_deepcache else ["DeepCache is not installed (pip install DeepCache): its rows are left out."]
    )
    command = command_line(sys.argv[1:]).replace("modiff", "python benchmarks/pareto.py", 1)
    report = {"model": model.name, "images": args.images, "threads": args.threads, "rows": rows, "notes": notes}
    args.json.write_text(to_json({**report, "torch": torch.__version__, "command": command}))
    return 0


class Study:
    """Samples one batch of `images` pictures in every way."""

    def __init__(self, model: models.Model, images: int) -> None:
        self.model = model
        self.seeds = range(images)
        self.has_deepcache = importlib.util.find_spec("DeepCache") is not None
        self.macs = _multiplications(model.unet)
        longest = models.make_scheduler(model, "ddim").config.num_train_timesteps
        unet = models.share_copy(model.unet).to(memory_format=torch.channels_last)
        self.converged, _ = self._sample(unet, Sampler("", "ddim", (), (), UNCLIPPED), longest)

    def rows(self, network: Row, sampler: Sampler) -> Iterator[dict[str, Any]]:
        """All rows of one network and sampler, those that compute every call first."""
        for steps in sampler.steps:
            dense, row = self._scheduled(network, sampler, steps, None)
            yield self._row(network, sampler, steps, "every call", row, dense, dense)
            if steps not in sampler.scheduled:
                continue
            for method, texts in SCHEDULES.items():
                for text in texts:
                    pictures, row = self._scheduled(network, sampler, steps, text)
                    yield self._row(network, sampler, steps, method, row, pictures, dense)
            if network.mode == "float" and self.has_deepcache:
                for interval in DEEPCACHE_INTERVALS:
                    pictures, row = self._deepcache(sampler, steps, interval)
                    yield self._row(network, sampler, steps, "DeepCache", row, pictures, dense)

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

    def _deepcache(self, sampler: Sampler, steps: int, interval: int):
        from DeepCache import DeepCacheSDHelper

        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        done = dict.fromkeys(self.macs, 0)
        for path in self.macs:
            unet.get_submodule(path).register_forward_hook(_Counter(done, path))
        pipe = types.SimpleNamespace(unet=unet, scheduler=None)
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)

        def run(scheduler):
            pipe.scheduler = scheduler
            helper.enable()
            return torch.inference_mode()

        pictures, seconds = self._sample(unet, sampler, steps, run)
        cost = sum(self.macs[path] * done[path] for path in self.macs) / sum(self.macs.values())
        return pictures, {"schedule": f"interval {interval}", "evaluations": cost, "time_s": seconds}

    def _calls(self, sampler: Sampler, steps: int) -> int:
        scheduler = models.make_scheduler(self.model, sampler.name, **sampler.options)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)

    def _sample(self, unet: nn.Module, sampler: Sampler, steps: int, run=None) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        options = {"run": run} if run is not None else {}
        pictures = models.sample_images(
            self.model, unet, sampler.name, steps, self.seeds, scheduler_options=sampler.options, **options
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
    """Multiplications of each Conv2d and Linear in one call for one picture."""
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
