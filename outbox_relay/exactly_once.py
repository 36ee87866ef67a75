"""Publishes exactly once and each key in order, for readers that read what is committed.

The cursor is a record itself, in a topic of this relay alone, and is committed in the same Kafka
transaction as the events. Opening a session fences every earlier producer of the topic, decides
the fate of its last transaction, and only then reads the cursor: it is the one behind which nothing
of ours is in Kafka, whatever was killed, frozen or cut off. There is one answer to all that goes
wrong with a transaction: give the session up and open a new one.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

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
from outbox_relay.cursor import (
    REMEDY,
    Cursor,
    Store,
    Stored,
    from_row,
    load_rows,
    newest,
    refuse_another_history,
    refuse_another_kafka,
    refuse_restored,
)
from outbox_relay.leadership import RefusedError
from outbox_relay.producer import (
    ANSWER_WITHIN_S,
    FULL_QUEUE_SLICE_S,
    QUIET,
    REQUEST_TIMEOUT_S,
    SLICE_S,
    Channel,
    PublishError,
    RecordRefusedError,
    batch_size,
    failure,
    make_admin,
    produce,
    reason,
    trouble,
)
from outbox_relay.reader import Chunk, Position, Row

DELIVERY = "exactly_once"
OPEN_WITHIN_S = 30.0
# The coordinator has given up by then: the transaction is decided, and a new session sees how.
COMMIT_WITHIN_S = 30.0
SURE_AFTER_S, SURE_INTERVAL_S = 3.0, 0.3
FLUSH_SLICE_S = 0.05
COPY_INTERVAL_S = 1.0
# A backlog is committed in portions, not in chunks: every commit costs some 10 ms.
TRANSACTION_MAX_CHUNKS = 20
TRANSACTION_MAX_S = 0.5
# After a commit Kafka still writes its markers; who begins meanwhile is sent away for 20 ms.
MARKERS_S = 0.002
# Of the cursor topic, read from its end: a lane that was busy finds its own among the last few.
WINDOW_RECORDS = 500
EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


class HeldBackError(PublishError):
    """What is committed can't be read up to where it should be."""


@dataclass(slots=True)
class _Transaction:
    """An open transaction: what was sent in it so far, and the cursor that it will commit."""

    cursor: Cursor
    begun_at_s: float
    oldest_age_s: float
    rows: int = 0
    # For the one that Kafka refuses; more of them are only counted.
    first_rows: Sequence[Row] = ()


class ExactlyOnce:
    """One session of a lane with Kafka. Use as a context manager."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._store = Store(channel.connection, channel.term, channel.topic)
        self._producer: Producer | None = None
        self._open: _Transaction | None = None
        self._moved: Position | None = None
        self._admin: AdminClient | None = None
        self._partitions: Sequence[int] = ()
        self._offsets: dict[str, int] = {}
        self._asked: dict[TopicPartition, Future[Any]] = {}
        self._failure: KafkaError | None = None
        self._copied_at_s = self._committed_at_s = time.monotonic()
        self._copied = self._told_of_copy = True

    def __enter__(self) -> Self:
        self.cursor = self._begin_session()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._producer is None or self._open is None:
            return
        if kind is not RecordRefusedError:  # after which the next session begins at once
            # Else readers of what is committed would wait for the transaction's timeout.
            with suppress(KafkaException):
                self._producer.abort_transaction(SLICE_S)

    @property
    def idle_for_s(self) -> float:
        """How long a lane without news may leave us alone."""
        settled = self._copied and self._told_of_copy and self._moved is None
        return 1.0 if settled else COPY_INTERVAL_S / 2

    def send(self, chunk: Chunk) -> None:
        """Hand a chunk to Kafka; it is committed by `settle`, or with others of a backlog.

        Raises:
            PublishError: Kafka is in trouble; the session is over.
            RecordRefusedError: Kafka refused a record; the session is over.
        """
        transaction = self._open or self._begin(chunk.oldest_age_s)
        transaction.cursor = replace(transaction.cursor, position=chunk.position)
        self._produce(transaction, chunk)
        max_rows = self._channel.settings.outbox_relay_chunk_max_rows * TRANSACTION_MAX_CHUNKS
        full = transaction.rows >= max_rows
        if full or time.monotonic() - transaction.begun_at_s >= TRANSACTION_MAX_S:
            self.settle()

    def move(self, position: Position) -> None:
        """Note that nothing is to be published up to `position`; committed a little later."""
        if self._open is None:
            self._moved = position
        else:
            self._open.cursor = replace(self._open.cursor, position=position)

    def publish_released(self, rows: Sequence[Row]) -> None:
        """Publish and commit quarantined events, whose ids the cursor then carries."""
        self.settle()
        transaction = self._begin(0.0)
        released = tuple(row[0] for row in rows)
        transaction.cursor = replace(transaction.cursor, released=released)
        self._produce(transaction, Chunk(rows, self.cursor.position))
        self.settle()

    def settle(self) -> None:
        """Commit what was sent, and copy the cursor to Postgres when that is due.

        Raises:
            PublishError, RecordRefusedError: as `send`.
        """
        if self._open is not None:
            self._commit(self._open)
        elif time.monotonic() - self._committed_at_s >= COPY_INTERVAL_S:
            self._commit_cursor()
        if not self._copied and time.monotonic() - self._copied_at_s >= COPY_INTERVAL_S:
            self._copy()

    def finish(self) -> None:
        """Settle, and leave an exact copy of the cursor in Postgres."""
        self.settle()
        if not self._copied:
            self._copy()
        self._commit_cursor()

    def _commit_cursor(self) -> None:
        """Commit what the cursor alone has to tell: another position, or its copy in Postgres."""
        if self._moved is not None:
            self._commit(self._begin(0.0))
        elif self._copied and not self._told_of_copy:
            self._commit(self._begin(0.0))
            # Another copy would be something to tell of again, and so on.
            self._copied = True

    def wait(self, _timeout_s: float) -> bool:
        """Wait for what is on its way: nothing ever is, a commit has waited."""
        return False

    def _begin(self, oldest_age_s: float) -> _Transaction:
        assert self._producer is not None, "the session is open"  # noqa: S101
        wait_s = self._committed_at_s + MARKERS_S - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            raise failure(reason(error), ()) from error
        step = self.cursor.step(self._moved or self.cursor.position)
        self._open = _Transaction(step, time.monotonic(), oldest_age_s)
        self._moved = None
        return self._open

    def _produce(self, transaction: _Transaction, chunk: Chunk) -> None:
        assert self._producer is not None, "the session is open"  # noqa: S101
        count = len(chunk.rows)
        transaction.first_rows = transaction.first_rows or chunk.rows
        transaction.rows += count
        rows = transaction.cursor.published_rows + count
        transaction.cursor = replace(transaction.cursor, published_rows=rows)
        try:
            produce(self._producer, self._channel, chunk.rows, self._failed)
            self._producer.poll(0)
        except KafkaException as error:
            raise self._cause(error, transaction) from error

    def _cause(self, error: KafkaException, transaction: _Transaction) -> Exception:
        """Return what is behind a failure: a refused record makes the producer refuse the next."""
        assert self._producer is not None, "the session is open"  # noqa: S101
        self._producer.poll(0)
        rows = transaction.first_rows if transaction.rows == 1 else ()
        return failure(self._failure or reason(error), rows)

    def _commit(self, transaction: _Transaction) -> None:
        self._produce_cursor(transaction)
        self._complete(transaction)
        self._open, self.cursor, self._copied = None, transaction.cursor, False
        self._told_of_copy = True
        self._committed_at_s = time.monotonic()
        age_s = transaction.oldest_age_s + self._committed_at_s - transaction.begun_at_s
        if transaction.rows:
            self._channel.published(transaction.rows, age_s)

    def _produce_cursor(self, transaction: _Transaction) -> None:
        assert self._producer is not None, "the session is open"  # noqa: S101
        value = replace(
            transaction.cursor, offsets=self._offsets, copied_sequence=self._store.saved.sequence
        ).to_json()
        while True:
            try:
                self._producer.produce(
                    self._channel.settings.cursor_topic,
                    partition=0,
                    key=self._channel.topic,
                    value=value,
                    on_delivery=self._cursor_failed,
                )
            except BufferError:
                self._producer.poll(FULL_QUEUE_SLICE_S)
                self._channel.go_on()
            except KafkaException as error:
                cause = self._cause(error, transaction)
                # What is wrong with the cursor itself is no reason to quarantine events.
                raise (cause if self._failure else trouble(reason(error))) from error
            else:
                return

    def _complete(self, transaction: _Transaction) -> None:
        assert self._producer is not None, "the session is open"  # noqa: S101
        deadline_s = time.monotonic() + COMMIT_WITHIN_S
        # A commit does this too, but a refused record would cost it the whole of its time.
        while self._producer.flush(FLUSH_SLICE_S) > 0 and self._failure is None:
            self._channel.go_on()
            if time.monotonic() > deadline_s:
                raise PublishError("records were not acknowledged in time")
        if self._failure is not None:
            raise failure(self._failure, transaction.first_rows if transaction.rows == 1 else ())
        while True:
            try:
                self._producer.commit_transaction(SLICE_S)
            except KafkaException as error:
                said = reason(error)
                # Timed out: the same commit goes on. Everything else ends the session.
                if said.code() != KafkaError._TIMED_OUT or time.monotonic() > deadline_s:  # noqa: SLF001
                    raise trouble(said) from error
                self._channel.go_on()
            else:
                return

    def _failed(self, error: KafkaError | None, _: Message) -> None:
        self._failure = self._failure or error

    def _cursor_failed(self, error: KafkaError | None, _: Message) -> None:
        # Never a reason to quarantine events: whatever it is, it is not theirs.
        if error is not None and self._failure is None:
            self._failure = KafkaError(
                KafkaError._FAIL,  # noqa: SLF001
                f"the cursor was not taken: {error.str()}",
            )

    def _copy(self) -> None:
        self._take_offsets()
        self._store.save(self.cursor, DELIVERY, durably=True)
        self._copied, self._copied_at_s = True, time.monotonic()
        self._told_of_copy = False

    def _take_offsets(self) -> None:
        """Note where the topic's partitions ended when we last asked, and ask again."""
        for partition, future in self._asked.items():
            if future.done() and future.exception() is None:
                number, end = str(partition.partition), int(future.result().offset)
                # -1001 while it has no leader, an old end from a broker that has just woken up.
                self._offsets[number] = max(end, self._offsets.get(number, 0))
        assert self._admin is not None, "the session is open"  # noqa: S101
        self._asked = self._admin.list_offsets(
            {TopicPartition(self._channel.topic, number): LATEST for number in self._partitions},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=REQUEST_TIMEOUT_S,
        )

    def _begin_session(self) -> Cursor:
        """Fence all earlier producers of the topic and return where they came to."""
        channel = self._channel
        server = leadership.examine(channel.connection)
        stored = self._store.load(server, DELIVERY)
        admin = self._admin = channel.admin()
        try:
            kafka_cluster_id = cluster_id(admin, channel.topic, channel.settings.cursor_topic)
            topic_id, self._partitions = _describe(admin, channel.topic)
            records = CursorRecords(channel.settings, channel.topic, admin, channel.go_on)

            def checked(in_kafka: Cursor | None) -> Cursor:
                refuse_another_kafka(stored.cursor, kafka_cluster_id)
                refuse_restored(stored.cursor, in_kafka, channel.topic)
                replaced = in_kafka and in_kafka.generation < stored.cursor.generation
                counts = stored.cursor if in_kafka is None or replaced else in_kafka
                return refuse_another_history(channel.connection, counts, server)

            # Before anything is fenced: a copy of the database must not disturb the original.
            checked(records.read())
            self._producer = self._fencing_producer(admin, transactional_id(channel, server))
            in_kafka = self._decided_cursor(records, self._barrier())
            cursor = checked(newest(stored, in_kafka, channel.topic))
            self._refuse_for_good(
                lambda: _refuse_lost_events(admin, channel.topic, cursor, topic_id)
            )
        except KafkaException as error:
            raise trouble(reason(error)) from error
        self._offsets = dict(cursor.offsets)
        if cursor.released:
            channel.connection.execute(
                sql.QUARANTINE_PUBLISHED,
                {"name": channel.term.name, "ids": list(cursor.released)},
            )
        if stored.delivery != DELIVERY:
            cursor = cursor.next_generation()
            self._store.save(cursor, DELIVERY, durably=True)
        return replace(cursor, topic_id=topic_id, kafka_cluster_id=kafka_cluster_id)

    def _decided_cursor(self, records: "CursorRecords", barrier: int) -> Cursor | None:
        """Return the last committed cursor, now that no transaction of ours is open.

        Where one still holds it back, Kafka has lost it: a coordinator that takes over while a
        partition has no leader (all brokers died at once) declares the transaction complete and
        leaves out that partition (seen in 4.3.0). Its records then hold back every reader for ever.
        """
        try:
            return records.read(up_to=barrier)
        except HeldBackError as error:
            hanging = self._held_back()
            if not any(place.topic == self._channel.settings.cursor_topic for place in hanging):
                raise
            self._abort_hanging(hanging)
            raise PublishError(
                "Kafka had lost a transaction and left it open; it is aborted, its events follow"
            ) from error

    def _held_back(self) -> list[TopicPartition]:
        """Return the partitions in which an open transaction hides what is behind it."""
        assert self._admin is not None, "the session is open"  # noqa: S101
        cursor_topic = self._channel.settings.cursor_topic
        places = [TopicPartition(self._channel.topic, number) for number in self._partitions]
        places.append(TopicPartition(cursor_topic, 0))
        committed, written = (
            self._admin.list_offsets(
                dict.fromkeys(places, LATEST),
                isolation_level=isolation,
                request_timeout=REQUEST_TIMEOUT_S,
            )
            for isolation in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
        )
        return [
            place
            for place in places
            if offset_in(committed[place], place.topic) < offset_in(written[place], place.topic)
        ]

    def _abort_hanging(self, places: Sequence[TopicPartition]) -> None:
        """End by an abort whatever of our producer's id is open in these partitions.

        An abort's marker ends all that is open of its producer's id. As the cursor is among it,
        everything behind the last one that counts is published again: nothing can get lost.
        """
        assert self._producer is not None, "the session is open"  # noqa: S101
        self._producer.begin_transaction()
        for place in places:
            # Nobody sees it; only a partition that was written to gets a marker.
            self._producer.produce(place.topic, partition=place.partition, key=b"aborted")
        deadline_s = time.monotonic() + OPEN_WITHIN_S
        while self._producer.flush(FLUSH_SLICE_S) > 0 and time.monotonic() < deadline_s:
            self._channel.go_on()
        self._in_slices(self._producer.abort_transaction)

    def _refuse_for_good(self, check: Callable[[], None]) -> None:
        """Refuse what is found again and again: a broker that woke up may tell of old ends."""
        until_s = time.monotonic() + SURE_AFTER_S
        while True:
            try:
                return check()
            except RefusedError:
                if time.monotonic() > until_s:
                    raise
            self._channel.go_on()
            time.sleep(SURE_INTERVAL_S)

    def _fencing_producer(self, admin: AdminClient, transactional_id: str) -> Producer:
        channel = self._channel
        producer = channel.producer(
            {
                **batch_size(admin, channel.topic),
                "transactional.id": transactional_id,
                "transaction.timeout.ms": channel.settings.outbox_relay_transaction_timeout_ms,
            }
        )
        self._in_slices(producer.init_transactions)
        return producer

    def _in_slices(self, act: Callable[[float], object]) -> None:
        """Do what may be called again when it timed out, and leave it soon when told to stop."""
        deadline_s = time.monotonic() + OPEN_WITHIN_S
        while True:
            try:
                act(SLICE_S)
            except KafkaException as error:
                if not reason(error).retriable() or time.monotonic() > deadline_s:
                    raise
                self._channel.go_on()
            else:
                return

    def _barrier(self) -> int:
        """Write a record to the cursor topic, after the fencing; return its offset.

        Who has read up to it has read whatever was committed before. An end that a broker tells
        wouldn't do: one that was frozen and no longer leads tells an old one until it knows.
        """
        told: list[tuple[KafkaError | None, int]] = []
        producer = self._channel.producer({"delivery.report.only.error": False})
        producer.produce(
            self._channel.settings.cursor_topic,
            partition=0,
            key=b"barrier",
            on_delivery=lambda error, message: told.append((error, message.offset() or 0)),
        )
        deadline_s = time.monotonic() + OPEN_WITHIN_S
        while not told:
            if time.monotonic() > deadline_s:
                raise PublishError("the cursor topic did not take a record in time")
            producer.flush(FLUSH_SLICE_S)
            self._channel.go_on()
        error, offset = told[0]
        if error is not None:
            raise trouble(error)
        return offset


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

    def read(self, *, up_to: int | None = None) -> Cursor | None:
        """Return the last committed cursor.

        Without `up_to` (an offset) another lane's open transaction may hide it: good enough to see
        whose it is. Else that transaction's end is waited for.

        Raises:
            HeldBackError: `up_to` was not reached in time.
        """
        start = self._offset(EARLIEST)
        end = self._offset(LATEST) if up_to is None else up_to
        consumer = Consumer(
            {
                **self._settings.kafka_properties(),
                "group.id": "outbox-relay",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 5,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                **QUIET,
            }
        )
        try:
            window, first = WINDOW_RECORDS, end
            while first > start:
                first = max(start, end - window)
                found = self._last(consumer, first, up_to)
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
        return offset_in(future, self._partition.topic)

    def _last(self, consumer: Consumer, first: int, up_to: int | None) -> bytes | None:
        """Return the value of the last committed record of our key from `first` on."""
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
            elif up_to is None or (message.offset() or 0) > up_to:
                return found
        raise HeldBackError("the end of the cursor topic was not reached in time")


def refuse_as_a_lane_would(
    settings: Settings, connection: psycopg.Connection, topic: str, *, at_rest: bool
) -> None:
    """Compare Kafka with the cursor in Postgres as a session of `topic` does; fence nobody.

    Raises:
        RefusedError: a lane refuses, or will; not `at_rest`, while a relay leads, a cursor that is
            just being committed is no reason.
        KafkaException, PublishError: Kafka can't be reached, or the topic is missing.
    """
    admin = make_admin(settings.kafka_properties())
    # Before the copy, which a leader may renew meanwhile.
    in_kafka = CursorRecords(settings, topic, admin, lambda: None).read()
    for row in load_rows(connection, settings.outbox_relay_name, topic):
        stored = Stored(from_row(row), row["delivery"])
        refuse_another_kafka(stored.cursor, cluster_id(admin, topic))
        refuse_restored(stored.cursor, in_kafka, topic)
        counts = newest(stored, in_kafka, topic) if at_rest else in_kafka or stored.cursor
        _refuse_lost_events(admin, topic, counts, _describe(admin, topic)[0])


def newest_generation(settings: Settings, connection: psycopg.Connection) -> int:
    """Return the newest generation of cursors that Kafka knows of; 0 when it has none.

    Raises:
        KafkaException: Kafka can't be reached.
    """
    admin = make_admin(settings.kafka_properties())
    newest_found = 0
    if settings.cursor_topic not in admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics:
        return newest_found
    for (topic,) in connection.execute(sql.TOPICS, {"name": settings.outbox_relay_name}).fetchall():
        found = CursorRecords(settings, topic, admin, lambda: None).read()
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


def _describe(admin: AdminClient, topic: str) -> tuple[str, Sequence[int]]:
    """Return the topic's id, which another topic of its name hasn't, and its partitions."""
    future = admin.describe_topics(TopicCollection([topic]), request_timeout=REQUEST_TIMEOUT_S)
    found = future[topic].result(ANSWER_WITHIN_S)
    return str(found.topic_id), [partition.id for partition in found.partitions]


def offset_in(asked: Future[Any], topic: str) -> int:
    """Wait for an offset that was asked for.

    A partition without a leader may answer -1001 and no error: taken for its end, that would be an
    empty topic that has lost its events, or a cursor that was never written.

    Raises:
        KafkaException: Kafka can't be reached.
        PublishError: no broker tells it just now.
    """
    offset = int(asked.result(ANSWER_WITHIN_S).offset)
    if offset < 0:
        raise PublishError(f"Kafka tells no offset of topic {topic} just now")
    return offset


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
        end = offset_in(future, topic)
        if end < cursor.offsets[str(partition.partition)]:
            raise RefusedError(
                f"topic {topic} has lost events: partition {partition.partition} ends at {end}."
                f" {REMEDY}"
            )
