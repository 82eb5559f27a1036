"""Times configurations against each other, in turns or one by one, within a budget of time.

In turns they are all built first, and each round begins with another one, so that ratios pair runs of one round. One by
one, each is built, verified, timed and dropped before the next: for a GPU, where state and graphs of several do not fit
side by side, where compiling takes minutes and what was measured must not be lost, and where times spread little.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks import record
from benchmarks.budget import Budget, attempt, free_memory
from benchmarks.configurations import Network, importable, telling_first
from modiff_kernels.evaluation.configurations import Row, select_rows


@dataclasses.dataclass
class Entrant:
    """A row in the contest. times: seconds of its runs, or calls, in order. more: what else was found.

    peak_bytes: of a GPU, while it was timed by itself, with its weights; 0 where it is not known.
    turn: entrants with the same one took turns, and their times pair.
    """

    row: Row
    network: Network | None = None
    sqnr_db: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    turn: int = 0
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the times."""
        return statistics.median(self.times)


def ratios(baseline: Entrant, own: Entrant) -> list[float]:
    """How much faster `own` is: pair by pair if they took turns, else by the medians."""
    if baseline.turn == own.turn:
        return [b / s for b, s in zip(baseline.times, own.times, strict=True)]
    return [baseline.median / own.median]


def fastest(entrants: Sequence[Entrant], keys: Sequence[str]) -> Entrant | None:
    """The fastest of those whose row has one of `keys`, or None if there is none."""
    return min((e for e in entrants if e.row.key in keys), key=lambda e: e.median, default=None)


class Scores:
    """Entrants that were timed, those that are `known` first. baselines: by metric, keys of the rows it compares with.

    The fastest one of them counts.
    """

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
        found = {metric: fastest(self.entrants, keys) for metric, keys in self.baselines.items()}
        return {metric: entrant for metric, entrant in found.items() if entrant is not None}


def recorded(
    measure: tuple[str, str, float], problems: Mapping[str, Row], paths: Iterable[Path], device: str
) -> list[Entrant]:
    """Entrants of what this commit, without local changes, has recorded on `device`; `problems` are rows by their name.

    measure: op, metric, and seconds of its unit. Their only time is the recorded median.
    """
    op, metric, seconds = measure
    (commit, dirty), newest = record.commit(), {}
    for path in paths if dirty is False else ():
        for row in record.read(path) if path.exists() else ():
            same = (row["op"], row["git_commit"], row["dirty"], row["device"]) == (op, commit, "False", device)
            if same and row["metric"] == metric and row["problem"] in problems:
                newest[row["problem"]] = row
    found = []
    for turn, name in enumerate([name for name in problems if name in newest], start=1):
        row = newest[name]
        entrant = Entrant(problems[name], None, float(row["sqnr_db"]), [seconds * float(row["p50"])], turn=-turn)
        entrant.more["backend"] = row["backend"]
        found.append(entrant)
    return found


def reserved_bytes() -> int:
    """What torch has taken of the GPU's memory, pools of CUDA graphs included; 0 without a GPU."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def peak_bytes() -> int:
    """The most of that since `reset_peak`."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    """Begin to look for the peak anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Bench(Protocol):
    """What is timed with each row."""

    def make(self, row: Row) -> Network:
        """The network of `row`."""
        ...

    def verify(self, entrant: Entrant) -> float | str:
        """Run it and give its SQNR in dB, or a text that says why it is not to be timed."""
        ...

    def timed(self, entrant: Entrant) -> list[float]:
        """Seconds of one round."""
        ...

    def measured(self, entrants: list[Entrant]) -> None:
        """Take those that have new times, while their networks are there."""
        ...


class Contest:
    """Runs the contest of rows. in_turns: all at once."""

    def __init__(self, bench: Bench, *, rounds: int, in_turns: bool, budget: Budget, quiet: bool = False) -> None:
        self.bench = bench
        self.rounds = rounds
        self.in_turns = in_turns
        self.budget = budget
        self.quiet = quiet

    def run(self, rows: Sequence[Row]) -> bool:
        """Whether all rows were verified and timed."""
        groups = [list(rows)] if self.in_turns else [[row] for row in rows]
        done = 0
        with tqdm(total=len(rows), unit="row", disable=self.quiet, leave=False) as bar:
            for turn, group in enumerate(groups):
                if self.budget.is_over:
                    names = ", ".join(row.name for row in rows[rows.index(group[0]) :])
                    print(f"the budget is used up; left out: {names}", file=sys.stderr, flush=True)
                    break
                done += self._run_group(group, turn, bar)
        return done == len(rows)

    def _run_group(self, group: list[Row], turn: int, bar: tqdm) -> int:
        entrants = []
        before = reserved_bytes()
        for row in group:
            bar.set_postfix_str(row.key)
            entrant = attempt(row.name, lambda row=row: self._verified(row), self.budget)
            if entrant is not None:
                entrant.turn = turn
                entrants.append(entrant)
            bar.update()
        if entrants:
            free_memory()  # what compiling and choosing kernels took does not count
            reset_peak()
            names = ", ".join(entrant.row.name for entrant in entrants)
            attempt(f"further rounds of {names}", lambda: self._time(entrants), self.budget)
            if peak_bytes() and not self.in_turns:
                entrants[0].peak_bytes = max(0, peak_bytes() - before) + entrants[0].network.shared_bytes
        timed = [entrant for entrant in entrants if entrant.times]
        shortest = min((len(entrant.times) for entrant in timed), default=0)
        for entrant in timed:
            entrant.times = entrant.times[:shortest]
        if timed:
            self.bench.measured(timed)
        for entrant in entrants:
            entrant.network.remove()
            entrant.network = None
        if any(row.compiled for row in group):
            torch._dynamo.reset()  # else compiled code keeps memory of its graphs; what it was compiled to is on disk
        free_memory()
        return len(timed)

    def _verified(self, row: Row) -> Entrant | None:
        entrant = Entrant(row, self.bench.make(row))
        found = self.bench.verify(entrant)
        if isinstance(found, str):
            print(f"{row.name}: {found}; not timed", file=sys.stderr, flush=True)
            return None
        entrant.sqnr_db = found
        return entrant

    def _time(self, entrants: list[Entrant]) -> None:
        for turn in range(self.rounds):
            shift = turn % len(entrants)
            for entrant in entrants[shift:] + entrants[:shift]:
                entrant.times += self.bench.timed(entrant)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that holds a contest."""
    add = parser.add_argument
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    add("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on cuda")
    add("--rows", default="", help="names or beginnings of rows as in `modiff compare`, by commas (default: all)")
    add("--backend", default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--in-turns", action=argparse.BooleanOptionalAction, default=None, help="default: on the CPU")
    add("--budget", type=float, default=None, metavar="SECONDS", help="end after this time, with what is measured")
    add("--record", action="store_true", help="append the rows to the results as they come")
    add("--skip-recorded", action="store_true", help="leave out rows that this commit has recorded on this device")
    add("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="of the results (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")


def hold(
    args: argparse.Namespace,
    budget: Budget,
    device: torch.device,
    rows: Sequence[Row],
    order: Sequence[str],
    problem: Callable[[Row], str],
    measure: tuple[str, str, float],
    bench_of: Callable[[list[Entrant], Callable[[list[dict]], None]], Bench],
    rounds: int,
) -> tuple[bool, list[dict]]:
    """Hold the contest of those `rows` that `args` ask for; whether all were timed, and the new rows of results.

    order: that of the rows where they come one by one. problem: as results name a row. measure: of `recorded`.
    bench_of: takes entrants that have their results, and what keeps new ones.
    """
    rows = importable(select_rows(rows, tuple(name for name in args.rows.split(",") if name)))
    in_turns = device.type == "cpu" if args.in_turns is None else args.in_turns
    if not in_turns:
        rows = telling_first(rows, order)
    name = record.name_of(device)
    path = record.results_file(args.results, name)
    known = recorded(measure, {problem(row): row for row in rows}, {record.results_file(device=name), path}, name)
    known = known if args.skip_recorded and (len(known) == len(rows) or not in_turns) else []
    left = [row for row in rows if row.key not in {entrant.row.key for entrant in known}]
    results: list[dict] = []

    def keep(new: list[dict]) -> None:
        results.extend(new)
        if args.record and new:
            record.append([{**row, "device": name} for row in new], path)

    if not left:
        return True, results
    bench = attempt(f"all rows like {problem(left[0])}", lambda: bench_of(known, keep), budget)
    if bench is None:
        return False, results
    contest = Contest(bench, rounds=rounds, in_turns=in_turns, budget=budget, quiet=args.quiet)
    return contest.run(left), results
