"""Publishes records to Kafka, at least once and each key in order.

An idempotent producer without a time limit keeps the order of what it was given and acknowledges
each record or fails it. After the first failure nothing behind it counts: the producer is thrown
away, and the relay starts again from its stored cursor.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
    """Kafka did not take a record; nothing behind the stored cursor counts as published."""


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
        self._unacknowledged = 0
        self._failure: KafkaError | None = None

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
        for row in rows:
            self._send(row, keep_leading)
        while self._producer.flush(WAIT_SLICE_S) > 0:
            self._raise_failure()
            keep_leading()
        self._raise_failure()
        if self._unacknowledged != 0:
            raise PublishError(f"{self._unacknowledged} records are neither sent nor failed")

    def _send(self, row: Row, keep_leading: Callable[[], None]) -> None:
        while True:
            try:
                self._producer.produce(
                    row.topic,
                    value=row.payload,
                    key=row.key,
                    headers=_headers(row.headers),
                    on_delivery=self._acknowledge,
                )
            except BufferError:  # the queue is full: wait for acknowledgements
                self._producer.poll(WAIT_SLICE_S)
                self._raise_failure()
                keep_leading()
            except KafkaException as error:
                raise PublishError(f"outbox row {row.id}: {error.args[0].str()}") from error
            else:
                self._unacknowledged += 1
                return

    def _acknowledge(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._unacknowledged -= 1
        elif self._failure is None:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise PublishError(f"Kafka refused a record: {self._failure.str()}")


@lru_cache(maxsize=1024)
def _headers(text: str) -> list[tuple[str, str | bytes | None]]:
    """Return Kafka's form of a row's headers; most rows of an outbox carry the same ones."""
    return [(name, value) for name, value in json.loads(text).items()]
