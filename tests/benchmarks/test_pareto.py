import json
import sys

import pytest
import torch
from diffusers import UNet2DModel

from benchmarks import pareto
from benchmarks.pareto import NETWORKS, Sampler, Study, _multiplications
from modiff_kernels.evaluation.networks import Model

# "auto" says so where it computes every call of the short runs here.
pytestmark = pytest.mark.filterwarnings("ignore:schedule='auto':UserWarning")


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny_model():
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
    config = {"num_train_timesteps": 40, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    return Model("tiny", unet.eval().requires_grad_(False), config)


def test_multiplications_of_layers():
    counted = _multiplications(tiny_model().unet)
    assert counted["conv_in"] == 8 * 8 * 3 * 8 * 3 * 3
    assert counted["time_embedding.linear_1"] == 8 * 32
    assert counted["down_blocks.1.attentions.0.to_q"] == 4 * 4 * 16 * 16


def test_rows_count_what_is_computed():
    study = Study(tiny_model(), images=2, searches=[])
    sampler = Sampler("DDIM", "ddim", (10, 13), (13,), options={"clip_sample": False})
    rows = list(study.rows(NETWORKS["W8A8"], sampler))
    assert [row["evaluations"] for row in rows if row["method"] == "every call"] == [10, 13]
    by_schedule = {row["schedule"]: row for row in rows if row["steps"] == 13}
    assert by_schedule["hold every=3"]["evaluations"] == 7  # the first three, every third of nine, the last
    assert 7 < by_schedule["deep-forecast every=3"]["evaluations"] < 13
    assert all(row["own_db"] is None for row in rows if row["method"] == "every call")
    assert by_schedule["hold every=2"]["own_db"] > by_schedule["hold every=5"]["own_db"] > 10


def run(monkeypatch, path, *arguments):
    """The report of the command, on the tiny model with one sampler."""
    sampler = Sampler("DDIM", "ddim", (4, 8), (8,), (8,), {"clip_sample": False})
    monkeypatch.setattr(pareto, "SAMPLERS", (sampler,))
    monkeypatch.setattr(pareto.models, "load_model", lambda *_: tiny_model())
    argv = ["--images", "2", "--threads", "1", "--networks", "float32", *arguments, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["pareto.py", *argv])
    assert pareto.main() == 0
    return json.loads(path.read_text())


def test_a_search_is_judged_on_other_noise_and_goes_on_where_it_stopped(monkeypatch, tmp_path):
    path = tmp_path / "pareto.json"
    report = run(monkeypatch, path)
    searched = {row["schedule"]: row for row in report["rows"] if row["method"] == "searched"}
    assert [search["computed"] for search in report["searches"]] == [6, 5, 4]  # of 8 calls, as the uniform rules
    for search in report["searches"]:
        row = searched[search["schedule"]]
        assert row["evaluations"] == search["computed"]
        assert row["macs"] == search["computed"] * report["macs_per_evaluation"]
        assert row["own_db"] != search["search_db"], "the seeds of the search are not those of the rows"

    kept = [row for row in report["rows"] if row["method"] not in ("searched", "hold")]
    path.write_text(json.dumps({**report, "rows": kept}))
    sampled = []
    sample = pareto.models.sample_images
    monkeypatch.setattr(pareto.models, "sample_images", lambda *a, **k: sampled.append(a[3]) or sample(*a, **k))
    resumed = run(monkeypatch, path, "--resume")
    assert sampled == [40] + [8] * 7, "the converged run, every call, three held and three searched ones"
    assert resumed["searches"] == report["searches"]
    assert resumed["command"] == report["command"]
    assert {pareto.key(row): row["converged_db"] for row in resumed["rows"]} == {
        pareto.key(row): row["converged_db"] for row in report["rows"]
    }


def test_a_report_of_something_else_is_not_added_to(monkeypatch, tmp_path):
    path = tmp_path / "pareto.json"
    old = {"model": "other", "images": 2, "threads": 1, "torch": torch.__version__, "command": "c", "rows": []}
    path.write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="has model 'other', this run 'tiny'"):
        run(monkeypatch, path, "--resume")
    assert json.loads(path.read_text()) == old
