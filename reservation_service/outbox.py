"""Write an event into the outbox, in the transaction of the change that it tells of.

Guarantees:
- The event is published if and only if the caller's transaction commits.
- Events of one key are published in the order in which `write` was called for them, provided
  that whoever calls it holds a lock that belongs to the key (its row, or an advisory lock of the
  transaction) until COMMIT. Without one nothing is lost, but there is no order.
- Key, payload and headers leave byte for byte as they were given.

Nothing in here is about reservations, and psycopg is all that it needs: another service that
shares the database may copy this file. docs/outbox.md tells how, and what it is in plain SQL.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

# Here and not in sql.py, so that the file is whole by itself.
INSERT = """
INSERT INTO outbox (topic, key, payload, headers)
VALUES (%(topic)s, %(key)s, %(payload)s, %(headers)s)
"""

# W3C Trace Context: no version ff, no ids of zeros; a version after 00 may carry more.
TRACEPARENT_MAX_CHARACTERS = 255
TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
    r"(?P<more>-[\x21-\x7e]*)?"
)


def write(
    connection: psycopg.Connection[Any],
    *,
    topic: str,
    key: str,
    payload: bytes,
    headers: Mapping[str, str] | None = None,
    traceparent: str | None = None,
) -> None:
    """Insert one event.

    Args:
        connection: in the transaction of the change; in psycopg's pipeline mode too.
        topic: one that stands in `outbox_topics`.
        key: what the event is about; events of a key stay in order.
        payload: JSON in UTF-8.
        headers: the record's headers.
        traceparent: of the request that asked for the change, as it came: it becomes a header
            if it is a valid one, and is left out if it isn't.

    Raises:
        RuntimeError: there is no transaction, so the event would be published whatever becomes of
            the change. In a pipeline nobody can tell.
        psycopg.errors.CheckViolation: the event could never be published (unknown topic, no key,
            too big); the caller's transaction is over. In a pipeline this shows at its end.
        psycopg.errors.InvalidTextRepresentation: the payload is no JSON; likewise.
        UnicodeDecodeError: it is no UTF-8.
    """
    if connection.autocommit and _is_idle(connection):
        raise RuntimeError("outbox.write needs the transaction of the change that it tells of")
    given = dict(headers or {})
    if trace := valid_traceparent(traceparent):
        given["traceparent"] = trace
    values = {
        "topic": topic,
        "key": key,
        # As text, which `json` keeps byte for byte.
        "payload": payload.decode(),
        "headers": json.dumps(given),
    }
    connection.execute(INSERT, values)


def _is_idle(connection: psycopg.Connection[Any]) -> bool:
    status = connection.info
    # In a pipeline BEGIN may not have been sent yet.
    return (
        status.pipeline_status == PipelineStatus.OFF
        and status.transaction_status == TransactionStatus.IDLE
    )


def valid_traceparent(header: str | None) -> str | None:
    """Return a W3C trace context that may be passed on, or None."""
    if header is None or len(header) > TRACEPARENT_MAX_CHARACTERS:
        return None
    found = TRACEPARENT.fullmatch(header)
    return header if found and (found["version"] != "00" or not found["more"]) else None
