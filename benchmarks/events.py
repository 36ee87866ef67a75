"""The rows that all contenders publish: events as the service really writes them.

The service's own code makes the templates; the database copies them with new reservation ids, the
held and the completed event of each reservation. One half carries a trace context.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import psycopg

from reservation_service import events
from reservation_service.events import (
    ConcertOfReservation,
    PerformanceOfReservation,
    Reservation,
    Seat,
    Status,
)

if TYPE_CHECKING:
    from reservation_service.database import Connection

TOPIC = events.RESERVATION_TOPIC
PARTITIONS = 6
# Stand in the templates where each copy gets an id of its own, of the same length.
TEMPLATE_ID = "01990000-0000-7000-8000-000000000000"
TEMPLATE_TRACE = "0af7651916cd43dd8448eb211c80319c"
VERSIONS: tuple[Status, ...] = ("held", "confirmed")
TEMPLATES = 500
# As many as a service under load commits between two of a reader's polls.
ROWS_PER_TRANSACTION = 100
WRITERS = 2

TEMPLATE_TABLE = """
DROP TABLE IF EXISTS bench_events;
CREATE TABLE bench_events (
    template integer, version integer, payload text, headers text, PRIMARY KEY (template, version)
);
GRANT SELECT ON bench_events TO reservation_service
"""
INSERT_TEMPLATE = "INSERT INTO bench_events VALUES (%s, %s, %s, %s)"
WRITE_BACKLOG = """
WITH reservation AS MATERIALIZED (
    SELECT (random() * 1000000)::integer %% %(templates)s AS template, gen_random_uuid()::text AS id
    FROM generate_series(1, %(reservations)s)
)
INSERT INTO outbox (topic, key, payload, headers)
SELECT %(topic)s, id,
       replace(replace(payload, %(template_id)s, id), %(trace)s, replace(id, '-', ''))::json,
       replace(headers, %(trace)s, replace(id, '-', ''))::jsonb
FROM reservation JOIN bench_events USING (template)
ORDER BY version
"""
WRITE_ONE = """
INSERT INTO outbox (topic, key, payload, headers)
SELECT %(topic)s, %(key)s,
       replace(replace(payload, %(template_id)s, %(key)s),
               %(trace)s, replace(%(key)s, '-', ''))::json,
       replace(headers, %(trace)s, replace(%(key)s, '-', ''))::jsonb
FROM bench_events WHERE template = 1 AND version = 1
"""
LAST_ID = "SELECT coalesce(max(id), 0) FROM outbox"
# Hint bits are set and statistics taken before the first contender reads, for all alike.
SETTLE = ("VACUUM (ANALYZE) outbox", "CHECKPOINT")
DESCRIBE = """
SELECT count(*), avg(octet_length(payload::text))::float8, avg(octet_length(key))::float8,
       avg(octet_length(headers::text))::float8,
       avg((SELECT count(*) FROM jsonb_object_keys(headers)))::float8
FROM (SELECT payload, key, headers FROM outbox WHERE topic = %s ORDER BY id LIMIT 10000) AS sample
"""


class _Recorder:
    """Stands where the service has its connection and keeps what it would have inserted."""

    autocommit = False

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def execute(self, _statement: object, parameters: Mapping[str, Any]) -> None:
        self.rows.append(parameters)


@dataclass(frozen=True)
class Backlog:
    """`rows` committed events, all with ids above `after_id`."""

    after_id: int
    rows: int


def templates(count: int = TEMPLATES) -> list[tuple[int, int, str, str]]:
    """Return (template, version, payload, headers) of `count` reservations' events."""
    recorder, found = _Recorder(), []
    for template in range(count):
        for version, status in enumerate(VERSIONS, start=1):
            traced = f"00-{TEMPLATE_TRACE}-00f067aa0ba902b7-01" if template % 2 else None
            reservation = _reservation(template, version, status)
            events.write_reservation(
                cast("Connection", recorder), reservation, reservation.created_at, traced
            )
            row = recorder.rows[-1]
            found.append((template, version, row["payload"], row["headers"]))
    return found


def _reservation(number: int, version: int, status: Status) -> Reservation:
    created_at = datetime(2026, 3, 1, 12, tzinfo=UTC) + timedelta(milliseconds=137 * number)
    seats = [
        Seat(40_000 + 7 * number + place, "Stalls left", "K", 1 + place, 8_950)
        for place in range(1 + number % 4)
    ]
    return Reservation(
        reservation_id=TEMPLATE_ID,
        version=version,
        status=status,
        customer_id=f"customer-{number:06}",
        created_at=created_at,
        expires_at=created_at + timedelta(minutes=10) if status == "held" else None,
        amount=sum(seat.price for seat in seats),
        currency="EUR",
        concert=ConcertOfReservation(
            17, "Northern Lights Tour", "Harbour Arena, Hamburg", "Europe/Berlin"
        ),
        performance=PerformanceOfReservation(31, datetime(2026, 4, 15, 18, tzinfo=UTC)),
        seats=seats,
    )


def prepare(owner_url: str) -> None:
    """Put the templates into the database."""
    with psycopg.connect(owner_url) as connection:
        connection.execute(TEMPLATE_TABLE)
        connection.cursor().executemany(INSERT_TEMPLATE, templates())


def write_backlog(owner_url: str, rows: int) -> Backlog:
    """Commit `rows` events (a multiple of 200) in transactions of 100, by two writers at once."""
    after_id = last_id(owner_url)
    transactions = rows // ROWS_PER_TRANSACTION // WRITERS
    with ThreadPoolExecutor(WRITERS) as pool:
        for writer in [pool.submit(_write, owner_url, transactions) for _ in range(WRITERS)]:
            writer.result()
    return Backlog(after_id, transactions * ROWS_PER_TRANSACTION * WRITERS)


def write_one(owner_url: str) -> bytes:
    """Commit one event and return its key."""
    key = str(uuid4())
    parameters = {"topic": TOPIC, "key": key, "template_id": TEMPLATE_ID, "trace": TEMPLATE_TRACE}
    with psycopg.connect(owner_url) as connection:
        connection.execute(WRITE_ONE, parameters)
    return key.encode()


def last_id(owner_url: str) -> int:
    """Return the outbox's last id, 0 when it is empty."""
    with psycopg.connect(owner_url) as connection:
        found = connection.execute(LAST_ID).fetchone()
    return 0 if found is None else int(found[0])


def settle(admin_url: str) -> None:
    """Leave nothing to do for whoever reads first."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        for statement in SETTLE:
            connection.execute(statement)


def describe(owner_url: str) -> dict[str, float]:
    """Return the rows' mean sizes in bytes, and the headers of a row."""
    with psycopg.connect(owner_url) as connection:
        found = connection.execute(DESCRIBE, [TOPIC]).fetchone()
    names = ("sampled", "payload_bytes", "key_bytes", "headers_bytes", "headers")
    return (
        {} if found is None else {name: round(v, 1) for name, v in zip(names, found, strict=True)}
    )


def _write(owner_url: str, transactions: int) -> None:
    parameters = {
        "topic": TOPIC,
        "templates": TEMPLATES,
        "reservations": ROWS_PER_TRANSACTION // len(VERSIONS),
        "template_id": TEMPLATE_ID,
        "trace": TEMPLATE_TRACE,
    }
    with psycopg.connect(owner_url, autocommit=True) as connection:
        # What is measured comes later; a lost backlog would be noticed.
        connection.execute("SET synchronous_commit = off")
        for _ in range(transactions):
            connection.execute(WRITE_BACKLOG, parameters, prepare=True)
