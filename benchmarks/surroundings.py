"""The servers that all contenders share, and how each of them is started and ended."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from confluent_kafka import libversion

from benchmarks import events
from benchmarks.arrivals import Arrivals
from devstack.kafka import KafkaCluster
from devstack.processes import ConfigurationError, DevstackError, Process, succeed
from devstack.stack import COMMAND_TIMEOUT_S, Stack
from devstack.steps import Steps

RELAY_START_TIMEOUT_S = 30.0
RELAY_STOP_TIMEOUT_S = 15.0
DELIVERIES = ("at_least_once", "exactly_once")
# Every commit's time, taken by the server: what latencies count from.
SERVER_SETTINGS = {"track_commit_timestamp": "on"}
# For logical decoding; the same for every contender of a run.
PEER_SETTINGS = {"wal_level": "logical"}
POSTMASTER = "SELECT setting FROM pg_settings WHERE name = 'data_directory'"


@dataclass(frozen=True)
class Surroundings:
    """A stack with the templates of the events in it; only local processes can be measured."""

    stack: Stack
    steps: Steps

    @property
    def bootstrap_servers(self) -> str:
        """Kafka's address."""
        return self.stack.kafka.bootstrap_servers

    @property
    def owner_url(self) -> str:
        """The reservation database as its owner."""
        return self.stack.environment["RESERVATION_OWNER_DATABASE_URL"]

    @property
    def admin_url(self) -> str:
        """The reservation database as the server's superuser."""
        return self.stack.reservations.admin_url.rpartition("/")[0] + "/reservations"

    @property
    def relay_url(self) -> str:
        """The reservation database as the relay's role."""
        return self.stack.environment["OUTBOX_RELAY_DATABASE_URL"]

    @property
    def kafka(self) -> KafkaCluster:
        """Kafka."""
        return self.stack.kafka

    def server_pids(self) -> dict[str, int]:
        """Return the processes of the servers."""
        broker = self.kafka.brokers[0].process
        assert isinstance(broker, Process)  # noqa: S101 - checked at the start
        return {"postgres": postmaster(self.admin_url), "kafka": broker.pid}

    def arrivals(self, topic: str) -> Arrivals:
        """Look at a topic from its present end on."""
        return Arrivals(self.bootstrap_servers, topic, events.PARTITIONS)

    def make_topic(self, topic: str) -> None:
        """Make a topic like the events' own, for another contender."""
        self.kafka.create_topic(topic, events.PARTITIONS, {"retention.ms": "-1"})
        self._let_broker_stamp(topic)

    def program(
        self, package: str, *arguments: str, name: str, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start one of our programs on the stack."""
        return self.stack.program(package, *arguments, name=name, env=env)

    @contextmanager
    def relay(self, delivery: str, *, leading: bool = True) -> Iterator[Process]:
        """Run `outbox-relay run`, which ends with the block; at its beginning it is `leading`.

        Where it is not to be waited for, it has just been started.

        Raises:
            DevstackError: it ended, or did not end well.
        """
        name, environment = relay_name(delivery), relay_environment(delivery)
        log = self.stack.run.path / f"{name}.log"
        log.unlink(missing_ok=True)
        process = self.program("outbox_relay", "run", name=name, env=environment)
        try:
            if leading:
                process.wait_ready(says(log, '"leading"'), RELAY_START_TIMEOUT_S)
            yield process
        finally:
            code = process.stop(RELAY_STOP_TIMEOUT_S)
        if code:
            raise DevstackError(f"{name} ended with code {code}\n{process.log_tail()}")

    def make_relay_topics(self) -> None:
        """Make the topics of each relay."""
        for delivery in DELIVERIES:
            environment = relay_environment(delivery)
            arguments = ("topics", "--replication-factor", "1")
            succeed(
                self.program("outbox_relay", *arguments, name="topics", env=environment),
                COMMAND_TIMEOUT_S,
            )
        self._let_broker_stamp(events.TOPIC)

    def _let_broker_stamp(self, topic: str) -> None:
        # A record's time is then when the broker took it, whoever made it.
        self.kafka.set_topic_config(topic, {"message.timestamp.type": "LogAppendTime"})


@contextmanager
def surroundings(steps: Steps, *, peers: bool) -> Iterator[Surroundings]:
    """Start the servers, make the relays' topics and the events' templates.

    Raises:
        ConfigurationError: the servers would be containers, whose cost can't be read.
    """
    with Stack(1, steps) as stack:
        if type(stack.kafka) is not KafkaCluster:
            raise ConfigurationError(
                "the benchmarks measure local processes: install Java and Maven, "
                "and leave DEVSTACK_CONTAINERS unset"
            )
        stack.start()
        with steps.step("the benchmark's settings, topics and events"):
            # Nobody needs the analysts' database here.
            stack.analytics.stop()
            _configure(stack, SERVER_SETTINGS | (PEER_SETTINGS if peers else {}))
            found = Surroundings(stack, steps)
            found.make_relay_topics()
            events.prepare(found.owner_url)
        yield found


def _configure(stack: Stack, settings: Mapping[str, str]) -> None:
    with psycopg.connect(stack.reservations.admin_url, autocommit=True) as connection:
        for name, value in settings.items():
            connection.execute(
                psycopg.sql.SQL("ALTER SYSTEM SET {} = {}").format(
                    psycopg.sql.Identifier(name), psycopg.sql.Literal(value)
                )
            )
    stack.reservations.stop()
    stack.reservations.start()


def relay_name(delivery: str) -> str:
    """Return the name of the relay of a delivery."""
    return f"bench-{delivery.replace('_', '-')}"


def relay_environment(delivery: str) -> dict[str, str]:
    """Return what is set for a relay on top of the stack's environment."""
    return {"OUTBOX_RELAY_NAME": relay_name(delivery), "OUTBOX_RELAY_DELIVERY": delivery}


def says(log: Path, sign: str) -> Callable[[], bool]:
    """Return a condition: a program's log holds a sign."""
    return lambda: sign in log.read_text(encoding="utf-8")


def check_alive(process: Process) -> Callable[[], None]:
    """Return what raises when a program has ended by itself."""

    def check() -> None:
        if not process.alive and process.exit_code:
            raise DevstackError(
                f"{process.name} ended with code {process.exit_code}\n{process.log_tail()}"
            )

    return check


def postmaster(url: str) -> int:
    """Return the process of a Postgres server, which all of its others are children of."""
    with psycopg.connect(url) as connection:
        found = connection.execute(POSTMASTER).fetchone()
    pid = Path(str(found[0] if found else "")) / "postmaster.pid"
    return int(pid.read_text(encoding="ascii").split()[0])


def machine(stack: Stack) -> dict[str, object]:
    """Return what the figures depend on; nothing that tells whose machine it is."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": os.cpu_count(),
        "cpu": ", ".join(sorted(models)),
        "memory_gib": round(memory / 2**30, 1),
        "linux": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "librdkafka": libversion()[0],
        "psycopg": psycopg.__version__,
        "postgres": stack.reservations.version,
        "kafka": stack.kafka.version,
    }
