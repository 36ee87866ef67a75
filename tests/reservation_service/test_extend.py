"""Extending a hold: how far, how often, and what it tells the world."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask.testing import FlaskClient

from reservation_service import booking
from reservation_service.booking import Terms
from reservation_service.problems import Problem
from tests.reservation_service.conftest import MakeClient
from tests.reservation_service.house import House, bearer
from tests.reservation_service.test_booking import reserve, wait_for_clock, wait_for_waiter
from tests.reservation_service.test_events import validator


def hold(house: House, client: FlaskClient, *, confirm: bool = False) -> dict[str, Any]:
    order = house.order(*house.seat_ids[:2], confirm=confirm)
    made: Any = client.post("/api/reservations", json=order, headers=bearer("ann")).json
    return dict(made)


def extend(client: FlaskClient, reservation_id: str, customer: str = "ann") -> Any:
    path = f"/api/reservations/{reservation_id}/extend"
    return client.post(path, headers=bearer(customer))


def age(house: House, minutes: int) -> None:
    """Let the reservation have been made earlier, with a minute left to run."""
    house.execute(
        "UPDATE reservations SET created_at = created_at - %s * interval '1 minute', "
        "expires_at = expires_at - interval '9 minutes'",
        minutes,
    )


def test_a_hold_lasts_as_long_again_and_tells_so(house: House, client: FlaskClient) -> None:
    made = hold(house, client)
    answer = extend(client, made["reservation_id"])
    assert answer.status_code == 200
    assert (answer.json["status"], answer.json["version"]) == ("held", 2)
    assert answer.json["expires_at"] > made["expires_at"]
    event = house.events()[-1]
    assert event["type"] == "reservation.extended"
    assert event["data"]["expires_at"] == answer.json["expires_at"]
    validator("reservation").validate(event)
    claims = house.execute("SELECT DISTINCT claimed_until FROM seats WHERE reservation_id NOTNULL")
    until = datetime.fromisoformat(answer.json["expires_at"])
    assert [row["claimed_until"] for row in claims] == [until]
    house.check()


def test_no_hold_outlives_its_absolute_end(house: House, client: FlaskClient) -> None:
    made = hold(house, client)
    age(house, 25)
    first = extend(client, made["reservation_id"]).json
    row = house.execute("SELECT created_at, expires_at FROM reservations")[0]
    assert row["expires_at"] - row["created_at"] == timedelta(minutes=30)
    events = len(house.events())
    again = extend(client, made["reservation_id"])
    assert (again.status_code, again.json) == (200, first)
    assert len(house.events()) == events, "what gains nothing changes nothing"


def test_no_hold_is_extended_beyond_the_sale(house: House, client: FlaskClient) -> None:
    made = hold(house, client)
    for column, minutes in (("sales_close_at", 8), ("starts_at", 5)):
        house.execute(
            f"UPDATE performances SET {column} = now() + %s * interval '1 minute'",  # noqa: S608
            minutes,
        )
        house.execute("UPDATE reservations SET expires_at = now() + interval '1 minute'")
        assert extend(client, made["reservation_id"]).status_code == 200
        both = house.execute("SELECT expires_at, least(sales_close_at, starts_at) AS sale_ends_at "
                             "FROM reservations, performances")[0]  # fmt: skip
        assert both["expires_at"] == both["sale_ends_at"]


def test_an_extension_never_shortens_a_hold(house: House, make_client: MakeClient) -> None:
    made = hold(house, make_client(hold_seconds=600))
    answer = extend(make_client(hold_seconds=30), made["reservation_id"])
    assert (answer.status_code, answer.json) == (200, made)


@pytest.mark.parametrize("status", ["confirmed", "cancelled", "expired"])
def test_what_is_not_held_is_not_extended(house: House, client: FlaskClient, status: str) -> None:
    made = hold(house, client, confirm=status == "confirmed")
    if status == "cancelled":
        client.post(f"/api/reservations/{made['reservation_id']}/cancel", headers=bearer("ann"))
    if status == "expired":
        house.let_lapse(made["reservation_id"])
    events = len(house.events())
    answer = extend(client, made["reservation_id"])
    assert (answer.status_code, answer.json["type"]) == (409, "wrong-state")
    assert answer.json["status"] == status
    assert len(house.events()) == events


def test_another_s_hold_does_not_exist(house: House, client: FlaskClient) -> None:
    made = hold(house, client)
    assert extend(client, made["reservation_id"], "eve").status_code == 404
    assert len(house.events()) == 1


def test_a_hold_that_ran_out_while_the_call_waited_is_not_revived(house: House) -> None:
    terms = Terms(timedelta(milliseconds=400))
    with (
        house.connect() as connection,
        house.connect() as second,
        psycopg.connect(house.database.owner_url) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        held = reserve(connection, house, house.seat_ids[:1], terms=terms)
        other.execute("SELECT 1 FROM reservations FOR UPDATE")
        reservation_id = UUID(held.reservation_id)
        call = pool.submit(booking.extend, second, reservation_id, "ann", terms=terms)
        wait_for_waiter(house)
        wait_for_clock(house, held.reservation_id)
        other.rollback()
        with pytest.raises(Problem) as caught:
            call.result(timeout=10)
    assert caught.value.members == {"status": "expired"}
    house.check()


def test_an_extension_that_is_sent_again_changes_nothing(house: House, client: FlaskClient) -> None:
    made = hold(house, client)
    first = extend(client, made["reservation_id"])
    again = extend(client, made["reservation_id"])
    assert (again.status_code, again.json) == (200, first.json)
    assert len(house.events()) == 2
    age(house, 1)
    later = extend(client, made["reservation_id"]).json
    assert (later["version"], later["expires_at"] > first.json["expires_at"]) == (3, True)
    house.check()


def test_a_stranger_who_knows_the_id_waits_for_no_lock_of_it(
    house: House, client: FlaskClient
) -> None:
    made = hold(house, client)
    with psycopg.connect(house.database.owner_url) as owner:
        owner.execute("SELECT FROM seats WHERE reservation_id IS NOT NULL FOR UPDATE")
        owner.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('customer ann ' || performance_id, 0)) "
            "FROM reservations"
        )
        for action in ("extend", "confirm", "cancel"):
            path = f"/api/reservations/{made['reservation_id']}/{action}"
            assert client.post(path, headers=bearer("eve")).status_code == 404
