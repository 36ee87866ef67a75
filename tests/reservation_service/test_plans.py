"""However much there is, a booking and its changes read a few pages: on generated rows."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest

from reservation_service import booking, events, sql
from reservation_service.booking import Order, Terms
from reservation_service.database import Connection
from tests.reservation_service.house import House
from tests.reservation_service.test_sql import numbered

SEATS, SEATS_PER_HALL, RESERVATIONS = 100_000, 1_000, 30_000
# The seats fill some 1,300 pages; the customer has 30 reservations, which are counted.
PAGES_MAX = 300

FILL = (
    """
    INSERT INTO performances (concert_id, starts_at, sales_open_at, sales_close_at, capacity)
    SELECT concert_id, now() + interval '1 day', now() - interval '1 day',
        now() + interval '1 hour', %(hall)s
    FROM concerts, generate_series(1, %(seats)s / %(hall)s)
    """,
    """
    INSERT INTO seats (performance_id, section, "row", number, price)
    SELECT performance_id, 'A', number / 50, 1 + number, 1
    FROM performances, generate_series(0, %(hall)s - 1) AS number WHERE capacity = %(hall)s
    """,
    """
    INSERT INTO reservations (reservation_id, customer_id, performance_id, status, version, amount,
        currency, created_at, updated_at, expires_at)
    SELECT gen_random_uuid(), 'c' || n %% 1000, 2 + n %% (%(seats)s / %(hall)s), 'held', 1, 1,
        'EUR', now(), now(), now() + interval '1 hour'
    FROM generate_series(1, %(reservations)s) AS n
    """,
    """
    INSERT INTO reservation_seats (reservation_id, seat_id, section, "row", number, price)
    SELECT reservation_id, 100 + 3 * row_number() OVER (), 'A', '1', 1, 1 FROM reservations
    """,
    """
    UPDATE seats SET reservation_id = r.reservation_id, claimed_until = now() + interval '1 hour'
    FROM reservation_seats AS r WHERE r.seat_id = seats.seat_id
    """,
    """
    INSERT INTO idempotency_keys (caller, operation, key, fingerprint, created_at)
    SELECT 'c' || n %% 1000, 'reserve', 'k' || n, '', now()
    FROM generate_series(1, %(reservations)s) AS n
    """,
)
# As many as a large hall has; its index entries alone are on more pages than are allowed.
NEW_HALL_SEATS = 50_000
NEW_HALL = """
WITH performance AS (
    INSERT INTO performances (concert_id, starts_at, sales_open_at, sales_close_at, capacity)
    SELECT concert_id, now() + interval '1 day', now() - interval '1 day',
        now() + interval '1 hour', %(seats)s
    FROM concerts LIMIT 1 RETURNING performance_id
), seat AS (
    INSERT INTO seats (performance_id, section, "row", number, price)
    SELECT performance_id, 'A', number / 50, 1 + number, 1
    FROM performance, generate_series(0, %(seats)s - 1) AS number
    RETURNING performance_id, seat_id
)
SELECT performance_id, min(seat_id) AS begin FROM seat GROUP BY performance_id
"""


@pytest.fixture
def full_house(house: House) -> House:
    """The house, with many other performances, reservations and keys beside its own."""
    sizes = {"seats": SEATS, "hall": SEATS_PER_HALL, "reservations": RESERVATIONS}
    for statement in FILL:
        house.owner.execute(statement, sizes)
    house.owner.execute("ANALYZE")
    return house


def explain(connection: Connection, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run one of our statements; its plan with what it really did."""
    prepared, parameters = numbered(getattr(sql, name))
    connection.execute(f"PREPARE {name} AS {prepared}".encode())
    places = ", ".join(["%s"] * len(parameters))
    # EXECUTE takes no parameters of the protocol.
    row = (
        psycopg.ClientCursor(connection)
        .execute(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name} ({places})".encode(),
            [values[parameter] for parameter in parameters],
        )
        .fetchone()
    )
    connection.execute(f"DEALLOCATE {name}".encode())
    assert row
    found: dict[str, Any] = row[0][0]["Plan"]
    return found


def pages(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


def test_a_booking_and_its_changes_read_a_few_pages_among_many(full_house: House) -> None:
    house = full_house
    for plans, first in (("force_custom_plan", 0), ("force_generic_plan", 8)):
        read = {name: pages(plan) for name, plan in explained(house, plans, first).items()}
        assert {name: count for name, count in read.items() if count > PAGES_MAX} == {}, read


def test_a_hall_that_has_just_gone_on_sale_is_not_read_through_for_a_booking(
    house: House,
) -> None:
    # Statistics that know all other performances say that this one can't have any seats.
    house.owner.execute(NEW_HALL, {"seats": NEW_HALL_SEATS})
    house.owner.execute("ANALYZE")
    found = house.owner.execute(NEW_HALL, {"seats": NEW_HALL_SEATS}).fetchone()
    assert found
    performance_id, begin = found["performance_id"], found["begin"]
    for plans, first in (("force_custom_plan", begin), ("force_generic_plan", begin + 8)):
        with house.connect() as connection:
            connection.execute(f"SET plan_cache_mode = {plans}".encode())
            read = []
            for seat_id in range(first, first + 8, 4):
                order = Order("c1", performance_id, list(range(seat_id, seat_id + 4)), confirm=True)
                read.append(pages(explain(connection, "BOOK_SEATS", booking_values(order))))
        assert read[-1] <= PAGES_MAX, (plans, read)


def booking_values(order: Order) -> dict[str, Any]:
    """What a booking with a key gives to its statement."""
    new_id = booking.uuid7()
    event = events.of_new_reservation(str(new_id), confirm=order.confirm, trace=None)
    return {
        **order._asdict(),
        **event._asdict(),
        "seat_ids": list(order.seat_ids),
        "reservation_id": new_id,
        "hold": timedelta(minutes=10),
        "max_seats_per_customer": 2_000,
        "operation": "reserve",
        "key": str(new_id),
        "fingerprint": b"x",
    }


def explained(house: House, plans: str, first: int) -> dict[str, dict[str, Any]]:
    """Book and change with this plan_cache_mode, using eight seats from the `first` on."""
    mine, more = house.seat_ids[first : first + 4], house.seat_ids[first + 4 : first + 8]
    order = Order("c1", house.performance_id, mine, confirm=False)
    with house.connect() as connection:
        connection.execute(f"SET plan_cache_mode = {plans}".encode())
        # What the first call reads of the catalogue doesn't count.
        answer = booking.book(connection, order, Terms(timedelta(minutes=10), 2_000))
        reservation_id = UUID(msgspec.json.decode(answer.body)["reservation_id"])
        values = booking_values(order._replace(seat_ids=more))
        found = {"BOOK_SEATS": explain(connection, "BOOK_SEATS", values)}
        now = datetime.now(UTC)
        values |= {
            "reservation_id": reservation_id,
            "reservation_ids": [reservation_id],
            "seat_ids": mine,
            "expires_at": now + timedelta(minutes=20),
            "changed_at": now,
            "status": "confirmed",
            "version": 2,
            "before": booking.UUID_MAX,
            "limit": 50,
            "caller": "c1",
        }
        for name in (
            *("LOCK_CUSTOMER_OF_RESERVATION", "LOCK_RESERVATION", "LOCK_SEATS_OF_RESERVATIONS"),
            *("READ_RESERVATIONS", "LIST_RESERVATIONS", "EXTEND_RESERVATION", "EXTEND_SEATS"),
            *("CHANGE_RESERVATION", "CONFIRM_SEATS", "FREE_SEATS", "READ_IDEMPOTENCY_KEY"),
            *("LOCK_LAPSED_HOLDS", "READ_PERFORMANCE"),
        ):
            found[name] = explain(connection, name, values)
    return found
