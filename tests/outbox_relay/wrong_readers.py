"""Two readers that most outbox relays use, here to show that the race finds them out."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

# Ids commit out of order: what commits late has been passed.
BY_ID = """
SELECT id, 0::bigint, key, payload FROM outbox
WHERE id > %(id)s ORDER BY id LIMIT 1000
"""
# A late event of an old transaction sorts before the events it comes after.
BY_TRANSACTION_BELOW_HORIZON = """
SELECT id, transaction_id::text::bigint, key, payload FROM outbox
WHERE transaction_id < pg_snapshot_xmin(pg_current_snapshot())
  AND (transaction_id::text::bigint, id) > (%(transaction)s, %(id)s)
ORDER BY transaction_id, id LIMIT 1000
"""


class WrongReader:
    """Polls the outbox with a cursor of numbers and notes (key, number) in the order it sees."""

    def __init__(self, url: str, statement: str) -> None:
        self._url = url
        self._statement = statement
        self._cursor = {"id": 0, "transaction": 0}
        self._stop = threading.Event()
        self.published: list[tuple[str, int]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read while the block runs, and what is left behind it."""
        thread = threading.Thread(target=self._read)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)
        assert not thread.is_alive()

    def _read(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while self._read_once(connection) or not self._stop.is_set():
                pass

    def _read_once(self, connection: psycopg.Connection) -> int:
        rows = connection.execute(self._statement, self._cursor).fetchall()
        if rows:
            self._cursor = {"id": rows[-1][0], "transaction": rows[-1][1]}
        self.published += [(key, payload["number"]) for _, _, key, payload in rows]
        return len(rows)
