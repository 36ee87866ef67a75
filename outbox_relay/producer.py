"""How records go to Kafka: the settings that the guarantees stand on, and what a failure means."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import psycopg
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    ConfigResource,
)

from outbox_relay.config import GUARANTEED_PRODUCER_PROPERTIES, Settings
from outbox_relay.leadership import Term
from outbox_relay.reader import Row

# Kafka is asked in slices, between which a lane looks whether it shall go on.
SLICE_S = 1.0
REQUEST_TIMEOUT_S = 5.0
# Longer than the client's own limit, so that it is the client who says what is wrong.
ANSWER_WITHIN_S = 2 * REQUEST_TIMEOUT_S
# No acknowledgement wakes up who waits for room in the queue: only failures are called back.
FULL_QUEUE_SLICE_S = 0.01
QUEUE_MAX_MESSAGES = 200_000
QUEUE_MAX_KBYTES = 16 * 1024
# outbox_topics allows 1,000,000 bytes of key, payload and headers; the frame comes on top.
MESSAGE_MAX_BYTES = 1_048_576

# May be overridden by KAFKA_PROPERTIES_FILE.
DEFAULT_PRODUCER_PROPERTIES: Mapping[str, str | int | bool] = {
    "client.id": "outbox-relay",
    "compression.type": "lz4",
    "linger.ms": 1,
    "message.max.bytes": MESSAGE_MAX_BYTES,
    "reconnect.backoff.max.ms": 1_000,
    "socket.keepalive.enable": True,
    "queue.buffering.max.messages": QUEUE_MAX_MESSAGES,
    "queue.buffering.max.kbytes": QUEUE_MAX_KBYTES,
}

# While the controller that librdkafka (2.16) knows refuses connections, a question that goes to it
# connects again and again without a pause: a killed broker cost both cores for as long as it was
# away, and its successor was found late. Connected to all, it keeps to its backoff. Without topics
# of its own a client learns of another controller only by asking.
ADMIN_PROPERTIES: Mapping[str, str | int | bool] = {
    "enable.sparse.connections": False,
    "topic.metadata.refresh.interval.ms": 2_000,
}

# The broker says these of a record, whatever state it is in itself. Everything else is an outage.
REFUSALS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
    }
)

# librdkafka's own lines would flood the log in an outage; we say what it comes to.
QUIET: Mapping[str, Any] = {"log_level": 0, "logger": logging.getLogger("librdkafka")}
HEADERS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(dict[str, str])

Delivered = Callable[[KafkaError | None, Message], None]


class PublishError(Exception):
    """Kafka did not take something for a reason of its own: wait, and go on from the cursor."""


class RecordRefusedError(Exception):
    """Kafka refused a record for itself: `row`, when it was sent alone."""

    def __init__(self, error: KafkaError, row: Row | None) -> None:
        super().__init__(error.str())
        self.row = row


class StoppedError(Exception):
    """The lane was told to stop while it waited for Kafka."""


@dataclass(frozen=True, slots=True)
class Channel:
    """What a delivery is given by the lane that it publishes for.

    `go_on` is called about once a second while Kafka is waited for; what it raises ends the wait.
    `published` is told of each chunk: how many rows, and for how many seconds the oldest waited.
    """

    topic: str
    settings: Settings
    term: Term
    connection: psycopg.Connection
    go_on: Callable[[], None]
    published: Callable[[int, float], None]
    on_broker_error: Callable[[KafkaError], None]

    def admin(self) -> AdminClient:
        """Return a new admin client; keep it as long as its futures."""
        return make_admin(self.settings.kafka_properties())

    def producer(self, more: Mapping[str, str | int | bool]) -> Producer:
        """Return a new producer."""
        return make_producer(self.settings.kafka_properties(), more, self.on_broker_error)


def failure(error: KafkaError, rows: Sequence[Row]) -> Exception:
    """Return the exception for what Kafka said of one of `rows`."""
    if error.code() in REFUSALS:
        return RecordRefusedError(error, rows[0] if len(rows) == 1 else None)
    return trouble(error)


def trouble(error: KafkaError) -> PublishError:
    """Return the exception for what Kafka said of a whole session."""
    return PublishError(f"{error.name()}: {error.str()}")


def make_producer(
    kafka_properties: Mapping[str, str],
    more: Mapping[str, str | int | bool],
    on_broker_error: Callable[[KafkaError], None],
) -> Producer:
    """Return a producer with the user's properties, but never against a guarantee.

    Raises:
        KafkaException: librdkafka doesn't take these properties.
    """
    return Producer(
        {
            **DEFAULT_PRODUCER_PROPERTIES,
            **kafka_properties,
            **GUARANTEED_PRODUCER_PROPERTIES,
            # A call for each acknowledgement would cost as much as reading the row.
            "delivery.report.only.error": True,
            **more,
            "error_cb": on_broker_error,
            **QUIET,
        }
    )


def make_admin(kafka_properties: Mapping[str, str]) -> AdminClient:
    """Return a new admin client; keep it as long as its futures."""
    return AdminClient(
        {**ADMIN_PROPERTIES, **kafka_properties, "client.id": "outbox-relay", **QUIET}
    )


def check(kafka_properties: Mapping[str, str]) -> None:
    """Make a producer and throw it away.

    Raises:
        KafkaException: librdkafka doesn't take these properties.
    """
    make_producer(kafka_properties, {}, lambda _: None)


def batch_size(admin: AdminClient, topic: str) -> Mapping[str, str | int | bool]:
    """Return the producer's batch size for `topic`.

    A broker refuses a whole batch that is larger than the topic allows, innocent records too.

    Raises:
        KafkaException: Kafka can't be reached, or the topic is missing.
    """
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    future = admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource]
    allowed = future.result(ANSWER_WITHIN_S)["max.message.bytes"].value
    return {"batch.size": min(int(allowed), MESSAGE_MAX_BYTES)}


def produce(producer: Producer, channel: Channel, rows: Sequence[Row], failed: Delivered) -> None:
    """Hand records to the client in order; where its queue is full, wait for acknowledgements.

    `failed` is told of those that Kafka doesn't take, and of no others: `producer` has none waiting
    when all are acknowledged.

    Raises:
        KafkaException: the client refused the record.
    """
    send, topic, decode = producer.produce, channel.topic, HEADERS.decode
    for _, key, payload, headers, _ in rows:
        while True:
            try:
                send(topic, payload, key, headers=decode(headers), on_delivery=failed)
            except BufferError:
                producer.poll(FULL_QUEUE_SLICE_S)
                channel.go_on()
            else:
                break


def reason(error: KafkaException) -> KafkaError:
    """Return what Kafka said."""
    found: KafkaError = error.args[0]
    return found
