"""Fits a step schedule to a network and its sampler: which calls are computed, and what every call returns.

Call i returns a linear form of the last computed outputs e and of the sample x_i that it is given. Polynomial forecasts
are of this form, and so are the linear multistep solvers::

    out_i = sum_k w_ik e_(m-k) + v_i x_i,    m: the last computed call up to i, i itself where it is computed

A *span* is a computed call with the skipped ones up to the next. Every skipped call has the weights that come nearest
to the network's output on the wanted trajectory. What counts of a span is where it leaves the sample, so all its calls
share what is added to them; these few numbers per span are fitted in two ways:

    states   span after span, to the sample of the wanted trajectory at the span's end, by least squares. The network is
             computed at the computed calls alone, so the search for these has the fit inside.
    end      all spans together, to the final picture, by Gauss-Newton steps as long as other pictures gain by them."""

import contextlib
import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff_kernels.config.schedule import FORECAST, UPDATE, StepSchedule
from modiff_kernels.planning.clock import DEGREE, combine, polynomial

TERMS = 4  # computed outputs in a form; more gain 0.1 dB
RIDGE = 1e-4  # of the diagonal, which keeps weights small: outputs of consecutive calls are nearly parallel
PROBE = 0.01  # change of a weight by which derivatives are found
MOVES = (-1, 1, -2, 2)
POWERS = (0.0, -0.1, -0.2, -0.3)  # of the signal's part: how much more errors at noisy calls count
DAMPINGS = (1e-4, 1e-2)  # of Gauss-Newton steps
END_STEPS = 4  # with the Jacobian of the first
QUICK_DB = 6.0  # what moving calls and the end fit add at most to the first guess, by far

Computed = tuple[int, ...]
Outputs = dict[tuple[int, int], Tensor]  # by number among the computed calls, and pass
Rows = list[list[float]]  # weights by call: of the last computed outputs, the newest first, then of the sample
Answer = Callable[[int, int, Tensor, Callable[[], Tensor]], Tensor]


class Target(NamedTuple):
    """The trajectory that is wanted, of the first pass of each step. states: the sample of every call. outputs: of the
    network there. picture: what sampling gives. log_snr: of every call."""

    states: list[Tensor]
    outputs: list[Tensor]
    picture: Tensor
    log_snr: Sequence[float]


class Fitted(NamedTuple):
    """rows: the weights of all calls. fitting_db, validation_db: fidelity on the pictures of the fit and on those that
    stopped it. polynomial_db: of the polynomial at the same calls, on the latter."""

    computed: Computed
    rows: Rows
    fitting_db: float
    validation_db: float
    polynomial_db: float

    @property
    def schedule(self) -> StepSchedule:
        return StepSchedule(pattern(self.computed, len(self.rows)), weights=self.rows)


class _Reached(Exception):
    """The call whose sample is asked for has come."""


class Fit:
    """The fits on some pictures. sample(answer): samples them; in the place of pass p of call i of the network on a
    sample x, answer(i, p, x, compute) gives the output, with compute() for that of the network. on_run:
    called after each run of the sampler. known: what an interrupted fit has found, added to; on_known: called then."""

    def __init__(
        self, sample: Callable[[Answer], Tensor], target: Target, on_run: Callable[[], Any] = lambda: None,
        known: MutableMapping[str, Any] | None = None, on_known: Callable[[], Any] = lambda: None,
    ) -> None:  # fmt: skip
        self.known, self._on_known = {} if known is None else known, on_known
        self.calls = len(target.states)
        self._sample, self._target, self._on_run = sample, target, on_run
        self._places = [math.exp(-snr / 4) for snr in target.log_snr]
        self._takes_sample = target.states[0].shape[1] >= target.outputs[0].shape[1]
        low, high = float(target.picture.min()), float(target.picture.max())
        self._range = 1.0 if low >= 0 and high <= 1 else high - low
        channels = min(target.outputs[0].shape[1], target.states[0].shape[1])  # a learnt variance is not sampled with
        both = [row[:, :channels].double().flatten() for row in (*target.states, *target.outputs)]
        self._gram = torch.stack([torch.stack([row @ other for other in both]) for row in both])
        self._spans: dict[Computed, Rows] = {}  # by the computed calls up to the span's end
        self._outputs: dict[Computed, Outputs] = {}  # by those up to the call

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), or what is known under this name."""
        if name not in self.known:
            self.known[name] = compute()
            self._on_known()
        return self.known[name]

    def states(self, computed: Computed) -> tuple[Rows, Outputs]:
        """The fit of the spans in order, but for fitted beginnings, and the outputs of the computed calls."""
        rows: Rows = []
        outputs: Outputs = {}
        for m, end in enumerate([*computed[1:], self.calls]):
            begun, span = computed[: m + 1], range(computed[m], end)
            name = (*begun, end)
            outputs |= self._outputs.get(begun, {})
            if name not in self._spans:
                self._spans[name] = self._fitted_span(computed, span, rows, outputs)
                self._outputs[begun] = {key: value for key, value in outputs.items() if key[0] == m}
            rows = rows + self._spans[name]
        return rows, outputs

    def keep(self, computed: Computed) -> None:
        """Forget all fits but those of beginnings of `computed`, for their memory."""
        self._spans = {key: rows for key, rows in self._spans.items() if key[:-1] == computed[: len(key) - 1]}
        self._outputs = {key: held for key, held in self._outputs.items() if key == computed[: len(key)]}

    def jacobian(self, computed: Computed, rows: Rows) -> list[Tensor]:
        """Derivatives of the picture by what is added to the weights of a span, one after the other, by differences."""
        outputs: Outputs = {}
        start = self._run(computed, rows, outputs)
        free = self._free(computed, rows)
        columns = []
        for j, (span, _) in enumerate(free):
            known = {key: value for key, value in outputs.items() if computed[key[0]] <= span[0]}
            changes = [PROBE * (i == j) for i in range(len(free))]
            picture = self._run(computed, self._changed(computed, rows, changes), known)
            columns.append(((picture - start) / PROBE).flatten())
        return columns

    def end(self, computed: Computed, rows: Rows, columns: Callable[[], Sequence[Tensor]]) -> Rows:
        """A Gauss-Newton step from `rows` on the picture, damped and as long as fits best. columns: the Jacobian."""
        left = (self._target.picture - self._run(computed, rows, {})).flatten()
        steps = [_least_squares(columns(), left, damping) for damping in DAMPINGS]
        changes = [[size * change for change in step] for step in steps for size in (1.0, 0.5)]
        tried = [self._changed(computed, rows, change) for change in changes]
        return max(tried, key=lambda new: self.fidelity(computed, new))

    def _free(self, computed: Computed, rows: Rows) -> list[tuple[range, int]]:
        spans = [range(*pair) for pair in itertools.pairwise([*computed, self.calls])]
        return [(span, k) for span in spans for k in range(len(rows[span[0]]) - (not self._takes_sample))]

    def _changed(self, computed: Computed, rows: Rows, changes: Sequence[float]) -> Rows:
        new = [list(row) for row in rows]
        for (span, k), change in zip(self._free(computed, rows), changes):
            for call in span:
                new[call][k] += change
        return new

    def fidelity(self, computed: Computed, rows: Rows | None = None, outputs: Outputs | None = None) -> float:
        """In dB to the picture that is wanted, mean over the pictures. rows: None for the polynomial."""
        ends = [*computed[1:], self.calls]
        rows = rows or [row for span in map(range, computed, ends) for row in self._polynomial(computed, span)]
        errors = self._run(computed, rows, {} if outputs is None else outputs) - self._target.picture
        squares = errors.double().flatten(1).square().mean(1).clamp_min(1e-20)
        return float((10 * torch.log10(self._range**2 / squares)).mean())

    def promising(self, evaluations: int) -> list[Computed]:
        """Computed calls from which to search on: for each of POWERS those with the least sum, over the spans, of what
        a form of two outputs and the sample leaves on the wanted trajectory itself."""
        left, calls = self._left_over(), self.calls
        signal = torch.sigmoid(torch.tensor(self._target.log_snr, dtype=torch.float64)).clamp_min(1e-3)
        found = []
        for power in POWERS:
            costs = left * signal**power  # [before, begins, ends], the first one call later
            least, chosen = torch.full((calls + 1, calls), math.inf, dtype=torch.float64), []
            least[0, 0] = 0.0
            for _ in range(evaluations - 1):
                value, before = (least[:, :, None] + costs).min(0)
                least = torch.cat([torch.full((1, calls), math.inf, dtype=torch.float64), value])
                chosen.append(before)
            at = int((least + costs[:, :, -1]).argmin())  # the last span ends behind the last call: nearly as there
            path = [at % calls, at // calls - 1]
            for before in reversed(chosen[1:]):
                path.append(int(before[path[-1], path[-2]]) - 1)
            found.append(tuple(reversed(path)) if evaluations > 1 else (0,))
        return list(dict.fromkeys(found))

    def _left_over(self) -> Tensor:
        """float64 [1 + before, begins, ends]: squared distance of the state at `ends` from the form of the state and
        output at `begins` and the output at `before` (index 0: none) that is nearest to it; inf where impossible."""
        calls, gram = self.calls, self._gram
        left = torch.full((calls + 1, calls, calls), math.inf, dtype=torch.float64)
        spans = [(c, d) for c in range(calls) for d in range(c, calls) if d > c or d == calls - 1]
        b, c, d = torch.tensor([(b, c, d) for c, d in spans for b in range(-1, c)]).T
        for has, count in ((b < 0, 2), (b >= 0, 3)):
            terms = torch.stack([c, calls + c, calls + b][:count], 1)[has]
            normal, right = gram[terms[:, :, None], terms[:, None]], gram[terms, d[has, None]]
            ridge = torch.diag_embed(torch.diagonal(normal, dim1=1, dim2=2)) * RIDGE
            weights = torch.linalg.solve(normal + ridge, right[..., None])[..., 0]
            fit = 2 * (weights * right).sum(1) - torch.einsum("ni,nij,nj->n", weights, normal, weights)
            left[b[has] + 1, c[has], d[has]] = (gram[d[has], d[has]] - fit).clamp_min(0)
        return left

    def _fitted_span(self, computed: Computed, span: range, before: Rows, outputs: Outputs) -> Rows:
        base = self._nearest(computed, span)

        def changed(changes: Sequence[float]) -> Rows:
            return [[w + c for w, c in itertools.zip_longest(row, changes, fillvalue=0.0)] for row in base]

        def reached(changes: Sequence[float]) -> Tensor:
            return self._run(computed, before + changed(changes), outputs, span.stop).flatten()

        start = reached([])
        free = range(len(base[0]) - (not self._takes_sample))
        columns = [(reached([0.0] * k + [PROBE]) - start) / PROBE for k in free]
        wanted = [*self._target.states, self._target.picture][span.stop].flatten()
        return changed(_least_squares(columns, wanted - start, RIDGE))

    def _nearest(self, computed: Computed, span: range) -> Rows:
        """Of every call of a span the form nearest to the network's output there, all on the wanted trajectory."""
        nodes = [self.calls + call for call in computed if call <= span[0]][::-1][:TERMS]
        rows = [[1.0] + [0.0] * len(nodes)]
        for call in span[1:]:
            terms = torch.tensor([*nodes, call] if self._takes_sample else nodes)
            normal, right = self._gram[terms[:, None], terms], self._gram[terms, self.calls + call]
            rows.append(_solved(normal, right, RIDGE) + [0.0] * (not self._takes_sample))
        return rows

    def _polynomial(self, computed: Computed, span: range) -> Rows:
        nodes = [call for call in computed if call <= span[0]][::-1][:TERMS]
        rows = [polynomial([self._places[node] for node in nodes[: DEGREE + 1]], self._places[call]) for call in span]
        return [row + [0.0] * (len(nodes) + 1 - len(row)) for row in rows]

    def _run(self, computed: Computed, rows: Rows, outputs: Outputs, end: int | None = None) -> Tensor:
        """The sample that call `end` is given, or the picture where no such call is. outputs: of computed calls, which
        are not computed again; the others are added."""
        reached: list[Tensor] = []

        def answer(call: int, part: int, sample: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            if call == end:
                reached.append(sample.clone())
                raise _Reached
            m = bisect_right(computed, call) - 1
            if (m, part) not in outputs:
                outputs[m, part] = compute().clone()
            return combine(rows[call], [outputs[m - k, part] for k in range(len(rows[call]) - 1)], sample)

        with contextlib.suppress(_Reached):
            reached.append(self._sample(answer))
        self._on_run()
        return reached[0]


def _least_squares(columns: Sequence[Tensor], right: Tensor, damping: float) -> list[float]:
    """x of the least |columns x - right|^2, with a part of the diagonal of the normal equations added to it."""
    matrix = torch.stack(list(columns), 1).double()
    return _solved(matrix.T @ matrix, matrix.T @ right.double(), damping)


def _solved(normal: Tensor, right: Tensor, damping: float) -> list[float]:
    return list(torch.linalg.solve(normal + damping * normal.diag().clamp_min(1e-12).diag(), right).tolist())


def search(fit: Fit, evaluations: int, least_db: float = -math.inf) -> Computed | None:
    """The computed calls whose fit of the states is best: from the promising ones on, each is moved by one call as long
    as that helps. Fidelities are known by pattern: an interrupted search goes on. None where the promising ones are so
    bad that nothing of it can reach least_db."""

    def score(computed: Computed) -> float:
        name = pattern(computed, fit.calls)
        return float(fit.once(name, lambda: fit.fidelity(computed, *fit.states(computed))))

    best = max(fit.promising(evaluations), key=score)
    if score(best) < least_db - QUICK_DB:
        return None
    improved = True
    while improved:
        fit.keep(best)
        improved = False
        for moved in _neighbours(best, fit.calls):
            if score(moved) > score(best):
                best, improved = moved, True
                break
    return best


def _neighbours(computed: Computed, calls: int) -> Iterator[Computed]:
    """One call, or it and all later ones, moved by one or two; the last ones first, whose fits share most."""
    for m, by in itertools.product(range(len(computed) - 1, 0, -1), MOVES):
        for until in {m + 1, len(computed)}:
            moved = (*computed[:m], *[call + by for call in computed[m:until]], *computed[until:])
            if moved[-1] < calls and all(a < b for a, b in itertools.pairwise(moved)):
                yield moved


def fitted(fitting: Fit, validation: Fit, evaluations: int | None, budget_db: float | None = None) -> Fitted:
    """The best schedule of so many computed calls, or the one of the fewest whose fidelity is budget_db. Deterministic
    if sampling is. ValueError where there is none, or it is worse than the polynomial on the pictures of `validation`.
    """
    calls = fitting.calls
    if evaluations is not None and not 2 <= evaluations <= calls:
        raise ValueError(f"evaluations={evaluations} is not allowed; give 2 to {calls} for runs of {calls} calls")
    found = None
    for count in range(2, calls) if evaluations is None else (evaluations,):
        least_db = -math.inf if budget_db is None else budget_db
        if (computed := search(fitting, count, least_db)) is not None:
            found = _finished(fitting, validation, computed)
            if found.validation_db >= least_db:
                break
    else:
        most = max(db for db in fitting.known.values() if isinstance(db, float))
        text = f"with up to {calls - 1} computed calls is {most:.1f} dB; give less, or more steps"
        raise ValueError(f"no schedule of {calls} calls has {budget_db:g} dB: the most that was found {text}")
    if found.validation_db <= found.polynomial_db:
        text = f"{found.validation_db:.1f} dB on other pictures, and the polynomial reaches {found.polynomial_db:.1f}"
        raise ValueError(f"the fit reaches {text}: it is of no use; give more images")
    return found


def _finished(fitting: Fit, validation: Fit, computed: Computed) -> Fitted:
    """End fits as long as they gain on other pictures."""
    start = rows = fitting.states(computed)[0]
    best_db = validation.fidelity(computed, rows)
    columns = functools.cache(lambda: fitting.jacobian(computed, start))
    for step in range(END_STEPS):
        name = f"{pattern(computed, fitting.calls)} end {step}"
        new = fitting.once(name, functools.partial(fitting.end, computed, rows, columns))
        if (db := validation.fidelity(computed, new)) <= best_db:
            break
        rows, best_db = new, db
    rows = [[round(weight, 7) for weight in row] for row in rows]
    return Fitted(computed, rows, fitting.fidelity(computed, rows), best_db, validation.fidelity(computed))


def pattern(computed: Computed, calls: int) -> str:
    return "".join(UPDATE if call in computed else FORECAST for call in range(calls))
