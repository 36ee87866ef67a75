"""What the leader tells of Kafka's replicas, seen on three brokers of which one is killed."""

from outbox_relay.config import Settings
from outbox_relay.metrics import Metrics
from outbox_relay.replicas import Replicas
from tests.conftest import MakeKafkaCluster
from tests.waiting import wait_until

CLUSTER = {"broker.session.timeout.ms": "4000", "broker.heartbeat.interval.ms": "1000"}


def test_a_killed_broker_shows_as_under_replicated_partitions_and_nothing_does_before(
    make_kafka_cluster: MakeKafkaCluster,
) -> None:
    cluster = make_kafka_cluster(3, CLUSTER)
    cluster.create_topic("kept-thrice", 3, {"min.insync.replicas": "2"})
    metrics = Metrics()
    settings = Settings(
        kafka_bootstrap_servers=cluster.bootstrap_servers,
        outbox_relay_database_url="postgresql://nobody@127.0.0.1/none",
    )

    def told(what: str) -> float | None:
        name = f"outbox_relay_{what}_partitions"
        return metrics.registry.get_sample_value(name, {"topic": "kept-thrice"})

    metrics.leading(True)
    replicas = Replicas(settings, metrics)
    replicas.start()
    wait_until(lambda: told("under_replicated") == 0, 20, "all replicas in sync")
    cluster.brokers[2].kill()
    wait_until(lambda: told("under_replicated") == 3, 40, "three partitions to lack a replica")
    assert told("leaderless") == 0
    metrics.leading(False)
    assert told("under_replicated") is None
    metrics.partitions({"kept-thrice": (3, 0)})
    assert told("under_replicated") is None, "an answer that came after the term"
    replicas.stop()
