import contextlib
import signal
import time

import pytest
import torch

from benchmarks.budget import Budget, OutOfTime, attempt


def test_without_a_limit_nothing_is_over():
    budget = Budget()
    assert not budget.is_over
    with budget.limit():
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_step_that_does_not_end_is_given_up(capsys):
    before = signal.getsignal(signal.SIGALRM)

    def compile_for_ever():
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue  # a compiler that goes on after errors does not keep it up

    assert attempt("model, compiled", compile_for_ever, Budget(0.2)) is None
    assert "model, compiled: the budget was used up before it was done; left out" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_lost_alarm_comes_again(monkeypatch):
    monkeypatch.setattr("benchmarks.budget.REPEAT_S", 0.1)

    def lose_the_first():
        with contextlib.suppress(OutOfTime):  # as in a destructor, where Python reports it and goes on
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(OutOfTime), Budget(0.1).limit():
        lose_the_first()


def test_torch_compile_is_given_up(capsys):
    """The compiler lets the exception through, and what is compiled afterwards works."""

    ended = []

    def backend(graph, inputs):
        time.sleep(60)
        ended.append(True)
        return graph.forward

    def doubled(x):
        return torch.compile(lambda x: x * 2, backend="eager")(x)

    doubled(torch.ones(2))  # imports the compiler, which is no part of this
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    assert attempt("compile", lambda: compiled(torch.ones(2)), Budget(1.0)) is None
    assert not ended
    assert "used up" in capsys.readouterr().err
    assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "a: out of memory (CUDA out of memory. Tried); left",
        ),
        (RuntimeError("no kernel\nmore"), "a: failed: no kernel; left out"),
        (ValueError(), "a: failed: ValueError; left out"),
    ],
)
def test_errors_are_told_and_end_the_step_alone(error, told, capsys):
    def step():
        raise error

    assert attempt("a", step, Budget()) is None
    assert told in capsys.readouterr().err
    assert attempt("b", lambda: 3, Budget(5.0)) == 3
