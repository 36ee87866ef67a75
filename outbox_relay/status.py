"""What an operator asks first: who leads, and how far behind Kafka is."""

from typing import Any

import psycopg

from outbox_relay import leadership, sql
from outbox_relay.leadership import RefusedError
from outbox_relay.reader import EMPTY_SNAPSHOT, Position


def status(connection: psycopg.Connection, name: str, delivery: str) -> dict[str, Any]:
    """Return the relay's state.

    `lag_rows` events are committed and not yet published, the oldest for `lag_seconds`; `leader`
    is `host:pid` of the active relay or None; `cursor` is None before the first run.
    """
    cursor = leadership.load_cursor(connection, name)
    position = Position(EMPTY_SNAPSHOT, "0/0") if cursor is None else leadership.position_of(cursor)
    lag_rows, lag_seconds = _lag(connection, position)
    held = connection.execute(sql.HOLDS_LEADERSHIP, {"name": name}).fetchone()
    leads = held is not None and held[0] > 0
    return {
        "name": name,
        "delivery": delivery if cursor is None else cursor["delivery"],
        "leader": (cursor["leader"] or None) if leads and cursor is not None else None,
        "lag_rows": lag_rows,
        "lag_seconds": round(lag_seconds, 3),
        "quarantined": 0,
        "cursor": None if cursor is None else _described(cursor),
    }


def resume(
    connection: psycopg.Connection, name: str, delivery: str, from_id: int, *, apply: bool
) -> dict[str, int]:
    """Make the cursor say that all committed rows before `from_id` are published; return counts.

    Changes nothing without `apply`. Rows of transactions that are open now are published whatever
    their ids.

    Raises:
        RefusedError: a relay of this name leads, or it has never run.
    """
    server = leadership.examine(connection)
    if not leadership.try_lock(connection, name):
        raise RefusedError(f"the relay {name} is running; stop it first")
    if leadership.load_cursor(connection, name) is None:
        raise RefusedError(
            f"the relay {name} has no cursor: it starts with the first row by itself"
        )
    found = connection.execute(sql.RESUME_PREVIEW, {"from_id": from_id}).fetchone()
    if found is None:
        raise RefusedError("this database has no outbox")
    to_publish, to_skip, snapshot, wal_lsn = found
    if apply:
        connection.execute(
            sql.RESUME,
            {
                "name": name,
                "delivery": delivery,
                "published_snapshot": EMPTY_SNAPSHOT,
                "batch_snapshot": snapshot,
                "batch_last_id": from_id - 1,
                "system_identifier": server.identity.system_identifier,
                "database_oid": server.identity.database_oid,
                "timeline": server.identity.timeline,
                "wal_lsn": wal_lsn,
            },
        )
    return {"from_id": from_id, "publishes_rows": to_publish, "skips_rows": to_skip}


def _lag(connection: psycopg.Connection, position: Position) -> tuple[int, float]:
    found = connection.execute(
        sql.LAG,
        {
            **position.unpublished(),
            "published_snapshot": position.published_snapshot,
            "batch_snapshot": position.batch_snapshot,
            "batch_last_id": position.batch_last_id,
        },
    ).fetchone()
    return (0, 0.0) if found is None else (found[0], found[1])


def _described(cursor: dict[str, Any]) -> dict[str, Any]:
    shown = ("published_snapshot", "batch_snapshot", "batch_last_id", "timeline", "wal_lsn")
    return {name: cursor[name] for name in shown} | {
        "leader_epoch": cursor["leader_epoch"],
        "published_rows": cursor["published_rows"],
        "updated_at": cursor["updated_at"].isoformat(),
    }
