"""Publishes at least once and each key in order, with the least delay.

New chunks are sent while earlier ones are on their way. The cursor in Postgres moves behind them
when Kafka has acknowledged them all, and is stored a moment later, so that nobody waits for that:
whatever is killed, the next term starts at or before the first unacknowledged row. It may repeat
events after newer ones of their key.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from confluent_kafka import KafkaError, KafkaException, Message

from outbox_relay import leadership
from outbox_relay.cursor import (
    Cursor,
    Store,
    refuse_another_history,
    refuse_another_kafka,
)
from outbox_relay.exactly_once import ExactlyOnce, cluster_id
from outbox_relay.producer import (
    SLICE_S,
    Channel,
    batch_size,
    failure,
    produce,
    reason,
    trouble,
)
from outbox_relay.reader import Chunk, Position, Row

DELIVERY = "at_least_once"
SAVE_INTERVAL_S = 0.05
# Enough to keep Kafka busy while the next chunk is read.
IN_FLIGHT_MAX_ROWS = 10_000
# Only once nothing is on its way do we know that Kafka has it all: under load, that is seen to.
DRAIN_INTERVAL_S = 0.25


@dataclass(slots=True)
class _InFlight:
    """Chunks on their way, of which Kafka has said nothing yet, or that it doesn't take one."""

    sent_at_s: float
    oldest_age_s: float
    position: Position
    rows: int = 0
    first_rows: Sequence[Row] = ()
    error: KafkaError | None = None

    def failed(self, error: KafkaError | None, _: Message) -> None:
        self.error = self.error or error


class AtLeastOnce:
    """One session of a lane with Kafka. Use as a context manager."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._store = Store(channel.connection, channel.term, channel.topic)
        self._in_flight: _InFlight | None = None
        self._saved_at_s = time.monotonic()
        self._saved = True

    def __enter__(self) -> Self:
        self.cursor = self._begin_session()
        return self

    def __exit__(self, *_: object) -> None:
        # What is still queued will be read again from the outbox; it must not be sent after that.
        self._producer.purge(in_queue=True, in_flight=True, blocking=True)

    @property
    def idle_for_s(self) -> float:
        """How long a lane without news may leave us alone."""
        return 1.0 if self._saved and self._in_flight is None else SAVE_INTERVAL_S

    def send(self, chunk: Chunk) -> None:
        """Hand a chunk to Kafka, once there is room for it.

        Raises:
            PublishError: Kafka is in trouble; the session is over.
            RecordRefusedError: Kafka refused a record; the session is over.
        """
        flight = self._in_flight
        if flight is not None and time.monotonic() - flight.sent_at_s >= DRAIN_INTERVAL_S:
            self._drain()
        while len(self._producer) >= IN_FLIGHT_MAX_ROWS:
            self._producer.poll(SLICE_S / 100)
            self._channel.go_on()
        flight = self._begin(chunk)
        flight.rows += len(chunk.rows)
        flight.first_rows = flight.first_rows or chunk.rows
        try:
            produce(self._producer, self._channel, chunk.rows, flight.failed)
        except KafkaException as error:
            raise failure(reason(error), chunk.rows) from error
        self.settle()

    def move(self, position: Position) -> None:
        """Note that nothing is to be published up to `position`."""
        self._begin(Chunk((), position))

    def publish_released(self, rows: Sequence[Row]) -> None:
        """Publish quarantined events and wait for them; the cursor stays where it is."""
        self.finish()
        self.send(Chunk(rows, self.cursor.position))
        self.finish()

    def settle(self) -> None:
        """Take what Kafka has acknowledged, and store the cursor when that is due.

        Raises:
            PublishError, RecordRefusedError: as `send`.
        """
        self._producer.poll(0)
        if self._in_flight is not None and len(self._producer) == 0:
            self._arrived(self._in_flight)
        if not self._saved and time.monotonic() - self._saved_at_s >= SAVE_INTERVAL_S:
            self._save(durably=False)

    def finish(self) -> None:
        """Wait for all that is on its way, and store the cursor."""
        self._drain()
        if not self._saved:
            self._save(durably=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait for what is on its way; False when nothing is."""
        if self._in_flight is not None:
            self._producer.poll(timeout_s)
        return self._in_flight is not None

    def _begin(self, chunk: Chunk) -> _InFlight:
        if self._in_flight is None:
            self._in_flight = _InFlight(time.monotonic(), chunk.oldest_age_s, chunk.position)
        self._in_flight.position = chunk.position
        return self._in_flight

    def _drain(self) -> None:
        while self._in_flight is not None:
            self._producer.flush(SLICE_S)
            if len(self._producer) == 0:
                self._arrived(self._in_flight)
            self._channel.go_on()

    def _arrived(self, flight: _InFlight) -> None:
        """Move the cursor behind what was on its way, of which nothing is any more."""
        if flight.error is not None:
            raise failure(flight.error, flight.first_rows if flight.rows == 1 else ())
        self._in_flight = None
        self.cursor = self.cursor.step(flight.position, flight.rows)
        self._saved = False
        if flight.rows:
            age_s = flight.oldest_age_s + time.monotonic() - flight.sent_at_s
            self._channel.published(flight.rows, age_s)

    def _save(self, *, durably: bool) -> None:
        self._store.save(self.cursor, DELIVERY, durably=durably)
        self._saved, self._saved_at_s = True, time.monotonic()

    def _begin_session(self) -> Cursor:
        """Return the stored cursor; Kafka's, when this relay was `exactly_once` until now."""
        channel = self._channel
        server = leadership.examine(channel.connection)
        stored = self._store.load(server, DELIVERY)
        if stored.delivery != DELIVERY:
            with ExactlyOnce(channel) as until_now:
                cursor = until_now.cursor.next_generation()
        else:
            cursor = stored.cursor
        try:
            admin = channel.admin()
            kafka_cluster_id = cluster_id(admin, channel.topic)
            refuse_another_kafka(cursor, kafka_cluster_id)
            cursor = refuse_another_history(channel.connection, cursor, server)
            cursor = replace(cursor, kafka_cluster_id=kafka_cluster_id)
            self._producer = channel.producer(batch_size(admin, channel.topic))
        except KafkaException as error:
            raise trouble(reason(error)) from error
        if stored.delivery != DELIVERY or cursor != stored.cursor:
            self._store.save(cursor, DELIVERY, durably=True)
        return cursor
