"""The events that the service really writes hold the contracts in contracts/."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from reservation_service import expiry
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, concert

CONTRACTS = Path(__file__).parents[2] / "contracts"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((CONTRACTS / f"{name}-event.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def live(house: House, client: FlaskClient) -> dict[str, Any]:
    """Bring reservations through every state; return what became of each, by its id."""
    ends: dict[str, Any] = {}
    for number, actions in enumerate(["cancel", "confirm cancel", "expire", "confirm", ""]):
        order = house.order(*house.seat_ids[number * 2 : number * 2 + 2])
        answer = client.post("/api/reservations", json=order, headers=bearer("ann"))
        assert answer.json
        reservation_id = answer.json["reservation_id"]
        for action in actions.split():
            if action == "expire":
                house.let_lapse(reservation_id)
                with house.connect() as connection:
                    expiry.expire_batch(connection)
            else:
                path = f"/api/reservations/{reservation_id}/{action}"
                assert client.post(path, headers=bearer("ann")).status_code == 200
        path = f"/api/reservations/{reservation_id}"
        ends[reservation_id] = client.get(path, headers=bearer("ann")).json
    direct = house.order(house.seat_ids[15], confirm=True)
    answer = client.post("/api/reservations", json=direct, headers=bearer("ann"))
    ends[answer.json["reservation_id"]] = answer.json  # type: ignore[index]
    return ends


def test_reservation_events_hold_their_schema(house: House, client: FlaskClient) -> None:
    live(house, client)
    events = house.events()
    assert {event["type"].removeprefix("reservation.") for event in events} == {
        "held", "completed", "cancelled", "expired",
    }  # fmt: skip
    for event in events:
        validator("reservation").validate(event)


def test_concert_events_hold_their_schema(house: House) -> None:
    (event,) = house.events("concert-catalogue")
    validator("concert").validate(event)
    assert event["type"] == "concert.published"
    (performance,) = event["data"]["performances"]
    assert performance["sections"] == [
        {
            "section": "Parkett",
            "capacity": 20,
            "price_min": 5_000,
            "price_max": 5_000,
            "blocked": 0,
        }
    ]


def test_the_schema_refuses_what_is_no_event(house: House, client: FlaskClient) -> None:
    live(house, client)
    event = house.events()[0]
    for member in ("data", "subject", "time"):
        broken = {key: value for key, value in event.items() if key != member}
        with pytest.raises(jsonschema.ValidationError):
            validator("reservation").validate(broken)


def test_an_event_tells_the_whole_state_that_the_api_tells(
    house: House, client: FlaskClient
) -> None:
    ends = live(house, client)
    last: dict[str, Any] = {event["subject"]: event["data"] for event in house.events()}
    assert last.keys() == ends.keys()
    for reservation_id, shown in ends.items():
        data = last[reservation_id] | {"performance_id": house.performance_id}
        assert {name: data[name] for name in shown} == shown
    house.check()


def test_id_subject_key_and_headers_are_as_agreed(house: House, client: FlaskClient) -> None:
    order = house.order(house.seat_ids[0])
    headers = bearer("ann") | {"traceparent": TRACEPARENT}
    made = client.post("/api/reservations", json=order, headers=headers).json
    assert made
    path = f"/api/reservations/{made['reservation_id']}/confirm"
    client.post(path, headers=bearer("ann") | {"traceparent": "nonsense"})
    rows = house.execute("SELECT * FROM outbox WHERE topic = 'concert-reservation' ORDER BY id")
    assert [row["key"] for row in rows] == [made["reservation_id"]] * 2
    assert [row["payload"]["id"] for row in rows] == [
        f"{made['reservation_id']}:1", f"{made['reservation_id']}:2",
    ]  # fmt: skip
    kind = {"content-type": "application/cloudevents+json"}
    assert [row["headers"] for row in rows] == [kind | {"traceparent": TRACEPARENT}, kind]


def test_a_concert_s_event_is_written_with_it(house: House, client: FlaskClient) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}", "traceparent": TRACEPARENT}
    made = client.post("/api/concerts", json=concert(), headers=admin).json
    assert made
    row = house.execute("SELECT * FROM outbox ORDER BY id DESC LIMIT 1")[0]
    assert (row["topic"], row["key"]) == ("concert-catalogue", str(made["concert_id"]))
    assert row["headers"]["traceparent"] == TRACEPARENT
    assert row["payload"]["data"]["title"] == "Ein Abend mit Björk"
