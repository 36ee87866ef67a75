"""Which parts a stack is made of: containers or programs of this machine, decided here alone.

`DEVSTACK_CONTAINERS=1` insists on containers, `=0` forbids them. Unset: containers where a
Docker engine answers, else local programs. Whoever asks gets the same interface either way.
"""

from collections.abc import Mapping

from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from devstack.state import Run


def new_postgres(run: Run, name: str, settings: Mapping[str, str] | None = None) -> PostgresServer:
    """A PostgreSQL server, not started yet."""
    return PostgresServer(run, name, settings)


def new_kafka(
    run: Run, name: str, brokers: int = 1, settings: Mapping[str, str] | None = None
) -> KafkaCluster:
    """A Kafka cluster of 1 or 3 brokers, not started yet."""
    return KafkaCluster(run, name, brokers, settings)
