"""The transaction: rows, dead letters and offsets become visible together, or not at all.

Guarantees: a batch changes anything only if Postgres still stands where the batch begins, in the
same topic (compare-and-swap on the offset rows, which are locked first). So a record is loaded
once, whoever else still believes to own its partition. Only records that Postgres refuses for
what they contain are put aside, found by bisection; when it refuses most, nothing is.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import structlog
from psycopg import errors as pg
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from data_platform import sql, star
from data_platform.batch import BadRecord, Decoded, Row, Slice, bad_record
from data_platform.errors import Cure, MostlyRefusedError, PlaceLostError, cure_of, told
from data_platform.topics import StoredOffset

APPLICATION_NAME = "data-platform"
CONNECT_TIMEOUT_S = 5
# The server's own limits (sql.SESSION) come first; this one is for a server that says nothing.
TRANSACTION_LIMIT_S = 20.0
WATCH_INTERVAL_S = 0.25
# Events that came again come in swarms: so many batches after the last of them still ask first.
ASKING_BATCHES = 20
# A refused batch is searched in pieces of this size, each in a transaction of its own.
PIECE_RECORDS = 100
SIFTING_LIMIT_S = 10.0
# From so many records on, in one batch or one after the other, more refused than loaded means
# that the fault is ours. Of a batch so many are tried.
REFUSED_MINIMUM_RECORDS = 100
SAMPLE_RECORDS = 32

log = structlog.get_logger()

Connection = psycopg.Connection[TupleRow]


@dataclass(frozen=True)
class Loaded:
    """What a transaction did. `new_events` are facts that were not there yet."""

    slices: Sequence[Slice]
    events: int = 0
    new_events: int = 0
    dead_letters: int = 0


class Loader:
    """Loads decoded batches over one connection, which it makes when needed.

    Args:
        url: libpq connection string of a role with the loader's rights.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Connection | None = None
        self._deadline: float | None = None
        self._deadline_lock = threading.Lock()
        self._hurried = False
        self._closed = threading.Event()
        # Records and refusals of late, by which `_judge` tells a bad record from a fault of ours.
        self._recent = (0, 0)
        self._asking = 0
        threading.Thread(target=self._watch, name="transaction-limit", daemon=True).start()

    def claim(
        self, topic: str, topic_id: str, partitions: Sequence[int]
    ) -> Mapping[int, StoredOffset]:
        """Return where Postgres stands in each partition, 0 where it has never been."""
        with self._transaction() as connection:
            connection.cursor().executemany(
                sql.CLAIM_OFFSET,
                [{"topic": topic, "kafka_partition": p, "topic_id": topic_id} for p in partitions],
            )
            connection.execute(
                sql.ADOPT_TOPIC,
                {"topic": topic, "topic_id": topic_id, "partitions": list(partitions)},
            )
            rows = connection.execute(sql.READ_OFFSETS, {"topic": topic})
            return {row[0]: StoredOffset(row[1], row[2]) for row in rows}

    def load(self, batch: Decoded, rows: star.Rows | None = None) -> Loaded:
        """Load a batch and move its partitions' offsets, in one transaction.

        A batch with records that Postgres refuses is loaded in several, piece by piece.

        Args:
            batch: what to load.
            rows: `star.rows_of` the batch, where somebody has made them already.

        Raises:
            PlaceLostError: Postgres doesn't stand where the batch, or one of its pieces, begins.
            MostlyRefusedError: Postgres refuses most of the records; none was put aside.
            psycopg.Error: a transaction failed, or the connection was lost in COMMIT.

        After each of these only Postgres knows where it stands.
        """
        try:
            return self._load_whole(batch, rows or star.rows_of(batch.rows))
        except pg.LockNotAvailable:
            self._end_blockers(batch.slices)
            raise
        except Exception as error:
            if not batch.rows or cure_of(error) is not Cure.DEAD_LETTER:
                raise
            log.warning("batch_refused", cause=told(error), records=len(batch.rows))
        return self._load_in_pieces(batch)

    def _load_whole(self, batch: Decoded, rows: star.Rows) -> Loaded:
        written = star.Written(0, repeated=False)
        with self._transaction() as connection:
            # First of all: whoever finds us frozen in what follows knows us by this lock.
            _lock(connection, batch.slices)
            if batch.rows:
                written = star.write(connection, rows, ask=self._asking > 0)
            put_aside(connection, batch.bad)
            _move(connection, batch)
        self._asking = ASKING_BATCHES if written.repeated else max(0, self._asking - 1)
        self._count(len(batch.rows), 0)
        return Loaded(batch.slices, len(batch.rows), written.new_events, len(batch.bad))

    def _load_in_pieces(self, batch: Decoded) -> Loaded:
        """Load a refused batch bit by bit, so that what is done stays done.

        Bisecting a large batch in one transaction could take longer than one may last.
        """
        large = len(batch.rows) >= REFUSED_MINIMUM_RECORDS
        if large:
            self._try_sample(batch.rows)
        until = time.monotonic() + SIFTING_LIMIT_S
        done = []
        for piece in batch.pieces(PIECE_RECORDS):
            if self._hurried:
                raise PlaceLostError("asked to end while sifting: the rest is for the next worker")
            if time.monotonic() > until:
                raise PlaceLostError("sifting takes long: the rest is fetched again")
            done.append(self._load_sifted(piece, judged=large))
        return Loaded(
            batch.slices,
            sum(piece.events for piece in done),
            sum(piece.new_events for piece in done),
            sum(piece.dead_letters for piece in done),
        )

    def _try_sample(self, rows: Sequence[Row]) -> None:
        """Raise MostlyRefusedError if Postgres refuses more than half of some of the rows.

        Asked before anything is put aside.
        """
        sample = rows[:: -(-len(rows) // SAMPLE_RECORDS)]
        refusals: list[Exception] = []
        with self._transaction() as connection:
            for row in sample:
                try:
                    with connection.transaction(force_rollback=True):
                        star.write(connection, star.rows_of([row]), ask=True)
                except Exception as error:
                    if cure_of(error) is not Cure.DEAD_LETTER:
                        raise
                    refusals.append(error)
        if len(refusals) > len(sample) / 2:
            raise MostlyRefusedError(
                f"Postgres refuses {len(refusals)} of {len(sample)} records tried; none of this "
                f"batch was put aside. The last refusal: {told(refusals[-1])}"
            )

    def _load_sifted(self, batch: Decoded, *, judged: bool) -> Loaded:
        refused: list[BadRecord] = []
        with self._transaction() as connection:
            _lock(connection, batch.slices)
            new_events = sift(connection, batch.rows, refused)
            if not judged:
                self._judge(len(batch.rows), refused)
            put_aside(connection, [*batch.bad, *refused])
            _move(connection, batch)
        self._count(len(batch.rows), len(refused))
        loaded = len(batch.rows) - len(refused)
        return Loaded(batch.slices, loaded, new_events, len(batch.bad) + len(refused))

    def _judge(self, records: int, refused: Sequence[BadRecord]) -> None:
        """For batches too small for a sample: what counts is the sum of the latest ones."""
        seen, seen_refused = self._recent
        if not refused or seen < REFUSED_MINIMUM_RECORDS:
            return
        if seen_refused + len(refused) > (seen + records) / 2:
            raise MostlyRefusedError(
                f"Postgres refuses more than half of the last {seen + records} records; "
                f"none of these was put aside. The last reason: {refused[-1].reason}"
            )

    def _count(self, records: int, refused: int) -> None:
        records, refused = self._recent[0] + records, self._recent[1] + refused
        if records > REFUSED_MINIMUM_RECORDS:
            share = REFUSED_MINIMUM_RECORDS / records
            records, refused = REFUSED_MINIMUM_RECORDS, round(refused * share)
        self._recent = records, refused

    def _end_blockers(self, slices: Sequence[Slice]) -> None:
        """End a loader that holds our offset rows: frozen, or cut off without Postgres knowing.

        The group has given its partitions to us, so whatever it does there will be refused.
        """
        with self._transaction() as connection:
            for pid, ended in connection.execute(sql.END_BLOCKERS, _names(slices)).fetchall():
                log.warning("blocking_loader_ended", backend_pid=pid, ended=ended)

    def close(self) -> None:
        """Close the connection and end the watch."""
        self._closed.set()
        if self._connection is not None:
            self._connection.close()

    # ---- the connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._limited():
                connection = self._connected()
                with connection.transaction():
                    yield connection
        except BaseException as error:
            if not isinstance(error, PlaceLostError) and cure_of(error) is not Cure.DEAD_LETTER:
                self._disconnect()
            raise

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.broken or self._connection.closed:
            connection = psycopg.connect(
                self._url,
                autocommit=True,
                application_name=APPLICATION_NAME,
                connect_timeout=CONNECT_TIMEOUT_S,
            )
            self._connection = connection
            prepare(connection)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        with self._deadline_lock:
            self._deadline = time.monotonic() + TRANSACTION_LIMIT_S
        try:
            yield
        finally:
            with self._deadline_lock:
                self._deadline = None

    def hurry(self, limit_s: float) -> None:
        """Let a transaction in flight have `limit_s` from now on at most; begin no other piece."""
        self._hurried = True
        # In a signal handler: no lock, whose owner may be what was interrupted. The watch may take
        # the deadline away meanwhile.
        deadline = self._deadline
        if deadline is not None:
            self._deadline = min(deadline, time.monotonic() + limit_s)

    def _watch(self) -> None:
        """Cut the connection of a transaction that passes its deadline.

        No setting of the server bounds a wait for a server that is frozen or cut off.
        """
        while not self._closed.wait(WATCH_INTERVAL_S):
            with self._deadline_lock:
                if self._deadline is None or time.monotonic() < self._deadline:
                    continue
                connection = self._connection
                if connection is not None:
                    log.warning("transaction_cut")
                    _shut_down(connection)
                self._deadline = None


def _shut_down(connection: Connection) -> None:
    # Both errors mean that the line is dead already. The duplicate is ours to close, the
    # descriptor itself stays libpq's.
    with (
        contextlib.suppress(psycopg.OperationalError, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as line,
    ):
        line.shutdown(socket.SHUT_RDWR)


def prepare(connection: Connection) -> None:
    """Make a new connection ready to load: its limits and its stage."""
    connection.execute(sql.SESSION)
    connection.execute(sql.CREATE_STAGE)


def _lock(connection: Connection, slices: Sequence[Slice]) -> None:
    """Lock the offset rows and compare them, so that `_move` may move them as they are."""
    stored = {
        (topic, partition): (next_offset, topic_id)
        for topic, partition, next_offset, topic_id in connection.execute(
            sql.LOCK_OFFSETS, _names(slices)
        )
    }
    for part in slices:
        expected = part.first_offset, part.topic_id
        if stored.get((part.topic, part.partition)) != expected:
            raise PlaceLostError(
                f"{part.topic} {part.partition}: expected {expected}, "
                f"Postgres has {stored.get((part.topic, part.partition))}"
            )


def sift(connection: Connection, rows: Sequence[Row], refused: list[BadRecord]) -> int:
    """Load what Postgres takes of `rows`, add the others to `refused`; count new facts.

    In the caller's transaction, on a connection that `prepare` has seen; moves no offset.
    """
    try:
        with connection.transaction():
            written = star.write(connection, star.rows_of(rows), ask=True)
            connection.execute(sql.UNSTAGE)
            return written.new_events
    except Exception as error:
        if cure_of(error) is not Cure.DEAD_LETTER:
            raise
        if len(rows) == 1:
            refused.append(bad_record(rows[0].message, "refused", error))
            return 0
    middle = len(rows) // 2
    return sift(connection, rows[:middle], refused) + sift(connection, rows[middle:], refused)


def put_aside(connection: Connection, bad: Sequence[BadRecord]) -> None:
    """Keep records as dead letters; those that are kept already stay as they are."""
    if bad:
        connection.cursor().executemany(
            sql.INSERT_DEAD_LETTER,
            [
                {
                    "topic": message.topic(),
                    "kafka_partition": message.partition(),
                    "kafka_offset": message.offset(),
                    "raw_key": message.key(),
                    "raw_value": message.value(),
                    "raw_headers": Jsonb(headers),
                    "reason": reason,
                    "error": error,
                }
                for message, reason, error, headers in bad
            ],
        )


def _move(connection: Connection, batch: Decoded) -> None:
    connection.execute(
        sql.MOVE_OFFSETS,
        {
            **_names(batch.slices),
            "next_offsets": [part.next_offset for part in batch.slices],
            "last_events_at": [
                batch.last_event_at.get((part.topic, part.partition)) for part in batch.slices
            ],
        },
    )


def _names(slices: Sequence[Slice]) -> dict[str, Any]:
    return {
        "topics": [part.topic for part in slices],
        "partitions": [part.partition for part in slices],
    }
