"""The tuner: refuses without a GPU, never times a wrong candidate, keeps the fastest and a row of each, in order and
within its budget. Its clock is a stand-in, its backend a made-up one on the CPU.
"""

import sys
from typing import NamedTuple

import pytest
import torch

from benchmarks import record, tile_tuning
from benchmarks.budget import Budget
from benchmarks.product_cases import Problem
from benchmarks.shapes import Layer
from benchmarks.tile_tuning import OP, OVER_BEST, Scratch, Tuner
from modiff_kernels.backends import cuda, reference, triton
from modiff_kernels.quant.packing import KPACK_V1
from modiff_kernels.tuned import Store
from tools import tune_cuda, tune_triton

CPU = torch.device("cpu")
LAYERS = [Layer("conv", 32, 24, 4, 4, 3, 1, 1), Layer("linear", 64, 40, 16, 1, 1)]
PROBLEMS = [Problem(LAYERS[0], 3, 0.6), Problem(LAYERS[1], 2, 0.4)]


class Shape(NamedTuple):
    m: int
    weight_bits: int


class Tile(NamedTuple):
    side: int
    parts: int = 1

    def __str__(self):
        return f"{self.side}-k{self.parts}"


class Products:
    """Tiles of any side, all of which compute as the reference does, but for `wrong` ones."""

    name = "made_up"
    tiles = (Tile(64), Tile(128), Tile(64, 2), Tile(64, 4))

    def __init__(self, folder, wrong=()):
        self.store, self.wrong = Store(folder, Shape, Tile), wrong

    def shape(self, scratch):
        return Shape(scratch.y_hat.numel() // len(scratch.weight[1]), scratch.weight_bits)

    def candidates(self, scratch):
        return self.tiles

    def cut(self, candidate):
        return candidate.side, candidate.parts

    def update(self, scratch, candidate):
        function = reference.accumulate_linear if scratch.conv is None else reference.accumulate_conv2d

        def call():
            function(
                scratch.codes, scratch.scale, *scratch.weight, scratch.y_hat, None, scratch.weight_bits, -1, KPACK_V1,
                *(scratch.conv or ()), torch.float16, False,
            )  # fmt: skip
            if candidate in self.wrong:
                scratch.y_hat[1, -1] += 1

        return call


def tuner_of(backend, times, batches, saved=None, **more):
    times = iter(times)
    return Tuner(
        backend, {}, CPU, "made-up GPU", lambda call: [next(times)], batches.append,
        (saved if saved is not None else []).append, **more,
    )  # fmt: skip


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem.layer))
def test_the_fastest_is_kept_and_all_are_recorded(tmp_path, problem, weight_bits):
    batches, backend = [], Products(tmp_path)
    tuner = tuner_of(backend, (3.0, 1.0, 2.0), batches)
    assert tuner.run([problem], [weight_bits], Budget(None)) == 0
    assert tuner.choices == {Shape(16 * problem.batch if problem.layer == LAYERS[0] else 32, weight_bits): Tile(128)}
    (rows,) = batches
    times = {row["backend"]: row["p50"] for row in rows if row["metric"] == "time"}
    assert times == {"made_up-64-k1": 3.0, "made_up-128-k1": 1.0, "made_up-64-k2": 2.0}, "not four parts"
    chosen = rows[-1]
    assert (chosen["metric"], chosen["backend"], chosen["p50"]) == (OVER_BEST, "made_up-128-k1", 3.0)
    assert {row["op"] for row in rows} == {OP}
    record.append(rows, tmp_path / "rows.csv")


@pytest.mark.parametrize("tile", Products.tiles[:2])
def test_nothing_is_chosen_where_candidates_differ(tmp_path, tile, capsys):
    """In the middle of the batch, where the reference does not look: any of them may be wrong."""
    batches, saved = [], []
    tuner = tuner_of(Products(tmp_path, wrong=[tile]), (1.0, 2.0), batches, saved)
    tuner.run(PROBLEMS[:1], [8], Budget(None))
    assert tuner.wrong >= 1
    assert (batches, saved, tuner.choices) == ([], [], {})
    errors = capsys.readouterr().err
    assert "is not timed, WRONG sums" in errors
    assert "made_up has no choice for it, its candidates differ" in errors


def test_a_candidate_that_does_not_run_is_left_out(tmp_path, capsys):
    backend, batches = Products(tmp_path), []
    right = backend.update

    def update(scratch, candidate):
        if candidate.side != 128:
            return right(scratch, candidate)

        def call():
            raise ValueError("out of shared memory")

        return call

    backend.update = update
    tuner = tuner_of(backend, (3.0, 2.0), batches)
    tuner.run(PROBLEMS[:1], [8], Budget(None))
    assert list(tuner.choices.values()) == [Tile(64, 2)]
    assert tuner.wrong == 1
    assert "made_up-128-k1 is not timed, FAILED: out of shared memory" in capsys.readouterr().err


def test_sums_that_are_wrong_everywhere_are_refused(tmp_path):
    backend, batches, saved = Products(tmp_path), [], []
    scratch = Scratch(LAYERS[1], 2, 8, CPU)
    scratch.weight[0][0, 0] += 1
    assert not scratch.is_exact(backend.update(scratch, Tile(64)))
    tuner = tuner_of(backend, (), batches, saved)
    backend.update = lambda scratch, candidate: lambda: None
    tuner.run(PROBLEMS, [8], Budget(None))
    assert (batches, saved, tuner.choices, tuner.wrong) == ([], [], {}, 6)


def test_parts_are_looked_for_around_the_estimate():
    candidates = [
        Tile(64, 4),
        Tile(128, 1),
        *[Tile(64, parts) for parts in (5, 3, 2, 8, 1)],
        Tile(128, 2),
        Tile(128, 3),
    ]
    kept = tile_tuning.shortlist(candidates, lambda tile: (tile.side, tile.parts))
    assert kept == [Tile(64, 4), Tile(128, 1), Tile(64, 2), Tile(64, 8), Tile(128, 2)]


def test_budget_and_what_was_recorded(tmp_path):
    path, batches, saved, now = tmp_path / "rows.csv", [], [], [0.0]
    times = (1.0,) * 99

    def timer(call):
        now[0] += 1
        return [1.0]

    tuner = tuner_of(Products(tmp_path), times, batches, saved)
    tuner.timer = timer
    assert tuner.run(PROBLEMS, [8, 4], Budget(5, lambda: now[0])) == 2, "between problems of three candidates"
    assert len(saved) == 2, "choices are saved as they are made"
    for rows in batches:
        record.append(rows, path)
    rows = record.read(path)
    done = tile_tuning.tuned_problems(rows, "made_up", rows[0]["git_commit"])
    assert done == {problem.name(bits) for problem in PROBLEMS[:1] for bits in (8, 4)}
    assert tile_tuning.tuned_problems(rows, "another", rows[0]["git_commit"]) == set()
    again = tuner_of(Products(tmp_path), times, batches, done=done)
    assert again.run(PROBLEMS, [8, 4], Budget(None)) == 0
    assert len(batches) == 4


def test_the_program_from_its_arguments_to_its_files(monkeypatch, tmp_path, capsys):
    """On the CPU in the place of a GPU."""
    path = tmp_path / "gpu.csv"
    monkeypatch.setattr(tile_tuning, "current_gpu", lambda: (CPU, "made-up GPU"))
    monkeypatch.setattr(tile_tuning, "ColdTimer", lambda rounds, seconds: lambda call: [2.0])
    monkeypatch.setattr(tile_tuning, "problems_by_share", lambda *arguments: PROBLEMS)
    monkeypatch.setattr(record, "results_file", lambda device: path)
    backend = Products(tmp_path)

    def run(*arguments):
        return tile_tuning.main([*arguments], "", None, lambda device: backend, lambda: {"compiler": "1"})

    assert run("--dry-run", "--weight-bits", "4") == 0
    assert not backend.store.path("made-up GPU").exists()
    assert run("--record", "--most", "1") == 0
    assert '"compiler": "1"' in backend.store.path("made-up GPU").read_text()
    assert len({row["problem"] for row in record.read(path)}) == 1
    assert run("--record", "--skip-recorded", "--budget", "0") == 3
    assert "1 problems left" in capsys.readouterr().out


@pytest.mark.parametrize(("tool", "backend"), [(tune_triton, triton), (tune_cuda, cuda)])
def test_without_a_gpu_it_says_why(capsys, monkeypatch, tool, backend):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py"])
    assert tool.main([]) == 2
    assert f"nothing to tune here: {backend.unavailable()}" in capsys.readouterr().err
