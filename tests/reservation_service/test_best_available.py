"""Best available: which seats are the best, and who gets them when everybody asks at once."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import psycopg
import pytest
from flask.testing import FlaskClient

from reservation_service import best_available, booking, problems, sql
from reservation_service.best_available import Row, choose
from reservation_service.booking import Terms
from tests.reservation_service.conftest import MakeClient, Serve
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, concert
from tests.waiting import wait_until

CLIENTS = 40
TERMS = Terms(timedelta(minutes=10))


def row(section: int, behind: int, taken: str = "", seats: int = 9) -> Row:
    """A row of `seats`; ids are section, row and number as digits: 123 is section 1, row 2, seat 3.

    `taken` names the numbers that aren't free.
    """
    numbers = [number for number in range(1, seats + 1) if str(number) not in taken]
    free = [(number, section * 100 + (behind + 1) * 10 + number) for number in numbers]
    return Row(section, behind, (1 + seats) / 2, free)


@pytest.mark.parametrize(
    ("rows", "count", "best"),
    [
        ([row(1, 0), row(1, 1)], 1, [115]),
        ([row(1, 0), row(1, 1)], 3, [114, 115, 116]),
        ([row(1, 0), row(1, 1)], 2, [114, 115]),
        ([row(1, 0, "456"), row(1, 1)], 1, [113]),  # as good as 125, and nearer
        ([row(1, 0, "34567"), row(1, 1)], 2, [124, 125]),  # not at the edge of the first row
        ([row(1, 0, "5"), row(1, 1, "456")], 2, [113, 114]),
        ([row(1, 0, "2468"), row(2, 0)], 2, [214, 215]),  # together, though in the next section
        ([row(1, 0, "1357"), row(2, 0, "123456789")], 2, [118, 119]),
        ([row(1, 0, "2468"), row(2, 0, "2468")], 2, [115, 113]),  # split where it must be
        ([row(1, 0, "1256789"), row(2, 0, "45"), row(3, 0, "23456789")], 6, [216, 217, 218, 219,
                                                                            113, 114]),
        ([row(1, 0, "23456789"), row(2, 0, "2345678")], 5, [111, 211, 219]),  # all there is
        ([], 2, []),
    ],
)  # fmt: skip
def test_the_best_seats_are_together_in_front_and_in_the_middle(
    rows: list[Row], count: int, best: list[int]
) -> None:
    assert choose(rows, count) == best


def test_seats_that_others_have_in_hand_are_left_to_them() -> None:
    assert choose([row(1, 0)], 2, {115}) == [113, 114]
    assert choose([row(1, 0, seats=2)], 2, {111}) == [112]


def ask(client: FlaskClient, house: House, count: int, **more: Any) -> Any:
    path = f"/api/performances/{house.performance_id}/best-available"
    customer = more.pop("customer", "ann")
    headers = bearer(customer) | more.pop("headers", {})
    return client.post(path, json={"count": count} | more, headers=headers)


def test_it_answers_as_a_reservation_of_named_seats_does(house: House, client: FlaskClient) -> None:
    answer = ask(client, house, 2)
    assert answer.status_code == 201, answer.json
    location = answer.headers["Location"]
    assert location == f"/api/reservations/{answer.json['reservation_id']}"
    assert client.get(location, headers=bearer("ann")).json == answer.json
    assert (answer.json["status"], answer.json["version"]) == ("held", 1)
    assert [seat["number"] for seat in answer.json["seats"]] == [10, 11]
    confirmed = ask(client, house, 3, confirm=True).json
    assert confirmed["status"] == "confirmed"
    assert [seat["number"] for seat in confirmed["seats"]] == [7, 8, 9]
    house.check()


def test_blocked_and_taken_seats_are_not_the_best_and_lapsed_holds_are(
    house: House, client: FlaskClient
) -> None:
    house.execute("UPDATE seats SET blocked = number > 4")
    first = client.post(
        "/api/reservations", json=house.order(house.seat_ids[0]), headers=bearer("bob")
    )
    assert ask(client, house, 4).status_code == 409
    house.let_lapse(first.json["reservation_id"])  # type: ignore[index]
    assert [seat["number"] for seat in ask(client, house, 4).json["seats"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "status", "kind"),
    [
        (0, 422, "invalid-body"),
        (11, 422, "invalid-body"),
        ("2", 422, "invalid-body"),
        (True, 422, "invalid-body"),
    ],
)
def test_a_count_that_cannot_be_is_422(
    house: House, client: FlaskClient, count: Any, status: int, kind: str
) -> None:
    answer = ask(client, house, count)
    assert (answer.status_code, answer.json["type"]) == (status, kind)
    assert [error["location"] for error in answer.json["errors"]] == ["count"]


def test_what_cannot_be_had_is_refused_as_elsewhere(
    house: House, client: FlaskClient, make_client: MakeClient
) -> None:
    def refused(answer: Any) -> tuple[int, str]:
        return answer.status_code, answer.json["type"]

    assert refused(ask(make_client(max_seats_per_customer=1), house, 2)) == (409, "customer-limit")
    assert ask(client, house, 10).status_code == 201
    assert ask(client, house, 9).status_code == 201
    answer = ask(client, house, 2)
    assert refused(answer) == (409, "seats-unavailable")
    assert answer.json["unavailable_seats"] == []
    house.execute("UPDATE performances SET status = 'cancelled'")
    assert refused(ask(client, house, 1)) == (409, "not-on-sale"), "some are free"
    assert refused(ask(client, house, 2)) == (409, "not-on-sale"), "too few are free"
    nowhere = "/api/performances/9999/best-available"
    assert refused(client.post(nowhere, json={"count": 1}, headers=bearer("a")))[0] == 404
    assert refused(client.post(nowhere, json={"count": 1}))[0] == 401


def test_a_retry_gets_the_same_seats_even_when_they_were_the_last(
    house: House, make_client: MakeClient
) -> None:
    client = make_client(max_seats_per_request=20)
    key = {"Idempotency-Key": "k"}
    first, again = (ask(client, house, 20, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.data == first.data
    assert again.headers["Idempotency-Replayed"] == "true"
    assert ask(client, house, 2, headers=key).status_code == 422
    client.post("/api/concerts", json=concert(), headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
    other = house.execute("SELECT max(performance_id) AS id FROM performances")[0]["id"]
    path = f"/api/performances/{other}/best-available"
    answer = client.post(path, json={"count": 20}, headers=bearer("ann") | key)
    assert answer.status_code == 422, "the same key for another performance"


def test_it_waits_for_the_last_seats_while_they_are_in_somebody_s_hands(
    house: House, client: FlaskClient
) -> None:
    with psycopg.connect(house.database.owner_url) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT 1 FROM seats FOR UPDATE")
        call = pool.submit(ask, client, house, 10)
        wait_until(lambda: house.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 10, "it")
        other.rollback()
        assert call.result(timeout=10).status_code == 201
    locks = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"
    assert house.execute(locks) == [], "nothing is announced any more"


def test_an_announcement_ends_with_its_call_whatever_becomes_of_it(
    house: House, client: FlaskClient
) -> None:
    house.execute("DELETE FROM outbox_topics")
    assert ask(client, house, 2).status_code == 500
    assert house.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == []


def test_who_is_always_too_late_is_told_to_come_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object) -> None:
        raise problems.seats_unavailable([house.seat_ids[0]])

    monkeypatch.setattr(booking, "book", too_late)
    monkeypatch.setattr(best_available, "GIVE_UP_AFTER_S", 0.2)
    wanted = best_available.Wanted("ann", house.performance_id, 20, confirm=False)
    with house.connect() as connection, pytest.raises(problems.Problem) as caught:
        best_available.book(connection, wanted, TERMS)
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})


@pytest.mark.parametrize("each", [2, 1])
def test_clients_at_once_get_different_seats_as_long_as_there_are_enough(
    house: House, serve: Serve, each: int
) -> None:
    served = serve()
    path = f"{served.url}/api/performances/{house.performance_id}/best-available"

    def book(number: int) -> httpx.Response:
        body = {"count": each, "confirm": number % 2 == 0}
        return http.post(path, json=body, headers=bearer(f"c{number}"))

    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(limits=limits, timeout=30) as http, ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(book, range(CLIENTS)))
    places = len(house.seat_ids) // each
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {201: places, 409: CLIENTS - places}
    given = [
        seat["seat_id"]
        for answer in answers
        if answer.status_code == 201
        for seat in answer.json()["seats"]
    ]
    assert sorted(given) == house.seat_ids
    house.check()


def test_the_plan_s_order_is_what_the_admin_published(house: House, client: FlaskClient) -> None:
    body: Any = concert()
    body["performances"][0]["sections"] = [
        {"section": section, "price": 1, "rows": [{"row": row, "seats": 3} for row in "BAC"]}
        for section in ["Z", "Y"]
    ]
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    made: Any = client.post("/api/concerts", json=body, headers=admin).json
    performance_id = made["performances"][0]["performance_id"]
    with house.connect() as connection:
        rows = best_available.read_rows(connection, performance_id)
    assert [(row.section, row.rows_behind) for row in rows] == [
        (section, row) for section in (1, 2) for row in range(3)
    ]
    names = "SELECT section, row, number FROM seats WHERE seat_id = %s"
    assert house.execute(names, choose(rows, 1)[0]) == [{"section": "Z", "row": "B", "number": 2}]


def test_seats_that_somebody_is_about_to_book_are_left_to_him_while_there_are_others(
    house: House, client: FlaskClient
) -> None:
    best = [seat["seat_id"] for seat in ask(client, house, 2).json["seats"]]
    house.execute("UPDATE seats SET reservation_id = NULL, claimed_until = NULL")
    with house.connect() as other:
        other.execute(sql.ANNOUNCE_SEATS, {"seat_ids": best})
        given = [seat["seat_id"] for seat in ask(client, house, 2).json["seats"]]
        assert set(given).isdisjoint(best)
        # He may think better of it: the last seats are not refused because of him.
        for _ in range(2):
            assert ask(client, house, 8).status_code == 201
        assert ask(client, house, 2).status_code == 201


def test_a_connection_whose_announcements_cannot_be_taken_back_is_closed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "UNANNOUNCE_SEATS", "SELECT 1 / 0 WHERE %(seat_ids)s IS NOT NULL")
    wanted = best_available.Wanted("ann", house.performance_id, 2, confirm=False)
    with house.connect() as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            best_available.book(connection, wanted, TERMS)
        assert connection.closed
    gone = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory')"
    wait_until(lambda: house.execute(gone), 10, "the announcement to end with its session")
