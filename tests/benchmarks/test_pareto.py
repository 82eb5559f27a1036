import torch
from diffusers import UNet2DModel

from benchmarks.pareto import NETWORKS, Sampler, Study, _multiplications
from modiff_kernels.cli.models import Model


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
    study = Study(tiny_model(), images=2)
    rows = list(study.rows(NETWORKS["W8A8"], Sampler("DDIM", "ddim", (10, 13), (13,), {"clip_sample": False})))
    assert [row["evaluations"] for row in rows if row["method"] == "every call"] == [10, 13]
    by_schedule = {row["schedule"]: row for row in rows if row["steps"] == 13}
    assert by_schedule["hold every=3"]["evaluations"] == 7  # the first three, every third of nine, the last
    assert 7 < by_schedule["deep-forecast every=3"]["evaluations"] < 13
    assert all(row["own_db"] is None for row in rows if row["method"] == "every call")
    assert by_schedule["hold every=2"]["own_db"] > by_schedule["hold every=5"]["own_db"] > 10
