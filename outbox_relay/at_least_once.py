"""Publishes at least once and each key in order, with the least delay.

Several chunks are on their way at a time. The cursor in Postgres moves behind a chunk when Kafka
has acknowledged it and all before it, and is stored a moment later, so that nobody waits for that:
whatever is killed, the next term starts at or before the first unacknowledged row. It may repeat
events after newer ones of their key.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Self

from confluent_kafka import KafkaError, KafkaException, Message

from outbox_relay import leadership
from outbox_relay.cursor import Cursor, Store, refuse_another_history
from outbox_relay.exactly_once import ExactlyOnce, cluster_id
from outbox_relay.producer import (
    SLICE_S,
    Channel,
    PublishError,
    batch_size,
    failure,
    produce,
    reason,
)
from outbox_relay.reader import Chunk, Position

DELIVERY = "at_least_once"
SAVE_INTERVAL_S = 0.05
# Enough to keep Kafka busy while the next chunk is read.
IN_FLIGHT_MAX_CHUNKS = 200
IN_FLIGHT_MAX_ROWS = 10_000


@dataclass(slots=True)
class _InFlight:
    """A chunk on its way, until Kafka has said something of each of its rows."""

    chunk: Chunk
    sent_at_s: float
    missing: int
    error: KafkaError | None = None

    def delivered(self, error: KafkaError | None, _: Message) -> None:
        self.missing -= 1
        self.error = self.error or error


class AtLeastOnce:
    """One session of a lane with Kafka. Use as a context manager."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._store = Store(channel.connection, channel.term, channel.topic)
        self._in_flight: deque[_InFlight] = deque()
        self._rows_in_flight = 0
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
        return 1.0 if self._saved and not self._in_flight else SAVE_INTERVAL_S

    def send(self, chunk: Chunk) -> None:
        """Hand a chunk to Kafka, once there is room for it.

        Raises:
            PublishError: Kafka is in trouble; the session is over.
            RecordRefusedError: Kafka refused a record; the session is over.
        """
        while (
            self._rows_in_flight >= IN_FLIGHT_MAX_ROWS
            or len(self._in_flight) >= IN_FLIGHT_MAX_CHUNKS
        ):
            self._producer.poll(SLICE_S)
            self._collect()
            self._channel.go_on()
        sent = _InFlight(chunk, time.monotonic(), len(chunk.rows))
        self._in_flight.append(sent)
        self._rows_in_flight += len(chunk.rows)
        try:
            produce(self._producer, self._channel, chunk.rows, sent.delivered)
        except KafkaException as error:
            raise failure(reason(error), chunk.rows) from error
        self.settle()

    def move(self, position: Position) -> None:
        """Note that nothing is to be published up to `position`."""
        self._in_flight.append(_InFlight(Chunk((), position), time.monotonic(), 0))

    def publish_released(self, chunk: Chunk) -> None:
        """Publish quarantined events and wait for them; the cursor stays where it is."""
        self.finish()
        self.send(Chunk(chunk.rows, self.cursor.position))
        self.finish()

    def settle(self) -> None:
        """Take what Kafka has acknowledged, and store the cursor when that is due.

        Raises:
            PublishError, RecordRefusedError: as `send`.
        """
        self._producer.poll(0)
        self._collect()
        if not self._saved and time.monotonic() - self._saved_at_s >= SAVE_INTERVAL_S:
            self._save(durably=False)

    def finish(self) -> None:
        """Wait for all that is on its way, and store the cursor."""
        while self._in_flight:
            self._producer.poll(SLICE_S)
            self._collect()
            self._channel.go_on()
        if not self._saved:
            self._save(durably=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait for what is on its way; False when nothing is."""
        if self._in_flight:
            self._producer.poll(timeout_s)
        return bool(self._in_flight)

    def _collect(self) -> None:
        """Move the cursor behind the chunks that are acknowledged, in the order they were sent."""
        while self._in_flight and self._in_flight[0].missing == 0:
            done = self._in_flight.popleft()
            rows = len(done.chunk.rows)
            if done.error is not None:
                raise failure(done.error, done.chunk.rows)
            self._rows_in_flight -= rows
            self.cursor = self.cursor.step(done.chunk.position, rows)
            self._saved = False
            if rows:
                age_s = done.chunk.oldest_age_s + time.monotonic() - done.sent_at_s
                self._channel.published(rows, age_s)

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
            cursor = refuse_another_history(
                channel.connection, cursor, server, cluster_id(admin, channel.topic)
            )
            self._producer = channel.producer(batch_size(admin, channel.topic))
        except KafkaException as error:
            said = reason(error)
            raise PublishError(f"{said.name()}: {said.str()}") from error
        if stored.delivery != DELIVERY or cursor != stored.cursor:
            self._store.save(cursor, DELIVERY, durably=True)
        return cursor
