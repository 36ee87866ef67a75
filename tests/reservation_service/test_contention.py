"""A hundred clients of a served service, one seat."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import House, bearer

CLIENTS = 100


def test_of_a_hundred_clients_who_want_the_same_seat_exactly_one_gets_it(
    house: House, serve: Serve
) -> None:
    served = serve()
    wanted = house.seat_ids[0]
    limits = httpx.Limits(max_connections=CLIENTS)
    with (
        httpx.Client(base_url=served.url, limits=limits, timeout=30) as http,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):

        def book(number: int) -> httpx.Response:
            # Everybody wants another second seat, so that locks meet in different sets.
            order = house.order(wanted, house.seat_ids[1 + number % 10], confirm=number % 2 == 0)
            return http.post("/api/reservations", json=order, headers=bearer(f"c{number}"))

        answers = list(pool.map(book, range(CLIENTS)))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: CLIENTS - 1}
    for answer in answers:
        if answer.status_code == 409:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert wanted in answer.json()["unavailable_seats"]
    assert len(house.events()) == 1
    house.check()
