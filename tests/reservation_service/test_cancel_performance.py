"""Cancelling a performance ends its sale at once, and every reservation in the end."""

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
from flask.testing import FlaskClient

from reservation_service import admin_api, booking, cancellation, catalogue_changes, expiry
from reservation_service.booking import Order, Terms
from reservation_service.database import Connection
from reservation_service.problems import Problem
from tests.databases import ReservationDatabase
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, open_house
from tests.reservation_service.test_catalogue_changes import told, waiters
from tests.reservation_service.test_outbox import TRACEPARENT
from tests.waiting import wait_until

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}", "traceparent": TRACEPARENT}
TERMS = Terms(timedelta(minutes=10))
RESERVATIONS = 2_000
TIMEOUT_S = 60


def book(connection: Connection, house: House, seat: int, *, confirm: bool = False) -> UUID:
    order = Order("ann", house.performance_id, [house.seat_ids[seat]], confirm)
    answer = booking.book(connection, order, TERMS)
    return UUID(msgspec.json.decode(answer.body)["reservation_id"])


def statuses(house: House) -> Counter[str]:
    return Counter(row["status"] for row in house.execute("SELECT status FROM reservations"))


def assert_settled(house: House) -> None:
    """Nothing of the performance is left, and each reservation was told of once."""
    assert statuses(house).keys() <= {"cancelled", "expired"}
    assert house.execute("SELECT 1 FROM seats WHERE reservation_id IS NOT NULL") == []
    assert house.execute("SELECT 1 FROM performances WHERE cancelling") == []
    ended = Counter(
        event["subject"]
        for event in house.events()
        if event["data"]["status"] in {"cancelled", "expired"}
    )
    assert len(ended) == sum(statuses(house).values())
    assert set(ended.values()) <= {1}
    house.check()


@contextmanager
def patient(house: House) -> Iterator[Connection]:
    """A connection that waits longer for locks than a test that is slow today."""
    with house.connect() as connection:
        connection.execute("SET lock_timeout = '60s'; SET statement_timeout = '60s'")
        yield connection


@contextmanager
def held_up(house: House, change: str) -> Iterator[None]:
    """Everybody who changes a reservation waits inside, its seats locked and all checks done."""
    house.execute(
        "CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END'"
    )
    house.execute(
        f"CREATE TRIGGER hold_up BEFORE {change} ON reservations"
        " FOR EACH ROW EXECUTE FUNCTION hold_up()"
    )
    house.execute("SELECT pg_advisory_lock(1)")
    try:
        yield
    finally:
        house.execute("SELECT pg_advisory_unlock(1)")


def test_a_cancelled_performance_takes_nothing_any_more(house: House, client: FlaskClient) -> None:
    made = [
        client.post("/api/reservations", json=house.order(seat), headers=bearer("ann")).json
        for seat in house.seat_ids[:3]
    ]
    ids = [one["reservation_id"] for one in made if one]
    client.post(f"/api/reservations/{ids[0]}/confirm", headers=bearer("ann"))
    house.let_lapse(ids[2])
    path = f"/api/performances/{house.performance_id}/cancel"
    for cancelled in (2, 0):
        assert client.post(path, headers=ADMIN).json == {
            "performance_id": house.performance_id,
            "cancelled_reservations": cancelled,
            "finished": True,
            "status": "cancelled",
        }
    for confirm in (True, False):
        order = house.order(house.seat_ids[5], confirm=confirm)
        refused = client.post("/api/reservations", json=order, headers=bearer("bob"))
        assert (refused.status_code, refused.json["type"]) == (409, "not-on-sale")  # type: ignore[index]
    for reservation_id in ids:
        for action in ("confirm", "extend"):
            answer = client.post(
                f"/api/reservations/{reservation_id}/{action}", headers=bearer("ann")
            )
            assert answer.status_code == 409
    later = {"sales_close_at": "2199-01-01T00:00:00Z"}
    path = f"/api/performances/{house.performance_id}"
    assert client.patch(path, json=later, headers=ADMIN).status_code == 409
    with house.connect() as connection:
        expiry.sweep(connection, threading.Event())
    assert statuses(house) == {"cancelled": 2, "expired": 1}
    assert_settled(house)
    assert [event["data"]["performances"][0]["status"] for event in told(house)] == [
        "scheduled", "cancelled",
    ]  # fmt: skip
    (headers,) = {
        row["headers"].get("traceparent")
        for row in house.execute(
            "SELECT headers FROM outbox WHERE payload ->> 'type' ~ 'cancelled'"
        )
    }
    assert headers == TRACEPARENT


def test_a_booking_that_waits_for_its_seat_meanwhile_is_refused(house: House) -> None:
    with (
        psycopg.connect(house.database.owner_url) as other,
        patient(house) as connection,
        house.connect() as admin,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("SELECT 1 FROM seats WHERE seat_id = %s FOR UPDATE", [house.seat_ids[0]])
        done = pool.submit(book, connection, house, 0)
        wait_until(lambda: waiters(house) == 1, 10, "the booking to wait")
        catalogue_changes.cancel_performance(admin, house.performance_id)
        other.commit()
        with pytest.raises(Problem) as refused:
            done.result(timeout=10)
    assert refused.value.type == "not-on-sale"


@pytest.mark.parametrize("change", ["INSERT", "UPDATE"])
def test_what_was_checked_before_and_commits_afterwards_is_cancelled_too(
    house: House, change: str
) -> None:
    with (
        patient(house) as connection,
        patient(house) as admin,
        ThreadPoolExecutor(2) as pool,
    ):
        act: Callable[[], object] = partial(book, connection, house, 0, confirm=True)
        if change == "UPDATE":
            act = partial(booking.confirm, connection, book(connection, house, 0), "ann")
        with held_up(house, change):
            done = pool.submit(act)
            wait_until(lambda: waiters(house) == 1, 10, "the customer")
            cancelled = pool.submit(cancellation.cancel, admin, house.performance_id)
            wait_until(lambda: waiters(house) == 2, 10, "the cancellation to wait for it")
        done.result(timeout=10)
        assert cancelled.result(timeout=10) == (1, True)
    assert statuses(house) == {"cancelled": 1}
    assert_settled(house)


def test_a_customer_s_session_that_froze_holds_it_up_only_as_long_as_it_may_live(
    house: House,
) -> None:
    frozen = house.connect()
    frozen.execute("BEGIN")
    frozen.execute("SELECT 1 FROM seats WHERE seat_id = %s FOR UPDATE", [house.seat_ids[3]])
    with house.connect() as admin:
        book(admin, house, 0)
        assert cancellation.cancel(admin, house.performance_id) == (1, True)
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        frozen.execute("COMMIT")
    frozen.close()
    assert_settled(house)


def test_what_a_request_has_no_time_for_is_left_to_the_sweeper(
    house: House, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house.connect() as connection:
        for seat in range(10):
            book(connection, house, seat, confirm=seat % 2 == 0)
        monkeypatch.setattr(admin_api, "CANCEL_WITHIN_S", -1.0)
        path = f"/api/performances/{house.performance_id}/cancel"
        answer = client.post(path, headers=ADMIN)
        assert (answer.status_code, answer.json["finished"]) == (202, False)  # type: ignore[index]
        assert statuses(house) == {"held": 5, "confirmed": 5}
        with pytest.raises(Problem, match="cancelled"):
            book(connection, house, 15)
        expiry.sweep(connection, threading.Event())
    assert statuses(house) == {"cancelled": 10}
    assert_settled(house)


def test_however_often_it_is_killed_every_reservation_is_cancelled_once(
    reservation_database: ReservationDatabase,
) -> None:
    with open_house(reservation_database, RESERVATIONS + 20) as house:
        known = fill(house)
        with customers(house, known):
            for enough in (200, 600, 1_000):
                kill_cancellation(house, enough)
            assert statuses(house)["confirmed"] > 0
            run("expire-holds", house=house)
        assert_settled(house)
        assert len(told(house)) == 2
        row = house.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
        assert row == [{"deadlocks": 0}]


def fill(house: House) -> list[UUID]:
    with house.connect() as connection:
        return [
            book(connection, house, seat, confirm=seat % 2 == 0) for seat in range(RESERVATIONS)
        ]


@contextmanager
def customers(house: House, known: list[UUID]) -> Iterator[None]:
    """Some who go on booking, confirming, extending and cancelling meanwhile."""
    stop = threading.Event()

    def go_on(number: int) -> int:
        dice, calls = random.Random(number), 0  # noqa: S311 - repeatable
        with house.connect() as connection:
            while not stop.is_set():
                calls += 1
                try:
                    act(connection, dice)
                except Problem as problem:
                    assert problem.status == 409, problem  # noqa: PT017
        return calls

    def act(connection: Connection, dice: random.Random) -> Any:
        if dice.random() < 0.3:
            known.append(book(connection, house, dice.randrange(len(house.seat_ids))))
        action = dice.choice([booking.confirm, booking.cancel])
        return action(connection, dice.choice(known), "ann")

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(go_on, number) for number in range(3)]
        try:
            yield
        finally:
            stop.set()
        assert all(calls.result(timeout=TIMEOUT_S) > 100 for calls in running)


def run(*arguments: str, house: House) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reservation_service", *arguments],
        env=os.environ | house.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def kill_cancellation(house: House, enough: int) -> None:
    """Begin to cancel, and kill it when so many reservations are."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "reservation_service"),
            *("cancel-performance", str(house.performance_id)),
        ],
        env=os.environ | house.environment,
    ) as process:
        wait_until(lambda: statuses(house)["cancelled"] >= enough, TIMEOUT_S, "the cancellation")
        assert process.poll() is None, "too quick to be killed in its midst"
        process.kill()
