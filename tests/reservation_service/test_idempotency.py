"""Idempotency-Key: one reservation for one key, whatever breaks in between."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest
from flask.testing import FlaskClient

from reservation_service import expiry
from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, concert, is_ready
from tests.reservation_service.swallowing_proxy import SwallowingProxy
from tests.waiting import wait_until

THREADS = 20


def headers(key: str, customer: str = "ann") -> dict[str, str]:
    return bearer(customer) | {"Idempotency-Key": key}


def test_the_same_key_from_twenty_threads_makes_one_reservation(house: House, serve: Serve) -> None:
    served = serve()
    order = house.order(*house.seat_ids[:2])

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{served.url}/api/reservations", json=order, headers=headers("k"))

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(post, range(THREADS)))
    created = [answer for answer in answers if answer.status_code == 201]
    others = [answer for answer in answers if answer.status_code != 201]
    assert len({answer.text for answer in created}) == 1
    assert len({answer.headers["Location"] for answer in created}) == 1
    replayed = [answer.headers.get("Idempotency-Replayed") for answer in created]
    assert sorted(replayed, key=str) == [None, *["true"] * (len(created) - 1)]
    for answer in others:
        assert (answer.status_code, answer.headers["Retry-After"]) == (409, "1")
    assert len(house.execute("SELECT 1 FROM reservations")) == 1
    house.check()


def test_a_retry_after_a_crash_between_commit_and_answer_gets_the_same_reservation(
    house: House, serve: Serve
) -> None:
    served = serve()
    order = house.order(*house.seat_ids[:2], confirm=True)
    with SwallowingProxy(served.port) as proxy, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{proxy.port}/api/reservations"
        call = pool.submit(httpx.post, url, json=order, headers=headers("k"), timeout=20)
        proxy.wait_swallowed()
        served.process.kill()
        with pytest.raises(httpx.TransportError):
            call.result(timeout=20)
    committed = house.execute("SELECT reservation_id::text AS id FROM reservations")
    assert len(committed) == 1
    restarted = serve()
    wait_until(lambda: is_ready(restarted.url), 20, "the restarted service")
    answer = httpx.post(f"{restarted.url}/api/reservations", json=order, headers=headers("k"))
    assert answer.status_code == 201
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert answer.json()["reservation_id"] == committed[0]["id"]
    assert len(house.events()) == 1


def test_a_key_in_flight_is_told_to_come_back(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[0])
    with psycopg.connect(house.database.owner_url) as other:
        other.execute(
            "INSERT INTO idempotency_keys (caller, operation, key, fingerprint, created_at) "
            "VALUES ('ann', 'reserve', 'k', '', now())"
        )
        answer = client.post("/api/reservations", json=order, headers=headers("k"))
        other.rollback()
    assert (answer.status_code, answer.headers["Retry-After"]) == (409, "1")
    assert client.post("/api/reservations", json=order, headers=headers("k")).status_code == 201


def test_the_same_key_with_another_body_is_refused(house: House, client: FlaskClient) -> None:
    first, second = (house.order(seat_id) for seat_id in house.seat_ids[:2])
    assert client.post("/api/reservations", json=first, headers=headers("k")).status_code == 201
    answer = client.post("/api/reservations", json=second, headers=headers("k"))
    assert (answer.status_code, answer.json["type"]) == (422, "key-reused")  # type: ignore[index]


def test_a_refused_request_leaves_nothing_and_its_key_is_free(
    house: House, client: FlaskClient
) -> None:
    seat, other = house.seat_ids[:2]
    client.post("/api/reservations", json=house.order(seat), headers=bearer("bob"))
    taken = client.post("/api/reservations", json=house.order(seat), headers=headers("k"))
    assert taken.status_code == 409
    assert house.execute("SELECT 1 FROM idempotency_keys") == []
    free = client.post("/api/reservations", json=house.order(other), headers=headers("k"))
    assert free.status_code == 201


def test_keys_of_other_callers_and_operations_are_other_keys(
    house: House, client: FlaskClient
) -> None:
    seat_ids = house.seat_ids[:2]
    for customer, seat_id in zip(["ann", "admin"], seat_ids, strict=True):
        order = house.order(seat_id)
        answer = client.post("/api/reservations", json=order, headers=headers("k", customer))
        assert (answer.status_code, answer.headers.get("Idempotency-Replayed")) == (201, None)
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Idempotency-Key": "k"}
    bodies = [concert(), concert(seats=3)]
    made = [client.post("/api/concerts", json=body, headers=admin) for body in bodies]
    assert [answer.status_code for answer in made] == [201, 422]
    again = concert()
    one, two = (
        client.post("/api/concerts", json=again, headers=admin | {"Idempotency-Key": "again"})
        for _ in range(2)
    )
    assert one.data == two.data
    assert two.headers["Idempotency-Replayed"] == "true"


def test_a_key_counts_for_a_day(house: House, client: FlaskClient) -> None:
    def book(seat_id: int) -> str | None:
        answer = client.post("/api/reservations", json=house.order(seat_id), headers=headers("k"))
        assert answer.status_code == 201, answer.json
        return answer.headers.get("Idempotency-Replayed")

    def age(interval: str) -> None:
        house.execute("UPDATE idempotency_keys SET created_at = now() - %s::interval", interval)

    first, second = house.seat_ids[:2]
    assert book(first) is None
    age("23 hours 59 minutes")
    with house.connect() as connection:
        assert expiry.forget_keys_batch(connection) == 0
    assert book(first) == "true"
    age("24 hours")
    assert book(second) is None, "it is forgotten before the sweeper comes by"
    age("24 hours")
    with house.connect() as connection:
        assert expiry.forget_keys_batch(connection) == 1


def test_what_counts_is_what_the_body_says_not_how_it_is_spaced(
    house: House, client: FlaskClient
) -> None:
    order = house.order(house.seat_ids[0])
    order.pop("confirm")
    turned = dict(reversed(order.items())) | {"confirm": False}
    bodies = [json.dumps(order, separators=(",", ":")), json.dumps(turned, indent=4)]
    answers = [client.post("/api/reservations", data=body, headers=headers("k")) for body in bodies]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].data == answers[1].data


@pytest.mark.parametrize("key", ["", "x" * 256, "smörgås", "tab\tbed"])
def test_a_key_that_is_no_printable_ascii_is_malformed(
    house: House, client: FlaskClient, key: str
) -> None:
    order = house.order(house.seat_ids[0])
    sent = bearer("ann") | {"Idempotency-Key": key}
    assert client.post("/api/reservations", json=order, headers=sent).status_code == 400
