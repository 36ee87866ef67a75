"""A concert house for tests: one performance with a few seats, and what its customers do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import httpx
import psycopg
from psycopg.rows import dict_row

from reservation_service import catalogue, catalogue_changes
from reservation_service.callers import make_token
from reservation_service.database import Connection, connect
from reservation_service.new_concert import NewConcert
from tests.databases import ReservationDatabase

SECRET_KEY = "a secret of the tests, long enough for HS256"
ADMIN_TOKEN = "the admin's token in tests"
TOKEN_TTL_S = 3_600
SEATS = 20


def concert(seats: int = SEATS, **window: datetime) -> dict[str, Any]:
    """The admin's JSON of a concert with one performance."""
    now = datetime.now(UTC)
    performance = {
        "starts_at": now + timedelta(days=30),
        "sales_open_at": now - timedelta(days=1),
        "sales_close_at": now + timedelta(days=29),
    } | window
    return {
        "title": "Ein Abend mit Björk",
        "venue": "Elbphilharmonie",
        "time_zone": "Europe/Berlin",
        "currency": "EUR",
        "performances": [
            {name: at.isoformat() for name, at in performance.items()}
            | {"sections": [
                {"section": "Parkett", "price": 5_000, "rows": [
                    {"row": "A", "first": first, "seats": min(500, seats + 1 - first)}
                    for first in range(1, seats + 1, 500)
                ]},
            ]}
        ],
    }  # fmt: skip


def bearer(customer_id: str) -> dict[str, str]:
    """The header that makes a request this customer's."""
    return {"Authorization": f"Bearer {make_token(customer_id, SECRET_KEY, TOKEN_TTL_S)}"}


@dataclass(frozen=True)
class House:
    """A database with one published performance."""

    database: ReservationDatabase
    owner: psycopg.Connection[dict[str, Any]]
    performance_id: int
    seat_ids: list[int]

    @property
    def environment(self) -> dict[str, str]:
        """What `serve` and the other commands need."""
        return {
            "RESERVATION_OWNER_DATABASE_URL": self.database.owner_url,
            "RESERVATION_DATABASE_URL": self.database.service_url,
            "RESERVATION_SECRET_KEY": SECRET_KEY,
            "RESERVATION_ADMIN_TOKEN": ADMIN_TOKEN,
        }

    def connect(self) -> Connection:
        """A connection as the service has it."""
        return connect(self.database.service_url, "tests")

    def order(self, *seat_ids: int, confirm: bool = False) -> dict[str, Any]:
        """The JSON that asks for these seats."""
        return {
            "performance_id": self.performance_id,
            "seat_ids": list(seat_ids),
            "confirm": confirm,
        }

    def execute(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Run a statement as the owner; rows as dicts."""
        cursor = self.owner.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def let_lapse(self, reservation_id: str) -> None:
        """Let a hold run out at this moment: the test moves the deadline, not the clock."""
        self.execute(
            """
            WITH lapsed AS (
                UPDATE reservations SET expires_at = clock_timestamp()
                WHERE reservation_id = %s AND status = 'held' RETURNING *
            )
            UPDATE seats SET claimed_until = lapsed.expires_at FROM lapsed
            WHERE seats.reservation_id = lapsed.reservation_id
            """,
            reservation_id,
        )

    def events(self, topic: str = "concert-reservation") -> list[dict[str, Any]]:
        """The events in the outbox, oldest first."""
        rows = self.execute(
            "SELECT payload::text AS payload FROM outbox WHERE topic = %s ORDER BY id", topic
        )
        return [json.loads(row["payload"]) for row in rows]

    def check(self) -> None:
        """Assert what must hold at any time, from the tables and from the events alone."""
        reservations = {
            str(row["reservation_id"]): row for row in self.execute("SELECT * FROM reservations")
        }
        by_reservation: dict[str, list[dict[str, Any]]] = {key: [] for key in reservations}
        for event in self.events():
            by_reservation[event["subject"]].append(event)
        for reservation_id, of_one in by_reservation.items():
            row = reservations[reservation_id]
            versions = [event["data"]["version"] for event in of_one]
            assert versions == list(range(1, row["version"] + 1)), reservation_id
            assert of_one[-1]["data"]["status"] == row["status"], reservation_id
        deadlines = {key: row["expires_at"] for key, row in reservations.items()}
        assert not overlaps(by_reservation, deadlines)
        claims = self.execute(
            """
            SELECT r.reservation_id, s.seat_id FROM reservations AS r
            JOIN reservation_seats USING (reservation_id) JOIN seats AS s USING (seat_id)
            WHERE (r.status = 'confirmed' OR r.status = 'held' AND r.expires_at > now())
                AND s.reservation_id IS DISTINCT FROM r.reservation_id
            """
        )
        assert claims == [], "a live reservation without its seat"


def overlaps(
    reservations: dict[str, list[dict[str, Any]]], deadlines: dict[str, datetime | None]
) -> list[tuple[Any, ...]]:
    """Two claims of one seat that overlap in time, as the events tell it: an overbooking.

    A hold's end comes from the table, for a test may have moved it (see `let_lapse`).
    """
    claims: dict[int, list[tuple[datetime, datetime]]] = {}
    never = datetime.max.replace(tzinfo=UTC)
    for reservation_id, events in reservations.items():
        ends = [
            datetime.fromisoformat(event["time"])
            for event in events
            if event["data"]["status"] in {"cancelled", "expired"}
        ]
        begin = datetime.fromisoformat(events[0]["time"])
        deadline = deadlines[reservation_id]
        if deadline:
            ends.append(deadline)
        for seat in events[0]["data"]["seats"]:
            claims.setdefault(seat["seat_id"], []).append((begin, ends[0] if ends else never))
    found: list[tuple[Any, ...]] = []
    for seat_id, of_seat in claims.items():
        of_seat.sort()
        found += [(seat_id, one, other) for one, other in pairwise(of_seat) if other[0] < one[1]]
    return found


@contextmanager
def open_house(database: ReservationDatabase, seats: int = SEATS) -> Iterator[House]:
    """Publish a concert in an empty database."""
    with connect(database.service_url, "tests") as connection:
        new = NewConcert.model_validate_json(json.dumps(concert(seats)))
        catalogue_changes.publish(connection, new)
        performances = catalogue.read_concerts(connection, 1)[0].performances
        performance_id = performances[0].performance_id
        found = catalogue.read_seats(connection, performance_id)
    with psycopg.connect(database.owner_url, autocommit=True, row_factory=dict_row) as owner:
        yield House(database, owner, performance_id, [seat.seat_id for seat in found.seats])


def is_ready(url: str) -> bool:
    """Whether the service at `url` answers and is ready."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
