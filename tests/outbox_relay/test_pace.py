"""How long a lane rests between steps."""

import pytest

from outbox_relay import pace
from outbox_relay.pace import Pace


class Clock:
    """The time as the pace sees it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def rest_at(rows_per_s: int, clock: Clock) -> list[float]:
    """Return the rests of a second in which a step takes 2 ms and so many rows come."""
    found: list[float] = []
    pending, until_s = 0.0, clock.now_s + 1
    of_lane = Pace()
    while clock.now_s < until_s:
        clock.now_s += 0.002
        pending += rows_per_s * (0.002 + (found[-1] if found else 0.0))
        rows, pending = int(pending), pending % 1
        found.append(of_lane.rest_s(rows))
        clock.now_s += found[-1]
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("outbox_relay.pace.time.monotonic", clock.monotonic)
    return clock


@pytest.mark.parametrize("rows_per_s", [1, 500, 2_000])
def test_what_comes_at_a_moderate_rate_is_never_kept_waiting(clock: Clock, rows_per_s: int) -> None:
    assert max(rest_at(rows_per_s, clock)) == pace.SHORTEST_S


def test_the_more_comes_the_longer_a_lane_collects_but_not_beyond_its_limit(clock: Clock) -> None:
    rests = [rest_at(rows_per_s, clock)[-1] for rows_per_s in (2_000, 2_700, 3_000, 8_000, 90_000)]
    assert rests == sorted(rests)
    assert rests[0] < rests[1] < rests[2] < rests[3]
    assert rests[3] == rests[4] == pace.LONGEST_S


def test_a_burst_is_forgotten_as_soon_as_it_is_over(clock: Clock) -> None:
    of_lane = Pace()
    clock.now_s += 0.01
    of_lane.rest_s(1_000)
    clock.now_s += pace.MEMORY_S
    assert of_lane.rest_s(1) == pace.SHORTEST_S
