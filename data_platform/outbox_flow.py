"""What the outbox knows of its events: which are published, and which still wait."""

import json
from collections.abc import Iterator

from data_platform import sql_reconcile as sql
from data_platform.loader import Connection

CHUNK_ROWS = 5_000
CHUNK_CHARACTERS = 2**24


class Outbox:
    """The reservation service's outbox, read by a role that may."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @staticmethod
    def readable(connection: Connection) -> "Outbox | None":
        """Return the outbox if this role may read it."""
        allowed = connection.execute(sql.MAY_READ_OUTBOX).fetchone()
        return Outbox(connection) if allowed == (True,) else None

    def _snapshot(self, topic: str) -> str:
        """What a relay has published, at least; before the first time nothing."""
        row = self._connection.execute(sql.CURSOR, {"topic": topic}).fetchone()
        return str(row[0]) if row else "1:1:"

    def pending(self, topic: str, keys: set[str]) -> set[str]:
        """Return the ids of events of these keys that may not be published yet."""
        found = set()
        place = {"topic": topic, "snapshot": self._snapshot(topic)}
        with self._connection.transaction(), self._connection.cursor("pending") as cursor:
            for key, payload in cursor.execute(sql.PENDING, place):
                if key in keys:
                    found.add(str(json.loads(payload).get("id")))
        return found

    def published(self, topic: str) -> Iterator[list[tuple[int, str, str]]]:
        """Yield published rows (id, key, payload), a chunk at a time."""
        row = self._connection.execute(sql.LAST_OUTBOX_ID).fetchone()
        place = {
            "topic": topic,
            "snapshot": self._snapshot(topic),
            "after": -1,
            "until": row[0] if row else 0,
            "limit": CHUNK_ROWS,
            "characters": CHUNK_CHARACTERS,
        }
        while rows := self._connection.execute(sql.PUBLISHED, place).fetchall():
            yield rows
            place["after"] = rows[-1][0]

    def quarantined(self, topic: str) -> list[tuple[int, str, str | None]]:
        """Return the first rows (id, key, error) that Kafka refused, or that wait behind one."""
        return self._connection.execute(sql.QUARANTINED, {"topic": topic}).fetchall()
