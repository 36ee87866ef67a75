"""A relay's surroundings: a database, a topic of its own that the outbox knows, and a reader."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from devstack.kafka import KafkaCluster
from devstack.processes import Process
from devstack.state import Run
from outbox_relay import leadership, status
from outbox_relay.config import Settings
from tests.conftest import RunProcess, UniqueTopic
from tests.databases import ReservationDatabase
from tests.outbox_relay.records import Record, read_topic
from tests.proxy import BreakableKafka, breakable

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Outbox:
    """A test's outbox: rows for `topic` are taken, and a relay called `relay_name` serves them."""

    database: ReservationDatabase
    bootstrap_servers: str
    topic: str
    relay_name: str

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a relay of this outbox."""
        return {
            "OUTBOX_RELAY_DATABASE_URL": self.database.relay_url,
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "OUTBOX_RELAY_NAME": self.relay_name,
            "OUTBOX_RELAY_DELIVERY": "at_least_once",
        } | more

    def owner(self) -> psycopg.Connection:
        """A connection of the owner that commits each statement."""
        return psycopg.connect(self.database.owner_url, autocommit=True)

    def insert(self, key: str, payload: str, headers: str = "{}") -> None:
        """Commit one event."""
        with psycopg.connect(self.database.service_url) as connection:
            connection.execute(
                "INSERT INTO outbox (topic, key, payload, headers) VALUES (%s, %s, %s, %s)",
                (self.topic, key, payload, headers),
            )

    def insert_many(self, count: int, keys: int = 100, payload_bytes: int = 20) -> None:
        """Commit `count` events in one transaction, their number as payload."""
        with self.owner() as connection:
            connection.execute(
                "INSERT INTO outbox (topic, key, payload)"
                " SELECT %s, 'key-' || n %% %s, json_build_object('n', n, 'pad', repeat('x', %s))"
                " FROM generate_series(1, %s) AS n",
                (self.topic, keys, payload_bytes, count),
            )

    def status(self) -> dict[str, Any]:
        """What `outbox-relay status` knows, without the second that it takes to tell the rate."""
        settings = Settings(
            outbox_relay_database_url=self.database.relay_url,
            kafka_bootstrap_servers=self.bootstrap_servers,
            outbox_relay_name=self.relay_name,
        )
        with leadership.connect(self.database.relay_url) as connection:
            return status.status(connection, settings, rate_over_s=0)

    def records(self) -> list[Record]:
        """Everything in the topic now."""
        return read_topic(self.bootstrap_servers, self.topic)


@pytest.fixture
def outbox(
    reservation_database: ReservationDatabase, kafka: KafkaCluster, unique_topic: UniqueTopic
) -> Outbox:
    """A fresh outbox with a topic of three partitions."""
    topic = unique_topic(partitions=3, prefix="outbox")
    with psycopg.connect(reservation_database.owner_url) as connection:
        # The broker has not the topics of the product itself.
        connection.execute("DELETE FROM outbox_topics")
        connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000000)", (topic,))
    return Outbox(reservation_database, kafka.bootstrap_servers, topic, f"relay-{next(_numbers)}")


StartRelay = Callable[..., Process]


@pytest.fixture
def start_relay(run_process: RunProcess) -> StartRelay:
    """Starts `outbox-relay run` for an outbox; ended with the test."""

    def start(outbox: Outbox, environment: Mapping[str, str] | None = None) -> Process:
        return run_process("outbox_relay", "run", env=outbox.environment(**dict(environment or {})))

    return start


@pytest.fixture(scope="session")
def breakable_kafka(stack_run: Run) -> Iterator[BreakableKafka]:
    """One broker that tests may freeze, kill and cut off; who does so mends it."""
    with breakable(stack_run, "kafka-breakable", 1) as kafka:
        yield kafka


@pytest.fixture(scope="session")
def three_brokers(stack_run: Run) -> Iterator[BreakableKafka]:
    """Three brokers that tests may freeze, kill and cut off; who does so mends them."""
    with breakable(stack_run, "kafka-three", 3) as kafka:
        yield kafka
