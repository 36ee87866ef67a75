"""The transaction by itself: compare-and-swap, frozen rivals, plans."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from confluent_kafka import Message

from data_platform import sql
from data_platform.batch import Decoded, Slice, decode
from data_platform.errors import MostlyRefusedError, PlaceLostError
from data_platform.events import decode_reservation_event
from data_platform.loader import APPLICATION_NAME, Loader
from data_platform.topics import StoredOffset
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import FACTS, STATES, Event, event, expected_facts, history
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

TOPIC, TOPIC_ID = "t", "id-1"


@pytest.fixture
def loader(analytics_database: AnalyticsDatabase) -> Iterator[Loader]:
    """A loader that has claimed partition 0."""
    one = Loader(analytics_database.loader_url)
    assert one.claim(TOPIC, TOPIC_ID, [0]) == {0: StoredOffset(0, TOPIC_ID)}
    yield one
    one.close()


def batch(events: Sequence[Event], first: int = 0, topic_id: str = TOPIC_ID) -> Decoded:
    """A batch of partition 0 that begins at `first`."""
    messages = [
        Message(topic=TOPIC, partition=0, offset=first + n, key=one.key, value=one.value)
        for n, one in enumerate(events)
    ]
    part = Slice(TOPIC, 0, topic_id, first, first + len(events), messages)
    return decode([part], {TOPIC: decode_reservation_event})


def test_a_batch_that_begins_elsewhere_than_postgres_stands_changes_nothing(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    first = event("r-1")
    assert loader.load(batch([first])).new_events == 1
    for stale in (
        batch([event("r-2")]),
        batch([event("r-2")], 5),
        batch([event("r-2")], 1, "id-2"),
    ):
        with pytest.raises(PlaceLostError):
            loader.load(stale)
    with psycopg.connect(analytics_database.owner_url) as connection:
        assert connection.execute(FACTS).fetchall() == [first.fact]
        assert connection.execute(STATES).fetchall() == [first.state]
    assert loader.claim(TOPIC, TOPIC_ID, [0]) == {0: StoredOffset(1, TOPIC_ID)}
    assert loader.load(batch([event("r-2")], 1)).new_events == 1


def test_a_stale_dead_letter_is_not_put_aside_either(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    bad = Message(topic=TOPIC, partition=0, offset=7, value=b"bad")
    part = Slice(TOPIC, 0, TOPIC_ID, 7, 8, [bad])
    with pytest.raises(PlaceLostError):
        loader.load(decode([part], {TOPIC: decode_reservation_event}))
    with psycopg.connect(analytics_database.owner_url) as connection:
        assert connection.execute(sql.COUNT_DEAD_LETTERS).fetchone() == (0,)


def test_a_topic_made_anew_before_anything_was_loaded_is_taken_as_it_is(loader: Loader) -> None:
    assert loader.claim(TOPIC, "id-2", [0]) == {0: StoredOffset(0, "id-2")}
    loader.load(batch([event()], 0, "id-2"))
    assert loader.claim(TOPIC, "id-3", [0]) == {0: StoredOffset(1, "id-2")}


def test_an_event_delivered_again_is_no_new_event(loader: Loader) -> None:
    events = history(20, seed=2)
    assert loader.load(batch(events + events)).new_events == len(events)
    again = loader.load(batch(events, 2 * len(events)))
    assert (again.events, again.new_events) == (len(events), 0)


def test_an_event_of_the_year_9999_does_not_make_the_tables_fresh_for_ever(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    def newest(happened: str, first: int) -> tuple[Any, ...]:
        envelope = {**event(f"r-{first}").envelope, "time": happened}
        loader.load(batch([Event(envelope)], first))
        with psycopg.connect(analytics_database.owner_url) as connection:
            row = connection.execute(
                "SELECT last_event_at, last_event_at = updated_at FROM analytics.load_offsets"
            ).fetchone()
        return row or ()

    past = datetime(2026, 1, 1, tzinfo=UTC)
    assert newest("2026-01-01T00:00:00Z", 0) == (past, False)
    bounded, is_now = newest("9999-12-31T23:59:59Z", 1)
    assert is_now
    # An older one doesn't turn it back, and nothing new isn't new.
    assert newest("2026-01-01T00:00:00Z", 2) == (bounded, False)


def test_a_stale_event_does_not_lock_the_reservation(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    newer, older = event("r-1", 2, "reservation.completed"), event("r-1", 1)
    loader.load(batch([newer]))
    with psycopg.connect(analytics_database.owner_url) as holder:
        holder.execute("SELECT FROM analytics.fct_reservations FOR UPDATE")
        assert loader.load(batch([older], 1)).new_events == 1


def test_a_large_batch_with_many_refused_records_is_loaded_in_bounded_transactions(
    loader: Loader, analytics_database: AnalyticsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "ALTER TABLE analytics.fct_reservations"
            " ADD CONSTRAINT nobody_called_x CHECK (customer_id <> 'x')"
        )
    # Bisecting all of it at once would take longer than this.
    monkeypatch.setattr("data_platform.loader.TRANSACTION_LIMIT_S", 2.0)
    events = [event(customer_id="x" if n % 10 == 0 else "y") for n in range(3_000)]
    place = 0
    while place < len(events):
        try:
            loader.load(batch(events[place:], place))
        except PlaceLostError:
            assert loader.claim(TOPIC, TOPIC_ID, [0])[0].next_offset > place
        place = loader.claim(TOPIC, TOPIC_ID, [0])[0].next_offset
    with psycopg.connect(analytics_database.owner_url) as connection:
        assert connection.execute(FACTS).fetchall() == sorted(
            one.fact for n, one in enumerate(events) if n % 10
        )
        assert connection.execute(sql.COUNT_DEAD_LETTERS).fetchone() == (300,)


def test_small_batches_of_which_postgres_refuses_all_stop_the_loader_after_a_hundred(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "ALTER TABLE analytics.fct_reservations ADD CONSTRAINT our_fault CHECK (amount < 0)"
        )
    for first in range(0, 120, 30):
        assert loader.load(batch([event() for _ in range(30)], first)).dead_letters == 30
    with pytest.raises(MostlyRefusedError):
        loader.load(batch([event()], 120))
    assert loader.claim(TOPIC, TOPIC_ID, [0])[0].next_offset == 120


def test_asked_to_end_while_it_sifts_it_begins_no_other_piece(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "ALTER TABLE analytics.fct_reservations"
            " ADD CONSTRAINT nobody_called_x CHECK (customer_id <> 'x')"
        )
    events = [event(customer_id="x" if n == 7 else "y") for n in range(300)]
    loader.hurry(6.0)
    with pytest.raises(PlaceLostError):
        loader.load(batch(events))
    assert loader.claim(TOPIC, TOPIC_ID, [0])[0].next_offset == 0


class _WatchedLoader(Loader):
    """One whose watch takes the deadline away right after it was looked at."""

    _looks = iter([1.0])

    @property
    def _deadline(self) -> float | None:
        return next(self._looks, None)

    @_deadline.setter
    def _deadline(self, value: float | None) -> None:
        """The watch has the last word."""


def test_hurry_bears_that_the_deadline_goes_away_meanwhile() -> None:
    loader = _WatchedLoader("")
    loader._looks = iter([1.0])
    loader.hurry(6.0)
    loader.close()


def test_a_worker_frozen_in_its_transaction_loses_its_locks_though_nobody_else_wants_them(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    place = {"topics": [TOPIC], "partitions": [0]}

    def let_go() -> bool:
        with psycopg.connect(analytics_database.owner_url) as other:
            free = "SELECT FROM analytics.load_offsets FOR UPDATE SKIP LOCKED"
            return other.execute(free).rowcount == 1

    frozen = loader._connected()
    frozen.execute("BEGIN")
    frozen.execute(sql.LOCK_OFFSETS, place)
    assert not let_go()
    wait_until(let_go, 10, "the locks to be free")
    with pytest.raises(psycopg.Error):
        frozen.execute("SELECT 1")
    assert loader.load(batch([event()])).new_events == 1


def test_offset_rows_are_locked_in_order_so_that_no_two_workers_wait_for_each_other(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    loader.claim(TOPIC, TOPIC_ID, [5, 4, 3, 2, 1])  # not in the file's order either
    place = {"topics": [TOPIC] * 6, "partitions": [5, 3, 1, 0, 2, 4]}
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(analytics_database.loader_url) as worker,
        psycopg.connect(analytics_database.loader_url) as other,
        psycopg.connect(analytics_database.owner_url) as holder,  # lets go before it is waited for
    ):
        holder.execute("SELECT FROM analytics.load_offsets WHERE kafka_partition = 5 FOR UPDATE")
        waiting = pool.submit(worker.execute, sql.LOCK_OFFSETS, place)
        wait_until(lambda: other.execute(IS_WAITING, [worker.info.backend_pid]).rowcount, 10, "it")
        free = other.execute("SELECT FROM analytics.load_offsets FOR UPDATE SKIP LOCKED")
        assert free.rowcount == 0  # it has all others: the one that is held comes last
        holder.rollback()
        assert waiting.result(10).rowcount == 6


IS_WAITING = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"


def test_a_rival_that_holds_our_offset_row_is_ended(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    with psycopg.connect(analytics_database.loader_url, application_name=APPLICATION_NAME) as rival:
        # As one frozen inside COPY: no idle_in_transaction_session_timeout ends it.
        rival.execute(sql.LOCK_OFFSETS, {"topics": [TOPIC], "partitions": [0]})
        rival.execute("SELECT pg_current_xact_id()")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            loader.load(batch([event()]))
        assert loader.load(batch([event()])).new_events == 1
        with pytest.raises(psycopg.OperationalError):
            rival.execute("SELECT 1")
        rival.close()


def test_a_worker_that_comes_new_takes_over_from_one_frozen_inside_copy(
    platform: Platform,
) -> None:
    worker = platform.worker()
    for number in range(6):
        platform.produce_raw([(b"k", b"bad")], number)
    platform.wait_for_offsets(6)
    assert worker.stop() == 0
    with psycopg.connect(platform.database.loader_url, application_name=APPLICATION_NAME) as frozen:
        rows = frozen.execute(
            sql.LOCK_OFFSETS, {"topics": [platform.topic] * 6, "partitions": list(range(6))}
        )
        assert len(rows.fetchall()) == 6
        frozen.execute("SELECT pg_current_xact_id()")
        frozen.execute(sql.CREATE_STAGE)
        # Neither idle (no idle_in_transaction_session_timeout) nor going on.
        with suppress(psycopg.OperationalError), frozen.cursor().copy(sql.STAGE):
            events = history(30, seed=9)
            platform.produce(events)
            platform.worker()
            platform.wait_for_offsets(6 + len(events), timeout_s=20)
        frozen.close()
    assert platform.facts() == expected_facts(events)


def test_a_stranger_that_holds_our_offset_row_is_left_alone(
    loader: Loader, analytics_database: AnalyticsDatabase
) -> None:
    with psycopg.connect(analytics_database.loader_url, application_name="psql") as stranger:
        stranger.execute(sql.LOCK_OFFSETS, {"topics": [TOPIC], "partitions": [0]})
        stranger.execute("SELECT pg_current_xact_id()")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            loader.load(batch([event()]))
        assert stranger.execute("SELECT 1").fetchone() == (1,)


def test_a_frozen_worker_gives_its_partitions_to_another(platform: Platform) -> None:
    events = history(30, seed=4)
    frozen = platform.worker()
    wait_until(lambda: platform.rows("SELECT FROM analytics.load_offsets"), 30, "placement")
    with psycopg.connect(platform.database.owner_url) as holder:
        holder.execute("LOCK TABLE analytics.fct_reservations IN EXCLUSIVE MODE")
        platform.produce(events)
        with psycopg.connect(platform.database.loader_url, autocommit=True) as watcher:
            wait_until(
                lambda: watcher.execute(
                    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND application_name = 'data-platform' AND datname = current_database()"
                ).fetchone(),
                10,
                "the worker to be in its transaction",
            )
        frozen.pause()
    # The frozen one holds its offset rows now, idle in its transaction.
    other = platform.worker()
    platform.wait_for_offsets(len(events))
    assert len(platform.facts()) == len(events)

    frozen.resume()
    platform.produce([event()])
    platform.wait_for_offsets(len(events) + 1)
    assert frozen.alive
    assert other.alive
    assert platform.dead_letters() == []


def test_a_batch_is_merged_through_indexes_however_large_the_tables_are(
    analytics_database: AnalyticsDatabase,
) -> None:
    with psycopg.connect(analytics_database.loader_url) as connection:
        connection.execute(sql.SESSION)
        connection.execute(sql.CREATE_STAGE)
        connection.execute(
            "INSERT INTO pg_temp.incoming_reservations SELECT 'r' || n, 2, 'held', 'c', 1, 1, 1, 1,"
            " 'EUR', now(), now(), NULL, 1, n, now() FROM generate_series(1, 5000) n"
        )
        # A plan made while the table is empty, kept as a prepared statement keeps it.
        connection.execute(b"PREPARE kept AS " + sql.UPDATE_RESERVATIONS.encode())
        connection.execute("SET plan_cache_mode = force_generic_plan")
        plan = "\n".join(row[0] for row in connection.execute("EXPLAIN (COSTS OFF) EXECUTE kept"))
        known = {"reservation_ids": ["r1"] * 9_000, "versions": [1] * 9_000}
        facts = "\n".join(
            row[0] for row in connection.execute("EXPLAIN (COSTS OFF) " + sql.KNOWN_EVENTS, known)
        )
    assert "Seq Scan on fct_reservations" not in plan
    assert "fct_reservations_pkey" in plan
    assert "fct_reservation_events_pkey" in facts


def test_every_statement_is_one_that_postgres_can_plan(
    analytics_database: AnalyticsDatabase,
) -> None:
    statements = {name: text for name, text in vars(sql).items() if name.isupper()}
    assert len(statements) > 10
    with psycopg.connect(analytics_database.loader_url, autocommit=True) as connection:
        connection.execute(statements.pop("CREATE_STAGE"))
        # COPY cannot be prepared; every load runs it.
        for copied in ("STAGE", "COPY_EVENTS", "COPY_RESERVATIONS", "COPY_SEATS"):
            statements.pop(copied)
        for name, text in statements.items():
            names = dict.fromkeys(_parameters(text))
            numbered = text % {key: f"${n}" for n, key in enumerate(names, start=1)}
            connection.execute(f"PREPARE {name} AS {numbered}".encode())


def _parameters(text: str) -> list[str]:
    class Names(dict[str, str]):
        def __missing__(self, key: str) -> str:
            self[key] = key
            return key

    names = Names()
    _ = text % names
    return list(names)


def test_a_stopped_worker_leaves_the_group_and_no_session(platform: Platform) -> None:
    worker = platform.worker()
    platform.produce([event()])
    platform.wait_for_offsets(1)
    assert worker.stop(how=signal.SIGTERM) == 0
    assert '"event": "stopped"' in worker.log.read_text()  # not cut off
    assert not platform.rows(
        "SELECT FROM pg_stat_activity"
        " WHERE application_name = 'data-platform' AND datname = current_database()"
    )
