"""What Kafka knows of a topic: its id, its partitions, which offsets they hold; of a group: who."""

from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, NamedTuple

from confluent_kafka import (
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from data_platform.errors import KafkaTroubleError

REQUEST_TIMEOUT_S = 5.0
# A client without topics of its own goes on asking the controller it knew, until that broker is
# back: partitions that were placed anew while a broker was down waited for it. And while that one
# refuses connections, librdkafka (2.16) connects again and again without a pause, which costs both
# cores; a client that is connected to all brokers keeps to its backoff.
ADMIN_PROPERTIES: Mapping[str, str] = {
    "enable.sparse.connections": "false",
    "topic.metadata.refresh.interval.ms": "2000",
}
EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


class StoredOffset(NamedTuple):
    """Where Postgres stands in a partition, and in which topic of that name."""

    next_offset: int
    topic_id: str


class Span(NamedTuple):
    """The offsets that a `read_committed` reader may see: from `first` up to before `end`."""

    first: int
    end: int


@dataclass(frozen=True)
class Topic:
    """A topic as it is now."""

    topic_id: str
    spans: Mapping[int, Span]

    def fault(self, partition: int, stored: StoredOffset) -> str | None:
        """Why one can't go on from `stored` without losing or mixing up something, or None.

        Raises:
            KafkaTroubleError: the broker we asked doesn't know the partition yet.
        """
        span = self.spans.get(partition)
        if span is None:
            raise KafkaTroubleError(f"partition {partition} is not described yet")
        if stored.topic_id != self.topic_id and stored.next_offset > 0:
            return (
                f"the topic was made anew: loaded up to {stored.next_offset} of topic id "
                f"{stored.topic_id}, Kafka now has {self.topic_id}"
            )
        if span.first > stored.next_offset:
            return (
                f"records {stored.next_offset} to {span.first - 1} were deleted before they were "
                "loaded"
            )
        if span.end < stored.next_offset:
            return f"it ends at {span.end}, but was loaded up to {stored.next_offset}"
        return None


def make_admin(client: Mapping[str, Any]) -> AdminClient:
    """Return a new admin client with these librdkafka properties.

    Keep it as long as its futures: a collected one drops them.
    """
    return AdminClient({**ADMIN_PROPERTIES, **client})


class Topics:
    """Asks Kafka about topics, over connections of its own: no fetch that waits is in the way.

    Args:
        client: librdkafka properties.
    """

    def __init__(self, client: Mapping[str, Any]) -> None:
        self._admin = make_admin(client)

    def describe(self, topic: str) -> "Future[Any]":
        """Begin to ask what the topic is; `topic_id_in` takes the answer."""
        self._admin.poll(0)
        collection = TopicCollection([topic])
        described = self._admin.describe_topics(collection, request_timeout=REQUEST_TIMEOUT_S)
        return described[topic]

    def describe_group(self, group: str) -> "Future[Any]":
        """Begin to ask who is a member of a consumer group."""
        described = self._admin.describe_consumer_groups([group], request_timeout=REQUEST_TIMEOUT_S)
        return described[group]

    def topic_id(self, topic: str) -> str:
        """Return the topic's id.

        Raises:
            KafkaTroubleError: there is no such topic, or no answer.
            KafkaException: Kafka refuses.
        """
        return topic_id_in(self.describe(topic), topic)

    def look(self, topic: str, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED) -> Topic:
        """Return the topic as such a reader finds it now; raises as `topic_id`."""
        description = _answer(self.describe(topic), topic)
        numbers = [partition.id for partition in description.partitions]
        first = self._list_offsets(topic, numbers, EARLIEST, isolation)
        end = self._list_offsets(topic, numbers, LATEST, isolation)
        return Topic(
            str(description.topic_id),
            {
                number: Span(offset_in(first[number], topic), offset_in(end[number], topic))
                for number in sorted(numbers)
            },
        )

    def _list_offsets(
        self, topic: str, numbers: list[int], which: OffsetSpec, isolation: IsolationLevel
    ) -> "dict[int, Future[Any]]":
        asked = self._admin.list_offsets(
            {TopicPartition(topic, number): which for number in numbers},
            isolation_level=isolation,
            request_timeout=REQUEST_TIMEOUT_S,
        )
        return {place.partition: future for place, future in asked.items()}


def topic_id_in(description: "Future[Any]", topic: str) -> str:
    """Wait for what `Topics.describe` asked for; raises as `Topics.topic_id`."""
    return str(_answer(description, topic).topic_id)


def offset_in(asked: "Future[Any]", topic: str) -> int:
    """Wait for an offset; raises as `Topics.topic_id`.

    Of a partition that just has no leader librdkafka may tell -1001, and no error: taken for its
    end, that would be a topic that was truncated.
    """
    offset = int(_answer(asked, topic).offset)
    if offset < 0:
        raise KafkaTroubleError(f"Kafka tells no offset of topic {topic}")
    return offset


def _answer(future: "Future[Any]", topic: str) -> Any:
    try:
        return future.result(REQUEST_TIMEOUT_S + 1)
    except FutureTimeoutError as error:
        raise KafkaTroubleError(f"Kafka tells nothing of topic {topic}") from error
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise KafkaTroubleError(f"topic {topic} doesn't exist") from error
        raise
