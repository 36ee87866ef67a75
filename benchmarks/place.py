"""A Kafka and a reservation database behind proxies: as far away as one wants them to be.

All bytes between a program and a server go through a proxy in this process, which lets them arrive
later by half a round trip in each direction. That is so with no delay, too: a ratio of two delays
is theirs alone. Bandwidth and loss stay those of one machine.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks import events, loader
from benchmarks.results import Figure
from benchmarks.surroundings import RELAY_STOP_TIMEOUT_S, Surroundings
from devstack.kafka import KafkaCluster
from devstack.parts import new_postgres
from devstack.postgres import PostgresServer
from devstack.processes import DevstackError, Process, succeed
from devstack.proxy import Proxy
from devstack.stack import COMMAND_TIMEOUT_S
from tests.databases import ReservationDatabase, create_reservation_database
from tests.proxy import BreakableKafka

# As short as a delay can be that goes through the same threads as the others.
NO_DELAY_S = 1e-6
WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'"


@dataclass(frozen=True)
class Place(Surroundings):
    """Surroundings with a Kafka and a reservation database behind proxies."""

    broken: BreakableKafka
    server: PostgresServer
    database: ReservationDatabase
    postgres: Proxy
    analysts: Proxy

    @property
    def kafka(self) -> KafkaCluster:
        """This section's Kafka, without its proxies."""
        return self.broken.cluster

    @property
    def bootstrap_servers(self) -> str:
        """The way that is never slow: who measures uses it."""
        return self.kafka.bootstrap_servers

    @property
    def owner_url(self) -> str:
        """The reservation database as its owner."""
        return self.database.owner_url

    @property
    def admin_url(self) -> str:
        """The reservation database as the server's superuser."""
        return f"{self.server.admin_url.rpartition('/')[0]}/{self.database.name}"

    def environment(self, name: str, delivery: str = "exactly_once") -> dict[str, str]:
        """Return the settings of programs whose ways go through the proxies."""
        analytics = self.stack.analytics
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.broken.bootstrap_servers,
            "OUTBOX_RELAY_DATABASE_URL": _moved(
                self.database.relay_url, self.server.port, self.postgres.port
            ),
            "OUTBOX_RELAY_NAME": name,
            "OUTBOX_RELAY_DELIVERY": delivery,
            "ANALYTICS_DATABASE_URL": _moved(
                self.stack.environment["ANALYTICS_DATABASE_URL"], analytics.port, self.analysts.port
            ),
            "DATA_PLATFORM_GROUP": name,
        }

    def delay(self, round_trip_ms: float) -> None:
        """Set the round trip of every way."""
        for proxy in (*self.broken.proxies, self.postgres, self.analysts):
            proxy.slow(max(round_trip_ms / 2_000, NO_DELAY_S))

    def make_topics(self, name: str) -> None:
        """Make a relay's topics."""
        arguments = ("topics", "--replication-factor", "1")
        process = self.program(
            "outbox_relay", *arguments, name=f"topics-{name}", env=self.environment(name)
        )
        succeed(process, COMMAND_TIMEOUT_S)

    @contextmanager
    def relay_of(self, name: str, delivery: str = "exactly_once") -> Iterator[Process]:
        """Run a relay of this name; it ends with the block."""
        process = self.program(
            "outbox_relay", "run", name=name, env=self.environment(name, delivery)
        )
        try:
            yield process
        finally:
            code = process.stop(RELAY_STOP_TIMEOUT_S)
        if code:
            raise DevstackError(f"{name} ended with code {code}\n{process.log_tail()}")

    def ask(self, statement: str) -> float:
        """Ask the reservation server for a number."""
        return number(self.admin_url, statement)


def load_topic(
    there: Place,
    group: str,
    name: str,
    offsets: int,
    *,
    workers: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Figure:
    """Load a topic up to its end, all of whose offsets are `offsets` in sum."""
    environment = there.environment(group) | {"DATA_PLATFORM_RESERVATION_TOPIC": name}
    environment |= settings or {}

    def loaded(connection: psycopg.Connection) -> int:
        found = connection.execute(loader.LOADED, [name]).fetchone()
        return int(found[0]) if found else 0

    with ExitStack() as cleanup:
        running = []
        for which in range(workers):
            running.append(
                there.program("data_platform", "run", name=f"{group}-{which}", env=environment)
            )
            cleanup.callback(running[-1].stop)
        return loader.watch_processes(there, running, loaded, offsets)


@contextmanager
def place(around: Surroundings, broken: BreakableKafka, name: str) -> Iterator[Place]:
    """Start a reservation server of its own, with a migrated database."""
    server, analytics = new_postgres(around.stack.run, name), around.stack.analytics
    try:
        server.start()
        database = create_reservation_database(server)
        events.prepare(database.owner_url)
        with Proxy(lambda: server.port) as postgres, Proxy(lambda: analytics.port) as analysts:
            place = Place(around.stack, around.steps, broken, server, database, postgres, analysts)
            place.delay(0)
            yield place
    finally:
        server.close()


def _moved(url: str, port: int, to: int) -> str:
    return url.replace(f":{port}/", f":{to}/")


def number(url: str, statement: str) -> float:
    """Ask a server for a number."""
    with psycopg.connect(url) as connection:
        found = connection.execute(statement).fetchone()
    return float(found[0] if found else 0)


def log_bytes(kafka: KafkaCluster, name: str) -> int:
    """Return what Kafka's segments of a topic hold."""
    folder = Path(kafka.properties(kafka.brokers[0])["log.dirs"])
    return sum(file.stat().st_size for file in folder.glob(f"{name}-[0-9]*/*.log"))
