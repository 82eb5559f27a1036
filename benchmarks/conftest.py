import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("modiff benchmarks")
    group.addoption("--record", action="store_true", help="append the results to benchmarks/results")
    group.addoption("--network", default="cifar10_small16", help="network whose layers are timed (%(default)s)")
    group.addoption("--batch", type=int, default=8, help="images (%(default)s)")
    group.addoption("--threads", type=int, default=2, help="CPU threads (%(default)s)")


def pytest_generate_tests(metafunc):
    if "layer" in metafunc.fixturenames:
        from benchmarks.shapes import layer_table

        layers = list(layer_table(metafunc.config.getoption("--network")))
        metafunc.parametrize("layer", layers, ids=str)


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    with torch.inference_mode():
        yield
