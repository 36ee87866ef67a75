"""Other ways to do it, each a program of its own: `python -m benchmarks.contenders NAME …`.

`raw-read` and `raw-produce` are the limits: the same rows read without Kafka, the same records
produced without Postgres. `polling` is a relay as most people write it.
"""

import json
import os
import resource
import signal
import sys
import time
from typing import Any, NoReturn

import click
import psycopg
from confluent_kafka import KafkaError, Message, Producer
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format

READ_ROWS = 5_000
POLLING_ROWS = 1_000
FLUSH_TIMEOUT_S = 120.0

PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    "compression.type": "lz4",
    "partitioner": "murmur2",
    "linger.ms": 2,
    "queue.buffering.max.messages": 200_000,
    "log_level": 0,
}

READ = """
SELECT id, key, payload, headers::text FROM outbox
WHERE id > %(after_id)s ORDER BY id LIMIT %(rows)s
"""
# Most people's: a column that says what is published, an index on what is not.
POLLED_TABLE = """
DROP TABLE IF EXISTS bench_polled;
CREATE TABLE bench_polled (
    id bigint PRIMARY KEY, topic text NOT NULL, key text NOT NULL, payload json NOT NULL,
    headers jsonb NOT NULL, created_at timestamptz NOT NULL, published_at timestamptz
);
CREATE INDEX bench_polled_unpublished ON bench_polled (id) WHERE published_at IS NULL
"""
FILL_POLLED_TABLE = """
INSERT INTO bench_polled
SELECT id, topic, key, payload, headers, created_at FROM outbox WHERE id > %(after_id)s
"""
SETTLE_POLLED_TABLE = "VACUUM (ANALYZE) bench_polled"
POLL = """
SELECT id, key, payload::text, headers FROM bench_polled
WHERE published_at IS NULL ORDER BY id LIMIT %(rows)s FOR UPDATE SKIP LOCKED
"""
MARK = "UPDATE bench_polled SET published_at = now() WHERE id = ANY (%(ids)s)"

Record = tuple[int, str, bytes, str]


class _Bytes(Loader):
    """A payload as its bytes."""

    format = Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@click.group()
def main() -> None:
    """Run one contender to the end of a backlog."""


@main.command("raw-read")
@click.argument("after_id", type=int)
@click.argument("rows", type=int)
def raw_read(after_id: int, rows: int) -> None:
    """Read a backlog in chunks, in binary, and say how long it took."""
    with _connect() as connection:
        _read(connection, after_id, READ_ROWS)  # prepares the statement
        began, before, found = time.monotonic(), _cpu_s(), 0
        while found < rows:
            chunk = _read(connection, after_id, READ_ROWS)
            after_id, found = chunk[-1][0], found + len(chunk)
        seconds, cpu_s = time.monotonic() - began, _cpu_s() - before
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(
        json.dumps({"rows": found, "seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak_mib})
    )


@main.command("raw-produce")
@click.argument("topic")
@click.argument("after_id", type=int)
@click.argument("rows", type=int)
def raw_produce(topic: str, after_id: int, rows: int) -> None:
    """Produce a backlog's records from memory."""
    with _connect() as connection:
        loaded = _read(connection, after_id, rows)
    records = [(key, payload, list(json.loads(text).items())) for _, key, payload, text in loaded]
    producer = _producer()
    click.echo("loaded", err=True)
    for key, payload, headers in records:
        while True:
            try:
                producer.produce(topic, value=payload, key=key, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
    _flush(producer)
    _await_end()


@main.command()
@click.argument("topic")
def polling(topic: str) -> None:
    """Publish `bench_polled` by SKIP LOCKED until nothing is left."""
    producer = _producer()
    with _connect() as connection:
        click.echo("started", err=True)
        rows: list[Any] = [None]
        while rows:
            with connection.transaction():
                rows = connection.execute(POLL, {"rows": POLLING_ROWS}).fetchall()
                for _, key, payload, headers in rows:
                    producer.produce(topic, value=payload, key=key, headers=list(headers.items()))
                _flush(producer)
                connection.execute(MARK, {"ids": [row[0] for row in rows]})
    _await_end()


def _connect() -> psycopg.Connection:
    connection = psycopg.connect(os.environ["RESERVATION_OWNER_DATABASE_URL"], autocommit=True)
    connection.adapters.register_loader("json", _Bytes)
    return connection


def _read(connection: psycopg.Connection, after_id: int, rows: int) -> list[Record]:
    return connection.execute(
        READ, {"after_id": after_id, "rows": rows}, binary=True, prepare=True
    ).fetchall()


def _producer() -> Producer:
    # Only a failure is reported: a callback for each record would cost what is measured here.
    return Producer(
        {
            **PRODUCER,
            "bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
            "delivery.report.only.error": True,
            "on_delivery": _fail,
        }
    )


def _fail(error: KafkaError | None, _message: Message) -> None:
    if error is not None:
        click.echo(f"not delivered: {error.str()}", err=True)
        os._exit(1)


def _flush(producer: Producer) -> None:
    if producer.flush(FLUSH_TIMEOUT_S):
        _give_up(f"not delivered within {FLUSH_TIMEOUT_S:g} s")


def _await_end() -> None:
    """Stay, so that what we cost can still be read."""
    signal.pause()


def _give_up(reason: str) -> NoReturn:
    click.echo(reason, err=True)
    sys.exit(1)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
