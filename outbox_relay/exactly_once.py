"""Publishes exactly once and each key in order, for readers that read what is committed.

The cursor is a record itself, in a topic of this relay alone, and is committed in the same Kafka
transaction as the events. Opening a session fences every earlier producer of the topic, decides
the fate of its last transaction, and only then reads the cursor: it is the one behind which nothing
of ours is in Kafka, whatever was killed, frozen or cut off. There is one answer to all that goes
wrong with a transaction: give the session up and open a new one.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import psycopg
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    OffsetSpec,
)

from outbox_relay import leadership, sql
from outbox_relay.config import Settings
from outbox_relay.cursor import REMEDY, Cursor, Store, newest, refuse_another_history
from outbox_relay.leadership import RefusedError
from outbox_relay.producer import (
    REQUEST_TIMEOUT_S,
    SLICE_S,
    Channel,
    PublishError,
    batch_size,
    failure,
    produce,
    reason,
)
from outbox_relay.reader import Chunk, Position

DELIVERY = "exactly_once"
OPEN_WITHIN_S = 30.0
# The coordinator has given up by then: the transaction is decided, and a new session sees how.
COMMIT_WITHIN_S = 30.0
COPY_INTERVAL_S = 1.0
# Of the cursor topic, read from its end: a lane that was busy finds its own among the last few.
WINDOW_RECORDS = 500
EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Transaction:
    """An open transaction: what it publishes and the cursor that it commits."""

    chunk: Chunk
    cursor: Cursor
    sent_at_s: float


class ExactlyOnce:
    """One session of a lane with Kafka. Use as a context manager."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._store = Store(channel.connection, channel.term, channel.topic)
        self._producer: Producer | None = None
        self._open: _Transaction | None = None
        self._moved: Position | None = None
        self._offsets: dict[str, int] = {}
        self._failure: KafkaError | None = None
        self._copied_at_s = self._committed_at_s = time.monotonic()
        self._copied = True

    def __enter__(self) -> Self:
        self.cursor = self._begin_session()
        return self

    def __exit__(self, *_: object) -> None:
        if self._producer is not None and self._open is not None:
            # Else readers of what is committed would wait for the transaction's timeout.
            with suppress(KafkaException):
                self._producer.abort_transaction(SLICE_S)

    @property
    def idle_for_s(self) -> float:
        """How long a lane without news may leave us alone."""
        return 1.0 if self._copied and self._moved is None else COPY_INTERVAL_S / 2

    def send(self, chunk: Chunk) -> None:
        """Hand a chunk to Kafka; it is committed by the next `send` or `settle`.

        Raises:
            PublishError: Kafka is in trouble; the session is over.
            RecordRefusedError: Kafka refused a record; the session is over.
        """
        self.settle()
        self._begin(chunk, self.cursor.step(chunk.position, len(chunk.rows)))

    def move(self, position: Position) -> None:
        """Note that nothing is to be published up to `position`; committed a little later."""
        self._moved = position

    def publish_released(self, chunk: Chunk) -> None:
        """Publish and commit quarantined events, whose ids the cursor then carries."""
        released = tuple(row.id for row in chunk.rows)
        step = self.cursor.step(self.cursor.position, len(chunk.rows), released)
        self._begin(chunk, step)
        self.settle()

    def settle(self) -> None:
        """Commit what was sent, and copy the cursor to Postgres when that is due.

        Raises:
            PublishError, RecordRefusedError: as `send`.
        """
        now_s = time.monotonic()
        if self._open is None and self._moved and now_s - self._committed_at_s >= COPY_INTERVAL_S:
            self._begin(Chunk((), self._moved), self.cursor.step(self._moved))
        if self._open is not None:
            self._commit(self._open)
        if not self._copied and time.monotonic() - self._copied_at_s >= COPY_INTERVAL_S:
            self._copy()

    def finish(self) -> None:
        """Settle, and leave an exact copy of the cursor in Postgres."""
        self.settle()
        if not self._copied:
            self._copy()

    def wait(self, _timeout_s: float) -> bool:
        """Wait for what is on its way: nothing ever is, a commit has waited."""
        return False

    def _begin(self, chunk: Chunk, cursor: Cursor) -> None:
        assert self._producer is not None, "the session is open"  # noqa: S101
        channel = self._channel
        try:
            self._producer.begin_transaction()
            self._open = _Transaction(chunk, cursor, time.monotonic())
            produce(self._producer, channel, chunk.rows, self._delivered)
            self._producer.produce(
                channel.settings.cursor_topic,
                partition=0,
                key=channel.topic,
                value=replace(cursor, offsets=self._offsets).to_json(),
                on_delivery=self._cursor_delivered,
            )
        except KafkaException as error:
            raise failure(reason(error), chunk.rows) from error
        self._moved = None

    def _commit(self, transaction: _Transaction) -> None:
        assert self._producer is not None, "the session is open"  # noqa: S101
        deadline_s = time.monotonic() + COMMIT_WITHIN_S
        while True:
            try:
                self._producer.commit_transaction(SLICE_S)
                break
            except KafkaException as error:
                if self._failure is not None:
                    raise failure(self._failure, transaction.chunk.rows) from error
                said = reason(error)
                # Timed out: the same commit goes on. Everything else ends the session.
                if said.code() != KafkaError._TIMED_OUT or time.monotonic() > deadline_s:  # noqa: SLF001
                    raise PublishError(f"{said.name()}: {said.str()}") from error
                self._channel.go_on()
        self._open, self.cursor, self._copied = None, transaction.cursor, False
        self._committed_at_s = time.monotonic()
        rows = len(transaction.chunk.rows)
        age_s = transaction.chunk.oldest_age_s + self._committed_at_s - transaction.sent_at_s
        self._channel.published(rows, age_s)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._offsets[str(message.partition())] = message.offset()  # type: ignore[assignment]
        elif self._failure is None:
            self._failure = error

    def _cursor_delivered(self, error: KafkaError | None, _: Message) -> None:
        # Never a reason to quarantine events: whatever it is, it is not theirs.
        if error is not None and self._failure is None:
            self._failure = KafkaError(
                KafkaError._FAIL,  # noqa: SLF001
                f"the cursor was not taken: {error.str()}",
            )

    def _copy(self) -> None:
        self._store.save(self.cursor, DELIVERY, durably=True)
        self._copied, self._copied_at_s = True, time.monotonic()

    def _begin_session(self) -> Cursor:
        """Fence all earlier producers of the topic and return where they came to."""
        channel = self._channel
        server = leadership.examine(channel.connection)
        stored = self._store.load(server, DELIVERY)
        admin = channel.admin()
        try:
            kafka_cluster_id = cluster_id(admin, channel.topic, channel.settings.cursor_topic)
            topic_id = _topic_id(admin, channel.topic)
            records = CursorRecords(channel.settings, channel.topic, admin, channel.go_on)

            def checked(in_kafka: Cursor | None) -> Cursor:
                found = newest(stored, in_kafka, channel.topic)
                return refuse_another_history(channel.connection, found, server, kafka_cluster_id)

            # Before anything is fenced: a copy of the database must not disturb the original.
            checked(records.read(to_the_end=False))
            self._producer = self._fencing_producer(admin, transactional_id(channel, server))
            cursor = checked(records.read(to_the_end=True))
            _refuse_lost_events(admin, channel.topic, cursor, topic_id)
        except KafkaException as error:
            said = reason(error)
            raise PublishError(f"{said.name()}: {said.str()}") from error
        self._offsets = dict(cursor.offsets)
        if cursor.released:
            channel.connection.execute(
                sql.QUARANTINE_PUBLISHED,
                {"name": channel.term.name, "ids": list(cursor.released)},
            )
        if stored.delivery != DELIVERY:
            cursor = cursor.next_generation()
            self._store.save(cursor, DELIVERY, durably=True)
        return replace(cursor, topic_id=topic_id)

    def _fencing_producer(self, admin: AdminClient, transactional_id: str) -> Producer:
        channel = self._channel
        producer = channel.producer(
            {
                **batch_size(admin, channel.topic),
                "transactional.id": transactional_id,
                "transaction.timeout.ms": channel.settings.outbox_relay_transaction_timeout_ms,
            }
        )
        deadline_s = time.monotonic() + OPEN_WITHIN_S
        while True:
            try:
                producer.init_transactions(SLICE_S)
            except KafkaException as error:
                if not reason(error).retriable() or time.monotonic() > deadline_s:
                    raise
                channel.go_on()
            else:
                return producer


def transactional_id(channel: Channel, server: leadership.Server) -> str:
    """Return the id by which Kafka fences: not that of another database's relay of this name."""
    identity, database = server.identity, channel.connection.info.dbname
    name = channel.settings.outbox_relay_name
    return f"outbox-relay.{name}.{identity.system_identifier}.{database}.{channel.topic}"


class CursorRecords:
    """The cursor topic, of which one topic's last committed record is wanted."""

    def __init__(
        self, settings: Settings, topic: str, admin: AdminClient, go_on: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._admin = admin
        self._go_on = go_on
        self._partition = TopicPartition(settings.cursor_topic, 0)

    def read(self, *, to_the_end: bool) -> Cursor | None:
        """Return the last committed cursor.

        Not `to_the_end`, another lane's open transaction may hide it: good enough to see whose it
        is. Else that transaction's end is waited for.

        Raises:
            PublishError: the end was not reached in time.
        """
        start, end = self._offset(EARLIEST), self._offset(LATEST)
        consumer = Consumer(
            {
                **self._settings.kafka_properties(),
                "group.id": "outbox-relay",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "log_level": 0,
            }
        )
        try:
            window, first = WINDOW_RECORDS, end
            while first > start:
                first = max(start, end - window)
                found = self._last(consumer, first, end, to_the_end=to_the_end)
                if found is not None:
                    return Cursor.from_json(found)
                window *= 20
        finally:
            consumer.close()
        return None

    def _offset(self, which: OffsetSpec) -> int:
        future = self._admin.list_offsets(
            {self._partition: which},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=REQUEST_TIMEOUT_S,
        )[self._partition]
        return int(future.result(REQUEST_TIMEOUT_S).offset)

    def _last(self, consumer: Consumer, first: int, end: int, *, to_the_end: bool) -> bytes | None:
        """Return the value of the last committed record of our key in [first, end)."""
        key, found = self._topic.encode(), None
        consumer.assign([TopicPartition(self._partition.topic, 0, first)])
        deadline_s = time.monotonic() + OPEN_WITHIN_S
        while time.monotonic() < deadline_s:
            message = consumer.poll(SLICE_S)
            error = None if message is None else message.error()
            if message is None:
                self._go_on()
            elif error is None:
                if message.key() == key:
                    found = message.value()
            elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001
                raise KafkaException(error)
            # The end of what is committed, which an open transaction holds back.
            elif not to_the_end or (message.offset() or 0) >= end:
                return found
        raise PublishError("the end of the cursor topic was not reached in time")


def newest_generation(settings: Settings, connection: psycopg.Connection) -> int:
    """Return the newest generation of cursors that Kafka knows of; 0 when it has none.

    Raises:
        KafkaException: Kafka can't be reached.
    """
    admin = AdminClient({**settings.kafka_properties(), "log_level": 0})
    newest_found = 0
    if settings.cursor_topic not in admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics:
        return newest_found
    for (topic,) in connection.execute(sql.TOPICS).fetchall():
        found = CursorRecords(settings, topic, admin, lambda: None).read(to_the_end=False)
        newest_found = max(newest_found, 0 if found is None else found.generation)
    return newest_found


def cluster_id(admin: AdminClient, *topics: str) -> str:
    """Return the id of the Kafka cluster, which has these topics.

    Raises:
        KafkaException: it can't be reached.
        PublishError: a topic is missing.
    """
    found = admin.list_topics(timeout=REQUEST_TIMEOUT_S)
    for topic in topics:
        if topic not in found.topics:
            raise PublishError(f"topic {topic} is missing; `outbox-relay topics` makes it")
    return str(found.cluster_id)


def _topic_id(admin: AdminClient, topic: str) -> str:
    future = admin.describe_topics(TopicCollection([topic]), request_timeout=REQUEST_TIMEOUT_S)
    return str(future[topic].result(REQUEST_TIMEOUT_S).topic_id)


def _refuse_lost_events(admin: AdminClient, topic: str, cursor: Cursor, topic_id: str) -> None:
    """Refuse when events that the cursor counts as published are not in `topic` any more.

    Raises:
        RefusedError: the topic was made anew, or is shorter than the cursor knows.
    """
    if cursor.topic_id not in (None, topic_id):
        raise RefusedError(
            f"topic {topic} was removed and made again since the cursor was written. {REMEDY}"
        )
    if not cursor.offsets:
        return
    futures = admin.list_offsets(
        {TopicPartition(topic, int(number)): LATEST for number in cursor.offsets},
        isolation_level=IsolationLevel.READ_UNCOMMITTED,
        request_timeout=REQUEST_TIMEOUT_S,
    )
    for partition, future in futures.items():
        end = future.result(REQUEST_TIMEOUT_S).offset
        if end <= cursor.offsets[str(partition.partition)]:
            raise RefusedError(
                f"topic {topic} has lost events: partition {partition.partition} ends at {end}."
                f" {REMEDY}"
            )
