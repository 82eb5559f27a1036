"""The order in which a cold call is timed, with a stand-in for torch.cuda."""

import pytest
import torch

from benchmarks import gpu_timing
from benchmarks.gpu_timing import ColdTimer


@pytest.fixture
def device(monkeypatch):
    """What happens on the device, in order; an event is the number of things before it."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")
            self.at = len(happened)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    class Flush:
        def zero_(self):
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **_: Flush())
    return happened


def test_every_call_is_cold_and_the_host_is_ahead(device):
    times = ColdTimer(rounds=9, seconds=60)(lambda: device.append("call"))
    assert times == [2000.0] * 9, "a call and the end lie behind the beginning"
    warm_up, rest = device[: 4 + 2], device[6:]
    assert warm_up == ["call", "call", "synchronize", "call", "call", "synchronize"]
    assert rest == ["flush", "sleep", "event", "call", "event"] * 9 + ["synchronize"]


def test_long_calls_are_timed_less_often(device, monkeypatch):
    clock = iter(range(100))  # a second between any two looks
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: float(next(clock)))
    assert len(ColdTimer(rounds=50, seconds=30)(lambda: None)) == 12, "a call takes 2.5 of these seconds"
    assert len(ColdTimer(rounds=50, seconds=0.1)(lambda: None)) == gpu_timing.LEAST_ROUNDS
