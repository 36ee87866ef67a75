"""Debezium's JDBC sink beside our loader: upserts of the current state by UNNEST, 5,000 at a time.

It loads flat records, each with a reservation's columns and nothing else: less to read than the
events themselves, and no transformation, so that it can show its best. Their schema is told once,
to the converter. Two tasks share the partitions. What counts is measured in a JVM that has loaded
another topic before.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from benchmarks import connect
from benchmarks.surroundings import Surroundings
from devstack.processes import wait_until

VERSION = "3.5.0.Final"
POM = Path(__file__).with_name("jdbc-sink-pom.xml")
NAME = "bench-jdbc-sink"
TASKS = 2
BATCH_ROWS = 5_000
TIMEOUT_S = 60.0

NUMBERS = {"concert_id", "performance_id", "amount"}
SHORT_NUMBERS = {"version", "seat_count"}
TIMES = {"created_at", "updated_at", "expires_at"}
COLUMNS = (
    *("reservation_id", "version", "status", "customer_id", "concert_id", "performance_id"),
    *("seat_count", "amount", "currency", "created_at", "updated_at", "expires_at"),
)

CONNECTOR = {
    "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
    "tasks.max": str(TASKS),
    "insert.mode": "upsert",
    "primary.key.mode": "record_key",
    "primary.key.fields": "reservation_id",
    "schema.evolution": "none",
    # Else a restart of Postgres ends the tasks, and a person has to start them.
    "connection.restart.on.errors": "true",
    "collection.name.format": "analytics.fct_reservations",
    "batch.size": str(BATCH_ROWS),
    # Without it and `key_of`, a batch with two events of one reservation ends the
    # task: "ON CONFLICT DO UPDATE command cannot affect row a second time".
    "use.reduction.buffer": "true",
    "dialect.postgres.unnest.insert.enabled": "true",
    "key.converter": "org.apache.kafka.connect.json.JsonConverter",
    "key.converter.schemas.enable": "true",
    "value.converter": "org.apache.kafka.connect.json.JsonConverter",
    "value.converter.schemas.enable": "true",
    # A killed one's partitions are free again as soon as our worker's; Kafka's default is 45 s.
    "consumer.override.session.timeout.ms": "10000",
    "consumer.override.max.poll.records": str(BATCH_ROWS),
    "consumer.override.fetch.min.bytes": str(2**20),
    "consumer.override.max.partition.fetch.bytes": str(4 * 2**20),
}
WORKER = {
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "org.apache.kafka.connect.json.JsonConverter",
}


def flat(event: str) -> str:
    """Return an event's current state as a flat record: the columns of the table."""
    envelope = json.loads(event)
    data = envelope["data"]
    state = data | {
        "concert_id": data["concert"]["concert_id"],
        "performance_id": data["performance"]["performance_id"],
        "seat_count": len(data["seats"]),
        "updated_at": envelope["time"],
    }
    return json.dumps({name: state[name] for name in COLUMNS}, separators=(",", ":"))


def key_of(reservation_id: str) -> str:
    """Return a record's key: a struct, which the reduction buffer takes for granted."""
    return f'{{"reservation_id":"{reservation_id}"}}'


def schema(columns: Sequence[str]) -> str:
    """Return the schema of a flat record or its key, as Connect's JSON converter has it."""
    fields = [_field(name) for name in columns]
    return json.dumps({"type": "struct", "optional": False, "fields": fields})


def _field(name: str) -> dict[str, Any]:
    kind = "int64" if name in NUMBERS else "int32" if name in SHORT_NUMBERS else "string"
    logical = {"name": "io.debezium.time.ZonedTimestamp"} if name in TIMES else {}
    return {"field": name, "type": kind, "optional": name == "expires_at", **logical}


def started(around: Surroundings) -> connect.Connect:
    """Return Connect with the sink's jars: a context manager."""
    title = f"Debezium's JDBC sink {VERSION}"
    return connect.Connect(around, title, POM, f"jdbc-sink-{VERSION}", WORKER)


@contextmanager
def sink(connected: connect.Connect, around: Surroundings, topic: str) -> Iterator[None]:
    """Load a topic while the block runs.

    Raises:
        RuntimeError: Connect refused it, or a task failed; with what caused it.
        TimeoutError: it did not start.
    """
    name = f"{NAME}-{topic}"
    config = CONNECTOR | _database(around) | {"topics": topic}
    config["key.converter.schema.content"] = schema(COLUMNS[:1])
    config["value.converter.schema.content"] = schema(COLUMNS)
    connected.create(name, config)
    try:
        wait_until(lambda: running(connected, topic), TIMEOUT_S, f"{name} to run")
        yield
    finally:
        connected.delete(name)


def running(connected: connect.Connect, topic: str) -> bool:
    """Whether all tasks run.

    Raises:
        RuntimeError: one has failed; with what caused it.
    """
    try:
        found = connected.call("GET", f"/connectors/{NAME}-{topic}/status")
    except RuntimeError:  # not known yet
        return False
    for task in found["tasks"]:
        if task["state"] == "FAILED":
            raise RuntimeError(_causes(task["trace"]))
    return [task["state"] for task in found["tasks"]] == ["RUNNING"] * TASKS


def _causes(trace: str) -> str:
    lines = trace.splitlines()
    return "\n".join([line for line in lines if line.startswith("Caused by")] or lines)


def _database(around: Surroundings) -> dict[str, str]:
    url = urlsplit(around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"])
    return {
        "connection.url": f"jdbc:postgresql://{url.hostname}:{url.port}{url.path}",
        "connection.username": unquote(url.username or ""),
        "connection.password": unquote(url.password or ""),
    }
