"""Checks that the values of this package share."""

import json
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
