import pytest
import torch

from benchmarks import bench_sampling, configurations, record
from benchmarks.budget import Budget
from benchmarks.pipelines import SAMPLERS, Workload
from benchmarks.shapes import build_unet
from modiff_kernels.evaluation.configurations import Row

SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
ADDED = {
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unet_of(network):
    """A small one of the same kind."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    more = ADDED if network == "sdxl" else {"cross_attention_dim": 32}
    return UNet2DConditionModel(**SMALL, **more).eval().requires_grad_(False)


class TestWorkload:
    @pytest.mark.parametrize(
        ("network", "kind"), [("sd15", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")]
    )
    def test_guided_pipelines(self, network, kind):
        unet = unet_of(network)
        workload = Workload(network, unet, SAMPLERS["ddim50"], images=2, steps=3)
        pipe = workload.pipe(unet)
        assert type(pipe).__name__ == kind
        assert not pipe.scheduler.config.clip_sample, "latents are not clipped"
        shapes, texts = [], []

        def look(module, args, kwargs):
            shapes.append(tuple(args[0].shape))
            texts.append(kwargs["encoder_hidden_states"])

        hook = unet.register_forward_pre_hook(look, with_kwargs=True)
        latents = workload.sample(pipe)
        hook.remove()
        assert shapes == [(4, 4, 8, 8)] * 3, "both passes of guidance in one batch"
        assert not torch.equal(texts[0][:2], texts[0][2:]), "guidance does something"
        assert latents.shape == (2, 4, 8, 8)
        assert torch.equal(latents, workload.sample(workload.pipe(unet))), "the same noise"
        assert not torch.equal(latents[0], latents[1])

    @pytest.mark.parametrize(("sampler", "calls"), [("ddim50", 50), ("dpm20", 20)])
    def test_unconditional(self, sampler, calls):
        unet = build_unet("cifar10_small16")
        workload = Workload("cifar10_small16", unet, SAMPLERS[sampler], images=1)
        pipe = workload.pipe(unet)
        seen = []
        hook = unet.register_forward_pre_hook(lambda *_: seen.append(1))
        pictures = workload.sample(pipe)
        hook.remove()
        assert len(seen) == calls == workload.steps
        assert pictures.shape == (1, 3, 16, 16)
        assert 0 <= pictures.min() < pictures.max() <= 1
        assert pipe.scheduler.config.get("clip_sample"), "as modiff compare has it for pixels"

    def test_the_same_pictures_as_modiff_sample(self):
        from modiff_kernels.evaluation import networks

        model = networks.load_model(None, None, torch.device("cpu"))
        expected = networks.sample_images(model, model.unet, "ddim", 5, [0, 1], channels_last=False)
        workload = Workload("cifar10_small16", model.unet, SAMPLERS["ddim50"], images=2, steps=5)
        pictures = workload.sample(workload.pipe(model.unet)).permute(0, 2, 3, 1).numpy()
        assert abs(pictures - expected).max() < 1e-5


class TestRows:
    def keys(self, device, **options):
        rows = configurations.run_rows(torch.device(device), torch.bfloat16, True, **options)
        return {row.key: row for row in rows}

    def test_every_rival_in_its_strongest_form_on_a_gpu(self):
        rows = self.keys("cuda", plan="plan.json")
        assert {"float-compile-graphs", "torchao-int8", "deepcache-3-compile", "deepcache-5-compile"} <= set(rows)
        assert {
            "modulated-w8a8-graphs",
            "scheduled-w8a8-compile-graphs",
            "planned-w8-graphs",
            "scheduled-float",
        } <= set(rows)
        for key in ("float-compile-graphs", "torchao-int8", "deepcache-3-compile", "deepcache-5-compile"):
            assert rows[key].compiled, key
            assert rows[key].cuda_graphs, key
        assert rows["deep-w8a8"].schedule == "deep-forecast every=3"
        assert rows["scheduled-w8a8-graphs"].schedule == "auto"
        assert rows["float-compile-graphs"].name == "bfloat16 torch.compile channels_last, CUDA graphs"
        assert len({row.name for row in rows.values()}) == len(rows)

    def test_no_graphs_on_the_cpu_and_no_plan_that_is_not_there(self):
        rows = self.keys("cpu")
        assert not any(row.cuda_graphs for row in rows.values())
        assert not any("planned" in key for key in rows)
        assert "torchao-int8" not in rows, "there it multiplies floats"

    def test_what_tells_most_comes_first(self):
        keys = [
            row.key for row in configurations.telling_first(list(self.keys("cuda").values()), configurations.RUN_ORDER)
        ]
        assert keys.index("scheduled-w8a8-graphs") < keys.index("float-compile-graphs") < keys.index("torchao-int8")
        assert set(configurations.RUN_ORDER) >= set(keys), "every row has its place"

    def test_rows_of_packages_that_are_missing(self, monkeypatch, capsys):
        monkeypatch.setattr(configurations, "has", lambda package: package == "torchao")
        rows = configurations.importable(list(self.keys("cuda").values()))
        assert "torchao-int8" in {row.key for row in rows}
        assert not any("deepcache" in row.key for row in rows)
        assert "DeepCache is not installed (pip install DeepCache): its rows are left out" in capsys.readouterr().err

    def test_options_of_the_compiler(self):
        options = configurations.compile_options(True, cuda_graphs=False)["options"]
        assert options["max_autotune"]
        assert not options["triton.cudagraphs"]
        assert configurations.compile_options(True, cuda_graphs=True, fuse_int_mm=True)["options"] == {
            **options,
            "triton.cudagraphs": True,
            **configurations.FUSE_INT_MM,
        }
        assert configurations.compile_options(False, cuda_graphs=False) == {}

    def test_what_is_compiled_gets_one_format(self, monkeypatch):
        """Timesteps of a pipeline on the CPU would keep torch from CUDA graphs, another format would compile anew."""
        seen = []
        monkeypatch.setattr(
            torch, "compile", lambda function, **options: lambda *a, **k: seen.append(a) or function(*a, **k)
        )
        unet = build_unet("cifar10_small16")
        configurations.compile_calls(unet, {})
        x = torch.zeros(1, 3, 16, 16)
        unet(x, 10)
        unet(x.contiguous(memory_format=torch.channels_last), torch.tensor(10))
        assert [(a[0].stride(), a[1].shape, a[1].dtype) for a in seen] == [
            ((768, 1, 48, 3), torch.Size([]), torch.int64)
        ] * 2

    def test_rivals_on_a_gpu_are_compiled_as_well_as_torch_can(self, monkeypatch):
        """Built as if the UNet was on a GPU; nothing is called."""
        asked = []
        monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
        monkeypatch.setattr(configurations, "quantise_with_torchao", lambda unet: asked.append("torchao"))
        monkeypatch.setattr(configurations, "CachedUNet", lambda *options: asked.append(options[1:]))
        networks = configurations.Networks(build_unet("cifar10_small16"))
        monkeypatch.setattr(type(networks.unet), "device", torch.device("cuda"))
        rows = self.keys("cuda")
        for key in ("float-compile", "float-compile-graphs", "torchao-int8", "deepcache-5-compile", "deepcache-5"):
            networks.make(rows[key])
        plain, graphs, torchao, fused, deepcache, as_it_is = asked
        assert plain["options"] | {"triton.cudagraphs": True} == graphs["options"]
        assert not plain["options"]["triton.cudagraphs"]
        assert (torchao, fused["options"]) == ("torchao", graphs["options"] | configurations.FUSE_INT_MM)
        interval, compiled, options, capture = deepcache
        assert (interval, compiled, options) == (5, True, {"options": plain["options"]})
        assert type(capture) is configurations.CudaCapture
        assert as_it_is == (5, False, None, None)

    def test_weights_are_shared_and_counted(self):
        networks = configurations.Networks(build_unet("cifar10_small16"))
        plain = networks.make(Row("float-channels_last", "float", "float"))
        weights = sum(p.nbytes for p in plain.unet.parameters())
        assert plain.shared_bytes == weights + sum(b.nbytes for b in plain.unet.buffers())
        low_bit = networks.make(Row("plain-w8a8", "plain", "quantized", 8, 8))
        assert low_bit.shared_bytes == plain.shared_bytes, "remove() puts the weights back, so they are kept"
        contiguous = networks.make(Row("float-contiguous", "float", "float", channels_last=False))
        assert contiguous.shared_bytes == plain.shared_bytes


OPTIONS = ["--images", "1", "--sampler", "dpm20", "--rounds", "1", "--threads", "1", "--no-compile", "--quiet"]


@pytest.fixture
def short(monkeypatch):
    """Few steps, though rows are recorded."""
    sampler = SAMPLERS["dpm20"]
    monkeypatch.setitem(SAMPLERS, "dpm20", type(sampler)(sampler.key, sampler.label, sampler.name, 12))


def recorded(folder):
    found = {}
    for row in record.read(record.results_file(folder)):
        found.setdefault(row["problem"].removeprefix("cifar10_small16-dpm20-n1-"), {})[row["metric"]] = row
    return found


def test_runs_are_verified_timed_and_recorded(short, tmp_path, capsys):
    rows = ["--rows", "float-channels_last,plain-w8a8,scheduled-w8a8,deep-w8a8"]
    assert bench_sampling.main([*OPTIONS, *rows, "--record", "--results", str(tmp_path)]) == 0
    found = recorded(tmp_path)
    assert list(found) == ["float-channels_last", "plain-w8a8", "scheduled-w8a8", "deep-w8a8"]
    value = {key: {metric: float(row["p50"]) for metric, row in metrics.items()} for key, metrics in found.items()}
    full_calls = {key: metrics["full_calls"] for key, metrics in value.items()}
    assert full_calls == {"float-channels_last": 12, "plain-w8a8": 12, "scheduled-w8a8": 8, "deep-w8a8": 6}
    for key, metrics in value.items():
        assert metrics["images_per_s"] == pytest.approx(1 / metrics["run_time"], rel=1e-4), key
        assert metrics["outside_unet"] > 0
        assert found[key]["run_time"]["verified"] == "True"
    assert value["float-channels_last"]["speedup_vs_float"] == 1
    assert float(found["float-channels_last"]["run_time"]["sqnr_db"]) == float("inf")
    assert 25 < value["scheduled-w8a8"]["psnr"] < value["plain-w8a8"]["psnr"] < 60
    assert value["scheduled-w8a8"]["state"] > 1e6
    assert "speedup_vs_deepcache3" not in value["plain-w8a8"]
    assert "scheduled-w8a8" in capsys.readouterr().out


def test_what_this_commit_has_is_not_measured_again(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", False))
    more = ["--no-in-turns", "--record", "--skip-recorded", "--results", str(tmp_path)]
    assert bench_sampling.main([*OPTIONS, *more, "--rows", "plain-w8a8"]) == 0
    first = recorded(tmp_path)["plain-w8a8"]["run_time"]
    assert bench_sampling.main([*OPTIONS, *more, "--rows", "plain-w8a8"]) == 0
    assert len([row for row in record.read(record.results_file(tmp_path)) if row["metric"] == "run_time"]) == 1
    capsys.readouterr()
    assert bench_sampling.main([*OPTIONS, *more, "--rows", "plain-w8a8,float-channels_last"]) == 0
    found = recorded(tmp_path)
    ratio = float(found["plain-w8a8"]["speedup_vs_float"]["p50"])
    assert ratio == pytest.approx(
        float(found["float-channels_last"]["run_time"]["p50"]) / float(first["p50"]), rel=1e-3
    )
    assert found["plain-w8a8"]["run_time"] == first
    monkeypatch.setattr(record, "commit", lambda: ("another", False))
    assert bench_sampling.main([*OPTIONS, *more, "--rows", "plain-w8a8"]) == 0
    assert recorded(tmp_path)["plain-w8a8"]["run_time"] != first, "of another commit"


def test_a_wrong_picture_is_not_timed(short, monkeypatch, capsys):
    monkeypatch.setattr(bench_sampling, "LEAST_SQNR_APPROXIMATE_DB", 300.0)
    assert bench_sampling.main([*OPTIONS, "--rows", "float-channels_last,plain-w8a8"]) == 1
    out, err = capsys.readouterr()
    assert "plain W8A8: " in err
    assert "at least 300 expected; not timed" in err
    assert "plain-w8a8" not in out


def test_a_budget_that_is_used_up(capsys):
    assert bench_sampling.main([*OPTIONS, "--budget", "0"]) == 1
    assert "the budget is used up; left out: cifar10_small16" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["sd15", "sdxl"])
def test_every_way_through_a_guided_pipeline(network, monkeypatch):
    """Runs are begun by the pipeline, schedules know its scheduler, and everything stays near full precision."""
    unet = unet_of(network)
    workload = Workload(network, unet, SAMPLERS["dpm20"], images=1, steps=12)
    kept = []
    bench = bench_sampling.Bench(workload, configurations.Networks(unet), [], kept.extend, Budget())
    rows = {row.key: row for row in configurations.run_rows(torch.device("cpu"), torch.float32, False)}
    full_calls = {}
    for key in ("float-contiguous", "modulated-w8a8", "scheduled-w8a8", "deep-w8a8", "scheduled-float"):
        entrant = bench_sampling.Entrant(rows[key], bench.make(rows[key]))
        assert not isinstance(bench.verify(entrant), str), key
        full_calls[key] = entrant.more["full_calls"]
        entrant.network.remove()
    assert full_calls == {
        "float-contiguous": 12,
        "modulated-w8a8": 12,
        "scheduled-w8a8": 8,
        "deep-w8a8": 6,
        "scheduled-float": 8,
    }


def test_bad_options_are_refused(capsys):
    for options, told in ((["--images", "0"], "at least 1"), (["--steps", "4", "--record"], "leave --record out")):
        with pytest.raises(SystemExit):
            bench_sampling.main(options)
        assert told in capsys.readouterr().err
