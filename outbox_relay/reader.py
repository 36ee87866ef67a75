"""Reads the outbox by snapshot difference: every committed row once, each key in order.

A batch is every row that is visible in a newer snapshot C and was not in the published one P, in
`id` order. Ids commit out of order, so no id can be a cursor; snapshots know exactly what was
committed. A long transaction holds up its own rows only. A key keeps its order because its writer
holds the key's lock when its INSERT starts: of two writers the later one sees the earlier one
committed, draws the greater id, and is never in an older batch.

A batch that fits into one chunk comes from a single statement, whose own snapshot is C. A bigger
one fixes C first and is then walked by id, so that a restart in its middle reads the same rows.
"""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any, Self, TypedDict, cast

import psycopg

from outbox_relay import sql

# A snapshot before all transactions: nothing is visible in it, so the whole outbox is new.
EMPTY_SNAPSHOT = "3:3:"
# So many rows of a big batch come at a time; each may have a megabyte.
STREAM_ROWS = 32


@dataclass(frozen=True, slots=True)
class Position:
    """How far the outbox is published.

    Everything visible in `published_snapshot` is; while a big batch is under way also what is
    visible in `batch_snapshot` up to `batch_last_id`. `wal_lsn` is the end of the WAL when the
    newer of both was taken: whatever it tells of is on disk once the WAL is flushed so far.
    """

    published_snapshot: str
    wal_lsn: str
    batch_snapshot: str | None = None
    batch_last_id: int | None = None

    def unpublished(self) -> dict[str, object]:
        """Return by which transactions an index finds what `published_snapshot` has not seen."""
        return unseen_by(self.published_snapshot)


def unseen_by(snapshot: str) -> dict[str, object]:
    """Return the bounds of the transactions that a snapshot (as text) has not seen."""
    _, xmax, in_progress = snapshot.split(":")
    return {"xmax": xmax, "in_progress": in_progress.split(",") if in_progress else []}


# One event of a topic as it comes from the database: id, key, value byte for byte, headers as the
# text of a JSON object; and what the first row of a chunk tells of all. A plain tuple: making
# something of it would cost a drain a tenth of its speed.
Row = tuple[int, str, bytes, str, list[str] | None]
PAYLOAD, HEADERS = itemgetter(2), itemgetter(3)


class Limits(TypedDict):
    """What a chunk may be."""

    topic: str
    max_rows: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows to publish, in order, and the position once all of them are acknowledged.

    `oldest_age_s` is how long ago the first of them was written, when that is known.
    """

    rows: Sequence[Row]
    position: Position
    oldest_age_s: float = 0.0

    @property
    def more(self) -> bool:
        """Whether its batch goes on behind it."""
        return self.position.batch_snapshot is not None


def read(
    connection: psycopg.Connection, position: Position, topic: str, *, max_rows: int, max_bytes: int
) -> Chunk:
    """Return the next rows of `topic` behind `position`: none when there is nothing new.

    A chunk has at most `max_rows` rows and about `max_bytes` of payloads and headers: never more
    than twice that and a few rows.
    An empty chunk may still move the position (the end of a big batch): read again from there.
    The WAL that the chunk's position stands on is on disk when this returns.
    """
    limits = Limits(topic=topic, max_rows=max_rows, max_bytes=max_bytes)
    if position.batch_snapshot is not None:
        return _read_big_batch(connection, position, limits)
    # A relay's first batch is the whole table: no need to visit all of it to know where it begins.
    whole = position.published_snapshot == EMPTY_SNAPSHOT
    try:
        chunk = _read_fresh(connection, position, limits)
        if chunk is not None:
            return chunk
        batch = _begin_big_batch(connection, position, topic, whole=whole)
    except psycopg.errors.QueryCanceled:
        # Too many rows of other topics lie in between: whatever there is is walked through, then.
        batch = _begin_big_batch(connection, position, topic, whole=True)
    return _read_big_batch(connection, batch, limits)


class Reader:
    """Reads a topic's chunks; of a big batch the next one while the present one is published.

    Use as a context manager: behind it nobody uses the connection any more.
    """

    def __init__(self, connection: psycopg.Connection, topic: str, max_bytes: int) -> None:
        self._connection = connection
        self._topic = topic
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(1, f"read {topic}")
        self._ahead: tuple[Position, Future[Chunk]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def next(self, position: Position, max_rows: int) -> Chunk:
        """Return what `read` does."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            chunk = ahead[1].result()
        else:
            chunk = self._read(position, max_rows)
        if chunk.more:
            self._ahead = chunk.position, self._pool.submit(self._read, chunk.position, max_rows)
        return chunk

    def _read(self, position: Position, max_rows: int) -> Chunk:
        return read(
            self._connection, position, self._topic, max_rows=max_rows, max_bytes=self._max_bytes
        )


def skip_other_topics(connection: psycopg.Connection, position: Position, topic: str) -> Position:
    """Return a newer position when other topics have rows behind `position` and `topic` has none.

    Else the transactions to look through, and the partitions of the outbox that this position
    keeps, would grow for as long as `topic` has no event.
    """
    if position.batch_snapshot is not None:
        return position
    try:
        found = connection.execute(
            sql.SKIP_OTHER_TOPICS, {**position.unpublished(), "topic": topic}, prepare=True
        ).fetchone()
    except psycopg.errors.QueryCanceled:  # too many: `read` passes them
        return position
    if found is None:
        return position
    _flush_wal(connection, found[1])
    return Position(published_snapshot=found[0], wal_lsn=found[1])


def _read_fresh(connection: psycopg.Connection, position: Position, limits: Limits) -> Chunk | None:
    """Return a whole small batch, or its first bytes; None when it has more than `max_rows`."""
    found = connection.execute(
        sql.READ_FRESH, {**position.unpublished(), **limits}, prepare=True, binary=True
    ).fetchall()
    if not found:
        return Chunk(rows=(), position=position)
    snapshot, wal_lsn, batch_rows, age_s = found[0][4]
    if int(batch_rows) > limits["max_rows"]:
        return None
    if len(found) == int(batch_rows):
        return Chunk(found, Position(published_snapshot=snapshot, wal_lsn=wal_lsn), float(age_s))
    # Cut by bytes: the rest of the same batch comes by id.
    batch = replace(position, batch_snapshot=snapshot, batch_last_id=found[-1][0], wal_lsn=wal_lsn)
    return Chunk(found, batch, float(age_s))


def _begin_big_batch(
    connection: psycopg.Connection, position: Position, topic: str, *, whole: bool
) -> Position:
    statement = sql.BEGIN_WHOLE_OUTBOX if whole else sql.BEGIN_BIG_BATCH
    found = connection.execute(statement, {**position.unpublished(), "topic": topic}).fetchone()
    assert found is not None, "an aggregate returns one row"  # noqa: S101
    snapshot, wal_lsn, first_id = found
    _flush_wal(connection, wal_lsn)
    return replace(
        position,
        batch_snapshot=snapshot,
        batch_last_id=0 if first_id is None else first_id - 1,
        wal_lsn=wal_lsn,
    )


def _read_big_batch(connection: psycopg.Connection, position: Position, limits: Limits) -> Chunk:
    assert position.batch_snapshot is not None, "a big batch has its snapshot"  # noqa: S101
    assert position.batch_last_id is not None, "and a place in it"  # noqa: S101
    window_end_id = position.batch_last_id + sql.WINDOW_IDS
    found = _stream(
        connection,
        {
            **limits,
            "after_id": position.batch_last_id,
            "window_end_id": window_end_id,
            "published_snapshot": position.published_snapshot,
            "batch_snapshot": position.batch_snapshot,
        },
    )
    if found:
        told = found[0][4]
        age_s = float(told[0]) if told else 0.0
        return Chunk(found, replace(position, batch_last_id=found[-1][0]), age_s)
    following = connection.execute(sql.NEXT_ID, {"after_id": window_end_id}).fetchone()
    if following is None or following[0] is None:
        return Chunk((), Position(position.batch_snapshot, position.wal_lsn))
    return Chunk((), replace(position, batch_last_id=following[0] - 1))


def _stream(connection: psycopg.Connection, parameters: Mapping[str, Any]) -> list[Row]:
    """Return the chunk's rows, while the server goes on reading the next ones.

    Rows that grow all of a sudden are cut off: the statement knows the size of the first ones only.
    """
    found: list[Row] = []
    rest_bytes = 2 * parameters["max_bytes"]
    with connection.cursor() as cursor:
        rows = cast(
            "Generator[Row]",
            cursor.stream(sql.READ_BIG_BATCH, parameters, binary=True, size=STREAM_ROWS),
        )
        with closing(rows):
            while rest_bytes > 0 and (some := list(islice(rows, STREAM_ROWS))):
                found += some
                rest_bytes -= sum(map(len, map(PAYLOAD, some))) + sum(map(len, map(HEADERS, some)))
    return found


def _flush_wal(connection: psycopg.Connection, wal_lsn: str) -> None:
    """Make sure that no crash takes back what a batch has seen, or hands out its xids again."""
    connection.execute(sql.FLUSH_WAL_TO, {"wal_lsn": wal_lsn}, prepare=True)
