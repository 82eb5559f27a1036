import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from benchmarks import feature_network, quality
from benchmarks.agreement import Agreement, Replay
from modiff_kernels import ops
from modiff_kernels.evaluation import frechet_distance, psnr
from modiff_kernels.evaluation.cifar10 import load_cifar10
from tests.cifar10_files import write_packed

IMAGES = 6
STEPS = 12  # the fewest that schedule="auto" leaves calls out of


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Few steps; and what the command sets for the process is put back."""
    samplers = {"DDIM-50": ("ddim", STEPS), "DPM-Solver++-20": ("dpmsolver++", STEPS)}
    monkeypatch.setattr(quality, "SAMPLERS", samplers)
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """--model, --data and --features of 8x8 images."""
    root = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(root / "tiny")
    DDIMScheduler(beta_end=0.002).save_pretrained(root / "tiny" / "scheduler")
    (root / "data").mkdir()
    write_packed(root / "data", {"cifar10_train_0": 9, "cifar10_test": 16})
    options = ["--size", "8", "--epochs", "1", "--batch-size", "9", "--width", "2", "--device", "cpu", "--quiet"]
    assert feature_network.main(["--data", str(root / "data"), "--out", str(root / "features"), *options]) == 0
    return root


@pytest.fixture
def command(folders, tmp_path):
    """Runs the study with more options and gives its exit code and report."""

    def run(*more):
        options = {"model": folders / "tiny", "data": folders / "data", "features": folders / "features"}
        options |= {"json": tmp_path / "q.json", "keep": tmp_path / "kept", "device": "cpu", "threads": 1}
        options |= {"images": IMAGES, "batch": 4, "samples": 2, "codes": "minmax"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        code = quality.main([*words, "--quiet", *more])
        return code, json.loads((tmp_path / "q.json").read_text())

    return run


def rows_of(report):
    return {(row["sampler"], row["bits"], row["way"], row["scheduled"]): row for row in report["rows"]}


def test_rows_and_what_they_say(command, folders, tmp_path):
    options = ("--bits", "W4A4", "--samplers", "DDIM-50", "--reference-images", "2", "--times")
    code, report = command(*options)
    rows = rows_of(report)
    assert (code, report["failures"]) == (0, {})
    assert set(rows) == set(map(astuple, quality.all_specs(["DDIM-50"], ["W4A4"], "float32")))
    assert len(rows) == 6

    modulated, plain = (rows["DDIM-50", "W4A4", way, False] for way in ("modulated", "plain"))
    assert modulated["psnr_db"] > plain["psnr_db"]
    assert modulated["frechet_full"] < plain["frechet_full"]
    assert modulated["state_bytes"] == 4 * modulated["state_bytes_per_image"] > 0 == plain["state_bytes"]
    assert modulated["batches_timed"] == 1
    assert modulated["images_per_s"] > 0
    scheduled = rows["DDIM-50", "W4A4", "modulated", True]
    assert scheduled["calls"] == STEPS > scheduled["calls_computed"]
    assert "forecast" in scheduled["schedule"]

    full = np.load(next((tmp_path / "kept").glob("float-DDIM-50-*.npy")))
    assert full.shape == (IMAGES, 8, 8, 3)
    features = feature_network.Features(8, folders / "features")
    train, test = (
        features(load_cifar10(folders / "data", split, 8)[0].permute(0, 2, 3, 1).float().div(255).numpy())
        for split in ("train", "test")
    )
    assert rows["DDIM-50", "", "float", False]["frechet_test"] == pytest.approx(
        frechet_distance(features(full), test), rel=1e-6
    )
    assert report["yardsticks"]["train_to_test"] == pytest.approx(frechet_distance(train[:IMAGES], test), rel=1e-6)
    assert report["yardsticks"]["test_to_test"] == pytest.approx(frechet_distance(test[:6], test[6:12]), rel=1e-6)

    for row in report["rows"]:
        if row["way"] not in ("plain", "modulated"):
            assert "reference" not in row
            continue
        reference = row["reference"]
        assert reference["images"] == 2
        assert reference["exact_differing"] == 0
        assert 0 < reference["exact_codes"] < reference["codes"]
        assert reference["differing"] < 1e-2 * reference["codes"]
        assert reference["sqnr_db"] is None or reference["sqnr_db"] > 100
        assert abs(reference["psnr_db"] - reference["reference_psnr_db"]) < 3


def test_rows_that_tell_most_come_first():
    specs = quality.all_specs(["DDIM-50", "DDIM-100"], list(quality.BITS), "float16")
    first = [spec.name for spec in specs[:7]]
    assert first[0] == "float"
    assert first[1:] == [f"{way} {bits}" for bits in ("W8A8", "W8A4", "W4A4") for way in ("modulated", "plain")]
    assert {spec.sampler for spec in specs[:7]} == {"DDIM-50"}
    assert len(set(specs)) == len(specs) == 2 * (1 + 2 * 2 * 5 + 2 + 1)
    floats = {spec.sampler: index for index, spec in enumerate(specs) if spec.way == "float"}
    assert all(floats[spec.sampler] <= index for index, spec in enumerate(specs))
    assert specs[7].name == "16-bit"


def test_resume_keeps_rows_images_and_codes(command, monkeypatch):
    options = ("--bits", "W4A8", "--samplers", "DDIM-50", "--reference-images", "0")
    code, report = command(*options)
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setattr(quality.mk, "calibrate", lambda *args, **more: 1 / 0)
        patch.setattr(quality.Study, "_images", lambda *args: 1 / 0)
        code, again = command(*options, "--resume")
    assert (code, again["rows"]) == (0, report["rows"])
    assert len(again["environments"]) == 2
    with monkeypatch.context() as patch:  # a row that is missing is measured with the codes and images that were kept
        patch.setattr(quality.mk, "calibrate", lambda *args, **more: 1 / 0)
        code, more = command("--bits", "W4A4", *options[2:], "--resume")
    assert (code, more["failures"]) == (0, {})
    assert len(more["rows"]) == len(report["rows"]) + 4
    assert all("--resume" not in text and "DATA" in text for text in more["commands"])
    assert report["codes"] == "minmax, DDIM-50, 2 trajectories"
    with pytest.raises(SystemExit, match=r"--resume: .* has images 6, this run 5"):
        command(*options, "--resume", "--images", "5")


def test_codes_of_an_earlier_calibration(command, folders, tmp_path, monkeypatch):
    options = ("--bits", "W4A8", "--samplers", "DDIM-50", "--reference-images", "0")
    _, report = command(*options)
    codes = next((tmp_path / "kept").glob("codes-minmax-w4-*"))
    monkeypatch.setattr(quality.mk, "calibrate", lambda *args, **more: 1 / 0)
    code, again = command(*options, "--codes", str(codes))
    assert (code, again["failures"]) == (0, {})
    assert again["codes"] == f"minmax, DDIMScheduler with {STEPS} steps, 2 trajectories"
    assert "--codes CODES" in again["commands"][0]
    for before, after in zip(report["rows"], again["rows"], strict=True):
        assert before.get("psnr_db") == after.get("psnr_db")


def test_rows_that_fail_are_named_and_leave_the_others(command, capsys):
    code, report = command("--bits", "W8A8", "--samplers", "DDIM-50", "--backend", "triton", "--reference-images", "0")
    assert code == 1
    assert [row["way"] for row in report["rows"]] == ["float", "weights"]  # no low-bit kernel runs in these
    assert "BackendUnavailable" in report["failures"]["DDIM-50 plain W8A8"]
    assert "DDIM-50 plain W8A8" in capsys.readouterr().err


def test_the_budget_ends_the_study(command, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(quality.time, "monotonic", lambda: next(now))
    options = ("--bits", "W8A8", "--samplers", "DDIM-50", "--reference-images", "0")
    code, report = command(*options, "--budget", "9")
    assert code == quality.UNFINISHED
    assert 0 < len(report["rows"]) < 6
    assert report["failures"] == {}
    code, report = command(*options, "--resume")
    assert len(report["rows"]) == 6


def test_float16_networks_are_judged_against_float32(command):
    code, report = command("--bits", "W8A8", "--samplers", "DDIM-50", "--dtype", "float16", "--reference-images", "0")
    rows = rows_of(report)
    assert (code, report["failures"]) == (0, {})
    assert 40 < rows["DDIM-50", "", "16-bit", False]["psnr_db"] < 100
    assert rows["DDIM-50", "W8A8", "modulated", False]["psnr_db"] > 30


def test_what_fails_with_graphs_goes_on_without(command, monkeypatch, capsys):
    made = []

    def config_of_row(row, backend):
        made.append(row.cuda_graphs)
        if row.cuda_graphs:
            raise RuntimeError("no capture here")
        return real(row, backend)

    real = quality.config_of_row
    monkeypatch.setattr(quality, "config_of_row", config_of_row)
    code, report = command("--bits", "W8A8", "--samplers", "DDIM-50", "--cuda-graphs", "--reference-images", "0")
    assert (code, report["failures"]) == (0, {})
    assert made == [True] + [False] * 5
    assert rows_of(report)["DDIM-50", "W8A8", "modulated", False]["cuda_graphs"] is False
    assert "modulated W8A8: going on without CUDA graphs: no capture here" in capsys.readouterr().err


def test_every_sampler_has_its_own_reference(command, tmp_path):
    _, report = command("--bits", "W8A8", "--reference-images", "0", "--samplers", "DDIM-50,DPM-Solver++-20")
    images = [np.load(path) for path in (tmp_path / "kept").glob("float-*.npy")]
    assert len(images) == 2
    between = psnr(*images).mean()
    for sampler in quality.SAMPLERS:
        assert rows_of(report)[sampler, "W8A8", "modulated", False]["psnr_db"] > between + 3


@pytest.mark.parametrize(("option", "value"), [("--bits", "W2A2"), ("--samplers", "DDIM-7"), ("--images", "0")])
def test_bad_options(command, capsys, option, value):
    with pytest.raises(SystemExit):
        command(option, value)
    assert f"{option} {value}" in capsys.readouterr().err


class TestReplay:
    def call(self, monkeypatch, spoil=None):
        """One quantiser and one product on the fastest backend here; `spoil` changes what the product returns."""
        x, x_hat, y_hat = torch.randn(4, 32), torch.zeros(4, 32), torch.zeros(4, 16)
        weight_q = torch.randint(-7, 8, (16, 32), dtype=torch.int8)
        layout = ops.preferred_layout("accumulate_linear", "cpu", n=16, k=32, weight_bits=4)
        weight = ops.prepare_weight(ops.pack_weight(weight_q, 4), 4, 16, 32, layout_to=layout)
        if spoil is not None:
            real = ops.accumulate_linear
            monkeypatch.setattr(ops, "accumulate_linear", lambda **given: spoil(real(**given)))
        with Replay() as replay:
            codes, scale, _ = ops.quantize_residual(x, x_hat, None, 4, "per_sample")
            torch.ops.modiff.accumulate_linear(
                codes, scale, weight, torch.ones(16), y_hat, None, 4, -1, layout, torch.float32
            )
        return replay.agreement

    def test_equal_ops(self, monkeypatch):
        found = self.call(monkeypatch)
        assert (found.ops, found.codes, found.exact_codes, found.differing) == (2, 4 * 32, 4 * 32, 0)
        assert found.sqnr_db > 120

    def test_a_wrong_product_is_seen(self, monkeypatch):
        found = self.call(monkeypatch, spoil=lambda out: out * 1.01)
        assert found.worst_op == "accumulate_linear"
        assert found.sqnr_db == pytest.approx(40.1, abs=0.2)

    def test_codes_and_state(self):
        found = Agreement()
        codes, x_hat = torch.tensor([[1, 2, 3]], dtype=torch.int8), torch.tensor([[1.0, 2.0, 3.0]])
        found.add("layer_norm_quantize_residual", [codes, x_hat], [codes.clone(), x_hat.clone()])
        other = torch.tensor([[1, 3, 3]], dtype=torch.int8)
        found.add("layer_norm_quantize_residual", [codes, x_hat], [other, x_hat + torch.tensor([0, 9.0, 0])])
        assert (found.codes, found.differing, found.exact_codes, found.sqnr_db) == (6, 1, 0, float("inf"))
        found.add("layer_norm_quantize_residual", [codes, x_hat], [codes, x_hat * 1.1])
        assert found.sqnr_db == pytest.approx(20.8, abs=0.1)
        found.add("quantize_residual", [other, x_hat * torch.nan], [codes, x_hat])
        found.add("quantize_residual", [codes, x_hat * 1.1], [codes, x_hat])  # better than NaN
        assert (found.exact_codes, found.exact_differing, found.to_dict()["sqnr_db"]) == (6, 1, -300.0)
