"""What Kafka tells of a topic, while its brokers come and go."""

from concurrent.futures import Future
from typing import Any

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaException
from confluent_kafka.admin import ListOffsetsResultInfo  # type: ignore[attr-defined]

from data_platform.errors import Cure, KafkaTroubleError, cure_of
from data_platform.topics import Topics, offset_in
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


def test_an_offset_that_no_broker_tells_is_waited_for_and_no_end_of_a_topic() -> None:
    def answer(offset: int) -> "Future[Any]":
        asked: Future[Any] = Future()
        asked.set_result(ListOffsetsResultInfo(offset, -1, -1))
        return asked

    assert offset_in(answer(7), "events") == 7
    with pytest.raises(KafkaTroubleError) as caught:
        offset_in(answer(OFFSET_INVALID), "events")
    assert cure_of(caught.value) is Cure.WAIT


def _told(topics: Topics) -> str | None:
    try:
        return topics.topic_id("events")
    except (KafkaTroubleError, KafkaException):
        return None
