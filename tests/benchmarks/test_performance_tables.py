"""tools/performance_tables.py on rows that are made up."""

import pytest

from benchmarks import record
from modiff_kernels.config.plan import Candidate, LayerPlan, Mode, PlanKey, UnitPlan
from tools import performance_tables

GPU = "NVIDIA H200"


def add(folder, op, problem, metric, value, device=GPU, sqnr_db=40.0, repro="python a.py", **more):
    row = {"op": op, "problem": problem, "backend": "triton", "metric": metric, "unit": "", "verified": True}
    row |= {"sqnr_db": sqnr_db, "device": device, "git_commit": "c0ffee", "dirty": False, "torch": "2.11.0"}
    row |= {"utc": "2026-12-01T00:00:00Z", "repro": repro, **record.percentiles([value]), **more}
    record.append([row], record.results_file(folder, device))


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|") and "---" not in line]


def test_steps_of_every_device_and_batch(tmp_path):
    for device, ms in ((GPU, 2.0), ("AMD EPYC, 2 threads", 300.0)):
        for batch in (16, 2):
            for key, factor in (("modulated-w8a8", 1), ("float-channels_last", 2)):
                problem = f"net-b{batch}-{key}"
                add(tmp_path, "unet_step", problem, "update_time", 9e9, device)  # an older one
                add(tmp_path, "unet_step", problem, "update_time", ms * batch * factor, device)
    add(tmp_path, "unet_step", "net-b2-modulated-w8a8", "speedup_vs_compile", 1.5, repro="python b.py")
    add(tmp_path, "unet_step", "net-b2-modulated-w8a8", "peak_memory", 3.21e9)
    add(tmp_path, "unet_step", "net-b2-modulated-w8a8", "bound", 1.25)
    add(tmp_path, "unet_step", "net-b4-modulated-w8a8", "bound", 1.25)  # without a time it is not shown
    add(tmp_path, "unet_step", "network-b2-modulated-w8a8", "update_time", 1.0)
    text = performance_tables.whole_steps_table(tmp_path, "net")
    cpu, gpu = text.split(f"**{GPU}**")
    assert cpu.startswith("**AMD EPYC, 2 threads**\n")
    assert lines(cpu) == [
        "| configuration, batch | ms per call | 20-80 % | SQNR dB |",
        "| float32 eager channels_last, 2 | 1200.00 | 1200.00-1200.00 | 40.0 |",
        "| modulated W8A8, 2 | 600.00 | 600.00-600.00 | 40.0 |",
        "| float32 eager channels_last, 16 | 9600.00 | 9600.00-9600.00 | 40.0 |",
        "| modulated W8A8, 16 | 4800.00 | 4800.00-4800.00 | 40.0 |",
    ]
    assert lines(gpu)[:3] == [
        "| configuration, batch | ms per call | 20-80 % | bound ms | vs torch.compile | SQNR dB | peak MB |",
        "| bfloat16 eager channels_last, 2 | 8.00 | 8.00-8.00 | - | - | 40.0 | - |",
        "| modulated W8A8, 2 | 4.00 | 4.00-4.00 | 1.25 | 1.50x | 40.0 | 3210 |",
    ]
    assert "`python a.py`, `python b.py`: torch 2.11.0; commit c0ffee, 2026-12-01." in gpu


def test_runs_of_a_sampler(tmp_path):
    problem = "net-ddim50-n8-scheduled-w8a8-graphs"
    values = {"run_time": 0.5, "images_per_s": 16.0, "speedup_vs_float": 2.5, "speedup_vs_deepcache3": 1.25}
    values |= {"full_calls": 14, "state": 2e6, "host_time": 3.456, "device_idle": 12.3, "psnr": 41.87}
    for metric, value in values.items():
        add(tmp_path, "sampling", problem, metric, value)
    add(tmp_path, "sampling", "net-dpm20-n8-plain-w8a8", "run_time", 1.0)
    add(tmp_path, "sampling", "net-ddim50-n8-float-channels_last", "run_time", 1.25, sqnr_db=float("inf"))
    text = performance_tables.whole_runs_table(tmp_path, "net", "ddim50")
    assert "net, DDIM, 50 steps:" in text
    assert lines(text) == [
        "| configuration, images | images/s | s a run | vs full precision | vs DeepCache N=3 | PSNR dB | SQNR dB "
        "| full calls | state MB | host ms a step | device idle |",
        "| bfloat16 eager channels_last, 8 | - | 1.250 | - | - | - | reference | - | - | - | - |",
        "| modulated W8A8 scheduled, CUDA graphs, 8 | 16 | 0.500 | 2.50x | 1.25x | 41.9 | 40.0 "
        "| 14 | 2.0 | 3.46 | 12 % |",
    ]


def test_names_are_those_of_the_device():
    names = {
        device: performance_tables.names_of(performance_tables.run_rows, device) for device in (GPU, "EPYC, 2 threads")
    }
    assert names[GPU]["deepcache-3-compile"] == "DeepCache N=3, torch.compile, CUDA graphs"
    assert names["EPYC, 2 threads"]["deepcache-3-compile"] == "DeepCache N=3, torch.compile"
    assert names[GPU]["forecast5-w8a8"] == "modulated W8A8 forecast every 5, CUDA graphs"
    assert names["EPYC, 2 threads"]["forecast5-w8a8"] == "modulated W8A8 forecast every 5"


def test_what_is_not_ours_and_takes_two_percent(tmp_path):
    for key in ("modulated-w8a8-graphs", "float-compile"):
        for metric, ms in (("whole", 10.0), ("CatArrayBatchedCopy", 0.25), ("vectorized_elementwise_kernel<4>", 1.0)):
            add(tmp_path, "unet_step_others", f"net-b2-{key}", metric, ms)
    assert lines(performance_tables.step_others_table(tmp_path, "net"))[1:] == [
        "| `vectorized_elementwise_kernel<4>` | modulated W8A8, CUDA graphs, 2 | 1.000 | 10 % |",
        "| `CatArrayBatchedCopy` | modulated W8A8, CUDA graphs, 2 | 0.250 | 2 % |",
    ]


@pytest.mark.parametrize("all_float", [False, True])
def test_layer_plans(tmp_path, all_float):
    modes = ["float"] * 3 if all_float else ["modulated 8", "float", "modulated 8"]
    units = tuple(UnitPlan(f"u{i}", Mode.parse(mode)) for i, mode in enumerate(modes))
    name = "plan: 2 modulated 8, 1 float"
    candidates = (
        Candidate("float contiguous", 9000.0, None),
        Candidate("float channels_last", 6000.0, None),
        Candidate("all modulated 8", 5000.0, 41.0, 9_000_000),
        Candidate(name, 4000.0, 44.06, 3_000_000),
    )
    summary = (
        "all float: nothing gains" if all_float else f"{name}: 1.50x as fast as float channels_last, 44.1 dB to float"
    )
    key = PlanKey(GPU, "m", (16, 3, 8, 8), "c", "modiff_kernels 1, torch 2.11")
    plan = LayerPlan(units, key, "measured", candidates, summary, 0.5)
    folder = tmp_path / "plans" / "nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "net-b16.json").write_text(plan.to_json())
    text = performance_tables.layer_plans_table(tmp_path, "net")
    expected = "| 16 | 2 modulated 8, 1 float | 4.00 | 6.00 | 1.50x | 44.1 | 3.0 |"
    if all_float:
        expected = "| 16 | 3 float | 6.00 | 6.00 | 1.00x | equal | 0.0 |"
    assert lines(text)[1:] == [expected]
    assert text.startswith(f"**{GPU}**")
    assert performance_tables.layer_plans_table(tmp_path, "other") == performance_tables.NOTHING


def test_nothing_yet(tmp_path):
    assert performance_tables.whole_steps_table(tmp_path, "net") == "*No results recorded yet.*\n"
    assert performance_tables.whole_runs_table(tmp_path, "net", "ddim50") == "*No results recorded yet.*\n"
