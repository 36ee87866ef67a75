"""Three brokers: what an acknowledgement means, and life after the death of one."""

from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined] # public, but not marked as such
    AdminClient,
    ConfigResource,
    ResourceType,
)

from devstack.kafka import KafkaCluster
from devstack.state import free_port
from tests.conftest import MakeKafkaCluster
from tests.waiting import wait_until


@pytest.fixture
def three(make_kafka_cluster: MakeKafkaCluster) -> KafkaCluster:
    return make_kafka_cluster(3)


def produce(cluster: KafkaCluster, topic: str, timeout_ms: int = 20_000) -> KafkaError | None:
    """Write one record with all acknowledgements; give the error, if any."""
    outcome: list[KafkaError | None] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        outcome.append(error)

    producer = Producer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "acks": "all",
            "delivery.timeout.ms": timeout_ms,
            "log_level": 0,
        }
    )
    producer.produce(topic, b"value", b"key", on_delivery=delivered)
    producer.flush(timeout_ms / 1000 + 5)
    return outcome[0]


def setting(cluster: KafkaCluster, resource: ConfigResource, name: str) -> str | None:
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers})
    (future,) = admin.describe_configs([resource]).values()
    value: str | None = future.result(20)[name].value
    return value


def in_sync(cluster: KafkaCluster, topic: str) -> int:
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    return len(admin.list_topics(topic, timeout=5).topics[topic].partitions[0].isrs)


def test_a_killed_leader_is_replaced_and_comes_back_with_its_data(three: KafkaCluster) -> None:
    three.create_topic("events", 1)
    assert produce(three, "events") is None
    old = three.leader_of("events")
    port = old.port
    old.kill()
    assert produce(three, "events") is None
    assert three.leader_of("events") is not old
    old.start()
    wait_until(lambda: in_sync(three, "events") == 3, 30, "three replicas in sync")
    assert old.port == port


def test_one_broker_of_three_alone_acknowledges_nothing(three: KafkaCluster) -> None:
    topic = ConfigResource(ResourceType.TOPIC, "events")
    three.create_topic("events", 1)
    assert setting(three, topic, "min.insync.replicas") == "2"
    assert setting(three, topic, "unclean.leader.election.enable") == "false"
    leader = three.leader_of("events")
    for broker in three.brokers:
        if broker is not leader:
            broker.pause()
    error = produce(three, "events", timeout_ms=5_000)
    assert error is not None
    for broker in three.brokers:
        broker.resume()
    wait_until(lambda: in_sync(three, "events") == 3, 60, "three replicas in sync")
    assert produce(three, "events") is None


def test_a_topic_that_nobody_created_does_not_appear(kafka: KafkaCluster) -> None:
    error = produce(kafka, "never-created", timeout_ms=3_000)
    assert error is not None
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    assert "never-created" not in admin.list_topics(timeout=10).topics


def test_a_topic_that_is_refused_says_why(kafka: KafkaCluster) -> None:
    with pytest.raises(KafkaException, match="retention"):
        kafka.create_topic("refused", 1, {"retention.ms": "soon"})


def test_a_port_that_somebody_else_took_is_changed_at_the_first_start(
    kafka: KafkaCluster,
    make_kafka_cluster: MakeKafkaCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = iter([kafka.brokers[0].port])
    monkeypatch.setattr("devstack.kafka.free_port", lambda: next(taken, None) or free_port())
    cluster = make_kafka_cluster(1)
    assert cluster.brokers[0].port != kafka.brokers[0].port
    cluster.create_topic("moved")
    assert produce(cluster, "moved") is None


def test_settings_of_a_cluster_reach_its_brokers(make_kafka_cluster: MakeKafkaCluster) -> None:
    cluster = make_kafka_cluster(1, {"message.max.bytes": "12345"})
    broker = ConfigResource(ResourceType.BROKER, "1")
    assert setting(cluster, broker, "message.max.bytes") == "12345"
    assert Path(f"/proc/{cluster.brokers[0].process.pid}").exists()  # type: ignore[attr-defined]
