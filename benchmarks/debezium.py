"""Debezium beside us: its Postgres connector with the outbox event router in Connect standalone.

Two settings, each the best we found: for throughput and for low latency. A connector that is
stopped and resumed in the same JVM is warm; before that it has made its slot, so that a backlog
written meanwhile is all its own to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from benchmarks import connect, events
from benchmarks.surroundings import Surroundings
from devstack.processes import wait_until

VERSION = "3.7.0.Final"
POM = Path(__file__).with_name("debezium-pom.xml")
STATE_TIMEOUT_S = 60.0
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
# In a distributed worker alone; the records of a poll and their offsets are one transaction.
EXACTLY_ONCE = {"exactly.once.support": "required", "transaction.boundary": "poll"}

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
    # As everybody's here; Connect alone would have one request under way, and repeat it blindly.
    "producer.override.enable.idempotence": "true",
    "producer.override.max.in.flight.requests.per.connection": "5",
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
}

PUBLISH = (
    f"CREATE PUBLICATION {PUBLICATION} FOR TABLE outbox"
    " WITH (publish = 'insert', publish_via_partition_root = true)"
)
SLOT_ACTIVE = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s AND active"
DROP_SLOT = (
    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
)


class Connect(connect.Connect):
    """Kafka Connect with the Postgres connector. A context manager."""

    def __init__(self, around: Surroundings, *, exactly_once: bool = False) -> None:
        super().__init__(
            *(around, f"Debezium {VERSION}", POM, f"debezium-{VERSION}", WORKER),
            distributed=exactly_once,
        )
        self._password = token_urlsafe(24)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with self._admin() as connection:
            connection.execute(f"DROP PUBLICATION {PUBLICATION}")
            connection.execute(f"DROP OWNED BY {ROLE}")
            connection.execute(f"DROP ROLE {ROLE}")

    @contextmanager
    def connector(self, name: str, settings: dict[str, str], topic: str) -> Iterator["Connector"]:
        """Run a connector that publishes the outbox to `topic`; it streams when the block begins.

        Raises:
            TimeoutError: it did not come to that.
        """
        connector = Connector(self, name)
        config = CONNECTOR | settings | self._database(name)
        config["transforms.outbox.route.topic.replacement"] = topic
        self.create(name, config)
        try:
            connector.wait("RUNNING", streaming=True)
            yield connector
        finally:
            self.delete(name)
            wait_until(lambda: self._drop_slot(name), STATE_TIMEOUT_S, f"the end of slot {name}")

    def streams(self, name: str) -> bool:
        """Whether a connector reads its slot."""
        with self._admin() as connection:
            found = connection.execute(SLOT_ACTIVE, [slot(name)]).fetchone()
        return found == (1,)

    def prepare(self) -> None:
        """Make the role and the publication."""
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
