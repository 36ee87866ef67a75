"""The fault audit finds what is wrong: a lost, a doubled, a reordered event, an older state."""

import math
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from benchmarks import fault_loaders, report, topic
from benchmarks.faults import SCRIPT, Strike, lateness, meanwhile, strike
from benchmarks.results import Results, wrong
from tests.outbox_relay.writers import Verdict, compare

COMMITTED = {("a", 1), ("a", 2), ("b", 1)}
ALL = [("a", 1), ("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("published", "found"),
    [
        (ALL, {}),
        ([("a", 1), ("b", 1)], {"lost": 1}),
        ([*ALL, ("a", 1)], {"doubled": 1}),
        ([("a", 2), ("b", 1), ("a", 1)], {"reordered": 1}),
        ([("a", 2), ("b", 1), ("a", 1), ("a", 2)], {"reordered": 1, "doubled": 1}),
        ([*ALL, ("a", 3)], {"invented": 1}),
    ],
)
def test_a_publisher_is_judged_by_what_was_committed(
    published: list[tuple[str, int]], found: dict[str, int]
) -> None:
    nothing = {"lost": 0, "invented": 0, "reordered": 0, "doubled": 0}
    assert compare(COMMITTED, published) == Verdict(3, **(nothing | found))


@pytest.mark.parametrize(
    ("states", "facts", "found"),
    [
        ({"a": 2, "b": 1}, dict.fromkeys(COMMITTED, 1), (0, 0, 0)),
        ({"a": 1, "b": 1}, dict.fromkeys(COMMITTED, 1), (0, 1, 0)),
        ({"a": 2}, dict.fromkeys(COMMITTED, 1), (1, 0, 0)),
        ({"a": 2, "b": 1}, {("a", 2): 1, ("b", 1): 1}, (1, 0, 0)),
        ({"a": 2, "b": 1}, dict.fromkeys(COMMITTED, 1) | {("a", 1): 3}, (0, 0, 2)),
        ({"a": 2, "b": 1}, None, (0, 0, None)),
    ],
    ids=["right", "an older state", "a lost state", "a lost fact", "doubled facts", "no facts"],
)
def test_a_loader_is_judged_by_what_the_topic_tells(
    states: dict[str, int],
    facts: dict[tuple[str, int], int] | None,
    found: tuple[int, int, int | None],
) -> None:
    names = ("lost", "stale", "doubled")
    assert fault_loaders.compare(COMMITTED, states, facts) == dict(zip(names, found, strict=True))


def test_the_topic_has_older_versions_behind_newer_ones_and_every_event_in_order_before() -> None:
    records = list(topic.records(10_000, held_for=fault_loaders.HELD_FOR_RESERVATIONS))
    assert len({(r.reservation, r.version) for r in records}) == 10_000
    seen: set[tuple[str, int]] = set()
    latest: dict[str, int] = {}
    first_seen: list[topic.Record] = []
    older_again = 0
    for record in fault_loaders.repeating(records):
        if (record.reservation, record.version) in seen:
            older_again += record.version < latest[record.reservation]
        else:
            first_seen.append(record)
        seen.add((record.reservation, record.version))
        latest[record.reservation] = record.version
    assert first_seen == records
    assert older_again > 50
    # Whoever takes whatever comes last is left with older versions.
    assert fault_loaders.compare(seen, latest, None)["stale"] == older_again


def test_faults_come_in_their_order_and_are_told_how_long_they_last() -> None:
    told = deque[tuple[str, float]]()
    script = [Strike("a", 0.1), Strike("b", 0.5, 0.25)]
    deeds = {"a": lambda s: told.append(("a", s)), "b": lambda s: told.append(("b", s))}
    began = time.monotonic()
    struck = strike(script, 0.04, deeds)
    assert time.monotonic() - began >= 0.04
    assert list(told) == [("a", 0.0), ("b", 0.01)]
    assert [name for name, _ in struck] == ["a", "b"]
    assert struck[1][1] - began >= 0.02
    assert [one.at for one in SCRIPT] == sorted(one.at for one in SCRIPT)


def test_nobody_is_struck_again_before_he_works_unless_the_script_wants_it() -> None:
    began = time.monotonic()
    script = [Strike("a", 0.0), Strike("b", 0.1, at_once=True), Strike("c", 0.2)]
    deeds = dict.fromkeys("abc", lambda _: None)
    struck = dict(strike(script, 0.01, deeds, lambda _: time.monotonic() - began > 0.3))
    # Asked before the first one, too: it has to be at work when it is struck.
    assert struck["a"] - began > 0.3
    asked = deque[float]()

    def works_since(since: float) -> bool:
        asked.append(since)
        return len(asked) > 5

    strike(script, 0.01, deeds, works_since)
    assert asked[0] == -math.inf
    assert asked[-1] > began  # the end of what was struck last


def test_lateness_is_told_of_the_fault_around_which_an_event_was_committed() -> None:
    struck = [("killed", 10.0), ("frozen", 20.0)]
    committed = {("before", 1): 5.0, ("under way", 1): 9.5, ("a", 1): 12.0, ("b", 1): 21.0}
    arrived = {("before", 1): 9.0, ("under way", 1): 13.5, ("a", 1): 12.1, ("b", 1): 30.0}
    assert lateness(struck, committed, arrived) == {"killed": 4.0, "frozen": 9.0}


def test_what_fails_meanwhile_is_raised() -> None:
    def work(ended: threading.Event) -> None:
        ended.wait()
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"), meanwhile(work):
        pass


def test_only_what_was_promised_is_wrong() -> None:
    assert wrong({"doubled": 3, "stale": 1}) == "3 doubled, 1 stale"
    assert wrong({"lost": 1, "doubled": 3, "promised": ["lost", "reordered"]}) == "1 lost"
    assert not wrong({"lost": 1, "doubled": 3, "promised": []})


def test_the_table_shows_who_is_best_at_what_even_if_it_is_a_peer(tmp_path: Path) -> None:
    audited = {"section": "faults", "lost": 0, "doubled": 0, "reordered": 0, "latest_s": 9.0}
    cpu = {"cpu_us_per_event": 5.0, "postgres_cpu_s": 10 * 2e-6, "kafka_cpu_s": 10 * 1e-6}
    drained = {"section": "drain", "open_transaction": False, **cpu}
    figures = [
        audited | {"contender": "exactly_once"},
        audited | {"contender": "polling", "doubled": 7, "latest_s": 2.0},
        drained | {"contender": "exactly_once", "rows": 10, "events_per_s": 50, "peak_mib": 90},
        drained | {"contender": "debezium", "rows": 10, "events_per_s": 20, "peak_mib": 900},
        drained | {"contender": "exactly_once", "rows": 100, "events_per_s": 60, "peak_mib": 1},
    ]
    origins = {"drain": {"date": "2027-01-31", "size": "quick", "commit": "abc"}}
    told = report.beside(Results(tmp_path / "run.json", figures=figures, origins=origins))
    assert told.endswith("\n\nSections: *drain*: 2027-01-31, size quick, commit abc.")
    lines = {line.split(" | ")[0]: line for line in told.splitlines()}
    ours, debezium, polling = (
        lines[f"| {report.PUBLISHERS[name]}"] for name in ("exactly_once", "debezium", "polling")
    )
    assert ours.endswith("| **50** | - | - | 5.0 | 8.0 | **90** | 0 | **0** | 0 | 9.0 |")
    assert debezium.endswith("| 20 | - | - | 5.0 | 8.0 | 900 | - | - | - | - |")
    assert polling.endswith("| - | - | - | - | - | - | 0 | 7 | 0 | **2.0** |")
