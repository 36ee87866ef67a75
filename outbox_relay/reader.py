"""Reads the outbox by snapshot difference: every committed row once, each key in order.

A batch is every row that is visible in a newer snapshot C and was not in the published one P, in
`id` order. Ids commit out of order, so no id can be a cursor; snapshots know exactly what was
committed. A long transaction holds up its own rows only. A key keeps its order because its writer
holds the key's lock when its INSERT starts: of two writers the later one sees the earlier one
committed, draws the greater id, and is never in an older batch.

A batch that fits into one chunk comes from a single statement, whose own snapshot is C. A bigger
one fixes C first and is then walked by id, so that a restart in its middle reads the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import psycopg

from outbox_relay import sql

# A snapshot before all transactions: nothing is visible in it, so the whole outbox is new.
EMPTY_SNAPSHOT = "3:3:"


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
        _, xmax, in_progress = self.published_snapshot.split(":")
        return {"xmax": xmax, "in_progress": in_progress.split(",") if in_progress else []}


class Row(NamedTuple):
    """One event of the outbox. `payload` is the value byte for byte, `headers` a JSON object."""

    id: int
    topic: str
    key: str
    payload: bytes
    headers: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows to publish, in order, and the position once all of them are acknowledged.

    `batch` is a position within the chunk's batch, for when only a part of it is.
    """

    rows: Sequence[Row]
    position: Position
    batch: Position

    def position_after(self, rows: int) -> Position:
        """Return the position when only the first `rows` rows (at least one) are acknowledged."""
        if rows == len(self.rows):
            return self.position
        return replace(self.batch, batch_last_id=self.rows[rows - 1].id)


def read(
    connection: psycopg.Connection, position: Position, *, max_rows: int, max_bytes: int
) -> Chunk:
    """Return the next rows behind `position`: none when there is nothing new.

    A chunk has at most `max_rows` rows, and not more than one row beyond `max_bytes` of payload.
    An empty chunk may still move the position (the end of a big batch): read again from there.
    The WAL that the chunk's position stands on is on disk when this returns.
    """
    if position.batch_snapshot is not None:
        return _read_big_batch(connection, position, max_rows=max_rows, max_bytes=max_bytes)
    chunk = _read_fresh(connection, position, max_rows=max_rows, max_bytes=max_bytes)
    if chunk is None:
        position = _begin_big_batch(connection, position)
        return _read_big_batch(connection, position, max_rows=max_rows, max_bytes=max_bytes)
    return chunk


def _read_fresh(
    connection: psycopg.Connection, position: Position, *, max_rows: int, max_bytes: int
) -> Chunk | None:
    """Return a whole small batch, or its first bytes; None when it has more than `max_rows`."""
    found = connection.execute(
        sql.READ_FRESH,
        {**position.unpublished(), "max_rows": max_rows, "max_bytes": max_bytes},
        prepare=True,
        binary=True,
    ).fetchall()
    if not found:
        return Chunk(rows=(), position=position, batch=position)
    *_, snapshot, wal_lsn, batch_rows = found[0]
    if batch_rows > max_rows:
        return None
    _flush_wal(connection, wal_lsn)
    rows = [Row(*columns[:5]) for columns in found]
    batch = replace(position, batch_snapshot=snapshot, batch_last_id=rows[-1].id, wal_lsn=wal_lsn)
    if len(rows) == batch_rows:
        return Chunk(rows, Position(published_snapshot=snapshot, wal_lsn=wal_lsn), batch)
    # Cut by bytes: the rest of the same batch comes by id.
    return Chunk(rows, batch, batch)


def _begin_big_batch(connection: psycopg.Connection, position: Position) -> Position:
    # A relay's first batch is the whole table: no need to visit all of it to know where it begins.
    statement = (
        sql.BEGIN_WHOLE_OUTBOX
        if position.published_snapshot == EMPTY_SNAPSHOT
        else sql.BEGIN_BIG_BATCH
    )
    found = connection.execute(statement, position.unpublished()).fetchone()
    assert found is not None, "an aggregate returns one row"  # noqa: S101
    snapshot, wal_lsn, first_id = found
    _flush_wal(connection, wal_lsn)
    return replace(
        position,
        batch_snapshot=snapshot,
        batch_last_id=0 if first_id is None else first_id - 1,
        wal_lsn=wal_lsn,
    )


def _read_big_batch(
    connection: psycopg.Connection, position: Position, *, max_rows: int, max_bytes: int
) -> Chunk:
    found = connection.execute(
        sql.READ_BIG_BATCH,
        {
            "after_id": position.batch_last_id,
            "published_snapshot": position.published_snapshot,
            "batch_snapshot": position.batch_snapshot,
            "max_rows": max_rows,
            "max_bytes": max_bytes,
        },
        prepare=True,
        binary=True,
    ).fetchall()
    if not found:
        assert position.batch_snapshot is not None, "a big batch has its snapshot"  # noqa: S101
        done = Position(published_snapshot=position.batch_snapshot, wal_lsn=position.wal_lsn)
        return Chunk(rows=(), position=done, batch=position)
    rows = [Row(*columns) for columns in found]
    batch = replace(position, batch_last_id=rows[-1].id)
    return Chunk(rows, batch, batch)


def _flush_wal(connection: psycopg.Connection, wal_lsn: str) -> None:
    """Make sure that no crash takes back what a batch has seen, or hands out its xids again."""
    connection.execute(sql.FLUSH_WAL_TO, {"wal_lsn": wal_lsn}, prepare=True)
