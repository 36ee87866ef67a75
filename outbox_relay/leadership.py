"""One relay of a name is active at a time, and its cursor survives it.

Leadership is a session advisory lock on the relay's only connection: when the connection goes, the
leadership goes, and everything remembered with it. The stored cursor says how far we are and of
which database: after a promotion, a restore or on a copy the same numbers mean other rows, so the
relay refuses to go on by itself.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.rows import dict_row

from outbox_relay import sql
from outbox_relay.reader import EMPTY_SNAPSHOT, Position

CONNECT_TIMEOUT_S = 5
# A dead peer is noticed within about 10 s, in the middle of a statement too.
KEEPALIVES: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class RefusedError(Exception):
    """Going on could lose or double events; the message says why and what to do."""


class LostLeadershipError(Exception):
    """Another relay has moved the cursor; this one must start over."""


class _JsonBytes(Loader):
    """A payload as its bytes: parsing and writing it again would change it."""

    format = Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which history of which database a cursor belongs to."""

    system_identifier: int
    database_oid: int
    timeline: str


@dataclass(frozen=True, slots=True)
class Server:
    """A database that may be relayed, and the end of its WAL when we looked."""

    identity: Identity
    wal_lsn: str


def connect(database_url: str) -> psycopg.Connection:
    """Open the relay's connection: autocommit, so that no transaction stays open."""
    connection = psycopg.connect(
        database_url,
        autocommit=True,
        options=sql.SESSION_OPTIONS,
        application_name="outbox-relay",
        connect_timeout=CONNECT_TIMEOUT_S,
        client_encoding="UTF8",
        **KEEPALIVES,
    )
    connection.adapters.register_loader("json", _JsonBytes)
    return connection


def examine(connection: psycopg.Connection) -> Server:
    """Return what `connection` leads to.

    Raises:
        RefusedError: a standby (its snapshots lack the running transactions, so rows would be
            lost), or an outbox whose ids are cached (version 2 would come before version 1).
    """
    found = _one(connection, sql.IDENTITY)
    if found["in_recovery"]:
        raise RefusedError(
            "OUTBOX_RELAY_DATABASE_URL leads to a standby; the relay needs the primary"
            " (add target_session_attrs=primary when the URL names several hosts)"
        )
    cache = _one(connection, sql.OUTBOX_IDENTITY_CACHE)["seqcache"]
    if cache != 1:
        raise RefusedError(
            f"outbox.id is an identity with CACHE {cache}, which reorders events;"
            " ALTER TABLE outbox ALTER COLUMN id SET CACHE 1"
        )
    position = _one(connection, sql.POSITION)
    identity = Identity(
        system_identifier=found["system_identifier"],
        database_oid=found["database_oid"],
        timeline=position["timeline"],
    )
    return Server(identity=identity, wal_lsn=position["wal_lsn"])


def try_lock(connection: psycopg.Connection, name: str) -> bool:
    """Try to become the one relay called `name`; the lock lives as long as the connection."""
    found = connection.execute(sql.TRY_LEADERSHIP, {"name": name}).fetchone()
    return found is not None and bool(found[0])


def load_cursor(connection: psycopg.Connection, name: str) -> dict[str, Any] | None:
    """Return the stored cursor's columns, or None when this relay never ran."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql.LOAD_CURSOR, {"name": name}).fetchone()


class Term:
    """The time in which this process leads: it alone moves the cursor, by compare-and-swap."""

    def __init__(
        self, connection: psycopg.Connection, name: str, epoch: int, position: Position
    ) -> None:
        self._connection = connection
        self._name = name
        self._epoch = epoch
        self.position = position

    @classmethod
    def begin(cls, connection: psycopg.Connection, name: str, delivery: str) -> Self:
        """Start a term from the stored cursor; call with the lock held.

        Raises:
            RefusedError: the cursor belongs to another history of the database.
        """
        server = examine(connection)
        connection.execute(
            sql.CREATE_CURSOR,
            {
                "name": name,
                "delivery": delivery,
                "published_snapshot": EMPTY_SNAPSHOT,
                "system_identifier": server.identity.system_identifier,
                "database_oid": server.identity.database_oid,
                "timeline": server.identity.timeline,
                "wal_lsn": server.wal_lsn,
            },
        )
        cursor = load_cursor(connection, name)
        if cursor is None:
            raise LostLeadershipError("the cursor was removed while a term began")
        refuse_another_history(cursor, server.identity)
        begun = connection.execute(
            sql.BEGIN_TERM,
            {
                "name": name,
                "delivery": delivery,
                "leader": f"{socket.gethostname()}:{os.getpid()}",
                "epoch": cursor["leader_epoch"],
            },
        ).fetchone()
        if begun is None:
            raise LostLeadershipError("another relay began a term at the same time")
        return cls(connection, name, begun[0], position_of(cursor))

    def advance(self, position: Position, rows: int) -> None:
        """Store `position`, reached by publishing `rows` rows.

        Raises:
            LostLeadershipError: the stored cursor is not the one that this term wrote last.
        """
        if position == self.position:
            return
        changed = self._connection.execute(
            sql.ADVANCE_CURSOR,
            {
                "name": self._name,
                "epoch": self._epoch,
                "rows": rows,
                "published_snapshot": position.published_snapshot,
                "batch_snapshot": position.batch_snapshot,
                "batch_last_id": position.batch_last_id,
                "wal_lsn": position.wal_lsn,
                "old_published_snapshot": self.position.published_snapshot,
                "old_batch_snapshot": self.position.batch_snapshot,
                "old_batch_last_id": self.position.batch_last_id,
            },
            prepare=True,
        ).rowcount
        if changed != 1:
            raise LostLeadershipError("the cursor has been moved by another relay")
        self.position = position

    def hold(self) -> None:
        """Use the connection, which otherwise would be ended as idle; raises when it is gone."""
        self._connection.execute("SELECT", prepare=True)


def position_of(cursor: dict[str, Any]) -> Position:
    """Return the position that a stored cursor tells."""
    return Position(
        published_snapshot=cursor["published_snapshot"],
        batch_snapshot=cursor["batch_snapshot"],
        batch_last_id=cursor["batch_last_id"],
        wal_lsn=cursor["wal_lsn"],
    )


def refuse_another_history(cursor: dict[str, Any], identity: Identity) -> None:
    """Refuse when the cursor's snapshots can't be trusted on this server.

    Raises:
        RefusedError: another server or database, a promoted or restored one, or one that has lost
            the end of its WAL.
    """
    checks = (
        ("another server", cursor["system_identifier"] != identity.system_identifier),
        ("another database", cursor["database_oid"] != identity.database_oid),
        ("another timeline (promoted or restored)", cursor["timeline"] != identity.timeline),
        ("an earlier state of this database (restored)", cursor["server_is_behind"]),
    )
    for what, differs in checks:
        if differs:
            raise RefusedError(
                f"the cursor was written on a different history: this is {what}."
                " Events may be lost or doubled by going on. Find the first event that is not in"
                " Kafka, then: outbox-relay resume --from-id N (shows what it would do;"
                " --apply does it)"
            )


def _one(connection: psycopg.Connection, statement: str) -> dict[str, Any]:
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(statement).fetchone()
    if found is None:
        raise RefusedError("this database has no outbox; run `reservation-service migrate` first")
    return found
