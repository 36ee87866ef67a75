"""Changes of the catalogue: what they do, whom they disturb, and the events that tell of them."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from flask.testing import FlaskClient

from reservation_service import catalogue_changes
from reservation_service.new_concert import ConcertChange, PerformanceChange
from reservation_service.problems import Problem
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer
from tests.reservation_service.test_events import TRACEPARENT, validator
from tests.waiting import wait_until

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def told(house: House) -> list[dict[str, Any]]:
    """The events of the house's concert, each of which must hold the contract."""
    events = house.events("concert-catalogue")
    for number, event in enumerate(events, start=1):
        validator("concert").validate(event)
        assert event["id"] == f"{event['subject']}:{number}"
        assert event["type"] == ("concert.published" if number == 1 else "concert.changed")
        assert event["data"]["version"] == number
    return events


def state(house: House, client: FlaskClient) -> dict[int, str]:
    answer = client.get(f"/api/performances/{house.performance_id}/seats").json
    assert answer
    return {seat["seat_id"]: seat["status"] for seat in answer["seats"]}


def waiters(house: House) -> int:
    """How many sessions wait for a lock."""
    return int(house.execute("SELECT count(*) AS n FROM pg_locks WHERE NOT granted")[0]["n"])


def concert_id(house: House) -> int:
    return int(house.execute("SELECT concert_id FROM concerts")[0]["concert_id"])


def test_every_change_raises_the_version_and_tells_the_whole_state(
    house: House, client: FlaskClient
) -> None:
    path = f"/api/concerts/{concert_id(house)}"
    headers = ADMIN | {"traceparent": TRACEPARENT}
    answer = client.patch(path, json={"title": "Another evening"}, headers=headers)
    assert answer.status_code == 200
    assert answer.json == client.get(path).json
    later = (datetime.now(UTC) + timedelta(days=40)).isoformat()
    performance = f"/api/performances/{house.performance_id}"
    answer = client.patch(performance, json={"starts_at": later}, headers=ADMIN)
    assert answer.status_code == 200
    assert answer.json == client.get(path).json
    blocked = {"seat_ids": house.seat_ids[3:5]}
    assert client.post(f"{performance}/block-seats", json=blocked, headers=ADMIN).json == {
        "performance_id": house.performance_id,
        "changed_seats": house.seat_ids[3:5],
    }
    events = told(house)
    assert [event["data"]["title"] for event in events[1:]] == ["Another evening"] * 3
    assert events[1]["traceparent"] == TRACEPARENT
    (performance_told,) = events[-1]["data"]["performances"]
    assert datetime.fromisoformat(performance_told["starts_at"]) == datetime.fromisoformat(later)
    assert [one["sections"][0]["blocked"] for e in events for one in e["data"]["performances"]] == [
        0, 0, 0, 2,
    ]  # fmt: skip


def test_what_is_so_already_is_left_alone(house: House, client: FlaskClient) -> None:
    performance = f"/api/performances/{house.performance_id}"
    known = client.get(f"/api/concerts/{concert_id(house)}").json
    assert known
    times = known["performances"][0]
    same = {name: times[name] for name in ("starts_at", "sales_open_at", "sales_close_at")}
    seats = {"seat_ids": house.seat_ids[:2]}
    for path, body in (
        (f"/api/concerts/{concert_id(house)}", {"title": known["title"]}),
        (f"/api/concerts/{concert_id(house)}", {}),
        (performance, same),
        (performance, {}),
    ):
        assert client.patch(path, json=body, headers=ADMIN).status_code == 200
    assert client.post(f"{performance}/release-seats", json=seats, headers=ADMIN).status_code == 200
    assert len(told(house)) == 1
    for _ in range(2):
        client.post(f"{performance}/block-seats", json=seats, headers=ADMIN)
    assert len(told(house)) == 2


def test_a_blocked_seat_can_be_neither_held_nor_booked_until_it_is_released(
    house: House, client: FlaskClient
) -> None:
    performance = f"/api/performances/{house.performance_id}"
    seats = {"seat_ids": house.seat_ids[:2]}
    assert client.post(f"{performance}/block-seats", json=seats, headers=ADMIN).status_code == 200
    assert set(state(house, client).values()) == {"available", "blocked"}
    order = house.order(*house.seat_ids[1:3])
    for confirm in (False, True):
        order["confirm"] = confirm
        refused = client.post("/api/reservations", json=order, headers=bearer("ann"))
        assert (refused.status_code, refused.json["unavailable_seats"]) == (  # type: ignore[index]
            409, [house.seat_ids[1]],
        )  # fmt: skip
    assert client.post(f"{performance}/release-seats", json=seats, headers=ADMIN).status_code == 200
    assert client.post("/api/reservations", json=order, headers=bearer("ann")).status_code == 201


def test_seats_that_are_held_or_reserved_cannot_be_blocked_and_are_named(
    house: House, client: FlaskClient
) -> None:
    path = f"/api/performances/{house.performance_id}/block-seats"
    for seat, confirm in ((1, False), (3, True)):
        order = house.order(house.seat_ids[seat], confirm=confirm)
        client.post("/api/reservations", json=order, headers=bearer("ann"))
    wanted = {"seat_ids": [*house.seat_ids[:4], 2**63 - 1]}
    refused = client.post(path, json=wanted, headers=ADMIN)
    assert (refused.status_code, refused.json["unavailable_seats"]) == (409, [2**63 - 1])  # type: ignore[index]
    wanted = {"seat_ids": house.seat_ids[:4]}
    refused = client.post(path, json=wanted, headers=ADMIN)
    assert refused.json["unavailable_seats"] == [house.seat_ids[1], house.seat_ids[3]]  # type: ignore[index]
    assert "blocked" not in state(house, client).values()
    assert len(told(house)) == 1


def test_a_hold_that_ran_out_is_in_no_blocking_s_way(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[0])
    made = client.post("/api/reservations", json=order, headers=bearer("ann")).json
    assert made
    house.let_lapse(made["reservation_id"])
    seats = {"seat_ids": house.seat_ids[:1]}
    path = f"/api/performances/{house.performance_id}/block-seats"
    assert client.post(path, json=seats, headers=ADMIN).status_code == 200
    # A clock that was set back: the hold looks alive, but its seat is no longer its own.
    house.execute("UPDATE reservations SET expires_at = now() + interval '1 hour'")
    confirm = f"/api/reservations/{made['reservation_id']}/confirm"
    assert client.post(confirm, headers=bearer("ann")).status_code == 409
    assert state(house, client)[house.seat_ids[0]] == "blocked"


def test_a_blocking_waits_for_the_booking_that_is_under_way(house: House) -> None:
    seat_id = house.seat_ids[0]
    with (
        psycopg.connect(house.database.owner_url) as booking_,
        ThreadPoolExecutor(1) as pool,
        house.connect() as connection,
    ):
        booking_.execute(
            "UPDATE seats SET claimed_until = 'infinity', reservation_id = gen_random_uuid()"
            " WHERE seat_id = %s",
            (seat_id,),
        )
        done = pool.submit(catalogue_changes.block, connection, house.performance_id, [seat_id])
        wait_until(lambda: waiters(house), 10, "the blocking to wait")
        booking_.commit()
        with pytest.raises(Problem) as refused:
            done.result(timeout=10)
    assert refused.value.members["unavailable_seats"] == [seat_id]


def test_a_change_keeps_what_another_one_at_the_same_time_has_changed(house: House) -> None:
    with (
        psycopg.connect(house.database.owner_url) as other,
        ThreadPoolExecutor(1) as pool,
        house.connect() as connection,
    ):
        other.execute("UPDATE concerts SET venue = 'Elsewhere', version = version + 1")
        change = ConcertChange(title="Another evening")
        done = pool.submit(catalogue_changes.change_concert, connection, concert_id(house), change)
        wait_until(lambda: waiters(house), 10, "the change to wait")
        other.commit()
        changed = done.result(timeout=10)
    assert (changed.title, changed.venue) == ("Another evening", "Elsewhere")
    assert house.events("concert-catalogue")[-1]["data"]["version"] == 3


def test_changes_at_once_are_told_in_the_order_of_their_versions(house: House) -> None:
    changes, workers = 25, 4
    concert = concert_id(house)

    def work(number: int) -> None:
        dice = random.Random(number)  # noqa: S311 - repeatable
        with house.connect() as connection:
            for change in range(changes):
                seats = dice.sample(house.seat_ids, 3)
                match dice.randrange(4):
                    case 0:
                        title = ConcertChange(title=f"Evening {number} {change}")
                        catalogue_changes.change_concert(connection, concert, title)
                    case 1:
                        at = datetime.now(UTC) + timedelta(days=dice.randrange(40, 400))
                        times = PerformanceChange(starts_at=at)
                        catalogue_changes.change_performance(
                            connection, house.performance_id, times
                        )
                    case 2:
                        catalogue_changes.block(connection, house.performance_id, seats)
                    case _:
                        catalogue_changes.release(connection, house.performance_id, seats)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, number) for number in range(workers)]:
            done.result(timeout=60)
    events = told(house)  # 1, 2, 3 … in the order of the outbox
    assert len(events) > changes * workers / 2
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    for one, other in pairwise(events):
        assert one["data"] | {"version": 0} != other["data"] | {"version": 0}, "told twice"
    blocked = house.execute("SELECT count(*) AS n FROM seats WHERE blocked")[0]["n"]
    (performance,) = events[-1]["data"]["performances"]
    assert performance["sections"][0]["blocked"] == blocked


@pytest.mark.parametrize(
    ("change", "location"),
    [
        ({"title": ""}, "title"),
        ({"title": "a\u0000b"}, "title"),
        ({"venue": "x" * 201}, "venue"),
        ({"titel": "x"}, "titel"),
        ({"time_zone": "Asia/Seoul"}, "time_zone"),
    ],
)
def test_a_change_is_checked_like_a_new_concert(
    house: House, client: FlaskClient, change: dict[str, str], location: str
) -> None:
    path = f"/api/concerts/{concert_id(house)}"
    answer = client.patch(path, json=change, headers=ADMIN)
    assert answer.status_code == 422
    assert answer.json
    assert answer.json["errors"][0]["location"] == location
    assert len(told(house)) == 1


def test_a_sale_cannot_end_before_it_begins(house: House, client: FlaskClient) -> None:
    path = f"/api/performances/{house.performance_id}"
    answer = client.patch(path, json={"sales_close_at": "2020-01-01T00:00:00Z"}, headers=ADMIN)
    assert answer.status_code == 422
    assert answer.json
    assert "sales_close_at" in answer.json["errors"][0]["message"]


def test_a_hold_cannot_be_confirmed_once_the_sale_was_ended_but_given_back(
    house: House, client: FlaskClient
) -> None:
    ann = bearer("ann")
    order = house.order(*house.seat_ids[:1])
    hold = client.post("/api/reservations", json=order, headers=ann).headers["Location"]
    window = {"sales_open_at": "2020-01-01T00:00:00Z", "sales_close_at": "2020-01-02T00:00:00Z"}
    path = f"/api/performances/{house.performance_id}"
    assert client.patch(path, json=window, headers=ADMIN).status_code == 200
    for action in ("confirm", "extend"):
        refused = client.post(f"{hold}/{action}", headers=ann)
        assert refused.json
        assert (refused.status_code, refused.json["status"]) == (409, "held")
    assert client.post(f"{hold}/cancel", headers=ann).status_code == 200


def test_only_the_admin_changes_the_catalogue_and_only_what_there_is(
    house: House, client: FlaskClient
) -> None:
    seats = {"seat_ids": house.seat_ids[:1]}
    paths = [
        ("PATCH", "/api/concerts/{}", {}),
        ("PATCH", "/api/performances/{}", {}),
        ("POST", "/api/performances/{}/block-seats", seats),
        ("POST", "/api/performances/{}/release-seats", seats),
        ("POST", "/api/performances/{}/cancel", None),
    ]
    for method, path, body in paths:
        for headers, status in (({}, 401), (bearer("ann"), 403), (ADMIN, 404)):
            answer = client.open(path.format(10**6), method=method, json=body, headers=headers)
            assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")


def test_seats_are_blocked_and_released_on_the_command_line(house: House) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "reservation_service", "block-seats", *map(str, arguments)],
            env=os.environ | house.environment | {"TRACEPARENT": TRACEPARENT},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    one, other = house.seat_ids[:2]
    assert run(house.performance_id, one, other) == (0, "2 seats blocked\n", "")
    assert told(house)[-1]["traceparent"] == TRACEPARENT
    assert run(house.performance_id, one, "--release") == (0, "1 seats released\n", "")
    code, _, said = run(house.performance_id, one, 10**9)
    assert (code, len(said.splitlines())) == (1, 1)
    assert f"Seats: {10**9}" in said
    assert run(10**9, one)[0] == 1
    assert run(house.performance_id)[0] == 2
    assert len(told(house)) == 3
