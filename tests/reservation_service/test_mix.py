"""No overbooking, no gap in the versions, no deadlock, whatever happens in whichever order."""

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from reservation_service import booking, expiry
from reservation_service.booking import Order, Terms
from reservation_service.problems import Problem
from tests.reservation_service.house import House, bearer

SEATS = 4
LIVE = {"held", "confirmed"}


class Bookings(RuleBasedStateMachine):
    """Compares the service over HTTP with a model of a few lines.

    The model knows for each reservation what the service must say of it, `lapsed` for a hold
    that ran out and was not swept yet.
    """

    made = Bundle("made")

    def __init__(self, house: House, client: FlaskClient) -> None:
        super().__init__()
        self.house, self.client = house, client
        house.execute("TRUNCATE reservations, reservation_seats, idempotency_keys, outbox;")
        house.execute("UPDATE seats SET reservation_id = NULL, claimed_until = NULL")
        self.seats = house.seat_ids[:SEATS]
        self.model: dict[str, dict[str, Any]] = {}

    def post(self, path: str, customer: str, body: object = None) -> Any:
        return self.client.post(f"/api{path}", json=body, headers=bearer(customer))

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        return self.client.get(path, headers=headers).json

    @rule(
        target=made,
        numbers=st.lists(st.integers(0, SEATS - 1), min_size=1, max_size=3, unique=True),
        customer=st.sampled_from(["ann", "bob"]),
        confirm=st.booleans(),
    )
    def book(self, numbers: list[int], customer: str, confirm: bool) -> Any:  # noqa: FBT001
        wanted = [self.seats[number] for number in numbers]
        taken = {
            seat for one in self.model.values() if one["status"] in LIVE for seat in one["seats"]
        }
        order = self.house.order(*wanted, confirm=confirm)
        answer = self.post("/reservations", customer, order)
        if taken & set(wanted):
            assert answer.status_code == 409
            assert answer.json["unavailable_seats"] == sorted(taken & set(wanted))
            return multiple()
        assert answer.status_code == 201, answer.json
        reservation_id = answer.json["reservation_id"]
        self.model[reservation_id] = {
            "customer": customer,
            "seats": wanted,
            "status": "confirmed" if confirm else "held",
            "version": 1,
        }
        return reservation_id

    @rule(reservation_id=made)
    def confirm(self, reservation_id: str) -> None:
        self.change(reservation_id, "confirm", "confirmed", {"held"})

    @rule(reservation_id=made)
    def cancel(self, reservation_id: str) -> None:
        self.change(reservation_id, "cancel", "cancelled", {"held", "confirmed"})

    @rule(reservation_id=made)
    def extend(self, reservation_id: str) -> None:
        one = self.model[reservation_id]
        answer = self.post(f"/reservations/{reservation_id}/extend", one["customer"])
        if one["status"] == "held":
            # The first extension counts; sent again within moments, it gains nothing.
            one["version"] = 2
            assert (answer.status_code, answer.json["version"]) == (200, one["version"])
        else:
            assert answer.status_code == 409

    def change(self, reservation_id: str, action: str, wanted: str, allowed: set[str]) -> None:
        one = self.model[reservation_id]
        answer = self.post(f"/reservations/{reservation_id}/{action}", one["customer"])
        if one["status"] in allowed:
            one["status"], one["version"] = wanted, one["version"] + 1
        if one["status"] == wanted:
            assert (answer.status_code, answer.json["version"]) == (200, one["version"])
        else:
            assert answer.status_code == 409
            assert answer.json["status"] == one["status"].replace("lapsed", "expired")

    @rule(reservation_id=made)
    def run_out(self, reservation_id: str) -> None:
        if self.model[reservation_id]["status"] == "held":
            self.house.let_lapse(reservation_id)
            self.model[reservation_id]["status"] = "lapsed"

    @rule()
    def sweep(self) -> None:
        lapsed = [one for one in self.model.values() if one["status"] == "lapsed"]
        with self.house.connect() as connection:
            assert expiry.expire_batch(connection) == len(lapsed)
        for one in lapsed:
            one["status"], one["version"] = "expired", one["version"] + 1

    @rule(reservation_id=consumes(made))
    def somebody_else_sees_nothing(self, reservation_id: str) -> None:
        other = bearer("eve")
        path = f"/api/reservations/{reservation_id}"
        assert self.client.get(path, headers=other).status_code == 404
        assert self.client.post(f"{path}/cancel", headers=other).status_code == 404

    @invariant()
    def the_service_says_what_the_model_says(self) -> None:
        for reservation_id, one in self.model.items():
            path = f"/api/reservations/{reservation_id}"
            answer = self.get(path, bearer(one["customer"]))
            assert answer["status"] == one["status"].replace("lapsed", "expired")
            assert answer["version"] == one["version"]
        path = f"/api/performances/{self.house.performance_id}/seats"
        shown = {seat["seat_id"]: seat["status"] for seat in self.get(path)["seats"]}
        words = {"held": "held", "confirmed": "reserved"}
        expected = dict.fromkeys(self.house.seat_ids, "available") | {
            seat: words[one["status"]]
            for one in self.model.values()
            if one["status"] in LIVE
            for seat in one["seats"]
        }
        assert shown == expected

    @invariant()
    def events_and_tables_agree(self) -> None:
        self.house.check()


def test_any_sequence_of_calls_keeps_seats_states_and_events_right(
    house: House, client: FlaskClient
) -> None:
    run_state_machine_as_test(
        lambda: Bookings(house, client),  # type: ignore[arg-type]
        settings=settings(
            max_examples=40,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_any_mix_of_calls_at_once_never_overbooks_or_deadlocks(house: House, seed: int) -> None:
    hold, attempts, workers = timedelta(milliseconds=3), 150, 8
    known: list[str] = []

    def work(number: int) -> None:
        dice = random.Random(seed * 1_000 + number)  # noqa: S311 - repeatable
        with house.connect() as connection:
            for _ in range(attempts):
                try:
                    act(connection, dice)
                except Problem as problem:
                    assert problem.status == 409, problem  # noqa: PT017

    def act(connection: Any, dice: random.Random) -> None:
        action = dice.choice(
            ["book", "book", "hold", "hold", "confirm", "cancel", "extend", "sweep"]
        )
        if action in {"book", "hold"}:
            wanted = dice.sample(house.seat_ids[:6], dice.randint(1, 4))
            terms = Terms(dice.choice([hold, timedelta(minutes=1)]))
            order = Order("ann", house.performance_id, wanted, action == "book")
            answer = booking.book(connection, order, terms)
            known.append(msgspec.json.decode(answer.body)["reservation_id"])
        elif action == "sweep":
            expiry.expire_batch(connection)
        elif known:
            # Of the newest few, else hardly anybody meets.
            reservation_id = UUID(dice.choice(known[-6:]))
            changes: dict[str, Any] = {
                "confirm": booking.confirm,
                "cancel": booking.cancel,
                "extend": partial(booking.extend, terms=Terms(hold)),
            }
            changes[action](connection, reservation_id, "ann")

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, number) for number in range(workers)]:
            done.result(timeout=60)
    statuses = {row["status"] for row in house.execute("SELECT status FROM reservations")}
    assert {"cancelled", "expired"} <= statuses, "the mix was too tame to prove anything"
    house.check()
    with psycopg.connect(house.database.owner_url) as connection:
        row = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row == (0,)
