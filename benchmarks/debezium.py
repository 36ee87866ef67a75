"""Debezium beside us: its Postgres connector with the outbox event router in Connect standalone.

Two settings, each the best we found: for throughput and for low latency. A connector that is
stopped and resumed in the same JVM is warm; before that it has made its slot, so that a backlog
written meanwhile is all its own to read.
"""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Self
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from benchmarks import events
from benchmarks.surroundings import Surroundings
from devstack import java
from devstack.kafka import LOG_OPTIONS
from devstack.processes import Process, wait_until
from devstack.state import free_port

VERSION = "3.7.0.Final"
POM = Path(__file__).with_name("debezium-pom.xml")
JAVA_OPTIONS = [
    # As Connect's own start script has them.
    *("-Xms256M", "-Xmx2G", "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20"),
    *("-XX:InitiatingHeapOccupancyPercent=35", "-XX:+ExplicitGCInvokesConcurrent"),
]
START_TIMEOUT_S = 90.0
STATE_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 30.0
ROLE = "bench_debezium"
PUBLICATION = "bench_debezium"

THROUGHPUT = {
    "poll.interval.ms": "5",
    "max.batch.size": "8192",
    "max.queue.size": "65536",
    "producer.override.linger.ms": "5",
    "producer.override.batch.size": str(256 * 1024),
}
LOW_LATENCY = {"poll.interval.ms": "1", "producer.override.linger.ms": "0"}

CONNECTOR = {
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "tasks.max": "1",
    "plugin.name": "pgoutput",
    "publication.name": PUBLICATION,
    "publication.autocreate.mode": "disabled",
    "table.include.list": "public.outbox",
    "snapshot.mode": "no_data",
    "skipped.operations": "u,d,t",
    "extended.headers.enabled": "false",
    "tombstones.on.delete": "false",
    # Our own relay's, by which it flushes the WAL: events of a topic that nobody has made.
    "message.prefix.exclude.list": ".*",
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "org.apache.kafka.connect.storage.StringConverter",
    "header.converter": "org.apache.kafka.connect.storage.StringConverter",
    "producer.override.acks": "all",
    "producer.override.compression.type": "lz4",
    "transforms": "outbox",
    "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
    "transforms.outbox.table.field.event.id": "id",
    "transforms.outbox.table.field.event.key": "key",
    "transforms.outbox.table.field.event.payload": "payload",
    "transforms.outbox.route.by.field": "topic",
    # The router can't unpack a JSON object into headers: they go as one.
    "transforms.outbox.table.fields.additional.placement": "headers:header:headers",
}

WORKER = {
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "org.apache.kafka.connect.storage.StringConverter",
    "connector.client.config.override.policy": "All",
    "plugin.discovery": "hybrid_warn",
    "offset.flush.interval.ms": "5000",
}

PUBLISH = (
    f"CREATE PUBLICATION {PUBLICATION} FOR TABLE outbox"
    " WITH (publish = 'insert', publish_via_partition_root = true)"
)
SLOT_ACTIVE = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s AND active"
DROP_SLOT = (
    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
)


class Connect:
    """Kafka Connect in one JVM. A context manager."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._port = free_port()
        self._password = token_urlsafe(24)
        self._process: Process | None = None

    def __enter__(self) -> Self:
        around, run = self._around, self._around.stack.run
        version = java.kafka_version()
        with around.steps.step(f"Debezium {VERSION} in Kafka Connect {version}") as step:
            jars = java.jars_of(POM, f"debezium-{VERSION}-connect-{version}", run, step.note)
            program, _ = java.java_and_jars(run, step.note)
            self._prepare_database()
            settings = run.path / "connect.properties"
            settings.write_text(self._worker_properties(), encoding="utf-8")
            self._process = Process(
                [
                    *(program, f"-Djava.io.tmpdir={run.path}", "-XX:-UsePerfData"),
                    *(*JAVA_OPTIONS, *LOG_OPTIONS, "-cp", f"{jars}/*"),
                    *("org.apache.kafka.connect.cli.ConnectStandalone", settings),
                ],
                name="Kafka Connect",
                log=run.path / "connect.log",
                keep_fds=[run.lock_fd],
            )
            self._process.wait_ready(self._answers, START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()
        with self._admin() as connection:
            connection.execute(f"DROP PUBLICATION {PUBLICATION}")
            connection.execute(f"DROP OWNED BY {ROLE}")
            connection.execute(f"DROP ROLE {ROLE}")

    @property
    def process(self) -> Process:
        """The JVM."""
        assert self._process  # noqa: S101 - within the block
        return self._process

    @contextmanager
    def connector(self, name: str, settings: dict[str, str], topic: str) -> Iterator["Connector"]:
        """Run a connector that publishes the outbox to `topic`; it streams when the block begins.

        Raises:
            TimeoutError: it did not come to that.
        """
        connector = Connector(self, name)
        config = CONNECTOR | settings | self._database(name)
        config["transforms.outbox.route.topic.replacement"] = topic
        self.call("POST", "/connectors", {"name": name, "config": config})
        try:
            connector.wait("RUNNING", streaming=True)
            yield connector
        finally:
            self.call("DELETE", f"/connectors/{name}")
            wait_until(lambda: self._drop_slot(name), STATE_TIMEOUT_S, f"the end of slot {name}")

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Ask Connect's REST interface.

        Raises:
            RuntimeError: it refused.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310 - our own JVM
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"Kafka Connect: {method} {path}: {error.read()[:500]!r}") from error
        return json.loads(text) if text else None

    def streams(self, name: str) -> bool:
        """Whether a connector reads its slot."""
        with self._admin() as connection:
            found = connection.execute(SLOT_ACTIVE, [slot(name)]).fetchone()
        return found == (1,)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)):
                return False
        try:
            return bool(self.call("GET", "/connectors") == [])
        except (RuntimeError, urllib.error.URLError, OSError):
            return False

    def _prepare_database(self) -> None:
        with self._admin() as connection:
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {}").format(
                    sql.Identifier(ROLE), sql.Literal(self._password)
                )
            )
            connection.execute(f"GRANT SELECT ON outbox TO {ROLE}")
            connection.execute(PUBLISH)

    def _drop_slot(self, name: str) -> bool:
        try:
            with self._admin() as connection:
                connection.execute(DROP_SLOT, [slot(name)])
        except psycopg.errors.ObjectInUse:
            return False
        return True

    def _admin(self) -> psycopg.Connection:
        return psycopg.connect(self._around.admin_url, autocommit=True)

    def _worker_properties(self) -> str:
        settings = WORKER | {
            "bootstrap.servers": self._around.bootstrap_servers,
            "listeners": f"http://127.0.0.1:{self._port}",
            "offset.storage.file.filename": str(self._around.stack.run.path / "connect.offsets"),
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def _database(self, name: str) -> dict[str, str]:
        url = urlsplit(self._around.owner_url)
        return {
            "database.hostname": "127.0.0.1",
            "database.port": str(url.port),
            "database.user": ROLE,
            "database.password": self._password,
            "database.dbname": url.path.removeprefix("/"),
            "topic.prefix": name,
            "slot.name": slot(name),
        }


@dataclass(frozen=True)
class Connector:
    """One connector of a JVM."""

    connect: Connect
    name: str

    def stop(self) -> None:
        """End its task; the slot keeps what comes. (A paused one would go on reading ahead.)"""
        self.connect.call("PUT", f"/connectors/{self.name}/stop")
        self.wait("STOPPED", streaming=False)

    def resume(self) -> None:
        """Let it go on, without waiting for it."""
        self.connect.call("PUT", f"/connectors/{self.name}/resume")

    def wait(self, state: str, *, streaming: bool) -> None:
        """Wait until it is in a state.

        Raises:
            TimeoutError: with the end of Connect's log.
        """

        def arrived() -> bool:
            if not self.connect.process.alive:
                raise RuntimeError(self.connect.process.log_tail())
            try:
                found = self.connect.call("GET", f"/connectors/{self.name}/status")
            except RuntimeError:  # not known yet
                return False
            reached = found["connector"]["state"] == state
            return reached and self.connect.streams(self.name) == streaming

        try:
            wait_until(arrived, STATE_TIMEOUT_S, f"{self.name} to be {state}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.connect.process.log_tail()}") from None


def slot(name: str) -> str:
    """Return the replication slot of a connector."""
    return name.replace("-", "_")


def topic_of(name: str) -> str:
    """Return the topic that a connector writes."""
    return f"{events.TOPIC}.{name}"
