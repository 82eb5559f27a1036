"""quantize_residual and quantize_activation of the backend cuda."""

import pytest

from tests.backends.quantizing_checks import TestActivation, TestResidual

__all__ = ["TestActivation", "TestResidual"]

pytestmark = pytest.mark.usefixtures("poisoned_empty")
