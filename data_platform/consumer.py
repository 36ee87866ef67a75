"""The Kafka side: which partitions we have, where they begin, what comes next.

Guarantees: a partition is read only from the offset that Postgres has for it, and only while it
belongs to the topic that Postgres has loaded from and still holds that offset; otherwise that
partition stops, loudly, and the others go on. What was fetched and not loaded is forgotten
whole (`forget`), never skipped: the partition is then placed again by Postgres' offset.

The group grants partitions (`_granted`); we hand one to librdkafka only once its offset is known
(`_placed`). In between there is nothing to pause: an outage of Postgres leaves partitions granted
but not placed, and polling keeps the membership alive.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from data_platform.batch import Slice
from data_platform.errors import KafkaTroubleError

KAFKA_CALL_TIMEOUT_S = 5.0
CHECK_INTERVAL_S = 10.0
# A transaction marker alone moves the offset at most this often.
MARKER_INTERVAL_S = 0.2
CHUNK_RECORDS = 500

LOST_PLACE = frozenset(
    {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}  # noqa: SLF001 - their public names
)

log = structlog.get_logger()


class Partition(NamedTuple):
    """A partition's full name."""

    topic: str
    partition: int


class StoredOffset(NamedTuple):
    """Where Postgres stands in a partition."""

    next_offset: int
    topic_id: str


@dataclass
class Place:
    """Where we stand in a partition: `loaded` in Postgres, `reached` by reading to the end."""

    topic_id: str
    loaded: int
    reached: int


# (topic, topic id, partition numbers) → where Postgres stands in each of them.
Claim = Callable[[str, str, Sequence[int]], Mapping[int, StoredOffset]]


class Source:
    """The records of `topics` that this member of the group has to load.

    Args:
        consumer: librdkafka properties of the consumer.
        admin: librdkafka properties of the admin client.
        topics: what to consume.
        batch_rows: a batch has about this many records at most,
        batch_bytes: and about this many bytes of keys and values.
    """

    def __init__(
        self,
        consumer: Mapping[str, Any],
        admin: Mapping[str, Any],
        topics: Sequence[str],
        *,
        batch_rows: int,
        batch_bytes: int,
    ) -> None:
        self._consumer = Consumer(
            {**consumer, "error_cb": self._on_client_error, "on_commit": _on_commit}
        )
        # Referenced as long as we live: a collected AdminClient drops its futures.
        self._admin = AdminClient(dict(admin))
        self._topics = list(topics)
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._subscribed = False
        self._granted: set[Partition] = set()
        self._placed: dict[Partition, Place] = {}
        self._slices: dict[Partition, Slice] = {}
        self._descriptions: dict[str, Future[Any]] = {}
        self._check_at = 0.0
        self._markers_at = 0.0
        self._away = False
        self.stopped: dict[Partition, str] = {}

    # ---- which partitions, and where they begin

    def settle(self, claim: Claim) -> None:
        """Join the group once the topics exist, and place what was granted.

        Raises:
            KafkaTroubleError, KafkaException: a topic doesn't exist or Kafka doesn't answer.
        """
        if not self._subscribed:
            for topic in self._topics:
                self._topic_id(topic)
            self._consumer.subscribe(
                self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke
            )
            self._subscribed = True
        self._check_topics()
        for topic in self._topics:
            waiting = [p for p in sorted(self._granted) if p.topic == topic and self._due(p)]
            if waiting:
                self._place(topic, waiting, claim)

    def _due(self, partition: Partition) -> bool:
        return partition not in self._placed and partition not in self.stopped

    def _place(self, topic: str, partitions: Sequence[Partition], claim: Claim) -> None:
        topic_id = self._topic_id(topic)
        stored = claim(topic, topic_id, [partition.partition for partition in partitions])
        for partition in partitions:
            offset = stored[partition.partition]
            fault = self._fault(partition, topic_id, offset)
            if fault:
                self._stop(partition, fault)
                continue
            self._consumer.incremental_assign([TopicPartition(*partition, offset.next_offset)])
            self._placed[partition] = Place(topic_id, offset.next_offset, offset.next_offset)
            log.info("partition_placed", **partition._asdict(), next_offset=offset.next_offset)

    def _fault(self, partition: Partition, topic_id: str, stored: StoredOffset) -> str | None:
        """Why this partition can't be read without losing or mixing up something, or None."""
        if stored.topic_id != topic_id:
            return (
                f"the topic was made anew: loaded up to {stored.next_offset} of topic id "
                f"{stored.topic_id}, Kafka now has {topic_id}"
            )
        marks = self._consumer.get_watermark_offsets(
            TopicPartition(*partition), timeout=KAFKA_CALL_TIMEOUT_S
        )
        if marks is None:
            raise KafkaTroubleError(f"no watermarks of {partition.topic} {partition.partition}")
        low, high = marks
        if low > stored.next_offset:
            return f"records {stored.next_offset} to {low - 1} were deleted before they were loaded"
        if high < stored.next_offset:
            return f"the partition ends at {high}, but {stored.next_offset} records were loaded"
        return None

    def _stop(self, partition: Partition, fault: str) -> None:
        log.error("partition_stopped", **partition._asdict(), fault=fault)
        self.stopped[partition] = fault

    def _topic_id(self, topic: str) -> str:
        described = self._admin.describe_topics(
            TopicCollection([topic]), request_timeout=KAFKA_CALL_TIMEOUT_S
        )
        try:
            return str(described[topic].result(KAFKA_CALL_TIMEOUT_S + 1).topic_id)
        except FutureTimeoutError as error:
            raise KafkaTroubleError(f"Kafka doesn't describe topic {topic}") from error
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise KafkaTroubleError(f"topic {topic} doesn't exist (yet)") from error
            raise

    def _check_topics(self) -> None:
        """Now and then look, without waiting, whether each topic is still the same one."""
        now = time.monotonic()
        if not self._descriptions and now >= self._check_at:
            self._check_at = now + CHECK_INTERVAL_S
            self._admin.poll(0)
            self._descriptions = self._admin.describe_topics(
                TopicCollection(self._topics), request_timeout=KAFKA_CALL_TIMEOUT_S
            )
        if self._descriptions and all(future.done() for future in self._descriptions.values()):
            descriptions, self._descriptions = self._descriptions, {}
            for topic, future in descriptions.items():
                if future.exception() is None:
                    self._note_answer()
                    self._forget_other_than(topic, str(future.result().topic_id))

    def _forget_other_than(self, topic: str, topic_id: str) -> None:
        self.forget(
            [
                partition
                for partition, place in self._placed.items()
                if partition.topic == topic and place.topic_id != topic_id
            ]
        )

    def forget(self, partitions: Sequence[Partition] | None = None) -> None:
        """Drop what was read and not loaded of `partitions` (default: all).

        They are placed again by Postgres' offsets with the next `settle`.
        """
        placed = [p for p in (partitions or list(self._placed)) if p in self._placed]
        for partition in placed:
            del self._placed[partition]
            self._slices.pop(partition, None)
        if placed:
            self._consumer.incremental_unassign([TopicPartition(*p) for p in placed])

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # An empty assignment acknowledges the rebalance; `settle` assigns with offsets.
        consumer.incremental_assign([])
        self._granted.update(Partition(p.topic, p.partition) for p in partitions)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        revoked = [Partition(p.topic, p.partition) for p in partitions]
        known = [TopicPartition(*p) for p in revoked if p in self._placed]
        consumer.incremental_unassign(known)
        for partition in revoked:
            self._granted.discard(partition)
            self._placed.pop(partition, None)
            self._slices.pop(partition, None)
            self.stopped.pop(partition, None)
        log.info("partitions_revoked", partitions=[p.partition for p in revoked])

    # ---- what comes next

    def fetch(self, wait_s: float) -> list[Slice]:
        """Return what is there, at once; wait up to `wait_s` for the first record.

        Empty when nothing came. After an exception call `forget`: records may be lost here.
        """
        self._slices = {}
        messages = self._consumer.consume(1, wait_s)
        rows = size_bytes = 0
        while messages:
            for message in messages:
                size_bytes += self._take(message)
            rows += len(messages)
            if rows >= self._batch_rows or size_bytes >= self._batch_bytes:
                break
            messages = self._consumer.consume(min(CHUNK_RECORDS, self._batch_rows), 0)
        return list(self._slices.values()) or self._moved_by_markers()

    def _take(self, message: Message) -> int:
        """Put a record into its slice; return its size in bytes."""
        partition = Partition(str(message.topic()), int(message.partition() or 0))
        place = self._placed.get(partition)
        error = message.error()
        if error is not None:
            self._take_error(partition, place, error, int(message.offset() or 0))
            return 0
        if place is None:  # fetched just before the partition was taken away
            return 0
        self._note_answer()
        part = self._slices.get(partition)
        if part is None:
            part = Slice(*partition, place.topic_id, place.loaded, place.loaded)
            self._slices[partition] = part
        part.messages.append(message)
        part.next_offset = place.reached = int(message.offset() or 0) + 1
        return len(message.value() or b"") + len(message.key() or b"")

    def _take_error(
        self, partition: Partition, place: Place | None, error: KafkaError, offset: int
    ) -> None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name
            self._note_answer()
            if place is not None and offset > place.reached:
                place.reached = offset
            if place is not None and partition in self._slices:
                self._slices[partition].next_offset = place.reached
        elif error.code() in LOST_PLACE:
            log.error("offset_not_in_kafka", **partition._asdict(), error=error.str())
            self.forget([partition])
        else:
            self._on_client_error(error)

    def _moved_by_markers(self) -> list[Slice]:
        """Slices without records: after the last record a transaction's marker takes an offset."""
        now = time.monotonic()
        if now < self._markers_at:
            return []
        self._markers_at = now + MARKER_INTERVAL_S
        return [
            Slice(*partition, place.topic_id, place.loaded, place.reached)
            for partition, place in self._placed.items()
            if place.reached > place.loaded
        ]

    def wait(self, wait_s: float) -> None:
        """Stay a member of the group for a moment. Nothing may be placed."""
        for message in self._consumer.consume(1, wait_s):
            error = message.error()
            if error is not None:
                self._on_client_error(error)

    # ---- afterwards

    def commit(self, slices: Sequence[Slice]) -> None:
        """Note what Postgres has; tell Kafka, for tools that watch the lag."""
        for part in slices:
            place = self._placed.get(Partition(part.topic, part.partition))
            if place is not None:
                place.loaded = part.next_offset
        offsets = [TopicPartition(part.topic, part.partition, part.next_offset) for part in slices]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:  # Postgres' offsets are the true ones
            log.info("kafka_offset_copy_failed", error=str(error))

    def close(self) -> None:
        """Leave the group, so that the others take over at once."""
        self._consumer.close()

    def _on_client_error(self, error: KafkaError) -> None:
        if not self._away:
            log.warning("kafka_trouble", error=error.str(), code=error.name())
        self._away = True

    def _note_answer(self) -> None:
        if self._away:
            log.info("kafka_answers_again")
        self._away = False


def _on_commit(error: KafkaError | None, _offsets: Sequence[TopicPartition]) -> None:
    if error is not None:
        log.info("kafka_offset_copy_failed", error=error.str())
