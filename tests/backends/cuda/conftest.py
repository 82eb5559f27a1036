"""The CUDA kernels emulated on the host under sanitizers, by themselves; see `emulators` in tests/conftest.py."""

import pytest


@pytest.fixture(scope="session")
def quantize_emulator(emulators):
    """`quantize`."""
    return emulators("quantize")


@pytest.fixture(scope="session")
def product_emulator(emulators):
    """The product of csrc/cuda/sm80."""
    return emulators("product")


@pytest.fixture(scope="session")
def hopper(emulators):
    """The product of csrc/cuda/sm90."""
    return emulators("hopper")
