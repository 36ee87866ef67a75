"""`data-platform reconcile`: what is a difference, and what isn't."""

import json
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import ANY

import psycopg
import pytest
from confluent_kafka import Producer
from psycopg.types.json import Jsonb

from data_platform import __main__ as command
from data_platform import config, records
from data_platform.consumer import Partition
from data_platform.reconcile import Report, reconcile
from data_platform.topics import Span, Topics
from devstack.state import free_port
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import Event, event, history
from tests.databases import ReservationDatabase
from tests.waiting import wait_until

BEGIN = """
DELETE FROM outbox_topics;
INSERT INTO outbox_topics VALUES ('{topic}', 1000000), ('{catalogue}', 1000000);
INSERT INTO concerts (concert_id, title, venue, time_zone, currency, created_at)
OVERRIDING SYSTEM VALUE
VALUES (1, 'Nacht der Streicher — Ø', 'Philharmonic Hall', 'Europe/Berlin', 'EUR', '2026-1-1Z');
INSERT INTO performances
OVERRIDING SYSTEM VALUE
VALUES (3, 1, '2027-05-01T18:00:00Z', '2026-01-01Z', '2027-05-01T17:00:00Z', 'scheduled', 500);
"""
RESERVE = """
INSERT INTO reservations VALUES (%(reservation_id)s, %(customer_id)s, 3, %(status)s, %(version)s,
    %(amount)s, %(currency)s, %(created_at)s, %(time)s, %(expires_at)s)
ON CONFLICT (reservation_id) DO UPDATE SET status = excluded.status, version = excluded.version,
    updated_at = excluded.updated_at, expires_at = excluded.expires_at
"""
RESERVE_SEATS = """
INSERT INTO reservation_seats SELECT %(reservation_id)s, seat_id, section, "row", number, price
FROM jsonb_to_recordset(%(seats)s)
    AS seat (seat_id bigint, section text, "row" text, number integer, price bigint)
ON CONFLICT DO NOTHING
"""
WRITE = "INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)"
# As the relay does it: what is visible now is published.
PUBLISH = """
INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,
    published_snapshot, system_identifier, database_oid, timeline, wal_lsn)
SELECT 'test', topic, 'at_least_once', 1, '', pg_current_snapshot(), 1, 1, '', '0/0'
FROM outbox_topics
ON CONFLICT (relay_name, topic) DO UPDATE SET published_snapshot = excluded.published_snapshot,
    updated_at = clock_timestamp()
"""
CONCERT = {
    "concert_id": 1,
    "version": 1,
    "title": "Nacht der Streicher — Ø",
    "venue": "Philharmonic Hall",
    "time_zone": "Europe/Berlin",
    "currency": "EUR",
    "performances": [
        {
            "performance_id": 3,
            "starts_at": "2027-05-01T18:00:00Z",
            "sales_open_at": "2026-01-01T00:00:00Z",
            "sales_close_at": "2027-05-01T17:00:00Z",
            "status": "scheduled",
            "capacity": 500,
            "sections": [{"section": "Rang", "capacity": 500, "price_min": 1, "price_max": 1}],
        }
    ],
}


@dataclass(frozen=True)
class Whole:
    """Service, outbox, topic and tables."""

    platform: Platform
    service: ReservationDatabase

    def reserve(self, events: Sequence[Event]) -> None:
        """Change reservations as the service does, with their outbox rows."""
        with psycopg.connect(self.service.owner_url) as connection:
            for one in events:
                data = one.envelope["data"]
                values = {**data, "time": one.envelope["time"], "seats": Jsonb(data["seats"])}
                del values["concert"], values["performance"]
                connection.execute(RESERVE, values)
                connection.execute(RESERVE_SEATS, values)
                connection.execute(
                    WRITE, [self.platform.topic, one.key.decode(), one.value.decode()]
                )

    def publish(self, events: Sequence[Event]) -> None:
        """Publish them, as the relay does."""
        self.platform.produce(events)
        self.execute(PUBLISH)

    def execute(self, statement: str) -> None:
        """Change something in the service's database, as its owner."""
        with psycopg.connect(self.service.owner_url) as connection:
            connection.execute(statement)

    def load(self, count: int) -> None:
        """Let a worker load up to so many offsets."""
        worker = self.platform.worker()
        self.platform.wait_for_offsets(count)
        assert worker.stop(15) == 0

    def environment(self) -> dict[str, str]:
        """What reconcile needs beyond the worker's."""
        return {
            "RESERVATION_DATABASE_URL": self.service.service_url,
            "OUTBOX_RELAY_DATABASE_URL": self.service.relay_url,
        }

    def reconcile(self, *arguments: str) -> dict[str, Any]:
        """What `reconcile --json` says; its exit code fits."""
        answer = self.platform.command("reconcile", "--json", *arguments, **self.environment())
        assert answer.stdout, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)
        assert answer.returncode == (1 if found["found"] else 0)
        return found

    def differences(self, *arguments: str) -> set[str]:
        """What differs, where, and in which row."""
        return {
            f"{one['what']} {one['where']} {one['key']}"
            for one in self.reconcile(*arguments)["differences"]
        }


@pytest.fixture
def whole(platform: Platform, reservation_database: ReservationDatabase) -> Whole:
    """A service and its platform with one concert."""
    made = Whole(platform, reservation_database)
    made.execute(BEGIN.format(topic=platform.topic, catalogue=platform.catalogue_topic))
    told = {
        "specversion": "1.0",
        "id": "1:1",
        "source": "/reservation-service",
        "type": "concert.published",
        "subject": "1",
        "time": "2026-01-01T00:00:00Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:concert-reservation:schema:concert-event:1",
        "data": CONCERT,
    }
    platform.produce_raw([(b"1", json.dumps(told).encode())], topic=platform.catalogue_topic)
    return made


def test_what_is_equal_has_no_differences_whatever_came_twice_or_was_bad(whole: Whole) -> None:
    events = history(60, seed=1)
    whole.reserve(events)
    whole.publish([*events, *events[:10]])
    whole.platform.produce_raw([(b"broken", b"{")], partition=0)
    whole.load(len(events) + 12)

    found = whole.reconcile()

    assert (found["differences"], found["in_flight"], found["notes"]) == ([], 0, [])
    assert found["compared"] == {
        "records": len(events) + 11,
        "repeated records": 10,
        "dead letters": 1,
        "facts": len(events),
        "outbox rows": len(events),
        "reservations": 60,
        "concerts": 1,
    }
    alone = whole.reconcile("--without-service")
    assert (alone["differences"], len(alone["notes"])) == ([], 1)
    # What retention drops is no difference.
    whole.execute("TRUNCATE outbox")
    assert whole.differences() == set()


ID = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"
TABLES = (
    "fct_reservation_events",
    "fct_reservations",
    "fct_reservation_seats",
    "dim_concerts",
    "dim_performances",
    "dead_letters",
)
# What is done, and what is said of it: `what where key`.
DAMAGES = {
    """
    DELETE FROM analytics.fct_reservation_events WHERE reservation_id = 'ID' AND version = 1
    """: ["missing fct_reservation_events ID:1"],
    """
    UPDATE analytics.fct_reservation_events SET amount = 1 WHERE reservation_id = 'ID'
        AND version = 1
    """: ["altered fct_reservation_events.amount ID:1"],
    """
    INSERT INTO analytics.fct_reservation_events
    SELECT reservation_id, 7, event_type, occurred_at, status, customer_id, concert_id,
        performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
        kafka_offset
    FROM analytics.fct_reservation_events WHERE reservation_id = 'ID' AND version = 2
    """: ["extra fct_reservation_events ID:7", "altered fct_reservations.version ID"],
    """
    INSERT INTO analytics.fct_reservation_events
    SELECT 'nobody', 1, event_type, occurred_at, status, customer_id, concert_id,
        performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
        kafka_offset
    FROM analytics.fct_reservation_events WHERE reservation_id = 'ID' AND version = 1
    """: ["extra fct_reservation_events nobody:1", "missing fct_reservations nobody"],
    """
    DELETE FROM analytics.fct_reservations WHERE reservation_id = 'ID'
    """: ["missing fct_reservations ID"],
    """
    UPDATE analytics.fct_reservations SET status = 'expired' WHERE reservation_id = 'ID'
    """: ["altered fct_reservations.status ID"],
    """
    INSERT INTO analytics.fct_reservations
    SELECT 'nobody', version, status, customer_id, concert_id, performance_id, seat_count, amount,
        currency, created_at, updated_at, expires_at
    FROM analytics.fct_reservations WHERE reservation_id = 'ID'
    """: ["extra fct_reservations nobody"],
    """
    UPDATE analytics.fct_reservation_seats SET price = 2
    WHERE reservation_id = 'ID' AND seat_id = 111
    """: ["altered fct_reservation_seats ID:111"],
    """
    DELETE FROM analytics.fct_reservation_seats WHERE reservation_id = 'ID' AND seat_id = 112
    """: ["missing fct_reservation_seats ID:112"],
    "UPDATE analytics.dim_performances SET capacity = 1": ["altered dim_performances.capacity 3"],
    "DELETE FROM analytics.dim_concerts": ["missing dim_concerts 1"],
    "DELETE FROM analytics.dead_letters": ["missing dead_letters TOPIC 0 OFFSET"],
}


def test_each_damage_to_a_table_is_named(whole: Whole) -> None:
    events = [
        event(ID),
        event(ID, 2, "reservation.completed"),
        event(OTHER, 1, "reservation.completed"),
    ]
    whole.reserve(events)
    whole.publish(events)
    whole.platform.produce_raw([(b"broken", b"{")], partition=0)
    whole.load(len(events) + 2)
    offset = whole.platform.rows("SELECT kafka_offset FROM analytics.dead_letters")[0][0]
    for table in TABLES:
        whole.platform.execute(f"CREATE TABLE kept_{table} AS TABLE analytics.{table}")

    for damage, said in DAMAGES.items():
        whole.platform.execute(damage.replace("'ID'", f"'{ID}'"))
        expected = {
            line.replace("ID", ID)
            .replace("TOPIC", whole.platform.topic)
            .replace("OFFSET", str(offset))
            for line in said
        }
        assert whole.differences() == expected, damage
        for table in TABLES:
            whole.platform.execute(
                f"TRUNCATE analytics.{table}; INSERT INTO analytics.{table} TABLE kept_{table}"
            )
    assert whole.differences() == set()


def test_what_the_topic_or_the_service_lost_is_named(whole: Whole) -> None:
    lost, kept = event(ID), event(OTHER, 1, "reservation.completed")
    whole.reserve([lost, kept])
    whole.publish([kept])  # the cursor says: both
    whole.load(2)

    assert whole.differences() == {
        f"missing fct_reservation_events {ID}:1",
        f"missing fct_reservations {ID}",
    }
    whole.publish([lost])
    whole.load(3)
    whole.execute("DELETE FROM reservation_seats WHERE right(reservation_id::text, 1) = '1'")
    whole.execute("DELETE FROM reservations WHERE right(reservation_id::text, 1) = '1'")
    found = whole.differences()
    assert f"extra fct_reservations {ID}" in found
    assert f"extra fct_reservation_events {ID}:1" in found


def test_without_the_service_facts_and_records_are_compared_in_both_directions(
    whole: Whole,
) -> None:
    events = [event(ID), event(OTHER, 1, "reservation.completed")]
    whole.platform.produce(events)
    whole.load(3)
    copied = "version, event_type, occurred_at, status, customer_id, concert_id, performance_id,"
    copied += " seat_count, amount, currency, created_at, expires_at, kafka_partition"
    for name, offset in (("doubled", "kafka_offset"), ("stray", "kafka_offset + 100")):
        whole.platform.execute(
            "INSERT INTO analytics.fct_reservation_events"  # noqa: S608 - ours
            f" (reservation_id, {copied}, kafka_offset) SELECT '{name}', {copied}, {offset}"
            f" FROM analytics.fct_reservation_events WHERE reservation_id = '{ID}'"
        )
    whole.platform.execute(
        f"DELETE FROM analytics.fct_reservation_events WHERE reservation_id = '{OTHER}'"  # noqa: S608 - ours
    )

    assert whole.differences("--without-service") == {
        "extra fct_reservation_events doubled:1",
        "extra fct_reservation_events stray:1",
        "missing fct_reservations doubled",
        "missing fct_reservations stray",
        f"missing fct_reservation_events {OTHER}:1",
        f"extra fct_reservations {OTHER}",
    }


def test_what_is_on_its_way_is_no_difference(whole: Whole) -> None:
    first = [event(ID), event(OTHER, 1, "reservation.completed")]
    whole.reserve(first)
    whole.publish(first)
    whole.load(3)
    later = event(ID, 2, "reservation.completed")

    whole.reserve([later])
    in_outbox = whole.reconcile()
    whole.publish([later])
    in_topic = whole.reconcile()
    whole.load(4)
    arrived = whole.reconcile()

    assert [one["differences"] for one in (in_outbox, in_topic, arrived)] == [[], [], []]
    assert [one["in_flight"] for one in (in_outbox, in_topic, arrived)] == [1, 1, 0]


def compared(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Report:
    """What a comparison in this process says, so that its bounds can be small."""
    for name, value in {**whole.platform.environment(), **whole.environment()}.items():
        monkeypatch.setenv(name, value)
    settings = config.load(config.ReconcileSettings)
    return reconcile(
        command._sources(settings, without_service=False),
        Topics(settings.client_properties()),
        settings.consumer_properties(),
        command._decoders(settings),
    )


def test_what_is_committed_but_not_yet_marked_so_in_the_topic_is_on_its_way(whole: Whole) -> None:
    """Kafka answers a commit before the partitions know of it: an open transaction looks alike."""
    topic, events = whole.platform.topic, history(20, seed=95)
    whole.reserve(events)
    producer = Producer(
        {
            "bootstrap.servers": whole.platform.bootstrap_servers,
            "partitioner": "murmur2_random",
            "transactional.id": f"relay-of-{topic}",
        }
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    for one in events:
        producer.produce(topic, one.value, one.key)
    producer.flush(30)
    whole.execute(PUBLISH)
    found = whole.reconcile()
    assert found["differences"] == []
    assert found["in_flight"] > 0
    producer.commit_transaction(30)
    assert whole.reconcile() == found | {"seconds": ANY}


def test_of_more_disorder_than_can_be_examined_the_first_are_named_and_the_rest_counted(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [event(f"00000000-0000-4000-8000-{number:012}") for number in range(40)]
    whole.reserve(events)
    whole.execute(PUBLISH)  # and Kafka has lost them
    whole.load(1)
    whole.platform.execute(
        "INSERT INTO analytics.fct_reservations (reservation_id, version, status, customer_id,"
        " concert_id, performance_id, seat_count, amount, currency, created_at, updated_at)"
        " SELECT 'nobody-' || 100 + n, 1, 'held', 'c', 1, 3, 1, 1, 'EUR', now(), now()"
        " FROM generate_series(0, 99) AS n"
    )
    monkeypatch.setattr("data_platform.reconcile.RANGE_RESERVATIONS", 8)
    monkeypatch.setattr("data_platform.reconcile.ROWS_LIMIT", 32)
    monkeypatch.setattr("data_platform.reconcile.SUSPECTS_LIMIT", 10)
    found = compared(whole, monkeypatch)
    named = {(one.what, one.key) for one in found.differences if one.where == "fct_reservations"}
    # (The tables alone say of the others that no fact stands behind them.)
    assert {("missing", one.key.decode()) for one in events[:10]} <= named
    assert ("missing", events[10].key.decode()) not in named
    assert found.unexamined == 30 + 100
    assert not found.good
    assert "and 130 more reservations differ or are on their way" in found.in_words(5)
    monkeypatch.setattr("data_platform.reconcile.SUSPECTS_LIMIT", 1_000)
    # Of a range in which the tables have far too many, the first are examined.
    assert compared(whole, monkeypatch).unexamined == 100 - 32


def test_what_workers_are_behind_with_is_looked_for_once_however_much_the_outbox_has(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = history(40, seed=3)
    whole.load(1)
    whole.reserve(events)
    with psycopg.connect(whole.service.owner_url) as connection:
        connection.execute(WRITE, [whole.platform.topic, "broken", '{"no": "event"}'])
    whole.publish(events)
    whole.platform.produce_raw([(b"broken", b'{"no": "event"}')])
    monkeypatch.setattr("data_platform.outbox_flow.CHUNK_ROWS", 5)
    monkeypatch.setattr("data_platform.outbox_flow.CHUNK_CHARACTERS", 2_000)
    read, readings = records.read, list[Any]()

    def counted(consumer: Mapping[str, Any], spans: Mapping[Partition, Span]) -> Any:
        readings.append(spans)
        return read(consumer, spans)

    monkeypatch.setattr(records, "read", counted)
    found = compared(whole, monkeypatch)
    assert (found.differences, found.in_flight) == ([], 40)
    assert found.compared["outbox rows"] == len(events) + 1
    assert len(readings) <= 4  # what is loaded, what the outbox has more, reservations, catalogue
    whole.load(len(events) + 2)
    assert compared(whole, monkeypatch).good
    whole.platform.execute("DELETE FROM analytics.dead_letters")
    (lost, of_topic) = sorted(one.key for one in compared(whole, monkeypatch).differences)
    assert lost.startswith("outbox ")
    assert of_topic.startswith(whole.platform.topic)


def test_traffic_makes_no_differences(whole: Whole) -> None:
    events = history(400, seed=2)
    worker = whole.platform.worker()
    done = threading.Event()

    def book() -> None:
        for at in range(0, len(events), 10):
            whole.reserve(events[at : at + 10])
            whole.publish(events[at : at + 10])
        done.set()

    thread = threading.Thread(target=book)
    thread.start()
    found = []
    try:
        while not done.is_set():
            found.append(whole.reconcile())
    finally:
        thread.join()
    whole.platform.wait_for_offsets(len(events) + 1)
    found.append(whole.reconcile())
    worker.stop(15)
    assert [one["differences"] for one in found] == [[]] * len(found)
    assert found[-1]["compared"]["reservations"] == 400


def test_what_it_needs_it_says_in_one_line(whole: Whole) -> None:
    without = whole.platform.command("reconcile")
    assert without.returncode == 2
    assert "RESERVATION_DATABASE_URL is not set" in without.stderr
    assert len(without.stderr.splitlines()) == 1
    blind = whole.platform.command("reconcile", RESERVATION_DATABASE_URL=whole.service.service_url)
    assert "set OUTBOX_RELAY_DATABASE_URL" in blind.stdout


def test_again_and_again_it_tells_the_outcome_as_metrics(whole: Whole) -> None:
    whole.load(1)
    whole.platform.execute("UPDATE analytics.dim_concerts SET title = 'another'")
    port = free_port()
    loop = whole.platform.run_process(
        "data_platform", "reconcile", "--every", "1",
        env=whole.platform.environment(METRICS_PORT=str(port), **whole.environment()),
    )  # fmt: skip

    def tells(number: int) -> Callable[[], bool]:
        def told() -> bool:
            if "reconciled" not in loop.log.read_text():
                return False
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                return f"data_platform_reconcile_differences {number}.0" in answer.read().decode()

        return told

    wait_until(tells(1), 30, "one difference")
    assert '"where": "dim_concerts.title"' in loop.log.read_text()
    assert "another" not in loop.log.read_text()  # values are for who asks, not for a log
    whole.platform.execute("UPDATE analytics.dim_concerts SET title = 'Nacht der Streicher — Ø'")
    wait_until(tells(0), 30, "no difference")
    assert loop.stop(10) == 0
