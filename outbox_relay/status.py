"""What an operator asks first: who leads, and how far behind Kafka is."""

import time
from typing import Any

import psycopg

from outbox_relay import cursor, leadership, sql
from outbox_relay.config import Settings
from outbox_relay.cursor import Cursor, from_row
from outbox_relay.leadership import RefusedError
from outbox_relay.reader import EMPTY_SNAPSHOT, Position, unseen_by

RATE_OVER_S = 1.0


def status(
    connection: psycopg.Connection, settings: Settings, rate_over_s: float = RATE_OVER_S
) -> dict[str, Any]:
    """Return the relay's state, in `topics` that of each topic.

    `lag_rows` events are committed and not yet published, the oldest, `oldest_id`, for
    `lag_seconds`; `leader` is `host:pid` of the active relay or None, `rate` its events per second
    just now, over `rate_over_s`; `cursor` is None before the first run. Under exactly_once all of
    this is what Postgres knows, up to a second late.
    """
    name = settings.outbox_relay_name
    leads = leadership.holds(connection, name)
    before = _published_rows(connection, name)
    started_s = time.monotonic()
    rows = cursor.load_rows(connection, name)
    topics = {row["topic"]: _topic(connection, row["topic"], from_row(row)) for row in rows}
    for (topic,) in connection.execute(sql.TOPICS, {"name": name}).fetchall():
        if topic not in topics:
            topics[topic] = _topic(connection, topic, None)
    counts = connection.execute(sql.QUARANTINE_COUNT, {"name": name}).fetchall()
    if leads:
        time.sleep(max(0.0, rate_over_s - (time.monotonic() - started_s)))
    published = _published_rows(connection, name) - before
    behind = [topic for topic in topics.values() if topic["lag_rows"]]
    return {
        "name": name,
        "delivery": rows[0]["delivery"] if rows else settings.outbox_relay_delivery,
        "leader": (rows[0]["leader"] or None) if leads and rows else None,
        "lag_rows": sum(topic["lag_rows"] for topic in behind),
        "lag_seconds": max((topic["lag_seconds"] for topic in behind), default=0.0),
        "oldest_id": min((topic["oldest_id"] for topic in behind), default=None),
        "rate": round(published / (time.monotonic() - started_s), 1),
        "quarantined": sum(count for _, count in counts),
        "cursor": {row["topic"]: _described(row) for row in rows} or None,
        "topics": topics,
    }


def lag(
    connection: psycopg.Connection, topic: str, position: Position
) -> tuple[int, float, int | None]:
    """Return how many rows of `topic` are not published, for how long (s), and the first's id."""
    found = connection.execute(
        sql.LAG,
        {
            **position.unpublished(),
            "topic": topic,
            "published_snapshot": position.published_snapshot,
            "batch_snapshot": position.batch_snapshot,
            "batch_last_id": position.batch_last_id,
        },
    ).fetchone()
    assert found is not None, "an aggregate returns one row"  # noqa: S101
    return found[0], found[1], found[2]


def lag_at_least(
    connection: psycopg.Connection, topic: str, position: Position
) -> tuple[int, float]:
    """Return how many rows of `topic` are not published, and for how long (s), at a bounded cost.

    Exact up to about sql.LAG_MAX_ROWS rows of all topics; too little beyond.
    """
    newest = position.batch_snapshot or position.published_snapshot
    found = connection.execute(
        sql.LAG_AT_LEAST,
        {
            **unseen_by(newest),
            "topic": topic,
            "published_snapshot": position.published_snapshot,
            "batch_snapshot": position.batch_snapshot,
            "batch_last_id": position.batch_last_id,
        },
    ).fetchone()
    assert found is not None, "an aggregate returns one row"  # noqa: S101
    return found[0], found[1]


def refuse_while_running(connection: psycopg.Connection, name: str) -> None:
    """Take the leadership, so that no relay can while `connection` lasts.

    Raises:
        RefusedError: a relay of this name leads.
    """
    if not leadership.try_lock(connection, name):
        raise RefusedError(f"the relay {name} is running; stop it first")
    # Kafka may be waited for longer than a leader's session may be silent.
    connection.execute(sql.BE_PATIENT)


def resume(
    connection: psycopg.Connection,
    settings: Settings,
    generation: int,
    from_id: int,
    topic: str | None = None,
    *,
    apply: bool,
) -> dict[str, int | None]:
    """Make the cursors say that all committed rows before `from_id` are published; return counts.

    All topics' cursors, or only that of `topic`.

    Changes nothing without `apply`. Rows of transactions that are open now are published whatever
    their ids. `generation` is the newest that Kafka knows of; the cursors get a newer one.
    `newest_id` is that of the last row there is, None without any.

    Raises:
        RefusedError: it has never run.
    """
    name = settings.outbox_relay_name
    server = leadership.examine(connection)
    if not cursor.load_rows(connection, name, topic):
        raise RefusedError(
            f"the relay {name} has no cursor{f' of topic {topic}' if topic else ''}:"
            " it starts with the first row by itself"
        )
    of_what = {"name": name, "topic": topic}
    found = connection.execute(sql.RESUME_PREVIEW, {**of_what, "from_id": from_id}).fetchone()
    assert found is not None, "an aggregate returns one row"  # noqa: S101
    to_publish, to_skip, to_repeat, snapshot, wal_lsn, newest_id = found
    if apply:
        connection.execute(
            sql.RESUME,
            {
                **of_what,
                "delivery": settings.outbox_relay_delivery,
                "generation": generation,
                "published_snapshot": EMPTY_SNAPSHOT,
                "batch_snapshot": snapshot,
                "batch_last_id": from_id - 1,
                "system_identifier": server.identity.system_identifier,
                "database_oid": server.identity.database_oid,
                "timeline": server.identity.timeline,
                "wal_lsn": wal_lsn,
            },
        )
    return {
        "newest_id": newest_id,
        "publishes_rows": to_publish,
        "repeats_rows": to_repeat,
        "skips_rows": to_skip,
    }


def _published_rows(connection: psycopg.Connection, name: str) -> int:
    return sum(row["published_rows"] for row in cursor.load_rows(connection, name))


def _topic(connection: psycopg.Connection, topic: str, published: Cursor | None) -> dict[str, Any]:
    position = Position(EMPTY_SNAPSHOT, "0/0") if published is None else published.position
    try:
        rows, seconds, oldest_id = lag(connection, topic, position)
    except psycopg.errors.QueryCanceled:  # too many to count; who asks then wants any answer
        (rows, seconds), oldest_id = lag_at_least(connection, topic, position), None
    return {"lag_rows": rows, "lag_seconds": round(seconds, 3), "oldest_id": oldest_id}


def _described(row: dict[str, Any]) -> dict[str, Any]:
    shown = (
        "published_snapshot",
        "batch_snapshot",
        "batch_last_id",
        "timeline",
        "wal_lsn",
        "generation",
        "sequence",
        "leader_epoch",
        "published_rows",
    )
    return {name: row[name] for name in shown} | {"updated_at": row["updated_at"].isoformat()}
