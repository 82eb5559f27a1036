"""The one runner of all benchmarks: takes the configurations of a case, refuses wrong ones, times and records the rest.

In turns, all are built first and each round begins with another one, so that ratios pair times of one round. One by
one, each is built, verified, timed and dropped before the next: for a GPU, where state and graphs of several do not fit
side by side, where compiling takes minutes and what was measured must not be lost, and where times spread little."""

import argparse
import contextlib
import dataclasses
import gc
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from benchmarks import record

T = TypeVar("T")
Row = dict[str, Any]
FAILED, NOT_FINISHED = 1, 3
"""Exit codes: something was wrong or could not be measured; --budget was spent before everything was."""
REPEAT_S = 5.0
"""After this time the alarm comes again: an exception is lost where Python is in a destructor."""


class OutOfTime(BaseException):
    """The budget is used up. No Exception, so that code which handles errors, such as a compiler, lets it pass."""


class DeviceLost(BaseException):
    """The CUDA context is lost: from now on every call of this process fails."""


class LeftOut(Exception):
    """A configuration does not exist here, for the reason that it names; that is no failure."""


class Budget:
    """Seconds from now on; None is no limit. `clock` is another one in tests."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = float("inf") if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """OutOfTime is raised inside when nothing is left. For the main thread, and not nested."""
        if self._end == float("inf"):
            yield
            return

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), REPEAT_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def device_is_lost() -> bool:
    """Whether this process has lost its CUDA context, whoever reported it and in whatever words."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def attempt(name: str, step: Callable[[], T], budget: Budget) -> T | None:
    """What `step` gives, or None where it failed, ran out of memory or of time; stderr then says so and for what."""
    reason = ""
    try:
        with budget.limit():
            return step()
    except OutOfTime:
        reason = "the budget was used up before it was done"
    except torch.OutOfMemoryError as error:
        reason = f"out of memory ({str(error).strip().splitlines()[0]})"
    except Exception as error:  # compilers have errors of their own
        traceback.print_exc()
        reason = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    print(f"{name}: {reason}; left out", file=sys.stderr, flush=True)
    if device_is_lost():
        raise DeviceLost(name)
    free_memory()  # here, where the exception and the frames it holds are gone
    return None


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Entrant:
    """A configuration that is timed: `config` has a key, a name, and says whether it is compiled by torch.

    subject: what the case made of it, None where its rows were recorded before. times: seconds of its runs, or calls.
    peak_bytes: of a GPU, while it was timed alone, with its weights; 0: not known. turn: entrants with the same one
    took turns, and their times pair. more: what else was found."""

    config: Any
    subject: Any = None
    sqnr_db: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    turn: int = 0
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


class Case(Protocol):
    """One problem. baselines: by metric, keys of the configurations whose fastest one the others are compared with.

    make gives the subject of a configuration, whose `remove` is called at the end, and whose `shared_bytes` count with
    its peak; verify runs it and gives its SQNR in dB, or a text that says why it is not to be timed; timed gives the
    seconds of one round, by `timer` where the subject is a call; rows are those of a timed entrant while its subject is
    there, ratio_rows those of how many times faster it is than the baseline of `metric`."""

    baselines: Mapping[str, Sequence[str]] = {}
    timer: Callable[[Callable[[], object]], list[float]]

    def make(self, config: Any) -> Any: ...
    def verify(self, entrant: Entrant) -> float | str: ...
    def rows(self, entrant: Entrant) -> list[Row]: ...

    def timed(self, entrant: Entrant) -> list[float]:
        return self.timer(entrant.subject)

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        return []


def ratios(baseline: Entrant, own: Entrant) -> list[float]:
    """How much faster `own` is: pair by pair if they took turns, else by the medians."""
    if baseline.turn == own.turn:
        return [b / s for b, s in zip(baseline.times, own.times, strict=True)]
    return [baseline.median / own.median]


class Scores:
    """Entrants that were timed, those that are `known` first, and what they are compared with."""

    def __init__(self, baselines: Mapping[str, Sequence[str]], known: Sequence[Entrant]) -> None:
        self.baselines = baselines
        self.entrants = list(known)

    def add(self, new: Sequence[Entrant]) -> list[tuple[Entrant, str, list[float]]]:
        """Ratios to be recorded, by entrant and metric: those of `new`, and of the others to a baseline in `new`."""
        old, before = list(self.entrants), self._fastest()
        self.entrants += new
        after = self._fastest()
        brought = [metric for metric, entrant in after.items() if before.get(metric) is not entrant]
        found = [(entrant, metric, ratios(after[metric], entrant)) for entrant in new for metric in after]
        return found + [(entrant, metric, ratios(after[metric], entrant)) for entrant in old for metric in brought]

    def _fastest(self) -> dict[str, Entrant]:
        """By metric the fastest of its baselines, where one of them was timed."""
        found = {metric: [e for e in self.entrants if e.config.key in keys] for metric, keys in self.baselines.items()}
        return {metric: min(own, key=lambda e: e.median) for metric, own in found.items() if own}


@dataclasses.dataclass(frozen=True)
class Measure:
    """How results name the time of a configuration: the row that says that it is recorded. unit_s: its unit."""

    op: str
    problem: str
    metric: str
    unit_s: float
    backend: str | None = None
    """Beginning of the backend in the row, where the problem does not tell configurations apart."""


def recorded(measures: Sequence[tuple[Any, Measure]], rows: Sequence[Mapping[str, str]], device: str) -> list[Entrant]:
    """Entrants of what this commit, without local changes, has recorded on `device`; their only time is the median."""
    (commit, dirty), found = record.commit(), []
    own = [row for row in rows if (row["git_commit"], row["dirty"], row["device"]) == (commit, "False", device)]
    for turn, (config, m) in enumerate(measures, start=1):
        newest = None
        for row in own if dirty is False else ():
            same = (row["op"], row["problem"], row["metric"]) == (m.op, m.problem, m.metric)
            if same and f"{row['backend']}-".startswith(f"{m.backend or row['backend']}-"):
                newest = row
        if newest is not None:
            times = [m.unit_s * float(newest["p50"])]
            found.append(Entrant(config, None, float(newest["sqnr_db"]), times, turn=-turn))
            found[-1].more["backend"] = newest["backend"]
    return found


def reserved_bytes(peak: bool = False) -> int:
    """What torch has taken of the GPU's memory, pools of CUDA graphs included, or the most since `reset_peak`."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Session:
    """One command: its options, device, budget and results. failed, left, done: configurations so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        if min(args.rounds, args.threads) < 1:
            raise SystemExit("--rounds and --threads must be at least 1")
        self.args = args
        self.budget = Budget(args.budget)
        torch.set_num_threads(args.threads)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device; use --device cpu")
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.device_name = record.name_of(self.device)
        self.path = record.results_file(args.results, self.device_name)
        self.in_turns = self.device.type == "cpu" if args.in_turns is None else args.in_turns
        self.dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(self.device)
        self.failed = self.left = self.done = 0
        self.rows: list[Row] = []

    def keep(self, rows: Sequence[Row]) -> None:
        """Take rows as they come, and write them if they are to be recorded."""
        new = [{"verified": True, **row, "device": self.device_name} for row in rows]
        self.rows.extend(new)
        if self.args.record and new:
            record.append(new, self.path)

    def known(self, measures: Sequence[tuple[Any, Measure]]) -> list[Entrant]:
        """What --skip-recorded leaves out: on a machine where configurations take turns, all or nothing."""
        if not self.args.skip_recorded:
            return []
        paths = {record.results_file(device=self.device_name), self.path}
        rows = [row for path in paths if path.exists() for row in record.read(path)]
        found = recorded(measures, rows, self.device_name)
        return found if len(found) == len(measures) or not self.in_turns else []

    def run(
        self, name: str, case_of: Callable[[], Case], measures: Sequence[tuple[Any, Measure]], rounds: int
    ) -> list[Row]:
        """Verify, time and record the configurations that --rows names; the new rows. case_of: makes the case."""
        chosen = [pair for pair in measures if is_wanted(pair[0].key, self.args.rows)]
        known = self.known(chosen)
        todo = [config for config, _ in chosen if config.key not in {entrant.config.key for entrant in known}]
        before = len(self.rows)
        if todo and self.budget.is_over:
            self._leave_out([f"{name}, {config.name}" for config in todo])
            return []
        case = attempt(name, case_of, self.budget) if todo else None
        if case is not None:
            _Run(self, name, case, known, rounds).run(todo)
        elif todo and self.budget.is_over:
            self.left += len(todo)
        elif todo:
            self.failed += len(todo)
        return self.rows[before:]

    def _leave_out(self, names: Sequence[str]) -> None:
        self.left += len(names)
        print(f"the budget is used up; left out: {'; '.join(names)}", file=sys.stderr, flush=True)

    @property
    def exit_code(self) -> int:
        return FAILED if self.failed else NOT_FINISHED if self.left else 0


class _Run:
    def __init__(self, session: Session, name: str, case: Case, known: Sequence[Entrant], rounds: int) -> None:
        self.session, self.name, self.case, self.rounds = session, name, case, rounds
        self.scores = Scores(case.baselines, known)
        self.skipped = 0

    def run(self, configs: Sequence[Any]) -> None:
        session = self.session
        groups = [list(configs)] if session.in_turns else [[config] for config in configs]
        with tqdm(total=len(configs), unit="row", desc=self.name, disable=session.args.quiet, leave=False) as bar:
            for turn, group in enumerate(groups):
                if session.budget.is_over:
                    session._leave_out([config.name for config in configs[configs.index(group[0]) :]])
                    break
                self.skipped = 0
                done = self._group(group, turn, bar)
                missing = len(group) - done - self.skipped
                session.done += done
                session.left += missing if session.budget.is_over else 0
                session.failed += 0 if session.budget.is_over else missing

    def _group(self, group: Sequence[Any], turn: int, bar: tqdm) -> int:
        """How many of `group` were verified and timed."""
        entrants: list[Entrant] = []
        budget, before = self.session.budget, reserved_bytes()
        for config in group:
            bar.set_postfix_str(config.key)
            entrant = attempt(f"{self.name}, {config.name}", lambda c=config: self._verified(c), budget)
            if entrant is not None:
                entrant.turn = turn
                entrants.append(entrant)
            bar.update()
        if entrants:
            free_memory()  # what compiling and choosing kernels took does not count
            reset_peak()
            names = ", ".join(entrant.config.name for entrant in entrants)
            attempt(f"{self.name}, further rounds of {names}", lambda: self._time(entrants), budget)
            if (peak := reserved_bytes(peak=True)) and not self.session.in_turns:
                entrants[0].peak_bytes = max(0, peak - before) + getattr(entrants[0].subject, "shared_bytes", 0)
        timed = [entrant for entrant in entrants if entrant.times]
        shortest = min((len(entrant.times) for entrant in timed), default=0)
        rows: list[Row] = []
        for entrant in timed:
            entrant.times = entrant.times[:shortest]
            rows += self.case.rows(entrant)
        for entrant, metric, faster in self.scores.add(timed):
            rows += self.case.ratio_rows(entrant, metric, faster)
        self.session.keep(rows)
        for entrant in entrants:
            getattr(entrant.subject, "remove", lambda: None)()
            entrant.subject = None
        if any(config.compiled for config in group):
            torch._dynamo.reset()  # else compiled code keeps memory of its graphs; what it was compiled to is on disk
        free_memory()
        return len(timed)

    def _verified(self, config: Any) -> Entrant | None:
        try:
            entrant = Entrant(config, self.case.make(config))
            found = self.case.verify(entrant)
        except LeftOut as reason:
            self.skipped += 1
            print(f"{self.name}, {config.name}: left out: {reason}", file=sys.stderr, flush=True)
            return None
        if isinstance(found, str):
            print(f"{self.name}, {config.name}: {found}; not timed", file=sys.stderr, flush=True)
            return None
        entrant.sqnr_db = found
        return entrant

    def _time(self, entrants: Sequence[Entrant]) -> None:
        for turn in range(self.rounds):
            shift = turn % len(entrants)
            for entrant in [*entrants[shift:], *entrants[:shift]]:
                entrant.times += self.case.timed(entrant)


def is_wanted(key: str, names: str) -> bool:
    """Whether --rows `names` asks for the configuration `key`: by its name, its beginning, or without its backend."""
    forms = (f"{key}-", f"{key.partition('.')[0]}-")
    return not names or any(form.startswith(f"{name}-") for name in names.split(",") for form in forms)


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="how often each configuration is timed (%(default)s)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    add("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on cuda")
    add("--rows", default="", help="keys of configurations or their beginnings, by commas (default: all)")
    add("--backend", nargs="+", default=["auto"], help="of our layers; several: ours once for each (auto)")
    add("--plan", metavar="FILE", help="layer plan of the rows planned")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--in-turns", action=argparse.BooleanOptionalAction, default=None, help="default: on the CPU")
    add("--budget", type=float, default=None, metavar="SECONDS", help="end after this time, with what is measured")
    add("--record", action="store_true", help="append the rows to the results as they come")
    add("--skip-recorded", action="store_true", help="leave out what this commit has recorded on this device")
    add("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="of the results (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
