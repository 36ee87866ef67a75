"""Asks Postgres which topics have something new, at the price of one small query.

A relay at rest does nothing else, so this is all that its idleness costs. It goes past psycopg's
cursors to libpq itself, as psycopg offers it: that takes half of the processor time.
"""

import select
from collections.abc import Sequence

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from outbox_relay import leadership, sql
from outbox_relay.reader import unseen_by

ANSWER_WITHIN_S = 10.0
STATEMENT = b"outbox_relay_news"


class News:
    """What has been committed since the last question, by topic."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._seen: str | None = None
        self._asked: set[str] = set()
        _checked(self._pgconn.prepare(STATEMENT, sql.NEWS.encode()), ExecStatus.COMMAND_OK)

    def of(self, topics: Sequence[str]) -> set[str]:
        """Return those of `topics` that have, or may have, rows since the last question.

        Raises:
            psycopg.OperationalError: the server is gone, or doesn't answer.
        """
        if not topics:
            self._seen, self._asked = None, set()
            return set()
        if self._seen is None:  # whatever was committed before this, they shall look for themselves
            with leadership.answering(self._connection):
                found = self._connection.execute(sql.SNAPSHOT).fetchone()
            self._seen = None if found is None else found[0]
            self._asked = set(topics)
            return set(topics)
        rows = self._ask(self._seen, topics)
        self._seen = rows[0][1]
        # Who has just fallen asleep may have missed what was asked before.
        new, self._asked = set(topics) - self._asked, set(topics)
        if sum(count for _, _, count in rows) >= sql.NEWS_MAX_ROWS:  # the rest was not looked at
            return set(topics)
        return new | {topic for topic, _, _ in rows if topic}

    def _ask(self, seen: str, topics: Sequence[str]) -> list[tuple[str, str, int]]:
        """Return topics, each with the new snapshot and its rows; no topic where nothing is new."""
        bounds = unseen_by(seen)
        in_progress = ",".join(bounds["in_progress"])  # type: ignore[arg-type]
        self._pgconn.send_query_prepared(
            STATEMENT,
            [
                str(bounds["xmax"]).encode(),
                f"{{{in_progress}}}".encode(),
                f"{{{','.join(topics)}}}".encode(),
            ],
        )
        self._pgconn.flush()
        if not select.select([self._pgconn.socket], [], [], ANSWER_WITHIN_S)[0]:
            raise psycopg.OperationalError("Postgres doesn't answer")
        self._pgconn.consume_input()
        found: list[tuple[str, str, int]] = []
        while (result := self._pgconn.get_result()) is not None:
            _checked(result, ExecStatus.TUPLES_OK)
            for row in range(result.ntuples):
                topic, snapshot, count = (result.get_value(row, at) or b"" for at in range(3))
                found.append((topic.decode(), snapshot.decode(), int(count)))
        return found


def _checked(result: PGresult, expected: ExecStatus) -> None:
    if result.status != expected:
        raise psycopg.OperationalError(result.error_message.decode(errors="replace").strip())
