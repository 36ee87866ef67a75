"""Dead letters are loaded again once they can be; nothing else changes."""

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from confluent_kafka import Message

from data_platform import dead_letters, logs, sql_dead_letters, star
from data_platform.__main__ import main
from data_platform.batch import Row
from data_platform.dead_letters import Place, Replayed, Scope
from data_platform.errors import RivalError
from data_platform.events import ReservationEvent, decode_reservation_event
from data_platform.loader import prepare
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import (
    FACTS,
    STATES,
    Event,
    event,
    expected_facts,
    expected_states,
    history,
)
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

TOPIC = "t"
DECODERS = {TOPIC: decode_reservation_event}
NOBODY_CALLED_X = (
    "ALTER TABLE analytics.fct_reservations"
    " ADD CONSTRAINT nobody_called_x CHECK (customer_id <> 'x')"
)
# Not `complete_up_to`, which goes on by itself.
OFFSETS = """
SELECT topic, kafka_partition, next_offset, topic_id FROM analytics.load_offsets
ORDER BY topic, kafka_partition
"""
ALL_LETTERS = """
SELECT topic, kafka_partition, kafka_offset, raw_key, raw_value, raw_headers, reason, error,
    first_seen_at
FROM analytics.dead_letters ORDER BY topic, kafka_partition, kafka_offset
"""


def put(
    database: AnalyticsDatabase,
    records: Sequence[tuple[bytes | None, bytes | None]],
    topic: str = TOPIC,
    reason: str = "schema",
) -> None:
    """Put records into dead_letters, as of yesterday, at offsets from 0 of partition 0."""
    with psycopg.connect(database.owner_url) as owner:
        owner.cursor().executemany(
            "INSERT INTO analytics.dead_letters VALUES"
            " (%s, 0, %s, %s, %s, '[[\"h\", null]]', %s, 'e', now() - interval '1 day')",
            [(topic, offset, key, value, reason) for offset, (key, value) in enumerate(records)],
        )


def of(events: Sequence[Event]) -> list[tuple[bytes | None, bytes | None]]:
    return [(one.key, one.value) for one in events]


def rows(database: AnalyticsDatabase, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.owner_url) as connection:
        return connection.execute(query).fetchall()


def replay(database: AnalyticsDatabase, scope: Scope | None = None, **more: bool) -> Replayed:
    return dead_letters.replay(database.loader_url, scope or Scope(), DECODERS, **more)


def test_what_the_worker_put_aside_is_loaded_once_the_cause_is_mended(platform: Platform) -> None:
    platform.execute(NOBODY_CALLED_X)
    good = history(30, seed=41)
    refused = [event(customer_id="x") for _ in range(20)]
    platform.produce([*good[:30], *refused, *good[30:]])
    platform.produce_raw([(None, b""), (b"", None)], partition=1, headers=[("a", None)])
    worker = platform.worker()
    platform.wait_for_offsets(len(good) + len(refused) + 2)
    offsets = platform.rows(OFFSETS)
    seen = platform.rows(ALL_LETTERS)
    assert len(seen) == 22

    not_yet = platform.command("dead-letters", "replay")
    assert (not_yet.returncode, not_yet.stdout[:22]) == (0, "0 loaded, 22 still bad")
    # The error tells the time of the attempt.
    assert [one[:7] for one in platform.rows(ALL_LETTERS)] == [one[:7] for one in seen]

    platform.execute("ALTER TABLE analytics.fct_reservations DROP CONSTRAINT nobody_called_x")
    done = platform.command("dead-letters", "replay", "--all", "--json")
    assert json.loads(done.stdout) == {"loaded": 20, "still_bad": 2, "not_read": 0, "busy": 0}
    assert platform.facts() == expected_facts([*good, *refused])
    assert platform.states() == expected_states([*good, *refused])
    # NULL is still NULL and empty is still empty.
    assert platform.rows(ALL_LETTERS) == [one for one in seen if one[3:5] in LAST]
    assert platform.rows(OFFSETS) == offsets
    assert worker.alive


LAST = [(None, b""), (b"", None)]


def test_a_replay_repeated_changes_nothing(analytics_database: AnalyticsDatabase) -> None:
    events = history(10, seed=42)
    put(analytics_database, of(events))
    assert replay(analytics_database) == Replayed(loaded=len(events))
    facts, states = rows(analytics_database, FACTS), rows(analytics_database, STATES)
    assert (facts, states) == (expected_facts(events), expected_states(events))
    put(analytics_database, of(events))  # as after a rebuild from the topic
    assert replay(analytics_database) == Replayed(loaded=len(events))
    assert replay(analytics_database) == Replayed()
    assert (rows(analytics_database, FACTS), rows(analytics_database, STATES)) == (facts, states)


def test_a_later_version_is_loaded_and_a_replayed_earlier_one_leaves_the_state_alone(
    platform: Platform,
) -> None:
    first = event("r-1", 1)
    broken = first.value.replace(b'"reservation.held"', b'"reservation.hold"')
    later = event("r-1", 2, "reservation.completed")
    platform.produce_raw([(first.key, broken), (later.key, later.value)])
    platform.worker()
    platform.wait_for_offsets(2)
    assert platform.facts() == [later.fact]
    assert [letter[3] for letter in platform.dead_letters()] == ["unknown-type"]
    before = platform.rows("SELECT * FROM analytics.fct_reservations")

    assert dead_letters.replay(
        platform.database.loader_url, Scope(), {platform.topic: upgraded}
    ) == Replayed(loaded=1)
    assert platform.facts() == [first.fact, later.fact]
    assert platform.rows("SELECT * FROM analytics.fct_reservations") == before  # loaded_at too


def upgraded(key: bytes | None, value: bytes | None) -> ReservationEvent:
    """What a later version of ours may read."""
    text = (value or b"").replace(b'"reservation.hold"', b'"reservation.held"')
    return decode_reservation_event(
        key, text.replace(b"reservation-event:2", b"reservation-event:1")
    )


def test_an_upgraded_worker_s_replay_loads_unknown_types_and_newer_schemas(
    analytics_database: AnalyticsDatabase,
) -> None:
    first, second, third = event(), event(), event()
    put(
        analytics_database,
        [
            (first.key, first.value.replace(b'"reservation.held"', b'"reservation.hold"')),
            (second.key, second.value.replace(b"event:1", b"event:2")),
            (third.key, third.value.replace(b"event:1", b"event:3")),
        ],
    )
    assert replay(analytics_database) == Replayed(still_bad=3)
    assert [letter[6] for letter in rows(analytics_database, ALL_LETTERS)] == [
        "unknown-type",
        "unknown-schema",
        "unknown-schema",
    ]
    done = dead_letters.replay(analytics_database.loader_url, Scope(), {TOPIC: upgraded})
    assert done == Replayed(loaded=2, still_bad=1)
    assert rows(analytics_database, FACTS) == expected_facts([first, second])


def test_those_still_bad_keep_all_but_reason_and_error(
    analytics_database: AnalyticsDatabase,
) -> None:
    put(analytics_database, [(None, None), (b"", b""), (b"\x00", b"\xff" * 10)])
    before = rows(analytics_database, ALL_LETTERS)
    assert replay(analytics_database) == Replayed(still_bad=3)
    after = rows(analytics_database, ALL_LETTERS)
    assert [(*one[:6], one[8]) for one in after] == [(*one[:6], one[8]) for one in before]
    assert [one[6] for one in after] == ["null-value", "not-json", "not-utf8"]
    assert "e" not in {one[7] for one in after}


def test_that_headers_could_not_be_kept_is_told_for_ever(
    analytics_database: AnalyticsDatabase,
) -> None:
    put(analytics_database, [(None, None)])
    told = "headers unreadable: 'utf-8'; x"
    with psycopg.connect(analytics_database.owner_url) as owner:
        owner.execute("UPDATE analytics.dead_letters SET error = %s", [told])
    replay(analytics_database)
    (letter,) = rows(analytics_database, ALL_LETTERS)
    assert letter[6:8] == ("null-value", told)


def test_a_letter_goes_only_in_the_transaction_that_loads_it(
    analytics_database: AnalyticsDatabase,
) -> None:
    events = history(5, seed=43)
    put(analytics_database, of(events))
    with psycopg.connect(analytics_database.owner_url) as owner:
        owner.execute("REVOKE DELETE ON analytics.dead_letters FROM data_platform")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        replay(analytics_database)
    assert rows(analytics_database, FACTS) == []
    assert len(rows(analytics_database, ALL_LETTERS)) == len(events)


def test_a_dry_run_tells_and_changes_nothing(analytics_database: AnalyticsDatabase) -> None:
    events = history(5, seed=44)
    put(analytics_database, [*of(events), (None, None)])
    before = rows(analytics_database, ALL_LETTERS)
    told = replay(analytics_database, dry_run=True)
    assert told == Replayed(loaded=len(events), still_bad=1)
    assert "would be loaded" in told.in_words(dry_run=True)
    assert rows(analytics_database, ALL_LETTERS) == before
    assert rows(analytics_database, FACTS) == rows(analytics_database, STATES) == []


def test_one_a_reason_or_a_topic_can_be_chosen(analytics_database: AnalyticsDatabase) -> None:
    put(analytics_database, of([event("r-0"), event("r-1"), event("r-2")]))
    put(analytics_database, of([event("r-3")]), topic="nobody reads it")
    assert replay(analytics_database, Scope(TOPIC, 0, 1)) == Replayed(loaded=1)
    assert replay(analytics_database, Scope(TOPIC, 0, 1)) == Replayed()
    assert replay(analytics_database, Scope(reason="other")) == Replayed()
    assert replay(analytics_database, Scope("nobody reads it")) == Replayed(not_read=1)
    assert replay(analytics_database, Scope(reason="schema")) == Replayed(loaded=2, not_read=1)
    assert [one[0] for one in rows(analytics_database, FACTS)] == ["r-0", "r-1", "r-2"]
    assert len(rows(analytics_database, ALL_LETTERS)) == 1


def test_what_another_replay_has_in_hand_is_left_to_it(
    analytics_database: AnalyticsDatabase,
) -> None:
    put(analytics_database, of([event("r-0"), event("r-1"), event("r-2")]))
    with psycopg.connect(analytics_database.loader_url) as other:
        other.execute(sql_dead_letters.LOCK, {"topics": [TOPIC], "partitions": [0], "offsets": [1]})
        assert replay(analytics_database) == Replayed(loaded=2, busy=1)
    assert replay(analytics_database) == Replayed(loaded=1)


def test_two_replays_and_a_worker_at_once_load_everything_once(platform: Platform) -> None:
    events = history(700, seed=45)
    late = events[::2]
    put(platform.database, of(late), topic=platform.topic)
    platform.worker()
    platform.produce(events[1::2])
    together = threading.Barrier(2)

    def one_replay() -> Replayed:
        together.wait(10)
        decoders = {platform.topic: decode_reservation_event}
        return dead_letters.replay(platform.database.loader_url, Scope(), decoders)

    with ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(one_replay) for _ in "ab"]]
    platform.wait_for_offsets(len(events) - len(late))

    assert first.loaded + second.loaded == len(late)
    assert first.still_bad == second.still_bad == 0
    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []


def test_what_loses_against_a_lock_is_tried_again(analytics_database: AnalyticsDatabase) -> None:
    put(analytics_database, of([event("r-0")]))
    attempts: set[Any] = set()

    def second_attempt() -> bool:
        attempts.update(watcher.execute(WAITING_REPLAY.replace("pid", "xact_start", 1)).fetchall())
        return len(attempts) > 1

    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(analytics_database.loader_url, autocommit=True) as watcher,
        psycopg.connect(analytics_database.owner_url) as holder,
    ):
        holder.execute("LOCK TABLE analytics.fct_reservation_events IN EXCLUSIVE MODE")
        running = pool.submit(replay, analytics_database)
        wait_until(second_attempt, 10, "a second attempt")
        holder.rollback()
        assert running.result(10) == Replayed(loaded=1)


def test_what_loses_against_a_worker_with_the_same_event_is_tried_again(
    analytics_database: AnalyticsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = event("r-0")
    put(analytics_database, of([one]))
    monkeypatch.setattr("data_platform.star.ATTEMPTS", 1)
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(analytics_database.loader_url, autocommit=True) as watcher,
        psycopg.connect(analytics_database.loader_url) as worker,
    ):
        prepare(worker)
        worker.execute("SET idle_in_transaction_session_timeout = 0")
        decoded = decode_reservation_event(one.key, one.value)
        star.write(worker, star.rows_of([Row(Message(), decoded)]), ask=False)
        running = pool.submit(replay, analytics_database)
        wait_until(lambda: watcher.execute(WAITING_REPLAY).fetchone(), 10, "the replay to wait")
        worker.commit()
        assert running.result(10) == Replayed(loaded=1)
    assert rows(analytics_database, FACTS) == [one.fact]
    assert rows(analytics_database, ALL_LETTERS) == []


def test_a_replay_that_loses_again_and_again_says_that_it_may_be_repeated(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> Replayed:
        raise RivalError("another loader was in the way 4 times")

    put(platform.database, of([event("r-0")]), topic=platform.topic)
    monkeypatch.setattr(dead_letters, "_replay_chunk", lost)
    for name, value in platform.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "set_up", lambda _level: None)
    answer = CliRunner().invoke(main, ["dead-letters", "replay"])
    assert answer.exit_code == 1
    assert answer.stderr.splitlines()[-1] == (
        "data-platform: another loader was in the way 4 times; run it again"
    )


WAITING_REPLAY = (
    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    " AND application_name = 'data-platform dead-letters' AND datname = current_database()"
)


def test_a_chunk_is_bounded_in_letters_and_in_bytes(
    analytics_database: AnalyticsDatabase,
) -> None:
    small = dead_letters.CHUNK_LETTERS * 2 + 1
    put(analytics_database, [(b"k", b"x")] * small)
    put(analytics_database, [(b"k", b"x" * 1_000_000)] * 9, topic="u")
    put(analytics_database, [(None, b"x" * (dead_letters.CHUNK_BYTES + 1)), (None, b"")], topic="v")
    with dead_letters._connected(analytics_database.loader_url) as connection:
        chunks = list(dead_letters._chunks(connection, Scope()))
    assert [len(chunk) for chunk in chunks] == [100, 100, 5, 4, 1, 1, 1]
    places = [place for chunk in chunks for place in chunk]
    assert len(set(places)) == len(places) == small + 11


def test_what_is_put_aside_during_a_replay_is_for_the_next_one(
    analytics_database: AnalyticsDatabase,
) -> None:
    put(analytics_database, of([event("r-0")]))
    with dead_letters._connected(analytics_database.loader_url) as connection:
        chunks = dead_letters._chunks(connection, Scope())
        assert next(chunks) == [Place(TOPIC, 0, 0)]
        with psycopg.connect(analytics_database.owner_url) as owner:
            owner.execute(
                "INSERT INTO analytics.dead_letters (topic, kafka_partition, kafka_offset, reason,"
                " error) VALUES ('t', 0, 7, 'r', 'e')"
            )
        assert list(chunks) == []


def test_the_command_says_what_it_did_and_refuses_what_it_can_not(
    platform: Platform,
) -> None:
    put(platform.database, [*of([event("r-0")]), (None, None)], topic=platform.topic)
    one = ["dead-letters", "replay", platform.topic, "0"]
    dry = platform.command(*one, "0", "--dry-run")
    assert (dry.returncode, dry.stdout[:17]) == (0, "1 would be loaded")
    assert platform.command(*one, "0").returncode == 0
    for offset in ("0", "1"):
        still = platform.command(*one, offset)
        assert still.returncode == 1
        assert still.stderr == f"data-platform: {platform.topic} 0 {offset} is not loaded\n"
    both = platform.command("dead-letters", "replay", "--all", "--reason", "schema")
    assert (both.returncode, len(both.stderr.splitlines())) == (2, 1)


def test_every_statement_of_the_dead_letters_is_one_that_postgres_can_plan(
    analytics_database: AnalyticsDatabase,
) -> None:
    statements = {name: text for name, text in vars(sql_dead_letters).items() if name.isupper()}
    with psycopg.connect(analytics_database.loader_url, autocommit=True) as connection:
        for name, text in statements.items():
            names = dict.fromkeys(re.findall(r"%\((\w+)\)s", text))
            numbered = text % {key: f"${n}" for n, key in enumerate(names, start=1)}
            connection.execute(f"PREPARE {name} AS {numbered}".encode())
