"""What the quantising passes share."""

import pytest
import torch

from modiff_kernels.quant.passes import all_finite, require_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_value_that_is_not_finite(value, dtype, place):
    x = torch.randn(1000).to(dtype)
    x[place] = value
    assert not all_finite(x)
    with pytest.raises(ValueError, match="op: x holds NaN or Inf"):
        require_finite("op", torch.ones(3), x)


def test_infinities_of_both_signs():
    assert not all_finite(torch.tensor([float("inf"), 1.0, -float("inf")]))


@pytest.mark.parametrize("x", [torch.full((9,), 3e38), torch.full((70000,), 65504.0).half(), torch.zeros(0)], ids=str)
def test_finite_values_whose_sum_is_not(x):
    assert all_finite(x)
