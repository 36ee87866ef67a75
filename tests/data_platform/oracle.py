"""Judges records by what is published alone, knowing nothing of the worker's own decoder.

A good record is one that the JSON Schema in `contracts/` takes, and for which these hold too:
- key, `subject` and the id in `data` are the same, and `id` is `<it>:<version>`;
- the value is UTF-8 throughout; no text in it, wherever, holds U+0000 or a lone surrogate;
- an integer is written as one (`1`, not `1.0`);
- a time is a moment between the years 1 and 9999, without leap seconds, with `T`, `Z` and at most
  18 digits after the point.
Where a name stands twice in an object the last one counts. JSON leaves open what that means, so the
worker may put such a record aside too (`unclear`).

JSON Schema's patterns are ECMAScript's: `$` is the end, not the place before a last newline.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema

CONTRACTS = Path(__file__).parents[2] / "contracts"
TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,18})?Z", re.ASCII)
LONGEST_NUMBER_DIGITS = 400
FORBIDDEN = re.compile("[\0\ud800-\udfff]")


class Judge:
    """Judges the records of one topic.

    Args:
        schema: the schema's file name in `contracts/`.
        name: the field of `data` that is also `subject` and key.
    """

    def __init__(self, schema: str, name: str) -> None:
        self._name = name
        document = json.loads((CONTRACTS / schema).read_text(encoding="utf-8"))
        formats = jsonschema.FormatChecker(formats=())
        formats.checks("date-time")(_is_moment)
        draft = jsonschema.Draft202012Validator
        strict: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
            draft,
            {"pattern": _pattern},
            type_checker=draft.TYPE_CHECKER.redefine(
                "integer",
                lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            ),
        )
        self._validator = strict(document, format_checker=formats)

    def good(self, key: bytes | None, value: bytes | None) -> dict[str, Any] | None:
        """Return what a good record says, or None."""
        try:
            envelope = _parsed(value, dict)
        except (ValueError, RecursionError):
            return None
        if any(FORBIDDEN.search(text) for text in _texts(envelope)):
            return None
        if not self._validator.is_valid(envelope):
            return None
        data = envelope["data"]
        subject = str(data[self._name])
        if (envelope["subject"], envelope["id"]) != (subject, f"{subject}:{data['version']}"):
            return None
        return dict(envelope) if key == subject.encode() else None


def unclear(value: bytes | None) -> bool:
    """Whether a name stands twice in one object of a value that is JSON."""
    twice = False

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len(dict(pairs)) < len(pairs)
        return dict(pairs)

    _parsed(value, make)
    return twice


def moment(text: str) -> datetime | None:
    """Read a time as Postgres does, to the microsecond; None when it is none."""
    match = TIME.fullmatch(text)
    try:
        whole = datetime.fromisoformat(match[1]).replace(tzinfo=UTC) if match else None
    except ValueError:
        return None
    if match is None or whole is None:
        return None
    return whole + timedelta(microseconds=round(float(f"0{match[2] or '.0'}") * 1e6))


def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or moment(value) is not None


def _pattern(
    _validator: object, pattern: str, text: object, _schema: object
) -> Iterator[jsonschema.ValidationError]:
    if isinstance(text, str) and not re.search(pattern.replace("$", r"\Z"), text):
        yield jsonschema.ValidationError("pattern")


def _parsed(value: bytes | None, make: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    return json.loads(
        (value or b"").decode("utf-8"),
        parse_constant=_refuse,
        parse_int=_integer,
        object_pairs_hook=make,
    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names included. Without recursion: it may be deep."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _integer(digits: str) -> int:
    # Python refuses to read very long ones; all that matters is that it is beyond all bounds.
    return int(digits[:LONGEST_NUMBER_DIGITS])
