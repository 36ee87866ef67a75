"""Idempotency-Key: a request that is sent again gets the first one's answer.

The key is claimed in the transaction of the work itself, before anything else. So the record
exists if and only if the work was committed: a crash between commit and answer leaves it for the
retry, a refused request leaves nothing and its key is free again. Two at once meet in the
primary key: the second waits for the first, at most for the session's lock_timeout.
"""

import hashlib
from typing import NamedTuple

import psycopg

from reservation_service import sql
from reservation_service.database import Connection
from reservation_service.problems import Problem


class Key(NamedTuple):
    """An Idempotency-Key within its scope: who asks for which operation with which body."""

    caller: str
    operation: str
    key: str
    fingerprint: bytes


class NoKey(NamedTuple):
    """What stands in a statement for the Key of a call without one."""

    caller: None = None
    operation: None = None
    key: None = None
    fingerprint: None = None


class Answer(NamedTuple):
    """A 201: where the new thing is, its JSON, and whether an earlier call made it."""

    location: str
    body: bytes
    replayed: bool = False


NO_KEY = NoKey()


def fingerprint(body: bytes) -> bytes:
    """Return what tells one body from another."""
    return hashlib.sha256(body).digest()


def claim(connection: Connection, key: Key | None) -> Answer | None:
    """Take the key for this transaction, or return the answer it already has.

    Raises:
        Problem: 409 while another request with it is in flight, 422 if it had another body.
    """
    if key is None:
        return None
    try:
        claimed = connection.execute(sql.CLAIM_IDEMPOTENCY_KEY, key._asdict())
        found = connection.execute(sql.READ_IDEMPOTENCY_KEY, key._asdict())
        if claimed.fetchone():
            return None
    except psycopg.errors.LockNotAvailable as error:
        raise in_flight(error) from None
    row = found.fetchone()
    assert row  # noqa: S101 - the conflict has locked it
    if bytes(row[0]) != key.fingerprint:
        raise key_reused()
    return Answer(location=row[1], body=row[2].encode(), replayed=True)


def key_reused() -> Problem:
    """Return what a key with another body is refused with."""
    return Problem(
        422,
        "key-reused",
        "This Idempotency-Key was used with another body.",
        members={"errors": []},
    )


def in_flight(error: psycopg.errors.LockNotAvailable) -> Problem | psycopg.Error:
    """Return what a wait in vain means: where it was for a key, that its request is in flight."""
    if "idempotency_keys" not in (error.diag.context or ""):
        return error
    return Problem(
        409,
        "request-in-flight",
        "A request with this Idempotency-Key is still being worked on.",
        headers={"Retry-After": "1"},
    )


def remember(connection: Connection, key: Key | None, answer: Answer) -> None:
    """Keep the answer of this transaction's work with its key."""
    if key is not None:
        connection.execute(
            sql.REMEMBER_ANSWER,
            key._asdict() | {"location": answer.location, "body": answer.body.decode()},
        )
