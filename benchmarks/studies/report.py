"""The JSON report of a study: written after every row, gone on with by --resume."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modiff_kernels.evaluation import to_json

PLACES = ("--json", "--keep", "--budget", "--data", "--features")
FLAGS = ("--resume", "--quiet")
"""Options that do not change rows: those with a value, and those without."""


def command(arguments: Sequence[str]) -> str:
    """The command of a report: without what does not change rows, and without the places of files."""
    kept, before = ["python", "-m", "benchmarks"], ""
    for item in arguments:
        skipped = before in PLACES or item.partition("=")[0] in (*PLACES, *FLAGS)
        if not skipped:
            kept.append("CODES" if before == "--codes" and Path(item).is_dir() else item)
        before = item
    return shlex.join(kept)


class Report:
    """The report at `path`: `same` and `more` fields, the commands it was made by, and rows, told apart by `key`.

    resume: goes on with the one that is there. SystemExit if a field of `same` is another one in it."""

    def __init__(
        self, path: Path, resume: bool, same: Mapping[str, Any], more: Mapping[str, Any], key: Sequence[str]
    ) -> None:  # fmt: skip
        self.path, self.key = path, key
        self.content: dict[str, Any] = {**same, "commands": [], **more, "rows": []}
        if resume and path.exists():
            kept = json.loads(path.read_text())
            for name, value in same.items():
                if kept[name] != value:
                    raise SystemExit(
                        f"--resume: {path} has {name} {kept[name]!r}, this run {value!r}; repeat its command, or leave "
                        "--resume out to measure everything anew"
                    )
            self.content |= kept
        text = command(sys.argv[1:])
        if text not in self.content["commands"]:
            self.content["commands"].append(text)
        self.content.setdefault("command", text)
        self.known = {self.key_of(row) for row in self.rows}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self.known.add(self.key_of(row))
        self.write()

    def write(self) -> None:
        """The file is whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(to_json(self.content))
        new.replace(self.path)
