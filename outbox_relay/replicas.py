"""How well Kafka keeps what we publish: the leader asks, in a thread of its own, for the metrics.

No exporter beside the brokers is needed: what a client is told of each partition (leader, replicas,
those in sync) is what counts for us. Whatever fails here delays no event and ends no term.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from confluent_kafka import KafkaException
from confluent_kafka.admin import TopicMetadata  # type: ignore[attr-defined]  # without a word

from outbox_relay.config import Settings
from outbox_relay.metrics import Metrics
from outbox_relay.producer import REQUEST_TIMEOUT_S, make_admin

INTERVAL_S = 10.0


class Replicas(threading.Thread):
    """Tells the metrics of one term about the partitions of all topics that we may see."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(name="replicas", daemon=True)
        self._properties = settings.kafka_properties()
        self._metrics = metrics
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask it to end; it may still wait for Kafka, and tells nothing any more."""
        self._stopping.set()

    def run(self) -> None:
        """Ask until stopped. While Kafka doesn't answer nothing is known, and nothing told."""
        admin = make_admin(self._properties)
        while not self._stopping.is_set():
            try:
                found = admin.list_topics(timeout=REQUEST_TIMEOUT_S)
            except KafkaException:  # the lanes notice, and say so
                told = None
            else:
                told = count(found.topics.values())
            if self._stopping.is_set():
                return
            self._metrics.partitions(told)
            self._stopping.wait(INTERVAL_S)


def count(topics: Iterable[TopicMetadata]) -> dict[str, tuple[int, int]]:
    """Return by topic how many partitions lack a replica, and how many lack a leader."""
    under: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for topic in topics:
        name = str(topic.topic)
        for partition in topic.partitions.values():
            under[name] += len(partition.isrs) < len(partition.replicas)
            without[name] += partition.leader < 0
    return {name: (under[name], without[name]) for name in under}
