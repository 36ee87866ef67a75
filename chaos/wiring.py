"""The network between the parts: a proxy on each way from one part to another.

Kafka tells its clients where its brokers are, so each client has a listener of its own at every
broker, which names the proxies of that client. Brokers talk to each other through proxies, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Self

from devstack.kafka import Broker, KafkaCluster
from devstack.proxy import Proxy
from devstack.state import Run, free_port

How = Literal["cut", "frozen", "slow"]
SLOW_S = 0.1
PEERS = "PEERS"
SETTINGS = {
    # Each listener has threads of its own.
    "num.network.threads": "1",
    # A dead producer's transaction is looked for every ten seconds otherwise.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    # A follower that is cut off leaves the replicas in sync as soon as it would matter.
    "replica.lag.time.max.ms": "5000",
}


class Ways:
    """The ways from one part to another, by (from, to). Use as a context manager."""

    def __init__(self) -> None:
        self._proxies: dict[tuple[str, str], Proxy] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def add(self, start: str, end: str, port: int) -> int:
        """Make a way to a port; return the port that leads there."""
        proxy = Proxy(lambda: port)
        self._cleanup.callback(proxy.close)
        self._proxies[start, end] = proxy
        return proxy.port

    @contextmanager
    def broken(self, start: str, end: str, how: How) -> Iterator[None]:
        """Break the ways from `start` to all parts whose names begin with `end`."""
        proxies = [
            proxy
            for (one, other), proxy in self._proxies.items()
            if one == start and other.startswith(end)
        ]
        assert proxies, (start, end)  # noqa: S101 - names are ours
        for proxy in proxies:
            if how == "cut":
                proxy.cut()
            elif how == "frozen":
                proxy.freeze()
            else:
                proxy.slow(SLOW_S)
        try:
            yield
        finally:
            for proxy in proxies:
                proxy.open()


class WiredKafka(KafkaCluster):
    """A cluster that each of `clients` reaches by ways of its own."""

    def __init__(
        self,
        run: Run,
        brokers: int,
        ways: Ways,
        clients: Sequence[str],
        folders: Mapping[int, Path],
    ) -> None:
        super().__init__(run, "kafka", brokers, SETTINGS)
        self._folders = folders
        # By node and listener: the port where the broker listens, and the one it tells.
        self._ports: dict[int, dict[str, tuple[int, int]]] = {}
        for broker in self.brokers:
            to = name_of(broker)
            self._ports[broker.node_id] = {}
            for client in [*clients, PEERS]:
                port = free_port()
                self._ports[broker.node_id][_listener(client)] = port, ways.add(client, to, port)

    def servers_for(self, client: str) -> str:
        """The addresses of all brokers, as one client knows them."""
        ports = (self._ports[broker.node_id][_listener(client)][1] for broker in self.brokers)
        return ",".join(f"127.0.0.1:{port}" for port in ports)

    def properties(self, broker: Broker) -> dict[str, str]:
        """The settings of one broker, with a listener for each client."""
        settings = super().properties(broker)
        ports = self._ports[broker.node_id]
        more = {
            "listeners": [f"{name}://127.0.0.1:{port}" for name, (port, _) in ports.items()],
            "advertised.listeners": [
                f"{name}://127.0.0.1:{told}" for name, (_, told) in ports.items()
            ],
            "listener.security.protocol.map": [f"{name}:PLAINTEXT" for name in ports],
        }
        for name, values in more.items():
            settings[name] = ",".join([settings[name], *values])
        settings["inter.broker.listener.name"] = PEERS
        settings["log.dirs"] = str(self._folders[broker.node_id] / f"data-{broker.node_id}")
        return settings


def name_of(broker: Broker) -> str:
    """Return the name of a broker among the parts."""
    return f"broker-{broker.node_id}"


def _listener(client: str) -> str:
    return client.replace("-", "").upper()
