"""Choices that were measured per GPU and problem shape, as JSON files that ship with the package.

`tools/tune_triton.py` and `tools/tune_cuda.py` make them, backends read them; nothing is ever measured inside a user's
run. Shapes and choices are NamedTuples; a shape's field `m` is the number of rows of the result.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

NEAREST_FACTOR = 2.0
"""A choice serves shapes with up to this many times more or fewer rows; the number of rows alone may differ."""

ShapeT = TypeVar("ShapeT", bound=NamedTuple)
ChoiceT = TypeVar("ChoiceT", bound=NamedTuple)


@dataclass(frozen=True)
class Store(Generic[ShapeT, ChoiceT]):
    """The files of one backend: shape -> choice, a file per GPU in `folder`."""

    folder: Path
    shape: Callable[..., ShapeT]
    choice: Callable[..., ChoiceT]

    def path(self, gpu_name: str) -> Path:
        return self.folder / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")

    @cache  # noqa: B019 (stores live as long as the process)
    def load(self, gpu_name: str) -> dict[ShapeT, ChoiceT]:
        """The choices for a GPU, read once in a process; empty if it was never tuned. Not to be changed."""
        path = self.path(gpu_name)
        entries = json.loads(path.read_text())["choices"] if path.exists() else []
        return {self.shape(**entry["shape"]): self.choice(**entry["config"]) for entry in entries}

    def save(self, choices: Mapping[ShapeT, ChoiceT], gpu_name: str, about: Mapping[str, str]) -> Path:
        """Write the choices for a GPU, ordered by shape, whole or not at all; `about`: versions and command."""
        path = self.path(gpu_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"shape": shape._asdict(), "config": choices[shape]._asdict()} for shape in sorted(choices)]
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"gpu": gpu_name, **about, "choices": entries}, indent=1) + "\n")
        part.replace(path)
        return path

    @cache  # noqa: B019 (likewise)
    def nearest(self, shape: ShapeT, gpu_name: str) -> ChoiceT | None:
        """The choice for `shape`, or for the one that differs in m alone and the least, up to NEAREST_FACTOR."""
        wanted: Any = shape
        choices: dict[Any, ChoiceT] = self.load(gpu_name)
        alike = [known for known in choices if known._replace(m=wanted.m) == wanted]
        known = min(alike, key=lambda known: abs(math.log2(known.m / wanted.m)), default=None)
        near = known is not None and abs(math.log2(known.m / wanted.m)) <= math.log2(NEAREST_FACTOR)
        return choices[known] if near else None
