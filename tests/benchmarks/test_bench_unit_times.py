import pytest

from benchmarks import bench_unit_times


def tiny_unet(network):
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def test_all_ways_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(bench_unit_times, "build_unet", tiny_unet)
    options = ["--batch", "1", "--rounds", "1", "--plans", "2", "--units", "1", "--cpu-time"]
    assert bench_unit_times.main(options) == 0
    whole, sums, gains = capsys.readouterr().out.strip().split("\n\n")
    ratios = [float(line.split()[-2]) for line in whole.splitlines()[2:]]
    assert len(ratios) == 2
    assert all(0.5 < ratio < 2 for ratio in ratios)  # that the parts are those of the whole; times of a busy machine
    assert (len(sums.splitlines()), len(gains.splitlines())) == (5, 3)


def test_cpu_time_needs_one_thread(capsys):
    with pytest.raises(SystemExit):
        bench_unit_times.main(["--cpu-time", "--threads", "2"])
    assert "--cpu-time needs --threads 1" in capsys.readouterr().err
