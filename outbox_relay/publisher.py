"""Publishes records to Kafka, at least once and each key in order.

An idempotent producer without a time limit keeps the order of what it was given and acknowledges
each record or fails it. After the first failure only the records before it count: the producer is
thrown away, and the relay goes on behind the last of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from outbox_relay.config import GUARANTEED_PRODUCER_PROPERTIES
from outbox_relay.reader import Row

# While records wait for Kafka the leader's lock is used at least this often.
WAIT_SLICE_S = 1.0
QUEUE_MAX_MESSAGES = 200_000
QUEUE_MAX_KBYTES = 256 * 1024

# May be overridden by KAFKA_PROPERTIES_FILE.
DEFAULT_PRODUCER_PROPERTIES: Mapping[str, str | int | bool] = {
    "client.id": "outbox-relay",
    "compression.type": "lz4",
    "linger.ms": 2,
    # outbox_topics allows 1,000,000 bytes of key, payload and headers; the frame comes on top.
    "message.max.bytes": 1_048_576,
    "reconnect.backoff.max.ms": 2_000,
    "socket.keepalive.enable": True,
    "queue.buffering.max.messages": QUEUE_MAX_MESSAGES,
    "queue.buffering.max.kbytes": QUEUE_MAX_KBYTES,
}


class PublishError(Exception):
    """Kafka did not take a record.

    Attributes:
        acknowledged_rows: how many rows before the first unacknowledged one Kafka has.
    """

    def __init__(self, message: str, acknowledged_rows: int = 0) -> None:
        super().__init__(message)
        self.acknowledged_rows = acknowledged_rows


class Publisher:
    """A producer and what it has not acknowledged yet. Use as a context manager."""

    def __init__(
        self, kafka_properties: Mapping[str, str], on_broker_error: Callable[[KafkaError], None]
    ) -> None:
        self._producer = Producer(
            {
                **DEFAULT_PRODUCER_PROPERTIES,
                **kafka_properties,
                **GUARANTEED_PRODUCER_PROPERTIES,
                "error_cb": on_broker_error,
                # librdkafka's own lines would flood the log in an outage; error_cb tells of it.
                "log_level": 0,
            }
        )
        self._rows: Sequence[Row] = ()
        self._acknowledged = bytearray()
        self._failure: tuple[int, KafkaError] | None = None

    @classmethod
    def check(cls, kafka_properties: Mapping[str, str]) -> None:
        """Make a producer and throw it away.

        Raises:
            KafkaException: librdkafka doesn't take these properties.
        """
        with cls(kafka_properties, lambda _: None):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What is still queued will be read again from the outbox; it must not be sent after that.
        self._producer.purge(in_queue=True, in_flight=True, blocking=True)

    def publish(self, rows: Sequence[Row], keep_leading: Callable[[], None]) -> None:
        """Send `rows` in order and wait until each is acknowledged, however long Kafka is away.

        `keep_leading` is called about once a second while waiting; what it raises ends the wait.

        Raises:
            PublishError: Kafka refused a record, or the producer is beyond repair.
        """
        self._rows, self._acknowledged = rows, bytearray(len(rows))
        for index in range(len(rows)):
            self._send(index, keep_leading)
        while self._producer.flush(WAIT_SLICE_S) > 0:
            self._raise_failure()
            keep_leading()
        self._raise_failure()
        if not all(self._acknowledged):
            raise PublishError("a record was neither taken nor refused", self._leading())

    def poll(self) -> None:
        """Let the client report what happened while nothing was published."""
        self._producer.poll(0)

    def _send(self, index: int, keep_leading: Callable[[], None]) -> None:
        row = self._rows[index]
        while True:
            try:
                self._producer.produce(
                    row.topic,
                    value=row.payload,
                    key=row.key,
                    headers=_headers(row.headers),
                    on_delivery=partial(self._acknowledge, index),
                )
            except BufferError:  # the queue is full: wait for acknowledgements
                self._producer.poll(WAIT_SLICE_S)
                self._raise_failure()
                keep_leading()
            except KafkaException as error:  # refused by the client itself
                self._failure = self._failure or (index, error.args[0])
                self._raise_failure()
            else:
                return

    def _acknowledge(self, index: int, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._acknowledged[index] = 1
        elif self._failure is None:
            self._failure = index, error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            index, error = self._failure
            row = self._rows[index]
            raise PublishError(
                f"outbox row {row.id} (topic {row.topic}, key {row.key}): {error.str()}",
                self._leading(),
            )

    def _leading(self) -> int:
        """Return how many rows Kafka has before the first that it has not."""
        first_missing = self._acknowledged.find(0)
        return len(self._acknowledged) if first_missing < 0 else first_missing


@lru_cache(maxsize=1024)
def _headers(text: str) -> list[tuple[str, str | bytes | None]]:
    """Return Kafka's form of a row's headers; most rows of an outbox carry the same ones."""
    return [(name, value) for name, value in json.loads(text).items()]
