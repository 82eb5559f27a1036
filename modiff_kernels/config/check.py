"""What the values of this package share: checks, and tables as text."""

import json
from collections.abc import Collection, Sequence
from typing import Any


def is_int(value: Any, least: int) -> bool:
    """Whether `value` is a whole number of at least `least`; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def not_allowed(what: str, field: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{what}: {field}={value!r} is not allowed; give {allowed}")


def read_json(what: str, text: str) -> Any:
    """The value of a JSON text, which should be a `what`; ValueError where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: the text is not JSON ({error}); give what to_json() returns") from error


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] | None = None) -> str:
    """Table in plain text of cells that are strings. left: names of columns aligned to the left, None: the first."""
    left = header[:1] if left is None else left
    columns = []
    for name, *cells in zip(header, *rows, strict=True):
        width = max(map(len, (name, *cells)))
        align = str.ljust if name in left else str.rjust
        columns.append([align(cell, width) for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))
