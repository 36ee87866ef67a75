"""Which parts a stack is made of: containers or programs of this machine, decided here alone.

`DEVSTACK_CONTAINERS=1` insists on containers, `=0` forbids them. Unset, the tests use containers
where a Docker engine on this machine answers and has the image or can pull it, so that they
also run against what others run; the stack for people uses local programs, and a container for
Kafka only where Java or Maven is missing and can't be installed. Whoever asks gets the same
interface either way. `DEVSTACK_ZOOKEEPER=1`: Kafka from its jars, by ZooKeeper (before 4.0).
"""

import os
import socket
from collections.abc import Mapping

from devstack import java
from devstack.kafka import KafkaCluster
from devstack.postgres import DEFAULT_CHOICE, PostgresServer
from devstack.processes import ConfigurationError
from devstack.state import Run
from devstack.zookeeper import ZooKeeperKafka

ENGINE_TIMEOUT_S = 2.0
DEFAULT_SOCKET = "/var/run/docker.sock"


def new_postgres(
    run: Run,
    name: str,
    settings: Mapping[str, str] | None = None,
    *,
    prefer_containers: bool = False,
) -> PostgresServer:
    """A PostgreSQL server, not started yet.

    Raises:
        ConfigurationError: DEVSTACK_CONTAINERS=1 can't be fulfilled.
    """
    major = os.environ.get("DEVSTACK_POSTGRES") or DEFAULT_CHOICE
    if major != "system" and _wants_containers(prefer_containers=prefer_containers):
        from devstack import containers  # noqa: PLC0415 - half a second that most don't need

        image = containers.postgres_image(major)
        if _obtainable(image):
            return containers.ContainerPostgres(run, name, settings, image=image)
    return PostgresServer(run, name, settings)


def new_kafka(
    run: Run,
    name: str,
    brokers: int = 1,
    settings: Mapping[str, str] | None = None,
    *,
    prefer_containers: bool = False,
) -> KafkaCluster:
    """A Kafka cluster of 1 or 3 brokers, not started yet.

    Raises:
        ConfigurationError: DEVSTACK_CONTAINERS=1 can't be fulfilled.
    """
    if os.environ.get("DEVSTACK_ZOOKEEPER") == "1":
        return ZooKeeperKafka(run, name, brokers, settings)
    needed = bool(java.missing()) and not java.can_install()
    if _wants_containers(prefer_containers=prefer_containers or needed):
        from devstack import containers  # noqa: PLC0415 - half a second that most don't need

        image = containers.kafka_image()
        if _obtainable(image):
            return containers.ContainerKafka(run, name, brokers, settings, image=image)
    return KafkaCluster(run, name, brokers, settings)


def engine_answers() -> bool:
    """Whether a Docker engine on this machine answers."""
    host = os.environ.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"
    if not host.startswith("unix://"):
        return False  # its ports aren't ours
    with socket.socket(socket.AF_UNIX) as engine:
        engine.settimeout(ENGINE_TIMEOUT_S)
        try:
            engine.connect(host.removeprefix("unix://"))
            engine.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in engine.recv(100)
        except OSError:
            return False


def _wants_containers(*, prefer_containers: bool) -> bool:
    choice = os.environ.get("DEVSTACK_CONTAINERS") or ""
    if choice not in {"", "0", "1"}:
        raise ConfigurationError(f"DEVSTACK_CONTAINERS: expected 0 or 1, not {choice!r}")
    if choice == "1" and not engine_answers():
        raise ConfigurationError("DEVSTACK_CONTAINERS=1: no Docker engine answers on this machine")
    return choice == "1" or (choice == "" and prefer_containers and engine_answers())


def _obtainable(image: str) -> bool:
    """Whether the engine has an image or can pull it; insisting on containers makes it a must."""
    from devstack import containers  # noqa: PLC0415 - see above

    if containers.obtain(image):
        return True
    if os.environ.get("DEVSTACK_CONTAINERS") == "1":
        raise ConfigurationError(f"DEVSTACK_CONTAINERS=1: the engine can't get the image {image}")
    return False
