"""Threads and instruction sets that the CPU kernels are tested with."""

import pytest
import torch

from tests.backends.cpu.cases import ISAS


@pytest.fixture(autouse=True)
def one_thread():
    """The default here: the cases with two threads ask for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    """Other cuts of the work: samples of 2^15 values and more are split into chunks of rows, products into rows and
    ranges of channels.
    """
    torch.set_num_threads(2)


@pytest.fixture(params=["one_thread", "two_threads"])
def threads(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=ISAS.values(), ids=ISAS.keys())
def isa(request):
    return request.param
