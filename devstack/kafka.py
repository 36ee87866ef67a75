"""Apache Kafka from its jars: one or three brokers, each a controller too (KRaft).

With three brokers every topic has three replicas of which two must have a record before it is
acknowledged; with one it has one. `DEVSTACK_KAFKA` names another version than 4.3.0.
"""

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
)

from devstack.java import Progress, java_and_jars, kafka_version
from devstack.processes import Process, ProcessDiedError, Running, succeed, wait_until
from devstack.state import Run, free_port, port_answers

QUORUM_STATE = Path("__cluster_metadata-0") / "quorum-state"
START_TIMEOUT_S = 90.0
FORMAT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
TOPIC_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 2.0
BIND_ATTEMPTS = 3

# The formatter runs for half a second: no time to spend on optimising it.
FORMATTER_OPTIONS = ["-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
BROKER_OPTIONS = ["-Xms128m", "-Xmx384m"]
LOG_OPTIONS = [
    f"-Dorg.slf4j.simpleLogger.{name}={value}"
    for name, value in {
        "defaultLogLevel": "warn",
        "showDateTime": "true",
        "dateTimeFormat": "yyyy-MM-dd HH:mm:ss.SSS",
    }.items()
]

# Throw-away data on a small machine. Names and units are Kafka's.
SETTINGS = {
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "unclean.leader.election.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    # Lets a test notice a dead consumer sooner than after six seconds.
    "group.min.session.timeout.ms": "1000",
    # The same for groups of KIP-848, where it is the broker's to say: 45 s by default, and a
    # partition that moves waits for two heartbeats, of 5 s each.
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "10000",
    "group.consumer.min.heartbeat.interval.ms": "500",
    "group.consumer.heartbeat.interval.ms": "500",
    # With the defaults a killed leader is missed for 12.7 s.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "offsets.topic.num.partitions": "8",
    "transaction.state.log.num.partitions": "8",
    "log.segment.bytes": str(64 * 2**20),
    "log.index.size.max.bytes": str(2**20),
    # By default a third of the heap.
    "log.cleaner.dedupe.buffer.size": str(16 * 2**20),
    "num.network.threads": "2",
    "num.io.threads": "4",
}


class Broker:
    """One broker of a cluster. After `kill` or `stop`, `start` keeps its port and its data."""

    def __init__(self, cluster: "KafkaCluster", node_id: int) -> None:
        self.node_id = node_id
        self._cluster = cluster
        self._process: Running | None = None
        self.choose_ports()

    def __repr__(self) -> str:
        return f"<Broker {self.node_id} on port {self.port}>"

    def choose_ports(self) -> None:
        """Take other ports; only before the cluster's first start."""
        self.port, self.controller_port = free_port(), free_port()
        self.second_port = free_port()

    @property
    def process(self) -> Running:
        """What runs it, or ran it last."""
        assert self._process  # noqa: S101 - launch comes first
        return self._process

    def launch(self) -> None:
        """Start it without waiting; nothing happens when it runs."""
        if self._process is None or not self._process.alive:
            self._process = self._cluster.run_broker(self)

    def start(self) -> None:
        """Start it again and wait until the cluster counts it in."""
        self.launch()
        self._cluster.wait_ready()

    def stop(self) -> None:
        """Shut it down in order: its leaderships move first. Killed after STOP_TIMEOUT_S."""
        self.process.stop(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL; nothing happens when it was never started."""
        if self._process:
            self._process.kill()

    def pause(self) -> None:
        """Freeze it."""
        self.process.pause()

    def resume(self) -> None:
        """Let it go on."""
        self.process.resume()


class KafkaCluster:
    """One or three brokers on ports of 127.0.0.1.

    `prepare` gets the software and begins to format the disks, `launch` starts the brokers
    without waiting for them, `wait_ready` waits; `start` is all three.

    Args:
        run: where its files go.
        name: names its folders and logs; unique within the run.
        brokers: 1 or 3.
        settings: broker settings on top of ours.
    """

    def __init__(
        self,
        run: Run,
        name: str = "kafka",
        brokers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._run = run
        # Without its first bit it can't begin with a hyphen, as an option would.
        number = uuid.uuid4().int & (1 << 127) - 1
        self._cluster_id = base64.urlsafe_b64encode(number.to_bytes(16)).decode().rstrip("=")
        self._settings = dict(settings or {})
        self._formatters: list[Process] = []
        self._java: list[str] = []
        self._advertised_ports: dict[int, int] = {}
        self._came_up = False
        self.brokers = [Broker(self, node_id) for node_id in range(1, brokers + 1)]

    def __repr__(self) -> str:
        return f"<KafkaCluster {self.name}: {self.brokers}>"

    @property
    def version(self) -> str:
        """What this cluster is, for people."""
        return f"Kafka {kafka_version()}"

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of all brokers, for a client's configuration."""
        return ",".join(f"127.0.0.1:{broker.port}" for broker in self.brokers)

    def listen_behind(self, ports: Sequence[int]) -> None:
        """Listen on each broker's `second_port` too, as if it were that one of `ports`.

        Clients that come through it are sent to `ports` (proxies to it). Before `prepare`.
        """
        numbers = (broker.node_id for broker in self.brokers)
        self._advertised_ports = dict(zip(numbers, ports, strict=True))

    # ---- life

    def fetch(self, progress: Progress = lambda _: None) -> None:
        """Get Java and the jars where missing, which may take minutes.

        Raises:
            ConfigurationError: Java or Maven is missing and can't be installed by us.
            DevstackError: a download failed.
        """
        java, jars = java_and_jars(self._run, progress)
        # Its temporary files go with the run; a killed broker would leave them elsewhere.
        scratch = [f"-Djava.io.tmpdir={self._run.path}", "-XX:-UsePerfData"]
        self._java = [str(java), *scratch, "-cp", f"{jars}/*"]

    def prepare(self, progress: Progress = lambda _: None) -> None:
        """`fetch`, and begin to format the brokers' disks."""
        self.fetch(progress)
        for broker in self.brokers:
            self._write_properties(broker)
            command = [
                *self._java, *FORMATTER_OPTIONS, "kafka.tools.StorageTool", "format",
                "--cluster-id", self._cluster_id, "--config", str(self._file(broker, "properties")),
                *self.format_options(),
            ]  # fmt: skip
            self._formatters.append(
                self._begin(f"format of broker {broker.node_id}", broker, command)
            )

    def launch(self) -> None:
        """Start all brokers without waiting for them."""
        while self._formatters:
            succeed(self._formatters.pop(), FORMAT_TIMEOUT_S)
        for broker in self.brokers:
            broker.launch()

    def wait_ready(self) -> None:
        """Wait until every broker that was launched has joined and every partition has a leader.

        At the first start ports that somebody else was quicker to take are changed.

        Raises:
            ProcessDiedError: a broker ended first; with the tail of its log.
            TimeoutError: START_TIMEOUT_S were not enough.
        """
        for attempt in range(BIND_ATTEMPTS):
            try:
                wait_until(self._joined, START_TIMEOUT_S, f"{self.version} to be ready")
                break
            except ProcessDiedError as error:
                if (
                    self._came_up
                    or "BindException" not in str(error)
                    or attempt == BIND_ATTEMPTS - 1
                ):
                    raise
                self._move()
        self._came_up = True

    def start(self, progress: Progress = lambda _: None) -> None:
        """Format, start and await all brokers."""
        self.prepare(progress)
        self.launch()
        self.wait_ready()

    def close(self) -> None:
        """End all brokers for good, at once: nobody needs their data."""
        for formatter in self._formatters:
            formatter.kill()
        for broker in self.brokers:
            broker.kill()

    # ---- topics

    def create_topic(
        self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None
    ) -> None:
        """Create a topic, replicated on all brokers, and wait until each partition has a leader.

        Raises:
            KafkaException: the brokers refused.
            TimeoutError: no leaders after TOPIC_TIMEOUT_S.
        """
        admin = self._admin()
        topic = NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=len(self.brokers),
            config=dict(config or {}),
        )
        admin.create_topics([topic], operation_timeout=TOPIC_TIMEOUT_S)[name].result(
            TOPIC_TIMEOUT_S
        )
        wait_until(
            lambda: len(self._leaders(admin, name)) == partitions,
            TOPIC_TIMEOUT_S,
            f"leaders of topic {name}",
        )

    def set_topic_config(self, name: str, config: Mapping[str, str]) -> None:
        """Change settings of a topic.

        Raises:
            KafkaException: the brokers refused.
        """
        change = ConfigResource(ConfigResource.Type.TOPIC, name)
        for setting, value in config.items():
            change.add_incremental_config(
                ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
            )
        admin = self._admin()  # a collected one would drop its futures
        admin.incremental_alter_configs([change])[change].result(TOPIC_TIMEOUT_S)

    def leader_of(self, topic: str, partition: int = 0) -> Broker:
        """The broker that leads a partition.

        Raises:
            TimeoutError: it has no leader for TOPIC_TIMEOUT_S.
        """
        admin = self._admin()
        leader = wait_until(
            lambda: self._leaders(admin, topic).get(partition),
            TOPIC_TIMEOUT_S,
            f"a leader of {topic} [{partition}]",
        )
        return next(broker for broker in self.brokers if broker.node_id == leader)

    def controller(self) -> Broker:
        """The active controller, as the brokers' files tell: no client is told of it."""
        states = [
            json.loads((self._file(broker, "data") / QUORUM_STATE).read_text("utf-8"))
            for broker in self.brokers
        ]
        latest = max(states, key=lambda state: (state["leaderEpoch"], state["leaderId"]))
        return next(broker for broker in self.brokers if broker.node_id == latest["leaderId"])

    # ---- inside

    def run_broker(self, broker: Broker) -> Running:
        """Start the program of one broker."""
        options = [*BROKER_OPTIONS, *LOG_OPTIONS]
        command = [*self._java, *options, "kafka.Kafka", str(self._file(broker, "properties"))]
        return self._begin(f"broker {broker.node_id}", broker, command)

    def _begin(self, what: str, broker: Broker, command: list[str]) -> Process:
        log, locks = self._file(broker, "log"), [self._run.lock_fd]
        return Process(command, name=f"{self.name} {what}", log=log, keep_fds=locks)

    def _file(self, broker: Broker, suffix: str) -> Path:
        return self._run.path / f"{self.name}-{broker.node_id}.{suffix}"

    def format_options(self) -> list[str]:
        """What the formatter is told on top, like the users of SCRAM."""
        return []

    def properties(self, broker: Broker) -> dict[str, str]:
        """The settings of one broker, by Kafka's names."""
        count = len(self.brokers)
        replicas, in_sync = str(count), str(max(1, count - 1))
        voters = (f"{other.node_id}@127.0.0.1:{other.controller_port}" for other in self.brokers)
        advertised = [f"CLIENT://127.0.0.1:{broker.port}"]
        listeners = [*advertised, f"CONTROLLER://127.0.0.1:{broker.controller_port}"]
        if other_port := self._advertised_ports.get(broker.node_id):
            listeners.append(f"SECOND://127.0.0.1:{broker.second_port}")
            advertised.append(f"SECOND://127.0.0.1:{other_port}")
        return {
            "process.roles": "broker,controller",
            "node.id": str(broker.node_id),
            "controller.quorum.voters": ",".join(voters),
            "listeners": ",".join(listeners),
            "advertised.listeners": ",".join(advertised),
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,SECOND:PLAINTEXT,"
            "CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "CLIENT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self._file(broker, "data")),
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            **SETTINGS,
            **self._settings,
        }

    def _write_properties(self, broker: Broker) -> None:
        settings = self.properties(broker)
        lines = "".join(f"{name}={value}\n" for name, value in settings.items())
        self._file(broker, "properties").write_text(lines, encoding="utf-8")

    def _move(self) -> None:
        """Start all over on other ports; they aren't part of what was formatted."""
        self.close()
        for broker in self.brokers:
            broker.choose_ports()
            self._file(broker, "log").unlink()
        for broker in self.brokers:
            self._write_properties(broker)
        self.launch()

    def _joined(self) -> bool:
        for broker in self.brokers:
            if not broker.process.alive and not self._came_up:
                raise ProcessDiedError(f"{broker} ended early\n{broker.process.log_tail()}")
        running = [broker for broker in self.brokers if broker.process.alive]
        if not all(port_answers(broker.port) for broker in running):
            return False
        try:
            known = self._admin().list_topics(timeout=REQUEST_TIMEOUT_S)
        except KafkaException:
            return False
        # Another stack's broker may be what answers on a port that ours failed to get.
        ours = known.cluster_id == self._cluster_id
        return ours and set(known.brokers) >= {broker.node_id for broker in running}

    def _admin(self) -> AdminClient:
        # librdkafka would write every refused connection to our standard error.
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})

    @staticmethod
    def _leaders(admin: AdminClient, topic: str) -> dict[int, int]:
        """Partition → node id of its leader, for those that have one."""
        found = admin.list_topics(topic, timeout=REQUEST_TIMEOUT_S).topics[topic]
        if found.error and found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return {}
        return {number: p.leader for number, p in found.partitions.items() if p.leader >= 0}
