"""What each place holds at the end of a run, read once and whole."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, NamedTuple

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition

from chaos.ledger import Order, Told

RESERVATION_TOPIC, CATALOGUE_TOPIC = "concert-reservation", "concert-catalogue"
# Whatever chaos puts into the outbox or a topic by itself has this header: AGAIN for a record that
# was there before, POISON for one that nobody can load.
MARK, AGAIN, POISON = "chaos", "again", "poison"
KAFKA_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 120.0

STORED = """
SELECT reservation_id::text, status, version, customer_id, performance_id, amount, currency,
       (SELECT jsonb_agg(jsonb_build_array(seat_id, price)) FROM reservation_seats AS seat
        WHERE seat.reservation_id = reservation.reservation_id)
FROM reservations AS reservation
"""
OUTBOX = """
SELECT topic, key, payload::text, headers FROM outbox ORDER BY id
"""
QUARANTINED = "SELECT count(*) FROM outbox_relay_quarantine"
FACTS = """
SELECT reservation_id || ':' || version, event_type, occurred_at, status, customer_id, concert_id,
       performance_id, seat_count, amount, currency, kafka_partition, kafka_offset
FROM analytics.fct_reservation_events
"""
STATES = """
SELECT reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
       currency
FROM analytics.fct_reservations
"""
SEATS = "SELECT reservation_id, seat_id, price FROM analytics.fct_reservation_seats"
DEAD_LETTERS = """
SELECT topic, kafka_partition, kafka_offset, raw_key, raw_value FROM analytics.dead_letters
"""
DAILY_BOOKINGS = """
SELECT day, performance_id, bookings, seats, revenue FROM analytics.daily_bookings
"""
OCCUPANCY = """
SELECT performance_id, bookings, booked_seats, revenue FROM analytics.performance_occupancy
WHERE bookings > 0
"""
FUNNEL = """
SELECT day, performance_id, started, completed, cancelled_before_completion,
       cancelled_after_completion, expired
FROM analytics.booking_funnel
"""


class Stored(NamedTuple):
    """A reservation in the service's tables."""

    status: str
    version: int
    order: Order


class Row(NamedTuple):
    """A row of the outbox; `mark` is empty where the service wrote it. Headers are sorted."""

    topic: str
    key: bytes
    value: bytes
    mark: str = ""
    headers: tuple[tuple[str, bytes], ...] = ()


class Record(NamedTuple):
    """A record of a topic; `mark` is empty where the relay published what the service wrote."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    mark: str = ""
    headers: tuple[tuple[str, bytes], ...] = ()

    @property
    def row(self) -> Row:
        """The row of the outbox that it was, without a mark."""
        return Row(self.topic, self.key or b"", self.value or b"", "", self.headers)


class Fact(NamedTuple):
    """A row of fct_reservation_events."""

    event_type: str
    occurred_at: datetime
    status: str
    customer_id: str
    concert_id: int
    performance_id: int
    seat_count: int
    amount: int
    currency: str
    partition: int
    offset: int


class State(NamedTuple):
    """A row of fct_reservations."""

    version: int
    status: str
    customer_id: str
    concert_id: int
    performance_id: int
    seat_count: int
    amount: int
    currency: str


class Funnel(NamedTuple):
    """What became of the reservations begun on a day."""

    started: int
    completed: int
    cancelled_before: int
    cancelled_after: int
    expired: int


@dataclass
class Places:
    """The same reservations in all places.

    Attributes:
        told: what clients know.
        unexpected: answers that no client should have got.
        outbox: by id, which is the order of each key.
        records: of both topics, each partition's in order.
        dead_letters: key and value by topic, partition and offset.
        daily_bookings: bookings, seats, revenue by day and performance.
        occupancy: bookings, seats, revenue by performance.
        reconcile: what the product's own comparison found.
    """

    told: Mapping[str, Told]
    stored: Mapping[str, Stored]
    outbox: Sequence[Row]
    records: Sequence[Record]
    facts: Mapping[str, Fact]
    states: Mapping[str, State]
    seats: frozenset[tuple[str, int, int]]
    dead_letters: Mapping[tuple[str, int, int], tuple[bytes | None, bytes | None]]
    daily_bookings: Mapping[tuple[date, int], tuple[int, int, int]]
    occupancy: Mapping[int, tuple[int, int, int]]
    funnel: Mapping[tuple[date, int], Funnel]
    quarantined: int = 0
    unexpected: Sequence[str] = field(default_factory=list)
    reconcile: Sequence[str] = field(default_factory=list)


def read(
    environment: Mapping[str, str],
    *,
    told: Mapping[str, Told],
    unexpected: Sequence[str],
    reconcile: Sequence[str],
) -> Places:
    """Read everything; nothing may be on its way any more."""
    with psycopg.connect(environment["RESERVATION_OWNER_DATABASE_URL"]) as service:
        stored = {
            name: Stored(status, version, Order._make([*order, frozenset(map(tuple, seats or ()))]))
            for name, status, version, *order, seats in service.execute(STORED)
        }
        outbox = [
            Row(topic, key.encode(), payload.encode(), headers.get(MARK, ""), _sorted(headers))
            for topic, key, payload, headers in service.execute(OUTBOX)
        ]
        quarantined = service.execute(QUARANTINED).fetchone()
    with psycopg.connect(environment["ANALYTICS_OWNER_DATABASE_URL"]) as tables:
        tables.execute("SELECT set_config('timezone', 'UTC', false)")
        return Places(
            told=told,
            stored=stored,
            outbox=outbox,
            records=records(environment["KAFKA_BOOTSTRAP_SERVERS"]),
            facts={row[0]: Fact(*row[1:]) for row in tables.execute(FACTS)},
            states={row[0]: State(*row[1:]) for row in tables.execute(STATES)},
            seats=frozenset(tables.execute(SEATS).fetchall()),
            dead_letters={row[:3]: row[3:] for row in tables.execute(DEAD_LETTERS).fetchall()},
            daily_bookings={row[:2]: row[2:] for row in tables.execute(DAILY_BOOKINGS).fetchall()},
            occupancy={row[0]: row[1:] for row in tables.execute(OCCUPANCY).fetchall()},
            funnel={row[:2]: Funnel(*row[2:]) for row in tables.execute(FUNNEL).fetchall()},
            quarantined=quarantined[0] if quarantined else 0,
            unexpected=unexpected,
            reconcile=reconcile,
        )


def record_of(message: Message) -> Record:
    """Return a record of a message without an error."""
    headers: Any = message.headers() or []
    mark = dict(headers).get(MARK, b"") or b""
    return Record(
        str(message.topic()),
        int(message.partition() or 0),
        int(message.offset() or 0),
        message.key(),
        message.value(),
        mark.decode(),
        tuple(sorted((name, value or b"") for name, value in headers)),
    )


def _sorted(headers: Mapping[str, str]) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((name, value.encode()) for name, value in headers.items()))


def records(bootstrap_servers: str) -> list[Record]:
    """Return what a reader of what is committed finds in both topics.

    Raises:
        TimeoutError: their ends were not reached in READ_TIMEOUT_S.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "chaos-audit",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "log_level": 0,
        }
    )
    try:
        known = consumer.list_topics(timeout=KAFKA_TIMEOUT_S).topics
        ends = {
            (topic, number): consumer.get_watermark_offsets(
                TopicPartition(topic, number), timeout=KAFKA_TIMEOUT_S
            )[1]
            for topic in (RESERVATION_TOPIC, CATALOGUE_TOPIC)
            for number in known[topic].partitions
        }
        left = {at for at, end in ends.items() if end > 0}
        consumer.assign([TopicPartition(*at, OFFSET_BEGINNING) for at in left])
        found: list[Record] = []
        deadline_s = time.monotonic() + READ_TIMEOUT_S
        while left:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the ends of {sorted(left)} were not reached")
            for message in consumer.consume(5_000, timeout=0.5):
                if message.error():
                    raise RuntimeError(f"reading Kafka: {message.error()}")
                found.append(record_of(message))
            for at in consumer.position([TopicPartition(*at) for at in left]):
                if at.offset >= ends[at.topic, at.partition]:
                    left.discard((at.topic, at.partition))
        return found
    finally:
        consumer.close()
