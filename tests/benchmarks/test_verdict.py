"""A run whose events are not all there, once and in order, is told from one whose are."""

import pytest

from benchmarks import events
from benchmarks.arrivals import Verdict

HELD, COMPLETED = (
    payload.encode() for template, _, payload, _ in events.templates(1) if template == 0
)


def verdict_of(*records: tuple[bytes, bytes]) -> Verdict:
    verdict = Verdict(expected=4)
    for at, (key, payload) in enumerate(records):
        verdict.add(key, payload, append_s=100.0 + at)
    return verdict


def test_every_event_once_and_in_order_is_right() -> None:
    verdict = verdict_of((b"a", HELD), (b"b", HELD), (b"a", COMPLETED), (b"b", COMPLETED))
    assert verdict.right
    assert (verdict.first_append_s, verdict.last_append_s) == (100.0, 103.0)


@pytest.mark.parametrize(
    ("records", "summary"),
    [
        ([(b"a", HELD), (b"a", COMPLETED), (b"b", HELD)], {"lost": 1}),
        (
            [(b"a", HELD), (b"a", HELD), (b"a", COMPLETED), (b"b", HELD), (b"b", COMPLETED)],
            {"doubled": 1},
        ),
        ([(b"a", HELD), (b"a", COMPLETED), (b"b", COMPLETED)], {"lost": 1, "reordered": 1}),
    ],
    ids=["lost", "doubled", "first version missing"],
)
def test_what_is_wrong_is_counted(
    records: list[tuple[bytes, bytes]], summary: dict[str, int]
) -> None:
    verdict = verdict_of(*records)
    assert not verdict.right
    assert verdict.summary() == {"lost": 0, "doubled": 0, "reordered": 0} | summary


def test_two_events_in_the_wrong_order_are_noticed() -> None:
    assert not verdict_of((b"a", COMPLETED), (b"a", HELD), (b"b", HELD), (b"b", COMPLETED)).right
