"""Events that Kafka refuses for themselves step aside, so that all others flow.

The refused event and every later one of its key wait here, in order, until an operator has made
room for it and released it. They are in this table before the cursor passes them, and leave it
after Kafka has them: nothing is lost in between, and the key's order is kept.
"""

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row

from outbox_relay import sql
from outbox_relay.leadership import RefusedError
from outbox_relay.reader import Chunk, Row

LIST_MAX_ROWS = 10_000
READY_MAX_ROWS = 500
READY_MAX_BYTES = 4 * 2**20


class Quarantine:
    """One topic's quarantine, in the hands of the lane that publishes the topic."""

    def __init__(self, connection: psycopg.Connection, name: str, topic: str) -> None:
        self._connection = connection
        self._named = {"name": name, "topic": topic}
        self._keys: set[str] = set()
        self.load()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def load(self) -> None:
        """Learn which keys wait."""
        found = self._connection.execute(sql.QUARANTINED_KEYS, self._named)
        self._keys = {key for (key,) in found}

    def divert(self, chunk: Chunk) -> Chunk:
        """Return the chunk without the events whose keys wait; those are in the table then."""
        keys = self._keys
        waiting = [row[0] for row in chunk.rows if row[1] in keys] if keys else []
        if not waiting:
            return chunk
        self._insert(waiting, None)
        rows = [row for row in chunk.rows if row[1] not in keys]
        return Chunk(rows, chunk.position, chunk.oldest_age_s)

    def take(self, row: Row, error: str) -> None:
        """Let `row` step aside, or stay aside; from now on the later ones of its key do too."""
        self._insert([row[0]], error)
        self._connection.execute(
            sql.QUARANTINE_REFUSED, {**self._named, "id": row[0], "error": error}
        )
        self._keys.add(row[1])

    def ready(self, max_rows: int) -> list[Row]:
        """Return events that may be tried now, in order."""
        bounds = {"max_rows": min(max_rows, READY_MAX_ROWS), "max_bytes": READY_MAX_BYTES}
        found = self._connection.execute(
            sql.QUARANTINE_READY, {**self._named, **bounds}, binary=True
        )
        return found.fetchall()

    def published(self, rows: Sequence[Row]) -> None:
        """Remove what Kafka has taken."""
        ids = [row[0] for row in rows]
        self._connection.execute(sql.QUARANTINE_PUBLISHED, {**self._named, "ids": ids})
        self.load()

    def _insert(self, ids: Sequence[int], error: str | None) -> None:
        self._connection.execute(sql.QUARANTINE, {**self._named, "ids": ids, "error": error})


def listed(connection: psycopg.Connection, name: str) -> list[dict[str, Any]]:
    """Return what waits, the oldest first: id, topic, key, error, times, bytes."""
    with connection.cursor(row_factory=dict_row) as rows:
        return rows.execute(
            sql.QUARANTINE_LIST, {"name": name, "max_rows": LIST_MAX_ROWS}
        ).fetchall()


def release(connection: psycopg.Connection, name: str, row_id: int) -> None:
    """Let the leader try an event again, and then those that wait behind it.

    Raises:
        RefusedError: it isn't in quarantine, or it only waits behind an earlier event of its key.
    """
    found = connection.execute(sql.QUARANTINE_RELEASE, {"name": name, "id": row_id}).fetchone()
    if found is None:
        raise RefusedError(f"no event with id {row_id} is in quarantine")
    if found[0]:
        raise RefusedError(
            f"event {row_id} only waits behind an earlier one of its key; release that one"
        )
