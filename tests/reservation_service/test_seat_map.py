"""The seats for who polls: a cheap 304 as long as they look the same, else all, compressed."""

import gzip
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from reservation_service import seat_map, sql
from tests.reservation_service.house import House, bearer


def seats(house: House, client: FlaskClient, etag: str | None = None, **more: str) -> TestResponse:
    headers = ({"If-None-Match": etag} if etag else {}) | more
    return client.get(f"/api/performances/{house.performance_id}/seats", headers=headers)


def hold(house: House, client: FlaskClient, number: int, *, confirm: bool = False) -> str:
    order = house.order(house.seat_ids[number], confirm=confirm)
    made: Any = client.post("/api/reservations", json=order, headers=bearer("ann")).json
    return str(made["reservation_id"])


def test_what_looks_the_same_is_not_sent_again(house: House, client: FlaskClient) -> None:
    first = seats(house, client)
    tag = first.headers["ETag"]
    again = seats(house, client, tag)
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["ETag"] == tag
    for known in (f'"other", {tag}', tag.removeprefix("W/"), "*"):
        assert seats(house, client, known).status_code == 304, known
    for answer in (first, again):
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["Vary"] == "Accept-Encoding"
    for unknown in ('"other"', "nonsense", 'W/""'):
        assert seats(house, client, unknown).status_code == 200, unknown


def test_every_change_of_a_seat_is_seen_at_once(house: House, client: FlaskClient) -> None:
    tags = [seats(house, client).headers["ETag"]]

    def changed(what: str) -> None:
        answer = seats(house, client, tags[-1])
        assert answer.status_code == 200, what
        tags.append(answer.headers["ETag"])

    held = hold(house, client, 0)
    changed("a hold")
    client.post(f"/api/reservations/{held}/extend", headers=bearer("ann"))
    assert seats(house, client, tags[-1]).status_code == 304, "an extension shows nowhere"
    client.post(f"/api/reservations/{held}/confirm", headers=bearer("ann"))
    changed("a confirmation")
    client.post(f"/api/reservations/{held}/cancel", headers=bearer("ann"))
    changed("a cancellation")
    assert tags[-1] == tags[0], "all are free again"
    house.execute("UPDATE seats SET blocked = true WHERE seat_id = %s", house.seat_ids[1])
    changed("a blocked seat")
    house.execute("UPDATE concerts SET version = version + 1")
    changed("another version of the concert")
    hold(house, client, 2)
    changed("a hold of another seat")
    assert len(set(tags)) == len(tags) - 1


def test_a_hold_that_runs_out_by_the_clock_alone_is_seen(house: House, client: FlaskClient) -> None:
    hold(house, client, 0)
    held = seats(house, client)
    # Nobody writes when a hold runs out: the test moves its deadline and puts the row's bytes of
    # "held" nowhere else.
    house.execute("UPDATE seats SET claimed_until = now() + '300 ms' WHERE reservation_id NOTNULL")
    assert seats(house, client, held.headers["ETag"]).status_code == 304
    house.execute("SELECT pg_sleep(0.4)")
    freed = seats(house, client, held.headers["ETag"])
    assert freed.status_code == 200
    assert {seat["status"] for seat in freed.json["seats"]} == {"available"}  # type: ignore[index]


def test_the_answer_is_compressed_for_who_can_read_that(house: House, client: FlaskClient) -> None:
    plain = seats(house, client)
    packed = seats(house, client, **{"Accept-Encoding": "br;q=1.0, gzip;q=0.5"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.data) == plain.data
    assert packed.headers["ETag"] == plain.headers["ETag"]
    for refusal in ("", "identity", "gzip;q=0", "br"):
        answer = seats(house, client, **{"Accept-Encoding": refusal})
        assert "Content-Encoding" not in answer.headers, refusal
        assert answer.data == plain.data


def test_a_body_never_comes_with_the_tag_of_another_state(
    house: House, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = seats(house, client)
    client.application.extensions["reservation-service"].seat_maps._bodies.clear()
    read_tag, held = seat_map.read_tag, list[str]()

    def read_tag_then_somebody_books(*arguments: Any) -> str:
        tag = read_tag(*arguments)
        if not held:
            held.append(hold(house, client, 0))
        return tag

    monkeypatch.setattr(seat_map, "read_tag", read_tag_then_somebody_books)
    other: Any = seats(house, client)
    monkeypatch.undo()
    assert other.json["seats"][0]["status"] == "held"
    client.post(f"/api/reservations/{held[0]}/cancel", headers=bearer("ann"))
    # Free again: who was shown the hold must not be told that nothing has changed.
    assert seats(house, client, other.headers["ETag"]).status_code == 200
    assert seats(house, client, free.headers["ETag"]).status_code == 304


def test_bodies_are_kept_up_to_a_bound(house: House, client: FlaskClient) -> None:
    maps = client.application.extensions["reservation-service"].seat_maps
    for number in range(seat_map.KEPT_BODIES + 2):
        hold(house, client, number)
        seats(house, client)
    assert len(maps._bodies) == seat_map.KEPT_BODIES


def test_a_performance_that_is_not_there_is_404(house: House, client: FlaskClient) -> None:
    house.execute("SELECT 1")
    answer = client.get("/api/performances/9999/seats", headers={"If-None-Match": "*"})
    assert answer.status_code == 404


def test_the_tag_of_a_hall_reads_that_hall_alone_however_many_there_are(house: House) -> None:
    house.execute(
        "INSERT INTO seats (performance_id, section, row, number, price) "
        "SELECT performance_id, 'x' || part, 'r', number, 1 FROM performances, "
        "generate_series(1, 100) AS part, generate_series(1, 500) AS number"
    )
    house.execute("INSERT INTO performances (concert_id, starts_at, sales_open_at, sales_close_at, "
                  "capacity) SELECT concert_id, starts_at, sales_open_at, sales_close_at, 20 "
                  "FROM performances")  # fmt: skip
    house.execute("INSERT INTO seats (performance_id, section, row, number, price) "
                  "SELECT max(performance_id), 's', 'r', generate_series(1, 20), 1 "
                  "FROM performances")  # fmt: skip
    house.execute("ANALYZE seats")
    small = house.execute("SELECT max(performance_id) AS id FROM performances")[0]["id"]
    statement = sql.READ_SEAT_STATES.replace("%(performance_id)s", str(small))
    plan = house.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
    top = plan[0]["QUERY PLAN"][0]["Plan"]
    assert top["Shared Hit Blocks"] + top["Shared Read Blocks"] < 30


def test_a_look_that_takes_too_long_is_503_and_says_when_to_ask_again(
    house: House, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(*_: object) -> str:
        raise TimeoutError

    monkeypatch.setattr(seat_map, "read_tag", too_slow)
    answer = seats(house, client)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
