"""How the source joins its group, and how sure it is before it stops a partition."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import IsolationLevel, KafkaError, Producer

from data_platform import consumer
from data_platform.consumer import Source
from data_platform.errors import PlaceLostError
from data_platform.topics import Span, StoredOffset, Topic, Topics
from devstack.kafka import KafkaCluster
from tests.conftest import UniqueTopic
from tests.waiting import wait_until

MEMBER = {
    "group.protocol": "consumer",
    "auto.offset.reset": "error",
    "enable.partition.eof": "true",
}


class CountingTopics(Topics):
    """Counts how often it was asked who is in the group."""

    asked = 0

    def describe_group(self, group: str) -> Future[Any]:
        self.asked += 1
        return super().describe_group(group)


class CountingDescriptions(Topics):
    """Counts the questions after a topic's id, and may tell another one."""

    described = 0
    other: str | None = None

    def describe(self, topic: str) -> Future[Any]:
        self.described += 1
        if self.other is None:
            return super().describe(topic)
        told: Future[Any] = Future()
        told.set_result(SimpleNamespace(topic_id=self.other))
        return told


class LateTopics(Topics):
    """Tells of ends that lie `late` records before the true ones, as a broker that just woke up."""

    late = 0

    def look(self, topic: str, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED) -> Topic:
        found = super().look(topic, isolation)
        spans = {n: Span(span.first, span.end - self.late) for n, span in found.spans.items()}
        return replace(found, spans=spans)


def claim_at(next_offset: int) -> Callable[[str, str, Sequence[int]], dict[int, StoredOffset]]:
    return lambda _topic, topic_id, numbers: {
        n: StoredOffset(next_offset, topic_id) for n in numbers
    }


def turn(source: Source, next_offset: int = 0) -> bool:
    """One turn of the worker's loop; whether a partition is placed."""
    source.settle(claim_at(next_offset))
    source.fetch(0.02)
    return bool(source._placed)


def test_who_gets_no_partition_stays_a_member_by_the_brokers_own_protocol(
    kafka: KafkaCluster, unique_topic: UniqueTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = unique_topic(1)
    client = {"bootstrap.servers": kafka.bootstrap_servers}
    member = {**client, **MEMBER, "group.id": topic}
    members = [
        Source(
            {**member, "group.protocol": "classic"},
            CountingTopics(client),
            [topic],
            batch_rows=10,
            batch_bytes=1000,
            new_group=member,
        )
        for _ in range(2)
    ]
    asked = [source._topics for source in members]
    watching = Topics(client)
    said: list[str] = []
    for source in members:
        monkeypatch.setattr(source, "_join_the_classic_way", said.append)

    def both_are_members() -> bool:
        placed = [turn(source) for source in members]
        asked = watching.describe_group(topic)
        # An error while the coordinator is being chosen.
        known = [] if asked.exception(10) else asked.result().members
        return sum(placed) == 1 and len(known) == len(members)

    wait_until(both_are_members, 30, "two members, one partition")
    monkeypatch.setattr(consumer, "JOIN_INTERVAL_S", 0.2)
    for source in members:
        source._membership_at = 0.0  # now, as after JOIN_INTERVAL_S

    def one_has_it_and_the_other_asks_and_asks() -> bool:
        placed = [turn(source) for source in members]
        if sum(placed) != 1:
            return False
        idle = asked[placed.index(False)]
        assert isinstance(idle, CountingTopics)
        return idle.asked > consumer.JOIN_ANSWERS + 2

    wait_until(one_has_it_and_the_other_asks_and_asks, 30, "questions of who has no partition")
    assert said == []
    for source in members:
        source.close()


def test_a_topics_id_is_asked_for_as_often_as_it_could_have_been_filled_again(
    kafka: KafkaCluster, unique_topic: UniqueTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = unique_topic(1)
    client = {"bootstrap.servers": kafka.bootstrap_servers}
    topics = CountingDescriptions(client)
    member = {**client, **MEMBER, "group.id": topic}
    source = Source(member, topics, [topic], batch_rows=1, batch_bytes=1000)
    producer = Producer(client)
    for number in range(60):
        producer.produce(topic, str(number).encode())
    assert producer.flush(10) == 0
    wait_until(lambda: turn(source, 10), 30, "the partition")

    def asked_for_a_batch() -> int:
        before = topics.described
        slices = wait_until(lambda: source.fetch(1.0), 20, "a record")
        source.confirm(slices)
        return topics.described - before

    # Ten records: a hundredth of a millisecond is enough to fill them up again.
    assert [asked_for_a_batch() for _ in range(5)] == [1] * 5
    monkeypatch.setattr(consumer, "FASTEST_FILL_PER_S", 0.1)  # ten records: hundred seconds
    assert [asked_for_a_batch() for _ in range(5)] == [0] * 5
    monkeypatch.setattr(consumer, "VOUCHED_S", 0.0)
    assert [asked_for_a_batch() for _ in range(2)] == [1] * 2
    monkeypatch.setattr(consumer, "VOUCHED_S", 100.0)
    assert asked_for_a_batch() == 0
    source._on_client_error(KafkaError(KafkaError._TRANSPORT))
    source._away = False
    topics.other = "another"
    with pytest.raises(PlaceLostError, match="is now another"):
        asked_for_a_batch()
    # What said no vouches for nothing; nor does what was said of another place.
    with pytest.raises(PlaceLostError, match="is now another"):
        asked_for_a_batch()
    source.forget()
    topics.other = None
    wait_until(lambda: turn(source, 10), 30, "the partition again")
    assert asked_for_a_batch() == 1
    source.close()


@pytest.mark.parametrize(("wakes_up", "stops"), [(True, False), (False, True)])
def test_a_partition_stops_only_for_a_fault_that_is_found_again_and_again(
    kafka: KafkaCluster,
    unique_topic: UniqueTopic,
    monkeypatch: pytest.MonkeyPatch,
    wakes_up: bool,  # noqa: FBT001 - a parameter of the test
    stops: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(consumer, "SURE_AFTER_S", 30.0 if wakes_up else 1.0)
    topic = unique_topic(1)
    client = {"bootstrap.servers": kafka.bootstrap_servers}
    topics = LateTopics(client)
    topics.late = 1
    source = Source(
        {**client, **MEMBER, "group.id": topic}, topics, [topic], batch_rows=10, batch_bytes=1000
    )
    wait_until(lambda: turn(source) or bool(source._suspected_since_s), 30, "a suspicion")
    assert not source.stopped
    if wakes_up:
        topics.late = 0
    wait_until(lambda: turn(source) or bool(source.stopped), 20, "a decision")
    assert bool(source.stopped) == stops
    source.close()
