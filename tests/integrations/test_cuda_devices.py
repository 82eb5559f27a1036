"""Work on a GPU that is not the current one: captures and marks go where the tensors are. torch.cuda is faked."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from modiff_kernels.integrations.graphs import CudaCapture
from modiff_kernels.integrations.plans import timer_of

SECOND = torch.device("cuda:1")


@pytest.fixture
def log(monkeypatch):
    """What torch.cuda was asked for, in order."""
    asked = []

    def enter(name, *args, **kwargs):
        asked.append((name, *args, kwargs))
        return contextlib.nullcontext()

    event = SimpleNamespace(record=lambda stream: asked.append(("record", stream)))
    graph = SimpleNamespace(replay=lambda: asked.append(("replay",)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("synchronize", device)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    for name in ("graph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, functools.partial(enter, name))
    return asked


def test_captures_are_on_the_device_of_the_call(log):
    capture = CudaCapture()
    for device in (SECOND, torch.device("cuda:0"), SECOND):
        log.clear()
        replay, outputs = capture(lambda: log.append(("step",)) or 7, device)
        assert outputs == 7
        assert log[0] == ("device", device, {})
        assert [entry[0] for entry in log] == ["device", "stream", "graph", "step"]
        assert log[1][1] == f"current stream of {device}"  # which is that again after an error
        options = {"pool": "pool", "stream": f"stream of {device}", "capture_error_mode": "thread_local"}
        assert log[2][-1] == options
    replay()
    assert log[-1] == ("replay",)


def test_marks_are_in_the_stream_of_the_device(log):
    timer = timer_of(SECOND)
    timer.mark()
    timer.wait()
    assert log == [("record", "current stream of cuda:1"), ("synchronize", SECOND)]
