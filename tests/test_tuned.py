"""Measured choices: what is saved is loaded, and near shapes alone are served."""

import json
from typing import NamedTuple

import pytest

from modiff_kernels import tuned


class Shape(NamedTuple):
    m: int
    n: int


class Choice(NamedTuple):
    tile: int


@pytest.fixture
def store(tmp_path):
    return tuned.Store(tmp_path / "choices", Shape, Choice)


def test_what_is_saved_is_loaded(store):
    assert store.load("another GPU") == {}
    choices = {Shape(9, 2): Choice(3), Shape(4, 2): Choice(1)}
    path = store.save(choices, "NVIDIA H200", {"torch": "2.11"})
    assert path == store.folder / "nvidia-h200.json"
    text = json.loads(path.read_text())
    assert (text["gpu"], text["torch"]) == ("NVIDIA H200", "2.11")
    assert [entry["shape"]["m"] for entry in text["choices"]] == [4, 9]
    assert store.load("NVIDIA H200") == choices


def test_the_nearest_of_several_is_taken(store):
    for m, n, nearest in ((1300, 8, 1500), (1100, 8, 1024), (4500, 8, 9000), (4000, 8, None), (1024, 16, None)):
        store.save({Shape(known, 8): Choice(known) for known in (1024, 1500, 9000)}, "gpu", {})
        assert store.nearest(Shape(m, n), "gpu") == (nearest and Choice(nearest))
        assert store.nearest(Shape(1024, 8), "another GPU") is None
