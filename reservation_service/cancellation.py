"""Cancel a performance: first its sale, at once, then every reservation, each with its event.

Guarantees:
- From the first commit on nothing of it can be held, booked, confirmed or extended any more.
- Every reservation that was held or confirmed becomes cancelled and its seats free, in batches of
  their own transactions; a hold that had run out becomes expired, by the sweeper.
- Whatever is killed at whichever point, and however many do it at once: run it again, or let
  `expire-holds` come by, and the rest is done; nothing is cancelled twice.

No booking slips through: it locks its seats and reads the performance's status in a later
statement. So, once `cancelled` is committed, whoever gets a seat's lock after us sees it, and
whoever had it before us has committed, and we see his claim.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar
from uuid import UUID

import psycopg

from reservation_service import booking, catalogue_changes, sql
from reservation_service.database import Connection, transaction

SEATS_PER_BATCH = 500
RESERVATIONS_PER_BATCH = 100
# A frozen client is cut off after 5 s, of which each attempt waits two.
LOCK_ATTEMPTS = 5

Item = TypeVar("Item")
Done = TypeVar("Done")


class Settled(NamedTuple):
    """How many reservations were cancelled here, and whether none is left."""

    cancelled: int
    finished: bool


def cancel(
    connection: Connection,
    performance_id: int,
    traceparent: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Settled:
    """Cancel a performance and its reservations until `stop`; once more is fine.

    Raises:
        Problem: 404.
        psycopg.errors.LockNotAvailable: somebody kept a seat or a reservation locked; the rest is
            left for the next time.
    """
    catalogue_changes.cancel_performance(connection, performance_id, traceparent)
    return settle(connection, performance_id, traceparent, stop)


def settle(
    connection: Connection,
    performance_id: int,
    traceparent: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Settled:
    """Cancel the reservations of a performance whose status `cancelled` is committed.

    Raises:
        psycopg.errors.LockNotAvailable: as above.
    """
    wanted = {"performance_id": performance_id}
    seat_ids = [seat_id for (seat_id,) in connection.execute(sql.LIST_SEATS, wanted)]
    cancelled = 0
    for seats in _batches(seat_ids, SEATS_PER_BATCH):
        if stop():
            return Settled(cancelled, finished=False)
        claims = _patiently(partial(_wait_for_claims, connection, seats))
        for batch in _batches(claims, RESERVATIONS_PER_BATCH):
            cancelled += _patiently(partial(_cancel_batch, connection, batch, traceparent))
    connection.execute(sql.FINISH_CANCELLING, wanted)
    return Settled(cancelled, finished=True)


def _wait_for_claims(connection: Connection, seat_ids: list[int]) -> list[UUID]:
    """Let everybody finish who has one of the seats; return whose they are then."""
    rows = connection.execute(sql.LOCK_CLAIMS, {"seat_ids": seat_ids}).fetchall()
    return sorted({reservation_id for (reservation_id,) in rows if reservation_id})


def _cancel_batch(
    connection: Connection, reservation_ids: list[UUID], traceparent: str | None
) -> int:
    with transaction(connection):
        wanted = {"reservation_ids": reservation_ids}
        connection.execute(sql.LOCK_RESERVATIONS, wanted)
        connection.execute(sql.LOCK_SEATS_OF_RESERVATIONS, wanted)
        # Read behind the locks: the customer, or another one of us, may have been quicker.
        live = [
            stored
            for stored in booking.read(connection, reservation_ids)
            if stored.reservation.status in {"held", "confirmed"}
        ]
        for stored in live:
            booking.apply(connection, stored.reservation, "cancelled", stored.now, traceparent)
    return len(live)


def _patiently(act: Callable[[], Done]) -> Done:
    for _ in range(LOCK_ATTEMPTS - 1):
        try:
            return act()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            continue  # a lock, or many one after the other, took longer than the session waits
    return act()


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    return (items[at : at + size] for at in range(0, len(items), size))
