"""GroupNorm+SiLU, LayerNorm and GEGLU in front of the two quantisers of the backend cuda."""

import pytest

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
