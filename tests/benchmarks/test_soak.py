"""What a soak calls flat, and what not."""

from typing import Any

import pytest

from benchmarks.soak import problems
from devstack.processes import DevstackError

FLAT: dict[str, Any] = {
    "failed": 0,
    "behind": 10,
    "per_s": 299.0,
    "p99_ms": 20.0,
    "relay MiB": 60.0,
    "relay files": 20,
    "kafka files": 100,
    "outbox bytes": 1500.0,
}


def hour(last: dict[str, Any]) -> list[dict[str, Any]]:
    """Sixty slices, of which the last quarter is otherwise."""
    return [FLAT] * 45 + [FLAT | last] * 15


def test_an_hour_without_a_change_is_flat() -> None:
    assert problems(hour({}), 300) == []


@pytest.mark.parametrize(
    "last",
    [
        {"failed": 1},
        {"behind": 1_501},
        {"p99_ms": 36.0},
        {"relay MiB": 67.5},
        {"relay files": 29},
        {"outbox bytes": 1_660.0},
    ],
    ids=str,
)
def test_what_grows_is_named(last: dict[str, Any]) -> None:
    assert len(problems(hour(last), 300)) == 1


def test_what_servers_keep_open_grows_with_what_they_keep() -> None:
    assert problems(hour({"kafka files": 140}), 300) == []


def test_a_rate_that_was_not_reached_proves_nothing() -> None:
    assert problems([FLAT | {"per_s": 280.0}] * 60, 300) == ["only 280 bookings a second of 300"]


def test_too_short_a_soak_tells_nothing() -> None:
    with pytest.raises(DevstackError, match="longer"):
        problems([FLAT] * 3, 300)
