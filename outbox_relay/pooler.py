"""Finds a connection pooler between the relay and its Postgres.

The relay's leadership is an advisory lock of its session and its safety are settings of that
session (a frozen leader loses the lock by them), so it can't work where a pooler hands its
statements to this or that server session. Nothing here is true of a direct connection, through a
TCP proxy too.
"""

import psycopg
from psycopg.rows import dict_row

from outbox_relay import sql

# PgBouncer's words, and not Postgres', for options that it wasn't told to ignore.
POOLER_REFUSES_OPTIONS = "unsupported startup parameter"
WHAT_TO_DO = (
    "the relay needs sessions of its own: let OUTBOX_RELAY_DATABASE_URL lead to Postgres directly,"
    " past PgBouncer or any other connection pooler"
)


def told_by(error: psycopg.Error) -> str | None:
    """Return what to tell the operator when a pooler has refused to connect us, else None."""
    if POOLER_REFUSES_OPTIONS in str(error):
        return f"a connection pooler refuses the session's settings; {WHAT_TO_DO}"
    return None


def found_in(connection: psycopg.Connection) -> str | None:
    """Return what to tell the operator when `connection` leads to a pooler; one round trip.

    A pooler gives its clients process ids of its own making to cancel by, so that one server
    session that serves us twice doesn't hide it.
    """
    with connection.cursor(row_factory=dict_row) as cursor:
        session = cursor.execute(sql.SESSION).fetchone()
    if session is None or session["pid"] != connection.info.backend_pid:
        return f"a connection pooler stands before Postgres; {WHAT_TO_DO}"
    if not session["has_our_options"]:
        return f"something before Postgres drops the session's settings; {WHAT_TO_DO}"
    return None
