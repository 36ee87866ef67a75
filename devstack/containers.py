"""The same servers in containers, by testcontainers.

They use the host's network: the brokers' advertised addresses and the ports are then the same as
for local programs, on 127.0.0.1 alone. That needs an engine on this very machine.

When our process is killed, testcontainers' reaper removes them; where its image can't be had
they stay until `docker rm`.
"""

import signal
from collections.abc import Callable, Mapping, Sequence

from docker.errors import DockerException  # type: ignore[import-untyped] # has no types
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from devstack import processes
from devstack.java import Progress, kafka_version
from devstack.kafka import Broker, KafkaCluster
from devstack.postgres import PostgresServer
from devstack.processes import DevstackError, Running, wait_until
from devstack.state import Run

KILL_TIMEOUT_S = 15.0


def obtain(image: str) -> bool:
    """Have an image at hand, pulled when it isn't there; False when that can't be done."""
    images = DockerClient().client.images
    try:
        images.get(image)
    except DockerException:
        try:
            images.pull(image)
        except DockerException:
            return False
    return True


class Container:
    """One container on the host's network; `Running`, as a local process is."""

    def __init__(
        self, name: str, image: str, environment: Mapping[str, str], command: Sequence[str] = ()
    ) -> None:
        self.name = name
        if not testcontainers_config.ryuk_disabled and not obtain(testcontainers_config.ryuk_image):
            testcontainers_config.ryuk_disabled = True
        container = DockerContainer(image, env=dict(environment)).with_kwargs(network_mode="host")
        if command:
            container.with_command(list(command))
        try:
            self._container = container.start()
        except DockerException as error:
            raise DevstackError(f"the Docker engine could not start {image}: {error}") from None

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        self._container.reload()
        return self._container.status in {"created", "running", "paused", "restarting"}

    def restart(self) -> None:
        """Start it again after its end, with its data."""
        self._container.get_wrapped_container().start()

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """As the function `wait_ready` of `processes`."""
        processes.wait_ready(self, ready, timeout_s)

    def stop(self, timeout_s: float = 10.0, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, insist after `timeout_s`; give its exit code."""
        self._signal(how)
        try:
            wait_until(lambda: not self.alive, timeout_s, f"the end of {self.name}")
        except TimeoutError:
            return self.kill()
        return self._exit_code()

    def kill(self) -> int:
        """SIGKILL; give its exit code."""
        self.resume()
        self._signal(signal.SIGKILL)
        wait_until(lambda: not self.alive, KILL_TIMEOUT_S, f"the end of {self.name}")
        return self._exit_code()

    def pause(self) -> None:
        """Freeze it."""
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        """Let it go on; nothing happens when it isn't paused."""
        self._container.reload()
        if self._container.status == "paused":
            self._container.get_wrapped_container().unpause()

    def log_tail(self) -> str:
        """The end of what it wrote."""
        wrapped = self._container.get_wrapped_container()
        text: bytes = wrapped.logs(tail=processes.LOG_TAIL_LINES)
        return processes.indented(text.decode(errors="replace"))

    def remove(self) -> None:
        """End and remove it with its data."""
        self._container.stop()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            self._container.get_wrapped_container().kill(signal=number.name)

    def _exit_code(self) -> int:
        """As a local process gives it: negative for a signal."""
        code = int(
            self._container.get_wrapped_container().wait(timeout=KILL_TIMEOUT_S)["StatusCode"]
        )
        return 128 - code if code > 128 else code


class ContainerPostgres(PostgresServer):
    """`PostgresServer` from the official image."""

    def __init__(
        self, run: Run, name: str, settings: Mapping[str, str] | None, *, image: str
    ) -> None:
        super().__init__(run, name, settings)
        self.image = image
        self._container: Container | None = None

    @property
    def version(self) -> str:
        """What this server is, for people."""
        return f"PostgreSQL ({self.image})"

    def prepare(self) -> None:
        """Nothing: the image makes its data directory."""

    def launch(self) -> None:
        """Start the server without waiting for it."""
        if self._container and self._came_up:
            self._container.restart()
            return
        self._discard()
        settings = self._settings | {"port": str(self.port)}
        # The image's own preparation talks to the server through a socket.
        settings.pop("unix_socket_directories")
        self._process = self._container = Container(
            f"postgres {self.name}",
            self.image,
            {
                "POSTGRES_PASSWORD": self._password,
                "POSTGRES_INITDB_ARGS": "--auth=scram-sha-256 --no-locale --encoding=UTF8",
            },
            [word for name, value in settings.items() for word in ("-c", f"{name}={value}")],
        )

    def close(self) -> None:
        """End the server for good."""
        self._discard()

    def _discard(self) -> None:
        if self._container:
            self._container.remove()
        self._process = self._container = None


class ContainerKafka(KafkaCluster):
    """`KafkaCluster` from Apache's image."""

    def __init__(
        self, run: Run, name: str, brokers: int, settings: Mapping[str, str] | None, *, image: str
    ) -> None:
        super().__init__(run, name, brokers, settings)
        self.image = image
        self._containers: dict[int, Container] = {}

    @property
    def version(self) -> str:
        """What this cluster is, for people."""
        return f"Kafka ({self.image})"

    def fetch(self, progress: Progress = lambda _: None) -> None:
        """Nothing: whoever made this object has the image."""

    def prepare(self, progress: Progress = lambda _: None) -> None:
        """Nothing: the image formats its disk."""

    def run_broker(self, broker: Broker) -> Running:
        """Start the container of one broker, or a new one for its first start elsewhere."""
        known = self._containers.get(broker.node_id)
        if known and self._came_up:
            known.restart()
            return known
        if known:
            known.remove()
        settings = self.properties(broker)
        del settings["log.dirs"]  # the image's own
        environment = {
            "KAFKA_" + name.upper().replace(".", "_"): value for name, value in settings.items()
        }
        container = Container(
            f"{self.name} broker {broker.node_id}",
            self.image,
            environment | {"CLUSTER_ID": self._cluster_id, "KAFKA_HEAP_OPTS": "-Xmx384m"},
        )
        self._containers[broker.node_id] = container
        return container

    def close(self) -> None:
        """End all brokers for good."""
        for container in self._containers.values():
            container.remove()
        self._containers.clear()


def postgres_image(major: str) -> str:
    """The official image of a major version."""
    return f"postgres:{major}"


def kafka_image() -> str:
    """Apache's image of the version that DEVSTACK_KAFKA names."""
    return f"apache/kafka:{kafka_version()}"
