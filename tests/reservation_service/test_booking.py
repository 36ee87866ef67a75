"""The booking transaction by itself: states, lapsed holds, and whose clock decides."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
from psycopg import errors
from psycopg.pq import TransactionStatus

from reservation_service import booking, events, expiry
from reservation_service.booking import Order, ReservationAnswer, Terms
from reservation_service.database import Connection, transaction
from reservation_service.problems import Problem
from tests.reservation_service.house import House
from tests.waiting import wait_until

TERMS = Terms(timedelta(minutes=10))


@pytest.fixture
def connection(house: House) -> Iterator[Connection]:
    with house.connect() as connected:
        yield connected


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def reserve(
    connection: Connection,
    house: House,
    seat_ids: list[int],
    *,
    customer: str = "ann",
    confirm: bool = False,
    terms: Terms = TERMS,
) -> ReservationAnswer:
    order = Order(customer, house.performance_id, seat_ids, confirm)
    answer = booking.book(connection, order, terms)
    return msgspec.json.decode(answer.body, type=ReservationAnswer)


def wait_for_waiter(house: House) -> None:
    """Wait until somebody waits for a row that a test has locked."""
    wait_until(
        lambda: house.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 10, "a lock's waiter"
    )


def wait_for_clock(house: House, reservation_id: str) -> None:
    wait_until(
        lambda: house.execute(
            "SELECT 1 FROM reservations WHERE reservation_id = %s AND expires_at < "
            "clock_timestamp()", reservation_id,
        ), 10, "the hold to run out",
    )  # fmt: skip


def refusal(future: "Future[Any]") -> Problem:
    with pytest.raises(Problem) as caught:
        future.result(timeout=10)
    return caught.value


def test_all_seats_of_a_request_or_none(connection: Connection, house: House) -> None:
    first, second, third = house.seat_ids[:3]
    reserve(connection, house, [second])
    with pytest.raises(Problem) as caught:
        reserve(connection, house, [first, second, third], customer="bob")
    assert caught.value.members == {"unavailable_seats": [second]}
    assert reserve(connection, house, [first, third], customer="bob").version == 1
    house.check()


def test_blocked_and_foreign_seats_are_unavailable(connection: Connection, house: House) -> None:
    blocked, unknown = house.seat_ids[0], 999_999
    house.execute("UPDATE seats SET blocked = true WHERE seat_id = %s", blocked)
    with pytest.raises(Problem) as caught:
        reserve(connection, house, [blocked, unknown, house.seat_ids[1]])
    assert caught.value.members == {"unavailable_seats": [blocked, unknown]}


def test_seats_of_a_lapsed_hold_go_to_the_next_and_the_sweeper_leaves_them_there(
    connection: Connection, house: House
) -> None:
    kept, taken = house.seat_ids[:2]
    old = reserve(connection, house, [kept, taken])
    house.let_lapse(old.reservation_id)
    new = reserve(connection, house, [taken], customer="bob", confirm=True)
    assert [row["status"] for row in house.execute("SELECT status FROM reservations")].count(
        "held"
    ) == 1, "the booking leaves the old reservation to the sweeper"
    assert expiry.expire_batch(connection) == 1
    owners = house.execute(
        "SELECT reservation_id::text AS owner FROM seats WHERE seat_id = ANY(%s) ORDER BY seat_id",
        [kept, taken],
    )
    assert [row["owner"] for row in owners] == [None, new.reservation_id]
    assert house.events()[-1]["type"] == "reservation.expired"
    house.check()


def test_the_expired_event_tells_when_the_hold_ran_out(
    connection: Connection, house: House
) -> None:
    held = reserve(connection, house, house.seat_ids[:1])
    house.let_lapse(held.reservation_id)
    row = house.execute("SELECT expires_at FROM reservations")[0]
    expiry.expire_batch(connection)
    assert datetime.fromisoformat(house.events()[-1]["time"]) == row["expires_at"]


@pytest.mark.parametrize("change", [booking.confirm, booking.cancel])
def test_a_hold_that_ran_out_while_the_call_waited_for_its_lock_is_expired(
    connection: Connection, house: House, threads: ThreadPoolExecutor, change: Any
) -> None:
    held = reserve(connection, house, house.seat_ids[:1], terms=Terms(timedelta(milliseconds=400)))
    reservation_id = UUID(held.reservation_id)
    with psycopg.connect(house.database.owner_url) as other, house.connect() as second:
        other.execute("SELECT 1 FROM reservations FOR UPDATE")
        call = threads.submit(change, second, reservation_id, "ann")
        wait_for_waiter(house)
        wait_for_clock(house, held.reservation_id)
        other.rollback()
        assert refusal(call).members == {"status": "expired"}
    house.check()


def test_a_booking_that_waited_until_the_hold_ran_out_gets_the_seat(
    connection: Connection, house: House, threads: ThreadPoolExecutor
) -> None:
    seat_id = house.seat_ids[0]
    held = reserve(connection, house, [seat_id], terms=Terms(timedelta(milliseconds=400)))
    with psycopg.connect(house.database.owner_url) as other, house.connect() as second:
        other.execute("SELECT 1 FROM seats WHERE seat_id = %s FOR UPDATE", [seat_id])
        call = threads.submit(reserve, second, house, [seat_id], customer="bob")
        wait_for_waiter(house)
        wait_for_clock(house, held.reservation_id)
        other.rollback()
        assert call.result(timeout=10).customer_id == "bob"
    house.check()


def test_a_hold_whose_seats_are_gone_is_not_confirmed_though_the_clock_says_it_lives(
    connection: Connection, house: House
) -> None:
    held = reserve(connection, house, house.seat_ids[:2])
    house.let_lapse(held.reservation_id)
    reserve(connection, house, house.seat_ids[:1], customer="bob")
    # What a clock that was set back would make of it.
    house.execute(
        "UPDATE reservations SET expires_at = now() + interval '1 hour' WHERE reservation_id = %s",
        held.reservation_id,
    )
    with pytest.raises(Problem) as caught:
        booking.confirm(connection, UUID(held.reservation_id), "ann")
    assert (caught.value.status, caught.value.members) == (409, {"status": "expired"})
    assert len(house.events()) == 2


def test_a_hold_never_outlives_the_sale(connection: Connection, house: House) -> None:
    house.execute("UPDATE performances SET sales_close_at = now() + interval '1 minute'")
    held = reserve(connection, house, house.seat_ids[:1])
    closes = house.execute("SELECT sales_close_at FROM performances")[0]["sales_close_at"]
    assert held.expires_at == closes


@pytest.mark.parametrize(
    "change",
    [
        "status = 'cancelled'",
        "starts_at = now()",
        "sales_open_at = now() + interval '1 hour'",
        "sales_close_at = now()",
    ],
)
def test_a_performance_that_is_not_on_sale_is_refused(
    connection: Connection, house: House, change: str
) -> None:
    house.execute(f"UPDATE performances SET {change}")  # noqa: S608 - the four above
    with pytest.raises(Problem) as caught:
        reserve(connection, house, house.seat_ids[:1])
    assert (caught.value.status, caught.value.type) == (409, "not-on-sale")
    assert house.events() == []


def test_an_event_that_is_refused_takes_the_booking_back(
    connection: Connection, house: House
) -> None:
    house.execute("DELETE FROM outbox_topics WHERE topic = 'concert-reservation'")
    with pytest.raises(errors.CheckViolation):
        reserve(connection, house, house.seat_ids[:1])
    assert house.execute("SELECT * FROM reservations") == []
    assert house.execute("SELECT 1 FROM seats WHERE reservation_id IS NOT NULL") == []


def test_the_limit_of_a_customer_holds_for_calls_at_once(
    house: House, threads: ThreadPoolExecutor
) -> None:
    terms = Terms(timedelta(minutes=10), max_seats_per_customer=3)

    def attempt(seat_id: int) -> str:
        with house.connect() as connection:
            try:
                reserve(connection, house, [seat_id], terms=terms)
            except Problem as problem:
                return problem.type
        return "booked"

    outcomes = sorted(threads.map(attempt, house.seat_ids[:12]))
    assert outcomes == ["booked"] * 3 + ["customer-limit"] * 9


def test_confirming_and_booking_under_a_limit_wait_for_each_other(
    connection: Connection, house: House, threads: ThreadPoolExecutor
) -> None:
    terms = Terms(timedelta(minutes=10), max_seats_per_customer=1)
    held = reserve(connection, house, house.seat_ids[:1], terms=terms)
    with house.connect() as other:
        # Somebody counts this customer's seats; a confirmation must not slip in between.
        other.execute("BEGIN")
        with pytest.raises(Problem, match="may have 1 seats"):
            reserve(other, house, house.seat_ids[1:2], terms=terms)

        def confirm() -> str:
            with house.connect() as mine:
                return booking.confirm(mine, UUID(held.reservation_id), held.customer_id).status

        confirming = threads.submit(confirm)
        wait_until(
            lambda: house.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 10, "the wait"
        )
        other.execute("COMMIT")
        assert confirming.result(10) == "confirmed"


def test_the_limit_of_a_customer_does_not_count_what_lapsed(
    connection: Connection, house: House
) -> None:
    terms = Terms(timedelta(minutes=10), max_seats_per_customer=1)
    first = reserve(connection, house, house.seat_ids[:1], terms=terms)
    house.let_lapse(first.reservation_id)
    assert reserve(connection, house, house.seat_ids[1:2], terms=terms).status == "held"


def test_the_sweeper_works_in_batches_and_passes_by_what_is_locked(
    connection: Connection, house: House
) -> None:
    held = [reserve(connection, house, [seat_id]) for seat_id in house.seat_ids[:5]]
    for one in held:
        house.let_lapse(one.reservation_id)
    with psycopg.connect(house.database.owner_url) as other:
        other.execute(
            "SELECT 1 FROM reservations WHERE reservation_id = %s FOR UPDATE",
            [held[0].reservation_id],
        )
        assert [expiry.expire_batch(connection, 3) for _ in range(3)] == [3, 1, 0]
        other.rollback()
    assert expiry.expire_batch(connection, 3) == 1
    house.check()


def test_reservation_ids_are_uuids_of_version_7_in_order_of_time() -> None:
    before = datetime.now(UTC)
    made = [booking.uuid7() for _ in range(1_000)]
    assert {value.version for value in made} == {7}
    assert {value.variant for value in made} == {"specified in RFC 4122"}
    assert len(set(made)) == len(made)
    milliseconds = [value.int >> 80 for value in made]
    assert milliseconds == sorted(milliseconds)
    assert abs(milliseconds[0] - before.timestamp() * 1_000) < 1_000


BLOCK_SEATS = "UPDATE seats SET blocked = true RETURNING 1"


def fail_by_itself(connection: Connection) -> None:
    with transaction(connection):
        connection.execute(BLOCK_SEATS)
        raise KeyError


def fail_at_the_end(connection: Connection) -> None:
    with transaction(connection):
        connection.execute(BLOCK_SEATS)
        connection.execute("SELECT 1/0")


def fail_in_between(connection: Connection) -> None:
    with transaction(connection):
        connection.execute(BLOCK_SEATS)
        connection.execute("SELECT 1/0").fetchone()


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (fail_by_itself, KeyError),
        (fail_at_the_end, errors.DivisionByZero),
        (fail_in_between, errors.DivisionByZero),
    ],
)
def test_a_transaction_that_fails_leaves_nothing_and_its_connection_usable(
    connection: Connection, house: House, fail: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        fail(connection)
    assert connection.info.transaction_status == TransactionStatus.IDLE
    assert house.execute("SELECT 1 FROM seats WHERE blocked") == []
    with transaction(connection):
        connection.execute(BLOCK_SEATS)
    assert len(house.execute("SELECT 1 FROM seats WHERE blocked")) == len(house.seat_ids)


def test_a_transaction_whose_connection_is_lost_says_so(
    connection: Connection, house: House
) -> None:
    def lose() -> None:
        with transaction(connection):
            connection.execute(BLOCK_SEATS).fetchall()
            with house.connect() as other:
                other.execute(
                    "SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid]
                )

    with pytest.raises(psycopg.OperationalError):
        lose()
    assert connection.closed
    assert house.execute("SELECT 1 FROM seats WHERE blocked") == []


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("traceparent", [None, f"00-{'a' * 32}-{'b' * 16}-01", "no trace"])
def test_a_booking_that_the_database_tells_is_the_one_that_we_would_tell(
    connection: Connection, house: House, traceparent: str | None, *, confirm: bool
) -> None:
    # Quotes, backslashes and what needs more than two bytes, where people may write such.
    house.execute("""UPDATE concerts SET title = 'He said "\\" 음악회 🎻', venue = 'O''Hara'""")
    house.execute("""UPDATE seats SET "row" = 'Ä"1'""")
    order = Order("ann", house.performance_id, house.seat_ids[2::-1], confirm)
    answer = booking.book(connection, order, TERMS, traceparent=traceparent)
    reservation_id = UUID(msgspec.json.decode(answer.body)["reservation_id"])
    reservation = booking.find(connection, reservation_id, "ann")
    assert answer.location == f"/api/reservations/{reservation_id}"
    told = msgspec.json.decode(answer.body, type=ReservationAnswer)
    assert told == booking.answer_of(reservation)
    assert msgspec.json.decode(answer.body).keys() == msgspec.to_builtins(told).keys()
    with connection.transaction():
        events.write_reservation(connection, reservation, reservation.created_at, traceparent)
    ours, theirs = house.execute(
        "SELECT key, payload::text, headers FROM outbox WHERE topic = %s ORDER BY id",
        events.RESERVATION_TOPIC,
    )
    parsed = [parse_times(msgspec.json.decode(row.pop("payload"))) for row in (ours, theirs)]
    assert parsed[0] == parsed[1]
    assert ours == theirs


def parse_times(event: dict[str, Any]) -> dict[str, Any]:
    """The event with its times as times: as many digits as one likes mean the same."""
    data = event["data"]
    for place, name in (
        (event, "time"),
        (data, "created_at"),
        (data, "expires_at"),
        (data["performance"], "starts_at"),
    ):
        if place[name] is not None:
            assert place[name].endswith("Z")
            place[name] = datetime.fromisoformat(place[name])
    return event
