"""What the fault tests stand on: an outbox under exactly_once, and the truth about it."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import psycopg
import pytest
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition

from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from devstack.processes import Process
from outbox_relay.exactly_once import LATEST, offset_in
from outbox_relay.producer import PublishError, make_admin
from tests.databases import ReservationDatabase, create_reservation_database
from tests.outbox_relay.conftest import Outbox
from tests.outbox_relay.records import read_topic
from tests.proxy import BreakableKafka, kafka_requests
from tests.waiting import wait_until

# As `outbox-relay topics` makes it.
CURSOR_TOPIC_CONFIG = {
    "cleanup.policy": "compact",
    "segment.ms": "60000",
    "segment.bytes": "1048576",
}
HANDOVER_TIMEOUT_S = 20.0
BACKLOG_ROWS = 20_000
REQUEST_TIMEOUT_S = 10.0
# Of a backlog: enough that one is open at nearly every moment for some seconds.
MANY_TRANSACTIONS = {"OUTBOX_RELAY_CHUNK_MAX_ROWS": "5"}
END_TXN = 26
# Of a broker that has come back, and knows less of its partitions yet than the client was told.
STARTING = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
)

_numbers = itertools.count(1)


@dataclass(frozen=True)
class ExactlyOnceOutbox(Outbox):
    """An outbox whose relay runs under exactly_once, and whose topics are all its own."""

    def environment(self, **more: str) -> dict[str, str]:
        return super().environment(**({"OUTBOX_RELAY_DELIVERY": "exactly_once"} | more))

    @property
    def cursor_topic(self) -> str:
        return f"outbox-relay-cursor.{self.relay_name}"

    def rows(self, topic: str | None = None) -> dict[str, list[bytes]]:
        """The truth: each key's committed payloads by id, which is the order of one writer."""
        with self.owner() as connection:
            found = connection.execute(
                "SELECT key, payload::text FROM outbox WHERE topic = %s ORDER BY id",
                (topic or self.topic,),
            ).fetchall()
        return _by_key((key, payload.encode()) for key, payload in found)

    def arrived(self, topic: str | None = None) -> dict[str, list[bytes]]:
        """What a read_committed consumer has of each key, in order."""
        records = read_topic(self.bootstrap_servers, topic or self.topic)
        return _by_key((r.key, r.value) for r in records)

    def command(
        self, *arguments: str, timeout_s: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `outbox-relay ARGUMENTS…` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "outbox_relay", *arguments],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def succeed(self, *arguments: str) -> str:
        """Run a command that has to end with 0; return what it said."""
        done = self.command(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(self, number: int, timeout_s: float = 30) -> None:
        """Wait until a read_committed consumer has so many records."""

        def count() -> int:
            return sum(map(len, self.arrived().values()))

        wait_until(lambda: count() >= number, timeout_s, f"{number} records")

    def settle(self, timeout_s: float = 40) -> None:
        """Wait until every committed row has arrived; each must have, once, in its key's order."""

        def outstanding() -> int:
            there = sum(map(len, self.arrived().values()))
            return sum(map(len, self.rows().values())) - there

        wait_until(lambda: outstanding() <= 0, timeout_s, "every row to arrive")
        assert self.arrived() == self.rows()


def _by_key(pairs: Iterator[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def make_outbox(
    database: ReservationDatabase,
    cluster: KafkaCluster,
    *,
    bootstrap_servers: str = "",
    partitions: int = 3,
    config: Mapping[str, str] | None = None,
) -> ExactlyOnceOutbox:
    """Create a topic and a cursor topic of a new relay, and let the database know them alone."""
    number = next(_numbers)
    outbox = ExactlyOnceOutbox(
        database,
        bootstrap_servers or cluster.bootstrap_servers,
        f"events-{os.getpid()}-{number}",
        f"relay-{os.getpid()}-{number}",
    )
    cluster.create_topic(outbox.topic, partitions, config)
    cluster.create_topic(outbox.cursor_topic, 1, CURSOR_TOPIC_CONFIG)
    set_topics(database, outbox.topic)
    return outbox


# To be imported where the relays of a module's tests shall run under exactly_once.
@pytest.fixture(name="outbox")
def exactly_once_outbox(
    reservation_database: ReservationDatabase, breakable_kafka: BreakableKafka
) -> ExactlyOnceOutbox:
    """A fresh outbox in a Kafka that may be broken."""
    return make_outbox(reservation_database, breakable_kafka.cluster)


def set_topics(database: ReservationDatabase, *topics: str) -> None:
    """Let an outbox take these topics and no other."""
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("DELETE FROM outbox_topics")
        for topic in topics:
            connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000000)", (topic,))


def term(outbox: ExactlyOnceOutbox) -> int:
    """The number of the last term that was begun."""
    with outbox.owner() as connection:
        found = connection.execute("SELECT max(leader_epoch) FROM outbox_relay_cursor").fetchone()
    assert found is not None
    return int(found[0] or 0)


def end_sessions(outbox: ExactlyOnceOutbox, name: str) -> None:
    """End what a killed relay's session is still about to do in Postgres."""
    with psycopg.connect(outbox.database.relay_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s",
            (f"outbox-relay {name}",),
        )


def with_port(database: ReservationDatabase, port: int) -> ReservationDatabase:
    """The same database as seen through another port: a proxy's, or a copy's server."""

    def moved(url: str) -> str:
        login, _, rest = url.rpartition("@")
        return f"{login}@127.0.0.1:{port}/{rest.partition('/')[2]}"

    return replace(
        database,
        owner_url=moved(database.owner_url),
        service_url=moved(database.service_url),
        relay_url=moved(database.relay_url),
    )


def private_outbox(server: PostgresServer, cluster: KafkaCluster) -> ExactlyOnceOutbox:
    """An outbox in a new database of a server of the test's own."""
    return make_outbox(create_reservation_database(server), cluster)


def says(process: Process, *texts: str) -> bool:
    """Whether a process has logged one of these."""
    log = process.log.read_text("utf-8")
    return any(text in log for text in texts)


def wait_for_leader(outbox: ExactlyOnceOutbox, relay: Process, timeout_s: float = 20) -> None:
    """Wait until this relay is the one that leads."""
    wait_until(
        lambda: str(outbox.status()["leader"]).endswith(f":{relay.pid}"), timeout_s, "the leader"
    )


def has_open_transaction(cluster: KafkaCluster, topic: str, partitions: int = 3) -> bool:
    """Whether records of a transaction that hasn't ended lie in a topic."""
    admin = make_admin({"bootstrap.servers": cluster.bootstrap_servers})
    wanted = {TopicPartition(topic, number): LATEST for number in range(partitions)}

    def ends(isolation: IsolationLevel) -> list[int]:
        futures = admin.list_offsets(
            wanted, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S
        )
        return [offset_in(future, topic) for future in futures.values()]

    def both_ends() -> list[list[int]]:
        try:
            return [ends(IsolationLevel.READ_COMMITTED), ends(IsolationLevel.READ_UNCOMMITTED)]
        except KafkaException as error:
            if error.args[0].code() not in STARTING:
                raise
            return []
        except PublishError:  # -1001: taken for the end twice, it would tell of no transaction
            return []

    committed, written = wait_until(both_ends, HANDOVER_TIMEOUT_S, "the leaders of the partitions")
    return committed != written


def freeze_in_a_transaction(
    outbox: ExactlyOnceOutbox, cluster: KafkaCluster, relay: Process
) -> None:
    """Stop a relay that has a backlog at a moment at which its transaction is open."""

    def caught() -> bool:
        wait_until(lambda: has_open_transaction(cluster, outbox.topic), 20, "a transaction")
        relay.pause()
        if has_open_transaction(cluster, outbox.topic):
            return True
        relay.resume()
        return False

    wait_until(caught, 30, "the relay to be stopped in a transaction")


def is_end_of_transaction(piece: bytes) -> bool:
    """Whether an EndTxn is among the requests."""
    return END_TXN in kafka_requests(piece)
