"""Apache Kafka before 4.0 with ZooKeeper instead of KRaft, from the same jars.

`DEVSTACK_ZOOKEEPER=1` with `DEVSTACK_KAFKA=3.9.2`: what many still run when they begin with us.
"""

from collections.abc import Mapping

from devstack.java import Progress
from devstack.kafka import LOG_OPTIONS, Broker, KafkaCluster
from devstack.processes import Process
from devstack.state import Run, free_port, port_answers

ZOOKEEPER_TIMEOUT_S = 30.0
SESSION_TIMEOUT_MS = 4_000
TICK_MS = 1_000
# Kafka's exit code for an error while it starts.
REFUSED = 1
KRAFT_ONLY = ("process.roles", "node.id", "controller.", "broker.session", "broker.heartbeat")


class ZooKeeperKafka(KafkaCluster):
    """As `KafkaCluster`, with one ZooKeeper server that knows who leads what."""

    def __init__(
        self,
        run: Run,
        name: str = "kafka",
        brokers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(run, name, brokers, settings)
        self._port = free_port()
        self._zookeeper: Process | None = None

    @property
    def version(self) -> str:
        """What this cluster is, for people."""
        return f"{super().version} with ZooKeeper"

    def prepare(self, progress: Progress = lambda _: None) -> None:
        """`fetch`, and start ZooKeeper; disks aren't formatted."""
        self.fetch(progress)
        for broker in self.brokers:
            self._write_properties(broker)
        folder = self._run.path / f"{self.name}-zookeeper"
        folder.mkdir()
        settings = folder / "zoo.cfg"
        settings.write_text(
            f"clientPort={self._port}\nclientPortAddress=127.0.0.1\ndataDir={folder}\n"
            f"tickTime={TICK_MS}\nadmin.enableServer=false\nmaxClientCnxns=0\n",
            encoding="utf-8",
        )
        self._zookeeper = Process(
            [*self._java, "-Xmx128m", *LOG_OPTIONS,
             "org.apache.zookeeper.server.ZooKeeperServerMain", str(settings)],
            name=f"{self.name} ZooKeeper",
            log=folder.with_suffix(".log"),
            keep_fds=[self._run.lock_fd],
        )  # fmt: skip

    def launch(self) -> None:
        """Start all brokers, once ZooKeeper answers."""
        if self._zookeeper:
            self._zookeeper.wait_ready(lambda: port_answers(self._port), ZOOKEEPER_TIMEOUT_S)
        super().launch()

    def close(self) -> None:
        """End all brokers and ZooKeeper for good."""
        super().close()
        if self._zookeeper:
            self._zookeeper.kill()

    def properties(self, broker: Broker) -> dict[str, str]:
        """The settings of one broker, by Kafka's names."""
        settings = {
            name: value
            for name, value in super().properties(broker).items()
            if not name.startswith(KRAFT_ONLY)
        }
        plain = [part for part in settings["listeners"].split(",") if "CONTROLLER" not in part]
        return settings | {
            "broker.id": str(broker.node_id),
            "zookeeper.connect": f"127.0.0.1:{self._port}",
            "zookeeper.session.timeout.ms": str(SESSION_TIMEOUT_MS),
            "listeners": ",".join(plain),
        }

    def _joined(self) -> bool:
        for broker in self.brokers:
            # Who was killed is refused as long as ZooKeeper holds on to its old session.
            process = broker.process
            if isinstance(process, Process) and process.exit_code == REFUSED and self._came_up:
                broker.launch()
        # The first broker makes it up, and writes it down.
        self._cluster_id = self._written_cluster_id() or self._cluster_id
        return super()._joined()

    def _written_cluster_id(self) -> str | None:
        path = self._file(self.brokers[0], "data") / "meta.properties"
        if not path.exists():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        return next((line[11:] for line in lines if line.startswith("cluster.id=")), None)
