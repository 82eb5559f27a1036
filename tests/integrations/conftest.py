import pytest
import torch


@pytest.fixture(autouse=True)
def no_grad():
    """One thread: enough for tiny networks, and steady on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
