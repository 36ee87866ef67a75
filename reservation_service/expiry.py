"""The sweeper: expires holds, finishes cancellations, forgets old keys and counts of writes.

Nothing correct depends on it: a hold that ran out counts as expired everywhere by the clock. It
brings the event `reservation.expired`, whose time is the moment at which the hold ran out, goes on
where the cancellation of a performance was interrupted, and tidies up. Several may run at once.
"""

import threading
from datetime import datetime  # noqa: TC003 - read where it is used
from uuid import UUID

import psycopg
import structlog

from reservation_service import booking, cancellation, sql
from reservation_service.database import Connection, connect, transaction

BATCH_ROWS = 100
KEYS_BATCH_ROWS = 1_000
BACKOFF_MAX_S = 5.0
BACKOFF_FIRST_S = 0.25

log = structlog.get_logger(__name__)


def expire_batch(connection: Connection, limit: int = BATCH_ROWS) -> int:
    """Expire up to `limit` lapsed holds in one transaction; return how many."""
    with transaction(connection):
        rows = connection.execute(sql.LOCK_LAPSED_HOLDS, {"limit": limit}).fetchall()
        lapsed: dict[UUID, datetime] = dict(rows)
        if lapsed:
            ids = list(lapsed)
            connection.execute(sql.LOCK_SEATS_OF_RESERVATIONS, {"reservation_ids": ids})
            for stored in booking.read(connection, ids):
                expired_at = lapsed[UUID(stored.reservation.reservation_id)]
                booking.apply(connection, stored.reservation, "expired", expired_at)
    return len(lapsed)


def forget_keys_batch(connection: Connection, limit: int = KEYS_BATCH_ROWS) -> int:
    """Delete up to `limit` idempotency keys older than 24 hours; return how many."""
    deleted = connection.execute(sql.DELETE_OLD_IDEMPOTENCY_KEYS, {"limit": limit})
    return deleted.rowcount


def forget_counts_batch(connection: Connection, limit: int = KEYS_BATCH_ROWS) -> int:
    """Delete up to `limit` counts of writes that no limit asks for any more; return how many."""
    return connection.execute(sql.DELETE_OLD_WRITE_COUNTS, {"limit": limit}).rowcount


def finish_cancellations(connection: Connection, stop: threading.Event) -> int:
    """Cancel what is left of cancelled performances; return how many reservations."""
    cancelled = 0
    for (performance_id,) in connection.execute(sql.LIST_CANCELLING).fetchall():
        cancelled += cancellation.settle(connection, performance_id, stop=stop.is_set).cancelled
    return cancelled


def sweep(connection: Connection, stop: threading.Event) -> tuple[int, int]:
    """Work until nothing is left or `stop` is set; return expired holds and deleted keys."""
    expired = forgotten = 0
    while not stop.is_set():
        holds = expire_batch(connection)
        keys = forget_keys_batch(connection)
        counts = forget_counts_batch(connection)
        expired, forgotten = expired + holds, forgotten + keys
        if holds < BATCH_ROWS and max(keys, counts) < KEYS_BATCH_ROWS:
            break
    cancelled = finish_cancellations(connection, stop)
    if expired or cancelled or forgotten:
        log.info("swept", expired_holds=expired, cancelled=cancelled, forgotten_keys=forgotten)
    return expired, forgotten


def run(url: str, every_s: float, stop: threading.Event) -> None:
    """Sweep every `every_s` seconds until `stop`; a database that is away is waited for."""
    backoff_s = 0.0
    while not stop.is_set():
        try:
            with connect(url, "reservation-service expire-holds") as connection:
                if backoff_s:
                    log.info("the database is back")
                backoff_s = 0.0
                while not stop.is_set():
                    sweep(connection, stop)
                    stop.wait(every_s)
        except (psycopg.OperationalError, psycopg.InternalError) as error:
            if not backoff_s:
                log.warning("the database is away; trying again", error=type(error).__name__)
            backoff_s = min(max(BACKOFF_FIRST_S, backoff_s * 2), BACKOFF_MAX_S)
            stop.wait(backoff_s)
