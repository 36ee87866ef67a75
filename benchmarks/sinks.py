"""Other ways to load the events, each a program of its own: `python -m benchmarks.sinks NAME …`.

`raw-copy` is the limit: the same columns of the same tables from memory, without Kafka. `current`
is our worker without facts and seats: what a sink does. `batch` and `single` are workers as most
people write them: executemany by 500, and a commit per message.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click
import psycopg
from confluent_kafka import Consumer, Message

from data_platform import config, sql, star, worker
from data_platform.__main__ import main as data_platform
from data_platform.batch import Slice, decode
from data_platform.events import decode_reservation_event

BATCH_ROWS = 500
# As the worker's own.
COPY_ROWS = 5_000
IDLE_S = 5.0

UPSERT = """
INSERT INTO analytics.fct_reservations AS stored (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, expires_at
)
VALUES (
    %(reservation_id)s, %(version)s, %(status)s, %(customer_id)s, %(concert_id)s,
    %(performance_id)s, %(seat_count)s, %(amount)s, %(currency)s, %(created_at)s, %(updated_at)s,
    %(expires_at)s
)
ON CONFLICT (reservation_id) DO UPDATE SET
    version = excluded.version, status = excluded.status, customer_id = excluded.customer_id,
    concert_id = excluded.concert_id, performance_id = excluded.performance_id,
    seat_count = excluded.seat_count, amount = excluded.amount, currency = excluded.currency,
    created_at = excluded.created_at, updated_at = excluded.updated_at,
    expires_at = excluded.expires_at
WHERE stored.version < excluded.version
"""


@click.group()
def main() -> None:
    """Run one contender."""


@main.command()
def current() -> None:
    """Run our worker without facts and seats."""
    rows_of = star.rows_of

    def states(rows: Any) -> star.Rows:
        found = rows_of(rows)
        return replace(found, facts={}, texts=replace(found.texts, facts="", seats=""))

    worker.rows_of = states  # type: ignore[attr-defined]
    sys.argv[1:] = ["run"]
    data_platform()


@main.command()
@click.argument("topic")
@click.argument("count", type=int)
def batch(topic: str, count: int) -> None:
    """Upsert the current state by executemany."""
    _consume(topic, count, BATCH_ROWS)


@main.command()
@click.argument("topic")
@click.argument("count", type=int)
def single(topic: str, count: int) -> None:
    """Upsert the current state, a commit per message."""
    _consume(topic, count, 1)


@main.command("raw-copy")
@click.argument("topic")
@click.argument("count", type=int)
def raw_copy(topic: str, count: int) -> None:
    """Write the same rows by COPY from memory; each state once, as it ends."""
    texts = list(_texts(topic, count))
    began = time.monotonic()
    with _connect() as connection:
        for facts, states, seats in texts:
            with connection.transaction(), connection.cursor() as cursor:
                for statement, text in (
                    (sql.COPY_EVENTS, facts),
                    (sql.COPY_RESERVATIONS, states),
                    (sql.COPY_SEATS, seats),
                ):
                    with cursor.copy(statement) as copy:
                        copy.write(text)
    _tell(count, began)


def _texts(topic: str, count: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield facts, states and seats of COPY_ROWS events each."""
    begun: set[str] = set()
    waiting: list[Message] = []
    for messages in _messages(topic, count, COPY_ROWS):
        waiting += messages
        while len(waiting) >= COPY_ROWS or (waiting and len(messages) == 0):
            part = Slice(topic, 0, "", 0, 0, waiting[:COPY_ROWS])
            del waiting[:COPY_ROWS]
            rows = star.rows_of(decode([part], {topic: decode_reservation_event}).rows)
            new = rows.latest.keys() - begun
            begun |= new
            texts = star._texts(rows.facts, {n: rows.latest[n] for n in new}, new)  # noqa: SLF001
            yield texts.facts.encode(), texts.new.encode(), texts.seats.encode()


def _consume(topic: str, count: int, rows: int) -> None:
    with _connect() as connection:
        began, loaded = 0.0, 0
        for messages in _messages(topic, count, rows):
            if not messages:
                break
            began = began or time.monotonic()
            with connection.transaction():
                connection.cursor().executemany(UPSERT, [_state(m) for m in messages])
            loaded += len(messages)
    _tell(loaded, began)


def _state(message: Message) -> dict[str, Any]:
    envelope = json.loads(message.value() or b"")
    data = envelope["data"]
    return {
        **{name: data[name] for name in ("reservation_id", "version", "status", "customer_id")},
        **{name: data[name] for name in ("amount", "currency", "created_at", "expires_at")},
        "concert_id": data["concert"]["concert_id"],
        "performance_id": data["performance"]["performance_id"],
        "seat_count": len(data["seats"]),
        "updated_at": envelope["time"],
    }


def _messages(topic: str, count: int, rows: int) -> Iterator[list[Message]]:
    """Yield up to `rows` records at a time, `count` in all; then an empty list."""
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": f"bench-{os.getpid()}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    found, heard_at = 0, time.monotonic() + 30
    while found < count and time.monotonic() < heard_at + IDLE_S:
        messages = [m for m in consumer.consume(min(rows, count - found), 0.5) if not m.error()]
        if messages:
            found, heard_at = found + len(messages), time.monotonic()
            yield messages
            if rows <= BATCH_ROWS:
                consumer.commit(asynchronous=True)
    consumer.close()
    yield []


def _connect() -> psycopg.Connection:
    url = config.load(config.DatabaseSettings).analytics_database_url.get_secret_value()
    return psycopg.connect(url, autocommit=True)


def _tell(count: int, began: float) -> None:
    click.echo(json.dumps({"rows": count, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
