"""A platform's surroundings: a database, a topic and a group of its own, and workers."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from devstack.kafka import KafkaCluster
from devstack.processes import Process
from tests.conftest import RunProcess, UniqueTopic
from tests.data_platform.histories import FACTS, STATES, Event
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

LOAD_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 30.0
PRODUCE_TIMEOUT_S = 30.0

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Platform:
    """One test's platform.

    `records_in` tells how many records were put into the topic by `produce`.
    """

    database: AnalyticsDatabase
    bootstrap_servers: str
    topic: str
    catalogue_topic: str
    group: str
    properties_file: Path
    run_process: RunProcess

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a worker of this platform."""
        return {
            "ANALYTICS_DATABASE_URL": self.database.loader_url,
            "ANALYTICS_OWNER_DATABASE_URL": self.database.owner_url,
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "KAFKA_PROPERTIES_FILE": str(self.properties_file),
            "DATA_PLATFORM_GROUP": self.group,
            "DATA_PLATFORM_RESERVATION_TOPIC": self.topic,
            "DATA_PLATFORM_CATALOGUE_TOPIC": self.catalogue_topic,
        } | more

    def worker(self, **more: str) -> Process:
        """Start `data-platform run`."""
        return self.run_process("data_platform", "run", env=self.environment(**more))

    def command(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run another command of data-platform to its end."""
        return subprocess.run(
            [sys.executable, "-m", "data_platform", *arguments],
            env=os.environ | self.environment(**more),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        answer = self.command("status", "--json")
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def produce(self, events: Iterable[Event]) -> None:
        """Put events into the topic, each into its key's partition."""
        self.produce_raw((one.key, one.value) for one in events)

    def produce_raw(
        self,
        records: Iterable[tuple[bytes | None, bytes | None]],
        partition: int | None = None,
        headers: list[tuple[str, str | bytes | None]] | None = None,
        topic: str | None = None,
    ) -> None:
        """Put records into the topic as they are."""
        producer = Producer(
            {"bootstrap.servers": self.bootstrap_servers, "partitioner": "murmur2_random"}
        )
        for key, value in records:
            producer.produce(
                topic or self.topic,
                value,
                key,
                partition=-1 if partition is None else partition,
                headers=list(headers or []),
            )
            producer.poll(0)
        assert producer.flush(PRODUCE_TIMEOUT_S) == 0

    def rows(
        self, query: str, parameters: Mapping[str, Any] | None = None
    ) -> list[tuple[Any, ...]]:
        """What the database says to a query."""
        with psycopg.connect(self.database.owner_url) as connection:
            return connection.execute(query, parameters).fetchall()

    def execute(self, statement: str) -> None:
        """Change something as the database's owner."""
        with psycopg.connect(self.database.owner_url) as connection:
            connection.execute(statement)

    def facts(self) -> list[tuple[Any, ...]]:
        """The rows of fct_reservation_events, without their place in Kafka."""
        return self.rows(FACTS)

    def states(self) -> list[tuple[Any, ...]]:
        """The rows of fct_reservations."""
        return self.rows(STATES)

    def dead_letters(self) -> list[tuple[Any, ...]]:
        """Key, value, headers and reason of each dead letter, in Kafka's order."""
        return self.rows(
            "SELECT raw_key, raw_value, raw_headers, reason FROM analytics.dead_letters"
            " ORDER BY kafka_partition, kafka_offset"
        )

    def loaded_offsets(self) -> int:
        """How many offsets have been loaded, over all partitions."""
        rows = self.rows("SELECT coalesce(sum(next_offset), 0)::bigint FROM analytics.load_offsets")
        return int(rows[0][0])

    def wait_for_offsets(self, count: int, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Wait until so many offsets have been loaded."""
        wait_until(lambda: self.loaded_offsets() >= count, timeout_s, f"{count} offsets loaded")


MakePlatform = Callable[..., Platform]


@pytest.fixture
def make_platform(run_process: RunProcess, tmp_path: Path) -> MakePlatform:
    """A factory of platforms on parts of the test's choice."""

    def make(database: AnalyticsDatabase, kafka: KafkaCluster, topic: str) -> Platform:
        properties = tmp_path / "kafka.properties"
        # A killed worker's partitions move soon.
        properties.write_text("session.timeout.ms=2000\nheartbeat.interval.ms=500\n")
        group = f"data-platform-{next(_numbers)}-{os.getpid()}"
        catalogue_topic = f"catalogue-of-{group}"
        kafka.create_topic(catalogue_topic, 1)
        return Platform(
            database,
            kafka.bootstrap_servers,
            topic,
            catalogue_topic,
            group,
            properties,
            run_process,
        )

    return make


@pytest.fixture
def platform(
    make_platform: MakePlatform,
    analytics_database: AnalyticsDatabase,
    kafka: KafkaCluster,
    unique_topic: UniqueTopic,
) -> Platform:
    """A platform on the session's servers, with a topic of six partitions."""
    return make_platform(analytics_database, kafka, unique_topic(6))
