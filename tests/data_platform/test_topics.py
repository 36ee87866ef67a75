"""What Kafka tells of a topic, while its brokers come and go."""

from confluent_kafka import KafkaException

from data_platform.errors import KafkaTroubleError
from data_platform.topics import Topics
from tests.conftest import MakeKafkaCluster
from tests.waiting import wait_until


def test_a_killed_broker_keeps_nobody_from_being_told_of_a_topic(
    make_kafka_cluster: MakeKafkaCluster,
) -> None:
    cluster = make_kafka_cluster(3)
    cluster.create_topic("events", 1)
    # Each has one broker or another for its controller.
    all_topics = [
        Topics({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}) for _ in range(12)
    ]
    told = all_topics[0].topic_id("events")
    assert {topics.topic_id("events") for topics in all_topics} == {told}

    cluster.brokers[0].kill()

    for topics in all_topics:
        wait_until(lambda topics=topics: _told(topics) == told, 30, "an answer")  # type: ignore[misc]


def _told(topics: Topics) -> str | None:
    try:
        return topics.topic_id("events")
    except (KafkaTroubleError, KafkaException):
        return None
