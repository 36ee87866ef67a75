"""A database that is frozen, not gone: nothing it says or closes tells the service so."""

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.conftest import MakePostgresServer
from tests.databases import create_reservation_database
from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import bearer, is_ready, open_house
from tests.waiting import wait_until

# Far above the bounds of the service, and far below "for ever".
ANSWER_TIMEOUT_S = 25.0
THREADS = 8


def test_a_frozen_database_is_a_503_in_bounded_time_and_no_end(
    make_postgres_server: MakePostgresServer, serve: Serve
) -> None:
    server = make_postgres_server()
    with open_house(create_reservation_database(server)) as house:
        served = serve("--workers", "1", env=house.environment)
        url = f"{served.url}/api/reservations"

        def book(seat_id: int) -> httpx.Response:
            order = house.order(seat_id)
            return httpx.post(url, json=order, headers=bearer("ann"), timeout=ANSWER_TIMEOUT_S)

        assert book(house.seat_ids[0]).status_code == 201
        server.pause()
        try:
            with ThreadPoolExecutor(THREADS + 1) as pool:
                calls = [pool.submit(book, seat_id) for seat_id in house.seat_ids[1 : THREADS + 1]]
                health = pool.submit(httpx.get, f"{served.url}/healthz", timeout=ANSWER_TIMEOUT_S)
                answers = [call.result() for call in calls]
                assert health.result().status_code == 200
        finally:
            server.resume()
        told = {(answer.status_code, answer.headers["Retry-After"]) for answer in answers}
        assert told == {(503, "1")}
        wait_until(lambda: is_ready(served.url), 40, "the service to find the database again")
        assert book(house.seat_ids[-1]).status_code == 201
        house.check()
