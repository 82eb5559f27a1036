import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from modiff_kernels.cli import main


def build_tiny_unet(**changes):
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DModel(**{**options, **changes})


@pytest.fixture(scope="session")
def tiny_unet():
    """Builder of a tiny UNet2DModel with random weights; options change its configuration."""
    return build_tiny_unet


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory):
    """A diffusers folder of a tiny UNet with random weights, and a noise schedule that keeps contrast."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_unet().save_pretrained(folder)
    DDIMScheduler(beta_end=0.002).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def refused(capsys):
    """refused(command, option, ...): the single line on stderr of a command that is refused with code 2."""

    def run(*argv):
        try:
            code = main([str(item) for item in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.count("\n") == 1, err
        assert "error: " in err
        return err

    return run
