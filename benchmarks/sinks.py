"""Other ways to load the events, each a program of its own: `python -m benchmarks.sinks NAME …`.

`raw-copy` is the limit: the same columns of the same tables from memory, without Kafka. `current`
is our worker without facts and seats: what a sink does. `batch` and `single` are workers as most
people write them: executemany by 500, and a commit per message.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
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
# A killed one's partitions are free again as soon as our worker's; the default is 45 s.
SESSION_TIMEOUT_MS = 10_000

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
"""
# Most people's leave it out.
VERSION_GUARD = "WHERE stored.version < excluded.version"
FACTS_TABLE = """
DROP TABLE IF EXISTS analytics.bench_facts;
CREATE TABLE analytics.bench_facts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, reservation_id text NOT NULL,
    version integer NOT NULL, status text NOT NULL, amount bigint NOT NULL,
    occurred_at timestamptz NOT NULL
);
GRANT SELECT, INSERT ON analytics.bench_facts TO data_platform;
"""
UNIQUE_FACTS = "CREATE UNIQUE INDEX ON analytics.bench_facts (reservation_id, version)"
INSERT_FACT = """
INSERT INTO analytics.bench_facts (reservation_id, version, status, amount, occurred_at)
VALUES (%(reservation_id)s, %(version)s, %(status)s, %(amount)s, %(updated_at)s)
"""
NOT_TWICE = "ON CONFLICT (reservation_id, version) DO NOTHING"


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


@main.command()
@click.argument("topic")
@click.option("--guarded", is_flag=True, help="heed versions, and take a fact once")
def service(topic: str, *, guarded: bool) -> None:
    """Load states and facts by executemany for ever; offsets are committed behind the rows."""
    upsert = UPSERT + VERSION_GUARD * guarded
    insert = INSERT_FACT + NOT_TWICE * guarded
    consumer = _consumer(f"bench-{topic}", {"session.timeout.ms": SESSION_TIMEOUT_MS})
    consumer.subscribe([topic])
    with _connect() as connection:
        while True:
            messages = [m for m in consumer.consume(BATCH_ROWS, 0.5) if not m.error()]
            if messages:
                states = [_state(m) for m in messages]
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.executemany(upsert, states)
                    cursor.executemany(insert, states)
                consumer.commit(asynchronous=False)


@main.command("raw-copy")
@click.argument("topic")
@click.argument("count", type=int)
def raw_copy(topic: str, count: int) -> None:
    """Write the same rows by COPY from memory; each state once, as it ends."""
    texts = list(_texts(topic, count))
    began, before = time.monotonic(), time.process_time()
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
    _tell(count, began, before)


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
        began, before, loaded = 0.0, 0.0, 0
        for messages in _messages(topic, count, rows):
            if not messages:
                break
            began, before = began or time.monotonic(), before or time.process_time()
            with connection.transaction():
                connection.cursor().executemany(
                    UPSERT + VERSION_GUARD, [_state(m) for m in messages]
                )
            loaded += len(messages)
    _tell(loaded, began, before)


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
    consumer = _consumer(f"bench-{os.getpid()}")
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


def _consumer(group: str, settings: Mapping[str, str | int] = MappingProxyType({})) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            **settings,
        }
    )


def _connect() -> psycopg.Connection:
    url = config.load(config.DatabaseSettings).analytics_database_url.get_secret_value()
    return psycopg.connect(url, autocommit=True)


def _tell(count: int, began: float, cpu_before_s: float) -> None:
    """Say how many rows were loaded, how long it took and what it cost this process."""
    told = {
        "rows": count,
        "seconds": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu_before_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    click.echo(json.dumps(told))


if __name__ == "__main__":
    main()
