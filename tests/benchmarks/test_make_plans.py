import numpy as np
import pytest
import torch

from benchmarks import configurations, make_plans, record
from modiff_kernels.config.plan import LayerPlan


@pytest.fixture
def asked(monkeypatch):
    """What make_plan is asked for; it answers without measuring."""
    found = []

    def make_plan(unet, config, **options):
        found.append((options["sample"](unet), config))
        if len(found) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LayerPlan.of({"mid_block": "float"})

    monkeypatch.setattr(make_plans.mk, "make_plan", make_plan)
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


def test_one_plan_for_each_batch_the_smallest_first(asked, tmp_path, capsys):
    options = ["--batch", "3", "1", "2", "--steps", "3", "--threads", "1", "--results", str(tmp_path), "--quiet"]
    assert make_plans.main(options) == 1, "one is out of memory"
    assert [pictures.shape for pictures, _ in asked] == [(1, 16, 16, 3), (2, 16, 16, 3), (3, 16, 16, 3)]
    for pictures, config in asked:
        assert pictures.dtype == np.float32
        assert 0 <= pictures.min() < pictures.max() <= 1
        assert config.act_bits == 8
    folder = tmp_path / "plans" / record.file_stem(record.device_name())
    assert sorted(path.name for path in folder.iterdir()) == ["cifar10_small16-b1.json", "cifar10_small16-b3.json"]
    out, err = capsys.readouterr()
    assert "cifar10_small16, batch 2: out of memory" in err
    assert str(folder / "cifar10_small16-b1.json") in out
    assert make_plans.main([*options, "--skip-existing"]) == 0
    assert len(asked) == 4, "that of batch 2 was missing"


def test_the_benchmarks_find_it(asked, tmp_path):
    make_plans.main(["--batch", "1", "--steps", "3", "--threads", "1", "--results", str(tmp_path), "--quiet"])
    device = torch.device("cpu")
    path = configurations.plan_file(device, "cifar10_small16", 1, tmp_path / "plans")
    row = next(r for r in configurations.step_rows(device, torch.float32, False, path) if r.key == "planned-w8")
    network = configurations.Networks(make_plans.build_unet("cifar10_small16")).make(row)
    modes = {
        layer.mode for layer in network.quantised.handle.rows() if layer.name.startswith("mid_block.resnets.0.conv")
    }
    assert modes == {"float"}
    assert "modulated" in {layer.mode for layer in network.quantised.handle.rows()}
    network.remove()


def test_nothing_begins_without_time(asked, tmp_path, capsys):
    options = ["--steps", "3", "--threads", "1", "--results", str(tmp_path), "--quiet", "--budget", "0"]
    assert make_plans.main(options) == 1
    assert "cifar10_small16, batch 8: the budget was used up" in capsys.readouterr().err
    assert not (tmp_path / "plans").exists()
