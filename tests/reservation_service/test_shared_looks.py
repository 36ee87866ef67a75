"""Looks that several threads want at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event

import pytest

from reservation_service import shared_looks
from reservation_service.shared_looks import SharedLooks
from tests.waiting import wait_until

WAIT_S = 10.0


class Watched:
    """Looks that wait until they are let go on, and are numbered."""

    def __init__(self) -> None:
        self.looks = SharedLooks()
        self.begun: list[Event] = []
        self._numbers = count()
        self.fails = False

    def __call__(self) -> int:
        number, may_end = next(self._numbers), Event()
        self.begun.append(may_end)
        assert may_end.wait(WAIT_S)
        if self.fails:
            raise ValueError(number)
        return number

    def share(self, what: str = "hall") -> int:
        return self.looks.share(what, self)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def await_looks(watched: Watched, number: int) -> None:
    wait_until(lambda: len(watched.begun) == number, WAIT_S, f"look {number} has begun")


def await_sharers(watched: Watched, number: int) -> None:
    """Wait until so many, beside the one who will look, wait for the next look at the hall."""

    def sharers() -> int:
        future = watched.looks._next.get("hall")
        return len(future._condition._waiters) if future else 0  # type: ignore[attr-defined]

    wait_until(lambda: sharers() == number, WAIT_S, f"{number} share the next look")


def test_who_comes_during_a_look_shares_the_next_and_never_that_one(
    threads: ThreadPoolExecutor,
) -> None:
    watched = Watched()
    first = threads.submit(watched.share)
    await_looks(watched, 1)
    later = [threads.submit(watched.share) for _ in range(5)]
    await_sharers(watched, 4)
    watched.begun[0].set()
    await_looks(watched, 2)
    watched.begun[1].set()
    assert first.result(WAIT_S) == 0
    assert {call.result(WAIT_S) for call in later} == {1}
    assert not watched.looks._under_way
    assert not watched.looks._next


def test_different_things_are_looked_at_side_by_side(threads: ThreadPoolExecutor) -> None:
    watched = Watched()
    calls = [threads.submit(watched.share, what) for what in ("hall", "garden")]
    await_looks(watched, 2)
    for may_end in watched.begun:
        may_end.set()
    assert {call.result(WAIT_S) for call in calls} == {0, 1}


def test_all_who_share_a_look_are_told_why_it_failed_and_the_next_is_not(
    threads: ThreadPoolExecutor,
) -> None:
    watched = Watched()
    watched.fails = True
    first = threads.submit(watched.share)
    await_looks(watched, 1)
    later = [threads.submit(watched.share) for _ in range(3)]
    await_sharers(watched, 2)
    watched.begun[0].set()
    await_looks(watched, 2)
    watched.begun[1].set()
    assert str(first.exception(WAIT_S)) == "0"
    assert {str(call.exception(WAIT_S)) for call in later} == {"1"}
    watched.fails = False
    after = threads.submit(watched.share)
    await_looks(watched, 3)
    watched.begun[2].set()
    assert after.result(WAIT_S) == 2


def test_nobody_waits_for_ever_for_who_does_not_come_back(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_looks, "TIMEOUT_S", 0.2)
    watched = Watched()
    stuck = threads.submit(watched.share)
    await_looks(watched, 1)
    later = [threads.submit(watched.share) for _ in range(3)]
    assert {type(call.exception(WAIT_S)) for call in later} == {TimeoutError}
    watched.begun[0].set()
    assert stuck.result(WAIT_S) == 0
    assert not watched.looks._under_way
    assert not watched.looks._next
