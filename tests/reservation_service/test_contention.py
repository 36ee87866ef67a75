"""Many customers of a served service want the same: one seat, or all seats of a hall."""

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks import bookers
from benchmarks.bookers import HOST, Spec
from benchmarks.crowd import Answer, Client, Crowd, at_once, request
from tests.databases import ReservationDatabase
from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import SECRET_KEY, House, bearer, open_house

CLAIMS = 300
FANS, SEATS = 250, 100
TIMEOUT_S = 60.0


@pytest.fixture
def hall(reservation_database: ReservationDatabase) -> Any:
    with open_house(reservation_database, SEATS) as opened:
        yield opened


def test_of_all_who_want_the_same_seat_at_once_exactly_one_gets_it(
    house: House, serve: Serve
) -> None:
    served = serve()
    wanted = house.seat_ids[0]
    answers: list[Answer] = []

    def claim(number: int) -> Client:
        # Everybody wants another second seat, so that locks meet in different sets.
        order = house.order(wanted, house.seat_ids[1 + number % 10], confirm=number % 2 == 0)
        body = json.dumps(order)
        answer = yield request("POST", "/api/reservations", bearer(f"c{number}"), body)
        answers.append(answer)

    clients = [claim(number) for number in range(CLAIMS)]
    Crowd((HOST, served.port), CLAIMS).run(at_once(clients), TIMEOUT_S)
    assert Counter(answer.status for answer in answers) == {201: 1, 409: CLAIMS - 1}
    for answer in answers:
        if answer.status == 409:
            assert b"application/problem+json" in answer.head
            assert wanted in json.loads(answer.body)["unavailable_seats"]
    assert len(house.events()) == 1
    house.check()


def test_a_hall_that_more_people_want_than_it_has_seats_is_sold_out_and_no_seat_twice(
    hall: House, serve: Serve
) -> None:
    served = serve()
    spec = Spec(
        "fans", served.port, SECRET_KEY, lines=FANS, seconds=2, performance_id=hall.performance_id
    )
    figure = bookers.run(spec)
    assert set(map(int, figure["answers"])) <= {200, 201, 409}, figure["refusals"]
    ends = figure["ends"]
    assert ends["booked"] + ends["sold out"] == FANS
    sold = hall.execute("SELECT 1 FROM seats WHERE claimed_until = 'infinity'")
    # One may be left over, where each of the last wanted two.
    assert len(sold) == ends["seats booked"] >= SEATS - 1
    hall.check()
