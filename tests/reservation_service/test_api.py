"""The HTTP API: shapes, status codes, callers."""

import io
import time
from typing import Any

import jwt
import msgspec
import pytest
from flask.testing import FlaskClient

from reservation_service import expiry
from reservation_service.callers import make_token
from tests.reservation_service.conftest import MakeClient
from tests.reservation_service.house import ADMIN_TOKEN, SECRET_KEY, House, bearer, concert

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
NOBODY = "00000000-0000-7000-8000-000000000000"


def claims(**changes: Any) -> dict[str, Any]:
    known = {"aud": "reservation-service", "sub": "ann", "exp": int(time.time()) + 60} | changes
    return {name: value for name, value in known.items() if value is not None}


def signed(**changes: Any) -> str:
    return jwt.encode(claims(**changes), SECRET_KEY, algorithm="HS256")


def problem(answer: Any, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.data
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["type"] == kind
    body: dict[str, Any] = answer.json
    return body


def test_concerts_have_the_agreed_shape(client: FlaskClient) -> None:
    answer = client.get("/api/concerts").json
    assert answer
    (only,) = answer["items"]
    assert answer["next_cursor"] is None
    assert list(only) == ["concert_id", "title", "venue", "time_zone", "performances"]
    (performance,) = only["performances"]
    assert list(performance) == [
        "performance_id", "starts_at", "sales_open_at", "sales_close_at", "capacity", "status",
    ]  # fmt: skip
    assert performance["starts_at"].endswith("Z")
    assert (performance["capacity"], performance["status"]) == (20, "scheduled")
    assert client.get(f"/api/concerts/{only['concert_id']}").json == only


def test_seats_have_the_agreed_shape_and_say_what_became_of_them(
    house: House, client: FlaskClient
) -> None:
    held, reserved, blocked, lapsed, free = house.seat_ids[:5]
    house.execute("UPDATE seats SET blocked = true WHERE seat_id = %s", blocked)
    for order in (house.order(held), house.order(reserved, confirm=True), house.order(lapsed)):
        client.post("/api/reservations", json=order, headers=bearer("ann"))
    house.execute("UPDATE seats SET claimed_until = now() WHERE seat_id = %s", lapsed)
    answer = client.get(f"/api/performances/{house.performance_id}/seats").json
    assert answer
    assert answer["performance_id"] == house.performance_id
    assert answer["seats"][0] == {
        "seat_id": held, "section": "Parkett", "row": "A", "number": 1, "price": 5_000,
        "currency": "EUR", "status": "held",
    }  # fmt: skip
    shown = {seat["seat_id"]: seat["status"] for seat in answer["seats"]}
    assert [shown[seat] for seat in (held, reserved, blocked, lapsed, free)] == [
        "held", "reserved", "blocked", "available", "available",
    ]  # fmt: skip


def test_a_reservation_has_the_agreed_shape(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[1], house.seat_ids[0])
    answer = client.post("/api/reservations", json=order, headers=bearer("ann"))
    body = answer.json
    assert body
    assert list(body) == [
        "reservation_id", "status", "version", "performance_id", "customer_id", "seats",
        "amount", "currency", "expires_at",
    ]  # fmt: skip
    assert body["seats"][0] == {
        "seat_id": house.seat_ids[0], "section": "Parkett", "row": "A", "number": 1,
        "price": 5_000,
    }  # fmt: skip
    assert (body["status"], body["version"], body["amount"]) == ("held", 1, 10_000)
    assert body["expires_at"].endswith("Z")
    assert answer.headers["Location"] == f"/api/reservations/{body['reservation_id']}"
    assert client.get(answer.headers["Location"], headers=bearer("ann")).json == body


def test_the_hold_lasts_as_long_as_the_house_says(house: House, make_client: MakeClient) -> None:
    client = make_client(hold_seconds=30)
    client.post("/api/reservations", json=house.order(house.seat_ids[0]), headers=bearer("ann"))
    row = house.execute("SELECT expires_at - created_at AS hold FROM reservations")[0]
    assert row["hold"].total_seconds() == 30


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Basic YW5uOg==",
        "Bearer nonsense",
        f"Bearer {signed(exp=int(time.time()) - 1)}",
        f"Bearer {signed(exp=None)}",
        f"Bearer {signed(aud='somebody-else')}",
        f"Bearer {signed(aud=None)}",
        f"Bearer {signed(sub=None)}",
        f"Bearer {signed(sub='')}",
        f"Bearer {signed(sub='a b')}",
        f"Bearer {signed(sub='x' * 65)}",
        f"Bearer {signed()[:-2]}",
        f"Bearer {jwt.encode(claims(), '', algorithm='none')}",
        f"Bearer {jwt.encode(claims(), SECRET_KEY * 2, algorithm='HS512')}",
        f"Bearer {signed(exp='4102444800')}",
        f"Bearer {jwt.encode(claims(), 'another secret that is long enough', algorithm='HS256')}",
    ],
)
def test_no_caller_or_an_invalid_one_is_401(client: FlaskClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for call in (
        client.get("/api/reservations", headers=headers),
        client.post("/api/reservations", json={}, headers=headers),
        client.post(f"/api/reservations/{NOBODY}/cancel", headers=headers),
        client.post("/api/concerts", json={}, headers=headers),
    ):
        problem(call, 401, "unauthenticated")
        assert call.headers["WWW-Authenticate"] == "Bearer"


def test_a_customer_may_not_publish_and_the_admin_is_no_customer(
    house: House, client: FlaskClient
) -> None:
    problem(client.post("/api/concerts", json=concert(), headers=bearer("a")), 403, "forbidden")
    order = house.order(house.seat_ids[0])
    problem(client.post("/api/reservations", json=order, headers=ADMIN), 403, "forbidden")


def test_without_an_admin_token_there_is_no_admin(make_client: MakeClient) -> None:
    client = make_client(admin_token=None)
    problem(client.post("/api/concerts", json=concert(), headers=ADMIN), 401, "unauthenticated")


def test_another_s_reservation_does_not_exist(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[0])
    made = client.post("/api/reservations", json=order, headers=bearer("ann")).json
    assert made
    known = made["reservation_id"]
    for reservation_id in (known, NOBODY, "nonsense", known.upper(), f"{{{known}}}"):
        path = f"/api/reservations/{reservation_id}"
        caller = bearer("eve" if reservation_id == known else "ann")
        problem(client.get(path, headers=caller), 404, "not-found")
        for action in ("confirm", "cancel"):
            problem(client.post(f"{path}/{action}", headers=caller), 404, "not-found")
    listed = client.get("/api/reservations", headers=bearer("eve")).json
    assert listed == {"items": [], "next_cursor": None}


@pytest.mark.parametrize(
    "path",
    [
        "/api/concerts/9999", "/api/performances/9999/seats", "/api/nothing",
        "/api/concerts/99999999999999999999999", "/api/concerts/x",
    ],
)  # fmt: skip
def test_what_is_not_there_is_404(client: FlaskClient, path: str) -> None:
    problem(client.get(path), 404, "not-found")


def test_an_unknown_performance_is_404(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[0]) | {"performance_id": 9_999}
    call = client.post("/api/reservations", json=order, headers=bearer("ann"))
    problem(call, 404, "not-found")


def test_the_wrong_method_is_405(client: FlaskClient) -> None:
    answer = client.delete("/api/concerts")
    problem(answer, 405, "method-not-allowed")
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize("body", ["", "{", "nonsense", '{"a":1,}', b"\xff", "[" * 100_0])
def test_malformed_json_is_400(client: FlaskClient, body: str | bytes) -> None:
    answer = client.post("/api/reservations", data=body, headers=bearer("ann"))
    problem(answer, 400, "malformed-request")


@pytest.mark.parametrize(
    ("change", "location"),
    [
        ({"performance_id": "1"}, "performance_id"),
        ({"performance_id": True}, "performance_id"),
        ({"performance_id": 1.5}, "performance_id"),
        ({"performance_id": 0}, "performance_id"),
        ({"performance_id": 2**63}, "performance_id"),
        ({"seat_ids": []}, "seat_ids"),
        ({"seat_ids": [1, 1]}, "seat_ids"),
        ({"seat_ids": ["1"]}, "seat_ids.0"),
        ({"seat_ids": [0]}, "seat_ids.0"),
        ({"seat_ids": list(range(1, 12))}, "seat_ids"),
        ({"seat_ids": 1}, "seat_ids"),
        ({"confirm": "yes"}, "confirm"),
        ({"confirm": 1}, "confirm"),
        ({"confrim": True}, "confrim"),
    ],
)
def test_a_body_against_the_schema_is_422_with_errors(
    client: FlaskClient, change: dict[str, Any], location: str
) -> None:
    body = {"performance_id": 1, "seat_ids": [1]} | change
    answer = client.post("/api/reservations", json=body, headers=bearer("ann"))
    errors = problem(answer, 422, "invalid-body")["errors"]
    assert [error["location"] for error in errors] == [location]


def test_more_seats_than_a_request_may_have_is_422(house: House, make_client: MakeClient) -> None:
    client = make_client(max_seats_per_request=2)
    two, three = (house.order(*house.seat_ids[:count]) for count in (2, 3))
    refused = client.post("/api/reservations", json=three, headers=bearer("ann"))
    assert problem(refused, 422, "invalid-body")["errors"]
    assert client.post("/api/reservations", json=two, headers=bearer("ann")).status_code == 201


def test_more_seats_than_a_customer_may_have_is_409(house: House, make_client: MakeClient) -> None:
    client = make_client(max_seats_per_customer=2)
    three = house.order(*house.seat_ids[:3])
    call = client.post("/api/reservations", json=three, headers=bearer("ann"))
    problem(call, 409, "customer-limit")


def test_a_body_that_is_too_large_is_413(client: FlaskClient) -> None:
    body = b" " * 65_537
    problem(client.post("/api/reservations", data=body, headers=bearer("ann")), 413, "too-large")
    body = b" " * 4_194_305
    problem(client.post("/api/concerts", data=body, headers=ADMIN), 413, "too-large")


def test_a_chunked_body_that_is_too_large_is_413_however_it_begins(
    house: House, client: FlaskClient
) -> None:
    order = msgspec.json.encode(house.order(house.seat_ids[0]))
    answer = client.post(
        "/api/reservations",
        input_stream=io.BytesIO(order + b" " * 70_000),
        environ_overrides={"wsgi.input_terminated": True},
        headers=bearer("ann"),
    )
    problem(answer, 413, "too-large")
    assert house.events() == []


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=", "limit=1e1",
                                   "cursor=x", "cursor=eA==", "cursor=", "limit=-1"])  # fmt: skip
@pytest.mark.parametrize("path", ["/api/concerts", "/api/reservations"])
def test_a_malformed_limit_or_cursor_is_400(client: FlaskClient, path: str, query: str) -> None:
    problem(client.get(f"{path}?{query}", headers=bearer("ann")), 400, "malformed-request")


def test_lists_come_in_pages(house: House, client: FlaskClient) -> None:
    for seat_id in house.seat_ids[:5]:
        client.post("/api/reservations", json=house.order(seat_id), headers=bearer("ann"))
    client.post("/api/concerts", json=concert(), headers=ADMIN)
    for path, count in (("/api/reservations", 5), ("/api/concerts", 2)):
        whole = client.get(path, headers=bearer("ann")).json
        assert whole
        assert len(whole["items"]) == count
        found, query = [], "limit=1"
        while query:
            answer: Any = client.get(f"{path}?{query}", headers=bearer("ann")).json
            found += answer["items"]
            cursor = answer["next_cursor"]
            query = f"limit=1&cursor={cursor}" if cursor else ""
        assert found == whole["items"]


def test_a_published_concert_can_be_booked(client: FlaskClient) -> None:
    answer: Any = client.post("/api/concerts", json=concert(seats=3), headers=ADMIN)
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/api/concerts/{answer.json['concert_id']}"
    made: Any = client.get(answer.headers["Location"]).json
    assert made == answer.json
    performance_id = made["performances"][0]["performance_id"]
    seats: Any = client.get(f"/api/performances/{performance_id}/seats").json
    assert [seat["number"] for seat in seats["seats"]] == [1, 2, 3]
    order = {"performance_id": performance_id, "seat_ids": [seats["seats"][0]["seat_id"]]}
    assert client.post("/api/reservations", json=order, headers=bearer("a")).status_code == 201


def test_the_seat_of_another_performance_is_unavailable(house: House, client: FlaskClient) -> None:
    client.post("/api/concerts", json=concert(), headers=ADMIN)
    other = house.execute("SELECT max(seat_id) AS seat FROM seats")[0]["seat"]
    call = client.post("/api/reservations", json=house.order(other), headers=bearer("ann"))
    assert problem(call, 409, "seats-unavailable")["unavailable_seats"] == [other]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["title"], ""),
        (["title"], "a\u0000b"),
        (["title"], "x" * 201),
        (["time_zone"], "Mars/Olympus"),
        (["time_zone"], "../etc/passwd"),
        (["currency"], "eur"),
        (["currency"], "EUO"),
        (["performances"], []),
        (["performances", 0, "starts_at"], "tomorrow"),
        (["performances", 0, "starts_at"], "2027-01-01T20:00:00"),
        (["performances", 0, "starts_at"], "9999-12-31T23:59:59-12:00"),
        (["performances", 0, "sales_close_at"], "2020-01-01T00:00:00Z"),
        (["performances", 0, "sections", 0, "price"], -1),
        (["performances", 0, "sections", 0, "rows", 0, "seats"], 0),
        (["performances", 0, "sections", 0, "rows", 0, "seats"], "5"),
        (["performances", 0, "sections", 0, "rows"], [{"row": "A", "seats": 1}] * 2),
        (["extra"], 1),
    ],
)
def test_a_concert_against_the_schema_is_422(
    house: House, client: FlaskClient, path: list[Any], value: object
) -> None:
    body: Any = concert()
    target = body
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    before = len(house.events("concert-catalogue"))
    told = problem(client.post("/api/concerts", json=body, headers=ADMIN), 422, "invalid-body")
    assert not any(each["message"].startswith("Value error") for each in told["errors"])
    assert len(house.events("concert-catalogue")) == before


def test_a_concert_with_too_many_seats_is_422(client: FlaskClient) -> None:
    body = concert()
    rows = [{"row": str(number), "seats": 500} for number in range(201)]
    body["performances"][0]["sections"][0]["rows"] = rows
    assert problem(client.post("/api/concerts", json=body, headers=ADMIN), 422, "invalid-body")


def test_an_error_of_ours_is_a_500_without_a_stack_trace(house: House, client: FlaskClient) -> None:
    house.execute("DELETE FROM outbox_topics")
    order = house.order(house.seat_ids[0])
    call = client.post("/api/reservations", json=order, headers=bearer("ann"))
    body = problem(call, 500, "internal-error")
    assert set(body) == {"type", "title", "status", "detail"}
    assert "outbox" not in str(body)


def test_every_answer_has_security_headers(client: FlaskClient) -> None:
    for path in ("/", "/api/concerts", "/api/nothing", "/healthz", "/static/style.css"):
        with client.get(path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_token_is_what_the_contract_says() -> None:
    token = make_token("ann", SECRET_KEY, 60)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    decoded = jwt.decode(token, SECRET_KEY, algorithms=["HS256"], audience="reservation-service")
    assert decoded["sub"] == "ann"
    assert decoded["exp"] > time.time()


def test_more_writes_than_a_minute_may_have_are_429(house: House, make_client: MakeClient) -> None:
    client = make_client(writes_per_minute=2)
    order = house.order(house.seat_ids[0])

    def post(customer: str) -> Any:
        return client.post("/api/reservations", json=order, headers=bearer(customer))

    # A new minute may begin between two calls; then the count starts again.
    answers = [post("ann") for _ in range(6)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    problem(refused, 429, "too-many-writes")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert post("bob").status_code == 409, "another customer has his own count"
    assert len(house.events()) == 1
    house.execute("UPDATE write_counts SET minute = minute - interval '61 minutes'")
    with house.connect() as connection:
        assert expiry.forget_counts_batch(connection) >= 2
    assert post("ann").status_code == 409
