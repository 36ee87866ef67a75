"""Invented lives of reservations: the events that tell them and the rows that must come of it."""

import json
import random
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

OPENING = datetime(2027, 1, 1, 10, tzinfo=UTC)

# What may follow: (type, status, whether the life ends there).
BEGINNINGS = ["reservation.held", "reservation.held", "reservation.completed"]
SEQUELS: dict[str, list[str | None]] = {
    "reservation.held": [
        "reservation.extended",
        "reservation.completed",
        "reservation.cancelled",
        "reservation.expired",
    ],
    "reservation.extended": ["reservation.completed", "reservation.expired"],
    "reservation.completed": ["reservation.cancelled", None],
    "reservation.cancelled": [None],
    "reservation.expired": [None],
}
STATUS = {
    "reservation.held": "held",
    "reservation.extended": "held",
    "reservation.completed": "confirmed",
    "reservation.cancelled": "cancelled",
    "reservation.expired": "expired",
}


@dataclass(frozen=True)
class Event:
    """A change of a reservation, as a record of topic `concert-reservation`."""

    envelope: Mapping[str, Any]

    @property
    def key(self) -> bytes:
        """The record's key."""
        return str(self.envelope["subject"]).encode()

    @property
    def value(self) -> bytes:
        """The record's value."""
        return json.dumps(self.envelope, ensure_ascii=False, separators=(",", ":")).encode()

    @property
    def fact(self) -> tuple[Any, ...]:
        """Its row in fct_reservation_events, in the order of FACTS."""
        data = self.envelope["data"]
        return (
            data["reservation_id"],
            data["version"],
            self.envelope["type"],
            moment(self.envelope["time"]),
            data["status"],
            data["customer_id"],
            data["concert"]["concert_id"],
            data["performance"]["performance_id"],
            len(data["seats"]),
            data["amount"],
            data["currency"],
            moment(data["created_at"]),
            moment(data["expires_at"]),
        )

    @property
    def state(self) -> tuple[Any, ...]:
        """Its row in fct_reservations if it is the latest, in the order of STATES."""
        fact = self.fact
        return (*fact[:2], *fact[4:12], fact[3], fact[12])


FACTS = """
SELECT reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at
FROM analytics.fct_reservation_events ORDER BY reservation_id, version
"""
STATES = """
SELECT reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, expires_at
FROM analytics.fct_reservations ORDER BY reservation_id
"""


def moment(text: str | None) -> datetime | None:
    """Read an RFC 3339 time."""
    return None if text is None else datetime.fromisoformat(text)


def time_text(when: datetime) -> str:
    """Write a time as the service does."""
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def event(
    reservation_id: str | None = None,
    version: int = 1,
    kind: str = "reservation.held",
    **data: Any,
) -> Event:
    """One valid event; `data` replaces fields of its data."""
    reservation_id = reservation_id or str(uuid.uuid4())
    happened = time_text(OPENING + timedelta(seconds=version))
    state = {
        "reservation_id": reservation_id,
        "version": version,
        "status": STATUS[kind],
        "customer_id": "customer-1",
        "created_at": time_text(OPENING),
        "expires_at": time_text(OPENING + timedelta(minutes=10))
        if STATUS[kind] == "held"
        else None,
        "amount": 12_000,
        "currency": "EUR",
        "concert": {
            "concert_id": 1,
            "title": "Nacht der Streicher — Ø",
            "venue": "Philharmonic Hall",
            "time_zone": "Europe/Berlin",
        },
        "performance": {"performance_id": 3, "starts_at": "2027-05-01T18:00:00Z"},
        "seats": [
            {"seat_id": 100 + n, "section": "Parterre", "row": "F", "number": n, "price": 6_000}
            for n in (11, 12)
        ],
    } | data
    return Event(
        {
            "specversion": "1.0",
            "id": f"{reservation_id}:{version}",
            "source": "/reservation-service",
            "type": kind,
            "subject": reservation_id,
            "time": happened,
            "datacontenttype": "application/json",
            "dataschema": "urn:concert-reservation:schema:reservation-event:1",
            "data": state,
        }
    )


def history(reservations: int, seed: int) -> list[Event]:
    """The lives of so many reservations, one after the other, from first event to last."""
    dice = random.Random(seed)  # noqa: S311 - the same history each time
    return [
        happened
        for _ in range(reservations)
        for happened in _life(str(uuid.UUID(int=dice.getrandbits(128), version=4)), dice)
    ]


def _life(reservation_id: str, dice: random.Random) -> Iterable[Event]:
    kind: str | None = dice.choice(BEGINNINGS)
    version = 0
    fixed = {
        "customer_id": f"customer-{dice.randrange(1000)}",
        "amount": dice.randrange(100_000),
        "seats": [
            {"seat_id": n, "section": "Rang", "row": "1", "number": n, "price": 1}
            for n in range(1, dice.randrange(2, 6))
        ],
    }
    while kind is not None:
        version += 1
        yield event(reservation_id, version, kind, **fixed)
        kind = dice.choice(SEQUELS[kind])


def expected_facts(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    """The rows of fct_reservation_events that these events make."""
    return sorted({happened.fact for happened in events}, key=lambda fact: fact[:2])


def expected_states(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    """The rows of fct_reservations that these events make."""
    latest: dict[str, tuple[Any, ...]] = {}
    for happened in sorted(events, key=lambda one: one.fact[1]):
        latest[happened.fact[0]] = happened.state
    return [latest[reservation_id] for reservation_id in sorted(latest)]
