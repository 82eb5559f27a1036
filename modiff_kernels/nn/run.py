"""`Run`: the clock of one accelerated network: which run, call and context this is. It refuses what would give a wrong
picture.

A *run* is one sampling trajectory. In its first call the layers begin their state anew, so beginning it touches no
memory. A *context* is an independent trajectory inside a run, two for classifier-free guidance in two passes, which can
begin anew as well. Everything here is decided on the host; nothing reads the device."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

UPDATE = "update"
DEFAULT_CONTEXT = "default"

R = TypeVar("R", bound="Run")

NEW_RUN = (
    "begin a new run (scheduler.set_timesteps() of an accelerated pipeline, or of another one after "
    "handle.wrap_scheduler(pipe), or `with handle.sampling_run():`)"
)


class Run:
    """action: what this call does: "update", or "hold" or "forecast" where a schedule skips it; None outside a call.
    is_first: whether this call begins its context, in this run or anew.
    call_index: number of the call in its context and run, from 0.
    step_index: number of the sampler's step that it belongs to, from that of the run's first call on.
    run_index: number of the run.
    scheduled: whether calls need a run even if nothing has a state.
    calls_calibrated: calls of a run, where scales are tables over them; None: any number.

    One thread samples at a time: the one that began the run. Every misuse raises RuntimeError; after a failed or
    interrupted call the run is over, because its layers hold a mix of two steps.

    Owners of state override `needs_run`, and add to what happens where runs and calls begin and end."""

    advice = NEW_RUN

    def __init__(self) -> None:
        self.action: str | None = None
        self.is_first = False
        self.context_name = DEFAULT_CONTEXT
        self.call_index = self.step_index = self.run_index = 0
        self.scheduled = False
        self.calls_calibrated: int | None = None
        self._busy = threading.Lock()
        self._caller: threading.Thread | None = None
        self._runner: threading.Thread | None = None
        self._calls: dict[str, int] = {}
        self._begun: set[str] = set()
        self._placed = False  # whether the context of this call is one that the user did not name
        self._num_calls: int | None = None
        self._over: str | None = "no run has begun"

    @property
    def needs_run(self) -> bool:
        """Whether a call outside a run is an error."""
        return self.scheduled or self.calls_calibrated is not None

    @property
    def is_open(self) -> bool:
        """Whether a run has begun and has not ended."""
        return self._over is None

    def _on_leave_call(self, ended: bool) -> None:
        """A call ends. ended: one that needs a run, and well."""

    def expect_calls(self, calls: int) -> None:
        """From now on runs have `calls` calls: scales are given for each. ValueError if it was another number."""
        if self.calls_calibrated not in (None, calls):
            text = f"in a UNet with tables of {self.calls_calibrated}; give all one length"
            raise ValueError(f"a table of {calls} scales, one per call, {text}")
        self.calls_calibrated = calls

    def begin_run(self, num_calls: int | None = None) -> None:
        """Begin a run in this thread: the next call of every context is its first. num_calls: calls per context; one
        more raises. None = any number. Raises RuntimeError while another thread is inside a call, and on a number other
        than that of calibrated tables of scales."""
        if self.calls_calibrated is not None:
            if num_calls not in (None, self.calls_calibrated):
                text = f"UNet calls of a run, but this run has {num_calls}; sample with as many, or calibrate for these"
                raise RuntimeError(f"the scales are calibrated for the {self.calls_calibrated} {text}")
            num_calls = self.calls_calibrated
        with self._between_calls("begin a run"):
            self.begin_anew()
            self.run_index += 1
            self._runner = threading.current_thread()
            self._calls, self._num_calls, self._over = {}, num_calls, None

    def begin_anew(self, context: str | None = None) -> None:
        """Let the next call of `context` (None: of each) be a first one again, which stands on nothing of before."""
        self._begun -= {context} if context is not None else self._begun

    def end_run(self) -> None:
        with self._between_calls("end a run"):
            self.invalidate("the run has ended")

    def reset_after_pipeline(self) -> None:
        """End the run of this thread; leave that of another live thread alone."""
        if self._runner is threading.current_thread() or self._runner is None or not self._runner.is_alive():
            self.end_run()

    @contextlib.contextmanager
    def sampling_run(self: R, num_calls: int | None = None) -> Iterator[R]:
        self.begin_run(num_calls)
        try:
            yield self
        finally:
            self.end_run()

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Calls inside belong to the trajectory `name`, for example "cond" and "uncond"."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"context: name={name!r} is not allowed; give a non-empty string such as 'cond'")
        if self.action is not None:
            raise RuntimeError("context: a UNet call is in progress; enter contexts around whole UNet calls")
        previous, self.context_name = self.context_name, name
        try:
            yield
        finally:
            self.context_name = previous

    def begin_call(self, look: Callable[[], str | None] = lambda: None) -> None:
        """Enter a call. look: looks at it when no other is in the way, and may give its context. Raises RuntimeError
        where the call would give a wrong picture."""
        if not self.needs_run:
            look()
            return
        self._acquire("call the UNet")
        try:
            self._check_run(threading.current_thread())
            if (name := look()) not in (None, self.context_name):
                self.context_name, self._placed = name, True
            self.call_index = self._calls.get(self.context_name, 0)
            self._check_number()
        except BaseException:
            self._leave()
            raise
        self.is_first = self.context_name not in self._begun
        self._begun.add(self.context_name)
        self.action = UPDATE
        self._caller = self._runner

    def end_call(self, failed: bool = False) -> None:
        """Leave the call of this thread, if it is in one; a failed one ends the run."""
        needs_run = self.needs_run
        if needs_run and self._caller is not threading.current_thread():
            return
        self._on_leave_call(needs_run and not failed)
        if needs_run:
            if failed:
                self.invalidate("a UNet call failed")
            else:
                self._calls[self.context_name] = self.call_index + 1
            self._leave()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call, for layers that are used without a network around them."""
        self.begin_call()
        try:
            yield
        except BaseException:
            self.end_call(failed=True)
            raise
        self.end_call()

    def invalidate(self, reason: str) -> None:
        """End the run, for `reason`, which may have made its state worthless."""
        if self._over is None:
            self._over = reason
            self._num_calls = None

    def _check_run(self, thread: threading.Thread) -> None:
        if self._over is not None:
            raise RuntimeError(f"the UNet was called outside a run ({self._over}); {self.advice}")
        runner: Any = self._runner
        if thread is not runner:
            text = f"but {thread.name!r} calls the UNet; {NEW_RUN} in this thread, or give every thread its own UNet"
            raise RuntimeError(f"the run was begun by thread {runner.name!r} {text}")

    def _check_number(self) -> None:
        if self._num_calls is not None and self.call_index >= self._num_calls:
            text = f"num_calls={self._num_calls}: give as many as every context has, or none"
            if self.calls_calibrated is not None:
                text = f"scales calibrated for {self._num_calls}: calibrate one for all calls, or use dynamic ones"
            where = f"call {self._num_calls + 1} of the UNet in context {self.context_name!r}"
            raise RuntimeError(f"{where}, but this run has {text}; {NEW_RUN} for a new picture")

    @contextlib.contextmanager
    def _between_calls(self, what: str) -> Iterator[None]:
        self._acquire(what)
        try:
            yield
        finally:
            self._busy.release()

    def _acquire(self, what: str) -> None:
        """Be the only one that calls. A call in progress that cannot be running any more is left."""
        if self._busy.acquire(blocking=False):
            return
        owner = self._caller
        if owner is not threading.current_thread() and (owner is None or owner.is_alive()):
            text = "one thread samples with one accelerated UNet at a time, give every thread its own"
            raise RuntimeError(f"cannot {what}: another thread is inside a call of this UNet; {text}")
        self.invalidate("a UNet call was interrupted")
        self._leave()
        self._busy.acquire()

    def _leave(self) -> None:
        self.action = self._caller = None
        self.is_first = False
        if self._placed:
            self.context_name, self._placed = DEFAULT_CONTEXT, False
        self._busy.release()
