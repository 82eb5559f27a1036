"""GroupNorm+SiLU, LayerNorm and GEGLU in front of the two quantisers of the backend triton."""

import pytest

from modiff_kernels.backends.triton import group_norm_silu_quantize_residual as group_norm
from tests.backends.quantizing_prologue_checks import (
    test_activation,
    test_dynamic_residual,
    test_group_norm_of_values_far_from_zero,
    test_group_norm_options,
    test_layer_norm_without_weights,
    test_residual_bits_and_clip_ratio,
    test_residual_dtypes,
    test_residual_with_given_scale,
)

__all__ = [
    "test_activation",
    "test_dynamic_residual",
    "test_group_norm_of_values_far_from_zero",
    "test_group_norm_options",
    "test_layer_norm_without_weights",
    "test_residual_bits_and_clip_ratio",
    "test_residual_dtypes",
    "test_residual_with_given_scale",
]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_merging_tile_is_bounded():
    for row_blocks in (1, 7, 64, 4096):
        for width in (1, 10, 40, 2560):
            block_p, block_g, num_warps = group_norm.merge_tile(row_blocks, width)
            assert block_g >= width
            assert block_p * block_g <= max(2048, block_g)
            assert num_warps >= 4
