"""Whatever comes: every good record is loaded, every bad one kept byte for byte, nobody dies.

`FUZZ_EVENTS` and `FUZZ_SEED` choose how many and which; the same seed makes the same records.
"""

import base64
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, Message, Producer

from tests.data_platform.concerts import concert_event, record
from tests.data_platform.conftest import PRODUCE_TIMEOUT_S, Platform
from tests.data_platform.histories import history
from tests.data_platform.mutations import Headers, Record, records
from tests.data_platform.oracle import Judge, moment, unclear
from tests.data_platform.test_outages import said

EVENTS = int(os.environ.get("FUZZ_EVENTS") or 20_000)
CONCERTS = EVENTS // 10
SEED = int(os.environ.get("FUZZ_SEED") or 1)
LOAD_TIMEOUT_S = 120.0
LETTERS = """
SELECT kafka_partition, kafka_offset, raw_key, raw_value, raw_headers, reason
FROM analytics.dead_letters ORDER BY kafka_partition, kafka_offset
"""
SEATS = """
SELECT reservation_id, seat_id, performance_id, section, "row", number, price, currency
FROM analytics.fct_reservation_seats ORDER BY reservation_id, seat_id
"""
PERFORMANCES = """
SELECT performance_id, concert_id, version, starts_at, sales_open_at, sales_close_at, status,
    capacity, time_zone
FROM analytics.dim_performances
"""
FACTS = """
SELECT reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset
FROM analytics.fct_reservation_events ORDER BY kafka_partition, kafka_offset
"""


@dataclass(frozen=True)
class Sent:
    """A record and where Kafka put it."""

    place: tuple[int, int]
    record: Record


def send(platform: Platform, topic: str, mutants: Sequence[Record]) -> list[Sent]:
    """Put records into the topic; return them in Kafka's order."""
    sent: list[Sent] = []
    producer = Producer(
        {
            "bootstrap.servers": platform.bootstrap_servers,
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "queue.buffering.max.kbytes": 2**20,
        }
    )

    def keep(record: Record) -> Any:
        def delivered(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            sent.append(Sent((int(message.partition() or 0), int(message.offset() or 0)), record))

        return delivered

    for one in mutants:
        producer.produce(
            topic, one.value, one.key, headers=list(one.headers), on_delivery=keep(one)
        )
        producer.poll(0)
    assert producer.flush(PRODUCE_TIMEOUT_S) == 0
    return sorted(sent, key=lambda one: one.place)


def stored(headers: Headers) -> list[list[str | None]]:
    """Headers as dead_letters has them."""
    return [
        [name, None if value is None else base64.b64encode(value).decode()]
        for name, value in headers
    ]


def fact(envelope: dict[str, Any], place: tuple[int, int]) -> tuple[Any, ...]:
    """The row that a good record makes."""
    data = envelope["data"]
    return (
        data["reservation_id"],
        data["version"],
        envelope["type"],
        moment(envelope["time"]),
        data["status"],
        data["customer_id"],
        data["concert"]["concert_id"],
        data["performance"]["performance_id"],
        len(data["seats"]),
        data["amount"],
        data["currency"],
        moment(data["created_at"]),
        None if data["expires_at"] is None else moment(data["expires_at"]),
        *place,
    )


def seats(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of fct_reservation_seats that a state makes; of a seat told twice the last."""
    reservation_id, performance = data["reservation_id"], data["performance"]["performance_id"]
    return [
        (
            reservation_id,
            seat["seat_id"],
            performance,
            seat["section"],
            seat["row"],
            seat["number"],
            seat["price"],
            data["currency"],
        )
        for _, seat in sorted({seat["seat_id"]: seat for seat in data["seats"]}.items())
    ]


def performances(data: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
    """The rows of dim_performances that a concert makes, by id; of one told twice the last."""
    return {
        one["performance_id"]: (
            one["performance_id"],
            data["concert_id"],
            data["version"],
            *(moment(one[name]) for name in ("starts_at", "sales_open_at", "sales_close_at")),
            one["status"],
            one["capacity"],
            data["time_zone"],
        )
        for one in data["performances"]
    }


def state(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The current state that a fact makes, in the order of `Platform.states`."""
    return (*row[:2], *row[4:12], row[3], row[12])


def load(
    platform: Platform, topic: str, judge: Judge, mutants: Sequence[Record]
) -> tuple[list[tuple[Sent, dict[str, Any]]], Counter[str]]:
    """Let a worker load the mutants; return the good ones, and the bad ones' reasons counted."""
    worker = platform.worker()
    sent = send(platform, topic, mutants)
    judged = [(one, judge.good(one.record.key, one.record.value)) for one in sent]
    platform.wait_for_offsets(len(sent), LOAD_TIMEOUT_S)
    assert worker.alive
    assert said(worker, "waiting") == said(worker, "batch_refused") == 0

    kept = platform.rows(LETTERS)
    put_aside = {row[:2] for row in kept}
    judged = [
        (
            one,
            None if one.place in put_aside and envelope and unclear(one.record.value) else envelope,
        )
        for one, envelope in judged
    ]
    bad = [one for one, envelope in judged if envelope is None]
    wrongly_loaded = {one.place for one in bad} - put_aside
    wrongly_kept = put_aside - {one.place for one in bad}
    assert not [one for one in sent if one.place in wrongly_loaded]
    assert not [row for row in kept if row[:2] in wrongly_kept]
    for one, row in zip(bad, kept, strict=True):
        assert row[2:5] == (one.record.key, one.record.value, stored(one.record.headers))
    # Both halves are worth something, and Postgres never had to refuse what the decoder let pass.
    assert min(len(bad), len(sent) - len(bad)) > len(sent) / 4
    good = [(one, envelope) for one, envelope in judged if envelope is not None]
    return good, Counter(row[5] for row in kept)


REASONS = {
    "schema", "not-json", "not-utf8", "nul", "null-value", "too-deep", "unknown-type",
    "unknown-schema", "subject", "id", "key",
}  # fmt: skip


def test_whatever_comes_the_good_is_loaded_and_the_bad_is_kept_byte_for_byte(
    platform: Platform,
) -> None:
    judge = Judge("reservation-event.schema.json", "reservation_id")
    envelopes = [dict(one.envelope) for one in history(EVENTS, SEED)][:EVENTS]
    good, reasons = load(platform, platform.topic, judge, list(records(envelopes, SEED)))
    assert set(reasons) == REASONS

    facts: dict[tuple[str, int], tuple[Any, ...]] = {}
    told: dict[tuple[str, int], dict[str, Any]] = {}
    for one, envelope in good:  # of two records with one event the first one counts
        row = fact(envelope, one.place)
        facts.setdefault(row[:2], row)
        told.setdefault(row[:2], envelope["data"])
    assert platform.rows(FACTS) == sorted(facts.values(), key=lambda row: row[13:])
    latest = {row[0]: row for row in sorted(facts.values(), key=lambda row: row[1])}
    assert platform.states() == [state(latest[name]) for name in sorted(latest)]
    assert platform.rows(SEATS) == [
        seat for name in sorted(latest) for seat in seats(told[latest[name][:2]])
    ]


def test_whatever_comes_as_a_concert_the_good_is_loaded_and_the_bad_is_kept(
    platform: Platform,
) -> None:
    judge = Judge("concert-event.schema.json", "concert_id")
    envelopes = [json.loads(record(concert_event(n))[1] or b"") for n in range(1, CONCERTS + 1)]
    mutants = list(records(envelopes, SEED, is_catalogue=True))
    good, reasons = load(platform, platform.catalogue_topic, judge, mutants)
    assert set(reasons) <= REASONS

    latest: dict[int, int] = {}
    told: set[tuple[Any, ...]] = set()
    for _, envelope in good:
        data = envelope["data"]
        concert = data["concert_id"]
        latest[concert] = max(latest.get(concert, 0), data["version"])
        told.add(tuple(data[name] for name in ("concert_id", "version", "title", "venue")))
    loaded = platform.rows("SELECT concert_id, version, title, venue FROM analytics.dim_concerts")
    assert {row[:2] for row in loaded} == set(latest.items())
    assert set(loaded) <= told
    # A mutant may take another concert's id, or its performance's: then either may win, whole. What
    # only one event tells of, of a concert that only one event tells of, is there as it says.
    rows = [performances(envelope["data"]) for _, envelope in good]
    of_concert = Counter(envelope["data"]["concert_id"] for _, envelope in good)
    of_performance = Counter(name for one in rows for name in one)
    undisputed = {
        row
        for one in rows
        for name, row in one.items()
        if of_performance[name] == of_concert[row[1]] == 1
    }
    assert len(undisputed) > CONCERTS / 2
    stored_rows = set(platform.rows(PERFORMANCES))
    assert undisputed <= stored_rows
    assert stored_rows <= {row for one in rows for row in one.values()}
