"""One relay of a name is active at a time, on a primary and nowhere else.

Leadership is a session advisory lock: when the connection goes, the leadership goes, and everything
remembered with it. A term is numbered in the cursors' rows, so that a leader of an earlier one
can't move them any more.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.string import ByteaBinaryLoader

from outbox_relay import pooler, sql

CONNECT_TIMEOUT_S = 5
# Longer than any statement that the main thread waits for takes on a healthy server.
ANSWER_WITHIN_S = 10.0
# A dead peer is noticed within about 10 s, in the middle of a statement too.
KEEPALIVES: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class RefusedError(Exception):
    """Going on could lose or double events; the message says why and what to do."""


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


def connect(database_url: str, purpose: str = "") -> psycopg.Connection:
    """Open a connection of the relay: autocommit, so that no transaction stays open.

    `purpose` is what an operator sees of it in pg_stat_activity.

    Raises:
        RefusedError: there is a connection pooler in between.
    """
    try:
        connection = _connect(database_url, purpose)
    except psycopg.OperationalError as error:
        if why := pooler.told_by(error):
            raise RefusedError(why) from None
        raise
    with answering(connection):
        why = pooler.found_in(connection)
    if why:
        connection.close()
        raise RefusedError(why)
    # A payload as its bytes: parsing and writing it again would change it.
    connection.adapters.register_loader("json", ByteaBinaryLoader)
    return connection


def _connect(database_url: str, purpose: str) -> psycopg.Connection:
    return psycopg.connect(
        database_url,
        autocommit=True,
        options=sql.SESSION_OPTIONS,
        application_name=f"outbox-relay {purpose}".rstrip(),
        connect_timeout=CONNECT_TIMEOUT_S,
        client_encoding="UTF8",
        **KEEPALIVES,
    )


@contextmanager
def answering(connection: psycopg.Connection) -> Iterator[None]:
    """Wait for answers of `connection` no longer than ANSWER_WITHIN_S.

    A server that is frozen keeps its sockets open, and neither it nor TCP ends a statement then.

    Raises:
        psycopg.OperationalError: the time is over; the connection is useless.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        cut(connection)

    timer = threading.Timer(ANSWER_WITHIN_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except psycopg.OperationalError as error:
        if over.is_set():
            raise psycopg.OperationalError("Postgres doesn't answer") from error
        raise
    finally:
        timer.cancel()


def cut(connection: psycopg.Connection) -> None:
    """Let whoever waits for `connection`, in whatever thread, wait no longer."""
    with (
        suppress(OSError, psycopg.Error),  # it has gone by itself
        socket.socket(fileno=os.dup(connection.fileno())) as its_socket,
    ):
        its_socket.shutdown(socket.SHUT_RDWR)


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


def holds(connection: psycopg.Connection, name: str) -> bool:
    """Whether somebody leads the relay called `name`."""
    found = connection.execute(sql.HOLDS_LEADERSHIP, {"name": name}).fetchone()
    return found is not None and found[0] > 0


class Standby:
    """How a relay that stands by tells the leader whether it could take over."""

    def __init__(self, connection: psycopg.Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._told = False

    def tell(self, *, fit: bool) -> None:
        """Say whether it is fit to lead; the end of the connection takes it back."""
        if fit != self._told:
            statement = sql.TRY_STANDBY if fit else sql.END_STANDBY
            self._connection.execute(statement, {"name": self._name})
            self._told = fit


def has_fit_standby(connection: psycopg.Connection, name: str) -> bool:
    """Whether a relay stands by that has lately reached Kafka."""
    return holds(connection, f"standby:{name}")


@dataclass(frozen=True, slots=True)
class Term:
    """The time in which this process leads. `leader` is its host and process id."""

    name: str
    epoch: int
    leader: str


def begin_term(connection: psycopg.Connection, name: str) -> Term:
    """Number a new term in all cursors of the relay; call with the lock held."""
    leader = f"{socket.gethostname()}:{os.getpid()}"
    connection.execute(sql.CALL_ITSELF, {"purpose": "leader"})
    begun = connection.execute(sql.BEGIN_TERM, {"name": name, "leader": leader}).fetchone()
    return Term(name=name, epoch=1 if begun is None else begun[0], leader=leader)


def _one(connection: psycopg.Connection, statement: str) -> dict[str, Any]:
    try:
        with connection.cursor(row_factory=dict_row) as cursor:
            found = cursor.execute(statement).fetchone()
    except psycopg.errors.UndefinedTable:
        found = None
    if found is None:
        raise RefusedError("this database has no outbox; run `reservation-service migrate` first")
    return found
