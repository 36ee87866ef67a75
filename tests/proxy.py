"""A Kafka whose network a test can break; the proxy itself is `devstack.proxy`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from devstack.kafka import KafkaCluster
from devstack.parts import new_kafka
from devstack.processes import ConfigurationError
from devstack.proxy import Proxy, kafka_requests
from devstack.state import Run
from tests.require import require

__all__ = ["BreakableKafka", "Proxy", "breakable", "kafka_requests"]

# A dead producer's transaction is looked for every ten seconds otherwise.
BREAKABLE = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000"}


@dataclass(frozen=True)
class BreakableKafka:
    """A cluster with a second way to it that goes through proxies, one a broker."""

    cluster: KafkaCluster
    proxies: Sequence[Proxy]

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of the brokers behind the proxies."""
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies)


@contextmanager
def breakable(run: Run, name: str, brokers: int) -> Iterator[BreakableKafka]:
    """Start a cluster with a proxy before each broker."""
    cluster = new_kafka(run, name, brokers, BREAKABLE, prefer_containers=True)

    def second_port(index: int) -> Callable[[], int]:
        return lambda: cluster.brokers[index].second_port

    proxies = [Proxy(second_port(index)) for index in range(brokers)]
    try:
        cluster.listen_behind([proxy.port for proxy in proxies])
        try:
            cluster.start()
        except ConfigurationError as error:
            require(available=False, what=str(error))
        yield BreakableKafka(cluster, proxies)
    finally:
        cluster.close()
        for proxy in proxies:
            proxy.close()
